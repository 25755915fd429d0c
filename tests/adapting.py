"""What the tests of the adapter share: an adapter on a fresh database, account states, and the invariants."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from prometheus_client import CollectorRegistry
from pydantic import SecretStr
from sqlalchemy import Connection, Engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.pool import NullPool

from ledger import ACT, execute, install_users, rows, scalar, unguarded
from walletmigrate import LegacyBalanceAdapter, Settings, StaticSource, connect
from walletmigrate import Mapping as TableMapping
from walletmigrate.functions import relation, value_of
from walletmigrate.install import install
from walletmigrate.observe import Event, Mismatch, Observer, Posted, PrometheusObserver, Read
from walletmigrate.schema import quoted

OFF: dict[str, bool] = {}
DUAL = {"wallet.dualWrite": True}
READ = {"wallet.dualWrite": True, "wallet.readFromLedger": True}


class Base(DeclarativeBase):
    """The application's declarative base."""


class User(Base):
    """The application's users, as `ledger.install_users` makes the table."""

    __tablename__ = "users"

    id: Mapped[int] = mapped_column(primary_key=True)
    tenant: Mapped[str] = mapped_column(default="acme")
    role: Mapped[str] = mapped_column(default="member")
    total_coins: Mapped[Decimal]
    promo: Mapped[Decimal] = mapped_column(default=Decimal(0))


@dataclass
class Heard:
    """An observer that keeps what it is told."""

    events: list[Event] = field(default_factory=list)

    def __call__(self, event: Event, /) -> None:
        self.events.append(event)

    @property
    def posted(self) -> list[Posted]:
        return [event for event in self.events if isinstance(event, Posted)]

    @property
    def reads(self) -> list[Read]:
        return [event for event in self.events if isinstance(event, Read)]

    @property
    def mismatches(self) -> list[Mismatch]:
        return [event for event in self.events if isinstance(event, Mismatch)]


@dataclass
class Place:
    """A database with an installed ledger, its adapter, and what the adapter's observers were told."""

    engine: Engine
    settings: Settings
    source: StaticSource
    heard: Heard
    registry: CollectorRegistry
    adapter: LegacyBalanceAdapter

    @property
    def mapping(self) -> TableMapping:
        return self.settings.mapping(None)

    def flags(self, flags: Mapping[str, bool]) -> None:
        """Put other flags in force."""
        self.source.set(flags)

    def another(self, *, settings: Settings | None = None, observers: Iterable[Observer] = ()) -> LegacyBalanceAdapter:
        """An adapter of another process: nothing in memory, the same flags."""
        return LegacyBalanceAdapter(settings or self.settings, self.source, observers=observers)

    def metric(self, name: str, **labels: str) -> float | None:
        """A sample of the registry, without the prefix of its name."""
        return self.registry.get_sample_value(f"walletmigrate_{name}", labels)

    def coins(self, key: object, column: str = "total_coins") -> Any:
        """The legacy column as it stands; None where there is no row."""
        name, table = quoted(self.mapping.key), relation(self.mapping)
        return scalar(self.engine, f"select {quoted(column)} from {table} where {name}::text = :key", key=str(key))

    def account(self, key: object, bucket: str = "cash", currency: str = "EUR") -> tuple[str, Decimal] | None:
        """State and balance of a ledger account; None where it is absent."""
        found = rows(
            self.engine,
            "select state::text, balance from wallet.accounts "
            "where mapping = :mapping and key = :key and bucket = :bucket and currency = :currency",
            mapping=self.mapping.name,
            key=str(key),
            bucket=bucket,
            currency=currency,
        )
        return (found[0][0], found[0][1]) if found else None

    def legs(self, after: int = 0) -> list[tuple[str, str, str, Decimal]]:
        """(kind, debtor, creditor, amount) of the transactions since id ``after``; owners by key."""
        name = (
            "coalesce((select key from wallet.accounts where id = {0}), "
            "(select name from wallet.system_accounts where id = {0}))"
        )
        found = rows(
            self.engine,
            f"select kind::text, {name.format('debit_account')}, {name.format('credit_account')}, amount "
            "from wallet.transactions where id > :after order by id",
            after=after,
        )
        return [(kind, debtor, creditor, amount) for kind, debtor, creditor, amount in found]

    def last_id(self) -> int:
        """The id of the newest transaction, 0 without one."""
        return int(scalar(self.engine, "select coalesce(max(id), 0) from wallet.transactions"))

    def check(self) -> None:
        """Fail unless every invariant of the ledger holds."""
        check_invariants(self.engine, self.settings)


def place(url: str, *, flags: Mapping[str, bool] = DUAL, phase: str = "dual_write", **table: Any) -> Place:
    """Install the ledger on a table of users, made as `ledger.install_users` does."""
    engine, settings = install_users(url, phase=phase, **table)
    return placed(engine, settings, flags)


def placed(engine: Engine, settings: Settings, flags: Mapping[str, bool] = DUAL) -> Place:
    """An adapter on a database whose ledger is installed already, or is not to be."""
    source, heard, registry = StaticSource(flags), Heard(), CollectorRegistry()
    adapter = LegacyBalanceAdapter(settings, source, observers=[heard, PrometheusObserver(registry)])
    return Place(engine, settings, source, heard, registry, adapter)


def custom(
    url: str,
    ddl: str,
    mapping: Mapping[str, Any],
    *,
    flags: Mapping[str, bool] = DUAL,
    phase: str = "dual_write",
    installed: bool = True,
) -> Place:
    """A table of the test's own making: ``ddl`` creates and fills it, ``mapping`` describes it."""
    engine = connect.engine(url, application_name="walletmigrate-test", poolclass=NullPool)
    with engine.begin() as connection:
        connection.exec_driver_sql(ddl, execution_options={"no_parameters": True})
    settings = Settings(database_url=SecretStr(url), mappings=(TableMapping.model_validate(mapping),))
    if installed:
        install(engine, settings, ACT)
        execute(engine, "update wallet.control set phase = :phase", phase=phase)
    return placed(engine, settings, flags)


@contextmanager
def asked_for(at: Place, wish: str) -> Iterator[None]:
    """Put "on", "off" or "stopped" in force: the flag, or the flag with the line stopped."""
    at.flags(OFF if wish == "off" else DUAL)
    execute(at.engine, "select wallet.set_line(:running)", running=wish != "stopped")
    try:
        yield
    finally:
        at.flags(DUAL)
        execute(at.engine, "select wallet.set_line(true)")


def seal(connection: Connection, *keys: int) -> None:
    """Freeze these accounts of users, whatever the phase is."""
    found = connection.exec_driver_sql(
        "select frozen, refused from wallet.seal_users(%s::bigint[])", (list(keys),)
    ).one()
    assert found.frozen >= len(keys), "an account that is not mirrored cannot be frozen"


def bring_into(at: Place, key: int, state: str) -> int | None:
    """Make row ``key`` with 100 legacy coins, and its account in ``state``; give a transaction to reverse.

    "closed" has lost its row; "closed, live" has one, put there past the fence. In every state but absent
    the account has been credited 5 by the transaction that is given.
    """
    behind = {"stale": 80, "closed, live": 80}.get(state, 95)
    opening = 100 if state == "absent" else behind
    execute(at.engine, "insert into users values (:key, 'acme', 'member', :coins, 5)", key=key, coins=opening)
    if state == "absent":
        return None
    writer = LegacyBalanceAdapter(at.settings, StaticSource(DUAL))
    with at.engine.begin() as connection:
        transaction = writer.credit(connection, key, 5, type="deposit").transaction_id
        if state == "frozen":
            seal(connection, key)
        if state == "stale":
            connection.exec_driver_sql("update users set total_coins = 100 where id = %s", (key,))
        if state.startswith("closed"):
            connection.exec_driver_sql("delete from users where id = %s", (key,))
    if state == "closed, live":
        with unguarded(at.engine, "public.users") as connection:
            connection.exec_driver_sql("insert into users values (%s, 'acme', 'member', 100, 5)", (key,))
    assert transaction is not None
    return transaction


def check_invariants(engine: Engine, settings: Settings) -> None:
    """Conservation per currency, mirrored = legacy, balance = journal, and an unbroken chain of balances."""
    for mapping in settings.mappings:
        floats = {name for (name,) in rows(engine, _FLOATS, table=relation(mapping))}
        for column in mapping.columns:
            value = value_of(column, is_float=column.column in floats)
            wrong = rows(
                engine,
                f"select a.key, a.balance, {value} from wallet.accounts as a "
                f"left join {relation(mapping)} as l on l.{quoted(mapping.key)}::text = a.key "
                "where a.mapping = :mapping and a.bucket = :bucket and a.currency = :currency "
                f"and a.state = 'mirrored' and a.balance is distinct from {value}",
                mapping=mapping.name,
                bucket=column.bucket,
                currency=column.currency,
            )
            assert wrong == [], "mirrored accounts differ from legacy"
    assert rows(engine, _IMBALANCE) == [], "the sum of all balances is not zero"
    assert rows(engine, _JOURNAL) == [], "balances differ from the journal"
    assert rows(engine, _CHAIN) == [], "a balance after is not the one before and the amount"
    assert rows(engine, "select key from wallet.idempotency_keys where mode is null and transaction_id is null") == []


_FLOATS = (
    "select attname from pg_attribute where attrelid = cast(:table as regclass) "
    "and atttypid in ('float4'::regtype, 'float8'::regtype)"
)

_IMBALANCE = """
select currency, sum(balance) from (
    select currency, balance from wallet.accounts
    union all select currency, balance from wallet.system_balances
) as x group by currency having sum(balance) <> 0
"""

_JOURNAL = """
select a.id, a.key, a.balance from wallet.accounts as a where a.balance <> coalesce(
    (select sum(e.amount) from wallet.wallet_entries as e where e.account_id = a.id), 0
)
"""

_CHAIN = """
select * from (
    select
        e.account_id, e.transaction_id, e.balance_before, e.balance_after, a.balance,
        lag(e.balance_after, 1, 0.00) over w as previous,
        lead(e.transaction_id) over w is null as newest
    from wallet.wallet_entries as e inner join wallet.accounts as a on a.id = e.account_id
    window w as (partition by e.account_id order by e.transaction_id)
) as x
where balance_before <> previous or (newest and balance_after <> balance)
"""
