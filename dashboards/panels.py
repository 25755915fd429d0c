"""What the dashboards are made of: expressions, panels of numbers, panels of lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, timeseries
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
    DataSourceRef,
    Threshold,
    ThresholdsMode,
    ValueMap,
    ValueMappingResult,
)

SOURCE: Final = DataSourceRef(type_val="prometheus", uid="${datasource}")

GREEN: Final = "green"
YELLOW: Final = "yellow"
RED: Final = "red"
BLUE: Final = "blue"
HOUR: Final = 3600.0

Steps = Sequence[tuple[float | None, str]]
Targets = Sequence[tuple[str, str]]
"""(PromQL, legend) of each line of a panel."""
Panel = stat.Panel | timeseries.Panel

ANY_IS_WRONG: Final[Steps] = ((None, GREEN), (1e-18, RED))
"""Green at exactly 0, red above: for what must never happen."""
ANY_IS_NOTEWORTHY: Final[Steps] = ((None, GREEN), (1e-18, YELLOW))
PLAIN: Final[Steps] = ((None, BLUE),)
AGE: Final = "time() - min(walletmigrate_verification_last_success_timestamp_seconds > 1)"
"""Seconds since the last clean full verification; no value without one."""


@dataclass(frozen=True)
class Board:
    """A dashboard: ``name`` is its file's, and with a prefix its uid in Grafana."""

    name: str
    title: str
    description: str
    rows: Sequence[tuple[str, Sequence[Panel]]]


def per_second(metric: str, by: str, selector: str = "") -> str:
    """The rate of a counter, summed over all processes."""
    return f"sum by ({by}) (rate({metric}{selector}[$__rate_interval]))"


def counted(metric: str, by: str, selector: str = "") -> str:
    """How many a counter saw since the point before, summed over all processes."""
    return f"sum by ({by}) (increase({metric}{selector}[$__rate_interval]))"


def by(labels: str, metric: str) -> str:
    """A gauge of the exporter. Of several exporters of one database the highest value is taken, not the sum."""
    return f"max by ({labels}) ({metric})"


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
