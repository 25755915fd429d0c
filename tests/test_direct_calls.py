"""What the SQL functions refuse by themselves: the adapter checks it too, but others may call them."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.exc import DBAPIError

from ledger import execute, install_users, journal, post, rows, scalar, set_phase
from walletmigrate import Settings

BACKFILL = "select * from wallet.backfill_users(null, null, null)"
LEGACY = "select id, total_coins, promo from users order by id"


@pytest.fixture
def opened(database_url: str) -> tuple[Engine, Settings]:
    """Three users of 100, all mirrored, with a floor of 10."""
    made = install_users(database_url, rows=3, phase="dual_write", with_promo=True, floor=Decimal(10))
    execute(made[0], BACKFILL)
    return made


def refusal(opened: tuple[Engine, Settings], operation: str, amount: str, **fields: Any) -> str | None:
    """What a posting is refused for; nothing may have been written then, and its key may be used again."""
    engine, settings = opened
    before = journal(engine), rows(engine, LEGACY)
    with engine.begin() as connection:
        found: str | None = post(connection, settings, operation, 1, amount, idempotency_key="k", **fields)["refusal"]
    if found is not None:
        assert (journal(engine), rows(engine, LEGACY)) == before
        assert scalar(engine, "select count(*) from wallet.idempotency_keys") == 0
    return found


@pytest.mark.parametrize("dual", [True, False])
@pytest.mark.parametrize("amount", ["NaN", "Infinity", "-Infinity", "-1", "0", "0.001", "1.999"])
@pytest.mark.parametrize("operation", ["credit", "debit"])
def test_no_amount_that_is_none_is_posted(
    opened: tuple[Engine, Settings], operation: str, amount: str, dual: bool
) -> None:
    assert refusal(opened, operation, amount, dual=dual) == "invalid_amount"


@pytest.mark.parametrize(
    ("amount", "expected"),
    [
        *[(amount, "invalid_amount") for amount in ("NaN", "Infinity", "-Infinity", "0.001")],
        *[(amount, None) for amount in ("0", "-1", "7.25")],
    ],
)
def test_a_balance_is_set_to_an_exact_amount_below_zero_too(
    opened: tuple[Engine, Settings], amount: str, expected: str | None
) -> None:
    assert refusal(opened, "set_balance", amount) == expected
    if expected is None:
        assert rows(opened[0], "select total_coins from users where id = 1") == [(Decimal(amount),)]


@pytest.mark.parametrize(
    ("operation", "amount", "expected"),
    [("debit", "90", None), ("debit", "90.01", "insufficient_funds"), ("set_balance", "9", None)],
)
def test_the_floor_binds_debits_to_the_last_cent(
    opened: tuple[Engine, Settings], operation: str, amount: str, expected: str | None
) -> None:
    assert refusal(opened, operation, amount) == expected


def test_a_transfer_does_not_reach_below_the_payer_s_floor(opened: tuple[Engine, Settings]) -> None:
    assert refusal(opened, "transfer", "90.01", payee=2) == "insufficient_funds"
    assert refusal(opened, "transfer", "90", payee=2) is None


@pytest.mark.parametrize(("bucket", "currency"), [("cash", "USD"), ("promo", "USD"), ("gold", "EUR")])
def test_a_column_is_known_by_bucket_and_currency_both(
    opened: tuple[Engine, Settings], bucket: str, currency: str
) -> None:
    engine, settings = opened
    before = journal(engine)
    movement = {"operation": "credit", "creditor": "1", "bucket": bucket, "currency": currency, "amount": "5"}
    fingerprint = scalar(engine, "select fingerprint from wallet.mappings")
    request = {"fingerprint": fingerprint, "policy": "strict", "movements": [{**movement, "dual": True, "type": "t"}]}
    call = "select refusal from wallet.post_users(cast(:r as jsonb))"
    with engine.begin() as connection:
        assert connection.scalar(text(call), {"r": json.dumps(request)}) == "unknown_column"
        label = f"(users/{bucket}/{currency}/1,5,t,t,,,,,,,)"
        plain = text("select wallet.plain_users(:f, 'strict', 1, :b, :c, 5, :l)")
        answer = connection.scalar(plain, {"f": fingerprint, "b": bucket, "c": currency, "l": label})
    assert json.loads(answer)["refusal"] == "unknown_column"
    assert journal(engine) == before
    assert settings.mapping(None).column("cash").currency == "EUR"


@pytest.mark.parametrize(
    "call",
    [
        'post_users(\'{"fingerprint": "0", "movements": []}\')',
        "post_users('{\"movements\": []}')",
        "plain_users('0', 'strict', 1, 'cash', 'EUR', 5, '{}')",
        "plain_users(null, 'strict', 1, 'cash', 'EUR', 5, '{}')",
        'correct_users(\'{"fingerprint": "0", "key": "1"}\')',
        'recalculate_users(\'{"fingerprint": "0", "key": "1"}\')',
    ],
)
def test_a_caller_of_another_configuration_is_refused(opened: tuple[Engine, Settings], call: str) -> None:
    with pytest.raises(DBAPIError, match="installed from another configuration"):
        execute(opened[0], f"select wallet.{call}".replace(":", r"\:"))


def test_a_transaction_that_is_none_is_unknown_to_a_reversal(opened: tuple[Engine, Settings]) -> None:
    assert refusal(opened, "reverse", "5", reverses=10**9) == "unknown_transaction"


def test_a_key_whose_result_is_not_known_moves_nothing(opened: tuple[Engine, Settings]) -> None:
    """Somebody has removed what stood there, or put it there by hand."""
    engine, settings = opened
    execute(engine, "insert into wallet.idempotency_keys (key, request) values ('k', gen_random_uuid())")
    before = journal(engine), rows(engine, LEGACY)
    with engine.connect() as connection:
        with pytest.raises(DBAPIError) as raised:
            post(connection, settings, "credit", 1, 5, idempotency_key="k")
        connection.rollback()
    assert getattr(raised.value.orig, "sqlstate", None) == "40001"
    assert (journal(engine), rows(engine, LEGACY)) == before


def test_the_balances_of_a_key_are_changed_by_its_own_request_alone(opened: tuple[Engine, Settings]) -> None:
    engine, settings = opened
    with engine.begin() as connection:
        post(connection, settings, "credit", 1, 5, idempotency_key="k")
    own, other = scalar(engine, "select request from wallet.idempotency_keys"), "00000000-0000-4000-8000-000000000002"
    balances = "select balances from wallet.idempotency_keys"
    for request, expected in ((other, [None, None, 105, 105]), (own, [None, None, 77, None])):
        execute(
            engine,
            "select wallet.diverged(m, p, 'users') from "
            "jsonb_populate_record(null::wallet.movement, cast(:m as jsonb)) as m, "
            'jsonb_populate_record(null::wallet.posting, \'{"mode"\\: "legacy", "creditor_legacy"\\: 77}\') as p',
            m=json.dumps({"idempotency_key": "k", "request": str(request)}),
        )
        assert scalar(engine, balances) == expected


def test_an_account_that_is_frozen_is_turned_stale_by_nobody(opened: tuple[Engine, Settings]) -> None:
    engine, _ = opened
    set_phase(engine, "frozen")
    execute(engine, "select wallet.freeze_users(null, '1')")
    execute(engine, "update wallet.accounts set state = 'closed' where key = '3'")
    execute(engine, "select wallet.turn_stale(id, 'test') from wallet.accounts")
    states = "select distinct key, state::text from wallet.accounts order by key"
    assert rows(engine, states) == [("1", "frozen"), ("2", "stale"), ("3", "stale")]
