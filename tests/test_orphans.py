"""Accounts whose legacy row went away past the fence: found by verify, closed by --mark-stale."""

from __future__ import annotations

import threading
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine
from sqlalchemy.exc import ProgrammingError

import commandline
from invariants import assert_sound
from ledger import ACT, engine_named, execute, fence_down, install_users, rows, scalar, unguarded, until_blocked
from walletmigrate.backfill import backfill
from walletmigrate.config import Settings
from walletmigrate.verify import Verification, verify

Ledger = tuple[Engine, Settings]


def prepared(url: str, **options: Any) -> Ledger:
    engine, settings = install_users(url, phase="dual_write", **options)
    backfill(engine, settings, settings.mapping(), ACT)
    return engine, settings


@pytest.fixture
def made(database_url: str) -> Ledger:
    return prepared(database_url)


def run(made: Ledger, **options: Any) -> Verification:
    return verify(*made, made[1].mapping(), ACT, **options)


def gone(made: Ledger, *keys: int) -> None:
    """Rows deleted past the fence."""
    with fence_down(*made) as superuser:
        superuser.exec_driver_sql(f"delete from users where id in ({', '.join(map(str, keys))})")


def states(engine: Engine) -> list[tuple[Any, ...]]:
    query = "select key, bucket, state::text, balance from wallet.accounts where state <> 'mirrored' order by 1, 2"
    return rows(engine, query)


@pytest.mark.parametrize("state", ["mirrored", "stale"])
def test_an_orphan_is_closed_on_record_and_verify_is_clean_again(made: Ledger, state: str) -> None:
    engine, settings = made
    if state == "stale":
        execute(engine, "update users set total_coins = 1 where id = 4")
    gone(made, 4)
    result = run(made, mark_stale=True)
    assert [(drift.key, drift.state, drift.problem) for drift in result.drift] == [("4", state, "orphan")]
    assert (result.turned_stale, result.closed) == (0, 1)
    assert states(engine) == [("4", "cash", "closed", Decimal(100))]
    reason = "select state_reason from wallet.accounts where state = 'closed'"
    assert scalar(engine, reason) == f"verify: {ACT.reason}"
    audit = "select actor, details from wallet.audit_log where action = 'verify mark-stale'"
    facts = {"differed": 1, "turned_stale": 0, "keys": [], "closed": 1, "closed_keys": ["4"]}
    assert rows(engine, audit) == [(ACT.actor, facts)]
    after = run(made, mark_stale=True)
    assert (after.clean, after.closed) == (True, 0)
    assert_sound(engine, settings)


@pytest.mark.parametrize("options", [{"key_type": "text"}, {"key_type": "uuid"}, {"with_promo": True}])
def test_orphans_of_every_key_type_and_bucket_are_closed(database_url: str, options: dict[str, Any]) -> None:
    made = prepared(database_url, **options)
    engine, settings = made
    with fence_down(*made) as superuser:
        superuser.exec_driver_sql("delete from users where id in (select id from users order by id limit 3)")
        superuser.exec_driver_sql(
            "update users set total_coins = 7 where id = (select max(id::text) from users)::text::"
            f"{options.get('key_type', 'bigint')}"
        )
    result = run(made, mark_stale=True)
    buckets = len(settings.mapping().columns)
    assert (result.turned_stale, result.closed) == (1, 3 * buckets)
    assert [state for _, _, state, _ in states(engine)].count("closed") == 3 * buckets


def test_a_dry_run_says_how_many_would_be_closed_and_closes_none(made: Ledger) -> None:
    gone(made, 4, 5)
    assert run(made, mark_stale=True, dry_run=True).closed == 2
    assert (run(made).closed, states(made[0])) == (None, [])


def test_a_row_that_is_back_before_its_account_can_be_locked_keeps_it(made: Ledger, database_url: str) -> None:
    """The row comes back past the fence, as a restore would bring it, while the mark waits for the account."""
    engine, settings = made
    gone(made, 4, 5)
    found: list[Verification] = []
    marker = engine_named(database_url, "marker", lock_timeout_ms=60_000)
    thread = threading.Thread(target=lambda: found.append(run((marker, settings), mark_stale=True)))
    with engine.begin() as restorer:
        restorer.exec_driver_sql("set local session_replication_role = replica")
        restorer.exec_driver_sql("select from wallet.accounts where key = '4' for update")
        thread.start()
        until_blocked(engine, "marker")
        with unguarded(engine_named(database_url), "users") as superuser:
            superuser.exec_driver_sql("insert into users values (4, 'globex', 'member', 100, 5)")
    thread.join()
    assert found[0].closed == 1
    assert states(engine) == [("5", "cash", "closed", Decimal(100))]


def test_a_row_that_is_inserted_after_its_account_was_closed_turns_it_stale(made: Ledger) -> None:
    engine, settings = made
    gone(made, 4)
    run(made, mark_stale=True)
    execute(engine, "insert into users values (4, 'globex', 'member', 30, 5)")
    assert states(engine) == [("4", "cash", "stale", Decimal(100))]
    assert backfill(engine, settings, settings.mapping(), ACT).resynced == 1
    assert run(made).clean


def test_operators_close_orphans_and_applications_cannot(made: Ledger, database_url: str) -> None:
    gone(made, 4)
    call = "select wallet.close_users((select id from wallet.accounts where key = '4'), 'by hand')"
    with pytest.raises(ProgrammingError, match="permission denied"):
        execute(engine_named(database_url, role="wallet_app"), call)
    live = "select wallet.close_users((select id from wallet.accounts where key = '5'), 'by hand')"
    operator = engine_named(database_url, role="wallet_operator")
    with operator.begin() as connection:
        assert connection.exec_driver_sql(live).scalar() is False
        assert connection.exec_driver_sql(call).scalar() is True
    assert states(made[0]) == [("4", "cash", "closed", Decimal(100))]


def test_the_command_says_what_it_closed(database_url: str, tmp_path: Path) -> None:
    project, engine = commandline.project_at(tmp_path, database_url, "dual_write")
    with unguarded(engine, "users") as superuser:
        superuser.exec_driver_sql("delete from users where id in (4, 5)")
        superuser.exec_driver_sql("update users set total_coins = 7 where id = 6")
    wanted = project.run("verify", "--mark-stale", "--dry-run").stdout.splitlines()
    assert "  would be turned stale: 1 accounts" in wanted
    assert "  would be closed, their rows are gone: 2 accounts" in wanted
    said = project.run("verify", "--mark-stale", *commandline.REASON)
    assert said.exit_code == 3
    assert "  turned stale: 1 accounts" in said.stdout.splitlines()
    assert "  closed, their rows are gone: 2 accounts" in said.stdout.splitlines()
