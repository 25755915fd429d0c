"""A mapping whose balance columns are retired: what stands in for them where a job or a look expects the table."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal
from typing import Any

from sqlalchemy import Connection, text

from walletmigrate import functions, survey
from walletmigrate.config import Mapping, Settings
from walletmigrate.errors import ConfigError
from walletmigrate.schema import installed, quoted
from walletmigrate.survey import LegacyColumn, LegacyTable


def is_retired(connection: Connection, schema: str) -> bool:
    """Whether the phase is retired: the balance columns are not read any more, and may be gone."""
    if not installed(connection, schema):
        return False
    return bool(connection.scalar(text(f"select phase = 'retired' from {quoted(schema)}.control")))


def legacy_table(connection: Connection, schema: str, mapping: Mapping) -> LegacyTable:
    """What the catalog says about the table; of dropped columns, what the ledger has kept of them.

    Raises ConfigError as `survey.inspect_mapping` does, unless the phase is retired.
    """
    try:
        return survey.inspect_mapping(connection, mapping)
    except ConfigError:
        if not is_retired(connection, schema):
            raise
    return recorded(connection, schema, mapping)


def recorded(connection: Connection, schema: str, mapping: Mapping) -> LegacyTable:
    """The table with its columns as they were at the last install."""
    table = survey.inspect_mapping(connection, mapping.model_copy(update={"columns": ()}))
    known = functions.installed_mapping(connection, schema, mapping.name)
    kept: dict[str, dict[str, Any]] = known.definition.get("limits", {}) if known else {}
    columns = [_column(kept[column.column]) for column in mapping.columns if column.column in kept]
    if len(columns) != len(mapping.columns):
        raise mapping.problem(
            f"the ledger does not know the retired columns of {mapping.table}.", "put the old configuration back."
        )
    return replace(table, columns=tuple(columns))


def _column(kept: dict[str, Any]) -> LegacyColumn:
    return LegacyColumn(**{**kept, "minimum": Decimal(kept["minimum"]), "maximum": Decimal(kept["maximum"])})


def stand_in(settings: Settings, mapping: Mapping, legacy: LegacyTable) -> str:
    """SQL that takes the table's place in a comparison: a row for each key that the ledger knows, with the traits of
    its row, if it has one, and the ledger's balances in the columns' own units.
    """
    key, schema = quoted(mapping.key), quoted(settings.ledger_schema)
    key_type = functions.key_type(legacy)
    balances = []
    for column in mapping.columns:
        factor = f" * {10**column.scale}" if column.unit == "minor" and column.scale else ""
        chosen = f"x.bucket = '{column.bucket}' and x.currency = '{column.currency}'"
        balances.append(f"max(x.balance::numeric) filter (where {chosen}){factor} as {quoted(column.column)}")
    traits = "".join(f", u.{quoted(name)}" for name in dict.fromkeys(mapping.traits.values()) if name != mapping.key)
    columns = "".join(f", k.{quoted(column.column)}" for column in mapping.columns)
    return (
        f"(select k.{key}{columns}{traits} from ("
        f"select x.key::{key_type} as {key}, {', '.join(balances)} from {schema}.accounts as x "
        f"where x.mapping = '{mapping.name}' and x.state <> 'closed' group by x.key) as k "
        f"left join {functions.relation(mapping)} as u on u.{key} = k.{key})"
    )
