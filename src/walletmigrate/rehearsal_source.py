"""The database whose legacy table a rehearsal copies: what is there, what is copied, and the stream of it.

Everything is read in one READ ONLY transaction at REPEATABLE READ, on a primary or a hot standby, with the right
to select a handful of columns: the key, the mapped balances, the traits. No other column is ever named in a query
that reads rows. What must not be known elsewhere is replaced in the query itself, so that it never leaves the
database: text keys, which may be addresses of people, and if asked for all keys and traits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Literal

import psycopg
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from walletmigrate import connect, console, gates, proposal, survey
from walletmigrate.config import Mapping
from walletmigrate.errors import PreconditionRefused, UsageError
from walletmigrate.functions import relation
from walletmigrate.rehearsal_report import CopiedFrom
from walletmigrate.schema import quoted
from walletmigrate.survey import LegacyTable, TableColumn

LIMIT: Final = 100_000
"""How many accounts are copied unless told otherwise."""

MADE_UP: Final = "rehearsal_cohort"
"""The trait of a copied table that has none, and its column."""

MADE_UP_COHORTS: Final = 8

STEP: Final = "the rehearsal on a copy of that table"

_APPLICATION: Final = "walletmigrate-rehearse-source"
_PLAIN_TRAITS: Final = frozenset({*survey.KEY_TYPES, "bool"})
"""Types of traits that are kept; any other is copied as text, since it may not exist elsewhere."""

_FACTS: Final = """
select
    current_database() as database, current_setting('server_version') as version, pg_is_in_recovery() as standby,
    current_user as role
"""

_CHECKS: Final = """
select
    k.conname as name, pg_get_constraintdef(k.oid) as definition,
    cardinality(k.conkey) = 1 as alone
from pg_constraint as k
where
    k.conrelid = cast(:table as regclass) and k.contype = 'c'
    and exists (
        select from pg_attribute as a
        where a.attrelid = k.conrelid and a.attnum = any(k.conkey) and a.attname = any(:columns)
    )
order by k.conname
"""


@dataclass(frozen=True)
class Wish:
    """What to copy. ``mapping`` None: what `init` would propose, or of its candidates the one named ``name``.

    ``limit`` accounts are copied at most, chosen by a hash of their keys and the seed. Text keys are replaced
    unless ``keep_keys``; with ``pseudonymous`` all keys and the traits are.
    """

    url: str
    mapping: Mapping | None = None
    name: str | None = None
    limit: int = LIMIT
    pseudonymous: bool = False
    keep_keys: bool = False


@dataclass(frozen=True)
class Copied:
    """A column of the copy: its type there, and the SQL over the source's row that it is filled with."""

    name: str
    sql_type: str
    not_null: bool
    value: str


class Source:
    """The source within its one transaction; made by `opened`."""

    def __init__(self, connection: Connection, wish: Wish, seed: int) -> None:
        """Look at everything, and refuse what cannot be rehearsed, before a row is copied."""
        self._connection = connection
        self._address = connect.masked(connection.engine.url)
        self._seed = seed % 2**31
        self._replaces_traits = wish.pseudonymous
        self.mapping = wish.mapping or _proposed(connection, wish.name)
        self.legacy: LegacyTable = survey.inspect_mapping(connection, self.mapping)
        known = survey.table_columns(connection, self.mapping)
        facts = connection.execute(text(_FACTS)).one()
        _refuse_unreadable(connection, self.mapping, known, facts.role)
        _refuse_unfit(connection, self.mapping)
        rows = int(connection.scalar(text(f"select count(*) from {relation(self.mapping)}")) or 0)
        if not rows:
            raise PreconditionRefused(STEP, [(f"{self.mapping.table} has no row", "name another with --mapping")])
        self._limit = wish.limit if rows > wish.limit else None
        self._replaces_keys = wish.pseudonymous or (self.legacy.key_type == "text" and not wish.keep_keys)
        self.columns = self._copied(known)
        self.checks = self._checks()
        self.facts = self._facts(facts, rows, wish, known)

    @property
    def trait(self) -> str:
        """The trait that cohorts are made by: the tenant, else the first one, else one that is made up."""
        traits = self.mapping.traits
        return "tenant" if "tenant" in traits else next(iter(traits), MADE_UP)

    def chunks(self) -> Iterator[bytes | bytearray | memoryview]:
        """The rows in COPY's text format, as they come: of any size, in constant memory."""
        driver = self._connection.connection.driver_connection
        assert driver is not None
        try:
            with driver.cursor() as cursor, cursor.copy(f"copy ({self.query}) to stdout") as out:
                yield from out
        except psycopg.Error as error:
            raise console.typed(DBAPIError("copy", None, error), self._address) from error

    def close(self) -> None:
        """End the transaction: a snapshot that is held keeps the source's vacuum from its work."""
        self._connection.close()

    @property
    def query(self) -> str:
        """The one query that reads rows; its columns are those of the copy."""
        key = f"l.{quoted(self.mapping.key)}"
        read = dict.fromkeys([self.mapping.key, *self.mapping.traits.values(), *self._balances])
        inner = f"select {', '.join(f'l.{quoted(name)}' for name in read)} from {relation(self.mapping)} as l"
        if self._limit is not None:
            order = f"hashtextextended({key}::text, {self._seed}), {key}"
            inner += f" order by {order} limit {self._limit}"
        return f"select {', '.join(column.value for column in self.columns)} from ({inner}) as s"

    @property
    def _balances(self) -> list[str]:
        return [column.column for column in self.mapping.columns]

    def _copied(self, known: dict[str, TableColumn]) -> tuple[Copied, ...]:
        made = {self.mapping.key: self._key(known[self.mapping.key])}
        for name in self._balances:
            column = known[name]
            made[name] = Copied(name, column.sql_type, column.not_null, f"s.{quoted(name)}")
        for name in self.mapping.traits.values():
            made.setdefault(name, self._trait(known[name]))
        if not self.mapping.traits:
            cohort = f"abs(hashtextextended(s.{quoted(self.mapping.key)}::text, {self._seed}) % {MADE_UP_COHORTS})"
            made[MADE_UP] = Copied(MADE_UP, "text", True, f"'cohort-' || {cohort}")
        return tuple(made.values())

    def _key(self, column: TableColumn) -> Copied:
        name = f"s.{quoted(column.name)}"
        kind = {"integer": "bigint", "uuid": "uuid", "text": f'{self.legacy.key_sql_type} collate "C"'}[
            self.legacy.key_type
        ]
        if not self._replaces_keys:
            # A column of type smallint or integer stays one: the adapter's casts are rehearsed with it.
            kept = column.sql_type if self.legacy.key_type == "integer" else kind
            return Copied(column.name, kept, True, name)
        number = f"row_number() over (order by hashtextextended({name}::text, {self._seed}), {name})"
        return Copied(
            column.name,
            kind,
            True,
            {
                "integer": number,
                "uuid": f"lpad(to_hex({number}), 32, '0')::uuid",
                "text": f"'account-' || {number}",
            }[self.legacy.key_type],
        )

    def _trait(self, column: TableColumn) -> Copied:
        name = f"s.{quoted(column.name)}"
        if self._replaces_traits:
            rank = f"dense_rank() over (order by hashtextextended({name}::text, {self._seed}))"
            value = f"case when {name} is not null then 'value-' || {rank} end"
            return Copied(column.name, "text", column.not_null, value)
        if column.base in _PLAIN_TRAITS:
            return Copied(column.name, column.sql_type, column.not_null, name)
        return Copied(column.name, "text", column.not_null, f"{name}::text")

    def _checks(self) -> dict[str, str | None]:
        """CHECK constraints that bind a balance, by name; None for one that names other columns too."""
        found = self._connection.execute(text(_CHECKS), {"table": relation(self.mapping), "columns": self._balances})
        return {row.name: row.definition if row.alone else None for row in found}

    def _facts(self, facts: Any, rows: int, wish: Wish, known: dict[str, TableColumn]) -> CopiedFrom:
        info = self._connection.connection.driver_connection.info  # type: ignore[union-attr]
        copied = {column.name for column in self.columns}
        replaced: Literal["copied", "replaced"] = "replaced" if self._replaces_traits else "copied"
        return CopiedFrom(
            host=info.host,
            port=info.port,
            database=facts.database,
            postgres_version=facts.version.split()[0],
            standby=facts.standby,
            mapping=self.mapping.name,
            proposed=wish.mapping is None,
            table=f"{self.mapping.schema_name}.{self.mapping.table_name}",
            rows=rows,
            rows_copied=rows if self._limit is None else self._limit,
            columns_copied=tuple(name for name in known if name in copied),
            columns_left_out=tuple(name for name in known if name not in copied),
            keys="replaced" if self._replaces_keys else "copied",
            traits=replaced if self.mapping.traits else "made up",
            checks_copied=tuple(name for name, definition in self.checks.items() if definition),
            checks_left_out=tuple(name for name, definition in self.checks.items() if not definition),
        )


@contextmanager
def opened(wish: Wish, seed: int) -> Iterator[Source]:
    """The source, its transaction open until the end of the block.

    Raises DatabaseUnreachable; ConfigError where the mapping does not fit the table; UsageError when nothing was
    found to propose; PreconditionRefused, with all reasons, where columns may not be read or values do not convert.
    """
    engine = connect.engine(
        wish.url, application_name=_APPLICATION, isolation_level="REPEATABLE READ", poolclass=NullPool
    )
    try:
        connect.reachable(engine)
        with engine.connect() as plain:
            connection = plain.execution_options(postgresql_readonly=True)
            try:
                source = Source(connection, wish, seed)
            except DBAPIError as error:
                raise console.typed(error, connect.masked(engine.url)) from error
            yield source
    finally:
        engine.dispose()


def _proposed(connection: Connection, name: str | None) -> Mapping:
    found = {one.name: one for one in proposal.survey(connection)}
    if not found:
        raise UsageError("no table looks as if it held balances. Write a mapping into walletmigrate.toml, see `init`")
    if name is not None and name not in found:
        raise UsageError(f"no table is proposed as mapping {name!r}; proposed are: {', '.join(found)}")
    return proposal.mapping_of(found[name] if name else next(iter(found.values())))


def _refuse_unreadable(connection: Connection, mapping: Mapping, known: dict[str, TableColumn], role: str) -> None:
    needed = dict.fromkeys([mapping.key, *(one.column for one in mapping.columns), *mapping.traits.values()])
    missing = [name for name in needed if not known[name].readable]
    schema, reasons = mapping.schema_name, []
    if not connection.scalar(text("select has_schema_privilege(:name, 'usage')"), {"name": schema}):
        mend = f"grant usage on schema {quoted(schema)} to {quoted(role)}"
        reasons.append((f"role {role} may not use schema {schema}", mend))
    if missing:
        columns = ", ".join(quoted(name) for name in missing)
        mend = f"grant select ({columns}) on {relation(mapping)} to {quoted(role)}"
        reasons.append((f"role {role} may not read {', '.join(missing)} of {mapping.table}", mend))
    if reasons:
        raise PreconditionRefused(STEP, reasons)


def _refuse_unfit(connection: Connection, mapping: Mapping) -> None:
    """Refuse at once what `install` would refuse, or `freeze` at the end of it all."""
    reasons = [
        (
            f"{one.column} of {one.key} holds {one.value}, which is no exact amount",
            f"update the row, or raise the scale of column {one.column!r} in the configuration",
        )
        for one in survey.unconvertible(connection, mapping)
    ]
    mend = "set a floor for the column in the configuration; `walletmigrate init` writes one"
    reasons += [(what, mend) for what, _ in gates.no_way_back(connection, [mapping])]
    if reasons:
        raise PreconditionRefused(STEP, reasons)
