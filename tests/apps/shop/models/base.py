"""Base and mixins."""

from sqlalchemy import func
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    pass


class Spending:
    """Mixed into models that have coins; it declares no column itself."""

    def spend(self, amount):
        if self.total_coins < amount:  # = read
            raise ValueError("not enough total_coins")
        self.total_coins -= amount  # = write


class Stamped:
    created_at: Mapped[str] = mapped_column(server_default=func.now())
