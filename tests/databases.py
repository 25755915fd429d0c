"""The databases of tests on a server: made, copied, given away and dropped by one session that stays.

A database is made by a copy of its template's files. PostgreSQL's other way, which writes every page to the log, takes
three times the work for databases as small as these. It is the gentler one on a server where others are at work; here
nobody is.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
from psycopg import sql
from sqlalchemy import make_url

_open: dict[str, Databases] = {}

_UNUSED = (
    "select d.datacl is null and d.datdba = (select oid from pg_roles where rolname = current_user) "
    "and d.datallowconn and d.datconnlimit = -1 and not d.datistemplate "
    "and s.sessions = 0 and not exists (select from pg_stat_activity as a where a.datid = d.oid) "
    "and not exists (select from pg_db_role_setting as r where r.setdatabase = d.oid) "
    "from pg_database as d join pg_stat_database as s on s.datid = d.oid where d.datname = %s"
)
"""Whether nobody has been in a database yet, nor decided anything about it."""


def on(url: str) -> Databases:
    """Give the databases of the server that ``url`` leads to, whichever its database."""
    server = make_url(url).set(database="postgres").render_as_string(hide_password=False)
    if server not in _open:
        _open[server] = Databases(server)
    return _open[server]


def leave() -> None:
    """Leave all servers."""
    while _open:
        _open.popitem()[1].close()


class Databases:
    """The databases of one server."""

    def __init__(self, url: str) -> None:
        """Take the URL of the server's database ``postgres``."""
        self._url = make_url(url)
        self._session = psycopg.connect(url, autocommit=True, application_name="tests-databases")
        self._spare: list[str] = []
        self._copies: set[str] = set()

    @contextmanager
    def scratch(self, template: str | None = None) -> Iterator[str]:
        """Make a database with a random name, empty or a copy of ``template``; give its URL; drop it afterwards."""
        name = f"walletmigrate_{secrets.token_hex(6)}"
        if template is None and self._spare:
            self._rename(self._spare.pop(), name)
        else:
            self.copy(template or "template1", name)
        try:
            yield self._url.set(database=name).render_as_string(hide_password=False)
        finally:
            self._run("drop database if exists {} with (force)", name)

    def is_unused(self, name: str) -> bool:
        """Tell whether nobody has been in a database yet, nor decided anything about it."""
        found = self._session.execute(_UNUSED, [name]).fetchone()
        return bool(found and found[0])

    def copy(self, template: str, name: str) -> None:
        """Make the database ``name`` of another one, which nobody is in."""
        self._run("create database {} template {} strategy file_copy", name, template)

    def replace(self, name: str, template: str) -> None:
        """Put a copy of ``template`` in the place of an unused database. Where that is empty, the next who wants one
        gets it; a copy is unused too, and not empty.
        """
        if name in self._copies:
            self._run("drop database {}", name)
        else:
            spare = f"spare_{secrets.token_hex(6)}"
            self._rename(name, spare)
            self._spare.append(spare)
        self.copy(template, name)
        self._copies.add(name)

    def close(self) -> None:
        """Leave the server."""
        self._session.close()

    def _rename(self, name: str, new: str) -> None:
        self._run("alter database {} rename to {}", name, new)

    def _run(self, command: str, *names: str) -> None:
        self._session.execute(sql.SQL(command).format(*map(sql.Identifier, names)))
