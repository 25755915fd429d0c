"""What the catalog says about a mapped legacy table, and which of its values are no exact amounts.

Read-only, in the caller's transaction.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, NamedTuple

from sqlalchemy import Connection, Row, text

from walletmigrate.config import MAX_INTEGER_DIGITS, WIDE, Column, KeyType, Mapping
from walletmigrate.configfile import raise_first
from walletmigrate.errors import ConfigError

KEY_TYPES: dict[str, KeyType] = {
    "int2": "integer",
    "int4": "integer",
    "int8": "integer",
    "uuid": "uuid",
    "text": "text",
    "varchar": "text",
}
INTEGER_BITS = {"int2": 16, "int4": 32, "int8": 64}
FLOAT_DIGITS = {"float8": 15, "float4": 6}
"""Decimal digits that a float type always keeps, and that PostgreSQL's cast of it to numeric yields."""

_RELATION = """
select
    c.oid::bigint as oid, c.relkind::text as kind, c.relpersistence::text as persistence, c.relispartition,
    c.relrowsecurity,
    c.relkind = 'r' and exists (select from pg_inherits where inhparent = c.oid) as inherited
from pg_class as c
join pg_namespace as n on n.oid = c.relnamespace
where n.nspname = :schema and c.relname = :table
"""

# A domain counts as the type it is made from. The last test is for PostgreSQL 18: NOT NULL can be NOT VALID.
_COLUMNS = """
select
    a.attnum, a.attname as name, b.typname as base, format_type(b.oid, null) as base_type,
    format_type(a.atttypid, a.atttypmod) as sql_type,
    case when t.typtype = 'd' then t.typtypmod else a.atttypmod end as typmod,
    format_type(b.oid, case when t.typtype = 'd' then t.typtypmod else a.atttypmod end) as plain_type,
    has_column_privilege(a.attrelid, a.attnum, 'select') as readable,
    a.attgenerated::text <> '' as generated, a.attidentity::text = 'a' as identity,
    coalesce(not k.collisdeterministic, false) as loose_collation,
    a.attnotnull and not exists (
        select from pg_constraint as o
        where o.conrelid = a.attrelid and o.contype = 'n' and not o.convalidated and a.attnum = any(o.conkey)
    ) as not_null
from pg_attribute as a
join pg_type as t on t.oid = a.atttypid
join pg_type as b on b.oid = case when t.typtype = 'd' then t.typbasetype else t.oid end
left join pg_collation as k on k.oid = a.attcollation
where a.attrelid = :oid and a.attnum > 0 and not a.attisdropped
order by a.attnum
"""

_UNIQUE = """
select
    coalesce(bool_or(i.indnkeyatts = 1 and i.indkey[0] = :attnum), false) as alone,
    coalesce(bool_or(i.indisprimary and :attnum = any(i.indkey)), false) as primary_part
from pg_index as i
where i.indrelid = :oid and i.indisunique and i.indisvalid and i.indimmediate and i.indpred is null
"""


@dataclass(frozen=True)
class LegacyColumn:
    """A balance column as the catalog has it.

    ``minimum`` and ``maximum`` (major units, multiples of the currency's smallest unit) are the outermost
    balances that the column keeps exactly, and at most the ledger's own 30 digits. ``finer`` says that its type
    could keep fractions of the smallest unit.
    """

    name: str
    sql_type: str
    minimum: Decimal
    maximum: Decimal
    is_float: bool
    nullable: bool
    finer: bool = True


@dataclass(frozen=True)
class LegacyTrait:
    """A trait and the column it is read from."""

    name: str
    column: str
    sql_type: str


@dataclass(frozen=True)
class LegacyTable:
    """The catalog's facts about a mapped table; columns and traits in the order of the mapping.

    ``key_sql_type`` is the type without its length ("bigint", "character varying"). ``has_rls`` says that
    row-level security is on for the table, whoever asks.
    """

    schema: str
    table: str
    key_type: KeyType
    key_sql_type: str
    columns: tuple[LegacyColumn, ...]
    traits: tuple[LegacyTrait, ...]
    has_rls: bool
    partitioned: bool

    def column(self, name: str) -> LegacyColumn:
        """The balance column of that name. Raises KeyError."""
        for column in self.columns:
            if column.name == name:
                return column
        raise KeyError(name)


@dataclass(frozen=True)
class TableColumn:
    """Any column of a table. ``sql_type`` is a domain's base type; ``base`` is its name in the catalog.

    ``readable`` says whether this database role may select it.
    """

    name: str
    sql_type: str
    base: str
    not_null: bool
    readable: bool


class Unconvertible(NamedTuple):
    """A legacy value that is no exact amount: the row's key, the column, the value, all as SQL shows them."""

    key: str
    column: str
    value: str


def inspect_mapping(connection: Connection, mapping: Mapping) -> LegacyTable:
    """Read what the ledger's functions need to know about the legacy table.

    Raises ConfigError (file and line of the setting, and the fix) for whatever the ledger cannot work on; the
    notes of the error name further problems.
    """
    relation = _relation(connection, mapping)
    found = connection.execute(text(_COLUMNS), {"oid": relation.oid}).all()
    columns = {row.name: row for row in found}
    problems = list(_key_problems(connection, mapping, relation, columns))
    for index, column in enumerate(mapping.columns):
        problems += _column_problems(mapping, index, column, columns)
    for trait, name in mapping.traits.items():
        if name not in columns:
            problems.append(_no_column(mapping, name, columns, "traits", trait))
    if problems:
        raise_first(problems)
    return LegacyTable(
        mapping.schema_name,
        mapping.table_name,
        KEY_TYPES[columns[mapping.key].base],
        columns[mapping.key].base_type,
        tuple(_legacy_column(column, columns[column.column]) for column in mapping.columns),
        tuple(LegacyTrait(trait, name, columns[name].sql_type) for trait, name in mapping.traits.items()),
        relation.relrowsecurity,
        relation.kind == "p",
    )


def table_columns(connection: Connection, mapping: Mapping) -> dict[str, TableColumn]:
    """All columns of the legacy table, in their order. Raises ConfigError when there is no such table."""
    found = connection.execute(text(_COLUMNS), {"oid": _relation(connection, mapping).oid})
    return {row.name: TableColumn(row.name, row.plain_type, row.base, row.not_null, row.readable) for row in found}


def unconvertible(connection: Connection, mapping: Mapping, limit: int = 1000) -> list[Unconvertible]:
    """The first ``limit`` values, by column and key, that do not convert exactly to an amount.

    These are NULL, NaN and the infinities; of a numeric column also values with more decimals than the scale
    (or, unit "minor", with any) and of more than 30 integer digits. A float is read as PostgreSQL casts it to
    numeric, to 15 significant digits for double precision and 6 for real, and then rounded to the scale. It
    does not convert if the amount has more digits than that, or if the rounding changes it by more than the
    noise of float arithmetic. Noise, for double precision, is 10^-11 of the value (of 1, for values below 1),
    and never more than a thousandth of the smallest unit: 0.30000000000000004 and 99.9999999999 convert at
    scale 2, and 12.345 and 12.3401 do not. For real it is nothing beyond the cast.

    Raises ConfigError as `inspect_mapping` does, and where row-level security hides rows from this role.
    """
    inspect_mapping(connection, mapping)
    relation = _relation(connection, mapping)
    if connection.scalar(text("select row_security_active(cast(:oid as oid))"), {"oid": relation.oid}):
        raise mapping.problem(
            f"row-level security hides rows of {mapping.table} from this database role.",
            "connect as the owner of the table, or as a role that has BYPASSRLS.",
            "table",
        )
    types = {row.name: row.base for row in connection.execute(text(_COLUMNS), {"oid": relation.oid})}
    listed: list[Unconvertible] = []
    for column in mapping.columns:
        rest = limit - len(listed)
        query = _unconvertible_query(connection, mapping, column, types[column.column])
        if rest > 0:
            listed += [Unconvertible(*row) for row in connection.execute(text(query), {"rest": rest})]
    return listed


def _relation(connection: Connection, mapping: Mapping) -> Row[Any]:
    """The table's row in the catalog. Raises ConfigError unless it is a table that the fence can guard."""
    names = {"schema": mapping.schema_name, "table": mapping.table_name}
    row = connection.execute(text(_RELATION), names).one_or_none()
    if row is None:
        raise _no_table(connection, mapping)
    refusals = {
        "v": ("a view", "map the table beneath it."),
        "m": ("a materialized view", "map the table beneath it."),
        "f": ("a foreign table", "map the table in the database that owns it."),
        "partition": ("one partition of a table", "map the partitioned table itself."),
        "inherited": ("a table with inheriting tables", "map a plain or a partitioned table."),
        "t": ("a temporary table", "map a permanent table."),
        "other": ("no table", "map a table."),
    }
    kind = row.kind if row.kind in ("v", "m", "f") else "other" if row.kind not in ("r", "p") else ""
    kind = kind or ("partition" if row.relispartition else "inherited" if row.inherited else "")
    kind = kind or ("t" if row.persistence == "t" else "")
    if kind:
        what, fix = refusals[kind]
        raise mapping.problem(f"{mapping.table} is {what}, and the ledger cannot guard it.", fix, "table")
    return row


def _no_table(connection: Connection, mapping: Mapping) -> ConfigError:
    rows = connection.execute(
        text(
            "select n.nspname || '.' || c.relname from pg_class as c join pg_namespace as n "
            "on n.oid = c.relnamespace where c.relkind in ('r', 'p') "
            "and n.nspname !~ '^pg_' and n.nspname <> 'information_schema'"
        )
    )
    fix = _near(f"{mapping.schema_name}.{mapping.table_name}", list(rows.scalars()))
    return mapping.problem(f"the database has no table {mapping.table!r}.", fix, "table")


def _no_column(mapping: Mapping, name: str, columns: dict[str, Row[Any]], *place: str | int) -> ConfigError:
    return mapping.problem(f"{mapping.table} has no column {name!r}.", _near(name, list(columns)), *place)


def _near(name: str, known: Sequence[str]) -> str:
    """The fix of a name that does not exist: case aside, the nearest of those that do."""
    folded = {one.lower(): one for one in known}
    near = difflib.get_close_matches(name.lower(), folded, n=1)
    return f"did you mean {folded[near[0]]!r}?" if near else "name one that exists, spelt as in the database."


def _key_problems(
    connection: Connection, mapping: Mapping, relation: Row[Any], columns: dict[str, Row[Any]]
) -> Iterator[ConfigError]:
    key = columns.get(mapping.key)
    if key is None:
        yield _no_column(mapping, mapping.key, columns, "key")
        return
    if key.base not in KEY_TYPES:
        fix = "use a column of an integer type, uuid, text or varchar."
        yield mapping.problem(f"key {mapping.key!r} is of type {key.sql_type}.", fix, "key")
        return
    if key.loose_collation:
        fix = "use a column with a deterministic collation: here two different texts can be equal."
        yield mapping.problem(f"key {mapping.key!r} has a nondeterministic collation.", fix, "key")
    unique = connection.execute(text(_UNIQUE), {"oid": relation.oid, "attnum": key.attnum}).one()
    if not unique.alone:
        what = "is only a part of a composite primary key" if unique.primary_part else "is not unique"
        fix = "use a column with a unique index of its own (not partial, not deferrable), or make one."
        yield mapping.problem(f"key {mapping.key!r} {what}.", fix, "key")
    if not key.not_null:
        fix = f"alter table {mapping.table} alter column {mapping.key} set not null."
        yield mapping.problem(f"key {mapping.key!r} can be NULL.", fix, "key")


def _column_problems(
    mapping: Mapping, index: int, column: Column, columns: dict[str, Row[Any]]
) -> Iterator[ConfigError]:
    row = columns.get(column.column)
    name = column.column
    if row is None:
        yield _no_column(mapping, name, columns, "columns", index, "column")
        return
    if row.generated or row.identity:
        fix = "map the column that the application writes."
        yield mapping.problem(f"column {name!r} is generated by the database.", fix, "columns", index, "column")
    if row.base not in ("numeric", *INTEGER_BITS, *FLOAT_DIGITS):
        fix = "map a numeric, integer or floating-point column, or alter this one's type to numeric."
        yield mapping.problem(f"column {name!r} is of type {row.sql_type}.", fix, "columns", index, "column")
        return
    decimals = _decimals(row)
    needed = _needed(column)
    if decimals is not None and decimals < needed:
        fixes = [f"set scale = {decimals}"] if decimals >= 0 else []
        fixes += ['set unit = "minor" if the column counts the smallest unit'] if decimals >= 0 else []
        fixes.append(f"alter the column to numeric with {needed} decimals")
        what = f"column {name!r} ({row.sql_type}) keeps {decimals} decimals, and the mapping needs {needed}."
        yield mapping.problem(what, ", or ".join(fixes) + ".", "columns", index, "scale")


def _precision(row: Row[Any]) -> tuple[int, int] | None:
    """Precision and scale of a numeric column, None if it was declared without; scale may be negative."""
    if row.base != "numeric" or row.typmod < 4:
        return None
    packed = row.typmod - 4
    return packed >> 16, ((packed & 0x7FF) ^ 1024) - 1024


def _decimals(row: Row[Any]) -> int | None:
    """How many decimals the column keeps, None for as many as needed."""
    precision = _precision(row)
    return 0 if row.base in INTEGER_BITS else precision[1] if precision else None


def _needed(column: Column) -> int:
    """How many decimals a balance has in the column."""
    return 0 if column.unit == "minor" else column.scale


def _legacy_column(column: Column, row: Row[Any]) -> LegacyColumn:
    minimum, maximum = _limits(column, row)
    decimals = _decimals(row)
    return LegacyColumn(
        column.column,
        row.sql_type,
        Decimal(minimum).scaleb(-column.scale, WIDE),
        Decimal(maximum).scaleb(-column.scale, WIDE),
        row.base in FLOAT_DIGITS,
        not row.not_null,
        decimals is None or decimals > _needed(column),
    )


def _limits(column: Column, row: Row[Any]) -> tuple[int, int]:
    """The smallest and the largest balance, counted in the currency's smallest unit."""
    ledger = 10 ** (MAX_INTEGER_DIGITS + column.scale) - 1
    factor = 10**column.scale if column.unit == "major" else 1
    precision = _precision(row)
    if row.base in INTEGER_BITS:
        half = 2 ** (INTEGER_BITS[row.base] - 1)
        return max(-half * factor, -ledger), min((half - 1) * factor, ledger)
    if row.base in FLOAT_DIGITS:
        most = 10 ** FLOAT_DIGITS[row.base] - 1
    elif precision:
        most = (10 ** precision[0] - 1) * factor // 10 ** precision[1]
    else:
        most = ledger
    return -min(most, ledger), min(most, ledger)


def _unconvertible_query(connection: Connection, mapping: Mapping, column: Column, base: str) -> str:
    """SQL for the values of one column that do not convert; every name in it is quoted."""
    quote: Callable[[str], str] = connection.dialect.identifier_preparer.quote_identifier
    name, key = quote(column.column), quote(mapping.key)
    decimals = _needed(column)
    wrong = f"{name} is null"
    if base not in INTEGER_BITS:
        largest = 10 ** (MAX_INTEGER_DIGITS + column.scale) - 1
        noise = "0"
        if base in FLOAT_DIGITS:
            largest = min(largest, 10 ** FLOAT_DIGITS[base] - 1)
        if base == "float8":
            noise = f"least(1e-{decimals + 3}, 1e-11 * greatest(abs({name}::numeric), 1))"
        limit = Decimal(largest).scaleb(-decimals, WIDE)
        wrong += (
            f" or {name} in ('NaN', 'Infinity', '-Infinity') or abs({name}::numeric) > {limit:f}"
            f" or abs({name}::numeric - round({name}::numeric, {decimals})) > {noise}"
        )
    table = f"{quote(mapping.schema_name)}.{quote(mapping.table_name)}"
    shown = column.column.replace("'", "''")
    return (
        f"select {key}::text, '{shown}', coalesce({name}::text, 'NULL') "
        # Qualified, because a bare name in ORDER BY means the output column, which is text.
        f"from {table} as l where {wrong} order by l.{key} limit :rest"
    )
