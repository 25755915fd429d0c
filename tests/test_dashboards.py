"""The Grafana dashboard: equal to what the code makes, complete, with expressions Prometheus can read."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
from itertools import combinations
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from binaries import program
from walletmigrate.observe import METRICS, PREFIX

FOLDER = Path(__file__).resolve().parent.parent / "dashboards"
COMMITTED = FOLDER / "walletmigrate.json"
SERIES = {series: metric for metric in METRICS.values() for series in metric.series}

Json = dict[str, Any]


def load_builder() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dashboards_build", FOLDER / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def committed() -> Json:
    board: Json = json.loads(COMMITTED.read_text(encoding="utf-8"))
    return board


def panels() -> list[Json]:
    return [panel for panel in committed()["panels"] if panel["type"] != "row"]


EXPRESSIONS = [
    pytest.param(target["expr"], id=f"{panel['title']}-{target['refId']}")
    for panel in panels()
    for target in panel["targets"]
]


def named(expression: str) -> set[str]:
    return set(re.findall(rf"\b{PREFIX}\w+", expression))


def test_the_committed_dashboard_is_what_the_code_makes() -> None:
    assert COMMITTED.read_text(encoding="utf-8") == load_builder().build()


def test_check_tells_a_dashboard_that_was_edited_by_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    builder = load_builder()
    monkeypatch.setattr(builder, "TARGET", tmp_path / "walletmigrate.json")
    assert builder.main(["--check"]) == 1
    assert builder.main([]) == 0
    assert builder.main(["--check"]) == 0
    edited = builder.TARGET.read_text(encoding="utf-8").replace("Phase", "Fase")
    builder.TARGET.write_text(edited, encoding="utf-8")
    assert builder.main(["--check"]) == 1
    assert "build.py" in capsys.readouterr().err


def test_the_data_source_is_a_variable_everywhere() -> None:
    (variable,) = committed()["templating"]["list"]
    assert (variable["name"], variable["type"], variable["query"]) == (
        "datasource",
        "datasource",
        "prometheus",
    )
    for panel in panels():
        for part in (panel, *panel["targets"]):
            assert part["datasource"] == {"type": "prometheus", "uid": "${datasource}"}, panel["title"]


def test_every_panel_has_a_title_of_its_own_a_description_and_a_unit() -> None:
    titles = [panel["title"] for panel in panels()]
    assert len(set(titles)) == len(titles)
    for panel in panels():
        assert panel["title"]
        assert len(panel["description"]) > 20, panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert all(target["legendFormat"] for target in panel["targets"]), panel["title"]


def test_panels_have_ids_of_their_own_and_do_not_overlap() -> None:
    everything = committed()["panels"]
    assert len({panel["id"] for panel in everything}) == len(everything)
    places = [panel["gridPos"] for panel in everything]
    assert all(place["x"] + place["w"] <= 24 for place in places)
    for one, other in combinations(places, 2):
        apart = (
            one["x"] + one["w"] <= other["x"]
            or other["x"] + other["w"] <= one["x"]
            or one["y"] + one["h"] <= other["y"]
            or other["y"] + other["h"] <= one["y"]
        )
        assert apart, (one, other)


def test_every_metric_of_this_release_is_on_the_dashboard() -> None:
    text = " ".join(target["expr"] for panel in panels() for target in panel["targets"])
    assert {SERIES[series].name for series in named(text)} == set(METRICS)


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_an_expression_names_only_metrics_and_labels_that_exist(expression: str) -> None:
    names = named(expression)
    assert names
    assert names <= SERIES.keys()
    known = {label for name in names for label in SERIES[name].labels} | {"le"}
    grouped = {label.strip() for group in re.findall(r"by \(([^)]*)\)", expression) for label in group.split(",")}
    selected = set(re.findall(r"[{,]\s*(\w+)\s*(?:=~|!~|!=|=)", expression))
    assert grouped | selected <= known


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_a_counter_is_only_looked_at_as_a_rate_over_grafanas_own_interval(expression: str) -> None:
    for name in named(expression):
        ranged = re.findall(rf"(rate|increase)\({name}(?:{{[^}}]*}})?\[\$__rate_interval\]\)", expression)
        expected = 0 if SERIES[name].kind == "gauge" else len(re.findall(rf"\b{name}\b", expression))
        assert len(ranged) == expected
    assert "[" not in expression.replace("[$__rate_interval]", "")


def test_prometheus_can_read_every_expression(tmp_path: Path) -> None:
    promtool = program("prometheus", "promtool")
    expressions = [str(case.values[0]).replace("$__rate_interval", "5m") for case in EXPRESSIONS]
    rules = [{"record": f"panel:{place}", "expr": text} for place, text in enumerate(expressions)]
    file = tmp_path / "rules.yml"
    file.write_text(json.dumps({"groups": [{"name": "panels", "rules": rules}]}), encoding="utf-8")
    checked = subprocess.run(
        [str(promtool.path), "check", "rules", str(file)],
        env=promtool.environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert f"{len(rules)} rules found" in checked.stdout
