"""What has been observed: verifications, the window, the exercise of the way back."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from datetime import datetime
from decimal import Decimal

from sqlalchemy import Connection, text

from walletmigrate.config import Mapping, Settings
from walletmigrate.flag_edits import FlagState, Override
from walletmigrate.flag_sources import DocumentSnapshot
from walletmigrate.flags import DUAL_WRITE, READ_FROM_LEDGER, FlagSource
from walletmigrate.schema import quoted
from walletmigrate.standing import (
    FENCE_MENDED,
    REASON,
    Reason,
    confirmation,
    database_time,
    flag_states,
    in_force_since,
    shown_span,
    shown_time,
    wait_until,
)

SHOWN = 5
"""How many single values a reason names before it says that there are more."""
_FORMS = {"full": "a full", "incremental": "an incremental", "sample": "a sampled"}


def verified(connection: Connection, settings: Settings) -> Iterator[Reason]:
    """A clean full verification of every mapping, begun since dual-write is on, and after the last failure, the last
    verification of any form that was not clean, and the last mending of its fence: an account that was written past
    it counts as mirrored until a verification looks.
    """
    begun = in_force_since(connection, settings, "dual_write")
    for mapping in settings.mappings:
        mend = f"walletmigrate verify --mapping {mapping.name}"
        runs = _last_runs(connection, settings, mapping)
        currencies = {column.currency for column in mapping.columns}
        if currencies - runs.keys():
            yield f"mapping {mapping.name!r} was never fully verified", mend
            continue
        started = min(at for at, _ in runs.values())
        failed = _last_failure(connection, settings, mapping)
        mended = _last_mending(connection, settings, mapping)
        found = _last_finding(connection, settings, mapping)
        if not all(clean for _, clean in runs.values()):
            yield f"the last full verification of {mapping.name!r} was not clean", mend
        elif found is not None and found[1] >= started:
            what = f"{_FORMS[found[0]]} verification of {mapping.name!r} was not clean at {shown_time(found[1])}"
            yield f"{what}, after its last full one", mend
        elif failed is not None and failed >= started:
            yield f"mapping {mapping.name!r} had a failure at {shown_time(failed)}, after its last verification", mend
        elif mended is not None and mended >= started:
            what = f"the fence of {mapping.name!r} was down until {shown_time(mended)}, after its last verification"
            yield what, f"walletmigrate verify --mark-stale --mapping {mapping.name} {REASON}"
        elif begun is not None and started < begun:
            yield f"mapping {mapping.name!r} was last verified before dual-write began", mend


def _last_runs(connection: Connection, settings: Settings, mapping: Mapping) -> dict[str, tuple[datetime, bool]]:
    rows = connection.execute(
        text(
            "select distinct on (currency) currency, started_at, clean "
            f"from {quoted(settings.ledger_schema)}.verifications "
            "where mapping = :mapping and full_run order by currency, id desc"
        ),
        {"mapping": mapping.name},
    )
    return {row.currency: (row.started_at, row.clean) for row in rows}


def _last_finding(connection: Connection, settings: Settings, mapping: Mapping) -> tuple[str, datetime] | None:
    """Form and time of the last run, of whatever form, that was not clean: only a full clean one after it lifts it."""
    row = connection.execute(
        text(
            f"select form, started_at from {quoted(settings.ledger_schema)}.verifications "
            "where mapping = :mapping and not clean order by started_at desc, id desc limit 1"
        ),
        {"mapping": mapping.name},
    ).one_or_none()
    return None if row is None else (row.form, row.started_at)


def _last_failure(connection: Connection, settings: Settings, mapping: Mapping) -> datetime | None:
    found: datetime | None = connection.scalar(
        text(f"select max(at) from {quoted(settings.ledger_schema)}.failures where mapping = :mapping"),
        {"mapping": mapping.name},
    )
    return found


def _last_mending(connection: Connection, settings: Settings, mapping: Mapping) -> datetime | None:
    found: datetime | None = connection.scalar(
        text(
            f"select max(at) from {quoted(settings.ledger_schema)}.audit_log "
            "where action = :action and mapping = :mapping"
        ),
        {"action": FENCE_MENDED, "mapping": mapping.name},
    )
    return found


def balanced(imbalance: dict[str, Decimal]) -> Iterator[Reason]:
    """All balances come to nothing, now: a verification says so of the moment of its snapshot.

    ``imbalance`` is what `facts.imbalance` sees.
    """
    for currency, amount in sorted(imbalance.items()):
        yield (
            f"the balances of the ledger in {currency} come to {amount}, and not to 0",
            "walletmigrate verify  # then see runbooks/ledger-imbalance.md",
        )


def observed(connection: Connection, settings: Settings) -> Iterator[Reason]:
    """The window has been watched in a phase that lets dual-write be asked for, and nothing went wrong in it."""
    now = database_time(connection)
    start = now - settings.observation_window
    begun, window = in_force_since(connection, settings, "dual_write"), shown_span(settings.observation_window)
    if begun is not None and begun > start:
        yield (
            f"dual-write has been allowed for {shown_span(now - begun)}, the observation window is {window}",
            wait_until(begun + settings.observation_window),
        )
    for what, query in _WATCHED.items():
        count, last = connection.execute(
            text(query.format(schema=quoted(settings.ledger_schema))),
            {"start": start, "mappings": [mapping.name for mapping in settings.mappings]},
        ).one()
        if count:
            yield (
                f"{count} {what} in the observation window, the last at {shown_time(last)}",
                f"find the cause (runbooks/balance-drift.md); then {wait_until(last + settings.observation_window)}",
            )


_WATCHED = {
    "failed or differing postings": (
        "select count(*), max(at) from {schema}.failures where at >= :start and mapping = any(:mappings)"
    ),
    "verifications with drift": (
        "select count(*), max(finished_at) from {schema}.verifications "
        "where finished_at >= :start and mapping = any(:mappings) and drift_accounts > 0"
    ),
    # By the catalogue, which no later change of the account's state overwrites; and by the accounts themselves, whose
    # reason stays where the catalogue was pruned, and dates from the resync.
    "accounts written past the adapter": (
        "select count(distinct (mapping, key, bucket, currency)), max(at) from ("
        "select mapping, key, bucket, currency, at from {schema}.bypasses where treatment = 'turned_stale' "
        "union all select mapping, key, bucket, currency, state_at from {schema}.accounts "
        "where state_reason like '%written past the adapter%'"
        ") as written where at >= :start and mapping = any(:mappings)"
    ),
    # What went past it nobody saw; a verification tells which accounts differ, not how often they were written.
    "mendings of a fence that was down": (
        "select count(*), max(at) from {schema}.audit_log "
        "where at >= :start and action = 'fence mended' and mapping = any(:mappings)"
    ),
}


def exercised(connection: Connection, settings: Settings, since: str = "dual_write") -> Iterator[Reason]:
    """Somebody has gone back a phase or rolled back since dual-write first began; or since ``since`` was last entered.

    Last, not first: for ``wallet_only`` a way back that was tried on the way there proves nothing of what was built
    upon it. An unfreeze is no entry, and neither is the exercise's own step forward.
    """
    name = quoted(settings.ledger_schema)
    which, entered = "min", "details ->> 'to' = :since"
    if since != "dual_write":
        which, entered = "max", f"{entered} and details ->> 'from' <> 'frozen' and not details ? 'exercise'"
    done = connection.scalar(
        text(
            f"select exists (select from {name}.audit_log where action in ('rollback', 'phase back') and id > "
            f"coalesce((select {which}(id) from {name}.audit_log where {entered}), 0))"
        ),
        {"since": since},
    )
    if not done:
        again = "" if since == "dual_write" else f" again since the phase came to {since}"
        yield f"the way back has not been exercised{again}", f"walletmigrate rollback --exercise {REASON}"


def dual_written(settings: Settings, source: FlagSource) -> Iterator[Reason]:
    """Somebody is dual-written: a window in which no write reached the ledger has shown nothing."""
    if not isinstance(source.snapshot(), DocumentSnapshot):
        return  # a source that decides account by account cannot be asked about all of them
    state = {state.flag: state for state in flag_states(source)}.get(DUAL_WRITE)
    if state and not state.default and not any(override.enabled for override in state.overrides):
        yield f"{DUAL_WRITE} is on for nobody", _switch_on(settings, DUAL_WRITE, [])


def read_by_everyone(connection: Connection, settings: Settings, source: FlagSource) -> Iterator[Reason]:
    """Both flags on for everyone, in a phase that lets them count, for the whole window."""
    states = {state.flag: state for state in flag_states(source)}
    missing = False
    for flag in (DUAL_WRITE, READ_FROM_LEDGER):
        state = states.get(flag, FlagState(flag, False))
        kept_off = [override for override in state.overrides if not override.enabled]
        if not state.default or kept_off:
            missing = True
            names = [override.value or override.segment for override in kept_off]
            but = f" (off for {', '.join(names[:SHOWN])})" if state.default else ""
            yield f"{flag} is not on for everyone{but}", _switch_on(settings, flag, kept_off)
    if missing:
        return
    now = database_time(connection)
    dates = (
        _flipped_at(connection, settings),
        _document_date(source, now),
        in_force_since(connection, settings, "read_ledger"),
    )
    since = max((date for date in dates if date is not None), default=None)
    if since is not None and since > now - settings.observation_window:
        window = shown_span(settings.observation_window)
        yield (
            f"all accounts are read from the ledger for {shown_span(now - since)}, the observation window is {window}",
            wait_until(since + settings.observation_window),
        )


def _switch_on(settings: Settings, flag: str, kept_off: list[Override]) -> str:
    if settings.flags.source != "file" and settings.flagsmith_admin_key is None:
        return f"switch {flag} on for the environment in Flagsmith, and end each override that is off"
    if kept_off:
        return f"walletmigrate flags set {flag} remove {_option(kept_off[0])} {REASON}"
    if flag == READ_FROM_LEDGER:
        return f"walletmigrate cutover --everyone --confirm {confirmation(settings)} {REASON}"
    return f"walletmigrate flags set {flag} on --everyone {REASON}"


def _option(override: Override) -> str:
    """How `flags set` names who an override is for."""
    if override.kind == "trait":
        return f"--cohort {shlex.quote(override.value)}"
    if override.kind == "account":
        return f"--account {shlex.quote(override.value)}"
    return f"--percent {override.value}" if override.kind == "percent" else f"--cohort {shlex.quote(override.segment)}"


def _flipped_at(connection: Connection, settings: Settings) -> datetime | None:
    found: datetime | None = connection.scalar(
        text(f"select max(at) from {quoted(settings.ledger_schema)}.audit_log where details ->> 'flag' = any(:flags)"),
        {"flags": [DUAL_WRITE, READ_FROM_LEDGER]},
    )
    return found


def _document_date(source: FlagSource, now: datetime) -> datetime | None:
    """When the document says that it was last changed: flips made elsewhere leave no row in our log."""
    snapshot = source.snapshot()
    document = snapshot.document if isinstance(snapshot, DocumentSnapshot) else None
    try:
        said = datetime.fromisoformat(str(document.content["updated_at"])) if document else None
    except (KeyError, ValueError):
        return None
    return said if said and said.tzinfo and said <= now else None
