"""The command line ``walletmigrate``: parse, one call, print, exit code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from walletmigrate import (
    cli_archive,
    cli_capture,
    cli_discover,
    cli_flags,
    cli_history,
    cli_joblist,
    cli_jobs,
    cli_line,
    cli_phases,
    cli_reconcile,
    cli_setup,
    cli_snapshots,
    cli_verify,
    cli_watch,
)
from walletmigrate.commands import CONFIG, DATABASE_URL, JSON, Group, command
from walletmigrate.console import DIFFERENCE, OK, Answer
from walletmigrate.invocation import Run

app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=False,
    help="Move money from a mutable balance column to a double-entry ledger, and back, under live traffic.",
    epilog="Exit codes: 0 ok, 1 failure, 2 usage, 3 difference found, 4 precondition refused, "
    "5 database or flag server unreachable, 130 interrupted.",
)


@app.callback()
def root(config: CONFIG = None, database_url: DATABASE_URL = None, as_json: JSON = False) -> None:
    """Options that every command takes, before or after its name."""


def rehearse(
    run: Run,
    transactions: Annotated[
        Path | None, typer.Option(help="A .csv or .csv.gz of transactions. Default: made-up traffic.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, max=64, help="Worker processes.")] = 4,
    seed: Annotated[int, typer.Option(help="Decides the made-up traffic and who is in which cohort.")] = 1,
    flag_lag: Annotated[
        float, typer.Option(min=0, max=60, metavar="SECONDS", help="How far apart workers see a flag flip.")
    ] = 5.0,
    report: Annotated[Path | None, typer.Option(help="Write the report here, as JSON.")] = None,
    balances: Annotated[Path | None, typer.Option(help="Write every account's balances here, as CSV.")] = None,
) -> Answer:
    """Rehearse the whole migration, and the way back, in a scratch database. Exit 3 if it fails."""
    from walletmigrate.rehearse import rehearse as run_rehearsal

    made = run_rehearsal(
        transactions,
        workers=workers,
        seed=seed,
        report=report,
        balances=balances,
        database_url=run.url_given,
        progress=not run.as_json,
        flag_lag=flag_lag,
    )
    passed = made.verdict == "pass"
    counts = f"{made.applied} of {made.transactions} transactions on {made.accounts} accounts"
    replays = f"{made.replayed} replayed, {made.resyncs} resyncs"
    lines = [
        f"verdict: {made.verdict}",
        f"{counts}, {made.mismatches} mismatches, {made.drift_accounts} accounts with drift",
        f"{made.bypass_writes} bypass writes, {replays}, {made.serialization_retries} serialization retries",
        f"totals: legacy {made.legacy_total}, ledger {made.ledger_total}, expected {made.expected_total}",
    ]
    return Answer(json.loads(made.to_json()), tuple(lines), exit_code=OK if passed else DIFFERENCE)


cli_setup.register(app)
cli_phases.register(app)
cli_line.register(app)
cli_jobs.register(app)
cli_verify.register(app)
cli_reconcile.register(app)
cli_archive.register(app)
cli_joblist.register(app)
cli_flags.register(app)
cli_capture.register(app)
cli_watch.register(app)
cli_discover.register(app)
cli_snapshots.register(app)
cli_history.register(app)
command(app, "rehearse", role="none")(rehearse)


def main() -> None:
    """The console script."""
    app(prog_name="walletmigrate")


if __name__ == "__main__":
    main()
