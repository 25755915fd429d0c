"""The undo of a backfill is a job as the others: held, paced, shown, cut off, killed and gone on with."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import Connection, Row

import ledger
from adapting import Place, place
from commandline import Project
from ledger import ACT, rows, scalar
from walletmigrate import job_batches, job_control, job_rows, job_turns, jobs, throttle
from walletmigrate.backfill import backfill
from walletmigrate.config import ThrottleSettings
from walletmigrate.errors import PreconditionRefused
from walletmigrate.facts import read_facts
from walletmigrate.undo import KIND, _Undoing, undo

ACCOUNTS = 12
ANSWERS: list[Any] = []


@pytest.fixture
def made(database_url: str) -> Place:
    at = place(database_url, rows=ACCOUNTS)
    backfill(at.engine, at.settings, at.mapping, ACT)
    return at


def backfilled(made: Place) -> int:
    return int(scalar(made.engine, "select max(id) from wallet.jobs where kind = 'backfill'"))


def standing(made: Place) -> tuple[Any, ...]:
    """The newest undo: state, accounts gone through, of how many, why it stands still."""
    query = "select state, items_done, items_total, held from wallet.jobs where kind = :kind order by id desc limit 1"
    (found,) = rows(made.engine, query, kind=KIND)
    return found


def reversed_once(made: Place) -> None:
    """Each opening has one reversal, and no account is left over."""
    found = "select count(*), count(distinct reverses) from wallet.transactions where kind = 'reversal'"
    assert rows(made.engine, found) == [(ACCOUNTS, ACCOUNTS)]
    assert rows(made.engine, "select distinct state::text, balance from wallet.accounts") == [("stale", 0)]
    made.check()


def quiet() -> Any:
    """What a throttle of the user's is asked; its answers in order, the last one for good."""
    answer = ANSWERS.pop(0) if len(ANSWERS) > 1 else ANSWERS[0]
    return answer() if callable(answer) else answer


def test_a_backfill_that_is_not_done_is_given_up_as_its_cursor_is_behind_what_is_taken_back(database_url: str) -> None:
    at = place(database_url, rows=ACCOUNTS)
    parts = iter([False])
    part = backfill(at.engine, at.settings, at.mapping, ACT, batch_size=5, stop=lambda: next(parts, True))
    assert (part.state, part.opened) == ("paused", 5)
    assert part.job_id is not None
    assert undo(at.engine, at.settings, part.job_id, ACT, dry_run=True).undone == 5
    assert scalar(at.engine, "select state from wallet.jobs") == "paused"
    assert undo(at.engine, at.settings, part.job_id, ACT).undone == 5
    assert scalar(at.engine, "select count(*) from wallet.audit_log where action = 'backfill cancel'") == 1
    with pytest.raises(PreconditionRefused, match="is cancelled"):
        job_control.resumable(at.engine, at.settings, part.job_id)
    whole = backfill(at.engine, at.settings, at.mapping, ACT)
    assert (whole.opened, whole.resynced, whole.resumed) == (ACCOUNTS - 5, 5, False)
    assert rows(at.engine, "select distinct state::text from wallet.accounts") == [("mirrored",)]
    assert undo(at.engine, at.settings, part.job_id, ACT).undone == 0
    assert scalar(at.engine, "select count(*) from wallet.audit_log where action = 'backfill cancel'") == 1


def test_a_backfill_that_is_resumed_while_its_undo_begins_is_not_given_up(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = place(database_url, rows=ACCOUNTS)
    part = backfill(at.engine, at.settings, at.mapping, ACT, batch_size=5, stop=lambda: True)
    assert part.job_id is not None
    rest = job_batches.rest

    def resumed(*arguments: Any) -> None:
        rest(*arguments)
        ledger.execute(at.engine, "update wallet.jobs set state = 'running' where kind = 'backfill'")

    monkeypatch.setattr(job_batches, "rest", resumed)
    with pytest.raises(PreconditionRefused, match="is running"):
        undo(at.engine, at.settings, part.job_id, ACT)
    assert rows(at.engine, "select kind, state from wallet.jobs") == [("backfill", "running")]


def test_an_undo_that_is_refused_gives_no_backfill_up(database_url: str) -> None:
    at = place(database_url, rows=ACCOUNTS)
    first = backfill(at.engine, at.settings, at.mapping, ACT)
    second = backfill(at.engine, at.settings, at.mapping, ACT, stop=lambda: True)
    assert first.job_id is not None
    assert second.job_id is not None
    assert undo(at.engine, at.settings, first.job_id, ACT, stop=lambda: True).state == "paused"
    with pytest.raises(PreconditionRefused, match="the undo of backfill"):
        undo(at.engine, at.settings, second.job_id, ACT)
    assert scalar(at.engine, "select state from wallet.jobs where id = :id", id=second.job_id) == "paused"


def test_another_rate_holds_while_a_turn_waits_for_its_own(made: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    job, slept = backfilled(made), list[float]()

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 3:
            undoing = int(scalar(made.engine, "select max(id) from wallet.jobs"))
            with jobs.begin(made.engine) as connection:
                job_rows.configure(connection, made.settings, undoing, {"rate": None})

    begun: list[int] = []

    def slowly(now: jobs.Job) -> None:
        begun.append(now.items_done)
        if len(begun) == 1:
            with jobs.begin(made.engine) as connection:
                job_rows.configure(connection, made.settings, now.id, {"rate": 0.01})

    monkeypatch.setattr(job_turns, "time", SimpleNamespace(sleep=sleep, monotonic=time.monotonic))
    assert undo(made.engine, made.settings, job, ACT, batch_size=4, progress=slowly).state == "done"
    assert begun[:2] == [4, 5], "under the rate one at once"
    assert len(slept) == 3
    assert max(slept) <= 0.25


def test_a_throttle_holds_it_with_a_reason_and_lets_it_go_on(made: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throttle, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(job_turns, "_HELD", 0.0)
    seen: list[Any] = []

    def look() -> bool:
        seen.append(standing(made))
        with made.engine.connect() as connection:
            seen.append(read_facts(connection, "wallet").jobs[KIND, "users"])
        return True

    ANSWERS[:] = [True, "month's end", look, True]
    held = made.settings.model_copy(update={"throttle": ThrottleSettings(check="python:test_undo_job:quiet")})
    done = undo(made.engine, held, backfilled(made), ACT, batch_size=5)
    shown, fact = seen
    assert shown == ("running", 5, ACCOUNTS, "python:test_undo_job:quiet: month's end")
    assert (fact.items, fact.remaining, fact.paused) == (5, ACCOUNTS - 5, 1)
    assert (done.state, done.undone) == ("done", ACCOUNTS)
    assert standing(made) == ("done", ACCOUNTS, ACCOUNTS, None)
    reversed_once(made)


def test_a_rate_and_a_batch_size_hold_from_the_next_turn_on(made: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    told: list[int] = []
    monkeypatch.setattr("walletmigrate.job_turns.time.sleep", slept.append)

    def set_then(job: jobs.Job) -> None:
        if not told:
            job_control.configure(made.engine, made.settings, job.id, {"batch_size": 100, "rate": 40.0}, ACT)
        told.append(job.items_done)

    undo(made.engine, made.settings, backfilled(made), ACT, batch_size=2, progress=set_then)
    assert told == [2, 6, 10, 12]
    assert slept == [0.1, 0.1, 0.05]
    reversed_once(made)


def cut_off(monkeypatch: pytest.MonkeyPatch, turns: list[Callable[[Connection], None] | None]) -> None:
    """Let the turns end, after they have written, as the list says; None: as they do."""
    honest = _Undoing._note

    def note(self: _Undoing, connection: Connection, job: jobs.Job, found: list[Row[Any]]) -> None:
        honest(self, connection, job, found)
        act = turns.pop(0) if turns else None
        if act is not None:
            act(connection)

    monkeypatch.setattr(_Undoing, "_note", note)


def test_a_turn_that_loses_its_connection_is_taken_again_from_where_it_stood(
    made: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ended(connection: Connection) -> None:
        connection.exec_driver_sql("select pg_terminate_backend(pg_backend_pid())")

    cut_off(monkeypatch, [None, ended, None, ended])
    done = undo(made.engine, made.settings, backfilled(made), ACT, batch_size=4)
    assert (done.state, done.undone, done.undone_before) == ("done", ACCOUNTS, 0)
    reversed_once(made)


def test_one_that_failed_goes_on_behind_its_last_account_and_knows_what_it_left(
    made: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    with made.engine.begin() as connection:
        made.adapter.credit(connection, 1, 5, type="deposit")
        made.adapter.credit(connection, ACCOUNTS, 5, type="deposit")

    def failed(connection: Connection) -> None:
        connection.exec_driver_sql("select from nowhere")

    cut_off(monkeypatch, [None, failed])
    job = backfilled(made)
    with pytest.raises(Exception, match="nowhere"):
        undo(made.engine, made.settings, job, ACT, batch_size=4)
    assert standing(made)[:2] == ("failed", 4)
    looked: list[int] = []
    honest = _Undoing._next

    def following(self: _Undoing, connection: Connection, number: int | None, after: int, size: int) -> Any:
        looked.append(after)
        return honest(self, connection, number, after, size)

    monkeypatch.setattr(_Undoing, "_next", following)
    done = undo(made.engine, made.settings, job, ACT, batch_size=4)
    fourth = scalar(made.engine, "select id from wallet.accounts order by id offset 3 limit 1")
    assert looked[0] == fourth
    assert (done.state, done.undone, done.left_count) == ("done", ACCOUNTS - 2, 2)
    assert [one.key for one in done.left] == ["1", str(ACCOUNTS)]
    assert standing(made) == ("done", ACCOUNTS, ACCOUNTS, None)


def test_a_step_to_retired_meanwhile_ends_it_before_another_account_is_touched(made: Place) -> None:
    def retire(_: jobs.Job) -> None:
        ledger.set_phase(made.engine, "retired")

    with pytest.raises(PreconditionRefused, match="the phase is retired"):
        undo(made.engine, made.settings, backfilled(made), ACT, batch_size=4, progress=retire)
    assert standing(made)[:2] == ("failed", 4)
    assert scalar(made.engine, "select count(*) from wallet.accounts where state = 'stale'") == 4


def test_one_whose_fence_fell_meanwhile_is_not_called_done(made: Place) -> None:
    def drop(_: jobs.Job) -> None:
        ledger.execute(made.engine, "drop trigger if exists walletmigrate_users_update on public.users")

    with pytest.raises(PreconditionRefused, match=r"walletmigrate_users_update.*is missing"):
        undo(made.engine, made.settings, backfilled(made), ACT, progress=drop)
    assert standing(made)[0] == "failed"


def test_a_process_that_is_killed_costs_nothing_but_time(made: Place, tmp_path: Path) -> None:
    """Killed while its third turn waits for an account that another session has locked."""
    url = made.settings.database_url
    assert url is not None
    project = Project(tmp_path, url.get_secret_value())
    job = str(backfilled(made))
    with made.engine.connect() as holder:
        holder.exec_driver_sql("select from wallet.accounts where key = '3' for update")
        by = holder.exec_driver_sql("select pg_backend_pid()").scalar_one()
        process = project.start("backfill", "undo", "--job", job, "--batch-size", "1", "--reason", "a test")
        try:
            while not scalar(
                made.engine, f"select count(*) from pg_stat_activity where {by} = any(pg_blocking_pids(pid))"
            ):
                assert process.poll() is None, process.communicate()
        finally:
            process.kill()
            process.communicate()
    assert standing(made)[:3] == ("running", 2, ACCOUNTS)
    number = scalar(made.engine, "select max(id) from wallet.jobs")
    shown = project.run("jobs", "show", str(number))
    assert f"2 of {ACCOUNTS} accounts" in shown.stdout
    said = project.run("jobs", "resume", str(number), "--reason", "a test")
    assert (said.exit_code, f"walletmigrate backfill undo --job {job}" in said.stderr) == (2, True)
    done = project.run("backfill", "undo", "--job", job, "--reason", "a test")
    assert done.exit_code == 0, done
    assert standing(made) == ("done", ACCOUNTS, ACCOUNTS, None)
    assert scalar(made.engine, "select max(id) from wallet.jobs") == number
    reversed_once(made)


@pytest.mark.parametrize(
    ("turns", "undone", "said"),
    [
        (2, 10, f"2 of these {ACCOUNTS} accounts are stale: walletmigrate backfill --reason"),
        (3, ACCOUNTS, f"of the {ACCOUNTS} accounts that were taken back none is stale: a backfill has brought them up"),
    ],
)
def test_it_says_how_many_are_stale_still_where_a_backfill_came_between_its_parts(
    made: Place, tmp_path: Path, turns: int, undone: int, said: str
) -> None:
    url = made.settings.database_url
    assert url is not None
    project, job = Project(tmp_path, url.get_secret_value()), backfilled(made)
    parts = iter([False] * turns)
    paused = undo(made.engine, made.settings, job, ACT, batch_size=5, stop=lambda: next(parts, True))
    assert (paused.state, paused.undone, paused.stale) == ("paused", undone, undone)
    backfill(made.engine, made.settings, made.mapping, ACT)
    done = project.run("backfill", "undo", "--job", str(job), "--reason", "a test")
    assert (done.exit_code, said in done.stderr) == (0, True), done
