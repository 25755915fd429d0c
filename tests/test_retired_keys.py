"""In phase retired triggers on the keys close the accounts of rows that go: whoever gets the key is somebody else."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.exc import DBAPIError

import interleaving
import ledger
from retiring import ACT, End, behind
from walletmigrate import LegacyBalanceAdapter, phases
from walletmigrate.config import Settings
from walletmigrate.errors import UnknownAccount
from walletmigrate.install import install
from walletmigrate.retirement import GUARDS, KEPT, guard_name


@pytest.fixture
def end(database_url: str, tmp_path: Path) -> End:
    return End(database_url, tmp_path, with_promo=True, floor=Decimal(0))


def retired(end: End) -> LegacyBalanceAdapter:
    end.freeze().archive()
    end.retire()
    end.migrate()
    return end.adapter()


@pytest.mark.parametrize("isolation", ["READ COMMITTED", "REPEATABLE READ"], ids=["read_committed", "repeatable_read"])
def test_whoever_gets_the_key_of_a_deleted_row_after_the_drop_begins_at_nothing(end: End, isolation: str) -> None:
    adapter = retired(end)
    with end.engine.connect().execution_options(isolation_level=isolation) as connection, connection.begin():
        connection.exec_driver_sql("delete from public.users where id = 3")
    assert ledger.rows(end.engine, "select state::text from wallet.accounts where key = '3'") == [("closed",)] * 2
    with pytest.raises(UnknownAccount):
        end.balance(adapter, 3)
    ledger.execute(end.engine, "insert into public.users values (3, 'acme', 'member')")
    assert end.balance(adapter, 3) == 0
    with end.engine.begin() as connection:
        assert adapter.credit(connection, 3, 5, type="deposit").ledger_balance == 5
    assert ledger.scalar(end.engine, "select count(*) from wallet.accounts where state <> 'frozen'") == 0
    assert end.verify()


def test_a_row_without_an_account_leaves_no_account_to_whoever_comes_after_it(end: End) -> None:
    adapter = retired(end)
    ledger.execute(end.engine, "insert into public.users values (50, 'acme', 'member')")
    delete = text("delete from public.users where id = 50")
    # The posting opens the account, and is in flight.
    behind(end, lambda on: adapter.credit(on, 50, 5, type="deposit"), lambda on: on.execute(delete))
    ledger.execute(end.engine, "insert into public.users values (50, 'acme', 'member')")
    assert end.balance(adapter, 50) == 0
    assert end.verify()


@pytest.mark.parametrize("key", [3, 50])
def test_a_posting_that_waited_for_the_deletion_of_its_row_is_to_be_tried_again(end: End, key: int) -> None:
    adapter = retired(end)
    ledger.execute(end.engine, "insert into public.users values (50, 'acme', 'member')")
    delete = text(f"delete from public.users where id = {key}")
    said = behind(end, lambda on: on.execute(delete), lambda on: adapter.credit(on, key, 5, type="deposit"))
    assert said == "40001"
    states = f"select distinct state::text from wallet.accounts where key = '{key}'"
    assert ledger.rows(end.engine, states) == [("closed",)]
    assert end.verify()


STEP = text("update wallet.control set phase = 'frozen'")


def test_the_phase_is_not_left_before_what_was_opened_in_it_is_there(end: End) -> None:
    """An unfreeze behind it would pass an account over that nobody else sees yet."""
    adapter = retired(end)
    ledger.execute(end.engine, "insert into public.users values (50, 'acme', 'member')")
    assert behind(end, lambda on: adapter.credit(on, 50, 5, type="deposit"), lambda on: on.execute(STEP)) is None


def test_nothing_is_opened_in_a_phase_that_was_left_meanwhile(end: End) -> None:
    adapter = retired(end)
    ledger.execute(end.engine, "insert into public.users values (50, 'acme', 'member')")
    said = behind(end, lambda on: on.execute(STEP), lambda on: adapter.credit(on, 50, 5, type="deposit"))
    assert said == "40001"


def test_a_key_changes_after_the_drop_only_where_it_leaves_no_money_behind(end: End) -> None:
    adapter = retired(end)
    move = "update public.users set id = 60 where id = 3"
    with pytest.raises(DBAPIError, match="the ledger keeps a balance under this key"):
        ledger.execute(end.engine, move)
    with end.engine.begin() as connection:
        adapter.set_balance(connection, 3, 0, actor="admin:7", reason="case")
        adapter.set_balance(connection, 3, 0, bucket="promo", actor="admin:7", reason="case")
    ledger.execute(end.engine, move)
    assert ledger.rows(end.engine, "select state::text from wallet.accounts where key = '3'") == [("closed",)] * 2
    assert end.balance(adapter, 60) == 0
    ledger.execute(end.engine, "update public.users set id = 3, tenant = 'other' where id = 60")
    assert end.balance(adapter, 3) == 0
    assert end.verify()


def partitioned(url: str, **_: Any) -> tuple[Engine, Settings]:
    """What `ledger.install_users` makes, with the table in two partitions by its key."""
    engine, settings = ledger.engine_named(url), ledger.users_settings(url)
    columns = "tenant text, role text, total_coins numeric(20, 2), promo numeric(20, 2) not null default 0"
    for statement in (
        f"create table public.users (id bigint primary key, {columns}) partition by range (id)",
        "create table public.users_low partition of public.users for values from (0) to (100)",
        "create table public.users_high partition of public.users for values from (100) to (200)",
    ):
        ledger.execute(engine, statement)
    ledger.add_users(engine, 1, 10)
    install(engine, settings, ACT)
    ledger.set_phase(engine, "dual_write")
    return engine, settings


def test_a_key_that_brings_its_row_to_another_partition_changes_after_the_drop_only_without_money(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "install_users", partitioned)
    end = End(database_url, tmp_path)
    adapter = retired(end)
    move = "update public.users set id = 160 where id = 3"
    with pytest.raises(DBAPIError, match="the ledger keeps a balance under this key") as caught:
        ledger.execute(end.engine, move)
    assert getattr(caught.value.orig, "sqlstate", None) == "WM030"
    assert end.balance(adapter, 3) == 100
    with end.engine.begin() as connection:
        adapter.set_balance(connection, 3, 0, actor="admin:7", reason="case")
    said = behind(end, lambda on: adapter.credit(on, 3, 5, type="deposit"), lambda on: on.execute(text(move)))
    assert (said, end.balance(adapter, 3)) == ("WM030", Decimal(5))
    with end.engine.begin() as connection:
        adapter.set_balance(connection, 3, 0, actor="admin:7", reason="case")
    ledger.execute(end.engine, move)
    assert ledger.rows(end.engine, "select state::text from wallet.accounts where key = '3'") == [("closed",)]
    assert (end.balance(adapter, 160), end.balance(adapter, 4)) == (Decimal(0), Decimal(100))
    with end.engine.begin() as connection:
        assert adapter.credit(connection, 160, 5, type="deposit").ledger_balance == 5
    # A delete is one all the same, in either partition.
    ledger.execute(end.engine, "delete from public.users where id in (4, 160)")
    closed = "select key from wallet.accounts where state = 'closed' order by key"
    assert ledger.rows(end.engine, closed) == [("160",), ("3",), ("4",)]
    assert end.verify()


def test_a_key_that_a_trigger_of_the_application_changes_is_refused_with_its_money(end: End) -> None:
    adapter = retired(end)
    ledger.execute(
        end.engine,
        "create function public.renamed() returns trigger language plpgsql as "
        "$$ begin new.id := 60; return new; end $$",
    )
    # After the other one, in the order of their names.
    ledger.execute(
        end.engine,
        "create trigger zz before update on public.users for each row execute function public.renamed()",
    )
    with pytest.raises(DBAPIError, match="the ledger keeps a balance under this key"):
        ledger.execute(end.engine, "update public.users set tenant = 'other' where id = 3")
    assert end.balance(adapter, 3) == 100


def test_what_is_written_of_a_row_beside_its_key_leaves_its_account_alone_after_the_drop(end: End) -> None:
    adapter = retired(end)
    ledger.execute(end.engine, "update public.users set tenant = 'other' where id = 3")
    ledger.execute(end.engine, "delete from public.users where id = 4")
    assert [end.balance(adapter, key) for key in (3, 5)] == [100, 100]


def test_a_truncated_table_closes_its_accounts_after_the_drop(end: End) -> None:
    adapter = retired(end)
    old = end.engine.execution_options(isolation_level="REPEATABLE READ")
    with old.connect() as connection, pytest.raises(DBAPIError, match="cannot be truncated at this isolation level"):
        connection.exec_driver_sql("truncate public.users")
    ledger.execute(end.engine, "truncate public.users")
    ledger.execute(end.engine, "insert into public.users values (3, 'acme', 'member')")
    assert end.balance(adapter, 3) == 0
    assert ledger.rows(end.engine, "select distinct state::text from wallet.accounts") == [("closed",)]
    assert end.verify()


def test_a_step_back_from_retired_takes_the_triggers_of_the_keys_along(end: End) -> None:
    end.freeze().archive()
    end.retire()
    phases.back(end.engine, end.settings, ACT)
    names = "select tgname from pg_trigger where tgname like '%\\_r\\_%'"
    assert ledger.rows(end.engine, names) == []
    with pytest.raises(DBAPIError, match="frozen"):
        ledger.execute(end.engine, "delete from public.users where id = 3")


def test_who_deletes_a_row_after_the_drop_needs_no_right_in_the_ledger_and_no_path(end: End) -> None:
    retired(end)
    ledger.execute(end.engine, "grant select, delete on public.users to wallet_app")
    with ledger.engine_named(end.url, role="wallet_app").begin() as connection:
        connection.exec_driver_sql("create temporary table accounts (like wallet.accounts)")
        connection.exec_driver_sql("set local search_path = pg_temp, public")
        connection.exec_driver_sql("delete from public.users where id = 3")
    assert ledger.rows(end.engine, "select state::text from wallet.accounts where key = '3'") == [("closed",)] * 2


def test_the_triggers_of_a_retired_mapping_have_names_of_their_own_for_every_mapping(end: End) -> None:
    longest = end.mapping.model_copy(update={"name": "m" * 40})
    names = {guard_name(longest, event) for event in (*GUARDS, *KEPT)}
    assert len(names) == 6
    assert max(map(len, names)) <= 63


def test_a_row_that_goes_closes_the_accounts_of_its_key_and_of_its_mapping_alone(end: End) -> None:
    adapter = retired(end)
    ledger.execute(
        end.engine,
        "insert into wallet.accounts (mapping, key, bucket, currency, state, balance) "
        "values ('others', '3', 'cash', 'EUR', 'frozen', 50), ('others', '4', 'cash', 'EUR', 'frozen', 50)",
    )
    with end.engine.begin() as connection:
        for bucket in ("cash", "promo"):
            adapter.set_balance(connection, 3, 0, bucket=bucket, actor="admin:7", reason="case")
    frozen = "select mapping, key from wallet.accounts where state = 'frozen' and key in ('3', '4', '5')"
    ledger.execute(end.engine, "update public.users set id = 60 where id = 3")
    ledger.execute(end.engine, "delete from public.users where id = 4")
    others = [("others", "3"), ("others", "4")]
    assert sorted(set(ledger.rows(end.engine, frozen))) == [*others, ("users", "5")]
    told = (
        "select key, bucket, state_at from wallet.accounts where key in ('3', '4') and state = 'closed' order by 1, 2"
    )
    before = ledger.rows(end.engine, told)
    # Whoever has the key of a closed account may go, and may take another key: the balance is not theirs.
    for goes in ("delete from public.users where id = 4", "update public.users set id = 61 where id = 4"):
        ledger.execute(end.engine, "insert into public.users values (4, 'acme', 'member')")
        ledger.execute(end.engine, goes)
        assert ledger.rows(end.engine, told) == before
    # A partition that is emptied leaves the rows of the others.
    ledger.execute(end.engine, "create table public.part (like public.users)")
    ledger.execute(
        end.engine,
        "create trigger t after truncate on public.part for each statement execute function wallet.gone_users()",
    )
    gone = (
        "insert into wallet.accounts (mapping, key, bucket, currency, state, balance) values ('users', '70', 'cash', "
    )
    ledger.execute(end.engine, gone + "'EUR', 'frozen', 0)")
    ledger.execute(end.engine, "truncate public.part")
    assert sorted(set(ledger.rows(end.engine, frozen))) == [*others, ("users", "5")]
    assert ledger.rows(end.engine, "select state::text from wallet.accounts where key = '70'") == [("closed",)]
    ledger.execute(end.engine, "truncate public.users")
    assert sorted(set(ledger.rows(end.engine, frozen))) == others
    assert ledger.rows(end.engine, told) == before


def test_a_key_that_changes_waits_for_a_posting_in_flight_and_then_keeps_the_money(end: End) -> None:
    adapter = retired(end)
    with end.engine.begin() as connection:
        for bucket in ("cash", "promo"):
            adapter.set_balance(connection, 3, 0, bucket=bucket, actor="admin:7", reason="case")
    rename = text("update public.users set id = 60 where id = 3")
    said = behind(end, lambda on: adapter.credit(on, 3, 5, type="deposit"), lambda on: on.execute(rename))
    assert said == "WM030"
    assert end.balance(adapter, 3) == 5


def test_the_triggers_of_retired_keys_fire_for_who_writes_as_a_replica_too(end: End) -> None:
    adapter = retired(end)
    with end.engine.connect() as connection:
        connection.exec_driver_sql("set session_replication_role = replica")
        connection.exec_driver_sql("delete from public.users where id = 3")
        connection.commit()
        assert ledger.rows(end.engine, "select state::text from wallet.accounts where key = '3'") == [("closed",)] * 2
        with pytest.raises(DBAPIError, match="keeps a balance"):
            connection.exec_driver_sql("update public.users set id = 60 where id = 4")
        connection.rollback()
        assert end.balance(adapter, 4) == 100
        connection.exec_driver_sql("set session_replication_role = replica")
        connection.exec_driver_sql("truncate public.users")
        connection.commit()
    assert ledger.rows(end.engine, "select distinct state::text from wallet.accounts") == [("closed",)]


@pytest.mark.parametrize("goes", ["delete from public.users where id = 3", "truncate public.users"])
def test_a_row_that_goes_waits_for_nobody_who_holds_another_account(end: End, goes: str) -> None:
    retired(end)
    ledger.execute(
        end.engine,
        "insert into wallet.accounts (mapping, key, bucket, currency, state, balance) "
        "values ('others', '3', 'cash', 'EUR', 'frozen', 50)",
    )
    held = "mapping = 'others'" if goes.startswith("truncate") else "mapping = 'others' or key <> '3'"
    with end.engine.connect() as holder, end.engine.begin() as connection:
        holder.exec_driver_sql(f"select from wallet.accounts where {held} for update")
        connection.exec_driver_sql("set local lock_timeout = '2s'")
        connection.exec_driver_sql(goes)


@pytest.mark.parametrize("goes", ["delete from public.users where id = 3", "truncate public.users"])
def test_the_accounts_of_a_row_that_goes_are_locked_by_id(end: End, goes: str) -> None:
    """The one that was opened first lies behind the other in the table, where an update alone would meet it last."""
    retired(end)
    query = "select id from wallet.accounts where key = '3' order by "
    first, last = (found for (found,) in ledger.rows(end.engine, query + "id"))
    ledger.execute(end.engine, f"update wallet.accounts set opened_at = clock_timestamp() where id = {first}")
    assert ledger.rows(end.engine, query + "ctid") == [(last,), (first,)]
    with interleaving.stage(end.url) as stage:
        holder, goer, other = stage.session(), stage.session(), stage.session()
        holder.sql("select from wallet.accounts where id = :id for update", id=first)
        # An index of the keys, or a join that hashes or sorts, would give them in an order of its own.
        for way in ("indexscan", "bitmapscan", "hashjoin", "mergejoin"):
            goer.sql(f"set local enable_{way} = off")
        waiting = goer.waiting(lambda connection: connection.exec_driver_sql(goes), on=holder)
        other.sql("select from wallet.accounts where id = :id for update nowait", id=last)
        other.rollback()
        holder.rollback()
        waiting.result(interleaving.PATIENCE_SECONDS)
        goer.commit()
    assert ledger.rows(end.engine, "select state::text from wallet.accounts where key = '3'") == [("closed",)] * 2
    assert end.verify()
