"""A psycopg connection that belongs to another framework, such as Django, as a Connection to post on.

SQLAlchemy ends what it begins: it would roll the owner's transaction back as soon as it lets go of the connection. So
it gets a view of the connection that cannot commit, roll back or close; the transaction stays the owner's.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

import psycopg
import sqlalchemy
from psycopg.pq import PipelineStatus
from psycopg.rows import tuple_row
from psycopg.types.numeric import NumericBinaryLoader, NumericLoader
from sqlalchemy import Connection
from sqlalchemy.pool import StaticPool

from walletmigrate.errors import UsageError

_lent: weakref.WeakKeyDictionary[psycopg.Connection[Any], Connection] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


class _View:
    """What SQLAlchemy sees. It holds the connection weakly: whoever owns it decides how long it lives."""

    def __init__(self, owned: psycopg.Connection[Any]) -> None:
        self._owned = weakref.ref(owned)

    def __getattr__(self, name: str) -> Any:
        owned = self._owned()
        if owned is None:
            raise psycopg.InterfaceError("the connection is gone")
        return getattr(owned, name)

    def cursor(self, *arguments: Any, **options: Any) -> Any:
        """A cursor of tuples and Decimals that takes %s, whatever the owner wants for itself."""
        made = self.__getattr__("cursor")(*arguments, **options)
        if isinstance(made, psycopg.RawCursor):
            made = psycopg.Cursor(made.connection)
        made.row_factory = tuple_row
        for loader in (NumericLoader, NumericBinaryLoader):
            made.adapters.register_loader("numeric", loader)
        return made

    def commit(self) -> None:
        """The owner commits."""

    def rollback(self) -> None:
        """The owner rolls back."""

    def close(self) -> None:
        """The owner closes."""


def borrowed(owned: psycopg.Connection[Any]) -> Connection:
    """The connection for SQLAlchemy, the same each time. Raises UsageError for one that is closed or in a pipeline."""
    if owned.closed:
        raise UsageError("the psycopg connection is closed: pass one that is open, inside its transaction.")
    if owned.pgconn.pipeline_status != PipelineStatus.OFF:
        raise UsageError(
            "the psycopg connection is in a pipeline, which answers later: call the adapter outside of it."
        )
    with _lock:
        found = _lent.get(owned)
        if found is None or found.closed or found.invalidated:
            view = _View(owned)
            engine = sqlalchemy.create_engine(
                "postgresql+psycopg://", creator=lambda: view, poolclass=StaticPool, use_native_hstore=False
            )
            found = _lent[owned] = engine.connect()
        return found
