"""What goes over the wire has the same names."""

from decimal import Decimal

from pydantic import BaseModel


class User(BaseModel):
    id: int
    total_coins: Decimal
    promo: str = ""


class Page(BaseModel):
    total_coins: Decimal

    def doubled(self):
        self.total_coins *= 2
        return self.total_coins
