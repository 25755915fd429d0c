"""Several workers on one job: processes, threads, a Dask cluster; and what becomes of one that is lost."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from sqlalchemy import Connection, Engine
from structlog.contextvars import bound_contextvars

import ledger
import shares
import skips
from commandline import REASON, Project
from ledger import ACT, execute, install_users, rows, scalar
from walletmigrate import job_workers, jobs
from walletmigrate.backfill import BackfillResult, backfill, steps
from walletmigrate.config import Settings
from walletmigrate.errors import JobFailed
from walletmigrate.job_rows import configure
from walletmigrate.job_work import Work

Ledger = tuple[Engine, Settings]
ROWS = 400


@pytest.fixture
def made(database_url: str) -> Ledger:
    return install_users(database_url, rows=ROWS, coins="100 + g", phase="dual_write")


def run(made: Ledger, **options: Any) -> BackfillResult:
    engine, settings = made
    return backfill(engine, settings, settings.mapping(), ACT, **{"batch_size": 5, "workers": 2, **options})


def assert_whole(made: Ledger, accounts: int = ROWS) -> None:
    """Every row has one account with its balance, which one opening explains; nothing else is in the journal."""
    engine = made[0]
    wrong = rows(
        engine,
        "select u.id, u.total_coins, a.balance, t.openings from users as u "
        "left join wallet.accounts as a on a.key = u.id::text collate \"C\" and a.state = 'mirrored' "
        "left join lateral (select count(*) as openings, sum(amount) as amount from wallet.transactions "
        "where credit_account = a.id) as t on true "
        "where a.balance is distinct from u.total_coins or t.openings <> 1 or t.amount <> a.balance",
    )
    assert wrong == []
    counted = rows(engine, "select (select count(*) from wallet.accounts), (select count(*) from wallet.transactions)")
    assert counted == [(accounts, accounts)]


def test_two_processes_open_each_account_once(made: Ledger) -> None:
    told: list[int] = []
    result = run(made, progress=lambda job: told.append(job.items_done))
    assert (result.state, result.opened, result.keys, result.failed) == ("done", ROWS, ROWS, 0)
    assert told == sorted(told)
    assert_whole(made)
    assert multiprocessing.active_children() == []


def test_any_executor_will_do(made: Ledger) -> None:
    with ThreadPoolExecutor(3) as pool:
        assert run(made, executor=pool, workers=3).opened == ROWS
    assert_whole(made)


def test_a_stop_pauses_all_workers_at_a_checkpoint(made: Ledger) -> None:
    engine, _ = made
    with ThreadPoolExecutor(2) as pool:
        paused = run(
            made, executor=pool, stop=lambda: bool(scalar(engine, "select sum(items_done) > 20 from wallet.jobs"))
        )
        assert paused.state == "paused"
        assert 20 < paused.keys < ROWS
        assert scalar(engine, "select count(*) from wallet.job_batches where state = 'claimed'") == 0
        assert run(made, executor=pool).state == "done"
    assert_whole(made)


def sleepers(engine: Engine) -> Callable[[], None]:
    """Make every batch stop at row 200 until the function is called that this gives."""
    holder = engine.connect()
    holder.exec_driver_sql("select from users where id = 200 for update")

    def release() -> None:
        holder.rollback()
        holder.close()

    return release


def kill_a_worker_that_waits(engine: Engine, release: Callable[[], None], kill: Callable[[], None]) -> bool:
    """To be called again and again: once a worker waits for the row, kill, and let the row go."""
    waiting = (
        "select count(*) from pg_stat_activity "
        "where application_name = 'walletmigrate worker' and wait_event_type = 'Lock'"
    )
    if not scalar(engine, waiting):
        return False
    kill()
    release()
    return True


def test_a_worker_process_that_is_killed_in_a_batch_costs_nothing_but_time(made: Ledger) -> None:
    engine, settings = made
    release = sleepers(engine)
    killed: list[bool] = []

    def kill() -> None:
        os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)

    def look() -> bool:
        if not killed and kill_a_worker_that_waits(engine, release, kill):
            killed.append(True)
        return False

    job = jobs.start_or_resume(engine, settings, "backfill", "users", ACT)
    with engine.begin() as connection:
        configure(connection, settings, job.id, {"lease_seconds": 0.5})
    result = run(made, stop=look)
    assert killed
    assert (result.state, result.opened) == ("done", ROWS)
    assert_whole(made)


def started(made: Ledger) -> jobs.Job:
    job = jobs.start_or_resume(*made, "backfill", "users", ACT)
    with made[0].begin() as connection:
        return configure(connection, made[1], job.id, {"batch_size": 5})


def fatal(connection: Connection, after: str | None, upto: str | None) -> jobs.Batch:
    """A step that takes its process down."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def test_work_that_kills_every_worker_fails_the_job(made: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_workers, "LOSSES", 1)
    engine, settings = made
    job = jobs.start_or_resume(engine, settings, "backfill", "users", ACT)
    with pytest.raises(JobFailed, match="2 workers were lost"):
        jobs.run_batches(engine, settings, job, fatal, workers=2)
    assert scalar(engine, "select state from wallet.jobs") == "failed"


class Dead(ProcessPoolExecutor):
    """A pool whose process died after it was last looked at."""

    def submit(self, *_: Any, **__: Any) -> Any:
        raise BrokenProcessPool


def first_dead(monkeypatch: pytest.MonkeyPatch) -> list[type]:
    """Let the first pool be a dead one; the classes of the pools that are made."""
    honest = job_workers._processes
    made: list[type] = []

    def pool(count: int) -> ProcessPoolExecutor:
        one = honest(count) if made else Dead(count)
        made.append(type(one))
        return one

    monkeypatch.setattr(job_workers, "_processes", pool)
    return made


def test_a_pool_that_is_found_broken_when_work_is_given_to_it_is_replaced(
    made: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    pools = first_dead(monkeypatch)
    assert run(made).state == "done"
    assert pools == [Dead, ProcessPoolExecutor]
    assert_whole(made)


def test_a_process_that_dies_is_one_loss_however_many_went_down_with_it(
    made: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each process of a pool that breaks brings its work back as lost."""
    monkeypatch.setattr(job_workers, "LOSSES", 1)
    first_dead(monkeypatch)
    assert run(made, workers=3).state == "done"
    assert_whole(made)


def test_workers_that_are_lost_now_and_then_never_fail_a_job_that_goes_on(
    made: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As machines of a cluster that are taken away at any time, one after each batch here. Of every second one the
    batch is seen before the worker is lost, of the others only after.
    """
    monkeypatch.setattr(job_workers, "LOSSES", 1)
    engine = made[0]
    lost: list[int] = []
    seen: list[int] = []
    honest = job_workers.Crew._look

    def look(self: job_workers.Crew, job: jobs.Job) -> jobs.Job:
        found = honest(self, job)
        seen.append(found.items_done)
        return found

    monkeypatch.setattr(job_workers.Crew, "_look", look)

    def one_batch(assignment: job_workers.Assignment) -> job_workers.Outcome:
        rests = iter([False])
        with engine.connect() as connection:
            job = jobs.get(connection, assignment.settings, assignment.job_id)
        worker = Work(engine, assignment.settings, assignment.steps, rest=lambda: next(rests, True))
        found, ended = worker.run(job)
        if not ended:
            lost.append(found.items_done)
            while len(lost) % 2 and seen[-1] < found.items_done:
                time.sleep(0.005)  # the pause between two looks, not what makes the order
            raise CancelledError
        return job_workers.Outcome(found, ended)

    monkeypatch.setattr(job_workers, "work", one_batch)
    with ThreadPoolExecutor(1) as pool:
        # One at a time: a second worker could be lost before the first one's batch has been seen.
        result = jobs.run_batches(
            *made, started(made), steps(made[1], made[1].mapping(), 1)[0], workers=1, executor=pool
        )
    assert result.items_done == ROWS
    assert len(lost) > 10 * job_workers.LOSSES


def test_a_step_that_cannot_be_sent_to_a_worker_is_an_error_that_says_so(made: Ledger) -> None:
    engine, settings = made
    job = jobs.start_or_resume(engine, settings, "backfill", "users", ACT)
    with pytest.raises(JobFailed, match="a worker could not do its work"):
        jobs.run_batches(engine, settings, job, lambda *_: jobs.Batch(0, 0, 0, {}), workers=2)


def test_an_error_of_a_worker_reaches_the_caller_with_its_type(made: Ledger) -> None:
    engine, _ = made
    execute(engine, "create function public.stopper() returns trigger language plpgsql as $$ begin raise 'no'; end $$")
    execute(engine, "create trigger stopper before insert on wallet.accounts execute function public.stopper()")
    message = r"the first 1\d batches failed for the same reason: no"
    with ThreadPoolExecutor(2) as pool, pytest.raises(JobFailed, match=message):
        run(made, batch_size=50, executor=pool)
    assert rows(engine, "select state, details ->> 'error' like '%the first 1_ batches%' from wallet.jobs") == [
        ("failed", True)
    ]


def test_what_workers_put_on_record_has_the_correlation_id_of_who_began(made: Ledger) -> None:
    engine, _ = made
    execute(engine, "create function public.stopper() returns trigger language plpgsql as $$ begin raise 'no'; end $$")
    execute(engine, "create trigger stopper before insert on wallet.accounts execute function public.stopper()")
    with bound_contextvars(correlation_id="deploy-17"), ThreadPoolExecutor(2) as pool, pytest.raises(JobFailed):
        run(made, batch_size=50, executor=pool)
    found = "select action, correlation_id from wallet.audit_log where action like 'backfill%' order by id"
    assert rows(engine, found) == [("backfill start", "deploy-17"), ("backfill failed", "deploy-17")]


def test_what_travels_never_shows_the_password() -> None:
    settings = ledger.users_settings("postgresql://ana:hunter2@localhost/shop")
    url = SecretStr("postgresql://ana:hunter2@localhost/shop")
    sent = job_workers.Assignment(settings, url, 1, steps(settings, settings.mapping(), 1))
    assert "hunter2" not in f"{sent!r} {sent}"


@contextmanager
def cluster() -> Iterator[Any]:
    """A Dask cluster of two worker processes on the loopback interface."""
    try:
        distributed: Any = import_module("distributed")
    except ImportError:
        skips.skip("dask")
    options = {"n_workers": 2, "threads_per_worker": 1, "host": "127.0.0.1", "dashboard_address": None}
    with distributed.LocalCluster(**options, silence_logs=50) as made:
        yield made


def test_a_dask_cluster_without_workers_is_refused_before_a_job_begins(
    made: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, settings = made

    @contextmanager
    def empty(_address: str) -> Iterator[tuple[Executor, int]]:
        with ThreadPoolExecutor(1) as pool:
            yield pool, 0

    monkeypatch.setattr(job_workers, "dask", empty)
    assert settings.database_url is not None
    project = Project(tmp_path, settings.database_url.get_secret_value())
    said = project.run("backfill", "--dask", "tcp://127.0.0.1:8786", *REASON)
    assert (said.exit_code, "has no worker" in said.stderr) == (2, True)
    assert scalar(engine, "select count(*) from wallet.jobs") == 0


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_dask_worker_that_is_lost_costs_nothing_but_time(made: Ledger) -> None:
    engine, settings = made
    job = jobs.start_or_resume(engine, settings, "backfill", "users", ACT)
    with engine.begin() as connection:
        configure(connection, settings, job.id, {"lease_seconds": 0.5})
    release = sleepers(engine)
    killed: list[bool] = []
    with cluster() as dask, job_workers.dask(dask.scheduler_address) as (executor, count):
        assert count == 2

        def kill() -> None:
            os.kill(next(iter(dask.workers.values())).pid, signal.SIGKILL)

        def look() -> bool:
            if not killed and kill_a_worker_that_waits(engine, release, kill):
                killed.append(True)
            return False

        assert isinstance(executor, Executor)
        result = run(made, executor=executor, stop=look)
    assert killed
    assert (result.state, result.opened) == ("done", ROWS)
    assert_whole(made)


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_reconciliation_on_a_dask_cluster_that_loses_a_worker_corrects_each_account_once(
    made: Ledger, tmp_path: Path
) -> None:
    """By the command, with a file as the truth, which travels to the workers."""
    engine, settings = made
    assert run(made, workers=1, batch_size=None).state == "done"
    truth = tmp_path / "truth.csv"
    lines = [f"{key},{100 + key + key % 2}" for key in range(1, ROWS + 1)]
    truth.write_text("\n".join(["key,balance", *lines]), encoding="utf-8")
    assert settings.database_url is not None
    project = Project(tmp_path, settings.database_url.get_secret_value())
    # Row 201 has to be corrected, and is in the middle.
    holder = engine.connect()
    holder.exec_driver_sql("select from users where id = 201 for update")
    by = holder.exec_driver_sql("select pg_backend_pid()").scalar_one()
    waiting = f"select count(*) from pg_stat_activity where {by} = any(pg_blocking_pids(pid))"
    with cluster() as dask, ThreadPoolExecutor(1) as pool:
        words = ("reconcile", "--all", "--truth", str(truth), "--correct-up-to", "1", "--batch-size", "5")
        done = pool.submit(project.run, *words, "--dask", dask.scheduler_address, "--json", *REASON)
        while not scalar(engine, waiting):
            assert not done.done(), done.result()
            time.sleep(0.02)
        job = scalar(engine, "select id from wallet.jobs where kind = 'reconcile'")
        with engine.begin() as connection:
            configure(connection, settings, job, {"lease_seconds": 0.5})
        of_it = "state = 'claimed' and 201 between cast(after_key as int) + 1 and cast(upto_key as int)"
        owner = scalar(engine, f"select worker from wallet.job_batches where {of_it}")
        pid = int(owner.split(":")[1])
        assert pid in {one.pid for one in dask.workers.values()}
        os.kill(pid, signal.SIGKILL)
        holder.rollback()
        holder.close()
        said = done.result(300)
    assert said.exit_code == 0, said
    (found,) = said.document["mappings"]
    assert (found["state"], found["counts"]["corrected"], found["counts"]["in_order"]) == ("done", 200, 200)
    assert rows(
        engine,
        "select count(*), count(distinct credit_account) from wallet.transactions where job_id = :job "
        "and kind = 'correction' and amount = 1",
        job=job,
    ) == [(200, 200)]
    assert rows(engine, "select id from users where total_coins <> 100 + id + id % 2") == []


@pytest.fixture
def kills(pytestconfig: pytest.Config) -> list[int]:
    """The seeds of the kills of a backfill: a few, or a share of all of them under ``make torture``."""
    share = shares.asked(pytestconfig)
    return list(share.choose(range(200)) if share else range(3)) or [0]


def test_a_backfill_killed_at_random_points_opens_each_account_once(database_url: str, kills: list[int]) -> None:
    """SIGKILL to the whole process group, workers included, a moment after as many accounts are open as chance says."""
    accounts = 60 + 30 * len(kills)
    engine, settings = install_users(database_url, rows=accounts, coins="100 + g", phase="dual_write")
    program = (
        "import ledger; from walletmigrate.backfill import backfill\n"
        f"engine = ledger.engine_named({database_url!r}, 'walletmigrate-other')\n"
        f"settings = ledger.users_settings({database_url!r})\n"
        "backfill(engine, settings, settings.mapping(), ledger.ACT, batch_size=3, workers=2)\n"
    )
    environment = {**os.environ, "PYTHONPATH": ":".join(path for path in sys.path if path)}
    query = "select coalesce(sum(items_done), 0)::int from wallet.jobs"
    for number, seed in enumerate(kills):
        chance = random.Random(seed)
        point = chance.randint(30 * number, 30 * number + 30)
        moment = chance.uniform(0, 0.02)
        process = subprocess.Popen([sys.executable, "-c", program], env=environment, start_new_session=True)
        try:
            while process.poll() is None and scalar(engine, query) < point:
                time.sleep(0.001)  # the pause between two looks
            time.sleep(moment)  # so that the kill meets a batch anywhere, not always where it ends
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        assert process.returncode == -signal.SIGKILL
    result = run((engine, settings), workers=1)
    assert (result.state, result.resumed, result.opened) == ("done", True, accounts)
    assert scalar(engine, "select count(*) from wallet.jobs") == 1
    assert_whole((engine, settings), accounts)
