"""The adapter: the short way (plain_), and the long way that decides everything (move_, leg_, side_)."""

from __future__ import annotations

from model.protocol import Movement, Rules, account_now, fence, labelled, turn_stale, update_account
from model.statements import (
    Account,
    Choose,
    Did,
    Fail,
    InsertAccount,
    InsertKey,
    LockAccount,
    LockRow,
    Look,
    Probe,
    Release,
    Savepoint,
    Side,
    Steps,
    Undo,
    View,
    WriteAccount,
    WriteRow,
)


def post(rules: Rules, movement: Movement, *, short_way: bool) -> Steps[None]:
    """One call of the adapter."""
    if movement.key is not None and not rules.guards.key_under_lock:
        view: View = yield Look(keys=True)
        if movement.key in view.keys:
            return
    if short_way:
        done = yield from short(rules, movement)
        if done:
            return
    if not rules.guards.frozen_locks_all:
        done = yield from frozen_alone(movement)
        if done:
            return
    yield from long(rules, movement)


def short(rules: Rules, movement: Movement) -> Steps[bool]:
    """Update legacy; the fence writes the ledger. What does not fit is taken back, and False the answer."""
    yield Savepoint()
    row: int | None = yield LockRow()
    if row is not None and rules.guards.fence:
        yield WriteRow(row + movement.amount)
        done = yield from labelled(rules, movement, row)
        if done:
            yield Release()
            yield Did(movement.amount, key=movement.key)
            return True
    yield Undo()
    return False


def long(rules: Rules, movement: Movement) -> Steps[None]:
    """Lock legacy, lock the account, keep the key, write the ledger, write legacy, compare."""
    guards = rules.guards
    row, account = yield from lock_row_and_account(rules)
    if row is None:
        return  # unknown account
    frozen_phase, runs = yield Side()
    if guards.state_in_new_statement:
        account = yield from account_now(rules)
    mode = "dual_write" if movement.dual and runs else "legacy"
    if (account is None and mode == "dual_write" and frozen_phase) or (account and account.state == "frozen"):
        mode = "ledger"
    elif account is None and mode == "legacy" and guards.probe:
        yield Probe()
    if movement.key is not None and (mode != "legacy" or guards.key_kept_when_off):
        new: bool = yield InsertKey(movement.key)
        if not new and guards.key_under_lock:
            return  # a replay
    if mode != "legacy":
        mode = yield from ledger_leg(rules, movement, mode, row, account)
    elif account is not None and account.state == "mirrored" and guards.adapter_marks_stale:
        yield from turn_stale(rules)
    if mode != "ledger":
        yield from write_legacy(rules, movement, mode)
    yield Did(movement.amount, key=movement.key)


def lock_row_and_account(rules: Rules) -> Steps[tuple[int | None, Account | None]]:
    """Lock the legacy row; no row: look once more with a fresh snapshot. The account only in a mutated protocol."""
    for _ in range(2):
        if rules.guards.state_in_new_statement:
            row: int | None = yield LockRow()
            account: Account | None = None
        else:
            row, account = yield LockRow(with_account=True)
        if row is not None:
            return row, account
    return None, None


def ledger_leg(rules: Rules, movement: Movement, mode: str, row: int, account: Account | None) -> Steps[str]:
    """Open or resync the account, then post. Under the shadow policy a failure leaves it stale, and mode legacy."""
    fails = False
    yield Savepoint()
    good = rules.good | {"frozen"}
    base = account.balance if account is not None and account.state in good else row
    if account is None:
        new: bool = yield InsertAccount(Account("frozen" if mode == "ledger" else "mirrored", row))
        if not new:
            yield Fail("the account was opened meanwhile (40001)")
    elif account.state not in good:
        yield from update_account(state="mirrored", balance=row)
    yield from update_account(balance=base + movement.amount)
    if movement.leg_may_fail and mode == "dual_write":
        fails = yield Choose((False, True), "the ledger leg fails")
    if not fails:
        yield Release()
        return mode
    yield Undo()
    yield from turn_stale(rules)
    return "legacy"


def write_legacy(rules: Rules, movement: Movement, mode: str) -> Steps[None]:
    """Update the legacy row, let the fence look at it, compare (shadow policy: what differs turns stale)."""
    row: int | None = yield LockRow()
    if row is None:
        yield Fail("the update wrote no row")
        return
    yield WriteRow(row + movement.amount)
    yield from fence(rules, row + movement.amount, ours=True)
    if mode == "dual_write" and rules.guards.compares:
        account: Account | None = yield LockAccount(frozenset({"mirrored"}))
        if account is not None and account.balance != row + movement.amount:
            yield from turn_stale(rules)


def frozen_alone(movement: Movement) -> Steps[bool]:
    """Mutated: what looks frozen is posted under the lock of its balance alone."""
    view: View = yield Look()
    if view.account is None or view.account.state != "frozen":
        return False
    if movement.key is not None:
        new: bool = yield InsertKey(movement.key)
        if not new:
            return True
    account: Account | None = yield LockAccount()
    if account is not None:
        yield WriteAccount(account._replace(balance=account.balance + movement.amount))
        yield Did(movement.amount, key=movement.key)
    return True
