"""Jobs: checkpoints, resumption, retries and interruption, on a real ledger with steps made for the test."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, text

import ledger
from walletmigrate import job_outages, jobs
from walletmigrate.audit import Act
from walletmigrate.config import Settings
from walletmigrate.errors import JobFailed, LedgerNotInstalled, PreconditionRefused, Retryable

KIND = "backfill"
KEYS = 10
Ledger = tuple[Engine, Settings]


@pytest.fixture
def made(database_url: str) -> Ledger:
    engine, settings = ledger.install_users(database_url, rows=KEYS)
    ledger.execute(engine, "create table public.seen (key bigint primary key)")
    return engine, settings


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tries again at once: how long a job pauses between attempts is not what these tests are about."""
    monkeypatch.setattr(job_outages, "_LONGEST_PAUSE", 0.001)


def step(connection: Connection, after: str | None, upto: str | None) -> jobs.Batch:
    """Note the keys of the span; a key that is noted twice is an error of the primary key."""
    found = connection.execute(
        text("insert into public.seen select id from public.users where id > :after and id <= :upto"),
        {"after": int(after or 0), "upto": int(upto or KEYS)},
    )
    return jobs.Batch(found.rowcount, found.rowcount, 0, {"noted": found.rowcount})


def start(made: Ledger, act: Act = ledger.ACT, **options: Any) -> jobs.Job:
    return jobs.start_or_resume(*made, KIND, "users", act, **options)


def run(made: Ledger, job: jobs.Job, work: jobs.Step = step, size: int = 3, **options: Any) -> jobs.Job:
    return jobs.run_batches(*made, job, work, batch_size=size, **options)


def finish(made: Ledger, job: jobs.Job) -> jobs.Job:
    engine, settings = made
    return jobs.finish(engine, settings, settings.mapping(), job, ledger.ACT)


def stored(made: Ledger, job: jobs.Job) -> jobs.Job:
    engine, settings = made
    with engine.connect() as connection:
        return jobs.get(connection, settings, job.id)


def seen(made: Ledger) -> list[int]:
    return [key for (key,) in ledger.rows(made[0], "select key from public.seen order by key")]


def actions(made: Ledger) -> list[str]:
    return [row[0] for row in ledger.rows(made[0], "select action from wallet.audit_log order by id")][1:]


def failing(times: int, failure: Callable[[Connection], None]) -> jobs.Step:
    """The step above, whose first ``times`` attempts end in ``failure`` after they have written."""
    left = iter(range(times))

    def work(connection: Connection, after: str | None, upto: str | None) -> jobs.Batch:
        batch = step(connection, after, upto)
        if next(left, None) is not None:
            failure(connection)
        return batch

    return work


def raises(sqlstate: str, message: str = "made for the test") -> Callable[[Connection], None]:
    def failure(connection: Connection) -> None:
        statement = f"do $$ begin raise exception '{message}' using errcode = '{sqlstate}'; end $$"
        connection.exec_driver_sql(statement)

    return failure


def test_a_job_runs_to_its_end_and_counts_what_it_did(made: Ledger) -> None:
    told: list[jobs.Job] = []
    job = run(made, start(made, total=KEYS), progress=told.append)
    done = finish(made, job)
    assert seen(made) == list(range(1, KEYS + 1))
    assert [one.cursor for one in told] == ["3", "6", "9", "10"]
    assert (done.state, done.items_done, done.items_total, done.counts) == ("done", 10, 10, {"noted": 10})
    assert done.finished_at is not None
    assert done.last_batch_seconds is not None
    assert done.last_batch_seconds > 0
    assert actions(made) == ["backfill start", "backfill done"]


def test_finishing_twice_changes_nothing_and_leaves_one_audit_row(made: Ledger) -> None:
    job = finish(made, run(made, start(made)))
    assert finish(made, job) == stored(made, job)
    assert actions(made).count("backfill done") == 1


def test_a_batch_that_fails_leaves_nothing_of_itself(made: Ledger) -> None:
    def work(connection: Connection, after: str | None, upto: str | None) -> jobs.Batch:
        batch = step(connection, after, upto)
        if after == "6":
            raise PreconditionRefused("the job", [("it is Sunday", "wait")])
        return batch

    job = start(made)
    with pytest.raises(PreconditionRefused, match="it is Sunday"):
        run(made, job, work)
    assert seen(made) == [1, 2, 3, 4, 5, 6]
    left = stored(made, job)
    assert (left.state, left.items_done) == ("failed", 6)
    assert "it is Sunday" in left.details["error"]

    again = start(made)
    assert (again.id, again.resumed, again.state) == (job.id, True, "running")
    assert "error" not in again.details
    done = finish(made, run(made, again))
    assert seen(made) == list(range(1, KEYS + 1))
    assert (done.items_done, done.counts) == (KEYS, {"noted": KEYS})
    assert actions(made) == ["backfill start", "backfill failed", "backfill resume", "backfill done"]


def test_a_process_that_died_leaves_a_running_job_and_the_next_one_resumes_it(made: Ledger) -> None:
    job = start(made)
    calls = iter(range(2))
    run(made, job, stop=lambda: next(calls, None) is None)
    # What a killed process leaves behind.
    ledger.execute(made[0], "update wallet.jobs set state = 'running'")
    again = start(made, Act("another", "to go on"))
    assert (again.id, again.cursor, again.resumed) == (job.id, "6", True)
    assert (again.actor, again.reason) == ("another", "to go on")
    run(made, again)
    assert seen(made) == list(range(1, KEYS + 1))


@pytest.mark.parametrize("state", ["done", "cancelled"])
def test_an_ended_job_is_not_resumed(made: Ledger, state: str) -> None:
    job = run(made, start(made))
    if state == "done":
        finish(made, job)
    else:
        with made[0].begin() as connection:
            assert jobs.cancel(connection, made[1], KIND, "users", ledger.ACT) == job.id
    again = start(made)
    assert again.id != job.id
    assert (again.cursor, again.resumed, again.items_done) == (None, False, 0)


def test_jobs_of_another_kind_or_mapping_are_left_alone(made: Ledger) -> None:
    job = start(made)
    other = jobs.start_or_resume(*made, "freeze", "users", ledger.ACT)
    third = jobs.start_or_resume(*made, KIND, "shops", ledger.ACT)
    assert len({job.id, other.id, third.id}) == 3
    assert not other.resumed
    assert not third.resumed


def test_stop_pauses_the_job_at_its_checkpoint(made: Ledger) -> None:
    answers = iter([False, True])
    job = run(made, start(made), stop=lambda: next(answers))
    assert (job.state, job.cursor) == ("paused", "3")
    assert seen(made) == [1, 2, 3]
    again = start(made)
    assert (again.id, again.state) == (job.id, "running")
    finish(made, run(made, again))
    assert seen(made) == list(range(1, KEYS + 1))
    assert actions(made) == ["backfill start", "backfill pause", "backfill resume", "backfill done"]


def test_ctrl_c_inside_a_batch_pauses_the_job_and_reaches_the_caller(made: Ledger) -> None:
    job = start(made)
    with pytest.raises(KeyboardInterrupt):
        run(made, job, failing(1, lambda _: signal.raise_signal(signal.SIGINT)))
    left = stored(made, job)
    assert (left.state, left.items_done, left.details) == ("paused", 0, {})
    assert seen(made) == []
    finish(made, run(made, start(made)))
    assert seen(made) == list(range(1, KEYS + 1))


@pytest.mark.parametrize("sqlstate", ["40001", "40P01", "55P03"])
def test_a_conflict_is_tried_again_from_the_start_of_the_batch(made: Ledger, quick: None, sqlstate: str) -> None:
    job = run(made, start(made), failing(jobs.ATTEMPTS - 1, raises(sqlstate)))
    assert (job.state, job.items_done) == ("running", KEYS)
    assert seen(made) == list(range(1, KEYS + 1))


def test_a_batch_survives_the_loss_of_its_connection(made: Ledger, quick: None) -> None:
    def cut(connection: Connection) -> None:
        connection.exec_driver_sql("select pg_terminate_backend(pg_backend_pid())")

    job = run(made, start(made), failing(2, cut))
    assert job.items_done == KEYS
    assert seen(made) == list(range(1, KEYS + 1))


def test_a_batch_that_waits_too_long_for_a_lock_is_tried_again(made: Ledger, quick: None) -> None:
    engine, _ = made
    ledger.execute(engine, "create table public.door (n int)")
    attempts: list[str | None] = []
    with engine.connect() as holder:
        holder.exec_driver_sql("lock table public.door")

        def work(connection: Connection, after: str | None, upto: str | None) -> jobs.Batch:
            if len(attempts) == 2:
                holder.rollback()
            attempts.append(after)
            connection.exec_driver_sql("set local lock_timeout = '20ms'")
            connection.exec_driver_sql("select from public.door")
            return step(connection, after, upto)

        run(made, start(made), work)
    assert attempts == [None, None, None, "3", "6", "9"]
    assert seen(made) == list(range(1, KEYS + 1))


def test_attempts_are_bounded_and_the_job_can_be_resumed_afterwards(made: Ledger, quick: None) -> None:
    tried = []

    def failure(connection: Connection) -> None:
        tried.append(1)
        raises("40001")(connection)

    job = start(made)
    with pytest.raises(Retryable, match=f"failed {jobs.ATTEMPTS} times.*40001.*run the same command again"):
        run(made, job, failing(1000, failure))
    assert len(tried) == jobs.ATTEMPTS
    assert seen(made) == []
    assert stored(made, job).state == "failed"
    assert start(made).id == job.id


@pytest.mark.parametrize(("sqlstate", "error"), [("42501", JobFailed), ("42883", LedgerNotInstalled)])
def test_what_no_other_row_would_mend_is_a_typed_error_without_the_statement(
    made: Ledger, sqlstate: str, error: type[Exception]
) -> None:
    job = start(made)
    with pytest.raises(error, match="made for the test") as caught:
        run(made, job, failing(1, raises(sqlstate)))
    assert "raise exception" not in str(caught.value)
    assert "made for the test" in stored(made, job).details["error"]
    finish(made, run(made, start(made)))
    assert seen(made) == list(range(1, KEYS + 1))


def test_two_processes_on_one_job_do_each_key_once(made: Ledger) -> None:
    job = start(made)
    barrier = threading.Barrier(2, timeout=30)

    def together(_: int) -> jobs.Job:
        barrier.wait()
        return run(made, job, size=1)

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(together, range(2)))
    assert max(one.items_done for one in results) == KEYS
    assert seen(made) == list(range(1, KEYS + 1))
    assert [finish(made, one).state for one in results] == ["done", "done"]
    assert actions(made).count("backfill done") == 1


def test_two_that_start_at_once_get_the_same_job(made: Ledger) -> None:
    barrier = threading.Barrier(8, timeout=30)

    def together(_: int) -> int:
        barrier.wait()
        return start(made).id

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(together, range(8)))) == 1
    assert ledger.scalar(made[0], "select count(*) from wallet.jobs") == 1


def test_a_cancelled_job_stops_before_its_next_batch(made: Ledger) -> None:
    engine, settings = made

    def cancel(_: jobs.Job) -> None:
        with engine.begin() as connection:
            jobs.cancel(connection, settings, KIND, "users", ledger.ACT)

    job = run(made, start(made), progress=cancel)
    assert job.state == "cancelled"
    assert seen(made) == [1, 2, 3]
    assert finish(made, job).state == "cancelled"


@pytest.mark.parametrize("level", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
def test_a_batch_reads_committed_whatever_the_engine_is_set_to(database_url: str, level: Any) -> None:
    _, settings = ledger.install_users(database_url, rows=1)
    engine = ledger.engine_named(database_url, "walletmigrate-test", isolation_level=level)
    levels: list[Any] = []

    def work(connection: Connection, after: str | None, upto: str | None) -> jobs.Batch:
        levels.append(connection.exec_driver_sql("show transaction_isolation").scalar())
        return jobs.Batch(0, 0, 0, {})

    job = jobs.start_or_resume(engine, settings, KIND, "users", ledger.ACT)
    jobs.run_batches(engine, settings, job, work, batch_size=1)
    assert levels == ["read committed"]


def test_a_job_whose_fence_fell_meanwhile_is_not_called_done(made: Ledger) -> None:
    engine, _ = made
    job = run(made, start(made))
    ledger.execute(engine, "drop trigger walletmigrate_users_update on public.users")
    with pytest.raises(PreconditionRefused, match=r"walletmigrate_users_update.*is missing"):
        finish(made, job)
    assert stored(made, job).state == "failed"
    assert "is missing" in stored(made, job).details["error"]
