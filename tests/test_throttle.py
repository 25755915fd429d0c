"""What makes a job stand still by itself, and go on: signals forced by the test, the clock in its hand."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from sqlalchemy import Engine

import ledger
from ledger import ACT, engine_named, execute, install_users, rows, scalar, users_settings
from servers import Postgres
from standby import pair
from walletmigrate import throttle as throttle_module
from walletmigrate.backfill import BackfillResult, backfill
from walletmigrate.config import Settings, ThrottleSettings
from walletmigrate.errors import ConfigError
from walletmigrate.facts import read_facts
from walletmigrate.report import JobStatus, _jobs
from walletmigrate.throttle import Signal, Throttle, Unreadable, of_settings

Ledger = tuple[Engine, Settings]
ROWS = 20
ANSWER: list[Any] = [True]


def answer() -> Any:
    """What the configuration's own check calls."""
    if isinstance(ANSWER[0], Exception):
        raise ANSWER[0]
    return ANSWER[0]


@pytest.fixture
def made(database_url: str) -> Ledger:
    ANSWER[0] = True
    return install_users(database_url, rows=ROWS, phase="dual_write")


def limited(made: Ledger, **limits: Any) -> Ledger:
    engine, settings = made
    return engine, settings.model_copy(update={"throttle": ThrottleSettings(**limits)})


def built(made: Ledger, **limits: Any) -> Throttle:
    engine, settings = limited(made, **limits)
    found = of_settings(engine, settings, 1, "users")
    assert found is not None
    return found


def run(made: Ledger, **options: Any) -> BackfillResult:
    engine, settings = made
    return backfill(engine, settings, settings.mapping(), ACT, **{"batch_size": 5, **options})


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_without_limits_nothing_is_asked(made: Ledger) -> None:
    assert of_settings(*made, 1, "users") is None


def test_signals_are_read_at_most_once_a_second() -> None:
    now, reads = [0.0], []

    def read() -> float:
        reads.append(now[0])
        return 1.0

    throttle = Throttle([Signal("load", read, 5)], clock=lambda: now[0])
    for at in (0.0, 0.5, 0.99, 1.0, 1.5, 2.1):
        now[0] = at
        assert throttle.reason() is None
    assert reads == [0.0, 1.0, 2.1]


def test_any_signal_over_its_limit_is_named_and_it_goes_on_when_it_is_well_again() -> None:
    now, load = [0.0], [6.5]
    signals = [Signal("waits", lambda: 0, 5), Signal("load", lambda: load[0], 5)]
    throttle = Throttle(signals, clock=lambda: now[0])
    assert throttle.reason() == "load 6.5 is over 5"
    now[0], load[0] = 1.0, 5.0
    assert throttle.reason() is None


def test_a_signal_that_cannot_be_read_once_is_not_said_to_be_away_since_another_one_held_the_job() -> None:
    now: list[float] = [0.0]
    load, broken = [6.0], [False]

    def read() -> float:
        if broken[0]:
            raise OSError("no route")
        return 0.0

    throttle = Throttle([Signal("load", lambda: load[0], 5), Signal("lag", read, 5)], clock=lambda: now[0])
    for second in range(20):
        now[0] = float(second)
        assert throttle.reason() == "load 6 is over 5"
    now[0], load[0], broken[0] = 20.0, 1.0, True
    assert throttle.reason() is None
    now[0] = 34.0
    assert throttle.reason() == "lag cannot be read for 15 s: no route"


def test_a_signal_that_cannot_be_read_for_15_seconds_counts_as_over_its_limit() -> None:
    now: list[float] = [0.0]
    broken = [True]

    def read() -> float:
        if broken[0]:
            raise OSError("no route to postgresql://ana:hunter2@replica/shop")
        return 0.0

    throttle = Throttle([Signal("lag", read, 5)], clock=lambda: now[0])
    assert throttle.reason() is None
    now[0] = 14.0
    assert throttle.reason() is None
    now[0] = 15.0
    assert throttle.reason() == "lag cannot be read for 15 s: no route to postgresql://***@replica/shop"
    now[0], broken[0] = 16.0, False
    assert throttle.reason() is None
    now[0], broken[0] = 20.0, True
    assert throttle.reason() is None


def test_sessions_that_wait_for_a_row_of_the_table_are_counted(made: Ledger, database_url: str) -> None:
    engine, _ = made
    execute(engine, "create table public.other (id int primary key)")
    execute(engine, "insert into public.other values (1)")
    waiting = engine_named(database_url, "waiting")

    def count(update: str) -> str | None:
        with engine.connect() as holder, ThreadPoolExecutor(1) as pool:
            holder.exec_driver_sql(update)
            future = pool.submit(execute, waiting, update)
            ledger.until_blocked(engine, "waiting")
            found = built(made, lock_waits=0).reason()
            holder.rollback()
            future.result(30)
        return found

    assert count("update users set tenant = 'x' where id = 1") == "sessions waiting for locks 1 is over 0"
    assert count("update public.other set id = 1") is None
    assert built(made, lock_waits=0).reason() is None


def test_a_signal_that_never_answers_holds_the_job_as_one_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a function of the user's that asks another machine without a time limit."""
    monkeypatch.setattr(throttle_module, "ANSWER_SECONDS", 0.0)
    now, answered, asked = [0.0], threading.Event(), []

    def read() -> float:
        asked.append(threading.current_thread().daemon)
        answered.wait()
        return 1.0

    throttle = Throttle([Signal("peak", read, 5)], clock=lambda: now[0])
    assert throttle.reason() is None
    now[0] = 16.0
    assert throttle.reason() == "peak cannot be read for 16 s: no answer within 0 s"
    assert asked == [True], "who has not answered yet is not asked again, and keeps no process from its end"
    answered.set()
    monkeypatch.setattr(throttle_module, "ANSWER_SECONDS", 30.0)
    now[0] = 17.0
    assert throttle.reason() is None


def test_sessions_at_work_are_counted(made: Ledger) -> None:
    assert built(made, active_sessions=1000).reason() is None
    engine, _ = made
    with engine.connect() as held, engine.connect() as other:
        held.exec_driver_sql("select pg_advisory_lock(1)")
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(other.exec_driver_sql, "select pg_advisory_lock(1)")
            until(lambda: built(made, active_sessions=0).reason() == "active sessions 1 is over 0")
            held.exec_driver_sql("select pg_advisory_unlock(1)")
            future.result(30)


def test_a_role_that_is_not_shown_the_sessions_is_blind_and_not_at_ease(made: Ledger, database_url: str) -> None:
    now = [0.0]
    operator = engine_named(database_url, role="wallet_operator"), made[1]
    throttle = Throttle(built(operator, active_sessions=5)._signals, clock=lambda: now[0])
    with made[0].connect() as superuser:
        superuser.exec_driver_sql("select 1")
        assert throttle.reason() is None
        now[0] = 20.0
        found = throttle.reason()
    assert found is not None
    assert found.startswith("active sessions cannot be read for 20 s")
    assert "grant it pg_monitor" in found


def test_wal_is_measured_from_one_look_to_the_next(made: Ledger) -> None:
    engine, _ = made
    (signal,) = built(made, wal_bytes_per_second=1)._signals
    assert signal.read() == 0
    execute(engine, "update users set tenant = tenant || 'x'")
    found = signal.read()
    assert isinstance(found, float)
    assert found > 1


def test_a_slow_batch_makes_the_job_rest_and_not_for_ever(made: Ledger) -> None:
    engine, _ = made
    run(made)
    execute(engine, "update wallet.jobs set last_batch_seconds = 3, updated_at = clock_timestamp()")
    assert built(made, batch_seconds=2).reason() == "seconds of the last batch 3 is over 2"
    execute(engine, "update wallet.jobs set updated_at = clock_timestamp() - interval '6 s'")
    assert built(made, batch_seconds=2).reason() is None


def test_a_replica_that_is_cut_off_is_not_up_to_date(server: Postgres) -> None:
    with pair(server) as two:
        assert two.standby is not None
        primary, standby = (engine_named(one.url) for one in (two.primary, two.standby))
        limits = {"throttle": ThrottleSettings(replica_lag_seconds=0.5)}
        known = users_settings(two.primary.url).model_copy(update=limits)
        direct = of_settings(primary, known.model_copy(update={"replica_urls": SecretStr(two.standby.url)}), 1, "users")
        seen = of_settings(primary, known, 1, "users")
        assert direct is not None
        assert seen is not None
        execute(primary, "create table written (at int)")
        two.caught_up()
        assert direct._signals[0].read() == 0
        assert isinstance(seen._signals[0].read(), float)
        with standby.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
            connection.exec_driver_sql("alter system set primary_conninfo = 'host=/nowhere'")
            connection.exec_driver_sql("select pg_reload_conf()")
        until(lambda: scalar(standby, "select not exists (select from pg_stat_wal_receiver)"))
        execute(primary, "insert into written values (1)")
        # Nothing was received that is not replayed, and yet it is behind, and more so all the time.
        assert scalar(standby, "select pg_last_wal_receive_lsn() = pg_last_wal_replay_lsn()")
        until(lambda: (direct.reason() or "").startswith("replica lag in seconds"))
        until(lambda: scalar(primary, "select not exists (select from pg_stat_replication)"))
        with pytest.raises(Unreadable, match="no replica streams"):
            seen._signals[0].read()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_job_stands_still_with_a_named_reason_and_goes_on_by_itself(made: Ledger, workers: int) -> None:
    engine, settings = limited(made, check="python:test_throttle:answer")
    ANSWER[0] = "the month is being closed"
    options: dict[str, Any] = {}
    with ThreadPoolExecutor(3) as pool:
        if workers > 1:
            options = {"executor": pool, "workers": workers}
        running = pool.submit(run, (engine, settings), **options)
        held = "select held from wallet.jobs"
        until(lambda: scalar(engine, "select count(*) from wallet.jobs where held is not null"))
        assert scalar(engine, held) == "python:test_throttle:answer: the month is being closed"
        with engine.connect() as connection:
            (job,) = _jobs(connection, settings)
            assert isinstance(job, JobStatus)
            assert (job.state, job.held, job.rate) == ("running", scalar(engine, held), None)
            assert read_facts(connection, "wallet").jobs["backfill", "users"].paused == 1
        assert scalar(engine, "select count(*) from wallet.accounts") == 0
        ANSWER[0] = True
        assert running.result(30).opened == ROWS
    assert rows(engine, "select state, held, held_at from wallet.jobs") == [("done", None, None)]


def test_a_job_that_stands_still_can_be_stopped(made: Ledger) -> None:
    engine, settings = limited(made, check="python:test_throttle:answer")
    ANSWER[0] = False
    asked = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run, (engine, settings), stop=asked.is_set)
        until(lambda: scalar(engine, "select held from wallet.jobs"))
        asked.set()
        assert running.result(30).state == "paused"
    assert rows(engine, "select state, held from wallet.jobs") == [("paused", None)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("lock_wait = 5", "did you mean 'lock_waits'"),
        ('check = "os.system"', 'write check = "python:module:function"'),
        ("replica_lag_seconds = 0", "replica_lag_seconds = 10"),
    ],
)
def test_a_limit_that_makes_no_sense_is_an_error_with_its_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "walletmigrate.toml"
    path.write_text(f"[throttle]\n{line}\n", encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        Settings.load(path)
    assert (caught.value.line, message in str(caught.value)) in [(2, True), (1, True)]
