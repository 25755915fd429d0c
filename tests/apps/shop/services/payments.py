"""Unit-of-work style."""

from decimal import Decimal

from sqlalchemy import select
from sqlalchemy.orm import Session

from shop.models import Account, Order, User


def pay(session: Session, user_id: int, amount: Decimal) -> Decimal:
    user = session.get(User, user_id)
    user.total_coins += amount  # = write
    return user.total_coins  # = read


def transfer(session, payer, payee, amount):
    payer.total_coins, payee.total_coins = (  # = write
        payer.total_coins - amount,  # = read
        payee.total_coins + amount,  # = read
    )


def refund(session: Session, order: Order):
    order.user.total_coins += order.total_coins  # = write
    order.total_coins = 0


def sign_up(session, name):
    session.add(User(name=name, total_coins=Decimal(10)))  # = write
    session.add(Account(promo=1, total_coins=5))
    return Order(user_id=1, total_coins=3)


def richest(session: Session):
    stmt = select(User).order_by(User.total_coins.desc())  # = read
    for one in session.scalars(stmt.limit(10)):
        print(one.total_coins)  # = read
    return max(session.query(User).all(), key=lambda u: u.total_coins)  # = read


def orders_of(session: Session):
    total = 0
    for order in session.scalars(select(Order).where(Order.total_coins > 0)):
        total += order.total_coins
    return total


def wipe(session, user: User):
    del user.total_coins  # = write
    setattr(user, "total_coins", 0)  # = write
    print(getattr(user, "total_coins", None))  # = read
    session.delete(user)  # = write


def apply_form(user: User, form: dict):
    for name, value in form.items():
        setattr(user, name, value)  # = unknown


def by_string(session: Session, field: str):
    if field == "total_coins":  # = unknown
        return session.query(User).order_by("total_coins").all()  # = unknown
    return session.query(getattr(User, field))  # = missed read


def spend_all(session: Session, user: User):
    user.spendable = 0  # = write
    user.spend(10)
    return session.query(User).filter(User.spendable > 10, User.is_rich)  # = read read
