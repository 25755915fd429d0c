"""The fence: whatever writes the legacy table, a mirrored account stays true and a frozen column stays as it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import psycopg
import pytest
from sqlalchemy import Engine
from sqlalchemy.engine.interfaces import IsolationLevel
from sqlalchemy.exc import DBAPIError

import interleaving
from interleaving import LEVELS, READ_COMMITTED, REPEATABLE_READ, SERIALIZABLE, outcome
from invariants import assert_sound
from ledger import ACT, execute, install_users, post, rows, scalar, set_phase, unguarded, users_settings
from walletmigrate.adapter import LegacyBalanceAdapter
from walletmigrate.capture import fence_problems
from walletmigrate.config import Settings
from walletmigrate.errors import LedgerMismatch, LegacyUpdateSuppressed
from walletmigrate.fences import set_mode
from walletmigrate.flags import DUAL_WRITE, StaticSource
from walletmigrate.install import install

FROZEN = "WM030"
INSERT = "insert into users (id, tenant, role, total_coins) values (1, 'acme', 'member', 100)"
UPDATE = "update users set total_coins = total_coins + 1 where id = 1"
DELETE = "delete from users where id = 1"
NEW_KEY = "update users set id = 11 where id = 1"
TRUNCATE = "truncate users"


@dataclass
class World:
    """Ten users of 100 each and the bucket promo of 5 each, in phase dual_write."""

    engine: Engine
    settings: Settings

    def bring(self, state: str, key: int = 1) -> None:
        """Bring both accounts of a user into a state."""
        if state == "absent":
            return
        with self.engine.begin() as connection:
            for bucket in ("cash", "promo"):
                post(connection, self.settings, "open_account", key, 0, bucket=bucket)
        if state == "stale":
            execute(
                self.engine, "update users set total_coins = total_coins + 1, promo = promo + 1 where id = :k", k=key
            )
        elif state == "closed":
            execute(self.engine, "delete from users where id = :k", k=key)
        elif state == "frozen":
            self.freeze()

    def freeze(self) -> None:
        execute(self.engine, "select * from wallet.freeze_users(null, null)")

    def write(self, *statements: str) -> str:
        """Run statements in one transaction, and give the SQLSTATE of their failure, or nothing."""
        try:
            with self.engine.begin() as connection:
                for statement in statements:
                    connection.exec_driver_sql(statement)
        except DBAPIError as error:
            return str(getattr(error.orig, "sqlstate", ""))
        return ""

    def state(self, key: int = 1, bucket: str = "cash") -> str:
        found = scalar(
            self.engine, "select state::text from wallet.accounts where key = :k and bucket = :b", k=str(key), b=bucket
        )
        return found or "absent"

    def legacy(self, key: int = 1, column: str = "total_coins") -> Any:
        return scalar(self.engine, f"select {column} from users where id = :k", k=key)

    def adapter(self, *, dual: bool = True) -> LegacyBalanceAdapter:
        return LegacyBalanceAdapter(self.settings, StaticSource({DUAL_WRITE: dual}))

    def assert_sound(self) -> None:
        assert_sound(self.engine, self.settings)


def make_world(url: str, *, policy: str = "shadow") -> World:
    engine, settings = install_users(url, with_promo=True, policy=policy, phase="dual_write")
    return World(engine, settings)


@pytest.fixture
def world(database_url: str) -> Iterator[World]:
    made = make_world(database_url)
    yield made
    made.assert_sound()


# The protocol's table


@pytest.mark.parametrize(
    ("before", "statement", "after"),
    [
        ("absent", UPDATE, "absent"),
        ("mirrored", UPDATE, "stale"),
        ("stale", UPDATE, "stale"),
        ("frozen", UPDATE, FROZEN),
        ("closed", UPDATE, "closed"),
        ("absent", DELETE, "absent"),
        ("mirrored", DELETE, "closed"),
        ("stale", DELETE, "closed"),
        ("frozen", DELETE, FROZEN),
        ("absent", NEW_KEY, "absent"),
        ("mirrored", NEW_KEY, "closed"),
        ("stale", NEW_KEY, "closed"),
        ("frozen", NEW_KEY, FROZEN),
        ("absent", TRUNCATE, "absent"),
        ("mirrored", TRUNCATE, "closed"),
        ("stale", TRUNCATE, "closed"),
        ("frozen", TRUNCATE, FROZEN),
        ("closed", TRUNCATE, "closed"),
        ("closed", INSERT, "stale"),
    ],
)
def test_a_raw_write_leaves_the_state_that_the_protocol_gives(
    world: World, before: str, statement: str, after: str
) -> None:
    world.bring(before)
    if after == FROZEN:
        held = rows(world.engine, "select * from users order by id")
        assert world.write(statement) == FROZEN
        assert rows(world.engine, "select * from users order by id") == held
        assert world.state() == "frozen"
    else:
        assert world.write(statement) == ""
        assert world.state() == after
        assert world.state(bucket="promo") == (before if statement == UPDATE else after)


@pytest.mark.parametrize(("before", "after"), [("stale", "stale"), ("frozen", FROZEN), ("mirrored", "mirrored")])
def test_a_row_lost_past_the_fence_and_inserted_again_is_treated_by_state(
    world: World, before: str, after: str
) -> None:
    world.bring(before)
    with unguarded(world.engine, "users") as connection:
        connection.exec_driver_sql(DELETE)
    assert world.write(INSERT.replace("total_coins)", "total_coins, promo)").replace("100)", "100, 5)")) == (
        FROZEN if after == FROZEN else ""
    )
    assert world.state() == before


@pytest.mark.parametrize(("before", "after"), [("absent", "absent"), ("closed", "stale")])
def test_a_row_that_takes_a_key_over_is_an_insert_of_that_key(world: World, before: str, after: str) -> None:
    world.bring("mirrored", key=2)
    world.bring(before, key=1)
    assert world.write(DELETE, "update users set id = 1 where id = 2") == ""
    assert (world.state(1), world.state(2)) == (after, "closed")


def test_a_row_that_takes_over_a_key_whose_account_is_stale_leaves_it_stale(world: World) -> None:
    """The first key of the two has no row any more: that says nothing of the second."""
    world.bring("stale", key=2)
    with unguarded(world.engine, "users") as connection:
        connection.exec_driver_sql("delete from users where id = 2")
    world.bring("mirrored", key=1)
    assert world.write("update users set id = 2 where id = 1") == ""
    assert (world.state(1), world.state(2)) == ("closed", "stale")


@pytest.mark.parametrize("statement", [DELETE, TRUNCATE])
def test_an_account_that_was_closed_stays_as_it_was_when_a_row_goes_again(world: World, statement: str) -> None:
    world.bring("closed")
    with unguarded(world.engine, "users") as connection:
        connection.exec_driver_sql(INSERT)
    closed = rows(world.engine, "select * from wallet.accounts")
    assert world.write(statement) == ""
    assert rows(world.engine, "select * from wallet.accounts") == closed


def test_a_row_that_would_take_a_frozen_key_over_is_refused(world: World) -> None:
    world.bring("frozen", key=1)
    with unguarded(world.engine, "users") as connection:
        connection.exec_driver_sql(DELETE)
    assert world.write("update users set id = 1 where id = 2") == FROZEN


def test_a_write_that_changes_no_balance_and_no_key_leaves_every_state_alone(world: World) -> None:
    world.bring("mirrored", key=2)
    world.bring("frozen", key=1)
    assert world.write("update users set role = 'vip', total_coins = total_coins + 0, promo = 5.00") == ""
    assert (world.state(1), world.state(2)) == ("frozen", "frozen")
    assert rows(world.engine, "select distinct state_reason from wallet.accounts") == [("freeze",)]


@pytest.mark.parametrize("value", ["null", "'NaN'"])
def test_a_balance_that_is_no_number_turns_the_account_stale(world: World, value: str) -> None:
    world.bring("mirrored")
    assert world.write(f"update users set total_coins = {value} where id = 1") == ""
    assert world.state() == "stale"


def test_only_the_bucket_that_was_written_turns_stale(world: World) -> None:
    world.bring("mirrored")
    assert world.write("update users set promo = 6 where id = 1") == ""
    assert (world.state(bucket="cash"), world.state(bucket="promo")) == ("mirrored", "stale")


def test_one_frozen_bucket_is_kept_while_the_other_is_written(world: World) -> None:
    world.bring("mirrored")
    assert world.write("update users set promo = 6 where id = 1") == ""
    world.freeze()
    assert (world.state(bucket="cash"), world.state(bucket="promo")) == ("frozen", "stale")
    assert world.write("update users set promo = 7 where id = 1") == ""
    assert world.write("update users set promo = 8, total_coins = 1 where id = 1") == FROZEN
    assert world.write(DELETE) == FROZEN
    assert (world.legacy(column="promo"), world.legacy()) == (7, 100)


# Ways to write


def test_copy_is_an_insert(world: World) -> None:
    world.bring("closed")
    with closing(world.engine.raw_connection()) as pooled:
        driver = pooled.driver_connection
        assert isinstance(driver, psycopg.Connection)
        with driver.cursor().copy("copy users (id, tenant, role, total_coins) from stdin") as copy:
            copy.write_row((1, "acme", "member", 100))
        driver.commit()
    assert world.state() == "stale"


@pytest.mark.parametrize(
    "statement",
    [
        (
            "insert into users (id, tenant, role, total_coins) values (1, 'a', 'b', 3) "
            "on conflict (id) do update set total_coins = excluded.total_coins"
        ),
        (
            "merge into users u using (values (1, 3)) v (id, coins) on u.id = v.id "
            "when matched then update set total_coins = v.coins"
        ),
        "with w as (update users set total_coins = 3 where id = 1 returning id) select * from w",
        "update users u set total_coins = 3 from (values (1)) v (id) where u.id = v.id",
    ],
    ids=["upsert", "merge", "with", "from"],
)
def test_every_kind_of_statement_meets_the_fence(world: World, statement: str) -> None:
    world.bring("mirrored")
    assert world.write(statement) == ""
    assert world.state() == "stale"
    world.bring("mirrored", key=2)
    world.freeze()
    assert world.write(statement.replace("values (1", "values (2").replace("id = 1", "id = 2")) == FROZEN


def test_merge_that_deletes_and_inserts_meets_the_fence(world: World) -> None:
    world.bring("mirrored", key=1)
    world.bring("closed", key=2)
    statement = (
        "merge into users u using (values (1), (2)) v (id) on u.id = v.id when matched then delete "
        "when not matched then insert (id, tenant, role, total_coins) values (v.id, 'a', 'b', 1)"
    )
    assert world.write(statement) == ""
    assert (world.state(1), world.state(2)) == ("closed", "stale")


def test_a_cascading_delete_closes_and_is_refused_when_frozen(world: World) -> None:
    world.write(
        "create table owners (id bigint primary key)",
        "insert into owners select id from users",
        "alter table users add foreign key (id) references owners on delete cascade on update cascade",
    )
    world.bring("mirrored", key=1)
    assert world.write("delete from owners where id = 1") == ""
    assert world.state(1) == "closed"
    world.bring("mirrored", key=2)
    assert world.write("update owners set id = 22 where id = 2") == ""
    assert (world.state(2), world.state(22)) == ("closed", "absent")
    world.bring("frozen", key=3)
    assert world.write("delete from owners where id = 3") == FROZEN
    assert scalar(world.engine, "select count(*) from owners where id = 3") == 1


def test_the_replica_role_does_not_get_past_the_fence(world: World) -> None:
    world.bring("mirrored", key=2)
    assert world.write("set local session_replication_role = replica", UPDATE.replace("= 1", "= 2")) == ""
    assert world.state(2) == "stale"
    world.bring("frozen", key=1)
    for statement in (UPDATE, DELETE, TRUNCATE):
        assert world.write("set local session_replication_role = replica", statement) == FROZEN


def test_a_raw_write_after_a_posting_in_the_same_transaction_turns_the_account_stale(world: World) -> None:
    with world.engine.begin() as connection:
        world.adapter().credit(connection, 1, 10, type="test")
        connection.exec_driver_sql(UPDATE)
    assert (world.state(), world.legacy()) == ("stale", 111)


def test_a_posting_after_a_raw_write_in_the_same_transaction_resyncs(world: World) -> None:
    world.bring("mirrored")
    with world.engine.begin() as connection:
        connection.exec_driver_sql(UPDATE)
        posted = world.adapter().credit(connection, 1, 10, type="test")
    assert [posted.ledger_balance, world.legacy()] == [111, 111]
    assert world.state() == "mirrored"


def test_a_savepoint_that_is_rolled_back_takes_the_states_back_with_it(world: World) -> None:
    world.bring("mirrored", key=1)
    world.bring("mirrored", key=2)
    with world.engine.begin() as connection:
        savepoint = connection.begin_nested()
        connection.exec_driver_sql("update users set total_coins = 0 where id in (1, 2)")
        connection.exec_driver_sql("delete from users where id = 2")
        savepoint.rollback()
    assert (world.state(1), world.state(2), world.legacy(1)) == ("mirrored", "mirrored", 100)


def test_a_refused_write_leaves_the_transaction_usable_behind_a_savepoint(world: World) -> None:
    world.bring("frozen")
    with world.engine.begin() as connection:
        savepoint = connection.begin_nested()
        with pytest.raises(DBAPIError, match="is frozen"):
            connection.exec_driver_sql(UPDATE)
        savepoint.rollback()
        connection.exec_driver_sql("update users set role = 'kept' where id = 1")
    assert scalar(world.engine, "select role from users where id = 1") == "kept"


def test_a_write_that_happens_to_equal_the_ledger_needs_no_label(world: World) -> None:
    world.bring("mirrored")
    with world.engine.begin() as connection:
        connection.exec_driver_sql("update users set total_coins = 90 where id = 1")
        connection.exec_driver_sql("update users set total_coins = 100 where id = 1")
    assert world.state() == "stale"  # between the two it was untrue, and nothing takes that back but a resync
    world.bring("mirrored", key=2)
    with world.engine.begin() as connection:
        connection.exec_driver_sql("update users set total_coins = 100.00, role = 'vip' where id = 2")
    assert world.state(2) == "mirrored"


# Triggers of the application


def application_trigger(world: World, when: str, body: str) -> None:
    function = (
        "create function app_trigger() returns trigger language plpgsql as "
        f"$$ begin if pg_trigger_depth() > 1 then return new; end if; {body} end $$"
    )
    trigger = f"create trigger app_trigger {when} on users for each row execute function app_trigger()"
    assert world.write(function, trigger) == ""


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


# Partitions


@pytest.fixture
def partitioned(database_url: str) -> Iterator[World]:
    """Users 1 to 10 in two partitions by id."""
    engine = interleaving.patient_engine(database_url)
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "create table users (id bigint primary key, tenant text not null default 'acme', "
            "role text not null default 'member', total_coins numeric(20, 2), promo numeric(20, 2) not null default 5) "
            "partition by range (id); "
            "create table users_low partition of users for values from (0) to (6); "
            "create table users_high partition of users for values from (6) to (100); "
            "insert into users (id, total_coins) select g, 100 from generate_series(1, 10) as g"
        )
    settings = users_settings(database_url, with_promo=True)
    install(engine, settings, ACT)
    set_phase(engine, "dual_write")
    made = World(engine, settings)
    yield made
    made.assert_sound()


def test_a_write_to_a_partition_by_its_own_name_meets_the_fence(partitioned: World) -> None:
    partitioned.bring("mirrored")
    assert partitioned.write("update users_low set total_coins = 1 where id = 1") == ""
    assert partitioned.state() == "stale"
    partitioned.bring("frozen", key=2)
    assert partitioned.write("delete from users_low where id = 2") == FROZEN


def test_a_row_that_moves_to_another_partition_takes_no_balance_along_unseen(partitioned: World) -> None:
    partitioned.bring("mirrored", key=1)
    partitioned.bring("closed", key=7)
    assert partitioned.write("update users set id = 7 where id = 1") == ""
    assert (partitioned.state(1), partitioned.state(7)) == ("closed", "stale")
    partitioned.bring("frozen", key=2)
    assert partitioned.write("update users set id = 77 where id = 2") == FROZEN


def test_the_truncation_of_a_partition_closes_only_its_own_accounts(partitioned: World) -> None:
    partitioned.bring("mirrored", key=1)
    partitioned.bring("mirrored", key=8)
    assert partitioned.write("truncate users_low") == ""
    assert (partitioned.state(1), partitioned.state(8)) == ("closed", "mirrored")
    partitioned.freeze()
    assert partitioned.write("truncate users_high") == FROZEN
    assert partitioned.write(TRUNCATE) == FROZEN


def test_reject_asks_of_a_truncated_partition_s_money_alone(partitioned: World) -> None:
    partitioned.bring("mirrored", key=8)
    set_mode(partitioned.engine, partitioned.settings, partitioned.settings.mapping(None), "reject", ACT)
    assert partitioned.write("truncate users_low") == ""
    assert partitioned.write("truncate users_high") == "WM031"
    assert partitioned.write("insert into users (id, total_coins) values (1, 100)") == ""
    assert partitioned.write("truncate users_high") == "WM031", "of rows in the other partition nothing is asked"
    assert partitioned.state(8) == "mirrored"


def test_a_partition_made_later_is_fenced_for_rows_at_once_and_reported_until_install_runs(partitioned: World) -> None:
    made = "create table users_top partition of users for values from (100) to (200)"
    assert partitioned.write(made, "insert into users (id, total_coins) values (100, 7)") == ""
    partitioned.bring("mirrored", key=100)
    assert partitioned.write("set local session_replication_role = replica", "update users set total_coins = 8") == ""
    assert partitioned.state(100) == "stale"
    problems = found_by(partitioned)
    assert "walletmigrate_users_truncate on public.users_top" in problems
    assert all(name.endswith(" on public.users_top") for name in problems)
    install(partitioned.engine, partitioned.settings, ACT)
    assert found_by(partitioned) == {}
    partitioned.bring("mirrored", key=100)
    assert partitioned.write("truncate users_top") == ""
    assert partitioned.state(100) == "closed"


def test_a_partition_that_is_detached_is_no_longer_the_fence_s(partitioned: World) -> None:
    assert partitioned.write("alter table users detach partition users_high") == ""
    assert found_by(partitioned) == {}


# What became of the fence


def found_by(world: World) -> dict[str, str]:
    with world.engine.connect() as connection:
        problems = fence_problems(connection, world.settings, world.settings.mapping(None))
    return {problem.trigger: problem.problem for problem in problems}


REPLACED = (
    "drop trigger {0} on users; create trigger {0} after update on users for each row when (false) "
    "execute function wallet.fence_users(); alter table users enable always trigger {0}"
)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("drop trigger {0} on users", "is missing"),
        ("alter table users disable trigger {0}", "is disabled, or does not fire in replica role"),
        ("alter table users disable trigger all", "is disabled, or does not fire in replica role"),
        ("alter table users enable replica trigger {0}", "is disabled, or does not fire in replica role"),
        ("alter table users enable trigger {0}", "is disabled, or does not fire in replica role"),
        (REPLACED, "was replaced or altered"),
        (
            "alter table users disable trigger {0}; alter table users enable always trigger {0}",
            "was replaced or altered",
        ),
        ("alter trigger {0} on users rename to other", "is missing"),
        ("drop function wallet.fence_users() cascade", "is missing"),
    ],
)
def test_a_fence_that_is_not_as_it_was_made_is_found_and_mended_by_install(
    world: World, change: str, problem: str
) -> None:
    assert found_by(world) == {}
    trigger = "walletmigrate_users_update"
    assert world.write(change.format(trigger)) == ""
    assert found_by(world)[f"{trigger} on public.users"] == problem
    install(world.engine, world.settings, ACT)
    assert found_by(world) == {}
    world.bring("mirrored")
    assert world.write(UPDATE) == ""
    assert world.state() == "stale"


def test_a_fence_that_another_cluster_made_is_not_this_one_though_its_transaction_has_the_same_number(
    world: World,
) -> None:
    name = "walletmigrate_users_update on public.users"
    execute(
        world.engine,
        "update wallet.mappings set fence = jsonb_set(fence, array[:name, 'cluster'], to_jsonb('1'::text))",
        name=name,
    )
    assert found_by(world) == {name: "was replaced or altered"}


def test_the_type_of_a_balance_column_is_not_altered_unseen_while_the_fence_stands(world: World) -> None:
    for column in ("total_coins", "promo", "id"):
        assert world.write(f"alter table users alter column {column} type text") == "0A000"


def test_a_fence_that_was_never_made_is_a_problem(world: World) -> None:
    execute(world.engine, "update wallet.mappings set fence = '{}'")
    assert list(found_by(world).values()) == ["was never installed"]


def test_adding_a_trigger_or_a_column_of_the_application_is_no_problem(world: World) -> None:
    application_trigger(world, "after insert", "return null;")
    assert world.write("alter table users add column nick text") == ""
    assert found_by(world) == {}
