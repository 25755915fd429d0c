"""A database server as far as the protocol leans on it: snapshots, row locks, unique keys, two isolation levels.

Nothing here knows the protocol. A request is answered in up to two steps, so that others can run in between: a
statement takes its snapshot, then meets the row, which may be locked or changed by then.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from model import statements as st
from model.statements import View
from model.transactions import ACCOUNT, KEYS, ROW, ROW_CHANGED, ROW_PENDING, ROW_REPLACED, Database, Transaction, said


@dataclass(frozen=True)
class Done:
    """The request is answered."""

    transaction: Transaction
    result: Any = None
    words: str = ""
    database: Database | None = None
    broken: str | None = None


@dataclass(frozen=True)
class Seen:
    """The statement has its snapshot, and has not met its row yet."""

    transaction: Transaction
    words: str


@dataclass(frozen=True)
class Blocked:
    """It waits for whoever holds one of these bits."""

    on: int


@dataclass(frozen=True)
class Raised:
    """An error: the transaction is rolled back."""

    words: str


Answer = Done | Seen | Blocked | Raised | tuple[Done, ...]
SERIALIZATION = "cannot serialize (40001)"


class Server:
    """Answers requests. `moving_line`, `moving_phase`, `shared`: what other sessions may touch, or never do.

    A request that no other session can notice or disturb is `local`: it needs no step of its own.
    """

    def __init__(self, keys: tuple[str, ...], *, moving_line: bool, moving_phase: bool, shared: frozenset[str]) -> None:
        self.keys = keys
        self._moving_line = moving_line
        self._moving_side = moving_line or moving_phase
        self._shared = shared
        self._answers: dict[type[st.Request], Callable[..., Answer]] = {
            st.Look: self._look,
            st.LockRow: self._lock_row,
            st.LockAccount: self._lock_account,
            st.WriteRow: self._write_row,
            st.InsertRow: self._insert_row,
            st.WriteAccount: self._write_account,
            st.InsertAccount: self._insert_account,
            st.Probe: self._insert_account,
            st.InsertKey: self._insert_key,
            st.Line: self._line,
            st.Side: self._side,
            st.SetLine: self._set_line,
            st.SetPhase: self._set_phase,
            st.Choose: self._choose,
            st.Savepoint: self._savepoint,
            st.Release: self._release,
            st.Undo: self._undo,
            st.Fail: lambda request, *_: Raised(f"error: {request.why}"),
            st.Did: self._did,
            st.Told: self._told,
        }
        self._visible = (
            *(st.Look, st.LockRow, st.LockAccount, st.InsertRow, st.InsertAccount, st.Probe),
            *(st.InsertKey, st.Line, st.Side, st.SetLine, st.SetPhase),
        )

    def local(self, request: st.Request, transaction: Transaction, isolated: bool) -> bool:
        """Whether the request commutes with everything that other sessions do."""
        work = transaction.work
        match request:
            case st.Commit():
                local = not work.holds
            case st.LockRow() | st.InsertRow():
                local = work.row_locked
            case st.LockAccount():
                local = work.account_locked
            case st.Probe():
                local = not isolated
            case st.Look():
                local = isolated and transaction.snapshot is not None
            case st.InsertKey(key):
                local = key not in self._shared
            case st.Line():
                local = not self._moving_line
            case st.Side():
                local = not self._moving_side
            case _:
                local = not isinstance(request, self._visible)
        return local

    def answer(
        self, request: st.Request, transaction: Transaction, database: Database, others: int, isolated: bool
    ) -> Answer:
        """Take one step towards the request. `others`: the bits that other sessions hold."""
        if isolated and transaction.snapshot is None and isinstance(request, self._visible):
            view = View(database.row, database.account, database.keys, database.frozen)
            return Seen(transaction._replace(snapshot=view), "takes its snapshot")
        return self._answers[type(request)](request, transaction, database, others, isolated)

    def _look(self, request: st.Look, t: Transaction, db: Database, _others: int, _isolated: bool) -> Answer:
        seen, work = t.snapshot or db, t.work
        view = View(
            work.row if work.row_written else seen.row,
            work.account if work.account_written else seen.account,
            seen.keys | work.keys if request.keys else frozenset(),
        )
        return Done(t, view, f"reads: legacy {said(view.row)}, account {said(view.account)}")

    def _lock_row(self, request: st.LockRow, t: Transaction, db: Database, others: int, isolated: bool) -> Answer:
        work, view = t.work, t.snapshot
        if work.row_locked:
            row = work.row if work.row_written else db.row
            return Done(t, (row, db.account) if request.with_account else row)
        if view is None:
            if db.row is None:
                return Done(t, (None, None) if request.with_account else None, "finds no legacy row")
            token = View(0, db.account if request.with_account else None)
            return Seen(t._replace(snapshot=token), "begins a statement on the legacy row")
        nothing = (None, None) if request.with_account else None
        if view.row is None:
            return Done(_statement_over(t, isolated), nothing, "finds no legacy row")
        if t.row_changed:
            if isolated:
                return Raised(f"the legacy row changed since its snapshot: {SERIALIZATION}")
            return Done(_statement_over(t, isolated), nothing, "finds the legacy row deleted")
        if others & (ROW | ROW_PENDING):
            return Blocked(ROW | ROW_PENDING)
        result = (db.row, view.account) if request.with_account else db.row
        t = _statement_over(t, isolated)._replace(work=work._replace(row_locked=True))
        return Done(t, result, f"locks the legacy row at {said(db.row)}")

    def _lock_account(
        self, request: st.LockAccount, t: Transaction, db: Database, others: int, isolated: bool
    ) -> Answer:
        work, view = t.work, t.snapshot
        if work.account_locked:
            own = work.account if work.account_written else db.account
            return Done(t, own if own is not None and request.matches(own) else None)
        if view is None:
            if db.account is None or not request.matches(db.account):
                return Done(t, None, f"finds no such account ({said(db.account)})")
            return Seen(t._replace(snapshot=View()), "begins a statement on the account")
        if isolated and (view.account is None or not request.matches(view.account)):
            return Done(t, None, f"sees no such account ({said(view.account)})")
        if t.account_changed:
            return Raised(f"the account changed since its snapshot: {SERIALIZATION}")
        if others & ACCOUNT:
            return Blocked(ACCOUNT)
        t = _statement_over(t, isolated)
        if db.account is None or not request.matches(db.account):
            return Done(t, None, f"finds the account changed meanwhile ({said(db.account)})")
        t = t._replace(work=work._replace(account_locked=True))
        return Done(t, db.account, f"locks the account ({said(db.account)})")

    def _write_row(self, request: st.WriteRow, t: Transaction, *_: object) -> Answer:
        written = ROW_REPLACED if request.value is None else max(t.work.row_written, ROW_CHANGED)
        words = "deletes the legacy row" if request.value is None else f"writes legacy: {request.value}"
        if not t.work.row_locked:
            raise AssertionError("a row is written only under its lock")
        return Done(t._replace(work=t.work._replace(row_written=written, row=request.value)), None, words)

    def _insert_row(self, request: st.InsertRow, t: Transaction, db: Database, others: int, _isolated: bool) -> Answer:
        work = t.work
        if others & ROW_PENDING:
            return Blocked(ROW_PENDING)
        if (work.row if work.row_written else db.row) is not None:
            return Raised("the legacy row is there already (23505)")
        work = work._replace(row_locked=True, row_written=ROW_REPLACED, row=request.value)
        return Done(t._replace(work=work), None, f"inserts the legacy row: {request.value}")

    def _write_account(self, request: st.WriteAccount, t: Transaction, *_: object) -> Answer:
        if not t.work.account_locked:
            raise AssertionError("an account is written only under its lock")
        work = t.work._replace(account_written=True, account=request.account)
        return Done(t._replace(work=work), None, f"writes the account: {said(request.account)}")

    def _insert_account(
        self, request: st.InsertAccount | st.Probe, t: Transaction, db: Database, others: int, isolated: bool
    ) -> Answer:
        if isinstance(request, st.Probe) and not isolated:
            return Done(t)
        if db.account is not None:
            if t.snapshot is not None and t.snapshot.account is None:
                return Raised(f"the account was opened since its snapshot: {SERIALIZATION}")
            return Done(t, False, "finds the account opened meanwhile")
        if others & ACCOUNT:
            return Blocked(ACCOUNT)
        if isinstance(request, st.Probe):
            return Done(t, None, "probes for an account: there is none")
        work = t.work._replace(account_locked=True, account_written=True, account=request.account)
        return Done(t._replace(work=work), True, f"opens the account: {said(request.account)}")

    def _insert_key(self, request: st.InsertKey, t: Transaction, db: Database, others: int, _isolated: bool) -> Answer:
        key = request.key
        if key in t.work.keys:
            return Done(t, False, f"has used key {key} itself")
        if key in db.keys:
            if t.snapshot is not None and key not in t.snapshot.keys:
                return Raised(f"key {key} was used since its snapshot: {SERIALIZATION}")
            return Done(t, False, f"finds key {key} used")
        mine = KEYS << self.keys.index(key)
        if others & mine:
            return Blocked(mine)
        return Done(t._replace(work=t.work._replace(keys=t.work.keys | {key})), True, f"keeps key {key}")

    def _line(self, _: st.Line, t: Transaction, db: Database, _others: int, _isolated: bool) -> Answer:
        return Done(t, db.runs, "sees the line run" if db.runs else "sees the line stopped")

    def _side(self, _: st.Side, t: Transaction, db: Database, _others: int, _isolated: bool) -> Answer:
        frozen = t.snapshot.frozen if t.snapshot is not None else db.frozen
        words = f"sees the line {'run' if db.runs else 'stopped'}{', the phase frozen' if frozen else ''}"
        return Done(t, (frozen, db.runs), words)

    def _set_line(self, request: st.SetLine, t: Transaction, db: Database, _others: int, _isolated: bool) -> Answer:
        words = "lets the line run" if request.runs else "stops the line"
        return Done(t, None, words, db._replace(runs=request.runs))

    def _set_phase(self, request: st.SetPhase, t: Transaction, db: Database, _others: int, _isolated: bool) -> Answer:
        words = f"moves the phase {'to' if request.frozen else 'back from'} frozen"
        return Done(t, None, words, db._replace(frozen=request.frozen))

    def _choose(self, request: st.Choose, t: Transaction, *_: object) -> Answer:
        return tuple(Done(t, option, f"{request.what}: {option}") for option in request.options)

    def _savepoint(self, _: st.Savepoint, t: Transaction, *_rest: object) -> Answer:
        return Done(t._replace(savepoints=(*t.savepoints, t.work)))

    def _release(self, _: st.Release, t: Transaction, *_rest: object) -> Answer:
        return Done(t._replace(savepoints=t.savepoints[:-1]))

    def _undo(self, _: st.Undo, t: Transaction, *_rest: object) -> Answer:
        undone = t._replace(work=t.savepoints[-1], savepoints=t.savepoints[:-1])
        return Done(undone, None, "takes its subtransaction back")

    def _did(self, request: st.Did, t: Transaction, *_: object) -> Answer:
        work = t.work
        moved = work.moved if request.key is None else work.moved | {request.key}
        if request.set_to:
            work = work._replace(set_to=True, amount=request.amount, moved=moved)
        else:
            work = work._replace(amount=(work.amount or 0) + (request.amount or 0), moved=moved)
        if request.key is not None and request.key in t.work.moved:
            return Done(t, None, "", None, f"invariant 4: key {request.key} moved money twice")
        return Done(t._replace(work=work))

    def _told(self, request: st.Told, t: Transaction, *_: object) -> Answer:
        broken = None
        if request.value not in request.true:
            true = " or ".join(sorted(said(value) for value in request.true))
            broken = f"invariant 7: a reader was told {said(request.value)}, true was {true}"
        return Done(t, None, f"answers {said(request.value)}", None, broken)


def _statement_over(transaction: Transaction, isolated: bool) -> Transaction:
    """At READ COMMITTED a snapshot ends with its statement."""
    return transaction if isolated else transaction._replace(snapshot=None, row_changed=False)
