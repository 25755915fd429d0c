"""Verify turns what differs stale, and leaves what it must not touch as it is."""

from __future__ import annotations

import threading
from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import text

from ledger import ACT, engine_named, execute, fence_down, rows, scalar, unguarded, until_blocked
from verifying import Ledger, assert_only, made, marks, prepared, run, states_of
from walletmigrate import marking
from walletmigrate.backfill import backfill
from walletmigrate.verify import Verification

__all__ = ["made"]


@pytest.mark.parametrize("options", [{}, {"key_type": "text"}, {"key_type": "uuid"}], ids=["bigint", "text", "uuid"])
def test_a_drifted_account_is_turned_stale_and_a_backfill_brings_it_up(
    database_url: str, options: dict[str, Any]
) -> None:
    made = prepared(database_url, **options)
    engine, settings = made
    key = rows(engine, "select u.id::text from users as u order by u.id")[3][0]
    with fence_down(*made) as superuser:
        superuser.execute(text("update users set total_coins = 125 where id::text = :key"), {"key": key})
    result = run(made, mark_stale=True)
    assert_only(result, "drift")
    assert (result.drift_accounts, result.turned_stale) == (1, 1)
    assert states_of(engine) == {f"{key} cash": "stale"}
    assert scalar(engine, "select state_reason from wallet.accounts where state = 'stale'") == f"verify: {ACT.reason}"
    assert marks(engine) == [{"differed": 1, "turned_stale": 1, "keys": [key], "closed": 0, "closed_keys": []}]
    assert_only(run(made), "behind")
    done = backfill(engine, settings, settings.mapping(), ACT)
    assert (done.opened, done.resynced) == (0, 1)
    query = "select kind::text, amount, job_id from wallet.transactions order by id desc limit 1"
    assert rows(engine, query) == [("resync", Decimal(25), done.job_id)]
    after = run(made, mark_stale=True)
    assert (after.clean, after.turned_stale) == (True, 0)
    assert len(marks(engine)) == 1


def test_an_account_that_is_healed_before_it_can_be_locked_is_left_alone(made: Ledger, database_url: str) -> None:
    engine, settings = made
    with fence_down(*made) as superuser:
        superuser.exec_driver_sql("update users set total_coins = 125 where id in (4, 5)")
    found: list[Verification] = []
    marker = engine_named(database_url, "marker")
    thread = threading.Thread(target=lambda: found.append(run((marker, settings), mark_stale=True)))
    with unguarded(engine, "users") as superuser:
        superuser.exec_driver_sql("update users set total_coins = 100 where id = 4")
        thread.start()
        until_blocked(engine, "marker")
    thread.join()
    assert [drift.key for drift in found[0].drift] == ["4", "5"]
    assert found[0].turned_stale == 1
    assert states_of(engine) == {"5 cash": "stale"}
    assert marks(engine) == [{"differed": 2, "turned_stale": 1, "keys": ["5"], "closed": 0, "closed_keys": []}]


def test_a_dry_run_says_how_many_would_be_turned_stale_and_turns_none(made: Ledger) -> None:
    with fence_down(*made) as superuser:
        superuser.exec_driver_sql("update users set total_coins = 125 where id in (4, 5)")
    assert run(made, mark_stale=True, dry_run=True).turned_stale == 2
    assert (states_of(made[0]), marks(made[0])) == ({}, [])
    assert run(made).turned_stale is None
    assert (states_of(made[0]), marks(made[0])) == ({}, [])


def test_frozen_and_closed_accounts_are_left_as_they_are(made: Ledger) -> None:
    execute(made[0], "delete from users where id = 6")
    with fence_down(*made) as superuser:
        superuser.exec_driver_sql("delete from users where id = 5")
        superuser.exec_driver_sql("insert into users values (6, 'globex', 'member', 7, 0)")
    execute(made[0], "update wallet.accounts set state = 'frozen' where key = '4'")
    with unguarded(made[0], "users") as superuser:
        superuser.exec_driver_sql("delete from users where id = 4")
    result = run(made, mark_stale=True)
    assert [(drift.key, drift.state, drift.problem) for drift in result.drift] == [
        ("4", "frozen", "orphan"),
        ("5", "mirrored", "orphan"),
        ("6", "closed", "reopened"),
    ]
    assert (result.turned_stale, result.closed) == (0, 1)
    assert states_of(made[0]) == {"4 cash": "frozen", "5 cash": "closed", "6 cash": "closed"}


def test_more_than_a_batch_and_more_than_the_listed_differences_are_turned_stale(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = prepared(database_url, with_promo=True)
    monkeypatch.setattr(marking, "BATCH", 2)
    monkeypatch.setattr(marking, "LISTED", 3)
    with fence_down(*made) as superuser:
        superuser.exec_driver_sql("update users set total_coins = 125 where id between 4 and 8")
        superuser.exec_driver_sql("update users set promo = 6 where id = 7")
    result = run(made, mark_stale=True, limit=1)
    assert (len(result.drift), result.drift_accounts, result.turned_stale) == (1, 6, 6)
    assert set(states_of(made[0])) == {*(f"{key} cash" for key in range(4, 9)), "7 promo"}
    assert marks(made[0]) == [
        {"differed": 6, "turned_stale": 6, "keys": ["4", "5", "6"], "closed": 0, "closed_keys": []}
    ]
