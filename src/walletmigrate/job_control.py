"""The operator's hand on jobs: list, show, pause, cancel, change settings, make ready to be resumed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Engine, text

from walletmigrate import job_batches, job_rows
from walletmigrate.audit import Act, record
from walletmigrate.config import Settings
from walletmigrate.errors import PreconditionRefused, UsageError
from walletmigrate.job_options import Options
from walletmigrate.job_rows import COLUMNS, RESUMABLE, Job, begin, job_of, table
from walletmigrate.standing import REASON


@dataclass(frozen=True)
class SetAside:
    """A legacy row that a job could not do, after ``attempts``, and the database's reason."""

    key: str
    reason: str
    attempts: int
    at: datetime


@dataclass(frozen=True)
class OpenBatch:
    """A batch that is not done: keys k with ``after`` < k <= ``upto``; ``worker`` has it if it is claimed."""

    after: str | None
    upto: str
    keys: int
    state: str
    worker: str | None
    attempts: int


@dataclass(frozen=True)
class JobDetail:
    """A job with what stands in the database about its batches."""

    job: Job
    batches_done: int
    open: tuple[OpenBatch, ...]
    set_aside: tuple[SetAside, ...]


def jobs_of(connection: Connection, settings: Settings, limit: int = 50) -> list[Job]:
    """Those that run, then the newest, the newest first."""
    query = f"select {COLUMNS} from {table(settings)} order by state = 'running' desc, id desc limit :limit"
    return [job_of(row) for row in connection.execute(text(query), {"limit": limit})]


def show(connection: Connection, settings: Settings, job_id: int) -> JobDetail:
    """A job with its open batches and what it has set aside. Raises UsageError for an unknown id."""
    job = job_rows.get(connection, settings, job_id)
    batches = table(settings, "job_batches")
    done = connection.scalar(
        text(f"select count(*) from {batches} where job_id = :id and state = 'done'"), {"id": job_id}
    )
    query = (
        f"select after_key as after, upto_key as upto, keys, state, worker, attempts from {batches} "
        "where job_id = :id and state in ('pending', 'claimed') order by number limit 1000"
    )
    waiting = tuple(OpenBatch(**row._mapping) for row in connection.execute(text(query), {"id": job_id}))
    aside = tuple(SetAside(**row._mapping) for row in job_batches.set_aside(connection, settings, job_id))
    return JobDetail(job, int(done or 0), waiting, aside)


def pause(engine: Engine, settings: Settings, job_id: int, act: Act, *, dry_run: bool = False) -> Job:
    """Stop a running job before its next batch, in whatever process it runs. Raises PreconditionRefused, also for one
    that reads a single snapshot.
    """
    with begin(engine) as connection:
        job = _in(connection, settings, job_id, "pause", ("running",))
        _unless_it_reads(
            job,
            "pause",
            "it goes on from nowhere, and a pause would keep its snapshot open, and vacuum from its work",
        )
        return job if dry_run else job_rows.left(connection, settings, job, "paused", act)


def cancel(engine: Engine, settings: Settings, job_id: int, act: Act, *, dry_run: bool = False) -> Job:
    """Give a job up: batches in flight are rolled back, the next start begins a new one; a statement that reads a
    snapshot is ended within seconds. Of a reconciliation the account at hand is still corrected, and none after it;
    what was corrected stays. Raises PreconditionRefused.
    """
    with begin(engine) as connection:
        job = _in(connection, settings, job_id, "cancel", RESUMABLE)
        return job if dry_run else job_rows.cancelled(connection, settings, job, act)


def configure(
    engine: Engine, settings: Settings, job_id: int, options: Mapping[str, Any], act: Act, *, dry_run: bool = False
) -> Job:
    """Change settings (see `job_options.parsed`), which hold from the next batch on. Raises PreconditionRefused, and
    UsageError where the smallest size would be above the largest.
    """
    with begin(engine) as connection:
        job = _in(connection, settings, job_id, "set", RESUMABLE)
        _unless_it_reads(job, "set", "it has no batches, and nothing to set")
        bounds = Options.of({**job.settings, **options})
        if bounds.min_batch_size > bounds.max_batch_size:
            what = f"min-batch-size={bounds.min_batch_size} is above max-batch-size={bounds.max_batch_size}"
            raise UsageError(f"{what}: set both")
        if dry_run:
            return job
        details = {"settings": dict(options)}
        record(connection, settings, f"{job.kind} set", act, mapping=job.mapping, job_id=job.id, details=details)
        return job_rows.configure(connection, settings, job_id, options)


def resumable(engine: Engine, settings: Settings, job_id: int, *, dry_run: bool = False) -> Job:
    """Make sure that the next start of the job's kind resumes this job, and give it as it is.

    A job that is done and has set rows aside is opened again, for them alone. Raises PreconditionRefused when there
    is nothing to resume, or when a newer job of its kind has taken its place.
    """
    with begin(engine) as connection:
        job = job_rows.get(connection, settings, job_id, lock=True)
        aside = job_batches.set_aside(connection, settings, job_id)
        reasons = []
        if job.state not in RESUMABLE and not (job.state == "done" and aside):
            reasons.append((f"job {job_id} is {job.state}", f"walletmigrate {job.kind} {REASON}  # begins a new one"))
        newest = job_rows.newest(connection, settings, job.kind, job.mapping or "")
        if newest is not None and newest.id != job_id:
            mend = f"walletmigrate jobs show {newest.id}"
            reasons.append((f"job {newest.id} of the same kind on the same mapping is newer", mend))
        if reasons:
            raise PreconditionRefused("jobs resume", reasons)
        if job.state == "done" and not dry_run:
            return job_rows.change(connection, settings, job_id, "state = 'paused', finished_at = null")
        return job


def _unless_it_reads(job: Job, step: str, why: str) -> None:
    if job.kind in job_rows.READS:
        mend = f"walletmigrate jobs cancel {job.id} {REASON}; then, when it suits: {job_rows.resuming(job)}"
        raise PreconditionRefused(f"jobs {step}", [(f"job {job.id} reads one snapshot: {why}", mend)])


def _in(connection: Connection, settings: Settings, job_id: int, step: str, states: tuple[str, ...]) -> Job:
    job = job_rows.get(connection, settings, job_id, lock=True)
    if job.state not in states:
        reason = (f"job {job_id} is {job.state}, not {' or '.join(states)}", f"walletmigrate jobs show {job_id}")
        raise PreconditionRefused(f"jobs {step}", [reason])
    return job
