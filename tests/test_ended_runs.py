"""Runs that only read, and are ended: what they had seen is on record, and their snapshots do not stay."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import Connection, create_engine, text
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.pool import NullPool

from commandline import Project
from ledger import ACT, engine_named, execute, fence_down, rows, scalar
from retiring import End
from test_job_reads import NEWEST, RECORDED, between, number, said_to_live, verified
from test_snapshot_job import ANSWERS, quiet
from verifying import Ledger, marks, prepared
from walletmigrate import archive_check, job_control, job_reads, marking, throttle
from walletmigrate import verify as verifying
from walletmigrate.backfill import backfill
from walletmigrate.comparison import snapshot
from walletmigrate.config import Settings, ThrottleSettings
from walletmigrate.connect import parsed
from walletmigrate.errors import JobCancelled, JobFailed, SnapshotTooOld
from walletmigrate.observation import verified as gate
from walletmigrate.verifications import put_on_record

__all__ = ["quiet"]

KEPT = (
    "select clean, complete, full_run, drift_accounts, details ->> 'unfinished' from wallet.verifications order by id"
)
OTHER = (
    "select pg_terminate_backend(pid) from pg_stat_activity "
    "where datname = current_database() and state = 'idle in transaction'"
)
WHY = "month's end"


@pytest.fixture
def made(database_url: str) -> Ledger:
    return prepared(database_url)


def drift(made: Ledger, change: str = "- 3") -> None:
    with fence_down(*made) as superuser:
        superuser.exec_driver_sql(f"update users set total_coins = total_coins {change} where id = 4")


def refused(made: Ledger) -> list[str]:
    """What the gate says of the verifications on record."""
    engine, settings = made
    with engine.connect() as connection:
        return [what for what, _ in gate(connection, settings)]


def cancelled(made: Ledger, _: Connection) -> None:
    job_control.cancel(*made, number(made), ACT)


def interrupted(*_: Any) -> None:
    raise KeyboardInterrupt


def failed(*_: Any) -> None:
    raise JobFailed(1, "verify", "a defect")


def lost(made: Ledger, connection: Connection) -> None:
    """The session that reads is gone, and with it all that the pool has, as when the server starts anew."""
    execute(made[0], OTHER)
    connection.execute(text("select 1"))


@pytest.mark.parametrize(
    ("end", "error", "why"),
    [
        (cancelled, JobCancelled, "was cancelled"),
        (interrupted, KeyboardInterrupt, "KeyboardInterrupt"),
        (failed, JobFailed, "a defect"),
        (lost, DBAPIError, "57P01"),
    ],
)
def test_what_a_run_has_seen_stays_on_record_however_it_ends(
    made: Ledger, monkeypatch: pytest.MonkeyPatch, end: Callable[..., None], error: type[BaseException], why: str
) -> None:
    assert verified(made).clean
    drift(made)
    with monkeypatch.context() as patch:
        between(patch, lambda connection: end(made, connection))
        with pytest.raises(error):
            verified(made)
    first, (*seen, said) = rows(made[0], KEPT)
    assert first[:4] == (True, True, True, 0)
    assert seen == [False, False, False, 1]
    assert why in said
    drift(made, "+ 3")
    assert any("was not clean at" in what for what in refused(made)), "the failure is sticky, though it is mended"
    assert verified(made, sample=10).clean
    assert any("was not clean at" in what for what in refused(made)), "no sample lifts it"
    assert verified(made).clean
    assert refused(made) == []


def test_a_moments_difference_is_no_fault_of_a_run_that_was_ended(
    made: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is looked at again, as one that comes to its end would."""
    engine, settings = made
    drift(made)

    def ends(_: Connection) -> None:
        execute(engine, "update wallet.accounts set state = 'stale', state_at = now() where key = '4'")
        backfill(engine, settings, settings.mapping(), ACT)
        raise KeyboardInterrupt

    between(monkeypatch, ends)
    with pytest.raises(KeyboardInterrupt):
        verified(made)
    assert rows(engine, KEPT) == []


def test_nothing_of_a_dry_run_that_was_ended_is_on_record(made: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    drift(made)
    between(monkeypatch, interrupted)
    with pytest.raises(KeyboardInterrupt):
        verified(made, dry_run=True)
    assert rows(made[0], KEPT) == []


def gone(*_: Any) -> OperationalError:
    return OperationalError(
        "insert", {}, psycopg.OperationalError("the connection is lost"), connection_invalidated=True
    )


@pytest.mark.parametrize("failures", [2, 3])
def test_it_is_put_on_record_as_soon_as_the_server_answers_again_and_else_logged(
    made: Ledger, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, failures: int
) -> None:
    honest = put_on_record
    errors = iter([gone(), PoolTimeout("the pool is empty"), gone()][:failures])

    def put(*arguments: Any) -> None:
        if (error := next(errors, None)) is not None:
            raise error
        honest(*arguments)

    monkeypatch.setattr(verifying, "put_on_record", put)
    monkeypatch.setattr(job_reads, "WAITS", (0.0, 0.0))
    drift(made)
    between(monkeypatch, interrupted)
    with pytest.raises(KeyboardInterrupt):
        verified(made)
    assert len(rows(made[0], KEPT)) == (1 if failures == 2 else 0)
    assert ("'drift_accounts': 1" in caplog.text) is (failures == 3)


def test_who_asks_the_command_to_end_by_a_signal_gets_the_same(
    made: Ledger, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As systemd and Kubernetes do; by itself SIGTERM would end the process where it stands."""
    engine, settings = made
    project = Project(tmp_path, settings.database_url.get_secret_value() if settings.database_url else "")
    drift(made)
    before = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, lambda *_: None)  # were it not heard, the tests would go on
    try:
        between(monkeypatch, lambda _: os.kill(os.getpid(), signal.SIGTERM))
        said = project.run("verify")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (said.exit_code, rows(engine, KEPT)[0][:4]) == (130, (False, False, False, 1))
    assert "the same command begins anew" in said.stderr
    assert "NOT CLEAN, and ended early" in project.run("verify", "list").stdout
    assert "unfinished: KeyboardInterrupt" in project.run("verify", "show", "1").stdout


# The snapshot


def held(made: Ledger, monkeypatch: pytest.MonkeyPatch, *answers: Any) -> Settings:
    monkeypatch.setattr(throttle, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(job_reads, "_HELD", 0.02)
    ANSWERS[:] = answers
    limits = ThrottleSettings(check="python:test_snapshot_job:quiet", snapshot_seconds=0.03)
    return made[1].model_copy(update={"throttle": limits})


def test_the_throttle_does_not_hold_a_snapshot_open_for_longer_than_its_limit_in_all(
    made: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, settings = made
    drift(made)
    limited = held(made, monkeypatch, True, WHY, True, WHY, True)
    with pytest.raises(SnapshotTooOld, match=f"0.03 s with its snapshot open.*{WHY}.*begins anew"):
        verifying.verify(engine, limited, settings.mapping(), ACT)
    assert rows(engine, NEWEST)[0][:2] == ("verify", "failed")
    assert scalar(engine, "select action from wallet.audit_log order by id desc limit 1") == "verify failed"
    assert rows(engine, KEPT)[0][:4] == (False, False, False, 1), "what it had seen by then"


def test_before_its_snapshot_a_run_is_held_for_as_long_as_it_takes(
    made: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, settings = made
    limited = held(made, monkeypatch, *[WHY] * 6, True)
    assert verifying.verify(engine, limited, settings.mapping(), ACT).clean


def test_a_snapshot_has_no_time_limit_whatever_role_and_database_have(database_url: str) -> None:
    engine = engine_named(database_url)
    limits = ["statement_timeout", "idle_in_transaction_session_timeout"]
    if int(scalar(engine, "show server_version_num")) >= 170000:
        limits.append("transaction_timeout")
    name = scalar(engine, "select current_database()")
    for limit in limits:
        execute(engine, f'alter database "{name}" set {limit} = 7777')
    fresh = create_engine(parsed(database_url), poolclass=NullPool)  # an application's own: no setting of ours
    with snapshot(fresh) as connection:
        found = {limit: connection.exec_driver_sql(f"show {limit}").scalar_one() for limit in limits}
    assert found == dict.fromkeys(limits, "0")


def test_the_heart_goes_on_when_the_pool_has_no_connection_for_it(
    made: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, _ = made
    monkeypatch.setattr(job_reads, "BEAT_SECONDS", 0.02)
    honest, first = job_reads.Run._changed, iter([True])

    def changed(self: job_reads.Run, *arguments: Any, **values: Any) -> bool:
        if threading.current_thread() is not threading.main_thread() and next(first, False):
            raise PoolTimeout("the pool is empty")
        return honest(self, *arguments, **values)

    monkeypatch.setattr(job_reads.Run, "_changed", changed)
    given = between(monkeypatch, said_to_live(engine))
    assert verified(made).clean
    assert (given, next(first, None)) == ([True], None)


class Cut:
    """A connection whose statement is being ended, until it is let go on."""

    def __init__(self) -> None:
        self.begun, self.go_on = threading.Event(), threading.Event()
        self.connection = self.driver_connection = self

    def cancel_safe(self) -> None:
        self.begun.set()
        assert self.go_on.wait(30)


def test_a_connection_is_not_given_back_while_its_statement_is_being_ended(made: Ledger) -> None:
    """What is asked on it next would be ended instead."""
    run, reads = job_reads.Run(*made, "verify"), Cut()
    left = threading.Event()

    def leaves() -> None:
        with run.cutting(reads):  # type: ignore[arg-type]
            inside.set()
            assert reads.begun.wait(30)
        left.set()

    inside = threading.Event()
    reader, cutter = threading.Thread(target=leaves), threading.Thread(target=run._cut)
    reader.start()
    assert inside.wait(30)
    cutter.start()
    assert reads.begun.wait(30)
    assert not left.wait(0.2)
    reads.go_on.set()
    reader.join(30)
    cutter.join(30)
    assert left.is_set()


def test_the_proof_of_an_archive_is_ended_in_the_midst_of_a_statement(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    end = End(database_url, tmp_path)
    monkeypatch.setattr(job_reads, "BEAT_SECONDS", 0.05)

    def statement(_: str) -> Any:
        job = scalar(end.engine, "select id from wallet.jobs where kind = 'archive'")
        job_control.cancel(end.engine, end.settings, job, ACT)
        return text("select pg_sleep(600)")

    monkeypatch.setattr(archive_check, "_statement", statement)
    with pytest.raises(JobCancelled):
        end.archive()
    assert list(tmp_path.glob("*.gz*")) == []


def test_an_archive_holds_its_snapshot_no_longer_and_leaves_no_file(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    end = End(database_url, tmp_path)
    end.settings = held((end.engine, end.settings), monkeypatch, True, WHY, WHY, WHY, True)
    with pytest.raises(SnapshotTooOld, match=f"archive was held for 0.03 s .*{WHY}"):
        end.archive()
    assert rows(end.engine, NEWEST)[0][:2] == ("archive", "failed")
    assert list(tmp_path.glob("*.gz*")) == []


# Marks


def two_marks(made: Ledger, monkeypatch: pytest.MonkeyPatch, act: Callable[[], Any]) -> None:
    """Two accounts differ, one is marked in a transaction; between the two something happens."""
    with fence_down(*made) as superuser:
        superuser.exec_driver_sql("update users set total_coins = total_coins - 3 where id in (4, 5)")
    monkeypatch.setattr(marking, "BATCH", 1)
    honest, once = marking._batches, iter([True])

    def batches(found: Any) -> Any:
        for place, batch in enumerate(honest(found)):
            if place and next(once, False):
                act()
            yield batch

    monkeypatch.setattr(marking, "_batches", batches)


def test_marks_are_a_part_of_the_job_which_can_be_cancelled_between_them(
    made: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, _ = made
    seen: list[Any] = []

    def act() -> None:
        seen.extend(rows(engine, NEWEST))
        job_control.cancel(*made, number(made), ACT)

    two_marks(made, monkeypatch, act)
    with pytest.raises(JobCancelled):
        verified(made, mark_stale=True)
    assert [(state, stage) for _, state, _, _, stage, _ in seen] == [("running", "what differs turned stale")]
    assert rows(engine, KEPT) == [(False, True, True, 2, None)], "the verification itself had come to its end"
    assert [(one["differed"], one["turned_stale"]) for one in marks(engine)] == [(2, 1)]


def test_marks_that_were_cut_short_are_made_by_the_same_command_again(
    made: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, _ = made

    two_marks(made, monkeypatch, failed)
    with pytest.raises(JobFailed):
        verified(made, mark_stale=True)
    assert rows(engine, NEWEST)[0][:2] == ("verify", "failed")
    assert scalar(engine, RECORDED) == 1
    assert marks(engine)[0]["turned_stale"] == 1
    assert verified(made, mark_stale=True).turned_stale == 1
    assert rows(engine, NEWEST)[0][:2] == ("verify", "done")
    stale = "select count(*) from wallet.accounts where state = 'stale'"
    assert scalar(engine, stale) == 2
