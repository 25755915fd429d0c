"""Make the ledger alone true, account by account, and back: the jobs behind ``freeze`` and ``unfreeze``.

The phase is moved first, by its own step, so that accounts that appear meanwhile come out on the right side.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Final, Literal

from sqlalchemy import Connection, Engine, text

from walletmigrate import jobs
from walletmigrate.audit import Act
from walletmigrate.comparison import Comparison, Group, snapshot
from walletmigrate.config import Mapping, Settings
from walletmigrate.errors import PreconditionRefused
from walletmigrate.schema import quoted
from walletmigrate.standing import show

Kind = Literal["freeze", "unfreeze"]
_OPPOSITE: Final[dict[Kind, Kind]] = {"freeze": "unfreeze", "unfreeze": "freeze"}
_COUNTED: Final[dict[Kind, str]] = {"freeze": "frozen", "unfreeze": "unfrozen"}


@dataclass(frozen=True)
class FreezeResult:
    """What a freeze or an unfreeze did, over all runs of its job, or would do (``dry_run``, no ``job_id``).

    ``changed`` accounts were frozen or unfrozen. ``refused`` are left on the other side at the end: after a
    freeze accounts that are absent, stale or differ from legacy; after an unfreeze frozen ones whose legacy
    row is gone. ``state`` is ``done``, or ``paused`` by the caller's stop; ``seconds`` are those of this run.
    """

    kind: Kind
    job_id: int | None
    changed: int
    refused: int
    keys: int
    seconds: float
    dry_run: bool
    resumed: bool
    state: str


def freeze(
    engine: Engine,
    settings: Settings,
    mapping: Mapping,
    act: Act,
    *,
    batch_size: int | None = None,
    force: bool = False,
    workers: int = 1,
    executor: Executor | None = None,
    dry_run: bool = False,
    progress: jobs.Progress | None = None,
    stop: jobs.Stop | None = None,
) -> FreezeResult:
    """Freeze every mirrored account that equals its legacy row, or resume the unfinished freeze. Idempotent.

    What is refused stays as it was: run a backfill, then freeze again. Raises PreconditionRefused unless the
    phase is `frozen` (a dry run may come before it) and the fence stands as made, LedgerNotInstalled, and what
    `jobs.run_batches` raises.
    """
    return _run(
        "freeze",
        engine,
        settings,
        mapping,
        act,
        batch_size=batch_size,
        force=force,
        workers=workers,
        executor=executor,
        dry_run=dry_run,
        progress=progress,
        stop=stop,
    )


def unfreeze(
    engine: Engine,
    settings: Settings,
    mapping: Mapping,
    act: Act,
    *,
    batch_size: int | None = None,
    force: bool = False,
    workers: int = 1,
    executor: Executor | None = None,
    dry_run: bool = False,
    progress: jobs.Progress | None = None,
    stop: jobs.Stop | None = None,
) -> FreezeResult:
    """Write every frozen account's balance to its legacy row and mirror it again. Idempotent, resumable.

    Raises PreconditionRefused while the phase is `frozen` (a dry run may come before it is left) or without the
    fence as it was made, LedgerNotInstalled, and what `jobs.run_batches` raises. A legacy row that does not take the
    balance is set aside, and its account stays frozen.
    """
    return _run(
        "unfreeze",
        engine,
        settings,
        mapping,
        act,
        batch_size=batch_size,
        force=force,
        workers=workers,
        executor=executor,
        dry_run=dry_run,
        progress=progress,
        stop=stop,
    )


def _run(
    kind: Kind,
    engine: Engine,
    settings: Settings,
    mapping: Mapping,
    act: Act,
    *,
    batch_size: int | None,
    force: bool,
    workers: int,
    executor: Executor | None,
    dry_run: bool,
    progress: jobs.Progress | None,
    stop: jobs.Stop | None,
) -> FreezeResult:
    began = time.monotonic()
    with snapshot(engine) as connection:
        _refuse(kind, connection, settings, mapping, dry_run=dry_run)
        if dry_run:
            return _plan(kind, connection, settings, mapping, began)
        total = jobs.count_items(connection, mapping)
    with jobs.begin(engine) as connection:
        # Once more, under the lock of the phase, which nobody moves until the job stands: between the look and
        # the start the phase could go the other way, and this job would turn accounts behind the one that follows.
        show(connection, settings, lock=True)
        _refuse(kind, connection, settings, mapping)
        # An unfinished job of the other direction would later go on behind keys that this one has turned.
        jobs.cancel(connection, settings, _OPPOSITE[kind], mapping.name, act)
        job = jobs.started(connection, settings, kind, mapping.name, act, total=total, force=force)
    job = jobs.run_batches(
        engine,
        settings,
        job,
        _step(kind, settings, mapping),
        batch_size=batch_size,
        workers=workers,
        executor=executor,
        progress=progress,
        stop=stop,
    )
    with snapshot(engine) as connection:
        refused = _left(kind, Comparison(connection, settings, mapping).groups(connection)[0])
    if job.state == "running":
        job = jobs.finish(engine, settings, mapping, job, act, details={"refused": refused})
    return FreezeResult(
        kind=kind,
        job_id=job.id,
        changed=job.counts.get(_COUNTED[kind], 0),
        refused=refused,
        keys=job.counts.get("keys", 0),
        seconds=time.monotonic() - began,
        dry_run=False,
        resumed=job.resumed,
        state=job.state,
    )


def _refuse(kind: Kind, connection: Connection, settings: Settings, mapping: Mapping, *, dry_run: bool = False) -> None:
    reasons = jobs.obstacles(connection, settings, mapping)
    phase = jobs.phase(connection, settings)
    if kind == "freeze" and phase != "frozen" and not dry_run:
        what = f"the phase is {phase}: accounts are frozen only in phase frozen"
        reasons.append((what, f"walletmigrate freeze --confirm {mapping.name} --reason '…'  # moves the phase first"))
    if kind == "unfreeze" and phase == "frozen" and not dry_run:
        what = "the phase is frozen: an account that appears now would be frozen again"
        reasons.append((what, f"walletmigrate unfreeze --confirm {mapping.name} --reason '…'  # moves the phase first"))
    if phase == "retired":
        reasons.append(("the phase is retired: there is no legacy column", ""))
    if reasons:
        raise PreconditionRefused(kind, reasons)
    jobs.visibility(connection, mapping, kind)


@dataclass(frozen=True)
class FreezeStep:
    """A batch of a freeze or an unfreeze."""

    kind: Kind
    statement: str
    columns: int

    def __call__(self, connection: Connection, after: str | None, upto: str | None) -> jobs.Batch:
        """Turn the accounts of a span of keys."""
        row = connection.execute(text(self.statement), {"after": after, "upto": upto}).one()
        failed = row.refused if self.kind == "freeze" else 0
        changed = row.frozen if self.kind == "freeze" else row.unfrozen
        counts = {"keys": row.keys, _COUNTED[self.kind]: changed}
        return jobs.Batch(row.keys, row.keys * self.columns - failed, failed, counts)


def _step(kind: Kind, settings: Settings, mapping: Mapping) -> FreezeStep:
    called = f"{quoted(settings.ledger_schema)}.{kind}_{mapping.name}"
    statement = f"select * from {called}(cast(:after as text), cast(:upto as text))"
    return FreezeStep(kind, statement, len(mapping.columns))


def _plan(kind: Kind, connection: Connection, settings: Settings, mapping: Mapping, began: float) -> FreezeResult:
    groups, _ = Comparison(connection, settings, mapping).groups(connection)
    alive = [group for group in groups if group.lives]
    turning: Callable[[Group], bool] = _freezable if kind == "freeze" else _frozen
    changed = [group for group in alive if turning(group)]
    left = _left(kind, [group for group in groups if group not in changed])
    return FreezeResult(
        kind=kind,
        job_id=None,
        changed=sum(group.accounts for group in changed),
        refused=left,
        keys=sum(group.accounts for group in alive) // len(mapping.columns),
        seconds=time.monotonic() - began,
        dry_run=True,
        resumed=False,
        state="planned",
    )


def _left(kind: Kind, groups: list[Group]) -> int:
    """Accounts that the job has not brought over: a closed one without a row belongs to neither side."""
    if kind == "unfreeze":
        return sum(group.accounts for group in groups if _frozen(group))
    gone = ("frozen", "closed")
    return sum(group.accounts for group in groups if group.lives and group.state != "frozen") + sum(
        group.accounts for group in groups if not group.lives and group.state not in gone
    )


def _freezable(group: Group) -> bool:
    return group.state == "mirrored" and group.equal is True


def _frozen(group: Group) -> bool:
    return group.state == "frozen"
