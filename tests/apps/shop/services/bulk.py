"""Statements over many rows."""

import sqlalchemy as sa
from sqlalchemy import bindparam, delete, insert, update
from sqlalchemy.dialects.postgresql import insert as pg_insert

from shop import models
from shop.models import Account, User


def interest(session):
    session.execute(update(User).values(total_coins=User.total_coins * 2))  # = write read
    session.execute(sa.update(models.User).where(models.User.id == 1).values({"total_coins": 0}))  # = write
    session.execute(update(User).values({User.total_coins: 0, User.bonus: 1}))  # = write write
    session.query(User).filter_by(total_coins=0).update({"total_coins": 1})  # = read write
    session.query(User).update({User.total_coins: User.total_coins + 1})  # = write read
    session.execute(update(Account).values(total_coins=0, promo=0))
    session.execute(update(User).ordered_values((User.total_coins, 0)))  # = write


def load(session, rows):
    session.bulk_insert_mappings(User, [{"id": 1, "total_coins": 5}])  # = write
    session.bulk_update_mappings(User, [{"id": r[0], "total_coins": r[1]} for r in rows])  # = write
    session.bulk_update_mappings(User, rows)  # = unknown
    session.bulk_update_mappings(Account, [{"total_coins": 5}])
    session.execute(insert(User), [{"total_coins": 5}])  # = write
    session.execute(update(User).where(User.id == bindparam("b")), [{"b": 1, "total_coins": 5}])  # = write
    session.execute(insert(User).values([{"total_coins": 5}, {"total_coins": 6}]))  # = write


def upsert(session, data):
    stmt = pg_insert(User).values(id=1, total_coins=2)  # = write
    stmt = stmt.on_conflict_do_update(
        index_elements=["id"],
        set_={"total_coins": stmt.excluded.total_coins},  # = write read
    )
    session.execute(stmt)
    values = {"total_coins": 1}  # = write
    session.execute(update(User).values(**values))
    later = {}
    later["total_coins"] = 3  # = write
    session.execute(update(User).values(later))
    session.add(User(**data))  # = unknown


def purge(session):
    session.execute(delete(User).where(User.tenant == "old"))  # = write
    session.query(User).filter(User.id == 1).delete()  # = write
    session.query(Account).delete()


def pieces(session, fields):
    batch = []
    for one in fields:
        batch.append({"id": one, "total_coins": 0})  # = write
    session.bulk_update_mappings(User, batch)
    changes = dict(total_coins=4)  # = write
    session.query(User).update(changes)


def helper_made(session):
    session.execute(update(User).values(_changes()))  # = unknown


def _changes():
    return {"total_coins": 9}  # = missed write
