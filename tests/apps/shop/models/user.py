"""The mapped table, with hybrids, a synonym, and a column under another name."""

from decimal import Decimal

from sqlalchemy import Column, Index, Numeric, String
from sqlalchemy.ext.hybrid import hybrid_property
from sqlalchemy.orm import Mapped, column_property, mapped_column, relationship, synonym, validates

from shop.models.base import Base, Spending, Stamped


class User(Spending, Stamped, Base):
    """A user. Its total_coins is money."""

    __tablename__ = "users"
    __table_args__ = (Index("ix_users_coins", "total_coins"), {"schema": "public"})  # = definition

    id: Mapped[int] = mapped_column(primary_key=True)
    tenant: Mapped[str] = mapped_column(String(20))
    total_coins: Mapped[Decimal] = mapped_column(Numeric(20, 2), default=0)  # = definition
    bonus: Mapped[Decimal] = mapped_column("promo", Numeric(20, 2))  # = definition
    orders: Mapped[list["Order"]] = relationship(back_populates="user")
    coins = synonym("total_coins")  # = definition

    @hybrid_property
    def spendable(self):
        return self.total_coins + self.bonus  # = read read

    @spendable.inplace.setter
    def _spendable(self, value):
        self.total_coins = value - self.bonus  # = write read

    @hybrid_property
    def is_rich(self):
        return self.total_coins > 1000  # = read

    @property
    def label(self):
        return f"{self.id}: {self.total_coins}"  # = read

    @validates("total_coins")  # = unknown
    def not_negative(self, key, value):
        assert value >= 0
        return value

    def grant(self, amount: Decimal) -> None:
        self.bonus += amount  # = write


class Customer(User):
    """Single table inheritance."""

    def cash_out(self):
        paid, self.total_coins = self.total_coins, 0  # = read write
        return paid


class Account(Base):
    """Another table, with names that are like the mapped ones."""

    __tablename__ = "accounts"

    id = Column(Numeric, primary_key=True)
    promo = Column(Numeric)
    total_coins = Column(Numeric)

    def clear(self):
        self.promo = 0
        self.total_coins = 0


rich = column_property(User.total_coins > 1000)  # = read
