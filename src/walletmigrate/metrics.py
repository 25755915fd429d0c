"""Every metric by name: what it counts, by which labels, and who serves it. Docs and boards are held to it by tests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal

PREFIX: Final = "walletmigrate_"


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric as it is scraped: ``name`` without prefix, ``labels`` in order, where it is counted. Of one that both
    serve, each has label values of its own: a sum over all counts nothing twice.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    served_by: Literal["process", "exporter", "both"] = "exporter"

    def served(self, by: Literal["process", "exporter"]) -> bool:
        """Whether a scrape of it shows the metric."""
        return self.served_by in (by, "both")

    @property
    def full_name(self) -> str:
        """The name with prefix."""
        return PREFIX + self.name

    @property
    def series(self) -> tuple[str, ...]:
        """The names under which samples appear in a scrape."""
        if self.kind == "histogram":
            return tuple(self.full_name + suffix for suffix in ("_bucket", "_count", "_sum"))
        return (self.full_name,)


def _catalogue(*metrics: Metric) -> Mapping[str, Metric]:
    return MappingProxyType({metric.name: metric for metric in metrics})


METRICS: Final = _catalogue(
    Metric(
        "dual_write_total",
        "counter",
        "Postings by the adapter's operation and how they ended.",
        ("operation", "outcome"),
        "process",
    ),
    Metric(
        "dual_write_duration_seconds",
        "histogram",
        "Seconds of one posting call that reached the database, commit not included.",
        ("operation", "mode"),
        "process",
    ),
    Metric("read_total", "counter", "Balance reads by the side that answered.", ("source",), "process"),
    Metric("read_compare_total", "counter", "Compared balance reads by result.", ("outcome",), "process"),
    Metric("mismatch_total", "counter", "Differences seen between legacy and ledger.", ("where",), "both"),
    Metric(
        "watched_write_total",
        "counter",
        "Writes to watched ORM attributes that overwrote a newer balance, or went past the adapter.",
        ("outcome",),
        "process",
    ),
    Metric("flag_age_seconds", "gauge", "Age of the flag document last decided by.", ("flag",), "process"),
    Metric(
        "bypass_writes_total",
        "counter",
        "Writes past the adapter since the install, by what the fence made of them.",
        ("treatment",),
    ),
    Metric(
        "flag_rollout_ratio", "gauge", "Share of the accounts for which the flag is on, as documents go.", ("flag",)
    ),
    Metric("flag_documents", "gauge", "Different flag documents that live processes decide by."),
    Metric("phase", "gauge", "1 for the phase in force, 0 for the others.", ("phase",)),
    Metric("line_stopped", "gauge", "1 while the line is stopped, else 0."),
    Metric("accounts", "gauge", "Accounts by state; absent is as of the last full verification.", ("state",)),
    Metric(
        "drift_accounts",
        "gauge",
        "Accounts that differed in the last full verification, or, if that is more, in a later verification or "
        "reconciliation.",
        ("currency",),
    ),
    Metric(
        "drift_amount",
        "gauge",
        "Sum of absolute differences in the same, in major units.",
        ("currency",),
    ),
    Metric(
        "verification_last_success_timestamp_seconds",
        "gauge",
        "Unix time of the last clean full verification, the oldest of all mappings; 1 if a later one of any form was "
        "not clean, 0 if a mapping never had any.",
    ),
    Metric("job_items", "gauge", "Items done by the newest job of each kind and mapping.", ("kind", "mapping")),
    Metric(
        "job_failed",
        "gauge",
        "Items that failed; at least 1 if the job itself failed, 0 if it was cancelled.",
        ("kind", "mapping"),
    ),
    Metric("job_paused", "gauge", "1 while the newest job is paused, or held by a throttle.", ("kind", "mapping")),
    Metric("job_remaining", "gauge", "Items left to do; NaN while the total is not known.", ("kind", "mapping")),
    Metric("job_batch_seconds", "gauge", "Seconds of the newest job's last batch.", ("kind", "mapping")),
    Metric("ledger_imbalance", "gauge", "Sum of all balances, in major units; must be 0.", ("currency",)),
    Metric("exporter_up", "gauge", "1 if the last look at the database succeeded, else 0."),
)
