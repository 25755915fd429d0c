"""Jobs that read one snapshot of the database, as `verify` and `archive` do: they are listed, held and cancelled.

What they find is true of one set of transactions, so they have no batches that another process could take up, and no
pause: an open snapshot keeps vacuum from its work. Of each kind a mapping has one row in ``jobs``, used again by every
run. A thread says every few seconds that the run lives, looks whether it was cancelled, and then ends the statement
that runs. A number in the row (``claims``) tells runs apart: one that was taken for dead, and lives, puts nothing on
record.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Final

import psycopg
from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from walletmigrate import connect, job_rows, throttle
from walletmigrate.audit import Act, record
from walletmigrate.config import Settings
from walletmigrate.errors import JobCancelled, PreconditionRefused, SnapshotTooOld, UsageError
from walletmigrate.functions import FUNCTIONS_VERSION
from walletmigrate.job_rows import COLUMNS, Job, begin, job_of, retryable, said, table
from walletmigrate.observe import kind_of
from walletmigrate.standing import REASON

BEAT_SECONDS: Final = 5.0
"""How often a run says that it lives, and looks whether it was cancelled."""
DEAD_SECONDS: Final = 30
"""After how long without a word another run takes its place."""

WAITS: Final = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0, 10.0, 10.0)
"""Seconds between attempts to put on record what a run saw that was ended: a server starts again within a minute."""

_WRITE_SECONDS: Final = 1.0
_HELD: Final = 0.25
_QUERY_CANCELED: Final = "57014"
_log = logging.getLogger("walletmigrate")


@dataclass
class Run:
    """One run. ``job`` is None of one that has no row: a dry run, and on a standby, which nothing can be written to."""

    engine: Engine
    settings: Settings
    kind: str
    job: Job | None = None
    token: int = 0
    done: int = 0
    _stage: str = ""
    _wrote: float = 0.0
    _signals: throttle.Throttle | None = None
    _reads: Connection | None = None
    _holds: bool = False
    _waited: float = 0.0
    _lost: bool = False
    _over: threading.Event = field(default_factory=threading.Event)
    _cutting: threading.Lock = field(default_factory=threading.Lock)

    def at(self, stage: str, done: int | None = None, total: int | None = None) -> None:
        """Between two parts: say what comes, and how many of how many accounts are done; stand still while the
        throttle says so. Raises JobCancelled, and SnapshotTooOld where it has stood still with its snapshot too long.
        """
        if self.job is None:
            return
        self.done = self.done if done is None else done
        now = time.monotonic()
        if stage != self._stage or total is not None or now - self._wrote >= _WRITE_SECONDS:
            self._stage, self._wrote = stage, now
            note = json.dumps({"stage": stage})
            more = "items_total = coalesce(:total, items_total), details = details || cast(:note as jsonb)"
            if not self._changed(more, total=total, note=note):
                raise self._ended()
        while self._signals is not None and (reason := self._signals.reason()) is not None:
            self._hold(reason)
            self._wait(reason)
        if self._signals is not None:
            self._hold(None)
        if self._lost:
            raise self._ended()

    @contextmanager
    def cutting(self, connection: Connection) -> Iterator[None]:
        """What this connection runs meanwhile is ended when the job is cancelled."""
        self._reads = connection
        try:
            yield
        finally:
            # Not in the midst of a cancellation, which would end what the connection is used for next.
            with self._cutting:
                self._reads = None

    @contextmanager
    def reading(self, connection: Connection) -> Iterator[None]:
        """The same of one that holds a snapshot open, with which the throttle holds a run for a while only."""
        self._holds = True
        try:
            with self.cutting(connection):
                yield
        finally:
            self._holds = False

    def require(self, connection: Connection) -> None:
        """Make sure, in the caller's transaction, that the job is still this run's. Raises JobCancelled."""
        if self.job is not None and not self._change(connection, "held = null, held_at = null"):
            raise self._ended()

    def finish(self, connection: Connection, done: int) -> None:
        """Call the job done, after so many accounts, in the caller's transaction, which puts its result on record.
        Raises JobCancelled.
        """
        if self.job is None:
            return
        self.done = done
        changes = "state = 'done', held = null, held_at = null, finished_at = clock_timestamp(), items_total = :done"
        if not self._change(connection, changes):
            raise self._ended()

    def beat(self) -> None:
        """Say that it lives; where it is not to go on, end what it runs. To be called by a thread of its own."""
        while not self._over.wait(BEAT_SECONDS):
            # Without a database, or a connection of the pool's, the run itself fails, or goes on; a word that is
            # missing is said later.
            with suppress(SQLAlchemyError):
                self._lost = self._lost or not self._changed("held = held")
            if self._lost:
                self._cut()

    def _cut(self) -> None:
        """End the statement that runs. Again and again: the run may have been between two."""
        with self._cutting, suppress(psycopg.Error, AttributeError):
            if self._reads is not None:
                self._reads.connection.driver_connection.cancel_safe()  # type: ignore[union-attr]

    def over(self) -> None:
        """End the beats."""
        self._over.set()

    def translated(self, error: BaseException) -> BaseException:
        """A statement that was ended because the job was cancelled failed for that, and not by itself."""
        return self._ended() if self._lost and isinstance(error, DBAPIError) and _was_cut(error) else error

    def leave(self, error: BaseException, act: Act) -> None:
        """Take a run that did not come to its end out of work, on record. What was refused, or stopped by its operator,
        is no failure.
        """
        if self.job is None or isinstance(error, JobCancelled):
            return
        given_up = not isinstance(error, Exception) or isinstance(error, PreconditionRefused | UsageError)
        state, word = ("cancelled", "cancel") if given_up else ("failed", "failed")
        note = json.dumps({"error": said(error)})
        changes = f"state = '{state}', held = null, held_at = null, finished_at = clock_timestamp(), "
        changes += "details = details || cast(:note as jsonb)"
        with suppress(SQLAlchemyError), begin(self.engine) as connection:
            if self._change(connection, changes, note=note):
                record(connection, self.settings, f"{self.kind} {word}", act, mapping=self.job.mapping)

    def _wait(self, reason: str) -> None:
        """A while of standing still. A snapshot that is held open keeps vacuum from its work in the whole database."""
        began = time.monotonic()
        time.sleep(_HELD)
        if self._holds:
            self._waited += time.monotonic() - began
            if self._waited >= (limit := self.settings.throttle.snapshot_seconds):
                raise SnapshotTooOld(self.kind, limit, reason)

    def _hold(self, reason: str | None) -> None:
        assert self.job is not None
        if self._lost:
            raise self._ended()
        with begin(self.engine) as connection:
            job_rows.hold(connection, self.settings, self.job.id, reason)

    def _changed(self, changes: str, **values: Any) -> bool:
        with begin(self.engine) as connection:
            return self._change(connection, changes, **values)

    def _change(self, connection: Connection, changes: str, **values: Any) -> bool:
        """Change the row while it is this run's; whether it was."""
        assert self.job is not None
        statement = (
            f"update {table(self.settings)} set {changes}, items_done = :done, updated_at = clock_timestamp() "
            "where id = :id and claims = :token and state = 'running'"
        )
        given = {"id": self.job.id, "token": self.token, "done": self.done, **values}
        return bool(connection.execute(text(statement), given).rowcount)

    def _ended(self) -> JobCancelled:
        assert self.job is not None
        return JobCancelled(self.job.id, self.kind)


@contextmanager
def run(
    engine: Engine, settings: Settings, kind: str, mapping_name: str, act: Act, *, listed: bool = True
) -> Iterator[Run]:
    """A run of this kind on a mapping, which has to `Run.finish` itself; ``listed`` False: without a row.

    Held back before it begins while the throttle says so. Raises PreconditionRefused while another one is at work, and
    JobCancelled.
    """
    made = Run(engine, settings, kind)
    with engine.connect() as connection:
        standby = bool(connection.scalar(text("select pg_is_in_recovery()")))
    if standby or not listed:
        yield made
        return
    with begin(engine) as connection:
        made.job, made.token = _started(connection, settings, kind, mapping_name, act)
    # It locks nothing that a posting could wait for, as a job without a mapping.
    made._signals = throttle.of_settings(engine, settings, made.job.id, None)
    heart = threading.Thread(target=made.beat, name=f"walletmigrate {kind}", daemon=True)
    heart.start()
    try:
        made.at("waiting to begin")
        yield made
    except BaseException as error:
        why = made.translated(error)
        made.leave(why, act)
        if why is error:
            raise
        raise why from error
    finally:
        made.over()
        heart.join()


def insist(engine: Engine, write: Callable[[Connection], object], what: str) -> None:
    """Put on record what a run saw before it was ended, when its connection or the server may be gone as well. Where
    that cannot be, ``what`` it was is logged.
    """
    for wait in (*WAITS, None):
        try:
            with begin(engine) as connection:
                write(connection)
            return
        except SQLAlchemyError as failure:
            if wait is None or (isinstance(failure, DBAPIError) and not retryable(failure)):
                _log.error("%s, and that could not be put on record: %s", what, kind_of(failure))
                return
        time.sleep(wait)


def _started(connection: Connection, settings: Settings, kind: str, mapping_name: str, act: Act) -> tuple[Job, int]:
    """The row of this kind and mapping, begun anew; and the number of the run."""
    worker = {"worker": f"{socket.gethostname()}:{os.getpid()}"}
    values = job_rows.opening(kind, mapping_name, act, FUNCTIONS_VERSION, worker)
    while True:
        found = job_rows.newest(connection, settings, kind, mapping_name, lock=True)
        if found is not None:
            _refuse_beside(connection, found)
            again = text(_AGAIN.format(table=table(settings)))
            row = connection.execute(again, {**values, "id": found.id}).one_or_none()
        else:
            # No row: another process has just made it, and the next look finds it.
            row = connection.execute(text(_FIRST.format(table=table(settings))), values).one_or_none()
        if row is not None:
            return job_of(row), int(connection.scalar(text(_TOKEN.format(table=table(settings))), {"id": row.id}) or 0)


def _refuse_beside(connection: Connection, found: Job) -> None:
    if found.state != "running":
        return
    age = connection.scalar(text("select extract(epoch from clock_timestamp() - :at)"), {"at": found.updated_at})
    if float(age or 0) < DEAD_SECONDS:
        what = f"job {found.id}, the same, is at work ({found.details.get('worker')}, {float(age or 0):.0f} s ago)"
        mend = f"wait for its end, or: walletmigrate jobs cancel {found.id} {REASON}"
        raise PreconditionRefused(found.kind, [(what, mend)])


def _was_cut(error: DBAPIError) -> bool:
    return connect.sqlstate(error) == _QUERY_CANCELED


_AGAIN: Final = (
    "update {table} set state = 'running', actor = :actor, reason = :reason, version = :version, "
    "functions_version = :functions, items_total = null, items_done = 0, items_failed = 0, claims = claims + 1, "
    "held = null, held_at = null, started_at = clock_timestamp(), updated_at = clock_timestamp(), finished_at = null, "
    f"details = cast(:details as jsonb) where id = :id returning {COLUMNS}"
)
_FIRST: Final = (
    "insert into {table} (kind, mapping, actor, reason, version, functions_version, claims, details) "
    "values (:kind, :mapping, :actor, :reason, :version, :functions, 1, cast(:details as jsonb)) "
    f"on conflict (kind, mapping) where state in ('running', 'paused') do nothing returning {COLUMNS}"
)
_TOKEN: Final = "select claims from {table} where id = :id"
