"""What the adapter has to know of a database: whether the ledger is installed, and the types of the columns."""

from __future__ import annotations

import time
import weakref
from dataclasses import dataclass
from decimal import Decimal

from sqlalchemy import Connection, Engine, text

from walletmigrate.config import Column, KeyType, Mapping
from walletmigrate.errors import UsageError
from walletmigrate.functions import value_of
from walletmigrate.retired import legacy_table
from walletmigrate.survey import LegacyColumn, LegacyTable, inspect_mapping

ABSENT_SECONDS = 5.0
"""How long "not installed" is believed. "Installed" is believed until a call finds the function gone."""

_SQL_TYPES: dict[KeyType, str] = {"integer": "bigint", "uuid": "uuid", "text": "text"}

# Not to_regprocedure: it raises, and so ends the caller's transaction, where a role may not look into the schema.
INSTALLED = """exists (
    select from pg_proc as p inner join pg_namespace as n on n.oid = p.pronamespace
    where n.nspname = :schema and p.proname = :function
)"""


@dataclass(frozen=True, eq=False)
class Site:
    """One mapping in one database, as it was found by one look. Statements are remembered by it: two looks are two."""

    mapping: Mapping
    schema: str
    installed: bool
    legacy: LegacyTable
    seen_at: float

    @property
    def key_type(self) -> KeyType:
        """What kind of key the legacy table has."""
        return self.legacy.key_type

    @property
    def key_sql_type(self) -> str:
        """The SQL type that a key's text is cast to."""
        return _SQL_TYPES[self.key_type]

    def limits(self, column: Column) -> LegacyColumn:
        """The column as the catalog has it, with the outermost balances that it can hold."""
        return self.legacy.column(column.column)

    def value(self, column: Column, alias: str | None = "l") -> str:
        """SQL for the column's balance in major units; ``alias`` is the legacy table's, None for the bare name."""
        return value_of(column, is_float=self.limits(column).is_float, alias=alias)


class Sites:
    """The sites of one adapter, one per engine. Looking costs a few round trips per process and engine."""

    def __init__(self, schema: str, mapping: Mapping) -> None:
        self._schema = schema
        self._mapping = mapping
        self._known: weakref.WeakKeyDictionary[Engine, Site] = weakref.WeakKeyDictionary()

    def at(self, connection: Connection) -> Site:
        """The site of this connection's database. Raises ConfigError if the ledger could not work on the table, and
        UsageError where the driver does not read numeric as Decimal.
        """
        site = self._known.get(connection.engine)
        if site is not None and (site.installed or time.monotonic() - site.seen_at < ABSENT_SECONDS):
            return site
        site = self._look(connection)
        self._known[connection.engine] = site
        return site

    def forget(self, connection: Connection) -> None:
        """Look anew at the next call, because the functions were found missing."""
        self._known.pop(connection.engine, None)

    def _look(self, connection: Connection) -> Site:
        names = {"schema": self._schema, "function": f"post_{self._mapping.name}"}
        installed, sample = connection.execute(text(f"select {INSTALLED}, 0.1::numeric"), names).one()
        if not isinstance(sample, Decimal):
            raise UsageError(
                f"the driver reads numeric as {type(sample).__name__}, which would round balances: a loader for "
                "numeric is registered in psycopg's adapters; post on connections without it"
            )
        # Without a ledger its schema is not looked into: a role may have no right to.
        legacy = (
            legacy_table(connection, self._schema, self._mapping)
            if installed
            else inspect_mapping(connection, self._mapping)
        )
        return Site(self._mapping, self._schema, installed, legacy, time.monotonic())
