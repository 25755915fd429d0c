"""The long way of a posting, where an account was opened, or changed its state, behind its back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy import Connection, text
from sqlalchemy.engine.interfaces import IsolationLevel

import interleaving
from interleaving import REPEATABLE_READ, SERIALIZABLE, of, outcome
from ledger import execute, install_users
from walletmigrate.capture import turn_stale
from worlds import World

BACKFILL = "select wallet.backfill_users(null, null, null)"
LEG = """
select (wallet.leg_users(
    jsonb_populate_record(null::wallet.movement, cast(:movement as jsonb)), 'strict', false
)).mode
"""
CREDIT = (
    '{"operation": "credit", "creditor": "1", "bucket": "cash", "currency": "EUR", "amount": 5, "dual": true, '
    '"type": "test"}'
)

above = pytest.mark.parametrize("isolation", [REPEATABLE_READ, SERIALIZABLE])


@pytest.fixture
def world(database_url: str) -> Iterator[World]:
    """Two users, absent from the ledger, under the strict policy."""
    engine, settings = install_users(database_url, rows=2, policy="strict", phase="dual_write")
    with interleaving.stage(database_url) as stage:
        yield World(engine, settings, stage)


def leg(connection: Connection) -> object:
    """The ledger's part alone, of a caller that does not lock the row first."""
    return connection.execute(text(LEG), {"movement": CREDIT}).scalar_one()


@above
def test_who_would_open_an_account_that_was_opened_since_has_to_try_again(
    world: World, isolation: IsolationLevel
) -> None:
    old = world.stage.session(isolation)
    old.look()
    execute(world.engine, BACKFILL)
    adapter = world.adapter()
    result = outcome(lambda: old.do(lambda on: adapter.set_balance(on, 1, 120, actor="admin:7", reason="case").mode))
    old.rollback()
    assert result == "40001"
    assert world.accounts() == [("1", "mirrored", 100), ("2", "mirrored", 100)]
    world.assert_sound()


@above
def test_a_backfill_that_would_open_accounts_that_another_opened_since_has_to_try_again(
    world: World, isolation: IsolationLevel
) -> None:
    """The rows themselves are as they were: nothing but the account tells."""
    old = world.stage.session(isolation)
    old.look()
    execute(world.engine, BACKFILL)
    assert outcome(lambda: old.do(lambda on: tuple(on.execute(text(BACKFILL)).one()))) == "40001"
    old.rollback()
    assert world.accounts() == [("1", "mirrored", 100), ("2", "mirrored", 100)]


@above
def test_who_leaves_an_account_absent_that_was_opened_since_has_to_try_again(
    world: World, isolation: IsolationLevel
) -> None:
    """Also where nothing is written that the fence could fire on."""
    old = world.stage.session(isolation)
    old.look()
    execute(world.engine, BACKFILL)
    adapter = world.adapter(dual=False)
    assert outcome(lambda: old.do(lambda on: adapter.open_account(on, 1)[0].mode)) == "40001"
    old.rollback()
    assert old.do(lambda on: adapter.open_account(on, 1)[0].mode) == "legacy"


def test_who_does_not_lock_the_row_and_finds_the_account_opened_has_to_try_again(world: World) -> None:
    opener, other = world.stage.session(), world.stage.session()
    opener.do(lambda on: world.adapter().open_account(on, 1))
    waiting = other.waiting(leg, on=opener)
    opener.commit()
    assert of(waiting) == "40001"
    other.rollback()
    assert world.accounts() == [("1", "mirrored", 100)]
    world.assert_sound()


def test_a_posting_waits_for_who_changes_the_state_under_the_account_s_lock_alone(world: World) -> None:
    """As whoever takes the fence away does: it has no row to lock."""
    execute(world.engine, BACKFILL)
    remover, poster = world.stage.session(), world.stage.session()
    mapping = world.settings.mapping(None)
    remover.do(lambda on: turn_stale(on, world.settings, mapping, "fence removed"))
    adapter = world.adapter()
    waiting = poster.waiting(
        lambda on: adapter.set_balance(on, 1, 120, actor="admin:7", reason="case").mode, on=remover
    )
    remover.commit()
    assert of(waiting) == "dual_write"
    poster.commit()
    assert world.accounts() == [("1", "mirrored", 120), ("2", "stale", 100)]
    world.assert_sound()
