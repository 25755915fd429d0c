"""A pytest plugin for the adopting application's own tests: a scratch database with the ledger, rolled back per test.

Switch it on in the top ``conftest.py`` and say how the application's tables are made::

    pytest_plugins = ["walletmigrate.testing"]

    @pytest.fixture(scope="session")
    def wallet_tables():
        return Base.metadata.create_all          # gets a Connection

The fixture `wallet` then is a `Wallet`, and ``async_wallet()`` opens an `AsyncWallet` for a test that awaits. What else
may be overridden: ``wallet_settings`` (default: the file that ``WALLETMIGRATE_CONFIG`` names, else
``walletmigrate.toml`` in pytest's root) and ``wallet_server`` (default: the server of
``WALLETMIGRATE_TEST_DATABASE_URL``, whose user may create databases and roles; else an embedded PostgreSQL, extra
``embedded``). With pytest-xdist each worker has a database of its own.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from decimal import Decimal
from typing import Any, Final, ParamSpec, TypeVar

import pytest
from pydantic import SecretStr
from sqlalchemy import Connection, Engine, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from walletmigrate import connect
from walletmigrate.adapter import LegacyBalanceAdapter
from walletmigrate.async_adapter import AsyncLegacyBalanceAdapter
from walletmigrate.audit import Act
from walletmigrate.config import Settings
from walletmigrate.embedded import DURABILITY_OFF, Server
from walletmigrate.errors import UsageError
from walletmigrate.flags import Decision, StaticSource
from walletmigrate.install import install
from walletmigrate.ledger import Entry
from walletmigrate.movements import Key
from walletmigrate.schema import quoted

PHASES: Final = ("legacy", "dual_write", "read_ledger", "wallet_only")
"""What `Wallet.phase` takes. Frozen accounts are made with `Wallet.freeze`."""

Tables = Callable[[Connection], object]
P = ParamSpec("P")
T = TypeVar("T")

_ACT: Final = Act("tests", "a scratch database")


class Wallet:
    """One test's view of the ledger. Everything runs in one transaction, which is rolled back at the end.

    ``connection`` is at READ COMMITTED; code under test gets it, or a `session`, which may commit and roll back as it
    likes. ``adapter`` decides by the flags that `flags` has set, and at first by none.
    """

    def __init__(self, connection: Connection, settings: Settings, mapping: str | None = None) -> None:
        self.connection = connection
        self.settings = settings
        self.mapping = settings.mapping(mapping)
        self.source = StaticSource()
        self.adapter = LegacyBalanceAdapter(settings, self.source, mapping=mapping)
        self._schema = quoted(settings.ledger_schema)

    def session(self, **options: Any) -> Session:
        """A Session on the test's connection: its commit releases a savepoint."""
        return Session(bind=self.connection, join_transaction_mode="create_savepoint", **options)

    def flags(
        self, *, dual_write: bool = False, read_from_ledger: bool = False, enable_withdrawals: bool = False
    ) -> None:
        """Put these flags in force for all accounts, at once."""
        self.source.set(Decision(dual_write, read_from_ledger, enable_withdrawals))

    def phase(self, phase: str) -> None:
        """Put the migration into a phase (it begins in ``wallet_only``, where the flags alone decide), without gates.

        Raises UsageError for another name than `PHASES` has.
        """
        if phase not in PHASES:
            raise UsageError(f"{phase!r} is none of {', '.join(PHASES)}; freeze accounts with wallet.freeze(key).")
        self.connection.execute(text(f"update {self._schema}.control set phase = :phase"), {"phase": phase})
        self._follow(phase)

    def freeze(self, key: Key, *, bucket: str | None = None, currency: str | None = None) -> None:
        """Make the ledger alone true for an account that is mirrored. Raises AssertionError for any other."""
        frozen = self.connection.execute(
            text(f"update {self._schema}.accounts set state = 'frozen' where {_ACCOUNT} and state = 'mirrored'"),
            self._names(key, bucket, currency),
        )
        assert frozen.rowcount == 1, (
            f"account {key} is {self.state(key, bucket=bucket, currency=currency)}, not mirrored"
        )

    def state(self, key: Key, *, bucket: str | None = None, currency: str | None = None) -> str:
        """The account's state: absent, mirrored, stale, frozen or closed."""
        found = self.connection.scalar(
            text(f"select state::text from {self._schema}.accounts where {_ACCOUNT}"),
            self._names(key, bucket, currency),
        )
        return str(found or "absent")

    def entries(self, key: Key, *, bucket: str | None = None, currency: str | None = None) -> tuple[Entry, ...]:
        """The account's ledger entries, oldest first (the newest thousand), openings and resyncs included."""
        found = self.adapter.history(self.connection, key, bucket=bucket, currency=currency, limit=1000)
        return tuple(reversed(found))

    def assert_balance(
        self, key: Key, expected: Decimal | int, *, bucket: str | None = None, currency: str | None = None
    ) -> None:
        """Fail unless the account has this balance (major units) on every side that has to be true for its state."""
        found = self.adapter.balance(self.connection, key, bucket=bucket, currency=currency)
        true = {
            "legacy": None if found.state == "frozen" else found.legacy_balance,
            "ledger": found.ledger_balance if found.state in ("mirrored", "frozen") else None,
        }
        wrong = {side: balance for side, balance in true.items() if balance is not None and balance != expected}
        assert not wrong, f"account {key} ({found.state or 'absent'}): expected {expected}, found {wrong}"

    def assert_entries(
        self, key: Key, *expected: tuple[str, Decimal | int], bucket: str | None = None, currency: str | None = None
    ) -> None:
        """Fail unless these are the account's postings, oldest first, as (type, signed amount in major units).

        Openings and resyncs are left out: they are the migration's, not the application's.
        """
        entries = self.entries(key, bucket=bucket, currency=currency)
        found = [(one.type, one.amount) for one in entries if one.kind not in ("opening", "resync")]
        assert found == list(expected), f"account {key}: expected {list(expected)}, found {found}"

    def _names(self, key: Key, bucket: str | None, currency: str | None) -> dict[str, object]:
        column = self.mapping.column(bucket, currency)
        names = {"mapping": self.mapping.name, "bucket": column.bucket, "currency": column.currency}
        return {**names, "key": str(key)}

    def _follow(self, phase: str) -> None:
        # The sequence that postings ask follows the phase at commit, and this transaction has none.
        value = 1 if phase == "legacy" else 2
        self.connection.execute(text(f"select setval('{self._schema}.ceiling', :value)"), {"value": value})


class AsyncWallet:
    """A `Wallet` for code that awaits: the same calls, those that ask the database as coroutines.

    ``connection`` is an AsyncConnection of the test's own event loop, ``adapter`` an `AsyncLegacyBalanceAdapter`.
    """

    def __init__(self, connection: AsyncConnection, settings: Settings, mapping: str | None = None) -> None:
        assert connection.sync_connection is not None, "the connection is not open"
        self.connection = connection
        self.wallet = Wallet(connection.sync_connection, settings, mapping)
        self.adapter = AsyncLegacyBalanceAdapter(settings, self.wallet.source, mapping=mapping)
        self.flags = self.wallet.flags

    def session(self, **options: Any) -> AsyncSession:
        """An AsyncSession on the test's connection: its commit releases a savepoint."""
        return AsyncSession(bind=self.connection, join_transaction_mode="create_savepoint", **options)

    async def phase(self, phase: str) -> None:
        """As `Wallet.phase`."""
        await self._do(self.wallet.phase, phase)

    async def freeze(self, key: Key, *, bucket: str | None = None, currency: str | None = None) -> None:
        """As `Wallet.freeze`."""
        await self._do(self.wallet.freeze, key, bucket=bucket, currency=currency)

    async def state(self, key: Key, *, bucket: str | None = None, currency: str | None = None) -> str:
        """As `Wallet.state`."""
        return await self._do(self.wallet.state, key, bucket=bucket, currency=currency)

    async def entries(self, key: Key, *, bucket: str | None = None, currency: str | None = None) -> tuple[Entry, ...]:
        """As `Wallet.entries`."""
        return await self._do(self.wallet.entries, key, bucket=bucket, currency=currency)

    async def assert_balance(
        self, key: Key, expected: Decimal | int, *, bucket: str | None = None, currency: str | None = None
    ) -> None:
        """As `Wallet.assert_balance`."""
        await self._do(self.wallet.assert_balance, key, expected, bucket=bucket, currency=currency)

    async def assert_entries(
        self, key: Key, *expected: tuple[str, Decimal | int], bucket: str | None = None, currency: str | None = None
    ) -> None:
        """As `Wallet.assert_entries`."""
        await self._do(self.wallet.assert_entries, key, *expected, bucket=bucket, currency=currency)

    async def _do(self, call: Callable[P, T], *values: P.args, **named: P.kwargs) -> T:
        return await self.connection.run_sync(lambda _: call(*values, **named))


_ACCOUNT: Final = "mapping = :mapping and key = :key and bucket = :bucket and currency = :currency"


@pytest.fixture(scope="session")
def wallet_tables() -> Tables:
    """How the application's tables are made: a function of a Connection. To be overridden."""
    raise UsageError(
        "walletmigrate.testing does not know the application's tables: override the session fixture wallet_tables, "
        "for example: return Base.metadata.create_all"
    )


@pytest.fixture(scope="session")
def wallet_settings(pytestconfig: pytest.Config) -> Settings:
    """The application's configuration, without its database."""
    path = os.environ.get("WALLETMIGRATE_CONFIG") or pytestconfig.rootpath / "walletmigrate.toml"
    return Settings.load(path)


@pytest.fixture(scope="session")
def wallet_server() -> Iterator[str]:
    """The URL of a server on which a scratch database may be made."""
    named = os.environ.get("WALLETMIGRATE_TEST_DATABASE_URL")
    if named:
        yield named
        return
    with Server.start(settings=DURABILITY_OFF) as server:
        yield server.url


@pytest.fixture(scope="session")
def wallet_engine(wallet_server: str, wallet_settings: Settings, wallet_tables: Tables) -> Iterator[Engine]:
    """An engine on the scratch database: the application's tables, the ledger, phase ``wallet_only``, no rows."""
    with connect.scratch_database(wallet_server) as url:
        settings = wallet_settings.model_copy(update={"database_url": SecretStr(url)})
        engine = connect.engine(url, application_name="walletmigrate-testing", poolclass=NullPool)
        with engine.begin() as connection:
            wallet_tables(connection)
        install(engine, settings, _ACT)
        with engine.begin() as connection:
            connection.execute(text(f"update {quoted(settings.ledger_schema)}.control set phase = 'wallet_only'"))
        yield engine
        engine.dispose()


@pytest.fixture
def wallet(wallet_engine: Engine, wallet_settings: Settings) -> Iterator[Wallet]:
    """A `Wallet` on the configured mapping (the first, where there are several)."""
    name = wallet_settings.mappings[0].name
    with wallet_engine.connect() as connection:
        transaction = connection.begin()
        made = Wallet(connection, wallet_settings, name)
        try:
            yield made
        finally:
            transaction.rollback()
            with connection.begin():
                made._follow("wallet_only")


@pytest.fixture
def async_wallet(
    wallet_engine: Engine, wallet_settings: Settings
) -> Callable[[], AbstractAsyncContextManager[AsyncWallet]]:
    """Opens an `AsyncWallet`: ``async with async_wallet() as wallet``, in whatever event loop the test runs."""

    @asynccontextmanager
    async def opened() -> AsyncIterator[AsyncWallet]:
        engine = create_async_engine(wallet_engine.url, poolclass=NullPool)
        async with engine.connect() as connection:
            transaction = await connection.begin()
            made = AsyncWallet(connection, wallet_settings, wallet_settings.mappings[0].name)
            try:
                yield made
            finally:
                await transaction.rollback()
                async with connection.begin():
                    await connection.run_sync(lambda _: made.wallet._follow("wallet_only"))
        await engine.dispose()

    return opened
