"""What the model takes for granted of PostgreSQL (model/server.py), asked of PostgreSQL."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from sqlalchemy import Connection
from sqlalchemy.engine.interfaces import IsolationLevel

import interleaving
from interleaving import READ_COMMITTED, REPEATABLE_READ, SERIALIZABLE, Stage, of, outcome

OLD_SNAPSHOTS = (REPEATABLE_READ, SERIALIZABLE)
LOCK = "select balance from legacy where id = 1 for no key update"
CREDIT = "update legacy set balance = balance + 1 where id = 1 returning balance"
OPEN = "insert into accounts values (2, 'mirrored', 0) on conflict do nothing returning id"


@pytest.fixture
def stage(database_url: str) -> Iterator[Stage]:
    with interleaving.stage(database_url) as made:
        setup = made.session()
        setup.sql("create table legacy (id integer primary key, balance integer)")
        setup.sql("create table accounts (id integer primary key, state text, balance integer)")
        setup.sql("create sequence line minvalue 1 maxvalue 2")
        setup.sql("insert into legacy values (1, 10)")
        setup.sql("insert into accounts values (1, 'stale', 10)")
        setup.commit()
        yield made


def rows(statement: str) -> Callable[[Connection], list[tuple[object, ...]]]:
    """Work that answers the rows of a statement."""
    return lambda connection: [tuple(row) for row in connection.exec_driver_sql(statement)]


def test_a_statement_that_waited_takes_the_row_as_it_is_now_and_all_else_from_its_snapshot(stage: Stage) -> None:
    first, second = stage.session(), stage.session()
    first.sql(CREDIT)
    first.sql("update accounts set state = 'frozen'")
    both = "select l.balance, (select a.state from accounts as a where a.id = l.id) from legacy as l for no key update"
    waiting = second.waiting(rows(both), on=first)
    first.commit()
    assert of(waiting) == [(11, "stale")]
    assert second.sql("select state from accounts") == [("frozen",)]


def test_a_condition_is_asked_again_after_the_wait(stage: Stage) -> None:
    first, second = stage.session(), stage.session()
    first.sql("update accounts set state = 'mirrored'")
    update = "update accounts set balance = 0 where state = 'stale' returning id"
    waiting = second.waiting(rows(update), on=first)
    first.commit()
    assert of(waiting) == []


def test_a_row_that_does_not_match_in_the_snapshot_is_neither_waited_for_nor_found(stage: Stage) -> None:
    first, second = stage.session(), stage.session()
    first.sql("update accounts set state = 'mirrored'")
    assert second.sql("select id from accounts where state = 'mirrored' for no key update") == []


def test_a_row_that_was_deleted_and_inserted_again_is_found_by_a_new_statement_only(stage: Stage) -> None:
    first, second = stage.session(), stage.session()
    first.sql("delete from legacy")
    first.sql("insert into legacy values (1, 5)")
    waiting = second.waiting(rows(LOCK), on=first)
    first.commit()
    assert of(waiting) == []
    assert second.sql(LOCK) == [(5,)]


@pytest.mark.parametrize("isolation", OLD_SNAPSHOTS)
@pytest.mark.parametrize("change", [CREDIT, "update legacy set balance = balance", "delete from legacy"])
def test_an_old_snapshot_cannot_lock_what_changed_since(stage: Stage, isolation: IsolationLevel, change: str) -> None:
    old, other = stage.session(isolation), stage.session()
    old.look()
    other.sql(change)
    other.commit()
    assert outcome(lambda: old.sql(LOCK)) == "40001"


@pytest.mark.parametrize("isolation", OLD_SNAPSHOTS)
def test_an_old_snapshot_can_lock_what_was_only_locked_since(stage: Stage, isolation: IsolationLevel) -> None:
    old, other = stage.session(isolation), stage.session()
    old.look()
    other.sql(LOCK)
    other.commit()
    assert old.sql(CREDIT) == [(11,)]


@pytest.mark.parametrize("isolation", OLD_SNAPSHOTS)
def test_an_insert_that_conflicts_with_a_row_that_its_snapshot_does_not_show_fails(
    stage: Stage, isolation: IsolationLevel
) -> None:
    old, other = stage.session(isolation), stage.session()
    old.look()
    assert other.sql(OPEN) == [(2,)]
    other.commit()
    assert outcome(lambda: old.sql(OPEN)) == "40001"


def test_at_read_committed_an_insert_that_conflicts_waits_and_does_nothing(stage: Stage) -> None:
    first, second = stage.session(), stage.session()
    first.sql(OPEN)
    waiting = second.waiting(rows(OPEN), on=first)
    first.commit()
    assert of(waiting) == []


@pytest.mark.parametrize("isolation", [READ_COMMITTED, *OLD_SNAPSHOTS])
def test_an_insert_goes_through_once_what_it_waited_for_is_rolled_back(stage: Stage, isolation: IsolationLevel) -> None:
    first, second = stage.session(), stage.session(isolation)
    second.look()
    first.sql(OPEN)
    waiting = second.waiting(rows(OPEN), on=first)
    first.rollback()
    assert of(waiting) == [(2,)]


def test_an_old_snapshot_may_insert_a_key_whose_row_was_deleted_since(stage: Stage) -> None:
    old, other = stage.session(REPEATABLE_READ), stage.session()
    old.look()
    other.sql("delete from legacy")
    other.commit()
    assert old.sql("insert into legacy values (1, 5) returning balance") == [(5,)]


def test_a_subtransaction_that_is_rolled_back_frees_its_locks(stage: Stage) -> None:
    first, second = stage.session(), stage.session()
    first.sql("savepoint s")
    first.sql(CREDIT)
    waiting = second.waiting(rows(CREDIT), on=first)
    first.sql("rollback to savepoint s")
    assert of(waiting) == [(11,)]


def test_a_sequence_is_seen_at_once_by_an_old_snapshot_and_by_no_rollback_undone(stage: Stage) -> None:
    old, other = stage.session(REPEATABLE_READ), stage.session()
    old.look()
    other.sql("select setval('line', 2)")
    assert old.sql("select last_value from line") == [(2,)]
    other.rollback()
    assert old.sql("select last_value from line") == [(2,)]
