"""Take back the openings of a backfill, by reversals, as long as no other transaction stands on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from sqlalchemy import Connection, Engine, text

from walletmigrate import jobs
from walletmigrate.audit import Act
from walletmigrate.config import Settings
from walletmigrate.errors import PreconditionRefused, UsageError
from walletmigrate.schema import quoted
from walletmigrate.standing import REASON, Reason, require_installed, show

KIND: Final = "backfill undo"
SHOWN: Final = 1000
"""How many accounts that were left are named."""


@dataclass(frozen=True)
class Left:
    """An account that the job opened and that stays as it is, and why."""

    key: str
    bucket: str
    currency: str
    why: str


@dataclass(frozen=True)
class UndoResult:
    """What became of the accounts that backfill ``of`` opened, or would (``dry_run``, and then no ``job_id``).

    ``undone`` accounts are stale now, at balance 0; ``left`` names the first thousand of the ``left_count`` that stay,
    those aside that were ``undone_before``. ``state`` is done, planned, or paused; or failed or cancelled, by another
    process: then the figures are those of a part.
    """

    of: int
    mapping: str
    job_id: int | None
    undone: int
    undone_before: int
    left_count: int
    left: tuple[Left, ...]
    dry_run: bool
    state: str


def undo(
    engine: Engine,
    settings: Settings,
    job_id: int,
    act: Act,
    *,
    batch_size: int = 500,
    dry_run: bool = False,
    stop: Callable[[], bool] | None = None,
) -> UndoResult:
    """Reverse each opening of a backfill, one account after the other under its lock. Idempotent, resumable.

    The legacy row is true for such an account again; the next posting or backfill brings it up. Raises UsageError
    where there is no backfill of that id, PreconditionRefused while it runs, once the column is retired, or while the
    undo of another backfill of this mapping is not finished.
    """
    with engine.begin() as connection:
        mapping = _mapping(connection, settings, job_id)
    if dry_run:
        return _all(engine, settings, UndoResult(job_id, mapping, None, 0, 0, 0, (), True, "planned"), act, batch_size)
    job = _start(engine, settings, mapping, job_id, act)
    result = UndoResult(job_id, mapping, job.id, 0, 0, 0, (), False, job.state)
    result = _all(engine, settings, result, act, batch_size, stop)
    if result.state == "stopped":
        return replace(result, state=jobs.leave(engine, settings, job, "paused").state)
    if result.state == "running":
        facts = {"of": job_id, "undone": result.undone, "left": result.left_count, "before": result.undone_before}
        job = jobs.finish(engine, settings, settings.mapping(mapping), job, act, details=facts)
        return replace(result, state=job.state)
    return result


def _mapping(connection: Connection, settings: Settings, job_id: int) -> str:
    """The mapping that the job went over, if it may be undone."""
    require_installed(connection, settings)
    row = connection.execute(
        text(f"select kind, mapping, state from {quoted(settings.ledger_schema)}.jobs where id = :id"), {"id": job_id}
    ).one_or_none()
    if row is None or row.kind != "backfill":
        is_what = "no job" if row is None else f"a {row.kind}"
        raise UsageError(f"{job_id} is {is_what}, and only a backfill can be undone; see: walletmigrate status")
    reasons: list[Reason] = []
    if row.state == "running":
        reasons.append((f"job {job_id} is running", "stop it by Ctrl-C where it runs, or wait for its end"))
    if show(connection, settings).phase == "retired":
        reasons.append(("the phase is retired: there is no legacy column to be true instead", ""))
    if reasons:
        raise PreconditionRefused(KIND, reasons)
    return str(settings.mapping(row.mapping).name)


def _start(engine: Engine, settings: Settings, mapping: str, job_id: int, act: Act) -> jobs.Job:
    """Begin, or go on with, the undo of this backfill; one of another backfill is not taken up in its place."""

    def of_this(found: jobs.Job) -> bool:
        of = found.details.get("of")
        if of == job_id:
            return True
        what = f"job {found.id}, the undo of backfill {of}, is {found.state} and not finished"
        mend = f"walletmigrate backfill undo --job {of} {REASON}; or: walletmigrate jobs cancel {found.id} {REASON}"
        raise PreconditionRefused(KIND, [(what, mend)])

    with jobs.begin(engine) as connection:
        return jobs.started(connection, settings, KIND, mapping, act, details={"of": job_id}, wanted=of_this)


def _all(
    engine: Engine,
    settings: Settings,
    result: UndoResult,
    act: Act,
    batch_size: int,
    stop: Callable[[], bool] | None = None,
) -> UndoResult:
    """Batch by batch, each in a transaction of its own; done again, it finds what is taken back already.

    Each batch holds the job's row: once a pause or a cancellation has committed, nothing more is done for the job.
    """
    statement = text(
        f"select * from {quoted(settings.ledger_schema)}.undo_openings("
        ":mapping, :job, :undo, :after, :limit, :actor, :reason, :dry_run)"
    )
    after = 0
    while stop is None or not stop():
        with jobs.begin(engine) as connection:
            if result.job_id is not None:
                state = jobs.get(connection, settings, result.job_id, lock=True).state
                if state != "running":
                    return replace(result, state=state)
            rows = connection.execute(
                statement,
                {
                    "mapping": result.mapping,
                    "job": result.of,
                    "undo": result.job_id,
                    "after": after,
                    "limit": batch_size,
                    "actor": act.actor,
                    "reason": act.reason,
                    "dry_run": result.dry_run,
                },
            ).all()
        if not rows:
            return result
        after = rows[-1].account
        before = sum(row.why == "taken back before" for row in rows)
        left = [row for row in rows if not row.undone and row.why != "taken back before"]
        named = (Left(row.key, row.bucket, row.currency, row.why) for row in left)
        result = replace(
            result,
            undone=result.undone + sum(row.undone for row in rows),
            undone_before=result.undone_before + before,
            left_count=result.left_count + len(left),
            left=(*result.left, *named)[:SHOWN],
        )
    return replace(result, state="stopped")
