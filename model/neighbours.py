"""Who else touches the row: raw SQL, the jobs, a reader."""

from __future__ import annotations

from model.protocol import Movement, Rules, fence, labelled, update_account
from model.statements import (
    Account,
    Did,
    Fail,
    InsertAccount,
    InsertRow,
    LockAccount,
    LockRow,
    Look,
    Side,
    Steps,
    Told,
    View,
    WriteAccount,
    WriteRow,
    truth,
)


def raw_update(rules: Rules, amount: int) -> Steps[None]:
    """`update users set coins = coins + amount`."""
    row: int | None = yield LockRow()
    if row is None:
        return
    yield WriteRow(row + amount)
    yield from fence(rules, row + amount, in_place=True)
    yield Did(amount)


def forged_update(rules: Rules, movement: Movement) -> Steps[None]:
    """The same, under a label that somebody forged."""
    row: int | None = yield LockRow()
    if row is None:
        return
    yield WriteRow(row + movement.amount)
    done = not rules.guards.fence
    if not done:
        done = yield from labelled(rules, movement, row)
    if not done:
        # It does not fit: met as any other write, and what the adapter did not mirror is stale in every mode.
        yield from fence(rules, row + movement.amount, ours=True)
    yield Did(movement.amount, key=movement.key)


def raw_delete(rules: Rules) -> Steps[None]:
    """`delete from users`."""
    row: int | None = yield LockRow()
    if row is None:
        return
    yield WriteRow(None)
    yield from fence(rules, None)
    yield Did(None, set_to=True)


def raw_insert(rules: Rules, value: int) -> Steps[None]:
    """`insert into users`."""
    yield InsertRow(value)
    yield from fence(rules, value)
    yield Did(value, set_to=True)


def backfill(rules: Rules) -> Steps[None]:
    """One batch: lock the row, then read it; open what is absent, resync what is stale or closed."""
    guards = rules.guards
    row: int | None = None
    if not (guards.backfill_locks and guards.backfill_rereads):
        before: View = yield Look()
        row = before.row
    if guards.backfill_locks:
        locked: int | None = yield LockRow()
        row = locked if guards.backfill_rereads or locked is None else row
    frozen_phase, _ = yield Side()
    due: Account | None = yield LockAccount(frozenset({"stale", "closed"}))
    view: View = yield Look()
    if row is None:
        return
    if view.account is None:
        new: bool = yield InsertAccount(Account("frozen" if frozen_phase else "mirrored", row))
        if not new:
            yield Fail("duplicate key (23505)")
    elif due is not None:
        yield from update_account(frozenset({"stale", "closed"}), state="mirrored", balance=row)


def freeze(rules: Rules) -> Steps[None]:
    """One batch: a mirrored account that equals legacy turns frozen."""
    if not rules.guards.order_of_locks:
        yield LockAccount()
    row: int | None = yield LockRow()
    if row is None:
        return
    account: Account | None = yield LockAccount()
    if account is None or account.state not in rules.good:
        return
    if account.balance == row or not rules.guards.freeze_compares:
        yield WriteAccount(account._replace(state="frozen"))


def unfreeze(rules: Rules) -> Steps[None]:
    """One batch: state first, then legacy := ledger, which the fence compares."""
    row: int | None = yield LockRow()
    if row is None:
        return
    account: Account | None = yield LockAccount()
    if account is not None and account.state == "frozen":
        yield WriteAccount(account._replace(state="mirrored"))
        yield WriteRow(account.balance)
        if account.balance != row:
            yield from fence(rules, account.balance)


def read(rules: Rules) -> Steps[None]:
    """Read the balance, the ledger asked for: state and balances in one statement."""
    balances: View = yield Look()
    state: View = balances
    if not rules.guards.read_in_one_statement:
        state = yield Look()
    value = balances.row
    if balances.account is not None and state.account is not None and state.account.state in rules.good | {"frozen"}:
        value = balances.account.balance
    yield Told(value, frozenset({truth(balances.row, balances.account), truth(state.row, state.account)}))
