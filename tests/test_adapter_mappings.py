"""Accounts of the adapter: how they are opened, and mappings of every kind of bucket, currency, key and column."""

from __future__ import annotations

import uuid
from decimal import Decimal
from typing import Any

import pytest

from adapting import DUAL, OFF, custom, place
from conftest import MakeDatabase
from ledger import execute, rows
from walletmigrate import LegacyBalanceAdapter
from walletmigrate.errors import UnknownTransaction

D = Decimal


def test_if_either_side_asks_for_dual_write_both_get_it(database_url: str) -> None:
    at = place(database_url, rows=2)

    class OnlyOne:
        document_id, needs_traits, source = "test", False, "test"

        def decide(self, identifier: str, traits: object) -> Any:  # noqa: ARG002 - as the protocol has it
            return at.source.snapshot().decide(identifier, {}) if identifier == "2" else at_rest

        def age_seconds(self) -> float:
            return 0.0

        def snapshot(self) -> OnlyOne:
            return self

    from walletmigrate.flags import OFF as at_rest  # noqa: N811 - a decision, not a constant of this module

    adapter = LegacyBalanceAdapter(at.settings, OnlyOne())
    with at.engine.begin() as connection:
        assert adapter.credit(connection, 1, 1, type="deposit").mode == "legacy"
        assert adapter.transfer(connection, 1, 2, 1, type="gift").mode == "dual_write"
        assert adapter.transfer(connection, 2, 1, 1, type="gift").mode == "dual_write"
    assert (at.account(1), at.account(2)) == (("mirrored", D(101)), ("mirrored", D(100)))
    at.check()


@pytest.mark.parametrize(
    ("phase", "mode", "state"),
    [
        ("legacy", "legacy", None),
        ("dual_write", "dual_write", "mirrored"),
        ("read_ledger", "dual_write", "mirrored"),
        ("wallet_only", "dual_write", "mirrored"),
        ("frozen", "ledger", "frozen"),
    ],
)
def test_the_phase_is_the_ceiling_of_what_the_flag_may_ask_for(
    database_url: str, phase: str, mode: str, state: str | None
) -> None:
    at = place(database_url, phase=phase, rows=1)
    with at.engine.begin() as connection:
        assert at.adapter.credit(connection, 1, 5, type="deposit").mode == mode
    assert at.account(1) == (state and (state, D(105)))
    assert at.coins(1) == (100 if mode == "ledger" else 105)
    at.check()


def test_a_new_account_is_opened_as_frozen_while_the_phase_is_frozen(database_url: str) -> None:
    at = place(database_url, rows=0, phase="frozen", with_promo=True)
    execute(at.engine, "insert into users values (1, 'acme', 'member', 12.5, 0)")
    with at.engine.begin() as connection:
        opened = at.adapter.open_account(connection, 1)
    assert [(each.mode, each.bucket, each.ledger_balance) for each in opened] == [
        ("ledger", "cash", D("12.5")),
        ("ledger", "promo", D(0)),
    ]
    assert (at.account(1), at.account(1, "promo")) == (("frozen", D("12.5")), ("frozen", D(0)))
    at.check()


def test_open_account_opens_every_bucket_once(database_url: str) -> None:
    at = place(database_url, rows=1, with_promo=True)
    for _ in range(2):
        with at.engine.begin() as connection:
            opened = at.adapter.open_account(connection, 1)
        assert [(each.operation, each.bucket, each.ledger_balance, each.transaction_id) for each in opened] == [
            ("open_account", "cash", D(100), None),
            ("open_account", "promo", D(5), None),
        ]
    assert at.legs() == [("opening", "opening", "1", D(100)), ("opening", "opening", "1", D(5))]
    at.check()


def test_open_account_of_a_row_inserted_in_the_same_transaction_works(database_url: str) -> None:
    at = place(database_url, rows=0)
    with at.engine.begin() as connection:
        connection.exec_driver_sql("insert into users values (1, 'acme', 'member', 0, 0)")
        assert at.adapter.open_account(connection, 1)[0].ledger_balance == 0
        assert at.adapter.credit(connection, 1, 3, type="deposit").ledger_balance == 3
    assert at.legs() == [("posting", "external", "1", D(3))]
    at.check()


def test_a_negative_legacy_balance_opens_and_resyncs_as_it_is(database_url: str) -> None:
    at = place(database_url, rows=1, coins="-20")
    with at.engine.begin() as connection:
        assert at.adapter.credit(connection, 1, 5, type="deposit").ledger_balance == -15
        connection.exec_driver_sql("update users set total_coins = -40")
        assert at.adapter.debit(connection, 1, 1, type="fee").ledger_balance == -41
    assert at.legs() == [
        ("opening", "1", "opening", D(20)),
        ("posting", "external", "1", D(5)),
        ("resync", "1", "bypass", D(25)),
        ("posting", "1", "external", D(1)),
    ]
    at.check()


def test_a_balance_may_be_set_below_zero_and_below_the_floor(database_url: str) -> None:
    at = place(database_url, rows=1, floor=D(0))
    with at.engine.begin() as connection:
        result = at.adapter.set_balance(connection, 1, D("-0.01"), actor="admin:7", reason="chargeback")
    assert (result.legacy_balance, result.ledger_balance) == (D("-0.01"), D("-0.01"))
    at.check()


def test_buckets_are_accounts_of_their_own(database_url: str) -> None:
    at = place(database_url, rows=2, with_promo=True)
    with at.engine.begin() as connection:
        assert at.adapter.credit(connection, 1, 1, type="bonus", bucket="promo").ledger_balance == 6
        assert at.adapter.transfer(connection, 1, 2, 2, type="gift", bucket="promo").payee_ledger_balance == 7
        assert at.adapter.debit(connection, 1, 10, type="booking").ledger_balance == 90
    assert (at.coins(1), at.coins(1, "promo"), at.coins(2, "promo")) == (90, 4, 7)
    assert (at.account(1), at.account(1, "promo"), at.account(2)) == (("mirrored", D(90)), ("mirrored", D(4)), None)
    at.check()


TWO_CURRENCIES = {
    "name": "wallets",
    "table": "public.wallets",
    "key": "owner",
    "columns": [
        {"bucket": "cash", "column": "euros", "currency": "EUR", "scale": 2},
        {"bucket": "cash", "column": "yen", "currency": "JPY", "scale": 0},
    ],
}


def test_a_mapping_with_two_currencies_keeps_them_apart(database_url: str) -> None:
    at = custom(
        database_url,
        "create table wallets (owner text primary key, euros numeric(12, 2) not null, yen bigint not null);"
        "insert into wallets values ('ann', 10, 1000), ('bob', 20, 2000)",
        TWO_CURRENCIES,
    )
    with at.engine.begin() as connection:
        at.adapter.credit(connection, "ann", D("0.5"), type="deposit", currency="EUR")
        at.adapter.transfer(connection, "ann", "bob", 300, type="gift", currency="JPY")
    assert (at.coins("ann", "euros"), at.coins("ann", "yen"), at.coins("bob", "yen")) == (D("10.5"), 700, 2300)
    assert at.account("ann", currency="EUR") == ("mirrored", D("10.5"))
    assert at.account("ann", currency="JPY") == ("mirrored", D(700))
    systems = rows(at.engine, "select name, currency, balance from wallet.system_balances where balance <> 0")
    assert sorted(systems) == [
        ("external", "EUR", D("-0.5")),
        ("opening", "EUR", D(-10)),
        ("opening", "JPY", D(-3000)),
    ]
    at.check()


@pytest.mark.parametrize(
    ("key_type", "first", "second"),
    [
        ("bigint", 1, 2),
        ("text", "user-0000001", "user-0000002"),
        ("uuid", uuid.UUID("00000000-0000-4000-8000-000000000001"), "00000000-0000-4000-8000-000000000002"),
    ],
)
def test_integer_text_and_uuid_keys_name_accounts(database_url: str, key_type: str, first: Any, second: Any) -> None:
    at = place(database_url, rows=2, key_type=key_type)
    with at.engine.begin() as connection:
        assert at.adapter.credit(connection, first, 5, type="deposit").key == first
        assert at.adapter.transfer(connection, first, second, 1, type="gift").payee_ledger_balance == 101
        assert at.adapter.balance(connection, second).amount == 101
        assert len(at.adapter.history(connection, first)) == 3
    assert at.account(first) == ("mirrored", D(104))
    at.check()


def test_a_uuid_in_upper_case_is_the_same_account(database_url: str) -> None:
    at = place(database_url, rows=0, key_type="uuid")
    key = uuid.UUID("abcdefab-cdef-4abc-8def-abcdefabcdef")
    execute(at.engine, "insert into users values (:key, 'acme', 'member', 1, 0)", key=key)
    with at.engine.begin() as connection:
        at.adapter.credit(connection, str(key).upper(), 1, type="deposit", idempotency_key="k")
        assert at.adapter.credit(connection, key, 1, type="deposit", idempotency_key="k").replayed
    assert at.account(key) == ("mirrored", D(2))
    at.check()


@pytest.mark.parametrize("dual", [True, False])
@pytest.mark.parametrize("coins_type", ["integer", "bigint", "numeric(20, 0)"])
def test_a_column_of_minor_units_counts_cents(database_url: str, coins_type: str, dual: bool) -> None:
    at = place(database_url, rows=2, unit="minor", coins="12345", coins_type=coins_type, flags=DUAL if dual else OFF)
    with at.engine.begin() as connection:
        assert at.adapter.balance(connection, 1).amount == D("123.45")
        assert at.adapter.credit(connection, 1, D("0.05"), type="deposit").legacy_balance == D("123.50")
        assert at.adapter.transfer(connection, 1, 2, D("0.01"), type="gift").payee_legacy_balance == D("123.46")
        at.adapter.set_balance(connection, 2, D("-7.03"), actor="admin:7", reason="case")
    assert (at.coins(1), at.coins(2)) == (12349, -703)
    at.check()


@pytest.mark.parametrize("dual", [True, False])
@pytest.mark.parametrize("coins_type", ["double precision", "real"])
def test_a_float_column_stays_exact_over_many_small_amounts(database_url: str, coins_type: str, dual: bool) -> None:
    at = place(database_url, rows=1, coins="0.1", coins_type=coins_type, flags=DUAL if dual else OFF)
    with at.engine.begin() as connection:
        credited = [at.adapter.credit(connection, 1, D("0.1"), type="deposit") for _ in range(30)]
        assert credited[-1].legacy_balance == D("3.10")
        assert at.adapter.debit(connection, 1, D("3.09"), type="booking").legacy_balance == D("0.01")
    assert at.coins(1) == pytest.approx(0.01)
    assert at.account(1) == (("mirrored", D("0.01")) if dual else None)
    at.check()


def test_a_key_and_columns_with_odd_names_are_quoted(database_url: str) -> None:
    at = custom(
        database_url,
        'create schema "Bank"; create table "Bank"."User" ("Id" bigint primary key, "Group" text not null, '
        '"TotalCoins" numeric(12, 2) not null); insert into "Bank"."User" values (1, \'acme\', 10)',
        {
            "name": "bank_users",
            "table": "Bank.User",
            "key": "Id",
            "traits": {"tenant": "Group"},
            "columns": [{"bucket": "cash", "column": "TotalCoins", "currency": "EUR", "scale": 2}],
        },
    )
    with at.engine.begin() as connection:
        assert at.adapter.credit(connection, 1, 5, type="deposit").legacy_balance == 15
        assert at.adapter.balance(connection, 1).amount == 15
    assert at.account(1) == ("mirrored", D(15))


def test_two_mappings_in_one_database_do_not_touch_each_other(make_database: MakeDatabase) -> None:
    url = make_database()
    at = place(url, rows=1)
    both = custom(
        url,
        "create table shops (id bigint primary key, till numeric(12, 2) not null); insert into shops values (1, 50)",
        {
            "name": "shops",
            "table": "public.shops",
            "key": "id",
            "columns": [{"bucket": "cash", "column": "till", "currency": "EUR", "scale": 2}],
        },
    )
    with at.engine.begin() as connection:
        at.adapter.credit(connection, 1, 5, type="deposit")
        posted = both.adapter.credit(connection, 1, 7, type="sale")
        with pytest.raises(UnknownTransaction):
            at.adapter.reverse(connection, posted.transaction_id or 0, reason="not mine")
    assert (at.account(1), both.account(1)) == (("mirrored", D(105)), ("mirrored", D(57)))
    at.check()
    both.check()
