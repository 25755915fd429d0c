"""The command line ``walletmigrate``: parse, one call, print, exit code."""

from __future__ import annotations

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
    cli_rehearse,
    cli_setup,
    cli_snapshots,
    cli_verify,
    cli_watch,
)
from walletmigrate.commands import CONFIG, DATABASE_URL, JSON, VERSION, Group

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
def root(
    config: CONFIG = None, database_url: DATABASE_URL = None, as_json: JSON = False, version: VERSION = False
) -> None:
    """Options that every command takes, before or after its name."""


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
cli_rehearse.register(app)


def main() -> None:
    """The console script."""
    app(prog_name="walletmigrate")


if __name__ == "__main__":
    main()
