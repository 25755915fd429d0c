"""One order of locks: legacy rows by key, then accounts by id; and whoever waits for the first holds none of the next.

The rows and the accounts lie in another order than they are to be locked in, for every plan that reads them: key 1
stands behind key 2 in the table, and its account is the younger one but stands before the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from sqlalchemy import Connection

import interleaving
from interleaving import Stage
from ledger import execute, install_users, post, rows, set_phase
from walletmigrate import LegacyBalanceAdapter, Movement, Settings, StaticSource

Work = Callable[[Connection, Settings], object]


def transfer(connection: Connection, settings: Settings) -> None:
    post(connection, settings, "transfer", 1, 1, payee=2)


def batch(connection: Connection, settings: Settings) -> None:
    adapter = LegacyBalanceAdapter(settings, StaticSource({"wallet.dualWrite": True}))
    adapter.apply(connection, [Movement.credit(key, 5, type="test") for key in (1, 2)])


def batch_of_the_second_first(connection: Connection, settings: Settings) -> None:
    adapter = LegacyBalanceAdapter(settings, StaticSource({"wallet.dualWrite": True}))
    adapter.apply(connection, [Movement.credit(key, 5, type="test") for key in (2, 1)])


def truncate(connection: Connection, _: Settings) -> None:
    connection.exec_driver_sql("truncate users")


def sql(statement: str) -> Work:
    return lambda connection, _: connection.exec_driver_sql(statement).all()


BACKFILL = sql("select wallet.backfill_users(null, null, null)")
FREEZE = sql("select wallet.freeze_users(null, null)")
UNFREEZE = sql("select wallet.unfreeze_users(null, null)")

WORKS: dict[str, tuple[str, Work]] = {
    "a transfer": ("mirrored", transfer),
    "a transfer of frozen accounts": ("frozen", transfer),
    "a batch": ("mirrored", batch),
    "a batch of the second first": ("mirrored", batch_of_the_second_first),
    "a batch of frozen accounts": ("frozen", batch),
    "a backfill": ("stale", BACKFILL),
    "a freeze": ("mirrored", FREEZE),
    "an unfreeze": ("frozen", UNFREEZE),
}


class Place:
    """Rows 1 and 2, and their accounts, all in one state."""

    def __init__(self, url: str, state: str) -> None:
        self.engine, self.settings = install_users(url, rows=2, phase="dual_write")
        for key in (2, 1):
            with self.engine.begin() as connection:
                post(connection, self.settings, "open_account", key, 0)
        if state == "stale":
            execute(self.engine, "update users set total_coins = total_coins + 1")
        if state == "frozen":
            set_phase(self.engine, "frozen")
            execute(self.engine, "select wallet.freeze_users(null, null)")
        # To the end of their tables.
        execute(self.engine, "update users set tenant = 'moved' where id = 1")
        execute(self.engine, "update wallet.accounts set opened_at = clock_timestamp() where key = '2'")
        assert rows(self.engine, "select key, state::text from wallet.accounts order by id") == [
            ("2", state),
            ("1", state),
        ]
        assert rows(self.engine, "select id from users order by ctid") == [(2,), (1,)]
        assert rows(self.engine, "select key from wallet.accounts order by ctid") == [("1",), ("2",)]


@pytest.fixture
def staged(database_url: str, what: str) -> Iterator[tuple[Place, Stage]]:
    place = Place(database_url, WORKS[what][0])
    with interleaving.stage(database_url) as stage:
        yield place, stage


def waits_for_the_first_alone(place: Place, stage: Stage, work: Work, first: str, second: str) -> None:
    holder, worker, other = stage.session(), stage.session(), stage.session()
    holder.sql(first)
    # An index of the keys would give them in order by itself.
    worker.sql(
        "set local enable_indexscan = off; set local enable_bitmapscan = off; set local enable_indexonlyscan = off"
    )
    waiting = worker.waiting(lambda connection: work(connection, place.settings), on=holder)
    other.sql("set local lock_timeout = '2s'")
    other.sql(second)
    other.rollback()
    holder.rollback()
    waiting.result(interleaving.PATIENCE_SECONDS)
    worker.commit()


@pytest.mark.parametrize("what", WORKS)
def test_legacy_rows_are_locked_by_key(staged: tuple[Place, Stage], what: str) -> None:
    place, stage = staged
    lock = "select from users where id = {} for update"
    waits_for_the_first_alone(place, stage, WORKS[what][1], lock.format(1), lock.format(2))


@pytest.mark.parametrize("what", [what for what in WORKS if not what.startswith(("a batch", "a transfer"))])
def test_a_job_locks_rows_by_key_also_where_no_index_brings_them_in_that_order(
    staged: tuple[Place, Stage], what: str
) -> None:
    place, stage = staged
    lock = "select from users where id = {} for update"

    def work(connection: Connection, settings: Settings) -> object:
        connection.exec_driver_sql("set local enable_indexscan = off")
        connection.exec_driver_sql("set local enable_bitmapscan = off")
        return WORKS[what][1](connection, settings)

    waits_for_the_first_alone(place, stage, work, lock.format(1), lock.format(2))


@pytest.mark.parametrize("what", WORKS)
def test_accounts_are_locked_by_id(staged: tuple[Place, Stage], what: str) -> None:
    place, stage = staged
    lock = "select from wallet.accounts where key = '{}' for update"
    waits_for_the_first_alone(place, stage, WORKS[what][1], lock.format(2), lock.format(1))


@pytest.mark.parametrize("what", WORKS)
def test_no_account_is_locked_before_the_legacy_rows(staged: tuple[Place, Stage], what: str) -> None:
    place, stage = staged
    first = "select from users where id = 2 for update"
    waits_for_the_first_alone(place, stage, WORKS[what][1], first, "select from wallet.accounts for update")


def test_a_truncate_locks_all_accounts_in_order_before_it_closes_any(database_url: str) -> None:
    place = Place(database_url, "mirrored")
    execute(place.engine, "insert into users select g, 'acme', 'member', 100 from generate_series(3, 40) as g")
    execute(place.engine, "select wallet.backfill_users(null, null, null)")
    first, rest = (f"select from wallet.accounts where id {which} for update" for which in ("= 1", "> 1"))
    with interleaving.stage(database_url) as stage:
        waits_for_the_first_alone(place, stage, truncate, first, rest)


def test_a_truncate_locks_accounts_by_id(database_url: str) -> None:
    place = Place(database_url, "mirrored")
    lock = "select from wallet.accounts where key = '{}' for update"
    with interleaving.stage(database_url) as stage:
        waits_for_the_first_alone(place, stage, truncate, lock.format(2), lock.format(1))
