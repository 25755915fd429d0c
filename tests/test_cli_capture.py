"""The commands of the fence, as an operator runs them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from sqlalchemy import Engine
from sqlalchemy.pool import NullPool

from commandline import REASON, Project, project_at
from ledger import execute, rows, scalar
from walletmigrate import connect

ADD = "update users set total_coins = total_coins + 5 where id = 1"


@pytest.fixture
def project(database_url: str, tmp_path: Path) -> Project:
    """A project in phase dual_write, with an account for everybody."""
    return project_at(tmp_path, database_url, "dual_write")[0]


@pytest.fixture
def engine(project: Project) -> Engine:
    """The project's database, past the adapter."""
    return connect.engine(project.url, application_name="cron", poolclass=NullPool)


def test_the_report_reads_as_a_list_of_code_paths(project: Project, engine: Engine) -> None:
    assert "no write past the adapter" in project.run("capture", "report").stdout
    execute(engine, ADD)
    said = project.run("capture", "report")
    assert said.exit_code == 0
    assert "1 × update users.total_coins" in said.stdout
    assert "update users set total_coins = total_coins + ? where id = ?" in said.stdout
    assert "1 turned stale" in said.stdout
    document = project.run("capture", "report", "--since", "1h", "--json").document
    assert [path["writes"] for path in document["paths"]] == [1]
    assert document["modes"] == {"users": "stale"}


@pytest.mark.parametrize("since", ["1", "h", "0d", "yesterday"])
def test_a_window_that_is_none_is_refused(project: Project, since: str) -> None:
    said = project.run("capture", "report", "--since", since)
    assert said.exit_code == 2
    assert "for example 7d" in said.stderr


def test_a_mode_is_set_by_command_with_a_reason_and_a_dry_run(project: Project, engine: Engine) -> None:
    assert project.run("capture", "mode", "reject").exit_code == 2  # no reason
    assert project.run("capture", "mode", "reject", "--dry-run", *REASON).exit_code == 0
    assert scalar(engine, "select capture_mode from wallet.mappings") == "stale"
    assert project.run("capture", "mode", "reject", *REASON).exit_code == 0
    assert scalar(engine, "select capture_mode from wallet.mappings") == "reject"
    assert "as before" in project.run("capture", "mode", "reject", *REASON).stdout
    said = project.run("capture", "mode", "ignore", *REASON)
    assert (said.exit_code, "stale, mirror, reject" in said.stderr) == (2, True)


def test_a_change_of_mode_is_no_step_of_the_phase(project: Project) -> None:
    """Both stand in the audit log with a from and a to."""
    before = project.run("phase", "show", "--json").document
    project.change("capture", "mode", "mirror")
    after = project.run("phase", "show", "--json").document
    assert after["reasons"] == before["reasons"]
    assert project.run("status").exit_code == 0
    project.change("rollback", "--exercise")
    project.change("phase", "advance")


def test_a_reader_that_has_gone_is_no_defect(project: Project) -> None:
    """As in `walletmigrate status | head -1`."""
    gone, end = os.pipe()
    os.close(gone)
    process = project.start("status", stdout=end)
    os.close(end)
    assert (process.communicate(timeout=60)[1], process.returncode) == ("", 1)


def test_the_fence_comes_down_and_goes_up_by_command(project: Project, engine: Engine) -> None:
    refused = project.run("capture", "remove", "--confirm", "users", *REASON)
    assert refused.exit_code == 4
    assert "phase back" in refused.stderr
    project.change("phase", "back")
    assert project.run("capture", "remove", *REASON).exit_code == 2  # not confirmed
    assert project.run("capture", "remove", "--confirm", "users", *REASON).exit_code == 0
    assert project.run("doctor").exit_code == 3
    assert project.run("capture", "install", *REASON).exit_code == 0
    assert project.run("doctor").exit_code == 0
    found = rows(engine, "select action from wallet.audit_log where action like 'capture%' order by id")
    assert found == [("capture remove",), ("capture install",)]


def test_doctor_names_what_mends_a_fault_and_what_mends_it_does(project: Project, engine: Engine) -> None:
    assert project.run("doctor").exit_code == 0
    execute(engine, "alter table users disable trigger walletmigrate_users_update")
    said = project.run("doctor")
    assert said.exit_code == 3
    assert "walletmigrate capture install" in said.stdout
    assert "runbooks/balance-drift.md" in said.stdout
    project.change("capture", "install")
    query = "select mapping from wallet.audit_log where action = 'fence mended'"
    assert rows(engine, query) == [("users",)]  # the gates want a verification that began after it
    found = project.run("doctor", "--json").document["findings"]
    assert [one["severity"] for one in found] == ["note", "note"], "no application runs here, and no exporter was named"


def test_old_lines_are_removed_by_command(project: Project, engine: Engine) -> None:
    execute(engine, ADD)
    execute(engine, "update wallet.bypasses set at = at - interval '31 days'")
    assert "1 lines would be removed" in project.run("capture", "prune", "--dry-run", *REASON).stdout
    assert "1 lines removed" in project.run("capture", "prune", *REASON).stdout
    assert scalar(engine, "select count(*) from wallet.bypasses") == 0


@pytest.mark.parametrize("words", [("capture", "report"), ("capture", "install", *REASON), ("doctor",)])
def test_without_a_ledger_the_commands_say_so(database_url: str, tmp_path: Path, words: tuple[str, ...]) -> None:
    said = Project(tmp_path, database_url).run(*words)
    assert said.exit_code == 4
    assert "walletmigrate install" in said.stderr
