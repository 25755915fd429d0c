"""Adapter, fence and jobs behind a PgBouncer that pools transactions, as one server connection serves many clients.

Everything here goes through the pooler, the install of the ledger included.
"""

from __future__ import annotations

import asyncio
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from sqlalchemy import Connection, Engine
from sqlalchemy.engine.interfaces import IsolationLevel
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.pool import NullPool

import commandline
import pooling
from adapting import DUAL, OFF, READ, Place, place
from interleaving import LEVELS
from ledger import engine_named, execute, rows, scalar
from servers import Postgres
from walletmigrate import AsyncLegacyBalanceAdapter, LegacyBalanceAdapter, Movement, StaticSource, connect
from walletmigrate.errors import InsufficientFunds
from walletmigrate.exporter import serve

RAW = "update users set total_coins = total_coins + 1 where id = 1"


@dataclass
class Pooled:
    """A place whose every connection goes through the pooler, and the URLs on both sides of it."""

    pooler: pooling.Pooler
    direct: str
    url: str
    at: Place

    def client(self, prepare_threshold: int | None = None, **options: Any) -> Engine:
        """The engine of an application's process; it prepares statements after so many uses, None: never."""
        url = sqlalchemy.make_url(self.url).set(drivername="postgresql+psycopg")
        arguments = {"prepare_threshold": prepare_threshold}
        return sqlalchemy.create_engine(
            url, connect_args=arguments, poolclass=NullPool, use_native_hstore=False, **options
        )

    def credit(self, connection: Connection, key: int, amount: int, **fields: Any) -> Any:
        """A posting of 'type' test."""
        return self.at.adapter.credit(connection, key, amount, type="test", **fields)


@pytest.fixture
def pooler(server: Postgres) -> Iterator[pooling.Pooler]:
    """One server connection for all clients: whatever one leaves on it, the next one meets."""
    with pooling.pooler(server.url, size=1) as running:
        yield running


@pytest.fixture
def pooled(pooler: pooling.Pooler, database_url: str) -> Pooled:
    url = pooler.url_for(database_url)
    return Pooled(pooler, database_url, url, place(url, rows=6, floor=Decimal(0)))


def backend(connection: Connection) -> int:
    return int(connection.exec_driver_sql("select pg_backend_pid()").scalar_one())


def test_an_engine_in_autocommit_leaves_no_time_limit_for_the_next_client(pooled: Pooled) -> None:
    admin = connect.engine(pooled.url, application_name="test", isolation_level="AUTOCOMMIT", poolclass=NullPool)
    with admin.connect() as connection:
        before = backend(connection)
    with pooled.client().connect() as connection:
        assert backend(connection) == before
        assert connection.exec_driver_sql("show lock_timeout").scalar_one() == "0"
        assert connection.exec_driver_sql("show statement_timeout").scalar_one() == "0"


@pytest.mark.parametrize("flags", [DUAL, OFF], ids=["on", "off"])
def test_every_kind_of_posting_goes_through_a_pooler(pooled: Pooled, flags: dict[str, bool]) -> None:
    at, adapter = pooled.at, pooled.at.adapter
    at.flags(flags)
    with pooled.client().begin() as connection:
        short = [adapter.credit(connection, 1, 5, type="a"), adapter.debit(connection, 1, 2, type="a")]
        long = [
            adapter.transfer(connection, 1, 2, 3, type="a"),
            adapter.set_balance(connection, 3, 70, reason="as counted", actor="tests"),
            adapter.credit(connection, 4, 1, type="a", description="words"),
            *adapter.apply(connection, [Movement.credit(5, 1, type="a"), Movement.debit(6, 1, type="a")]),
        ]
    expected = "dual_write" if flags else "legacy"
    assert {one.mode for one in short + long} == {expected}
    assert [at.coins(key) for key in range(1, 7)] == [100, 103, 70, 101, 101, 99]
    assert at.account(1) == (("mirrored", Decimal(100)) if flags else None)
    at.check()


@pytest.mark.parametrize("flags", [DUAL, OFF], ids=["on", "off"])
@pytest.mark.parametrize("description", [None, "the long way"], ids=["short", "long"])
def test_a_key_that_is_sent_again_by_another_client_moves_nothing(
    pooled: Pooled, flags: dict[str, bool], description: str | None
) -> None:
    at = pooled.at
    at.flags(flags)
    first, *others = [committed(pooled, key=1, idempotency_key="once", description=description) for _ in range(3)]
    assert not first.replayed
    assert [one.replayed for one in others] == [True, True]
    assert {(one.transaction_id, one.legacy_balance) for one in (first, *others)} == {
        (first.transaction_id, Decimal(105))
    }
    assert at.coins(1) == 105
    at.check()


def committed(pooled: Pooled, *, key: int, amount: int = 5, **fields: Any) -> Any:
    """A credit by a client of its own."""
    with pooled.client().begin() as connection:
        return pooled.credit(connection, key, amount, **fields)


def test_a_raw_write_of_another_client_turns_the_account_stale_and_a_posting_resyncs_it(pooled: Pooled) -> None:
    committed(pooled, key=1)
    with pooled.client().begin() as connection:
        connection.exec_driver_sql(RAW)
    assert pooled.at.account(1) == ("stale", Decimal(105))
    pooled.at.flags(OFF)
    assert committed(pooled, key=1).mode == "legacy"
    pooled.at.flags(DUAL)
    assert committed(pooled, key=1).ledger_balance == 116
    assert pooled.at.account(1) == ("mirrored", Decimal(116))
    pooled.at.check()


@pytest.mark.parametrize("how", ["commit", "rollback", "savepoint", "refusal", "failure"])
def test_a_label_never_outlives_its_transaction_on_a_server_connection(pooled: Pooled, how: str) -> None:
    at, seen = pooled.at, []
    committed(pooled, key=1)
    one, other = pooled.client().connect(), pooled.client().connect()
    with one, other:
        with one.begin() as transaction:
            seen.append(backend(one))
            if how == "savepoint":
                with one.begin_nested() as savepoint:
                    pooled.credit(one, 1, 1)
                    savepoint.rollback()
            elif how == "refusal":
                with pytest.raises(InsufficientFunds):
                    at.adapter.debit(one, 1, 1000, type="test")
            elif how == "failure":
                one.exec_driver_sql("alter table users add constraint capped check (total_coins <> 106)")
                with pytest.raises(DBAPIError, match="capped"):
                    pooled.credit(one, 1, 1)
            else:
                pooled.credit(one, 1, 1)
            if how != "commit":
                transaction.rollback()
        with other.begin():
            seen.append(backend(other))
            assert not other.exec_driver_sql("select current_setting('walletmigrate.posting', true)").scalar()
            # The very write that the label stood for, by a client that has none: nothing but a bypass.
            other.exec_driver_sql(RAW)
    assert seen[0] == seen[1], "the pooler gave each client a connection of its own: nothing could leak"
    balance = Decimal(106) if how == "commit" else Decimal(105)
    assert at.account(1) == ("stale", balance)
    assert at.coins(1) == balance + 1
    at.check()


def test_the_time_limits_of_a_job_end_with_its_transaction(pooled: Pooled) -> None:
    job = connect.engine(
        pooled.url, application_name="job", lock_timeout_ms=234, statement_timeout_ms=56_000, poolclass=NullPool
    )
    shown = "select current_setting('lock_timeout'), current_setting('statement_timeout'), pg_backend_pid()"
    with job.connect() as one, pooled.client().connect() as other:
        with one.begin():
            lock, statement, first = one.exec_driver_sql(shown).one()
        with other.begin():
            others = other.exec_driver_sql(shown).one()
        with one.begin():
            again = one.exec_driver_sql(shown).one()
    assert (lock, statement) == ("234ms", "56s")
    assert tuple(others) == ("0", "0", first)
    assert tuple(again) == ("234ms", "56s", first)


def test_a_job_reads_times_in_a_database_of_another_style_and_leaves_the_style_as_it_is(
    pooler: pooling.Pooler, database_url: str
) -> None:
    name = sqlalchemy.make_url(database_url).database
    execute(engine_named(database_url), f"""alter database "{name}" set datestyle = 'German'""")
    url = pooler.url_for(database_url)
    job = connect.engine(url, application_name="job", poolclass=NullPool)
    application = Pooled(pooler, database_url, url, place(url, rows=1)).client()
    for _ in range(2):
        assert scalar(job, "select installed_at from wallet.mappings").tzinfo is not None
        with application.connect() as connection:
            assert connection.exec_driver_sql("show datestyle").scalar_one() == "German, DMY"


def test_the_lock_limit_of_a_job_is_in_force_behind_a_pooler(pooled: Pooled) -> None:
    job = connect.engine(pooled.url, application_name="job", lock_timeout_ms=100, poolclass=NullPool)
    with engine_named(pooled.direct).connect() as holder, holder.begin():
        holder.exec_driver_sql("select from users where id = 1 for update")
        with pytest.raises(OperationalError) as caught, job.begin() as connection:
            pooled.credit(connection, 1, 5)
    assert getattr(caught.value.orig, "sqlstate", None) == "55P03"


def test_engines_of_the_library_prepare_nothing_on_the_server_connection(pooled: Pooled) -> None:
    engine = connect.engine(pooled.url, application_name="job", poolclass=NullPool)
    with engine.connect() as connection:
        for _ in range(12):  # psycopg's own threshold is five
            with connection.begin():
                pooled.credit(connection, 1, 1)
    assert scalar(pooled.at.engine, "select count(*) from pg_prepared_statements") == 0
    assert pooled.at.coins(1) == 112


def test_clients_that_prepare_statements_post_where_the_pooler_keeps_them_and_lose_nothing_where_not(
    pooled: Pooled,
) -> None:
    """Since 1.21 PgBouncer keeps them. Before, the second client of a connection is told that its name is taken."""
    outcomes = []
    clients = [pooled.client(prepare_threshold=0).connect() for _ in range(2)]
    for client in clients * 2:
        try:
            with client.begin():
                outcomes.append(pooled.credit(client, 1, 5).mode)
        except DBAPIError as error:
            outcomes.append(str(getattr(error.orig, "sqlstate", None)))
    for client in clients:
        client.close()
    if pooled.pooler.prepares:
        assert outcomes == ["dual_write"] * 4
    else:
        assert outcomes[:2] == ["dual_write", "42P05"]
    assert pooled.at.coins(1) == 100 + 5 * outcomes.count("dual_write")
    pooled.at.check()


@pytest.mark.parametrize("isolation", LEVELS)
def test_clients_that_take_turns_on_one_connection_post_at_every_isolation_level(
    pooled: Pooled, isolation: IsolationLevel
) -> None:
    clients = [pooled.client(isolation_level=isolation).connect() for _ in range(3)]
    for _ in range(3):
        for client in clients:
            with client.begin():
                assert pooled.credit(client, 1, 1).mode == "dual_write"
                assert client.exec_driver_sql("show transaction_isolation").scalar() == isolation.lower()
    for client in clients:
        client.close()
    assert pooled.at.account(1) == ("mirrored", Decimal(109))
    pooled.at.check()


def test_reads_come_from_the_ledger_behind_a_pooler(pooled: Pooled) -> None:
    at = pooled.at
    committed(pooled, key=1)
    execute(at.engine, "update wallet.control set phase = 'read_ledger'")
    at.flags(READ)
    with pooled.client().begin() as connection:
        assert at.adapter.balance(connection, 1).amount == 105
    assert [one.source for one in at.heard.reads] == ["ledger"]


def test_the_async_adapter_posts_behind_a_pooler(pooled: Pooled) -> None:
    async def main() -> None:
        url = sqlalchemy.make_url(pooled.url).set(drivername="postgresql+psycopg")
        engine = create_async_engine(
            url, connect_args={"prepare_threshold": None}, poolclass=NullPool, use_native_hstore=False
        )
        adapter = AsyncLegacyBalanceAdapter(pooled.at.settings, StaticSource(DUAL))
        async with AsyncSession(engine) as session, session.begin():
            posted = await adapter.credit(session, 1, 5, type="test")
            assert (posted.mode, posted.ledger_balance) == ("dual_write", Decimal(105))
        await engine.dispose()

    asyncio.run(main())
    pooled.at.check()


def test_a_pooler_that_ends_in_the_middle_of_a_transaction_leaves_no_half_of_it(
    server: Postgres, database_url: str
) -> None:
    with pooling.pooler(server.url) as running:
        at = place(running.url_for(database_url), rows=1)
        cut = at.engine.connect()
        posted = at.adapter.credit(cut, 1, 5, type="test", idempotency_key="cut")
        assert posted.mode == "dual_write"
    with pytest.raises(OperationalError):
        cut.commit()
    cut.close()
    direct = engine_named(database_url)
    assert rows(direct, "select total_coins from users") == [(100,)]
    assert scalar(direct, "select count(*) from wallet.transactions") == 0
    with direct.begin() as connection:
        again = LegacyBalanceAdapter(at.settings, StaticSource(DUAL)).credit(
            connection, 1, 5, type="test", idempotency_key="cut"
        )
    assert (again.replayed, again.ledger_balance) == (False, Decimal(105))


def test_the_whole_migration_and_the_way_back_go_through_a_pooler(
    server: Postgres, database_url: str, tmp_path: Path
) -> None:
    # Two: a verification says that it lives while its snapshot stands.
    with pooling.pooler(server.url, size=2) as pooler:
        project, engine = commandline.project_at(tmp_path, pooler.url_for(database_url), "frozen")
        settings = project.settings
        source = StaticSource({**READ, "wallet.enableWithdrawals": True})
        with engine.begin() as connection:
            posted = LegacyBalanceAdapter(settings, source).credit(connection, 4, 5, type="test")
        assert (posted.mode, posted.ledger_balance) == ("ledger", Decimal(105))
        with pytest.raises(DBAPIError, match="is frozen"):
            execute(engine, RAW)
        project.change("unfreeze", "--confirm", "users")
        assert rows(engine, "select total_coins from users where id in (1, 4) order by id") == [(100,), (105,)]
        assert project.run("verify", "--json").document["clean"]
        status = project.run("status", "--json")
        assert (status.exit_code, status.document["phase"]) == (0, "wallet_only")
        exporter = serve(settings, 0)
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{exporter.port}/metrics", timeout=30) as answer:
                scraped = answer.read().decode()
        finally:
            exporter.close()
        assert 'walletmigrate_accounts{state="mirrored"} 10.0' in scraped
        assert "walletmigrate_exporter_up 1.0" in scraped
