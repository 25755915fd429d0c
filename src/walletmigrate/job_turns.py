"""Jobs whose batches must follow one another: a turn at a time, each under the lock of the job's row.

A fold over the journal means something only in the journal's order, so batches that several workers claim, split and
set aside would be wrong for it. Such a job has the same row as all others, so that it is listed, paused, resumed,
cancelled, paced and held by the throttle like them. Its cursor stands in what it works on, and moves in the
transaction of the turn: killed anywhere, the next turn goes on. Two processes take turns.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

from sqlalchemy import Connection, Engine

from walletmigrate import job_rows, throttle
from walletmigrate.audit import Act, record
from walletmigrate.config import Settings
from walletmigrate.errors import DatabaseUnreachable
from walletmigrate.job_options import EVERYTHING
from walletmigrate.job_outages import never
from walletmigrate.job_rows import Batch, Job, begin
from walletmigrate.job_work import Progress, Stop, Work

Turn = Callable[[Connection, int], Batch]
"""``turn(connection, size)``: do at most the next ``size`` items, under the lock of the job's row and in that
transaction, or in others while it lasts. No keys in the batch: none are left.
"""
Closing = Callable[[Connection], dict[str, Any]]
"""What is left to be done when no items are, in the transaction that calls the job done; details of its audit row."""

_HELD: Final = 0.25


def run_turns(
    engine: Engine,
    settings: Settings,
    job: Job,
    turn: Turn,
    act: Act,
    *,
    size: int,
    closing: Closing | None = None,
    progress: Progress | None = None,
    stop: Stop | None = None,
) -> Job:
    """Take turns until none is left, and call the job done. ``size`` is the batch size unless the operator set one.

    Returns the job ``paused`` when ``stop`` said so, or in the state that another process gave it. Raises Retryable
    when a turn ran out of attempts, or what it failed with; the job is ``failed`` then, and can be resumed.
    DatabaseUnreachable if it is to stop before the end of an outage. Ctrl-C pauses it and goes on as KeyboardInterrupt.
    """
    work = Work(engine, settings, (), stop=stop or never, throttle=_throttle(engine, settings, job))

    def next_turn() -> tuple[Job, int]:
        work.ask(job)
        return _one(engine, settings, job, turn, act, size, closing)

    try:
        while job.state == "running":
            if work.stop():
                return work.pause(job)
            now, done = work.patience(job).persist(next_turn)
            job = replace(now, resumed=job.resumed)
            if job.held is not None and job.state == "running":
                time.sleep(_HELD)
            elif done:
                if progress is not None:
                    progress(job)
                _keep_pace(engine, settings, job, done, work.stop)
    except DatabaseUnreachable:
        raise
    except BaseException as error:
        work.leave_somehow(job, error)
        raise
    return job


def _keep_pace(engine: Engine, settings: Settings, job: Job, done: int, stop: Stop) -> None:
    """Wait for as long as that many items take at the job's rate; not where an operator or ``stop`` says otherwise."""
    rate = job.options.rate
    left = done / rate if rate else 0.0
    while left > 0 and not stop():
        time.sleep(min(left, _HELD))
        left -= _HELD
        if left > 0:
            with begin(engine) as connection:
                now = job_rows.get(connection, settings, job.id)
            if (now.state, now.options.rate) != (job.state, rate):
                return


def _throttle(engine: Engine, settings: Settings, job: Job) -> throttle.Throttle | None:
    return throttle.of_settings(engine, settings, job.id, None if job.mapping == EVERYTHING else job.mapping)


def _one(
    engine: Engine, settings: Settings, job: Job, turn: Turn, act: Act, size: int, closing: Closing | None
) -> tuple[Job, int]:
    """One turn, with the job's counters, in one transaction; how many items there were."""
    with begin(engine) as connection:
        now = job_rows.get(connection, settings, job.id, lock=True)
        if now.state != "running" or now.held is not None:
            return now, 0
        began = time.monotonic()
        batch = turn(connection, _size(now, size))
        more = {} if batch.keys or closing is None else closing(connection)
        changes = "items_done = items_done + :done, last_batch_seconds = :seconds, updated_at = clock_timestamp()"
        if not batch.keys:
            changes += ", state = 'done', items_total = items_done + items_failed, finished_at = clock_timestamp()"
        now = job_rows.change(connection, settings, job.id, changes, done=batch.done, seconds=time.monotonic() - began)
        if not batch.keys:
            record(
                connection, settings, f"{job.kind} done", act, mapping=job.mapping, job_id=job.id, details=more or None
            )
        return now, batch.keys


def _size(job: Job, usual: int) -> int:
    """As the operator set it; with a rate no more at once than its burst."""
    wanted, most = job.options.batch_size or usual, job.options.burst()
    return wanted if most is None else min(wanted, most)
