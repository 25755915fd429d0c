"""Flag flips on record: the flag file and the audit row together, or neither."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import Connection, Engine

from walletmigrate.audit import Act, record
from walletmigrate.config import Settings
from walletmigrate.errors import UsageError
from walletmigrate.flag_edits import FlagState
from walletmigrate.flag_file import FlagFile
from walletmigrate.standing import require_installed


@dataclass(frozen=True)
class FlagChange:
    """One edit of a flag. ``who`` is "everyone", "tenant=acme", "25 %" …; ``also`` are flags that moved along."""

    flag: str
    who: str
    before: FlagState
    after: FlagState
    changed: bool
    dry_run: bool
    audit_id: int | None
    also: tuple[str, ...] = ()


def set_flag(
    engine: Engine | None,
    settings: Settings,
    flags: FlagFile,
    flag: str,
    enabled: bool | None,
    act: Act,
    *,
    dry_run: bool = False,
    **who: Any,
) -> FlagChange:
    """Switch a flag (None: end the override) for exactly one of trait, percent, account, everyone.

    ``engine`` None leaves no audit row. ``who`` are the arguments of `FlagFile.set` or `FlagFile.remove`.
    """
    if engine is None or dry_run:
        return _edit(flags, flag, enabled, dry_run=dry_run, **who)
    with engine.begin() as connection:
        require_installed(connection, settings)
        return flip(connection, settings, flags, "flags set", act, flag, enabled, dry_run=False, **who)


def flip(
    connection: Connection,
    settings: Settings,
    flags: FlagFile,
    action: str,
    act: Act,
    flag: str,
    enabled: bool | None,
    *,
    dry_run: bool,
    **who: Any,
) -> FlagChange:
    """Edit the file and leave the audit row. The row comes first: without a row there is no flip."""
    change = _edit(flags, flag, enabled, dry_run=True, **who)
    if dry_run or not change.changed:
        return replace(change, dry_run=dry_run)
    details = {
        "flag": flag,
        "who": change.who,
        "before": _plain(change.before),
        "after": _plain(change.after),
        "also": list(change.also),
    }
    audit_id = record(connection, settings, action, act, details=details)
    return replace(_edit(flags, flag, enabled, dry_run=False, **who), audit_id=audit_id)


def _edit(flags: FlagFile, flag: str, enabled: bool | None, *, dry_run: bool, **who: Any) -> FlagChange:
    named = _named(who)
    if enabled is None:
        if who.get("everyone"):
            raise UsageError("everyone has no override to remove: switch the flag on or off for everyone")
        change = flags.remove(
            flag,
            trait=who.get("trait"),
            percent=who.get("percent") is not None,
            account=who.get("account"),
            dry_run=dry_run,
        )
    else:
        change = flags.set(flag, enabled, dry_run=dry_run, **who)
    return FlagChange(flag, named, change.before, change.after, change.changed, dry_run, None, change.also)


def _named(who: dict[str, Any]) -> str:
    if who.get("trait"):
        return "=".join(who["trait"])
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
