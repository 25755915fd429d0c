"""The command that catalogues code paths: as a table, a check-list, or JSON."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from walletmigrate.commands import command
from walletmigrate.console import DIFFERENCE, OK, Answer, plain
from walletmigrate.discover import discover as look_for
from walletmigrate.errors import UsageError
from walletmigrate.findings import Catalogue, Finding
from walletmigrate.invocation import Run, period


class Form(StrEnum):
    """How the catalogue is printed."""

    TABLE = "table"
    MARKDOWN = "markdown"


def register(app: typer.Typer) -> None:
    """Add the command."""
    command(app, "discover")(discover)


def discover(
    run: Run,
    source: Annotated[list[Path], typer.Option(help="A folder of sources, or a file. Can be repeated.")],
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="Paths to leave out, such as 'tests/*'. Can be repeated.")
    ] = None,
    no_database: Annotated[bool, typer.Option("--no-database", help="Look at the sources alone.")] = False,
    since: Annotated[str | None, typer.Option(metavar="7d", help="Writes that the fence saw: not older.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Also write a check-list here, in Markdown.")] = None,
    form: Annotated[Form, typer.Option("--format", help="How to print it.")] = Form.TABLE,
) -> Answer:
    """List the code that touches the mapped columns. Exit 3 while direct writes are, or may be, left."""
    window = period(since) if since else None
    if no_database or run.settings.database_url is None:
        found = look_for(run.settings, source, exclude=exclude or ())
    else:
        with run.engine.connect() as plain_connection:
            connection = plain_connection.execution_options(postgresql_readonly=True)
            found = look_for(run.settings, source, connection=connection, exclude=exclude or (), window=window)
    if not found.files and not found.unread:
        raise UsageError(
            f"no file was read under {', '.join(map(str, source))}: pass the folder of the application's sources by "
            "--source, and leave out less by --exclude"
        )
    if markdown is not None:
        _write(markdown, found)
    lines = tuple(check_list(found) if form is Form.MARKDOWN else _table(found))
    notes = [f"not read: {one.file}: {one.problem}" for one in found.unread] + list(found.notes)
    if closed := sum(not one.as_text for one in found.unseen):
        notes.append(f"{closed} not read at all, where a write may stand: mend them, or leave them out by --exclude")
    if unparsed := sum(one.as_text for one in found.unseen):
        notes.append(
            f"{unparsed} not parsed, where a write may stand, for what is mapped is named: run discover with the "
            f"application's own Python (this is {sys.version_info[0]}.{sys.version_info[1]}), mend them, or look them "
            "through and accept each by a comment: # walletmigrate: ignore-file <reason>"
        )
    return Answer(_document(found), lines, tuple(notes), DIFFERENCE if found.left or found.unseen else OK)


def check_list(found: Catalogue) -> Iterator[str]:
    """The catalogue as Markdown: what is to be moved has an open box, what is moved or accepted a ticked one."""
    yield "# Code paths that touch the mapped balances"
    yield ""
    yield _summary(found)
    for title, chosen in _sections(found):
        if not chosen:
            continue
        yield from ("", f"## {title}", "")
        for one in chosen:
            done = one.adapter or one.accepted is not None
            box = f"[{'x' if done else ' '}] " if one.access == "write" or done or one.access == "unknown" else ""
            where = f"{one.file}:{one.line}" if one.line else one.file
            code = f": `{one.code.replace('`', chr(39))}`" if one.code else ""
            scope = f" in {one.scope}" if one.scope else ""
            yield f"- {box}`{where}`{scope}: {_what(one)}{code}"
    if found.unread:
        yield from ("", "## Not read", "")
        yield from (f"- [ ] `{one.file}`: {one.problem}" for one in found.unread)
    if found.notes:
        yield from ("", "## Notes", "")
        yield from (f"- {note}" for note in found.notes)


def _sections(found: Catalogue) -> list[tuple[str, list[Finding]]]:
    """The findings by what is to be done about them."""
    open_ = [one for one in found.findings if not one.adapter and one.accepted is None]
    return [
        ("Direct writes", [one for one in open_ if one.access == "write"]),
        ("To be looked at", [one for one in open_ if one.access == "unknown"]),
        ("Direct reads", [one for one in open_ if one.access == "read"]),
        ("Definitions", [one for one in open_ if one.access == "definition"]),
        ("Through the adapter", [one for one in found.findings if one.adapter]),
        ("Accepted", [one for one in found.findings if one.accepted is not None and not one.adapter]),
    ]


def _table(found: Catalogue) -> Iterator[str]:
    rows = [
        (
            f"{one.file}:{one.line}" if one.line else one.file,
            one.access + ("" if one.sure else "?"),
            one.column or "(rows)" if not one.adapter else "adapter",
            one.scope or "-",
            one.how + (f"; accepted: {one.accepted}" if one.accepted else ""),
        )
        for one in found.findings
    ]
    widths = [min(max((len(row[place]) for row in rows), default=0), 70) for place in range(4)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row[:4], widths, strict=True)) + "  " + row[4]
    yield _summary(found)


def _summary(found: Catalogue) -> str:
    counts = Counter(one.access for one in found.findings if not one.adapter and one.accepted is None)
    adapter = sum(one.adapter for one in found.findings)
    accepted = sum(one.accepted is not None and not one.adapter for one in found.findings)
    return (
        f"direct writes left: {len(found.left)}; reads {counts['read']}, definitions {counts['definition']}, "
        f"unknown {counts['unknown']}; through the adapter {adapter}, accepted {accepted}; files read: {found.files}"
    )


def _what(one: Finding) -> str:
    sure = "" if one.sure else " (perhaps)"
    told = f"; accepted: {one.accepted}" if one.accepted else ""
    return f"{one.access}{sure} of {one.column or 'rows'}, {one.how}{told}" if not one.adapter else one.how


def _document(found: Catalogue) -> dict[str, Any]:
    return {
        "left": len(found.left),
        "files": found.files,
        "findings": [{**plain(one), "left": one.left} for one in found.findings],
        "unread": plain(found.unread),
        "notes": list(found.notes),
    }


def _write(path: Path, found: Catalogue) -> None:
    try:
        path.write_text("\n".join(check_list(found)) + "\n", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path} cannot be written ({error.strerror}): name another file by --markdown") from None
