"""What reviews found: each test failed on the code before its fix."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal

import pytest
from sqlalchemy import Engine, create_engine

from invariants import assert_sound
from ledger import ACT, execute, install_users, post, rows, scalar, set_phase, users_settings
from walletmigrate import LegacyBalanceAdapter, StaticSource, connect, gates
from walletmigrate.backfill import backfill
from walletmigrate.config import Settings
from walletmigrate.errors import PreconditionRefused
from walletmigrate.freeze import freeze, unfreeze
from walletmigrate.install import install, uninstall
from walletmigrate.undo import undo
from walletmigrate.verify import verify


def test_a_key_moves_money_once_though_a_process_still_believes_that_no_ledger_is_installed(database_url: str) -> None:
    engine = create_engine(connect.parsed(database_url))
    execute(engine, "create table users (id bigint primary key, tenant text, role text, total_coins numeric(20, 2))")
    execute(engine, "insert into users values (1, 'acme', 'member', 100)")
    settings = users_settings(database_url)
    early, late = (LegacyBalanceAdapter(settings, StaticSource()) for _ in range(2))
    with engine.begin() as connection:
        assert early.credit(connection, 1, 10, type="deposit").legacy_balance == 110
    install(engine, settings, ACT)
    for adapter, replayed in ((early, False), (late, True), (early, True)):
        with engine.begin() as connection:
            found = adapter.credit(connection, 1, 10, type="deposit", idempotency_key="once")
            assert found.replayed is replayed
    assert scalar(engine, "select total_coins from users") == 120
    engine.dispose()


def test_unfreeze_leaves_every_bucket_of_a_row_mirrored(database_url: str) -> None:
    engine, settings = install_users(database_url, rows=3, with_promo=True, phase="wallet_only")
    mapping = settings.mapping(None)
    backfill(engine, settings, mapping, ACT)
    set_phase(engine, "frozen")
    freeze(engine, settings, mapping, ACT)
    with engine.begin() as connection:
        post(connection, settings, "credit", 1, 10)
        post(connection, settings, "credit", 1, 7, bucket="promo")
    set_phase(engine, "wallet_only")
    assert unfreeze(engine, settings, mapping, ACT).changed == 6
    assert rows(engine, "select total_coins, promo from users where id = 1") == [(110, 12)]
    assert rows(engine, "select distinct state::text from wallet.accounts") == [("mirrored",)]
    assert_sound(engine, settings)


def hidden_by_a_resync(engine: Engine, settings: Settings, _job: int) -> None:
    execute(engine, "delete from wallet.bypasses")  # as a prune does: the account's own reason is left


def hidden_by_an_undo(engine: Engine, settings: Settings, job: int) -> None:
    undo(engine, settings, job, ACT)


def hidden_by_a_mark(engine: Engine, settings: Settings, _job: int) -> None:
    backfill(engine, settings, settings.mapping(None), ACT)
    execute(engine, "update wallet.accounts set balance = balance + 1 where key = '3'")
    assert verify(engine, settings, settings.mapping(None), ACT, mark_stale=True).turned_stale == 1


def hidden_by_a_freeze(engine: Engine, settings: Settings, _job: int) -> None:
    backfill(engine, settings, settings.mapping(None), ACT)
    set_phase(engine, "frozen")
    freeze(engine, settings, settings.mapping(None), ACT)
    set_phase(engine, "wallet_only")
    unfreeze(engine, settings, settings.mapping(None), ACT)


@pytest.mark.parametrize("hide", [hidden_by_a_resync, hidden_by_an_undo, hidden_by_a_mark, hidden_by_a_freeze])
def test_nothing_hides_that_an_account_was_written_past_the_adapter(
    database_url: str, hide: Callable[[Engine, Settings, int], None]
) -> None:
    engine, settings = install_users(database_url, phase="dual_write")
    job = backfill(engine, settings, settings.mapping(None), ACT).job_id
    assert job is not None
    execute(engine, "update users set total_coins = total_coins + 1 where id = 3")
    hide(engine, settings, job)
    backfill(engine, settings, settings.mapping(None), ACT)
    assert scalar(engine, "select state::text from wallet.accounts where key = '3'") == "mirrored"
    with engine.begin() as connection:
        found = [what for what, _ in gates.reasons(connection, settings, StaticSource(), "read_ledger")]
    assert len([what for what in found if "1 accounts written past the adapter" in what]) == 1


def test_freezing_is_refused_while_a_check_of_the_application_could_close_the_way_back(database_url: str) -> None:
    engine, settings = install_users(database_url, phase="wallet_only")
    execute(engine, "alter table users add constraint never_negative check (total_coins >= 0)")
    with engine.begin() as connection:
        found = [what for what, _ in gates.reasons(connection, settings, StaticSource(), "frozen")]
        floored = users_settings(database_url, floor=Decimal(0))
        mended = [what for what, _ in gates.reasons(connection, floored, StaticSource(), "frozen")]
    assert any("never_negative" in what for what in found)
    assert not any("never_negative" in what for what in mended)


def test_an_uninstall_does_not_let_a_later_install_change_what_accounts_mean(database_url: str) -> None:
    engine, settings = install_users(database_url, coins="1000", coins_type="bigint", unit="minor", phase="dual_write")
    backfill(engine, settings, settings.mapping(None), ACT)
    set_phase(engine, "legacy")
    uninstall(engine, settings, ACT)
    with pytest.raises(PreconditionRefused, match="another table, key, column, scale or unit"):
        install(engine, users_settings(database_url, scale=0), ACT)
    install(engine, settings, ACT)


def test_row_level_security_that_came_later_never_closes_a_live_account(database_url: str) -> None:
    engine, settings = install_users(database_url, phase="dual_write")
    backfill(engine, settings, settings.mapping(None), ACT)
    execute(engine, "alter table users enable row level security")
    with engine.connect() as connection:
        with pytest.raises(Exception, match="row-level security hides rows"):
            post(connection, settings, "credit", 1, 1)
        connection.rollback()
    assert scalar(engine, "select state::text from wallet.accounts where key = '1'") == "mirrored"
    assert_sound(engine, settings)
