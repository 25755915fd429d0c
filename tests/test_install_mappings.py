"""A mapping that changed since its install: what is taken beneath open accounts, and what is refused."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest

from installing import FENCES, adapter_of, with_columns, with_mapping
from invariants import assert_sound
from ledger import ACT, execute, install_users, post, rows, set_phase, users_settings
from walletmigrate.capture import fence_problems
from walletmigrate.config import Column, Mapping, Settings
from walletmigrate.errors import IdempotencyKeyReused, LedgerNotInstalled, PreconditionRefused
from walletmigrate.install import install


@pytest.mark.parametrize(
    "change",
    [{"scale": 1}, {"unit": "minor"}, {"column": "promo"}, {"currency": "USD"}, {"bucket": "main"}],
    ids=lambda change: next(iter(change)),
)
def test_another_meaning_beneath_open_accounts_is_refused(database_url: str, change: dict[str, Any]) -> None:
    engine, settings = install_users(database_url, phase="dual_write")
    with engine.begin() as connection:
        post(connection, settings, "open_account", 1, 0)
    with pytest.raises(PreconditionRefused, match="1 accounts of mapping 'users'"):
        install(engine, with_columns(settings, **change), ACT)
    with engine.begin() as connection:
        assert post(connection, settings, "credit", 1, 1)["debtor_ledger"] is None


def test_more_decimals_are_taken_beneath_open_accounts_and_their_journal_goes_on(database_url: str) -> None:
    engine, settings = install_users(database_url, phase="dual_write", coins_type="numeric(20, 4)")
    with engine.begin() as connection:
        adapter_of(settings).credit(connection, 1, 1, type="test", idempotency_key="one")
    finer = with_columns(settings, scale=4)
    install(engine, finer, ACT)
    with engine.begin() as connection, pytest.raises(LedgerNotInstalled, match="another configuration"):
        adapter_of(settings).credit(connection, 1, 1, type="test")
    with engine.begin() as connection:
        posted = adapter_of(finer).credit(connection, 1, Decimal("0.0001"), type="test")
    assert (posted.ledger_balance, posted.legacy_balance) == (Decimal("101.0001"), Decimal("101.0001"))
    with engine.begin() as connection, pytest.raises(IdempotencyKeyReused):  # never twice, though not a replay either
        adapter_of(finer).credit(connection, 1, 1, type="test", idempotency_key="one")
    assert_sound(engine, finer)
    with pytest.raises(PreconditionRefused, match="opened under another"):
        install(engine, settings, ACT)


def test_more_decimals_of_a_floating_column_are_another_meaning(database_url: str) -> None:
    """What was rounded away at the old scale is a part of the value at the new one."""
    engine, settings = install_users(
        database_url, coins="12345678.000004", coins_type="double precision", phase="dual_write"
    )
    with engine.begin() as connection:
        post(connection, settings, "open_account", 1, 0)
    set_phase(engine, "legacy")
    with pytest.raises(PreconditionRefused, match="another table, key, column, scale or unit"):
        install(engine, with_columns(settings, scale=6), ACT)


def test_more_decimals_of_minor_units_are_another_meaning(database_url: str) -> None:
    engine, settings = install_users(database_url, phase="dual_write", unit="minor", coins_type="bigint")
    with engine.begin() as connection:
        post(connection, settings, "open_account", 1, 0)
    with pytest.raises(PreconditionRefused, match=r"currency-or-scale-change\.md"):
        install(engine, with_columns(settings, scale=3), ACT)


def test_another_table_or_key_beneath_open_accounts_is_refused(database_url: str) -> None:
    engine, settings = install_users(database_url, phase="dual_write")
    execute(engine, "alter table users add number bigint generated always as identity unique not null")
    execute(engine, "create table clients (like users including all)")
    with engine.begin() as connection:
        post(connection, settings, "open_account", 1, 0)
    for change in ({"key": "number"}, {"table": "public.clients"}):
        with pytest.raises(PreconditionRefused, match="opened under another"):
            install(engine, with_mapping(settings, **change), ACT)


def test_another_meaning_is_taken_while_no_account_is_open(database_url: str) -> None:
    engine, settings = install_users(database_url, phase="dual_write")
    changed = with_columns(settings, scale=1, bucket="main")
    install(engine, changed, ACT)
    with engine.begin() as connection:
        assert adapter_of(changed).credit(connection, 1, Decimal("0.5"), type="test").ledger_balance == Decimal("100.5")
    with engine.begin() as connection, pytest.raises(LedgerNotInstalled, match="another configuration"):
        adapter_of(settings).credit(connection, 1, 1, type="test")


def test_a_new_floor_and_a_new_bucket_are_taken_beneath_open_accounts(database_url: str) -> None:
    engine, settings = install_users(database_url, phase="dual_write")
    with engine.begin() as connection:
        post(connection, settings, "open_account", 1, 0)
    changed = users_settings(database_url, floor=Decimal(50), with_promo=True)
    install(engine, changed, ACT)
    with engine.begin() as connection:
        assert post(connection, changed, "debit", 1, 60)["refusal"] == "insufficient_funds"
        assert post(connection, changed, "credit", 1, 1, bucket="promo")["creditor_ledger"] == 6
        connection.exec_driver_sql("update users set promo = 1 where id = 1")
    states = rows(engine, "select bucket, state::text from wallet.accounts order by 1")
    assert states == [("cash", "mirrored"), ("promo", "stale")]


def test_a_mapping_that_moves_to_another_table_takes_its_fence_along(database_url: str) -> None:
    engine, settings = install_users(database_url, phase="dual_write")
    execute(
        engine, "create table clients (number bigint primary key, tenant text, role text, total_coins numeric(20,2))"
    )
    moved = with_mapping(settings, table="public.clients", key="number")
    assert install(engine, moved, ACT).fences_made == ("users",)
    assert {name for (name,) in rows(engine, FENCES)} == {
        f"clients walletmigrate_users_{event}" for event in ("insert", "update", "delete", "truncate")
    }
    execute(engine, "update users set total_coins = 5")  # no trigger calls functions that are not for this table
    execute(engine, "insert into clients values (1, 'a', 'b', 3)")
    with engine.begin() as connection:
        assert adapter_of(moved).credit(connection, 1, 1, type="test").ledger_balance == 4
    assert_sound(engine, moved)


def test_two_mappings_of_one_table_have_a_fence_each(database_url: str) -> None:
    engine, settings = install_users(database_url, phase="dual_write")
    promo = Column(bucket="promo", column="promo", currency="EUR", scale=2)
    other = Mapping.model_validate({**settings.mapping(None).model_dump(), "name": "promos", "columns": (promo,)})
    both = Settings(database_url=settings.database_url, mappings=(*settings.mappings, other))
    assert install(engine, both, ACT).fences_made == ("promos",)
    assert install(engine, both, ACT).fences_made == ()
    with engine.begin() as connection:
        for mapping in both.mappings:
            assert fence_problems(connection, both, mapping) == []
            adapter_of(both, mapping.name).credit(connection, 1, 1, type="test")
        connection.exec_driver_sql("update users set promo = promo + 1, total_coins = total_coins + 1 where id = 1")
    states = rows(engine, "select mapping, state::text from wallet.accounts order by 1")
    assert states == [("promos", "stale"), ("users", "stale")]
    assert_sound(engine, both)
