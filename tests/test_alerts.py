"""The alerts: well formed, with a runbook each, and proved by promtool to fire, to stay silent and to resolve."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from alert_cases import CASES, UNSEEN, WINDOWS
from alert_rules import FOLDER, PREFIX, ROOT, RULES, RUNBOOKS, Alert, recorded, rules
from binaries import program
from promtool import ALERTS, NAMED, played, promtools, run
from walletmigrate import facts, observe
from walletmigrate.metrics import METRICS

SEVERITIES = {"critical": "pager", "warning": "chat", "info": "inbox"}
EXPECTED = {
    "LedgerImbalance",
    "BalanceDrift",
    "DualWriteErrorBudgetBurn",
    "ReadMismatch",
    "BypassWrites",
    "VerificationStale",
    "BackfillStalled",
    "JobFailed",
    "LedgerLatencyHigh",
    "FlagsStale",
    "FlagDisagreement",
    "LineStopped",
    "ExporterDown",
}


def named(alert: Alert) -> str:
    return f"{alert.name}-{alert.window}" if alert.window else alert.name


def test_the_alerts_are_those_of_the_contract() -> None:
    assert {alert.name for alert in ALERTS} == EXPECTED
    assert all(rule["alert"].startswith(PREFIX) for rule in rules() if "alert" in rule)
    assert len(NAMED) == len(ALERTS), "only windows share a name"
    windows = {"DualWriteErrorBudgetBurn": set(WINDOWS), "ExporterDown": set(UNSEEN)}
    for name in EXPECTED:
        assert {alert.window for alert in ALERTS if alert.name == name} == windows.get(name, {None}), name


@pytest.mark.parametrize("alert", ALERTS, ids=named)
def test_an_alert_says_what_it_means_how_bad_it_is_and_where_its_runbook_is(alert: Alert) -> None:
    assert re.fullmatch(r"([A-Z][a-z]+)+", alert.name)
    assert alert.severity in SEVERITIES
    assert set(alert.annotations) == {"summary", "description", "runbook_url"}
    assert 15 < len(alert.annotations["summary"]) < 80
    assert "{{" not in alert.annotations["summary"], "it groups notifications, so it is the same for all of them"
    assert len(alert.annotations["description"]) > 80
    assert re.search(r"\b[Uu]sers\b", alert.annotations["description"]), "it says what users feel"
    assert alert.annotations["runbook_url"] == RUNBOOKS + alert.runbook


@pytest.mark.parametrize("runbook", sorted({alert.runbook for alert in ALERTS}))
def test_the_file_behind_a_runbooks_url_exists_and_names_its_alert(runbook: str) -> None:
    text = (ROOT / "runbooks" / runbook).read_text(encoding="utf-8")
    (name,) = {alert.name for alert in ALERTS if alert.runbook == runbook}
    assert f"`{PREFIX}{name}`" in text


def test_rules_name_only_metrics_and_recordings_that_exist() -> None:
    series = {name for metric in METRICS.values() for name in metric.series} | recorded()
    for rule in rules():
        names = set(re.findall(r"\bwalletmigrate[_:][\w:]+", rule["expr"]))
        assert names <= series, rule


def test_prometheus_can_read_the_rules_and_the_example_configurations() -> None:
    promtool = program("prometheus", "promtool")
    assert f"{len(rules())} rules found" in run(promtool, "check", "rules", "--lint-fatal", RULES)
    for file in ("prometheus.yml", "rehearsal.yml"):
        assert "1 rule files found" in run(promtool, "check", "config", file)


@pytest.mark.parametrize("alert", ALERTS, ids=named)
def test_every_alert_has_a_case_of_firing_of_silence_and_of_resolving(alert: Alert) -> None:
    mine = [case for case in CASES if (case.alert, case.window) == (alert.name, alert.window)]
    assert {case.kind for case in mine} == {"fires", "silent", "resolves"}
    for case in mine:
        firing = [any(one.window == alert.window for one in look) for look in case.looks.values()]
        expected = {"fires": [True], "silent": [False] * len(firing), "resolves": [True, False]}[case.kind]
        assert [on for on, before in zip(firing, [None, *firing], strict=False) if on != before] == [
            on for on, before in zip(expected, [None, *expected], strict=False) if on != before
        ], case


@pytest.mark.parametrize("minutes", sorted({case.minutes for case in CASES}))
def test_promtool_sees_each_alert_fire_stay_silent_and_resolve(minutes: int, tmp_path: Path) -> None:
    texts = [json.dumps(promtools(case)) for case in CASES if case.minutes == minutes]
    cases = [json.loads(text) for text in dict.fromkeys(texts)]  # the windows of an alert share some
    assert "SUCCESS" in played(RULES, cases, tmp_path, minutes)


def test_promtool_tells_a_case_that_does_not_hold(tmp_path: Path) -> None:
    wrong = promtools(next(case for case in CASES if case.kind == "fires"))
    wrong["input_series"][0]["values"] = "0x20"
    with pytest.raises(AssertionError, match="FAILED"):
        played(RULES, [wrong], tmp_path)


def test_alertmanager_can_read_the_example_routes() -> None:
    amtool = program("prometheus-alertmanager", "amtool")
    assert "SUCCESS" in run(amtool, "check-config", "alertmanager.yml")


def test_every_receiver_of_the_example_is_told_that_an_alert_is_over() -> None:
    receivers = yaml.safe_load((FOLDER / "alertmanager.yml").read_text(encoding="utf-8"))["receivers"]
    assert {one["name"]: [hook["send_resolved"] for hook in one["webhook_configs"]] for one in receivers} == {
        name: [True] for name in SEVERITIES.values()
    }


@pytest.mark.parametrize("alert", ALERTS, ids=named)
def test_an_alert_goes_to_the_receiver_of_its_severity(alert: Alert) -> None:
    amtool = program("prometheus-alertmanager", "amtool")
    given = [f"{label}={value}" for label, value in alert.labels.items()]
    route = ["config", "routes", "test", "--config.file=alertmanager.yml"]
    told = run(amtool, *route, f"alertname={PREFIX}{alert.name}", *given)
    assert told.strip() == SEVERITIES[alert.severity]


def table(heading: str) -> list[list[str]]:
    """The cells of all tables of a chapter of docs/metrics.md, without their heads."""
    text = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    chapter = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in chapter.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_the_page_of_metrics_has_each_of_them_as_it_is() -> None:
    told = [row for row in table("Metrics") if row[0].startswith("`walletmigrate_")]
    assert told == [
        [
            f"`{metric.full_name}`",
            metric.kind,
            ", ".join(f"`{label}`" for label in metric.labels) or "–",
            metric.served_by,
            metric.help,
        ]
        for metric in METRICS.values()
    ]


def test_the_page_of_metrics_has_the_values_of_every_label() -> None:
    given = [row for row in table("Metrics") if not row[0].startswith("`walletmigrate_") and row[0] != "metric"]
    told = {row[0]: re.findall(r"`([^`]+)`", row[1]) for row in given if row[0] != "label"}
    assert told == {
        "`operation`": list(observe.OPERATIONS),
        "`outcome` of dual-writes": list(observe.OUTCOMES),
        "`outcome` of compared reads": list(observe.COMPARES),
        "`outcome` of watched writes": list(observe.WATCHED),
        "`mode`": list(observe.MODES),
        "`source`": list(observe.SOURCES),
        "`where`": [*observe.PLACES, observe.VERIFIED],
        "`flag`": list(observe.FLAGS),
        "`phase`": list(facts.PHASES),
        "`state`": list(facts.STATES),
        "`kind`": [*facts.JOB_KINDS, *facts.WHOLE_KINDS],
        "`mapping`": ["(all)"],
        "`treatment`": list(facts.TREATMENTS),
        "`currency`": [],
    }


def test_the_page_of_alerts_has_each_of_them_with_its_severity_and_its_runbook() -> None:
    told = [(row[0], row[1], row[3]) for row in table("Alerts") if row[0].startswith(f"`{PREFIX}")]
    assert told == [
        (
            f"`{PREFIX}{alert.name}`" + (f" ({alert.window})" if alert.window else ""),
            alert.severity,
            f"[{alert.runbook.removesuffix('.md')}](../runbooks/{alert.runbook})",
        )
        for alert in ALERTS
    ]
    series = [row[0].strip("`") for row in table("Alerts") if row[0].startswith("`walletmigrate:")]
    assert set(series) == recorded()
    assert len(series) == len(recorded())
