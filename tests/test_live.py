"""`walletmigrate status` as people read it, and `watch`, which is the same live on a terminal."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import make_url
from sqlalchemy.pool import NullPool

from commandline import Project, Said, project_at
from ledger import execute, scalar
from terminals import Screen, on_terminal
from walletmigrate import connect

INTERRUPTED = 130


@pytest.fixture
def project(database_url: str, tmp_path: Path) -> Project:
    return project_at(tmp_path, database_url, "dual_write")[0]


def run_a_job(project: Project, state: str, updated: str = "clock_timestamp()") -> None:
    engine = connect.engine(project.url, application_name="test", poolclass=NullPool)
    execute(
        engine,
        "insert into wallet.jobs (kind, mapping, state, actor, reason, version, items_total, items_done, items_failed, "
        f"started_at, updated_at) values ('backfill', 'users', '{state}', 'ana', 'a test', '1', 30000, 9990, 9, "
        f"clock_timestamp() - interval '1000 s', {updated})",
    )


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ("running", "running, 9999 of 30000 accounts, 33 %, 9 failed, 10/s, about 33 min left"),
        ("paused", "paused, 9999 of 30000 accounts, 33 %, 9 failed"),
    ],
)
def test_status_says_progress_rate_and_time_left_of_a_job_that_runs(project: Project, state: str, said: str) -> None:
    run_a_job(project, state)
    lines = project.run("status").stdout.splitlines()
    assert [line for line in lines if "backfill of users" in line] == [f"job 3: backfill of users, {said}"]
    document = project.run("status", "--json").document
    assert document["schema_version"] == 1
    (job,) = [one for one in document["jobs"] if one["kind"] == "backfill"]
    assert job["share"] == pytest.approx(0.3333)
    assert (job["eta_seconds"] is None) == (job["rate"] is None) == (state == "paused")


@contextmanager
def watching(project: Project, *words: str, rows: int = 50) -> Iterator[Screen]:
    command = ("watch", "--interval", "0.5", *words)
    with on_terminal(project, *command, streams=("stdin", "stdout"), rows=rows) as screen:
        yield screen


def test_watch_follows_what_changes_and_ends_with_130(project: Project) -> None:
    with watching(project) as screen:
        screen.until("line: runs")
        project.change("stop-the-line")
        screen.until("line: STOPPED")
        screen.until("\x1b[")  # it draws over what it showed before, rather than below it
        screen.process.send_signal(signal.SIGINT)
        assert screen.process.wait(timeout=30) == INTERRUPTED
        assert screen.process.stderr is not None
        assert screen.process.stderr.read() == ""


def test_watch_shows_the_next_command_on_a_terminal_of_twelve_lines(project: Project) -> None:
    for state in ("paused", "failed"):
        run_a_job(project, state)
    assert len(project.run("status").stdout.splitlines()) > 12
    with watching(project, rows=12) as screen:
        screen.until("phase: dual_write")
        assert "next: walletmigrate " in screen.shown


def test_watch_says_that_the_database_is_away_shows_what_it_saw_last_and_goes_on_when_it_is_back(
    project: Project,
) -> None:
    url = make_url(project.url)
    admin = connect.engine(
        url.set(database="postgres"), application_name="test", poolclass=NullPool, isolation_level="AUTOCOMMIT"
    )
    with watching(project) as screen:
        screen.until("next: ")
        with admin.connect() as connection:
            connection.exec_driver_sql(f'alter database "{url.database}" allow_connections false')
            sessions = "select pg_terminate_backend(pid) from pg_stat_activity where datname = %s"
            connection.exec_driver_sql(sessions, (url.database,))
            screen.until("NOT REACHED")
            screen.until("below is what was seen at")
            screen.until("phase: dual_write")
            assert screen.process.poll() is None
            connection.exec_driver_sql(f'alter database "{url.database}" allow_connections true')
        execute(connect.engine(url, application_name="test", poolclass=NullPool), "select wallet.set_line(false)")
        screen.until("line: STOPPED")


def refused(said: Said) -> None:
    assert (said.exit_code, "needs a terminal" in said.stderr, "walletmigrate status" in said.stderr) == (2, True, True)


def test_watch_without_a_terminal_is_refused_and_names_status(project: Project) -> None:
    refused(project.script("watch"))
    with watching(project, "--json") as screen:
        screen.until("needs a terminal")
        assert screen.process.wait(timeout=30) == 2


def test_watch_of_a_database_that_was_never_there_ends_with_5(project: Project) -> None:
    away = make_url(project.url).set(database="nowhere").render_as_string(hide_password=False)
    with watching(project, "--database-url", away) as screen:
        assert screen.process.wait(timeout=60) == 5


def test_watch_reads_only(project: Project) -> None:
    engine = connect.engine(project.url, application_name="test", poolclass=NullPool)
    before = scalar(engine, "select count(*) from wallet.audit_log")
    with watching(project) as screen:
        screen.until("next: ")
    assert scalar(engine, "select count(*) from wallet.audit_log") == before
