"""The commands of the migration's end, as an operator runs them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import ledger
from commandline import REASON, project_at
from retiring import FIRST
from walletmigrate import cli_jobs, job_control, undo


def test_the_whole_way_to_a_dropped_column_by_commands(database_url: str, tmp_path: Path) -> None:
    project, engine = project_at(tmp_path, database_url, "frozen")
    versions = tmp_path / "versions"
    versions.mkdir()
    (versions / "0001_first.py").write_text(FIRST, encoding="utf-8")
    file, folder = str(tmp_path / "users.jsonl.gz"), str(tmp_path / "evidence")
    retire = ("retire", "--archive", file, "--migrations", str(versions), "--confirm", "users")

    said = project.run(*retire, *REASON)
    assert (said.exit_code, said.stderr) == (
        2,
        f"error: there is no archive {file}: walletmigrate archive --to {file} --reason '…'\n",
    )
    said = project.run("phase", "advance", "--json", *REASON)
    assert said.exit_code == 4
    assert "walletmigrate archive --to users.jsonl.gz" in said.document["error"]["fields"]["reasons"][0]["mend"]
    project.change("verify")
    assert project.run("archive", "--to", file, "--dry-run").exit_code == 0
    assert "proven: 10 rows agree" in project.change("archive", "--to", file).stdout
    assert project.run("archive", "check", file, "--json").document["check"]["proven"]
    assert "proves no more" in project.run("archive", "check", file, "--no-database").stdout
    assert project.run("phase", "show").stdout.count("→") == 0
    assert "alembic upgrade head" in project.change(*retire).stderr
    assert project.run("status").exit_code == 0
    assert project.run("phase", "show").stdout.startswith("retired since")
    for words in (["backfill"], ["unfreeze", "--confirm", "users"], ["rollback"]):
        assert project.run(*words, *REASON).exit_code == 4, words
    with engine.begin() as connection:
        for event in ("insert", "update"):
            connection.exec_driver_sql(f"drop trigger walletmigrate_users_r_{event} on public.users")
        connection.exec_driver_sql("alter table public.users drop column total_coins")
    for words in (
        ["status"],
        ["verify"],
        ["doctor"],
        ["phase", "show"],
        ["install", *REASON],
        ["install", "--dry-run"],
    ):
        assert project.run(*words).exit_code == 0, words
    assert project.run("phase", "back", *REASON).exit_code == 4
    assert project.run("archive", "check", file).exit_code == 0
    assert project.run("evidence", "--to", folder).exit_code == 0
    assert "intact, and as the database has it" in project.run("evidence", "check", folder, "--with-database").stdout
    with engine.begin() as connection:
        assert ledger.post(connection, project.settings, "credit", 3, 5)["mode"] == "ledger"
    (tmp_path / "evidence" / "flags.json").write_text("{}")
    assert project.run("evidence", "check", folder).exit_code == 3


def test_a_backfill_is_taken_back_by_its_number(database_url: str, tmp_path: Path) -> None:
    project, engine = project_at(tmp_path, database_url, "dual_write")
    with engine.begin() as connection:
        ledger.post(connection, project.settings, "credit", 3, 5)
    assert (
        "9 openings of job 1 would be taken back, 1 left"
        in project.run("backfill", "undo", "--job", "1", "--dry-run").stdout
    )
    said = project.run("backfill", "undo", "--job", "1", *REASON)
    assert said.exit_code == 4, "one was left"
    assert "  3 (cash, EUR): later transactions stand on it" in said.stdout
    assert "stale" in said.stderr
    assert project.run("backfill", "undo", "--job", "99", *REASON).exit_code == 2
    assert project.run("backfill", "undo", "--job", "1").exit_code == 2, "no reason"
    assert "resynced 9" in project.change("backfill").stdout
    assert "Usage: walletmigrate backfill" in project.run("backfill", "--help").stdout
    assert project.run("verify").exit_code == 0


def test_an_undo_whose_job_is_cancelled_meanwhile_is_no_success(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project, engine = project_at(tmp_path, database_url, "dual_write")
    asked = iter([False, True, False])

    def cancelled() -> bool:
        if next(asked):
            newest = ledger.scalar(engine, "select max(id) from wallet.jobs")
            job_control.cancel(engine, project.settings, newest, ledger.ACT)
        return False

    def undone(*arguments: Any, **options: Any) -> undo.UndoResult:
        return undo.undo(*arguments, **{**options, "stop": cancelled})

    monkeypatch.setattr(cli_jobs, "undo_backfill", undone)
    said = project.run("backfill", "undo", "--job", "1", "--batch-size", "4", *REASON)
    assert said.exit_code == 1
    assert "4 openings of job 1 taken back, 0 left (job 3, cancelled)" in said.stdout
    assert "taken out of work elsewhere" in said.stderr
