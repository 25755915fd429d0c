"""Discovery in a database: views, functions, triggers, keys, rules, policies, and what the fence has seen."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import Engine
from sqlalchemy.pool import NullPool

import ledger
from commandline import Project
from walletmigrate import connect
from walletmigrate.config import Settings
from walletmigrate.discover import discover
from walletmigrate.findings import Finding

TABLES = """
create table tenants (name text primary key, coins numeric);
create table rates (rate numeric(20, 2) primary key);
create table users (
    id bigint primary key, tenant text, total_coins numeric(20, 2) not null default 0,
    twice numeric generated always as (total_coins * 2) stored
);
create table orders (id bigint primary key, user_id bigint references users, total_coins numeric);
"""


@pytest.fixture
def engine(database_url: str) -> Engine:
    made = connect.engine(database_url, application_name="tests", poolclass=NullPool)
    with made.begin() as connection:
        connection.exec_driver_sql(TABLES)
    return made


@pytest.fixture
def settings(database_url: str) -> Settings:
    return ledger.users_settings(database_url)


def found_in(engine: Engine, settings: Settings, sql: str = "", source: Path | None = None) -> list[Finding]:
    with engine.begin() as connection:
        if sql:
            connection.exec_driver_sql(sql, execution_options={"no_parameters": True})
        found = discover(settings, [source] if source else [], connection=connection)
    return [one for one in found.findings if one.origin != "python"]


def told(found: list[Finding]) -> set[tuple[str, str, str]]:
    return {(one.file, one.access, one.how) for one in found}


DOES_NOTHING = "create function f() returns trigger language plpgsql as 'begin return new; end';"
SETS_ITS_ROW = "create function f() returns trigger language plpgsql as 'begin new.total_coins := 0; return new; end';"
EMPTIES = "create function f() returns void language sql as 'update users set total_coins = 0';"
MADE_AT_RUN_TIME = """
create procedure f() language plpgsql as
$$ begin execute format('update %I set %I = 0', 'users', 'total_coins'); end $$
"""
BEFORE = ("default value for column twice of table users", "read", "generated column or default")


@pytest.mark.parametrize(
    ("sql", "file", "access"),
    [
        ("create view rich as select id from users where total_coins > 5", "view public.rich", "read"),
        ("create materialized view rich as select * from users", "materialized view public.rich", "read"),
        (
            "create rule r as on update to rates do also update users set total_coins = 0",
            "rule r on table rates",
            "write",
        ),
        (
            "alter table users add foreign key (total_coins) references rates on update cascade",
            "constraint users_total_coins_fkey on table users",
            "write",
        ),
        (
            "alter table users add constraint r foreign key (total_coins) references rates",
            "constraint r on table users",
            "definition",
        ),
        (
            "alter table users add constraint t foreign key (tenant) references tenants on delete cascade",
            "constraint t on public.users",
            "write",
        ),
        ("create policy p on users using (total_coins > 0)", "policy p on table users", "read"),
        (
            DOES_NOTHING + "create trigger t after update of total_coins on users for each row execute function f()",
            "trigger t on table users",
            "read",
        ),
        (
            SETS_ITS_ROW + "create trigger t before update on users for each row execute function f()",
            "function f()",
            "write",
        ),
        (
            "create function f(bigint) returns void language sql as 'update users set total_coins = 0 where id = $1'",
            "function f(bigint)",
            "write",
        ),
        (
            "create function f() returns void language sql begin atomic; update users set total_coins = 0; end",
            "function f()",
            "write",
        ),
        (
            MADE_AT_RUN_TIME,
            "function f()",
            "unknown",
        ),
    ],
)
def test_an_object_that_touches_the_column_is_listed(
    engine: Engine, settings: Settings, sql: str, file: str, access: str
) -> None:
    assert told(found_in(engine, settings)) == {BEFORE}
    new = [one for one in found_in(engine, settings, sql) if (one.file, one.access, one.how) != BEFORE]
    assert (file, access) in {(one.file, one.access) for one in new}
    assert {one.file for one in new} == {file}


@pytest.mark.parametrize(
    "sql",
    [
        "create view v as select id from users",
        "create view v as select total_coins from orders",
        "create index i on users (total_coins)",
        "create function f() returns void language sql as 'update orders set total_coins = 0'",
        SETS_ITS_ROW + "create trigger t before update on orders for each row execute function f()",
        EMPTIES + "alter extension plpgsql add function f()",
        "alter table users add foreign key (tenant) references tenants",
        "create policy p on users using (id > 0)",
    ],
)
def test_an_object_that_does_not_touch_it_is_not(engine: Engine, settings: Settings, sql: str) -> None:
    assert told(found_in(engine, settings, sql)) == {BEFORE}


def test_a_finding_in_a_function_has_its_line_and_the_triggers_that_call_it(engine: Engine, settings: Settings) -> None:
    found = found_in(
        engine,
        settings,
        "create function f() returns trigger language plpgsql as $$\nbegin\n  update users set total_coins = 0;\n"
        "  return new;\nend $$; create trigger t after insert on orders for each row execute function f()",
    )
    (one,) = [each for each in found if each.file == "function f()"]
    assert (one.line, one.scope, one.code) == (3, "t on orders", "update users set total_coins = 0;")


def test_a_comment_on_the_object_or_in_its_body_accepts_it_with_its_reason(engine: Engine, settings: Settings) -> None:
    found = found_in(
        engine,
        settings,
        "create function f() returns void language sql as 'update users set total_coins = 0';"
        "comment on function f() is 'Resets. walletmigrate: ignore only on a test server';"
        "create function g() returns void language sql as $$"
        "update users set total_coins = 0 -- walletmigrate: ignore only by hand\n$$;"
        "create function h() returns void language sql as 'update users set total_coins = 0'",
    )
    accepted = {one.file: one.accepted for one in found if one.access == "write"}
    assert accepted == {"function f()": "only on a test server", "function g()": "only by hand", "function h()": None}


def test_the_library_s_own_functions_and_triggers_are_not_listed(database_url: str) -> None:
    engine, settings = ledger.install_users(database_url)
    assert found_in(engine, settings) == []


def test_a_partition_is_known_by_its_own_name(engine: Engine, settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "old.sql").write_text("update users_old set total_coins = 0;")
    assert told(found_in(engine, settings, source=tmp_path)) == {BEFORE}
    parts = (
        "drop table users cascade; create table users (id bigint, total_coins numeric) partition by range (id);"
        "create table users_old partition of users for values from (0) to (10)"
    )
    (one,) = found_in(engine, settings, parts, tmp_path)
    assert (Path(one.file).name, one.access) == ("old.sql", "write")


def test_a_table_that_is_not_there_is_said(database_url: str, settings: Settings) -> None:
    engine = connect.engine(database_url, application_name="tests", poolclass=NullPool)
    with engine.connect() as connection:
        found = discover(settings, [], connection=connection)
    assert "table public.users is not in this database: its columns were looked for in the sources only" in found.notes


@pytest.mark.parametrize("partitions", ["", "partition by range (id)"])
def test_a_table_that_is_there_is_not_said_to_be_missing(
    database_url: str, settings: Settings, partitions: str
) -> None:
    engine = connect.engine(database_url, application_name="tests", poolclass=NullPool)
    ledger.execute(engine, f"create table users (id bigint, total_coins numeric) {partitions}")
    with engine.connect() as connection:
        found = discover(settings, [], connection=connection)
    assert not any("is not in this database" in note for note in found.notes)


def test_what_the_fence_saw_is_grouped_by_fingerprint_within_the_time_asked_for(
    engine: Engine, settings: Settings, tmp_path: Path
) -> None:
    ledger.execute(engine, "create schema seen")
    ledger.execute(
        engine,
        "create table seen.bypasses (at timestamptz, mapping text, key text, bucket text, currency text, "
        "operation text, treatment text, application_name text, database_user text, fingerprint text, query text, "
        "xid bigint)",
    )
    ledger.execute(
        engine,
        "insert into seen.bypasses select clock_timestamp() - g * interval '1 day', 'users', g::text, 'cash', "
        "'EUR', 'update', 'stale', 'cron', 'shop', case when g < 3 then 'aaaa' else 'bbbb' end, null, g "
        "from generate_series(1, 5) as g",
    )
    elsewhere = settings.model_copy(update={"ledger_schema": "seen"})
    seen = [one for one in found_in(engine, elsewhere) if one.origin == "runtime"]
    assert [(one.file, one.column, one.scope, one.left) for one in seen] == [
        ("aaaa", "total_coins", "cron as shop", True),
        ("bbbb", "total_coins", "cron as shop", True),
    ]
    assert [one.how.split(", last")[0] for one in seen] == ["update, 2 times", "update, 3 times"]
    project = Project(tmp_path, engine.url.render_as_string(hide_password=False))
    project.config.write_text('schema = "seen"\n' + project.config.read_text(encoding="utf-8"), encoding="utf-8")
    said = project.run("discover", "--source", str(project.config), "--since", "60h", "--json")
    assert [one["file"] for one in said.document["findings"] if one["origin"] == "runtime"] == ["aaaa"]
    assert said.exit_code == 3


def test_a_raw_write_is_seen_where_the_ledger_keeps_a_catalogue(database_url: str) -> None:
    engine, settings = ledger.install_users(database_url)
    ledger.execute(engine, "update users set total_coins = 7 where id = 1")
    with engine.connect() as connection:
        keeps = connection.exec_driver_sql("select to_regclass('wallet.bypasses') is not null").scalar_one()
        found = discover(settings, [], connection=connection)
    assert len(found.left) == (1 if keeps else 0)
    assert any("no catalogue of bypasses" in note for note in found.notes) is not keeps
