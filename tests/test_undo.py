"""A backfill taken back: reversals for its openings, as long as no other transaction stands on them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from decimal import Decimal

import pytest

import ledger
from adapting import Place, place
from walletmigrate import job_control, jobs
from walletmigrate.backfill import backfill
from walletmigrate.errors import PreconditionRefused, UsageError
from walletmigrate.freeze import freeze
from walletmigrate.undo import KIND, undo
from walletmigrate.verify import verify

D = Decimal
ACT = ledger.ACT


@pytest.fixture
def made(database_url: str) -> Place:
    return place(database_url, rows=10, coins="case when g = 9 then 0 when g = 8 then -3 else 100 end", with_promo=True)


def filled(made: Place) -> int:
    job = backfill(made.engine, made.settings, made.mapping, ACT).job_id
    assert job is not None
    return job


def system(made: Place) -> dict[str, Decimal]:
    found = ledger.rows(made.engine, "select name, balance from wallet.system_balances")
    return {str(name): balance for name, balance in found}


def test_openings_are_reversed_and_a_new_backfill_opens_the_same_again(made: Place) -> None:
    job = filled(made)
    before = system(made)
    done = undo(made.engine, made.settings, job, ACT, batch_size=3)
    assert (done.undone, done.left_count, done.undone_before, done.state) == (20, 0, 0, "done")
    assert set(system(made).values()) == {D(0)}
    assert (made.account(1), made.account(8), made.account(9)) == (("stale", D(0)),) * 3
    kinds = "select kind::text, count(*) from wallet.transactions group by kind order by kind"
    assert ledger.rows(made.engine, kinds) == [("opening", 19), ("reversal", 19)]
    assert ledger.rows(
        made.engine, "select distinct actor, reason, job_id from wallet.transactions where kind = 'reversal'"
    ) == [(ACT.actor, ACT.reason, done.job_id)]
    made.check()
    again = backfill(made.engine, made.settings, made.mapping, ACT)
    assert (again.opened, again.resynced) == (0, 20)
    assert system(made) == before, "the money comes from opening again, not from a bypass that never was"
    assert (made.account(1), made.account(8), made.account(9)) == (
        ("mirrored", D(100)),
        ("mirrored", D(-3)),
        ("mirrored", D(0)),
    )
    made.check()
    assert verify(made.engine, made.settings, made.mapping, ACT).clean


def test_the_next_posting_brings_a_taken_back_account_up_from_opening_too(made: Place) -> None:
    undo(made.engine, made.settings, filled(made), ACT)
    last = made.last_id()
    with made.engine.begin() as connection:
        assert made.adapter.credit(connection, 1, 5, type="deposit").ledger_balance == 105
    assert made.legs(last) == [("resync", "opening", "1", D(100)), ("posting", "external", "1", D(5))]
    made.check()


def test_an_account_with_later_transactions_is_listed_and_left(made: Place) -> None:
    job = filled(made)
    with made.engine.begin() as connection:
        made.adapter.transfer(connection, 1, 9, 5, type="gift")
        made.adapter.credit(connection, 8, 5, type="deposit")
    done = undo(made.engine, made.settings, job, ACT)
    assert {(one.key, one.bucket, one.why) for one in done.left} == {
        (key, "cash", "later transactions stand on it") for key in ("1", "8", "9")
    }
    assert (made.account(1), made.account(9), made.account(2)) == (
        ("mirrored", D(95)),
        ("mirrored", D(5)),
        ("stale", D(0)),
    )
    made.check()


def test_done_twice_it_changes_nothing_the_second_time(made: Place) -> None:
    job = filled(made)
    undo(made.engine, made.settings, job, ACT)
    before = ledger.journal(made.engine)
    again = undo(made.engine, made.settings, job, ACT)
    assert (again.undone, again.undone_before, again.left_count) == (0, 20, 0)
    assert ledger.journal(made.engine) == before
    backfill(made.engine, made.settings, made.mapping, ACT)
    before = ledger.journal(made.engine)
    assert undo(made.engine, made.settings, job, ACT).undone == 0
    assert ledger.journal(made.engine) == before


def test_stopped_after_a_batch_it_goes_on_where_it_was(made: Place) -> None:
    job = filled(made)
    asked = iter([False, True])
    first = undo(made.engine, made.settings, job, ACT, batch_size=4, stop=lambda: next(asked))
    assert (first.state, first.undone) == ("paused", 4)
    second = undo(made.engine, made.settings, job, ACT)
    assert (second.job_id, second.undone, second.undone_before) == (first.job_id, 20, 0)
    made.check()


def test_the_unfinished_undo_of_another_backfill_is_not_taken_up_in_its_place(made: Place) -> None:
    first = filled(made)
    ledger.add_users(made.engine, 11, 12)
    second = filled(made)
    asked = iter([False, True])
    paused = undo(made.engine, made.settings, first, ACT, batch_size=4, stop=lambda: next(asked))
    before = ledger.rows(made.engine, "select * from wallet.jobs order by id"), ledger.journal(made.engine)
    with pytest.raises(PreconditionRefused, match=f"undo of backfill {first}, is paused") as refused:
        undo(made.engine, made.settings, second, ACT)
    assert f"walletmigrate backfill undo --job {first} " in str(refused.value)
    assert f"walletmigrate jobs cancel {paused.job_id} " in str(refused.value)
    assert (ledger.rows(made.engine, "select * from wallet.jobs order by id"), ledger.journal(made.engine)) == before
    assert undo(made.engine, made.settings, second, ACT, dry_run=True).undone == 4
    assert undo(made.engine, made.settings, first, ACT).job_id == paused.job_id
    done = undo(made.engine, made.settings, second, ACT)
    assert (done.undone, done.job_id != paused.job_id) == (4, True)
    details = "select id, (details ->> 'of')::bigint from wallet.jobs where kind = 'backfill undo' order by id"
    assert ledger.rows(made.engine, details) == [(paused.job_id, first), (done.job_id, second)]
    made.check()


def test_of_two_undos_begun_at_once_the_second_is_refused_and_names_the_first(made: Place) -> None:
    first = filled(made)
    ledger.add_users(made.engine, 11, 12)
    second = filled(made)
    engine = ledger.engine_named(made.settings.database_url.get_secret_value(), "undo")  # type: ignore[union-attr]
    refused: list[Exception] = []

    def begin() -> None:
        try:
            undo(engine, made.settings, second, ACT)
        except PreconditionRefused as error:
            refused.append(error)

    with made.engine.connect() as connection:
        job = jobs.started(connection, made.settings, KIND, "users", ACT, details={"of": first})
        worker = threading.Thread(target=begin)
        worker.start()
        ledger.until_blocked(made.engine, "undo")
        connection.commit()
    worker.join()
    assert [f"job {job.id}, the undo of backfill {first}, is running" in str(error) for error in refused] == [True]
    details = "select id, details from wallet.jobs where kind = 'backfill undo'"
    assert ledger.rows(made.engine, details) == [(job.id, {"of": first})]
    assert undo(made.engine, made.settings, first, ACT).job_id == job.id
    assert undo(made.engine, made.settings, second, ACT).undone == 4
    made.check()


@pytest.mark.parametrize(
    ("hand", "state"), [(job_control.cancel, "cancelled"), (job_control.pause, "paused")], ids=["cancel", "pause"]
)
def test_once_another_process_took_the_job_out_of_work_nothing_more_is_undone_and_its_state_is_told(
    made: Place, hand: Callable[..., object], state: str
) -> None:
    job = filled(made)
    asked = iter([False, True])

    def taken() -> bool:
        if next(asked):
            newest = ledger.scalar(made.engine, "select max(id) from wallet.jobs")
            hand(made.engine, made.settings, newest, ACT)
        return False

    done = undo(made.engine, made.settings, job, ACT, batch_size=4, stop=taken)
    assert (done.state, done.undone) == (state, 4)
    stale = "select count(*) from wallet.accounts where state = 'stale'"
    assert ledger.scalar(made.engine, stale) == 4
    assert ledger.rows(made.engine, "select action from wallet.audit_log where action = 'backfill undo done'") == []
    again = undo(made.engine, made.settings, job, ACT)
    # The same job goes on behind its last account; a new one meets those accounts again.
    assert (again.state, again.undone, again.undone_before) == ("done", *((20, 0) if state == "paused" else (16, 4)))
    assert (again.job_id == done.job_id) == (state == "paused")
    made.check()


def test_a_cancellation_after_the_last_batch_is_told_too(made: Place) -> None:
    job = filled(made)

    def cancelled_then(now: jobs.Job) -> None:
        job_control.cancel(made.engine, made.settings, now.id, ACT)

    done = undo(made.engine, made.settings, job, ACT, progress=cancelled_then)
    assert (done.state, done.undone) == ("cancelled", 20)


def test_a_dry_run_counts_and_changes_nothing(made: Place) -> None:
    job = filled(made)
    with made.engine.begin() as connection:
        made.adapter.credit(connection, 1, 5, type="deposit")
    before = ledger.journal(made.engine)
    done = undo(made.engine, made.settings, job, ACT, dry_run=True)
    assert (done.undone, done.left_count, done.job_id) == (19, 1, None)
    assert ledger.journal(made.engine) == before


def test_a_posting_that_is_first_keeps_its_account_and_the_undo_waits_for_it(made: Place) -> None:
    job = filled(made)
    engine = ledger.engine_named(made.settings.database_url.get_secret_value(), "undo")  # type: ignore[union-attr]
    results: list[int] = []
    with made.engine.connect() as connection:
        made.adapter.credit(connection, 1, 5, type="deposit")
        worker = threading.Thread(target=lambda: results.append(undo(engine, made.settings, job, ACT).left_count))
        worker.start()
        ledger.until_blocked(made.engine, "undo")
        connection.commit()
    worker.join()
    assert (results, made.account(1)) == ([1], ("mirrored", D(105)))
    made.check()


def test_a_frozen_account_is_left_and_a_closed_one_stays_closed(made: Place) -> None:
    job = filled(made)
    ledger.execute(made.engine, "delete from public.users where id = 2")
    ledger.set_phase(made.engine, "frozen")
    freeze(made.engine, made.settings, made.mapping, ACT)
    done = undo(made.engine, made.settings, job, ACT)
    assert (done.undone, {one.why for one in done.left}) == (2, {"frozen: the ledger alone is true"})
    assert made.account(2) == ("closed", D(0))
    made.check()


def test_a_resync_of_the_same_backfill_is_no_opening_and_what_was_opened_at_nothing_is_left(made: Place) -> None:
    """Its last pass goes over rows that were written past the adapter meanwhile."""
    job = filled(made)
    ledger.execute(made.engine, "update public.users set total_coins = 5 where id = 9")
    ledger.execute(made.engine, "select wallet.late_users(null, null, :job)", job=job)
    legs = "select t.kind::text, t.job_id from wallet.transactions as t order by id desc limit 1"
    assert (ledger.rows(made.engine, legs), made.account(9)) == ([("resync", job)], ("mirrored", D(5)))
    done = undo(made.engine, made.settings, job, ACT)
    assert [(one.key, one.bucket, one.why) for one in done.left] == [("9", "cash", "later transactions stand on it")]
    assert made.account(9) == ("mirrored", D(5))
    made.check()


def test_a_batch_goes_on_behind_the_last_account_and_stays_in_its_mapping(made: Place) -> None:
    job = filled(made)
    query = "select account from wallet.undo_openings(:mapping, :job, null, :after, 3, 'a', 'r', true)"
    ids = [number for (number,) in ledger.rows(made.engine, "select id from wallet.accounts order by id")]

    def batch(after: int, mapping: str = "users") -> list[int]:
        return [found for (found,) in ledger.rows(made.engine, query, mapping=mapping, job=job, after=after)]

    assert [batch(0), batch(ids[2]), batch(ids[-2]), batch(ids[-1])] == [ids[:3], ids[3:6], ids[-1:], []]
    assert batch(0, "another") == []


def test_only_a_backfill_that_is_at_rest_can_be_taken_back(made: Place) -> None:
    job = filled(made)
    with pytest.raises(UsageError, match="999 is no job"):
        undo(made.engine, made.settings, 999, ACT)
    ledger.execute(made.engine, "update wallet.jobs set state = 'running' where id = :id", id=job)
    with pytest.raises(PreconditionRefused, match="is running"):
        undo(made.engine, made.settings, job, ACT)
    ledger.execute(made.engine, "update wallet.jobs set kind = 'freeze' where id = :id", id=job)
    with pytest.raises(UsageError, match="is a freeze"):
        undo(made.engine, made.settings, job, ACT)
