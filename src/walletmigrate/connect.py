"""Connections for jobs and the command line: the driver, time limits, and URLs without their passwords.

The application brings an engine of its own; nothing here touches it.

Time limits are set inside each transaction with ``SET LOCAL``, not on the connection. Behind a PgBouncer that
pools transactions, the start-up parameter ``options=-c …`` is refused unless it is configured to be ignored,
and a plain ``SET`` would stay on a server connection that the next client gets. ``SET LOCAL`` costs one round
trip per transaction and, unlike ``select set_config(…)``, takes no snapshot, so that ``SET TRANSACTION`` and
the first real statement of a REPEATABLE READ transaction behave as if it were not there. What makes and drops databases
runs in no transaction: see `_limit_session`.

In the same breath each transaction gets the settings that reading values depends on (`_READABLE`), and no limit on its
own length or on its pauses (`_UNHURRIED`), whatever server, database or role say; and BEGIN names its isolation level.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

import psycopg
import sqlalchemy
from psycopg import pq
from psycopg.conninfo import make_conninfo
from pydantic import SecretStr
from sqlalchemy import event, make_url, text
from sqlalchemy.engine import URL, Connection, Engine
from sqlalchemy.engine.interfaces import IsolationLevel
from sqlalchemy.exc import ArgumentError, DBAPIError, OperationalError
from sqlalchemy.pool import NullPool

from walletmigrate.errors import ConfigError, DatabaseUnreachable

LOCK_TIMEOUT_MS: Final = 5_000
"""How long a statement of a job waits for a lock, in milliseconds."""

STATEMENT_TIMEOUT_MS: Final = 300_000
"""How long a statement of a job may run, in milliseconds; 0 is no limit."""

_READABLE: Final = (
    ("client_encoding", "'UTF8'"),
    # Of the style of output alone: in which order the application's own texts have day and month stays as it is.
    ("datestyle", "'ISO'"),
    ("extra_float_digits", "1"),
    ("array_nulls", "on"),
    ("quote_all_identifiers", "off"),
)
"""What the driver and this library read values by. search_path and TimeZone are not touched: the application's triggers
and cross-checks run in these transactions too, and nothing here depends on either.
"""

_UNHURRIED: Final = (
    # Set for a role, to end what an application forgot, these would cut off a batch that waits for its job's other
    # sessions, or what reads one snapshot for an hour: each time anew, so that it never came to its end.
    "set local idle_in_transaction_session_timeout = 0",
    "set local transaction_timeout = 0",  # the last: PostgreSQL 15 and 16 do not know it
)
_TRANSACTION_TIMEOUT_SINCE: Final = 17
_CONNECT_SECONDS: Final = 10
_KEPT_ALIVE: Final = {"keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3}
"""Seconds, and tries: a host that is gone without a word is missed after a minute, and not after the two hours that a
system waits by default. Of no meaning for a socket.
"""
_INSUFFICIENT_PRIVILEGE: Final = "42501"
_READ_ONLY: Final = "25006"
_PASSING: Final = ("08", "57P01", "57P02", "57P03", "57P05", _READ_ONLY)
"""SQLSTATEs of a session that was ended from outside, of a server that shuts down or starts, and of one that is a
standby, or set read-only, for now.
"""
_SCHEMES: Final = frozenset({"postgresql", "postgres", "postgresql+psycopg"})
_SECRET_PARAMETERS: Final = frozenset({"password", "sslpassword", "passphrase", "oauth_client_secret"})
_HIDDEN: Final = "***"
_UNREADABLE: Final = "(unreadable URL)"


def parsed(url: str | SecretStr | URL) -> URL:
    """Read a PostgreSQL URL; plain ``postgresql://`` and ``postgres://`` mean psycopg 3.

    Raises ConfigError, which never quotes the URL, when it cannot be read or names another driver.
    """
    try:
        read = make_url(url.get_secret_value() if isinstance(url, SecretStr) else url)
    except (ArgumentError, ValueError):  # their texts quote the URL or a part of it
        raise ConfigError(
            "the database URL cannot be read",
            fix="write postgresql://user:password@host:5432/database, and in user and password "
            "@ : / % as %40 %3A %2F %25",
        ) from None
    if read.drivername not in _SCHEMES:
        raise ConfigError(
            f"the database URL names {read.drivername!r}",
            fix="use postgresql:// (PostgreSQL, driver psycopg 3)",
        )
    return read.set(drivername="postgresql+psycopg")


def masked(url: str | SecretStr | URL) -> str:
    """Give the URL as ``postgresql://…`` with every password in it replaced; never raises."""
    try:
        read = parsed(url)
    except ConfigError:
        return _UNREADABLE
    hidden = {name: _HIDDEN for name in read.query if name.lower() in _SECRET_PARAMETERS}
    shown = read.set(drivername="postgresql").update_query_dict(hidden)
    address, mark, query = shown.render_as_string(hide_password=True).partition("?")
    return address + mark + query.replace("%2A", "*").replace("%2F", "/")


def has_secret(url: str) -> bool:
    """Whether a password stands in what may be the URL of a PostgreSQL database; never raises."""
    try:
        read = parsed(url)
    except ConfigError:
        return False
    return bool(read.password) or any(name.lower() in _SECRET_PARAMETERS for name in read.query)


def engine(
    url: str | SecretStr | URL,
    *,
    application_name: str,
    lock_timeout_ms: int = LOCK_TIMEOUT_MS,
    statement_timeout_ms: int = STATEMENT_TIMEOUT_MS,
    isolation_level: IsolationLevel = "READ COMMITTED",
    **options: Any,
) -> Engine:
    """Make an engine whose every transaction has a lock and a statement time limit (milliseconds, 0: none).

    It has no other, and what is read does not depend on the settings of server, database or role.
    ``application_name`` is what ``pg_stat_activity`` shows. ``options`` go to ``sqlalchemy.create_engine``.
    An engine in AUTOCOMMIT has the limits on its sessions instead, and behind a pooler, where sessions are not its own,
    the server's; so has a connection that alone is put in autocommit.

    Raises ConfigError for a URL that cannot be read; connects to nothing yet.
    """
    address = parsed(url)
    arguments: dict[str, Any] = {
        "application_name": application_name,
        "connect_timeout": _CONNECT_SECONDS,
        **{name: value for name, value in _KEPT_ALIVE.items() if name not in address.query},
        # Prepared statements outlive a transaction; a PgBouncer older than 1.21 then mixes up its clients.
        "prepare_threshold": None,
        **options.pop("connect_args", {}),
    }
    # No hstore here: to look for it costs each engine a round trip in a savepoint, which an interrupt can meet.
    options = {"use_native_hstore": False, "isolation_level": isolation_level, **options}
    made = sqlalchemy.create_engine(address, connect_args=arguments, **options)
    limits = (("lock_timeout", int(lock_timeout_ms)), ("statement_timeout", int(statement_timeout_ms)))
    settings = "; ".join(f"set local {name} = {value}" for name, value in (*limits, *_READABLE))

    @event.listens_for(made, "begin")
    def _limit(connection: Connection) -> None:
        if not _in_autocommit(connection):
            connection.exec_driver_sql(f"{settings}; {unhurried(connection)}")

    if isolation_level == "AUTOCOMMIT":
        event.listen(made, "connect", partial(_limit_session, limits))
    return made


def _limit_session(limits: tuple[tuple[str, int], ...], driver: psycopg.Connection[Any], _record: object) -> None:
    """Set the limits for as long as this connection lasts: statements outside of transactions have no other place.

    A pooler gives the session to its next client, with all that was set. It is known by the process that it names at
    the start, which is not the server's.
    """
    if driver.execute("select pg_backend_pid()").fetchone() == (driver.info.backend_pid,):
        driver.execute("; ".join(f"set {name} = {value}" for name, value in limits).encode())


def unhurried(connection: Connection) -> str:
    """Statements that take every limit off this transaction's length and pauses, as far as its server has any."""
    release = connection.dialect.server_version_info or (0,)
    return "; ".join(_UNHURRIED if release >= (_TRANSACTION_TIMEOUT_SINCE,) else _UNHURRIED[:-1])


def reachable(engine: Engine) -> None:
    """Open a connection and ask for one row.

    Raises DatabaseUnreachable, with the password masked everywhere, when that fails.
    """
    try:
        with engine.connect() as connection:
            connection.execute(text("select 1"))
    except DBAPIError as error:
        raise DatabaseUnreachable(masked(engine.url), words(error, engine.url)) from None


def words(error: DBAPIError, url: URL) -> str:
    """The driver's own words on one line, without any secret of the URL."""
    said = " ".join(str(error.orig).split())
    secret_values = [value for name, value in url.query.items() if name.lower() in _SECRET_PARAMETERS]
    for value in (url.password, *secret_values):
        for secret in (value,) if isinstance(value, str) else value or ():
            if secret:
                said = said.replace(secret, _HIDDEN)
    return said.rstrip(".")


def sqlstate(error: DBAPIError) -> str:
    """The five characters that PostgreSQL gave, "" where it gave none."""
    return str(getattr(error.orig, "sqlstate", None) or "")


def conflicted(error: DBAPIError) -> bool:
    """Whether the same transaction may well succeed when it is tried again: a serialization failure or a deadlock
    (class 40), or a lock that was not had in time (55P03).
    """
    return sqlstate(error).startswith(("40", "55P03"))


def lost(error: DBAPIError) -> bool:
    """Whether it is the connection's and not the statement's: it was lost, could not be made, or cannot write."""
    state = sqlstate(error)
    without = not state and isinstance(error, OperationalError)
    return error.connection_invalidated or without or state.startswith(_PASSING)


def away(engine: Engine) -> str | None:
    """Why the database cannot be worked with now, if that passes by itself; no secret in it.

    None where it answers, and also where it refuses this client (a password, a database, a right to connect): then the
    next statement says so.
    """
    try:
        with engine.connect() as connection:
            writable = connection.scalar(text("select current_setting('transaction_read_only') = 'off'"))
        return None if writable else "it takes no writes (it is a standby, or was set read-only)"
    except DBAPIError as error:
        if not lost(error) or not _silent(engine, error):
            return None
        return words(error, engine.url)


def _silent(engine: Engine, error: DBAPIError) -> bool:
    """Whether a server that could not be connected to is away. A refusal has no SQLSTATE in the driver's error, so the
    driver's library is asked, which knows it: a server that refuses a client is there.
    """
    if sqlstate(error) or isinstance(error.orig, psycopg.errors.ConnectionTimeout):
        return True
    given = {**engine.dialect.create_connect_args(engine.url)[1], "connect_timeout": _CONNECT_SECONDS}
    given.pop("context", None)  # SQLAlchemy's own
    conninfo = make_conninfo(**given)
    return pq.PGconn.ping(conninfo.encode()) in (pq.Ping.REJECT, pq.Ping.NO_RESPONSE)


@contextmanager
def scratch_database(server: str | SecretStr | URL | Engine, template: str | None = None) -> Iterator[str]:
    """Create a database with a random name on the server, yield its URL, and drop it with its sessions.

    ``server`` is the URL of any database there whose user may create databases, or an engine for it;
    ``template`` is the database to copy (nobody may be connected to it). The URL yielded has its password.

    Raises DatabaseUnreachable when the server does not answer.
    """
    url = server.url if isinstance(server, Engine) else parsed(server)
    name = f"walletmigrate_{secrets.token_hex(6)}"
    source = "template1" if template is None else template.replace('"', '""')
    admin = engine(url, application_name="walletmigrate-scratch", isolation_level="AUTOCOMMIT", poolclass=NullPool)
    try:
        reachable(admin)
        with admin.connect() as connection:
            connection.exec_driver_sql(f'create database "{name}" template "{source}"')
        try:
            yield url.set(drivername="postgresql", database=name).render_as_string(hide_password=False)
        finally:
            _drop_database(admin, name)
    finally:
        admin.dispose()


def _drop_database(admin: Engine, name: str) -> None:
    """Drop a database and end the sessions in it.

    An autovacuum worker belongs to nobody, so PostgreSQL forbids FORCE to a user who may not signal every session.
    A plain DROP ends such a worker itself, and waits 5 s for the others.
    """
    with admin.connect() as connection:
        try:
            connection.exec_driver_sql(f'drop database if exists "{name}" with (force)')
        except DBAPIError as error:
            if sqlstate(error) != _INSUFFICIENT_PRIVILEGE:
                raise
            connection.exec_driver_sql(f'drop database if exists "{name}"')


def _in_autocommit(connection: Connection) -> bool:
    return bool(getattr(connection.connection.driver_connection, "autocommit", False))
