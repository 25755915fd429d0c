"""Whether a runbook's alert fires in its situation, and ends with it: Prometheus' own rules, on what was really served.

What the exporter and the application's process serve is taken at a few moments. promtool then plays the committed rules
on it, as if each had gone on for as long as the rule waits. Its clock begins at 0, so served times are moved as far.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import time
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from alert_rules import FOLDER, PREFIX, rules
from binaries import program
from walletmigrate.exporter import DatabaseFacts
from walletmigrate.observe import PrometheusObserver

EXPORTER: Final = {"job": "walletmigrate-exporter", "instance": "db"}
SHOP: Final = {"job": "shop", "instance": "a"}
BEGIN: Final = 27 * 60
"""Minutes of promtool's time before the first sample: longer than any age that a rule asks for."""
BEFORE, DURING, AFTER = 20, 45, 60
"""Minutes for which a state is served; a counter rises evenly to what is served at their end."""
SLOWEST: Final = {"DualWriteErrorBudgetBurn": 8 * 60}
"""An alert that looks back further than `AFTER`: the longest of its short windows is six hours."""
COUNTERS: Final = ("_total", "_bucket", "_count", "_sum")


@dataclass(frozen=True)
class Shop:
    """What one process of the application counts."""

    registry: CollectorRegistry = field(default_factory=CollectorRegistry)
    observer: PrometheusObserver = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "observer", PrometheusObserver(self.registry))


@dataclass(frozen=True)
class Scrape:
    """What was served at a moment (seconds since 1970): the samples by their series."""

    at: float
    samples: Mapping[str, float]


def scraped(engine: Any, settings: Any, shop: Shop, exporter_url: str | None) -> Scrape:
    """One look, as Prometheus would: at the exporter under its address, or, without one, at what it would serve now."""
    text: str | None
    if exporter_url is None:
        scope = {(mapping.name, column.currency) for mapping in settings.mappings for column in mapping.columns}
        registry = CollectorRegistry()
        registry.register(DatabaseFacts(engine, settings.ledger_schema, scope))
        text = generate_latest(registry).decode()
    else:
        try:
            with urllib.request.urlopen(f"{exporter_url}/metrics", timeout=10) as answer:
                text = answer.read().decode()
        except OSError:
            text = None
    samples = {_series("up", EXPORTER): float(text is not None), _series("up", SHOP): 1.0}
    samples |= _samples(text or "", EXPORTER)
    samples |= _samples(generate_latest(shop.registry).decode(), SHOP)
    return Scrape(time.time(), samples)


def _samples(text: str, target: Mapping[str, str]) -> dict[str, float]:
    return {
        _series(sample.name, {**target, **sample.labels}): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith("walletmigrate_") and not sample.name.endswith("_created")
    }


def _series(name: str, labels: Mapping[str, str]) -> str:
    inner = ", ".join(f"{label}={json.dumps(value)}" for label, value in labels.items())
    return f"{name}{{{inner}}}"


def assert_it_fires_and_ends(alert: str, before: Sequence[Scrape], during: Scrape, after: Scrape, folder: Path) -> None:
    """Fail unless the alert is silent ``before``, fires with what was served in the fault, and is silent at the end."""
    rest = SLOWEST.get(alert, AFTER)
    stretches = [*((one, BEFORE) for one in before), (during, DURING), (after, rest)]
    broken = BEGIN + BEFORE * len(before)
    firing = f'ALERTS{{alertname="{PREFIX}{alert}", alertstate="firing"}}'

    def ever(minutes: int) -> str:
        return f"max(max_over_time({firing}[{minutes}m]))"

    fired = [{"labels": "{}", "value": 1}]
    looks = [
        {"expr": ever(BEFORE * len(before) - 2), "eval_time": f"{broken - 1}m", "exp_samples": []},
        {"expr": ever(DURING), "eval_time": f"{broken + DURING - 1}m", "exp_samples": fired},
        {"expr": f"count({firing})", "eval_time": f"{broken + DURING + rest - 1}m", "exp_samples": []},
    ]
    mine = _rules(alert)
    named = set(re.findall(r"\w+", " ".join(rule["expr"] for rule in mine)))
    names = {name for scrape, _ in stretches for name in scrape.samples if name.partition("{")[0] in named}
    test = {
        "interval": "1m",
        "input_series": [{"series": name, "values": _values(name, stretches)} for name in sorted(names)],
        "promql_expr_test": looks,
    }
    file = folder / "alert.yml"
    chosen = folder / "rules.yml"
    chosen.write_text(json.dumps({"groups": [{"name": "of the alert", "rules": mine}]}), encoding="utf-8")
    content = {"rule_files": [str(chosen)], "evaluation_interval": "1m", "tests": [test]}
    file.write_text(json.dumps(content), encoding="utf-8")  # JSON is YAML
    promtool = program("prometheus", "promtool")
    command = [str(promtool.path), "test", "rules", str(file)]
    done = subprocess.run(
        command, env=promtool.environment, capture_output=True, text=True, timeout=120, check=False, cwd=FOLDER
    )
    assert done.returncode == 0, f"{alert}: silent, fires, silent?\n{done.stdout}{done.stderr}"


def _rules(alert: str) -> list[dict[str, Any]]:
    """The alert's rules, and the recordings where they need any, in order: all rules take promtool much longer."""
    mine = [rule for rule in rules() if rule.get("alert") == PREFIX + alert]
    recordings = [rule for rule in rules() if "record" in rule]
    return [*(recordings if any("walletmigrate:" in rule["expr"] for rule in mine) else []), *mine]


def _values(name: str, stretches: Sequence[tuple[Scrape, int]]) -> str:
    """The series in promtool's notation: a sample each minute."""
    values, begins = f"_x{BEGIN}", BEGIN * 60
    there, last = False, 0.0
    for scrape, minutes in stretches:
        value = scrape.samples.get(name)
        if value is None:
            values += f" {'stale' if there else '_'} _x{minutes - 1}"
        elif math.isnan(value):
            values += " NaN" * minutes
        elif there and name.partition("{")[0].endswith(COUNTERS):
            step = (value - last) / minutes
            values += f" {last + step:.9g}{step:+.9g}x{minutes - 1}"
        else:
            moved = "timestamp_seconds" in name and value > 1  # 0 and 1 are no times
            values += f" {value - scrape.at + begins if moved else value:.9g}x{minutes - 1}"
        there, last, begins = value is not None, value or 0.0, begins + minutes * 60
    return values
