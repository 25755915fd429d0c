"""Give accounts that a verification found to differ the state that is true: stale, or closed where the row is gone.

No balance changes; legacy alone is read from then on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Final

from sqlalchemy import Connection, Engine, text

from walletmigrate import config
from walletmigrate.audit import Act, record
from walletmigrate.comparison import ALL, Comparison, Scope
from walletmigrate.config import Settings
from walletmigrate.job_reads import Run
from walletmigrate.schema import quoted

BATCH: Final = 500
"""Accounts per transaction: their rows are locked for so long."""
LISTED: Final = 100
"""How many keys the audit row names."""


@dataclass(frozen=True)
class Suspect:
    """An account that is not what its legacy row says, in the snapshot of a verification; ``gone``: it has no row."""

    key: str
    bucket: str
    currency: str
    gone: bool


@dataclass(frozen=True)
class Marked:
    """The keys of the accounts that were turned stale, and of those that were closed."""

    stale: tuple[str, ...] = ()
    closed: tuple[str, ...] = ()


def suspects(comparison: Comparison, connection: Connection, scope: Scope = ALL) -> tuple[Suspect, ...]:
    """Mirrored accounts that differ, and mirrored and stale ones without a row, by bucket and key.

    Frozen and closed accounts are none: there the ledger alone is true, or nothing is read.
    """
    rows = comparison.run(connection, "differences", scope, behind=False, limit=None)
    found = (
        Suspect(row.key, row.bucket, row.currency, row.problem == "orphan")
        for row in rows
        if row.state in ("mirrored", "stale")
    )
    return tuple(sorted(found, key=lambda one: (one.bucket, one.currency, one.key)))


def mark(
    engine: Engine,
    settings: Settings,
    mapping: config.Mapping,
    comparison: Comparison,
    found: Sequence[Suspect],
    act: Act,
    run: Run,
) -> Marked:
    """Turn stale, or close, those that still differ, in small transactions; then one audit row. A part of the job
    ``run``, which may be cancelled in between.

    Idempotent. When it is cut short, the audit row tells of what was turned until then.
    """
    stale: list[str] = []
    closed: list[str] = []
    at_a_time = engine.execution_options(isolation_level="READ COMMITTED")
    try:
        for batch in _batches(found):
            run.at("what differs turned stale")
            with at_a_time.begin() as connection:
                run.require(connection)
                done = _turn(connection, settings, mapping, comparison, batch, f"verify: {act.reason}")
            stale += done.stale
            closed += done.closed
    finally:
        if found:
            facts = {"differed": len(found), "turned_stale": len(stale), "closed": len(closed)}
            keys = {"keys": stale[:LISTED], "closed_keys": closed[:LISTED]}
            with at_a_time.begin() as connection:
                record(connection, settings, "verify mark-stale", act, mapping=mapping.name, details={**facts, **keys})
    return Marked(tuple(stale), tuple(closed))


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
) -> Marked:
    """Lock the legacy rows, compare again, and mark the accounts.

    Whoever writes a legacy row or posts to its account holds the row first, so under this lock both stand
    still. Where there is no row to lock, the function `close_` locks the account and looks again. Accounts are
    written by these functions alone: operators may not write the table.
    """
    schema, key_type = quoted(settings.ledger_schema), comparison.names["key_type"]
    keys = f"cast(cast(:keys as text[]) as {key_type}[])"
    bucket, currency = batch[0].bucket, batch[0].currency
    value = next(
        column["value"]
        for column in comparison.names["columns"]
        if (column["bucket"], column["currency"]) == (bucket, currency)
    )
    given: dict[str, object] = {"keys": [one.key for one in batch]}
    connection.execute(text(f"select {schema}.lock_{mapping.name}({keys})"), given)
    key = f"l.{comparison.names['key']}"
    # A statement of its own, whose snapshot is taken under the locks.
    differing = f"""
        with differing as materialized (
            select a.id, a.key, {key} is null as gone
            from {schema}.accounts as a
            left join {comparison.names["relation"]} as l
                on {key} = any({keys}) and a.key = {key}::text collate "C"
            where
                a.mapping = :mapping and a.key = any(cast(:keys as text[]))
                and a.bucket = :bucket and a.currency = :currency
                and (
                    {key} is null and a.state in ('mirrored', 'stale')
                    or a.state = 'mirrored' and a.balance is distinct from {value}
                )
        )
    """
    given |= {"mapping": mapping.name, "bucket": bucket, "currency": currency, "reason": reason}
    row = "(select * from differing where {} order by id) as d"
    stale = connection.execute(
        text(f"{differing} select d.key, {schema}.turn_stale(d.id, :reason) from {row.format('not gone')}"), given
    )
    turned = tuple(one.key for one in stale)
    if not any(one.gone for one in batch):
        return Marked(turned)
    closed = connection.execute(
        text(
            f"{differing} select d.key, {schema}.close_{mapping.name}(d.id, :reason) as done from {row.format('gone')}"
        ),
        given,
    )
    return Marked(turned, tuple(one.key for one in closed if one.done))
