"""One account corrected under its locks, by one SQL function: for reconciliations, adjustments and recalculations."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Final

from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import DBAPIError

from walletmigrate import config, connect, jobs
from walletmigrate.audit import Act
from walletmigrate.config import Column, KeyType, Settings, exact, key_text
from walletmigrate.errors import InvalidAmount, InvalidKey, InvalidMovement, LedgerNotInstalled, PreconditionRefused
from walletmigrate.functions import fingerprint
from walletmigrate.observe import Adjusted, Observer, Observers
from walletmigrate.retired import legacy_table
from walletmigrate.schema import quoted
from walletmigrate.standing import INSTALL, REASON, show

ATTEMPTS: Final = 3
"""How often an account is tried that meets a deadlock, a lock time limit or a serialization failure."""
LONGEST_NOTES: Final = 500

_NO_FUNCTIONS: Final = ("42883", "42P01", "3F000", "WM010")
_LOST: Final = ("08", "57P")
_AMOUNTS: Final = ("truth", "difference", "legacy_before", "ledger_before", "legacy_after", "ledger_after")

REFUSALS: Final[dict[str, tuple[str, str]]] = {
    "no_row": ("the legacy table has no row of this key", ""),
    "absent": ("it has no ledger account", f"walletmigrate backfill {REASON}"),
    "stale": ("the ledger is behind, and cannot be the truth", f"walletmigrate backfill {REASON}"),
    "frozen": ("it is frozen: the ledger alone is true", "take another truth"),
    "closed": ("the account is closed, but there is a row", f"walletmigrate backfill {REASON}"),
    "stopped": ("the line is stopped, or the phase is legacy", f"walletmigrate resume {REASON}"),
    "legacy_value": ("the legacy column holds no exact amount", "mend the row"),
    "differs": ("legacy and ledger differ", f"walletmigrate reconcile --account KEY {REASON}"),
    "journal": ("its balance is not the sum of its journal", f"walletmigrate recalculate --account KEY {REASON}"),
    "negative": ("the balance would be negative", "--allow-negative"),
    "invalid": ("the truth is no exact amount of the column", "round it at its source"),
    "overflow": ("the balance does not fit the legacy column", "widen the column"),
    "floor": ("the balance would fall below the floor: the money has been spent", ""),
    "undone_before": ("it was undone before", ""),
    "reversed_before": ("its transaction was reversed before", ""),
}
"""Why an account is left as it is: what is wrong, and what mends it."""


@dataclass(frozen=True)
class Correction:
    """What came of one account. Amounts are in major units, None where there is no such balance.

    ``outcome`` is in_order, corrected, opened, resynced, reported (too large to correct), refused (``refusal`` says
    why), failed (``error``), undone, recalculated or turned_stale; ``unlisted`` where the truth does not know it.
    ``state`` is the account's before, None if there was none. ``difference`` is the truth less the balance that is
    true in that state; of a mirrored account whose sides differ, of the side that is further away. ``correlation_id``
    stands in the transaction and in the audit row; None of one read from the record.
    """

    outcome: str
    key: str
    bucket: str
    currency: str
    refusal: str | None = None
    account_id: int | None = None
    state: str | None = None
    truth: Decimal | None = None
    difference: Decimal | None = None
    legacy_before: Decimal | None = None
    ledger_before: Decimal | None = None
    legacy_after: Decimal | None = None
    ledger_after: Decimal | None = None
    transaction_id: int | None = None
    error: str | None = None
    correlation_id: str | None = None

    @property
    def why(self) -> str:
        """Why it was left as it is, in words; empty if it was not."""
        if self.error is not None:
            return self.error
        return REFUSALS[self.refusal][0] if self.refusal in REFUSALS else self.refusal or ""


class Corrector:
    """Calls the function of one mapping, each account in a transaction of its own, at READ COMMITTED."""

    def __init__(
        self, engine: Engine, settings: Settings, mapping: config.Mapping, act: Act, *, alone: bool = False
    ) -> None:
        self._alone: Final = alone
        self._engine: Final = engine
        self.settings: Final = settings
        self.mapping: Final = mapping
        self._schema: Final = quoted(settings.ledger_schema)
        self.correlation_id: Final = act.correlation()
        words = {"actor": act.actor, "reason": act.reason, "correlation": self.correlation_id}
        self._common: Final = {"fingerprint": fingerprint(mapping), **words}

    def call(self, function: str, key: str, column: Column, **request: Any) -> Correction:
        """Run ``correct`` or ``recalculate`` on one account. What fails for it alone comes back as ``failed``.

        Raises what concerns all accounts: a lost connection, missing functions, missing rights. ``alone``: there is
        no other account, and everything is raised.
        """
        place = {"key": key, "bucket": column.bucket, "currency": column.currency}
        given = json.dumps({**self._common, **place, **request})
        query = text(f"select (c).* from {self._schema}.{function}_{self.mapping.name}(cast(:request as jsonb)) as c")
        for attempt in range(1, ATTEMPTS + 1):
            try:
                with jobs.begin(self._engine) as connection:
                    row = connection.execute(query, {"request": given}).one()
                return Correction(**row._mapping, correlation_id=self.correlation_id)
            except DBAPIError as error:
                state = connect.sqlstate(error)
                if state in _NO_FUNCTIONS:
                    mend = INSTALL
                    raise LedgerNotInstalled(self.mapping.name, "its functions are gone", mend) from error
                if error.connection_invalidated or not state or state.startswith(_LOST) or state == "42501":
                    raise
                if attempt == ATTEMPTS or not connect.conflicted(error):
                    if self._alone:
                        raise
                    return Correction("failed", key, column.bucket, column.currency, error=_said(error, state))
            time.sleep(random.uniform(0.02, 0.1) * attempt)
        raise AssertionError("unreachable")


def recorded(details: Mapping[str, Any]) -> Correction:
    """One as the audit log has it, or the row of the job, where amounts are texts."""
    known: dict[str, Any] = {name: details.get(name) for name in Correction.__dataclass_fields__}
    for name in _AMOUNTS:
        value = known[name]
        known[name] = None if value is None else Decimal(value)
    return Correction(**known)


def changed_by(
    connection: Connection, settings: Settings, run: int, *, limit: int | None = None
) -> tuple[Correction, ...]:
    """What a run changed, in its order, by the audit log."""
    name = quoted(settings.ledger_schema)
    # Through the type: in JSON the driver would read the amounts as floats.
    query = text(
        f"select k.* from {name}.audit_log as a "
        f"cross join jsonb_populate_record(null::{name}.correction, a.details) as k where a.job_id = :run "
        "and a.action in ('reconcile corrected', 'reconcile opened', 'reconcile resynced', 'reconcile undone') "
        "order by a.id limit :limit"
    )
    return tuple(recorded(one._asdict()) for one in connection.execute(query, {"run": run, "limit": limit}))


def adjust(
    engine: Engine,
    settings: Settings,
    mapping: config.Mapping,
    act: Act,
    key: str,
    amount: Decimal | int,
    *,
    bucket: str | None = None,
    currency: str | None = None,
    notes: str | None = None,
    allow_negative: bool = False,
    dry_run: bool = False,
    observers: Iterable[Observer] = (),
) -> Correction:
    """An operator's correction of one account by ``amount``, signed and in major units, on both sides.

    ``key`` is the key's text. The floor does not bind, but a balance below zero is refused unless ``allow_negative``.
    ``notes`` stand beside the transaction, in the table whose texts can be erased; reason and actor stand in it.
    ``observers`` are told `Adjusted` after the commit, with the correlation id of the transaction and the audit row.
    Unlike the adapter's `set_balance` it needs no flag, never leaves the ledger behind, and moves by an amount, so
    that a posting that comes between is kept. Not idempotent: look at the history before you repeat one whose end
    you have not seen. Raises PreconditionRefused with the reason, InvalidAmount, InvalidMovement and UnknownBucket.
    """
    column = mapping.column(bucket, currency)
    if notes is not None and not 0 < len(notes.strip()) <= len(notes) <= LONGEST_NOTES:
        raise InvalidMovement("notes", f"pass at most {LONGEST_NOTES} characters, or leave them out")
    signed = exact(amount, column, allow_negative=True)
    with jobs.begin(engine) as connection:
        refuse("adjust", jobs.obstacles(connection, settings, mapping))
        text_key = key_of(key, legacy_table(connection, settings.ledger_schema, mapping).key_type, mapping)
    request = {"truth": "change", "amount": str(signed), "negative": allow_negative, "dry": dry_run, "notes": notes}
    corrector = Corrector(engine, settings, mapping, act, alone=True)
    made = corrector.call("correct", text_key, column, type="adjust", **request)
    if made.outcome == "refused":
        if made.refusal == "stopped":
            with jobs.begin(engine) as connection:
                refuse("adjust", stopped(connection, settings))
        what, mend = REFUSALS[made.refusal or ""]
        refuse("adjust", [(f"account {key}: {what}", mend.replace("KEY", key))])
    if not dry_run:
        Observers(observers).tell(_event(made, mapping))
    return made


def _event(made: Correction, mapping: config.Mapping) -> Adjusted:
    place = (mapping.name, made.bucket, made.currency)
    return Adjusted(*place, made.transaction_id, made.correlation_id, key=made.key, amount=made.difference)


def stopped(connection: Connection, settings: Settings) -> list[tuple[str, str]]:
    """Why no account can be corrected now: the phase or the line."""
    stands = show(connection, settings)
    found = []
    if stands.phase == "legacy":
        what = "the phase is legacy: there is no ledger to correct"
        found.append((what, f"walletmigrate phase advance {REASON}"))
    if stands.phase == "retired":
        found.append(("the phase is retired: there is no legacy column", ""))
    if not stands.line_running:
        found.append(("the line is stopped", f"walletmigrate resume {REASON}"))
    return found


def refuse(step: str, reasons: list[tuple[str, str]]) -> None:
    """Raises PreconditionRefused if there are reasons."""
    if reasons:
        raise PreconditionRefused(step, reasons)


def key_of(value: str, key_type: KeyType, mapping: config.Mapping) -> str:
    """The canonical text of a key that was given as text. Raises InvalidKey."""
    if key_type != "integer":
        return key_text(value, key_type, mapping.name)
    digits = value.strip().removeprefix("-")
    if not (digits.isascii() and digits.isdigit() and len(digits) < 20):
        raise InvalidKey(mapping.name, value, "an integer")
    return key_text(int(value), key_type, mapping.name)


def amount_of(value: object, column: Column) -> Decimal:
    """A balance that an outside source gave, exact at the column's scale. Raises InvalidAmount."""
    if not isinstance(value, int | Decimal):
        raise InvalidAmount(value, f"the truth must be a Decimal or an int, not {type(value).__name__}")
    return exact(value, column, allow_negative=True, allow_zero=True)


def _said(error: DBAPIError, state: str) -> str:
    words = getattr(getattr(error.orig, "diag", None), "message_primary", None) or type(error.orig).__name__
    return f"{words} (SQLSTATE {state})"
