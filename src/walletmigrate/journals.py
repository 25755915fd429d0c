"""The journal held against the balances: does what was posted lead to what is stored, account by account?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Final

from sqlalchemy import Connection, Row, text

from walletmigrate.comparison import ALL, Comparison, Scope
from walletmigrate.sums import by_name, less, total


@dataclass(frozen=True)
class JournalProblem:
    """One contradiction between the transactions and an account, whose id is negative if it is the system's.

    ``expected`` is what the transactions say, ``found`` what is stored, where the problem is about amounts;
    ``transaction_id`` is the first transaction that does not fit, where one can be told.
    """

    account: int
    key: str | None
    bucket: str | None
    currency: str | None
    problem: str
    transaction_id: int | None = None
    expected: Decimal | None = None
    found: Decimal | None = None


@dataclass(frozen=True)
class Known:
    """What an earlier full and clean run saw of the journal: ``transactions``, in the snapshot ``seen``.

    Those that still stand as they stood then are known to be in order, and what pointed at one does so still.
    """

    seen: str
    transactions: int

    @property
    def bounds(self) -> dict[str, Any]:
        """The snapshot: below ``horizon`` all transactions of the database had ended, from ``next`` on none."""
        horizon, following = self.seen.split(":")[:2]
        return {"horizon": int(horizon), "next": int(following), "seen": self.seen}


_NOTHING: Final = Known("1:1:", 0)

FEW: Final = 20_000
"""Up to how many transactions that are not known the accounts are followed one by one, by the index."""


@dataclass(frozen=True)
class Journal:
    """What the whole journal says. ``accounts`` have a problem, of which ``problems`` lists the first.

    ``imbalance`` is the sum of all balances by currency. ``grouped``: there are transactions of a group.
    ``transactions`` is how many there are. ``horizon`` is that of an earlier run all of whose transactions still stand
    as it saw them; 0: there is no such run, or one of them is gone or was written again.
    """

    problems: tuple[JournalProblem, ...]
    accounts: int
    imbalance: dict[str, Decimal]
    grouped: bool
    transactions: int = 0
    horizon: int = 0


def whole(
    comparison: Comparison, connection: Connection, limit: int, ledger: Sequence[Row[Any]], known: Known | None = None
) -> Journal:
    """Look at the whole journal. ``ledger`` are the sums that `Comparison.whole` saw in the same snapshot.

    One pass adds up hashes of the balances that transactions led to and from. What these cannot tell is the order of an
    account's transactions: it is followed where an account has several, and something has been written since ``known``.
    """
    accounts_of_system = _system_accounts(comparison, connection)
    folded = max((row.folded_xid for row in accounts_of_system), default=0)
    since = known or _NOTHING
    steps = comparison.run(connection, "steps", folded=folded, **since.bounds)
    transactions = sum(row.transactions for row in steps)
    if sum(row.untouched for row in steps) != since.transactions:  # one is gone, or was written again
        known, since = None, _NOTHING
    problems, accounts = _followed(comparison, connection, limit, ledger, steps, known)
    of_system, balances = _system(comparison, connection, accounts_of_system, folded, steps)
    sums = [*balances.items(), *((row.currency, row.balance) for row in ledger)]
    return Journal(
        problems=(*of_system, *problems),
        accounts=accounts + len({problem.account for problem in of_system}),
        imbalance=by_name((), sums),
        grouped=any(row.grouped for row in steps),
        transactions=transactions,
        horizon=since.bounds["horizon"] if known else 0,
    )


def of_accounts(
    comparison: Comparison, connection: Connection, limit: int, scope: Scope = ALL
) -> tuple[tuple[JournalProblem, ...], int]:
    """Follow each account's transactions: the problems of the first ``limit`` that have one, and how many have one."""
    rows = comparison.run(connection, "journal", scope, limit=limit)
    return tuple(problem for row in rows for problem in _explained(row)), rows[0].found if rows else 0


def _followed(
    comparison: Comparison,
    connection: Connection,
    limit: int,
    ledger: Sequence[Row[Any]],
    steps: Sequence[Row[Any]],
    known: Known | None,
) -> tuple[tuple[JournalProblem, ...], int]:
    """The problems of owners' accounts, as `of_accounts` tells them, with as little following as will do."""
    if not _leads_to(steps, ledger) or any(row.pay_themselves for row in steps):
        return of_accounts(comparison, connection, limit)
    if known is None:
        several = any(row.further for row in steps)
        in_order = not several or _in_order(comparison, connection, None)
    else:
        fresh = sum(row.transactions for row in steps) - known.transactions
        if fresh <= FEW:
            rows = comparison.run(connection, "fresh", **known.bounds)
            if len(rows) == fresh:
                ids = {account for row in rows for account in row if account > 0}
                scope = Scope("keys", accounts=tuple(sorted(ids)))
                return of_accounts(comparison, connection, limit, scope) if ids else ((), 0)
        in_order = _in_order(comparison, connection, known)
    return ((), 0) if in_order else of_accounts(comparison, connection, limit)


def _in_order(comparison: Comparison, connection: Connection, known: Known | None) -> bool:
    bounds = (known or _NOTHING).bounds
    return not comparison.run(connection, "disorder", known=known is not None, **bounds)[0].found


def _leads_to(steps: Sequence[Row[Any]], ledger: Sequence[Row[Any]]) -> bool:
    """Whether the journal's steps lead, as a set, from nothing to the stored balances, in each currency."""
    led = [(row.currency, less(row.after or Decimal(0), row.before or Decimal(0))) for row in steps]
    stored = [(row.currency, row.last or Decimal(0)) for row in ledger]
    names = {row.currency for row in (*steps, *ledger)}
    return by_name(names, led) == by_name(names, stored)


def _explained(row: Row[Any]) -> Iterator[JournalProblem]:
    place = (row.account, row.key, row.bucket, row.currency)
    if row.unknown:
        yield JournalProblem(*place, "transactions of an account that does not exist", None, row.total)
        return
    if row.broken_at is not None:
        what = "the balance after a transaction does not follow from the one before"
        yield JournalProblem(*place, what, row.broken_at)
    if row.itself_at is not None:
        yield JournalProblem(*place, "a transaction pays the account that it is taken from", row.itself_at)
    if row.unexplained:
        what = "the balance is not the sum of the account's transactions"
        yield JournalProblem(*place, what, None, row.total, row.balance)
    if row.not_last:
        what = "the balance is not the one after the last transaction"
        yield JournalProblem(*place, what, None, row.last_balance, row.balance)
    if row.other_currency:
        yield JournalProblem(*place, "a transaction is in another currency than the account")


def _system_accounts(comparison: Comparison, connection: Connection) -> Sequence[Row[Any]]:
    name = comparison.names["schema"]
    return connection.execute(text(f"select id, currency, balance, folded_xid from {name}.system_accounts")).all()


def _system(
    comparison: Comparison,
    connection: Connection,
    known: Sequence[Row[Any]],
    folded: int,
    steps: Sequence[Row[Any]],
) -> tuple[tuple[JournalProblem, ...], dict[str, Decimal]]:
    """Problems of system accounts, and the sum of their balances by currency."""
    moved = [row for row in steps if row.side != "owners"]
    if _folded_right(known, folded, moved):
        signed = ((row.currency, row.amount if row.side == "credit" else row.amount.copy_negate()) for row in moved)
        return (), by_name((), signed)
    return _system_in_full(comparison, connection)


def _folded_right(known: Sequence[Row[Any]], folded: int, moved: Sequence[Row[Any]]) -> bool:
    """Whether each stored fold is what the journal says, all accounts of the system having the same bound, or none."""
    places = {(row.id, row.currency) for row in known}
    if any((row.account, row.currency) not in places for row in moved):
        return False
    for account in known:
        here = [row for row in moved if row.account == account.id]
        credit = total(row.folded or Decimal(0) for row in here if row.side == "credit")
        debit = total(row.folded or Decimal(0) for row in here if row.side == "debit")
        expected = less(credit, debit) if account.folded_xid else Decimal(0)
        if account.folded_xid not in (0, folded) or account.balance != expected:
            return False
    return True


def _system_in_full(
    comparison: Comparison, connection: Connection
) -> tuple[tuple[JournalProblem, ...], dict[str, Decimal]]:
    problems: list[JournalProblem] = []
    balances: list[tuple[str, Decimal]] = []
    for row in comparison.run(connection, "system"):
        place = (row.account, row.name, None, row.currency)
        balances.append((row.currency, row.balance))
        if row.unknown:
            what = "transactions of a system account that does not exist"
            problems.append(JournalProblem(*place, what, None, row.total))
        elif row.balance != row.total:
            what = "the folded balance is not the sum of the account's transactions"
            problems.append(JournalProblem(*place, what, None, row.total, row.balance))
        if row.other_currency:
            problems.append(JournalProblem(*place, "a transaction is in another currency than the account"))
    return tuple(problems), by_name((), balances)
