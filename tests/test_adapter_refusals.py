"""What is refused: typed, with fields, nothing written, the caller's transaction usable; and idempotency."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError
from structlog.contextvars import bound_contextvars

from adapting import DUAL, OFF, Place, bring_into, custom, place, seal
from ledger import execute, fence_down, rows, scalar, set_phase
from walletmigrate import (
    LegacyBalanceAdapter,
    Movement,
    PostingRefused,
    StaticSource,
    WalletMigrateError,
    errors,
)
from walletmigrate.errors import (
    AmountOverflow,
    IdempotencyKeyReused,
    InsufficientFunds,
    InvalidAmount,
    InvalidKey,
    InvalidMovement,
    LegacyValueInvalid,
    NotReversible,
    SelfTransfer,
    UnknownAccount,
    UnknownBucket,
    UnknownCurrency,
    UnknownTransaction,
)

D = Decimal
Call = Callable[[LegacyBalanceAdapter, Connection], object]

WRITTEN = {
    "users": "select id, total_coins, promo from users order by id",
    "accounts": "select id, key, bucket, state, balance from wallet.accounts order by id",
    "transactions": "select id from wallet.transactions order by id",
    "keys": "select key from wallet.idempotency_keys order by key",
    "failures": "select key, message from wallet.failures order by id",
    "details": "select * from wallet.transaction_details",
}


@contextmanager
def refusal(at: Place, error: type[PostingRefused], key: object = 1) -> Iterator[list[Any]]:
    """The block's call is refused, nothing of it is written, and the same transaction can still post.

    Yields a list: of the connection, and in the end of the error.
    """
    got: list[Any] = []
    with at.engine.connect() as connection, connection.begin() as transaction:
        before = {name: str(connection.exec_driver_sql(query).all()) for name, query in WRITTEN.items()}
        got.append(connection)
        with pytest.raises(error) as refused:
            yield got
        got.append(refused.value)
        after = {name: str(connection.exec_driver_sql(query).all()) for name, query in WRITTEN.items()}
        assert after == before
        assert fields(refused.value), "an error has fields"  # type: ignore[arg-type]
        assert len(str(refused.value)) > 20, "an error is a sentence"
        at.adapter.credit(connection, key, 1, type="still usable")  # type: ignore[arg-type]
        transaction.commit()
    assert at.heard.posted[-2].outcome == "refused"
    assert at.heard.posted[-2].error == refused.value.code
    at.check()


AMOUNTS: list[Any] = [
    1.5,
    float("nan"),
    D("NaN"),
    D("sNaN"),
    D("Infinity"),
    D("-Infinity"),
    0,
    D("0.00"),
    -1,
    D("-0.01"),
    True,
    "5",
    None,
    D("0.001"),
    D("1e-30"),
    D("1e40"),
    10**5000,
    1 + 0j,
]


@pytest.mark.parametrize("operation", ["credit", "debit", "transfer", "batch"])
def test_an_amount_that_is_no_exact_positive_amount_is_refused(database_url: str, operation: str) -> None:
    at = place(database_url, rows=2)
    for amount in AMOUNTS:
        with refusal(at, InvalidAmount) as got:
            if operation == "transfer":
                at.adapter.transfer(got[0], 1, 2, amount, type="gift")
            elif operation == "batch":
                movements = [Movement.credit(2, 1, type="deposit"), Movement.debit(1, amount, type="booking")]
                at.adapter.apply(got[0], movements)
            else:
                getattr(at.adapter, operation)(got[0], 1, amount, type="deposit")
    assert at.coins(1) == 100 + len(AMOUNTS)


def test_a_target_that_is_no_exact_amount_is_refused(database_url: str) -> None:
    at = place(database_url, rows=1)
    for amount in (1.5, D("NaN"), D("Infinity"), True, "5", None, D("0.001"), D("-1e40")):
        with refusal(at, InvalidAmount) as got:
            at.adapter.set_balance(got[0], 1, amount, actor="admin:7", reason="case")  # type: ignore[arg-type]


def test_zeros_behind_the_last_decimal_are_no_extra_decimals(database_url: str) -> None:
    at = place(database_url, rows=1)
    with at.engine.begin() as connection:
        assert at.adapter.credit(connection, 1, D("1.500000"), type="deposit").legacy_balance == D("101.50")


@pytest.mark.parametrize(
    ("key_type", "key"),
    [
        ("bigint", "1"),
        ("bigint", 1.0),
        ("bigint", True),
        ("bigint", None),
        ("bigint", 2**63),
        ("bigint", (1, 2)),
        ("bigint", {"id": 1}),
        ("text", 1),
        ("text", "nul\0"),
        ("text", "\ud800"),
        ("text", ("a", "b")),
        ("uuid", "not a uuid"),
        ("uuid", 1),
        ("uuid", (uuid.UUID(int=1), uuid.UUID(int=2))),
    ],
    ids=repr,
)
def test_a_key_of_another_type_and_a_composite_key_are_refused(database_url: str, key_type: str, key: Any) -> None:
    at = place(database_url, rows=2, key_type=key_type)
    good: Any = {"bigint": 1, "text": "user-0000001", "uuid": "00000000-0000-4000-8000-000000000001"}[key_type]
    with refusal(at, InvalidKey, good) as got:
        at.adapter.credit(got[0], key, 1, type="deposit")
    with refusal(at, InvalidKey, good) as got:
        at.adapter.transfer(got[0], good, key, 1, type="gift")
    with at.engine.connect() as connection, pytest.raises(InvalidKey):
        at.adapter.balance(connection, key)
    with at.engine.connect() as connection, pytest.raises(InvalidKey):
        at.adapter.history(connection, key)


MOVES: dict[str, Call] = {
    "credit": lambda adapter, on: adapter.credit(on, 404, 1, type="deposit"),
    "debit": lambda adapter, on: adapter.debit(on, 404, 1, type="booking"),
    "set_balance": lambda adapter, on: adapter.set_balance(on, 404, 1, actor="admin:7", reason="case"),
    "open_account": lambda adapter, on: adapter.open_account(on, 404),
    "transfer to": lambda adapter, on: adapter.transfer(on, 1, 404, 1, type="gift"),
    "transfer from": lambda adapter, on: adapter.transfer(on, 404, 1, 1, type="gift"),
    "batch": lambda adapter, on: adapter.apply(
        on, [Movement.credit(1, 1, type="a", idempotency_key="k"), Movement.credit(404, 1, type="b")]
    ),
}


@pytest.mark.parametrize("flags", [DUAL, OFF], ids=["on", "off"])
@pytest.mark.parametrize("call", list(MOVES.values()), ids=list(MOVES))
def test_an_unknown_account_is_refused(database_url: str, call: Call, flags: dict[str, bool]) -> None:
    at = place(database_url, rows=1, flags=flags)
    with refusal(at, UnknownAccount) as got:
        call(at.adapter, got[0])
    assert (got[1].mapping, got[1].key) == ("users", 404)


@pytest.mark.parametrize(
    ("bucket", "currency", "error"),
    [
        ("gold", None, UnknownBucket),
        ("cash", "USD", UnknownCurrency),
        ("", None, UnknownBucket),
        (5, "EUR", UnknownBucket),
    ],
)
def test_an_unknown_bucket_or_currency_is_refused(
    database_url: str, bucket: Any, currency: Any, error: type[PostingRefused]
) -> None:
    at = place(database_url, rows=2)
    with refusal(at, error) as got:
        at.adapter.credit(got[0], 1, 1, type="deposit", bucket=bucket, currency=currency)
    with refusal(at, error) as got:
        at.adapter.transfer(got[0], 1, 2, 1, type="gift", bucket=bucket, currency=currency)
    with at.engine.connect() as connection, pytest.raises(error):
        at.adapter.balance(connection, 1, bucket=bucket, currency=currency)
    with at.engine.connect() as connection, pytest.raises(error):
        at.adapter.history(connection, 1, bucket=bucket, currency=currency)


def test_of_several_currencies_one_has_to_be_named(database_url: str) -> None:
    at = custom(
        database_url,
        "create table users (id bigint primary key, total_coins numeric(12, 2) not null, promo bigint not null);"
        "insert into users values (1, 10, 1000)",
        {
            "name": "users",
            "table": "public.users",
            "key": "id",
            "columns": [
                {"bucket": "cash", "column": "total_coins", "currency": "EUR", "scale": 2},
                {"bucket": "cash", "column": "promo", "currency": "JPY", "scale": 0},
            ],
        },
    )
    with at.engine.begin() as connection, pytest.raises(UnknownCurrency) as refused:
        at.adapter.credit(connection, 1, 1, type="deposit")
    assert refused.value.known == ("EUR", "JPY")
    with at.engine.begin() as connection, pytest.raises(InvalidAmount):
        at.adapter.credit(connection, 1, D("0.5"), type="deposit", currency="JPY")


def test_nobody_can_pay_oneself(database_url: str) -> None:
    at = place(database_url, rows=1)
    with refusal(at, SelfTransfer) as got:
        at.adapter.transfer(got[0], 1, 1, 1, type="gift")


def test_nobody_can_pay_oneself_under_another_spelling_of_the_key(database_url: str) -> None:
    at = place(database_url, rows=1, key_type="uuid")
    key = uuid.UUID("00000000-0000-4000-8000-00000000000a")
    execute(at.engine, "insert into users values (:key, 'acme', 'member', 1, 0)", key=key)
    with refusal(at, SelfTransfer, key) as got:
        at.adapter.transfer(got[0], key, str(key).upper(), 1, type="gift")


# Floor


@pytest.mark.parametrize("state", ["absent", "mirrored", "stale", "frozen", "closed, live"])
@pytest.mark.parametrize("flags", [DUAL, OFF], ids=["on", "off"])
def test_a_debit_below_the_floor_is_refused_in_every_state(
    database_url: str, state: str, flags: dict[str, bool]
) -> None:
    at = place(database_url, rows=0, floor=D("-10"), flags=flags)
    bring_into(at, 1, state)
    bring_into(at, 2, "mirrored")
    with refusal(at, InsufficientFunds, 2) as got:
        at.adapter.debit(got[0], 1, D("110.01"), type="booking")
    refused = got[1]
    assert (refused.key, refused.balance, refused.amount, refused.floor) == (1, D(100), D("110.01"), D(-10))
    with refusal(at, InsufficientFunds, 2) as got:
        at.adapter.transfer(got[0], 1, 2, 200, type="gift")
    assert (got[1].key, got[1].balance) == (1, D(100))
    with at.engine.begin() as connection:
        result = at.adapter.debit(connection, 1, 110, type="booking")
    assert D(-10) in (result.legacy_balance, result.ledger_balance)
    at.check()


def test_a_credit_lifts_a_balance_that_is_below_the_floor_already(database_url: str) -> None:
    at = place(database_url, rows=1, floor=D(0), coins="-50")
    with at.engine.begin() as connection:
        assert at.adapter.credit(connection, 1, 10, type="deposit").ledger_balance == -40
    with refusal(at, InsufficientFunds) as got:
        at.adapter.debit(got[0], 1, D("0.01"), type="booking")
    assert got[1].balance == -40


def test_a_reversal_that_would_go_below_the_floor_is_refused_with_its_figures(database_url: str) -> None:
    at = place(database_url, rows=1, floor=D(0), coins="0", with_promo=True)
    with at.engine.begin() as connection:
        gift = at.adapter.credit(connection, 1, 8, type="gift")
        at.adapter.debit(connection, 1, 5, type="booking")
    assert gift.transaction_id is not None
    with refusal(at, InsufficientFunds) as got:
        at.adapter.reverse(got[0], gift.transaction_id, reason="mistake")
    assert (got[1].key, got[1].balance, got[1].amount, got[1].floor) == ("1", D(3), D(8), D(0))


def test_without_a_floor_a_balance_may_go_below_zero(database_url: str) -> None:
    at = place(database_url, rows=1)
    with at.engine.begin() as connection:
        assert at.adapter.debit(connection, 1, 150, type="booking").ledger_balance == -50
    at.check()


# Overflow


@pytest.mark.parametrize("flags", [DUAL, OFF], ids=["on", "off"])
@pytest.mark.parametrize(
    ("coins_type", "unit", "scale", "top", "bottom"),
    [
        ("integer", "major", 0, D(2**31 - 1), D(-(2**31))),
        ("bigint", "minor", 2, D(2**63 - 1) / 100, D(-(2**63)) / 100),
        ("smallint", "minor", 2, D("327.67"), D("-327.68")),
        ("numeric(6, 2)", "major", 2, D("9999.99"), D("-9999.99")),
        ("numeric(8, 4)", "major", 2, D("9999.99"), D("-9999.99")),
    ],
)
def test_a_balance_that_does_not_fit_the_column_is_refused(
    database_url: str,
    flags: dict[str, bool],
    coins_type: str,
    unit: str,
    scale: int,
    top: Decimal,
    bottom: Decimal,
) -> None:
    at = place(database_url, rows=2, coins_type=coins_type, unit=unit, scale=scale, coins="0", flags=flags)
    room = top - 1
    with at.engine.begin() as connection:
        at.adapter.set_balance(connection, 2, room, actor="admin:7", reason="fill")
    unit_amount = D(1).scaleb(-scale)
    with refusal(at, AmountOverflow) as got:
        at.adapter.credit(got[0], 2, 1 + unit_amount, type="deposit")
    assert (got[1].key, got[1].balance, got[1].column) == (2, top + unit_amount, "total_coins")
    with refusal(at, AmountOverflow) as got:
        at.adapter.transfer(got[0], 1, 2, 2, type="gift")
    assert (got[1].key, got[1].balance) == (2, top + 1)
    with refusal(at, AmountOverflow) as got:
        at.adapter.set_balance(got[0], 1, top + unit_amount, actor="admin:7", reason="case")
    assert (got[1].key, got[1].balance) == (1, top + unit_amount)
    with refusal(at, AmountOverflow, 2) as got:
        at.adapter.set_balance(got[0], 1, bottom - unit_amount, actor="admin:7", reason="case")
    with at.engine.begin() as connection:
        at.adapter.set_balance(connection, 1, bottom, actor="admin:7", reason="case")
        assert at.adapter.set_balance(connection, 2, top, actor="admin:7", reason="case").legacy_balance == top
    with refusal(at, AmountOverflow, 1) as got:
        at.adapter.debit(got[0], 1, unit_amount, type="fee")
    assert (got[1].key, got[1].balance) == (1, bottom - unit_amount)
    at.check()


def test_a_payer_that_would_leave_the_column_s_range_is_the_one_named(database_url: str) -> None:
    at = place(database_url, rows=2, coins_type="numeric(6, 2)", coins="-9999")
    with refusal(at, AmountOverflow) as got:
        at.adapter.transfer(got[0], 1, 2, 5, type="gift")
    assert (got[1].key, got[1].balance) == (1, D("-10004"))


# Legacy values


@pytest.mark.parametrize("flags", [DUAL, OFF], ids=["on", "off"])
@pytest.mark.parametrize("value", ["null", "'NaN'", "'Infinity'", "'-Infinity'"])
def test_a_legacy_value_that_is_no_amount_is_refused(database_url: str, value: str, flags: dict[str, bool]) -> None:
    at = place(database_url, rows=2, coins_type="numeric", flags=flags)
    execute(at.engine, f"update users set total_coins = {value} where id = 2")
    calls: list[Call] = [
        lambda adapter, on: adapter.credit(on, 2, 1, type="deposit"),
        lambda adapter, on: adapter.debit(on, 2, 1, type="booking"),
        lambda adapter, on: adapter.transfer(on, 1, 2, 1, type="gift"),
        lambda adapter, on: adapter.transfer(on, 2, 1, 1, type="gift"),
    ]
    for call in calls:
        with refusal(at, LegacyValueInvalid) as got:
            call(at.adapter, got[0])
        assert (got[1].key, got[1].column) == (2, "total_coins")


def test_under_shadow_an_inexact_legacy_value_goes_on_alone(database_url: str) -> None:
    at = place(database_url, rows=1, coins_type="numeric")
    execute(at.engine, "update users set total_coins = 100.005")
    with at.engine.begin() as connection:
        result = at.adapter.credit(connection, 1, 5, type="deposit")
    assert (result.mode, result.outcome, result.ledger_balance) == ("legacy", "ledger_failed", None)
    assert (at.coins(1), at.account(1)) == (D("105.005"), None)
    at.check()


def test_under_strict_an_inexact_legacy_value_is_refused(database_url: str) -> None:
    at = place(database_url, rows=2, coins_type="numeric", policy="strict")
    execute(at.engine, "update users set total_coins = 100.005 where id = 2")
    with refusal(at, LegacyValueInvalid) as got:
        at.adapter.credit(got[0], 2, 5, type="deposit")
    with refusal(at, LegacyValueInvalid) as got:
        at.adapter.transfer(got[0], 1, 2, 5, type="gift")
    assert got[1].key == 2


# Fields of a movement


@pytest.mark.parametrize(
    ("details", "field"),
    [
        ({"reference": ("deposit",)}, "reference"),
        ({"reference": "ab"}, "reference"),
        ({"reference": 17}, "reference"),
        ({"reference": (1, 2)}, "reference"),
        ({"reference": ("deposit", "a\0b")}, "reference id"),
        ({"reference": ("deposit", "\ud800")}, "reference id"),
        ({"reference": ("deposit", "")}, "reference id"),
        ({"idempotency_key": ""}, "idempotency_key"),
        ({"idempotency_key": "   "}, "idempotency_key"),
        ({"idempotency_key": 17}, "idempotency_key"),
        ({"idempotency_key": "k" * 501}, "idempotency_key"),
        ({"idempotency_key": "nul\0"}, "idempotency_key"),
        ({"idempotency_key": "walletmigrate:reversal:1"}, "idempotency_key"),
        ({"correlation_id": "\0"}, "correlation_id"),
        ({"actor": 7}, "actor"),
        ({"reason": "\ud800"}, "reason"),
        ({"description": b"bytes"}, "description"),
        ({"address": "x" * 501}, "address"),
        ({"type": ""}, "type"),
        ({"type": None, "reference": (None, 1)}, ""),
    ],
    ids=lambda value: str(value)[:40].encode("ascii", "backslashreplace").decode() if isinstance(value, dict) else "",
)
def test_a_text_that_cannot_be_stored_is_refused(database_url: str, details: dict[str, Any], field: str) -> None:
    at = place(database_url, rows=1)
    if not field:
        with at.engine.begin() as connection:
            assert at.adapter.credit(connection, 1, 1, **details).mode == "dual_write"
        return
    with refusal(at, InvalidMovement) as got:
        at.adapter.credit(got[0], 1, 1, **{"type": "deposit", **details})
    assert got[1].field == field


def test_a_bad_correlation_id_of_the_caller_s_context_is_refused_too(database_url: str) -> None:
    at = place(database_url, rows=1)
    with at.engine.begin() as connection:
        with bound_contextvars(correlation_id="a\0b"), pytest.raises(InvalidMovement):
            at.adapter.credit(connection, 1, 1, type="deposit")
        assert at.adapter.credit(connection, 1, 1, type="deposit").legacy_balance == 101


def test_an_adjustment_and_a_reversal_say_who_and_why(database_url: str) -> None:
    at = place(database_url, rows=1)
    with refusal(at, InvalidMovement) as got:
        at.adapter.set_balance(got[0], 1, 1, actor="admin:7")
    with refusal(at, InvalidMovement) as got:
        at.adapter.set_balance(got[0], 1, 1, reason="case")
    with refusal(at, InvalidMovement) as got:
        at.adapter.reverse(got[0], 1)
    assert got[1].field == "reason"


@pytest.mark.parametrize("operation", ["steal", "", None, "apply"])
def test_an_unknown_operation_is_refused(database_url: str, operation: Any) -> None:
    at = place(database_url, rows=1)
    with refusal(at, InvalidMovement) as got:
        at.adapter.apply(got[0], [Movement(operation=operation, key=1, amount=1, type="deposit")])


def test_all_refusals_are_of_one_base() -> None:
    refusals = {each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, PostingRefused)}
    assert {InvalidAmount, InvalidKey, UnknownAccount, SelfTransfer, InsufficientFunds, AmountOverflow} < refusals
    assert all(issubclass(each, WalletMigrateError) for each in refusals)
    codes = [each.code for each in refusals]
    assert len(set(codes)) == len(codes)


# Batches


@pytest.mark.parametrize("flags", [DUAL, OFF], ids=["on", "off"])
@pytest.mark.parametrize("place_of_fault", [0, 1, 3])
def test_a_batch_with_one_refusal_writes_nothing(
    database_url: str, place_of_fault: int, flags: dict[str, bool]
) -> None:
    at = place(database_url, rows=4, floor=D(0), flags=flags)
    with at.engine.begin() as connection:
        at.adapter.credit(connection, 2, 1, type="known")
        seal(connection, *([2] if flags else []))
    good = [
        Movement.credit(1, 10, type="deposit", idempotency_key="one"),
        Movement.transfer(2, 3, 10, type="gift", description="d", address="a"),
        Movement.set_balance(4, 0, actor="admin:7", reason="case", idempotency_key="two"),
    ]
    batch = [
        *good[:place_of_fault],
        Movement.debit(3, 1000, type="booking", idempotency_key="bad"),
        *good[place_of_fault:],
    ]
    with refusal(at, InsufficientFunds) as got:
        at.adapter.apply(got[0], batch)
    assert (got[1].key, got[1].amount) == (3, D(1000))
    assert at.heard.posted[-2].operation == "apply"
    with at.engine.begin() as connection:
        assert [each.replayed for each in at.adapter.apply(connection, good)] == [False, False, False]
    at.check()


def test_a_batch_may_spend_what_it_brought_in(database_url: str) -> None:
    at = place(database_url, rows=1, coins="0", floor=D(0))
    spend, earn = Movement.debit(1, 5, type="booking"), Movement.credit(1, 5, type="deposit")
    with at.engine.begin() as connection:
        at.adapter.apply(connection, [earn, spend])
    with refusal(at, InsufficientFunds) as got:
        at.adapter.apply(got[0], [spend, earn])


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


# Errors that are no refusals


def test_a_constraint_of_the_application_reaches_the_caller_as_it_is(database_url: str) -> None:
    at = place(database_url, rows=1)
    execute(at.engine, "alter table users add check (total_coins >= 0)")
    with at.engine.connect() as connection, pytest.raises(DBAPIError) as raised:
        at.adapter.debit(connection, 1, 101, type="booking")
    assert getattr(raised.value.orig, "sqlstate", None) == "23514"
    assert at.heard.posted[-1].error == "23514"
    assert (at.coins(1), at.account(1)) == (100, None)


def test_a_function_missing_in_the_application_s_trigger_is_not_taken_for_a_missing_ledger(
    database_url: str,
) -> None:
    at = place(database_url, rows=1)
    execute(
        at.engine,
        "create function public.broken() returns trigger language plpgsql as "
        "$$ begin perform public.no_such_function(); return new; end $$",
    )
    execute(at.engine, "create trigger broken before update on users for each row execute function public.broken()")
    with at.engine.connect() as connection, pytest.raises(DBAPIError) as raised:
        at.adapter.credit(connection, 1, 1, type="deposit")
    assert getattr(raised.value.orig, "sqlstate", None) == "42883"


def test_a_row_changed_past_the_fence_is_found_by_the_next_posting(database_url: str) -> None:
    at = place(database_url, rows=1)
    with at.engine.begin() as connection:
        at.adapter.open_account(connection, 1)
    with fence_down(at.engine, at.settings) as connection:
        connection.exec_driver_sql("update users set total_coins = 90")
    with at.engine.begin() as connection:
        result = at.adapter.credit(connection, 1, 5, type="deposit")
    assert (result.mismatch, result.legacy_balance, result.ledger_balance) == (True, D(95), D(105))
    assert at.account(1) == ("stale", D(105))
    assert scalar(at.engine, "select sqlstate from wallet.failures") == "WM020"
    with at.engine.begin() as connection:
        assert at.adapter.credit(connection, 1, 5, type="deposit").ledger_balance == 100
    at.check()
