"""Verify compares accounts with their rows: whatever is wrong is found, and what is right is not called wrong."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import text

from ledger import ACT, add_users, execute, fence_down, install_users, unguarded
from verifying import ROWS, Ledger, assert_only, made, prepared, run
from walletmigrate.backfill import backfill
from walletmigrate.verify import Drift

__all__ = ["made"]

CENT = Decimal("0.01")


def test_a_ledger_that_follows_its_legacy_table_is_clean(made: Ledger) -> None:
    result = run(made)
    assert result.clean
    assert (result.accounts, result.missing, result.stale, result.drift_accounts) == (ROWS, 0, 0, 0)
    assert (result.drift, result.behind, result.journal, result.guards) == ((), (), (), ())
    assert dict(result.states) == {"mirrored": ROWS}
    assert dict(result.imbalance) == {"EUR": 0}
    assert dict(result.legacy_total) == dict(result.ledger_total) == {"EUR": Decimal("907.50")}
    assert result.seconds > 0


@pytest.mark.parametrize(
    "options",
    [
        {"key_type": "text"},
        {"key_type": "uuid"},
        {"with_promo": True},
        {"coins_type": "bigint", "coins": "10000", "unit": "minor"},
        {"coins_type": "double precision", "coins": "100.1 + 0.2"},
        {"coins_type": "bigint", "scale": 0, "coins": "100"},
    ],
    ids=["text", "uuid", "two columns", "cents", "float", "whole"],
)
def test_every_kind_of_mapping_is_clean_when_it_is_right_and_not_when_it_is_wrong(
    database_url: str, options: dict[str, Any]
) -> None:
    if options.get("scale") == 0:
        engine, settings = install_users(database_url, rows=ROWS, phase="dual_write", **options)
        backfill(engine, settings, settings.mapping(), ACT)
        made = engine, settings
    else:
        made = prepared(database_url, **options)
    clean = run(made)
    assert clean.clean, clean
    assert clean.accounts == ROWS * len(made[1].mapping().columns)
    execute(
        made[0], "update wallet.accounts set balance = balance + 1 where id = (select max(id) from wallet.accounts)"
    )
    assert_only(run(made), "drift", "journal", "imbalance")


@pytest.mark.parametrize("change", [1, -1])
@pytest.mark.parametrize("unit", [CENT, Decimal(1)])
def test_drift_of_one_unit_in_the_legacy_column_is_found(made: Ledger, change: int, unit: Decimal) -> None:
    with fence_down(*made) as superuser:
        statement = text("update users set total_coins = total_coins + :change where id = 4")
        superuser.execute(statement, {"change": change * unit})
    result = run(made)
    assert_only(result, "drift")
    assert result.drift == (Drift("4", "cash", "EUR", 100 + change * unit, Decimal(100), "mirrored", "differs"),)
    assert (result.drift_accounts, dict(result.drift_amount)) == (1, {"EUR": unit})
    assert result.legacy_total["EUR"] - result.ledger_total["EUR"] == change * unit


@pytest.mark.parametrize("change", [1, -1])
def test_drift_of_one_unit_in_the_ledger_is_found(made: Ledger, change: int) -> None:
    execute(made[0], "update wallet.accounts set balance = balance + :change where key = '4'", change=change)
    result = run(made)
    assert_only(result, "drift", "journal", "imbalance")
    assert [(drift.key, drift.legacy, drift.ledger) for drift in result.drift] == [
        ("4", Decimal(100), Decimal(100 + change))
    ]
    assert dict(result.imbalance) == {"EUR": change}
    assert {(problem.key, problem.expected, problem.found) for problem in result.journal} == {
        ("4", Decimal(100), Decimal(100 + change))
    }


def test_a_shift_of_money_from_one_account_to_another_is_found_though_the_sums_are_right(made: Ledger) -> None:
    with fence_down(*made) as superuser:
        superuser.exec_driver_sql("update users set total_coins = 101 where id = 4")
        superuser.exec_driver_sql("update users set total_coins = 99 where id = 5")
    result = run(made)
    assert_only(result, "drift")
    assert [drift.key for drift in result.drift] == ["4", "5"]
    assert result.drift_amount["EUR"] == 2
    assert result.legacy_total == result.ledger_total


def test_a_missing_account_is_found(made: Ledger) -> None:
    add_users(made[0], ROWS + 1, ROWS + 1)
    result = run(made)
    assert_only(result, "behind")
    assert (result.missing, result.accounts) == (1, ROWS)
    assert result.behind == (Drift("11", "cash", "EUR", Decimal(100), None, "absent", "missing"),)


def test_a_stale_account_is_found_and_its_difference_is_no_drift(made: Ledger) -> None:
    execute(made[0], "update users set total_coins = 1 where id = 4")
    result = run(made)
    assert_only(result, "behind")
    assert (result.missing, result.stale) == (0, 1)
    assert result.behind == (Drift("4", "cash", "EUR", Decimal(1), Decimal(100), "stale", "stale"),)


@pytest.mark.parametrize("state", ["mirrored", "stale"])
def test_an_orphan_is_found(made: Ledger, state: str) -> None:
    if state == "stale":
        execute(made[0], "update users set total_coins = 1 where id = 4")
    with fence_down(*made) as superuser:
        superuser.exec_driver_sql("delete from users where id = 4")
    result = run(made)
    assert_only(result, "drift")
    assert result.drift == (Drift("4", "cash", "EUR", None, Decimal(100), state, "orphan"),)
    assert result.drift_amount["EUR"] == 100


def test_an_account_that_closed_with_its_row_is_in_order(made: Ledger) -> None:
    execute(made[0], "delete from users where id = 4")
    result = run(made)
    assert result.clean
    assert dict(result.states) == {"closed": 1, "mirrored": ROWS - 1}
    assert result.legacy_total == result.ledger_total == {"EUR": Decimal("807.50")}


def test_a_closed_account_whose_row_lives_is_found(made: Ledger) -> None:
    execute(made[0], "delete from users where id = 4")
    with fence_down(*made) as superuser:
        superuser.exec_driver_sql("insert into users values (4, 'acme', 'member', 100, 0)")
    result = run(made)
    assert_only(result, "drift")
    assert result.drift == (Drift("4", "cash", "EUR", Decimal(100), Decimal(100), "closed", "reopened"),)


@pytest.mark.parametrize("value", ["null", "'NaN'"])
def test_a_legacy_value_that_is_no_amount_is_found(made: Ledger, value: str) -> None:
    # Install would refuse such a value, so the fence keeps the trace of having been off.
    with unguarded(made[0], "users") as superuser:
        superuser.exec_driver_sql(f"update users set total_coins = {value} where id = 4")
    result = run(made)
    assert_only(result, "drift", "guards")
    assert result.drift == (Drift("4", "cash", "EUR", None, Decimal(100), "mirrored", "no_value"),)


def test_a_null_of_an_account_that_turned_stale_is_listed_with_it(made: Ledger) -> None:
    execute(made[0], "update users set total_coins = null where id = 4")
    result = run(made)
    assert_only(result, "behind")
    assert [(one.key, one.legacy, one.problem) for one in result.behind] == [("4", None, "stale")]
