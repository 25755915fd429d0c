"""Snapshots: every account's balance at one point, kept and pruned. Their proof: `snapshot_checks`.

The point is a set of transactions, not a time: those that one statement's view of the database saw. A posting that
was in flight is outside, though its time may be earlier and it commits a moment later. So the batches that fold the
journal take no lock that a posting could meet, and see the same whenever they run. Rows are kept for the accounts that
changed since the snapshot before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from decimal import Decimal
from typing import Any, Final

from sqlalchemy import Connection, Engine, Row, text
from sqlalchemy.exc import IntegrityError

from walletmigrate import connect, job_rows, job_turns, jobs
from walletmigrate.audit import Act, record
from walletmigrate.capture import with_short_locks
from walletmigrate.config import Settings
from walletmigrate.errors import PreconditionRefused, UnknownRun, UsageError
from walletmigrate.job_options import EVERYTHING
from walletmigrate.job_outages import Patience
from walletmigrate.job_rows import Job
from walletmigrate.schema import quoted, statements
from walletmigrate.standing import require_installed

KINDS: Final = ("opening", "resync", "posting", "correction", "reversal")
SYSTEM: Final = "(system)"
"""The mapping under which totals name the system accounts; their bucket is the account's name."""

TAKE: Final = "snapshot take"
"""The kind of the job."""

_NOT_NULL: Final = "23502"
"""SQLSTATE of a null where none may be."""

TAKEN: Final = "walletmigrate snapshot take --reason '…'"
"""The command that takes one, or finishes one that was begun."""

Progress = Callable[[int], None]
"""Told how many transactions, or accounts, were looked at so far."""
Stop = Callable[[], bool]


@dataclass(frozen=True)
class Snapshot:
    """A row of ``snapshots``. ``transactions`` and ``changed`` (accounts) count since the one before, ``previous``.

    ``state`` is running, complete or pruned (its rows are being merged away). ``taken_at`` is just after the point:
    all of its transactions were posted before. ``verified_clean`` is None until it was verified.
    """

    id: int
    state: str
    previous: int | None
    taken_at: datetime
    finished_at: datetime | None
    accounts: int
    changed: int
    transactions: int
    verified_at: datetime | None
    verified_clean: bool | None
    actor: str
    reason: str
    resumed: bool = False


@dataclass(frozen=True)
class SnapshotTotal:
    """The accounts of one mapping, bucket and currency in a snapshot, in major units.

    ``accounts`` and ``balance`` are of the snapshot; ``changed``, ``transactions`` and the net sums by kind are since
    the snapshot before. Of a system account ``mapping`` is "(system)" and ``bucket`` its name.
    """

    mapping: str
    bucket: str
    currency: str
    accounts: int
    balance: Decimal
    changed: int
    opening: Decimal
    resync: Decimal
    posting: Decimal
    correction: Decimal
    reversal: Decimal
    transactions: int


@dataclass(frozen=True)
class SnapshotBalance:
    """One account in a snapshot, in major units; the sums by kind are net, and since the snapshot before.

    ``mapping``, ``key`` and ``bucket`` are None for an account that only the journal knows.
    """

    account_id: int
    mapping: str | None
    key: str | None
    bucket: str | None
    currency: str | None
    balance: Decimal
    transaction_id: int
    opening: Decimal
    resync: Decimal
    posting: Decimal
    correction: Decimal
    reversal: Decimal
    transactions: int


@dataclass(frozen=True)
class PruneResult:
    """What a prune removed, or would (``dry_run``): snapshots by id; the oldest one that is kept, if any."""

    pruned: tuple[int, ...]
    kept: tuple[int, ...]
    dry_run: bool


def take(
    engine: Engine,
    settings: Settings,
    act: Act,
    *,
    batch_size: int = 20_000,
    dry_run: bool = False,
    progress: Progress | None = None,
    stop: Stop | None = None,
) -> Snapshot | None:
    """Take a snapshot of all accounts, or finish the one that was begun; then fold the system accounts' balances.

    A job (`job_turns`), which an operator can pause, hold and cancel. ``batch_size`` is transactions of the journal in
    one database transaction. Killed anywhere, the next call goes on: with the point of the first. ``stop`` pauses the
    job and leaves the snapshot ``running``, and so does an operator. None is given for a dry run that would begin
    one. Raises LedgerNotInstalled, PreconditionRefused when the journal has a row that no posting writes or the job
    was begun with other functions, or Retryable when a batch ran out of attempts.
    """
    with engine.connect() as connection:
        require_installed(connection, settings)
        begun = _running(connection, settings)
    if dry_run:
        return begun
    adopt(engine, settings, act)
    job, snapshot_id = _started(engine, settings, act)

    def turn(connection: Connection, size: int) -> job_rows.Batch:
        return _fold(connection, settings, snapshot_id, size)

    def closing(connection: Connection) -> dict[str, Any]:
        return _folded(connection, settings, snapshot_id, act)

    def told(now: Job) -> None:
        if progress is not None:
            progress(now.items_done - job.items_done)

    job_turns.run_turns(engine, settings, job, turn, act, size=batch_size, closing=closing, progress=told, stop=stop)
    with engine.begin() as connection:
        return replace(get(connection, settings, snapshot_id), resumed=begun is not None)


def _started(engine: Engine, settings: Settings, act: Act) -> tuple[Job, int]:
    """The job, and the snapshot that it takes: begun, or gone on with. Under the job's lock, so that both are one."""
    name = quoted(settings.ledger_schema)
    with jobs.begin(engine) as connection:
        # A point in time does not grow old: a snapshot that was begun long ago is finished like any other.
        job = jobs.started(connection, settings, TAKE, EVERYTHING, act, ageless=True)
        begin = text(f"select {name}.begin_snapshot(:actor, :reason)")
        snapshot_id = connection.scalar(begin, {"actor": act.actor, "reason": act.reason})
        note = "details = details || jsonb_build_object('snapshot', cast(:snapshot as bigint))"
        job_rows.change(connection, settings, job.id, note, snapshot=snapshot_id)
    return job, int(snapshot_id or 0)


def _fold(connection: Connection, settings: Settings, snapshot_id: int, size: int) -> job_rows.Batch:
    """The next transactions of the journal."""
    name = quoted(settings.ledger_schema)
    advance = text(f"select {name}.advance_snapshot(:id, :limit)")
    try:
        read = int(connection.execute(advance, {"id": snapshot_id, "limit": size}).scalar_one())
    except IntegrityError as error:
        if connect.sqlstate(error) != _NOT_NULL:
            raise
        # Of all that a batch writes only the balance after a transaction may be missing, and only where it was forged.
        what = "a transaction of the journal has no balance of its account's after it, which no posting writes"
        raise PreconditionRefused(TAKE, [(what, "walletmigrate verify  # names it")]) from error
    return job_rows.Batch(read, read, 0, {})


def _folded(connection: Connection, settings: Settings, snapshot_id: int, act: Act) -> dict[str, Any]:
    """The end, when no transaction is left."""
    connection.execute(text(f"select {quoted(settings.ledger_schema)}.fold_system_accounts()"))
    made = get(connection, settings, snapshot_id)
    facts = {"snapshot": made.id, "accounts": made.accounts, "changed": made.changed}
    record(connection, settings, TAKE, act, details={**facts, "transactions": made.transactions})
    return {}


def adopt(engine: Engine, settings: Settings, act: Act) -> bool:
    """Recognise a logical restore: the xids of the journal are another cluster's. True if there was one.

    What was restored counts as settled by its ids from then on, and the system accounts are folded from the first
    transaction. Postings wait, for half a second at a time, until those in flight have ended.
    """

    def work(connection: Connection) -> bool:
        found = bool(connection.scalar(text(f"select {quoted(settings.ledger_schema)}.adopt_journal()")))
        if found:
            record(connection, settings, "journal adopted", act)
        return found

    return with_short_locks(engine, work)


def listing(connection: Connection, settings: Settings) -> tuple[Snapshot, ...]:
    """All snapshots, newest first."""
    require_installed(connection, settings)
    rows = connection.execute(text(_listing(settings, "s.state <> 'pruned'")))
    return tuple(_snapshot(row) for row in rows)


def get(connection: Connection, settings: Settings, snapshot_id: int | None = None) -> Snapshot:
    """The snapshot of that id; None: the newest that is complete. Raises UnknownRun."""
    require_installed(connection, settings)
    where = "s.state = 'complete'" if snapshot_id is None else "s.id = :id and s.state <> 'pruned'"
    row = connection.execute(text(_listing(settings, where) + " limit 1"), {"id": snapshot_id}).one_or_none()
    if row is None:
        which = "that is complete" if snapshot_id is None else str(snapshot_id)
        mend = f"Take one: {TAKEN}" if snapshot_id is None else "See: walletmigrate snapshot list"
        raise UnknownRun("snapshot", which, mend)
    return _snapshot(row)


def totals(connection: Connection, settings: Settings, snapshot: Snapshot) -> tuple[SnapshotTotal, ...]:
    """The totals that a snapshot keeps, the system accounts' last."""
    rows = connection.execute(
        text(
            "select mapping, bucket, currency, accounts, balance, changed, opening, resync, posting, correction, "
            f"reversal, transactions from {quoted(settings.ledger_schema)}.snapshot_totals "
            f"where snapshot_id = :id order by mapping = '{SYSTEM}', mapping, currency, bucket"
        ),
        {"id": snapshot.id},
    )
    return tuple(SnapshotTotal(*row) for row in rows)


def balances(connection: Connection, settings: Settings, snapshot: Snapshot) -> Iterator[SnapshotBalance]:
    """Every account of a complete snapshot, streamed in the order of account ids."""
    statement = text(_statement(settings, "balances")).execution_options(yield_per=2000)
    for row in connection.execute(statement, {"snapshot": snapshot.id}):
        yield SnapshotBalance(**row._mapping)


def prune(
    engine: Engine,
    settings: Settings,
    act: Act,
    *,
    keep: int,
    batch_size: int = 20_000,
    dry_run: bool = False,
) -> PruneResult:
    """Keep the newest ``keep`` complete snapshots. The oldest of them takes over what the older ones say.

    In batches; killed, the next prune finishes it. Balances at any time stay exact: they come from the journal.
    Raises UsageError if ``keep`` is less than 1, and Retryable when a batch ran out of attempts.
    """
    if keep < 1:
        raise UsageError(f"--keep {keep}: keep at least 1, from which the next one goes on")
    with engine.begin() as connection:
        require_installed(connection, settings)
        name = quoted(settings.ledger_schema)
        rows = connection.execute(text(f"select id, state from {name}.snapshots where state <> 'running' order by id"))
        known = [(row.id, row.state) for row in rows]
        complete = [one for one, state in known if state == "complete"]
        into = complete[-keep] if len(complete) >= keep else complete[0] if complete else None
        old = tuple(one for one, state in known if state == "pruned" or (into is not None and one < into))
        result = PruneResult(old, tuple(one for one in complete if one not in old), dry_run)
        if dry_run or not old or into is None:
            return result
        connection.execute(text(f"update {name}.snapshots set state = 'pruned' where id < :into"), {"into": into})
        record(connection, settings, "snapshot prune", act, details={"pruned": old, "kept": result.kept})
    after: int | None = 0
    while after is not None:
        after = _step(
            engine,
            f"select {name}.merge_snapshots(:into, :after, :limit)",
            {"into": into, "after": after, "limit": batch_size},
        )
    _step(engine, f"select {name}.drop_snapshots(:into)", {"into": into})
    return result


def _running(connection: Connection, settings: Settings) -> Snapshot | None:
    row = connection.execute(text(_listing(settings, "s.state = 'running'"))).one_or_none()
    return None if row is None else _snapshot(row)


def _snapshot(row: Row[Any]) -> Snapshot:
    return Snapshot(**row._mapping)


def _listing(settings: Settings, where: str) -> str:
    name = quoted(settings.ledger_schema)
    return f"""
        select
            s.id, s.state, s.previous, s.taken_at, s.finished_at, coalesce(t.accounts, 0)::bigint as accounts,
            coalesce(t.changed, 0)::bigint as changed, coalesce(t.transactions, 0)::bigint as transactions,
            s.verified_at, s.verified_clean, s.actor, s.reason
        from {name}.snapshots as s
        left join lateral (
            select sum(o.accounts) as accounts, sum(o.changed) as changed,
                -- A transaction has two legs, each in some total.
                sum(o.transactions) / 2 as transactions
            from {name}.snapshot_totals as o where o.snapshot_id = s.id
        ) as t on true
        where {where}
        order by s.id desc
    """


def _statement(settings: Settings, name: str) -> str:
    return statements("snapshot_checks", schema=quoted(settings.ledger_schema))[name]


def _step(engine: Engine, statement: str, values: dict[str, Any]) -> Any:
    """One step of a prune in a transaction of its own, tried again as a batch of a job is: each may be done twice."""

    def step() -> Any:
        with jobs.begin(engine) as connection:
            return connection.execute(text(statement), values).scalar_one()

    return Patience(engine, "snapshot prune").persist(step)
