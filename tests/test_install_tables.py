"""Install on tables of every kind: partitioned, with row level security, with names and keys of any form."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import SecretStr, ValidationError
from sqlalchemy.exc import DBAPIError

from installing import FENCES, adapter_of, failure, job, plain_engine, uninstall_in_legacy, with_mapping
from invariants import assert_sound
from ledger import ACT, execute, install_users, rows, scalar, set_phase, users_settings
from walletmigrate.config import Column, Mapping, Settings
from walletmigrate.errors import WalletMigrateError
from walletmigrate.functions import relation
from walletmigrate.install import install, uninstall
from walletmigrate.movements import Movement
from walletmigrate.schema import quoted


def test_a_partitioned_table_is_fenced_on_every_partition(database_url: str) -> None:
    engine = plain_engine(database_url)
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "create table users (id bigint primary key, tenant text, role text, total_coins numeric(20, 2)) "
            "partition by range (id); create table users_a partition of users for values from (0) to (10) "
            "partition by hash (id); "
            "create table users_a0 partition of users_a for values with (modulus 2, remainder 0); "
            "create table users_a1 partition of users_a for values with (modulus 2, remainder 1); "
            "create table users_b partition of users default; "
            "insert into users values (1, 'a', 'b', 5), (20, 'a', 'b', 5)"
        )
    settings = users_settings(database_url)
    install(engine, settings, ACT)
    assert len(rows(engine, FENCES)) == 4 * 5
    assert (
        scalar(engine, "select count(*) from pg_trigger where tgname like 'walletmigrate%' and tgenabled <> 'A'") == 0
    )
    assert install(engine, settings, ACT).fences_made == ()
    set_phase(engine, "dual_write")
    assert job(engine, "select opened, failed from wallet.backfill_users(null, null, null)") == (2, 0)
    uninstall_in_legacy(engine, settings)
    assert rows(engine, FENCES) == []


ROW_SECURITY = (
    "alter table users enable row level security; create policy tenants on users to wallet_app "
    "using (tenant = current_setting('app.tenant', true)); grant select, insert, update, delete on users to wallet_app"
)


def as_tenant(connection: Any, tenant: str) -> None:
    connection.exec_driver_sql(f"set local role wallet_app; set local app.tenant = '{tenant}'")


def test_row_level_security_shows_the_application_its_rows_and_the_fence_all(database_url: str) -> None:
    engine, settings = install_users(database_url, phase="dual_write")
    execute(engine, ROW_SECURITY.replace(":", r"\:"))
    install(engine, settings, ACT)
    adapter = adapter_of(settings)
    with engine.begin() as connection:
        as_tenant(connection, "acme")
        assert adapter.credit(connection, 1, 1, type="test").ledger_balance == 101
        with pytest.raises(LookupError):
            adapter.credit(connection, 2, 1, type="test")  # a row of globex
        connection.exec_driver_sql("update users set total_coins = 3 where id = 1")
        assert adapter.credit(connection, 1, 1, type="test").ledger_balance == 4
        connection.exec_driver_sql("delete from users where id = 3")
    states = rows(engine, "select key, state\\:\\:text, balance from wallet.accounts order by 1")
    assert states == [("1", "mirrored", 4)]
    assert_sound(engine, settings)


def test_row_level_security_that_comes_later_never_loses_a_posting_in_silence(database_url: str) -> None:
    """The owner of the ledger then sees no row: a posting must fail, not report what it did not write."""
    engine, settings = install_users(database_url, phase="dual_write")
    with engine.begin() as connection:
        adapter_of(settings).credit(connection, 1, 1, type="test")
    execute(engine, ROW_SECURITY.replace(":", r"\:"))
    reported = 101
    for amount in (1, 2, 4):
        with engine.connect() as connection:
            as_tenant(connection, "acme")
            try:
                adapter_of(settings).credit(connection, 1, amount, type="test")
            except (DBAPIError, WalletMigrateError):
                connection.rollback()
            else:
                connection.commit()
                reported += amount
    assert scalar(engine, "select total_coins from users where id = 1") == reported
    install(engine, settings, ACT)
    with engine.begin() as connection:
        as_tenant(connection, "acme")
        assert adapter_of(settings).credit(connection, 1, 1, type="test").ledger_balance == reported + 1
    assert_sound(engine, settings)


NAMES = [
    # table, key, balance column, another column: names that mean something in SQL or in the ledger's functions.
    ("public.Users", "ID", "Total Coins".replace(" ", "_"), "Role"),
    ("public.user", "order", "select", "table"),
    ("Größe.Konten$", "schlüssel", "saldo€".replace("€", "_ß"), "mandant"),
    ("public.accounts", "key", "balance", "state"),
    ("public.transactions", "id", "amount", "failed"),
    ("public.line", "p_key", "p_change", "last_value"),
    ("public.control", "m", "tip_change", "opened"),
    ("public.l", "l", "a", "k"),
    ("public.mapping", "v_key", "v_now", "s"),
    ("wallet_legacy.job", "debtor", "creditor", "p"),
]


@pytest.mark.parametrize(("table", "key", "column", "other"), NAMES, ids=str)
def test_names_of_any_kind_are_only_names(database_url: str, table: str, key: str, column: str, other: str) -> None:
    engine = plain_engine(database_url)
    mapping = Mapping(
        name="odd",
        table=table,
        key=key,
        traits={"tenant": other},
        columns=(
            Column(bucket="main", column=column, currency="EUR", scale=2),
            Column(bucket="extra", column="extra", currency="EUR", scale=2),
        ),
    )
    settings = Settings(database_url=SecretStr(database_url), mappings=(mapping,))
    name = relation(mapping)
    if mapping.schema_name != "public":
        execute(engine, f"create schema {quoted(mapping.schema_name)}")
    execute(
        engine,
        f"create table {name} ({quoted(key)} bigint primary key, {quoted(column)} numeric(20, 2), "
        f"{quoted(other)} text, extra numeric(20, 2) default 5)",
    )
    execute(
        engine, f"insert into {name} ({quoted(key)}, {quoted(column)}) select g, 100 from generate_series(1, 9) as g"
    )
    install(engine, settings, ACT)
    set_phase(engine, "dual_write")
    adapter = adapter_of(settings)
    with engine.begin() as connection:
        adapter.credit(connection, 1, 5, type="test", idempotency_key="k")
        adapter.transfer(connection, 1, 2, 5, type="test", bucket="extra")
        first = adapter.debit(connection, 1, 3, type="test")
        adapter.reverse(connection, first.transaction_id or 0, reason="test")
        adapter.set_balance(connection, 2, 50, actor="a", reason="b")
        adapter.apply(connection, [Movement.credit(1, 1, type="test"), Movement.debit(2, 1, type="test")])
        assert adapter.balance(connection, 1).amount == 106
    execute(engine, f"update {name} set {quoted(column)} = 7 where {quoted(key)} = 1")
    execute(engine, f"update {name} set {quoted(key)} = 33 where {quoted(key)} = 3")
    assert job(engine, "select opened, resynced, failed from wallet.backfill_odd(null, null, null)") == (14, 1, 0)
    assert_sound(engine, settings)
    assert job(engine, "select frozen, refused from wallet.freeze_odd(null, null)") == (18, 0)
    assert failure(engine, f"update {name} set {quoted(column)} = 8 where {quoted(key)} = 1") == "WM030"
    with engine.begin() as connection:
        assert adapter.credit(connection, 1, 1, type="test").mode == "ledger"
    assert job(engine, "select unfrozen from wallet.unfreeze_odd(null, null)") == (18,)
    assert scalar(engine, f"select {quoted(column)} from {name} where {quoted(key)} = 1") == 8
    execute(engine, f"truncate {name}")
    assert rows(engine, "select distinct state::text from wallet.accounts") == [("closed",)]
    assert_sound(engine, settings)
    uninstall_in_legacy(engine, settings)


@pytest.mark.parametrize(
    "name", ['public."Weird Table"', "public.Weird Table", "public.weird;table", "a.b.c", "1users"]
)
def test_a_table_name_that_is_no_name_is_refused_by_the_configuration(name: str) -> None:
    with pytest.raises(ValidationError, match="not the name of a table"):
        with_mapping(users_settings("postgresql://localhost/x"), table=name)


@pytest.mark.parametrize("key_type", ["smallint", "integer"])
def test_a_key_too_large_for_its_column_is_an_unknown_account(database_url: str, key_type: str) -> None:
    engine, settings = install_users(database_url, key_type="bigint", rows=0)
    uninstall(engine, settings, ACT)
    execute(engine, f"alter table users alter id type {key_type}")
    execute(engine, "insert into users values (1, 'a', 'b', 100)")
    install(engine, settings, ACT)
    set_phase(engine, "dual_write")
    adapter = adapter_of(settings)
    with engine.begin() as connection:
        for key in (70_000, 2**40, -(2**40)):
            with pytest.raises(LookupError):
                adapter.credit(connection, key, 1, type="test")
        with pytest.raises(LookupError):
            adapter.transfer(connection, 1, 2**40, 1, type="test")
        assert adapter.credit(connection, 1, 1, type="test").ledger_balance == 101
    assert_sound(engine, settings)
