"""What a scrape must have and has, for the tests of metrics: series by name and sorted labels."""

from __future__ import annotations

import subprocess
from itertools import product

from prometheus_client.parser import text_string_to_metric_families

from binaries import program
from walletmigrate import observe

Series = tuple[str, tuple[tuple[str, str], ...]]


def process_series() -> set[Series]:
    """Every series that a process must have from its start, without histogram buckets and creation times."""
    series: set[Series] = set()
    calls = [
        (("operation", operation), ("outcome", name))
        for operation, name in product(observe.OPERATIONS, observe.OUTCOMES)
    ]
    series |= {("walletmigrate_dual_write_total", labels) for labels in calls}
    for mode, operation in product(observe.MODES, observe.OPERATIONS):
        timing = (("mode", mode), ("operation", operation))
        series.add(("walletmigrate_dual_write_duration_seconds_count", timing))
        series.add(("walletmigrate_dual_write_duration_seconds_sum", timing))
    series |= {("walletmigrate_read_total", (("source", source),)) for source in observe.SOURCES}
    series |= {("walletmigrate_read_compare_total", (("outcome", name),)) for name in observe.COMPARES}
    series |= {("walletmigrate_mismatch_total", (("where", where),)) for where in observe.PLACES}
    series |= {("walletmigrate_watched_write_total", (("outcome", name),)) for name in observe.WATCHED}
    series |= {("walletmigrate_flag_age_seconds", (("flag", flag),)) for flag in observe.FLAGS}
    return series


def everything(text: str) -> dict[Series, float]:
    """All samples of a page, buckets of histograms too, without creation times."""
    samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for sample in samples
        if not sample.name.endswith("_created")
    }


def scraped(text: str) -> dict[Series, float]:
    """The samples of a page without buckets and creation times."""
    return {series: value for series, value in everything(text).items() if not series[0].endswith("_bucket")}


def assert_well_formed(page: bytes) -> None:
    """Fail unless promtool finds nothing to say about the page."""
    promtool = program("prometheus", "promtool")
    checked = subprocess.run(
        [str(promtool.path), "check", "metrics"],
        input=page,
        env=promtool.environment,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")
