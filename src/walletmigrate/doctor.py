"""Look whether what was installed still stands as it was made, and name the runbook for what does not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sqlalchemy import Connection, text

from walletmigrate import capture, functions, retired
from walletmigrate.config import Mapping, Settings
from walletmigrate.schema import quoted
from walletmigrate.standing import REASON, require_installed

INSTALL = f"walletmigrate install {REASON}"
DRIFT = "runbooks/balance-drift.md"
CHANGED = "runbooks/currency-or-scale-change.md"


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be, the command that mends it, and the runbook that explains it."""

    what: str
    mend: str
    runbook: str


def examine(connection: Connection, settings: Settings) -> tuple[Finding, ...]:
    """All findings. Reads only. Raises LedgerNotInstalled."""
    require_installed(connection, settings)
    found = [one for mapping in settings.mappings for one in _mapping(connection, settings, mapping)]
    return (*found, *_append_only(connection, settings), *_ceiling(connection, settings))


def _mapping(connection: Connection, settings: Settings, mapping: Mapping) -> Iterator[Finding]:
    stands = functions.installed_mapping(connection, settings.ledger_schema, mapping.name)
    if stands is None:
        yield Finding(f"mapping {mapping.name!r} is not installed", INSTALL, DRIFT)
        return
    if stands.fingerprint != functions.fingerprint(mapping):
        what = f"mapping {mapping.name!r} was installed from another configuration: every posting is refused"
        yield Finding(what, INSTALL, CHANGED)
    if stands.functions_version != functions.FUNCTIONS_VERSION:
        what = f"the functions of {mapping.name!r} are of version {stands.functions_version}"
        yield Finding(f"{what}, this release makes {functions.FUNCTIONS_VERSION}", INSTALL, DRIFT)
    yield from _legacy(connection, settings, mapping, stands)
    replaced = capture.function_problems(connection, settings, mapping)
    for problem in capture.fence_problems(connection, settings, mapping):
        first = INSTALL if replaced else f"walletmigrate capture install {REASON}"
        mend = f"{first}; walletmigrate verify --mapping {mapping.name} --mark-stale {REASON}"
        yield Finding(f"the fence: {problem.trigger} {problem.problem}", mend, DRIFT)


def _legacy(
    connection: Connection, settings: Settings, mapping: Mapping, stands: functions.Installed
) -> Iterator[Finding]:
    """The functions name the table's columns: altered since, they no longer fit, and refuse every write."""
    altered = functions.alteration(
        connection, mapping, stands, lambda: retired.legacy_table(connection, settings.ledger_schema, mapping)
    )
    if altered:
        yield Finding(*altered, CHANGED)


def _append_only(connection: Connection, settings: Settings) -> Iterator[Finding]:
    rows = connection.execute(
        text(
            "select w.relation, w.trigger from (values ('transactions', 'append_only'), "
            "('transactions', 'append_only_truncate'), ('audit_log', 'append_only'), "
            "('audit_log', 'append_only_truncate'), ('control', 'ceiling')) as w (relation, trigger) "
            "where not exists (select from pg_trigger as t where t.tgname = w.trigger "
            "and t.tgrelid = to_regclass(format('%I.%I', cast(:schema as text), w.relation)) "
            "and (t.tgenabled = 'A' or w.trigger = 'ceiling' and t.tgenabled = 'O'))"
        ),
        {"schema": settings.ledger_schema},
    )
    for relation, trigger in rows:
        what = f"the trigger {trigger} on {settings.ledger_schema}.{relation} is missing or does not always fire"
        mend = "walletmigrate verify, then make the trigger anew as the ledger's migration has it"
        yield Finding(what, mend, DRIFT)


def _ceiling(connection: Connection, settings: Settings) -> Iterator[Finding]:
    name = quoted(settings.ledger_schema)
    row = connection.execute(text(f"select k.phase, c.last_value from {name}.control as k, {name}.ceiling as c")).one()
    if (row.phase == "legacy") != (row.last_value == 1):
        taken = "legacy" if row.last_value == 1 else "dual_write or later"
        what = f"postings take the phase for {taken}; it is {row.phase}"
        mend = f"as the ledger's owner: update {name}.control set phase = phase"
        yield Finding(what, mend, DRIFT)
