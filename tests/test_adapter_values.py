"""Balances that do not fit their column, and legacy values that are no amount: refused, or left to legacy alone."""

from __future__ import annotations

from decimal import Decimal

import pytest

from adapting import DUAL, OFF, place
from ledger import execute
from refusing import Call, refusal
from walletmigrate.errors import AmountOverflow, LegacyValueInvalid

D = Decimal


# Overflow


@pytest.mark.parametrize("flags", [DUAL, OFF], ids=["on", "off"])
@pytest.mark.parametrize(
    ("coins_type", "unit", "scale", "top", "bottom"),
    [
        ("integer", "major", 0, D(2**31 - 1), D(-(2**31))),
        ("bigint", "minor", 2, D(2**63 - 1) / 100, D(-(2**63)) / 100),
        ("smallint", "minor", 2, D("327.67"), D("-327.68")),
        ("numeric(6, 2)", "major", 2, D("9999.99"), D("-9999.99")),
        ("numeric(8, 4)", "major", 2, D("9999.99"), D("-9999.99")),
    ],
)
def test_a_balance_that_does_not_fit_the_column_is_refused(
    database_url: str,
    flags: dict[str, bool],
    coins_type: str,
    unit: str,
    scale: int,
    top: Decimal,
    bottom: Decimal,
) -> None:
    at = place(database_url, rows=2, coins_type=coins_type, unit=unit, scale=scale, coins="0", flags=flags)
    room = top - 1
    with at.engine.begin() as connection:
        at.adapter.set_balance(connection, 2, room, actor="admin:7", reason="fill")
    unit_amount = D(1).scaleb(-scale)
    with refusal(at, AmountOverflow) as got:
        at.adapter.credit(got[0], 2, 1 + unit_amount, type="deposit")
    assert (got[1].key, got[1].balance, got[1].column) == (2, top + unit_amount, "total_coins")
    with refusal(at, AmountOverflow) as got:
        at.adapter.transfer(got[0], 1, 2, 2, type="gift")
    assert (got[1].key, got[1].balance) == (2, top + 1)
    with refusal(at, AmountOverflow) as got:
        at.adapter.set_balance(got[0], 1, top + unit_amount, actor="admin:7", reason="case")
    assert (got[1].key, got[1].balance) == (1, top + unit_amount)
    with refusal(at, AmountOverflow, 2) as got:
        at.adapter.set_balance(got[0], 1, bottom - unit_amount, actor="admin:7", reason="case")
    with at.engine.begin() as connection:
        at.adapter.set_balance(connection, 1, bottom, actor="admin:7", reason="case")
        assert at.adapter.set_balance(connection, 2, top, actor="admin:7", reason="case").legacy_balance == top
    with refusal(at, AmountOverflow, 1) as got:
        at.adapter.debit(got[0], 1, unit_amount, type="fee")
    assert (got[1].key, got[1].balance) == (1, bottom - unit_amount)
    at.check()


def test_a_payer_that_would_leave_the_column_s_range_is_the_one_named(database_url: str) -> None:
    at = place(database_url, rows=2, coins_type="numeric(6, 2)", coins="-9999")
    with refusal(at, AmountOverflow) as got:
        at.adapter.transfer(got[0], 1, 2, 5, type="gift")
    assert (got[1].key, got[1].balance) == (1, D("-10004"))


# Legacy values


@pytest.mark.parametrize("flags", [DUAL, OFF], ids=["on", "off"])
@pytest.mark.parametrize("value", ["null", "'NaN'", "'Infinity'", "'-Infinity'"])
def test_a_legacy_value_that_is_no_amount_is_refused(database_url: str, value: str, flags: dict[str, bool]) -> None:
    at = place(database_url, rows=2, coins_type="numeric", flags=flags)
    execute(at.engine, f"update users set total_coins = {value} where id = 2")
    calls: list[Call] = [
        lambda adapter, on: adapter.credit(on, 2, 1, type="deposit"),
        lambda adapter, on: adapter.debit(on, 2, 1, type="booking"),
        lambda adapter, on: adapter.transfer(on, 1, 2, 1, type="gift"),
        lambda adapter, on: adapter.transfer(on, 2, 1, 1, type="gift"),
    ]
    for call in calls:
        with refusal(at, LegacyValueInvalid) as got:
            call(at.adapter, got[0])
        assert (got[1].key, got[1].column) == (2, "total_coins")


def test_under_shadow_an_inexact_legacy_value_goes_on_alone(database_url: str) -> None:
    at = place(database_url, rows=1, coins_type="numeric")
    execute(at.engine, "update users set total_coins = 100.005")
    with at.engine.begin() as connection:
        result = at.adapter.credit(connection, 1, 5, type="deposit")
    assert (result.mode, result.outcome, result.ledger_balance) == ("legacy", "ledger_failed", None)
    assert (at.coins(1), at.account(1)) == (D("105.005"), None)
    at.check()


def test_under_strict_an_inexact_legacy_value_is_refused(database_url: str) -> None:
    at = place(database_url, rows=2, coins_type="numeric", policy="strict")
    execute(at.engine, "update users set total_coins = 100.005 where id = 2")
    with refusal(at, LegacyValueInvalid) as got:
        at.adapter.credit(got[0], 2, 5, type="deposit")
    with refusal(at, LegacyValueInvalid) as got:
        at.adapter.transfer(got[0], 1, 2, 5, type="gift")
    assert got[1].key == 2
