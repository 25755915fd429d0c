"""Watched ORM attributes: what may be watched, and the listeners that stand while it is."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, TypedDict

from sqlalchemy import Column as SQLColumn
from sqlalchemy import Table, event, inspect
from sqlalchemy.orm import ColumnProperty, InstrumentedAttribute, Mapper, Session

from walletmigrate.assignments import ORM, Door, Rule
from walletmigrate.config import Column, Mapping
from walletmigrate.errors import UsageError
from walletmigrate.sessions import attributes_of
from walletmigrate.watched_flush import FlushHooks
from walletmigrate.watched_updates import UpdateHooks


class WatchDetails(TypedDict, total=False):
    """What the movements of a watched attribute say of themselves; see `LegacyBalanceAdapter.watch`."""

    type: str
    actor: str | Callable[[Session], str | None]
    reason: str
    idempotency_key: Callable[[Any], str | None]


class Watch:
    """One watched attribute, until `stop`; or for the length of a ``with``."""

    def __init__(self, watches: Watches, rule: Rule) -> None:
        self._watches = watches
        self._rule = rule

    def stop(self) -> None:
        """Let the ORM write the attribute itself again. Stopping twice is harmless."""
        self._watches.remove(self._rule)

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


class Watches:
    """The watched attributes of one adapter. The listeners are there only while there is one."""

    def __init__(self, mapping: Mapping, door: Door) -> None:
        self._mapping = mapping
        self._rules: list[Rule] = []
        self._flush = FlushHooks(mapping, door, self._rules)
        self._updates = UpdateHooks(mapping, door, self._rules)

    def add(self, attribute: Any, details: WatchDetails) -> Watch:
        """Watch an attribute. Raises UsageError for one that cannot be, or is already."""
        mapper, sql_column = _mapped(attribute)
        column = _configured(self._mapping, mapper, sql_column)
        name = f"{mapper.class_.__name__}.{attribute.key}"
        rule = Rule(
            mapping=self._mapping,
            column=column,
            mapper=mapper,
            table=_table(sql_column),
            attribute=name,
            type=details.get("type", ORM),
            actor=details.get("actor", ORM),
            reason=details.get("reason", f"assignment of {name}"),
            idempotency_key=details.get("idempotency_key"),
        )
        with _LOCK:
            _refuse_a_second(rule)
            _WATCHED.append(rule)
            for place in self._places(rule):
                event.listen(*place, propagate=True)
            self._rules.append(rule)
        return Watch(self, rule)

    def remove(self, rule: Rule) -> None:
        """Stop watching."""
        with _LOCK:
            if rule not in self._rules:
                return
            self._rules.remove(rule)
            _WATCHED.remove(rule)
            for place in self._places(rule):
                event.remove(*place)

    def _places(self, rule: Rule) -> list[tuple[Any, str, Callable[..., Any]]]:
        """The listeners that this rule needs and that no other rule of the adapter has set."""
        flush = self._flush
        places: list[tuple[Any, str, Callable[..., Any]]] = []
        if not any(rule.mapper is each.mapper for each in self._rules):
            names = ("before_update", "before_insert", "after_insert")
            places += [(rule.mapper.class_, name, getattr(flush, name)) for name in names]
        if not self._rules:
            places += [
                (Session, "before_flush", flush.before_flush),
                (Session, "after_flush", flush.after_flush),
                (Session, "do_orm_execute", self._updates.do_orm_execute),
            ]
        return places


_LOCK = threading.Lock()
_WATCHED: list[Rule] = []
"""Of all adapters of the process: two that post the same assignment would both move the money."""


def _refuse_a_second(rule: Rule) -> None:
    for other in _WATCHED:
        related = rule.mapper.isa(other.mapper) or other.mapper.isa(rule.mapper)
        if related and rule.balance is other.balance:
            raise UsageError(f"{rule.attribute} is watched already, as {other.attribute}; stop that watch first")


def _mapped(attribute: Any) -> tuple[Mapper[Any], SQLColumn[Any]]:
    """The mapper and the column of a plain mapped attribute; UsageError says what else it is."""
    what = "watch() takes a mapped attribute of a class that holds the balance column, for example User.total_coins"
    # Synonyms and hybrids are proxies of another class; an alias's attribute has no mapper for a parent.
    if not isinstance(attribute, InstrumentedAttribute):
        raise UsageError(f"{what}, not {attribute!r}: watch the attribute behind a synonym or a hybrid")
    mapper, found = inspect(attribute).parent, attribute.property
    if not isinstance(mapper, Mapper):
        raise UsageError(f"{what}, not that of an alias: {attribute}")
    if not isinstance(found, ColumnProperty):
        raise UsageError(f"{what}; {attribute} is a {type(found).__name__}")
    column = found.columns[0]
    if not isinstance(column, SQLColumn):
        raise UsageError(f"{what}; {attribute} is an SQL expression, nothing is written to it")
    return mapper, column


def _table(column: SQLColumn[Any]) -> Table:
    table = column.table
    if not isinstance(table, Table):
        raise UsageError(f"column {column} is mapped to no table")
    return table


def _configured(mapping: Mapping, mapper: Mapper[Any], column: SQLColumn[Any]) -> Column:
    ours = _is_mapped_table(mapping, _table(column))
    found = next((each for each in mapping.columns if ours and each.column == column.name), None)
    if found is None:
        known = ", ".join(f"{mapping.table}.{each.column}" for each in mapping.columns)
        raise UsageError(
            f"column {column} is not in mapping {mapping.name!r}, which has {known}; see walletmigrate.toml"
        )
    if not attributes_of(mapper, mapping, mapping.key):
        raise UsageError(
            f"{mapper.class_.__name__} does not map the key column {mapping.key!r} of mapping {mapping.name!r}"
        )
    if _python_type(column) is float:
        raise UsageError(
            f"column {column} gives floats, which are no money: map it as Numeric, or as Float(asdecimal=True)"
        )
    return found


def _is_mapped_table(mapping: Mapping, table: Table) -> bool:
    return (table.schema or mapping.schema_name, table.name) == (mapping.schema_name, mapping.table_name)


def _python_type(column: SQLColumn[Any]) -> type | None:
    try:
        return column.type.python_type
    except NotImplementedError:
        return None
