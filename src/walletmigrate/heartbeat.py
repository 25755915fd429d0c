"""Each process tells the database that it lives, and by which flag document it decides.

Processes that decide by different documents for long are what dual-writes fail by elsewhere. Here no balance can
become wrong by it, but an operator wants to know: the exporter counts the documents in use (``flag_documents``) and
``walletmigrate doctor`` names the processes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import uuid
import weakref
from collections.abc import Iterable
from importlib.metadata import version
from typing import Final

from sqlalchemy import Engine, TextClause, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool

from walletmigrate import connect, forks, observe
from walletmigrate.config import Settings
from walletmigrate.errors import ConfigError
from walletmigrate.flag_sources import DocumentSource
from walletmigrate.flags import FlagSource
from walletmigrate.schema import quoted

LIVE_SECONDS: Final = 60
"""A process that has not beaten for so long counts as gone."""

_FORGOTTEN: Final = "1 hour"
_log = logging.getLogger("walletmigrate")


class Heartbeat:
    """Beats from a thread of its own, on connections of its own, in this process and in each that is forked from it.

    ``name`` says which program this is, for people. ``observers`` are told the age of the flags at each beat
    (`observe.FlagsSeen`): give it those of the adapter, else the age stands still in a process without work. What
    fails is logged once and tried again at the next beat: a process never fails for it. Raises ConfigError without a
    database URL.
    """

    def __init__(
        self,
        settings: Settings,
        source: FlagSource,
        *,
        name: str = "application",
        seconds: float = 10.0,
        observers: Iterable[observe.Observer] = (),
    ) -> None:
        if settings.database_url is None:
            raise ConfigError("a heartbeat needs a database URL", fix="set WALLETMIGRATE_DATABASE_URL")
        # No pool: a forked worker would go on with the connection of its parent, and both would spoil it.
        self._engine: Engine = connect.engine(
            settings.database_url, application_name="walletmigrate heartbeat", poolclass=NullPool
        )
        self._statements = _statements(settings.ledger_schema)
        self._source = source
        self._observers = observe.Observers(observers)
        self._name = name
        self._seconds = seconds
        self._thread: threading.Thread | None = None
        self._failing = False
        self._begin()
        forks.watch(self)

    def start(self) -> Heartbeat:
        """Begin to beat; again does nothing."""
        if self._thread is None:
            target, arguments = _beat_until, (weakref.ref(self), self._stop, self._seconds)
            thread = threading.Thread(target=target, args=arguments, name="walletmigrate-heartbeat", daemon=True)
            # At the interpreter's end no thread can start any more.
            with contextlib.suppress(RuntimeError):
                thread.start()
                self._thread = thread
        return self

    def beat(self) -> None:
        """Beat once, now. Raises SQLAlchemy's errors."""
        snapshot = self._source.snapshot()
        # Before the database is asked, which may be away while the flags are not.
        self._observers.tell(observe.FlagsSeen(snapshot.age_seconds(), snapshot.source, snapshot.document_id))
        facts = {
            "id": self.id,
            "name": self._name,
            "pid": os.getpid(),
            "version": version("walletmigrate"),
            "document": snapshot.document_id,
            "source": snapshot.source,
            "age": snapshot.age_seconds(),
            "problem": self._source.problem if isinstance(self._source, DocumentSource) else None,
        }
        with self._engine.begin() as connection:
            for statement in self._statements:
                connection.execute(statement, facts)

    def close(self, wait_seconds: float = 1.0) -> None:
        """End it. The process counts as gone a minute later."""
        self._stop.set()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(wait_seconds)

    def after_fork(self) -> None:
        """A forked child is a process of its own, and beats if its parent did."""
        beating = self._thread is not None and not self._stop.is_set()
        self._thread = None
        self._begin()
        if beating:
            self.start()

    def _begin(self) -> None:
        self.id = str(uuid.uuid4())
        self._stop = threading.Event()

    def _beat_somehow(self) -> None:
        try:
            self.beat()
        except (SQLAlchemyError, ConfigError) as error:
            if not self._failing:
                _log.warning("no heartbeat: %s; tried again every %s s", observe.kind_of(error), self._seconds)
            self._failing = True
        else:
            self._failing = False


def _statements(schema: str) -> tuple[TextClause, TextClause]:
    name = f"{quoted(schema)}.processes"
    return (
        text(
            f"insert into {name} (id, name, pid, version, document_id, document_source, document_age_seconds, problem) "
            "values (:id, :name, :pid, :version, :document, :source, :age, :problem) on conflict (id) do update set "
            "seen_at = clock_timestamp(), document_id = excluded.document_id, problem = excluded.problem, "
            "document_source = excluded.document_source, document_age_seconds = excluded.document_age_seconds"
        ),
        text(
            f"delete from {name} where id in (select id from {name} "
            f"where seen_at < clock_timestamp() - interval '{_FORGOTTEN}' for update skip locked)"
        ),
    )


def _beat_until(heartbeat: weakref.ref[Heartbeat], stop: threading.Event, pause: float) -> None:
    # Holds it only while it beats, so that one nobody closed can still be collected.
    while not stop.is_set():
        one = heartbeat()
        if one is None:
            return
        one._beat_somehow()
        del one
        stop.wait(pause)
