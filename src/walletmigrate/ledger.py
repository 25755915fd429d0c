"""Reading the ledger: an account's history, its balance at a past time, a transaction's accounts."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Literal

from sqlalchemy import Connection, text

from walletmigrate.config import Column
from walletmigrate.errors import UsageError
from walletmigrate.schema import quoted
from walletmigrate.sums import less

MAX_ENTRIES = 1000
_NEWEST = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Entry:
    """One leg of a transaction on one account. ``amount`` is signed, balances are before and after, major units.

    ``group_id`` is shared by the transactions of one call of `apply`: the id of the first of them. So has half a
    transfer whose other side was not in the ledger, with itself alone.
    """

    transaction_id: int
    direction: Literal["debit", "credit"]
    amount: Decimal
    balance_before: Decimal
    balance_after: Decimal
    currency: str
    kind: Literal["opening", "resync", "posting", "correction", "reversal"]
    type: str
    posted_at: datetime
    reverses: int | None
    reversed_by: int | None
    reference: tuple[str, str] | None
    correlation_id: str | None
    actor: str | None
    reason: str | None
    job_id: int | None
    group_id: int | None = None


@dataclass(frozen=True, slots=True)
class Touched:
    """What a transaction moved: the keys of the owners' accounts, debtor first, and the amount in major units."""

    keys: tuple[str, ...]
    bucket: str
    currency: str
    amount: Decimal


def history(
    connection: Connection,
    schema: str,
    mapping: str,
    key: str,
    column: Column,
    *,
    limit: int = 50,
    before: int | None = None,
) -> tuple[Entry, ...]:
    """The newest entries of an account, newest first; ``before`` is a transaction id to go on from.

    Each direction is read by its own index and only as far as ``limit`` goes (1 to 1000). Raises UsageError for a
    ``limit`` or ``before`` that is no int.
    """
    for name, number in (("limit", limit), ("before", before)):
        if number is not None and (isinstance(number, bool) or not isinstance(number, int)):
            raise UsageError(f"{name} is an int, not {number!r}; before is the transaction_id of the last entry shown")
    rows = connection.execute(
        text(_HISTORY.format(schema=quoted(schema))),
        {
            "mapping": mapping,
            "key": key,
            "bucket": column.bucket,
            "currency": column.currency,
            "before": None if before is None else max(0, min(before, _NEWEST)),
            "limit": max(1, min(limit, MAX_ENTRIES)),
        },
    )
    return tuple(
        Entry(
            transaction_id=row.id,
            direction=row.direction,
            amount=row.amount,
            balance_before=less(row.balance_after, row.amount),
            balance_after=row.balance_after,
            currency=row.currency,
            kind=row.kind,
            type=row.type,
            posted_at=row.posted_at,
            reverses=row.reverses,
            reversed_by=row.reversed_by,
            reference=None if row.reference_type is None else (row.reference_type, row.reference_id),
            correlation_id=row.correlation_id,
            actor=row.actor,
            reason=row.reason,
            job_id=row.job_id,
            group_id=row.group_id,
        )
        for row in rows
    )


def balance_at(
    connection: Connection, schema: str, mapping: str, key: str, column: Column, at: datetime
) -> Decimal | None:
    """The ledger balance that stood at a time; None before the account's first transaction.

    Times are taken under the account's lock, so they follow the order of posting. Raises UsageError for a
    time without a time zone.
    """
    if at.tzinfo is None:
        raise UsageError(f"{at} has no time zone; pass for example datetime.now(UTC)")
    found = connection.scalar(
        text(_BALANCE_AT.format(schema=quoted(schema))),
        {"mapping": mapping, "key": key, "bucket": column.bucket, "currency": column.currency, "at": at},
    )
    return None if found is None else Decimal(found)


def touched_by(connection: Connection, schema: str, mapping: str, transaction_id: int) -> Touched | None:
    """What a transaction moved in this mapping; None when the mapping has no transaction of that id."""
    rows = connection.execute(
        text(
            f"select a.key, a.bucket, a.currency, t.amount from {quoted(schema)}.transactions as t "
            f"inner join {quoted(schema)}.accounts as a on a.id in (t.debit_account, t.credit_account) "
            "where t.id = :id and a.mapping = :mapping order by a.id <> t.debit_account"
        ),
        {"id": transaction_id, "mapping": mapping},
    ).all()
    if not rows:
        return None
    return Touched(tuple(row.key for row in rows), rows[0].bucket, rows[0].currency, rows[0].amount)


_ACCOUNT = """
    select a.id from {schema}.accounts as a
    where a.mapping = :mapping and a.key = :key and a.bucket = :bucket and a.currency = :currency
"""

_HISTORY = (
    """
with account as ("""
    + _ACCOUNT
    + """), legs as (
    (
        select t.*, 'credit' as direction, t.amount as signed, t.credit_balance as balance_after
        from {schema}.transactions as t
        where t.credit_account > 0 and t.credit_account = (select id from account)
        and (cast(:before as bigint) is null or t.id < :before)
        order by t.id desc limit :limit
    )
    union all
    (
        select t.*, 'debit' as direction, -t.amount as signed, t.debit_balance as balance_after
        from {schema}.transactions as t
        where t.debit_account > 0 and t.debit_account = (select id from account)
        and (cast(:before as bigint) is null or t.id < :before)
        order by t.id desc limit :limit
    )
)
select
    l.id, l.direction, l.signed as amount, l.balance_after, l.currency, l.kind::text as kind, l.type, l.posted_at,
    l.reverses, r.id as reversed_by, l.reference_type, l.reference_id, l.correlation_id, l.actor, l.reason, l.job_id,
    l.group_id
from legs as l
left join {schema}.transactions as r on r.reverses = l.id
order by l.id desc
limit :limit
"""
)

_BALANCE_AT = (
    """
with account as ("""
    + _ACCOUNT
    + """)
select x.balance_after from (
    (
        select t.id, t.credit_balance as balance_after from {schema}.transactions as t
        where t.credit_account > 0 and t.credit_account = (select id from account) and t.posted_at <= :at
        order by t.id desc limit 1
    )
    union all
    (
        select t.id, t.debit_balance from {schema}.transactions as t
        where t.debit_account > 0 and t.debit_account = (select id from account) and t.posted_at <= :at
        order by t.id desc limit 1
    )
) as x
order by x.id desc
limit 1
"""
)
