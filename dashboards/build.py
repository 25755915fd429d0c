"""Make ``walletmigrate.json``, the Grafana dashboard: ``python dashboards/build.py``.

With ``--check`` nothing is written; the exit code is 1 if the file is not what this program makes. The
metrics are described in `walletmigrate.observe`.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import (
    BigValueColorMode,
    BigValueGraphMode,
    BigValueTextMode,
    LegendDisplayMode,
    LegendPlacement,
    StackingMode,
    TooltipDisplayMode,
)
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DataSourceRef,
    Threshold,
    ThresholdsMode,
    ValueMap,
    ValueMappingResult,
)

TARGET: Final = Path(__file__).with_name("walletmigrate.json")
SOURCE: Final = DataSourceRef(type_val="prometheus", uid="${datasource}")
COLUMNS: Final = 24  # Grafana's grid

GREEN: Final = "green"
YELLOW: Final = "yellow"
RED: Final = "red"
HOUR: Final = 3600.0

Steps = Sequence[tuple[float | None, str]]
Targets = Sequence[tuple[str, str]]
"""(PromQL, legend) of each line of a panel."""

ANY_IS_WRONG: Final[Steps] = ((None, GREEN), (1e-18, RED))
"""Green at exactly 0, red above: for what must never happen."""

WRITES: Final = "walletmigrate_dual_write_total"
LATENCY: Final = "walletmigrate_dual_write_duration_seconds_bucket"
VERIFIED: Final = "walletmigrate_verification_last_success_timestamp_seconds"
COUNTED: Final = 'outcome=~"ok|replayed|ledger_failed"'
"""What the success ratio is of: skipped is what an operator wanted, refused what a caller did wrong."""


def per_second(metric: str, by: str, selector: str = "") -> str:
    """The rate of a counter, summed over all processes."""
    return f"sum by ({by}) (rate({metric}{selector}[$__rate_interval]))"


def quantile(share: float) -> str:
    """A quantile of the posting latency by mode, in seconds."""
    return f"histogram_quantile({share}, {per_second(LATENCY, 'le, mode')})"


def success_ratio() -> str:
    """The share of postings whose ledger leg did not fail; no value without traffic."""
    good = f'sum(rate({WRITES}{{outcome=~"ok|replayed"}}[$__rate_interval]))'
    counted = f"sum(rate({WRITES}{{{COUNTED}}}[$__rate_interval]))"
    return f"{good} / ({counted} > 0)"


def _queries(targets: Targets, *, instant: bool) -> list[prometheus.Dataquery]:
    queries = []
    for (expression, legend), letter in zip(targets, "ABCDEFGH", strict=False):
        query = prometheus.Dataquery().expr(expression).legend_format(legend)
        query = query.ref_id(letter).datasource(SOURCE)
        queries.append(query.instant() if instant else query.range())
    return queries


def _thresholds(steps: Steps) -> dashboard.ThresholdsConfig:
    made = [Threshold(value=value, color=color) for value, color in steps]
    return dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(made)


def number(
    title: str,
    description: str,
    targets: Targets,
    *,
    unit: str,
    steps: Steps,
    words: dict[str, tuple[str, str]] | None = None,
    names_only: bool = False,
    no_value: str = "no data",
    span: int = 4,
) -> stat.Panel:
    """A panel of present values. ``words``: value → (text, colour); ``names_only`` shows the legend."""
    panel = stat.Panel().title(title).description(description).datasource(SOURCE).unit(unit)
    for query in _queries(targets, instant=True):
        panel.with_target(query)
    if words:
        results = {value: ValueMappingResult(text=text, color=color) for value, (text, color) in words.items()}
        panel.mappings([ValueMap(options=results)])
    text = BigValueTextMode.NAME if names_only else BigValueTextMode.AUTO
    return (
        panel.thresholds(_thresholds(steps))
        .color_mode(BigValueColorMode.BACKGROUND)
        .graph_mode(BigValueGraphMode.NONE)
        .text_mode(text)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .no_value(no_value)
        .height(4)
        .span(span)
    )


def lines(
    title: str,
    description: str,
    targets: Targets,
    *,
    unit: str,
    stacked: bool = False,
    least: float | None = 0,
    most: float | None = None,
    span: int = 12,
) -> timeseries.Panel:
    """A panel of values over time."""
    legend = common.VizLegendOptions().display_mode(LegendDisplayMode.TABLE).placement(LegendPlacement.BOTTOM)
    tooltip = common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI)
    panel = timeseries.Panel().title(title).description(description).datasource(SOURCE).unit(unit)
    for query in _queries(targets, instant=False):
        panel.with_target(query)
    panel.legend(legend.calcs(["lastNotNull", "max"]).show_legend(True)).tooltip(tooltip)
    panel.fill_opacity(20 if stacked else 5).line_width(1)
    if stacked:
        panel.stacking(common.StackingConfig().mode(StackingMode.NORMAL))
    if least is not None:
        panel.min(least)
    if most is not None:
        panel.max(most)
    return panel.height(8).span(span)


def state_panels() -> list[stat.Panel]:
    """Where the migration stands and whether anything is wrong now."""
    return [
        number(
            "Phase",
            "The phase in force. It is the ceiling for what the flags can ask for.",
            [("max by (phase) (walletmigrate_phase) == 1", "{{phase}}")],
            unit="none",
            steps=((None, "blue"),),
            names_only=True,
        ),
        number(
            "Line",
            "Stopped means: no ledger leg is written in any process; written accounts turn stale.",
            [("max(walletmigrate_line_stopped)", "line")],
            unit="none",
            steps=((None, GREEN), (1, RED)),
            words={"0": ("running", GREEN), "1": ("STOPPED", RED)},
        ),
        number(
            "Ledger imbalance",
            "Sum of all balances by currency, system accounts included, in major units. It must be 0.",
            [("abs(max by (currency) (walletmigrate_ledger_imbalance))", "{{currency}}")],
            unit="none",
            steps=ANY_IS_WRONG,
        ),
        number(
            "Accounts with drift",
            "Accounts whose legacy and ledger balance differed in the last full verification.",
            [("sum(walletmigrate_drift_accounts)", "accounts")],
            unit="short",
            steps=ANY_IS_WRONG,
        ),
        number(
            "Verification age",
            "Time since the last clean full verification, of the mapping that has waited longest.",
            [(f"time() - min({VERIFIED} > 0)", "age")],
            unit="s",
            steps=((None, GREEN), (26 * HOUR, YELLOW), (50 * HOUR, RED)),
            no_value="no clean run known",
        ),
        number(
            "Exporter",
            "Whether the exporter's last look at the database succeeded. If not, this row shows nothing new.",
            [("min(walletmigrate_exporter_up)", "exporter")],
            unit="none",
            steps=((None, RED), (1, GREEN)),
            words={"0": ("down", RED), "1": ("up", GREEN)},
        ),
    ]


def write_panels() -> list[timeseries.Panel]:
    """Postings of the application's processes."""
    return [
        lines(
            "Dual-writes by outcome",
            "Postings per second. ledger_failed: legacy was written, the account turned stale. skipped: "
            "dual-write was off. replayed: an idempotency key was seen before. refused: nothing written.",
            [(per_second(WRITES, "outcome"), "{{outcome}}")],
            unit="ops",
            stacked=True,
        ),
        lines(
            "Dual-write success ratio",
            "Share of postings whose ledger leg did not fail. Skipped and refused ones do not count.",
            [(success_ratio(), "success")],
            unit="percentunit",
            least=None,
            most=1,
        ),
        lines(
            "Posting latency",
            "Median and 99th percentile of one posting call by mode, the caller's commit not included.",
            [(quantile(0.5), "p50 {{mode}}"), (quantile(0.99), "p99 {{mode}}")],
            unit="s",
        ),
        lines(
            "Mismatches",
            "Differences between legacy and ledger since the point before, by where they were seen.",
            [("sum by (where) (increase(walletmigrate_mismatch_total[$__rate_interval]))", "{{where}}")],
            unit="short",
        ),
        lines(
            "Writes past the adapter",
            "Writes to the legacy column that did not come through the adapter, by what the fence made of them.",
            [("sum by (treatment) (increase(walletmigrate_bypass_writes_total[$__rate_interval]))", "{{treatment}}")],
            unit="short",
        ),
        lines(
            "Watched ORM writes",
            "lost_update: an assignment overwrote a balance newer than the one it was made from. unrouted: a write "
            "that could not be sent through the adapter; the fence caught it.",
            [("sum by (outcome) (increase(walletmigrate_watched_write_total[$__rate_interval]))", "{{outcome}}")],
            unit="short",
        ),
    ]


def read_panels() -> list[timeseries.Panel]:
    """Balance reads of the application's processes."""
    return [
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
    ]


def account_panels() -> list[timeseries.Panel]:
    """Accounts, the jobs over all of them, drift and flags."""
    done, left = 'walletmigrate_job_items{kind="backfill"}', 'walletmigrate_job_remaining{kind="backfill"}'
    return [
        lines(
            "Accounts by state",
            "Accounts in the ledger by state; absent ones as counted by the last full verification.",
            [("max by (state) (walletmigrate_accounts)", "{{state}}")],
            unit="short",
            stacked=True,
        ),
        lines(
            "Backfill progress",
            "Share of the newest backfill's items that are done; nothing while there has been no backfill.",
            [(f"sum({done}) / (sum({done}) + sum({left}) > 0)", "done")],
            unit="percentunit",
            most=1,
        ),
        lines(
            "Jobs",
            "Items left and items failed of the newest jobs, and jobs that are paused, by kind.",
            [
                ("max by (kind) (walletmigrate_job_remaining)", "{{kind}} left"),
                ("max by (kind) (walletmigrate_job_failed)", "{{kind}} failed"),
                ("max by (kind) (walletmigrate_job_paused)", "{{kind}} paused"),
            ],
            unit="short",
        ),
        lines(
            "Drift",
            "Sum of absolute differences in the last full verification, in major units of each currency.",
            [("max by (currency) (walletmigrate_drift_amount)", "{{currency}}")],
            unit="none",
        ),
        lines(
            "Flag age",
            "Age of the oldest flag document that a live process has just decided by.",
            [("max(walletmigrate_flag_age_seconds)", "oldest")],
            unit="s",
        ),
        lines(
            "Flag rollout",
            "Share of the accounts for which each flag is on, as the documents go; the phase may allow less.",
            [("max by (flag) (walletmigrate_flag_rollout_ratio)", "{{flag}}")],
            unit="percentunit",
            most=1,
        ),
        lines(
            "Flag documents in use",
            "Different flag documents that live processes decide by; more than one for long means that they disagree.",
            [("max(walletmigrate_flag_documents)", "documents")],
            unit="short",
        ),
        lines(
            "Batch duration",
            "Seconds of the last batch of the newest jobs, by kind.",
            [("max by (kind) (walletmigrate_job_batch_seconds)", "{{kind}}")],
            unit="s",
        ),
    ]


def build() -> str:
    """The dashboard as JSON, always the same text."""
    source = dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus")
    board = (
        dashboard.Dashboard("walletmigrate")
        .uid("walletmigrate")
        .description("A balance column on its way to a double-entry ledger: state, writes, reads, jobs, drift.")
        .tags(["walletmigrate"])
        .readonly()
        .time("now-6h", "now")
        .timezone("browser")
        .refresh("30s")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .with_variable(source)
    )
    rows: Sequence[tuple[str, Sequence[stat.Panel | timeseries.Panel]]] = (
        ("State", state_panels()),
        ("Writes", write_panels()),
        ("Reads", read_panels()),
        ("Accounts and jobs", account_panels()),
    )
    numbers = itertools.count(1)  # Grafana wants them unique on a dashboard, rows included
    for title, panels in rows:
        board.with_row(dashboard.Row(title).id(next(numbers)))
        for panel in panels:
            board.with_panel(panel.id(next(numbers)))
    return JSONEncoder(indent=2, sort_keys=True).encode(board.build()) + "\n"


def main(arguments: Sequence[str]) -> int:
    """Write the file, or with ``--check`` compare it; the result is the exit code."""
    made = build()
    if "--check" in arguments:
        same = TARGET.exists() and TARGET.read_text(encoding="utf-8") == made
        if not same:
            sys.stderr.write(f"{TARGET.name} is not what the code makes: run python dashboards/build.py\n")
        return 0 if same else 1
    TARGET.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
