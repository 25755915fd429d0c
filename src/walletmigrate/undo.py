"""Take back the openings of a backfill, by reversals, as long as no other transaction stands on them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from sqlalchemy import Connection, Engine, Row, text

from walletmigrate import job_batches, job_rows, job_turns, jobs
from walletmigrate.audit import Act
from walletmigrate.config import Settings
from walletmigrate.errors import PreconditionRefused, UsageError
from walletmigrate.schema import quoted
from walletmigrate.standing import REASON, Reason, require_installed

KIND: Final = "backfill undo"
SHOWN: Final = 1000
"""How many accounts that were left are named."""

_BEFORE: Final = "taken back before"


@dataclass(frozen=True)
class Left:
    """An account that the job opened and that stays as it is, and why."""

    key: str
    bucket: str
    currency: str
    why: str


@dataclass(frozen=True)
class UndoResult:
    """What became of the accounts that backfill ``of`` opened, over all runs of the undo's job, or would (``dry_run``,
    and then no ``job_id``).

    ``undone`` accounts came to balance 0, and turned stale; ``stale`` counts how many of all that were taken back, by
    whichever job, are so still: a backfill between the parts of an undo brings them up again. ``left`` names the first
    thousand of the ``left_count`` that stay, those aside that were ``undone_before``, by another job. ``state`` is
    done, planned, or paused; or failed or cancelled, by another process: then the figures are those of a part.
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
    stale: int = 0

    @property
    def taken_back(self) -> int:
        """How many accounts were taken back, by this job or one before."""
        return self.undone + self.undone_before


def undo(
    engine: Engine,
    settings: Settings,
    job_id: int,
    act: Act,
    *,
    batch_size: int = 500,
    dry_run: bool = False,
    progress: jobs.Progress | None = None,
    stop: jobs.Stop | None = None,
) -> UndoResult:
    """Reverse each opening of a backfill, one account after the other under its lock. Idempotent, resumable.

    A job of turns (`job_turns`), ``batch_size`` accounts each: ``stop``, and an operator's pause or cancellation, hold
    from the next turn on, and the next call goes on behind the last account. The legacy row is true for such an account
    again; the next posting or backfill brings it up. A backfill that is not done is cancelled by it: one that went on
    would leave behind it what was taken back. Raises UsageError where there is no backfill of that id,
    PreconditionRefused while it runs or a batch of it is at work, once the column is retired, while the undo of another
    backfill of this mapping is not finished, or if the fence fell meanwhile; and what `job_turns.run_turns` raises.
    """
    with jobs.begin(engine) as connection:
        mapping = _mapping(connection, settings, job_id)
    undoing = _Undoing(settings, mapping, job_id, act)
    if dry_run:
        return undoing.planned(engine, batch_size)
    # What a batch in flight opened after the last turn had looked would stand for good.
    job_batches.rest(engine, settings, job_id, KIND)
    job = undoing.start(engine)
    job = job_turns.run_turns(
        engine,
        settings,
        job,
        undoing.turn(job.id),
        act,
        size=batch_size,
        closing=undoing.closing(job.id),
        progress=progress,
        stop=stop,
    )
    with jobs.begin(engine) as connection:
        return undoing.result(connection, job)


def _mapping(connection: Connection, settings: Settings, job_id: int) -> str:
    """The mapping that the job went over, if it may be undone."""
    require_installed(connection, settings)
    row = connection.execute(
        text(f"select kind, mapping, state from {quoted(settings.ledger_schema)}.jobs where id = :id"), {"id": job_id}
    ).one_or_none()
    if row is None or row.kind != "backfill":
        is_what = "no job" if row is None else f"a {row.kind}"
        raise UsageError(f"{job_id} is {is_what}, and only a backfill can be undone; see: walletmigrate status")
    reasons = [*_of_state(job_id, row.state), *_of_phase(connection, settings)]
    if reasons:
        raise PreconditionRefused(KIND, reasons)
    return str(settings.mapping(row.mapping).name)


def _of_state(job_id: int, state: str) -> list[Reason]:
    if state != "running":
        return []
    return [(f"job {job_id} is running", f"wait for its end, or: walletmigrate jobs pause {job_id} {REASON}")]


def _of_phase(connection: Connection, settings: Settings) -> list[Reason]:
    if jobs.phase(connection, settings) == "retired":
        return [("the phase is retired: there is no legacy column to be true instead", "")]
    return []


class _Undoing:
    """The undo of one backfill."""

    def __init__(self, settings: Settings, mapping: str, of: int, act: Act) -> None:
        self._settings, self._mapping, self._of, self._act = settings, mapping, of, act
        self._schema = quoted(settings.ledger_schema)

    def start(self, engine: Engine) -> jobs.Job:
        """Begin, or go on with, this undo; one of another backfill is not taken up in its place."""

        def of_this(found: jobs.Job) -> bool:
            of = found.details.get("of")
            if of == self._of:
                return True
            what = f"job {found.id}, the undo of backfill {of}, is {found.state} and not finished"
            mend = f"walletmigrate backfill undo --job {of} {REASON}; or: walletmigrate jobs cancel {found.id} {REASON}"
            raise PreconditionRefused(KIND, [(what, mend)])

        count = text(f"select count(*) from {self._schema}.accounts where mapping = :mapping and job_id = :of")
        with jobs.begin(engine) as connection:
            # In one transaction with the start: an undo that is refused leaves the backfill as it was.
            reasons = _of_state(self._of, job_rows.give_up(connection, self._settings, self._of, self._act).state)
            if reasons:
                raise PreconditionRefused(KIND, reasons)
            total = connection.scalar(count, {"mapping": self._mapping, "of": self._of})
            more: dict[str, Any] = {"total": total, "details": {"of": self._of}, "wanted": of_this}
            return jobs.started(connection, self._settings, KIND, self._mapping, self._act, **more)

    def turn(self, undo: int) -> job_turns.Turn:
        """The next accounts of the job, its cursor and its counts, in one transaction."""

        def turn(connection: Connection, size: int) -> jobs.Batch:
            # A step of the phase waits for no turn.
            refused = _of_phase(connection, self._settings)
            if refused:
                raise PreconditionRefused(KIND, refused)
            job = jobs.get(connection, self._settings, undo)
            rows = self._next(connection, undo, int(job.cursor or 0), size)
            if not rows:
                return jobs.Batch(0, 0, 0, {})
            self._note(connection, job, rows)
            # One that is left has been gone through, and is no failure: nothing is to be mended about it.
            return jobs.Batch(len(rows), len(rows), 0, {})

        return turn

    def closing(self, undo: int) -> job_turns.Closing:
        """Nothing but the look whether it may be called done."""

        def closing(connection: Connection) -> dict[str, Any]:
            reasons = jobs.obstacles(connection, self._settings, self._settings.mapping(self._mapping))
            if reasons:
                raise PreconditionRefused(KIND, reasons)
            return {"of": self._of, **jobs.get(connection, self._settings, undo).counts}

        return closing

    def planned(self, engine: Engine, size: int) -> UndoResult:
        """The same look at all of them, with every write left out."""
        result, after = UndoResult(self._of, self._mapping, None, 0, 0, 0, (), True, "planned"), 0
        while True:
            with jobs.begin(engine) as connection:
                rows = self._next(connection, None, after, size)
            if not rows:
                return result
            after, counts = rows[-1].account, _counts(rows)
            result = replace(
                result,
                undone=result.undone + counts["undone"],
                undone_before=result.undone_before + counts["before"],
                left_count=result.left_count + counts["left"],
                left=(*result.left, *_left(rows))[:SHOWN],
            )

    def result(self, connection: Connection, job: jobs.Job) -> UndoResult:
        """By what stands on the job's row; and how its accounts stand now."""
        counts = job.counts
        query = text(
            f"select count(*) from {self._schema}.accounts where mapping = :mapping and job_id = :of "
            "and state = 'stale' and state_reason = 'opening taken back'"
        )
        stale = connection.scalar(query, {"mapping": self._mapping, "of": self._of})
        left = tuple(Left(**one) for one in job.details.get("items", []))
        figures = (counts.get("undone", 0), counts.get("before", 0), counts.get("left", 0))
        return UndoResult(self._of, self._mapping, job.id, *figures, left, False, job.state, int(stale or 0))

    def _next(self, connection: Connection, undo: int | None, after: int, size: int) -> list[Row[Any]]:
        """The next accounts, taken back or left; ``undo`` None changes nothing."""
        statement = text(
            f"select * from {self._schema}.undo_openings("
            ":mapping, :of, :undo, :after, :limit, :actor, :reason, :dry_run)"
        )
        values = {"mapping": self._mapping, "of": self._of, "undo": undo, "after": after, "limit": size}
        act = {"actor": self._act.actor, "reason": self._act.reason, "dry_run": undo is None}
        return list(connection.execute(statement, {**values, **act}))

    def _note(self, connection: Connection, job: jobs.Job, rows: list[Row[Any]]) -> None:
        """Move the job's cursor behind these accounts, and add up what became of them."""
        counts = {name: job.counts.get(name, 0) + number for name, number in _counts(rows).items()}
        items = job.details.get("items", [])
        more = {"counts": counts, "items": [*items, *map(asdict, _left(rows))][:SHOWN]}
        changes = "cursor = :cursor, details = details || cast(:more as jsonb)"
        values = {"cursor": str(rows[-1].account), "more": json.dumps(more)}
        job_rows.change(connection, self._settings, job.id, changes, **values)


def _counts(rows: list[Row[Any]]) -> dict[str, int]:
    undone, before = sum(row.undone for row in rows), sum(row.why == _BEFORE for row in rows)
    return {"undone": undone, "before": before, "left": len(rows) - undone - before}


def _left(rows: list[Row[Any]]) -> list[Left]:
    return [Left(row.key, row.bucket, row.currency, row.why) for row in rows if row.why not in (None, _BEFORE)]
