"""The guards that a SQL template holds, read out by machine, and what takes each of them away.

A guard is one thing whose absence leaves SQL that still runs: an operand of a condition, a statement that raises,
writes or calls, a lock, the order of locks, `on conflict do nothing`, `security definer`, a pinned search_path.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources

from mutants.conditions import operands
from mutants.tokens import Group, Node, Token, tree

TEMPLATES = (
    *("posting", "mapping", "fence", "capture", "guard", "batches"),
    *("reconcile", "retired", "windows", "snapshots", "undo", "ledger"),
)
"""The templates whose SQL writes. `verify`, `snapshot_checks` and `overview` only read."""

_PLACE = re.compile(
    r"create (?:or replace )?(?:function|procedure) \{\{ schema \}\}\.(\w+?)(?:_?\{\{ mapping \}\})?\("
    r"|\{%-? macro (\w+)\(|\{%-? endmacro|^\$\$;",
    re.MULTILINE,
)
_CLAUSES = {
    "definer": re.compile(r"^security definer$", re.MULTILINE),
    "pin": re.compile(r"^set search_path = .*$", re.MULTILINE),
    "plan": re.compile(r"^set (?:enable_seqscan|plan_cache_mode) = .*$", re.MULTILINE),
    "unique": re.compile(r"create unique index|^    unique \(.*\)(?=\n)", re.MULTILINE),
    "trigger": re.compile(r"^create (?:constraint )?trigger [^;]*;", re.MULTILINE),
    "always": re.compile(r"^alter table \{\{ schema \}\}\.\w+ enable always trigger \w+;", re.MULTILINE),
}
_STATEMENTS = ("raise", "perform", "insert", "update", "delete", "lock", "with")
_OPENS = (";", "then", "else", "begin", "loop")
_LONGEST = 110


@dataclass(frozen=True)
class Guard:
    """``source[start:end]`` of a template is it; ``replacement`` is put there. ``name`` is its own in the place.

    ``place`` is "template.function". ``kind``: operand, statement, clause. ``literal`` of an operand is its mutant.
    """

    template: str
    place: str
    name: str
    kind: str
    start: int
    end: int
    replacement: str
    literal: str = ""

    @property
    def id(self) -> str:
        """Its name among all guards."""
        return f"{self.place}: {self.name}"

    def mutated(self, source: str) -> str:
        """The template without the guard."""
        return source[: self.start] + self.replacement + source[self.end :]


def template(name: str) -> str:
    """The text of a template as it stands in the package."""
    return (resources.files("walletmigrate") / "sql" / f"{name}.sql").read_text(encoding="utf-8")


@cache
def all_guards() -> dict[str, Guard]:
    """Every guard of every template, by its id, in the order in which they stand."""
    return {guard.id: guard for name in TEMPLATES for guard in guards(name, template(name))}


def guards(name: str, source: str) -> list[Guard]:
    """The guards of one template. Those that read alike in one function are numbered from the second on."""
    places = [(match.start(), match[1] or match[2] or "") for match in _PLACE.finditer(source)]
    seen: Counter[str] = Counter()
    found = []
    for guard in sorted(_read(name, source), key=lambda g: (g.start, g.end)):
        place = next((function for start, function in reversed(places) if start <= guard.start), "")
        named = replace(guard, place=f"{name}.{place or 'schema'}", name=_words(guard.name))
        seen[named.id] += 1
        found.append(replace(named, name=f"{named.name} ({seen[named.id]})") if seen[named.id] > 1 else named)
    return found


def _words(text: str) -> str:
    """One line; what is too long ends in a digest of the rest."""
    text, arrow, mutant = re.sub(r"--[^\n]*", "", text).rpartition(" → ")
    text = " ".join(re.sub(r"\{%.*?%\}|\{#.*?#\}", " ", text, flags=re.DOTALL).split())
    if len(text) > _LONGEST:
        text = f"{text[:_LONGEST]}… {hashlib.sha256(text.encode()).hexdigest()[:6]}"
    return text + arrow + mutant


def _read(name: str, source: str) -> Iterator[Guard]:
    def made(kind: str, start: int, end: int, replacement: str, mutant: str = "", literal: str = "") -> Guard:
        return Guard(name, "", f"{source[start:end]} → {mutant or 'removed'}", kind, start, end, replacement, literal)

    root = tree(source)
    for operand in operands(root):
        if source[operand.start : operand.end] != operand.literal:
            yield made("operand", operand.start, operand.end, operand.literal, operand.literal, operand.literal)
    for start, end in _statements(root):
        yield made("statement", start, end, "null")
    for start, end in _locks(root):
        yield made("clause", start, end, "")
    for kind, pattern in _CLAUSES.items():
        for match in pattern.finditer(source):
            yield made("clause", *match.span(), _without(kind, match.group()))


def _without(kind: str, clause: str) -> str:
    """What is left of a clause: a trigger that never fires and an index that is not unique can still be named."""
    if kind == "trigger":
        return clause.replace("execute function", "when (false) execute function")
    if kind == "unique":
        return "check (true)" if clause.startswith(" ") else "create index"
    return ""


def _statements(group: Group) -> Iterator[tuple[int, int]]:
    """Statements of PL/pgSQL that do something, each without its semicolon."""
    inside = group.text != ""
    for index, node in enumerate(group.nodes):
        if isinstance(node, Group):
            yield from _statements(node)
            continue
        before = group.nodes[index - 1] if index else Token("jinja", "", 0, 0)
        if inside or node.text not in _STATEMENTS or (before.text not in _OPENS and before.kind != "jinja"):
            continue
        if (node.text == "perform" and group.nodes[index + 1].text == "1") or not _in_body(group, index):
            continue  # `perform 1` is there for its lock alone
        if node.text == "with" and not _inserts(group.nodes[index + 3]):
            continue
        yield node.start, _end_of(group.nodes, index)


def _inserts(part: Node) -> bool:
    """Whether a part of a WITH is an INSERT, as where two rows are one statement's."""
    return isinstance(part, Group) and bool(part.nodes) and part.nodes[0].text == "insert"


def _in_body(group: Group, index: int) -> bool:
    """Whether the node stands in a function's or a macro's body, not among the definitions of tables."""
    before = [node.text for node in group.nodes[:index]]
    return before.count("$$") % 2 == 1 or "table" not in before


def _end_of(nodes: list[Node], index: int) -> int:
    for before, node in zip(nodes[index:], nodes[index + 1 :], strict=False):
        if node.text == ";":
            return before.end
    raise ValueError(f"a statement at {nodes[index].start} does not end")


def _locks(group: Group) -> Iterator[tuple[int, int]]:
    """Locks, what orders them and inserted keys, and `on conflict do nothing`."""
    nodes = group.nodes
    ordered: int | None = None
    for index, node in enumerate(nodes):
        if isinstance(node, Group):
            yield from _locks(node)
            continue
        words = [n.text for n in nodes[index : index + 6]]
        if node.text in (";", "loop", "limit"):
            ordered = None
        elif words[:2] == ["order", "by"]:
            ordered = index
        elif words[0] == "for" and (words[1:4] == ["no", "key", "update"] or words[1:2] in (["update"], ["share"])):
            last = index + (3 if words[1] == "no" else 1)
            if [n.text for n in nodes[last + 1 : last + 2]] == ["of"]:
                last += 2
            yield node.start, nodes[last].end
            if ordered is not None:
                yield nodes[ordered].start, nodes[index - 1].end
        elif words[:2] == ["on", "conflict"] and "nothing" in words[2:5]:
            last = index + words.index("nothing")
            yield node.start, nodes[last].end
            if ordered is not None:
                yield nodes[ordered].start, nodes[index - 1].end
