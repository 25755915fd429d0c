"""Transactions that run at the same time, in an order that the test forces.

A `Session` is one connection with a thread of its own. `waiting` starts work in it and returns when the
server says that the session waits for a lock, so that the next step of the test meets it there.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine, text
from sqlalchemy.engine.interfaces import IsolationLevel
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from walletmigrate import connect

READ_COMMITTED: IsolationLevel = "READ COMMITTED"
REPEATABLE_READ: IsolationLevel = "REPEATABLE READ"
SERIALIZABLE: IsolationLevel = "SERIALIZABLE"
LEVELS: tuple[IsolationLevel, ...] = (READ_COMMITTED, REPEATABLE_READ, SERIALIZABLE)

PATIENCE_SECONDS = 60.0
_POLL_SECONDS = 0.005
_ATTEMPTS = 500

T = TypeVar("T")


class Session:
    """One connection with a thread of its own; its transaction begins with its first statement."""

    def __init__(self, engine: Engine, isolation: IsolationLevel) -> None:
        self._engine = engine
        self._thread = ThreadPoolExecutor(max_workers=1)
        self.connection: Connection = self._run(lambda: engine.connect().execution_options(isolation_level=isolation))
        self.pid: int = self._run(lambda: self.connection.scalar(text("select pg_backend_pid()")))
        self.rollback()

    def do(self, work: Callable[[Connection], T]) -> T:
        """Run something on the connection, and wait for its result."""
        return self._run(lambda: work(self.connection))

    def sql(self, statement: str, **parameters: Any) -> list[tuple[Any, ...]]:
        """Run one statement, and give its rows."""
        return self.do(lambda connection: _rows(connection, statement, parameters))

    def look(self) -> None:
        """Take the snapshot of the transaction (at READ COMMITTED: of one statement)."""
        self.sql("select count(*) from pg_class")

    def waiting(self, work: Callable[[Connection], T], *, on: Session | None = None) -> Future[T]:
        """Start work that has to wait for a lock (of session ``on``), and return once it waits."""
        future = self.start(work)
        self.until_blocked(future, by=on)
        return future

    def start(self, work: Callable[[Connection], T]) -> Future[T]:
        """Start work, and return at once."""
        return self._thread.submit(work, self.connection)

    def until_blocked(self, future: Future[Any], *, by: Session | None = None) -> None:
        """Return once the started work waits for a lock (of session ``by``); fail if it ends instead."""
        query = "select 1 from unnest(pg_blocking_pids(:pid)) as b where b = coalesce(cast(:by as integer), b)"
        self._poll(query, future, pid=self.pid, by=by and by.pid)

    def until_blocking(self, future: Future[Any]) -> None:
        """Return once any other backend waits for a lock of this session; fail if the started work ends instead."""
        query = "select 1 from pg_stat_activity where pid <> pg_backend_pid() and :pid = any(pg_blocking_pids(pid))"
        self._poll(query, future, pid=self.pid)

    def commit(self) -> None:
        """Commit the transaction."""
        self.do(lambda connection: connection.commit())

    def rollback(self) -> None:
        """Roll the transaction back."""
        self.do(lambda connection: connection.rollback())

    def close(self) -> None:
        """Close connection and thread; a statement that still waits is cancelled."""
        with self._engine.connect() as other:
            other.execute(text("select pg_cancel_backend(:pid)"), {"pid": self.pid})
        try:
            self.do(lambda connection: connection.close())
        finally:
            self._thread.shutdown()

    def _poll(self, query: str, future: Future[Any], **parameters: object) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            with self._engine.connect() as other:
                if other.scalar(text(query), parameters):
                    return
            if future.done():
                raise AssertionError(f"nobody waited for a lock: {future.exception() or future.result()!r}")
            time.sleep(_POLL_SECONDS)
        raise AssertionError(f"nobody came to wait for a lock within {PATIENCE_SECONDS:g} s")

    def _run(self, work: Callable[[], T]) -> T:
        return self._thread.submit(work).result(PATIENCE_SECONDS)


class Stage:
    """Makes sessions in one database; they are closed together."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._sessions: list[Session] = []

    def session(self, isolation: IsolationLevel = READ_COMMITTED) -> Session:
        """Give a new session."""
        made = Session(self.engine, isolation)
        self._sessions.append(made)
        return made

    def close(self) -> None:
        """Close all sessions."""
        for session in self._sessions:
            session.close()


@contextmanager
def stage(url: str) -> Iterator[Stage]:
    """Give a stage whose sessions wait for locks longer than any test is patient."""
    made = Stage(patient_engine(url))
    try:
        yield made
    finally:
        made.close()


def patient_engine(url: str) -> Engine:
    """Make an engine without a pool whose lock time limit no test reaches."""
    limit = int(PATIENCE_SECONDS * 2000)
    return connect.engine(url, application_name="interleaving", lock_timeout_ms=limit, poolclass=NullPool)


def outcome(work: Callable[[], T]) -> T | str:
    """Give the result, or the SQLSTATE of the database's error."""
    try:
        return work()
    except DBAPIError as error:
        return str(getattr(error.orig, "sqlstate", None))


def of(future: Future[T]) -> T | str:
    """Give a started work's result or SQLSTATE, once it has one."""
    return outcome(lambda: future.result(PATIENCE_SECONDS))


def crowd(
    engine: Engine, isolation: IsolationLevel, works: Sequence[Callable[[Connection], T]]
) -> tuple[list[T], Counter[str]]:
    """Run all works at once, each in a connection and with transactions of its own.

    A serialization failure (40001) is tried again. Returns the results in order, and how often each SQLSTATE
    came; any other error is raised.
    """
    failures: Counter[str] = Counter()
    barrier = threading.Barrier(len(works))

    def run(work: Callable[[Connection], T]) -> T:
        with engine.connect().execution_options(isolation_level=isolation) as connection:
            barrier.wait(PATIENCE_SECONDS)
            for _ in range(_ATTEMPTS):
                try:
                    with connection.begin():
                        return work(connection)
                except DBAPIError as error:
                    state = str(getattr(error.orig, "sqlstate", None))
                    failures[state] += 1
                    if state != "40001":
                        raise
            raise AssertionError(f"no success in {_ATTEMPTS} attempts")

    with ThreadPoolExecutor(max_workers=len(works)) as threads:
        started = [threads.submit(run, work) for work in works]
        return [future.result() for future in started], failures


def _rows(connection: Connection, statement: str, parameters: dict[str, Any]) -> list[tuple[Any, ...]]:
    result = connection.execute(text(statement), parameters)
    return [tuple(row) for row in result] if result.returns_rows else []
