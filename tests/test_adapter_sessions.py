"""ORM sessions: flushed before, expired after, in the caller's transaction, told after the outermost commit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import BigInteger, Column, ForeignKey, Numeric, Table, TypeDecorator, create_engine
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    column_property,
    mapped_column,
    registry,
    scoped_session,
    sessionmaker,
)

from adapting import Place, User, custom, place
from ledger import execute, rows
from walletmigrate import Movement, sessions
from walletmigrate.errors import InsufficientFunds, UsageError

D = Decimal


@pytest.fixture
def at(database_url: str) -> Place:
    return place(database_url, rows=3, floor=D(0), with_promo=True)


@pytest.fixture
def session(at: Place) -> Iterator[Session]:
    with Session(at.engine) as opened:
        yield opened


# Flush before


def test_a_pending_change_of_the_balance_is_flushed_first(at: Place, session: Session) -> None:
    user = session.get_one(User, 1)
    user.total_coins = D(50)
    assert at.adapter.credit(session, 1, 5, type="deposit").legacy_balance == 55
    session.commit()
    assert (at.coins(1), at.account(1)) == (55, ("mirrored", D(55)))
    at.check()


def test_a_new_user_is_flushed_first(at: Place, session: Session) -> None:
    session.add(User(id=9, total_coins=D(0)))
    assert at.adapter.open_account(session, 9)[0].ledger_balance == 0
    assert at.adapter.credit(session, 9, 5, type="deposit").legacy_balance == 5
    session.commit()
    assert at.account(9) == ("mirrored", D(5))


def test_a_pending_change_is_flushed_before_a_read(at: Place, session: Session) -> None:
    session.get_one(User, 1).total_coins = D(7)
    assert at.adapter.balance(session, 1).amount == 7


def test_without_autoflush_pending_changes_are_flushed_too(at: Place) -> None:
    with Session(at.engine, autoflush=False) as session, session.begin():
        session.get_one(User, 1).total_coins = D(50)
        assert at.adapter.credit(session, 1, 5, type="deposit").legacy_balance == 55


# Expire after


def test_a_loaded_balance_is_read_anew_after_a_posting(at: Place, session: Session) -> None:
    one, two = session.get_one(User, 1), session.get_one(User, 2)
    at.adapter.transfer(session, 1, 2, 30, type="gift")
    assert [one.total_coins, two.total_coins] == [70, 130]


def test_only_the_balances_of_the_accounts_at_hand_are_expired(at: Place, session: Session) -> None:
    one, three = session.get_one(User, 1), session.get_one(User, 3)
    at.adapter.credit(session, 1, 5, type="deposit")
    assert "total_coins" not in one.__dict__
    assert "promo" not in one.__dict__
    assert one.__dict__["tenant"] == "acme"
    assert three.__dict__["total_coins"] == 100


def test_a_reversal_expires_the_balances_of_both_its_accounts(at: Place, session: Session) -> None:
    number = at.adapter.transfer(session, 1, 2, 30, type="gift").transaction_id
    one, two = session.get_one(User, 1), session.get_one(User, 2)
    assert [one.total_coins, two.total_coins] == [70, 130]
    at.adapter.reverse(session, number or 0, reason="refund")
    assert [one.total_coins, two.total_coins] == [100, 100]


def test_a_session_that_does_not_expire_on_commit_reads_anew_too(at: Place) -> None:
    with Session(at.engine, expire_on_commit=False) as session:
        user = session.get_one(User, 1)
        at.adapter.credit(session, 1, 5, type="deposit")
        session.commit()
        assert user.total_coins == 105


def test_a_flush_after_the_posting_does_not_write_an_old_balance_back(at: Place, session: Session) -> None:
    user = session.get_one(User, 1)
    at.adapter.credit(session, 1, 5, type="deposit")
    user.role = "vip"
    session.commit()
    assert (at.coins(1), user.role) == (105, "vip")
    at.check()


def test_a_refused_posting_leaves_loaded_objects_and_the_session_usable(at: Place, session: Session) -> None:
    user = session.get_one(User, 1)
    user.role = "vip"
    with pytest.raises(InsufficientFunds):
        at.adapter.debit(session, 1, 500, type="booking")
    assert user.total_coins == 100
    at.adapter.debit(session, 1, 100, type="booking")
    session.commit()
    assert user.total_coins == 0
    assert user.role == "vip"


def test_other_classes_in_the_session_are_left_alone(at: Place, session: Session) -> None:
    execute(at.engine, "create table notes (id bigint primary key, total_coins numeric)")
    execute(at.engine, "insert into notes values (1, 42)")
    other = registry()

    @other.mapped
    class Note:
        __tablename__ = "notes"
        id: Mapped[int] = mapped_column(primary_key=True)
        total_coins: Mapped[Decimal]

    note = session.get_one(Note, 1)
    at.adapter.credit(session, 1, 5, type="deposit")
    assert note.__dict__["total_coins"] == 42


def test_a_class_with_other_attribute_names_and_another_primary_key_is_expired(database_url: str) -> None:
    at = custom(
        database_url,
        "create table users (nr bigint primary key, id text unique not null, total_coins numeric(12, 2) not null);"
        "insert into users values (1, 'ann', 10), (2, 'bob', 10)",
        {
            "name": "users",
            "table": "users",
            "key": "id",
            "columns": [{"bucket": "cash", "column": "total_coins", "currency": "EUR", "scale": 2}],
        },
    )
    own = registry()

    @own.mapped
    class Person:
        __tablename__ = "users"
        nr: Mapped[int] = mapped_column(primary_key=True)
        login: Mapped[str] = mapped_column("id")
        coins: Mapped[Decimal] = mapped_column("total_coins")

    with Session(at.engine) as session:
        ann, bob = session.get_one(Person, 1), session.get_one(Person, 2)
        at.adapter.credit(session, "ann", 5, type="deposit")
        assert [ann.coins, bob.__dict__["coins"]] == [15, 10]


def test_a_balance_that_only_a_class_below_has_is_expired(at: Place, session: Session) -> None:
    """What it held before would be written back by the next assignment."""
    execute(at.engine, "update users set role = case id when 1 then 'vip' else 'guest' end")
    own = registry()

    @own.mapped
    class Person:
        __tablename__ = "users"
        id: Mapped[int] = mapped_column(primary_key=True)
        role: Mapped[str]
        __mapper_args__: Any = {"polymorphic_on": "role", "polymorphic_identity": "guest"}  # noqa: RUF012 - as above

    @own.mapped
    class Vip(Person):
        total_coins: Mapped[Decimal]
        __mapper_args__: Any = {"polymorphic_identity": "vip"}  # noqa: RUF012 - as above

    vip, guest = session.get_one(Person, 1), session.get_one(Person, 2)
    assert isinstance(vip, Vip)
    at.adapter.transfer(session, 1, 2, 5, type="gift")
    assert vip.total_coins == 95
    assert guest.role == "guest"


def test_a_balance_whose_column_has_another_name_in_the_program_is_expired(at: Place, session: Session) -> None:
    own = registry()
    table = Table(
        "users",
        own.metadata,
        Column("id", BigInteger, key="number", primary_key=True),
        Column("total_coins", Numeric(20, 2), key="money"),
    )

    class Person:
        pass

    own.map_imperatively(Person, table)
    person: Any = session.get_one(Person, 1)
    assert person.money == 100
    at.adapter.credit(session, 1, 10, type="deposit")
    person.money += 5
    session.commit()
    assert at.coins(1) == 115


def test_a_balance_is_expired_whatever_the_program_takes_for_a_key(at: Place, session: Session) -> None:
    class Named(TypeDecorator[str]):
        impl = BigInteger
        cache_ok = True

        def process_bind_param(self, value: str | None, _dialect: Any) -> int | None:
            return int(value.removeprefix("u")) if value else None

        def process_result_value(self, value: int | None, _dialect: Any) -> str | None:
            return f"u{value}"

    own = registry()

    @own.mapped
    class Person:
        __tablename__ = "users"
        id: Mapped[str] = mapped_column(Named, primary_key=True)
        total_coins: Mapped[Decimal]

    person = session.get_one(Person, "u1")
    assert person.total_coins == 100
    at.adapter.credit(session, 1, 10, type="deposit")
    assert person.total_coins == 110


def test_a_session_of_several_databases_posts_where_the_class_of_the_balance_is(at: Place) -> None:
    elsewhere = create_engine("postgresql+psycopg://nobody@127.0.0.1:1/elsewhere")
    with Session(elsewhere, binds={User: at.engine}) as session, session.begin():
        assert at.adapter.credit(session, 1, 10, type="deposit").legacy_balance == 110
    with Session() as session, pytest.raises(UsageError, match=r"no engine for public\.users"):
        at.adapter.credit(session, 1, 10, type="deposit")
    assert at.coins(1) == 110


@pytest.mark.parametrize("key", ["--5", "²", "9" * 5000, "-", ""])
def test_a_text_key_that_looks_like_a_number_is_looked_for_as_text(key: str) -> None:
    assert sessions._identities(key) == [key]


def test_a_class_that_leaves_the_balance_out_is_no_hindrance(at: Place, session: Session) -> None:
    own = registry()

    @own.mapped
    class Name:
        __table__ = User.__table__
        __mapper_args__: Any = {"exclude_properties": ["total_coins", "promo"]}  # noqa: RUF012 - as SQLAlchemy has it

    name = session.get_one(Name, 1)
    assert at.adapter.credit(session, 1, 5, type="deposit").legacy_balance == 105
    assert name.__dict__["tenant"] == "acme"


def test_a_subclass_with_a_table_of_its_own_is_expired(at: Place, session: Session) -> None:
    execute(at.engine, "create table staff (id bigint primary key references users, desk text not null)")
    execute(at.engine, "insert into staff values (1, 'A1')")
    own = registry()

    @own.mapped
    class Person:
        __tablename__ = "users"
        id: Mapped[int] = mapped_column(primary_key=True)
        total_coins: Mapped[Decimal]

    @own.mapped
    class Staff(Person):
        __tablename__ = "staff"
        id: Mapped[int] = mapped_column(ForeignKey("users.id"), primary_key=True)
        desk: Mapped[str]

    member = session.get_one(Staff, 1)
    at.adapter.credit(session, 1, 5, type="deposit")
    assert member.total_coins == 105


# The caller's transaction


def test_nothing_is_committed_by_the_adapter(at: Place, session: Session) -> None:
    at.adapter.credit(session, 1, 5, type="deposit")
    at.adapter.apply(session, [Movement.credit(2, 1, type="a"), Movement.credit(3, 1, type="b")])
    assert (at.coins(1), at.account(1), at.account(2)) == (100, None, None)
    session.rollback()
    assert rows(at.engine, "select * from wallet.transactions") == []
    assert rows(at.engine, "select * from wallet.idempotency_keys") == []


def test_a_posting_in_a_savepoint_that_is_rolled_back_did_not_happen(at: Place, session: Session) -> None:
    user = session.get_one(User, 1)
    at.adapter.credit(session, 1, 1, type="kept")
    with session.begin_nested() as savepoint:
        at.adapter.credit(session, 1, 10, type="lost")
        savepoint.rollback()
    assert user.total_coins == 101
    session.commit()
    assert at.account(1) == ("mirrored", D(101))
    at.check()


@pytest.mark.parametrize("loaded", ["before", "within"])
@pytest.mark.parametrize("released", [False, True])
def test_a_balance_seen_in_a_savepoint_that_is_rolled_back_is_forgotten(at: Place, released: bool, loaded: str) -> None:
    with Session(at.engine) as session, session.begin():
        kept = [session.get_one(User, 1)] if loaded == "before" else []
        with session.begin_nested() as savepoint:
            with session.begin_nested() if released else nullcontext():
                at.adapter.debit(session, 1, 30, type="booking")
                kept.append(session.get_one(User, 1))
                assert kept[0].total_coins == 70
            savepoint.rollback()
        assert kept[0].total_coins == 100
        kept[0].total_coins += 5  # a code path that was not moved yet
    assert at.coins(1) == 105


def test_a_balance_seen_in_a_savepoint_that_a_failed_flush_ended_is_forgotten(at: Place, session: Session) -> None:
    user = session.get_one(User, 1)

    def failing() -> None:
        with session.begin_nested():
            at.adapter.debit(session, 1, 30, type="booking")
            assert user.total_coins == 70
            session.add(User(id=2, total_coins=D(0)))
            session.flush()

    with pytest.raises(IntegrityError):
        failing()
    assert user.total_coins == 100


def test_what_the_database_makes_of_balances_is_read_anew(at: Place) -> None:
    class Wealth(DeclarativeBase):
        pass

    class Owner(Wealth):
        __table__ = Table(
            "users",
            Wealth.metadata,
            Column("id", BigInteger, primary_key=True),
            Column("total_coins", Numeric),
            Column("promo", Numeric),
        )
        total = column_property(__table__.c.total_coins + __table__.c.promo)

    with Session(at.engine) as session, session.begin():
        owner = session.get_one(Owner, 1)
        before = owner.total
        at.adapter.credit(session, 1, 5, type="deposit")
        assert owner.total == before + 5


def test_a_bare_connection_and_its_savepoints_serve_as_well(at: Place) -> None:
    with at.engine.begin() as connection:
        at.adapter.credit(connection, 1, 1, type="kept")
        with connection.begin_nested() as savepoint:
            at.adapter.credit(connection, 1, 10, type="lost")
            savepoint.rollback()
    assert at.account(1) == ("mirrored", D(101))
    at.check()


def test_a_scoped_session_is_a_session(at: Place) -> None:
    scoped = scoped_session(sessionmaker(at.engine))
    user = scoped.get_one(User, 1)
    user.total_coins = D(50)
    assert at.adapter.credit(scoped, 1, 5, type="deposit").legacy_balance == 55
    assert user.total_coins == 55
    assert at.heard.posted == []
    scoped.commit()
    scoped.remove()
    assert [event.committed for event in at.heard.posted] == [True]
    assert at.adapter.balance(scoped, 1).amount == 55
    scoped.remove()


@pytest.mark.parametrize("target", [None, "postgresql://", object()])
def test_what_is_neither_session_nor_connection_is_named(at: Place, target: Any) -> None:
    with pytest.raises(UsageError, match="pass a Session or a Connection"):
        at.adapter.credit(target, 1, 5, type="deposit")
    with pytest.raises(UsageError, match=type(target).__name__):
        at.adapter.balance(target, 1)


def test_an_engine_and_an_async_session_are_refused(at: Place) -> None:
    for target in (at.engine, AsyncSession()):
        with pytest.raises(UsageError, match="async shell"):
            at.adapter.credit(target, 1, 5, type="deposit")  # type: ignore[arg-type]
