"""Runs that read one snapshot, verify and archive, as jobs: seen while they run, held, cancelled, taken for dead."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, Engine

from commandline import REASON, Project
from ledger import ACT, execute, rows, scalar
from retiring import End
from test_snapshot_job import ANSWERS, quiet
from verifying import Ledger, prepared
from walletmigrate import archive, archive_check, cross_checks, job_control, job_reads, references, throttle
from walletmigrate import verify as verifying
from walletmigrate.config import ThrottleSettings
from walletmigrate.errors import JobCancelled, JobFailed, PreconditionRefused
from walletmigrate.facts import read_facts
from walletmigrate.verify import verify

__all__ = ["quiet"]

SEEN = "select kind, state, items_done, items_total, details ->> 'stage' as stage, held from wallet.jobs"
NEWEST = f"{SEEN} where kind like 'verify%' or kind = 'archive' order by id"
RECORDED = "select count(*) from wallet.verifications"


@pytest.fixture
def made(database_url: str) -> Ledger:
    return prepared(database_url)


def number(made: Ledger, kind: str = "verify") -> int:
    return int(scalar(made[0], "select id from wallet.jobs where kind = :kind", kind=kind))


def verified(made: Ledger, **options: Any) -> Any:
    engine, settings = made
    return verify(engine, settings, settings.mapping(), ACT, **options)


def between(monkeypatch: pytest.MonkeyPatch, act: Callable[[Connection], Any]) -> list[Any]:
    """Let something happen in the midst of a full verification, before it looks at references; what it gave."""
    given: list[Any] = []
    honest, once = references.look, iter([True])

    def look(connection: Connection, *arguments: Any, **more: Any) -> Any:
        if next(once, False):
            given.append(act(connection))
        return honest(connection, *arguments, **more)

    monkeypatch.setattr(references, "look", look)
    return given


def said_to_live(engine: Engine) -> Callable[[Connection], bool]:
    """Waits for the next word that the verification lives; whether there was one."""
    stamp = "select updated_at from wallet.jobs where kind = 'verify'"

    def waits(_: Connection) -> bool:
        before, patience = scalar(engine, stamp), time.monotonic() + 60
        while scalar(engine, stamp) == before and time.monotonic() < patience:
            time.sleep(0.02)
        return bool(scalar(engine, stamp) > before)

    return waits


def test_a_verification_is_among_the_jobs_while_it_runs_and_its_row_is_used_again(
    made: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, settings = made
    given = between(monkeypatch, lambda _: (rows(engine, NEWEST), job_control.jobs_of(engine.connect(), settings)[0]))
    assert verified(made).clean
    ((seen, first),) = given
    assert seen == [("verify", "running", 10, 10, "references, 3 of 4", None)]
    assert (first.kind, first.actor, first.stalled) == ("verify", ACT.actor, False), "those that run stand first"
    assert rows(engine, NEWEST) == [("verify", "done", 10, 10, "cross-checks, 4 of 4", None)]
    before = number(made)
    verified(made)
    verified(made, since_last=True)
    verified(made, sample=3)
    assert [one[:4] for one in rows(engine, NEWEST)] == [
        ("verify", "done", 10, 10),
        ("verify changes", "done", 0, 0),
        ("verify sample", "done", 3, 3),
    ]
    assert number(made) == before
    with engine.connect() as connection:
        told = read_facts(connection, "wallet", [("users", "EUR")]).jobs
    assert [told[kind, "users"].items for kind in ("verify", "verify sample", "archive")] == [10, 3, 0]
    verified(made, dry_run=True)
    assert scalar(engine, "select claims from wallet.jobs where kind = 'verify'") == 2


def test_a_verification_that_is_cancelled_between_two_parts_puts_nothing_on_record(
    made: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, settings = made
    further: list[Any] = []
    kept = scalar(engine, RECORDED)
    honest = cross_checks.run

    def further_part(*arguments: Any) -> Any:
        further.append(arguments)
        return honest(*arguments)

    monkeypatch.setattr(cross_checks, "run", further_part)
    between(monkeypatch, lambda _: job_control.cancel(engine, settings, number(made), ACT))
    with pytest.raises(JobCancelled):
        verified(made)
    assert further == [], "the part that would have come next"
    assert rows(engine, NEWEST)[0][:2] == ("verify", "cancelled")
    assert scalar(engine, RECORDED) == kept
    assert verified(made).clean, "the next one begins anew"


def test_a_cancellation_in_the_last_moment_holds_too(made: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, settings = made
    honest, once = verifying._result, iter([True])

    def result(*arguments: Any) -> Any:
        if next(once, False):
            job_control.cancel(engine, settings, number(made), ACT)
        return honest(*arguments)

    kept = scalar(engine, RECORDED)
    monkeypatch.setattr(verifying, "_result", result)
    with pytest.raises(JobCancelled):
        verified(made)
    assert scalar(engine, RECORDED) == kept


def test_a_statement_that_runs_is_ended_when_its_job_is_cancelled(
    made: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, settings = made
    monkeypatch.setattr(job_reads, "BEAT_SECONDS", 0.05)
    between(monkeypatch, lambda connection: connection.exec_driver_sql("select pg_sleep(600)"))
    asleep = "select count(*) from pg_stat_activity where wait_event = 'PgSleep' and datname = current_database()"
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(verified, made)
        while not scalar(engine, asleep):
            assert not running.done(), running.result()
        job_control.cancel(engine, settings, number(made), ACT)
        with pytest.raises(JobCancelled):
            running.result(60)
    assert not scalar(engine, asleep)


def test_the_same_is_refused_beside_one_that_lives_and_other_forms_are_not(
    made: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    verified(made)

    def beside(_: Connection) -> None:
        with pytest.raises(PreconditionRefused, match=f"walletmigrate jobs cancel {number(made)}"):
            verified(made)
        assert verified(made, since_last=True).clean

    between(monkeypatch, beside)
    assert verified(made).clean


def test_one_that_is_silent_is_shown_as_gone_and_another_takes_its_place(
    made: Ledger, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    engine, settings = made
    project = Project(tmp_path, settings.database_url.get_secret_value() if settings.database_url else "")
    kept: list[int] = []

    def silent(_: Connection) -> None:
        execute(
            engine, "update wallet.jobs set updated_at = clock_timestamp() - interval '2 min' where kind = 'verify'"
        )
        assert "verify of users, running, but no batch for a minute" in project.run("jobs", "list").stdout
        assert "walletmigrate verify --mapping users" in project.run("doctor").stdout
        assert verified(made).clean
        kept.append(scalar(engine, RECORDED))

    between(monkeypatch, silent)
    with pytest.raises(JobCancelled):
        verified(made)
    assert [scalar(engine, RECORDED)] == kept, "who was taken for dead puts nothing on record"
    assert rows(engine, NEWEST)[0][:2] == ("verify", "done")


def test_one_whose_place_was_taken_writes_nothing_of_its_own_into_the_row(
    made: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, settings = made
    kept = scalar(engine, RECORDED)

    def taken(_: Connection) -> None:
        execute(
            engine, "update wallet.jobs set updated_at = clock_timestamp() - interval '2 min' where kind = 'verify'"
        )
        with engine.begin() as connection:
            job_reads._started(connection, settings, "verify", "users", ACT)

    between(monkeypatch, taken)
    with pytest.raises(JobCancelled):
        verified(made)
    assert rows(engine, f"{SEEN} where kind = 'verify'") == [("verify", "running", 0, None, None, None)]
    assert scalar(engine, RECORDED) == kept


def test_a_run_says_that_it_lives_while_one_statement_runs(made: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _ = made
    monkeypatch.setattr(job_reads, "BEAT_SECONDS", 0.05)
    given = between(monkeypatch, said_to_live(engine))
    assert verified(made).clean
    assert given == [True]


def test_the_throttle_holds_it_before_its_snapshot_and_between_parts_with_a_reason(
    made: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, settings = made
    monkeypatch.setattr(throttle, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(job_reads, "_HELD", 0.0)
    seen: list[Any] = []

    def look() -> bool:
        seen.append((rows(engine, NEWEST)[0][4:], scalar(engine, _SNAPSHOTS)))
        return True

    why = "python:test_job_reads:quiet: month's end"
    ANSWERS[:] = ["month's end", look, "month's end", look, True]
    held = settings.model_copy(update={"throttle": ThrottleSettings(check="python:test_job_reads:quiet")})
    assert verify(engine, held, settings.mapping(), ACT).clean
    assert seen == [(("waiting to begin", why), 0), (("balances, 1 of 4", why), 1)]
    assert rows(engine, NEWEST)[0][4:] == ("cross-checks, 4 of 4", None)


_SNAPSHOTS = (
    "select count(*) from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid() "
    "and state = 'idle in transaction'"
)


def test_it_is_neither_paused_nor_set_nor_resumed_and_says_why(
    made: Ledger, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, settings = made
    project = Project(tmp_path, settings.database_url.get_secret_value() if settings.database_url else "")

    def refused(_: Connection) -> list[Any]:
        job = str(number(made))
        return [project.run("jobs", *words.split(), *REASON) for words in (f"pause {job}", f"set {job} rate=5")]

    given = between(monkeypatch, refused)
    assert verified(made).clean
    ((pause, options),) = given
    assert (pause.exit_code, options.exit_code) == (4, 4)
    assert "vacuum" in pause.stderr
    assert "nothing to set" in options.stderr
    said = project.run("jobs", "resume", str(number(made)), *REASON)
    assert (said.exit_code, "walletmigrate verify --mapping users" in said.stderr) == (2, True)
    shown = project.run("jobs", "show", str(number(made))).stdout
    assert "one snapshot, at: cross-checks, 4 of 4; read by " in shown
    assert "batch-size" not in shown


@pytest.mark.parametrize(
    ("error", "state", "audited"),
    [
        (JobFailed(1, "x", "a defect"), "failed", "verify failed"),
        (PreconditionRefused("x", [("a", "b")]), "cancelled", "verify cancel"),
        (KeyboardInterrupt(), "cancelled", "verify cancel"),
    ],
)
def test_one_that_does_not_come_to_its_end_says_so(
    made: Ledger, monkeypatch: pytest.MonkeyPatch, error: BaseException, state: str, audited: str
) -> None:
    engine, _ = made

    def fail(_: Connection) -> None:
        raise error

    between(monkeypatch, fail)
    with pytest.raises(type(error)):
        verified(made)
    assert rows(engine, NEWEST)[0][:2] == ("verify", state)
    assert scalar(engine, "select action from wallet.audit_log order by id desc limit 1") == audited


@pytest.mark.parametrize("where", ["in the file", "in the proof"])
def test_an_archive_is_among_the_jobs_and_leaves_no_file_when_it_is_cancelled(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    end = End(database_url, tmp_path)
    seen: list[Any] = []
    honest = job_reads.Run.at

    def at(self: job_reads.Run, stage: str, *arguments: Any, **more: Any) -> None:
        honest(self, stage, *arguments, **more)
        if ("rows" if where == "in the file" else "proof") in stage and self.job is not None:
            seen.extend(rows(end.engine, NEWEST))
            job_control.cancel(end.engine, end.settings, self.job.id, ACT)
            honest(self, "next")

    monkeypatch.setattr(job_reads.Run, "at", at)
    with pytest.raises(JobCancelled):
        end.archive()
    assert list(tmp_path.glob("*.gz*")) == []
    ((kind, state, done, *_),) = seen
    assert (kind, state, done) == ("archive", "running", 10 if where == "in the file" else 0)
    assert not rows(end.engine, "select 1 from wallet.audit_log where action = 'archive'")
    monkeypatch.setattr(job_reads.Run, "at", honest)
    assert end.archive().proven
    assert rows(end.engine, NEWEST) == [("archive", "done", 10, 10, "proof, 2 of 2", None)]


def test_an_archive_that_is_cancelled_before_it_is_on_record_leaves_no_file(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    end = End(database_url, tmp_path)
    honest = archive.put_on_record

    def late(*arguments: Any, **more: Any) -> Any:
        job = scalar(end.engine, "select id from wallet.jobs where kind = 'archive'")
        job_control.cancel(end.engine, end.settings, job, ACT)
        return honest(*arguments, **more)

    monkeypatch.setattr(archive_check, "put_on_record", late)
    with pytest.raises(JobCancelled):
        end.archive()
    assert list(tmp_path.glob("*.gz*")) == []


def test_an_archive_that_is_interrupted_leaves_no_file_either(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    end = End(database_url, tmp_path)

    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(archive_check, "check", interrupted)
    with pytest.raises(KeyboardInterrupt):
        end.archive()
    assert list(tmp_path.glob("*.gz*")) == []
