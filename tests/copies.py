"""Databases that many tests begin with: made anew the first times, and copied from then on.

What makes them is tested where it is made; a copy is the same database, byte by byte, in the same cluster.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Final, TypeVar, cast

from sqlalchemy import make_url, text
from sqlalchemy.pool import NullPool

from walletmigrate import connect

Made = TypeVar("Made")

UNTOUCHED: Final[set[str]] = set()
"""URLs of databases that `conftest.make_database` made empty, for a test that may not have begun to use them."""

ANEW: Final[list[str]] = []
"""Reasons why everything is made anew: where mutants are played, a copy would have been made of other SQL."""

_asked: Counter[tuple[str, str]] = Counter()
_templates: dict[tuple[str, str], tuple[str, object]] = {}

_ALONE = text(
    "select d.datacl is null and d.datdba = (select oid from pg_roles where rolname = current_user) "
    "and s.sessions = 0 and not exists (select from pg_stat_activity as a where a.datid = d.oid) "
    "and not exists (select from pg_db_role_setting as r where r.setdatabase = d.oid) "
    "from pg_database as d join pg_stat_database as s on s.datid = d.oid where d.datname = :name"
)
"""Whether nobody has been in a database yet, nor decided anything about it."""


def copied(url: str, what: str, make: Callable[[], Made]) -> Made:
    """Make of the database what ``make`` makes of it; by a copy, if it is empty and ``what`` was asked for before.

    ``what`` says all that the outcome depends on. ``make`` leaves no connection open; what it gives belongs to the
    database, and is given with each copy of it.
    """
    server = make_url(url).set(database="postgres")
    database = str(make_url(url).database)
    key = (server.render_as_string(hide_password=False), what)
    _asked[key] += 1
    if ANEW or url not in UNTOUCHED or _asked[key] == 1:
        return make()
    engine = connect.engine(server, application_name="tests-copies", isolation_level="AUTOCOMMIT", poolclass=NullPool)
    with engine.connect() as connection:
        if not connection.scalar(_ALONE, {"name": database}):
            return make()
        if key not in _templates:
            made = make()
            name = f"begun_{len(_templates)}"
            connection.exec_driver_sql(f'create database "{name}" template "{database}"')
            _templates[key] = name, made
            return made
        name, kept = _templates[key]
        connection.exec_driver_sql(f'drop database "{database}"')
        connection.exec_driver_sql(f'create database "{database}" template "{name}"')
        return cast("Made", kept)
