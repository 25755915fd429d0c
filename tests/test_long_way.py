"""What a posting leaves beside the balances when it goes the long way, and what it leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal

import pytest
from sqlalchemy import Connection

from adapting import DUAL, OFF, Place, bring_into, place, seal
from ledger import execute, rows, scalar, set_phase
from walletmigrate import LegacyBalanceAdapter, Movement, Posting
from walletmigrate.errors import (
    AmountOverflow,
    IdempotencyKeyReused,
    InsufficientFunds,
    LegacyValueInvalid,
    WalletMigrateError,
)

D = Decimal
Call = Callable[[LegacyBalanceAdapter, Connection, int, int], Posting]

CALLS: tuple[Call, ...] = (
    lambda adapter, on, key, _: adapter.credit(on, key, 5, type="test", description="the long way"),
    lambda adapter, on, key, _: adapter.debit(on, key, 5, type="test", description="the long way"),
    lambda adapter, on, key, other: adapter.transfer(on, key, other, 5, type="test"),
    lambda adapter, on, key, other: adapter.transfer(on, other, key, 5, type="test"),
)
"""What can be done with an account, and, in a transfer, with another."""


def why(at: Place, key: int) -> tuple[str, str]:
    (found,) = rows(at.engine, "select state::text, state_reason from wallet.accounts where key = :key", key=str(key))
    return found


# Why an account is stale


@pytest.mark.parametrize("state", ["mirrored", "closed, live"])
def test_an_account_that_was_passed_by_says_that_dual_write_was_off(database_url: str, state: str) -> None:
    at = place(database_url, rows=0, flags=OFF)
    for number, call in enumerate(CALLS):
        key, other = 10 * number, 10 * number + 1
        bring_into(at, key, state)
        bring_into(at, other, "absent")
        with at.engine.begin() as connection:
            call(at.adapter, connection, key, other)
        assert why(at, key) == ("stale", "written while dual-write was off or the line stopped")
    at.check()


def test_both_accounts_of_a_transfer_say_that_the_ledger_s_leg_failed(database_url: str) -> None:
    at = place(database_url, rows=0)
    bring_into(at, 1, "mirrored")
    bring_into(at, 2, "mirrored")
    execute(at.engine, "alter table wallet.transactions add constraint no_thirteen check (amount <> 13)")
    with at.engine.begin() as connection:
        assert at.adapter.transfer(connection, 1, 2, 13, type="gift").outcome == "ledger_failed"
    assert why(at, 1) == why(at, 2) == ("stale", "a ledger leg failed")
    at.check()


def test_a_resync_says_what_the_account_was(database_url: str) -> None:
    at = place(database_url, rows=0)
    for key, state in ((1, "stale"), (2, "closed, live")):
        bring_into(at, key, state)
        with at.engine.begin() as connection:
            at.adapter.credit(connection, key, 1, type="deposit")
    reasons = rows(at.engine, "select reason from wallet.transactions where kind = 'resync' order by id")
    assert reasons == [("the account was stale",), ("the account was closed",)]


def test_what_was_taken_back_of_one_account_does_not_say_where_another_s_money_comes_from(database_url: str) -> None:
    at = place(database_url, rows=0)
    bring_into(at, 1, "stale")
    bring_into(at, 2, "stale")
    execute(at.engine, "update wallet.accounts set state_reason = 'opening taken back' where key = '2'")
    last = at.last_id()
    with at.engine.begin() as connection:
        at.adapter.credit(connection, 1, 1, type="deposit")
    assert at.legs(last)[0] == ("resync", "bypass", "1", D(15))


# What is left alone


@pytest.mark.parametrize("flags", [DUAL, OFF], ids=["on", "off"])
def test_what_moves_nothing_does_not_write_the_legacy_row(database_url: str, flags: dict[str, bool]) -> None:
    at = place(database_url, rows=1, flags=flags)
    row = rows(at.engine, "select ctid::text, * from users")
    with at.engine.begin() as connection:
        at.adapter.open_account(connection, 1)
        at.adapter.set_balance(connection, 1, 100, actor="admin:7", reason="as counted")
    assert rows(at.engine, "select ctid::text, * from users") == row


def test_with_the_flag_off_an_account_is_not_opened_in_phase_frozen_either(database_url: str) -> None:
    at = place(database_url, rows=1, phase="frozen", flags=OFF)
    with at.engine.begin() as connection:
        result = at.adapter.set_balance(connection, 1, 120, actor="admin:7", reason="case")
    assert (result.mode, at.account(1), at.coins(1)) == ("legacy", None, 120)


@pytest.mark.parametrize("flags", [DUAL, OFF], ids=["on", "off"])
def test_a_posting_is_no_write_past_the_adapter(database_url: str, flags: dict[str, bool]) -> None:
    at = place(database_url, rows=2, flags=flags)
    with at.engine.begin() as connection:
        for call in CALLS:
            call(at.adapter, connection, 1, 2)
    assert rows(at.engine, "select key, treatment from wallet.bypasses") == []
    at.check()


# Keys


def test_a_replay_gives_the_balances_of_its_own_transaction(database_url: str) -> None:
    """By the short way, which leaves them to the transaction."""
    at = place(database_url, rows=2)
    with at.engine.begin() as connection:
        for key in (1, 2):
            at.adapter.open_account(connection, key)
        for key, amount in ((2, 7), (1, 5), (1, 3)):
            at.adapter.credit(connection, key, amount, type="deposit", idempotency_key=f"{key} {amount}")
        again = at.adapter.credit(connection, 1, 5, type="deposit", idempotency_key="1 5")
        back = at.adapter.debit(connection, 1, 5, type="booking", idempotency_key="back")
        once = at.adapter.debit(connection, 1, 5, type="booking", idempotency_key="back")
    assert (again.replayed, again.legacy_balance, again.ledger_balance) == (True, D(105), D(105))
    assert (once.replayed, once.legacy_balance, back.legacy_balance) == (True, D(103), D(103))


def test_what_was_done_once_stays_done_when_the_row_is_gone(database_url: str) -> None:
    at = place(database_url, rows=2)
    with at.engine.begin() as connection:

        def both() -> list[Posting]:
            return [
                at.adapter.credit(connection, 1, 5, type="deposit", idempotency_key="one"),
                at.adapter.transfer(connection, 1, 2, 5, type="gift", idempotency_key="two"),
            ]

        done = both()
        connection.exec_driver_sql("delete from users where id = 1")
        again = both()
    assert [one.replayed for one in again] == [True, True]
    assert [one.transaction_id for one in again] == [one.transaction_id for one in done]
    at.check()


def test_of_two_requests_under_one_key_in_a_large_batch_the_first_holds_it(database_url: str) -> None:
    """Enough of them that a sort by key alone does not keep their order."""
    at = place(database_url, rows=1)
    keys = [f"k{number}" for number in range(9, 1, -1)]
    batch = [Movement.credit(1, 1, type="deposit", idempotency_key=key) for key in keys]
    other = Movement.credit(1, 2, type="deposit", idempotency_key=keys[0])
    with at.engine.begin() as connection:
        with pytest.raises(IdempotencyKeyReused):
            at.adapter.apply(connection, [*batch[:-1], other])
        assert not any(each.replayed for each in at.adapter.apply(connection, batch))
    assert at.coins(1) == 108


# A legacy value that is no exact amount


@pytest.mark.parametrize("policy", ["shadow", "strict"])
def test_a_side_that_holds_no_exact_amount_is_refused_or_recorded(database_url: str, policy: str) -> None:
    at = place(database_url, rows=2, coins_type="numeric(20, 4)", policy=policy)
    execute(at.engine, "update users set total_coins = 100.0005 where id = 1")
    for call in CALLS:
        with at.engine.begin() as connection:
            if policy == "strict":
                with pytest.raises(LegacyValueInvalid) as refused:
                    call(at.adapter, connection, 1, 2)
                assert refused.value.key == 1
            else:
                assert call(at.adapter, connection, 1, 2).outcome == "ledger_failed"
    recorded = rows(at.engine, "select key, sqlstate from wallet.failures")
    assert recorded == ([] if policy == "strict" else [("1", "WM023")] * len(CALLS))
    at.check()


# Rows that the owner of the ledger cannot see


def test_a_side_that_row_level_security_hides_from_the_owner_is_never_left_out(database_url: str) -> None:
    at = place(database_url, rows=2)
    with at.engine.begin() as connection:
        at.adapter.open_account(connection, 1)
        at.adapter.open_account(connection, 2)
    execute(at.engine, "create policy but_one on users using (id <> 1)")
    execute(at.engine, "alter table users enable row level security")
    for call in CALLS:
        with at.engine.connect() as connection:
            with pytest.raises(WalletMigrateError, match="row-level security hides"):
                call(at.adapter, connection, 1, 2)
            connection.rollback()
    assert (at.coins(1), at.coins(2)) == (100, 100)
    at.check()


# Figures of a frozen account: the column no longer says what it holds


def test_a_frozen_account_is_judged_and_told_by_the_ledger_alone(database_url: str) -> None:
    at = place(database_url, rows=1, coins_type="numeric(5, 2)", floor=D(0))
    with at.engine.begin() as connection:
        at.adapter.open_account(connection, 1)
        seal(connection, 1)
    set_phase(at.engine, "frozen")
    with at.engine.begin() as connection:
        at.adapter.credit(connection, 1, 400, type="deposit")
        assert at.adapter.credit(connection, 1, 400, type="deposit").ledger_balance == 900
        with pytest.raises(AmountOverflow) as over:
            at.adapter.credit(connection, 1, 200, type="deposit")
        assert over.value.balance == 1100
        with pytest.raises(InsufficientFunds) as short:
            at.adapter.debit(connection, 1, D("900.01"), type="booking")
        assert short.value.balance == 900
        assert at.adapter.debit(connection, 1, 300, type="booking").ledger_balance == 600
        assert at.adapter.debit(connection, 1, 100, type="booking").ledger_balance == 500
        set_to = at.adapter.set_balance(connection, 1, -999, actor="admin:7", reason="case")
    assert set_to.ledger_balance == -999
    assert at.coins(1) == 100
    assert scalar(at.engine, "select amount from wallet.transactions order by id desc limit 1") == 1499
    at.check()
