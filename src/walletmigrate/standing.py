"""Where the migration stands: the phase, since when, and what the flags say."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from sqlalchemy import Connection, text

from walletmigrate import schema
from walletmigrate.config import Settings
from walletmigrate.errors import LedgerNotInstalled
from walletmigrate.flag_edits import FlagState, state_of
from walletmigrate.flag_sources import DocumentSnapshot, DocumentSource
from walletmigrate.flags import ALL_FLAGS, NO_DOCUMENT, FlagSource
from walletmigrate.schema import quoted

PHASES = ("legacy", "dual_write", "read_ledger", "wallet_only", "frozen", "retired")

Reason = tuple[str, str]
"""What is missing, and the command (or the act) that mends it."""

REASON = "--reason '…'"
"""How the commands that are proposed to the operator ask for a reason."""

_INSTALLING: Final = f"as the owner of the tables: walletmigrate install {REASON}"

INSTALL: Final = f"Do, {_INSTALLING}"
"""What an operator does where the mapping's functions are not in the database."""

FENCE_MENDED = "fence mended"
"""The action of the audit row that says: until now writes may have gone past the fence of a mapping."""


@dataclass(frozen=True)
class PhaseState:
    """Where the migration stands. ``since`` is when the phase was last changed, None before an install."""

    phase: str
    since: datetime | None
    installed: bool
    line_running: bool

    @property
    def next(self) -> str | None:
        """The phase after this one, None after the last."""
        at = PHASES.index(self.phase)
        return PHASES[at + 1] if at + 1 < len(PHASES) else None

    @property
    def previous(self) -> str | None:
        """The phase before this one, None before the first."""
        at = PHASES.index(self.phase)
        return PHASES[at - 1] if at else None


def reached(phase: str, wanted: str) -> bool:
    """Whether ``phase`` is ``wanted`` or beyond."""
    return PHASES.index(phase) >= PHASES.index(wanted)


def show(connection: Connection, settings: Settings, *, lock: bool = False) -> PhaseState:
    """Where the migration stands; "legacy" before an install. ``lock`` keeps other phase changes out."""
    if not schema.installed(connection, settings.ledger_schema):
        return PhaseState("legacy", None, False, True)
    name = quoted(settings.ledger_schema)
    row = connection.execute(
        text(
            f"select phase, changed_at, (select last_value from {name}.line) as last_value from {name}.control"
            + (" for update" if lock else "")
        )
    ).one()
    return PhaseState(row.phase, row.changed_at, True, row.last_value == 1)


def require_installed(connection: Connection, settings: Settings) -> None:
    """Raises LedgerNotInstalled before an install."""
    if not schema.installed(connection, settings.ledger_schema):
        names = ", ".join(mapping.name for mapping in settings.mappings)
        mend = f"Is it the right database? Then, {_INSTALLING}"
        raise LedgerNotInstalled(names, "the ledger is not installed in this database", mend)


def flag_states(source: FlagSource) -> tuple[FlagState, ...]:
    """What the document in force says of each flag; empty if there is none, or none that can be read so."""
    snapshot = source.snapshot()
    if isinstance(snapshot, DocumentSnapshot):
        content = snapshot.document.content if snapshot.document else None
        return tuple(state_of(content, flag) for flag in ALL_FLAGS) if content else ()
    if snapshot.document_id == NO_DOCUMENT or snapshot.needs_traits:
        return ()
    wanted = snapshot.decide("", {})
    on = (wanted.dual_write, wanted.read_from_ledger, wanted.enable_withdrawals)
    return tuple(FlagState(flag, enabled) for flag, enabled in zip(ALL_FLAGS, on, strict=True))


def of_mapping(settings: Settings, mapping: str) -> str:
    """The option that names a mapping where there are several, with a space before it; else nothing."""
    return f" --mapping {shlex.quote(mapping)}" if len(settings.mappings) > 1 else ""


def confirmation(settings: Settings, *mappings: str) -> str:
    """What --confirm must say: the names of the mappings that a command touches."""
    return ",".join(mappings or (mapping.name for mapping in settings.mappings))


def in_force_since(connection: Connection, settings: Settings, phase: str) -> datetime | None:
    """Since when the migration has stood at ``phase`` or beyond, exercises of the way back not counted."""
    rows = connection.execute(
        text(
            "select at, details ->> 'from' as before, details ->> 'to' as after "
            f"from {quoted(settings.ledger_schema)}.audit_log "
            # Other changes go from one thing to another, too: a fence's mode does.
            "where details ->> 'from' = any(:phases) and details ->> 'to' = any(:phases) "
            "and not details ? 'exercise' order by id desc"
        ),
        {"phases": list(PHASES)},
    )
    for row in rows:
        if reached(row.after, phase) and not reached(row.before, phase):
            at: datetime = row.at
            return at
    # Put there past the phase commands: it has stood for no longer than since the last change.
    state = show(connection, settings)
    return state.since if reached(state.phase, phase) else None


def database_time(connection: Connection) -> datetime:
    """The database's clock, now."""
    now: datetime = connection.execute(text("select clock_timestamp()")).scalar_one()
    return now


def wait_until(when: datetime) -> str:
    """What to do while an observation window is not over."""
    return f"wait until {shown_time(when)}, or shorten observation_window in the configuration"


def shown_time(when: datetime) -> str:
    """A time as people read it, to the second."""
    return f"{when:%Y-%m-%d %H:%M:%S %Z}".strip()


def shown_span(length: timedelta) -> str:
    """A length of time as people say it: "90 s", "3 h", "7 d"."""
    seconds = int(length.total_seconds())
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * size or seconds == size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"


def refreshed(source: FlagSource) -> FlagSource:
    """The same source, having looked for a new document just now."""
    if isinstance(source, DocumentSource):
        source.refresh()
    return source
