"""What is refused: typed, with fields, nothing written, the caller's transaction usable."""

from __future__ import annotations

import uuid
from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy.exc import DBAPIError
from structlog.contextvars import bound_contextvars

from adapting import DUAL, OFF, bring_into, custom, place, seal
from ledger import execute, fence_down, rows, scalar
from refusing import Call, refusal
from walletmigrate import Movement, PostingRefused, WalletMigrateError, errors
from walletmigrate.errors import (
    AmountOverflow,
    InsufficientFunds,
    InvalidAmount,
    InvalidKey,
    InvalidMovement,
    SelfTransfer,
    UnknownAccount,
    UnknownBucket,
    UnknownCurrency,
)

D = Decimal


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
        at.adapter.debit(connection, 1, D("2.5"), type="booking")  # the short way: the account stands now
    assert rows(at.engine, "select amount::text from wallet.transactions where kind = 'posting' order by id") == [
        ("1.50",),
        ("2.50",),
    ]


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
    assert (got[1].key, got[1].balance, got[1].amount, got[1].floor) == (1, D(3), D(8), D(0))


def test_without_a_floor_a_balance_may_go_below_zero(database_url: str) -> None:
    at = place(database_url, rows=1)
    with at.engine.begin() as connection:
        assert at.adapter.debit(connection, 1, 150, type="booking").ledger_balance == -50
    at.check()


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
