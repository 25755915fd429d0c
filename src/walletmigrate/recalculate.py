"""Make stored balances what the journal says: of one account, or of all that differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, Engine, text

from walletmigrate import config, jobs
from walletmigrate.audit import Act
from walletmigrate.comparison import snapshot
from walletmigrate.config import Settings
from walletmigrate.corrections import Correction, Corrector, key_of
from walletmigrate.retired import legacy_table
from walletmigrate.schema import quoted


@dataclass(frozen=True)
class Recalculation:
    """What came of it: ``accounts`` were looked at, ``items`` are those whose balance was another than their journal's,
    as recalculated, turned_stale or failed (and refused: the one account that was asked for does not exist).
    """

    mapping: str
    accounts: int
    items: tuple[Correction, ...]
    dry_run: bool


def recalculate(
    engine: Engine,
    settings: Settings,
    mapping: config.Mapping,
    act: Act,
    *,
    account: str | None = None,
    dry_run: bool = False,
    stop: jobs.Stop | None = None,
) -> Recalculation:
    """Set balances to the sum of their journal, each under its locks with an audit row of before and after. Idempotent.

    Only what is stored is mended, so no transaction is made, and legacy is never written: nobody has said that it is
    wrong. A mirrored account that then differs from its legacy row turns stale, is read from legacy, and is resynced by
    a transaction at its next posting or by a backfill. A frozen one's balance is the only one: its journal decides.
    Raises LedgerNotInstalled, InvalidKey, and PreconditionRefused where row-level security hides rows.
    """
    with snapshot(engine) as connection:
        jobs.require_installed(connection, settings, mapping)
        jobs.visibility(connection, mapping, "recalculate")
        if account is None:
            looked_at, found = _suspects(connection, settings, mapping)
        else:
            key = key_of(account, legacy_table(connection, settings.ledger_schema, mapping).key_type, mapping)
            found = [(key, column.bucket, column.currency) for column in mapping.columns]
            looked_at = len(found)
    corrector = Corrector(engine, settings, mapping, act)
    items = []
    for key, bucket, currency in found:
        if stop is not None and stop():
            break
        made = corrector.call("recalculate", key, mapping.column(bucket, currency), dry=dry_run)
        if made.outcome != "in_order":
            items.append(made)
    return Recalculation(mapping.name, looked_at, tuple(items), dry_run)


def _suspects(
    connection: Connection, settings: Settings, mapping: config.Mapping
) -> tuple[int, Sequence[tuple[str, str, str]]]:
    """How many accounts there are, and those whose balance is not the sum of their journal, in this snapshot."""
    name = quoted(settings.ledger_schema)
    columns = [(column.bucket, column.currency) for column in mapping.columns]
    rows = connection.execute(
        text(
            "with legs as ("
            f"select credit_account as account, amount from {name}.transactions where credit_account > 0 "
            f"union all select debit_account, -amount from {name}.transactions where debit_account > 0"
            "), summed as (select account, sum(amount) as total from legs group by account) "
            f"select a.key, a.bucket, a.currency from {name}.accounts as a left join summed as s on s.account = a.id "
            "where a.mapping = :mapping and a.balance <> coalesce(s.total, 0) order by a.id"
        ),
        {"mapping": mapping.name},
    )
    found = [(row.key, row.bucket, row.currency) for row in rows if (row.bucket, row.currency) in columns]
    counted = connection.scalar(
        text(f"select count(*) from {name}.accounts where mapping = :mapping"), {"mapping": mapping.name}
    )
    return int(counted or 0), found
