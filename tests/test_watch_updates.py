"""UPDATE statements of a Session on a watched column: routed where they can be, else left alone and told."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import bindparam, event, func, inspect, lambda_stmt, literal_column, select, text, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Mapped, ORMExecuteState, Session, mapped_column, registry, with_loader_criteria

from adapting import Place, User, place, seal
from interleaving import stage
from ledger import execute
from walletmigrate import watched_updates
from walletmigrate.errors import AssignmentRefused, InsufficientFunds, InvalidAmount
from watching import movements, unrouted

D = Decimal
USERS: Any = User.__table__
COINS: Any = User.total_coins


@pytest.fixture
def at(database_url: str) -> Iterator[Place]:
    made = place(database_url, rows=4, floor=D(0), with_promo=True)
    with made.adapter.watch(User.total_coins), made.adapter.watch(User.promo):
        yield made


@pytest.fixture
def session(at: Place) -> Iterator[Session]:
    with Session(at.engine) as opened:
        yield opened


# Routed


def test_an_update_of_one_row_is_posted(at: Place, session: Session) -> None:
    core = update(USERS).where(USERS.c.id == 1)
    for statement in (
        update(User).where(User.id == 1).values(total_coins=D(40)),
        update(User).where(User.id == 1).values({COINS: D(60)}),
        update(User).where(User.id == 1, COINS > 0).values(total_coins=COINS - 20),
        core.values(total_coins=60),
        core.values(total_coins=USERS.c.total_coins - 20),
        update(USERS).where(text("id = 1")).values({"total_coins": 20 + USERS.c.total_coins}),
    ):
        before, last, user = at.coins(1), at.last_id(), session.get_one(User, 1)
        result: Any = session.execute(statement)
        assert result.rowcount == 1, statement
        now = user.total_coins
        session.commit()
        assert (at.coins(1), at.account(1)) == (now, ("mirrored", now)), statement
        assert at.legs(last)[-1][3] == abs(now - before), statement
    assert (at.coins(1), at.coins(2), unrouted(at)) == (60, 100, [])
    assert [kind for kind, *_ in movements(at)] == [*["correction"] * 2, "posting", "correction", *["posting"] * 2]
    at.check()


def test_a_query_of_the_older_style_is_posted(at: Place, session: Session) -> None:
    assert session.query(User).filter(User.id == 1).update({User.total_coins: User.total_coins + 1}) == 1
    session.commit()
    assert at.account(1) == ("mirrored", D(101))


def test_every_row_of_an_update_is_posted_in_one_batch_and_other_values_are_written_too(
    at: Place, session: Session
) -> None:
    users = [session.get_one(User, key) for key in (1, 2, 3, 4)]
    statement = update(User).where(User.id.in_([3, 1, 2])).values(total_coins=COINS + 10, promo=D(7), role="vip")
    result: Any = session.execute(statement)
    assert result.rowcount == 3
    assert [(user.total_coins, user.promo, user.role) for user in users] == [
        *[(D(110), D(7), "vip")] * 3,
        (D(100), D(5), "member"),
    ]
    session.commit()
    assert [at.account(key) for key in (1, 2, 3, 4)] == [*[("mirrored", D(110))] * 3, None]
    assert at.account(2, "promo") == ("mirrored", D(7))
    assert len([each for each in at.heard.posted if each.seconds is not None]) == 1
    at.check()


def test_loaded_objects_show_the_new_balance_however_they_are_synchronized(at: Place, session: Session) -> None:
    one, two = session.get_one(User, 1), session.get_one(User, 2)
    statement = update(User).where(User.id < 3).values(total_coins=COINS + 10)
    kinds: list[Any] = [False, "fetch", "evaluate", "auto"]
    for times, synchronize in enumerate(kinds, start=1):
        session.execute(statement, execution_options={"synchronize_session": synchronize})
        assert [one.total_coins, two.total_coins] == [100 + 10 * times] * 2
    one.total_coins += 1
    session.commit()
    assert [at.account(1), at.account(2)] == [("mirrored", D(141)), ("mirrored", D(140))]


def test_returning_gives_the_new_balance(at: Place, session: Session) -> None:
    statement = update(User).where(User.id == 1).values(total_coins=COINS + 10)
    assert session.execute(statement.returning(User.id, User.total_coins)).all() == [(1, D(110))]
    user = session.execute(statement.returning(User)).scalar_one()
    assert user.total_coins == 120
    core = update(USERS).where(USERS.c.id == 1).values(total_coins=USERS.c.total_coins + 10)
    assert session.execute(core.returning(USERS.c.total_coins)).scalar_one() == 130
    session.commit()
    assert (at.account(1), unrouted(at)) == (("mirrored", D(130)), [])


def test_the_condition_of_a_conditional_update_is_asked_under_the_lock(at: Place, session: Session) -> None:
    taken = update(User).where(User.id == 1, User.total_coins >= 60).values(total_coins=COINS - 60)
    results: list[Any] = [session.execute(taken) for _ in range(2)]
    assert [result.rowcount for result in results] == [1, 0]
    session.commit()
    assert (at.coins(1), at.account(1), unrouted(at)) == (40, ("mirrored", D(40)), [])


def test_an_update_that_waits_asks_its_condition_of_the_balance_it_finds(at: Place) -> None:
    counts: list[int] = []

    def take(connection: Any) -> None:
        with Session(connection) as session:
            for amount in (60, 30):
                statement = update(User).where(User.id == 1, User.total_coins >= amount)
                result: Any = session.execute(statement.values(total_coins=COINS - amount))
                counts.append(result.rowcount)
            session.commit()

    with stage(at.engine.url.render_as_string(hide_password=False)) as on:
        writer, orm = on.session(), on.session()
        writer.do(lambda connection: at.adapter.debit(connection, 1, 60, type="booking"))
        waits = orm.waiting(take, on=writer)
        writer.commit()
        waits.result()
        orm.commit()
    assert counts == [0, 1]
    assert (at.coins(1), at.account(1), unrouted(at)) == (10, ("mirrored", D(10)), [])
    at.check()


def test_pending_changes_are_flushed_before(at: Place, session: Session) -> None:
    session.get_one(User, 1).total_coins = D(50)
    session.execute(update(User).where(User.id == 1).values(total_coins=COINS + 10))
    session.commit()
    assert at.account(1) == ("mirrored", D(60))
    with Session(at.engine, autoflush=False) as other:
        user = other.get_one(User, 1)
        user.total_coins = D(1)
        add = update(User).where(User.id == 1).values(total_coins=COINS + 10)
        other.execute(add, execution_options={"synchronize_session": False})
        assert user.total_coins == 1, "what is not flushed is the program's to keep"
        other.commit()
    assert at.account(1) == ("mirrored", D(1))


def test_an_update_by_primary_key_from_a_list_is_posted(at: Place, session: Session) -> None:
    session.execute(update(User), [{"id": 2, "total_coins": D(2)}, {"id": 1, "total_coins": D(1), "role": "vip"}])
    session.commit()
    assert [at.account(1), at.account(2), at.coins(1, "role")] == [("mirrored", D(1)), ("mirrored", D(2)), "vip"]
    assert unrouted(at) == []


def test_an_update_in_a_savepoint_is_rolled_back_with_it(at: Place, session: Session) -> None:
    with session.begin_nested() as inner:
        session.execute(update(User).where(User.id == 1).values(total_coins=COINS + 10))
        inner.rollback()
    session.execute(update(User).where(User.id == 1).values(total_coins=COINS + 1))
    session.commit()
    assert (at.coins(1), at.account(1), len(at.heard.posted)) == (101, ("mirrored", D(101)), 1)


def test_an_update_of_other_columns_is_none_of_the_adapters_business(at: Place, session: Session) -> None:
    session.execute(update(User).where(User.id == 1).values(role="vip"))
    session.commit()
    assert (at.coins(1, "role"), at.heard.events) == ("vip", [])


# Refused


def test_a_refused_update_leaves_the_transaction_usable(at: Place, session: Session) -> None:
    session.execute(update(User).where(User.id == 2).values(total_coins=COINS + 1))
    with pytest.raises(InsufficientFunds):
        session.execute(update(User).where(User.id == 1).values(total_coins=COINS - 500))
    with pytest.raises(InvalidAmount):
        session.execute(update(User).where(User.id == 1).values(total_coins=D("0.001")))
    session.commit()
    assert (at.coins(1), at.account(1), at.account(2)) == (100, None, ("mirrored", D(101)))


def test_a_frozen_account_takes_changes_and_no_values(at: Place, session: Session) -> None:
    at.adapter.credit(session, 1, 10, type="deposit")
    at.adapter.credit(session, 1, 10, type="deposit", bucket="promo")
    seal(session.connection(), 1)
    session.commit()
    session.execute(update(User).where(User.id == 1).values(total_coins=COINS + 1))
    with pytest.raises(AssignmentRefused):
        session.execute(update(User).where(User.id == 1).values(total_coins=D(5)))
    with pytest.raises(AssignmentRefused):
        session.execute(update(User), [{"id": 1, "total_coins": D(5)}])
    session.commit()
    assert (at.coins(1), at.account(1)) == (110, ("frozen", D(111)))
    at.check()


# Left alone, and told


def elsewhere() -> dict[str, tuple[Callable[[Session], object], str]]:
    """What is not routed, and a word of the reason. Each brings row 1 to 40."""
    set_40 = update(User).where(User.id == 1)

    def upsert(session: Session) -> None:
        new = insert(User).values(id=1, tenant="a", role="b", total_coins=D(0), promo=D(0))
        session.execute(new.on_conflict_do_update(index_elements=["id"], set_={"total_coins": D(40)}))

    return {
        "a function": (lambda s: s.execute(set_40.values(total_coins=func.round(COINS * 2 / 5))), "neither a value"),
        "text": (lambda s: s.execute(set_40.values(total_coins=literal_column("40"))), "neither a value"),
        "another column": (lambda s: s.execute(set_40.values(total_coins=User.promo * 8)), "neither a value"),
        "ordered values": (lambda s: s.execute(set_40.ordered_values((User.total_coins, D(40)))), "ordered_values"),
        "a subquery": (
            lambda s: s.execute(
                update(User).where(User.id.in_(select(func.min(User.id)))).values(total_coins=COINS - 60)
            ),
            "more than the table",
        ),
        "a parameter": (
            lambda s: s.execute(update(USERS).where(USERS.c.id == bindparam("k")).values(total_coins=D(40)), {"k": 1}),
            "parameters beside",
        ),
        "a parameter with a callable": (
            lambda s: s.execute(
                set_40.where(User.role != bindparam("r", callable_=lambda: "x")).values(total_coins=40)
            ),
            "a parameter without a value",
        ),
        "a value with a callable": (
            lambda s: s.execute(set_40.values(total_coins=bindparam("v", 41, callable_=lambda: 40))),
            "neither a value",
        ),
        "a CTE": (
            lambda s: s.execute(
                set_40.add_cte(insert(USERS).values(id=1).on_conflict_do_nothing().cte()).values(total_coins=40)
            ),
            "a CTE",
        ),
        "schemas translated": (
            lambda s: s.execute(
                set_40.values(total_coins=40), execution_options={"schema_translate_map": {None: "public"}}
            ),
            "schema_translate_map",
        ),
        "values as parameters": (
            lambda s: s.execute(update(USERS).where(USERS.c.id == 1), {"total_coins": D(40)}),
            "parameters beside",
        ),
        "one row twice": (
            lambda s: s.execute(update(User), [{"id": 1, "total_coins": D(4)}, {"id": 1, "total_coins": D(40)}]),
            "twice",
        ),
        "a value made from the balance": (
            lambda s: s.execute(set_40.values(total_coins=COINS - 60, promo=COINS / 20)),
            "neither a value",
        ),
        "another value made from the balance": (
            lambda s: s.execute(set_40.values(total_coins=COINS - 60, role=func.concat(COINS))),
            "another value",
        ),
        "an upsert": (upsert, "ON CONFLICT"),
        "too many rows": (
            lambda s: s.execute(update(User).where(User.id > 0).values(total_coins=COINS - 60)),
            "more than 3 rows",
        ),
    }


def test_what_cannot_be_routed_is_executed_as_it_was_and_told(
    at: Place, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watched_updates, "ROUTED_ROWS", 3)
    for what, (run, word) in elsewhere().items():
        for key in (1, 2, 3, 4):
            at.adapter.set_balance(session, key, 100, actor="test", reason="begin anew")
        session.commit()
        at.heard.events.clear()
        run(session)
        session.commit()
        assert (at.coins(1), at.account(1)) == (40, ("stale", D(100))), what
        assert {where for where, _ in unrouted(at)} == {"insert" if what == "an upsert" else "update"}, what
        assert all(word in reason for _, reason in unrouted(at)), what
        assert at.heard.posted == [], what
    at.check()


def unseen() -> dict[str, Callable[[Session], object]]:
    """What no session sees. Each brings row 1 to 40."""
    set_40 = update(User).where(User.id == 1).values(total_coins=40)

    def save(session: Session) -> None:
        user = session.get_one(User, 1)
        user.total_coins = D(40)
        with session.no_autoflush:
            session.bulk_save_objects([user])
        session.expire(user)

    return {
        "bulk_save_objects": save,
        "bulk_update_mappings": lambda s: s.bulk_update_mappings(inspect(User), [{"id": 1, "total_coins": 40}]),
        "a Connection": lambda s: s.connection().execute(set_40),
        "text()": lambda s: s.execute(text("update users set total_coins = 40 where id = 1")),
        "a driver's text": lambda s: s.connection().exec_driver_sql("update users set total_coins = 40 where id = 1"),
        "a lambda": lambda s: s.execute(lambda_stmt(lambda: set_40)),
    }


def test_what_no_session_sees_is_caught_by_the_fence(at: Place, session: Session) -> None:
    for what, run in unseen().items():
        at.adapter.set_balance(session, 1, 100, actor="test", reason="begin anew")
        session.commit()
        at.heard.events.clear()
        run(session)
        session.commit()
        assert (at.coins(1), at.account(1)) == (40, ("stale", D(100))), what
        assert at.heard.events == [], what
    at.check()


def test_an_update_that_is_rolled_back_is_not_told(at: Place, session: Session) -> None:
    session.execute(update(User).where(User.id == 1).values(total_coins=COINS * 2))
    session.rollback()
    assert unrouted(at) == []


def test_criteria_that_another_listener_adds_hold_and_nothing_is_posted_past_them(at: Place, session: Session) -> None:
    def only_acme(state: ORMExecuteState) -> None:
        state.statement = state.statement.options(with_loader_criteria(User, User.tenant == "acme"))

    event.listen(session, "do_orm_execute", only_acme)
    result: Any = session.execute(update(User).where(User.id.in_([1, 2])).values(total_coins=COINS + 10))
    assert result.rowcount == 1
    session.commit()
    assert (at.coins(1), at.coins(2), at.account(1), at.account(2)) == (110, 100, None, None)
    assert unrouted(at) == [("update", "the statement has criteria of its own for the rows it meets")]
    assert at.heard.posted == []
    result = session.execute(update(User).where(User.id == 1).values(total_coins=COINS + 1))
    session.commit()
    assert (result.rowcount, at.account(1)) == (1, ("mirrored", D(111)))


def test_an_update_of_a_subclass_meets_only_its_rows(at: Place) -> None:
    own = registry()

    @own.mapped
    class Person:
        __tablename__ = "users"
        id: Mapped[int] = mapped_column(primary_key=True)
        tenant: Mapped[str]
        total_coins: Mapped[Decimal]
        __mapper_args__: Any = {"polymorphic_on": "tenant"}  # noqa: RUF012 - as SQLAlchemy has it

    @own.mapped
    class Globex(Person):
        __mapper_args__: Any = {"polymorphic_identity": "globex"}  # noqa: RUF012 - as SQLAlchemy has it

    globex: Any = Globex
    with Session(at.engine) as session, session.begin():
        result: Any = session.execute(update(Globex).where(globex.id == 1).values(total_coins=D(0)))
        assert result.rowcount == 0
        session.execute(update(Globex).where(globex.id == 2).values(total_coins=D(0)))
    assert (at.coins(1), at.account(1), at.account(2)) == (100, None, ("mirrored", D(0)))


def test_in_autocommit_nothing_is_routed(at: Place) -> None:
    with Session(at.engine.execution_options(isolation_level="AUTOCOMMIT")) as session:
        session.execute(update(User).where(User.id == 1).values(total_coins=D(40)))
        session.get_one(User, 2).total_coins = D(2)
        session.commit()
    assert (at.coins(1), at.coins(2), at.account(1), at.account(2)) == (40, 2, None, None)
    reason = "the connection is in AUTOCOMMIT: there is no transaction to post in"
    assert unrouted(at) == [("update", reason), ("flush", reason)]


def test_objects_of_a_sharded_session_are_posted_where_they_live(at: Place, make_database: Callable[..., str]) -> None:
    there = place(make_database(), rows=4, floor=D(0), with_promo=True)
    with at.engine.connect() as here, there.engine.connect() as other, Session(here) as session:
        session.connection_callable = lambda _mapper, user=None, **_: other if user.id % 2 else here  # type: ignore[assignment]
        session.get_one(User, 2).total_coins = D(2)
        session.add(User(id=11, total_coins=D(3)))
        with session.no_autoflush:
            session.get_one(User, 1).total_coins = D(1)
        session.flush()
        session.execute(update(User).where(User.id == 3).values(total_coins=D(5)))
        session.commit()
        other.commit()
    assert [at.coins(1), at.coins(2), there.coins(1), there.coins(2)] == [100, 2, 1, 100]
    assert [at.account(1), at.account(2), at.account(11)] == [None, ("mirrored", D(2)), None]
    assert [there.account(1), there.account(2), there.account(11)] == [
        ("mirrored", D(1)),
        None,
        ("mirrored", D(3)),
    ]
    assert unrouted(at)[-1] == ("update", "the session is sharded")


def test_null_rows_are_left_to_the_statement(at: Place, session: Session) -> None:
    execute(at.engine, "alter table users alter total_coins drop not null")
    execute(at.engine, "update users set total_coins = null where id = 1")
    session.execute(update(User).where(User.id < 3).values(total_coins=D(3)))
    session.commit()
    assert (at.coins(1), at.coins(2), unrouted(at)) == (3, 3, [("update", "NULL is no balance")])
    session.execute(update(User).where(User.id == 1).values(total_coins=None))
    session.commit()
    assert (at.coins(1), unrouted(at)[1:]) == (None, [("update", "neither a value nor column ± amount")])
