"""Core tables, and a class that is mapped to one by hand."""

from sqlalchemy import Column, ForeignKey, MetaData, Numeric, Table
from sqlalchemy.orm import registry

metadata = MetaData()
mapper_registry = registry()

users = Table(
    "users",
    metadata,
    Column("id", Numeric, primary_key=True),
    Column("total_coins", Numeric),  # = definition
    Column("promo", Numeric, key="bonus"),  # = definition
)
orders = Table("orders", metadata, Column("id", Numeric), Column("total_coins", Numeric), Column("user_id", ForeignKey("users.id")))


class Member:
    pass


mapper_registry.map_imperatively(Member, users, properties={"money": users.c.total_coins})  # = read
