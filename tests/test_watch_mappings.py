"""Watched attributes of every kind of mapping: what may be watched, and what the ORM keeps doing for itself."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import Float, ForeignKey, Integer, Numeric, TypeDecorator, event, func, inspect, update
from sqlalchemy.ext.hybrid import hybrid_property
from sqlalchemy.orm import (
    Mapped,
    Session,
    aliased,
    column_property,
    mapped_column,
    registry,
    relationship,
    sessionmaker,
    synonym,
)
from sqlalchemy.orm.exc import StaleDataError

from adapting import DUAL, Place, User, custom, place
from ledger import execute, scalar
from walletmigrate import LegacyBalanceAdapter, Settings, StaticSource
from walletmigrate import Mapping as TableMapping
from walletmigrate.errors import InvalidAmount, LegacyValueInvalid, UsageError
from watching import lost, movements, unrouted

D = Decimal
COINS = {"bucket": "cash", "column": "total_coins", "currency": "EUR", "scale": 2}
USERS = {"name": "users", "table": "users", "key": "id", "columns": [COINS]}


@pytest.fixture
def at(database_url: str) -> Place:
    return place(database_url, rows=3)


# What may be watched


def wrong_attributes() -> dict[str, Any]:
    """Each with a word of the error."""
    own = registry()

    @own.mapped
    class Order:
        __tablename__ = "orders"
        id: Mapped[int] = mapped_column(primary_key=True)
        user_id: Mapped[int] = mapped_column(ForeignKey("users.id"))

    @own.mapped
    class Person:
        __tablename__ = "users"
        id: Mapped[int] = mapped_column(primary_key=True)
        total_coins: Mapped[Decimal] = mapped_column()
        tenant: Mapped[str]
        coins: Mapped[Decimal] = synonym("total_coins")
        twice: Mapped[Decimal] = column_property(total_coins * 2)
        orders: Mapped[list[Order]] = relationship(Order)

        @hybrid_property
        def rich(self) -> bool:
            return self.total_coins > 1000

    person: Any = Person

    @own.mapped
    class Floating:
        __table__ = person.__table__.to_metadata(registry().metadata)
        __mapper_args__: Any = {"include_properties": ["id", "total_coins"]}  # noqa: RUF012 - as SQLAlchemy has it

    Floating.__table__.c.total_coins.type = Float()

    @own.mapped
    class Keyless:
        __table__ = person.__table__.to_metadata(registry().metadata)
        __mapper_args__: Any = {  # noqa: RUF012 - as SQLAlchemy has it
            "include_properties": ["tenant", "total_coins"],
            "primary_key": ["tenant"],
        }

    return {
        "a text": ("users.total_coins", "mapped attribute"),
        "a Core column": (person.__table__.c.total_coins, "mapped attribute"),
        "a synonym": (person.coins, "synonym"),
        "a hybrid": (person.rich, "hybrid"),
        "an expression": (person.twice, "SQL expression"),
        "a relationship": (person.orders, "Relationship"),
        "an alias": (aliased(Person).total_coins, "alias"),
        "another column": (person.tenant, "not in mapping 'users', which has users.total_coins"),
        "another table": (Order.user_id, "not in mapping"),
        "a float": (Floating.total_coins, "Numeric"),  # type: ignore[attr-defined]
        "a class without the key": (Keyless.total_coins, "key column 'id'"),  # type: ignore[attr-defined]
    }


def test_what_cannot_be_watched_is_refused_at_once() -> None:
    adapter = LegacyBalanceAdapter(Settings(mappings=(TableMapping.model_validate(USERS),)), StaticSource(DUAL))
    for what, (attribute, word) in wrong_attributes().items():
        with pytest.raises(UsageError, match=word):
            adapter.watch(attribute)
        assert adapter._watches._rules == [], what


def test_an_attribute_is_watched_by_one_adapter_at_a_time(at: Place) -> None:
    other = LegacyBalanceAdapter(at.settings, at.source)
    with at.adapter.watch(User.total_coins) as watch:
        for adapter in (at.adapter, other):
            with pytest.raises(UsageError, match=r"User.total_coins is watched already"):
                adapter.watch(User.total_coins)
        watch.stop()
        with other.watch(User.total_coins), Session(at.engine) as session, session.begin():
            session.get_one(User, 1).total_coins += 1
    assert at.account(1) == ("mirrored", D(101))
    assert at.heard.posted == [], "a watch that was stopped hears nothing"


def test_a_stopped_watch_leaves_no_listener_behind(at: Place) -> None:
    flush, updates = at.adapter._watches._flush, at.adapter._watches._updates
    places: list[tuple[Any, str, Any]] = [
        (User, "before_update", flush.before_update),
        (User, "before_insert", flush.before_insert),
        (User, "after_insert", flush.after_insert),
        (Session, "before_flush", flush.before_flush),
        (Session, "after_flush", flush.after_flush),
        (Session, "do_orm_execute", updates.do_orm_execute),
    ]
    with at.adapter.watch(User.total_coins):
        assert all(event.contains(*place) for place in places)
    assert not any(event.contains(*place) for place in places)


def test_without_a_ledger_the_orm_does_what_it_did(database_url: str) -> None:
    at = custom(
        database_url,
        "create table users (id bigint primary key, tenant text, role text, total_coins numeric(20, 2), promo numeric);"
        "insert into users values (1, 'acme', 'member', 100, 5)",
        USERS,
        installed=False,
    )
    with at.adapter.watch(User.total_coins), Session(at.engine) as session:
        user = session.get_one(User, 1)
        session.add(User(id=2, total_coins=D(1)))
        user.total_coins += 10
        session.commit()
        user.total_coins = User.total_coins * 2
        session.commit()
        session.execute(update(User).where(User.id == 1).values(total_coins=User.total_coins / 2))
        session.commit()
    assert (at.coins(1), at.coins(2), at.heard.events) == (110, 1, [])


# What the ORM keeps doing


def test_version_ids_and_onupdate_columns_move_with_a_balance_alone(database_url: str) -> None:
    at = custom(
        database_url,
        "create table users (id bigint primary key, total_coins numeric(12, 2) not null, version int not null, "
        "changed int not null); insert into users values (1, 100, 1, 0)",
        USERS,
    )
    own = registry()

    @own.mapped
    class Person:
        __tablename__ = "users"
        id: Mapped[int] = mapped_column(primary_key=True)
        total_coins: Mapped[Decimal]
        version: Mapped[int] = mapped_column()
        changed: Mapped[int] = mapped_column(onupdate=func.length("seven77"))
        __mapper_args__: Any = {"version_id_col": version}  # noqa: RUF012 - as SQLAlchemy has it

    with at.adapter.watch(Person.total_coins), Session(at.engine) as one, Session(at.engine) as two:
        mine, theirs = one.get_one(Person, 1), two.get_one(Person, 1)
        mine.total_coins += 10
        one.commit()
        assert (mine.version, mine.changed, mine.total_coins) == (2, 7, D(110))
        theirs.total_coins += 1
        with pytest.raises(StaleDataError):
            two.commit()
        two.rollback()
        assert theirs.total_coins == 110
        assert lost(at) == [], "refused by the version, so nothing was lost"
    assert (at.coins(1), at.account(1)) == (110, ("mirrored", D(110)))
    at.check()


def test_history_and_other_listeners_see_what_they_saw(at: Place) -> None:
    seen: list[tuple[Any, ...]] = []
    maker = sessionmaker(at.engine)

    def look(session: Session, _context: object) -> None:
        seen.extend(inspect(each).attrs.total_coins.history for each in session.dirty)

    from sqlalchemy import event

    event.listen(maker, "after_flush", look)
    with at.adapter.watch(User.total_coins), maker.begin() as session:
        session.get_one(User, 1).total_coins += 10
    assert seen == [([D(110)], (), [D(100)])]


def test_merge_refresh_and_expire_work_as_ever(at: Place) -> None:
    with at.adapter.watch(User.total_coins), Session(at.engine) as session:
        session.merge(User(id=1, tenant="acme", role="member", total_coins=D(7), promo=D(5)))
        session.commit()
        user = session.get_one(User, 1)
        assert (at.account(1), user.total_coins) == (("mirrored", D(7)), D(7))
        user.total_coins = D(1)
        session.refresh(user)
        assert user.total_coins == 7
        user.total_coins = D(2)
        session.expire(user)
        session.commit()
        assert (at.coins(1), len(at.heard.posted)) == (7, 1)
        session.add(User(id=9, total_coins=D(4)))
        session.merge(User(id=10, tenant="acme", role="member", total_coins=D(7), promo=D(5)))
        session.commit()
    assert (at.account(9), at.account(10)) == (("mirrored", D(4)), ("mirrored", D(7)))


def test_a_key_that_changes_with_its_balance_is_posted_under_the_old_one(at: Place) -> None:
    with at.adapter.watch(User.total_coins), Session(at.engine) as session, session.begin():
        user = session.get_one(User, 1)
        user.id, user.total_coins = 21, D(30)
    assert (at.coins(21), at.account(1), at.account(21)) == (30, ("closed", D(30)), None)


# Inheritance


def test_subclasses_with_tables_of_their_own_are_watched_with_their_base(at: Place) -> None:
    execute(at.engine, "create table staff (id bigint primary key references users, desk text not null)")
    execute(at.engine, "insert into staff values (1, 'A1')")
    own = registry()

    @own.mapped
    class Person:
        __tablename__ = "users"
        id: Mapped[int] = mapped_column(primary_key=True)
        tenant: Mapped[str]
        role: Mapped[str]
        total_coins: Mapped[Decimal]

    with at.adapter.watch(Person.total_coins) as watch, Session(at.engine) as session:

        @own.mapped
        class Staff(Person):
            __tablename__ = "staff"
            id: Mapped[int] = mapped_column(ForeignKey("users.id"), primary_key=True)
            desk: Mapped[str]

        member, other = session.get_one(Staff, 1), session.get_one(Person, 2)
        member.desk, member.total_coins, other.total_coins = "B2", D(11), D(22)
        new: Any = Staff(id=8, tenant="acme", role="x", total_coins=D(1), desk="C3")  # type: ignore[call-arg]
        session.add(new)
        session.commit()
        member.desk = "B3"
        session.commit()
        assert [at.account(1), at.account(2), at.account(8)] == [("mirrored", D(k)) for k in (11, 22, 1)]
        assert scalar(at.engine, "select desk from staff where id = 1") == "B3"
        assert (unrouted(at), len(movements(at))) == ([], 2)
        watch.stop()
        member.total_coins = D(12)
        session.commit()
    assert at.account(1) == ("stale", D(11)), "the subclass is not watched any longer either"
    at.check()


def test_subclasses_in_the_same_table_are_watched_with_their_base(at: Place) -> None:
    own = registry()

    @own.mapped
    class Person:
        __tablename__ = "users"
        id: Mapped[int] = mapped_column(primary_key=True)
        tenant: Mapped[str]
        role: Mapped[str]
        total_coins: Mapped[Decimal]
        __mapper_args__: Any = {"polymorphic_on": "tenant"}  # noqa: RUF012 - as SQLAlchemy has it

    @own.mapped
    class Acme(Person):
        __mapper_args__: Any = {"polymorphic_identity": "acme"}  # noqa: RUF012 - as SQLAlchemy has it

    @own.mapped
    class Globex(Person):
        __mapper_args__: Any = {"polymorphic_identity": "globex"}  # noqa: RUF012 - as SQLAlchemy has it

    with at.adapter.watch(Person.total_coins), Session(at.engine) as session, session.begin():
        one, two = session.get_one(Acme, 1), session.get_one(Globex, 2)
        one.total_coins, two.total_coins = D(11), D(22)
    assert [at.account(1), at.account(2)] == [("mirrored", D(11)), ("mirrored", D(22))]
    assert len([each for each in at.heard.posted if each.seconds is not None]) == 1, "one batch"


# Column types


def test_null_is_left_to_the_orm_and_told(database_url: str) -> None:
    at = custom(
        database_url,
        "create table users (id bigint primary key, total_coins numeric(12, 2)); insert into users values (1, 10)",
        USERS,
    )
    own = registry()

    @own.mapped
    class Person:
        __tablename__ = "users"
        id: Mapped[int] = mapped_column(primary_key=True)
        total_coins: Mapped[Decimal | None]

    with at.adapter.watch(Person.total_coins), Session(at.engine) as session:
        at.adapter.credit(session, 1, 1, type="deposit")
        person = session.get_one(Person, 1)
        person.total_coins = None
        session.commit()
        assert (at.coins(1), at.account(1)) == (None, ("stale", D(11)))
        person.total_coins = D(5)
        session.commit()
        assert (at.coins(1), at.account(1)) == (5, ("stale", D(11)))
        assert unrouted(at) == [("flush", "NULL is no balance"), ("flush", "the row holds no exact amount")]
        person.total_coins = D(6)
        session.add_all([Person(id=2), Person(id=3, total_coins=D(3))])  # type: ignore[call-arg]
        session.commit()
        assert (at.account(1), at.account(2), at.account(3)) == (("mirrored", D(6)), None, ("mirrored", D(3)))
        assert unrouted(at)[2:] == [("insert", "legacy_value")]
        session.get_one(Person, 2).total_coins = Person.total_coins + 1
        with pytest.raises(LegacyValueInvalid):
            session.flush()
    at.check()


def test_a_column_of_cents_is_posted_in_major_units(database_url: str) -> None:
    at = place(database_url, rows=2, coins_type="bigint", unit="minor")
    own = registry()

    @own.mapped
    class Person:
        __tablename__ = "users"
        id: Mapped[int] = mapped_column(primary_key=True)
        total_coins: Mapped[int]

    with at.adapter.watch(Person.total_coins), Session(at.engine) as session:
        one, two = session.get_one(Person, 1), session.get_one(Person, 2)
        execute(at.engine, "update users set total_coins = 101 where id = 1")
        one.total_coins, two.total_coins = 250, Person.total_coins + 5
        session.flush()
        assert two.__dict__["total_coins"] == 105
        session.commit()
        assert (at.coins(1), at.account(1), at.account(2)) == (250, ("mirrored", D("2.50")), ("mirrored", D("1.05")))
        assert [(told.expected, told.found, told.assigned) for told in lost(at)] == [(D(1), D("1.01"), D("2.50"))]
        one.total_coins = D("1.5")  # type: ignore[assignment] # a program's mistake
        with pytest.raises(InvalidAmount):
            session.flush()
    at.check()


class Cents(TypeDecorator[Decimal]):
    """Decimal euros in the program, cents in the column."""

    impl = Integer
    cache_ok = True

    def process_bind_param(self, value: Decimal | None, _dialect: object) -> int | None:
        return None if value is None else int(value * 100)

    def process_result_value(self, value: int | None, _dialect: object) -> Decimal | None:
        return None if value is None else D(value) / 100


def test_a_type_of_the_applications_own_is_posted_as_it_is_bound(database_url: str) -> None:
    at = place(database_url, rows=2, coins_type="bigint", unit="minor")
    own = registry()

    @own.mapped
    class Person:
        __tablename__ = "users"
        id: Mapped[int] = mapped_column(primary_key=True)
        total_coins: Mapped[Decimal] = mapped_column(Cents)

    with at.adapter.watch(Person.total_coins), Session(at.engine) as session, session.begin():
        one, two = session.get_one(Person, 1), session.get_one(Person, 2)
        one.total_coins += D("1.50")
        two.total_coins = Person.total_coins + D("0.05")
        session.flush()
        assert two.__dict__["total_coins"] == D("1.05")
    assert (at.coins(1), at.account(1), at.account(2)) == (250, ("mirrored", D("2.50")), ("mirrored", D("1.05")))
    assert lost(at) == []


def test_a_float_column_that_gives_decimals_is_watched(database_url: str) -> None:
    at = place(database_url, rows=1, coins_type="double precision")
    own = registry()

    @own.mapped
    class Person:
        __tablename__ = "users"
        id: Mapped[int] = mapped_column(primary_key=True)
        total_coins: Mapped[Decimal] = mapped_column(Float(asdecimal=True))

    with at.adapter.watch(Person.total_coins), Session(at.engine) as session, session.begin():
        session.get_one(Person, 1).total_coins += D("0.10")
    assert (at.account(1), lost(at)) == (("mirrored", D("100.10")), [])


def test_other_attribute_names_and_another_primary_key_are_followed(database_url: str) -> None:
    at = custom(
        database_url,
        "create table users (nr bigint primary key, id text unique not null, total_coins numeric(12, 2) not null);"
        "insert into users values (1, 'ann', 10), (2, 'bob', 10)",
        USERS,
    )
    own = registry()

    @own.mapped
    class Person:
        __tablename__ = "users"
        nr: Mapped[int] = mapped_column(primary_key=True)
        login: Mapped[str] = mapped_column("id")
        coins: Mapped[Decimal] = mapped_column("total_coins", Numeric(12, 2))

    with at.adapter.watch(Person.coins), Session(at.engine) as session, session.begin():
        session.get_one(Person, 1).coins = D(15)
        session.add(Person(nr=3, login="cid", coins=D(3)))  # type: ignore[call-arg]
    assert (at.account("ann"), at.account("bob"), at.account("cid")) == (("mirrored", D(15)), None, ("mirrored", D(3)))
    assert movements(at) == [("correction", "orm", "orm", "assignment of Person.coins")]


def test_a_connection_that_translates_schemas_is_left_alone_and_told(at: Place) -> None:
    engine = at.engine.execution_options(schema_translate_map={None: "public"})
    with at.adapter.watch(User.total_coins), Session(engine) as session, session.begin():
        session.get_one(User, 1).total_coins += 1
    assert (at.coins(1), at.account(1)) == (101, None)
    assert unrouted(at) == [("flush", "schema_translate_map is in use")]
