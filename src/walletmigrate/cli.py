"""The command line ``walletmigrate``: parse, one call, print, exit code."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Final

import typer

from walletmigrate.commands import CONFIG, DATABASE_URL, JSON, VERSION, Group

ROOMS: Final = {
    "setup": ("init", "install", "uninstall", "sandbox"),
    "phases": ("phase", "cutover", "rollback"),
    "line": ("stop-the-line", "resume"),
    "jobs": ("backfill", "freeze", "unfreeze"),
    "verify": ("verify",),
    "reconcile": ("reconcile", "recalculate", "adjust"),
    "archive": ("archive", "evidence", "retire"),
    "joblist": ("jobs",),
    "flags": ("flags",),
    "capture": ("capture", "doctor", "erase"),
    "watch": ("status", "watch", "trace", "exporter", "version"),
    "discover": ("discover",),
    "snapshots": ("snapshot",),
    "history": ("history", "balance", "overview", "report"),
    "rehearse": ("rehearse",),
}
"""The rooms of the command line, ``cli_…``, in the order of the help, and the commands that each registers."""


def root(
    config: CONFIG = None, database_url: DATABASE_URL = None, as_json: JSON = False, version: VERSION = False
) -> None:
    """Options that every command takes, before or after its name."""


def program(words: Sequence[str] = ()) -> typer.Typer:
    """The command line for these words: with the room of the command that they name, or with all of them.

    One room is loaded in half the time of all, which counts for those who wait for a command in an incident.
    """
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
    app.callback()(root)
    name = _named(iter(words))
    for room in [room for room, names in ROOMS.items() if name in names] or ROOMS:
        import_module(f"walletmigrate.cli_{room}").register(app)
    return app


def _named(words: Iterator[str]) -> str | None:
    """The first word that is not an option of all commands, or the value of one."""
    for word in words:
        if word in ("--config", "--database-url"):
            next(words, None)
        elif word != "--json" and not word.startswith(("--config=", "--database-url=")):
            return word
    return None
