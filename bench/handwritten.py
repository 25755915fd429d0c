"""A dual-write as a competent engineer writes it by hand, on simple tables of its own: the rival.

Lock the legacy row, update it, insert the transaction, insert its two entries, update the account's balance; with
an idempotency key, a reference and a correlation id, as the adapter has them. It has no states, no comparison, no
fence and no flags. Written once with Core and once with the ORM.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from decimal import Decimal

from sqlalchemy import (
    BigInteger,
    BindParameter,
    DateTime,
    Engine,
    ForeignKey,
    Identity,
    MetaData,
    Numeric,
    Table,
    bindparam,
    func,
    insert,
    select,
    text,
    update,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship

SYSTEM = 0
"""The account on the other side of every movement."""

Credit = Callable[[int, Decimal, str, str], None]
"""``credit(key, amount, idempotency_key, correlation_id)``, in a transaction of its own."""

_MONEY = Numeric(20, 2)
_ROOM = {"postgresql_with": {"fillfactor": 70}}


class _Base(DeclarativeBase):
    metadata = MetaData(schema="hand")


class User(_Base):
    """A legacy row."""

    __tablename__ = "users"
    __table_args__ = _ROOM
    id: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    total_coins: Mapped[Decimal] = mapped_column(_MONEY)


class Account(_Base):
    """An account with its balance."""

    __tablename__ = "accounts"
    __table_args__ = _ROOM
    id: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    balance: Mapped[Decimal] = mapped_column(_MONEY)


class Transaction(_Base):
    """A transaction with its entries."""

    __tablename__ = "transactions"
    id: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
    idempotency_key: Mapped[str | None] = mapped_column(unique=True)
    type: Mapped[str]
    reference_type: Mapped[str | None]
    reference_id: Mapped[str | None]
    correlation_id: Mapped[str | None]
    created_at: Mapped[datetime] = mapped_column(DateTime(timezone=True), server_default=func.now())
    entries: Mapped[list[Entry]] = relationship()


class Entry(_Base):
    """One side of a transaction."""

    __tablename__ = "entries"
    id: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
    transaction_id: Mapped[int] = mapped_column(ForeignKey(Transaction.id), index=True)
    account_id: Mapped[int] = mapped_column(ForeignKey(Account.id), index=True)
    amount: Mapped[Decimal] = mapped_column(_MONEY)


def make(engine: Engine, rows: int) -> None:
    """Make the tables, with the keys 1 to ``rows`` mirrored at 1000.00."""
    with engine.begin() as connection:
        connection.execute(text("create schema hand"))
        _Base.metadata.create_all(connection)
        for table in ("users (id, total_coins)", "accounts (id, balance)"):
            connection.execute(
                text(f"insert into hand.{table} select g, 1000 from generate_series(1, :rows) as g"), {"rows": rows}
            )
        connection.execute(insert(Account), {"id": SYSTEM, "balance": -1000 * rows})


def differing(engine: Engine) -> int:
    """How many users the hand-written ledger got wrong: by balance, or by the sum of the entries."""
    query = (
        "select count(*) from hand.users as u inner join hand.accounts as a on a.id = u.id "
        "left join (select account_id, sum(amount) as moved from hand.entries group by account_id) as e "
        "on e.account_id = u.id "
        "where u.total_coins <> a.balance or u.total_coins <> 1000 + coalesce(e.moved, 0)"
    )
    with engine.connect() as connection:
        return int(connection.scalar(text(query)) or 0)


def core(engine: Engine) -> Credit:
    """Six statements by SQLAlchemy Core, of which the driver sends the two entries as one batch."""
    change: BindParameter[Decimal] = bindparam("change", type_=_MONEY)
    whose: BindParameter[int] = bindparam("key", type_=BigInteger())
    users, accounts, transactions = _table(User), _table(Account), _table(Transaction)
    lock = select(users.c.total_coins).where(users.c.id == whose).with_for_update()
    legacy = update(users).where(users.c.id == whose).values(total_coins=users.c.total_coins + change)
    transaction = insert(transactions).returning(transactions.c.id)
    entries = insert(_table(Entry))
    balance = update(accounts).where(accounts.c.id == whose).values(balance=accounts.c.balance + change)

    def credit(key: int, amount: Decimal, idempotency_key: str, correlation_id: str) -> None:
        with engine.begin() as connection:
            if connection.execute(lock, {"key": key}).scalar_one() + amount < 0:
                raise ValueError("insufficient funds")
            connection.execute(legacy, {"key": key, "change": amount})
            number = connection.execute(transaction, _facts(key, idempotency_key, correlation_id)).scalar_one()
            connection.execute(
                entries,
                [
                    {"transaction_id": number, "account_id": key, "amount": amount},
                    {"transaction_id": number, "account_id": SYSTEM, "amount": -amount},
                ],
            )
            connection.execute(balance, {"key": key, "change": amount})

    return credit


def orm(engine: Engine) -> Credit:
    """The same by a Session: objects where they read well, an UPDATE where a look would cost a round trip."""

    def credit(key: int, amount: Decimal, idempotency_key: str, correlation_id: str) -> None:
        with Session(engine) as session, session.begin():
            user = session.get_one(User, key, with_for_update=True)
            if user.total_coins + amount < 0:
                raise ValueError("insufficient funds")
            user.total_coins += amount
            transaction = Transaction(**_facts(key, idempotency_key, correlation_id))
            transaction.entries = [Entry(account_id=key, amount=amount), Entry(account_id=SYSTEM, amount=-amount)]
            session.add(transaction)
            session.execute(
                update(Account)
                .where(Account.id == key)
                .values(balance=Account.balance + amount)
                .execution_options(synchronize_session=False)
            )

    return credit


def _facts(key: int, idempotency_key: str, correlation_id: str) -> dict[str, str]:
    return {
        "idempotency_key": idempotency_key,
        "type": "deposit",
        "reference_type": "deposit",
        "reference_id": str(key),
        "correlation_id": correlation_id,
    }


def _table(entity: type[_Base]) -> Table:
    table = entity.__table__
    assert isinstance(table, Table)
    return table
