"""One event for each command that changes something: what was asked by whom, how it ended, under which id."""

from __future__ import annotations

import logging
import os
import sys
from contextlib import suppress
from typing import Any, Final, Literal

from walletmigrate import console, loggers
from walletmigrate.configfile import ENVIRONMENT_PREFIX
from walletmigrate.errors import DatabaseUnreachable, UsageError
from walletmigrate.invocation import Run

VARIABLE: Final = f"{ENVIRONMENT_PREFIX}LOG"
OUTCOMES: Final = {
    console.OK: "ok",
    console.FAILURE: "failed",
    console.USAGE: "usage",
    console.DIFFERENCE: "difference",
    console.REFUSED: "refused",
    DatabaseUnreachable.exit_code: "unreachable",
    console.INTERRUPTED: "interrupted",
}
"""By exit code."""


def form() -> Literal["json", "console"] | None:
    """How events are to be written to stderr; None: not at all. Raises UsageError for a form that there is none of."""
    asked = os.environ.get(VARIABLE, "").strip()
    match asked:
        case "json" | "console":
            return asked
        case "":
            return None
    raise UsageError(f"{VARIABLE} is {asked!r}: set it to json or console, or unset it")


def check(run: Run) -> None:
    """Look at what the environment asks for, before anything is done. Raises UsageError."""
    form()
    run.correlation_id  # noqa: B018 - made now, it is that of all that the command does


def tell(run: Run, code: int, seconds: float) -> None:
    """Tell the event ``wallet.command`` of a run that ended with exit code ``code`` after ``seconds``.

    It goes to the standard library's logger ``walletmigrate`` at INFO, which nobody hears who has not set it up; or,
    where `VARIABLE` asks for it, as one line to stderr. No balance, no account and no reason is in it: a reason is
    somebody's own words, and stands in the audit log.
    """
    try:
        asked, correlation_id = form(), run.correlation_id
    except UsageError:
        return  # for which the command has ended, and has said so
    if asked is None and not logging.getLogger("walletmigrate").isEnabledFor(logging.INFO):
        return
    fields: dict[str, Any] = {
        "command": run.command,
        "outcome": OUTCOMES.get(code, "failed"),
        "exit_code": code,
        "correlation_id": correlation_id,
        "actor": run.actor,
        "mapping": run.mapping,
        "dry_run": run.dry_run or None,
        "seconds": round(seconds, 3),
    }
    said = {name: value for name, value in fields.items() if value is not None}
    log = loggers.default_logger() if asked is None else loggers.stream_logger(sys.stderr, form=asked)
    with suppress(OSError):  # who read stderr has gone; the command has done its work all the same
        log.info("wallet.command", **said)
