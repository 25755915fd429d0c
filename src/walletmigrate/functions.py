"""The SQL functions made for one mapping: what they are made from, and how they come into the database."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from decimal import Decimal
from typing import Any

from sqlalchemy import Connection, text

from walletmigrate import survey
from walletmigrate.config import MAX_INTEGER_DIGITS, Column, Mapping, Roles, Settings
from walletmigrate.errors import ConfigError, PreconditionRefused
from walletmigrate.schema import quoted, render, run_script
from walletmigrate.survey import LegacyTable

FUNCTIONS_VERSION = 1
SHARED_GUARDS = ("turn_stale", "follow", "probe_account", "stated", "fingerprint")
"""What every fence calls; each mapping's install makes them anew."""
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


def value_of(column: Column, *, is_float: bool, alias: str | None = "l") -> str:
    """SQL for a legacy balance in major units. A float is read as rounded to the scale."""
    value = f"{alias}.{quoted(column.column)}::numeric" if alias else f"{quoted(column.column)}::numeric"
    if column.unit == "minor" and column.scale:
        value = f"({value} * {column.quantum:f})"
    return f"round({value}, {column.scale})" if is_float else value


def key_type(legacy: LegacyTable) -> str:
    """The SQL type that the functions take keys in."""
    return "bigint" if legacy.key_type == "integer" else legacy.key_sql_type


def context(
    schema: str,
    mapping: Mapping,
    legacy: LegacyTable,
    system: dict[tuple[str, str], int],
    *,
    roles: Roles,
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
        "key_type": key_type(legacy),
        "columns": [_column_context(column, legacy, system) for column in mapping.columns],
        "app": roles.app,
        "operator": roles.operator,
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
        "wide": found.is_float or found.maximum.adjusted() == MAX_INTEGER_DIGITS - 1,
        "finer": found.finer,
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


def alteration(
    connection: Connection, mapping: Mapping, stands: Installed, look: Callable[[], LegacyTable] | None = None
) -> tuple[str, str] | None:
    """How the legacy table was altered since the install, and what mends it; None if the functions still fit.

    ``look`` says how the table is now; default: as the catalog has it.
    """
    again = "walletmigrate install --reason '…'"
    was = f"the legacy table of {mapping.name!r} was altered since the install"
    try:
        now = legacy_facts(look() if look else survey.inspect_mapping(connection, mapping))
    except ConfigError as error:
        return f"{was}: {error}", f"put it back, or change the configuration; then {again}"
    made = {name: stands.definition[name] for name in now if name in stands.definition}
    apart = "; ".join(f"{name} was {made[name]}, is {now[name]}" for name in made if made[name] != now[name])
    return (f"{was}: {apart}", again) if apart else None


def limits(legacy: LegacyTable) -> dict[str, dict[str, Any]]:
    """What of the balance columns outlives them: the functions of a retired mapping are made from it."""
    return {
        column.name: {**asdict(column), "minimum": f"{column.minimum:f}", "maximum": f"{column.maximum:f}"}
        for column in legacy.columns
    }


def make_system_accounts(connection: Connection, schema: str, currencies: list[str]) -> None:
    """Make the system accounts of these currencies where they are missing. They come before any opening."""
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


def system_accounts(connection: Connection, schema: str) -> dict[tuple[str, str], int]:
    """The ids of the system accounts by name and currency."""
    rows = connection.execute(text(f"select name, currency, id from {quoted(schema)}.system_accounts"))
    return {(row.name, row.currency): row.id for row in rows}


def make_functions(
    connection: Connection, settings: Settings, mapping: Mapping, legacy: LegacyTable, *, retired: bool = False
) -> None:
    """Make or replace the functions of one mapping and record what they were made from. Idempotent.

    With ``retired`` they do without the balance columns, which may be dropped then. Raises PreconditionRefused where
    a newer release made the functions that stand: every process would lose what they can do.
    """
    schema = settings.ledger_schema
    _refuse_newer(connection, schema, mapping)
    make_system_accounts(connection, schema, _currencies(mapping))
    connection.exec_driver_sql(f"set local search_path = pg_catalog, {quoted(schema)}, pg_temp")
    for script in scripts(connection, settings, mapping, legacy, retired=retired):
        run_script(connection, script)
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
            "definition": json.dumps({**definition(mapping), **legacy_facts(legacy), "limits": limits(legacy)}),
        },
    )
    _record_guards(connection, schema, mapping.name)


def scripts(
    connection: Connection, settings: Settings, mapping: Mapping, legacy: LegacyTable, *, retired: bool = False
) -> list[str]:
    """The SQL that makes the functions of a mapping, a later script in the place of an earlier one. Reads only."""
    schema = settings.ledger_schema
    names = context(
        schema,
        mapping,
        legacy,
        system_accounts(connection, schema),
        roles=settings.roles,
        mode=_capture_mode(connection, schema, mapping),
        raw_queries=settings.capture.raw_queries,
    )
    parts = (
        *("posting", "capture", "mapping", "batches", "reconcile", "fence", "undo", "erasure", "snapshots"),
        *(("retired",) if retired else ()),
    )
    return [render(part, **names) for part in parts]


def _refuse_newer(connection: Connection, schema: str, mapping: Mapping) -> None:
    stands = installed_mapping(connection, schema, mapping.name)
    if stands is not None and stands.functions_version > FUNCTIONS_VERSION:
        what = f"the functions of {mapping.name!r} are of version {stands.functions_version}"
        mend = "run it with the newer release; this one can go on posting meanwhile"
        raise PreconditionRefused(
            "making functions", [(f"{what}, and this release makes {FUNCTIONS_VERSION}: a newer one made them", mend)]
        )


def _currencies(mapping: Mapping) -> list[str]:
    return list(dict.fromkeys(column.currency for column in mapping.columns))


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
    names += ["freeze", "seal", "unfreeze", "unseal", "close", "fence", "fence_truncate", "retired", "gone"]
    names += ["amend", "rewrite", "correct", "recount", "recalculate", "standing"]
    rows = connection.execute(
        text(
            "select p.oid::regprocedure::text from pg_proc p join pg_namespace n on n.oid = p.pronamespace "
            "where n.nspname = :schema and p.proname = any(:names) order by 1"
        ),
        {"schema": schema, "names": [f"{name}_{mapping}" for name in names]},
    )
    return list(rows.scalars())


def guards(connection: Connection, schema: str, mapping: str) -> dict[str, str]:
    """The functions that a mapping's fence is made of, as they stand now: digests by name."""
    rows = connection.execute(
        text(
            "select p.proname, md5(concat_ws(' ', p.prosrc, p.prosecdef, array_to_string(p.proconfig, ','))) as digest "
            "from pg_proc p join pg_namespace n on n.oid = p.pronamespace "
            "where n.nspname = :schema and p.proname = any(:names)"
        ),
        {"schema": schema, "names": [f"fence_{mapping}", f"fence_truncate_{mapping}", *SHARED_GUARDS]},
    )
    return {row.proname: row.digest for row in rows}


def made_guards(connection: Connection, schema: str, mapping: str) -> dict[str, str]:
    """The same as `guards`, as they were when they were made."""
    query = text(f"select definition -> 'guards' from {quoted(schema)}.mappings where name = :name")
    return dict(connection.scalar(query, {"name": mapping}) or {})


def _record_guards(connection: Connection, schema: str, mapping: str) -> None:
    """Also for the other mappings, whose fences call the same functions."""
    made = guards(connection, schema, mapping)
    shared = {name: digest for name, digest in made.items() if name in SHARED_GUARDS}
    for which, names in (("name = :name", made), ("name <> :name", shared)):
        connection.execute(
            text(
                f"update {quoted(schema)}.mappings set definition = jsonb_set(definition, '{{guards}}', "
                "coalesce(definition -> 'guards', '{}') || cast(:guards as jsonb)) "
                f"where {which}"
            ),
            {"name": mapping, "guards": json.dumps(names)},
        )


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
