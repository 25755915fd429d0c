"""The line: stop all dual-writes at the next statement of every process, and let them go on.

The line is a sequence, so that a stop is seen at once, by old snapshots too. Whoever reads it holds a lock on it
to the end of the transaction, as on every relation: so the transactions that may still commit what they
posted before a stop are those that hold one, wherever they stand, prepared ones included.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Final, TypeAlias

from sqlalchemy import Connection, Engine, text

from walletmigrate.audit import Act, record
from walletmigrate.config import Settings
from walletmigrate.flags import Decision
from walletmigrate.schema import quoted
from walletmigrate.standing import PhaseState, reached, require_installed, show

LOOK_SECONDS: Final = 0.2
"""How long to wait between two looks at who is left."""


@dataclass(frozen=True)
class LineChange:
    """What became of the line, or would (``dry_run``). ``running`` is how it stands now.

    ``audit_id`` is None where nothing was changed.
    """

    running: bool
    changed: bool
    dry_run: bool
    audit_id: int | None


@dataclass(frozen=True)
class Holder:
    """A transaction that has read the line and has not ended.

    ``id`` is the server's for the running transaction. ``application_name`` and ``pid`` are None for a prepared
    one, whose name is ``prepared``; ``since`` is None where the server does not tell this role.
    """

    id: str
    application_name: str | None
    pid: int | None
    since: datetime | None
    prepared: str | None


Told: TypeAlias = Callable[[tuple[Holder, ...]], None]


def stop(engine: Engine, settings: Settings, act: Act, *, dry_run: bool = False) -> LineChange:
    """Stop the line: from the next statement of every process on, legacy alone is written. Idempotent.

    Postings in flight may still commit; `wait` waits them out. Raises LedgerNotInstalled.
    """
    return _set(engine, settings, "stop-the-line", act, running=False, dry_run=dry_run)


def resume(engine: Engine, settings: Settings, act: Act, *, dry_run: bool = False) -> LineChange:
    """Let the line run again. Idempotent. Raises LedgerNotInstalled.

    What was written meanwhile is stale; its next posting, or a backfill, resyncs it by a transaction.
    """
    return _set(engine, settings, "resume", act, running=True, dry_run=dry_run)


def wait(
    engine: Engine, settings: Settings, *, timeout: float | None = None, told: Told | None = None
) -> tuple[Holder, ...]:
    """Wait until every transaction has ended that read the line before this call: call it after `stop`.

    ``timeout`` is in seconds, None for no end. ``told`` is called with those who are left each time that they
    are others than before. Returns who is left when the time is over; nobody, if all have ended.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    left = _holders(engine, settings)
    before: tuple[Holder, ...] = ()
    while True:
        if told is not None and left and left != before:
            told(left)
        if not left or (deadline is not None and time.monotonic() >= deadline):
            return left
        time.sleep(LOOK_SECONDS if deadline is None else max(0.0, min(LOOK_SECONDS, deadline - time.monotonic())))
        # Who is prepared keeps the id; who came since has seen the line stopped.
        waited, before = {one.id for one in left}, left
        left = tuple(one for one in _holders(engine, settings) if one.id in waited)


def holders(connection: Connection, settings: Settings) -> tuple[Holder, ...]:
    """The transactions that have read the line and have not ended, the oldest first."""
    rows = connection.execute(
        text(
            # A prepared transaction has no session, but a lock on its own number.
            "with held as materialized (select * from pg_locks where granted), prepared as ("
            "select h.virtualtransaction, p.gid, p.prepared from pg_prepared_xacts as p inner join held as h "
            "on h.locktype = 'transactionid' and h.transactionid = p.transaction and h.pid is null) "
            "select h.virtualtransaction as id, nullif(a.application_name, '') as application_name, h.pid, "
            "coalesce(p.prepared, a.xact_start) as since, p.gid as prepared from held as h "
            "left join pg_stat_activity as a on a.pid = h.pid "
            "left join prepared as p on h.pid is null and p.virtualtransaction = h.virtualtransaction "
            # Predicate locks of SERIALIZABLE outlive their transaction.
            "where h.locktype = 'relation' and h.mode <> 'SIReadLock' and h.relation = cast(:line as regclass) "
            "and h.database = (select oid from pg_database where datname = current_database()) "
            "and h.pid is distinct from pg_backend_pid() group by 1, 2, 3, 4, 5 order by 4 nulls last, 1"
        ),
        {"line": f"{quoted(settings.ledger_schema)}.line"},
    )
    return tuple(Holder(**row._mapping) for row in rows)


def in_force(wanted: Decision, state: PhaseState) -> Decision:
    """What the flags ask for, under the ceiling of the phase and with what a stopped line turns off.

    Reads go on: they are by account, and an account that nobody has written since the stop is still true.
    """
    return Decision(
        dual_write=wanted.dual_write and state.line_running and reached(state.phase, "dual_write"),
        read_from_ledger=wanted.read_from_ledger and reached(state.phase, "read_ledger"),
        enable_withdrawals=wanted.enable_withdrawals and state.line_running and reached(state.phase, "wallet_only"),
    )


def _holders(engine: Engine, settings: Settings) -> tuple[Holder, ...]:
    with engine.begin() as connection:
        return holders(connection, settings)


def _set(engine: Engine, settings: Settings, action: str, act: Act, *, running: bool, dry_run: bool) -> LineChange:
    with engine.begin() as connection:
        require_installed(connection, settings)
        before = show(connection, settings).line_running
        if dry_run or (running and before):
            return LineChange(before, before != running, dry_run, None)
        changed = before != running
        audit_id = record(connection, settings, action, act, details={"running": running}) if changed else None
        # Nothing undoes it, not even a rollback: so it is the last statement. A stop is set whatever was seen: a resume
        # in flight may have looked before it and come after.
        connection.execute(text(f"select {quoted(settings.ledger_schema)}.set_line(:running)"), {"running": running})
    return LineChange(running, changed, False, audit_id)
