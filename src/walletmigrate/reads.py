"""Reading a balance: legacy and ledger in one statement, so that what is compared belongs together."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping as MappingOf
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache
from typing import Any, Literal

from sqlalchemy import Connection, Row

from walletmigrate import observe
from walletmigrate.config import Column
from walletmigrate.errors import LegacyValueInvalid, UnknownAccount
from walletmigrate.functions import relation
from walletmigrate.movements import Key
from walletmigrate.schema import quoted
from walletmigrate.sites import Site

READING = frozenset({"read_ledger", "wallet_only", "frozen", "retired"})
"""The phases in which flags may ask for reads from the ledger."""


@dataclass(frozen=True, slots=True)
class Balance:
    """A balance (major units) and where it came from.

    ``source`` is "fallback" where the ledger was asked for and could not answer. ``ledger_balance`` and
    ``state`` are None where there is no ledger account. ``compare`` is None where nothing was compared.
    """

    key: Key
    bucket: str
    currency: str
    amount: Decimal
    source: Literal["legacy", "ledger", "fallback"]
    legacy_balance: Decimal | None
    ledger_balance: Decimal | None
    state: Literal["mirrored", "stale", "frozen", "closed"] | None
    compare: Literal["match", "mismatch", "stale"] | None


def read_balance(
    connection: Connection,
    schema: str,
    site: Site,
    column: Column,
    key: Key,
    key_text: str,
    wanted: bool,
    compared: bool,
) -> Balance:
    """One statement, one snapshot.

    Raises UnknownAccount when neither side has the account, LegacyValueInvalid when the column holds NULL.
    """
    statement = _statement(schema, site, column.bucket, column.currency)
    arguments = (key_text, key_text) if site.installed else (key_text,)
    row = connection.exec_driver_sql(statement, arguments).one_or_none()
    if row is None or (row.key is None and row.state != "frozen"):
        raise UnknownAccount(site.mapping.name, key)
    return _judged(site, column, key, row, wanted=wanted, compared=compared)


def read_balances(
    connection: Connection,
    schema: str,
    site: Site,
    column: Column,
    keys: MappingOf[str, Key],
    wanted: Callable[[str], bool],
    compared: bool,
) -> dict[Key, Balance]:
    """Many accounts in one statement and one snapshot; ``keys`` by their text. Who is unknown is left out.

    Raises LegacyValueInvalid for the first column that holds NULL.
    """
    rows = connection.exec_driver_sql(_statement_of_many(schema, site, column.bucket, column.currency), (list(keys),))
    found = {
        row.asked: _judged(site, column, keys[row.asked], row, wanted=wanted(row.asked), compared=compared)
        for row in rows
        if row.key is not None or row.state == "frozen"
    }
    return {key: found[text] for text, key in keys.items() if text in found}


def _judged(site: Site, column: Column, key: Key, row: Row[Any], *, wanted: bool, compared: bool) -> Balance:
    # Once, and by place: by name each would take as long as all of them.
    values: tuple[Any, ...] = row[-4:]
    legacy, ledger, state, phase = values
    if phase == "retired":
        # An account that was never opened, or of a row that came again, holds nothing.
        amount = ledger if state == "frozen" else Decimal(0)
        return Balance(key, column.bucket, column.currency, amount, "ledger", None, amount, state, None)
    compare: Literal["match", "mismatch", "stale"] | None = None
    if compared and state == "mirrored":
        compare = "match" if legacy == ledger else "mismatch"
    elif compared and state in ("stale", "closed"):
        compare = "stale"
    source: Literal["legacy", "ledger", "fallback"] = "legacy"
    if state == "frozen":
        source = "ledger"
    elif wanted and phase in READING:
        # Legacy is true until an account is frozen: whatever the ledger cannot vouch for comes from there.
        source = "ledger" if state == "mirrored" and legacy == ledger else "fallback"
    amount = ledger if source == "ledger" else legacy
    if amount is None:
        raise LegacyValueInvalid(site.mapping.name, key, column.column)
    return Balance(
        key=key,
        bucket=column.bucket,
        currency=column.currency,
        amount=amount,
        source=source,
        legacy_balance=legacy,
        ledger_balance=ledger,
        state=state,
        compare=compare,
    )


def told(mapping: str, found: Balance, seconds: float) -> list[observe.Event]:
    """What observers are told of a read."""
    bucket, currency, key = found.bucket, found.currency, found.key
    correlation = observe.correlation_id()
    events: list[observe.Event] = [
        observe.Read(
            found.source, found.compare, seconds, mapping, bucket, currency, correlation, key, balance=found.amount
        )
    ]
    if found.compare == "mismatch":
        legacy, ledger = found.legacy_balance, found.ledger_balance
        events.append(
            observe.Mismatch("read", mapping, bucket, currency, correlation, key=key, legacy=legacy, ledger=ledger)
        )
    return events


@lru_cache(maxsize=256)
def _statement_of_many(schema: str, site: Site, bucket: str, currency: str) -> str:
    mapping, column = site.mapping, site.mapping.column(bucket, currency)
    # As in `_statement`: a column that is dropped while processes run is null.
    name, value = f"l.{quoted(mapping.key)}", site.value(column, alias=None)
    asked = (
        "unnest(cast(%s as text[])) as q (asked) "
        f"cross join (select null::numeric as {quoted(column.column)}) as dropped "
        f"left join lateral (select {name} as key, {value} as legacy from {relation(mapping)} as l "
        f"where {name} = cast(q.asked as {site.key_sql_type})) as l on true"
    )
    selected = "select q.asked, l.key, l.legacy, "
    if not site.installed:
        return f"{selected} null::numeric as ledger, null::text as state, 'legacy' as phase from {asked}"
    return (
        f"{selected} a.balance as ledger, a.state::text as state, k.phase "
        f"from {quoted(schema)}.control as k cross join {asked} "
        f"left join {quoted(schema)}.accounts as a on a.mapping = '{mapping.name}' and a.key = q.asked collate \"C\" "
        f"and a.bucket = '{column.bucket}' and a.currency = '{column.currency}'"
    )


@lru_cache(maxsize=256)
def _statement(schema: str, site: Site, bucket: str, currency: str) -> str:
    # By the column's name, not the column: to hash that takes as long as the rest of a call's own work.
    mapping, column, name = site.mapping, site.mapping.column(bucket, currency), quoted(site.mapping.key)
    row = f"{relation(mapping)} as l on l.{name} = cast(%s as {site.key_sql_type})"
    # A column that is dropped while processes run must fail no read. Its name without a table's before it is the
    # legacy table's while that has it, and then the outer one's: null.
    value = site.value(column, alias=None)
    live = (
        f"lateral (select l.{name} as key, {value} as legacy from {relation(mapping)} as l "
        f"where l.{name} = cast(%s as {site.key_sql_type})) as l on true"
    )
    if not site.installed:
        return (
            f"select l.{name} as key, {site.value(column)} as legacy, null::numeric as ledger, "
            f"null::text as state, 'legacy' as phase from (values (1)) as one inner join {row}"
        )
    return (
        f"select l.key, l.legacy, a.balance as ledger, a.state::text as state, k.phase "
        f"from {quoted(schema)}.control as k cross join (select null::numeric as {quoted(column.column)}) as dropped "
        f"left join {live} "
        f"left join {quoted(schema)}.accounts as a on a.mapping = '{mapping.name}' and a.key = %s "
        f"and a.bucket = '{column.bucket}' and a.currency = '{column.currency}'"
    )
