"""Whether a cohort may be read from the ledger."""

from __future__ import annotations

import time
from collections.abc import Iterator

from sqlalchemy import Connection

from walletmigrate import observation, schema
from walletmigrate.census import Cohort, census, decisions, trait_column
from walletmigrate.config import Mapping, Settings
from walletmigrate.errors import WalletMigrateError
from walletmigrate.facts import imbalance
from walletmigrate.flag_editor import FLAG_PROBLEMS, FlagEditor
from walletmigrate.flag_sources import DocumentSnapshot
from walletmigrate.flags import DUAL_WRITE
from walletmigrate.gates import in_step
from walletmigrate.standing import REASON, Reason, reached, show


def cohort_reasons(
    connection: Connection, settings: Settings, flags: FlagEditor, cohort: Cohort | None
) -> list[Reason]:
    """Everything that keeps a cohort (None: everyone) from being read from the ledger.

    Raises UsageError for a trait that no mapping has.
    """
    mappings = _concerned(settings, cohort)
    if not schema.installed(connection, settings.ledger_schema):
        return [("the ledger is not installed in this database", f"walletmigrate install {REASON}")]
    found: list[Reason] = []
    state = show(connection, settings)
    if not reached(state.phase, "read_ledger"):
        found.append(
            (f"the phase is {state.phase}, and reads need read_ledger", f"walletmigrate phase advance {REASON}")
        )
    snapshot: DocumentSnapshot | None = None
    try:
        snapshot = DocumentSnapshot(flags.document(), flags.name, time.monotonic(), time.monotonic)
    except FLAG_PROBLEMS as error:
        found.append(_unusable(error))
    rows = 0
    for mapping in mappings:
        counted = census(connection, settings, mapping, cohort)
        rows += counted[0].rows
        found += in_step(counted)
        if snapshot is not None:
            found += _not_writing(connection, mapping, snapshot, cohort)
    if cohort and not rows:
        found.append((f"no account has {'='.join(cohort)}", "write the value as the legacy table has it"))
    found += observation.balanced(imbalance(connection, settings.ledger_schema))
    found += observation.verified(connection, settings)
    return found


def _concerned(settings: Settings, cohort: Cohort | None) -> list[Mapping]:
    if cohort is None:
        return list(settings.mappings)
    mappings = [mapping for mapping in settings.mappings if cohort[0] in mapping.traits]
    if not mappings:
        trait_column(settings.mappings[0], cohort[0])  # raises, and names the traits there are
    return mappings


def _not_writing(
    connection: Connection, mapping: Mapping, snapshot: DocumentSnapshot, cohort: Cohort | None
) -> Iterator[Reason]:
    """Accounts for which dual-write is off, by the document itself: an override may take some out of a cohort."""
    off, example = 0, ""
    for key, decision in decisions(connection, mapping, snapshot, cohort):
        if not decision.dual_write:
            off, example = off + 1, example or key
    if off:
        who = f"--cohort {'='.join(cohort)}" if cohort else "--everyone"
        yield (
            f"{DUAL_WRITE} is off for {off} accounts of {mapping.name}, for example {example}",
            f"walletmigrate flags set {DUAL_WRITE} on {who} {REASON}",
        )


def _unusable(error: WalletMigrateError) -> Reason:
    return str(error), "mend the flag source; then: walletmigrate flags check"
