"""The command `rehearse`: on a file of transactions, on made-up ones, or on a copy of one's own table."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from walletmigrate.commands import command
from walletmigrate.config import Mapping
from walletmigrate.console import DIFFERENCE, OK, Answer, plain
from walletmigrate.errors import UsageError
from walletmigrate.invocation import Run
from walletmigrate.rehearsal_source import LIMIT, Source, Wish, opened

if TYPE_CHECKING:  # what the rehearsal needs is loaded by those who run one
    from walletmigrate.rehearsal_report import CopiedFrom, Report

FROM: Final = "WALLETMIGRATE_FROM_DATABASE"

_TRANSACTIONS = Annotated[
    Path | None, typer.Option(help="A .csv or .csv.gz of transactions. Default: made-up traffic.")
]
_FROM_DATABASE = Annotated[
    str | None,
    typer.Option(metavar="URL", envvar=FROM, help="Copy the legacy table of this database, and rehearse on that."),
]
_MAPPING = Annotated[
    str | None, typer.Option(help="Which mapping to copy. Default: the only one; without a file, the likeliest.")
]
_LIMIT_ACCOUNTS = Annotated[int, typer.Option(min=1, help="Copy so many rows at most, a random sample.")]
_COUNT = Annotated[
    int | None, typer.Option(min=1, help="How many transactions to make. Default: as fits the rows copied.")
]
_PSEUDONYMOUS = Annotated[
    bool, typer.Option("--pseudonymous", help="Replace all keys and traits in the copy, not only text keys.")
]
_KEEP_KEYS = Annotated[bool, typer.Option("--keep-keys", help="Copy text keys as they are.")]
_DRY_RUN = Annotated[
    bool, typer.Option("--dry-run", help="Look at the table and tell what would be copied; run nothing.")
]
_SEED = Annotated[int, typer.Option(help="Decides the made-up traffic and who is in which cohort.")]
_FLAG_LAG = Annotated[
    float, typer.Option(min=0, max=60, metavar="SECONDS", help="How far apart workers see a flag flip.")
]
_METRICS_PORT = Annotated[
    int | None, typer.Option(min=0, max=65535, help="Serve its metrics on this port of 127.0.0.1; 0: a free one.")
]


def register(app: typer.Typer) -> None:
    """Add the command."""
    command(app, "rehearse", role="none")(rehearse)


def rehearse(
    run: Run,
    transactions: _TRANSACTIONS = None,
    from_database: _FROM_DATABASE = None,
    mapping: _MAPPING = None,
    limit_accounts: _LIMIT_ACCOUNTS = LIMIT,
    transactions_count: _COUNT = None,
    pseudonymous: _PSEUDONYMOUS = False,
    keep_keys: _KEEP_KEYS = False,
    dry_run: _DRY_RUN = False,
    workers: Annotated[int, typer.Option(min=1, max=64, help="Worker processes.")] = 4,
    seed: _SEED = 1,
    flag_lag: _FLAG_LAG = 5.0,
    report: Annotated[Path | None, typer.Option(help="Write the report here, as JSON.")] = None,
    balances: Annotated[Path | None, typer.Option(help="Write every account's balances here, as CSV.")] = None,
    metrics_port: _METRICS_PORT = None,
) -> Answer:
    """Rehearse the whole migration, and the way back, in a scratch database. Exit 3 if it fails."""
    copying = {
        "--mapping": mapping is not None,
        "--limit-accounts": limit_accounts != LIMIT,
        "--transactions-count": transactions_count is not None,
        "--pseudonymous": pseudonymous,
        "--keep-keys": keep_keys,
        "--dry-run": dry_run,
    }
    _check(transactions, from_database, [name for name, given in copying.items() if given])
    options: dict[str, Any] = {
        "workers": workers,
        "seed": seed,
        "report": report,
        "balances": balances,
        "progress": not run.as_json,
        "flag_lag": flag_lag,
        "metrics_port": metrics_port,
    }
    if from_database is None:
        from walletmigrate.rehearse import rehearse as run_rehearsal

        return _answer(run_rehearsal(transactions, database_url=run.url_given, **options))
    configured = _mapping(run, mapping) if run.configured else None
    keys = {"pseudonymous": pseudonymous, "keep_keys": keep_keys}
    with opened(Wish(from_database, configured, mapping, limit=limit_accounts, **keys), seed) as source:
        return _told(source, run.url_option) if dry_run else _of_copy(run, source, transactions_count, options)


def _of_copy(run: Run, source: Source, transactions: int | None, options: dict[str, Any]) -> Answer:
    from walletmigrate.rehearse import rehearse_copy

    # The environment names the database to be migrated: no scratch database is made beside it unasked.
    return _answer(rehearse_copy(source, transactions=transactions, database_url=run.url_option, **options))


def _check(transactions: Path | None, from_database: str | None, copying: list[str]) -> None:
    if from_database is None and copying:
        raise UsageError(f"{copying[0]} is about a copied table: add --from-database URL")
    if from_database is not None and transactions is not None:
        raise UsageError(f"--transactions and --from-database ({FROM}) exclude each other: leave one out")
    if {"--pseudonymous", "--keep-keys"} <= set(copying):
        raise UsageError("--pseudonymous replaces keys, --keep-keys copies them: leave one out")


def _mapping(run: Run, name: str | None) -> Mapping:
    """The mapping to copy. Raises UsageError where several are configured and none is named."""
    found = run.mappings(name)
    if len(found) > 1:
        known = ", ".join(one.name for one in found)
        raise UsageError(f"the configuration has several mappings ({known}): name one with --mapping")
    return found[0]


def _told(source: Source, server: str | None) -> Answer:
    """What would be copied."""
    facts = source.facts
    lines = [
        *_copied(facts),
        "columns of the copy: " + ", ".join(f"{one.name} {one.sql_type}" for one in source.columns),
        "constraints: " + (", ".join(name for name, text in source.checks.items() if text) or "none"),
        "the scratch database would be made on " + ("the server of --database-url" if server else "an embedded server"),
        "dry run: no row was copied",
    ]
    document = {"dry_run": True, "source": plain(facts), "query": source.query}
    return Answer(document, tuple(lines))


def _copied(facts: CopiedFrom) -> list[str]:
    where = f"{facts.database} on {facts.host}:{facts.port}" + (", a hot standby" if facts.standby else "")
    how = "proposed" if facts.proposed else "configured"
    left = ", ".join(facts.columns_left_out) or "none"
    return [
        f"source: {facts.table} of {where} (mapping {facts.mapping}, {how})",
        f"{facts.rows_copied} of {facts.rows} rows; keys {facts.keys}, traits {facts.traits}",
        f"columns copied: {', '.join(facts.columns_copied)}; left out: {left}",
    ]


def _answer(made: Report) -> Answer:
    passed = made.verdict == "pass"
    counts = f"{made.applied} of {made.transactions} transactions on {made.accounts} accounts"
    replays = f"{made.replayed} replayed, {made.resyncs} resyncs"
    lines = [
        f"verdict: {made.verdict}",
        *(_copied(made.copied_from) if made.copied_from else ()),
        f"{counts}, {made.mismatches} mismatches, {made.drift_accounts} accounts with drift",
        f"{made.bypass_writes} bypass writes, {replays}, {made.serialization_retries} serialization retries",
        *_totals(made),
    ]
    return Answer(json.loads(made.to_json()), tuple(lines), exit_code=OK if passed else DIFFERENCE)


def _totals(made: Report) -> list[str]:
    if made.copied_from is None:
        return [_total("", made.legacy_total, made.ledger_total, made.expected_total)]
    return [_total(f" of {one.bucket}, {one.currency}", one.legacy, one.ledger, one.expected) for one in made.totals]


def _total(what: str, legacy: Decimal | None, ledger: Decimal | None, expected: Decimal | None) -> str:
    return f"totals{what}: legacy {legacy}, ledger {ledger}, expected {expected}"
