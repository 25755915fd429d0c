"""Everything the database knows of one mutation, by its correlation id, in the order in which it happened."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal

from sqlalchemy import Connection, text

from walletmigrate.config import Settings
from walletmigrate.schema import quoted
from walletmigrate.standing import require_installed

SLACK = timedelta(minutes=5)
"""Ids follow the time nearly: a posting may wait for its account that long after it took its id."""


@dataclass(frozen=True)
class Trace:
    """One row that carries the id. ``where`` is the table: the journal, its idempotency keys, the failures of shadow
    legs, the audit log. ``what`` is for people; ``details`` are the row's own values (amounts in major units).
    """

    at: datetime
    where: Literal["ledger", "key", "failure", "audit"]
    what: str
    correlation_id: str
    details: dict[str, Any]


def trace(
    connection: Connection, settings: Settings, identifier: str, *, since: timedelta | None = timedelta(days=1)
) -> tuple[Trace, ...]:
    """The whole way of a mutation. ``identifier`` is a correlation id, or an idempotency key, which leads to one.

    The journal has no index of correlation ids (each would cost every posting): it is read from ``since`` before now
    on, None from its beginning. What an idempotency key leads to is found however old it is. Raises LedgerNotInstalled.
    """
    require_installed(connection, settings)
    name = quoted(settings.ledger_schema)
    by_key = connection.execute(
        text(
            f"select t.id, t.correlation_id from {name}.idempotency_keys as k "
            f"left join {name}.transactions as t on t.id = k.transaction_id where k.key = :key"
        ),
        {"key": identifier},
    ).one_or_none()
    correlation = by_key.correlation_id if by_key is not None and by_key.correlation_id else identifier
    first = _first_id(connection, name, since)
    if by_key is not None and by_key.id is not None:
        first = min(first, int(by_key.id))
    parameters = {"id": correlation, "key": identifier, "first": first}
    found = [one for query in _QUERIES for one in _rows(connection, query.format(schema=name), correlation, parameters)]
    # A key is taken before its transaction, and says what came of it: it stands behind.
    return tuple(sorted(found, key=lambda one: one.at))


def _first_id(connection: Connection, name: str, since: timedelta | None) -> int:
    """The first transaction that may be younger: found by halving, each look by the primary key."""
    low, high = connection.execute(text(f"select min(id), max(id) from {name}.transactions")).one()
    if low is None or since is None:
        return 0
    look = text(f"select posted_at from {name}.transactions where id >= :id order by id limit 1")
    begin = connection.execute(text("select clock_timestamp()")).scalar_one() - since - SLACK
    while low < high:
        middle = (low + high) // 2
        if connection.scalar(look, {"id": middle}) < begin:
            low = middle + 1
        else:
            high = middle
    return int(low)


def _rows(connection: Connection, query: str, correlation: str, parameters: dict[str, Any]) -> Iterator[Trace]:
    for row in connection.execute(text(query), parameters):
        yield Trace(row.at, row.place, row.what, correlation, dict(row.details))


_OF_ACCOUNT = """
    case when {column} < 0
    then (select s.name from {{schema}}.system_accounts as s where s.id = {column})
    else (
        select a.mapping || '/' || a.key || ' (' || a.bucket || ')' from {{schema}}.accounts as a where a.id = {column}
    )
    end
"""

_QUERIES = (
    """
select
    t.posted_at as at, 'ledger' as place, jsonb_strip_nulls(to_jsonb(t)) as details,
    format(
        'transaction %s: %s %s, %s %s from %s to %s%s', t.id, t.kind, t.type, t.amount, t.currency,"""
    + _OF_ACCOUNT.format(column="t.debit_account")
    + ","
    + _OF_ACCOUNT.format(column="t.credit_account")
    + """, concat(', reverses ' || t.reverses, ', reversed by ' || r.id)
    ) as what
from {schema}.transactions as t
left join {schema}.transactions as r on r.reverses = t.id
where t.id >= :first and t.correlation_id = :id
""",
    """
select
    coalesce(t.posted_at, k.created_at) as at, 'key' as place, jsonb_strip_nulls(to_jsonb(k)) as details,
    format(
        'idempotency key %s: mode %s, %s', k.key, coalesce(k.mode::text, 'dual_write'),
        coalesce('transaction ' || k.transaction_id, 'no transaction')
    ) as what
from {schema}.idempotency_keys as k
left join {schema}.transactions as t on t.id = k.transaction_id
where
    k.key = :key or t.id >= :first and t.correlation_id = :id
""",
    """
select
    f.at, 'failure' as place, jsonb_strip_nulls(to_jsonb(f)) as details,
    format('%s on %s/%s (%s): SQLSTATE %s, %s', f.operation, f.mapping, f.key, f.bucket, f.sqlstate, f.message) as what
from {schema}.failures as f
where f.correlation_id = :id
""",
    """
select
    l.at, 'audit' as place, jsonb_strip_nulls(to_jsonb(l)) as details,
    format('%s by %s: %s', l.action, l.actor, l.reason) as what
from {schema}.audit_log as l
where l.correlation_id = :id or l.details ->> 'idempotency_key' = :key
""",
)
