"""What ORM code wrote to a watched attribute, made into a movement: a value that is set, or column ± amount."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Protocol, cast

from sqlalchemy import BinaryExpression, Connection, Dialect, Table
from sqlalchemy import Column as SQLColumn
from sqlalchemy.orm import Mapper, Session
from sqlalchemy.sql import operators
from sqlalchemy.sql.elements import BindParameter, ClauseElement, Grouping
from sqlalchemy.types import TypeEngine

from walletmigrate import observe
from walletmigrate.config import WIDE, Column, Mapping
from walletmigrate.movements import Key, Movement
from walletmigrate.postings import Posting
from walletmigrate.sessions import Tell, column_named

ORM = "orm"
"""Type and actor of a watched movement, unless `watch` was told otherwise."""


class Door(Protocol):
    """What a watch uses of the adapter, on a connection, in the caller's transaction."""

    def installed(self, connection: Connection) -> bool:
        """Whether there is a ledger; without one the ORM is left alone."""

    def dual_written(self, connection: Connection, keys: Sequence[Key]) -> list[Key]:
        """Those of the keys for which the flags ask for dual-write."""

    def post(self, connection: Connection, movements: Sequence[Movement]) -> tuple[tuple[Posting, ...], Tell]:
        """Post a batch; the observers hear of it when the second value is called."""

    def tell(self, event: observe.Event) -> None:
        """Tell the observers."""


@dataclass(frozen=True, eq=False)
class Rule:
    """One watched attribute: the column it holds, and what its movements say of themselves."""

    mapping: Mapping
    column: Column
    mapper: Mapper[Any]
    table: Table
    attribute: str
    type: str
    actor: str | Callable[[Session], str | None]
    reason: str
    idempotency_key: Callable[[Any], str | None] | None

    @functools.cached_property
    def balance(self) -> SQLColumn[Any]:
        """The mapped balance column."""
        return column_named(self.table, self.column.column)

    @functools.cached_property
    def key(self) -> SQLColumn[Any]:
        """The mapped key column."""
        return column_named(self.table, self.mapping.key)

    def set_to(self, session: Session, key: Key, balance: Any, of: object = None) -> Movement:
        """The movement of an assigned value; ``of`` is the object, where there is one."""
        return self._movement("set_balance", session, key, balance, of)

    def change_by(self, session: Session, key: Key, change: Decimal | int, of: object = None) -> Movement:
        """The movement of column ± amount."""
        return self._movement("credit" if change > 0 else "debit", session, key, Decimal(change).copy_abs(), of)

    def _movement(self, operation: Any, session: Session, key: Key, amount: Any, of: object) -> Movement:
        return Movement(
            operation=operation,
            key=key,
            amount=amount,
            type=self.type,
            bucket=self.column.bucket,
            currency=self.column.currency,
            actor=(self.actor(session) if callable(self.actor) else self.actor) or ORM,
            reason=self.reason,
            idempotency_key=self.idempotency_key(of) if self.idempotency_key and of is not None else None,
            watched=True,
        )


def obstacle(connection: Connection) -> str | None:
    """Why nothing can be routed on this connection, if so."""
    if connection.get_execution_options().get("schema_translate_map"):
        return "schema_translate_map is in use"
    if getattr(connection.connection.dbapi_connection, "autocommit", False):
        return "the connection is in AUTOCOMMIT: there is no transaction to post in"
    return None


def is_expression(value: object) -> bool:
    """Whether the value is SQL, rather than a value."""
    return isinstance(value, ClauseElement) or hasattr(value, "__clause_element__")


def literal(value: Any, rule: Rule, dialect: Dialect, type_: TypeEngine[Any] | None = None) -> Any:
    """The value as the database would get it, in major units. What is no number is given as it is."""
    process = (type_ or rule.balance.type).dialect_impl(dialect).bind_processor(dialect)
    sent = process(value) if process and value is not None else value
    if rule.column.unit == "minor" and isinstance(sent, int | Decimal) and not isinstance(sent, bool):
        return WIDE.scaleb(Decimal(sent), -rule.column.scale)
    return sent


def change(value: Any, rule: Rule, dialect: Dialect) -> Decimal | int | None:
    """The amount in "column + amount" and "column - amount" (major units, signed); None for any other SQL."""
    found = _terms(value.__clause_element__() if hasattr(value, "__clause_element__") else value, rule)
    if found is None:
        return None
    amounts = [literal(bind.value, rule, dialect, bind.type) for _, bind in found]
    if not all(isinstance(each, int | Decimal) and not isinstance(each, bool) for each in amounts):
        return None
    # Nothing is left to the application's own decimal context, which may round.
    signed = (
        Decimal(each) if sign > 0 else Decimal(each).copy_negate()
        for (sign, _), each in zip(found, amounts, strict=True)
    )
    return functools.reduce(WIDE.add, signed, Decimal(0))


def _terms(element: Any, rule: Rule) -> list[tuple[int, BindParameter[Any]]] | None:
    """The literals, with their signs, beside exactly one mention of the column."""
    if isinstance(element, Grouping):
        return _terms(element.element, rule)
    if isinstance(element, BinaryExpression) and element.operator in (operators.add, operators.sub):
        for inner, other, sign in _orders(element):
            terms = _terms(inner, rule)
            if terms is not None and is_literal(other):
                return [*terms, (sign, cast("BindParameter[Any]", other))]
        return None
    return [] if is_column(element, rule.balance) else None


def _orders(element: BinaryExpression[Any]) -> Iterator[tuple[Any, Any, int]]:
    subtracts = element.operator is operators.sub
    yield element.left, element.right, -1 if subtracts else 1
    if not subtracts:
        yield element.right, element.left, 1


def is_literal(element: object) -> bool:
    """Whether the element is a value that stands in the statement, not a parameter that comes at its execution."""
    return isinstance(element, BindParameter) and element.callable is None and element.value is not None


def is_column(element: Any, column: SQLColumn[Any]) -> bool:
    """Whether the element is the column, of the table itself and of no alias."""
    table = getattr(element, "table", None)
    return getattr(element, "name", None) == column.name and same_table(table, column.table)


def same_table(one: Any, other: Any) -> bool:
    """Whether both are the same Table, with an entity's annotations or without."""
    return isinstance(one, Table) and isinstance(other, Table) and one.fullname == other.fullname
