"""Jobs over all accounts of a mapping: begun, resumed, worked on, ended; the batches stand in the database.

A batch's work, its mark and the job's counters are one transaction, so a process may be killed at any point: the
next run, or another worker, takes the batch up again. Any number of workers and starts work on one job side by side.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import replace
from datetime import timedelta
from math import isfinite
from typing import Any, Final, TypeVar

from sqlalchemy import Connection, Engine, text

from walletmigrate import config, job_batches, standing
from walletmigrate.audit import Act, record
from walletmigrate.capture import fence_problems
from walletmigrate.config import Settings
from walletmigrate.errors import LedgerNotInstalled, PreconditionRefused, UsageError
from walletmigrate.functions import FUNCTIONS_VERSION, Installed, alteration, fingerprint, installed_mapping, relation
from walletmigrate.job_outages import ATTEMPTS, Patience
from walletmigrate.job_rows import (
    COLUMNS,
    RESUMABLE,
    Batch,
    Job,
    begin,
    cancelled,
    change,
    configure,
    get,
    has_own_command,
    job_of,
    leave,
    newest,
    opening,
    resuming,
)
from walletmigrate.job_work import Progress, Step, Stop, Work
from walletmigrate.job_workers import Crew
from walletmigrate.retired import legacy_table
from walletmigrate.schema import quoted
from walletmigrate.standing import INSTALL, REASON
from walletmigrate.throttle import Throttle, of_settings

__all__ = [
    "ATTEMPTS",
    "Batch",
    "Job",
    "Progress",
    "Step",
    "Stop",
    "begin",
    "cancel",
    "count_items",
    "finish",
    "get",
    "leave",
    "manned",
    "newest",
    "obstacles",
    "persist",
    "phase",
    "require_installed",
    "run_batches",
    "start_or_resume",
    "started",
    "visibility",
]

_T = TypeVar("_T")
FRESH: Final = timedelta(days=7)
"""How long ago the last batch of a job may be that is resumed without being forced."""


def start_or_resume(
    engine: Engine,
    settings: Settings,
    kind: str,
    mapping_name: str,
    act: Act,
    *,
    total: int | None = None,
    details: dict[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    force: bool = False,
) -> Job:
    """Go on with the newest job of this kind and mapping unless it is done or cancelled; else make one.

    ``options`` are settings that a new one begins with (`job_options.Options`). The job's actor and reason are those of
    the last start; the audit log has them all. Raises PreconditionRefused for a job of other functions, or one that
    nobody has worked on for `FRESH`, unless ``force``.
    """
    with begin(engine) as connection:
        return started(
            connection, settings, kind, mapping_name, act, total=total, details=details, options=options, force=force
        )


def started(
    connection: Connection,
    settings: Settings,
    kind: str,
    mapping_name: str,
    act: Act,
    *,
    total: int | None = None,
    details: dict[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    force: bool = False,
    ageless: bool = False,
    wanted: Callable[[Job], bool] | None = None,
) -> Job:
    """`start_or_resume` in the caller's transaction, which is at READ COMMITTED.

    ``ageless``: it is resumed however long ago it was worked on, but not with other functions.
    ``wanted`` is asked of an unfinished job, under its lock, before it is resumed, also of one that another process has
    made in this moment. One that is not wanted is cancelled, and a new one made; or it raises, and all stays as it is.
    """
    values = {**opening(kind, mapping_name, act, FUNCTIONS_VERSION, details), "total": total}
    row, resumed = None, False
    while row is None:
        found = newest(connection, settings, kind, mapping_name, lock=True)
        resumed = found is not None and found.state in RESUMABLE
        if found is not None and resumed and wanted is not None and not wanted(found):
            cancelled(connection, settings, found, act)
            resumed = False
        if found is not None and resumed:
            if not force:
                _refuse_old(connection, found, ageless=ageless)
            job_batches.revive(connection, settings, found, aside=found.state != "running")
            row = connection.execute(text(_resume(settings)), {**values, "id": found.id}).one()
        else:
            # No row: another process has just made the job, and the next look finds it.
            begun = {**values, "options": json.dumps(dict(options or {}))}
            row = connection.execute(text(_insert(settings)), begun).one_or_none()
    job = job_of(row, resumed=resumed)
    word = "resume" if resumed else "start"
    record(connection, settings, f"{kind} {word}", act, mapping=mapping_name, job_id=job.id, details=details)
    return job


def run_batches(
    engine: Engine,
    settings: Settings,
    job: Job,
    step: Step,
    *,
    last: Step | None = None,
    batch_size: int | None = None,
    rate: float | None = None,
    workers: int = 1,
    executor: Executor | None = None,
    throttle: Throttle | None = None,
    progress: Progress | None = None,
    stop: Stop | None = None,
) -> Job:
    """Run batches until no key is left; the job is then still ``running``, and the caller's to `finish`.

    ``last`` is the step of a last pass over all keys once more, for what was written meanwhile. ``batch_size``
    (legacy rows) and ``rate`` (accounts a second, over all workers; `math.inf`: as fast as it goes) are kept as the
    job's settings; None leaves them as they are, and by default the size tunes itself and the rate has no bound.

    More than one of ``workers`` are processes of this machine, or tasks of any ``executor``. They connect with the
    engine's URL, and get the steps pickled; ``progress`` and ``stop`` stay here, and are called a few times a second.
    ``throttle`` makes the job stand still for as long as it says; by default the one that the configuration asks for.

    Returns the job ``paused`` when ``stop`` said so, or in the state that another process gave it. Ctrl-C pauses it
    and goes on as KeyboardInterrupt. A batch that fails is halved until the one bad row is set aside; the job fails
    when its first batches fail alike, or when too many rows are set aside (JobFailed), when a batch ran out of
    attempts (Retryable), or when functions are missing (LedgerNotInstalled); a failed job is resumable. A database that
    is away is waited for; DatabaseUnreachable if ``stop`` says so before it is back.
    """
    manned(workers)
    asked = {"batch_size": batch_size, "rate": rate}
    given = {name: one if isfinite(one) else None for name, one in asked.items() if one is not None}
    if given:
        with begin(engine) as connection:
            configure(connection, settings, job.id, given)
    steps = (step,) if last is None else (step, last)
    throttle = throttle or of_settings(engine, settings, job.id, job.mapping or "")
    work = Work(engine, settings, steps, progress=progress, throttle=throttle)
    if stop is not None:
        work = replace(work, stop=stop)
    if executor is None and workers == 1:
        return work.run(job)[0]
    return Crew(work, workers, executor).run(job)[0]


def manned(workers: int) -> None:
    """Raise UsageError where nobody would work; asked before a job begins, which would else stand there."""
    if workers < 1:
        raise UsageError(f"{workers} workers: name one at least")


def finish(
    engine: Engine,
    settings: Settings,
    mapping: config.Mapping,
    job: Job,
    act: Act,
    *,
    details: Mapping[str, Any] | None = None,
    failed: int | None = None,
    closing: Callable[[Connection, Job], Mapping[str, Any]] | None = None,
) -> Job:
    """Call the job done and write the audit row. Idempotent: what is not running stays as it is.

    ``closing`` is what comes before that, once: in the same transaction, under the job's lock; gives more details.
    ``failed`` accounts, if known better than by the sum over the batches. Raises PreconditionRefused, and the job is
    failed, if the fence fell while it ran: accounts could then be behind without knowing it.
    """

    def ended() -> Job:
        with begin(engine) as connection:
            reasons = obstacles(connection, settings, mapping)
        if reasons:
            refused = PreconditionRefused(job.kind, reasons)
            leave(engine, settings, job, "failed", str(refused))
            raise refused
        with begin(engine) as connection:
            now = get(connection, settings, job.id, lock=True)
            if now.state != "running":
                return replace(now, resumed=job.resumed)
            more = closing(connection, now) if closing is not None else {}
            done = change(
                connection,
                settings,
                job.id,
                "state = 'done', items_failed = coalesce(:failed, items_failed), "
                "items_total = greatest(items_total, items_done + coalesce(:failed, items_failed)), "
                "held = null, held_at = null, finished_at = clock_timestamp(), updated_at = clock_timestamp()",
                failed=failed,
            )
            job_batches.clear(connection, settings, job.id)
            facts = {**done.counts, "failed": done.items_failed, **(details or {}), **more}
            record(connection, settings, f"{job.kind} done", act, mapping=job.mapping, job_id=job.id, details=facts)
        return replace(done, resumed=job.resumed)

    return persist(engine, job, ended)


def persist(engine: Engine, job: Job, call: Callable[[], _T]) -> _T:
    """What ``call`` gives, tried again while that may help, as batches are: for what comes before and after them.

    It has to be something that may be done twice. Raises Retryable, and what no other try would mend.
    """
    return Patience(engine, f"job {job.id} ({job.kind})").persist(call)


def cancel(connection: Connection, settings: Settings, kind: str, mapping_name: str, act: Act) -> int | None:
    """Give up the unfinished job of this kind, so that a later one begins at the first key; its id or None.

    A batch in flight is rolled back. Of a reconciliation the account at hand is still corrected, none after it, and
    what was corrected stays: `reconciliations.undo` takes it back.
    """
    found = newest(connection, settings, kind, mapping_name, lock=True)
    if found is None or found.state not in RESUMABLE:
        return None
    cancelled(connection, settings, found, act)
    return found.id


def require_installed(connection: Connection, settings: Settings, mapping: config.Mapping) -> Installed:
    """What the database knows of the mapping. Raises LedgerNotInstalled when that is nothing."""
    standing.require_installed(connection, settings)
    known = installed_mapping(connection, settings.ledger_schema, mapping.name)
    if known is None:
        raise LedgerNotInstalled(mapping.name, "the ledger does not know this mapping", INSTALL)
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
    altered = alteration(connection, mapping, known, lambda: legacy_table(connection, settings.ledger_schema, mapping))
    return [*found, altered] if altered else found


def phase(connection: Connection, settings: Settings) -> str:
    """The phase as the database has it."""
    return str(connection.scalar(text(f"select phase from {quoted(settings.ledger_schema)}.control")))


def count_items(connection: Connection, mapping: config.Mapping) -> int:
    """How many accounts a job over the whole legacy table meets."""
    rows = connection.scalar(text(f"select count(*) from {relation(mapping)}"))
    return int(rows or 0) * len(mapping.columns)


def _refuse_old(connection: Connection, job: Job, *, ageless: bool) -> None:
    reasons = []
    cancel = f"walletmigrate jobs cancel {job.id} {REASON}"
    ways = f"walletmigrate jobs resume {job.id} --force {REASON}, or: {cancel}"
    if has_own_command(job):
        # Begun anew, it finds what was done before as it stands.
        ways = f"{cancel}; then: {resuming(job)}"
    if job.functions_version != FUNCTIONS_VERSION:
        what = f"job {job.id} was begun with functions {job.functions_version}, these are {FUNCTIONS_VERSION}"
        reasons.append((what, ways))
    old = text("select clock_timestamp() - :at > :fresh")
    if not ageless and connection.scalar(old, {"at": job.updated_at, "fresh": FRESH}):
        what = f"job {job.id} was last worked on at {job.updated_at:%Y-%m-%d %H:%M}, more than {FRESH.days} days ago"
        reasons.append((what, ways))
    if reasons:
        raise PreconditionRefused(f"resuming the {job.kind}", reasons)


def _resume(settings: Settings) -> str:
    return (
        f"update {quoted(settings.ledger_schema)}.jobs set state = 'running', actor = :actor, reason = :reason, "
        "version = :version, functions_version = :functions, items_total = coalesce(:total, items_total), "
        "updated_at = clock_timestamp(), finished_at = null, held = null, held_at = null, "
        "details = (details - 'error') || cast(:details as jsonb) "
        f"where id = :id returning {COLUMNS}"
    )


def _insert(settings: Settings) -> str:
    return (
        f"insert into {quoted(settings.ledger_schema)}.jobs "
        "(kind, mapping, actor, reason, version, functions_version, items_total, details, settings) values "
        "(:kind, :mapping, :actor, :reason, :version, :functions, :total, cast(:details as jsonb), "
        "cast(:options as jsonb)) "
        "on conflict (kind, mapping) where state in ('running', 'paused') do nothing "
        f"returning {COLUMNS}"
    )
