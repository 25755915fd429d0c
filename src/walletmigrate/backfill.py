"""Open an account for every legacy row, and bring the stale ones up, while the application keeps running."""

from __future__ import annotations

import time
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Final

from sqlalchemy import Connection, Engine, text

from walletmigrate import job_batches, jobs
from walletmigrate.audit import Act
from walletmigrate.comparison import Comparison, Group, snapshot
from walletmigrate.config import Mapping, Settings
from walletmigrate.errors import PreconditionRefused, UsageError
from walletmigrate.job_options import PACE
from walletmigrate.schema import quoted
from walletmigrate.standing import REASON

KIND: Final = "backfill"
_DUE: Final = ("stale", "closed")
_FILLED_PERCENT: Final = 70
"""How full openings leave a page of accounts."""

KEPT_PERCENT: Final = 90
"""How full a page may become before postings look for dead versions on it; more than 90 means 90 to PostgreSQL."""


@dataclass(frozen=True)
class BackfillResult:
    """What a backfill did, over all runs of its job, or would do (``dry_run``, and then no ``job_id``).

    ``keys`` are legacy rows; ``opened``, ``resynced`` and ``failed`` are accounts. A failed one has a legacy
    value that is no exact amount, or its row was set aside; it stays as it was. ``state`` is ``done``, or
    ``paused`` by the caller's stop; ``seconds`` are those of this run.
    """

    job_id: int | None
    opened: int
    resynced: int
    failed: int
    keys: int
    seconds: float
    dry_run: bool
    resumed: bool
    state: str


def backfill(
    engine: Engine,
    settings: Settings,
    mapping: Mapping,
    act: Act,
    *,
    batch_size: int | None = None,
    rate: float | None = None,
    force: bool = False,
    workers: int = 1,
    executor: Executor | None = None,
    dry_run: bool = False,
    progress: jobs.Progress | None = None,
    stop: jobs.Stop | None = None,
) -> BackfillResult:
    """Backfill a mapping, or go on with its unfinished backfill. Idempotent: what is in step stays as it is.

    Rows that are inserted or written while it runs are covered by a last pass; an account that turns stale without its
    row being written, as `verify --mark-stale` does it, by the next backfill. A new one is paced (`job_options.PACE`
    for each worker) unless ``rate`` says another, `math.inf` as fast as it goes. ``batch_size``, ``rate``,
    ``workers``, ``executor`` and ``force`` as in `jobs.run_batches` and `jobs.start_or_resume`. Raises
    PreconditionRefused in phase `legacy` or without the fence as it was made (also if the phase went back or the
    fence fell while the job ran), LedgerNotInstalled, UsageError for a rate of 0 or less or for no worker, and what
    these raise.
    """
    if rate is not None and not rate > 0:
        raise UsageError(f"a rate of {rate}: name how many accounts a second, more than 0")
    jobs.manned(workers)
    began = time.monotonic()
    with snapshot(engine) as connection:
        _refuse(connection, settings, mapping)
        if dry_run:
            return _plan(connection, settings, mapping, began)
        total = jobs.count_items(connection, mapping)
    paced = {"rate": PACE * workers}
    job = jobs.start_or_resume(engine, settings, KIND, mapping.name, act, total=total, options=paced, force=force)
    jobs.persist(engine, job, lambda: _fill(engine, settings, _FILLED_PERCENT))
    main, late = steps(settings, mapping, job.id)
    job = jobs.run_batches(
        engine,
        settings,
        job,
        main,
        last=late,
        batch_size=batch_size,
        rate=rate,
        workers=workers,
        executor=executor,
        progress=progress,
        stop=stop,
    )
    if job.state == "running":
        found = job
        aside = jobs.persist(engine, found, lambda: _closed(engine, settings, found))
        failed = job.counts.get("unfit", 0) + aside * len(mapping.columns)
        job = jobs.finish(engine, settings, mapping, job, act, failed=failed)
    counts = job.counts
    return BackfillResult(
        job_id=job.id,
        opened=counts.get("opened", 0),
        resynced=counts.get("resynced", 0),
        failed=job.items_failed,
        keys=counts.get("keys", 0),
        seconds=time.monotonic() - began,
        dry_run=False,
        resumed=job.resumed,
        state=job.state,
    )


def _closed(engine: Engine, settings: Settings, job: jobs.Job) -> int:
    """What is left to do when no key is; how many rows were set aside."""
    with engine.begin() as connection:
        connection.execute(text(f"select {quoted(settings.ledger_schema)}.fold_system_accounts()"))
        aside = len(job_batches.set_aside(connection, settings, job.id))
    _fill(engine, settings, KEPT_PERCENT)
    return aside


def _fill(engine: Engine, settings: Settings, percent: int) -> None:
    with engine.begin() as connection:
        connection.execute(
            text(f"select {quoted(settings.ledger_schema)}.fill_accounts(:percent)"), {"percent": percent}
        )


def _refuse(connection: Connection, settings: Settings, mapping: Mapping) -> None:
    reasons = jobs.obstacles(connection, settings, mapping)
    reasons += _of_phase(jobs.phase(connection, settings))
    if reasons:
        raise PreconditionRefused(KIND, reasons)
    jobs.visibility(connection, mapping, KIND)


def _of_phase(phase: str) -> list[tuple[str, str]]:
    if phase == "legacy":
        what = "the phase is legacy: the adapter would leave every account that it writes behind"
        return [(what, f"walletmigrate phase advance {REASON}")]
    if phase == "retired":
        return [("the phase is retired: there is no legacy column to open accounts from", "")]
    return []


@dataclass(frozen=True)
class BackfillStep:
    """A batch of a backfill: of its main pass, or (``late``) of the last one over what was written meanwhile."""

    statement: str
    settings: Settings
    job_id: int
    columns: int
    late: bool

    def __call__(self, connection: Connection, after: str | None, upto: str | None) -> jobs.Batch:
        """Open and resync the accounts of a span of keys. Raises PreconditionRefused: it ends the job as failed."""
        # A step back is never gated and waits for no batch, so each batch looks. One in flight may still commit: what
        # it opens is in step, and turns stale with its next write, as if it had come before.
        refused = _of_phase(jobs.phase(connection, self.settings))
        if refused:
            raise PreconditionRefused(KIND, refused)
        values = {"after": after, "upto": upto, "job": self.job_id}
        row = connection.execute(text(self.statement), values).one()
        counts = {"opened": row.opened, "resynced": row.resynced}
        written = row.opened + row.resynced
        if self.late:
            # It has looked at every value once more: what the main pass counted as failed may be mended since.
            keys = row.opened // self.columns
            return jobs.Batch(keys, row.opened, 0, {**counts, "keys": keys, "unfit": row.failed}, written)
        done = row.keys * self.columns - row.failed
        return jobs.Batch(row.keys, done, row.failed, {**counts, "keys": row.keys}, written)


def steps(settings: Settings, mapping: Mapping, job_id: int) -> tuple[BackfillStep, BackfillStep]:
    """The work of the main and of the last pass."""

    def step(function: str, *, late: bool) -> BackfillStep:
        called = f"{quoted(settings.ledger_schema)}.{function}_{mapping.name}"
        statement = f"select * from {called}(cast(:after as text), cast(:upto as text), :job)"
        return BackfillStep(statement, settings, job_id, len(mapping.columns), late)

    return step("backfill", late=False), step("late", late=True)


def _plan(connection: Connection, settings: Settings, mapping: Mapping, began: float) -> BackfillResult:
    groups, _ = Comparison(connection, settings, mapping).groups(connection)
    alive = [group for group in groups if group.lives]

    def count(chosen: list[Group]) -> int:
        return sum(group.accounts for group in chosen)

    return BackfillResult(
        job_id=None,
        opened=count([group for group in alive if group.exact and group.state == "absent"]),
        resynced=count([group for group in alive if group.exact and group.state in _DUE]),
        failed=count([group for group in alive if not group.exact]),
        keys=count(alive) // len(mapping.columns),
        seconds=time.monotonic() - began,
        dry_run=True,
        resumed=False,
        state="planned",
    )
