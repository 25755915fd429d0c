"""Commands that go over all accounts: backfill, freeze, unfreeze."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any

import typer

from walletmigrate import phases
from walletmigrate.backfill import backfill as run_backfill
from walletmigrate.commands import DASK, WORKERS, below, command
from walletmigrate.config import Mapping
from walletmigrate.console import CUT_SHORT, FAILURE, OK, REFUSED, STOPPED, Answer, bar, job_code, plain
from walletmigrate.errors import UsageError
from walletmigrate.freeze import freeze as run_freeze
from walletmigrate.freeze import unfreeze as run_unfreeze
from walletmigrate.invocation import Run
from walletmigrate.job_options import parsed
from walletmigrate.standing import REASON, confirmation
from walletmigrate.undo import UndoResult
from walletmigrate.undo import undo as undo_backfill

_MAPPING = Annotated[str | None, typer.Option("--mapping", help="One mapping. Default: all, one after the other.")]
_BATCH = Annotated[
    int | None,
    typer.Option("--batch-size", min=1, max=100_000, help="Legacy rows per transaction. Default: it tunes itself."),
]
FORCE = Annotated[bool, typer.Option("--force", help="Resume a job of other functions, or older than 7 days.")]

_SHOWN = 20

JobCall = Callable[..., Any]


def _rate(value: str) -> float:
    try:
        rate = parsed([f"rate={value}"])["rate"]
    except UsageError as error:
        raise typer.BadParameter(str(error)) from None
    return math.inf if rate is None else float(rate)


def register(app: typer.Typer) -> None:
    """Add the commands."""
    command(app, "backfill", changes=True)(backfill)
    command(below(app, "backfill"), "undo", group="backfill", changes=True)(undo)
    command(app, "freeze", changes=True, confirms=True)(freeze)
    command(app, "unfreeze", changes=True, confirms=True)(unfreeze)


def backfill(
    run: Run,
    mapping: _MAPPING = None,
    batch_size: _BATCH = None,
    rate: Annotated[
        float | None,
        typer.Option(
            "--rate",
            parser=_rate,
            metavar="N|none",
            help="Accounts a second over all workers; none: no bound. Default: 3000 for each worker.",
        ),
    ] = None,
    workers: WORKERS = None,
    dask: DASK = None,
    force: FORCE = False,
) -> Answer:
    """Open an account for every legacy row, and bring stale ones up. Resumable."""
    run.act()
    options = {"batch_size": batch_size, "rate": rate, "force": force}
    results = run_over(run, mapping, run_backfill, workers=workers, dask=dask, **options)
    lines, failed = [], 0
    for name, one in results:
        failed += one.failed
        verb = "would open" if one.dry_run else "opened"
        lines.append(
            f"{name}: {verb} {one.opened}, resynced {one.resynced}, failed {one.failed}, "
            f"of {one.keys} rows in {one.seconds:.1f} s{_job(one)}"
        )
    notes = []
    if failed:
        notes.append("values that are no exact amounts: walletmigrate install --dry-run lists them")
        notes.append("rows that the database refused: walletmigrate jobs show ID lists them with the reason")
    return jobs_answer(run, results, lines, notes, OK if not failed else REFUSED)


def undo(
    run: Run,
    job: Annotated[int, typer.Option("--job", metavar="ID", help="The backfill.")],
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, max=10_000, help="Accounts at a time.")] = 500,
) -> Answer:
    """Take back what a backfill opened, where no other transaction stands on it. Resumable."""
    act = run.act()
    with run.interruptible(), bar(f"{run.command} {job}", as_json=run.as_json) as progress:
        options: dict[str, Any] = {"batch_size": batch_size, "dry_run": run.dry_run, "progress": progress}
        done = undo_backfill(run.engine, run.settings, job, act, **options, stop=run.stop)
    verb = "would be taken back" if run.dry_run else "taken back"
    number = "" if done.state in ("done", "planned") else f" (job {done.job_id}, {done.state})"
    lines = [f"{done.mapping}: {done.undone} openings of job {done.of} {verb}, {done.left_count} left{number}"]
    lines += [f"  {one.key} ({one.bucket}, {one.currency}): {one.why}" for one in done.left[:_SHOWN]]
    notes = [] if run.dry_run or not done.undone else [_stale(done)]
    if done.state == "paused":
        notes.append("stopped: run the same command again, it goes on from there")
    code = job_code([done.state], REFUSED if done.left_count else OK)
    if job_code([done.state], OK) == FAILURE:
        notes.append(CUT_SHORT)
    return Answer(plain(done), tuple(lines), tuple(notes), code)


def _stale(done: UndoResult) -> str:
    """How the accounts that were taken back stand now: a backfill may have been there since."""
    if not done.stale:
        return f"of the {done.taken_back} accounts that were taken back none is stale: a backfill has brought them up"
    which = "these accounts" if done.stale == done.taken_back else f"{done.stale} of these {done.taken_back} accounts"
    return f"{which} are stale: walletmigrate backfill {REASON}"


def freeze(
    run: Run,
    mapping: _MAPPING = None,
    batch_size: _BATCH = None,
    workers: WORKERS = None,
    dask: DASK = None,
    force: FORCE = False,
) -> Answer:
    """Make the ledger alone true, account by account. The legacy column then rejects writes. Resumable."""
    act, names = run.act(), [one.name for one in run.mappings(mapping)]
    run.confirmed(*names)
    moved = phases.enter_frozen(run.engine, run.settings, run.source, act, dry_run=run.dry_run)
    results = run_over(run, mapping, run_freeze, batch_size=batch_size, workers=workers, dask=dask, force=force)
    refused = sum(one.refused for _, one in results)
    lines = [f"{name}: {_changed(one, 'frozen')}, {one.refused} refused{_job(one)}" for name, one in results]
    notes = []
    if refused:
        mend = f"walletmigrate backfill {REASON}; walletmigrate freeze --confirm {confirmation(run.settings)} {REASON}"
        notes.append(f"refused accounts are absent, stale or drifted: {mend}")
    return jobs_answer(run, results, lines, notes, REFUSED if refused else OK, phase=plain(moved))


def unfreeze(
    run: Run,
    mapping: _MAPPING = None,
    batch_size: _BATCH = None,
    workers: WORKERS = None,
    dask: DASK = None,
    force: FORCE = False,
) -> Answer:
    """Write the ledger's balances to the legacy column and let both be written again. Resumable."""
    act, names = run.act(), [one.name for one in run.mappings(mapping)]
    run.confirmed(*names)
    moved = phases.leave_frozen(run.engine, run.settings, act, dry_run=run.dry_run)
    results = run_over(run, mapping, run_unfreeze, batch_size=batch_size, workers=workers, dask=dask, force=force)
    left = sum(one.refused for _, one in results)
    lines = [f"{name}: {_changed(one, 'unfrozen')}{_job(one)}" for name, one in results]
    notes = []
    if left:
        notes.append(f"{left} accounts stay frozen: run unfreeze again; what then stays has no legacy row")
        notes.append("or was refused by the database: walletmigrate jobs show ID lists them")
    return jobs_answer(run, results, lines, notes, REFUSED if left else OK, phase=plain(moved))


def run_over(
    run: Run, name: str | None, job: JobCall, *, workers: int | None, dask: str | None, **options: Any
) -> list[tuple[str, Any]]:
    """Run a job over the chosen mappings, one after the other, until the operator stops it."""
    results: list[tuple[str, Any]] = []
    mapping: Mapping
    with run.interruptible(), run.hands(workers, dask) as hands:
        options = {**options, **hands}
        for mapping in run.until_stopped(run.mappings(name)):
            with bar(f"{run.command} {mapping.name}", as_json=run.as_json) as progress:
                result = job(
                    run.engine,
                    run.settings,
                    mapping,
                    run.act(),
                    **options,
                    dry_run=run.dry_run,
                    progress=progress,
                    stop=run.stop,
                )
            results.append((mapping.name, result))
    return results


def jobs_answer(
    run: Run, results: list[tuple[str, Any]], lines: list[str], notes: list[str], exit_code: int, **more: Any
) -> Answer:
    """How a command over all mappings ends: as `job_code` says of a job that did not come to its end."""
    states = run.states(one for _, one in results)
    stopped = "paused" in states
    if stopped:
        notes.append(STOPPED)
    code = job_code(states, exit_code)
    if code == FAILURE:
        notes.append(CUT_SHORT)
    document = {
        **more,
        "dry_run": run.dry_run,
        "interrupted": stopped,
        "mappings": [{"mapping": name, **plain(one)} for name, one in results],
    }
    return Answer(document, tuple(lines), tuple(notes), code)


def _changed(one: Any, word: str) -> str:
    return f"{one.changed} accounts {'would be ' if one.dry_run else ''}{word}"


def _job(one: Any) -> str:
    if one.job_id is None:
        return ""
    return f" (job {one.job_id}, {one.state}{', resumed' if one.resumed else ''})"
