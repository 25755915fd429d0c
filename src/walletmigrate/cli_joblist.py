"""Commands that look at jobs and steer them: list, show, pause, resume, cancel, set."""

from __future__ import annotations

from typing import Annotated, Any, Final

import typer

from walletmigrate import job_control
from walletmigrate.backfill import backfill
from walletmigrate.cli_jobs import FORCE, JobCall, jobs_answer, run_over
from walletmigrate.commands import DASK, WORKERS, command
from walletmigrate.console import OK, REFUSED, Answer, plain
from walletmigrate.errors import UsageError
from walletmigrate.freeze import freeze, unfreeze
from walletmigrate.invocation import Run
from walletmigrate.job_control import JobDetail
from walletmigrate.job_options import parsed
from walletmigrate.job_rows import READS, TURNS, Job, get, has_own_command, resuming
from walletmigrate.standing import shown_time

KINDS: Final[dict[str, JobCall]] = {"backfill": backfill, "freeze": freeze, "unfreeze": unfreeze}
"""What runs a job of a kind: ``call(engine, settings, mapping, act, *, force, dry_run, progress, stop)``."""

_ID = Annotated[int, typer.Argument(metavar="ID", help="The job's number, as `jobs list` shows it.")]
_SHOWN = 20


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = typer.Typer(
        help="Jobs over all accounts: look at them and steer them while they run.", no_args_is_help=True
    )
    command(group, "list", group="jobs")(list_jobs)
    command(group, "show", group="jobs")(show)
    command(group, "pause", group="jobs", changes=True)(pause)
    command(group, "resume", group="jobs", changes=True)(resume)
    command(group, "cancel", group="jobs", changes=True)(cancel)
    command(group, "set", group="jobs", changes=True)(set_options)
    app.add_typer(group, name="jobs")


def list_jobs(
    run: Run, limit: Annotated[int, typer.Option(min=1, max=1000, help="How many, newest first.")] = 20
) -> Answer:
    """List the newest jobs: kind, mapping, state, progress."""
    with run.engine.connect() as connection:
        found = job_control.jobs_of(connection, run.settings, limit)
    return Answer({"jobs": [_document(job) for job in found]}, tuple(_line(job) for job in found) or ("no job yet",))


def show(run: Run, job: _ID) -> Answer:
    """Show one job: progress, settings, what holds it, its open batches, and the rows it has set aside."""
    with run.engine.connect() as connection:
        found = job_control.show(connection, run.settings, job)
    document = {
        "job": _document(found.job),
        "batches_done": found.batches_done,
        "open_batches": [plain(one) for one in found.open],
        "set_aside": [plain(one) for one in found.set_aside],
    }
    notes = []
    if found.job.stalled:
        notes.append(f"its process is gone, or waits for a lock; to go on: {resuming(found.job)}")
    if found.set_aside:
        notes.append(f"mend the rows; then: {resuming(found.job)}  # tries them again")
    elif found.job.kind == "reconcile" and found.job.items_failed:
        notes.append(f"which accounts: walletmigrate reconcile show {found.job.id}; then: {resuming(found.job)}")
    return Answer(document, tuple(_detail_lines(found)), tuple(notes))


def pause(run: Run, job: _ID) -> Answer:
    """Stop a running job before its next batch, wherever it runs."""
    done = job_control.pause(run.engine, run.settings, job, run.act(), dry_run=run.dry_run)
    return _changed(run, done, f"paused; to go on: {resuming(done)}")


def cancel(run: Run, job: _ID) -> Answer:
    """Give a job up: what is committed stays, the next start of its kind begins at the first key."""
    done = job_control.cancel(run.engine, run.settings, job, run.act(), dry_run=run.dry_run)
    return _changed(run, done, "cancelled")


def set_options(
    run: Run,
    job: _ID,
    settings: Annotated[list[str], typer.Argument(metavar="NAME=VALUE…", help="For example batch-size=500 rate=none.")],
) -> Answer:
    """Change settings of a job, from its next batch on: batch-size, rate, target-seconds and others."""
    options = parsed(settings)
    done = job_control.configure(run.engine, run.settings, job, options, run.act(), dry_run=run.dry_run)
    return _changed(run, done, " ".join(settings))


def resume(run: Run, job: _ID, workers: WORKERS = None, dask: DASK = None, force: FORCE = False) -> Answer:
    """Run a job on, here, with what it has set aside, from where it stopped; or name the command that does."""
    run.act()
    with run.engine.connect() as connection:
        found = get(connection, run.settings, job)
    call = KINDS.get(found.kind)
    if call is None:
        own = f", which has a command of its own: {resuming(found)}" if has_own_command(found) else ""
        raise UsageError(f"job {job} is a {found.kind}{own}")
    job_control.resumable(run.engine, run.settings, job, dry_run=run.dry_run)
    results = run_over(run, found.mapping, call, workers=workers, dask=dask, force=force)
    (_, result) = results[0]
    lines = [f"job {job}: {found.kind} of {found.mapping}, {result.state} in {result.seconds:.1f} s"]
    failed = getattr(result, "failed", 0) or getattr(result, "refused", 0)
    notes = [f"{failed} accounts are not done: walletmigrate jobs show {job}"] if failed else []
    return jobs_answer(run, results, lines, notes, REFUSED if failed else OK)


def _changed(run: Run, job: Job, what: str) -> Answer:
    said = f"job {job.id} ({job.kind} of {job.mapping}): {'would be ' if run.dry_run else ''}{what}"
    return Answer({"dry_run": run.dry_run, "job": _document(job)}, (said,))


def _document(job: Job) -> dict[str, Any]:
    return {**plain(job), "held": None if job.stalled else job.held, "options": job.options.shown()}


def _line(job: Job) -> str:
    of = f" of {job.items_total}" if job.items_total is not None else ""
    failed = f", {job.items_failed} failed" if job.items_failed else ""
    state = job.state
    if job.stalled:
        state = "running, but no batch for a minute"
    elif job.held and job.state == "running":
        state = f"running, waiting: {job.held}"
    done = job.items_done + job.items_failed
    return (
        f"job {job.id}: {job.kind} of {job.mapping}, {state}, {done}{of} accounts{failed}, {shown_time(job.updated_at)}"
    )


def _detail_lines(found: JobDetail) -> list[str]:
    job = found.job
    where = "last pass, " if job.job_pass > 1 else ""
    batches = f"{found.batches_done} batches done, {len(found.open)} open, {job.claims_lost} commits refused"
    lines = [_line(job), f"  begun {shown_time(job.started_at)} by {job.actor}: {job.reason}"]
    if job.kind in READS:
        lines.append(f"  one snapshot, at: {job.details.get('stage')}; read by {job.details.get('worker')}")
    else:
        took = f"last {job.last_batch_seconds or 0:.2f} s"
        lines.append(
            f"  in turns, one at a time; {took}"
            if job.kind in TURNS
            else f"  {where}cut up to key {job.cursor} of {job.until_key}; {batches}; {took}"
        )
        lines.append("  " + " ".join(f"{name}={value}" for name, value in job.options.shown().items()))
    if job.details.get("error"):
        lines.append(f"  error: {job.details['error']}")
    lines += [
        f"  {one.state}: {one.keys} keys behind {one.after}, to {one.upto}"
        + (f", {one.worker}" if one.state == "claimed" else f", tried {one.attempts} times")
        for one in found.open[:_SHOWN]
    ]
    lines += [f"  set aside: {one.key}: {one.reason}" for one in found.set_aside[:_SHOWN]]
    if len(found.set_aside) > _SHOWN:
        lines.append(f"  … {len(found.set_aside)} set aside in all; --json lists them")
    return lines
