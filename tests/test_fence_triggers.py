"""The fence beside others: triggers of the application, and transactions with snapshots of before."""

from __future__ import annotations

import pytest
from sqlalchemy.engine.interfaces import IsolationLevel

import interleaving
from fencing import DELETE, FROZEN, INSERT, NEW_KEY, TRUNCATE, UPDATE, World, application_trigger, make_world, world
from interleaving import LEVELS, READ_COMMITTED, REPEATABLE_READ, SERIALIZABLE, outcome
from ledger import execute, scalar, unguarded
from walletmigrate.errors import LedgerMismatch, LegacyUpdateSuppressed

__all__ = ["world"]

BONUS = "new.total_coins := new.total_coins + 1; return new;"


def test_a_before_trigger_that_changes_the_balance_turns_a_posted_account_stale(world: World) -> None:
    world.bring("mirrored")
    application_trigger(world, "before update", BONUS)
    with world.engine.begin() as connection:
        posted = world.adapter().credit(connection, 1, 10, type="test")
    assert posted.mismatch
    assert [posted.legacy_balance, posted.ledger_balance] == [111, 110]
    assert (world.state(), world.legacy()) == ("stale", 111)
    assert scalar(world.engine, "select sqlstate from wallet.failures") == "WM020"


def test_a_before_trigger_that_changes_the_balance_is_refused_by_the_strict_policy(database_url: str) -> None:
    world = make_world(database_url, policy="strict")
    world.bring("mirrored")
    application_trigger(world, "before update", BONUS)
    with world.engine.connect() as connection:
        with pytest.raises(LedgerMismatch):
            world.adapter().credit(connection, 1, 10, type="test")
        connection.rollback()
    assert (world.state(), world.legacy()) == ("mirrored", 100)
    world.assert_sound()


def test_a_before_trigger_that_changes_an_unassigned_balance_is_seen(world: World) -> None:
    world.bring("mirrored", key=2)
    world.bring("frozen", key=1)
    execute(world.engine, "select * from wallet.unfreeze_users('1', null)")
    assert (world.state(1), world.state(2)) == ("frozen", "mirrored")
    application_trigger(world, "before update", BONUS)
    assert world.write("update users set role = 'vip' where id = 2") == ""
    assert world.state(2) == "stale"
    assert world.write("update users set role = 'vip' where id = 1") == FROZEN


def test_a_before_trigger_that_changes_a_key_which_no_statement_names_is_seen(world: World) -> None:
    world.bring("mirrored", key=2)
    world.bring("frozen", key=1)
    execute(world.engine, "select * from wallet.unfreeze_users('1', null)")
    application_trigger(world, "before update", "new.id := new.id + 100; return new;")
    assert world.write("update users set role = 'vip' where id = 2") == ""
    assert world.state(2) == "closed"
    assert world.write("update users set role = 'vip' where id = 1") == FROZEN


def test_a_before_trigger_that_suppresses_the_update_is_an_error_not_a_lost_write(world: World) -> None:
    world.bring("mirrored")
    application_trigger(world, "before update", "return null;")
    with world.engine.connect() as connection:
        with pytest.raises(LegacyUpdateSuppressed):
            world.adapter().credit(connection, 1, 10, type="test")
        connection.rollback()
    assert (world.state(), world.legacy()) == ("mirrored", 100)


OTHER_ROW = "update users set total_coins = total_coins + 1 where id = 2; return null;"
SAME_ROW = "update users set total_coins = total_coins + 1 where id = new.id; return null;"


def test_an_after_trigger_that_writes_another_row_turns_only_that_one_stale(world: World) -> None:
    world.bring("mirrored", key=1)
    world.bring("mirrored", key=2)
    application_trigger(world, "after update", OTHER_ROW)
    with world.engine.begin() as connection:
        posted = world.adapter().credit(connection, 1, 10, type="test")
    assert posted.mismatch is False
    assert (world.state(1), world.state(2), world.legacy(2)) == ("mirrored", "stale", 101)


@pytest.mark.parametrize("name", ["a_first", "z_last"])
def test_an_after_trigger_that_writes_the_same_row_again_turns_it_stale(world: World, name: str) -> None:
    world.bring("mirrored")
    application_trigger(world, "after update", SAME_ROW)
    assert world.write(f"alter trigger app_trigger on users rename to {name}") == ""
    with world.engine.begin() as connection:
        world.adapter().credit(connection, 1, 10, type="test")
    assert (world.state(), world.legacy()) == ("stale", 111)


def test_an_after_trigger_that_writes_a_frozen_row_fails_the_whole_statement(world: World) -> None:
    world.bring("frozen", key=2)
    application_trigger(world, "after update", OTHER_ROW)
    assert world.write(UPDATE) == FROZEN
    assert (world.legacy(1), world.legacy(2)) == (100, 100)


def test_a_deferred_trigger_that_writes_at_commit_meets_the_fence(world: World) -> None:
    world.bring("mirrored", key=1)
    world.bring("mirrored", key=2)
    function = f"create function late() returns trigger language plpgsql as $$ begin {OTHER_ROW} end $$"
    trigger = (
        "create constraint trigger late after update on users deferrable initially deferred "
        "for each row when (new.id = 1) execute function late()"
    )
    assert world.write(function, trigger) == ""
    with world.engine.begin() as connection:
        world.adapter().credit(connection, 1, 10, type="test")
    assert (world.state(1), world.state(2)) == ("mirrored", "stale")


# Snapshots older than what happened


@pytest.mark.parametrize("isolation", [REPEATABLE_READ, SERIALIZABLE])
@pytest.mark.parametrize("statement", [UPDATE, DELETE, NEW_KEY], ids=["update", "delete", "key change"])
def test_a_raw_writer_whose_snapshot_is_older_than_the_opening_gets_40001(
    world: World, database_url: str, isolation: IsolationLevel, statement: str
) -> None:
    with interleaving.stage(database_url) as stage:
        old = stage.session(isolation)
        old.look()
        execute(world.engine, "select * from wallet.backfill_users(null, null, null)")
        assert outcome(lambda: old.sql(statement)) == "40001"
        old.rollback()
    assert (world.state(), world.legacy()) == ("mirrored", 100)


@pytest.mark.parametrize("isolation", LEVELS)
def test_a_truncate_never_leaves_an_account_mirrored_that_its_snapshot_does_not_see(
    world: World, database_url: str, isolation: IsolationLevel
) -> None:
    with interleaving.stage(database_url) as stage:
        old = stage.session(isolation)
        old.look()
        execute(world.engine, "select * from wallet.backfill_users(null, null, null)")
        result = outcome(lambda: old.sql(TRUNCATE))
        old.commit()
    if isolation == READ_COMMITTED:
        assert (result, world.state()) == ([], "closed")
    else:
        assert (result, world.state()) == ("0A000", "mirrored")


@pytest.mark.parametrize("isolation", [REPEATABLE_READ, SERIALIZABLE])
def test_an_insert_whose_snapshot_is_older_than_the_closing_leaves_no_closed_account_with_a_row(
    world: World, database_url: str, isolation: IsolationLevel
) -> None:
    with interleaving.stage(database_url) as stage:
        old = stage.session(isolation)
        old.look()
        world.bring("closed")
        assert outcome(lambda: old.sql(INSERT)) == "40001"
        old.rollback()
    assert world.state() == "closed"


def test_a_row_that_comes_again_holds_its_account_until_it_is_there(world: World, database_url: str) -> None:
    """Else a closing, which finds no row yet, would close an account whose row then comes."""
    world.bring("stale")
    with unguarded(world.engine, "users") as connection:
        connection.exec_driver_sql(DELETE)
    close = "select wallet.close_users(id, 'gone') from wallet.accounts where key = '1' and bucket = 'cash'"
    with interleaving.stage(database_url) as stage:
        raw, closing_one = stage.session(), stage.session()
        raw.sql(INSERT)
        waiting = closing_one.waiting(lambda connection: connection.exec_driver_sql(close).scalar_one(), on=raw)
        raw.commit()
        assert waiting.result(interleaving.PATIENCE_SECONDS) is False
        closing_one.commit()
    assert world.state() == "stale"
