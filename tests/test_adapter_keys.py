"""One idempotency key moves money at most once, and a transaction is reversed at most once."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest

from adapting import DUAL, OFF, Place, bring_into, place, seal
from ledger import execute, rows, set_phase
from refusing import Call, refusal
from walletmigrate import LegacyBalanceAdapter, Movement, StaticSource
from walletmigrate.errors import (
    IdempotencyKeyReused,
    InsufficientFunds,
    InvalidMovement,
    NotReversible,
    UnknownAccount,
    UnknownTransaction,
    UsageError,
)

D = Decimal


# Reversals


@pytest.mark.parametrize("state", ["mirrored", "stale", "frozen", "closed, live"])
@pytest.mark.parametrize("wish", ["on", "off", "stopped", "flipped"])
def test_a_transaction_is_reversed_at_most_once_in_every_mode(database_url: str, state: str, wish: str) -> None:
    at = place(database_url, rows=0)
    made = bring_into(at, 1, state)
    assert made is not None
    at.flags(OFF if wish in ("off", "flipped") else DUAL)
    execute(at.engine, "select wallet.set_line(:on)", on=wish != "stopped")
    with at.engine.begin() as connection:
        first = at.adapter.reverse(connection, made, reason="refund")
    at.flags(DUAL if wish == "flipped" else OFF if wish == "off" else DUAL)
    with at.engine.begin() as connection:
        second = at.adapter.reverse(connection, made, reason="refund, again", actor="admin:8")
        third = at.adapter.apply(connection, [Movement.reverse(made, reason="x"), Movement.credit(1, 1, type="y")])
    assert (first.replayed, second.replayed, third[0].replayed) == (False, True, True)
    assert (second.transaction_id, second.mode) == (first.transaction_id, first.mode)
    assert (second.legacy_balance, second.ledger_balance) == (first.legacy_balance, first.ledger_balance)
    assert D(95) in (first.legacy_balance, first.ledger_balance)
    assert at.coins(1) == (100 if state == "frozen" else 96)
    at.check()


def test_a_reversal_takes_no_key_as_it_would_be_dropped_and_move_money_again(database_url: str) -> None:
    at = place(database_url)
    with at.engine.begin() as connection:
        made = at.adapter.credit(connection, 1, 1, type="deposit").transaction_id or 0
        with pytest.raises(InvalidMovement, match="is its own key"):
            at.adapter.reverse(connection, made, reason="refund", idempotency_key="refund:7")
        assert at.adapter.credit(connection, 1, 1, type="deposit", idempotency_key="refund:7").legacy_balance == 102
    at.check()


def test_a_batch_may_be_a_generator_and_is_refused_for_what_it_is(database_url: str) -> None:
    at = place(database_url)
    with at.engine.begin() as connection:
        with pytest.raises(UnknownAccount):
            at.adapter.apply(connection, (Movement.credit(key, 1, type="y") for key in (1, 999)))
        assert at.adapter.apply(connection, iter(())) == ()
        for wrong, said in ((Movement.credit(1, 1, type="y"), "several"), ([{"key": 1}], "not dict")):
            with pytest.raises(UsageError, match=said):
                at.adapter.apply(connection, wrong)  # type: ignore[arg-type]
    assert at.coins(1) == 100


def test_a_reversal_has_the_type_and_the_accounts_of_what_it_undoes(database_url: str) -> None:
    at = place(database_url, rows=2, with_promo=True)
    with at.engine.begin() as connection:
        gift = at.adapter.transfer(connection, 1, 2, 3, type="gift", bucket="promo")
        undone = at.adapter.reverse(connection, gift.transaction_id or 0, reason="refund")
        fixed = at.adapter.set_balance(connection, 1, 7, actor="admin:7", reason="case")
        back = at.adapter.reverse(connection, fixed.transaction_id or 0, reason="mistake")
    assert (undone.bucket, undone.currency) == ("promo", "EUR")
    assert (undone.ledger_balance, undone.payee_ledger_balance) == (D(5), D(5))
    assert back.ledger_balance == 100
    found = rows(at.engine, "select kind::text, type, reverses from wallet.transactions where reverses is not null")
    assert found == [("reversal", "gift", gift.transaction_id), ("reversal", "set_balance", fixed.transaction_id)]
    assert at.legs()[-1] == ("reversal", "correction", "1", D(93))
    at.check()


def test_openings_resyncs_and_reversals_are_not_reversible(database_url: str) -> None:
    at = place(database_url, rows=1)
    with at.engine.begin() as connection:
        at.adapter.open_account(connection, 1)
        connection.exec_driver_sql("update users set total_coins = 90")
        posted = at.adapter.credit(connection, 1, 1, type="deposit")
        at.adapter.reverse(connection, posted.transaction_id or 0, reason="refund")
    for number, kind in rows(at.engine, "select id, kind::text from wallet.transactions where kind <> 'posting'"):
        with refusal(at, NotReversible) as got:
            at.adapter.reverse(got[0], number, reason=f"undo the {kind}")
        assert got[1].transaction_id == number


def test_half_a_transfer_is_not_reversed(database_url: str) -> None:
    at = place(database_url, rows=2, flags=OFF)
    with at.engine.begin() as connection:
        LegacyBalanceAdapter(at.settings, StaticSource(DUAL)).open_account(connection, 1)
        seal(connection, 1)
        gift = at.adapter.transfer(connection, 1, 2, 5, type="gift")
    assert at.legs()[-1] == ("posting", "1", "transit", D(5))
    with refusal(at, NotReversible) as got:
        at.adapter.reverse(got[0], gift.transaction_id or 0, reason="the payee would keep the money")
    assert "transit" in str(got[1])


@pytest.mark.parametrize("number", [0, -1, 2**63, True, "5", 1.0, None])
def test_what_is_no_transaction_id_is_refused(database_url: str, number: Any) -> None:
    at = place(database_url, rows=1)
    with refusal(at, InvalidMovement) as got:
        at.adapter.reverse(got[0], number, reason="refund")
    assert got[1].field == "transaction_id"


def test_a_transaction_that_does_not_exist_is_refused(database_url: str) -> None:
    at = place(database_url, rows=1)
    with refusal(at, UnknownTransaction) as got:
        at.adapter.reverse(got[0], 2**62, reason="refund")
    assert got[1].transaction_id == 2**62


def test_a_caller_s_key_does_not_stand_in_the_way_of_a_reversal(database_url: str) -> None:
    at = place(database_url, rows=1)
    with at.engine.begin() as connection:
        posted = at.adapter.credit(connection, 1, 5, type="deposit")
        at.adapter.credit(connection, 1, 1, type="x", idempotency_key=f"reversal:{posted.transaction_id}")
        assert not at.adapter.reverse(connection, posted.transaction_id or 0, reason="refund").replayed
    at.check()


# Idempotency

MODES = ["on", "off", "stopped", "legacy phase", "frozen", "ledger failed"]


def into_mode(at: Place, mode: str) -> None:
    """Make the next posting on account 1 run in a mode."""
    at.flags(OFF if mode == "off" else DUAL)
    set_phase(at.engine, "legacy" if mode == "legacy phase" else "dual_write")
    execute(at.engine, "select wallet.set_line(:on)", on=mode != "stopped")
    execute(at.engine, "drop trigger if exists fault on wallet.transactions")
    if mode == "frozen":
        with at.engine.begin() as connection:
            LegacyBalanceAdapter(at.settings, StaticSource(DUAL)).open_account(connection, 1)
            seal(connection, 1)
    if mode == "ledger failed":
        execute(
            at.engine,
            "create function public.fault() returns trigger language plpgsql as "
            "$$ begin raise exception 'fault' using errcode = '23514'; end $$",
        )
        execute(at.engine, "create trigger fault before insert on wallet.transactions execute function public.fault()")


@pytest.mark.parametrize("first", MODES)
@pytest.mark.parametrize("operation", ["credit", "set_balance", "transfer"])
def test_a_key_moves_money_once_across_modes(database_url: str, operation: str, first: str) -> None:
    at = place(database_url, rows=2)
    calls: dict[str, Call] = {
        "credit": lambda adapter, on: adapter.credit(on, 1, 5, type="deposit", idempotency_key="k"),
        "set_balance": lambda adapter, on: adapter.set_balance(
            on, 1, 105, actor="admin:7", reason="case", idempotency_key="k"
        ),
        "transfer": lambda adapter, on: adapter.transfer(on, 2, 1, 5, type="gift", idempotency_key="k"),
    }
    into_mode(at, first)
    with at.engine.begin() as connection:
        done: Any = calls[operation](at.adapter, connection)
    assert not done.replayed
    for second in ("on", "off", "stopped", "legacy phase"):
        into_mode(at, second)
        with at.engine.begin() as connection:
            again: Any = calls[operation](at.another(), connection)
        assert (again.replayed, again.outcome) == (True, "replayed")
        for name in ("mode", "transaction_id", "legacy_balance", "ledger_balance", "payee_legacy_balance"):
            assert getattr(again, name) == getattr(done, name), name
    expected = {"on": "dual_write", "frozen": "dual_write" if operation == "transfer" else "ledger"}
    assert done.mode == expected.get(first, "legacy")
    assert done.outcome == (
        "ledger_failed" if first == "ledger failed" else "ok" if done.mode != "legacy" else "skipped"
    )
    assert at.coins(1) == (100 if first == "frozen" else 105)
    if first == "frozen":
        assert at.account(1) == ("frozen", D(105))
    at.check()


def test_a_replay_is_the_first_result_though_the_balance_is_another_by_now(database_url: str) -> None:
    at = place(database_url, rows=1, floor=D(0))
    with at.engine.begin() as connection:
        at.adapter.debit(connection, 1, 60, type="booking", idempotency_key="k")
        at.adapter.debit(connection, 1, 40, type="booking")
        again = at.adapter.debit(connection, 1, 60, type="booking", idempotency_key="k")
    assert (again.replayed, again.legacy_balance, again.ledger_balance) == (True, D(40), D(40))
    assert at.coins(1) == 0
    at.check()


def test_a_key_of_the_short_way_whose_mode_is_not_kept_is_replayed_as_dual_write(database_url: str) -> None:
    at = place(database_url, rows=1)
    with at.engine.begin() as connection:
        at.adapter.open_account(connection, 1)
        done = at.adapter.credit(connection, 1, 5, type="deposit", idempotency_key="k")
        again = at.adapter.credit(connection, 1, 5, type="deposit", idempotency_key="k")
    assert rows(at.engine, "select mode, transaction_id from wallet.idempotency_keys") == [(None, done.transaction_id)]
    assert again.replayed
    for name in ("mode", "transaction_id", "legacy_balance", "ledger_balance"):
        assert getattr(again, name) == getattr(done, name), name
    at.check()


OTHERS: dict[str, Call] = {
    "account": lambda adapter, on: adapter.credit(on, 2, 5, type="deposit", idempotency_key="k"),
    "amount": lambda adapter, on: adapter.credit(on, 1, 6, type="deposit", idempotency_key="k"),
    "operation": lambda adapter, on: adapter.debit(on, 1, 5, type="deposit", idempotency_key="k"),
    "type": lambda adapter, on: adapter.credit(on, 1, 5, type="gift", idempotency_key="k"),
    "bucket": lambda adapter, on: adapter.credit(on, 1, 5, type="deposit", bucket="promo", idempotency_key="k"),
    "reference": lambda adapter, on: adapter.credit(
        on, 1, 5, type="deposit", reference=("deposit", 1), idempotency_key="k"
    ),
    "payee": lambda adapter, on: adapter.transfer(on, 1, 2, 5, type="deposit", idempotency_key="k"),
    "in a batch": lambda adapter, on: adapter.apply(
        on, [Movement.credit(1, 1, type="x"), Movement.credit(1, 6, type="deposit", idempotency_key="k")]
    ),
}


@pytest.mark.parametrize("mode", ["on", "off"])
@pytest.mark.parametrize("call", list(OTHERS.values()), ids=list(OTHERS))
def test_a_key_reused_for_another_request_is_refused(database_url: str, call: Call, mode: str) -> None:
    at = place(database_url, rows=2, with_promo=True, flags=DUAL if mode == "on" else OFF)
    with at.engine.begin() as connection:
        at.adapter.credit(connection, 1, 5, type="deposit", idempotency_key="k")
    with refusal(at, IdempotencyKeyReused) as got:
        call(at.adapter, got[0])
    assert got[1].idempotency_key == "k"


def test_a_retry_with_other_words_is_the_same_request(database_url: str) -> None:
    at = place(database_url, rows=1)
    with at.engine.begin() as connection:
        first = at.adapter.credit(connection, 1, 5, type="deposit", idempotency_key="k", description="Deposit")
        again = at.adapter.credit(
            connection, 1, D("5.00"), type="deposit", idempotency_key="k", description="Retry", correlation_id="other"
        )
    assert again.replayed
    assert again.transaction_id == first.transaction_id


def test_the_key_of_a_refused_movement_is_free(database_url: str) -> None:
    at = place(database_url, rows=1, floor=D(0))
    with refusal(at, InsufficientFunds) as got:
        at.adapter.debit(got[0], 1, 500, type="booking", idempotency_key="k")
    with at.engine.begin() as connection:
        at.adapter.credit(connection, 1, 500, type="deposit")
        assert not at.adapter.debit(connection, 1, 500, type="booking", idempotency_key="k").replayed
    at.check()


def test_the_key_of_a_rolled_back_movement_is_free(database_url: str) -> None:
    at = place(database_url, rows=1)
    with at.engine.connect() as connection, connection.begin():
        savepoint = connection.begin_nested()
        at.adapter.credit(connection, 1, 5, type="deposit", idempotency_key="k")
        savepoint.rollback()
        assert not at.adapter.credit(connection, 1, 5, type="deposit", idempotency_key="k").replayed
    assert at.coins(1) == 105
    at.check()


@pytest.mark.parametrize("flags", [DUAL, OFF], ids=["on", "off"])
def test_a_key_twice_within_a_batch_moves_money_once(database_url: str, flags: dict[str, bool]) -> None:
    at = place(database_url, rows=1, flags=flags)
    same = Movement.credit(1, 5, type="deposit", idempotency_key="k")
    with at.engine.begin() as connection:
        results = at.adapter.apply(connection, [same, Movement.credit(1, 1, type="x"), same])
    assert [each.replayed for each in results] == [False, False, True]
    assert [each.legacy_balance for each in results] == [105, 106, 105]
    assert results[2].transaction_id == results[0].transaction_id
    assert at.coins(1) == 106
    at.check()


def test_a_key_twice_within_a_batch_for_two_requests_is_refused(database_url: str) -> None:
    at = place(database_url, rows=1)
    with refusal(at, IdempotencyKeyReused) as got:
        batch = [Movement.credit(1, n, type="deposit", idempotency_key="k") for n in (5, 6)]
        at.adapter.apply(got[0], batch)


def test_a_key_of_a_single_call_replays_within_a_batch_and_the_other_way_round(database_url: str) -> None:
    at = place(database_url, rows=1)
    one, two = (Movement.credit(1, 5, type="deposit", idempotency_key=key) for key in ("one", "two"))
    with at.engine.begin() as connection:
        single = at.adapter.credit(connection, 1, 5, type="deposit", idempotency_key="one")
        batch = at.adapter.apply(connection, [two, one])
        again = at.adapter.credit(connection, 1, 5, type="deposit", idempotency_key="two")
    assert [each.replayed for each in batch] == [False, True]
    assert (batch[1].transaction_id, again.transaction_id) == (single.transaction_id, batch[0].transaction_id)
    assert again.replayed
    assert at.coins(1) == 110
    at.check()


def test_a_reversal_twice_within_a_batch_moves_money_once(database_url: str) -> None:
    at = place(database_url, rows=1)
    with at.engine.begin() as connection:
        number = at.adapter.credit(connection, 1, 5, type="deposit").transaction_id or 0
        results = at.adapter.apply(
            connection, [Movement.reverse(number, reason="a"), Movement.reverse(number, reason="b")]
        )
    assert [each.replayed for each in results] == [False, True]
    assert at.coins(1) == 100
    at.check()
