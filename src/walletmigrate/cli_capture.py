"""Commands of the fence: put it up, take it down, its mode, what it saw, and what of that is personal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Annotated

import typer

from walletmigrate import bypasses, doctor, fences
from walletmigrate.bypasses import Catalogue, CodePath
from walletmigrate.checkup import Finding
from walletmigrate.commands import command
from walletmigrate.console import DIFFERENCE, OK, Answer, plain
from walletmigrate.erasure import erase as erase_texts
from walletmigrate.errors import InvalidKey, UnknownMapping, UsageError
from walletmigrate.fences import FenceChange
from walletmigrate.invocation import Run, period
from walletmigrate.standing import shown_time


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = typer.Typer(help="The fence on the legacy table, and what it saw.", no_args_is_help=True)
    command(group, "install", group="capture", changes=True, role="installer")(install)
    command(group, "remove", group="capture", changes=True, confirms=True, role="installer")(remove)
    command(group, "mode", group="capture", changes=True, role="installer")(mode)
    command(group, "report", group="capture")(report)
    command(group, "prune", group="capture", changes=True)(prune)
    app.add_typer(group, name="capture")
    command(app, "doctor")(check)
    command(app, "erase", changes=True)(erase)


def install(run: Run) -> Answer:
    """Put the fence up where it does not stand as it was made. Idempotent."""
    return _answer(fences.put_up(run.engine, run.settings, run.act(), dry_run=run.dry_run))


def remove(run: Run) -> Answer:
    """Take the fence down; mirrored accounts turn stale. Only in phase legacy. Idempotent."""
    act = run.act()
    run.confirmed()
    return _answer(fences.take_down(run.engine, run.settings, act, dry_run=run.dry_run))


def mode(
    run: Run,
    wanted: Annotated[str, typer.Argument(metavar="stale|mirror|reject", help="What becomes of a mirrored account.")],
    mapping: Annotated[str | None, typer.Option(help="The mapping. Default: all.")] = None,
) -> Answer:
    """Say what the fence does to a mirrored account that is written past the adapter."""
    act = run.act()
    if wanted not in fences.MODES:
        raise UsageError(f"{wanted!r} is no mode: choose one of {', '.join(fences.MODES)}")
    chosen = [run.settings.mapping(mapping)] if mapping else run.settings.mappings
    kind: fences.Mode = next(one for one in fences.MODES if one == wanted)
    done = [fences.set_mode(run.engine, run.settings, each, kind, act, dry_run=run.dry_run) for each in chosen]
    return _answer(tuple(done))


def report(
    run: Run, since: Annotated[str | None, typer.Option(metavar="7d", help="Only what is not older.")] = None
) -> Answer:
    """List the code paths that write past the adapter, most writes first."""
    window = period(since) if since else None
    with run.engine.connect() as plain_connection:
        connection = plain_connection.execution_options(postgresql_readonly=True)
        found = bypasses.report(connection, run.settings, window=window)
        modes = fences.modes(connection, run.settings)
    document = {**plain(found), "modes": modes}
    return Answer(document, tuple(_report_lines(found, modes)))


def prune(run: Run) -> Answer:
    """Remove lines of the catalogue that are older than the configured retention."""
    count = bypasses.prune(run.engine, run.settings, run.act(), dry_run=run.dry_run)
    said = "would be removed" if run.dry_run else "removed"
    return Answer({"removed": count, "dry_run": run.dry_run}, (f"{count} lines {said}",))


def erase(
    run: Run,
    account: Annotated[str, typer.Option("--account", metavar="KEY", help="Whose texts, by the account's key.")],
    mapping: Annotated[str | None, typer.Option(help="Its mapping; needed where there are several.")] = None,
) -> Answer:
    """Erase the personal texts about one owner. Transactions and balances stay. Idempotent."""
    try:
        chosen = run.settings.mapping(mapping)
        done = erase_texts(run.engine, run.settings, chosen, account, run.act(), dry_run=run.dry_run)
    except (InvalidKey, UnknownMapping) as error:
        raise UsageError(str(error)) from None
    verb = "would erase" if done.dry_run else "erased"
    line = (
        f"{done.mapping} {done.key}: {verb} the texts of {done.details} transactions, {done.queries} statements, "
        f"{done.messages} messages; no transaction and no balance changes"
    )
    return Answer(plain(done), (line,))


def check(
    run: Run,
    exporter: Annotated[
        str | None, typer.Option(metavar="URL", help="The exporter, to be looked at too: http://127.0.0.1:9464.")
    ] = None,
    login: Annotated[
        list[str] | None, typer.Option(metavar="ROLE", help="A role that the application logs in with; repeatable.")
    ] = None,
) -> Answer:
    """Look for what is not as it should be, and name the runbook for it. Exit 3 if there is a problem."""
    source = run.source
    with run.engine.connect() as plain_connection:
        connection = plain_connection.execution_options(postgresql_readonly=True)
        found = doctor.examine(connection, run.settings, source, exporter=exporter, logins=login or ())
        notes = doctor.notes(connection, run.settings, exporter=exporter)
    lines = list(_finding_lines((*found, *notes)))
    if not found:
        lines.append(f"everything {'else ' if notes else ''}is as it should be")
    return Answer(
        {"findings": [plain(one) for one in (*found, *notes)]}, tuple(lines), exit_code=DIFFERENCE if found else OK
    )


def _finding_lines(found: Sequence[Finding]) -> Iterator[str]:
    """What mends several in a row is said once, below the last of them: a lost role lacks dozens of grants."""
    for (mend, runbook), same in groupby(found, key=lambda one: (one.mend, one.runbook)):
        yield from (f"{'note: ' if one.severity == 'note' else ''}{one.what}" for one in same)
        yield f"  mend: {mend}\n  runbook: {runbook}"


def _answer(done: tuple[FenceChange, ...]) -> Answer:
    return Answer({"fences": [plain(one) for one in done]}, tuple(_line(one) for one in done))


def _line(done: FenceChange) -> str:
    after = f"stands, mode {done.after}" if done.after else "is down"
    if not done.changed:
        return f"{done.mapping}: the fence {after}, as before"
    would = "dry run: afterwards " if done.dry_run else ""
    return f"{done.mapping}: {would}the fence {after}"


def _report_lines(found: Catalogue, modes: dict[str, str]) -> list[str]:
    lines = [f"{name}: mode {modes[name]}, {count} writes rejected" for name, count in found.rejected.items()]
    if not found.paths:
        return [*lines, "no write past the adapter" + (f" since {shown_time(found.since)}" if found.since else "")]
    lines.append(f"{len(found.paths)} code paths wrote past the adapter, {found.writes} times:")
    for path in found.paths:
        lines += _path_lines(path)
    return lines


def _path_lines(path: CodePath) -> list[str]:
    treated = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in sorted(path.treatments.items()))
    moved = f", {path.moved:+f} {path.currency}" if path.moved is not None and path.currency else ""
    by = f"by {', '.join(path.application_names) or '(no name)'} as {', '.join(path.database_users)}"
    lines = [
        f"  {path.writes} × {path.operation} {path.relation}" + (f".{path.column}" if path.column else ""),
        f"    {path.fingerprint}",
        f"    {by}; {path.accounts} accounts{moved}; {treated}",
        f"    first {shown_time(path.first)}, last {shown_time(path.last)}",
    ]
    return lines + ([f"    for example: {path.example}"] if path.example else [])
