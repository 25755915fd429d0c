"""Watched attributes in a flush: what ORM code assigns goes through the adapter, the code unchanged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from decimal import Decimal, localcontext
from typing import Any, cast

import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError, PendingRollbackError
from sqlalchemy.orm import Session

from adapting import OFF, Place, User, place, seal
from interleaving import stage
from ledger import execute, rows, scalar
from walletmigrate.errors import AssignmentRefused, IdempotencyKeyReused, InsufficientFunds, InvalidAmount
from watching import lost, movements, unrouted

D = Decimal


@pytest.fixture
def at(database_url: str) -> Iterator[Place]:
    made = place(database_url, rows=4, floor=D(0), with_promo=True)
    with made.adapter.watch(User.total_coins), made.adapter.watch(User.promo):
        yield made


@pytest.fixture
def session(at: Place) -> Iterator[Session]:
    with Session(at.engine) as opened:
        yield opened


# Assignments


def test_an_assignment_is_posted_and_says_what_it_is(at: Place, session: Session) -> None:
    user = session.get_one(User, 1)
    user.total_coins += 10
    session.commit()
    assert (at.coins(1), at.account(1)) == (110, ("mirrored", D(110)))
    assert at.legs() == [("opening", "opening", "1", D(100)), ("correction", "correction", "1", D(10))]
    assert movements(at) == [("correction", "orm", "orm", "assignment of User.total_coins")]
    assert [(each.operation, each.committed) for each in at.heard.posted] == [("set_balance", True)]
    assert (lost(at), unrouted(at)) == ([], [])
    at.check()


def test_without_the_watch_the_same_code_goes_past_the_adapter(at: Place, session: Session) -> None:
    at.adapter.credit(session, 1, 1, type="deposit")
    session.commit()
    at.adapter._watches.remove(at.adapter._watches._rules[0])
    session.get_one(User, 1).total_coins += 10
    session.commit()
    assert (at.coins(1), at.account(1)) == (111, ("stale", D(101)))


def test_other_columns_of_the_object_are_flushed_as_ever(at: Place, session: Session) -> None:
    user = session.get_one(User, 1)
    user.role, user.total_coins = "vip", D(50)
    session.commit()
    assert (user.role, at.coins(1, "role"), at.coins(1), at.account(1)) == ("vip", "vip", 50, ("mirrored", D(50)))
    session.get_one(User, 2).role = "vip"
    session.commit()
    assert at.account(2) is None, "an object whose balance was not assigned is not posted"


def test_all_objects_and_balances_of_a_flush_are_one_call(at: Place, session: Session) -> None:
    one, two, three = (session.get_one(User, key) for key in (1, 2, 3))
    three.total_coins, one.total_coins, two.promo, one.promo = D(3), D(1), D(2), D(7)
    session.commit()
    assert [at.account(1), at.account(1, "promo"), at.account(3)] == [("mirrored", D(k)) for k in (1, 7, 3)]
    assert at.account(2, "promo") == ("mirrored", D(2))
    assert [each.seconds is not None for each in at.heard.posted] == [True, False, False, False]
    at.check()


def test_an_assignment_of_the_same_value_moves_nothing(at: Place, session: Session) -> None:
    user = session.get_one(User, 1)
    user.total_coins = D(100)
    session.flush()
    assert at.account(1) is None
    user.total_coins = D(110)
    user.total_coins = D(100)
    session.commit()
    assert (at.coins(1), at.account(1), at.heard.posted) == (100, None, [])


def test_several_flushes_follow_each_other(at: Place, session: Session) -> None:
    user = session.get_one(User, 1)
    for _ in range(3):
        user.total_coins += 10
        session.flush()
    user.total_coins = D(100)
    session.commit()
    assert (at.coins(1), at.account(1)) == (100, ("mirrored", D(100)))
    assert [leg[3] for leg in at.legs()] == [100, 10, 10, 10, 30]
    assert lost(at) == []


def test_an_assignment_stands_before_the_adapters_own_posting(at: Place, session: Session) -> None:
    user = session.get_one(User, 1)
    user.total_coins = D(50)
    assert at.adapter.credit(session, 1, 5, type="deposit").legacy_balance == 55
    user.total_coins += 10
    session.commit()
    assert (at.coins(1), at.account(1), lost(at)) == (65, ("mirrored", D(65)), [])


# The assigned value wins


def test_the_assigned_value_wins_and_the_lost_update_is_told(at: Place, session: Session) -> None:
    user = session.get_one(User, 1)
    with at.engine.begin() as other:
        at.adapter.credit(other, 1, 7, type="deposit")
    user.total_coins += 10
    session.flush()
    assert lost(at) == [], "it is not lost for good before the commit"
    session.commit()
    assert (at.coins(1), at.account(1)) == (110, ("mirrored", D(110)))
    (told,) = lost(at)
    assert (told.key, told.attribute, told.expected, told.found, told.assigned) == (
        1,
        "User.total_coins",
        D(100),
        D(107),
        D(110),
    )
    assert told.transaction_id == at.last_id()
    assert at.metric("watched_write_total", outcome="lost_update") == 1
    at.check()


def test_a_lost_update_that_is_rolled_back_is_not_told(at: Place, session: Session) -> None:
    user = session.get_one(User, 1)
    session.execute(text("update users set total_coins = 5 where id = 1"))
    user.total_coins += 10
    session.flush()
    session.rollback()
    session.get_one(User, 1).total_coins += 1
    session.commit()
    assert (at.coins(1), lost(at)) == (101, [])


def test_a_flush_that_waits_for_a_posting_finds_its_balance(at: Place) -> None:
    with stage(at.engine.url.render_as_string(hide_password=False)) as on:
        writer, orm = on.session(), on.session()
        writer.do(lambda connection: at.adapter.credit(connection, 1, 7, type="deposit"))

        def assign(connection: Any) -> None:
            with Session(connection) as session:
                session.get_one(User, 1).total_coins += 10
                session.commit()

        waits = orm.waiting(assign, on=writer)
        writer.commit()
        waits.result()
        orm.commit()
    assert (at.coins(1), at.account(1)) == (110, ("mirrored", D(110)))
    assert [(told.expected, told.found) for told in lost(at)] == [(D(100), D(107))]
    at.check()


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
def test_with_an_old_snapshot_nothing_is_lost_and_the_flush_is_to_be_tried_again(at: Place, level: str) -> None:
    old = at.engine.execution_options(isolation_level=level)
    coins: Any = User.total_coins
    ways: list[Callable[[User], Any]] = [lambda user: user.total_coins + 10, lambda _: coins + 10]
    for number, assigned in enumerate(ways, start=1):
        with Session(old) as session:
            user = session.get_one(User, number)
            with at.engine.begin() as other:
                at.adapter.credit(other, number, 7, type="deposit")
            user.total_coins = assigned(user)
            with pytest.raises(DBAPIError) as raised:
                session.flush()
            assert getattr(raised.value.orig, "sqlstate", None) == "40001"
            session.rollback()
            user.total_coins = assigned(user)
            session.commit()
        assert (at.coins(number), at.account(number)) == (117, ("mirrored", D(117)))
    assert lost(at) == []
    at.check()


def test_a_value_assigned_without_a_look_at_the_old_one_loses_nothing(at: Place, session: Session) -> None:
    user = session.get_one(User, 1)
    session.expire(user)
    execute(at.engine, "update users set total_coins = 70 where id = 1")
    user.total_coins = D(50)
    session.commit()
    assert (at.coins(1), at.account(1), lost(at)) == (50, ("mirrored", D(50)), [])


# column + amount


def test_column_plus_amount_is_a_credit_and_loses_no_update(at: Place, session: Session) -> None:
    one, two = session.get_one(User, 1), session.get_one(User, 2)
    with at.engine.begin() as other:
        at.adapter.credit(other, 1, 7, type="deposit")
    one.total_coins = User.total_coins + 10
    two.total_coins = 5 + User.total_coins - D("2.50") - 40
    session.flush()
    assert [one.__dict__["total_coins"], two.__dict__["total_coins"]] == [117, D("62.50")]
    session.commit()
    assert [at.coins(1), at.coins(2)] == [117, D("62.50")]
    assert [at.account(1), at.account(2)] == [("mirrored", D(117)), ("mirrored", D("62.50"))]
    assert [kind for kind, *_ in movements(at)] == ["posting", "posting", "posting"]
    assert (lost(at), unrouted(at)) == ([], [])
    at.check()


def test_no_amount_is_rounded_by_the_decimal_context_of_the_application(at: Place, session: Session) -> None:
    user = session.get_one(User, 1)
    with localcontext() as context:
        context.prec = 3
        user.total_coins = User.total_coins + D("1234567.89")
        session.flush()
        user.total_coins = User.total_coins - D("1000000.78")
        session.commit()
    assert (at.coins(1), at.account(1)) == (D("234667.11"), ("mirrored", D("234667.11")))


def test_column_minus_amount_is_a_debit_that_the_floor_binds(at: Place, session: Session) -> None:
    session.get_one(User, 1).total_coins = User.total_coins - 500
    with pytest.raises(InsufficientFunds):
        session.flush()
    session.rollback()
    session.get_one(User, 1).total_coins -= 500
    session.commit()
    assert (at.coins(1), at.account(1)) == (-400, ("mirrored", D(-400))), "an assigned value is not bound"


def test_column_plus_nothing_moves_nothing(at: Place, session: Session) -> None:
    session.get_one(User, 1).total_coins = User.total_coins + 0
    session.commit()
    assert (at.coins(1), at.account(1), unrouted(at)) == (100, None, [])


def test_other_sql_is_left_to_the_orm_and_told(at: Place, session: Session) -> None:
    at.adapter.credit(session, 1, 1, type="deposit")
    session.get_one(User, 1).total_coins = User.total_coins * 2
    session.commit()
    assert (at.coins(1), at.account(1)) == (202, ("stale", D(101)))
    assert unrouted(at) == [("flush", "an SQL expression other than column ± amount")]
    assert at.metric("watched_write_total", outcome="unrouted") == 1
    session.get_one(User, 1).total_coins += 1
    session.commit()
    assert at.account(1) == ("mirrored", D(203)), "the next routed write resyncs"


# Refusals, rollbacks, savepoints


def test_what_is_no_amount_is_refused_at_the_flush(at: Place, session: Session) -> None:
    wrong: list[Any] = [D("1.001"), 1.5, D("NaN"), True, "5"]
    for value in wrong:
        user = session.get_one(User, 1)
        session.get_one(User, 2).total_coins = D(5)
        user.role, user.total_coins = "vip", value
        with pytest.raises(InvalidAmount):
            session.commit()
        with pytest.raises(PendingRollbackError):
            session.get_one(User, 3)
        session.rollback()
        assert (at.coins(1), at.coins(1, "role"), at.coins(2), at.account(2)) == (100, "member", 100, None)
    session.get_one(User, 1).total_coins = D(7)
    session.commit()
    assert (at.coins(1), at.account(1)) == (7, ("mirrored", D(7)))


def test_a_savepoint_that_is_rolled_back_takes_its_assignments_along(at: Place, session: Session) -> None:
    user = session.get_one(User, 1)
    user.total_coins = D(50)
    with session.begin_nested() as inner:
        user.total_coins = D(60)
        session.flush()
        inner.rollback()
    assert user.total_coins == 50
    user.total_coins += 1
    session.commit()
    assert (at.coins(1), at.account(1)) == (51, ("mirrored", D(51)))
    assert [leg[3] for leg in at.legs()] == [100, 50, 1]
    assert [each.operation for each in at.heard.posted] == ["set_balance", "set_balance"]
    at.check()


def test_what_a_savepoint_took_back_is_not_told_when_the_transaction_around_it_commits(
    at: Place, session: Session
) -> None:
    one, two, three = (session.get_one(User, key) for key in (1, 2, 3))
    coins = cast(Any, User.total_coins)
    execute(at.engine, "update users set total_coins = 70")
    with session.begin_nested() as inner:
        one.total_coins += 10
        two.total_coins = coins * 2
        session.flush()
        inner.rollback()
    three.total_coins = D(5)
    session.commit()
    assert [each.operation for each in at.heard.posted] == ["set_balance"]
    assert ([told.key for told in lost(at)], unrouted(at)) == ([3], [])
    assert at.metric("watched_write_total", outcome="lost_update") == 1
    assert [at.coins(key) for key in (1, 2, 3)] == [70, 70, 5]
    at.check()


def test_a_flush_that_fails_in_a_savepoint_leaves_the_transaction_around_it(at: Place, session: Session) -> None:
    user = session.get_one(User, 1)
    user.total_coins = D(50)
    session.flush()

    def fails() -> None:
        with session.begin_nested():
            session.get_one(User, 2).total_coins = D(2)
            session.flush()
            user.total_coins = D("0.001")
            session.flush()

    with pytest.raises(InvalidAmount):
        fails()
    session.commit()
    assert (at.coins(1), at.account(1), at.coins(2), at.account(2)) == (50, ("mirrored", D(50)), 100, None)
    assert [(e.key, e.committed) for e in at.heard.posted if e.outcome == "ok"] == [(1, True)]


def test_a_flush_that_fails_after_the_posting_takes_it_back(at: Place, session: Session) -> None:
    session.get_one(User, 1).total_coins = D(50)
    session.get_one(User, 1).role = None  # type: ignore[assignment]
    with pytest.raises(Exception, match="not-null"):
        session.commit()
    session.rollback()
    assert (at.coins(1), at.account(1), [e for e in at.heard.posted if e.committed]) == (100, None, [])


# Inserts and deletes


def test_accounts_of_new_objects_are_opened_in_the_flush(at: Place, session: Session) -> None:
    session.add_all([User(id=11, total_coins=D(3)), User(id=12, total_coins=D(0), promo=D(4))])
    session.flush()
    session.get_one(User, 11).total_coins += 1
    session.commit()
    assert [at.account(11), at.account(11, "promo")] == [("mirrored", D(4)), ("mirrored", D(0))]
    assert [at.account(12), at.account(12, "promo")] == [("mirrored", D(0)), ("mirrored", D(4))]
    assert unrouted(at) == []
    at.check()


def test_with_dual_write_off_nothing_is_opened_and_an_assignment_turns_the_account_stale(
    at: Place, session: Session
) -> None:
    at.adapter.credit(session, 1, 1, type="deposit")
    session.commit()
    at.flags(OFF)
    session.add(User(id=11, total_coins=D(3)))
    session.get_one(User, 1).total_coins += 10
    session.commit()
    assert (at.account(11), at.coins(1), at.account(1)) == (None, 111, ("stale", D(101)))
    assert [event.operation for event in at.heard.posted] == ["credit", "set_balance"]
    reason = scalar(at.engine, "select state_reason from wallet.accounts where key = '1' and bucket = 'cash'")
    assert reason == "written while dual-write was off or the line stopped", "it is no bypass"


def test_a_deleted_object_closes_its_account(at: Place, session: Session) -> None:
    user = session.get_one(User, 1)
    user.total_coins = D(5)
    session.flush()
    session.delete(user)
    session.commit()
    assert at.account(1) == ("closed", D(5))


def test_a_balance_that_is_assigned_and_deleted_in_one_flush_is_not_posted(at: Place, session: Session) -> None:
    one, two = session.get_one(User, 1), session.get_one(User, 2)
    one.total_coins, two.total_coins = D(1), D(2)
    session.delete(one)
    session.commit()
    assert (at.account(1), at.account(2), unrouted(at)) == (None, ("mirrored", D(2)), [])


def test_a_new_object_in_the_place_of_a_deleted_one_is_an_assignment(at: Place, session: Session) -> None:
    at.adapter.credit(session, 1, 1, type="deposit")
    session.delete(session.get_one(User, 1))
    session.add(User(id=1, tenant="acme", role="vip", total_coins=D(9), promo=D(5)))
    session.commit()
    assert (at.coins(1), at.coins(1, "role"), at.account(1)) == (9, "vip", ("mirrored", D(9)))
    assert unrouted(at) == []


def test_what_a_later_hook_assigns_is_told(at: Place, session: Session) -> None:
    def round_up(_mapper: object, _connection: object, user: User) -> None:
        user.total_coins = D(200)

    event.listen(User, "before_update", round_up)
    try:
        session.get_one(User, 1).total_coins = D(150)
        session.commit()
    finally:
        event.remove(User, "before_update", round_up)
    assert (at.coins(1), at.account(1)) == (200, ("stale", D(150)))
    assert unrouted(at) == [("flush", "assigned by a later hook of the flush")]


# Locks


def test_all_rows_of_a_flush_are_locked_by_key_whatever_is_written_to_them(at: Place) -> None:
    with stage(at.engine.url.render_as_string(hide_password=False)) as on:
        blocker, orm = on.session(), on.session()
        blocker.sql("select 1 from users where id = 1 for update")

        def assign(connection: Any) -> None:
            with Session(connection) as session:
                one, two = session.get_one(User, 1), session.get_one(User, 2)
                one.role, two.total_coins = "vip", D(5)
                session.commit()

        waits = orm.waiting(assign, on=blocker)
        free = rows(at.engine, "select id from users where id = 2 for update skip locked")
        blocker.commit()
        waits.result()
        orm.commit()
    assert free == [(2,)], "row 2 is not locked while row 1 is waited for"
    assert (at.coins(1, "role"), at.account(2)) == ("vip", ("mirrored", D(5)))


# Frozen accounts


def test_an_assignment_to_a_frozen_account_is_refused(at: Place, session: Session) -> None:
    at.adapter.credit(session, 1, 10, type="deposit")
    at.adapter.credit(session, 1, 10, type="deposit", bucket="promo")
    seal(session.connection(), 1)
    session.commit()
    at.adapter.credit(session, 1, 40, type="deposit")
    session.commit()
    session.get_one(User, 1).total_coins += 1
    with pytest.raises(AssignmentRefused, match="frozen"):
        session.flush()
    session.rollback()
    assert at.account(1) == ("frozen", D(150))
    session.get_one(User, 1).total_coins = User.total_coins + 1
    session.commit()
    assert (at.coins(1), at.account(1)) == (110, ("frozen", D(151))), "column + amount reads nothing"


# Idempotency keys


def test_an_idempotency_key_moves_money_once(database_url: str) -> None:
    at = place(database_url, rows=1)

    def key(user: User) -> str | None:
        return user.__dict__.get("request")

    with at.adapter.watch(
        User.total_coins, idempotency_key=key, type="import", actor=lambda s: str(s.info["who"]), reason="night run"
    ):
        with Session(at.engine, info={"who": "job:7"}) as session:
            user = session.get_one(User, 1)
            user.__dict__["request"] = "run-1"
            user.total_coins = D(150)
            session.commit()
        with Session(at.engine, info={"who": "job:7"}) as session:
            user = session.get_one(User, 1)
            user.total_coins += 25
            session.commit()
            assert user.total_coins == 175
            user.__dict__["request"] = "run-1"
            user.total_coins, user.role = D(150), "vip"
            session.flush()
            assert user.__dict__["total_coins"] == 175, "done before: the row stays as it is"
            session.commit()
            user.__dict__["request"] = "run-1"
            user.total_coins = D(160)
            with pytest.raises(IdempotencyKeyReused):
                session.flush()
    assert (at.coins(1), at.coins(1, "role"), at.account(1)) == (175, "vip", ("mirrored", D(175)))
    assert movements(at) == [("correction", "import", "job:7", "night run")] * 2
    assert lost(at) == []
    at.check()
