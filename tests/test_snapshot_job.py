"""Taking a snapshot is a job: paused, cancelled, held, paced, killed and gone on with; each transaction folded once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import Connection

from adapting import Place, place
from commandline import REASON, Project
from ledger import ACT, execute, rows, scalar
from test_snapshots import credit, ends_after, proof, take
from walletmigrate import job_control, job_outages, job_turns, snapshots, throttle
from walletmigrate.config import ThrottleSettings
from walletmigrate.errors import PreconditionRefused, Retryable
from walletmigrate.job_rows import Batch
from walletmigrate.snapshots import Snapshot

POSTINGS = 12
ANSWERS: list[Any] = []


@pytest.fixture
def at(database_url: str) -> Place:
    made = place(database_url, rows=6)
    for key in range(1, 7):
        credit(made, key, key)
    return made


def quiet() -> Any:
    """What a throttle of the user's is asked; its answers in order, the last one for good."""
    answer = ANSWERS.pop(0) if len(ANSWERS) > 1 else ANSWERS[0]
    return answer() if callable(answer) else answer


def jobs(at: Place) -> list[tuple[Any, ...]]:
    return rows(
        at.engine, "select id, state, items_done, held from wallet.jobs where kind = 'snapshot take' order by id"
    )


def whole(at: Place, made: Snapshot) -> None:
    """The snapshot is complete, and has each transaction up to its point once."""
    assert made.state == "complete"
    assert made.transactions == scalar(at.engine, "select count(*) from wallet.transactions") - 1
    assert proof(at, made).clean


def stopped_by(at: Place, act: Any) -> Any:
    """A progress that lets an operator act after the second batch, from a session of his own."""
    calls: Iterator[int] = iter(range(1, 99))

    def told(_: int) -> None:
        if next(calls) == 2:
            act(at.engine, at.settings, jobs(at)[-1][0], ACT)

    return told


@pytest.mark.parametrize("ended", ["paused", "cancelled"])
def test_an_operator_ends_it_before_the_next_batch_and_the_next_call_goes_on_with_the_point(
    at: Place, ended: str
) -> None:
    act = job_control.pause if ended == "paused" else job_control.cancel
    begun = take(at, batch_size=2, progress=stopped_by(at, act))
    assert begun.state == "running"
    ((number, state, done, _),) = jobs(at)
    assert (state, done) == (ended, 4)
    credit(at, 1, 100)  # after the point: outside
    made = take(at, batch_size=2)
    assert (made.id, made.resumed) == (begun.id, True)
    whole(at, made)
    assert [(one[0] == number, one[1]) for one in jobs(at)] == (
        [(True, "done")] if ended == "paused" else [(True, "cancelled"), (False, "done")]
    )


@pytest.mark.parametrize(("act", "code"), [(job_control.pause, 130), (job_control.cancel, 1)])
def test_its_command_says_whether_it_was_paused_or_taken_out_of_work(
    at: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Any, act: Any, code: int
) -> None:
    honest = snapshots.take

    def cut(*place: Any, **options: Any) -> Any:
        return honest(*place, **{**options, "batch_size": 2, "progress": stopped_by(at, act)})

    monkeypatch.setattr(snapshots, "take", cut)
    project = Project(tmp_path, at.engine.url.render_as_string(hide_password=False))
    said = project.run("snapshot", "take", *REASON)
    assert said.exit_code == code
    assert ("taken out of work elsewhere" in said.stderr) == (code == 1)


def test_one_that_was_begun_long_ago_is_finished_and_one_of_other_functions_is_given_up_first(at: Place) -> None:
    begun = take(at, batch_size=2, stop=ends_after(2))
    credit(at, 1, 100)  # after the point: outside
    ((number, state, *_),) = jobs(at)
    assert state == "paused"
    execute(at.engine, "update wallet.jobs set functions_version = 0, updated_at = now() - interval '30 days'")
    with pytest.raises(PreconditionRefused, match=f"job {number} was begun with functions 0") as refused:
        take(at)
    assert [f"walletmigrate jobs cancel {number} " in mend for _, mend in refused.value.reasons] == [True]
    assert [one[:2] for one in jobs(at)] == [(number, "paused")]
    job_control.cancel(at.engine, at.settings, number, ACT)
    beyond = take(at, batch_size=2, stop=ends_after(2))
    assert (beyond.id, [one[1] for one in jobs(at)]) == (begun.id, ["cancelled", "paused"])
    execute(at.engine, "update wallet.jobs set updated_at = now() - interval '30 days'")
    made = take(at)
    assert (made.id, [one[1] for one in jobs(at)]) == (begun.id, ["cancelled", "done"])
    whole(at, made)


def test_a_throttle_holds_it_with_a_reason_and_lets_it_go_on(at: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throttle, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(job_turns, "_HELD", 0.0)
    seen: list[Any] = []

    def look() -> bool:
        seen.append(jobs(at)[-1])
        return True

    ANSWERS[:] = [True, "month's end", look, True]
    held = at.settings.model_copy(update={"throttle": ThrottleSettings(check="python:test_snapshot_job:quiet")})
    made = snapshots.take(at.engine, held, ACT, batch_size=2)
    assert made is not None
    assert made.state == "complete"
    ((_, state, done, why),) = seen
    assert (state, done) == ("running", 2)
    assert why == "python:test_snapshot_job:quiet: month's end"
    assert jobs(at)[-1][3] is None


def test_a_rate_and_a_batch_size_hold_from_the_next_batch_on(at: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = take(at, batch_size=1, stop=ends_after(1))
    assert begun.state == "running"
    ((number, *_),) = jobs(at)
    job_control.configure(at.engine, at.settings, number, {"batch_size": 100, "rate": 40.0}, ACT)
    slept: list[float] = []
    monkeypatch.setattr("walletmigrate.job_turns.time.sleep", slept.append)
    counted: list[int] = []
    take(at, progress=counted.append)
    sizes = [b - a for a, b in zip([0, *counted], counted, strict=False)]
    assert max(sizes) == 4
    assert slept == [size / 40 for size in sizes]


def test_a_turn_that_is_cut_off_is_taken_again_and_nothing_is_folded_twice(
    at: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, cut = snapshots._fold, iter([True, False, True])

    def fold(connection: Connection, *arguments: Any) -> Batch:
        done = honest(connection, *arguments)
        if next(cut, False):
            connection.exec_driver_sql("select pg_terminate_backend(pg_backend_pid())")
        return done

    monkeypatch.setattr(snapshots, "_fold", fold)
    made = take(at, batch_size=5)
    assert made.transactions == scalar(at.engine, "select count(*) from wallet.transactions")
    assert proof(at, made).clean
    assert [one[1:3] for one in jobs(at)] == [("done", made.transactions)]


def test_a_turn_that_keeps_failing_fails_the_job_and_the_next_call_goes_on(
    at: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_outages, "_FIRST_PAUSE", 0.0)
    honest = snapshots._fold

    def fold(connection: Connection, *_: Any) -> int:
        connection.exec_driver_sql("do $$ begin raise serialization_failure; end $$")
        raise AssertionError("unreachable")

    monkeypatch.setattr(snapshots, "_fold", fold)
    with pytest.raises(Retryable, match="failed 8 times"):
        take(at)
    ((number, state, done, _),) = jobs(at)
    assert (state, done) == ("failed", 0)
    monkeypatch.setattr(snapshots, "_fold", honest)
    made = take(at)
    assert made.resumed
    assert proof(at, made).clean
    assert [one[:2] for one in jobs(at)] == [(number, "done")]


def test_a_process_that_is_killed_costs_nothing_but_time(database_url: str, tmp_path: Any) -> None:
    at = place(database_url, rows=300)
    execute(at.engine, "select * from wallet.backfill_users(null, null, 1)")
    project = Project(tmp_path, database_url)
    process = project.start("snapshot", "take", "--batch-size", "1", "--reason", "a test")
    try:
        while not (jobs(at) and jobs(at)[-1][2] >= 3):
            assert process.poll() is None, process.communicate()
    finally:
        process.kill()
        process.communicate()
    begun = jobs(at)
    assert begun[-1][1] == "running"
    assert begun[-1][2] < 300
    said = project.run("jobs", "resume", str(begun[-1][0]), "--reason", "a test")
    assert said.exit_code == 2
    assert "walletmigrate snapshot take" in said.stderr
    made = take(at)
    assert made.resumed
    assert made.transactions == 300
    assert proof(at, made).clean
    assert [one[:3] for one in jobs(at)] == [(begun[-1][0], "done", 300)]
