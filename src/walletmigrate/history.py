"""An account's history by filters, in pages or streamed, and its balance at any time.

It asks the ledger alone, so that closed accounts and retired legacy tables have their history too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any, Final

from sqlalchemy import Connection, Row, text

from walletmigrate.config import Mapping, Settings
from walletmigrate.errors import InvalidTime, PageOutOfRange, UnknownLedgerAccount, UsageError
from walletmigrate.ledger import Entry
from walletmigrate.schema import quoted
from walletmigrate.standing import database_time, require_installed

KINDS: Final = ("opening", "resync", "posting", "correction", "reversal")
MAX_LIMIT: Final = 10_000


@dataclass(frozen=True)
class Account:
    """One ledger account; ``scale`` is the decimals of its amounts."""

    id: int
    mapping: str
    key: str
    bucket: str
    currency: str
    scale: int
    state: str
    balance: Decimal
    opened_at: datetime


@dataclass(frozen=True)
class Selection:
    """Which entries: of these types and kinds (empty: all), posted at ``since`` or later and before ``until``.

    Both times need a time zone, and are at most now (else InvalidTime); kinds are those of `KINDS` (UsageError).
    """

    types: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    since: datetime | None = None
    until: datetime | None = None

    def __post_init__(self) -> None:
        for kind in self.kinds:
            if kind not in KINDS:
                raise UsageError(f"there is no kind {kind!r}: use one of {', '.join(KINDS)}")
        for when in (self.since, self.until):
            if when is not None:
                zoned(when)
        if self.since is not None and self.until is not None and self.since >= self.until:
            raise InvalidTime(self.until.isoformat(), f"is not after {self.since.isoformat()}, so nothing lies between")


@dataclass(frozen=True)
class Page:
    """Entries of an account, newest first. ``after`` is what to go on from, None at the end.

    ``number`` and ``pages`` are None unless a page was asked for by number: counting them reads all entries.
    """

    account: Account
    entries: tuple[Entry, ...]
    after: int | None
    number: int | None = None
    pages: int | None = None


@dataclass(frozen=True)
class BalanceAt:
    """A ledger balance that stood at a time, and the transaction that made it (None: none had come yet).

    ``balance`` is None before the account was opened. ``snapshot_id`` is the newest snapshot from before that time;
    ``proven`` says whether its balance and the amounts since come to the same, None without such a snapshot.
    """

    account: Account
    at: datetime
    balance: Decimal | None
    transaction_id: int | None
    posted_at: datetime | None
    snapshot_id: int | None
    proven: bool | None


def account_of(
    connection: Connection,
    settings: Settings,
    mapping: Mapping,
    key: str,
    bucket: str | None = None,
    currency: str | None = None,
) -> Account:
    """The account with that key as text. Raises UnknownLedgerAccount, UnknownBucket, UnknownCurrency.

    Capitals mean nothing in a UUID alone: as text, ``bob`` and ``BOB`` are two people.
    """
    require_installed(connection, settings)
    column = mapping.column(bucket, currency)
    name = quoted(settings.ledger_schema)
    row = connection.execute(
        text(
            "select id, mapping, key, bucket, currency, state::text as state, balance, opened_at "
            f"from {name}.accounts where mapping = :mapping and key = case when ("
            f"select definition ->> 'key_type' from {name}.mappings where name = :mapping"
            ") = 'uuid' then lower(:key) else :key end and bucket = :bucket and currency = :currency"
        ),
        {"mapping": mapping.name, "key": key, "bucket": column.bucket, "currency": column.currency},
    ).one_or_none()
    if row is None:
        raise UnknownLedgerAccount(mapping.name, key, column.bucket, column.currency)
    return Account(scale=column.scale, **row._mapping)


def page(
    connection: Connection,
    settings: Settings,
    account: Account,
    selection: Selection | None = None,
    *,
    limit: int = 50,
    after: int | None = None,
    number: int | None = None,
) -> Page:
    """One page: the ``number``-th (from 1), or what comes behind the transaction ``after``; else the first.

    Each entry is read by the account's own index. Raises PageOutOfRange, UsageError, InvalidTime.
    """
    if not 1 <= limit <= MAX_LIMIT:
        raise UsageError(f"limit {limit}: a page has 1 to {MAX_LIMIT} entries; an export has no limit")
    if number is not None and after is not None:
        raise UsageError("a page is asked for by its number or by what it comes after, not by both")
    values = _bounds(connection, settings, account, selection or Selection())
    pages = None
    if number is not None:
        count = int(connection.scalar(text(_count(settings)), values) or 0)
        pages = max(1, -(-count // limit))
        if not 1 <= number <= pages:
            raise PageOutOfRange(number, pages, limit)
    if after is not None:
        values["below"] = min(after, values["below"])
    paging = {"limit": limit + 1, "offset": (number - 1) * limit if number else 0}
    rows = connection.execute(text(_entries(settings) + " limit :limit offset :offset"), {**values, **paging}).all()
    shown = tuple(_entry(row) for row in rows[:limit])
    return Page(account, shown, shown[-1].transaction_id if len(rows) > limit else None, number, pages)


def entries(
    connection: Connection, settings: Settings, account: Account, selection: Selection | None = None
) -> Iterator[Entry]:
    """All entries that are asked for, newest first, streamed from a cursor of the database."""
    values = _bounds(connection, settings, account, selection or Selection())
    statement = text(_entries(settings)).execution_options(yield_per=2000)
    for row in connection.execute(statement, values):
        yield _entry(row)


def balance_at(connection: Connection, settings: Settings, account: Account, at: datetime) -> BalanceAt:
    """The account's balance at a time, found in the journal by bisection: some forty probes of an index.

    An account's times follow the order of posting, since they are taken under its lock. Raises InvalidTime for a
    time without a zone, or in the future.
    """
    _past(connection, at)
    name = quoted(settings.ledger_schema)
    last = last_at(connection, settings, account, at)
    found = connection.execute(
        text(
            "select case when t.credit_account = :account then t.credit_balance else t.debit_balance end as balance, "
            f"t.posted_at from {name}.transactions as t where t.id = :id"
        ),
        {"account": account.id, "id": last},
    ).one_or_none()
    balance = found.balance if found else Decimal(0) if at >= account.opened_at else None
    snapshot = connection.scalar(
        text(f"select max(id) from {name}.snapshots where state = 'complete' and taken_at <= :at"), {"at": at}
    )
    proven = None
    if snapshot is not None:
        since = connection.execute(
            text(_SINCE.format(schema=name)), {"account": account.id, "snapshot": snapshot, "last": last}
        ).scalar_one()
        proven = since == (balance or 0)
    return BalanceAt(account, at, balance, last or None, found.posted_at if found else None, snapshot, proven)


def last_at(connection: Connection, settings: Settings, account: Account, at: datetime) -> int:
    """The id of the account's last transaction posted at that time or before; 0 if there was none."""
    statement = text(_BISECTION.format(schema=quoted(settings.ledger_schema)))
    return int(connection.scalar(statement, {"account": account.id, "at": at}) or 0)


def zoned(when: datetime) -> datetime:
    """The same time. Raises InvalidTime if it has no zone."""
    if when.tzinfo is None:
        raise InvalidTime(when.isoformat(), "has no time zone")
    return when


def read_time(words: str) -> datetime:
    """A time in ISO 8601 with its zone. Raises InvalidTime."""
    try:
        return zoned(datetime.fromisoformat(words.strip()))
    except ValueError as error:
        if isinstance(error, InvalidTime):
            raise
        raise InvalidTime(words, "cannot be read") from None


def _past(connection: Connection, when: datetime) -> None:
    if zoned(when) > database_time(connection):
        raise InvalidTime(when.isoformat(), "is in the future")


def _bounds(connection: Connection, settings: Settings, account: Account, chosen: Selection) -> dict[str, Any]:
    """The filters as parameters; times become ids, so that a page of long ago costs no more than today's."""
    above, below = 0, 2**63 - 1
    if chosen.since is not None:
        _past(connection, chosen.since)
        above = _before(connection, settings, account, chosen.since)
    if chosen.until is not None:
        _past(connection, chosen.until)
        below = _before(connection, settings, account, chosen.until) + 1
    types, kinds = list(chosen.types) or None, list(chosen.kinds) or None
    return {"account": account.id, "above": above, "below": below, "types": types, "kinds": kinds}


def _before(connection: Connection, settings: Settings, account: Account, when: datetime) -> int:
    """The last transaction before a time; PostgreSQL's times are whole microseconds."""
    one = connection.execute(text("select cast(:at as timestamptz) - interval '1 microsecond'"), {"at": when})
    return last_at(connection, settings, account, one.scalar_one())


def _entry(row: Row[Any]) -> Entry:
    values = dict(row._mapping)
    reference = (values.pop("reference_type"), values.pop("reference_id"))
    after = values["balance_after"]
    before = after - values["amount"]
    return Entry(balance_before=before, reference=None if reference[0] is None else reference, **values)


def _legs(settings: Settings, columns: str) -> str:
    name = quoted(settings.ledger_schema)
    chosen = (
        "t.id > :above and t.id < :below and (cast(:types as text[]) is null or t.type = any(:types)) "
        "and (cast(:kinds as text[]) is null or cast(t.kind as text) = any(:kinds))"
    )
    sides = (("credit", "t.amount"), ("debit", "-t.amount"))
    return " union all ".join(
        f"(select {columns.format(side=side, amount=amount)} from {name}.transactions as t "
        f"where t.{side}_account > 0 and t.{side}_account = :account and {chosen} order by t.id desc)"
        for side, amount in sides
    )


def _count(settings: Settings) -> str:
    return f"select count(*) from ({_legs(settings, 't.id')}) as l"


def _entries(settings: Settings) -> str:
    columns = (
        "t.id as transaction_id, cast('{side}' as text) as direction, {amount} as amount, "
        "t.{side}_balance as balance_after, t.currency, cast(t.kind as text) as kind, t.type, t.posted_at, t.reverses, "
        "t.reference_type, t.reference_id, t.correlation_id, t.actor, t.reason, t.job_id, t.group_id"
    )
    name = quoted(settings.ledger_schema)
    return (
        f"select l.*, (select r.id from {name}.transactions as r where r.reverses = l.transaction_id) as reversed_by "
        f"from ({_legs(settings, columns)}) as l order by l.transaction_id desc"
    )


# lo is at or before the time, hi behind it; the probe is the first transaction from the middle on.
_BISECTION = """
with recursive search (lo, hi) as (
    select cast(0 as bigint), 1 + coalesce(greatest(
        (select max(t.id) from {schema}.transactions as t where t.credit_account > 0 and t.credit_account = :account),
        (select max(t.id) from {schema}.transactions as t where t.debit_account > 0 and t.debit_account = :account)
    ), 0)
    union all
    select
        case when p.id < s.hi and p.posted_at <= :at then p.id else s.lo end,
        case when p.id < s.hi and p.posted_at <= :at then s.hi else m.id end
    from search as s
    cross join lateral (select (s.lo + s.hi) / 2 as id) as m
    left join lateral (
        select x.id, x.posted_at from (
            (
                select t.id, t.posted_at from {schema}.transactions as t
                where t.credit_account > 0 and t.credit_account = :account and t.id >= m.id
                order by t.id limit 1
            )
            union all
            (
                select t.id, t.posted_at from {schema}.transactions as t
                where t.debit_account > 0 and t.debit_account = :account and t.id >= m.id
                order by t.id limit 1
            )
        ) as x
        order by x.id limit 1
    ) as p on true
    where s.hi - s.lo > 1
)
select max(lo) from search
"""

# What a snapshot has, and the amounts of what the account did since, up to a transaction.
_SINCE = """
with known as (
    select b.balance, b.transaction_id from {schema}.snapshot_balances as b
    where b.account_id = :account and b.snapshot_id <= :snapshot order by b.snapshot_id desc limit 1
), start as (
    select coalesce((select k.balance from known as k), 0) as balance,
        coalesce((select k.transaction_id from known as k), 0) as id
)
select s.balance + coalesce((
    select sum(t.amount) from {schema}.transactions as t
    where t.credit_account > 0 and t.credit_account = :account and t.id > s.id and t.id <= :last
), 0) - coalesce((
    select sum(t.amount) from {schema}.transactions as t
    where t.debit_account > 0 and t.debit_account = :account and t.id > s.id and t.id <= :last
), 0)
from start as s
"""
