"""Models of other tables."""

from sqlalchemy import Numeric
from sqlalchemy.orm import Mapped, mapped_column, relationship

from shop.models.base import Base


class Campaign(Base):
    __tablename__ = "campaigns"

    id: Mapped[int] = mapped_column(primary_key=True)
    promo: Mapped[str]


class Order(Base):
    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    user_id: Mapped[int]
    total_coins = mapped_column(Numeric)
    user: Mapped["User"] = relationship(back_populates="orders")

    def charge(self):
        self.user.total_coins -= self.total_coins  # = write
