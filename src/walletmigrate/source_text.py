"""Files that are not Python: SQL scripts, templates, shell and other text, read by pattern."""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import Final

from walletmigrate.findings import Access, Finding, Ignores, Wanted, shortened
from walletmigrate.source_sql import Side, Touch, read_sql
from walletmigrate.source_tokens import statements_in

SQL_SUFFIXES: Final = frozenset({".sql", ".psql", ".pgsql", ".ddl", ".dml", ".plpgsql"})
_PROSE: Final = frozenset({".md", ".rst", ".txt", ".adoc", ".po", ".pot", ".log"})
_EXPRESSION = re.compile(r"\{\{.*?\}\}|\{%.*?%\}|\$\{.*?\}|<%.*?%>|^\s*%\s.*?$", re.DOTALL | re.MULTILINE)


def read_text_file(path: str, text: str, wanted: Wanted, names: dict[str, str]) -> list[Finding]:
    """What a text does to one mapped table: its statements, expressions of templates, and bare mentions.

    ``names`` are the names under which a template may have the columns. Mentions that are none of these are one
    finding for the whole file; in prose they are none, and a name of one word needs the table's beside it.
    """
    suffix = PurePath(path.lower().removesuffix(".j2").removesuffix(".jinja")).suffix
    lines = text.splitlines()
    ignores = Ignores.of(lines)
    touches = _sql(text, suffix, wanted)
    covered = {_line(text, touch.offset) for touch in touches}
    if suffix not in SQL_SUFFIXES:
        touches += [each for each in _expressions(text, names) if _line(text, each.offset) not in covered]
    found = []
    for touch in touches:
        at = _line(text, touch.offset)
        covered.add(at)
        found.append(_finding(path, at, touch, wanted, lines, ignores))
    telling = {one: one for one in wanted.columns if "_" in one or any(name in text for name in wanted.names)}
    if telling and suffix not in SQL_SUFFIXES | _PROSE:
        found += _mentions(path, lines, wanted, telling, covered, ignores)
    return list(dict.fromkeys(found))


def read_body(text: str, wanted: Wanted, language: str, row: Side) -> list[tuple[int, Touch]]:
    """What the body of a database function does, with lines: SQL and PL/pgSQL whole, other languages by statement."""
    if language in {"sql", "plpgsql"}:
        return [(_line(text, touch.offset), touch) for touch in read_sql(text, wanted, row=row)]
    return [(_line(text, touch.offset), touch) for touch in _statements(text, wanted)]


def _sql(text: str, suffix: str, wanted: Wanted) -> list[Touch]:
    return read_sql(text, wanted) if suffix in SQL_SUFFIXES else _statements(text, wanted)


def _statements(text: str, wanted: Wanted) -> list[Touch]:
    low = text.lower()
    if not any(name.lower() in low for name in (*wanted.names, *wanted.columns)):
        return []
    found: list[Touch] = []
    for offset, statement in statements_in(text):
        # A quote that is open before the statement ends it, or would hide the rest of it.
        plain = statement.replace('"', " ") if statement.count('"') % 2 else statement
        plain = plain.replace("'", " ") if plain.count("'") % 2 else plain
        # In prose and data, what merely looks like a statement names no table that is known.
        known = [each for each in read_sql(plain, wanted) if each.sure or each.access == "write"]
        found += [each._replace(offset=each.offset + offset) for each in known]
    return found


def _expressions(text: str, names: dict[str, str]) -> list[Touch]:
    """Columns inside the expressions of a template."""
    found = []
    pattern = _any_of(names)
    for match in _EXPRESSION.finditer(text):
        for hit in pattern.finditer(match[0]):
            offset = match.start() + hit.start()
            found.append(Touch(offset, names[hit[0]], "read", "expression of a template", False))
    return found


def _mentions(
    path: str, lines: list[str], wanted: Wanted, telling: dict[str, str], covered: set[int], ignores: Ignores
) -> list[Finding]:
    pattern = _any_of(telling)
    hits = [
        (number, match[0])
        for number, line in enumerate(lines, 1)
        if number not in covered and (match := pattern.search(line))
    ]
    if not hits:
        return []
    at, column = hits[0]
    how = "mention" if len(hits) == 1 else f"{len(hits)} mentions, the first here"
    touch = Touch(0, column, "unknown", how, False)
    return [_finding(path, at, touch, wanted, lines, ignores)]


def _finding(path: str, at: int, touch: Touch, wanted: Wanted, lines: list[str], ignores: Ignores) -> Finding:
    access: Access = touch.access
    code = shortened(lines[at - 1]) if at <= len(lines) else ""
    reason = ignores.reason(at, at)
    return Finding(
        "text", path, at, access, wanted.mapping, touch.column, "", touch.how, code, touch.sure, False, reason
    )


def _any_of(names: dict[str, str]) -> re.Pattern[str]:
    words = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    return re.compile(rf"(?<![\w-])(?:{words})(?![\w-])")


def _line(text: str, offset: int) -> int:
    return text.count("\n", 0, offset) + 1
