"""promtool and amtool in tests: what they say, and the cases of the alerts in promtool's form."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from alert_cases import Case, Firing
from alert_rules import FOLDER, PREFIX, Alert, alerts
from binaries import Program, program

ALERTS = alerts()
NAMED = {(alert.name, alert.window): alert for alert in ALERTS}


def run(tool: Program, *arguments: str | Path) -> str:
    """What the program said; the test fails unless it ended with 0."""
    command = [str(tool.path), *map(str, arguments)]
    done = subprocess.run(
        command, env=tool.environment, capture_output=True, text=True, timeout=120, check=False, cwd=FOLDER
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def rendered(alert: Alert, firing: Firing) -> dict[str, str]:
    """The annotations with the labels and the value at their places."""
    # Prometheus fills in the labels of the series alone, not those that the rule adds.
    given = alert.annotations["description"]
    told = re.sub(r"\{\{ \$labels\.(\w+) \}\}", lambda found: firing.labels[found[1]], given)
    told = re.sub(r"\{\{ \$value.*?\}\}", firing.value, told)
    assert "{{" not in told
    return {**alert.annotations, "description": told}


def labels(alert: Alert, firing: Firing) -> dict[str, str]:
    return {**firing.labels, **alert.labels}


def stated(case: Case) -> Iterator[tuple[str, dict[str, Any]]]:
    """promtool's tests of a case. Only where it fires, the texts are compared too: later the values are others."""
    for when, firing in case.looks.items():
        expected = [(NAMED[case.alert, one.window], one) for one in firing]
        samples = [
            {
                "labels": written({"alertname": PREFIX + case.alert, "alertstate": "firing", **labels(*one)}),
                "value": 1,
            }
            for one in expected
        ]
        query = f'ALERTS{{alertname="{PREFIX}{case.alert}", alertstate="firing"}}'
        yield "promql_expr_test", {"expr": query, "eval_time": when, "exp_samples": samples}
        if case.kind == "fires":
            told = [{"exp_labels": labels(*one), "exp_annotations": rendered(*one)} for one in expected]
            yield "alert_rule_test", {"eval_time": when, "alertname": PREFIX + case.alert, "exp_alerts": told}


def written(given: dict[str, str]) -> str:
    return "ALERTS{" + ", ".join(f'{label}="{value}"' for label, value in given.items()) + "}"


def promtools(case: Case) -> dict[str, Any]:
    """The case as promtool's file of tests has it."""
    test: dict[str, Any] = {
        "interval": f"{case.minutes}m",
        "input_series": [{"series": name, "values": values} for name, values in case.series.items()],
    }
    for kind, one in stated(case):
        test.setdefault(kind, []).append(one)
    return test


def played(rules: Path, cases: Sequence[dict[str, Any]], folder: Path, minutes: int = 1) -> str:
    """What promtool says of these cases of the rules, evaluated every so many minutes; the test fails if one does not
    hold.
    """
    file = folder / "cases.yml"
    content = {"rule_files": [str(rules)], "evaluation_interval": f"{minutes}m", "tests": list(cases)}
    file.write_text(json.dumps(content), encoding="utf-8")  # JSON is YAML
    return run(program("prometheus", "promtool"), "test", "rules", file)
