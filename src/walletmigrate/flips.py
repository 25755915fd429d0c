"""Flag flips on record: the audit row stands before the flag is switched, and what became of it behind it."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError

from walletmigrate.audit import Act, record
from walletmigrate.config import Settings
from walletmigrate.errors import FlagChangeIncomplete, UsageError
from walletmigrate.flag_editor import Change, FlagEditor
from walletmigrate.flag_edits import FlagState
from walletmigrate.flag_impact import Impact, impact
from walletmigrate.standing import require_installed


@dataclass(frozen=True)
class FlagChange:
    """One edit of a flag. ``who`` is "everyone", "tenant=acme", "25 %" …; ``also`` are flags that moved along.

    ``impact`` is counted in a dry run only; None where there was no database to count in.
    """

    flag: str
    who: str
    before: FlagState
    after: FlagState
    changed: bool
    dry_run: bool
    audit_id: int | None
    also: tuple[str, ...] = ()
    impact: tuple[Impact, ...] | None = None


def set_flag(
    engine: Engine | None,
    settings: Settings,
    flags: FlagEditor,
    flag: str,
    enabled: bool | None,
    act: Act,
    *,
    dry_run: bool = False,
    **who: Any,
) -> FlagChange:
    """Switch a flag (None: end the override) for exactly one of trait, segment, percent, account, everyone.

    ``engine`` None leaves no audit row, and counts nothing in a dry run. ``who`` are the arguments of
    `FlagEditor.set` or `FlagEditor.remove`.
    """
    if engine is None:
        return _told(_edit(flags, flag, enabled, dry_run=dry_run, **who), flag, who, dry_run=dry_run)
    with engine.connect() as connection:
        if not dry_run:
            require_installed(connection, settings)
        return flip(connection, settings, flags, "flags set", act, flag, enabled, dry_run=dry_run, **who)


def flip(
    connection: Connection,
    settings: Settings,
    flags: FlagEditor,
    action: str,
    act: Act,
    flag: str,
    enabled: bool | None,
    *,
    dry_run: bool,
    **who: Any,
) -> FlagChange:
    """Switch the flag and leave the audit row. The row is committed first: without a row there is no flip, whenever
    this process, the database or the flag source goes away. A flip that failed has a second row that says so.

    Commits on ``connection``, which has no transaction of the caller's to be kept. A dry run counts the accounts that
    would change.
    """
    planned = _edit(flags, flag, enabled, dry_run=True, **who)
    change = _told(planned, flag, who, dry_run=dry_run)
    if dry_run:
        return replace(change, impact=impact(connection, settings, *planned.documents))
    if not change.changed:
        return change
    details = {
        "flag": flag,
        "who": change.who,
        "source": flags.name,
        "before": _plain(change.before),
        "after": _plain(change.after),
        "also": list(change.also),
    }
    audit_id = record(connection, settings, action, act, details=details)
    connection.commit()
    try:
        done = _edit(flags, flag, enabled, dry_run=False, **who)
    except FlagChangeIncomplete as error:
        left = {"done": list(error.done), "left": [what for what, _ in error.left], "cause": error.cause}
        _then(connection, settings, f"{action} incomplete", act, {"who": change.who, **left})
        raise
    except Exception as error:
        _then(connection, settings, f"{action} failed", act, {"flag": flag, "who": change.who, "cause": str(error)})
        raise
    return replace(_told(done, flag, who, dry_run=False), audit_id=audit_id)


def _then(connection: Connection, settings: Settings, action: str, act: Act, details: dict[str, Any]) -> None:
    """The row behind a flip. Where the database is away, the one before it stands, and the flag's error is told."""
    with suppress(DBAPIError):
        record(connection, settings, action, act, details=details)
        connection.commit()


def _edit(flags: FlagEditor, flag: str, enabled: bool | None, *, dry_run: bool, **who: Any) -> Change:
    if enabled is not None:
        return flags.set(flag, enabled, dry_run=dry_run, **who)
    if who.get("everyone"):
        raise UsageError("everyone has no override to remove: switch the flag on or off for everyone")
    return flags.remove(
        flag,
        trait=who.get("trait"),
        segment=who.get("segment"),
        percent=who.get("percent") is not None,
        account=who.get("account"),
        dry_run=dry_run,
    )


def _told(change: Change, flag: str, who: dict[str, Any], *, dry_run: bool) -> FlagChange:
    return FlagChange(flag, _named(who), change.before, change.after, change.changed, dry_run, None, change.also)


def _named(who: dict[str, Any]) -> str:
    if who.get("trait"):
        return "=".join(who["trait"])
    if who.get("segment") is not None:
        return f"segment {who['segment']}"
    if who.get("account") is not None:
        return f"account {who['account']}"
    if who.get("percent"):
        share = "the percentage" if who["percent"] is True else f"{who['percent']} %"
        return f"{share} of {who['percent_of']}" if who.get("percent_of") else share
    return "everyone"


def _plain(state: FlagState) -> dict[str, Any]:
    overrides = [
        {"segment": one.segment, "kind": one.kind, "value": one.value, "enabled": one.enabled}
        for one in state.overrides
    ]
    return {"default": state.default, "overrides": overrides}
