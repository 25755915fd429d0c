"""One account corrected, corrected back or recalculated under its locks: what is refused, and what is not touched."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError

import interleaving
from ledger import ACT, execute, fence_down, install_users, rows, scalar, set_phase, unguarded
from test_reconcile import BY, World, told, told_of, world
from walletmigrate import LegacyBalanceAdapter, StaticSource, reconciliations
from walletmigrate.backfill import backfill
from walletmigrate.corrections import Correction, adjust
from walletmigrate.errors import PreconditionRefused
from walletmigrate.flags import DUAL_WRITE
from walletmigrate.freeze import freeze
from walletmigrate.line import stop
from walletmigrate.recalculate import recalculate
from walletmigrate.reconcile import Limits, Reconciliation
from walletmigrate.truths import LEDGER

__all__ = ["world"]

D = Decimal
WIDE = Limits(D(0), D(2000), allow_negative=True)
NO_AMOUNT = "update users set total_coins = 'NaN' where id = 3"


def request(world: World, **fields: Any) -> str:
    """What the functions are called with, as JSON in SQL."""
    fixed = {"fingerprint": scalar(world.engine, "select fingerprint from wallet.mappings"), "key": "3"}
    fixed |= {"bucket": "cash", "currency": "EUR", "actor": ACT.actor, "reason": ACT.reason, "type": "t"}
    return (
        "jsonb_build_object(" + ", ".join(f"'{name}', '{value}'" for name, value in {**fixed, **fields}.items()) + ")"
    )


def direct(connection: Connection, function: str, given: str) -> Correction:
    found = connection.execute(text(f"select (c).* from wallet.{function}_users({given}) as c")).one()
    return Correction(**found._mapping)


def called(world: World, **fields: Any) -> Correction:
    with world.engine.begin() as connection:
        return direct(connection, "correct", request(world, **fields))


def damaged_world(url: str, **table: Any) -> World:
    """Ten mirrored accounts of 100, of which nothing is asked at the end."""
    engine, settings = install_users(url, phase="dual_write", **table)
    backfill(engine, settings, settings.mappings[0], ACT)
    return World(engine, settings, url)


def narrow_world(url: str, **table: Any) -> World:
    """The same in a column from -999.99 to 999.99."""
    return damaged_world(url, coins_type="numeric(5, 2)", **table)


def past_the_fence(world: World, statement: str) -> None:
    with unguarded(world.engine, "users") as connection:
        connection.exec_driver_sql(statement)


def frozen(world: World) -> None:
    set_phase(world.engine, "frozen")
    freeze(world.engine, world.settings, world.settings.mappings[0], ACT)


def undo(world: World, made: Reconciliation) -> list[tuple[str, str | None]]:
    """Take a run back; the keys that were left, and why."""
    done = reconciliations.undo(world.engine, world.settings, made.run or 0, BY)
    return [(one.key, one.refusal) for one in done.left]


def adjusted(world: World, amount: object, **options: Any) -> Correction:
    mapping = world.settings.mappings[0]
    return adjust(world.engine, world.settings, mapping, ACT, "3", D(str(amount)), **options)


# Corrected


def test_an_amount_that_is_no_exact_one_in_the_legacy_row_refuses_the_account_until_it_is_frozen(world: World) -> None:
    execute(world.engine, NO_AMOUNT)
    assert world.one(3, told(101)).refusal == "legacy_value"
    execute(world.engine, "update users set total_coins = 100 where id = 3")
    world.reconcile()
    frozen(world)
    past_the_fence(world, NO_AMOUNT)
    assert called(world, truth="change", amount=1).outcome == "corrected"
    assert world.account(3)[:2] == ("frozen", D(101))  # type: ignore[index]


def test_a_frozen_account_is_held_against_its_ledger_whatever_the_legacy_row_holds(world: World) -> None:
    frozen(world)
    assert [adjusted(world, 5).difference, adjusted(world, 5).truth] == [D(5), D(110)]
    assert called(world, truth="value", amount=100, tolerance=0, limit=20).outcome == "corrected"
    assert world.account(3) == ("frozen", D(100), D(100))


def test_what_is_too_far_away_is_left_as_it_is_also_where_the_sides_differ(database_url: str) -> None:
    world = damaged_world(database_url)
    world.damage("update users set total_coins = 103 where id = 3")
    assert called(world, truth="value", amount=200, tolerance=0, limit=1).outcome == "reported"
    assert called(world, truth="value", amount=200, tolerance=0, limit=1000, seen=100).outcome == "moved"
    assert world.account(3) == ("mirrored", D(100), D(103))
    assert rows(world.engine, "select action from wallet.audit_log where action like 'reconcile%'") == []


def test_an_absent_account_is_opened_by_a_call_that_says_so_alone(world: World) -> None:
    execute(world.engine, "insert into users values (11, 'acme', 'member', 7, 0)")
    asked = {"key": 11, "truth": "legacy", "tolerance": 0, "limit": 0}
    for fields in (asked, {**asked, "create": "false"}):
        assert called(world, **fields).refusal == "absent"
    assert called(world, **asked, create="true").outcome == "opened"


@pytest.mark.parametrize("truth", [1000, -1000])
def test_a_truth_that_does_not_fit_the_column_is_refused_before_it_is_written(database_url: str, truth: int) -> None:
    narrow = narrow_world(database_url)
    assert narrow.one(3, told(truth), WIDE).refusal == "overflow"
    assert narrow.one(3, told(truth - truth // 1000), WIDE).outcome == "corrected"


@pytest.mark.parametrize("amount", ["0.001", "NaN", "Infinity", "-Infinity"])
def test_a_truth_that_is_no_exact_amount_is_refused_by_the_function_itself(world: World, amount: str) -> None:
    made = called(world, truth="value", amount=amount, limit="NaN", tolerance=-1, negative="true")
    assert (made.outcome, made.refusal) == ("refused", "invalid")
    assert world.account(3) == ("mirrored", D(100), D(100))


def test_a_change_is_made_whatever_the_limits_are(world: World) -> None:
    for amount in ("0.50", "20"):
        assert called(world, truth="change", amount=amount, tolerance=1, limit=2).outcome == "corrected"
    assert world.account(3) == ("mirrored", D("120.50"), D("120.50"))


def test_an_adjustment_is_on_record_as_such_and_its_notes_stand_beside_it(world: World) -> None:
    assert adjusted(world, "0.50").transaction_id
    assert rows(world.engine, "select * from wallet.transaction_details") == []
    noted = adjusted(world, "-0.25", notes="call of Monday").transaction_id
    details = "select transaction_id, description from wallet.transaction_details"
    assert rows(world.engine, details) == [(noted, "call of Monday")]
    after = "select debit_balance, credit_balance from wallet.transactions order by id desc limit 2"
    assert rows(world.engine, after) == [(D("100.25"), None), (None, D("100.50"))]
    assert [one["transaction_id"] for one in world.audited("adjust")][1:] == [noted]
    assert adjusted(world, -100, allow_negative=True, dry_run=True).ledger_after == D("0.25")
    assert len(world.audited("adjust")) == 2
    with pytest.raises(PreconditionRefused, match="would be negative"):
        adjusted(world, -101)


def test_an_adjustment_that_is_refused_names_what_mends_it_of_its_own_options_and_of_its_own_cause(
    world: World,
) -> None:
    execute(world.engine, "insert into users values (77, 'acme', 'member', 7, 0)")
    with pytest.raises(PreconditionRefused) as refused:
        adjust(world.engine, world.settings, world.settings.mappings[0], ACT, "77", D(1))
    assert "walletmigrate backfill" in str(refused.value)
    assert "--create-missing" not in str(refused.value)
    stop(world.engine, world.settings, ACT)
    with pytest.raises(PreconditionRefused, match="walletmigrate resume"):
        adjusted(world, 1)
    set_phase(world.engine, "legacy")
    with pytest.raises(PreconditionRefused, match="walletmigrate phase advance"):
        adjusted(world, 1)


def test_a_run_corrects_an_account_once_and_another_run_s_corrections_are_no_hindrance(world: World) -> None:
    """Also one of another key, bucket, currency or mapping, or of the same run but by another action."""
    fields = {"truth": "value", "tolerance": 0, "limit": 9}
    assert called(world, amount=101, run=7, **fields).outcome == "corrected"
    assert called(world, amount=102, run=7, **fields).outcome == "in_order"
    assert called(world, amount=102, run=8, **fields).outcome == "corrected"
    assert called(world, amount=102, run=7, key=4, **fields).outcome == "corrected"
    insert = (
        "insert into wallet.audit_log (action, actor, reason, mapping, job_id, details) values (:action, 'a', 'r', "
        ":mapping, 9, jsonb_build_object('key', cast(:key as text), 'bucket', cast(:bucket as text), "
        "'currency', cast(:currency as text)))"
    )
    own = {"action": "reconcile corrected", "mapping": "users", "key": "5", "bucket": "cash", "currency": "EUR"}
    others = {"action": "reconcile opened", "mapping": "clubs", "key": "6", "bucket": "promo", "currency": "USD"}
    for name, value in others.items():
        execute(world.engine, insert, **{**own, name: value})
    assert called(world, amount=102, run=9, key=5, **fields).outcome == "corrected"
    assert called(world, amount=103, run=9, key=5, **fields).outcome == "in_order"


def test_a_column_that_the_mapping_has_not_is_refused(world: World) -> None:
    for column in ({"bucket": "gold"}, {"currency": "USD"}):
        with pytest.raises(DBAPIError, match="mapping users has no such column") as raised:
            called(world, truth="legacy", tolerance=0, limit=0, **column)
        assert getattr(raised.value.orig, "sqlstate", None) == "WM010"


def test_rows_that_the_ledger_s_owner_does_not_see_are_told(world: World) -> None:
    execute(world.engine, "alter table users enable row level security")
    with pytest.raises(DBAPIError) as raised:
        called(world, truth="change", amount=1)
    assert getattr(raised.value.orig, "sqlstate", None) == "WM022"
    execute(world.engine, "alter table users disable row level security")


def test_a_correction_of_the_ledger_alone_writes_no_row(world: World) -> None:
    world.damage("update users set total_coins = 101 where id = 3")
    execute(
        world.engine,
        "create function no() returns trigger language plpgsql as $$ begin raise exception 'a write'; end $$",
    )
    execute(world.engine, "create trigger no before update on users for each row execute function no()")
    assert world.one(3).outcome == "corrected"
    assert world.account(3) == ("mirrored", D(101), D(101))


def test_a_row_that_a_trigger_keeps_from_being_written_is_told_as_that(world: World) -> None:
    execute(
        world.engine,
        "create function keep() returns trigger language plpgsql as $$ begin return null; end $$",
    )
    execute(world.engine, "create trigger keep before update on users for each row execute function keep()")
    made = world.one(3, told(101))
    assert (made.outcome, "WM021" in made.why) == ("failed", True)


def test_a_correction_leaves_no_label_for_what_is_written_after_it_in_the_transaction(world: World) -> None:
    with world.engine.begin() as connection:
        direct(connection, "correct", request(world, truth="change", amount=1))
        assert connection.scalar(text("select current_setting('walletmigrate.posting')")) == ""
        connection.exec_driver_sql("update users set total_coins = 7 where id = 3")
    assert rows(world.engine, "select key from wallet.bypasses") == [("3",)]
    assert world.account(3) == ("stale", D(101), D(7))


def test_a_row_that_is_deleted_and_inserted_again_while_the_correction_waits_is_found(world: World) -> None:
    with interleaving.stage(world.url) as stage:
        writer, corrector = stage.session(), stage.session()
        writer.sql("delete from users where id = 3")
        writer.sql("insert into users values (3, 'acme', 'member', 50, 0)")
        given = request(world, truth="value", amount=51, tolerance=0, limit=9)
        waiting = corrector.waiting(lambda connection: direct(connection, "correct", given), on=writer)
        writer.commit()
        assert waiting.result(interleaving.PATIENCE_SECONDS).outcome == "corrected"
        corrector.commit()
    assert world.account(3) == ("mirrored", D(51), D(51))


# Corrected back


def test_what_cannot_be_taken_back_any_more_is_told(world: World) -> None:
    made = world.reconcile(told(101))
    execute(world.engine, NO_AMOUNT)
    execute(world.engine, "update wallet.accounts set state = 'closed' where key = '4'")
    assert undo(world, made) == [("3", "legacy_value"), ("4", "closed")]
    held = "select key, balance from wallet.accounts where key in ('3', '4') order by key"
    assert rows(world.engine, held) == [("3", D(101)), ("4", D(101))]


def test_what_was_corrected_in_legacy_alone_cannot_be_taken_back_once_it_is_frozen(world: World) -> None:
    world.damage("update users set total_coins = 103 where id in (3, 4)")
    made = world.reconcile(LEDGER)
    assert made.counts["corrected"] == 2
    frozen(world)
    assert undo(world, made) == [("3", "frozen"), ("4", "frozen")]
    assert world.account(3) == ("frozen", D(100), D(100))


def test_a_frozen_account_is_corrected_back_whatever_the_legacy_row_holds(world: World) -> None:
    made = world.reconcile(told_of(k3=101))
    frozen(world)
    past_the_fence(world, NO_AMOUNT)
    audit = scalar(world.engine, "select id from wallet.audit_log where action = 'reconcile corrected'")
    done = called(world, audit=audit, run=made.run, request="00000000-0000-4000-8000-000000000001")
    assert (done.outcome, done.difference) == ("undone", D(-1))
    assert world.account(3)[:2] == ("frozen", D(100))  # type: ignore[index]
    assert rows(world.engine, "select mode::text from wallet.idempotency_keys") == [("ledger",)]


def test_a_correction_whose_account_is_another_now_is_left(database_url: str) -> None:
    """Somebody has deleted the accounts past everything; one was opened anew."""
    world = damaged_world(database_url)
    world.damage("update users set total_coins = 103 where id = 4")
    both, legacy = world.reconcile(told_of(k3=101)), world.reconcile(LEDGER)
    assert (both.counts["corrected"], legacy.counts["corrected"]) == (1, 1)
    execute(world.engine, "delete from wallet.accounts where key in ('3', '4')")
    assert (undo(world, both), undo(world, legacy)) == ([("3", "absent")], [("4", "absent")])
    backfill(world.engine, world.settings, world.settings.mappings[0], ACT)
    assert undo(world, both) == [("3", "absent")]
    assert world.account(3) == ("mirrored", D(101), D(101))


def test_a_reversal_in_legacy_alone_and_one_whose_key_is_gone_count_too(world: World) -> None:
    made = world.reconcile(told_of(k3=101, k4=101))
    numbers = {one.key: one.transaction_id or 0 for one in made.items}
    for key, dual in (("3", True), ("4", False)):
        adapter = LegacyBalanceAdapter(world.settings, StaticSource({DUAL_WRITE: dual}))
        with world.engine.begin() as connection:
            adapter.reverse(connection, numbers[key], reason="by hand")
    execute(world.engine, "delete from wallet.idempotency_keys where mode = 'dual_write'")
    assert undo(world, made) == [("3", "reversed_before"), ("4", "reversed_before")]
    assert (world.account(3), world.account(4)) == (("mirrored", D(100), D(100)), ("stale", D(101), D(100)))


def test_a_correction_that_was_undone_is_not_undone_again_by_a_call_of_its_own(world: World) -> None:
    """Of the second there is no transaction: the record alone says that it was undone."""
    world.damage("update users set total_coins = 103 where id = 4")
    runs = world.reconcile(told_of(k3=101)), world.reconcile(LEDGER, account="4")
    assert [undo(world, made) for made in runs] == [[], []]
    # The undo of the second wrote the row of an account that is stale, as the library and not past it.
    assert (world.account(4), rows(world.engine, "select * from wallet.bypasses")) == (("stale", D(100), D(103)), [])
    audits = rows(
        world.engine, "select id, details ->> 'key' from wallet.audit_log where action = 'reconcile corrected'"
    )
    assert len(audits) == 2
    for audit, key in audits:
        assert called(world, audit=audit, key=key).refusal == "undone_before"


def test_a_line_that_is_stopped_and_a_dry_run_take_nothing_back(world: World) -> None:
    made = world.reconcile(told_of(k3=101))
    audit = scalar(world.engine, "select id from wallet.audit_log where action = 'reconcile corrected'")
    assert called(world, audit=audit, dry="true").outcome == "undone"
    stop(world.engine, world.settings, ACT)
    assert called(world, audit=audit, run=made.run).refusal == "stopped"
    assert world.account(3) == ("mirrored", D(101), D(101))
    assert world.audited("reconcile undone") == []


def test_the_floor_binds_what_is_taken_away_by_an_undo_and_nothing_else(database_url: str) -> None:
    world = narrow_world(database_url, floor=D(0))
    made = world.reconcile(told_of(k1=101, k2=101, k3=99, k4=99))
    execute(world.engine, "update users set total_coins = 0.50 where id = 1")
    execute(world.engine, "update users set total_coins = 1 where id = 2")
    execute(world.engine, "update users set total_coins = -50 where id = 3")
    execute(world.engine, "update users set total_coins = 999.50 where id = 4")
    assert undo(world, made) == [("1", "floor"), ("4", "overflow")]
    assert [world.account(key) for key in (2, 3)] == [("stale", D(100), D(0)), ("stale", D(100), D(-49))]


def test_without_a_floor_an_undo_ends_where_the_column_does(database_url: str) -> None:
    world = narrow_world(database_url)
    made = world.reconcile(told_of(k1=101))
    execute(world.engine, "update users set total_coins = -999.50 where id = 1")
    assert undo(world, made) == [("1", "overflow")]


# Recalculated


def recalculated(world: World, **options: Any) -> list[tuple[str, str]]:
    made = recalculate(world.engine, world.settings, world.settings.mappings[0], ACT, **options)
    return [(one.key, one.outcome) for one in made.items]


def test_only_a_mirrored_account_that_differs_from_its_row_turns_stale_by_its_journal(world: World) -> None:
    execute(world.engine, "update users set total_coins = 60 where id = 5")
    execute(world.engine, "update wallet.accounts set balance = 90 where key in ('3', '4', '5')")
    with fence_down(world.engine, world.settings) as connection:
        connection.exec_driver_sql("update users set total_coins = 90 where id = 3")
    found = [("3", "turned_stale"), ("4", "recalculated"), ("5", "recalculated")]
    assert recalculated(world, dry_run=True) == found
    assert world.audited("recalculate") == []
    assert world.account(4) == ("mirrored", D(90), D(100))
    assert recalculated(world) == found
    assert [world.account(key) for key in (3, 4, 5)] == [
        ("stale", D(100), D(90)),
        ("mirrored", D(100), D(100)),
        ("stale", D(100), D(60)),
    ]
    assert [one["key"] for one in world.audited("recalculate")] == ["3", "4", "5"]
    assert recalculated(world, account="4") == []
    assert recalculated(world, account="99") == [("99", "refused")]
    assert len(world.audited("recalculate")) == 3


def test_a_recalculation_waits_for_who_holds_the_row(world: World) -> None:
    with interleaving.stage(world.url) as stage:
        holder, other = stage.session(), stage.session()
        holder.sql("select from users where id = 3 for no key update")
        given = request(world)
        waiting = other.waiting(lambda connection: direct(connection, "recalculate", given), on=holder)
        holder.rollback()
        assert waiting.result(interleaving.PATIENCE_SECONDS).outcome == "in_order"
        other.rollback()


def test_a_recalculation_waits_for_who_holds_the_account_alone_and_counts_what_came_of_it(database_url: str) -> None:
    """As the undo of a backfill does."""
    world = damaged_world(database_url)
    job = scalar(world.engine, "select id from wallet.jobs where kind = 'backfill'")
    execute(world.engine, "update wallet.accounts set balance = 107 where key = '3'")
    with interleaving.stage(world.url) as stage:
        undoing, other = stage.session(), stage.session()
        undoing.sql("select * from wallet.undo_openings('users', :job, null, 0, 10, 'a', 'r', false)", job=job)
        given = request(world)
        waiting = other.waiting(lambda connection: direct(connection, "recalculate", given), on=undoing)
        undoing.commit()
        made = waiting.result(interleaving.PATIENCE_SECONDS)
        other.commit()
    assert (made.outcome, made.ledger_before, made.ledger_after) == ("recalculated", D(7), D(0))
    assert world.account(3) == ("stale", D(0), D(100))
