"""The dashboard of where the migration stands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from panels import AGE, ANY_IS_WRONG, GREEN, HOUR, PLAIN, RED, YELLOW, Board, Panel, by, lines, number

WRITES: Final = "walletmigrate_dual_write_total"
COUNTED: Final = 'outcome=~"ok|replayed|ledger_failed"'
"""What the success ratio is of: skipped is what an operator wanted, refused what a caller did wrong."""
# Recorded by alerts/walletmigrate.rules.yml.
FAILED_RATIO: Final = "walletmigrate:dual_write_failed:ratio_rate"
BUDGET: Final = "(1 - scalar(walletmigrate:dual_write:objective))"


def success_ratio() -> str:
    """The share of postings whose ledger leg did not fail; no value without traffic."""
    good = f'sum(rate({WRITES}{{outcome=~"ok|replayed"}}[$__rate_interval]))'
    among = f"sum(rate({WRITES}{{{COUNTED}}}[$__rate_interval]))"
    return f"{good} / ({among} > 0)"


def overview() -> Board:
    """Where the migration stands, and whether anything is wrong."""
    return Board(
        "overview",
        "walletmigrate: overview",
        "Where the migration of a balance column to a double-entry ledger stands, and whether anything is wrong.",
        (("Now", _now()), ("Error budget", _budget()), ("Accounts and drift", _whole()), ("Flags", _flags())),
    )


def _now() -> Sequence[Panel]:
    return (
        number(
            "Phase",
            "The phase in force. It is the ceiling for what the flags can ask for.",
            [("max by (phase) (walletmigrate_phase) == 1", "{{phase}}")],
            unit="none",
            steps=PLAIN,
            names_only=True,
            span=6,
        ),
        number(
            "Line",
            "Stopped means: no ledger leg is written in any process; written accounts turn stale.",
            [("max(walletmigrate_line_stopped)", "line")],
            unit="none",
            steps=((None, GREEN), (1, RED)),
            words={"0": ("running", GREEN), "1": ("STOPPED", RED)},
            span=6,
        ),
        number(
            "Exporter",
            "Whether the exporter's last look at the database succeeded. If not, nothing here but processes' counters "
            "is new.",
            [("min(walletmigrate_exporter_up)", "exporter")],
            unit="none",
            steps=((None, RED), (1, GREEN)),
            words={"0": ("down", RED), "1": ("up", GREEN)},
            span=6,
        ),
        number(
            "Alerts firing",
            "Alerts of alerts/walletmigrate.rules.yml that fire now, by name; each has a runbook of its name.",
            [
                (
                    'count by (alertname) (ALERTS{alertname=~"WalletMigrate.+", alertstate="firing"})',
                    "{{alertname}}",
                )
            ],
            unit="none",
            steps=ANY_IS_WRONG,
            no_value="none",
            span=6,
        ),
        number(
            "Ledger imbalance",
            "Sum of all balances by currency, system accounts included, in major units. It must be 0.",
            [(f"abs({by('currency', 'walletmigrate_ledger_imbalance')})", "{{currency}}")],
            unit="none",
            steps=ANY_IS_WRONG,
            span=6,
        ),
        number(
            "Accounts with drift",
            "Accounts whose balances differ, by the last full verification or what came later: samples, changes, "
            "reconciliations, those with an outside truth too. More than 0 is a critical alert.",
            [(f"sum({by('currency', 'walletmigrate_drift_accounts')})", "accounts")],
            unit="short",
            steps=ANY_IS_WRONG,
            span=6,
        ),
        number(
            "Verification age",
            "Time since the last clean full verification, of the mapping that has waited longest. One that a later "
            "verification found something after does not count.",
            [(AGE, "age")],
            unit="s",
            steps=((None, GREEN), (26 * HOUR, YELLOW), (50 * HOUR, RED)),
            no_value="no clean run known",
            span=6,
        ),
        number(
            "Error budget left",
            "What is left of the last three days' error budget of dual-writes; below 0 it is overspent.",
            [(f"1 - {FAILED_RATIO}3d / {BUDGET}", "left")],
            unit="percentunit",
            steps=((None, RED), (0, YELLOW), (0.5, GREEN)),
            no_value="no traffic",
            span=6,
        ),
    )


def _budget() -> Sequence[Panel]:
    windows = ("5m", "1h", "6h", "3d")
    return (
        lines(
            "Burn rate",
            "How many times faster than allowed dual-writes fail, by window. 1 spends the budget exactly; "
            "14.4 over an hour and 6 over six hours page.",
            [(f"{FAILED_RATIO}{window} / {BUDGET}", window) for window in windows],
            unit="none",
        ),
        lines(
            "Dual-write success ratio",
            "Share of postings whose ledger leg did not fail. Skipped and refused ones do not count.",
            [(success_ratio(), "success")],
            unit="percentunit",
            least=None,
            most=1,
        ),
    )


def _whole() -> Sequence[Panel]:
    return (
        lines(
            "Accounts by state",
            "Accounts in the ledger by state; absent ones as counted by the last full verification.",
            [(by("state", "walletmigrate_accounts"), "{{state}}")],
            unit="short",
            stacked=True,
        ),
        lines(
            "Drift",
            "Sum of absolute differences, in major units of each currency, by the last full verification or what came "
            "later: samples, changes, reconciliations, those with an outside truth too.",
            [(by("currency", "walletmigrate_drift_amount"), "{{currency}}")],
            unit="none",
        ),
    )


def _flags() -> Sequence[Panel]:
    return (
        lines(
            "Flag rollout",
            "Share of the accounts for which each flag is on, as the documents go; the phase may allow less.",
            [(by("flag", "walletmigrate_flag_rollout_ratio"), "{{flag}}")],
            unit="percentunit",
            most=1,
            span=8,
        ),
        lines(
            "Flag age",
            "Age of the oldest flag document that a live process has just decided by.",
            [("max(walletmigrate_flag_age_seconds)", "oldest")],
            unit="s",
            span=8,
        ),
        lines(
            "Flag documents in use",
            "Different flag documents that live processes decide by; more than one for long means that they disagree.",
            [("max(walletmigrate_flag_documents)", "documents")],
            unit="short",
            span=8,
        ),
    )
