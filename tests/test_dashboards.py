"""The Grafana dashboards: equal to what the code makes, complete, and joined by links."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest
import yaml

from alert_rules import recorded
from board_files import FILES, FOLDER, board, expressions, panels
from walletmigrate.metrics import METRICS, PREFIX

SERIES = {series: metric for metric in METRICS.values() for series in metric.series}
EXPRESSIONS = [pytest.param(text, id=name) for name, text in expressions().items()]
OWN = {"ALERTS": {"alertname", "alertstate"}}
"""Prometheus' own series, and the labels of them that are looked at."""

each_board = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def named(expression: str) -> set[str]:
    return set(re.findall(rf"\b{PREFIX}\w+", expression))


def build(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(folder / "build.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_there_are_four_dashboards_and_each_is_what_the_code_makes() -> None:
    assert [path.stem for path in FILES] == ["dual-write", "jobs", "overview", "reconciliation"]
    checked = build(FOLDER, "--check")
    assert checked.returncode == 0, checked.stderr


def test_check_tells_a_dashboard_that_was_edited_left_out_or_added_by_hand(tmp_path: Path) -> None:
    folder = tmp_path / "dashboards"
    shutil.copytree(FOLDER, folder)
    overview = folder / "grafana" / "overview.json"
    overview.write_text(overview.read_text(encoding="utf-8").replace("Phase", "Fase"), encoding="utf-8")
    (folder / "grafana" / "jobs.json").unlink()
    (folder / "grafana" / "another.json").write_text("{}", encoding="utf-8")
    told = build(folder, "--check")
    assert told.returncode == 1
    assert told.stderr == (
        "not what the code makes: another.json, jobs.json, overview.json; run python dashboards/build.py\n"
    )
    assert not (folder / "grafana" / "jobs.json").exists(), "--check writes nothing"
    (folder / "grafana" / "another.json").unlink()
    assert build(folder).returncode == 0
    assert build(folder, "--check").returncode == 0


@each_board
def test_the_data_source_is_a_variable_everywhere(path: Path) -> None:
    (variable,) = board(path)["templating"]["list"]
    assert (variable["name"], variable["type"], variable["query"]) == ("datasource", "datasource", "prometheus")
    for panel in panels(path):
        for part in (panel, *panel["targets"]):
            assert part["datasource"] == {"type": "prometheus", "uid": "${datasource}"}, panel["title"]


@each_board
def test_every_panel_has_a_title_of_its_own_a_description_and_a_unit(path: Path) -> None:
    titles = [panel["title"] for panel in panels(path)]
    assert len(set(titles)) == len(titles)
    for panel in panels(path):
        assert panel["title"]
        assert len(panel["description"]) > 20, panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert all(target["legendFormat"] for target in panel["targets"]), panel["title"]


@each_board
def test_panels_have_ids_of_their_own_and_do_not_overlap(path: Path) -> None:
    everything = board(path)["panels"]
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


def test_every_dashboard_leads_to_the_others() -> None:
    boards = [board(path) for path in FILES]
    assert len({one["uid"] for one in boards}) == len({one["title"] for one in boards}) == len(boards)
    for one in boards:
        (link,) = one["links"]
        assert (link["type"], link["keepTime"], link["includeVars"]) == ("dashboards", True, True)
        assert all(set(link["tags"]) <= set(other["tags"]) for other in boards)


def test_every_metric_of_this_release_is_on_a_dashboard() -> None:
    shown = " ".join(expressions().values())
    assert {SERIES[series].name for series in named(shown)} == set(METRICS)


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_an_expression_names_only_metrics_recordings_and_labels_that_exist(expression: str) -> None:
    names = named(expression)
    own = {name for name in OWN if re.search(rf"\b{name}\b", expression)}
    rules = set(re.findall(r"\bwalletmigrate:[\w:]+", expression))
    assert names | own | rules
    assert names <= SERIES.keys()
    assert rules <= recorded()
    known = {label for name in names for label in SERIES[name].labels} | {"le"}
    known |= {label for name in own for label in OWN[name]}
    grouped = {label.strip() for group in re.findall(r"by \(([^)]*)\)", expression) for label in group.split(",")}
    selected = set(re.findall(r"[{,]\s*(\w+)\s*(?:=~|!~|!=|=)", expression))
    assert grouped | selected <= known


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_a_range_is_grafanas_own_interval_and_a_counter_is_only_looked_at_as_a_rate(expression: str) -> None:
    for name in named(expression):
        functions = "deriv" if SERIES[name].kind == "gauge" else "rate|increase"
        ranged = re.findall(rf"({functions})\({name}(?:{{[^}}]*}})?\[\$__rate_interval\]\)", expression)
        with_range = re.findall(rf"\b{name}(?:{{[^}}]*}})?\[", expression)
        counted = SERIES[name].kind != "gauge"
        assert len(ranged) == len(re.findall(rf"\b{name}\b", expression) if counted else with_range)
    assert "[" not in expression.replace("[$__rate_interval]", "")


def test_what_the_readme_installs_is_where_grafana_finds_a_prometheus_and_the_four_dashboards(tmp_path: Path) -> None:
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    (commands,) = re.findall(r"^```sh\n(install -d .*?)^```", readme, re.MULTILINE | re.DOTALL)
    provisioned = tmp_path / "etc" / "grafana" / "provisioning"
    for kind in ("dashboards", "datasources"):
        (provisioned / kind).mkdir(parents=True)  # Grafana's package brings these
    there = commands.replace(" /etc/", f" {tmp_path}/etc/")
    subprocess.run(["sh", "-eu", "-c", there], cwd=FOLDER, check=True)
    (provider,) = yaml.safe_load((provisioned / "dashboards" / "walletmigrate.yaml").read_text())["providers"]
    assert provider["type"] == "file"
    loaded = Path(f"{tmp_path}{provider['options']['path']}").glob("*.json")
    assert {path.name: path.read_bytes() for path in loaded} == {path.name: path.read_bytes() for path in FILES}
    (source,) = yaml.safe_load((provisioned / "datasources" / "prometheus.yaml").read_text())["datasources"]
    assert (source["type"], source["access"]) == ("prometheus", "proxy")
