"""The proof of a snapshot is a job too: listed, held, cancelled; and what it has found is kept however it ends."""

from __future__ import annotations

from typing import Any

import pytest

from adapting import Place
from commandline import Project
from ledger import ACT, rows, scalar, unguarded
from test_snapshot_job import ANSWERS, at, quiet
from test_snapshots import take
from walletmigrate import job_control, job_reads, snapshot_checks, throttle
from walletmigrate.config import ThrottleSettings
from walletmigrate.errors import JobCancelled
from walletmigrate.snapshot_checks import verify

__all__ = ["at", "quiet"]

JOBS = (
    "select state, items_done, items_total, details ->> 'stage', held from wallet.jobs where kind = 'snapshot verify'"
)
PROOF = "select verified_clean from wallet.snapshots"
ACTS = "select details from wallet.audit_log where action = 'snapshot verify' order by id"


def stages(monkeypatch: pytest.MonkeyPatch, at: Place, act: Any) -> list[Any]:
    """What stood in the row after each word of the run; ``act`` is called with the stage."""
    seen: list[Any] = []
    honest = job_reads.Run.at

    def word(self: job_reads.Run, stage: str, *arguments: Any, **more: Any) -> None:
        honest(self, stage, *arguments, **more)
        seen.extend(rows(at.engine, JOBS))
        act(stage)

    monkeypatch.setattr(job_reads.Run, "at", word)
    return seen


def cancel(at: Place) -> None:
    job_control.cancel(
        at.engine, at.settings, scalar(at.engine, "select id from wallet.jobs where kind = 'snapshot verify'"), ACT
    )


def test_it_is_among_the_jobs_while_it_runs(at: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    take(at)
    seen = stages(monkeypatch, at, lambda _: None)
    assert verify(at.engine, at.settings, ACT).clean
    assert list(dict.fromkeys(seen)) == [
        ("running", 0, None, "waiting to begin", None),
        ("running", 0, 6, "accounts, 1 of 3", None),
        ("running", 6, 6, "accounts, 1 of 3", None),
        ("running", 6, 6, "system accounts, 2 of 3", None),
        ("running", 6, 6, "rows of the journal, 3 of 3", None),
    ]
    assert rows(at.engine, JOBS) == [("done", 6, 6, "rows of the journal, 3 of 3", None)]
    assert scalar(at.engine, PROOF) is True
    before = rows(at.engine, JOBS)
    verify(at.engine, at.settings, ACT, dry_run=True)
    assert rows(at.engine, JOBS) == before


def test_the_throttle_holds_it_between_its_ranges(at: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    take(at)
    monkeypatch.setattr(throttle, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(job_reads, "_HELD", 0.0)
    seen: list[Any] = []

    def look() -> bool:
        seen.extend(rows(at.engine, JOBS))
        return True

    ANSWERS[:] = [True, "month's end", look, True]
    limits = ThrottleSettings(check="python:test_snapshot_job:quiet", snapshot_seconds=1e-9)
    assert verify(at.engine, at.settings.model_copy(update={"throttle": limits}), ACT).clean
    why = "python:test_snapshot_job:quiet: month's end"
    assert seen == [("running", 0, 6, "accounts, 1 of 3", why)], "no snapshot is open meanwhile, and no limit holds"


@pytest.mark.parametrize("edited", [False, True])
def test_one_that_is_cancelled_keeps_what_it_had_found_and_else_nothing(
    at: Place, monkeypatch: pytest.MonkeyPatch, edited: bool
) -> None:
    take(at)
    assert verify(at.engine, at.settings, ACT).clean
    if edited:
        with unguarded(at.engine, "wallet.snapshot_balances") as superuser:
            superuser.exec_driver_sql("update wallet.snapshot_balances set balance = balance + 1 where account_id > 0")
    stages(monkeypatch, at, lambda stage: cancel(at) if stage.endswith("1 of 3") else None)
    with pytest.raises(JobCancelled):
        verify(at.engine, at.settings, ACT)
    assert scalar(at.engine, PROOF) is not edited
    found = [(one["clean"], "unfinished" in one) for (one,) in rows(at.engine, ACTS)]
    assert found == [(True, False)] + ([(False, True)] if edited else [])


def test_a_statement_of_it_is_ended_when_it_is_cancelled(at: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    take(at)
    monkeypatch.setattr(job_reads, "BEAT_SECONDS", 0.05)
    honest = snapshot_checks._Check._run

    def asleep(self: Any, connection: Any, name: str, **parameters: Any) -> Any:
        if name == "owners":
            cancel(at)
            connection.exec_driver_sql("select pg_sleep(600)")
        return honest(self, connection, name, **parameters)

    monkeypatch.setattr(snapshot_checks._Check, "_run", asleep)
    with pytest.raises(JobCancelled):
        verify(at.engine, at.settings, ACT)


def test_jobs_resume_names_its_command(at: Place, tmp_path: Any) -> None:
    take(at)
    verify(at.engine, at.settings, ACT)
    project = Project(tmp_path, at.settings.database_url.get_secret_value() if at.settings.database_url else "")
    said = project.run("jobs", "resume", scalar(at.engine, "select max(id)::text from wallet.jobs"), "--reason", "x")
    assert (said.exit_code, "walletmigrate snapshot verify" in said.stderr) == (2, True)
