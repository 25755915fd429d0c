"""Sessions and connections of the caller: what is flushed before, expired after (and after a rollback), and told after
the commit.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import psycopg
from sqlalchemy import Column, Connection, Table, TypeDecorator, event, inspect
from sqlalchemy.exc import UnboundExecutionError
from sqlalchemy.orm import Mapper, Session, SessionTransaction, scoped_session
from sqlalchemy.orm.exc import UnmappedColumnError
from sqlalchemy.orm.util import identity_key

from walletmigrate.borrowed import borrowed
from walletmigrate.config import Mapping
from walletmigrate.errors import UsageError

Target = Session | scoped_session[Any] | Connection | psycopg.Connection[Any]
Tell = Callable[[bool], None]
Undo = Callable[[Session], None]

_PENDING = "walletmigrate_pending"


@dataclass(frozen=True, slots=True)
class _Pending:
    """What a session's transaction (or savepoint) still has to tell when it is committed, or undo when not."""

    at: SessionTransaction | None
    tell: Tell
    undo: Undo


def connection_of(target: Target, mapping: Mapping) -> Connection:
    """The connection to post on, of the database that the session has for the legacy table. Pending ORM changes are
    flushed first, as before any statement of a session.

    Raises UsageError for what is none of them.
    """
    if isinstance(target, Connection):
        return target
    if isinstance(target, psycopg.Connection):
        return borrowed(target)
    session = _session_of(target)
    if session is None:
        kind = type(target)
        raise UsageError(
            f"pass a Session or a Connection of SQLAlchemy, or a connection of psycopg 3, and not "
            f"{kind.__module__}.{kind.__qualname__}; async ones go to the async shell"
        )
    if session.new or session.dirty or session.deleted:
        session.flush()
    return _connection(session, mapping)


def _connection(session: Session, mapping: Mapping) -> Connection:
    # To ask the session (`get_bind`) takes the mapped class, which only the application knows. SQLAlchemy 2.0 has them
    # under the other name.
    binds = getattr(session, "binds", None) or getattr(session, "_Session__binds", {})
    ours = next((table for table in binds if isinstance(table, Table) and _is_of(table, mapping)), None)
    try:
        return session.connection(bind_arguments={} if ours is None else {"clause": ours})
    except UnboundExecutionError as error:
        raise UsageError(
            f"the session has no engine for {mapping.table}: bind it, or pass "
            "session.connection(bind_arguments={'mapper': …}) with your class"
        ) from error


def _session_of(target: object) -> Session | None:
    """The session; of a scoped one, the session in its registry. None for anything else."""
    found = target() if isinstance(target, scoped_session) else target
    return found if isinstance(found, Session) else None


def expire(target: Target, mapping: Mapping, keys: Iterable[str], *, reload: bool = False) -> None:
    """Forget the balances that loaded objects of these keys hold, and what the mapper makes of columns; the next look
    reads them anew.

    ``reload`` reads them now, for async sessions, where an attribute cannot be read behind the scenes.
    """
    session = _session_of(target)
    if session is None:
        return
    wanted = set(keys)
    # Not by the classes of the identities: these are the bases, and the column may be one of a class below.
    classes = {type(each) for each in session.identity_map.values()}
    for mapper in map(inspect, classes):
        names = attributes_of(mapper, mapping, *(column.column for column in mapping.columns))
        names += _made_of_columns(mapper) if names else []
        for found in _loaded(session, mapper, mapping, wanted) if names else ():
            # A change that is not flushed yet (a session without autoflush) is the program's to keep.
            known = [name for name in names if not inspect(found).attrs[name].history.has_changes()]
            if known:
                session.expire(found, known)
            if known and reload:
                session.refresh(found, known)


def attributes_of(mapper: Mapper[Any], mapping: Mapping, *columns: str) -> list[str]:
    """The attributes that hold these columns of the legacy table; none of a class that is mapped elsewhere."""
    names = []
    for table in mapper.tables:
        if _is_of(table, mapping):
            # By its name in the database; in the program it may have another (`Column.key`).
            for column in (each for each in table.columns if each.name in columns):
                with suppress(UnmappedColumnError):  # the class may leave a column out
                    names.append(mapper.get_property_by_column(column).key)
    return names


def _made_of_columns(mapper: Mapper[Any]) -> list[str]:
    """The attributes that the database works out of columns, as SQLAlchemy itself expires them behind an UPDATE."""
    return [
        each.key for each in mapper.column_attrs if not isinstance(each.expression, Column) and each.expire_on_flush
    ]


def column_named(table: Table, name: str) -> Column[Any]:
    """The column of this name in the database; in the program it may have another (`Column.key`)."""
    return next(each for each in table.columns if each.name == name)


def _is_of(table: object, mapping: Mapping) -> bool:
    schema = getattr(table, "schema", None) or mapping.schema_name
    return (schema, getattr(table, "name", None)) == (mapping.schema_name, mapping.table_name)


def _loaded(session: Session, mapper: Mapper[Any], mapping: Mapping, keys: set[str]) -> list[Any]:
    if any(isinstance(c.type, TypeDecorator) for c in mapper.primary_key):
        # The program's keys may be of any kind: all that is loaded.
        return [each for each in session.identity_map.values() if isinstance(each, mapper.class_)]
    if [c.name for c in mapper.primary_key] == [mapping.key]:
        found = [
            session.identity_map.get(identity_key(mapper.class_, identity))
            for key in keys
            for identity in _identities(key)
        ]
        return [each for each in found if isinstance(each, mapper.class_)]
    attributes = attributes_of(mapper, mapping, mapping.key)
    return [
        each
        for each in session.identity_map.values()
        if isinstance(each, mapper.class_) and any(str(inspect(each).dict.get(name)) in keys for name in attributes)
    ]


def _identities(key: str) -> list[Any]:
    """The forms in which a primary key of that text may stand in an identity map."""
    forms: list[Any] = [key]
    if key.lstrip("-").isdigit():
        with suppress(ValueError):  # text keys such as "--5" and "²" are no numbers, and one may have too many digits
            forms.append(int(key))
    elif len(key) == 36:
        with suppress(ValueError):
            forms.append(uuid.UUID(key))
    return forms


def _nothing(_: Session) -> None:
    pass


def tell_when_committed(target: Target, tell: Tell, undo: Undo = _nothing) -> None:
    """Call ``tell(True)`` after the outermost commit of a Session; on a bare Connection ``tell(False)`` now.

    What a savepoint rolls back is not told, for it did not happen; ``undo`` is called with the session instead. It may
    not use the database.
    """
    session = _session_of(target)
    if session is None:
        tell(False)
        return
    transaction = session.get_nested_transaction() or session.get_transaction()
    session.info.setdefault(_PENDING, []).append(_Pending(transaction, tell, undo))


def listen() -> None:
    """Hear of every session's end. Called when the first adapter is made, not at import."""
    if not event.contains(Session, "after_commit", _after_commit):
        event.listen(Session, "after_commit", _after_commit)
        event.listen(Session, "after_soft_rollback", _after_rollback)
        event.listen(Session, "after_transaction_end", _after_end)


def _after_commit(session: Session) -> None:
    pending = session.info.get(_PENDING)
    if not pending:
        return
    nested = session.get_nested_transaction()
    if nested is None:
        session.info[_PENDING] = []
        for each in pending:
            each.tell(True)
        return
    # A savepoint was released: what it held now belongs to the transaction around it.
    session.info[_PENDING] = [replace(each, at=nested.parent) if each.at is nested else each for each in pending]


def _after_rollback(session: Session, previous: SessionTransaction) -> None:
    pending = session.info.get(_PENDING)
    if pending:
        kept: list[_Pending] = []
        lost: list[_Pending] = []
        for each in pending:
            (lost if _within(each.at, previous) else kept).append(each)
        session.info[_PENDING] = kept
        for each in lost if previous.parent is not None else ():  # behind the outermost all is expired
            each.undo(session)


def _after_end(session: Session, transaction: SessionTransaction) -> None:
    # What is still a savepoint's own at its end was not released: a flush that failed in it ends it without a word.
    _after_rollback(session, transaction)
    if transaction.parent is None:
        session.info.pop(_PENDING, None)


def _within(inner: SessionTransaction | None, outer: SessionTransaction) -> bool:
    while inner is not None:
        if inner is outer:
            return True
        inner = inner.parent
    return False
