"""The fence: whatever writes the legacy table, a mirrored account stays true and a frozen column stays as it is."""

from __future__ import annotations

from contextlib import closing

import psycopg
import pytest
from sqlalchemy.exc import DBAPIError

from fencing import DELETE, FROZEN, INSERT, NEW_KEY, TRUNCATE, UPDATE, World, world
from ledger import rows, scalar, unguarded

__all__ = ["world"]


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
