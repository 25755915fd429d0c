"""Turn accounts stale that a verification found to differ: no balance changes, legacy alone is read from then on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Final

from sqlalchemy import Connection, Engine, text

from walletmigrate import config
from walletmigrate.audit import Act, record
from walletmigrate.comparison import Comparison
from walletmigrate.config import Settings
from walletmigrate.schema import quoted

BATCH: Final = 500
"""Accounts per transaction: their rows are locked for so long."""
LISTED: Final = 100
"""How many keys the audit row names."""


@dataclass(frozen=True)
class Suspect:
    """A mirrored account that is not what its legacy row says, in the snapshot of a verification."""

    key: str
    bucket: str
    currency: str


def suspects(comparison: Comparison, connection: Connection) -> tuple[Suspect, ...]:
    """All of them, by bucket and key; frozen and closed accounts are none, and stale ones need no mark."""
    rows = comparison.run(connection, "differences", behind=False, limit=None)
    found = (Suspect(row.key, row.bucket, row.currency) for row in rows if row.state == "mirrored")
    return tuple(sorted(found, key=lambda one: (one.bucket, one.currency, one.key)))


def turn_stale(
    engine: Engine,
    settings: Settings,
    mapping: config.Mapping,
    comparison: Comparison,
    found: Sequence[Suspect],
    act: Act,
) -> int:
    """Turn those stale that still differ, in small transactions; then one audit row. Returns how many.

    Idempotent. When it is cut short, the audit row tells of what was turned until then.
    """
    turned: list[str] = []
    at_a_time = engine.execution_options(isolation_level="READ COMMITTED")
    try:
        for batch in _batches(found):
            with at_a_time.begin() as connection:
                keys = _turn(connection, settings, mapping, comparison, batch, f"verify: {act.reason}")
            turned += keys
    finally:
        if found:
            facts = {"differed": len(found), "turned_stale": len(turned), "keys": turned[:LISTED]}
            with at_a_time.begin() as connection:
                record(connection, settings, "verify mark-stale", act, mapping=mapping.name, details=facts)
    return len(turned)


def _batches(found: Sequence[Suspect]) -> Iterator[list[Suspect]]:
    """Of one bucket each."""
    for bucket, currency in dict.fromkeys((one.bucket, one.currency) for one in found):
        rest = (one for one in found if (one.bucket, one.currency) == (bucket, currency))
        while batch := list(islice(rest, BATCH)):
            yield batch


def _turn(
    connection: Connection,
    settings: Settings,
    mapping: config.Mapping,
    comparison: Comparison,
    batch: list[Suspect],
    reason: str,
) -> list[str]:
    """Lock the legacy rows, compare again, and turn the accounts stale; the keys of those that were turned.

    Whoever writes a legacy row or posts to its account holds the row first, so under this lock both stand
    still. The account itself is locked by the function `turn_stale`: operators may not write the table.
    """
    schema, key_type = quoted(settings.ledger_schema), comparison.names["key_type"]
    keys = f"cast(cast(:keys as text[]) as {key_type}[])"
    bucket, currency = batch[0].bucket, batch[0].currency
    value = next(
        column["value"]
        for column in comparison.names["columns"]
        if (column["bucket"], column["currency"]) == (bucket, currency)
    )
    given = {"keys": [one.key for one in batch]}
    connection.execute(text(f"select {schema}.lock_{mapping.name}({keys})"), given)
    # A statement of its own, whose snapshot is taken under the locks.
    rows = connection.execute(
        text(
            f"""
            with differing as materialized (
                select a.id, a.key
                from {schema}.accounts as a
                left join {comparison.names["relation"]} as l
                    on l.{comparison.names["key"]} = any({keys})
                    and a.key = l.{comparison.names["key"]}::text collate "C"
                where
                    a.mapping = :mapping and a.key = any(cast(:keys as text[]))
                    and a.bucket = :bucket and a.currency = :currency
                    and a.state = 'mirrored' and a.balance is distinct from {value}
            )

            select d.key, {schema}.turn_stale(d.id, :reason) from (select * from differing order by id) as d
            """
        ),
        {**given, "mapping": mapping.name, "bucket": bucket, "currency": currency, "reason": reason},
    )
    return [row.key for row in rows]
