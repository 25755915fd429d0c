"""The rules for another objective: made from the committed ones, and proved by promtool to fire by it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from alert_cases import WINDOWS, burns
from alert_rules import FOLDER, RULES
from binaries import program
from promtool import played, promtools, run

FALLS_BEHIND = {
    # objective: (postings that succeed, that fail, their share, the windows that fire)
    "99.5": [(920, 80, "8%", WINDOWS), (980, 20, "2%", ("1d", "3d")), (996, 4, "0.4%", ())],
    "99.9": [(980, 20, "2%", WINDOWS), (995, 5, "0.5%", ("1d", "3d")), (9995, 5, "0.05%", ())],
    "99.99": [(998, 2, "0.2%", WINDOWS), (1999, 1, "0.05%", ("1d", "3d")), (49999, 4, "0.008%", ())],
}


def rendered(*words: str, folder: Path = FOLDER) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(folder / "rules.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def made(*words: str) -> str:
    done = rendered(*words)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_without_an_option_the_rules_are_the_committed_ones() -> None:
    assert made() == RULES.read_text(encoding="utf-8")
    assert made("--objective", "99.9", "--minimum", "100") == RULES.read_text(encoding="utf-8")


@pytest.mark.parametrize("objective", FALLS_BEHIND)
def test_alerts_made_for_an_objective_fire_by_it(objective: str, tmp_path: Path) -> None:
    rules = tmp_path / "walletmigrate.rules.yml"
    rules.write_text(made("--objective", objective), encoding="utf-8")
    assert "SUCCESS" in run(program("prometheus", "promtool"), "check", "rules", "--lint-fatal", rules)
    cases = [promtools(burns("1h", *case)) for case in FALLS_BEHIND[objective]]
    assert "SUCCESS" in played(rules, cases, tmp_path)


def test_an_objective_changes_nothing_but_itself() -> None:
    before, after = (text.splitlines() for text in (made(), made("--objective", "99.95 %", "--minimum", "20")))
    changed = [(old.strip(), new.strip()) for old, new in zip(before, after, strict=True) if old != new]
    assert changed == [("expr: vector(0.999)", "expr: vector(0.9995)"), ("expr: vector(100)", "expr: vector(20)")]


def test_every_alert_leads_to_the_runbooks_at_the_given_place() -> None:
    groups = yaml.safe_load(made("--runbooks", "https://wiki.example.com/runbooks/"))["groups"]
    urls = {rule["annotations"]["runbook_url"] for group in groups for rule in group["rules"] if "alert" in rule}
    names = {url.removeprefix("https://wiki.example.com/runbooks/") for url in urls}
    assert names == {path.name for path in (FOLDER.parent / "runbooks").glob("*.md")} & names
    assert len(names) == 13


@pytest.mark.parametrize(
    "words",
    [
        *(("--objective", objective) for objective in ("100", "93", "0.999", "99,9", "NaN", "")),
        *(("--minimum", minimum) for minimum in ("-1", "many", "1.5")),
        ("--runbooks", "wiki"),
    ],
)
def test_a_value_that_cannot_be_meant_is_refused_with_one_that_can(words: tuple[str, str]) -> None:
    done = rendered(f"{words[0]}={words[1]}")
    assert (done.returncode, done.stdout) == (2, "")
    assert f"argument {words[0]}: {words[1]!r}: write " in done.stderr


def test_rules_that_were_edited_by_hand_are_not_changed_unseen(tmp_path: Path) -> None:
    folder = tmp_path / "dashboards"
    shutil.copytree(FOLDER, folder)
    edited = folder / "alerts" / RULES.name
    edited.write_text(edited.read_text(encoding="utf-8").replace("vector(0.999)", "vector(0.99)"), encoding="utf-8")
    done = rendered("--objective", "99.95", folder=folder)
    assert (done.returncode, done.stdout) == (1, "")
    assert "does not record objective as 0.999" in done.stderr
