"""The line in the log of each command that changes something, and its correlation id."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine

import ledger
from commandline import REASON, Project, Said, project_at
from walletmigrate.command_log import OUTCOMES

JSON = {"WALLETMIGRATE_LOG": "json"}
GIVEN = {"WALLETMIGRATE_CORRELATION_ID": "deploy-17"}


@pytest.fixture
def made(database_url: str, tmp_path: Path) -> tuple[Project, Engine]:
    return project_at(tmp_path, database_url, "dual_write")


@pytest.fixture
def project(made: tuple[Project, Engine]) -> Project:
    return made[0]


def told(said: Said) -> list[dict[str, Any]]:
    """The log's lines on stderr."""
    return [json.loads(line) for line in said.stderr.splitlines() if line.startswith("{")]


def test_a_command_that_changes_something_tells_one_event(project: Project) -> None:
    said = project.run("adjust", "--account", "1", "--amount", "5", "--json", *REASON, env=JSON)
    (event,) = told(said)
    assert event.pop("timestamp").endswith("Z")
    assert event.pop("seconds") > 0
    assert event == {
        "event": "wallet.command",
        "level": "info",
        "command": "adjust",
        "outcome": "ok",
        "exit_code": 0,
        "actor": "tests",
        "correlation_id": said.document["correlation_id"],
    }


def test_log_ledger_row_and_audit_row_of_a_command_carry_one_id(made: tuple[Project, Engine]) -> None:
    project, engine = made
    (event,) = told(
        project.run("adjust", "--mapping", "users", "--account", "1", "--amount", "5", *REASON, env=JSON | GIVEN)
    )
    assert (event["mapping"], event["correlation_id"]) == ("users", "deploy-17")
    for table in ("transactions", "audit_log"):
        found = f"select count(*) from wallet.{table} where correlation_id = 'deploy-17'"
        assert ledger.scalar(engine, found) == 1, table
    way = project.run("trace", "deploy-17", "--json").document["rows"]
    assert [row["where"] for row in way] == ["ledger", "audit"]


def test_every_audit_row_of_a_command_has_the_id_that_a_script_gave(made: tuple[Project, Engine]) -> None:
    project, engine = made
    before = ledger.scalar(engine, "select max(id) from wallet.audit_log")
    steps = ("verify", "backfill --workers 2", "stop-the-line", "resume", "flags set wallet.dualWrite off --everyone")
    for words in steps:
        said = project.run(*words.split(), *REASON, env=GIVEN)
        assert said.exit_code == 0, said
    found = "select distinct correlation_id from wallet.audit_log where id > :before"
    assert ledger.rows(engine, found, before=before) == [("deploy-17",)]


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("phase advance --reason 'too early'", 4),
        ("reconcile undo 999 --reason mistake", 2),
        ("adjust --account 1 --amount 5", 2),
        ("adjust --account nobody --amount 5 --reason gift", 2),
    ],
)
def test_one_that_fails_tells_how_it_ended(project: Project, words: str, code: int) -> None:
    said = project.run(*words.replace("'too early'", "early").split(), env=JSON)
    (event,) = told(said)
    assert (said.exit_code, event["exit_code"], event["outcome"]) == (code, code, OUTCOMES[code])
    assert event["correlation_id"]


def test_a_dry_run_says_that_it_is_one(project: Project) -> None:
    (event,) = told(project.run("backfill", "--dry-run", env=JSON))
    assert (event["dry_run"], event["outcome"]) == (True, "ok")


def test_what_only_looks_tells_nothing(project: Project) -> None:
    for words in ("status", "phase show", "history --account 1", "verify list"):
        assert told(project.run(*words.split(), env=JSON)) == []


def test_neither_balance_nor_account_nor_reason_is_in_it(project: Project) -> None:
    secret = ("--account", "7", "--amount", "31.17", "--reason", "for Ada Lovelace")
    line = next(one for one in project.run("adjust", *secret, env=JSON).stderr.splitlines() if one.startswith("{"))
    event = json.loads(line)
    assert event.keys() <= {
        *("event", "level", "timestamp", "command", "outcome", "exit_code", "actor", "correlation_id", "seconds"),
        *("mapping", "dry_run"),
    }
    assert not [one for one in ("31.17", "131.17", "Lovelace") if one in line]


def test_without_the_variable_the_output_is_as_it_was(project: Project) -> None:
    quiet = project.run("adjust", "--account", "1", "--amount", "5", "--json", *REASON)
    assert (told(quiet), quiet.stderr) == ([], "")
    asked = project.run("adjust", "--account", "1", "--amount", "5", "--json", *REASON, env=JSON)
    assert asked.document.keys() == quiet.document.keys()
    assert asked.stdout.startswith("{\n")


def test_the_script_writes_it_to_stderr(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WALLETMIGRATE_LOG", "console")
    said = project.script("stop-the-line", "--json", *REASON)
    assert (said.exit_code, said.document["command"]) == (0, "stop-the-line")
    (line,) = [one for one in said.stderr.splitlines() if "wallet.command" in one]
    assert "outcome=ok" in line
    assert "\x1b" not in line


def test_who_has_set_up_the_library_s_logger_gets_it_there(project: Project, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="walletmigrate"):
        said = project.run("stop-the-line", *REASON)
    (record,) = caplog.records
    assert (said.exit_code, json.loads(record.getMessage())["event"]) == (0, "wallet.command")
    assert told(said) == []


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("WALLETMIGRATE_LOG", "yaml"),
        ("WALLETMIGRATE_CORRELATION_ID", "two\nlines"),
        ("WALLETMIGRATE_CORRELATION_ID", "x" * 501),
    ],
)
def test_a_variable_that_is_wrong_is_said_before_anything_is_done(
    made: tuple[Project, Engine], variable: str, value: str
) -> None:
    project, engine = made
    before = ledger.scalar(engine, "select max(id) from wallet.audit_log")
    said = project.run("stop-the-line", *REASON, env={variable: value})
    assert (said.exit_code, variable in said.stderr) == (2, True)
    assert ledger.scalar(engine, "select max(id) from wallet.audit_log") == before
    assert project.run("status", env={variable: value}).exit_code == 0


def test_an_id_of_blanks_is_none(project: Project) -> None:
    said = project.run("stop-the-line", *REASON, env=JSON | {"WALLETMIGRATE_CORRELATION_ID": "  "})
    assert len(told(said)[0]["correlation_id"]) == 32


def test_the_page_has_every_event_and_every_outcome() -> None:
    root = Path(__file__).parents[1]
    page = (root / "docs" / "logs.md").read_text(encoding="utf-8")
    sources = "".join(
        (root / "src" / "walletmigrate" / f"{name}.py").read_text() for name in ("observe", "command_log")
    )
    events = set(re.findall(r'"(wallet\.[a-z_]+)"', sources))
    assert len(events) >= 9
    assert set(re.findall(r"^\| `(wallet\.[a-z_]+)`", page, re.MULTILINE)) == events
    assert all(f"`{outcome}`" in page for outcome in OUTCOMES.values())
