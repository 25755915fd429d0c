"""Guards of the protocol, taken away one at a time: without it the same interleaving breaks an invariant.

Each story is told twice, with the functions as they are made and with a guard removed from them, so that a
guard that is not needed, or a story that does not reach it, is noticed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from sqlalchemy import Engine, text

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


@dataclass(frozen=True)
class Mutant:
    """A guard: the functions it stands in, a pattern of the text that is it, and what is put there."""

    functions: tuple[str, ...]
    guard: str
    replacement: str


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


ACCOUNT_LOCKS = Mutant(("fence_users", "side_users"), r"for no key update( of \w+)?", "")
PROBE = Mutant(("probe_account",), r"in \('read committed', 'read uncommitted'\)", "is not null")
STALE_WHEN_OFF = Mutant(("turn_stale",), "id = p_account", "id = p_account and p_reason not like 'written while%'")
TRUNCATE_AT_OLD_SNAPSHOT = Mutant(
    ("fence_truncate_users",), r"not in \('read committed', 'read uncommitted'\)", "is null"
)

STORIES: list[tuple[Story, Mutant]] = [
    (a_raw_write_with_a_snapshot_older_than_a_resync, ACCOUNT_LOCKS),
    (a_posting_with_the_flag_off_and_a_snapshot_older_than_a_resync, ACCOUNT_LOCKS),
    (a_raw_write_with_a_snapshot_older_than_the_opening, PROBE),
    (a_posting_with_the_flag_off_that_waited_for_one_with_it_on, STALE_WHEN_OFF),
    (a_truncate_with_a_snapshot_older_than_the_opening, TRUNCATE_AT_OLD_SNAPSHOT),
]


def remove(engine: Engine, mutant: Mutant) -> None:
    """Make the functions anew without the guard; every one of them must have had it."""
    with engine.begin() as connection:
        connection.exec_driver_sql("set local search_path = pg_catalog, wallet, pg_temp")
        for name in mutant.functions:
            source = connection.scalar(
                text("select pg_get_functiondef(oid) from pg_proc where proname = :name and prokind = 'f'"),
                {"name": name},
            )
            mutated, count = re.subn(mutant.guard, mutant.replacement, source)
            assert count
            connection.exec_driver_sql(mutated, execution_options={"no_parameters": True})


@pytest.mark.parametrize(("story", "mutant"), STORIES, ids=[story.__name__ for story, _ in STORIES])
def test_without_its_guard_the_story_ends_badly_and_with_it_well(
    database_url: str, make_database: Callable[[], str], story: Story, mutant: Mutant
) -> None:
    for guarded, url in ((True, database_url), (False, make_database())):
        engine, settings = install_users(url, phase="dual_write")
        if not guarded:
            remove(engine, mutant)
        with interleaving.stage(url) as stage:
            story(engine, settings, stage)
        with engine.connect() as connection:
            found = violations(connection, settings)
        if guarded:
            assert found == []
        else:
            assert [sentence for sentence in found if sentence.startswith("mirrored account '1' holds")]
