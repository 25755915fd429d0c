"""Reports of verifications and jobs: a row for each finding and each account, in columns, and what is left out said."""

from __future__ import annotations

import csv
import re
from decimal import Decimal
from pathlib import Path

import pytest

from commandline import REASON, Project
from ledger import engine_named, execute, install_users, scalar, unguarded
from test_exports import drawn, sheet

ROWS = 120


@pytest.fixture
def project(tmp_path: Path, database_url: str) -> Project:
    install_users(database_url, rows=ROWS, phase="dual_write")
    made = Project(tmp_path, database_url)
    made.change("backfill")
    return made


def drift(project: Project, words: str = "true") -> None:
    """Move the column past the ledger, unseen."""
    with unguarded(engine_named(project.url), "users") as connection:
        connection.exec_driver_sql(f"update users set total_coins = total_coins + id * 0.01 where {words}")


def written(project: Project, of: str, kind: str) -> Path:
    path = project.folder / f"report.{kind}"
    said = project.run("report", of, "--to", str(path), "--force")
    assert said.exit_code == 0, said
    return path


def table(path: Path, title: str) -> list[dict[str, str]]:
    """The rows of one table of a CSV report, by its heads."""
    with path.open(newline="", encoding="utf-8") as file:
        lines = list(csv.reader(file))
    start = lines.index([title]) + 1
    end = next((number for number in range(start, len(lines)) if not lines[number]), len(lines))
    return [dict(zip(lines[start], line, strict=True)) for line in lines[start + 1 : end]]


def test_each_finding_is_a_row_in_columns_of_its_own(project: Project) -> None:
    drift(project, "id in (4, 5)")
    execute(engine_named(project.url), "insert into users values (999, 'acme', 'member', 7)")
    assert project.run("verify").exit_code == 3
    found = table(written(project, "verification", "csv"), "Findings")
    assert list(found[0]) == ["kind", "key", "bucket", "currency", "legacy", "ledger", "expected", "state", "problem"]
    assert [list(one.values()) for one in found] == [
        ["drift", "4", "cash", "EUR", "100.04", "100.00", "", "mirrored", "differs"],
        ["drift", "5", "cash", "EUR", "100.05", "100.00", "", "mirrored", "differs"],
        ["behind", "999", "cash", "EUR", "7.00", "", "", "absent", "missing"],
    ]
    rows = sheet(written(project, "verification", "xlsx"))
    (first,) = [row for row in rows if row.get("B") == "4"]
    assert [str(first[letter]) for letter in "EF"] == ["100.04", "100"]
    shown = project.run("verify", "show", "1").stdout
    assert "4 (cash, EUR): legacy 100.04, ledger 100.00, mirrored, differs" in shown
    assert "999 (cash): missing" in shown
    assert "are on record" not in shown


@pytest.mark.parametrize("kind", ["csv", "xlsx", "pdf", "html"])
def test_a_report_says_how_many_findings_are_not_on_record(project: Project, kind: str) -> None:
    drift(project)
    assert project.run("verify").exit_code == 3
    path = written(project, "verification", kind)
    said = f"100 of {ROWS} are on record"
    if kind == "xlsx":
        assert said in {str(cell) for row in sheet(path, 1) for cell in row.values()}
    elif kind == "pdf":
        assert said in " ".join(word for page in drawn(path) for word in page)
    else:
        assert said in path.read_text(encoding="utf-8")
    if kind == "csv":
        assert len(table(path, "Findings")) == 100
    assert said in project.run("verify", "show", "1").stdout


def states(path: Path) -> list[tuple[str, int]]:
    """What the chart of states says of the newest run."""
    chart = re.findall(
        r"<section><h2>Accounts of users by state.*?</section>", path.read_text(encoding="utf-8"), re.DOTALL
    )
    return [(name, int(count)) for name, count in re.findall(r"<title>(\w+): (\d+)</title>", chart[0])]


def test_the_chart_of_states_has_each_state_and_what_differs(project: Project) -> None:
    engine = engine_named(project.url)
    drift(project, "id in (4, 5)")
    execute(engine, "insert into users values (999, 'acme', 'member', 7)")
    execute(engine, "delete from users where id in (1, 2, 3)")
    execute(engine, "update users set total_coins = 1 where id = 6")
    execute(engine, "update wallet.accounts set state = 'frozen' where key::bigint > 80")
    project.run("verify")
    seen = {"mirrored": 74, "frozen": 40, "stale": 1, "closed": 3, "absent": 1, "drifted": 2}
    path = written(project, "overview", "html")
    assert states(path) == list(seen.items())
    execute(
        engine,
        "insert into wallet.verifications (mapping, started_at, clean, form, accounts, missing, drift_accounts, "
        "drift_amount, currency, actor, details) values "
        "('users', now(), false, 'full', 100, 5, 3, 1, 'EUR', 'tests', '{\"stale\": 7}')",
    )
    before = {"mirrored": 90, "frozen": 0, "stale": 7, "closed": 0, "absent": 5, "drifted": 3}
    assert states(written(project, "overview", "html")) == list(before.items())


def test_a_record_of_before_has_its_sentences_one_a_row(project: Project) -> None:
    drift(project, "id = 4")
    project.run("verify")
    execute(
        engine_named(project.url),
        "insert into wallet.verifications (mapping, started_at, clean, form, accounts, missing, drift_accounts, "
        "drift_amount, currency, actor, details) select mapping, started_at, clean, form, accounts, missing, 449, 1, "
        "currency, actor, jsonb_build_object('drift', (select jsonb_agg(g || ' (cash, EUR): differs') "
        "from generate_series(1, 100) as g)) from wallet.verifications",
    )
    path = written(project, "verification", "csv")
    found = table(path, "Findings")
    assert (len(found), found[0]["kind"], found[0]["problem"]) == (100, "drift", "1 (cash, EUR): differs")
    assert "the first 100 are on record" in path.read_text(encoding="utf-8")
    assert "    1 (cash, EUR): differs" in project.run("verify", "show", "2").stdout


def test_what_a_job_left_as_it_is_stands_in_a_table(project: Project) -> None:
    drift(project, "id in (4, 5)")
    project.change("install")
    assert project.run("reconcile", "--all", "--correct-up-to", "0.01", *REASON).exit_code == 3
    path = written(project, "job", "csv")
    assert table(path, "Left as they are") == [
        dict(
            zip(
                ("outcome", "key", "bucket", "currency", "legacy", "ledger", "truth", "difference", "why"),
                ("reported", str(key), "cash", "EUR", f"100.0{key}", "100.00", f"100.0{key}", f"0.0{key}", ""),
                strict=True,
            )
        )
        for key in (4, 5)
    ]
    engine = engine_named(project.url)
    aside = "insert into wallet.job_batches (job_id, number, pass, upto_key, keys, state, error, attempts) "
    execute(engine, f"{aside} select max(id), 99, 1, '7', 1, 'set_aside', 'broken', 1 from wallet.jobs")
    execute(engine, 'update wallet.jobs set details = details || \'{"error": "too many"}\'')
    path = written(project, "job", "csv")
    last = table(path, "Left as they are")[-1]
    assert (last["outcome"], last["key"], last["why"]) == ("set aside", "7", "broken")
    assert "too many" in path.read_text(encoding="utf-8")


def test_what_a_job_did_to_an_account_stands_in_columns(project: Project) -> None:
    drift(project, "id in (4, 5)")
    project.change("install")  # the fence stands again as it was made
    project.change("reconcile", "--all")
    found = table(written(project, "job", "csv"), "Audit log")
    assert list(found[0])[5:] == [
        *("key", "bucket", "currency", "legacy before", "legacy after", "ledger before", "ledger after", "difference"),
        *("transaction", "details"),
    ]
    first, last = next(one for one in found if one["key"]), found[-1]
    assert [first["action"], *list(first.values())[5:14]] == [
        *("reconcile corrected", "4", "cash", "EUR"),
        *("100.04", "100.04", "100.00", "100.04", "0.04"),
        str(scalar(engine_named(project.url), "select max(id) - 1 from wallet.transactions")),
    ]
    assert '"outcome": "corrected"' in first["details"]
    assert "legacy_before" not in first["details"]
    assert not any(list(last.values())[5:14]), "a row of no account"
    assert last["details"].startswith("{")
    rows = sheet(written(project, "job", "xlsx"))
    (cells,) = [row for row in rows if row.get("F") == "4"]
    assert [cells[letter] for letter in "IM"] == [Decimal("100.04"), Decimal("0.04")]
    for kind in ("pdf", "html"):
        written(project, "job", kind)
