"""The dashboard of whether both sides agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from panels import AGE, Board, Panel, by, counted, lines

WRITES: Final = "walletmigrate_dual_write_total"
MISMATCHES: Final = "walletmigrate_mismatch_total"
PROCESSES: Final = '{where!="verify"}'
VERIFIED: Final = f'{MISMATCHES}{{where="verify"}}[$__rate_interval]'
"""Served by the exporter; of several exporters of one database the highest value is taken, not the sum."""


def reconciliation() -> Board:
    """Whether the two sides, and the ledger in itself, agree."""
    return Board(
        "reconciliation",
        "walletmigrate: reconciliation and verification",
        "Whether legacy and ledger agree, by verification and by live traffic, and whether the ledger balances.",
        (("Verification", _verification()), ("Live traffic", _live())),
    )


def _verification() -> Sequence[Panel]:
    return (
        lines(
            "Imbalance by currency",
            "Sum of all balances, system accounts included, in major units. Anything but 0 is a critical alert.",
            [(by("currency", "walletmigrate_ledger_imbalance"), "{{currency}}")],
            unit="none",
            least=None,
        ),
        lines(
            "Age of the last clean verification",
            "Time since the last clean full verification, of the mapping that has waited longest. One that a later "
            "verification found something after does not count.",
            [(AGE, "age")],
            unit="s",
        ),
        lines(
            "Accounts with drift by currency",
            "Accounts whose balances differ, by the last full verification or what came later: samples, changes, "
            "reconciliations, those with an outside truth too. Stale and absent ones are no drift.",
            [(by("currency", "walletmigrate_drift_accounts"), "{{currency}}")],
            unit="short",
        ),
        lines(
            "Drift by currency",
            "Sum of absolute differences, in major units, by the last full verification or what came later: samples, "
            "changes, reconciliations, those with an outside truth too.",
            [(by("currency", "walletmigrate_drift_amount"), "{{currency}}")],
            unit="none",
        ),
    )


def _live() -> Sequence[Panel]:
    compared = 'walletmigrate_read_compare_total{outcome=~"match|mismatch"}'
    mismatched = 'walletmigrate_read_compare_total{outcome="mismatch"}'
    return (
        lines(
            "Mismatches",
            "Differences between legacy and ledger since the point before, by where they were seen: by processes that "
            "write and read, and by verifications, each of which counts an account that differs anew.",
            [(counted(MISMATCHES, "where", PROCESSES), "{{where}}"), (f"max(increase({VERIFIED}))", "verify")],
            unit="short",
        ),
        lines(
            "Share of compared reads that differ",
            "Of the reads of accounts that should be in step. Legacy answered each that differed.",
            [
                (
                    f"sum(rate({mismatched}[$__rate_interval])) / (sum(rate({compared}[$__rate_interval])) > 0)",
                    "differ",
                )
            ],
            unit="percentunit",
        ),
        lines(
            "Stale and closed accounts",
            "Stale accounts are behind and are not read; closed ones have lost their legacy row.",
            [(by("state", 'walletmigrate_accounts{state=~"stale|closed"}'), "{{state}}")],
            unit="short",
        ),
        lines(
            "Causes of stale accounts",
            "What made accounts stale since the point before: writes past the adapter, failures of the ledger leg.",
            [
                (
                    'sum(increase(walletmigrate_bypass_writes_total{treatment="turned_stale"}[$__rate_interval]))',
                    "past the adapter",
                ),
                (f'sum(increase({WRITES}{{outcome="ledger_failed"}}[$__rate_interval]))', "ledger leg failed"),
            ],
            unit="short",
        ),
    )
