"""UPDATE statements that a Session executes on a watched column.

``update(User).where(…).values(total_coins=User.total_coins + 10)`` is routed where its WHERE is over the table alone
and it names few rows: these are locked, what the statement says is posted for each, and the statement runs for just
these rows with the column set to itself, so that its other values, its row count, RETURNING and what the ORM does to
loaded objects stay the application's. All of it stands in a savepoint: where the statement then meets other rows than
those that were locked (criteria that a mapper or another listener adds), it is taken back and runs as it was.

Everything else is left alone, is caught by the fence, and is told.
"""

from __future__ import annotations

from collections.abc import Mapping as MappingABC
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal

from sqlalchemy import Connection, CursorResult, FromClause, Insert, Result, Select, SelectBase, Table, Update, select
from sqlalchemy.orm import ORMExecuteState
from sqlalchemy.sql import visitors
from sqlalchemy.sql.elements import BindParameter, ClauseElement

from walletmigrate import observe
from walletmigrate.assignments import (
    Door,
    Rule,
    change,
    is_column,
    is_expression,
    is_literal,
    literal,
    obstacle,
    same_table,
)
from walletmigrate.config import Mapping
from walletmigrate.errors import AssignmentRefused, LegacyValueInvalid, UnknownAccount
from walletmigrate.movements import Key, Movement
from walletmigrate.sessions import Tell, attributes_of, column_named, expire, tell_when_committed

ROUTED_ROWS = 1000
"""More rows in one UPDATE are left to the fence and to the backfill: each would be a posting of its own."""


@dataclass(frozen=True)
class Written:
    """One watched column that a statement sets. ``place`` is how its VALUES name it."""

    rule: Rule
    place: Any
    value: Any


class Unroutable(Exception):
    """Why a statement is left as it is; never reaches the caller."""


class UpdateHooks:
    """The listener to a session's statements, for the watched attributes of one adapter."""

    def __init__(self, mapping: Mapping, door: Door, rules: list[Rule]) -> None:
        self._mapping = mapping
        self._door = door
        self._rules = rules

    def do_orm_execute(self, state: ORMExecuteState) -> Result[Any] | None:
        """Post what an UPDATE says of a watched column, and run it for the rows that were posted."""
        written = self._written(state)
        if not written:
            return None
        if state.session.connection_callable is not None:
            self._unrouted(state, written, "the session is sharded")
            return None
        connection = state.session.connection(bind_arguments=dict(state.bind_arguments))
        if not self._door.installed(connection):
            return None
        if state.bind_mapper is not None:
            state.session._autoflush()
        try:
            if reason := obstacle(connection):
                raise Unroutable(reason)
            if state.execution_options.get("schema_translate_map"):
                raise Unroutable("schema_translate_map is in use")
            if isinstance(state.statement, Insert):
                raise Unroutable("INSERT … ON CONFLICT DO UPDATE")
            if state.parameters:
                self._post_rows(state, connection, written)
                return None
            return self._route(state, connection, written)
        except Unroutable as unroutable:
            self._unrouted(state, written, str(unroutable))
            return None

    def _unrouted(self, state: ORMExecuteState, written: list[Written], reason: str) -> None:
        where: Literal["insert", "update"] = "insert" if isinstance(state.statement, Insert) else "update"
        events = [observe.Unrouted(where, self._mapping.name, each.rule.attribute, reason) for each in written]

        def tell(_: bool) -> None:
            for event in events:
                self._door.tell(event)

        tell_when_committed(state.session, tell)

    def _written(self, state: ORMExecuteState) -> list[Written]:
        """The watched columns that the statement sets, by its VALUES or by its parameters."""
        statement = state.statement
        if isinstance(statement, Update):
            values = dict(statement._values or getattr(statement, "_ordered_values", None) or ())
        elif isinstance(statement, Insert):
            values = getattr(getattr(statement, "_post_values_clause", None), "update_values_to_set", None) or {}
        else:
            return []
        found = []
        for rule in self._rules if isinstance(statement.table, Table) else ():
            if same_table(statement.table, rule.table):
                names = _names(state, rule, rule.column.column)
                places = [
                    (place, value)
                    for place, value in dict(values).items()
                    if place in names or is_column(place, rule.balance)
                ]
                found += [Written(rule, *each) for each in places]
                if isinstance(statement, Update) and not places and any(names & row.keys() for row in _rows(state)):
                    found.append(Written(rule, None, None))
        return found

    def _route(self, state: ORMExecuteState, connection: Connection, written: list[Written]) -> Result[Any] | None:
        statement, rule = state.statement, written[0].rule
        assert isinstance(statement, Update)
        _refuse_shapes(statement, written)
        steps = [(each, *_step(each, connection)) for each in written]
        key = _attribute(state, rule, self._mapping.key)
        with connection.begin_nested() as savepoint:
            rows = connection.execute(_lock(state, statement, written)).all()
            if not rows:
                return None
            if len(rows) > ROUTED_ROWS:
                raise Unroutable(f"more than {ROUTED_ROWS} rows")
            if any(None in row for row in rows):
                raise Unroutable("NULL is no balance")
            keys = [row[0] for row in rows]
            tell = self._post(connection, self._movements(state, keys, steps))
            same = {each.place: _attribute(state, each.rule, each.rule.column.column) for each in written}
            routed = statement.values(same)
            routed._where_criteria = (key.in_(keys),)
            result, count = _counted(state.invoke_statement(statement=routed))
            if count != len(keys):
                savepoint.rollback()
                raise Unroutable("the statement has criteria of its own for the rows it meets")
        texts = [str(key) for key in keys]
        tell_when_committed(state.session, tell, undo=lambda session: expire(session, self._mapping, texts))
        expire(state.session, self._mapping, texts, reload=connection.dialect.is_async)
        return result

    def _movements(
        self, state: ORMExecuteState, keys: Sequence[Key], steps: list[tuple[Written, Any, Decimal | int | None]]
    ) -> list[tuple[Rule, bool, Movement]]:
        session, movements = state.session, []
        for key in keys:
            for each, to, by in steps:
                if by is None:
                    movements.append((each.rule, True, each.rule.set_to(session, key, to)))
                elif by:
                    movements.append((each.rule, False, each.rule.change_by(session, key, by)))
        return movements

    def _post(self, connection: Connection, movements: list[tuple[Rule, bool, Movement]]) -> Tell:
        if not movements:
            return lambda _: None
        postings, tell = self._door.post(connection, [movement for _, _, movement in movements])
        for (rule, absolute, movement), posting in zip(movements, postings, strict=True):
            if absolute and posting.mode == "ledger":
                raise AssignmentRefused(self._mapping.name, movement.key, rule.attribute)
        return tell

    def _post_rows(self, state: ORMExecuteState, connection: Connection, written: list[Written]) -> None:
        """``execute(update(User), [{"id": 1, "total_coins": 5}, …])``: the ORM's update by primary key."""
        statement, mapper = state.statement, state.bind_mapper
        rows = _rows(state)
        assert isinstance(statement, Update)
        by_key = mapper is not None and [c.name for c in mapper.primary_key] == [self._mapping.key]
        if statement._where_criteria or statement._values or isinstance(state.parameters, MappingABC) or not by_key:
            raise Unroutable("parameters beside the statement")
        (key,) = attributes_of(mapper, self._mapping, self._mapping.key) if mapper else ("",)
        asked = [(each.rule, row) for row in rows for each in written if _names(state, each.rule) & row.keys()]
        if len(rows) > ROUTED_ROWS:
            raise Unroutable(f"more than {ROUTED_ROWS} rows")
        movements = []
        for rule, row in asked:
            (name,) = _names(state, rule) & row.keys()
            to = literal(row[name], rule, connection.dialect)
            if to is None or is_expression(to) or row.get(key) is None:
                raise Unroutable("a value that is no balance")
            movements.append((rule, True, rule.set_to(state.session, row[key], to)))
        if len({row.get(key) for row in rows}) < len(rows):
            raise Unroutable("one row twice")
        with connection.begin_nested():
            try:
                tell = self._post(connection, movements)
            except (LegacyValueInvalid, UnknownAccount) as error:
                raise Unroutable(error.code) from error
        tell_when_committed(state.session, tell)


def _rows(state: ORMExecuteState) -> list[MappingABC[str, Any]]:
    given = state.parameters or ()
    return [given] if isinstance(given, MappingABC) else list(given)


def _names(state: ORMExecuteState, rule: Rule, *more: str) -> set[str]:
    """How a string may name the column: the ORM by its attribute, Core by itself."""
    mapper = state.bind_mapper
    if mapper is None:
        return {rule.column.column}
    return {*attributes_of(mapper, rule.mapping, rule.column.column), *more}


def _attribute(state: ORMExecuteState, rule: Rule, column: str) -> Any:
    """The column as the statement's entity has it: only so can the ORM evaluate it for loaded objects."""
    mapper = state.bind_mapper
    names = attributes_of(mapper, rule.mapping, column) if mapper is not None else []
    return getattr(mapper.class_, names[0]) if mapper is not None and names else column_named(rule.table, column)


def _refuse_shapes(statement: Update, written: list[Written]) -> None:
    if getattr(statement, "_maintain_values_ordering", False) or getattr(statement, "_ordered_values", None):
        raise Unroutable("ordered_values()")
    if statement._independent_ctes:
        raise Unroutable("a CTE")
    for criterion in statement._where_criteria:
        _refuse_criterion(criterion, written[0].rule.table)
    ours = {id(each.value) for each in written}
    for value in (statement._values or {}).values():
        if id(value) not in ours and is_expression(value):
            for element in visitors.iterate(value):
                if any(is_column(element, each.rule.balance) for each in written):
                    raise Unroutable("another value is made from the balance")


def _refuse_criterion(criterion: ClauseElement, table: Table) -> None:
    for element in visitors.iterate(criterion):
        source = getattr(element, "table", None)
        foreign = isinstance(source, FromClause) and not same_table(source, table)
        if foreign or isinstance(element, SelectBase):
            raise Unroutable("a WHERE over more than the table")
        if isinstance(element, BindParameter) and (element.required or element.callable is not None):
            raise Unroutable("a parameter without a value")


def _step(written: Written, connection: Connection) -> tuple[Any, Decimal | int | None]:
    """What the column is set to, or by how much it changes; in major units."""
    rule, value = written.rule, written.value
    if is_literal(value):
        return literal(value.value, rule, connection.dialect), None
    by = change(value, rule, connection.dialect) if is_expression(value) else None
    if by is None:
        raise Unroutable("neither a value nor column ± amount")
    return None, by


def _lock(state: ORMExecuteState, statement: Update, written: list[Written]) -> Select[Any]:
    """The rows that the statement would write, locked by key, with their balances."""
    key = _attribute(state, written[0].rule, written[0].rule.mapping.key)
    balances = [_attribute(state, each.rule, each.rule.column.column) for each in written]
    found = select(key, *balances).where(*statement._where_criteria)
    return found.order_by(key).limit(ROUTED_ROWS + 1).with_for_update(key_share=True)


def _counted(result: Result[Any]) -> tuple[Result[Any], int]:
    """How many rows the statement wrote. With RETURNING the ORM's result has no count: its rows are counted."""
    if isinstance(result, CursorResult):
        return result, result.rowcount
    frozen = result.freeze()
    return frozen(), len(frozen.data)
