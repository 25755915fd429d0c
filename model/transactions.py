"""What is committed, what a transaction has seen, locked and written, and what its commit does; the invariants."""

from __future__ import annotations

from typing import NamedTuple

from model.statements import Account, View, truth

ROW, ROW_PENDING, ACCOUNT, KEYS = 1, 2, 4, 8
"""What a session holds, as bits: the row's lock, an uncommitted insert or delete of it, the account, keys from 8 on."""

ROW_CHANGED, ROW_REPLACED, ACCOUNT_CHANGED = 1, 2, 4
"""What a commit did to others' snapshots, as bits. Replaced: deleted, perhaps inserted again."""


class Database(NamedTuple):
    """What is committed. `moved` is a ghost: keys under which money has moved."""

    row: int | None
    account: Account | None
    keys: frozenset[str] = frozenset()
    frozen: bool = False
    runs: bool = True
    moved: frozenset[str] = frozenset()


class Work(NamedTuple):
    """What a transaction has locked and written, and (ghosts) what it means by it."""

    row_locked: bool = False
    row_written: int = 0  # 0, ROW_CHANGED or ROW_REPLACED
    row: int | None = None
    account_locked: bool = False
    account_written: bool = False
    account: Account | None = None
    keys: frozenset[str] = frozenset()
    set_to: bool = False
    amount: int | None = 0
    moved: frozenset[str] = frozenset()

    @property
    def holds(self) -> bool:
        """Whether others can notice it."""
        return self.row_locked or self.account_locked or bool(self.keys)


class Transaction(NamedTuple):
    """A running transaction. `node` says where its program stands.

    At READ COMMITTED `snapshot` is that of a statement under way and holds no more than the statement needs;
    `row_changed` then says that the row it saw was deleted since. At snapshot isolation it says changed or deleted.
    """

    node: int
    snapshot: View | None = None
    row_changed: bool = False
    account_changed: bool = False
    work: Work = Work()
    savepoints: tuple[Work, ...] = ()


def holding(work: Work, keys: tuple[str, ...]) -> int:
    """What the transaction holds, as bits."""
    bits = (ROW if work.row_locked else 0) | (ROW_PENDING if work.row_written == ROW_REPLACED else 0)
    bits |= ACCOUNT if work.account_locked else 0
    for position, key in enumerate(keys):
        bits |= KEYS << position if key in work.keys else 0
    return bits


def after_commit_of_another(transaction: Transaction, snapshot_isolation: bool, changes: int) -> Transaction:
    """Note what a commit did to the rows that this transaction's snapshot shows."""
    view = transaction.snapshot
    if view is None:
        return transaction
    to_row = ROW_CHANGED | ROW_REPLACED if snapshot_isolation else ROW_REPLACED
    row = transaction.row_changed or (view.row is not None and bool(changes & to_row))
    account = snapshot_isolation and view.account is not None and bool(changes & ACCOUNT_CHANGED)
    return transaction._replace(row_changed=row, account_changed=transaction.account_changed or account)


def commit(work: Work, database: Database) -> tuple[Database, int, str | None]:
    """Make the work visible. Answers the database, the changes as bits, and the invariant that broke."""
    committed = Database(
        row=work.row if work.row_written else database.row,
        account=work.account if work.account_written else database.account,
        keys=database.keys | work.keys,
        frozen=database.frozen,
        runs=database.runs,
        moved=database.moved | work.moved,
    )
    changes = work.row_written | (ACCOUNT_CHANGED if work.account_written else 0)
    broken = None
    before = truth(database.row, database.account)
    if not work.set_to and work.amount:
        expected = None if before is None else before + (work.amount or 0)
    else:
        expected = work.amount if work.set_to else before
    now, account = truth(committed.row, committed.account), committed.account
    if database.moved & work.moved:
        broken = f"invariant 4: key {min(database.moved & work.moved)} moved money twice"
    elif account is not None and account.state == "mirrored" and account.balance != committed.row:
        broken = f"invariant 1: mirrored at {account.balance}, but legacy is {said(committed.row)}"
    elif now != expected:
        broken = f"conservation: the balance is {said(now)}, and should be {said(expected)}"
    return committed, changes, broken


def said(value: object) -> str:
    """A value as a trace tells it."""
    if isinstance(value, Account):
        return f"{value.state} {value.balance}"
    return "none" if value is None else str(value)
