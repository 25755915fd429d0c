"""Commands that stop all dual-writes and let them go on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from walletmigrate import line
from walletmigrate.commands import command
from walletmigrate.console import FAILURE, INTERRUPTED, OK, Answer, plain, say
from walletmigrate.errors import UsageError
from walletmigrate.invocation import Run
from walletmigrate.line import Holder, LineChange
from walletmigrate.standing import REASON, shown_time

_AFTERWARDS = f"walletmigrate resume {REASON} && walletmigrate backfill {REASON}"


def register(app: typer.Typer) -> None:
    """Add the commands."""
    command(app, "stop-the-line", changes=True)(stop_the_line)
    command(app, "resume", changes=True)(resume)


def stop_the_line(
    run: Run,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until what was begun before has ended.")] = False,
    timeout: Annotated[
        float | None, typer.Option("--timeout", min=0, metavar="SECONDS", help="With --wait: give up after that long.")
    ] = None,
) -> Answer:
    """Stop all dual-writes at the next statement of every process: legacy alone is written."""
    if timeout is not None and not wait:
        raise UsageError("--timeout goes with --wait")
    done = line.stop(run.engine, run.settings, run.act(), dry_run=run.dry_run)
    notes = () if run.dry_run else (f"accounts written from now on turn stale; afterwards: {_AFTERWARDS}",)
    if not wait:
        return Answer(_document(done), (_said(done, "is stopped"),), notes)
    if run.dry_run:
        with run.engine.begin() as connection:
            left = line.holders(connection, run.settings)
        lines = (_said(done, "is stopped"), *(f"would wait for {_named(one)}" for one in left))
        return Answer({**_document(done), "left": plain(left)}, lines)
    return _wait(run, done, notes, timeout)


def resume(run: Run) -> Answer:
    """Let dual-writes go on after stop-the-line. Accounts written meanwhile are stale: backfill them."""
    done = line.resume(run.engine, run.settings, run.act(), dry_run=run.dry_run)
    return Answer(_document(done), (_said(done, "runs"),))


def _wait(run: Run, done: LineChange, notes: tuple[str, ...], timeout: float | None) -> Answer:
    """Wait, and name those who are waited for; the line stays stopped whatever comes of it."""
    left: tuple[Holder, ...] = ()
    told = _teller()

    def hear(found: tuple[Holder, ...]) -> None:
        nonlocal left
        left = found
        told(found)

    try:
        left = line.wait(run.engine, run.settings, timeout=timeout, told=hear)
        code, ended = (FAILURE, f"{len(left)} transactions have not ended in {timeout:g} s") if left else (OK, "")
    except KeyboardInterrupt:
        code, ended = INTERRUPTED, "interrupted while waiting"
    said = [f"{ended}: what they posted before the stop may still be committed"] if ended else []
    said += [f"left: {_named(one)}" for one in left] if ended else []
    lines = (_said(done, "is stopped"), *(() if ended else ("all transactions begun before the stop have ended",)))
    if ended:
        notes = (*said, "the line is stopped, and stays so; to wait on: the same command again", *notes)
    return Answer({**_document(done), "left": plain(left)}, lines, notes, exit_code=code)


def _teller() -> Callable[[tuple[Holder, ...]], None]:
    """Say once of each transaction that it is waited for."""
    known: set[str] = set()

    def tell(found: tuple[Holder, ...]) -> None:
        for one in found:
            if one.id not in known:
                say(f"waiting for {_named(one)}")
        known.update(one.id for one in found)

    return tell


def _named(one: Holder) -> str:
    since = f", since {shown_time(one.since)}" if one.since else ""
    if one.pid is None:
        return f"prepared transaction {one.prepared!r}{since}"
    return f"{one.application_name or '(no application_name)'}, pid {one.pid}{since}"


def _document(done: LineChange) -> dict[str, object]:
    return {"line_running": done.running, "changed": done.changed, "dry_run": done.dry_run}


def _said(done: LineChange, word: str) -> str:
    return f"the line {word}" + ("" if done.changed else " already") + (" (dry run: unchanged)" if done.dry_run else "")
