"""The dashboard of postings and reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from panels import Board, Panel, counted, lines, per_second

WRITES: Final = "walletmigrate_dual_write_total"
TIMED: Final = "walletmigrate_dual_write_duration_seconds"


def quantile(share: float) -> str:
    """A quantile of the posting latency by mode, in seconds."""
    return f"histogram_quantile({share}, {per_second(TIMED + '_bucket', 'le, mode')})"


def dual_write() -> Board:
    """Postings and reads of the application's processes, and writes past them."""
    return Board(
        "dual-write",
        "walletmigrate: dual-write",
        "Postings and balance reads of the application's processes, and the writes that went past the adapter.",
        (("Postings", _postings()), ("Past the adapter", _past()), ("Reads", _reads())),
    )


def _postings() -> Sequence[Panel]:
    return (
        lines(
            "Postings by outcome",
            "Postings per second. ledger_failed: under shadow legacy was written and the account turned stale, under "
            "strict the payment failed. skipped: dual-write was off. replayed: an idempotency key was seen before. "
            "refused: nothing written.",
            [(per_second(WRITES, "outcome"), "{{outcome}}")],
            unit="ops",
            stacked=True,
        ),
        lines(
            "Failures of the ledger leg",
            "Postings per second whose ledger leg failed, by operation. Each one spends error budget.",
            [(per_second(WRITES, "operation", '{outcome="ledger_failed"}'), "{{operation}}")],
            unit="ops",
        ),
        lines(
            "Postings by operation",
            "Postings per second by the adapter's operation, however they ended.",
            [(per_second(WRITES, "operation"), "{{operation}}")],
            unit="ops",
            stacked=True,
        ),
        lines(
            "Posting latency",
            "Median and 99th percentile of one posting call by mode, the caller's commit not included.",
            [(quantile(0.5), "p50 {{mode}}"), (quantile(0.99), "p99 {{mode}}")],
            unit="s",
        ),
        lines(
            "Timed calls by mode",
            "Posting calls per second that reached the database. legacy: the ledger leg was off for the account.",
            [(per_second(TIMED + "_count", "mode"), "{{mode}}")],
            unit="ops",
            stacked=True,
        ),
        lines(
            "Time in postings",
            "Seconds that all processes together spend in posting calls, per second, by mode.",
            [(per_second(TIMED + "_sum", "mode"), "{{mode}}")],
            unit="s",
        ),
    )


def _past() -> Sequence[Panel]:
    return (
        lines(
            "Writes past the adapter",
            "Writes to the legacy column that did not come through the adapter, by what the fence made of them.",
            [(counted("walletmigrate_bypass_writes_total", "treatment"), "{{treatment}}")],
            unit="short",
        ),
        lines(
            "Watched ORM writes",
            "lost_update: an assignment overwrote a balance newer than the one it was made from. unrouted: a write "
            "that could not be sent through the adapter; the fence caught it.",
            [(counted("walletmigrate_watched_write_total", "outcome"), "{{outcome}}")],
            unit="short",
        ),
    )


def _reads() -> Sequence[Panel]:
    return (
        lines(
            "Reads by source",
            "Balance reads per second. fallback: the ledger was asked for and could not answer; legacy did.",
            [(per_second("walletmigrate_read_total", "source"), "{{source}}")],
            unit="reqps",
            stacked=True,
        ),
        lines(
            "Read comparisons",
            "Reads compared with the other side, per second. stale: the account is known to be behind.",
            [(per_second("walletmigrate_read_compare_total", "outcome"), "{{outcome}}")],
            unit="reqps",
            stacked=True,
        ),
    )
