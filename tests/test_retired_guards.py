"""The triggers of a retired mapping: what doctor finds of them, and that install puts them up anew."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Connection

from examining import run
from findings import assert_told
from ledger import ACT, execute, rows, scalar
from retiring import End
from servers import Postgres
from walletmigrate import connect, doctor
from walletmigrate.install import install

HOLLOW = "create function public.hollow() returns trigger language plpgsql as 'begin return null; end';"
PARTITIONED = """
alter table users rename to users_old;
create table users (like users_old including defaults, primary key (id)) partition by range (id);
create table users_low partition of users for values from (minvalue) to (6);
create table users_high partition of users for values from (6) to (maxvalue);
insert into users select * from users_old;
drop table users_old
"""


def retired(url: str, folder: Path) -> End:
    end = End(url, folder).freeze()
    end.archive()
    end.retire()
    return end


@pytest.fixture(scope="module")
def end(server: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[End]:
    with connect.scratch_database(server.url) as url:
        yield retired(url, tmp_path_factory.mktemp("retired"))


@pytest.fixture
def connection(end: End) -> Iterator[Connection]:
    """A transaction that is rolled back, so that a fault made in it is gone afterwards."""
    with end.engine.connect() as connection:
        yield connection
        connection.rollback()


def trigger(name: str, what: str, function: str = "wallet.gone_users") -> str:
    """The trigger dropped, and made anew in another way."""
    made = f"create trigger {name} {what} execute function {function}(); "
    return f"drop trigger {name} on users; {made}alter table users enable always trigger {name}"


DELETE, MOVE, KEY, EMPTY = (f"walletmigrate_users_r_{event}" for event in ("delete", "move", "key", "empty"))
INSERT, UPDATE = (f"walletmigrate_users_r_{event}" for event in ("insert", "update"))
FAULTS = {
    **{f"drop trigger {name} on users": (name, "is missing") for name in (DELETE, MOVE, KEY, EMPTY, INSERT, UPDATE)},
    **{
        f"alter table users {how} trigger {name}": (name, "is disabled, or does not fire in replica role")
        for name, how in (
            (DELETE, "disable"),
            (MOVE, "enable replica"),
            (KEY, "enable"),
            (EMPTY, "enable replica"),
            (INSERT, "disable"),
            (UPDATE, "enable"),
        )
    },
    HOLLOW + trigger(DELETE, "after delete on users for each row", "public.hollow"): (DELETE, "was replaced"),
    trigger(DELETE, "before delete on users for each row"): (DELETE, "was replaced"),
    trigger(DELETE, "after delete on users for each row when (old.id > 5)"): (DELETE, "was replaced"),
    trigger(KEY, "after update on users for each row when (old.role is distinct from new.role)"): (KEY, "was replaced"),
    trigger(KEY, "after update of tenant on users for each row when (old.id is distinct from new.id)"): (
        KEY,
        "was replaced",
    ),
    trigger(MOVE, "after update on users for each row when (old.id is distinct from new.id)"): (MOVE, "was replaced"),
    trigger(EMPTY, "after insert on users for each statement"): (EMPTY, "was replaced"),
    HOLLOW + trigger(UPDATE, "after update on users for each row when (old.* <> new.*)", "public.hollow"): (
        UPDATE,
        "was replaced",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_trigger_of_a_retired_mapping_that_is_not_as_it_was_made_is_found(
    connection: Connection, end: End, fault: str
) -> None:
    assert doctor.examine(connection, end.settings) == ()
    name, problem = FAULTS[fault]
    run(connection, fault)
    found = doctor.examine(connection, end.settings)
    assert [one.what for one in found] == [f"the retired table: {name} on public.users {problem}"]
    assert found[0].mend.startswith("walletmigrate install --reason")
    assert_told(found)


def test_the_function_under_a_trigger_of_a_retired_mapping_is_compared(connection: Connection, end: End) -> None:
    hollow = "returns trigger language plpgsql security definer set search_path = pg_catalog, wallet, pg_temp as "
    for name in ("gone", "retired"):
        run(connection, f"create or replace function wallet.{name}_users() {hollow} 'begin return null; end'")
    found = doctor.examine(connection, end.settings)
    assert [one.what for one in found] == [
        "the function wallet.gone_users was replaced",
        "the function wallet.retired_users was replaced",
    ]
    assert_told(found)


def test_a_column_that_is_dropped_needs_no_guard(database_url: str, tmp_path: Path) -> None:
    end = retired(database_url, tmp_path)
    end.migrate()
    with end.engine.connect() as connection:
        assert doctor.examine(connection, end.settings) == ()
    execute(end.engine, f"drop trigger {KEY} on users")
    install(end.engine, end.settings, ACT)
    with end.engine.connect() as connection:
        assert doctor.examine(connection, end.settings) == ()


def test_install_puts_up_what_is_missing_says_so_on_record_and_closes_rows_that_go_again(
    database_url: str, tmp_path: Path
) -> None:
    end = retired(database_url, tmp_path)
    execute(end.engine, f"drop trigger {DELETE} on users")
    execute(end.engine, f"alter table users disable trigger {UPDATE}")
    install(end.engine, end.settings, ACT)
    with end.engine.connect() as connection:
        assert doctor.examine(connection, end.settings) == ()
    said = scalar(end.engine, "select details -> 'mended' from wallet.audit_log order by id desc limit 1")
    assert said == [
        f"{DELETE} on public.users is missing",
        f"{UPDATE} on public.users is disabled, or does not fire in replica role",
    ]
    execute(end.engine, "delete from users where id = 1")
    assert rows(end.engine, "select state::text from wallet.accounts where key = '1'") == [("closed",)]
    install(end.engine, end.settings, ACT)
    assert scalar(end.engine, "select details -> 'mended' from wallet.audit_log order by id desc limit 1") == []


def test_the_triggers_of_each_partition_are_looked_at(database_url: str, tmp_path: Path) -> None:
    end = End(database_url, tmp_path)
    with end.engine.begin() as connection:
        run(connection, PARTITIONED)
    install(end.engine, end.settings, ACT)
    end.freeze().archive()
    end.retire()
    with end.engine.connect() as connection:
        assert doctor.examine(connection, end.settings) == ()
        for name in (DELETE, EMPTY):
            run(connection, f"alter table users_high disable trigger {name}")
        run(connection, f"drop trigger {EMPTY} on users_low")
        found = [one.what for one in doctor.examine(connection, end.settings)]
    assert found == [
        f"the retired table: {DELETE} on public.users_high is disabled, or does not fire in replica role",
        f"the retired table: {EMPTY} on public.users_high is disabled, or does not fire in replica role",
        f"the retired table: {EMPTY} on public.users_low is missing",
    ]
