"""What the shop keeps: users with a balance in euros, and what they booked."""

from __future__ import annotations

import os
from decimal import Decimal

from sqlalchemy import ForeignKey, Numeric, create_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    """The shop's tables."""


class User(Base):
    """Somebody with money in the shop. ``tenant`` is the branch that looks after them."""

    __tablename__ = "users"

    id: Mapped[int] = mapped_column(primary_key=True)
    tenant: Mapped[str]
    balance: Mapped[Decimal] = mapped_column(Numeric(12, 2), default=Decimal(0))


class Booking(Base):
    """A place that a user has paid for."""

    __tablename__ = "bookings"

    id: Mapped[int] = mapped_column(primary_key=True)
    user_id: Mapped[int] = mapped_column(ForeignKey("users.id"))
    price: Mapped[Decimal] = mapped_column(Numeric(12, 2))
    state: Mapped[str] = mapped_column(default="booked")


if __name__ == "__main__":  # makes the tables, before the first start
    Base.metadata.create_all(create_engine(os.environ["SHOP_DATABASE_URL"]))
