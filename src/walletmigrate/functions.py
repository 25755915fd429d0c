"""The SQL functions made for one mapping: what they are made from, and how they come into the database."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from sqlalchemy import Connection, text

from walletmigrate.config import Column, Mapping, Settings
from walletmigrate.schema import quoted, render, run_script
from walletmigrate.survey import LegacyTable

FUNCTIONS_VERSION = 1
SYSTEM_ACCOUNTS = ("opening", "external", "correction", "bypass", "transit")


@dataclass(frozen=True)
class Installed:
    """What the database knows of a mapping (`fingerprint` is of the configuration it was made from)."""

    name: str
    fingerprint: str
    functions_version: int
    definition: dict[str, Any]
    fence: dict[str, Any]


def definition(mapping: Mapping) -> dict[str, Any]:
    """What of a mapping the functions are made from; anything else may change without an install."""
    return {
        "table": f"{mapping.schema_name}.{mapping.table_name}",
        "key": mapping.key,
        "columns": [
            {
                "bucket": column.bucket,
                "currency": column.currency,
                "column": column.column,
                "scale": column.scale,
                "unit": column.unit,
                "floor": None if column.floor is None else str(column.floor),
            }
            for column in mapping.columns
        ],
    }


def fingerprint(mapping: Mapping) -> str:
    """Sixteen hex digits over the definition: the adapter sends it, the functions compare it."""
    canonical = json.dumps(definition(mapping), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def relation(mapping: Mapping) -> str:
    """The legacy table as SQL names it."""
    return f"{quoted(mapping.schema_name)}.{quoted(mapping.table_name)}"


def value_of(column: Column, *, is_float: bool, alias: str = "l") -> str:
    """SQL for a legacy balance in major units. A float is read as rounded to the scale."""
    value = f"{alias}.{quoted(column.column)}::numeric"
    if column.unit == "minor" and column.scale:
        value = f"({value} * {column.quantum:f})"
    return f"round({value}, {column.scale})" if is_float else value


def context(
    schema: str,
    mapping: Mapping,
    legacy: LegacyTable,
    system: dict[tuple[str, str], int],
    *,
    mode: str = "stale",
    raw_queries: bool = False,
) -> dict[str, Any]:
    """Everything the templates of a mapping ask for, quoted where it is a name."""
    return {
        "schema": quoted(schema),
        "mapping": mapping.name,
        "fingerprint": fingerprint(mapping),
        "relation": relation(mapping),
        "key": quoted(mapping.key),
        "key_type": "bigint" if legacy.key_type == "integer" else legacy.key_sql_type,
        "columns": [_column_context(column, legacy, system) for column in mapping.columns],
        "capture_mode": mode,
        "raw_queries": "true" if raw_queries else "false",
    }


def _column_context(column: Column, legacy: LegacyTable, system: dict[tuple[str, str], int]) -> dict[str, Any]:
    found = next(c for c in legacy.columns if c.name == column.column)
    name = quoted(column.column)
    factor = f" * {10**column.scale}" if column.unit == "minor" and column.scale else ""
    value = value_of(column, is_float=found.is_float)
    changed = f"({value} + <change>){factor}" if found.is_float else f"l.{name} + (<change>{factor})"
    return {
        "bucket": column.bucket,
        "currency": column.currency,
        "column": name,
        "name": column.column.replace("'", "''"),
        "scale": column.scale,
        "value": value,
        "before": value_of(column, is_float=found.is_float, alias="old"),
        "after": value_of(column, is_float=found.is_float, alias="new"),
        "changed": changed,
        "assigned": f"a.balance{factor}",
        "floor": _literal(column.floor),
        "minimum": _literal(found.minimum),
        "maximum": _literal(found.maximum),
        **{name: system[name, column.currency] for name in SYSTEM_ACCOUNTS},
    }


def _literal(value: Decimal | None) -> str:
    return "null::numeric" if value is None else f"'{value:f}'::numeric"


def legacy_facts(legacy: LegacyTable) -> dict[str, Any]:
    """What of the legacy table is compiled into the functions: altered since, they no longer fit."""
    types = {column.name: f"{column.sql_type}, {column.minimum} to {column.maximum}" for column in legacy.columns}
    return {"key_type": legacy.key_type, "types": types}


def make_system_accounts(connection: Connection, schema: str, currencies: list[str]) -> dict[tuple[str, str], int]:
    """The system accounts of these currencies, made where they are missing. They come before any opening."""
    table = f"{quoted(schema)}.system_accounts"
    for currency in currencies:
        for name in SYSTEM_ACCOUNTS:
            connection.execute(
                text(
                    f"insert into {table} (id, name, currency) "
                    f"select coalesce(min(id), 0) - 1, :name, :currency from {table} "
                    "on conflict (name, currency) do nothing"
                ),
                {"name": name, "currency": currency},
            )
    rows = connection.execute(text(f"select name, currency, id from {table}"))
    return {(row.name, row.currency): row.id for row in rows}


def make_functions(connection: Connection, settings: Settings, mapping: Mapping, legacy: LegacyTable) -> None:
    """Make or replace the functions of one mapping and record what they were made from. Idempotent."""
    schema = settings.ledger_schema
    currencies = list(dict.fromkeys(column.currency for column in mapping.columns))
    system = make_system_accounts(connection, schema, currencies)
    names = context(
        schema,
        mapping,
        legacy,
        system,
        mode=_capture_mode(connection, schema, mapping),
        raw_queries=settings.capture.raw_queries,
    )
    connection.exec_driver_sql(f"set local search_path = pg_catalog, {quoted(schema)}, pg_temp")
    for part in ("posting", "capture", "mapping", "batches", "fence"):
        run_script(connection, render(part, **names))
    connection.execute(
        text(
            f"insert into {quoted(schema)}.mappings (name, relation, fingerprint, functions_version, definition) "
            "values (:name, cast(:relation as regclass), :fingerprint, :version, cast(:definition as jsonb)) "
            "on conflict (name) do update set relation = excluded.relation, fingerprint = excluded.fingerprint, "
            "functions_version = excluded.functions_version, definition = excluded.definition"
        ),
        {
            "name": mapping.name,
            "relation": relation(mapping),
            "fingerprint": fingerprint(mapping),
            "version": FUNCTIONS_VERSION,
            "definition": json.dumps({**definition(mapping), **legacy_facts(legacy)}),
        },
    )


def _capture_mode(connection: Connection, schema: str, mapping: Mapping) -> str:
    """What the fence is to do to a mirrored account that is written past the adapter; an operator has set it."""
    query = text(f"select capture_mode from {quoted(schema)}.mappings where name = :name")
    return connection.scalar(query, {"name": mapping.name}) or "stale"


def mapping_functions(connection: Connection, schema: str, mapping: str) -> list[str]:
    """The signatures of the functions made for a mapping, as DROP FUNCTION wants them."""
    names = [
        "side",
        "lock",
        "leg",
        "plain",
        "settle",
        "move",
        "post",
        "cut",
        "last",
        "span",
        "open",
        "backfill",
        "late",
    ]
    names += ["freeze", "seal", "unfreeze", "unseal", "close", "fence", "fence_truncate"]
    rows = connection.execute(
        text(
            "select p.oid::regprocedure::text from pg_proc p join pg_namespace n on n.oid = p.pronamespace "
            "where n.nspname = :schema and p.proname = any(:names) order by 1"
        ),
        {"schema": schema, "names": [f"{name}_{mapping}" for name in names]},
    )
    return list(rows.scalars())


def fence_bodies(connection: Connection, schema: str, mapping: str) -> dict[str, str]:
    """The bodies of the functions that the fence of a mapping calls, by name."""
    rows = connection.execute(
        text(
            "select p.proname, p.prosrc from pg_proc p join pg_namespace n on n.oid = p.pronamespace "
            "where n.nspname = :schema and p.proname = any(:names)"
        ),
        {"schema": schema, "names": [f"fence_{mapping}", f"fence_truncate_{mapping}"]},
    )
    return {row.proname: row.prosrc for row in rows}


def installed_mapping(connection: Connection, schema: str, mapping: str, *, removed: bool = False) -> Installed | None:
    """What the database knows of a mapping, None when it is not installed.

    ``removed`` also finds one that was uninstalled: its accounts may still be there, and what they mean.
    """
    row = connection.execute(
        text(
            "select name, fingerprint, functions_version, definition, fence "
            f"from {quoted(schema)}.mappings where name = :name and (fingerprint <> '' or :removed)"
        ),
        {"name": mapping, "removed": removed},
    ).one_or_none()
    return None if row is None else Installed(*row)
