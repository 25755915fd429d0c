"""One account after the other held against a truth, and settled: what a batch of `reconcile` does, in any process."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from decimal import Decimal
from typing import Any, Final

import psycopg
from sqlalchemy import Connection, Row, text

from walletmigrate import config, job_rows, jobs
from walletmigrate.audit import Act
from walletmigrate.config import WIDE, Column, Settings
from walletmigrate.corrections import Correction, Corrector
from walletmigrate.errors import UsageError
from walletmigrate.functions import relation
from walletmigrate.job_claims import ClaimLost
from walletmigrate.schema import quoted
from walletmigrate.truths import Truth

LISTED: Final = 1000
"""How many accounts that are not in order a result lists, and the row of the job keeps."""
CHANGED: Final = ("corrected", "opened", "resynced")
DIGITS: Final = 18
"""A job counts in integers: amounts are in units of ten to the minus this."""
BEAT_SECONDS: Final = 10.0
"""How often a batch's session says something while somebody is asked for a truth."""
_ASKED: Final = 3


@dataclass(frozen=True)
class Limits:
    """What becomes of a difference, in major units: up to ``tolerance`` it is in order, up to ``correct_up_to`` it is
    corrected, a larger one is reported. ``create_missing`` opens accounts; a negative balance is set only if allowed.
    """

    tolerance: Decimal = Decimal(0)
    correct_up_to: Decimal = Decimal(1)
    create_missing: bool = False
    allow_negative: bool = False

    def __post_init__(self) -> None:
        for name in ("tolerance", "correct_up_to"):
            value = getattr(self, name)
            if not isinstance(value, Decimal) or not value.is_finite() or value < 0:
                raise UsageError(f"{name.replace('_', '-')} {value}: pass a Decimal that is not negative")


@dataclass
class Tally:
    """What one batch, or one account, came to."""

    counts: Counter[str] = field(default_factory=Counter)
    items: list[Correction] = field(default_factory=list)

    def add(self, one: Correction) -> None:
        """Count it, and list it if it is not in order."""
        self.counts[one.outcome] += 1
        if one.outcome not in ("in_order", "unlisted") and len(self.items) < LISTED:
            self.items.append(one)
        if one.outcome == "reported":
            self.counts[f"reported {one.currency}"] += 1
            self.counts[f"amount {one.currency}"] += int((one.difference or Decimal(0)).copy_abs().scaleb(DIGITS, WIDE))


@contextmanager
def awake(batch: Connection | None) -> Iterator[None]:
    """Let the batch's session say something now and then, while the caller does not use it: one that stands idle is
    ended (`job_claims.hold`), and who is asked for a truth may take his time.
    """
    if batch is None:
        yield
        return
    over, driven = threading.Event(), batch.connection.driver_connection
    assert driven is not None

    def beat() -> None:
        # The driver's, which serves several threads; lost, it is found to be lost by the next one who uses it.
        with suppress(psycopg.Error):
            while not over.wait(BEAT_SECONDS):
                driven.execute("select")

    beating = threading.Thread(target=beat, name="walletmigrate-batch", daemon=True)
    beating.start()
    try:
        yield
    finally:
        over.set()
        beating.join()


@dataclass(frozen=True)
class Settling:
    """A batch of a reconciliation: the accounts of a span of keys, each in a transaction of its own.

    It travels to workers pickled, with the truth: a file's balances, or a function by its module and name. ``run`` is
    the job, None of a dry run.
    """

    settings: Settings
    mapping: config.Mapping
    act: Act
    truth: Truth
    limits: Limits
    key_type: str
    run: int | None

    def __call__(self, connection: Connection, after: str | None, upto: str | None) -> jobs.Batch:
        """Compare and settle. Raises what concerns all accounts, and ClaimLost once the run was cancelled."""
        keys, rows = self.standing(connection, after, upto)
        tally = Tally()
        # In sessions of their own: locks may take their time, and each account has a transaction.
        corrector = Corrector(connection.engine, self.settings, self.mapping, self.act)
        self.go_through(rows, corrector, tally, connection)
        self.keep(connection, tally)
        failed = tally.counts["failed"]
        counts = {name: int(number) for name, number in tally.counts.items()}
        return jobs.Batch(len(keys), len(rows) - failed, failed, counts)

    def wanted(self, connection: Connection) -> None:
        """Raise ClaimLost once the run was cancelled: what stands of it may be taken back next. A paused one's batch is
        brought to its end, as what it counted and listed would be lost.
        """
        if self.run is not None and job_rows.get(connection, self.settings, self.run).state == "cancelled":
            raise ClaimLost

    def standing(self, connection: Connection, after: str | None, upto: str | None) -> tuple[list[str], list[Row[Any]]]:
        """The keys of a span, and how their accounts stand. Nothing is locked."""
        key = f"l.{quoted(self.mapping.key)}"
        limits = {">": ("after", after), "<=": ("upto", upto)}
        bounds = [
            f"{key} {sign} cast(:{name} as {self.key_type})"
            for sign, (name, value) in limits.items()
            if value is not None
        ]
        where = f" where {' and '.join(bounds)}" if bounds else ""
        query = text(f"select {key}::text from {relation(self.mapping)} as l{where} order by {key}")
        keys = list(connection.scalars(query, {name: value for name, value in limits.values() if value is not None}))
        return keys, self.accounts(connection, keys)

    def accounts(self, connection: Connection, keys: list[str]) -> list[Row[Any]]:
        """How the accounts of these keys stand, one row per column; none for a key without a row."""
        given = f"cast(cast(:keys as text[]) as {self.key_type}[])"
        query = text(f"select * from {quoted(self.settings.ledger_schema)}.standing_{self.mapping.name}({given})")
        return list(connection.execute(query, {"keys": keys})) if keys else []

    def go_through(
        self, rows: Iterable[Row[Any]], corrector: Corrector, tally: Tally, batch: Connection | None = None
    ) -> None:
        """Settle what is not in order at a look, each in a transaction of its own, while ``batch`` is this worker's."""
        for row in rows:
            column = self.mapping.column(row.bucket, row.currency)
            found = self._judged(row, column)
            if found is None:
                found = self.settle(row.key, column, corrector, batch)
                if batch is not None:
                    self.wanted(batch)
            tally.add(found)

    def _judged(self, row: Row[Any], column: Column) -> Correction | None:
        """What can be said without a lock: nearly all accounts are in order. None: to be looked at under its locks."""
        place = (row.key, row.bucket, row.currency)
        if row.state == "absent" and not self.limits.create_missing:
            return Correction("refused", *place, refusal="absent", legacy_before=row.legacy)
        truth = self.truth
        if truth.kind == "callable":
            return None
        if truth.kind == "file":
            wanted = truth.of(row.key, column)
            if wanted is None:
                return Correction("unlisted", *place)
        else:
            wanted = row.legacy if truth.kind == "legacy" else row.ledger
        held = (row.legacy, row.ledger) if row.state == "mirrored" else (row.ledger,) if row.state == "frozen" else ()
        if (
            not held
            or wanted is None
            or any(one is None or WIDE.subtract(one, wanted).copy_abs() > self.limits.tolerance for one in held)
        ):
            return None
        return Correction("in_order", *place)

    def settle(self, key: str, column: Column, corrector: Corrector, batch: Connection | None = None) -> Correction:
        """One account under its locks. A function is asked before, without them, and again if money moved meanwhile.
        Raises the driver's error if ``batch`` was lost meanwhile: others may have it, or have taken it back.
        """
        request: dict[str, Any] = {
            "truth": "value" if self.truth.outside else self.truth.kind,
            "tolerance": str(self.limits.tolerance),
            "limit": str(self.limits.correct_up_to),
            "create": self.limits.create_missing,
            "negative": self.limits.allow_negative,
            "dry": self.run is None,
            "run": self.run,
            "type": "reconcile",
        }
        place = (key, column.bucket, column.currency)
        for _ in range(_ASKED):
            if self.truth.kind == "callable":
                seen = corrector.call("correct", key, column, **{**request, "truth": "legacy", "dry": True})
                held = seen.ledger_before if seen.state == "frozen" else seen.legacy_before
                if held is None:
                    return seen
                request["seen"] = str(held)
            if self.truth.outside:
                try:
                    with awake(batch if self.truth.kind == "callable" else None):
                        amount = self.truth.of(key, column)
                except Exception as error:  # noqa: BLE001 - the user's function: one account of many
                    return Correction("failed", *place, error=f"the truth: {type(error).__name__}: {error}")
                if amount is None:
                    return Correction("unlisted", *place)
                request["amount"] = str(amount)
            if self.truth.kind == "callable" and batch is not None:
                # Lost meanwhile, it is found here: a correction behind an undo of the run would stand for good.
                batch.exec_driver_sql("select")
            made = corrector.call("correct", key, column, **request)
            if made.outcome != "moved":
                return made
        return Correction("failed", *place, error=f"money moved while the truth was asked, {_ASKED} times")

    def keep(self, connection: Connection, tally: Tally) -> None:
        """Put what was only reported, refused or failed on the row of the run, up to a limit."""
        kept = [asdict(one) for one in tally.items if one.outcome not in CHANGED]
        if kept:
            connection.execute(
                text(
                    f"update {quoted(self.settings.ledger_schema)}.jobs set details = jsonb_set(details, '{{items}}', "
                    "coalesce(details -> 'items', '[]') || cast(:items as jsonb)) "
                    "where id = :id and coalesce(jsonb_array_length(details -> 'items'), 0) < :limit"
                ),
                {"id": self.run, "items": json.dumps(kept, default=str), "limit": LISTED},
            )
