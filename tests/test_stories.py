"""Interleavings that end well, and badly where a guard is missing: which one, the record of the mutants says."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from sqlalchemy import Engine

import interleaving
from interleaving import READ_COMMITTED, REPEATABLE_READ, Stage, outcome
from invariants import violations
from ledger import execute, install_users, post
from walletmigrate.adapter import LegacyBalanceAdapter
from walletmigrate.config import Settings
from walletmigrate.flags import DUAL_WRITE, StaticSource

BACKFILL = "select * from wallet.backfill_users(null, null, null)"
UPDATE = "update users set total_coins = total_coins + 5 where id = 1"

Story = Callable[[Engine, Settings, Stage], None]


def adapter(settings: Settings, *, dual: bool) -> LegacyBalanceAdapter:
    return LegacyBalanceAdapter(settings, StaticSource({DUAL_WRITE: dual}))


def open_account(engine: Engine, settings: Settings) -> None:
    with engine.begin() as connection:
        post(connection, settings, "open_account", 1, 0)


def a_raw_write_with_a_snapshot_older_than_a_resync(engine: Engine, settings: Settings, stage: Stage) -> None:
    open_account(engine, settings)
    execute(engine, UPDATE)
    old = stage.session(REPEATABLE_READ)
    old.look()
    execute(engine, BACKFILL)
    outcome(lambda: old.sql(UPDATE))
    old.commit()


def a_posting_with_the_flag_off_and_a_snapshot_older_than_a_resync(
    engine: Engine, settings: Settings, stage: Stage
) -> None:
    open_account(engine, settings)
    execute(engine, UPDATE)
    off = adapter(settings, dual=False)
    old = stage.session(REPEATABLE_READ)
    old.look()
    execute(engine, BACKFILL)
    outcome(lambda: old.do(lambda connection: off.credit(connection, 1, 5, type="test")))
    old.commit()


def a_raw_write_with_a_snapshot_older_than_the_opening(engine: Engine, settings: Settings, stage: Stage) -> None:
    old = stage.session(REPEATABLE_READ)
    old.look()
    execute(engine, BACKFILL)
    outcome(lambda: old.sql(UPDATE))
    old.commit()


def a_posting_with_the_flag_off_that_waited_for_one_with_it_on(
    engine: Engine, settings: Settings, stage: Stage
) -> None:
    """Without the fence: the adapter by itself turns what it does not mirror stale."""
    execute(engine, "alter table users disable trigger all")
    on, off = stage.session(READ_COMMITTED), stage.session(READ_COMMITTED)
    on.do(lambda connection: adapter(settings, dual=True).credit(connection, 1, 5, type="test"))
    waiting = off.waiting(lambda connection: adapter(settings, dual=False).credit(connection, 1, 5, type="test"), on=on)
    on.commit()
    waiting.result(interleaving.PATIENCE_SECONDS)
    off.commit()


def a_truncate_with_a_snapshot_older_than_the_opening(engine: Engine, settings: Settings, stage: Stage) -> None:
    old = stage.session(REPEATABLE_READ)
    old.look()
    execute(engine, BACKFILL)
    outcome(lambda: old.sql("truncate users"))
    old.commit()


STORIES: list[Story] = [
    a_raw_write_with_a_snapshot_older_than_a_resync,
    a_posting_with_the_flag_off_and_a_snapshot_older_than_a_resync,
    a_raw_write_with_a_snapshot_older_than_the_opening,
    a_posting_with_the_flag_off_that_waited_for_one_with_it_on,
    a_truncate_with_a_snapshot_older_than_the_opening,
]


@pytest.mark.parametrize("story", STORIES, ids=[story.__name__ for story in STORIES])
def test_the_story_breaks_no_invariant(database_url: str, story: Story) -> None:
    engine, settings = install_users(database_url, phase="dual_write")
    with interleaving.stage(database_url) as stage:
        story(engine, settings, stage)
    with engine.connect() as connection:
        assert violations(connection, settings) == []
