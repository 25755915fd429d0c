"""The commands snapshot, history, balance, overview and report: words, exit codes and files."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from adapting import placed
from commandline import REASON, Project
from ledger import engine_named, execute, install_users, unguarded
from walletmigrate.rehearsal_report import judge


@pytest.fixture
def project(tmp_path: Path, database_url: str) -> Project:
    engine, settings = install_users(database_url, rows=4, phase="dual_write")
    adapter = placed(engine, settings).adapter
    with engine.begin() as connection:
        for key in (1, 2, 3):
            adapter.open_account(connection, key)
        for number in range(5):
            adapter.credit(connection, 1, 1, type="deposit", actor="=cmd()", reference=("order", number))
    return Project(tmp_path, database_url)


def test_snapshots_from_take_to_prune(project: Project) -> None:
    assert project.run("snapshot", "take").exit_code == 2
    assert project.run("snapshot", "verify").exit_code == 2
    assert "would begin" in project.run("snapshot", "take", "--dry-run").stdout
    taken = project.run("snapshot", "take", *REASON, "--json").document
    assert (taken["snapshot"]["state"], taken["snapshot"]["accounts"]) == ("complete", 3)
    assert taken["totals"][0]["balance"] == "305.00"
    project.change("snapshot", "take", "--batch-size", "2")
    assert "clean" in project.run("snapshot", "verify", "1").stdout
    assert [one["id"] for one in project.run("snapshot", "list", "--json").document["snapshots"]] == [2, 1]
    assert project.run("snapshot", "prune", "--keep", "0", *REASON).exit_code == 2
    assert project.run("snapshot", "prune", "--keep", "1", *REASON, "--json").document["pruned"] == [1]
    engine = engine_named(project.url)
    execute(engine, "update wallet.snapshot_balances set balance = 7 where account_id = 1")
    wrong = project.run("snapshot", "verify")
    assert wrong.exit_code == 3
    assert "differs" in wrong.stdout
    assert project.run("balance", "--account", "1").exit_code == 3
    assert "NOT CLEAN" in project.run("snapshot", "list").stdout


def test_an_edit_of_the_journal_is_told_by_its_ids_and_window_and_so_is_what_cannot_be_checked(
    project: Project,
) -> None:
    project.change("snapshot", "take")
    engine = engine_named(project.url)
    with unguarded(engine, "wallet.transactions") as connection:
        connection.exec_driver_sql("update wallet.transactions set actor = 'nobody' where id = 5")
    found = project.run("snapshot", "verify")
    assert found.exit_code == 3
    assert (
        "edited: transactions 0 to 9999 of snapshot 1 are not the rows that were folded: 8 now, 8 then" in found.stdout
    )
    assert "no checksum" not in found.stderr
    execute(engine, "delete from wallet.snapshot_checksums")
    blind = project.run("snapshot", "verify")
    assert blind.exit_code == 0
    assert "8 transactions have no checksum, edits of these would not be seen: docs/history.md" in blind.stderr


def test_history_in_pages_and_as_a_file(project: Project, tmp_path: Path) -> None:
    page = project.run("history", "--account", "1", "--type", "deposit", "--limit", "2", "--json").document
    assert [one["amount"] for one in page["entries"]] == ["1.00", "1.00"]
    behind = project.run("history", "--account", "1", "--after", str(page["after"]), "--limit", "2").stdout
    assert "order 2" in behind
    assert "order 3" not in behind
    assert "page 3 of 3" in project.run("history", "--account", "1", "--limit", "2", "--page", "3").stdout
    file = tmp_path / "history.csv"
    assert project.run("history", "--account", "1", "--kind", "posting", "--export", str(file)).exit_code == 0
    with file.open(newline="", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    assert (rows[0]["amount"], rows[0]["actor"], rows[0]["reference"]) == ("1.00", "'=cmd()", "order 4")
    assert len(rows) == 5
    for kind in ("xlsx", "pdf"):
        assert project.run("history", "--account", "1", "--export", str(tmp_path / f"h.{kind}")).exit_code == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("history --account 404", "no account '404'"),
        ("history --account 1 --page 9", "there is no page 9"),
        ("history --account 1 --kind posted", "no kind 'posted'"),
        ("history --account 1 --from 2026-01-01", "no time zone"),
        ("history --account 1 --from soon", "cannot be read"),
        ("history --account 1 --bucket gold", "no bucket 'gold'"),
        ("history --account 1 --mapping shops", "no mapping 'shops'"),
        ("history --account 1 --export x.html", ".html is no type to write"),
        ("history --account 1 --export walletmigrate.csv --page 1", "leave --page and --after out"),
        ("balance --account 1 --at 2999-01-01T00:00Z", "in the future"),
        ("balance --account 4", "no account '4'"),
        ("report job:99 --to x.csv", "no job 99"),
        ("report verification --to x.csv", "no verification at all"),
        ("report snapshot:3 --to x.pdf", "no snapshot 3"),
        ("report thing:3 --to x.pdf", "write snapshot:3"),
        ("report overview --to x.doc", ".doc is no type"),
        ("report missing.json --to x.csv", "cannot be read"),
        ("report walletmigrate.json --to x.csv", "not a rehearsal's report"),
    ],
)
def test_bad_input_is_told_with_exit_code_2_and_writes_nothing(
    project: Project, words: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project.folder)
    (project.folder / "walletmigrate.json").write_text("[1]", encoding="utf-8")
    before = sorted(project.folder.iterdir())
    answer = project.run(*words.split())
    assert (answer.exit_code, said in answer.stderr) == (2, True), answer
    assert sorted(project.folder.iterdir()) == before


def test_balance_and_overview_say_what_is_there(project: Project) -> None:
    now = project.run("balance", "--account", "1", "--json").document
    assert (now["balance"], now["proven"]) == ("105.00", None)
    before = project.run("balance", "--account", "1", "--at", "2020-01-01T00:00+01:00")
    assert "not open yet" in before.stdout
    seen = project.run("overview", "--json").document
    assert (seen["sound"], seen["buckets"][0]["opening"], seen["buckets"][0]["unmirrored"]) == (
        True,
        "300.00",
        "100.00",
    )
    said = project.run("overview").stdout
    assert (
        "discrepancy 0.00\n  unmirrored 100.00: legacy − ledger, what is absent, stale or drifted\n  came from" in said
    )
    assert "past the adapter" not in said
    execute(engine_named(project.url), "update users set total_coins = total_coins + 5 where id = 2")
    project.change("backfill")
    said = project.run("overview").stdout
    assert "unmirrored" not in said
    assert "resync 5.00, posting 5.00, correction 0, reversal 0\n  of this past the adapter: 5.00\n" in said
    assert project.run("overview", "--json").document["buckets"][0]["bypass"] == "5.00"
    execute(engine_named(project.url), "update wallet.accounts set balance = balance + 1 where key = '1'")
    assert project.run("overview").exit_code == 3


@pytest.mark.parametrize("kind", ["csv", "xlsx", "pdf", "html"])
def test_every_run_has_its_report_in_every_type(project: Project, tmp_path: Path, kind: str) -> None:
    assert project.run("verify").exit_code == 3
    project.change("backfill")
    project.change("snapshot", "take")
    report = judge(
        transactions=1, applied=1, mismatches=0, balances=(), stages=(), postgres_version="18", errors=()
    ).to_json()
    made = json.loads(report) | {"stages": [{"name": "dual write", "transactions": 5, "per_second": 12.5}]}
    (tmp_path / "report.json").write_text(json.dumps(made), encoding="utf-8")
    for of in ("verification", "job:1", "1", "snapshot:1", "overview", str(tmp_path / "report.json")):
        path = tmp_path / f"made.{kind}"
        said = project.run("report", of, "--to", str(path), "--force")
        assert said.exit_code == 0, said
        assert path.stat().st_size > 100
    words = (tmp_path / "made.html").read_text(encoding="utf-8") if kind == "html" else "dual write"
    assert "dual write" in words


def test_the_page_of_a_run_has_states_over_time_and_drift_by_tenant(project: Project, tmp_path: Path) -> None:
    project.run("verify")
    project.change("backfill")
    execute(engine_named(project.url), "update users set total_coins = total_coins + 5 where id = 2")
    project.run("verify")
    path = tmp_path / "page.html"
    assert project.run("report", "verification", "--to", str(path)).exit_code == 0
    words = path.read_text(encoding="utf-8")
    assert "Accounts of users by state" in words
    assert "Drift by tenant now" in words
    assert "globex: 5.00" in words
    assert "acme: 0.00" in words
    assert "absent: 0" in words
    assert "stale: 1" in words
