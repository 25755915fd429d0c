"""A database that is away in the midst of a job: waited for as long as that lasts, by one worker and by many.

A real server is stopped and started again. How long that takes is counted in tries, and no test sleeps.
"""

from __future__ import annotations

import itertools
import logging
import pkgutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
from sqlalchemy import Connection, Engine

import ledger
from ledger import ACT, execute, install_users, rows, scalar
from outages import Flaky, flaky
from servers import Postgres
from test_job_workers import assert_whole
from walletmigrate import connect, job_outages, job_work, job_workers, jobs, snapshots
from walletmigrate.backfill import BackfillResult, backfill
from walletmigrate.config import Settings
from walletmigrate.errors import DatabaseUnreachable, LedgerNotInstalled, Retryable
from walletmigrate.job_outages import ATTEMPTS, REFUSALS, Patience
from walletmigrate.reconcile import reconcile
from walletmigrate.undo import undo

Ledger = tuple[Engine, Settings]
ROWS = 60
LONG = 5 * ATTEMPTS
"""Tries in vain: many times as many as any batch has."""


@pytest.fixture(scope="module")
def down(server: Postgres) -> Iterator[Flaky]:
    with flaky(server) as made:
        yield made


@pytest.fixture
def made(down: Flaky, numbers: Iterator[int]) -> Ledger:
    return install_users(down.create(f"shop{next(numbers)}"), rows=ROWS, coins="100 + g", phase="dual_write")


@pytest.fixture(scope="module")
def numbers() -> Iterator[int]:
    return itertools.count()


@pytest.fixture(autouse=True)
def awake(monkeypatch: pytest.MonkeyPatch) -> None:
    """No try waits; what a wait is for, `resting` says."""
    monkeypatch.setattr(job_outages, "_FIRST_PAUSE", 0.0)


def resting(monkeypatch: pytest.MonkeyPatch, act: Callable[[int], None]) -> list[str]:
    """Call ``act`` with the number of the wait instead of each wait of an outage; who has waited, in order."""
    waited: list[str] = []

    def rest(self: Patience, _: float) -> None:
        waited.append(self.who)
        act(len(waited))

    monkeypatch.setattr(Patience, "_rest", rest)
    return waited


def back_after(down: Flaky, times: int) -> Callable[[int], None]:
    return lambda number: down.start() if number == times else None


def stopping(down: Flaky, at: int = 1) -> jobs.Progress:
    """Stop the server once, when so many accounts are done."""
    stopped: list[int] = []

    def told(job: jobs.Job) -> None:
        if job.items_done >= at and not stopped:
            stopped.append(job.items_done)
            down.stop()

    return told


def stopping_amid_threads(down: Flaky, monkeypatch: pytest.MonkeyPatch) -> jobs.Progress:
    """As `stopping`; until then no thread that is led begins a second batch: it could be the last before its leader
    looks.
    """
    stopped, stops = threading.Event(), stopping(down)
    plainly = job_work.Work._claim

    def claim(self: job_work.Work, job: jobs.Job) -> Any:
        if job.items_done and threading.current_thread() is not threading.main_thread():
            assert stopped.wait(60)
        return plainly(self, job)

    def told(job: jobs.Job) -> None:
        stops(job)
        if job.items_done:
            stopped.set()

    monkeypatch.setattr(job_work.Work, "_claim", claim)
    return told


def run(made: Ledger, **options: Any) -> BackfillResult:
    engine, settings = made
    return backfill(engine, settings, settings.mapping(), ACT, **{"batch_size": 5, **options})


@pytest.mark.parametrize("at", [1, ROWS], ids=["between batches", "when no key is left"])
def test_a_backfill_outlasts_an_outage_of_any_length_and_says_so_once(
    made: Ledger, down: Flaky, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, at: int
) -> None:
    waited = resting(monkeypatch, back_after(down, LONG))
    with caplog.at_level(logging.WARNING, "walletmigrate"):
        result = run(made, progress=stopping(down, at))
    assert (result.state, result.opened, result.resumed) == ("done", ROWS, False)
    assert len(waited) == LONG
    said = [one.getMessage() for one in caplog.records if one.name == "walletmigrate"]
    assert len(said) == 2
    assert said[0].startswith("job 1 (backfill) waits for the database, for 0 s so far: connection ")
    assert said[1].startswith("job 1 (backfill) goes on after ")
    assert_whole(made, ROWS)


def test_an_outage_that_goes_on_is_told_again_and_again(
    made: Ledger, down: Flaky, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(job_outages, "TOLD_SECONDS", 0.0)
    resting(monkeypatch, back_after(down, 3))
    run(made, progress=stopping(down))
    assert [one.getMessage().split()[3] for one in caplog.records if one.name == "walletmigrate"] == [
        *["waits"] * 3,
        "goes",
    ]


def test_pauses_grow_to_ten_seconds_and_no_further(made: Ledger, down: Flaky, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_outages, "_FIRST_PAUSE", 0.05)
    monkeypatch.setattr("walletmigrate.job_outages.time.sleep", lambda _: None)
    pauses: list[float] = []

    def rest(_: Patience, seconds: float) -> None:
        pauses.append(seconds)
        back_after(down, 20)(len(pauses))

    monkeypatch.setattr(Patience, "_rest", rest)
    run(made, progress=stopping(down))
    assert pauses[0] <= 0.1
    assert all(5 <= one <= 10 for one in pauses[10:])


def test_a_server_that_stops_in_the_midst_of_a_batch_costs_that_batch_alone(
    made: Ledger, down: Flaky, monkeypatch: pytest.MonkeyPatch
) -> None:
    resting(monkeypatch, back_after(down, LONG))
    engine, settings = made
    execute(engine, "create table public.seen (key bigint primary key)")
    first: list[int] = []

    def step(connection: Connection, after: str | None, upto: str | None) -> jobs.Batch:
        span = f"id > {after or 0} and id <= {upto}"
        found = connection.exec_driver_sql(f"insert into public.seen select id from users where {span}").rowcount
        if after is not None and not first:
            first.append(int(after))
            down.stop()
        return jobs.Batch(found, found, 0, {})

    job = jobs.start_or_resume(engine, settings, "backfill", "users", ACT)
    assert jobs.run_batches(engine, settings, job, step, batch_size=20).items_done == ROWS
    assert scalar(engine, "select count(*) from public.seen") == ROWS
    assert rows(engine, "select attempts from wallet.job_batches order by number") == [(1,), (2,), (1,)]


def test_workers_and_the_process_that_leads_them_outlast_it_alike(
    made: Ledger, down: Flaky, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`job_workers.work` is what runs in the processes of ``--workers``, in Dask's and in these threads."""
    lock, threads = threading.Lock(), {"led": 0, "leads": 0}

    def rest(self: Patience, _: float) -> None:
        with lock:
            main = threading.current_thread() is threading.main_thread()
            threads["leads" if main else "led"] += 1
            if min(threads.values()) >= LONG:
                down.start()

    monkeypatch.setattr(Patience, "_rest", rest)
    with ThreadPoolExecutor(2) as pool:
        result = run(made, executor=pool, workers=2, progress=stopping_amid_threads(down, monkeypatch))
    assert (result.state, result.opened) == ("done", ROWS)
    assert min(threads.values()) >= LONG
    assert_whole(made, ROWS)


def test_two_processes_outlast_it(made: Ledger, down: Flaky, monkeypatch: pytest.MonkeyPatch) -> None:
    waited = resting(monkeypatch, back_after(down, LONG))
    result = run(made, workers=2, progress=stopping(down))
    assert (result.state, result.opened) == ("done", ROWS)
    assert len(waited) >= LONG
    assert_whole(made, ROWS)


def test_a_job_of_turns_outlasts_it(made: Ledger, down: Flaky, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, settings = made
    job = run(made).job_id
    assert job is not None
    waited = resting(monkeypatch, back_after(down, LONG))
    done = undo(engine, settings, job, ACT, batch_size=7, progress=stopping(down, 14))
    assert (done.state, done.undone, len(waited)) == ("done", ROWS, LONG)
    assert scalar(engine, "select count(distinct reverses) from wallet.transactions where kind = 'reversal'") == ROWS


def test_who_stops_a_job_meanwhile_need_not_wait_for_the_database(
    made: Ledger, down: Flaky, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = threading.Event()
    resting(monkeypatch, lambda number: asked.set() if number == 3 else None)
    with pytest.raises(DatabaseUnreachable, match=r"job 1 \(backfill\) was stopped, and the same command goes on"):
        run(made, progress=stopping(down), stop=asked.is_set)
    down.start()
    assert scalar(made[0], "select state from wallet.jobs") == "running"
    assert (run(made).opened, scalar(made[0], "select count(*) from wallet.jobs")) == (ROWS, 1)
    assert_whole(made, ROWS)


@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_ends_the_waiting_at_once(
    made: Ledger, down: Flaky, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    def interrupted(number: int) -> None:
        if threading.current_thread() is threading.main_thread() and number > 3:
            raise KeyboardInterrupt

    resting(monkeypatch, interrupted)
    stops = stopping_amid_threads(down, monkeypatch)
    with ThreadPoolExecutor(2) as pool, pytest.raises(KeyboardInterrupt):
        run(made, progress=stops, workers=workers, executor=pool if workers > 1 else None)
    down.start()
    assert run(made).opened == ROWS
    assert_whole(made, ROWS)


def test_a_server_that_takes_no_writes_for_now_is_waited_for_as_one_that_is_away(
    made: Ledger, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As a standby that is to be promoted, or a disk that is full."""
    engine, _ = made
    name = engine.url.database
    admin = connect.engine(engine.url.set(database="postgres"), application_name="x", isolation_level="AUTOCOMMIT")

    def writable(yes: bool) -> None:
        with admin.connect() as connection:
            connection.exec_driver_sql(f"alter database {name} set default_transaction_read_only = {not yes}")

    def told(job: jobs.Job) -> None:
        if job.items_done == 5:
            writable(False)

    waited = resting(monkeypatch, lambda number: writable(True) if number == LONG else None)
    result = run(made, progress=told)
    admin.dispose()
    assert (result.state, result.opened, result.failed, len(waited)) == ("done", ROWS, 0, LONG)
    assert "it takes no writes (it is a standby, or was set read-only)" in caplog.text
    assert scalar(engine, "select count(*) from wallet.job_batches where state = 'set_aside'") == 0


@pytest.mark.parametrize("what", ["database", "role"])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_server_that_lets_nobody_in_is_no_outage_and_ends_the_job_with_its_words(
    made: Ledger, monkeypatch: pytest.MonkeyPatch, what: str, workers: int
) -> None:
    """As after another password, or with too many connections, which the driver does not tell apart."""
    engine, settings = made
    name = engine.url.database
    admin = connect.engine(engine.url.set(database="postgres"), application_name="x", isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.exec_driver_sql(f"create role {name} superuser login")
        change = {
            "database": (
                f"alter database {name} rename to {name}_gone",
                f"alter database {name}_gone rename to {name}",
            ),
            "role": (f"alter role {name} nologin", f"alter role {name} login"),
        }[what]
        theirs = ledger.engine_named(engine.url.set(username=name).render_as_string(hide_password=False))
        waited = resting(monkeypatch, lambda _: None)
        monkeypatch.setattr("walletmigrate.job_outages.time.sleep", lambda _: None)
        changed: list[int] = []

        def told(job: jobs.Job) -> None:
            if not changed:
                changed.append(job.id)
                connection.exec_driver_sql(
                    f"select pg_terminate_backend(pid) from pg_stat_activity where datname = '{name}'"
                )
                connection.exec_driver_sql(change[0])

        words = {"database": "does not exist", "role": "is not permitted to log in"}[what]
        with (
            ThreadPoolExecutor(2) as pool,
            pytest.raises(Retryable, match=rf"failed {REFUSALS} times, last by: .*{words}"),
        ):
            run((theirs, settings), progress=told, workers=workers, executor=pool if workers > 1 else None)
        connection.exec_driver_sql(change[1])
        assert waited == []
    admin.dispose()
    assert run(made).opened == ROWS
    assert_whole(made, ROWS)


def test_whom_the_server_refuses_does_not_try_on_when_nobody_waits(made: Ledger) -> None:
    """As a worker whose five seconds are over, or a job that its operator stops."""
    nowhere = made[0].url.set(database="nowhere").render_as_string(hide_password=False)
    engine, tried = ledger.engine_named(nowhere), [0]

    def call() -> None:
        tried[0] += 1
        engine.connect()

    with pytest.raises(DatabaseUnreachable, match='"nowhere" does not exist; it was stopped'):
        Patience(engine, "it", lambda: True).persist(call)
    assert tried == [1]


def test_what_no_waiting_mends_ends_the_job_although_the_connection_was_lost_before(
    made: Ledger, down: Flaky, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, _ = made

    def back_without_functions(number: int) -> None:
        if number == 3:
            down.start()
            execute(engine, "drop function wallet.cut_users")

    resting(monkeypatch, back_without_functions)
    with pytest.raises(LedgerNotInstalled, match="cut_users"):
        run(made, progress=stopping(down))
    assert scalar(engine, "select state from wallet.jobs") == "failed"


def test_a_batch_that_ends_its_own_session_each_time_is_not_tried_for_ever(
    made: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, settings = made
    tried: list[str | None] = []

    def step(connection: Connection, after: str | None, _: str | None) -> jobs.Batch:
        tried.append(after)
        connection.exec_driver_sql("select pg_terminate_backend(pg_backend_pid())")
        raise AssertionError("unreachable")

    job = jobs.start_or_resume(engine, settings, "backfill", "users", ACT)
    with pytest.raises(Retryable, match=f"failed {ATTEMPTS} times"):
        jobs.run_batches(engine, settings, job, step, batch_size=20)
    assert len(tried) == ATTEMPTS


def test_workers_that_reach_no_database_while_their_leader_does_end_the_job_with_the_reason(
    made: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As machines of a cluster in another network. In an outage each comes back so too, but then its leader waits."""
    engine, _ = made
    nowhere = engine.url.update_query_dict({"host": "/nowhere"})
    unreached = ledger.engine_named(nowhere.render_as_string(hide_password=False))
    asked: list[int] = []

    def lost(*_: Any, **__: Any) -> Engine:
        asked.append(1)
        return unreached

    monkeypatch.setattr(connect, "engine", lost)
    monkeypatch.setattr(job_workers, "Assignment", partial(job_workers.Assignment, seconds=0.0))
    resting(monkeypatch, lambda _: None)
    with ThreadPoolExecutor(2) as pool, pytest.raises(DatabaseUnreachable, match="a worker of job 1 was stopped"):
        run(made, executor=pool, workers=2)
    assert len(asked) > 2 * job_workers.UNREACHED
    assert rows(engine, "select state, details ->> 'error' like '%/nowhere%' from wallet.jobs") == [("failed", True)]


def stopping_at(place: str, down: Flaky, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stop the server once, when the function at ``place`` is called; each of its calls."""
    owner, _, name = place.rpartition(".")
    found = pkgutil.resolve_name(owner)
    plainly, calls = getattr(found, name), list[str]()

    def stopped(*values: Any, **named: Any) -> Any:
        calls.append(name)
        if len(calls) == 1:
            down.stop()
        return plainly(*values, **named)

    monkeypatch.setattr(found, name, stopped)
    return calls


@pytest.mark.parametrize("name", ["_fill", "_closed"])
def test_a_backfill_outlasts_an_outage_before_its_first_batch_and_behind_its_last(
    made: Ledger, down: Flaky, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    waited = resting(monkeypatch, back_after(down, LONG))
    calls = stopping_at(f"walletmigrate.backfill.{name}", down, monkeypatch)
    result = run(made)
    assert (result.state, result.opened, len(waited)) == ("done", ROWS, LONG)
    assert calls[:2] == [name, name]
    assert_whole(made, ROWS)


@pytest.mark.parametrize("name", ["_unmet", "_items"])
def test_a_reconciliation_outlasts_an_outage_behind_its_last_batch(
    made: Ledger, down: Flaky, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    run(made)
    engine, settings = made
    waited = resting(monkeypatch, back_after(down, LONG))
    calls = stopping_at(f"walletmigrate.reconcile._Run.{name}", down, monkeypatch)
    result = reconcile(engine, settings, settings.mapping(), ACT)
    assert (result.state, result.counts["in_order"], len(waited)) == ("done", ROWS, LONG)
    assert calls == [name, name]


def test_a_prune_of_snapshots_outlasts_an_outage(made: Ledger, down: Flaky, monkeypatch: pytest.MonkeyPatch) -> None:
    run(made)
    engine, settings = made
    for _ in range(2):
        snapshots.take(engine, settings, ACT)
    waited = resting(monkeypatch, back_after(down, LONG))
    stopping_at("walletmigrate.snapshots._step", down, monkeypatch)
    assert len(snapshots.prune(engine, settings, ACT, keep=1).pruned) == 1
    assert len(waited) == LONG
    assert rows(engine, "select state from wallet.snapshots") == [("complete",)]
