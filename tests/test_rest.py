"""What a job did is taken back when nothing more is done for it: a batch at work is waited for, others do not begin."""

from __future__ import annotations

import threading
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import Engine

from adapting import Place, place
from ledger import ACT, engine_named, execute, journal, rows, scalar, until_blocked
from test_reconcile import World, world
from walletmigrate import backfill as backfill_module
from walletmigrate import job_batches, job_claims, job_control, job_rows, jobs, reconciliations
from walletmigrate.errors import PreconditionRefused
from walletmigrate.job_batches import Claim
from walletmigrate.truths import Truth, asked
from walletmigrate.undo import KIND, undo

__all__ = ["world"]

D = Decimal
KEYS = 8


@pytest.fixture
def made(database_url: str) -> Place:
    return place(database_url, rows=KEYS)


def named(at: Place | World, name: str = "undo", lock_timeout_ms: int = 30_000) -> Engine:
    """Other sessions than the job's, which wait so long for a lock."""
    url = at.settings.database_url
    assert url is not None
    return engine_named(url.get_secret_value(), name, lock_timeout_ms=lock_timeout_ms)


def begun(made: Place, **options: Any) -> jobs.Job:
    job = jobs.start_or_resume(made.engine, made.settings, "backfill", "users", ACT)
    with made.engine.begin() as connection:
        return job_rows.configure(connection, made.settings, job.id, {"batch_size": 4, **options})


def claim(made: Place, job: jobs.Job) -> Claim:
    with jobs.begin(made.engine) as connection:
        found = job_claims.claim(connection, made.settings, job.id, "a worker")
    assert isinstance(found, Claim), found
    return found


def batches(made: Place) -> list[tuple[Any, ...]]:
    return rows(made.engine, "select number, state from wallet.job_batches order by number")


def acting(second: Callable[[int], None], world: World) -> Truth:
    """101 for everybody; ``second`` is called with the run's number while the second account is asked for."""
    met: list[str] = []

    def source(key: str, _bucket: str, _currency: str) -> Decimal:
        met.append(key)
        if key == "2" and met.count(key) == 1:
            second(int(scalar(world.engine, "select max(id) from wallet.jobs where kind = 'reconcile'")))
        return D(101)

    return asked(source, "a function")


def refused_at_work(world: World, run: int) -> str:
    """What an undo says that does not wait for long."""
    with pytest.raises(PreconditionRefused) as refused:
        reconciliations.undo(named(world, lock_timeout_ms=50), world.settings, run, ACT)
    return str(refused.value)


def test_a_reconciliation_that_was_cancelled_corrects_no_other_account_and_is_undone_after_that(world: World) -> None:
    said: list[str] = []

    def cancel_then_undo(run: int) -> None:
        job_control.cancel(world.engine, world.settings, run, ACT)
        said.append(refused_at_work(world, run))

    made = world.reconcile(acting(cancel_then_undo, world))
    assert made.run is not None
    assert [f"a batch of job {made.run} is still at work" in one for one in said] == [True]
    assert [f"walletmigrate jobs show {made.run}" in one for one in said] == [True]
    assert made.state == "cancelled"
    assert scalar(world.engine, "select count(*) from wallet.jobs where kind = 'reconcile undo'") == 0
    assert [one["key"] for one in world.audited()] == ["1", "2"], "the account at hand, and none behind it"
    done = reconciliations.undo(world.engine, world.settings, made.run, ACT)
    assert (done.undone, done.undone_before, done.left, done.open, done.state) == (2, 0, (), 0, "done")
    assert {world.account(key) for key in range(1, 11)} == {("mirrored", D(100), D(100))}


def test_a_reconciliation_that_was_paused_brings_its_batch_to_its_end_and_is_undone_after_that(world: World) -> None:
    said: list[str] = []

    def pause_then_undo(run: int) -> None:
        job_control.pause(world.engine, world.settings, run, ACT)
        said.append(refused_at_work(world, run))

    made = world.reconcile(acting(pause_then_undo, world), batch_size=4)
    assert made.run is not None
    assert [f"a batch of job {made.run} is still at work" in one for one in said] == [True]
    assert (made.state, made.counts["corrected"], len(world.audited())) == ("paused", 4, 4)
    done = reconciliations.undo(world.engine, world.settings, made.run, ACT)
    assert (done.undone, done.open, done.state) == (4, 0, "done")
    assert {world.account(key) for key in range(1, 11)} == {("mirrored", D(100), D(100))}


def test_an_undo_that_waits_for_a_batch_takes_back_what_the_batch_corrected_meanwhile(world: World) -> None:
    results: list[reconciliations.Undo] = []
    threads: list[threading.Thread] = []

    def pause_and_undo_beside(run: int) -> None:
        job_control.pause(world.engine, world.settings, run, ACT)

        def beside() -> None:
            results.append(reconciliations.undo(named(world), world.settings, run, ACT))

        threads.append(threading.Thread(target=beside))
        threads[0].start()
        until_blocked(world.engine, "undo")

    made = world.reconcile(acting(pause_and_undo_beside, world), batch_size=4)
    threads[0].join()
    (done,) = results
    assert scalar(world.engine, "select state from wallet.jobs where id = :run", run=made.run) == "cancelled"
    assert len(world.audited()) == 4
    assert (done.undone, done.open, done.state) == (4, 0, "done")
    total = scalar(world.engine, "select items_total from wallet.jobs where id = :run", run=done.run)
    assert total == 4, "counted when nothing more came"


def test_an_account_is_not_corrected_when_its_batch_was_lost_while_the_truth_was_asked(world: World) -> None:
    """As it is after a minute: the batch's session has stood idle, nothing holds its row, and the run is taken back."""
    done: list[reconciliations.Undo] = []

    def lose_then_undo(run: int) -> None:
        job_control.pause(world.engine, world.settings, run, ACT)
        ended = "select pg_terminate_backend(pid, 10000) from pg_stat_activity where state = 'idle in transaction'"
        assert rows(world.engine, f"{ended} and datname = current_database()") == [(True,)]
        done.append(reconciliations.undo(named(world, lock_timeout_ms=50), world.settings, run, ACT))

    made = world.reconcile(acting(lose_then_undo, world), batch_size=4)
    assert [(one.undone, one.state) for one in done] == [(1, "done")]
    assert (made.state, [one["key"] for one in world.audited()]) == ("cancelled", ["1"])
    assert {world.account(key) for key in range(1, 11)} == {("mirrored", D(100), D(100))}


def test_a_reconciliation_that_was_undone_is_not_gone_on_with(world: World) -> None:
    stops = iter([False])
    truth = asked(lambda *_: D(101), "a function")
    part = world.reconcile(truth, batch_size=4, stop=lambda: next(stops, True))
    assert part.run is not None
    assert (part.state, part.counts["corrected"]) == ("paused", 4)
    planned = reconciliations.undo(world.engine, world.settings, part.run, ACT, dry_run=True)
    state = "select state from wallet.jobs where id = :run"
    assert (planned.undone, scalar(world.engine, state, run=part.run)) == (4, "paused")
    assert reconciliations.undo(world.engine, world.settings, part.run, ACT).undone == 4
    assert scalar(world.engine, state, run=part.run) == "cancelled"
    whole = world.reconcile(truth, batch_size=4)
    assert (whole.resumed, whole.state, whole.counts["corrected"]) == (False, "done", 10)
    assert {world.account(key) for key in range(1, 11)} == {("mirrored", D(101), D(101))}


def test_an_undo_of_a_run_at_work_is_refused_for_that_before_it_waits_for_anything(world: World) -> None:
    said: list[str] = []
    made = world.reconcile(acting(lambda run: said.append(refused_at_work(world, run)), world))
    assert [f"run {made.run} is at work" in one and "a batch of" not in one for one in said] == [True]
    assert (made.state, made.counts["corrected"]) == ("done", 10)


def test_a_dry_run_of_an_undo_waits_for_no_batch_and_takes_no_claim(world: World) -> None:
    planned: list[reconciliations.Undo] = []

    def pause_and_look(run: int) -> None:
        job_control.pause(world.engine, world.settings, run, ACT)
        engine = named(world, lock_timeout_ms=50)
        planned.append(reconciliations.undo(engine, world.settings, run, ACT, dry_run=True))

    assert world.reconcile(acting(pause_and_look, world), batch_size=4).state == "paused"
    assert [(one.undone, one.state) for one in planned] == [(1, "planned")]


def test_a_batch_that_was_claimed_before_a_pause_does_not_begin_after_it(made: Place) -> None:
    """It sleeps for its rate between the two."""
    job = begun(made)
    late = claim(made, job)
    job_control.pause(made.engine, made.settings, job.id, ACT)
    with pytest.raises(job_claims.AtRest), jobs.begin(made.engine) as connection:
        job_claims.hold(connection, made.settings, late)
    done = undo(made.engine, made.settings, job.id, ACT)
    assert (done.undone, done.left_count, done.state) == (0, 0, "done")
    with pytest.raises(job_claims.AtRest), jobs.begin(made.engine) as connection:
        job_claims.hold(connection, made.settings, late)
    assert batches(made) == [(1, "pending")]


def test_a_batch_that_wants_to_begin_while_an_undo_takes_its_claim_is_refused(made: Place) -> None:
    """It has seen the job run, and waits for the lock of the batch's row: only that row is looked at anew."""
    job = begun(made)
    late = claim(made, job)
    refused: list[BaseException] = []

    def begin() -> None:
        try:
            with jobs.begin(named(made, "worker")) as connection:
                job_claims.hold(connection, made.settings, late)
        except job_claims.ClaimLost as error:
            refused.append(error)

    worker = threading.Thread(target=begin)
    with made.engine.begin() as undoing:
        undoing.exec_driver_sql("select from wallet.job_batches for no key update")
        worker.start()
        until_blocked(made.engine, "worker")
        job_control.pause(made.engine, made.settings, job.id, ACT)
        undoing.exec_driver_sql(
            "update wallet.job_batches set state = 'pending', lease_until = null where state = 'claimed'"
        )
    worker.join()
    assert [type(one) for one in refused] == [job_claims.AtRest]


@pytest.mark.parametrize(
    ("act", "state"), [(job_control.pause, "paused"), (job_control.cancel, "cancelled"), (None, "failed")]
)
def test_a_worker_gives_back_what_it_may_not_begin_and_counts_no_lost_claim(
    made: Place, monkeypatch: pytest.MonkeyPatch, act: Any, state: str
) -> None:
    job = begun(made)
    honest = job_claims.hold

    def later(connection: Any, settings: Any, claimed: Claim) -> None:
        if act is None:
            jobs.leave(made.engine, made.settings, job, "failed", "another worker's reason")
        else:
            act(made.engine, made.settings, job.id, ACT)
        honest(connection, settings, claimed)

    monkeypatch.setattr(job_claims, "hold", later)
    main, _ = backfill_module.steps(made.settings, made.mapping, job.id)
    ended = jobs.run_batches(made.engine, made.settings, job, main)
    assert (ended.state, ended.claims_lost, ended.items_done) == (state, 0, 0)
    assert batches(made) == [(1, "pending")]
    assert journal(made.engine) == []


@pytest.mark.parametrize("state", ["paused", "failed"])
def test_a_backfill_is_taken_back_when_the_batch_that_was_at_work_has_ended(made: Place, state: str) -> None:
    job = begun(made)
    late, never = claim(made, job), claim(made, job)
    main, _ = backfill_module.steps(made.settings, made.mapping, job.id)
    with jobs.begin(made.engine) as worker:
        job_claims.hold(worker, made.settings, late)
        batch = main(worker, late.after, late.upto)
        jobs.leave(made.engine, made.settings, job, state)
        with pytest.raises(PreconditionRefused, match=f"a batch of job {job.id} is still at work"):
            undo(named(made, lock_timeout_ms=50), made.settings, job.id, ACT)
        assert undo(named(made, lock_timeout_ms=50), made.settings, job.id, ACT, dry_run=True).state == "planned"
        assert scalar(made.engine, "select count(*) from wallet.jobs where kind = :kind", kind=KIND) == 0
        job_claims.complete(worker, made.settings, late, batch, 0.1)
    done = undo(made.engine, made.settings, job.id, ACT)
    assert (done.undone, done.left_count, done.stale, done.state) == (4, 0, 4, "done")
    with pytest.raises(job_claims.ClaimLost), jobs.begin(made.engine) as connection:
        job_claims.hold(connection, made.settings, never)
    assert rows(made.engine, "select distinct state::text, balance from wallet.accounts") == [("stale", 0)]
    made.check()


def test_who_waits_for_a_batch_at_work_stands_in_no_other_workers_way(made: Place) -> None:
    """A worker that gives its batch back has the job's lock, which the batch at work needs for its end."""
    job = begun(made)
    back, late = claim(made, job), claim(made, job)
    waiting = threading.Thread(target=lambda: job_batches.rest(named(made), made.settings, job.id, KIND))
    with jobs.begin(made.engine) as worker:
        job_claims.hold(worker, made.settings, late)
        job_control.pause(made.engine, made.settings, job.id, ACT)
        waiting.start()
        until_blocked(made.engine, "undo")
        with jobs.begin(named(made, "other", lock_timeout_ms=50)) as other:
            job_claims.give_back(other, made.settings, back)
        job_claims.complete(worker, made.settings, late, jobs.Batch(4, 4, 0, {}), 0.1)
    waiting.join()
    assert batches(made) == [(1, "pending"), (2, "done")]


def test_another_failure_than_that_of_a_lock_is_told_as_it_is(made: Place) -> None:
    job = begun(made)
    claim(made, job)
    execute(made.engine, "alter table wallet.job_batches add constraint odd check (state <> 'pending')")
    with pytest.raises(Exception, match="odd"):
        job_batches.rest(made.engine, made.settings, job.id, KIND)
