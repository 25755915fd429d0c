"""What a rehearsal comes to: the verdict, figures of each stage, and every account's three balances."""

from __future__ import annotations

import csv
import json
import os
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from decimal import Decimal, localcontext
from pathlib import Path
from typing import Any, Final, Literal

from walletmigrate.errors import UsageError
from walletmigrate.traffic import EXACT

SCHEMA_VERSION: Final = 1
BALANCE_COLUMNS: Final = ("account_id", "legacy_balance", "ledger_balance", "expected_balance")


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage's traffic. ``seconds`` is the time in which traffic ran; the percentiles are of single
    transactions through the adapter, commit included, in milliseconds; None where there was no transaction.
    """

    name: str
    transactions: int
    seconds: float
    per_second: float
    p50_ms: float | None
    p99_ms: float | None


@dataclass(frozen=True, slots=True)
class AccountBalances:
    """One account's balances in major units; None where that side has no such account."""

    account_id: str
    legacy: Decimal | None
    ledger: Decimal | None
    expected: Decimal
    bucket: str = ""
    currency: str = ""

    @property
    def drift(self) -> Decimal:
        """The largest difference between any two of the three; a side without the account counts as 0."""
        three = [balance or Decimal(0) for balance in (self.legacy, self.ledger, self.expected)]
        return max(three) - min(three)

    @property
    def agrees(self) -> bool:
        """Whether all three are there and equal."""
        return self.legacy == self.ledger == self.expected


@dataclass(frozen=True, slots=True)
class Total:
    """The sums of one bucket and currency, in major units."""

    bucket: str
    currency: str
    accounts: int
    legacy: Decimal
    ledger: Decimal
    expected: Decimal


@dataclass(frozen=True)
class CopiedFrom:
    """Where a rehearsal's legacy table was copied from, and what was copied; no password, no value of a row.

    ``rows`` are those of the source, ``rows_copied`` those of the rehearsal. ``keys`` and ``traits`` say whether
    they were ``copied`` or ``replaced``; ``traits`` is ``made up`` where the mapping has none. ``checks_copied``
    and ``checks_left_out`` are CHECK constraints that name a balance column.
    """

    host: str
    port: int
    database: str
    postgres_version: str
    standby: bool
    mapping: str
    proposed: bool
    table: str
    rows: int
    rows_copied: int
    columns_copied: tuple[str, ...]
    columns_left_out: tuple[str, ...]
    keys: Literal["copied", "replaced"]
    traits: Literal["copied", "replaced", "made up"]
    checks_copied: tuple[str, ...] = ()
    checks_left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """A finished rehearsal. Amounts are in major units.

    Sums of money are None where the accounts are of several currencies; ``totals`` has them apart.

    ``applied`` counts what workers posted and committed, each transaction once. ``mismatches`` counts answers
    of the adapter that were not as the file says, and failures that the ledger recorded. ``drift_accounts``
    are accounts whose legacy, ledger and expected balance are not all equal; ``drift_amount`` is the sum of
    their largest differences. ``bypass_writes`` are raw updates that the legacy column took, ``replayed``
    answers to transactions that were sent before, ``resyncs`` transactions that brought an account back to its
    legacy balance, ``serialization_retries`` postings tried again after SQLSTATE 40001. ``errors`` is why it
    failed, when it did not come to its end.
    """

    verdict: Literal["pass", "fail"]
    accounts: int
    transactions: int
    applied: int
    mismatches: int
    drift_accounts: int
    drift_amount: Decimal | None
    legacy_total: Decimal | None
    ledger_total: Decimal | None
    expected_total: Decimal | None
    stages: tuple[Stage, ...]
    postgres_version: str
    balances: tuple[AccountBalances, ...]
    errors: tuple[str, ...] = ()
    bypass_writes: int = 0
    replayed: int = 0
    resyncs: int = 0
    serialization_retries: int = 0
    copied_from: CopiedFrom | None = None

    @property
    def totals(self) -> tuple[Total, ...]:
        """The sums by bucket and currency."""
        kinds = dict.fromkeys((each.bucket, each.currency) for each in self.balances)
        return tuple(_total(kind, [b for b in self.balances if (b.bucket, b.currency) == kind]) for kind in kinds)

    def to_json(self) -> str:
        """The report as one JSON document; amounts are strings of exact decimals."""
        document: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "verdict": self.verdict,
            "accounts": self.accounts,
            "transactions": self.transactions,
            "applied": self.applied,
            "mismatches": self.mismatches,
            "drift_accounts": self.drift_accounts,
            "drift_amount": _plain(self.drift_amount),
            "legacy_total": _plain(self.legacy_total),
            "ledger_total": _plain(self.ledger_total),
            "expected_total": _plain(self.expected_total),
            "bypass_writes": self.bypass_writes,
            "replayed": self.replayed,
            "resyncs": self.resyncs,
            "serialization_retries": self.serialization_retries,
            "stages": [
                {
                    "name": stage.name,
                    "transactions": stage.transactions,
                    "seconds": stage.seconds,
                    "per_second": stage.per_second,
                    "p50_ms": stage.p50_ms,
                    "p99_ms": stage.p99_ms,
                }
                for stage in self.stages
            ],
            "postgres_version": self.postgres_version,
        }
        if self.copied_from is not None:
            document["totals"] = [
                {
                    **{"bucket": one.bucket, "currency": one.currency, "accounts": one.accounts},
                    **{"legacy": plain(one.legacy), "ledger": plain(one.ledger), "expected": plain(one.expected)},
                }
                for one in self.totals
            ]
            document["source"] = asdict(self.copied_from)
        return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def judge(
    *,
    transactions: int,
    applied: int,
    mismatches: int,
    balances: Sequence[AccountBalances],
    stages: Sequence[Stage],
    postgres_version: str,
    errors: Sequence[str],
    bypass_writes: int = 0,
    replayed: int = 0,
    resyncs: int = 0,
    serialization_retries: int = 0,
    copied_from: CopiedFrom | None = None,
) -> Report:
    """Make the report. It passes only if nothing at all is wrong."""
    drifting = [each for each in balances if not each.agrees]
    one_currency = len({each.currency for each in balances}) <= 1
    clean = not (errors or mismatches or drifting) and applied == transactions
    return Report(
        verdict="pass" if clean else "fail",
        accounts=len(balances),
        transactions=transactions,
        applied=applied,
        mismatches=mismatches,
        drift_accounts=len(drifting),
        drift_amount=_sum(each.drift for each in drifting) if one_currency else None,
        legacy_total=_sum(each.legacy for each in balances) if one_currency else None,
        ledger_total=_sum(each.ledger for each in balances) if one_currency else None,
        expected_total=_sum(each.expected for each in balances) if one_currency else None,
        bypass_writes=bypass_writes,
        replayed=replayed,
        resyncs=resyncs,
        serialization_retries=serialization_retries,
        stages=tuple(stages),
        postgres_version=postgres_version,
        balances=tuple(balances),
        errors=tuple(errors),
        copied_from=copied_from,
    )


def _total(kind: tuple[str, str], balances: Sequence[AccountBalances]) -> Total:
    sides = (_sum((getattr(each, side) for each in balances), Decimal(0)) for side in ("legacy", "ledger", "expected"))
    return Total(*kind, len(balances), *sides)


def _sum(amounts: Iterable[Decimal | None], zero: Decimal = Decimal("0.00")) -> Decimal:
    """Exact, also where the default context would round."""
    with localcontext(EXACT):
        return sum((amount for amount in amounts if amount is not None), zero)


def stage(name: str, transactions: int, seconds: float, durations: array[float]) -> Stage:
    """The figures of a stage; ``durations`` are those of single transactions, in seconds."""
    ordered = sorted(durations)
    return Stage(
        name=name,
        transactions=transactions,
        seconds=round(seconds, 3),
        per_second=round(transactions / seconds, 1) if transactions and seconds else 0.0,
        p50_ms=_percentile(ordered, 50),
        p99_ms=_percentile(ordered, 99),
    )


def _percentile(ordered: Sequence[float], percent: int) -> float | None:
    """By the nearest rank, so that it is one that was measured; in milliseconds."""
    if not ordered:
        return None
    return round(ordered[-(-percent * len(ordered) // 100) - 1] * 1000, 3)


def plain(amount: Decimal) -> str:
    """An amount as exact decimals, never with an exponent."""
    return f"{amount:f}"


def _plain(amount: Decimal | None) -> str | None:
    return None if amount is None else plain(amount)


def write_balances(report: Report, path: Path) -> None:
    """Write every account's balances as CSV, in the order of the file; empty where a side has none.

    Of a rehearsal on a copied table also bucket and currency, at the end.
    """
    money = report.copied_from is not None
    with path.open("w", encoding="utf-8", newline="") as file:
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow((*BALANCE_COLUMNS, *(("bucket", "currency") if money else ())))
        for each in report.balances:
            three = (each.legacy, each.ledger, each.expected)
            kind = (each.bucket, each.currency) if money else ()
            lines.writerow([each.account_id, *("" if one is None else plain(one) for one in three), *kind])


def check_writable(*paths: Path | None) -> None:
    """Find out before the rehearsal that a result could not be written after it. Raises UsageError."""
    for path in paths:
        if path is None:
            continue
        if path.is_dir():
            raise UsageError(f"{path} is a folder: name a file")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise UsageError(f"{path} cannot be written: name a file in a folder that exists and is yours")
