"""Connections of jobs and commands: limits, names, and no password anywhere."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest
from pydantic import SecretStr
from sqlalchemy import URL, Engine, make_url, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

import monitoring
from servers import Postgres
from walletmigrate import connect
from walletmigrate.errors import ConfigError, DatabaseUnreachable

PASSWORD = "s3cret!p%40ss"  # percent-encoded: it holds an @
DECODED = "s3cret!p@ss"


def one(engine: Engine, statement: str) -> object:
    with engine.begin() as connection:
        return connection.execute(text(statement)).scalar_one()


@pytest.fixture
def url(database_url: str) -> str:
    return database_url


@pytest.mark.parametrize("scheme", ["postgresql", "postgres", "postgresql+psycopg"])
def test_a_plain_url_means_psycopg_3(url: str, scheme: str) -> None:
    engine = connect.engine(url.replace("postgresql", scheme, 1), application_name="walletmigrate-test")
    assert engine.dialect.driver == "psycopg"
    assert one(engine, "select current_database()") == make_url(url).database
    engine.dispose()


@pytest.mark.parametrize("scheme", ["postgresql+psycopg2", "postgresql+asyncpg", "mysql", "sqlite"])
def test_another_driver_is_refused_by_name(scheme: str) -> None:
    with pytest.raises(ConfigError, match="psycopg 3") as caught:
        connect.engine(f"{scheme}://me:{PASSWORD}@localhost/bank", application_name="x")
    assert scheme in str(caught.value)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    "broken", ["s3cret", "postgresql://me:s3cret@localhost:port/bank", "postgresql://me:s3/cret@x:y@/bank"]
)
def test_an_unreadable_url_is_refused_without_being_quoted(broken: str) -> None:
    with pytest.raises(ConfigError, match="cannot be read") as caught:
        connect.parsed(broken)
    assert "cret" not in str(caught.value)
    assert caught.value.__suppress_context__
    assert "cret" not in connect.masked(broken)


@pytest.mark.parametrize(
    "address",
    [
        f"postgresql://me:{PASSWORD}@db.example:5433/bank",
        f"postgresql://me@/bank?host=/run/x&password={PASSWORD}",
        f"postgresql://me:{PASSWORD}@/bank?sslpassword={PASSWORD}&PASSWORD={PASSWORD}",
    ],
)
def test_a_masked_url_shows_where_but_no_password(address: str) -> None:
    for given in (address, SecretStr(address), make_url(address)):
        shown = connect.masked(given)
        assert "s3cret" not in shown
        assert shown.startswith("postgresql://me")
        assert "/bank" in shown
        assert "***" in shown


def test_a_masked_url_keeps_its_other_parameters() -> None:
    shown = connect.masked("postgresql://me@/bank?host=/run/x&password=s3cret&sslmode=require")
    assert "sslmode=require" in shown
    assert make_url(shown).query["host"] == "/run/x"


def test_a_transaction_has_its_name_and_its_time_limits(url: str) -> None:
    engine = connect.engine(
        url, application_name="walletmigrate-backfill", lock_timeout_ms=1_234, statement_timeout_ms=56_789
    )
    for _ in range(2):  # the second transaction runs on the same connection, from the pool
        with engine.begin() as connection:
            row = connection.execute(
                text(
                    "select current_setting('application_name'), current_setting('lock_timeout'),"
                    " current_setting('statement_timeout')"
                )
            ).one()
        assert tuple(row) == ("walletmigrate-backfill", "1234ms", "56789ms")
    engine.dispose()


def test_a_time_limit_leaves_nothing_on_the_server_connection(url: str) -> None:
    engine = connect.engine(url, application_name="x", lock_timeout_ms=1_234)
    with engine.begin() as connection:
        connection.execute(text("select 1"))
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        assert connection.execute(text("show lock_timeout")).scalar_one() == "0"
    engine.dispose()


def test_an_engine_in_autocommit_has_its_name_and_the_limits_on_its_sessions(url: str) -> None:
    """So are those that make and drop databases and roles, outside of any transaction."""
    engine = connect.engine(
        url, application_name="x", lock_timeout_ms=1_234, isolation_level="AUTOCOMMIT", poolclass=NullPool
    )
    names = ("application_name", "lock_timeout", "statement_timeout")
    with engine.connect() as connection:
        found = [connection.exec_driver_sql(f"show {name}").scalar_one() for name in names]
    assert found == ["x", "1234ms", "5min"]


def test_a_scratch_database_is_not_waited_for_longer_than_its_limit(
    server: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = connect.engine
    monkeypatch.setattr(connect, "engine", lambda *given, **options: make(*given, lock_timeout_ms=50, **options))
    with psycopg.connect(server.url) as holder:
        holder.execute("lock table pg_database in share mode")
        with pytest.raises(DBAPIError) as caught, connect.scratch_database(server.url):
            pytest.fail("the block ran")
    assert isinstance(caught.value.orig, psycopg.errors.LockNotAvailable)


def test_a_statement_that_takes_too_long_is_cancelled(url: str) -> None:
    engine = connect.engine(url, application_name="x", statement_timeout_ms=50)
    with pytest.raises(DBAPIError) as caught:
        one(engine, "select pg_sleep(30)")
    assert isinstance(caught.value.orig, psycopg.errors.QueryCanceled)
    engine.dispose()


def test_a_lock_that_is_held_is_not_waited_for_longer_than_its_limit(url: str) -> None:
    engine = connect.engine(url, application_name="x", lock_timeout_ms=50)
    with engine.begin() as connection:
        connection.execute(text("create table purse (id int)"))
    with engine.begin() as holder, engine.begin() as waiter:
        holder.execute(text("lock table purse"))
        with pytest.raises(DBAPIError) as caught:
            waiter.execute(text("lock table purse"))
    assert isinstance(caught.value.orig, psycopg.errors.LockNotAvailable)
    engine.dispose()


def test_the_limits_take_no_snapshot_and_leave_set_transaction_possible(url: str) -> None:
    engine = connect.engine(url, application_name="x")
    with engine.begin() as connection:
        connection.execute(text("set transaction isolation level repeatable read, read only"))
        assert connection.execute(text("show transaction_isolation")).scalar_one() == "repeatable read"
    engine.dispose()


def test_the_isolation_level_of_an_engine_is_that_of_its_transactions(url: str) -> None:
    engine = connect.engine(url, application_name="x", isolation_level="SERIALIZABLE")
    assert one(engine, "show transaction_isolation") == "serializable"
    engine.dispose()


def test_a_transaction_does_not_read_values_by_the_database_s_own_settings(url: str) -> None:
    """All of them together, in commands: test_foreign_settings."""
    name = make_url(url).database
    engine = connect.engine(url, application_name="x", poolclass=NullPool)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        for setting in ("default_transaction_isolation = serializable", "datestyle = 'German, DMY'"):
            connection.exec_driver_sql(f'alter database "{name}" set {setting}')
    assert one(engine, "show transaction_isolation") == "read committed"
    # The order of day and month in the application's own texts is still the database's.
    assert one(engine, "show datestyle") == "ISO, DMY"
    assert one(engine, "select cast('31.12.2026' as timestamptz)").year == 2026  # type: ignore[attr-defined]
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        assert connection.execute(text("show datestyle")).scalar_one() == "German, DMY"


def test_limits_that_the_database_has_for_its_sessions_do_not_cut_a_transaction_off(url: str, server: Postgres) -> None:
    """As they are set against forgotten transactions of an application."""
    name = make_url(url).database
    limits = ["statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout"]
    limits += ["transaction_timeout"] if server.major >= 17 else []
    engine = connect.engine(url, application_name="x", poolclass=NullPool)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        for limit in limits:
            connection.exec_driver_sql(f"alter database \"{name}\" set {limit} = '7s'")
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        assert [connection.exec_driver_sql(f"show {limit}").scalar_one() for limit in limits] == ["7s"] * len(limits)
    with engine.begin() as connection:
        found = [connection.exec_driver_sql(f"show {limit}").scalar_one() for limit in limits]
    assert found == ["5min", "5s", "0", "0"][: len(limits)]


def test_a_host_that_is_gone_without_a_word_is_missed_and_the_url_may_say_when(url: str) -> None:
    def asked(address: str) -> dict[str, str]:
        engine = connect.engine(address, application_name="x", poolclass=NullPool)
        with engine.connect() as connection:
            driver = connection.connection.driver_connection
            assert driver is not None
            return dict(driver.info.get_parameters())

    names = ("keepalives_idle", "keepalives_interval", "keepalives_count")
    assert [asked(url).get(name) for name in names] == ["30", "10", "3"]
    own = make_url(url).update_query_dict({"keepalives_idle": "99"}).render_as_string(hide_password=False)
    assert [asked(own).get(name) for name in names] == ["99", "10", "3"]


def test_no_prepared_statement_stays_on_the_server(url: str) -> None:
    engine = connect.engine(url, application_name="x")
    for _ in range(12):
        one(engine, "select 1")
    assert one(engine, "select count(*) from pg_prepared_statements") == 0
    engine.dispose()


def test_an_engine_reads_a_secret_url_and_passes_options_on(url: str) -> None:
    engine = connect.engine(
        SecretStr(url), application_name="x", poolclass=NullPool, connect_args={"application_name": "mine"}
    )
    assert isinstance(engine.pool, NullPool)
    assert one(engine, "show application_name") == "mine"


def test_a_server_that_answers_is_reachable(url: str) -> None:
    engine = connect.engine(url, application_name="x")
    connect.reachable(engine)
    engine.dispose()


@pytest.mark.parametrize("where", ["userinfo", "parameter"])
def test_an_unreachable_server_is_named_without_its_password(tmp_path: object, where: str) -> None:
    login = f"me:{PASSWORD}@" if where == "userinfo" else "me@"
    extra = f"&password={PASSWORD}" if where == "parameter" else ""
    engine = connect.engine(f"postgresql://{login}/bank?host={tmp_path}{extra}", application_name="x")
    with pytest.raises(DatabaseUnreachable) as caught:
        connect.reachable(engine)
    assert caught.value.exit_code == 5
    assert str(tmp_path) in str(caught.value.detail)
    for words in (str(caught.value), repr(caught.value), caught.value.url, caught.value.detail):
        assert "s3cret" not in words
    assert caught.value.__suppress_context__


def test_a_password_that_the_driver_quotes_is_hidden(server: Postgres) -> None:
    base = make_url(server.url)
    url = URL.create("postgresql", "me", DECODED, database=DECODED, query=base.query)
    engine = connect.engine(url, application_name="x", poolclass=NullPool)
    with pytest.raises(DatabaseUnreachable) as caught:
        connect.reachable(engine)  # the server answers that there is no role, or no database of that name
    assert DECODED not in caught.value.detail


def test_a_database_that_does_not_exist_counts_as_unreachable(server: Postgres) -> None:
    engine = connect.engine(server.url_for("nowhere"), application_name="x")
    with pytest.raises(DatabaseUnreachable, match='"nowhere" does not exist'):
        connect.reachable(engine)


def database_names(server: Postgres) -> set[str]:
    with psycopg.connect(server.url) as connection:
        return {name for (name,) in connection.execute("select datname from pg_database")}


def test_a_scratch_database_lives_as_long_as_its_block(server: Postgres) -> None:
    with connect.scratch_database(server.url) as url:
        name = make_url(url).database
        assert name in database_names(server)
        with psycopg.connect(url) as connection:
            assert connection.execute("select current_database()").fetchone() == (name,)
    assert name not in database_names(server)


def test_a_scratch_database_is_dropped_under_open_sessions(server: Postgres) -> None:
    with connect.scratch_database(server.url) as url:
        left_open = psycopg.connect(url)
    assert make_url(url).database not in database_names(server)
    with pytest.raises(psycopg.OperationalError):
        left_open.execute("select 1")
    left_open.close()


def test_a_scratch_database_is_dropped_beside_a_session_that_its_user_may_not_end(server: Postgres) -> None:
    """As autovacuum's workers are, which a DROP without FORCE ends."""
    with psycopg.connect(server.url, autocommit=True) as superuser, ThreadPoolExecutor() as pool:
        superuser.execute("create role humble login createdb password 'trusted'")
        context = connect.scratch_database(make_url(server.url).set(username="humble", password="trusted"))
        url = make_url(context.__enter__())
        other = psycopg.connect(make_url(server.url).set(database=url.database).render_as_string())
        dropped = pool.submit(context.__exit__, None, None, None)
        drops = "select count(*) from pg_stat_activity where state = 'active' and query = %s"
        query = f'drop database if exists "{url.database}"'
        monitoring.until(lambda: superuser.execute(drops, (query,)).fetchone() == (1,), lambda: dropped)
        other.close()
        assert not dropped.result()
        superuser.execute("drop role humble")
    assert url.database not in database_names(server)


def test_a_scratch_database_is_dropped_after_an_error(server: Postgres) -> None:
    before = database_names(server)
    engine = connect.engine(server.url, application_name="x")
    context = connect.scratch_database(engine)
    context.__enter__()
    assert database_names(server) > before
    error = ZeroDivisionError()
    assert not context.__exit__(type(error), error, None)
    assert database_names(server) == before
    engine.dispose()


def test_a_scratch_database_copies_its_template(server: Postgres) -> None:
    with connect.scratch_database(server.url) as template:
        with psycopg.connect(template) as connection:
            connection.execute("create table purse (id int)")
        with (
            connect.scratch_database(server.url, make_url(template).database) as url,
            psycopg.connect(url) as connection,
        ):
            assert connection.execute("select count(*) from purse").fetchone() == (0,)


def test_a_scratch_database_of_a_server_that_is_away_says_so(tmp_path: object) -> None:
    with pytest.raises(DatabaseUnreachable), connect.scratch_database(f"postgresql:///bank?host={tmp_path}"):
        pytest.fail("the block ran")


def test_the_tests_cannot_leave_this_machine() -> None:
    engine = connect.engine("postgresql://me@192.0.2.1/bank", application_name="x")
    with pytest.raises(AssertionError, match=r"192\.0\.2\.1"):
        engine.connect()
