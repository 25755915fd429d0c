"""What a command says and how it ends: data to stdout, all else to stderr, one JSON document, an exit code."""

from __future__ import annotations

import dataclasses
import enum
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any, Final

from pydantic import SecretStr
from sqlalchemy.exc import DBAPIError

from walletmigrate import connect
from walletmigrate.errors import (
    DatabaseFailed,
    DatabaseUnreachable,
    LedgerNotInstalled,
    PreconditionRefused,
    Retryable,
    UnreadableInput,
    WalletMigrateError,
)
from walletmigrate.jobs import Job
from walletmigrate.standing import INSTALL

SCHEMA_VERSION: Final = 1

OK: Final = 0
FAILURE: Final = 1
USAGE: Final = 2
DIFFERENCE: Final = 3
REFUSED: Final = 4
INTERRUPTED: Final = 130

CUT_SHORT: Final = "a job was taken out of work elsewhere, and is not done; see: walletmigrate jobs list"
"""The note beside `FAILURE` for a job that neither came to its end nor was paused."""

STOPPED: Final = "stopped at a checkpoint: run the same command again, it goes on from there"
"""The note beside `INTERRUPTED`."""

_LOST: Final = ("08", "28", "3D", "57P")
_MISSING: Final = ("42P01", "42883", "3F000", "WM010")
_RETRYABLE: Final = ("40", "55P03", "57014")


_SHOWN: Final[tuple[tuple[type[Any], Callable[[Any], Any]], ...]] = (
    (enum.Enum, lambda value: value.value),
    (datetime, datetime.isoformat),
    (timedelta, timedelta.total_seconds),
    (Decimal, lambda value: f"{value:f}"),
    (SecretStr, str),
)


@dataclass(frozen=True)
class Answer:
    """What a command found or did. ``lines`` are its text, ``notes`` go to stderr in either form; ``printed``
    says that it was shown already.
    """

    document: Mapping[str, Any]
    lines: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    exit_code: int = OK
    printed: bool = False


@dataclass(frozen=True)
class _Shape:
    """An error as the JSON document has it."""

    code: str
    message: str
    fields: Mapping[str, Any] = field(default_factory=dict)


def job_code(states: Iterable[str], code: int) -> int:
    """The exit code of a command whose jobs ended in these states; ``code`` if all came to their end.

    One that another process cancelled, or that failed, has done a part only.
    """
    ended = set(states)
    if ended - {"done", "planned", "paused"}:
        return FAILURE
    return INTERRUPTED if "paused" in ended else code


def show(command: str, answer: Answer, *, as_json: bool) -> int:
    """Print an answer and give its exit code."""
    if answer.printed:
        return answer.exit_code
    for note in answer.notes:
        say(note)
    if as_json:
        _emit({"command": command, **answer.document})
    else:
        for line in answer.lines:
            sys.stdout.write(line + "\n")
    sys.stdout.flush()
    return answer.exit_code


def show_error(command: str, error: WalletMigrateError, *, as_json: bool) -> int:
    """Print an error and give its exit code."""
    say(f"error: {error}")
    for note in getattr(error, "__notes__", ()):
        say(f"also: {note}")
    if as_json:
        _emit_error(command, _Shape(error.code, str(error), error_fields(error)))
    return error.exit_code


def show_failure(command: str, code: str, message: str, exit_code: int, *, as_json: bool) -> int:
    """Print an error that has no type of its own, and give its exit code."""
    say(message)
    if as_json:
        _emit_error(command, _Shape(code, message))
    return exit_code


def say(line: str) -> None:
    """Print a line for people, to stderr."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def error_fields(error: WalletMigrateError) -> dict[str, Any]:
    """The typed fields of an error, as JSON has them."""
    if isinstance(error, PreconditionRefused):
        return {"step": error.step, "reasons": reasons_as_json(error.reasons)}
    if isinstance(error, UnreadableInput):
        return {"file": error.file, "problems": [{"line": line, "problem": what} for line, what in error.problems]}
    names = getattr(error, "__dataclass_fields__", {})
    fields = {name: plain(getattr(error, name)) for name in names if not name.startswith("_")}
    also = list(getattr(error, "__notes__", ()))
    return {**fields, "also": also} if also else fields


def reasons_as_json(reasons: Any) -> list[dict[str, str]]:
    """Reasons as objects with ``what`` and ``mend``."""
    return [{"what": what, "mend": mend} for what, mend in reasons]


def reasons_as_lines(reasons: Any) -> list[str]:
    """Reasons as people read them: each with its mending command below."""
    lines = []
    for what, mend in reasons:
        lines += [f"  - {what}", *([f"    → {mend}"] if mend else [])]
    return lines


def plain(value: Any) -> Any:
    """A value as JSON can hold it: amounts as strings, times in ISO 8601, durations in seconds."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {one.name: plain(getattr(value, one.name)) for one in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(name): plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(one) for one in value]
    for kind, shown in _SHOWN:
        if isinstance(value, kind):
            return shown(value)
    return value if value is None or isinstance(value, str | int | float) else str(value)


def typed(error: DBAPIError, address: str) -> WalletMigrateError:
    """The error of this library for one of the driver's: by SQLSTATE, with the server's sentence alone."""
    state = connect.sqlstate(error)
    diagnostic = getattr(error.orig, "diag", None)
    said = str(getattr(diagnostic, "message_primary", None) or type(error.orig).__name__)
    if error.connection_invalidated or not state or state.startswith(_LOST):
        return DatabaseUnreachable(address, "the connection failed" if not state else said)
    if state in _MISSING:
        return LedgerNotInstalled("(all)", said, INSTALL)
    if state.startswith(_RETRYABLE):
        return Retryable(f"{said} (SQLSTATE {state})")
    return DatabaseFailed(state, said)


@contextmanager
def bar(label: str, *, as_json: bool) -> Iterator[Callable[[Job], None] | None]:
    """A progress bar on stderr for a job, on a terminal only; else None."""
    if as_json or not sys.stderr.isatty():
        yield None
        return
    # Here and not above, as a few others: a command that draws no bar starts without it.
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(label, total=None)

        def told(job: Job) -> None:
            done = job.items_done + job.items_failed
            progress.update(task, completed=done, total=job.items_total)

        yield told


def _emit(document: Mapping[str, Any]) -> None:
    whole = {"schema_version": SCHEMA_VERSION, **{name: plain(value) for name, value in document.items()}}
    sys.stdout.write(json.dumps(whole, indent=2, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def _emit_error(command: str, shape: _Shape) -> None:
    _emit({"command": command, "error": {"code": shape.code, "message": shape.message, "fields": shape.fields}})
