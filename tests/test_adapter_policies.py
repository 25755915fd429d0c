"""Shadow and strict: what a fault of the ledger, and a trigger of the application, do to a posting."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from adapting import DUAL, OFF, Place, User, bring_into, place, seal
from ledger import execute, rows, scalar
from walletmigrate import LegacyBalanceAdapter, Movement
from walletmigrate.errors import LedgerMismatch, LegacyUpdateSuppressed, WalletMigrateError

D = Decimal


def fail_ledger(at: Place, state: str) -> None:
    """Have every movement of 13 in the ledger fail with an SQLSTATE."""
    execute(
        at.engine,
        "create or replace function public.fault() returns trigger language plpgsql as $$ begin "
        "if new.amount = 13 and new.kind in ('posting', 'reversal') then "
        f"raise exception 'a fault' using errcode = '{state}'; end if; return new; end $$",
    )
    execute(
        at.engine,
        "create trigger fault before insert on wallet.transactions for each row execute function public.fault()",
    )


def add_check(at: Place) -> None:
    """A constraint on the ledger that an amount of 13 breaks."""
    execute(at.engine, "alter table wallet.transactions add constraint no_thirteen check (amount <> 13)")


def mend(at: Place) -> None:
    execute(at.engine, "drop trigger if exists fault on wallet.transactions")
    execute(at.engine, "alter table wallet.transactions drop constraint if exists no_thirteen")


def on_legacy(at: Place, body: str, *, when: str = "before", event: str = "update") -> None:
    """A trigger of the application on its own table."""
    execute(
        at.engine,
        f"create function public.app() returns trigger language plpgsql as $$ begin {body} end $$",
    )
    execute(at.engine, f"create trigger app {when} {event} on public.users for each row execute function public.app()")


def state_of(error: DBAPIError) -> str | None:
    found: str | None = getattr(error.orig, "sqlstate", None)
    return found


PERMANENT = ["23514", "P0001", "22012", "42P01", "XX000", "53100"]
RETRYABLE = ["40001", "40P01", "55P03"]

# The state before, and what shadow leaves: state and ledger balance (the ledger leg is undone as a whole).
LEFT: dict[str, tuple[str, Decimal] | None] = {
    "absent": None,
    "mirrored": ("stale", D(100)),
    "stale": ("stale", D(85)),
    "closed, live": ("stale", D(85)),
}


@pytest.mark.parametrize("state", list(LEFT))
@pytest.mark.parametrize("fault", ["check", "trigger"])
def test_under_shadow_a_failed_ledger_leg_does_not_lose_the_legacy_write(
    database_url: str, fault: str, state: str
) -> None:
    at = place(database_url, rows=0)
    bring_into(at, 1, state)
    if fault == "check":
        add_check(at)
    else:
        fail_ledger(at, "P0001")
    known = at.last_id()
    with Session(at.engine) as session:
        user = session.get_one(User, 1)
        result = at.adapter.credit(session, 1, 13, type="deposit", correlation_id="c-13", idempotency_key="k")
        assert user.total_coins == 113
        session.commit()
    assert (result.mode, result.outcome, result.mismatch) == ("legacy", "ledger_failed", False)
    assert (result.legacy_balance, result.ledger_balance, result.transaction_id) == (D(113), None, None)
    assert (at.coins(1), at.account(1), at.legs(known)) == (113, LEFT[state], [])
    recorded = rows(
        at.engine,
        "select mapping, key, bucket, currency, operation, sqlstate, correlation_id from wallet.failures",
    )
    assert recorded == [("users", "1", "cash", "EUR", "credit", "23514" if fault == "check" else "P0001", "c-13")]
    assert at.metric("dual_write_total", operation="credit", outcome="ledger_failed") == 1
    at.check()

    mend(at)
    with at.engine.begin() as connection:
        again = at.adapter.credit(connection, 1, 13, type="deposit", idempotency_key="k")
        assert (again.replayed, again.mode, again.legacy_balance) == (True, "legacy", D(113))
        healed = at.adapter.credit(connection, 1, 1, type="deposit")
    assert (healed.mode, healed.ledger_balance, at.account(1)) == ("dual_write", D(114), ("mirrored", D(114)))
    at.check()


@pytest.mark.parametrize("state", PERMANENT)
def test_under_shadow_every_fault_that_is_not_retryable_is_held_back(database_url: str, state: str) -> None:
    at = place(database_url, rows=1)
    fail_ledger(at, state)
    with at.engine.begin() as connection:
        assert at.adapter.credit(connection, 1, 13, type="deposit").outcome == "ledger_failed"
        assert at.adapter.credit(connection, 1, 1, type="deposit").outcome == "ok"
    assert scalar(at.engine, "select sqlstate from wallet.failures") == state
    assert (at.coins(1), at.account(1)) == (114, ("mirrored", D(114)))
    at.check()


@pytest.mark.parametrize("policy", ["shadow", "strict"])
@pytest.mark.parametrize("state", [*RETRYABLE, "57014"])
def test_what_can_be_retried_reaches_the_caller_under_both_policies(database_url: str, policy: str, state: str) -> None:
    at = place(database_url, rows=1, policy=policy)
    fail_ledger(at, state)
    with at.engine.connect() as connection:
        with pytest.raises(DBAPIError) as raised:
            at.adapter.credit(connection, 1, 13, type="deposit", idempotency_key="k")
        connection.rollback()
    assert state_of(raised.value) == state
    assert (at.coins(1), at.account(1)) == (100, None)
    retried = state in ("40001", "40P01")
    assert (at.heard.posted[-1].error, at.heard.posted[-1].outcome) == (
        state,
        "refused" if retried else "ledger_failed",
    )
    assert rows(at.engine, "select * from wallet.failures") == []
    mend(at)
    with at.engine.begin() as connection:
        assert not at.adapter.credit(connection, 1, 13, type="deposit", idempotency_key="k").replayed
    at.check()


@pytest.mark.parametrize("fault", ["check", "trigger"])
def test_under_strict_a_failed_ledger_leg_fails_the_posting(database_url: str, fault: str) -> None:
    at = place(database_url, rows=1, policy="strict")
    if fault == "check":
        add_check(at)
    else:
        fail_ledger(at, "23514")
    with at.engine.begin() as connection:
        savepoint = connection.begin_nested()
        with pytest.raises(DBAPIError) as raised:
            at.adapter.credit(connection, 1, 13, type="deposit", idempotency_key="k")
        savepoint.rollback()
        assert at.adapter.credit(connection, 1, 1, type="deposit").ledger_balance == 101
    assert state_of(raised.value) == "23514"
    assert (at.coins(1), at.account(1)) == (101, ("mirrored", D(101)))
    assert rows(at.engine, "select * from wallet.failures") == []
    # Not "refused", which stands for what a caller did wrong and counts against no budget: the ledger broke a payment.
    told_as_broken(at, 1)
    at.check()


def told_as_broken(at: Place, count: int, error: str = "23514") -> None:
    """The last posting that failed is told as the ledger's failure, timed; ``count`` credits and none refused are
    counted.
    """
    last = [each for each in at.heard.posted if each.error is not None][-1]
    assert (last.mode, last.outcome, last.error, last.committed) == ("dual_write", "ledger_failed", error, False)
    assert (last.seconds or 0) > 0
    assert at.metric("dual_write_total", operation="credit", outcome="ledger_failed") == count
    assert at.metric("dual_write_total", operation="credit", outcome="refused") == 0
    assert (at.metric("dual_write_duration_seconds_count", operation="credit", mode="dual_write") or 0) >= count


def credit(at: Place, amount: int, before: str = "select 1") -> None:
    """A credit that fails, in a transaction of its own that begins with ``before``."""
    with at.engine.connect() as connection:
        connection.exec_driver_sql(before)
        with pytest.raises((DBAPIError, WalletMigrateError)):
            at.adapter.credit(connection, 1, amount, type="deposit")


def test_a_ledger_that_refuses_every_call_is_told_as_broken(database_url: str) -> None:
    at = place(database_url, rows=1)
    execute(at.engine, "revoke execute on all functions in schema wallet from wallet_app")
    credit(at, 1, "set local role wallet_app")
    told_as_broken(at, 1, "not_installed")


@pytest.mark.parametrize("state", ["absent", "mirrored"])
@pytest.mark.parametrize(
    ("waiting", "error"), [("lock_timeout", "55P03"), ("statement_timeout", "57014")], ids=["lock", "statement"]
)
def test_a_wait_that_ends_in_the_ledger_is_the_ledger_s_and_one_for_the_legacy_row_is_not(
    database_url: str, waiting: str, error: str, state: str
) -> None:
    at = place(database_url, rows=0)
    bring_into(at, 1, state)
    with at.engine.connect() as holder:
        holder.exec_driver_sql("lock table wallet.accounts")
        credit(at, 1, f"set local {waiting} = '50ms'")
        told_as_broken(at, 1, error)
        holder.rollback()
        holder.exec_driver_sql("select from users for update")
        credit(at, 1, f"set local {waiting} = '50ms'")
    assert (at.heard.posted[-1].outcome, at.heard.posted[-1].error) == ("refused", error)
    assert at.metric("dual_write_total", operation="credit", outcome="ledger_failed") == 1


@pytest.mark.parametrize("policy", ["shadow", "strict"])
@pytest.mark.parametrize("state", ["absent", "mirrored"])
def test_what_the_legacy_table_refuses_is_not_the_ledger_s(database_url: str, policy: str, state: str) -> None:
    at = place(database_url, rows=0, policy=policy)
    bring_into(at, 1, state)
    execute(at.engine, "alter table users add constraint rich check (total_coins < 110)")
    credit(at, 13)
    assert (at.heard.posted[-1].outcome, at.heard.posted[-1].error) == ("refused", "23514")
    on_legacy(at, "raise exception 'not today' using errcode = 'AP001';")
    credit(at, 1)
    assert (at.heard.posted[-1].outcome, at.heard.posted[-1].error) == ("refused", "AP001")
    assert at.metric("dual_write_total", operation="credit", outcome="ledger_failed") == 0


def test_a_lost_connection_is_not_the_ledger_s(database_url: str) -> None:
    at = place(database_url, rows=1)
    with at.engine.connect() as connection:
        mine = connection.exec_driver_sql("select pg_backend_pid()").scalar_one()
        execute(at.engine, f"select pg_terminate_backend({mine}, 10000)")
        with pytest.raises(DBAPIError):
            at.adapter.credit(connection, 1, 1, type="deposit")
    assert at.heard.posted[-1].outcome == "refused"


@pytest.mark.parametrize("policy", ["shadow", "strict"])
def test_a_frozen_account_s_ledger_leg_never_fails_silently(database_url: str, policy: str) -> None:
    at = place(database_url, rows=2, policy=policy)
    with at.engine.begin() as connection:
        at.adapter.open_account(connection, 1)
        seal(connection, 1)
    fail_ledger(at, "23514")
    calls: list[Callable[[Connection], object]] = [
        lambda on: at.adapter.credit(on, 1, 13, type="deposit"),
        lambda on: at.adapter.transfer(on, 1, 2, 13, type="gift"),
        lambda on: at.adapter.transfer(on, 2, 1, 13, type="gift"),
    ]
    for call in calls:
        with at.engine.connect() as connection, pytest.raises(DBAPIError) as raised:
            call(connection)
        assert state_of(raised.value) == "23514"
        told_as_broken(at, 1)
    assert at.metric("dual_write_total", operation="transfer", outcome="ledger_failed") == 2
    assert (at.account(1), at.coins(1), at.coins(2)) == (("frozen", D(100)), 100, 100)
    at.check()


def test_a_failed_transfer_leaves_both_sides_stale_and_both_columns_written(database_url: str) -> None:
    at = place(database_url, rows=2)
    with at.engine.begin() as connection:
        at.adapter.transfer(connection, 1, 2, 1, type="gift")
    fail_ledger(at, "23514")
    with at.engine.begin() as connection:
        result = at.adapter.transfer(connection, 1, 2, 13, type="gift")
    assert (result.outcome, result.legacy_balance, result.payee_legacy_balance) == ("ledger_failed", D(86), D(114))
    assert (at.account(1), at.account(2)) == (("stale", D(99)), ("stale", D(101)))
    assert (at.coins(1), at.coins(2)) == (86, 114)
    at.check()


def test_in_a_batch_only_the_leg_that_failed_is_undone(database_url: str) -> None:
    at = place(database_url, rows=3)
    fail_ledger(at, "23514")
    with at.engine.begin() as connection:
        results = at.adapter.apply(connection, [Movement.credit(key, 12 + key % 2, type="deposit") for key in (1, 2)])
    assert [each.outcome for each in results] == ["ledger_failed", "ok"]
    assert (at.account(1), at.account(2)) == (None, ("mirrored", D(112)))
    assert (at.coins(1), at.coins(2)) == (113, 112)
    at.check()


def test_the_same_account_may_fail_and_recover_within_one_batch(database_url: str) -> None:
    at = place(database_url, rows=1)
    fail_ledger(at, "23514")
    with at.engine.begin() as connection:
        results = at.adapter.apply(connection, [Movement.credit(1, amount, type="deposit") for amount in (1, 13, 2)])
    assert [each.outcome for each in results] == ["ok", "ledger_failed", "ok"]
    assert at.account(1) == ("mirrored", D(116))
    assert [kind for kind, *_ in at.legs()] == ["opening", "posting", "resync", "posting"]
    at.check()


def test_a_reversal_whose_ledger_leg_failed_is_not_done_twice(database_url: str) -> None:
    at = place(database_url, rows=1)
    with at.engine.begin() as connection:
        number = at.adapter.credit(connection, 1, 13, type="deposit").transaction_id or 0
    fail_ledger(at, "23514")
    with at.engine.begin() as connection:
        assert at.adapter.reverse(connection, number, reason="refund").outcome == "ledger_failed"
    mend(at)
    with at.engine.begin() as connection:
        assert at.adapter.reverse(connection, number, reason="refund").replayed
    assert (at.coins(1), at.account(1)) == (100, ("stale", D(113)))
    at.check()


# Triggers of the application


BONUS = "if new.total_coins > old.total_coins then new.total_coins := new.total_coins + 1; end if; return new;"
UNDO = "new.total_coins := old.total_coins; return new;"


@pytest.mark.parametrize("state", ["absent", "mirrored", "stale", "closed, live"])
@pytest.mark.parametrize(("body", "legacy"), [(BONUS, 106), (UNDO, 100)], ids=["changes", "undoes"])
def test_under_shadow_an_update_that_a_trigger_changed_is_noticed(
    database_url: str, body: str, legacy: int, state: str
) -> None:
    at = place(database_url, rows=0)
    bring_into(at, 1, state)
    on_legacy(at, body)
    with Session(at.engine) as session:
        result = at.adapter.credit(session, 1, 5, type="deposit", correlation_id="c-1", idempotency_key="k")
        session.commit()
    assert (result.mode, result.outcome, result.mismatch) == ("dual_write", "ok", True)
    assert (result.legacy_balance, result.ledger_balance) == (D(legacy), D(105))
    assert (at.coins(1), at.account(1)) == (legacy, ("stale", D(105)))
    assert rows(at.engine, "select key, sqlstate, correlation_id from wallet.failures") == [("1", "WM020", "c-1")]
    assert at.metric("mismatch_total", where="write") == 1
    (seen,) = at.heard.mismatches
    assert (seen.key, seen.legacy, seen.ledger, seen.correlation_id) == (1, D(legacy), D(105), "c-1")
    at.check()

    with at.engine.begin() as connection:
        again = at.adapter.credit(connection, 1, 5, type="deposit", idempotency_key="k")
    assert (again.replayed, again.legacy_balance, again.ledger_balance) == (True, D(legacy), D(105))
    execute(at.engine, "drop trigger app on public.users")
    with at.engine.begin() as connection:
        assert at.adapter.debit(connection, 1, 1, type="booking").ledger_balance == legacy - 1
    assert at.account(1) == ("mirrored", D(legacy - 1))
    at.check()


@pytest.mark.parametrize("state", ["absent", "mirrored", "stale"])
@pytest.mark.parametrize("body", [BONUS, UNDO], ids=["changes", "undoes"])
def test_under_strict_an_update_that_a_trigger_changed_is_refused(database_url: str, body: str, state: str) -> None:
    at = place(database_url, rows=0, policy="strict")
    bring_into(at, 1, state)
    before = at.account(1)
    on_legacy(at, body)
    with at.engine.begin() as connection:
        savepoint = connection.begin_nested()
        with pytest.raises(LedgerMismatch, match="Roll back"):
            at.adapter.credit(connection, 1, 5, type="deposit")
        savepoint.rollback()
        assert at.adapter.balance(connection, 1).amount == 100
    assert (at.coins(1), at.account(1)) == (100, before)
    assert at.metric("mismatch_total", where="write") == 1
    assert at.metric("dual_write_total", operation="credit", outcome="ledger_failed") == 1
    at.check()


@pytest.mark.parametrize("side", ["payer", "payee"])
def test_a_trigger_that_changes_one_side_of_a_transfer_is_noticed(database_url: str, side: str) -> None:
    at = place(database_url, rows=2)
    changed = 1 if side == "payer" else 2
    on_legacy(at, f"if new.id = {changed} then new.total_coins := old.total_coins; end if; return new;")
    with at.engine.begin() as connection:
        result = at.adapter.transfer(connection, 1, 2, 5, type="gift")
    assert result.mismatch
    assert (result.legacy_balance, result.payee_legacy_balance) == (
        (D(100), D(105)) if side == "payer" else (D(95), D(100))
    )
    found = at.account(changed)
    assert found is not None
    assert found[0] == "stale"
    at.check()


@pytest.mark.parametrize("policy", ["shadow", "strict"])
def test_without_dual_write_the_result_is_what_the_trigger_left(database_url: str, policy: str) -> None:
    at = place(database_url, rows=0, flags=OFF, policy=policy)
    bring_into(at, 1, "mirrored")
    on_legacy(at, BONUS)
    with at.engine.begin() as connection:
        result = at.adapter.credit(connection, 1, 5, type="deposit", idempotency_key="k")
        again = at.adapter.credit(connection, 1, 5, type="deposit", idempotency_key="k")
    assert (result.mode, result.mismatch, result.legacy_balance) == ("legacy", False, D(106))
    assert (again.replayed, again.legacy_balance) == (True, D(106))
    assert (at.coins(1), at.account(1)) == (106, ("stale", D(100)))
    assert at.metric("mismatch_total", where="write") == 0
    assert rows(at.engine, "select * from wallet.failures") == []
    at.check()


@pytest.mark.parametrize("policy", ["shadow", "strict"])
@pytest.mark.parametrize("flags", [DUAL, OFF], ids=["on", "off"])
def test_an_update_that_a_trigger_suppressed_is_an_error(
    database_url: str, flags: dict[str, bool], policy: str
) -> None:
    at = place(database_url, rows=2, flags=flags, policy=policy)
    on_legacy(at, "if new.id = 1 then return null; end if; return new;")
    with at.engine.begin() as connection:
        savepoint = connection.begin_nested()
        with pytest.raises(LegacyUpdateSuppressed):
            at.adapter.credit(connection, 1, 5, type="deposit")
        savepoint.rollback()
        savepoint = connection.begin_nested()
        with pytest.raises(LegacyUpdateSuppressed):
            at.adapter.transfer(connection, 2, 1, 5, type="gift")
        savepoint.rollback()
        assert at.adapter.credit(connection, 2, 1, type="deposit").legacy_balance == 101
    assert (at.coins(1), at.coins(2), at.account(1)) == (100, 101, None)
    at.check()


@pytest.mark.parametrize("state", ["absent", "mirrored", "stale"])
def test_a_trigger_that_writes_the_same_row_again_turns_it_stale(database_url: str, state: str) -> None:
    at = place(database_url, rows=0)
    bring_into(at, 1, state)
    on_legacy(
        at,
        "if pg_trigger_depth() = 1 then update users set total_coins = total_coins + 1 where id = new.id; end if; "
        "return null;",
        when="after",
    )
    with at.engine.begin() as connection:
        at.adapter.credit(connection, 1, 5, type="deposit")
    assert (at.coins(1), at.account(1)) == (106, ("stale", D(105)))
    at.check()


def test_a_trigger_that_writes_another_row_turns_that_one_stale(database_url: str) -> None:
    at = place(database_url, rows=2)
    with at.engine.begin() as connection:
        at.adapter.open_account(connection, 2)
    on_legacy(
        at,
        "if new.id = 1 then update users set total_coins = total_coins + 1 where id = 2; end if; return null;",
        when="after",
    )
    with at.engine.begin() as connection:
        at.adapter.credit(connection, 1, 5, type="deposit")
    assert (at.account(1), at.account(2)) == (("mirrored", D(105)), ("stale", D(100)))
    assert (at.coins(1), at.coins(2)) == (105, 101)
    at.check()


def test_a_trigger_that_deletes_the_row_closes_the_account(database_url: str) -> None:
    at = place(database_url, rows=1)
    on_legacy(at, "if new.total_coins = 0 then delete from users where id = new.id; end if; return null;", when="after")
    with at.engine.begin() as connection:
        at.adapter.debit(connection, 1, 100, type="booking")
    found = at.account(1)
    assert found is not None
    assert (found[0], at.coins(1)) == ("closed", None)
    at.check()


def test_a_generated_time_stamp_of_the_application_is_no_mismatch(database_url: str) -> None:
    at = place(database_url, rows=1)
    execute(at.engine, "alter table users add updated_at timestamptz")
    on_legacy(at, "new.updated_at := clock_timestamp(); return new;")
    with at.engine.begin() as connection:
        result = at.adapter.credit(connection, 1, 5, type="deposit")
    assert (result.mismatch, at.account(1)) == (False, ("mirrored", D(105)))
    at.check()


def test_an_error_of_the_application_s_trigger_is_its_own_under_both_policies(database_url: str) -> None:
    at = place(database_url, rows=1)
    on_legacy(at, "raise exception 'not today' using errcode = 'AP001';")
    strict = at.settings.mapping(None).model_copy(update={"policy": "strict"})
    other = LegacyBalanceAdapter(at.settings.model_copy(update={"mappings": (strict,)}), at.source)
    for adapter in (at.adapter, other):
        with at.engine.connect() as connection, pytest.raises(DBAPIError) as raised:
            adapter.credit(connection, 1, 5, type="deposit")
        assert state_of(raised.value) == "AP001"
    assert (at.coins(1), at.account(1)) == (100, None)
    at.check()


def test_the_policy_is_the_caller_s_and_needs_no_install(database_url: str) -> None:
    at = place(database_url, rows=1)
    mapping = at.settings.mapping(None).model_copy(update={"policy": "strict"})
    strict: Any = at.another(settings=at.settings.model_copy(update={"mappings": (mapping,)}))
    add_check(at)
    with at.engine.connect() as connection, pytest.raises(DBAPIError):
        strict.credit(connection, 1, 13, type="deposit")
    with at.engine.begin() as connection:
        assert at.adapter.credit(connection, 1, 13, type="deposit").outcome == "ledger_failed"
