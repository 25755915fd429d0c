"""Models, handed on under one name."""

from shop.models.base import Base
from shop.models.catalogue import Campaign, Order
from shop.models.user import Account, Customer, User

__all__ = ["Account", "Base", "Campaign", "Customer", "Order", "User"]
