"""The protocol: the guards it leans on, how an account is read and marked, and the fence.

Follows src/walletmigrate/sql, statement by statement: `fence` and `labelled` are fence.sql, adapter.py is mapping.sql
and posting.sql, neighbours.py has the jobs of batches.sql and who else touches the row.
"""

from __future__ import annotations

from dataclasses import dataclass

from model.statements import Account, Choose, Fail, InsertKey, Line, LockAccount, Look, Probe, Steps, View, WriteAccount


@dataclass(frozen=True)
class Guards:
    """What makes the protocol right. A mutated protocol has one of them off.

    The last three are guarded twice: taken away alone, another guard does their work.
    """

    state_under_lock: bool = True  # adapter and fence read the account's state under its lock
    probe: bool = True  # an account that is not seen may be there: an insert finds out
    state_in_new_statement: bool = True  # than the one that waited for the legacy row
    backfill_locks: bool = True
    backfill_rereads: bool = True  # under the lock, what it saw before
    stale_mark: bool = True
    fence: bool = True
    key_under_lock: bool = True  # a used key is noticed by inserting it under the locks, not by looking before
    key_kept_when_off: bool = True
    frozen_locks_all: bool = True  # a frozen account too goes through the legacy row's lock and the state
    closed_apart: bool = True  # a closed account is no mirrored one
    read_in_one_statement: bool = True
    short_asks_state: bool = True  # the short way's account update asks for state and balance
    short_knows_isolation: bool = True  # an account that the short way does not see may be there
    look_knows_isolation: bool = True  # nor is one that raw SQL sees without a lock what it is now
    order_of_locks: bool = True  # jobs too lock the legacy row before the account
    frozen_rejects: bool = True  # the fence rejects raw writes to a frozen account's column
    adapter_marks_stale: bool = True  # not only the fence
    compares: bool = True  # the adapter compares legacy and ledger after writing
    freeze_compares: bool = True


@dataclass(frozen=True)
class Rules:
    """How the protocol is set up: its guards, the fence's mode, the isolation.

    The mode is "stale", "mirror", "reject", or "any" where it changes all the time.
    """

    guards: Guards = Guards()
    capture: str = "stale"
    isolated: bool = False

    @property
    def good(self) -> frozenset[str]:
        """The states whose ledger balance is believed besides legacy."""
        return frozenset({"mirrored"} if self.guards.closed_apart else {"mirrored", "closed"})


@dataclass(frozen=True)
class Movement:
    """One request to the adapter: a credit of `amount`."""

    amount: int
    key: str | None
    dual: bool
    leg_may_fail: bool = False


def account_now(rules: Rules) -> Steps[Account | None]:
    """Read the account, under its lock."""
    if rules.guards.state_under_lock:
        locked: Account | None = yield LockAccount()
        return locked
    view: View = yield Look()
    return view.account


def update_account(
    states: frozenset[str] | None = None, *, state: str | None = None, balance: int | None = None
) -> Steps[None]:
    """`update accounts set …`, of state or balance or both: a statement that locks for itself."""
    account: Account | None = yield LockAccount(states)
    if account is not None:
        yield WriteAccount(Account(state or account.state, account.balance if balance is None else balance))


def turn_stale(rules: Rules) -> Steps[None]:
    """Mark that the ledger is behind."""
    if rules.guards.stale_mark:
        yield from update_account(frozenset({"mirrored", "closed"}), state="stale")


def fence(rules: Rules, row: int | None, *, ours: bool = False, in_place: bool = False) -> Steps[None]:
    """What the trigger does after a write without a label: compare ledger and legacy as it is now (`row`).

    `ours`: the adapter writes, the long way; what it did not mirror is stale in every mode. `in_place`: raw SQL updated
    a row that keeps its key, and has its lock.
    """
    if not rules.guards.fence:
        return
    if in_place and not (rules.isolated and rules.guards.look_knows_isolation):
        # Only who has the row's lock opens an account or brings it up.
        view: View = yield Look()
        if view.account is None or view.account.state == "stale":
            return
    account: Account | None = yield from account_now(rules)
    if account is None:
        if rules.guards.probe:
            yield Probe()
    elif account.state in rules.good and row == account.balance:
        pass
    elif account.state == "frozen":
        if rules.guards.frozen_rejects:
            yield Fail("the column is frozen")
    else:
        yield from written(rules, account, row, ours=ours)


def written(rules: Rules, account: Account, row: int | None, *, ours: bool) -> Steps[None]:
    """What becomes of an account that legacy differs from now."""
    followed = False
    if account.state == "mirrored" and not ours and (row is not None or account.balance != 0):
        followed = yield from by_mode(rules, row or 0)
    if row is None:
        yield from update_account(frozenset({"mirrored", "stale"}), state="closed")
    elif not followed:
        yield from turn_stale(rules)


def by_mode(rules: Rules, balance: int) -> Steps[bool]:
    """A mirrored account was written past the adapter: what the mode does. Answers whether the ledger followed.

    Every mode may be "stale" at times: in phase legacy, for a balance that is no amount, after a leg that failed.
    """
    mode = "stale"
    if rules.capture != "stale":
        modes = ("mirror", "reject") if rules.capture == "any" else (rules.capture,)
        mode = yield Choose(("stale", *modes), "the fence's mode")
    if mode == "reject":
        yield Fail("the fence rejects")
    runs = False
    if mode == "mirror":
        runs = yield Line()
    if runs:
        yield from update_account(balance=balance)
    return runs


def labelled(rules: Rules, movement: Movement, before: int) -> Steps[bool]:
    """What the trigger does under a label: write the ledger itself. Answers whether it could."""
    guards, runs = rules.guards, False
    if movement.dual:
        runs = yield Line()
    if runs:
        wanted = LockAccount(rules.good, before) if guards.short_asks_state else LockAccount()
        account: Account | None = yield wanted
        if account is None:
            return False
        yield WriteAccount(account._replace(balance=before + movement.amount))
    else:
        account = yield from account_now(rules)
        if (account is not None and account.state != "stale") or (rules.isolated and guards.short_knows_isolation):
            return False
    if movement.key is not None and (runs or guards.key_kept_when_off):
        new: bool = yield InsertKey(movement.key)
        return new or not guards.key_under_lock
    return True
