"""Jobs over all accounts of a mapping: batches with a checkpoint in the database, resumed after any end.

A batch's work, its cursor and its counters are one transaction, so a process may be killed at any point: the
next run goes on behind the last committed batch. Two processes that run the same job take turns on its row.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields, replace
from datetime import datetime
from importlib.metadata import version
from typing import Any, Final

from sqlalchemy import Connection, Engine, Row, text
from sqlalchemy.exc import DBAPIError, OperationalError

from walletmigrate import config
from walletmigrate.audit import Act, record
from walletmigrate.capture import fence_problems
from walletmigrate.config import Settings
from walletmigrate.errors import JobFailed, LedgerMismatch, LedgerNotInstalled, PreconditionRefused, Retryable
from walletmigrate.functions import Installed, alteration, fingerprint, installed_mapping, relation
from walletmigrate.schema import installed, quoted
from walletmigrate.standing import REASON

ATTEMPTS: Final = 8
"""How often a batch is tried that meets a deadlock, a lock time limit or a lost connection."""

_FIRST_PAUSE: Final = 0.05
_LONGEST_PAUSE: Final = 2.0
_RESUMABLE: Final = ("running", "paused", "failed")
_LOST: Final = ("08", "57P")  # connection exceptions; the server is shutting down or starting
_NO_FUNCTIONS: Final = ("42883", "42P01", "3F000", "WM010")


@dataclass(frozen=True)
class Job:
    """A row of the table ``jobs``. Items are accounts; ``items_done`` leaves out the failed ones.

    ``state`` is running, paused, done, failed or cancelled; ``cursor`` is the last key of the last committed
    batch, as text. ``resumed`` says that `start_or_resume` found it begun.
    """

    id: int
    kind: str
    mapping: str | None
    state: str
    actor: str
    reason: str
    version: str
    items_total: int | None
    items_done: int
    items_failed: int
    cursor: str | None
    last_batch_seconds: float | None
    started_at: datetime
    updated_at: datetime
    finished_at: datetime | None
    details: dict[str, Any] = field(default_factory=dict)
    resumed: bool = False

    @property
    def counts(self) -> dict[str, int]:
        """What the batches counted so far, over all runs of this job."""
        return {name: int(value) for name, value in self.details.get("counts", {}).items()}


@dataclass(frozen=True)
class Batch:
    """What one batch did: ``last_key`` None when no key was left, else where the next batch begins.

    ``keys`` are legacy rows; ``done`` and ``failed`` are accounts; ``counts`` are added up over the job.
    """

    last_key: str | None
    keys: int
    done: int
    failed: int
    counts: Mapping[str, int]


Step = Callable[[Connection, str | None, int], Batch]
"""``step(connection, cursor, limit)``: the work on the next ``limit`` keys behind the cursor."""
Progress = Callable[[Job], None]
"""Told after each committed batch."""
Stop = Callable[[], bool]
"""Asked before each batch; True pauses the job."""

_COLUMNS: Final = ", ".join(f.name for f in fields(Job) if f.name != "resumed")


def start_or_resume(
    engine: Engine,
    settings: Settings,
    kind: str,
    mapping_name: str,
    act: Act,
    *,
    total: int | None = None,
    details: dict[str, Any] | None = None,
) -> Job:
    """Go on with the newest job of this kind and mapping unless it is done or cancelled; else make one.

    The job's actor and reason are those of the last start; the audit log has them all.
    """
    with begin(engine) as connection:
        return started(connection, settings, kind, mapping_name, act, total=total, details=details)


def started(
    connection: Connection,
    settings: Settings,
    kind: str,
    mapping_name: str,
    act: Act,
    *,
    total: int | None = None,
    details: dict[str, Any] | None = None,
) -> Job:
    """`start_or_resume` in the caller's transaction, which is at READ COMMITTED."""
    values = {
        "kind": kind,
        "mapping": mapping_name,
        "actor": act.actor,
        "reason": act.reason,
        "version": version("walletmigrate"),
        "total": total,
        "details": json.dumps(details or {}, default=str),
    }
    row, resumed = None, False
    while row is None:
        found = newest(connection, settings, kind, mapping_name, lock=True)
        resumed = found is not None and found.state in _RESUMABLE
        if found is not None and resumed:
            row = connection.execute(text(_resume(settings)), {**values, "id": found.id}).one()
        else:
            # No row: another process has just made the job, and the next look finds it.
            row = connection.execute(text(_insert(settings)), values).one_or_none()
    job = _job(row, resumed=resumed)
    word = "resume" if resumed else "start"
    record(connection, settings, f"{kind} {word}", act, mapping=mapping_name, job_id=job.id, details=details)
    return job


def run_batches(
    engine: Engine,
    settings: Settings,
    job: Job,
    step: Step,
    *,
    batch_size: int,
    progress: Progress | None = None,
    stop: Stop | None = None,
) -> Job:
    """Run batches until no key is left; the job is then still ``running``, and the caller's to `finish`.

    Returns it ``paused`` when ``stop`` said so, or in the state that another process gave it. Ctrl-C pauses it
    and goes on as KeyboardInterrupt. Raises Retryable when a batch ran out of attempts, LedgerMismatch,
    LedgerNotInstalled or JobFailed when the database refused it; the job is then ``failed`` and resumable.
    """
    try:
        while job.state == "running":
            if stop is not None and stop():
                return leave(engine, settings, job, "paused")
            now, ended = _batch(engine, settings, job, step, batch_size)
            job = replace(now, resumed=job.resumed)
            if ended:
                break
            if progress is not None:
                progress(job)
    except BaseException as error:
        _leave_somehow(engine, settings, job, error)
        if isinstance(error, DBAPIError):
            raise _typed(job, error) from error
        raise
    return job


def finish(
    engine: Engine,
    settings: Settings,
    mapping: config.Mapping,
    job: Job,
    act: Act,
    *,
    details: dict[str, Any] | None = None,
) -> Job:
    """Call the job done and write the audit row. Idempotent: what is not running stays as it is.

    Raises PreconditionRefused, and the job is failed, if the fence fell while it ran: accounts could then be
    behind without knowing it.
    """
    with begin(engine) as connection:
        reasons = obstacles(connection, settings, mapping)
    if reasons:
        refused = PreconditionRefused(job.kind, reasons)
        leave(engine, settings, job, "failed", str(refused))
        raise refused
    with begin(engine) as connection:
        row = connection.execute(
            text(
                f"update {quoted(settings.ledger_schema)}.jobs set state = 'done', "
                "finished_at = clock_timestamp(), updated_at = clock_timestamp() "
                f"where id = :id and state = 'running' returning {_COLUMNS}"
            ),
            {"id": job.id},
        ).one_or_none()
        if row is None:
            return replace(get(connection, settings, job.id), resumed=job.resumed)
        done = _job(row, resumed=job.resumed)
        facts = {**done.counts, "failed": done.items_failed, **(details or {})}
        record(connection, settings, f"{job.kind} done", act, mapping=job.mapping, job_id=job.id, details=facts)
    return done


def cancel(connection: Connection, settings: Settings, kind: str, mapping_name: str, act: Act) -> int | None:
    """Give up the unfinished job of this kind, so that a later one begins at the first key; its id or None."""
    found = newest(connection, settings, kind, mapping_name, lock=True)
    if found is None or found.state not in _RESUMABLE:
        return None
    connection.execute(
        text(
            f"update {quoted(settings.ledger_schema)}.jobs set state = 'cancelled', "
            "finished_at = clock_timestamp(), updated_at = clock_timestamp() where id = :id"
        ),
        {"id": found.id},
    )
    record(connection, settings, f"{kind} cancel", act, mapping=mapping_name, job_id=found.id)
    return found.id


def newest(
    connection: Connection, settings: Settings, kind: str, mapping_name: str, *, lock: bool = False
) -> Job | None:
    """The newest job of a kind on a mapping, None when there never was one."""
    row = connection.execute(
        text(
            f"select {_COLUMNS} from {quoted(settings.ledger_schema)}.jobs "
            "where kind = :kind and mapping = :mapping order by id desc limit 1"
            + (" for no key update" if lock else "")
        ),
        {"kind": kind, "mapping": mapping_name},
    ).one_or_none()
    return None if row is None else _job(row)


def get(connection: Connection, settings: Settings, job_id: int, *, lock: bool = False) -> Job:
    """The job of that id; ``lock`` makes other processes' batches of it wait for this transaction."""
    return _job(
        connection.execute(
            text(
                f"select {_COLUMNS} from {quoted(settings.ledger_schema)}.jobs where id = :id"
                + (" for no key update" if lock else "")
            ),
            {"id": job_id},
        ).one()
    )


def require_installed(connection: Connection, settings: Settings, mapping: config.Mapping) -> Installed:
    """What the database knows of the mapping. Raises LedgerNotInstalled when that is nothing."""
    known = None
    if installed(connection, settings.ledger_schema):
        known = installed_mapping(connection, settings.ledger_schema, mapping.name)
    if known is None:
        raise LedgerNotInstalled(mapping.name)
    return known


def visibility(connection: Connection, mapping: config.Mapping, step: str) -> None:
    """Refuse to work on a part of the table: a row that row-level security hides would count as gone."""
    if connection.scalar(text("select row_security_active(cast(:t as regclass))"), {"t": relation(mapping)}):
        what = f"row-level security hides rows of {mapping.table} from this database role"
        mend = "connect as the owner of the table, or as a role that has BYPASSRLS"
        raise PreconditionRefused(step, [(what, mend)])


def obstacles(connection: Connection, settings: Settings, mapping: config.Mapping) -> list[tuple[str, str]]:
    """Why no job may open or change accounts: (what is wrong, the command that mends it).

    Raises LedgerNotInstalled when the database does not know the mapping at all.
    """
    known = require_installed(connection, settings, mapping)
    found = [
        (f"the fence is not as it was made: {problem.trigger} {problem.problem}", f"walletmigrate install {REASON}")
        for problem in fence_problems(connection, settings, mapping)
    ]
    if known.fingerprint != fingerprint(mapping):
        found.append(("the functions were made from another configuration", f"walletmigrate install {REASON}"))
    altered = alteration(connection, mapping, known)
    return [*found, altered] if altered else found


def phase(connection: Connection, settings: Settings) -> str:
    """The phase as the database has it."""
    return str(connection.scalar(text(f"select phase from {quoted(settings.ledger_schema)}.control")))


def count_items(connection: Connection, mapping: config.Mapping) -> int:
    """How many accounts a job over the whole legacy table meets."""
    rows = connection.scalar(text(f"select count(*) from {relation(mapping)}"))
    return int(rows or 0) * len(mapping.columns)


def _batch(engine: Engine, settings: Settings, job: Job, step: Step, size: int) -> tuple[Job, bool]:
    """One batch, tried again while that can help; the job as committed, and whether no key was left."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return _try_batch(engine, settings, job, step, size)
        except DBAPIError as error:
            if not _retryable(error):
                raise
            if attempt == ATTEMPTS:
                what = f"a batch of job {job.id} ({job.kind}) failed {ATTEMPTS} times, last by: {_said(error)}"
                raise Retryable(what) from error
        time.sleep(random.uniform(0.5, 1) * min(_FIRST_PAUSE * 2**attempt, _LONGEST_PAUSE))
    raise AssertionError("unreachable")


def _try_batch(engine: Engine, settings: Settings, job: Job, step: Step, size: int) -> tuple[Job, bool]:
    began = time.monotonic()
    with begin(engine) as connection:
        stands = get(connection, settings, job.id, lock=True)
        if stands.state != "running":
            return stands, True
        batch = step(connection, stands.cursor, size)
        if batch.last_key is None:
            return stands, True
        counts = dict(stands.counts)
        for name, value in batch.counts.items():
            counts[name] = counts.get(name, 0) + value
        row = connection.execute(
            text(
                f"update {quoted(settings.ledger_schema)}.jobs set cursor = :cursor, "
                "items_done = items_done + :done, items_failed = items_failed + :failed, "
                "last_batch_seconds = :seconds, updated_at = clock_timestamp(), "
                "details = details || jsonb_build_object('counts', cast(:counts as jsonb)) "
                f"where id = :id returning {_COLUMNS}"
            ),
            {
                "id": job.id,
                "cursor": batch.last_key,
                "done": batch.done,
                "failed": batch.failed,
                "seconds": time.monotonic() - began,
                "counts": json.dumps(counts),
            },
        ).one()
    return _job(row), False


def leave(engine: Engine, settings: Settings, job: Job, state: str, error: str | None = None) -> Job:
    """Take a running job out of work as ``paused`` or ``failed``, with its checkpoint and on record."""
    with begin(engine) as connection:
        row = connection.execute(
            text(
                f"update {quoted(settings.ledger_schema)}.jobs set state = :state, "
                "updated_at = clock_timestamp(), "
                "details = details || jsonb_strip_nulls(jsonb_build_object('error', cast(:error as text))) "
                f"where id = :id and state = 'running' returning {_COLUMNS}"
            ),
            {"id": job.id, "state": state, "error": error},
        ).one_or_none()
        if row is None:
            return replace(get(connection, settings, job.id), resumed=job.resumed)
        word = "pause" if state == "paused" else "failed"
        record(
            connection,
            settings,
            f"{job.kind} {word}",
            Act(job.actor, job.reason),
            mapping=job.mapping,
            job_id=job.id,
            details={"error": error} if error else None,
        )
    return _job(row, resumed=job.resumed)


def _leave_somehow(engine: Engine, settings: Settings, job: Job, error: BaseException) -> None:
    """Without a database the job stays ``running``; the next start resumes it all the same."""
    interrupted = not isinstance(error, Exception)
    try:
        if interrupted:
            leave(engine, settings, job, "paused")
        else:
            leave(engine, settings, job, "failed", _said(error))
    except DBAPIError:
        return


def _resume(settings: Settings) -> str:
    return (
        f"update {quoted(settings.ledger_schema)}.jobs set state = 'running', actor = :actor, reason = :reason, "
        "version = :version, items_total = coalesce(:total, items_total), updated_at = clock_timestamp(), "
        "finished_at = null, details = (details - 'error') || cast(:details as jsonb) "
        f"where id = :id returning {_COLUMNS}"
    )


def _insert(settings: Settings) -> str:
    return (
        f"insert into {quoted(settings.ledger_schema)}.jobs "
        "(kind, mapping, actor, reason, version, items_total, details) values "
        "(:kind, :mapping, :actor, :reason, :version, :total, cast(:details as jsonb)) "
        "on conflict (kind, mapping) where state in ('running', 'paused') do nothing "
        f"returning {_COLUMNS}"
    )


def begin(engine: Engine) -> AbstractContextManager[Connection]:
    """A transaction at READ COMMITTED, whatever the engine is set to: a batch locks first and reads after."""
    return engine.execution_options(isolation_level="READ COMMITTED").begin()


def _job(row: Row[Any], *, resumed: bool = False) -> Job:
    return Job(**row._mapping, resumed=resumed)


def _sqlstate(error: DBAPIError) -> str:
    return str(getattr(error.orig, "sqlstate", None) or "")


def _retryable(error: DBAPIError) -> bool:
    state = _sqlstate(error)
    lost = error.connection_invalidated or (not state and isinstance(error, OperationalError))
    return lost or state.startswith(("40", *_LOST)) or state == "55P03"


def _said(error: BaseException) -> str:
    """The error's own words on one line; of the driver's only the server's sentence, never the statement."""
    if isinstance(error, DBAPIError):
        diagnostic = getattr(error.orig, "diag", None)
        words = getattr(diagnostic, "message_primary", None) or type(error.orig).__name__
        return f"{words} ({_sqlstate(error) or 'no SQLSTATE'})"
    return " ".join(str(error).split()) or type(error).__name__


def _typed(job: Job, error: DBAPIError) -> LedgerMismatch | LedgerNotInstalled | JobFailed:
    state = _sqlstate(error)
    if state == "WM020":
        return LedgerMismatch(_said(error))
    if state in _NO_FUNCTIONS:
        return LedgerNotInstalled(job.mapping or "", _said(error))
    return JobFailed(job.id, job.kind, _said(error))
