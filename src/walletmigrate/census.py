"""How many accounts are in step with their legacy rows: one live statement per balance column."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, text

from walletmigrate import functions, retired
from walletmigrate.config import Column, Mapping, Settings
from walletmigrate.errors import UsageError
from walletmigrate.flags import Decision, Snapshot
from walletmigrate.schema import quoted

Cohort = tuple[str, str]
"""A trait's name and value, such as ``("tenant", "acme")``."""


@dataclass(frozen=True)
class Census:
    """The legacy rows of one balance column, by what the ledger knows of them.

    ``stale`` includes accounts that are closed although their row lives. ``drifted`` are among the mirrored:
    ledger and legacy differ. ``example`` is the key of one account that is absent or stale, ``drifted_example`` of one
    that drifted.
    """

    mapping: str
    bucket: str
    currency: str
    rows: int
    absent: int
    mirrored: int
    stale: int
    frozen: int
    drifted: int
    example: str | None
    drifted_example: str | None

    @property
    def behind(self) -> int:
        """Accounts that cannot be read from the ledger."""
        return self.absent + self.stale + self.drifted


def census(
    connection: Connection, settings: Settings, mapping: Mapping, cohort: Cohort | None = None
) -> tuple[Census, ...]:
    """Compare every legacy row of the mapping (or of a cohort) with its account, now.

    Reads the whole table, about a million rows in two seconds. Raises ConfigError when table and mapping do
    not fit, UsageError for a cohort by a trait that the mapping has not.
    """
    legacy = retired.legacy_table(connection, settings.ledger_schema, mapping)
    where = f"where {trait_column(mapping, cohort[0])}::text = :value" if cohort else ""
    source = functions.relation(mapping)
    if retired.is_retired(connection, settings.ledger_schema):
        source = retired.stand_in(settings, mapping, legacy)
    counted = []
    for column in mapping.columns:
        is_float = legacy.column(column.column).is_float
        query = _query(settings, mapping, column, functions.value_of(column, is_float=is_float), source, where)
        parameters: dict[str, Any] = {"mapping": mapping.name, "value": cohort[1]} if cohort else {}
        row = connection.execute(text(query), {"mapping": mapping.name, **parameters}).one()
        counted.append(Census(mapping.name, column.bucket, column.currency, *row))
    return tuple(counted)


def decisions(
    connection: Connection, mapping: Mapping, snapshot: Snapshot, cohort: Cohort | None = None
) -> Iterator[tuple[str, Decision]]:
    """What the flags want of each account of the mapping (or of a cohort), as (key, decision), streamed."""
    traits = [f"l.{quoted(column)}" for column in mapping.traits.values()]
    where = f" where {trait_column(mapping, cohort[0])}::text = :value" if cohort else ""
    selected = ", ".join([f"l.{quoted(mapping.key)}::text", *traits])
    rows = connection.execute(
        text(f"select {selected} from {functions.relation(mapping)} as l{where}"),
        {"value": cohort[1]} if cohort else {},
        execution_options={"yield_per": 5000},
    )
    for key, *values in rows:
        pairs = zip(mapping.traits, values, strict=True)
        yield key, snapshot.decide(key, {name: trait_of(value) for name, value in pairs if value is not None})


def trait_column(mapping: Mapping, trait: str) -> str:
    """The column of a trait as SQL names it. Raises UsageError."""
    if trait not in mapping.traits:
        known = ", ".join(mapping.traits) or "none"
        raise UsageError(
            f"mapping {mapping.name!r} has no trait {trait!r} (it has: {known}). "
            "Name one of these, or add it to `traits` in the configuration."
        )
    return f"l.{quoted(mapping.traits[trait])}"


def trait_of(value: object) -> str | int | bool:
    """A column's value as the flags see it."""
    return value if isinstance(value, str | int | bool) else str(value)


def _query(settings: Settings, mapping: Mapping, column: Column, value: str, source: str, where: str) -> str:
    key = f'(l.{quoted(mapping.key)}::text) collate "C"'
    drifted = f"a.state = 'mirrored' and a.balance is distinct from {value}"
    return f"""
        select
            count(*),
            count(*) filter (where a.id is null),
            count(*) filter (where a.state = 'mirrored'),
            count(*) filter (where a.state in ('stale', 'closed')),
            count(*) filter (where a.state = 'frozen'),
            count(*) filter (where {drifted}),
            min({key}) filter (where a.id is null or a.state in ('stale', 'closed')),
            min({key}) filter (where {drifted})
        from {source} as l
        left join {quoted(settings.ledger_schema)}.accounts as a
            on a.mapping = :mapping and a.key = {key}
            and a.bucket = '{column.bucket}' and a.currency = '{column.currency}'
        {where}
    """
