"""Core style."""

from sqlalchemy import MetaData, Table, column, select, table, text

from shop.models.tables import Member, metadata, orders, users
from shop.models.user import User as U


SORTABLE = {"coins": "users.total_coins", "sum": "orders.total_coins"}  # = unknown


class Model:
    """Tables kept in a class."""

    members = Table("users", metadata, Column("promo"))  # = definition
    orders = Table("orders", metadata, Column("promo"))


def work(connection, engine):
    connection.execute(users.update().values(total_coins=users.c.total_coins + 1))  # = write read
    connection.execute(users.update().values({users.c.total_coins: 1, users.c["bonus"]: 2}))  # = write write
    connection.execute(users.insert(), [{"total_coins": 1}])  # = write
    connection.execute(orders.update().values(total_coins=1))
    connection.execute(select(orders.c.total_coins))
    connection.execute(select(users.c.id, users.columns.total_coins))  # = read
    row = connection.execute(select(users)).one()
    statement = users.update().where(users.c.id == 1)
    connection.execute(statement, total_coins=3)  # = write
    connection.execute(orders.update(), total_coins=3)
    print(SORTABLE["coins"], row.total_coins, row._mapping["total_coins"], row.bonus)  # = read read read false unknown
    people = users.alias("p")
    connection.execute(select(people.c.total_coins))  # = read
    reflected = Table("users", MetaData(), autoload_with=engine)
    connection.execute(reflected.update().values(total_coins=1))  # = write
    connection.execute(metadata.tables["users"].update().values(promo=1))  # = write
    light = table("users", column("id"), column("total_coins"))  # = definition
    connection.execute(light.update().values(total_coins=1))  # = write
    other = table("orders", column("total_coins"))
    connection.execute(other.update().values(total_coins=1))
    connection.execute(U.__table__.delete())  # = write


def member(session):
    one = session.get(Member, 1)
    one.money = 5  # = write
    return one.money  # = read


def fragments(session):
    session.query(U).filter(text("total_coins > 5"))  # = unknown
    session.query(U).order_by(text("total_coins desc"))  # = unknown
