"""Batches that stand in the database: claims, leases, fencing tokens, halves, what is set aside, and their size."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, text

import ledger
from walletmigrate import job_batches, job_claims, job_outages, job_rows, jobs
from walletmigrate.config import Settings
from walletmigrate.errors import JobFailed, PreconditionRefused, UsageError
from walletmigrate.job_batches import Claim
from walletmigrate.job_claims import ClaimLost
from walletmigrate.job_options import Options, parsed
from walletmigrate.job_rows import configure

KIND = "backfill"
KEYS = 16
Ledger = tuple[Engine, Settings]


@pytest.fixture
def made(database_url: str) -> Ledger:
    engine, settings = ledger.install_users(database_url, rows=KEYS)
    ledger.execute(engine, "create table public.seen (key bigint primary key)")
    return engine, settings


def note(connection: Connection, after: str | None, upto: str | None) -> jobs.Batch:
    found = connection.execute(
        text("insert into public.seen select id from public.users where id > :after and id <= :upto"),
        {"after": int(after or 0), "upto": int(upto or KEYS)},
    )
    return jobs.Batch(found.rowcount, found.rowcount, 0, {"noted": found.rowcount})


def poisoned(*keys: int) -> jobs.Step:
    def work(connection: Connection, after: str | None, upto: str | None) -> jobs.Batch:
        batch = note(connection, after, upto)
        for key in keys:
            if int(after or 0) < key <= int(upto or KEYS):
                raise ValueError("poison")
        return batch

    return work


def start(made: Ledger, **settings: Any) -> jobs.Job:
    job = jobs.start_or_resume(*made, KIND, "users", ledger.ACT)
    with made[0].begin() as connection:
        return configure(connection, made[1], job.id, {"batch_size": 4, **settings})


def run(made: Ledger, job: jobs.Job, work: jobs.Step = note, **options: Any) -> jobs.Job:
    return jobs.run_batches(*made, job, work, **options)


def claim(made: Ledger, job: jobs.Job, worker: str) -> Claim:
    with jobs.begin(made[0]) as connection:
        found = job_claims.claim(connection, made[1], job.id, worker)
    assert isinstance(found, Claim), found
    return found


def commit(made: Ledger, claimed: Claim, before: Callable[[], None] = lambda: None) -> jobs.Job:
    """Do the claimed batch, whatever became of it meanwhile."""
    with jobs.begin(made[0]) as connection:
        batch = note(connection, claimed.after, claimed.upto)
        before()
        return job_claims.complete(connection, made[1], claimed, batch, 0.1)


def seen(made: Ledger) -> list[int]:
    return [key for (key,) in ledger.rows(made[0], "select key from public.seen order by key")]


def aside(made: Ledger) -> list[tuple[Any, ...]]:
    query = "select upto_key, error, failed from wallet.job_batches where state = 'set_aside' order by upto_key::int"
    return ledger.rows(made[0], query)


def test_batches_are_cut_one_after_the_other_and_no_two_workers_get_the_same(made: Ledger) -> None:
    job = start(made)
    claims = [claim(made, job, worker) for worker in "abab"]
    assert [(one.after, one.upto, one.keys) for one in claims] == [
        (None, "4", 4),
        ("4", "8", 4),
        ("8", "12", 4),
        ("12", "16", 4),
    ]
    assert [one.token for one in claims] == [1, 2, 3, 4]
    with jobs.begin(made[0]) as connection:
        none = job_claims.claim(connection, made[1], job.id, "a")
    assert isinstance(none, job_claims.NoClaim)
    # The others are at work still: it is not the end.
    assert not none.ended


def test_a_stale_workers_commit_is_refused_by_its_token_and_its_work_rolled_back(made: Ledger) -> None:
    """The lease ends by hand between the worker's claim and its work, as in a machine that was asleep."""
    engine, settings = made
    job = start(made)
    stale = claim(made, job, "stale")
    ledger.execute(engine, "update wallet.job_batches set lease_until = clock_timestamp() - interval '1 s'")
    fresh = claim(made, job, "fresh")
    assert (fresh.number, fresh.after, fresh.upto) == (stale.number, stale.after, stale.upto)
    assert fresh.token > stale.token
    with pytest.raises(ClaimLost), jobs.begin(engine) as connection:
        job_claims.hold(connection, settings, stale)
    with pytest.raises(ClaimLost):
        commit(made, stale)
    assert seen(made) == []
    assert (commit(made, fresh).items_done, seen(made)) == (4, [1, 2, 3, 4])


def test_a_job_that_is_held_says_so_again_and_again_and_not_with_every_question(made: Ledger) -> None:
    engine, settings = made
    job = start(made)

    def hold(reason: str | None, ago: int) -> bool:
        """Whether it was said, ``ago`` seconds after the last time."""
        aged = f"clock_timestamp() - interval '{ago} s'"
        ledger.execute(engine, f"update wallet.jobs set updated_at = {aged}, held_at = coalesce(held_at, {aged})")
        with jobs.begin(engine) as connection:
            job_rows.hold(connection, settings, job.id, reason)
        return bool(ledger.scalar(engine, "select updated_at > clock_timestamp() - interval '4 s' from wallet.jobs"))

    assert hold("replica lag", 30)
    began = ledger.scalar(engine, "select held_at from wallet.jobs")
    assert not hold("replica lag", 5)
    assert hold("replica lag", 11)
    assert ledger.scalar(engine, "select held_at from wallet.jobs") == began, "when it began stays known"
    assert not hold(None, 30), "what goes on commits batches, which say it"


def test_a_claim_that_a_crash_took_back_is_not_mistaken_for_the_one_that_has_its_number_and_token_now(
    made: Ledger,
) -> None:
    engine, settings = made
    stale = claim(made, start(made, batch_size=4), "a")
    for column, key in (("upto_key", "3"), ("after_key", "1")):
        ledger.execute(engine, f"update wallet.job_batches set {column} = '{key}'")
        with pytest.raises(job_claims.ClaimLost), engine.begin() as connection:
            job_claims.hold(connection, settings, stale)
        ledger.execute(engine, "update wallet.job_batches set upto_key = '4', after_key = null")
    with engine.begin() as connection:
        job_claims.hold(connection, settings, stale)


@pytest.mark.parametrize(("ago", "free"), [(30, False), (61, True)])
def test_a_hold_whose_process_is_gone_holds_nobody_else(made: Ledger, ago: int, free: bool) -> None:
    engine, settings = made
    job = start(made)
    with engine.begin() as connection:
        job_rows.hold(connection, settings, job.id, "replica lag")
    ledger.execute(engine, f"update wallet.jobs set updated_at = clock_timestamp() - interval '{ago} s'")
    with jobs.begin(engine) as connection:
        assert isinstance(job_claims.claim(connection, settings, job.id, "other"), Claim) == free


def test_a_worker_whose_batch_was_taken_counts_it_and_goes_on_with_the_next(made: Ledger) -> None:
    job = start(made)
    stolen: list[str] = []

    def work(connection: Connection, after: str | None, upto: str | None) -> jobs.Batch:
        batch = note(connection, after, upto)
        if after == "4" and not stolen:
            stolen.append(after)
            connection.exec_driver_sql("update wallet.job_batches set token = token + 100 where after_key = '4'")
        return batch

    done = run(made, job, work)
    assert (done.state, done.claims_lost, done.items_done) == ("running", 1, KEYS)
    assert seen(made) == list(range(1, KEYS + 1))


def test_a_batch_that_is_worked_on_is_not_taken_however_long_its_lease_is_over(made: Ledger) -> None:
    engine, settings = made
    job = start(made, batch_size=100, lease_seconds=0.0)
    slow = claim(made, job, "slow")
    with jobs.begin(engine) as connection:
        job_claims.hold(connection, settings, slow)
        with jobs.begin(engine) as other:
            found = job_claims.claim(other, settings, job.id, "thief")
            assert isinstance(found, job_claims.NoClaim)
            assert not found.ended
    # As soon as the one that held it is gone, it is free.
    assert claim(made, job, "heir").token > slow.token


def test_a_lost_workers_batch_is_taken_up_when_its_lease_ends(made: Ledger) -> None:
    engine, _ = made
    job = start(made)
    claim(made, job, "killed")
    ledger.execute(engine, "update wallet.job_batches set lease_until = clock_timestamp() + interval '300 ms'")
    done = run(made, job)
    assert (done.items_done, seen(made)) == (KEYS, list(range(1, KEYS + 1)))


def test_a_start_takes_up_what_a_killed_process_had_claimed_without_waiting(made: Ledger) -> None:
    job = start(made, lease_seconds=3600)
    claim(made, job, "killed")
    again = jobs.start_or_resume(*made, KIND, "users", ledger.ACT)
    done = run(made, again)
    assert (done.items_done, seen(made)) == (KEYS, list(range(1, KEYS + 1)))


def test_a_batch_in_flight_of_a_job_that_is_cancelled_is_rolled_back(made: Ledger) -> None:
    engine, settings = made
    held = claim(made, start(made), "late")

    def cancel() -> None:
        with engine.begin() as operator:
            jobs.cancel(operator, settings, KIND, "users", ledger.ACT)

    with pytest.raises(ClaimLost):
        commit(made, held, cancel)
    assert seen(made) == []


@pytest.mark.parametrize("keys", [(1,), (16,), (4, 5), (2, 7, 11)])
def test_a_failing_batch_is_halved_down_to_the_poisonous_rows(made: Ledger, keys: tuple[int, ...]) -> None:
    done = run(made, start(made), poisoned(*keys))
    assert seen(made) == [key for key in range(1, KEYS + 1) if key not in keys]
    assert aside(made) == [(str(key), "poison", 1) for key in keys]
    assert (done.state, done.items_done, done.items_failed) == ("running", KEYS - len(keys), len(keys))


def test_what_was_set_aside_is_tried_again_when_the_job_is_resumed(made: Ledger) -> None:
    job = run(made, start(made), poisoned(3, 9), stop=lambda: len(seen(made)) == 14 and len(aside(made)) == 2)
    assert (job.state, job.items_failed) == ("paused", 2)
    again = jobs.start_or_resume(*made, KIND, "users", ledger.ACT)
    assert again.items_failed == 0
    done = run(made, again)
    assert (done.items_done, done.items_failed, aside(made)) == (KEYS, 0, [])
    assert seen(made) == list(range(1, KEYS + 1))


def test_more_rows_set_aside_than_allowed_fail_the_job(made: Ledger) -> None:
    job = start(made, max_failures=2)
    with pytest.raises(JobFailed, match="3 rows were set aside, more than max-failures=2; the last for: poison"):
        run(made, job, poisoned(2, 6, 10, 14))
    assert len(aside(made)) == 3
    assert ledger.rows(made[0], "select state, items_failed from wallet.jobs") == [("failed", 3)]


def test_a_job_whose_first_batches_all_fail_alike_stops_before_a_row_is_set_aside(made: Ledger) -> None:
    job = start(made, batch_size=16)
    with pytest.raises(JobFailed, match="the first 10 batches failed for the same reason: poison"):
        run(made, job, poisoned(*range(1, KEYS + 1)))
    assert aside(made) == []
    done = run(made, jobs.start_or_resume(*made, KIND, "users", ledger.ACT))
    assert (done.items_done, seen(made)) == (KEYS, list(range(1, KEYS + 1)))


def test_two_threads_split_and_set_aside_each_row_once(made: Ledger) -> None:
    job = start(made)
    with ThreadPoolExecutor(2) as pool:
        ended = list(pool.map(lambda _: run(made, job, poisoned(3, 8, 9)), range(2)))
    assert {one.state for one in ended} == {"running"}
    assert [key for key, *_ in aside(made)] == ["3", "8", "9"]
    assert seen(made) == [key for key in range(1, KEYS + 1) if key not in (3, 8, 9)]


@pytest.mark.parametrize("change", ["functions_version = 0", "updated_at = clock_timestamp() - interval '8 days'"])
def test_a_job_of_other_functions_or_an_old_one_is_resumed_only_by_force(made: Ledger, change: str) -> None:
    engine, settings = made
    job = run(made, start(made), stop=lambda: bool(seen(made)))
    ledger.execute(engine, f"update wallet.jobs set {change}")
    with pytest.raises(PreconditionRefused, match=f"(?s)job {job.id} was .*--force"):
        jobs.start_or_resume(engine, settings, KIND, "users", ledger.ACT)
    assert ledger.scalar(engine, "select state from wallet.jobs") == "paused"
    again = jobs.start_or_resume(engine, settings, KIND, "users", ledger.ACT, force=True)
    assert (again.id, again.resumed) == (job.id, True)


def test_settings_hold_from_the_next_batch_on(made: Ledger) -> None:
    engine, settings = made
    spans: list[tuple[str | None, str | None]] = []

    def work(connection: Connection, after: str | None, upto: str | None) -> jobs.Batch:
        spans.append((after, upto))
        return note(connection, after, upto)

    def halve(job: jobs.Job) -> None:
        with engine.begin() as connection:
            configure(connection, settings, job.id, parsed(["batch-size=2"]))

    run(made, start(made), work, progress=halve)
    assert spans == [(None, "4"), *((str(low), str(low + 2)) for low in range(4, KEYS, 2))]


def test_a_rate_paces_the_batches_of_all_workers_in_the_database(made: Ledger) -> None:
    job = start(made, rate=1, batch_size=100)
    began = time.monotonic()
    first, second = claim(made, job, "a"), claim(made, job, "b")
    passed = time.monotonic() - began
    # One at least; the first at once, the next when the first one's time is over.
    assert (first.keys, second.keys) == (1, 1)
    assert first.delay == 0
    assert 1 - passed <= second.delay <= 1


def test_no_more_than_a_fiftieth_of_a_seconds_worth_is_done_at_once(made: Ledger) -> None:
    assert claim(made, start(made, rate=150, batch_size=100), "a").keys == 3
    assert [Options(rate=400).burst(each, 0) for each in (1, 2, 100)] == [8, 4, 1]
    assert [Options(rate=400).burst(1, behind) for behind in (-1, 0.02, 0.05, 0.1, 9)] == [8, 8, 20, 40, 40]
    assert Options().burst() is None


@pytest.mark.parametrize(("written", "left"), [(2, timedelta()), (0, timedelta(milliseconds=18))])
def test_a_batch_that_took_longer_than_its_share_leaves_what_needed_nothing_and_no_more(
    made: Ledger, written: int, left: timedelta
) -> None:
    """A server that is slow is not asked for more at once. Two accounts at 100 a second are 20 ms, in step 2 ms."""
    first = claim(made, start(made, rate=100, batch_size=100), "a")
    assert first.keys == 2
    ledger.execute(made[0], "update wallet.jobs set paced_until = clock_timestamp() - interval '1 hour'")
    with jobs.begin(made[0]) as connection:
        began = connection.scalar(text("select clock_timestamp()"))
        job_claims.complete(connection, made[1], first, jobs.Batch(2, 2, 0, {}, written), 0.1)
        [(until, ended)] = connection.execute(text("select paced_until, clock_timestamp() from wallet.jobs"))
    assert began <= until + left <= ended


def test_a_batch_is_larger_where_those_before_left_their_time(made: Ledger) -> None:
    job = start(made, rate=100, batch_size=100)
    ledger.execute(made[0], "update wallet.jobs set paced_until = clock_timestamp() - interval '1 hour'")
    assert claim(made, job, "a").keys == 10
    ledger.execute(made[0], "update wallet.jobs set paced_until = clock_timestamp() + interval '0.5 s'")
    assert claim(made, job, "b").keys == 2


@pytest.mark.parametrize(
    ("size", "seconds", "then"),
    [
        (1000, [], 1000),
        (1000, [0.46], 1000),
        (1000, [0.05], 1200),
        (1000, [0.9], 528),
        (1000, [1.0] + [0.475] * 19, 694),
        (120, [5.0], 100),
        (9000, [0.01], 10_000),
        (None, [], 1000),
    ],
)
def test_a_batchs_size_goes_towards_its_target_time(size: int | None, seconds: list[float], then: int) -> None:
    assert Options().size(size, seconds) == pytest.approx(then, abs=2)


def test_the_halves_of_a_batch_that_failed_say_nothing_of_the_size(made: Ledger) -> None:
    """Each is done in no time: after the hunt for one bad row the next batches would be too large."""
    engine, settings = made
    job = start(made, min_batch_size=1)
    whole = claim(made, job, "a")
    with engine.begin() as connection:
        configure(connection, settings, job.id, {"batch_size": None})
        job_batches.fail(connection, settings, whole, "poison")
    for _ in range(2):
        half = claim(made, job, "a")
        assert half.keys == 2
        with engine.begin() as connection:
            job_claims.complete(connection, settings, half, jobs.Batch(2, 2, 0, {}), 0.001)
    again = claim(made, job, "a")
    assert (again.after, again.keys) == ("4", 4)
    with engine.begin() as connection:
        job_claims.complete(connection, settings, again, jobs.Batch(4, 4, 0, {}), 0.001)
    assert claim(made, job, "a").keys == 5


def test_a_batch_size_set_by_hand_is_kept_until_auto(made: Ledger) -> None:
    assert Options(batch_size=7).size(1000, [0.01] * 20) == 7
    assert parsed(["batch-size=auto", "rate=none"]) == {"batch_size": None, "rate": None}


@pytest.mark.parametrize("word", ["batch-size=0", "rate=-1", "rate=fast", "speed=3", "batch-size", "lease-seconds="])
def test_a_setting_that_makes_no_sense_is_refused(word: str) -> None:
    with pytest.raises(UsageError):
        parsed([word])


def test_a_job_that_tunes_itself_grows_its_batches(made: Ledger) -> None:
    job = start(made, batch_size=None, min_batch_size=1, max_batch_size=3, target_seconds=60)
    ledger.execute(made[0], "update wallet.jobs set batch_size = 1")
    run(made, job)
    sizes = [size for (size,) in ledger.rows(made[0], "select keys from wallet.job_batches order by number")]
    assert sizes[:4] == [1, 2, 3, 3]
    assert seen(made) == list(range(1, KEYS + 1))


def test_attempts_are_counted_where_the_batch_stands(made: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_outages, "_LONGEST_PAUSE", 0.001)
    left = iter(range(3))

    def work(connection: Connection, after: str | None, upto: str | None) -> jobs.Batch:
        if after == "4" and next(left, None) is not None:
            connection.exec_driver_sql("do $$ begin raise 'deadlock' using errcode = '40P01'; end $$")
        return note(connection, after, upto)

    run(made, start(made), work)
    attempts = ledger.rows(made[0], "select after_key, attempts from wallet.job_batches order by number")
    assert attempts == [(None, 1), ("4", 4), ("8", 1), ("12", 1)]
