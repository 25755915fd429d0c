"""Runs of reconcile: cut short and gone on with, on record, taken back; and the truth out of a file."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection

from findings import assert_told
from interleaving import PATIENCE_SECONDS
from ledger import ACT, add_users, engine_named, execute, rows, scalar, set_phase, until_blocked, users_settings
from test_reconcile import BY, World, told, told_of, world
from walletmigrate import audit, corrections, doctor, job_claims, job_control, jobs, reconciliations, settling, truths
from walletmigrate import reconcile as reconcile_module
from walletmigrate.adapter import LegacyBalanceAdapter
from walletmigrate.audit import Act
from walletmigrate.backfill import backfill
from walletmigrate.errors import PreconditionRefused, UnreadableInput, UsageError
from walletmigrate.facts import read_facts
from walletmigrate.flags import DUAL_WRITE, StaticSource
from walletmigrate.freeze import freeze, unfreeze
from walletmigrate.reconcile import Limits, Reconciliation
from walletmigrate.survey import inspect_mapping
from walletmigrate.truths import LEDGER, LEGACY, Truth, asked
from walletmigrate.verify import verify

__all__ = ["world"]

D = Decimal
MAPPING = users_settings("postgresql://localhost/none").mappings[0]
BACK = Act("user:ben", "CHG-8: the file was of another day")


def undo(world: World, run: int | None, **options: Any) -> reconciliations.Undo:
    assert run is not None
    return reconciliations.undo(world.engine, world.settings, run, BACK, **options)


def balances_told(world: World, made: Reconciliation, key: str) -> tuple[D | None, D | None]:
    """Legacy and ledger, as a reversal of the account's correction is told that they are after the undo."""
    adapter = LegacyBalanceAdapter(world.settings, StaticSource({DUAL_WRITE: True}))
    (number,) = [one.transaction_id or 0 for one in made.items if one.key == key]
    with world.engine.begin() as connection:
        replay = adapter.reverse(connection, number, reason="by hand")
    assert replay.replayed
    kept = (
        "select balances[1], balances[2] from wallet.idempotency_keys where key = 'walletmigrate:reversal:' || :number"
    )
    # As of the one who pays back what the correction brought.
    assert rows(world.engine, kept, number=number) == [(replay.legacy_balance, replay.ledger_balance)]
    return replay.legacy_balance, replay.ledger_balance


def read(world: World, folder: Path, content: str) -> Truth:
    path = folder / "truth.csv"
    path.write_text(content, encoding="utf-8")
    mapping = world.settings.mappings[0]
    with world.engine.connect() as connection:
        return truths.read(path, mapping, inspect_mapping(connection, mapping).key_type)


def test_a_run_that_is_cut_short_corrects_nothing_twice(world: World) -> None:
    """Between its two parts money moves: compared anew, the deposits would be taken away again."""
    asked_for: list[str] = []

    def source(key: str, _bucket: str, _currency: str) -> Decimal:
        asked_for.append(key)
        if asked_for == ["1", "2", "3", "4", "5"]:
            raise KeyboardInterrupt
        return D(101)

    truth = asked(source, "a function")
    with pytest.raises(KeyboardInterrupt):
        world.reconcile(truth, batch_size=3)
    # Accounts 1 to 3 are a committed batch; 4 is corrected, but its batch was lost.
    done = "select max(upto_key) from wallet.job_batches as b join wallet.jobs as j on j.id = b.job_id "
    assert scalar(world.engine, done + "where j.kind = 'reconcile' and b.state = 'done'") == "3"
    adapter = LegacyBalanceAdapter(world.settings, StaticSource({DUAL_WRITE: True}))
    with world.engine.begin() as connection:
        for key in (1, 4):
            adapter.credit(connection, key, D("0.50"), type="deposit")
    made = world.reconcile(truth, batch_size=3)
    assert (made.resumed, made.counts["corrected"], made.counts["in_order"]) == (True, 10, 0)
    assert [world.account(key) for key in (1, 4, 5)] == [
        ("mirrored", D("101.50"), D("101.50")),
        ("mirrored", D("101.50"), D("101.50")),
        ("mirrored", D(101), D(101)),
    ]
    assert len(world.audited()) == 10


def test_a_run_that_is_killed_at_its_end_counts_nothing_twice(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = read(world, tmp_path, "key,balance\n1,101\n2,100\n3,150\n77,5\n")

    def killed(*arguments: Any, **options: Any) -> None:
        audit.record(*arguments, **options)
        if arguments[2] == "reconcile done":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(jobs, "record", killed)
        with pytest.raises(KeyboardInterrupt):
            world.reconcile(truth, Limits())
    assert scalar(world.engine, "select state from wallet.jobs where kind = 'reconcile'") == "running"
    made = world.reconcile(truth, Limits())
    shown = {name: n for name, n in made.counts.items() if n}
    assert (made.resumed, shown) == (True, {"in_order": 1, "corrected": 1, "reported": 1, "refused": 1, "unlisted": 7})
    assert made.reported_amount == {"EUR": D(50)}
    assert made.run is not None
    with world.engine.connect() as connection:
        found = reconciliations.show(connection, world.settings, made.run)
    assert {name: n for name, n in found.run.counts.items() if n} == shown
    assert sorted((one.key, one.outcome) for one in found.left) == [("3", "reported"), ("77", "refused")]


def test_two_processes_that_come_to_the_end_of_one_run_count_it_once(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = read(world, tmp_path, "key,balance\n1,101\n77,5\n")
    whole, others = reconcile_module._Run._unknown, iter([True, False])
    results: list[reconcile_module.Reconciliation] = []

    def second_first(run: reconcile_module._Run, tally: Any) -> None:
        whole(run, tally)
        if next(others):
            results.append(world.reconcile(truth))

    monkeypatch.setattr(reconcile_module._Run, "_unknown", second_first)
    results.append(world.reconcile(truth))
    assert [one.state for one in results] == ["done", "done"]
    assert [{name: n for name, n in one.counts.items() if n} for one in results] == [
        {"corrected": 1, "refused": 1, "unlisted": 9}
    ] * 2
    with world.engine.connect() as connection:
        left = reconciliations.show(connection, world.settings, results[0].run or 0).left
    assert [(one.key, one.outcome) for one in left] == [("77", "refused")]


def test_of_two_runs_with_other_options_begun_at_once_the_second_is_refused(world: World) -> None:
    refused: list[str] = []
    mapping, engine = world.settings.mapping(), engine_named(world.url, "second")
    run = reconcile_module._Run(world.engine, world.settings, mapping, BY, told(101), Limits(), dry_run=False)

    def begin() -> None:
        try:
            reconcile_module.reconcile(engine, world.settings, mapping, BY, truth=LEGACY)
        except PreconditionRefused as error:
            refused.append(str(error))

    with world.engine.connect() as connection:
        job = run._start(connection, 10)
        worker = threading.Thread(target=begin)
        worker.start()
        until_blocked(world.engine, "second")
        connection.commit()
    worker.join()
    assert [f"run {job.id} is at work with other options" in one for one in refused] == [True]
    assert scalar(world.engine, "select state from wallet.jobs where kind = 'reconcile'") == "running"


def test_a_run_whose_process_is_gone_is_given_up_for_one_with_other_options(world: World) -> None:
    mapping = world.settings.mapping()
    run = reconcile_module._Run(world.engine, world.settings, mapping, BY, told(101), Limits(), dry_run=False)
    with world.engine.begin() as connection:
        dead = run._start(connection, 10)
    execute(world.engine, "update wallet.jobs set updated_at = now() - interval '61 s' where id = :id", id=dead.id)
    assert world.reconcile(LEGACY).state == "done"
    assert scalar(world.engine, "select state from wallet.jobs where id = :id", id=dead.id) == "cancelled"


def test_two_workers_share_a_run_and_correct_each_account_once(world: World) -> None:
    met, at_once = threading.local(), threading.Barrier(2)

    def source(_key: str, _bucket: str, _currency: str) -> Decimal:
        if not getattr(met, "before", False):
            met.before = True
            at_once.wait(PATIENCE_SECONDS)  # the first account of each: both are at work
        return D(101)

    with ThreadPoolExecutor(max_workers=2) as threads:
        made = world.reconcile(asked(source, "a function"), batch_size=1, workers=2, executor=threads)
    assert (made.state, made.counts["corrected"], made.counts["in_order"]) == ("done", 10, 0)
    assert [(one.key, one.outcome) for one in made.items] == [(str(key), "corrected") for key in range(1, 11)]
    assert {world.account(key) for key in range(1, 11)} == {("mirrored", D(101), D(101))}
    assert len(world.audited()) == 10


def test_a_paused_run_does_not_go_on_with_other_options(world: World) -> None:
    paused = world.reconcile(told(101), batch_size=3, stop=lambda: len(world.audited()) >= 3)
    assert paused.state == "paused"
    other = world.reconcile(told(102), Limits(D(0), D(5)))
    assert (other.resumed, other.counts["corrected"]) == (False, 10)
    assert rows(world.engine, "select state from wallet.jobs where id = :run", run=paused.run) == [("cancelled",)]


def test_a_run_with_other_options_is_not_started_beside_one_that_is_at_work(world: World) -> None:
    paused = world.reconcile(told(101), batch_size=3, stop=lambda: True)
    execute(world.engine, "update wallet.jobs set state = 'running' where id = :run", run=paused.run)
    with pytest.raises(PreconditionRefused, match="at work with other options"):
        world.reconcile(LEGACY)
    assert world.one(1, told(101)).outcome == "corrected"


def test_what_an_operator_sets_of_a_run_stays_when_it_is_gone_on_with(world: World) -> None:
    paused = world.reconcile(told(101), stop=lambda: True)
    assert paused.run is not None
    job_control.configure(world.engine, world.settings, paused.run, {"batch_size": 3}, BY)
    sizes = "select keys from wallet.job_batches where job_id = :run order by number"
    seen: list[list[tuple[Any, ...]]] = []
    done = world.reconcile(told(101), progress=lambda job: seen.append(rows(world.engine, sizes, run=job.id)))
    assert (done.resumed, done.state) == (True, "done")
    assert seen[-1] == [(3,), (3,), (3,), (1,)]


def test_a_function_may_take_longer_than_a_session_may_stand_idle(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_claims, "_IDLE", "500ms")
    monkeypatch.setattr(settling, "BEAT_SECONDS", 0.05)

    def source(key: str, _bucket: str, _currency: str) -> Decimal:
        if key == "2":
            time.sleep(1.5)  # the session's idle time is what is tested
        return Decimal(101)

    done = world.reconcile(asked(source, "a function"))
    assert (done.state, done.counts["corrected"], done.counts["failed"]) == ("done", 10, 0)
    assert scalar(world.engine, "select claims_lost from wallet.jobs") == 0


def test_doctor_tells_of_the_last_run_against_an_outside_truth_until_one_finds_nothing(world: World) -> None:
    verify(world.engine, world.settings, world.settings.mappings[0], BY)

    def found() -> list[str]:
        with world.engine.connect() as connection:
            told = doctor.examine(connection, world.settings)
        assert_told(told)
        return [one.what for one in told]

    run = world.reconcile(told(D("112.00")), Limits()).run
    assert found() == [f"reconciliation {run} of 'users' with a function left 10 accounts that differ"]
    world.reconcile(LEGACY)
    world.one(1, told(D("112.00")))
    assert len(found()) == 1, "neither of them looked at all accounts by that truth"
    world.reconcile(told(D("112.00")))
    assert found() == []


def test_undo_takes_back_exactly_the_corrections_of_its_run(world: World) -> None:
    first = world.reconcile(told(D("100.50")))
    second = world.one(1, told(101))
    adapter = LegacyBalanceAdapter(world.settings, StaticSource({DUAL_WRITE: True}))
    with world.engine.begin() as connection:
        adapter.credit(connection, 2, 7, type="deposit")
    planned = undo(world, first.run, dry_run=True)
    assert (planned.undone, world.account(1)) == (10, ("mirrored", D(101), D(101)))
    done = undo(world, first.run)
    assert (done.undone, done.undone_before, done.left, done.state) == (10, 0, (), "done")
    assert world.account(1) == ("mirrored", D("100.50"), D("100.50"))
    assert world.account(2) == ("mirrored", D(107), D(107))
    reversals = rows(world.engine, "select actor, job_id, amount from wallet.transactions where kind = 'reversal'")
    assert reversals == [(BACK.actor, done.run, D("0.50"))] * 10
    assert {row["undoes"] is not None for row in world.audited("reconcile undone")} == {True}
    assert second.transaction_id not in {
        row[0] for row in rows(world.engine, "select reverses from wallet.transactions where kind = 'reversal'")
    }


def test_a_correction_is_undone_at_most_once_by_whatever_way(world: World) -> None:
    made = world.reconcile(told(D("100.50")))
    adapter = LegacyBalanceAdapter(world.settings, StaticSource({DUAL_WRITE: True}))
    numbers = {one.key: one.transaction_id or 0 for one in made.items}
    with world.engine.begin() as connection:
        adapter.reverse(connection, numbers["1"], reason="by hand")
    done = undo(world, made.run)
    assert (done.undone, [(one.key, one.refusal) for one in done.left]) == (9, [("1", "reversed_before")])
    again = undo(world, made.run)
    assert (again.undone, again.undone_before, len(again.left)) == (0, 9, 1)
    with world.engine.begin() as connection:
        assert adapter.reverse(connection, numbers["2"], reason="by hand").replayed
    assert [world.account(key) for key in (1, 2)] == [("mirrored", D(100), D(100))] * 2


def test_a_batch_s_own_session_is_not_idle_for_longer_than_one_account_takes(world: World) -> None:
    """Else it would be ended in the midst of a batch whose truth is slow to answer, and each time again."""
    last: list[Any] = []

    def truth(_key: str, _bucket: str, _currency: str) -> Any:
        query = "select state_change from pg_stat_activity where state = 'idle in transaction' and datname = :name"
        last.extend(one for (one,) in rows(world.engine, query, name=world.engine.url.database))
        return D(100)

    made = world.reconcile(asked(truth, "a function"))
    assert made.counts["in_order"] == 10
    assert (len(last), sorted(set(last)) == last) == (10, True)


def test_an_undo_that_is_cut_short_goes_on(world: World) -> None:
    made = world.reconcile(told(D("100.50")))
    cut = undo(world, made.run, stop=lambda: len(world.audited("reconcile undone")) >= 4)
    assert (cut.undone, cut.state) == (4, "paused")
    rest = undo(world, made.run)
    assert (rest.run, rest.undone, rest.undone_before) == (cut.run, 6, 4)


@pytest.mark.parametrize("ended", ["paused", "cancelled"])
def test_an_operator_ends_an_undo_after_the_account_at_hand_and_the_next_call_goes_on(world: World, ended: str) -> None:
    made = world.reconcile(told(D("100.50")))
    end = job_control.pause if ended == "paused" else job_control.cancel
    looks: list[int] = []

    def operator() -> bool:
        looks.append(1)
        if len(looks) == 5:
            end(world.engine, world.settings, newest(), BY)
        return False

    def newest() -> int:
        return int(scalar(world.engine, "select max(id) from wallet.jobs"))

    cut = undo(world, made.run, stop=operator)
    assert (cut.state, cut.undone, cut.undone_before, cut.open) == (ended, 4, 0, 6)
    assert len(world.audited("reconcile undone")) == 4
    told_of_it = "select state, items_done, items_total from wallet.jobs where id = :run"
    assert rows(world.engine, told_of_it, run=cut.run) == [(ended, 4, 10)]
    rest = undo(world, made.run)
    assert (rest.state, rest.undone, rest.undone_before, rest.open) == ("done", 6, 4, 0)
    assert (rest.run == cut.run) is (ended == "paused")


def test_a_connection_that_is_lost_in_an_undo_leaves_no_correction_out(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = world.reconcile(told(D("100.50")))
    honest, pages = reconciliations._corrections, iter([False, True, False])

    def page(connection: Connection, *arguments: Any) -> Any:
        if next(pages, False):
            connection.exec_driver_sql("select pg_terminate_backend(pg_backend_pid())")
        return honest(connection, *arguments)

    monkeypatch.setattr(reconciliations, "_PAGE", 4)
    monkeypatch.setattr(reconciliations, "_corrections", page)
    done = undo(world, made.run)
    assert (done.state, done.undone, done.open) == ("done", 10, 0)
    assert next(pages, None) is None


def test_a_connection_that_is_lost_while_a_correction_is_undone_leaves_it_for_the_next_try(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = world.reconcile(told(D("100.50")))
    honest, lost = corrections.Corrector.call, iter([False, True, False])

    def call(self: corrections.Corrector, *arguments: Any, **more: Any) -> Any:
        if next(lost, False):
            execute(world.engine, "select pg_terminate_backend(pg_backend_pid())")
        return honest(self, *arguments, **more)

    monkeypatch.setattr(corrections.Corrector, "call", call)
    done = undo(world, made.run)
    assert (done.state, done.undone, done.left, done.open) == ("done", 10, (), 0)
    assert next(lost, None) is None


@pytest.mark.parametrize("truth", [LEGACY, LEDGER])
def test_a_correction_of_one_side_is_undone_on_that_side_and_the_account_is_stale(world: World, truth: Truth) -> None:
    world.damage("update users set total_coins = 103 where id = 3")
    made = world.reconcile(truth)
    after = D(103) if truth is LEGACY else D(100)
    assert world.account(3) == ("mirrored", after, after)
    assert undo(world, made.run).undone == 1
    assert world.account(3) == ("stale", D(100), D(103))
    assert undo(world, made.run).undone == 0


def test_what_was_spent_closed_or_frozen_since_is_told(world: World) -> None:
    made = world.reconcile(told(101))
    execute(world.engine, "delete from users where id = 2")
    execute(world.engine, "update users set total_coins = 60 where id = 4")
    done = undo(world, made.run)
    assert [(one.key, one.refusal) for one in done.left] == [("2", "no_row")]
    assert world.account(4) == ("stale", D(100), D(59))
    assert balances_told(world, made, "4") == (D(59), D(100))
    assert balances_told(world, made, "5") == (D(100), D(100))


def test_what_was_frozen_since_is_undone_in_the_ledger_alone(world: World) -> None:
    made = world.reconcile(told(101))
    set_phase(world.engine, "frozen")
    freeze(world.engine, world.settings, world.settings.mappings[0], ACT)
    assert undo(world, made.run).undone == 10
    assert world.account(3) == ("frozen", D(100), D(101))
    assert balances_told(world, made, "3") == (None, D(100))


def test_an_account_that_was_opened_and_corrected_is_undone_on_both_sides(world: World) -> None:
    add_users(world.engine, 11, 11)
    made = world.reconcile(told_of(k11=101), Limits(create_missing=True))
    assert world.account(11) == ("mirrored", D(101), D(101))
    assert undo(world, made.run).undone == 1
    assert world.account(11) == ("mirrored", D(100), D(100))


def test_what_was_corrected_while_frozen_is_undone_on_both_sides_after_an_unfreeze(world: World) -> None:
    """The unfreeze brought the correction to the row; 11 was opened by the run itself, frozen."""
    set_phase(world.engine, "frozen")
    freeze(world.engine, world.settings, world.settings.mappings[0], ACT)
    add_users(world.engine, 11, 11)
    made = world.reconcile(told_of(k3=D("100.80"), k4=D("99.50"), k11=101), Limits(create_missing=True))
    assert (made.counts["corrected"], world.account(11)) == (3, ("frozen", D(101), D(100)))
    set_phase(world.engine, "wallet_only")
    unfreeze(world.engine, world.settings, world.settings.mappings[0], ACT)
    assert world.account(3) == ("mirrored", D("100.80"), D("100.80"))
    done = undo(world, made.run)
    assert (done.undone, done.left) == (3, ())
    assert [world.account(key) for key in (3, 4, 11)] == [("mirrored", D(100), D(100))] * 3
    assert verify(world.engine, world.settings, world.settings.mappings[0], ACT).clean


def test_undo_refuses_what_is_no_run_and_what_is_at_work(world: World) -> None:
    with pytest.raises(UsageError, match="no reconciliation 999"):
        undo(world, 999)
    made = world.reconcile(told(101))
    back = undo(world, made.run)
    with pytest.raises(UsageError, match="itself an undo"):
        undo(world, back.run)
    execute(world.engine, "update wallet.jobs set state = 'running' where id = :run", run=made.run)
    with pytest.raises(PreconditionRefused, match="at work"):
        undo(world, made.run)


def test_the_runs_are_on_record_with_what_they_changed_and_what_they_left(world: World) -> None:
    made = world.reconcile(told(D("100.50")), Limits(D(0), D("0.10")))
    world.reconcile(told(D("100.50")))
    one = world.reconcile(account="3")
    with world.engine.connect() as connection:
        found = reconciliations.runs(connection, world.settings)
        first = reconciliations.show(connection, world.settings, made.run or 0)
        second = reconciliations.show(connection, world.settings, found[1].id)
    assert [(run.kind, run.account, run.corrected) for run in found] == [
        ("reconcile account", "3", 0),
        ("reconcile", None, 10),
        ("reconcile", None, 0),
    ]
    assert (found[0].id, found[2].reported_amount, found[2].actor) == (one.run, {"EUR": D(5)}, BY.actor)
    assert (len(first.left), first.left[0].difference, first.changed) == (10, D("0.50"), ())
    assert (second.left, second.changed[0].ledger_after, len(second.changed)) == ((), D("100.50"), 10)


def test_what_is_reported_is_in_the_metrics_until_a_later_run_finds_less(world: World) -> None:
    def drift() -> tuple[Any, Any]:
        with world.engine.connect() as connection:
            facts = read_facts(connection, "wallet", [("users", "EUR")])
        return facts.drift_accounts["EUR"], facts.drift_amount["EUR"]

    mapping = world.settings.mappings[0]
    verify(world.engine, world.settings, mapping, ACT)
    assert drift() == (0, 0)
    world.reconcile(told(102), Limits())
    assert drift() == (10, 20)
    # A verification compares legacy with the ledger, and says nothing of an outside truth.
    verify(world.engine, world.settings, mapping, ACT)
    assert drift() == (10, 20)
    world.reconcile(told(102))
    assert drift() == (0, 0)
    world.damage("update users set total_coins = total_coins + 3 where id in (2, 5)")
    world.reconcile(limits=Limits())
    assert drift() == (2, 6)
    world.reconcile()
    # That all are in order is for a verification to say, which looks at more.
    verify(world.engine, world.settings, mapping, ACT)
    assert drift() == (0, 0)


def test_a_file_is_the_truth_of_the_accounts_that_it_names(world: World, tmp_path: Path) -> None:
    truth = read(world, tmp_path, "key,balance\n1,100.50\n2,99.25\n77,5\n3,+100\n")
    made = world.reconcile(truth, Limits())
    shown = {name: n for name, n in made.counts.items() if n}
    assert shown == {"corrected": 2, "in_order": 1, "unlisted": 7, "refused": 1}
    assert [(one.key, one.refusal) for one in made.items if one.refusal] == [("77", "no_row")]
    assert world.account(2) == ("mirrored", D("99.25"), D("99.25"))
    assert scalar(
        world.engine, "select details -> 'options' ->> 'truth' from wallet.jobs where id = :r", r=made.run
    ) == ("truth.csv")
    assert world.reconcile(truth, account="4").counts["unlisted"] == 1


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        ("", [1]),
        ("key,amount\n1,2\n", [1]),
        ("key,balance\n", [1]),
        ("key,balance\n1,100\n1,100\n", [3]),
        ("key,balance\n1,1.005\n2,1e3\nx,1\n3\n4,NaN\n5,1.500\n", [2, 3, 4, 5, 6]),
        ("key,balance,bucket\n1,1,cash\n2,1,gold\n", [3]),
        ("key,balance,currency\n1,1,EUR\n2,1,USD\n", [3]),
        ('key,balance\n1,"1\n', [2]),
    ],
)
def test_a_line_that_cannot_be_read_is_refused_with_its_number_before_anything_is_done(
    tmp_path: Path, content: str, lines: list[int]
) -> None:
    path = tmp_path / "truth.csv"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UnreadableInput) as raised:
        truths.read(path, MAPPING, "integer")
    assert [line for line, _ in raised.value.problems] == lines


def test_a_function_is_named_by_module_and_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "our_bank_of_tests.py").write_text(
        "class Bank:\n    @staticmethod\n    def of(key, b, c):\n        return 5\n"
    )
    truth = truths.named("python:our_bank_of_tests:Bank.of", MAPPING, "integer")
    assert (truth.kind, truth.of("1", MAPPING.columns[0])) == ("callable", D(5))
    for wrong in (
        "python:our_bank_of_tests",
        "python:our_bank_of_tests:nothing",
        "python:no_such:f",
        "no/such/file.csv",
    ):
        with pytest.raises(UsageError):
            truths.named(wrong, MAPPING, "integer")


def test_what_is_in_order_is_looked_at_without_a_lock(world: World) -> None:
    """Held rows are waited for only where there is something to correct."""
    add_users(world.engine, 11, 2000)
    backfill(world.engine, world.settings, world.settings.mappings[0], ACT)
    with world.engine.begin() as holder:
        holder.exec_driver_sql("select 1 from users where id = 1500 for update")
        assert world.reconcile().counts["in_order"] == 2000
