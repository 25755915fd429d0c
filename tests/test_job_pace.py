"""The rate of a job while it runs: another one holds at once, and no slow one keeps a worker from its operator."""

from __future__ import annotations

import math
import time
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import text

import ledger
from test_job_batches import KEYS, Ledger, made, note, seen, start
from walletmigrate import job_claims, job_control, job_rows, job_work, jobs
from walletmigrate.backfill import backfill
from walletmigrate.job_batches import Claim
from walletmigrate.job_claims import NoClaim

__all__ = ["made"]

UNTIL = "select paced_until from wallet.jobs"
SPANS = "select after_key, upto_key, keys, state from wallet.job_batches order by number"


def claim(made: Ledger, job: jobs.Job) -> Claim | NoClaim:
    with jobs.begin(made[0]) as connection:
        return job_claims.claim(connection, made[1], job.id, "tests")


def configure(made: Ledger, job: jobs.Job, **options: Any) -> None:
    with jobs.begin(made[0]) as connection:
        job_rows.configure(connection, made[1], job.id, options)


def test_a_rate_without_room_gives_no_claim_and_another_rate_holds_at_once(made: Ledger) -> None:
    job = start(made, rate=0.1)
    assert isinstance(claim(made, job), Claim)
    later = claim(made, job)
    assert isinstance(later, NoClaim)
    assert (later.paced, later.ended) == (True, False)
    configure(made, job, max_failures=5)
    assert isinstance(claim(made, job), NoClaim)
    configure(made, job, rate=1000)
    now = claim(made, job)
    assert isinstance(now, Claim)
    assert now.delay == 0


@pytest.mark.parametrize(
    ("in_pass", "keys", "written", "seconds"),
    [
        (1, 1, None, 1000),  # all of its keys
        (1, 1, 1, 1000),
        (1, 1, 0, 100),  # ten that needed nothing are as one that is written
        (2, 10, 0, 1000),  # of a last pass ten times as many rows are looked at
        (2, 10, 10, 10_000),  # and what it writes it pays for afterwards
    ],
)
def test_what_a_batch_wrote_is_what_it_has_used_of_its_rate(
    made: Ledger, in_pass: int, keys: int, written: int | None, seconds: int
) -> None:
    engine, settings = made
    job = start(made, rate=0.001)
    with jobs.begin(engine) as connection:
        connection.execute(text("update wallet.jobs set pass = :pass"), {"pass": in_pass})
        first = job_claims.claim(connection, settings, job.id, "tests", passes=2)
        assert isinstance(first, Claim)
        assert first.keys == keys
        before = connection.scalar(text(UNTIL))
        job_claims.complete(connection, settings, first, jobs.Batch(keys, keys, 0, {}, written), 0.001)
        # What is charged first is one key: of the main pass, or for ten of the last one.
        assert connection.scalar(text(UNTIL)) - before == timedelta(seconds=seconds - 1000)


def test_a_backfill_that_finds_every_account_in_step_waits_for_a_tenth(
    made: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, settings = made
    mapping = settings.mapping()
    ledger.execute(engine, "update wallet.control set phase = 'dual_write'")
    assert backfill(engine, settings, mapping, ledger.ACT, rate=math.inf).opened == KEYS
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        time.sleep(seconds)

    monkeypatch.setattr(job_work, "time", SimpleNamespace(sleep=sleep, monotonic=time.monotonic))
    assert backfill(engine, settings, mapping, ledger.ACT, rate=2).state == "done"
    assert sum(slept) < KEYS / 2 / 2


@pytest.mark.parametrize(("act", "state"), [(job_control.cancel, "cancelled"), (job_control.pause, "paused")])
def test_a_worker_that_waits_for_its_rate_hears_its_operator(
    made: Ledger, monkeypatch: pytest.MonkeyPatch, act: Any, state: str
) -> None:
    """It waits for moments, not for as long as the rate would have it, and holds no batch meanwhile."""
    job = start(made, rate=0.1)
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 3:
            act(*made, job.id, ledger.ACT)

    monkeypatch.setattr(job_work, "time", SimpleNamespace(sleep=sleep, monotonic=time.monotonic))
    assert jobs.run_batches(*made, job, note).state == state
    assert max(slept) <= 0.25
    assert [row[3] for row in ledger.rows(made[0], SPANS)] == ["done"]


def test_a_batch_that_was_cut_before_the_rate_is_taken_up_in_parts(made: Ledger) -> None:
    """No more at once than its burst, also of what was cut, and lost, when nobody had set a rate."""
    job = start(made, batch_size=10, lease_seconds=1)
    lost = claim(made, job)
    assert isinstance(lost, Claim)
    ledger.execute(made[0], "update wallet.job_batches set lease_until = clock_timestamp()")
    configure(made, job, rate=200)
    taken = claim(made, job)
    assert isinstance(taken, Claim)
    assert (taken.after, taken.upto, taken.keys) == (None, "4", 4)
    assert ledger.rows(made[0], SPANS) == [("4", "10", 6, "pending"), (None, "4", 4, "claimed")]
    with pytest.raises(job_claims.ClaimLost), jobs.begin(made[0]) as connection:
        job_claims.hold(connection, made[1], lost)
    configure(made, job, rate=None)
    with jobs.begin(made[0]) as connection:
        job_claims.give_back(connection, made[1], taken)
    assert jobs.run_batches(*made, job, note).items_done == KEYS
    assert seen(made) == list(range(1, KEYS + 1))
