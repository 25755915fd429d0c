"""Every operation of the adapter on every account state, and what becomes of the two sides."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from itertools import count
from typing import Any

import pytest
from sqlalchemy import Connection, text
from structlog.contextvars import bound_contextvars

import servers
from adapting import DUAL, OFF, Place, bring_into, custom, place
from conftest import MakeDatabase
from ledger import execute, rows, scalar, set_phase
from walletmigrate import LegacyBalanceAdapter, Movement, Posting, connect
from walletmigrate.errors import UnknownAccount, UnknownTransaction

D = Decimal
KEYS = count(1000, 10)


@pytest.fixture(scope="module")
def shared(server: servers.Postgres) -> Iterator[Place]:
    """One database for the whole matrix; every case has accounts of its own."""
    with connect.scratch_database(server.url) as url:
        made = place(url, rows=0)
        made.engine = connect.engine(url, application_name="walletmigrate-test")
        yield made
        made.check()
        made.engine.dispose()


@contextmanager
def asked_for(at: Place, wish: str) -> Iterator[None]:
    """Put "on", "off" or "stopped" in force: the flag, or the flag with the line stopped."""
    at.flags(OFF if wish == "off" else DUAL)
    execute(at.engine, "select wallet.set_line(:running)", running=wish != "stopped")
    try:
        yield
    finally:
        at.flags(DUAL)
        execute(at.engine, "select wallet.set_line(true)")


Call = Callable[[LegacyBalanceAdapter, Connection, int, int | None], Posting]

OPERATIONS: dict[str, Call] = {
    "credit": lambda adapter, on, key, _: adapter.credit(on, key, 5, type="deposit"),
    "debit": lambda adapter, on, key, _: adapter.debit(on, key, D("30.50"), type="booking"),
    "set lower": lambda adapter, on, key, _: adapter.set_balance(on, key, 7, actor="admin:7", reason="case 1"),
    "set higher": lambda adapter, on, key, _: adapter.set_balance(on, key, 120, actor="admin:7", reason="case 1"),
    "set same": lambda adapter, on, key, _: adapter.set_balance(on, key, 100, actor="admin:7", reason="case 1"),
    "open": lambda adapter, on, key, _: adapter.open_account(on, key)[0],
    "reverse": lambda adapter, on, _, made: adapter.reverse(on, made or 10**9, reason="refund"),
}

# What the movement itself writes: (kind, debtor, creditor, amount); "me" is the account.
MOVES: dict[str, list[tuple[str, str, str, str]]] = {
    "credit": [("posting", "external", "me", "5")],
    "debit": [("posting", "me", "external", "30.5")],
    "set lower": [("correction", "me", "correction", "93")],
    "set higher": [("correction", "correction", "me", "20")],
    "set same": [],
    "open": [],
    "reverse": [("reversal", "me", "external", "5")],
}
AFTER = {
    "credit": "105",
    "debit": "69.5",
    "set lower": "7",
    "set higher": "120",
    "set same": "100",
    "open": "100",
    "reverse": "95",
}
MOVING = [operation for operation, moves in MOVES.items() if moves]
STILL = ["set same", "open"]
OPENING = ("opening", "opening", "me", "100")
RESYNC = ("resync", "bypass", "me", "15")  # from 85 to the legacy 100

# state, wish, operations, mode, outcome, whether legacy and ledger are told, state after, transactions before
TABLE: list[tuple[str, str, list[str], str, str, str, str | None, list[tuple[str, str, str, str]]]] = [
    ("absent", "on", [*MOVING[:-1], *STILL], "dual_write", "ok", "both", "mirrored", [OPENING]),
    ("mirrored", "on", [*MOVING, *STILL], "dual_write", "ok", "both", "mirrored", []),
    ("stale", "on", [*MOVING, *STILL], "dual_write", "ok", "both", "mirrored", [RESYNC]),
    ("closed, live", "on", [*MOVING, *STILL], "dual_write", "ok", "both", "mirrored", [RESYNC]),
    *(("frozen", w, [*MOVING, *STILL], "ledger", "ok", "ledger", "frozen", []) for w in ("on", "off", "stopped")),
    *(("absent", w, [*MOVING[:-1], *STILL], "legacy", "skipped", "legacy", None, []) for w in ("off", "stopped")),
    *(("mirrored", w, MOVING, "legacy", "skipped", "legacy", "stale", []) for w in ("off", "stopped")),
    *(("mirrored", w, STILL, "legacy", "skipped", "legacy", "mirrored", []) for w in ("off", "stopped")),
    *(("stale", w, [*MOVING, *STILL], "legacy", "skipped", "legacy", "stale", []) for w in ("off", "stopped")),
    *(("closed, live", w, MOVING, "legacy", "skipped", "legacy", "stale", []) for w in ("off", "stopped")),
    *(("closed, live", w, STILL, "legacy", "skipped", "legacy", "closed", []) for w in ("off", "stopped")),
]
CELLS = [(*row[:2], operation, *row[3:]) for row in TABLE for operation in row[2]]


def test_the_protocol_table_is_covered_whole() -> None:
    cells = {(state, wish, operation) for state, wish, operation, *_ in CELLS}
    states = ("mirrored", "stale", "frozen", "closed, live")
    assert len(cells) == len(CELLS) == 3 * (len(OPERATIONS) * len(states) + len(OPERATIONS) - 1)


@pytest.mark.parametrize(
    ("state", "wish", "operation", "mode", "outcome", "told", "after", "before"),
    CELLS,
    ids=[f"{operation}-{state}-{wish}".replace(" ", "_") for state, wish, operation, *_ in CELLS],
)
def test_an_operation_does_to_both_sides_what_the_protocol_says(
    shared: Place,
    state: str,
    wish: str,
    operation: str,
    mode: str,
    outcome: str,
    told: str,
    after: str | None,
    before: list[tuple[str, str, str, str]],
) -> None:
    key = next(KEYS)
    made = bring_into(shared, key, state)
    known = shared.last_id()
    balance = D(AFTER[operation])

    with asked_for(shared, wish), shared.engine.begin() as connection:
        result = OPERATIONS[operation](shared.adapter, connection, key, made)

    moves = before + MOVES[operation] if mode != "legacy" else []
    assert shared.legs(known) == [
        (kind, *(str(key) if name == "me" else name for name in names), D(amount)) for kind, *names, amount in moves
    ]
    assert (result.mode, result.outcome, result.replayed, result.mismatch) == (mode, outcome, False, False)
    assert (result.legacy_balance, result.ledger_balance) == (
        None if told == "ledger" else balance,
        None if told == "legacy" else balance,
    )
    assert (result.bucket, result.currency) == ("cash", "EUR")
    assert shared.coins(key) == (100 if told == "ledger" else balance)
    now = shared.account(key)
    assert (now and now[0]) == after
    if told != "legacy":
        assert now == (after, balance)
        newest = scalar(shared.engine, "select max(id) from wallet.transactions where id > :known", known=known)
        assert result.transaction_id == (newest if MOVES[operation] else None)
    else:
        assert result.transaction_id is None
    assert (result.payee_legacy_balance, result.payee_ledger_balance) == (None, None)


@pytest.mark.parametrize("wish", ["on", "off", "stopped"])
@pytest.mark.parametrize("operation", list(OPERATIONS))
def test_an_account_whose_row_is_gone_is_unknown_to_every_operation(shared: Place, operation: str, wish: str) -> None:
    key = next(KEYS)
    made = bring_into(shared, key, "closed")
    known = shared.last_id()
    with asked_for(shared, wish), shared.engine.begin() as connection:
        with pytest.raises(UnknownAccount) as refused:
            OPERATIONS[operation](shared.adapter, connection, key, made)
        assert str(refused.value.key) == str(key)
    assert shared.legs(known) == []
    assert shared.account(key) == ("closed", D(100))


@pytest.mark.parametrize("wish", ["on", "off", "stopped"])
def test_an_absent_account_has_nothing_to_reverse(shared: Place, wish: str) -> None:
    bring_into(shared, next(KEYS), "absent")
    with asked_for(shared, wish), shared.engine.begin() as connection, pytest.raises(UnknownTransaction):
        shared.adapter.reverse(connection, 10**9, reason="refund")


# payer, payee, mode on, transactions on | mode off, transactions off. "a" pays "b" 5; P = posting.
P = ("posting", "a", "b")
OUT = ("posting", "a", "transit")
IN = ("posting", "transit", "b")
OPEN = {"a": ("opening", "opening", "a"), "b": ("opening", "opening", "b")}
SYNC = {"a": ("resync", "bypass", "a"), "b": ("resync", "bypass", "b")}
Legs = list[tuple[str, str, str]]
TRANSFERS: list[tuple[str, str, str, Legs, str, Legs]] = [
    ("absent", "absent", "dual_write", [OPEN["a"], OPEN["b"], P], "legacy", []),
    ("absent", "mirrored", "dual_write", [OPEN["a"], P], "legacy", []),
    ("absent", "stale", "dual_write", [OPEN["a"], SYNC["b"], P], "legacy", []),
    ("absent", "closed, live", "dual_write", [OPEN["a"], SYNC["b"], P], "legacy", []),
    ("absent", "frozen", "dual_write", [OPEN["a"], P], "ledger", [IN]),
    ("mirrored", "absent", "dual_write", [OPEN["b"], P], "legacy", []),
    ("mirrored", "mirrored", "dual_write", [P], "legacy", []),
    ("mirrored", "stale", "dual_write", [SYNC["b"], P], "legacy", []),
    ("mirrored", "closed, live", "dual_write", [SYNC["b"], P], "legacy", []),
    ("mirrored", "frozen", "dual_write", [P], "ledger", [IN]),
    ("stale", "absent", "dual_write", [SYNC["a"], OPEN["b"], P], "legacy", []),
    ("stale", "mirrored", "dual_write", [SYNC["a"], P], "legacy", []),
    ("stale", "stale", "dual_write", [SYNC["a"], SYNC["b"], P], "legacy", []),
    ("stale", "closed, live", "dual_write", [SYNC["a"], SYNC["b"], P], "legacy", []),
    ("stale", "frozen", "dual_write", [SYNC["a"], P], "ledger", [IN]),
    ("closed, live", "absent", "dual_write", [SYNC["a"], OPEN["b"], P], "legacy", []),
    ("closed, live", "mirrored", "dual_write", [SYNC["a"], P], "legacy", []),
    ("closed, live", "stale", "dual_write", [SYNC["a"], SYNC["b"], P], "legacy", []),
    ("closed, live", "closed, live", "dual_write", [SYNC["a"], SYNC["b"], P], "legacy", []),
    ("closed, live", "frozen", "dual_write", [SYNC["a"], P], "ledger", [IN]),
    ("frozen", "absent", "dual_write", [OPEN["b"], P], "ledger", [OUT]),
    ("frozen", "mirrored", "dual_write", [P], "ledger", [OUT]),
    ("frozen", "stale", "dual_write", [SYNC["b"], P], "ledger", [OUT]),
    ("frozen", "closed, live", "dual_write", [SYNC["b"], P], "ledger", [OUT]),
    ("frozen", "frozen", "ledger", [P], "ledger", [P]),
]
OFF_STATE = {"absent": None, "mirrored": "stale", "stale": "stale", "closed, live": "stale", "frozen": "frozen"}


@pytest.mark.parametrize("wish", ["on", "off"])
@pytest.mark.parametrize(
    ("payer", "payee", "mode_on", "legs_on", "mode_off", "legs_off"),
    TRANSFERS,
    ids=[f"{payer}-{payee}".replace(" ", "") for payer, payee, *_ in TRANSFERS],
)
def test_each_side_of_a_transfer_follows_its_own_state(
    shared: Place,
    wish: str,
    payer: str,
    payee: str,
    mode_on: str,
    legs_on: Legs,
    mode_off: str,
    legs_off: Legs,
) -> None:
    a, b = next(KEYS), next(KEYS)
    bring_into(shared, a, payer)
    bring_into(shared, b, payee)
    known = shared.last_id()

    with asked_for(shared, wish), shared.engine.begin() as connection:
        result = shared.adapter.transfer(connection, a, b, 5, type="gift")

    on = wish == "on"
    amounts = {"opening": D(100), "resync": D(15), "posting": D(5)}
    names = {"a": str(a), "b": str(b)}
    assert shared.legs(known) == [
        (kind, names.get(debtor, debtor), names.get(creditor, creditor), amounts[kind])
        for kind, debtor, creditor in (legs_on if on else legs_off)
    ]
    assert (result.mode, result.mismatch, result.key) == (mode_on if on else mode_off, False, a)
    for state, key, balance, legacy, ledger in (
        (payer, a, D(95), result.legacy_balance, result.ledger_balance),
        (payee, b, D(105), result.payee_legacy_balance, result.payee_ledger_balance),
    ):
        in_ledger = on or state == "frozen"
        assert legacy == (None if state == "frozen" else balance)
        assert ledger == (balance if in_ledger else None)
        assert shared.coins(key) == (100 if state == "frozen" else balance)
        now = shared.account(key)
        assert (now and now[0]) == (state if state == "frozen" else "mirrored" if on else OFF_STATE[state])
        if now and in_ledger:
            assert now[1] == balance


@pytest.mark.parametrize("side", ["payer", "payee"])
@pytest.mark.parametrize("state", ["absent", "mirrored", "stale", "closed, live", "frozen"])
def test_a_transfer_with_a_side_whose_row_is_gone_is_refused(shared: Place, state: str, side: str) -> None:
    gone, other = next(KEYS), next(KEYS)
    bring_into(shared, gone, "closed")
    bring_into(shared, other, state)
    before = shared.account(other)
    pair = (gone, other) if side == "payer" else (other, gone)
    with shared.engine.begin() as connection, pytest.raises(UnknownAccount) as refused:
        shared.adapter.transfer(connection, *pair, 5, type="gift")
    assert refused.value.key == gone
    assert (shared.coins(other), shared.account(other)) == (100, before)


def test_if_either_side_asks_for_dual_write_both_get_it(database_url: str) -> None:
    at = place(database_url, rows=2)

    class OnlyOne:
        document_id, needs_traits, source = "test", False, "test"

        def decide(self, identifier: str, traits: object) -> Any:  # noqa: ARG002 - as the protocol has it
            return at.source.snapshot().decide(identifier, {}) if identifier == "2" else at_rest

        def age_seconds(self) -> float:
            return 0.0

        def snapshot(self) -> OnlyOne:
            return self

    from walletmigrate.flags import OFF as at_rest  # noqa: N811 - a decision, not a constant of this module

    adapter = LegacyBalanceAdapter(at.settings, OnlyOne())
    with at.engine.begin() as connection:
        assert adapter.credit(connection, 1, 1, type="deposit").mode == "legacy"
        assert adapter.transfer(connection, 1, 2, 1, type="gift").mode == "dual_write"
        assert adapter.transfer(connection, 2, 1, 1, type="gift").mode == "dual_write"
    assert (at.account(1), at.account(2)) == (("mirrored", D(101)), ("mirrored", D(100)))
    at.check()


@pytest.mark.parametrize(
    ("phase", "mode", "state"),
    [
        ("legacy", "legacy", None),
        ("dual_write", "dual_write", "mirrored"),
        ("read_ledger", "dual_write", "mirrored"),
        ("wallet_only", "dual_write", "mirrored"),
        ("frozen", "ledger", "frozen"),
    ],
)
def test_the_phase_is_the_ceiling_of_what_the_flag_may_ask_for(
    database_url: str, phase: str, mode: str, state: str | None
) -> None:
    at = place(database_url, phase=phase, rows=1)
    with at.engine.begin() as connection:
        assert at.adapter.credit(connection, 1, 5, type="deposit").mode == mode
    assert at.account(1) == (state and (state, D(105)))
    assert at.coins(1) == (100 if mode == "ledger" else 105)
    at.check()


def test_a_new_account_is_opened_as_frozen_while_the_phase_is_frozen(database_url: str) -> None:
    at = place(database_url, rows=0, phase="frozen", with_promo=True)
    execute(at.engine, "insert into users values (1, 'acme', 'member', 12.5, 0)")
    with at.engine.begin() as connection:
        opened = at.adapter.open_account(connection, 1)
    assert [(each.mode, each.bucket, each.ledger_balance) for each in opened] == [
        ("ledger", "cash", D("12.5")),
        ("ledger", "promo", D(0)),
    ]
    assert (at.account(1), at.account(1, "promo")) == (("frozen", D("12.5")), ("frozen", D(0)))
    at.check()


def test_open_account_opens_every_bucket_once(database_url: str) -> None:
    at = place(database_url, rows=1, with_promo=True)
    for _ in range(2):
        with at.engine.begin() as connection:
            opened = at.adapter.open_account(connection, 1)
        assert [(each.operation, each.bucket, each.ledger_balance, each.transaction_id) for each in opened] == [
            ("open_account", "cash", D(100), None),
            ("open_account", "promo", D(5), None),
        ]
    assert at.legs() == [("opening", "opening", "1", D(100)), ("opening", "opening", "1", D(5))]
    at.check()


def test_open_account_of_a_row_inserted_in_the_same_transaction_works(database_url: str) -> None:
    at = place(database_url, rows=0)
    with at.engine.begin() as connection:
        connection.exec_driver_sql("insert into users values (1, 'acme', 'member', 0, 0)")
        assert at.adapter.open_account(connection, 1)[0].ledger_balance == 0
        assert at.adapter.credit(connection, 1, 3, type="deposit").ledger_balance == 3
    assert at.legs() == [("posting", "external", "1", D(3))]
    at.check()


def test_a_negative_legacy_balance_opens_and_resyncs_as_it_is(database_url: str) -> None:
    at = place(database_url, rows=1, coins="-20")
    with at.engine.begin() as connection:
        assert at.adapter.credit(connection, 1, 5, type="deposit").ledger_balance == -15
        connection.exec_driver_sql("update users set total_coins = -40")
        assert at.adapter.debit(connection, 1, 1, type="fee").ledger_balance == -41
    assert at.legs() == [
        ("opening", "1", "opening", D(20)),
        ("posting", "external", "1", D(5)),
        ("resync", "1", "bypass", D(25)),
        ("posting", "1", "external", D(1)),
    ]
    at.check()


def test_a_balance_may_be_set_below_zero_and_below_the_floor(database_url: str) -> None:
    at = place(database_url, rows=1, floor=D(0))
    with at.engine.begin() as connection:
        result = at.adapter.set_balance(connection, 1, D("-0.01"), actor="admin:7", reason="chargeback")
    assert (result.legacy_balance, result.ledger_balance) == (D("-0.01"), D("-0.01"))
    at.check()


def test_buckets_are_accounts_of_their_own(database_url: str) -> None:
    at = place(database_url, rows=2, with_promo=True)
    with at.engine.begin() as connection:
        assert at.adapter.credit(connection, 1, 1, type="bonus", bucket="promo").ledger_balance == 6
        assert at.adapter.transfer(connection, 1, 2, 2, type="gift", bucket="promo").payee_ledger_balance == 7
        assert at.adapter.debit(connection, 1, 10, type="booking").ledger_balance == 90
    assert (at.coins(1), at.coins(1, "promo"), at.coins(2, "promo")) == (90, 4, 7)
    assert (at.account(1), at.account(1, "promo"), at.account(2)) == (("mirrored", D(90)), ("mirrored", D(4)), None)
    at.check()


TWO_CURRENCIES = {
    "name": "wallets",
    "table": "public.wallets",
    "key": "owner",
    "columns": [
        {"bucket": "cash", "column": "euros", "currency": "EUR", "scale": 2},
        {"bucket": "cash", "column": "yen", "currency": "JPY", "scale": 0},
    ],
}


def test_a_mapping_with_two_currencies_keeps_them_apart(database_url: str) -> None:
    at = custom(
        database_url,
        "create table wallets (owner text primary key, euros numeric(12, 2) not null, yen bigint not null);"
        "insert into wallets values ('ann', 10, 1000), ('bob', 20, 2000)",
        TWO_CURRENCIES,
    )
    with at.engine.begin() as connection:
        at.adapter.credit(connection, "ann", D("0.5"), type="deposit", currency="EUR")
        at.adapter.transfer(connection, "ann", "bob", 300, type="gift", currency="JPY")
    assert (at.coins("ann", "euros"), at.coins("ann", "yen"), at.coins("bob", "yen")) == (D("10.5"), 700, 2300)
    assert at.account("ann", currency="EUR") == ("mirrored", D("10.5"))
    assert at.account("ann", currency="JPY") == ("mirrored", D(700))
    systems = rows(at.engine, "select name, currency, balance from wallet.system_balances where balance <> 0")
    assert sorted(systems) == [
        ("external", "EUR", D("-0.5")),
        ("opening", "EUR", D(-10)),
        ("opening", "JPY", D(-3000)),
    ]
    at.check()


@pytest.mark.parametrize(
    ("key_type", "first", "second"),
    [
        ("bigint", 1, 2),
        ("text", "user-0000001", "user-0000002"),
        ("uuid", uuid.UUID("00000000-0000-4000-8000-000000000001"), "00000000-0000-4000-8000-000000000002"),
    ],
)
def test_integer_text_and_uuid_keys_name_accounts(database_url: str, key_type: str, first: Any, second: Any) -> None:
    at = place(database_url, rows=2, key_type=key_type)
    with at.engine.begin() as connection:
        assert at.adapter.credit(connection, first, 5, type="deposit").key == first
        assert at.adapter.transfer(connection, first, second, 1, type="gift").payee_ledger_balance == 101
        assert at.adapter.balance(connection, second).amount == 101
        assert len(at.adapter.history(connection, first)) == 3
    assert at.account(first) == ("mirrored", D(104))
    at.check()


def test_a_uuid_in_upper_case_is_the_same_account(database_url: str) -> None:
    at = place(database_url, rows=0, key_type="uuid")
    key = uuid.UUID("abcdefab-cdef-4abc-8def-abcdefabcdef")
    execute(at.engine, "insert into users values (:key, 'acme', 'member', 1, 0)", key=key)
    with at.engine.begin() as connection:
        at.adapter.credit(connection, str(key).upper(), 1, type="deposit", idempotency_key="k")
        assert at.adapter.credit(connection, key, 1, type="deposit", idempotency_key="k").replayed
    assert at.account(key) == ("mirrored", D(2))
    at.check()


@pytest.mark.parametrize("dual", [True, False])
@pytest.mark.parametrize("coins_type", ["integer", "bigint", "numeric(20, 0)"])
def test_a_column_of_minor_units_counts_cents(database_url: str, coins_type: str, dual: bool) -> None:
    at = place(database_url, rows=2, unit="minor", coins="12345", coins_type=coins_type, flags=DUAL if dual else OFF)
    with at.engine.begin() as connection:
        assert at.adapter.balance(connection, 1).amount == D("123.45")
        assert at.adapter.credit(connection, 1, D("0.05"), type="deposit").legacy_balance == D("123.50")
        assert at.adapter.transfer(connection, 1, 2, D("0.01"), type="gift").payee_legacy_balance == D("123.46")
        at.adapter.set_balance(connection, 2, D("-7.03"), actor="admin:7", reason="case")
    assert (at.coins(1), at.coins(2)) == (12349, -703)
    at.check()


@pytest.mark.parametrize("dual", [True, False])
@pytest.mark.parametrize("coins_type", ["double precision", "real"])
def test_a_float_column_stays_exact_over_many_small_amounts(database_url: str, coins_type: str, dual: bool) -> None:
    at = place(database_url, rows=1, coins="0.1", coins_type=coins_type, flags=DUAL if dual else OFF)
    with at.engine.begin() as connection:
        credited = [at.adapter.credit(connection, 1, D("0.1"), type="deposit") for _ in range(30)]
        assert credited[-1].legacy_balance == D("3.10")
        assert at.adapter.debit(connection, 1, D("3.09"), type="booking").legacy_balance == D("0.01")
    assert at.coins(1) == pytest.approx(0.01)
    assert at.account(1) == (("mirrored", D("0.01")) if dual else None)
    at.check()


def test_a_key_and_columns_with_odd_names_are_quoted(database_url: str) -> None:
    at = custom(
        database_url,
        'create schema "Bank"; create table "Bank"."User" ("Id" bigint primary key, "Group" text not null, '
        '"TotalCoins" numeric(12, 2) not null); insert into "Bank"."User" values (1, \'acme\', 10)',
        {
            "name": "bank_users",
            "table": "Bank.User",
            "key": "Id",
            "traits": {"tenant": "Group"},
            "columns": [{"bucket": "cash", "column": "TotalCoins", "currency": "EUR", "scale": 2}],
        },
    )
    with at.engine.begin() as connection:
        assert at.adapter.credit(connection, 1, 5, type="deposit").legacy_balance == 15
        assert at.adapter.balance(connection, 1).amount == 15
    assert at.account(1) == ("mirrored", D(15))


# Details of a movement


def test_a_movement_s_details_stand_where_they_belong(database_url: str) -> None:
    at = place(database_url, rows=1)
    with at.engine.begin() as connection:
        result = at.adapter.credit(
            connection,
            1,
            5,
            type="deposit",
            reference=("deposit", 17),
            correlation_id="c-1",
            actor="admin:7",
            reason="case 9",
            description="Deposit of Ann Other",
            address="1 High Street",
        )
    stored = rows(
        at.engine,
        "select reference_type, reference_id, correlation_id, actor, reason, type, kind::text "
        "from wallet.transactions where id = :id",
        id=result.transaction_id,
    )
    assert stored == [("deposit", "17", "c-1", "admin:7", "case 9", "deposit", "posting")]
    details = rows(at.engine, "select * from wallet.transaction_details")
    assert details == [(result.transaction_id, "Deposit of Ann Other", "1 High Street")]
    journal = rows(at.engine, "select t::text from wallet.transactions as t")
    assert not any("High Street" in row or "Ann" in row for (row,) in journal), "personal data is in the side table"
    assert result.correlation_id == "c-1"


def test_a_movement_without_personal_data_has_no_row_in_the_side_table(database_url: str) -> None:
    at = place(database_url, rows=1)
    with at.engine.begin() as connection:
        at.adapter.credit(connection, 1, 5, type="deposit")
    assert rows(at.engine, "select * from wallet.transaction_details") == []


@pytest.mark.parametrize("wish", ["on", "off"])
def test_the_caller_s_correlation_id_reaches_result_row_and_event(database_url: str, wish: str) -> None:
    at = place(database_url, rows=1, flags=DUAL if wish == "on" else OFF)
    with bound_contextvars(correlation_id="request-42"), at.engine.begin() as connection:
        result = at.adapter.credit(connection, 1, 5, type="deposit")
    assert result.correlation_id == "request-42"
    assert [event.correlation_id for event in at.heard.posted] == ["request-42"]
    stored = rows(at.engine, "select correlation_id from wallet.transactions")
    assert stored == ([("request-42",)] * 2 if wish == "on" else [])  # the opening, too


def test_a_correlation_id_of_the_movement_goes_before_the_caller_s(database_url: str) -> None:
    at = place(database_url, rows=1)
    with bound_contextvars(correlation_id="outer"), at.engine.begin() as connection:
        assert at.adapter.credit(connection, 1, 5, type="deposit", correlation_id="mine").correlation_id == "mine"


def test_without_a_correlation_id_one_is_made_for_the_whole_call(database_url: str) -> None:
    at = place(database_url, rows=1)
    with at.engine.begin() as connection:
        batch = at.adapter.apply(connection, [Movement.credit(1, 1, type="a"), Movement.credit(1, 2, type="b")])
        later = at.adapter.credit(connection, 1, 3, type="c")
    assert len({each.correlation_id for each in batch}) == 1
    assert later.correlation_id != batch[0].correlation_id
    assert len(later.correlation_id) == 32


@pytest.mark.parametrize("name", ["", "psql", "walletmigrate backfill"])
def test_the_application_name_makes_no_difference(database_url: str, name: str) -> None:
    at = place(database_url, rows=1)
    with at.engine.begin() as connection:
        connection.execute(text("select set_config('application_name', :name, true)"), {"name": name})
        assert at.adapter.credit(connection, 1, 5, type="deposit").mode == "dual_write"
    assert at.account(1) == ("mirrored", D(105))


# Batches


def test_a_batch_is_carried_out_in_the_order_given_with_one_result_for_each(database_url: str) -> None:
    at = place(database_url, rows=3, floor=D(0))
    with at.engine.begin() as connection:
        results = at.adapter.apply(
            connection,
            [
                Movement.set_balance(3, 0, actor="admin:7", reason="start"),
                Movement.credit(3, 10, type="deposit"),
                Movement.debit(3, 10, type="booking"),
                Movement.transfer(2, 1, 7, type="gift"),
                Movement.credit(1, 1, type="deposit"),
            ],
        )
    assert [(each.operation, each.key, each.ledger_balance) for each in results] == [
        ("set_balance", 3, D(0)),
        ("credit", 3, D(10)),
        ("debit", 3, D(0)),
        ("transfer", 2, D(93)),
        ("credit", 1, D(108)),
    ]
    numbers = [each.transaction_id for each in results]
    assert None not in numbers
    assert numbers == sorted(n for n in numbers if n is not None)
    assert (at.coins(1), at.coins(2), at.coins(3)) == (108, 93, 0)
    at.check()


def test_a_batch_in_another_order_takes_the_same_locks_and_ends_the_same(database_url: str) -> None:
    at = place(database_url, rows=3)
    movements = [
        Movement.transfer(3, 1, 5, type="gift", idempotency_key="z"),
        Movement.transfer(2, 3, 5, type="gift", idempotency_key="a"),
        Movement.credit(1, 5, type="deposit", idempotency_key="m"),
    ]
    with at.engine.begin() as connection:
        first = at.adapter.apply(connection, movements)
    with at.engine.begin() as connection:
        second = at.adapter.apply(connection, movements[::-1])
    assert [each.replayed for each in second] == [True, True, True]
    assert [each.transaction_id for each in second] == [each.transaction_id for each in reversed(first)]
    assert (at.coins(1), at.coins(2), at.coins(3)) == (110, 95, 100)
    at.check()


def test_an_empty_batch_does_nothing(database_url: str) -> None:
    at = place(database_url, rows=1)
    with at.engine.begin() as connection:
        assert at.adapter.apply(connection, []) == ()
    assert at.heard.events == []


def test_a_batch_over_all_states_posts_each_by_its_state(database_url: str) -> None:
    at = place(database_url, rows=0)
    states = ["absent", "mirrored", "stale", "frozen", "closed, live"]
    for key, state in enumerate(states, 1):
        bring_into(at, key, state)
    with at.engine.begin() as connection:
        results = at.adapter.apply(connection, [Movement.credit(key, 1, type="deposit") for key in range(1, 6)])
    assert [each.mode for each in results] == ["dual_write", "dual_write", "dual_write", "ledger", "dual_write"]
    assert {each.ledger_balance for each in results} == {D(101)}
    at.check()


def test_a_batch_takes_one_round_trip(database_url: str) -> None:
    at = place(database_url, rows=5)
    from sqlalchemy import event

    with at.engine.begin() as connection:
        at.adapter.credit(connection, 1, 1, type="warm-up")
        statements: list[str] = []
        event.listen(connection, "before_cursor_execute", lambda _c, _u, statement, *_: statements.append(statement))
        at.adapter.apply(connection, [Movement.credit(key, 1, type="deposit") for key in range(1, 6)])
        at.adapter.transfer(connection, 1, 2, 1, type="gift")
    assert len(statements) == 2


# Flag flips and phases in a row


def test_an_account_goes_through_flips_of_the_flag_without_a_wrong_balance(database_url: str) -> None:
    at = place(database_url, rows=1)
    states = []
    for flags in (DUAL, OFF, OFF, DUAL, OFF, DUAL):
        at.flags(flags)
        with at.engine.begin() as connection:
            at.adapter.credit(connection, 1, 1, type="deposit")
        states.append(at.account(1))
        at.check()
    assert states == [
        ("mirrored", D(101)),
        ("stale", D(101)),
        ("stale", D(101)),
        ("mirrored", D(104)),
        ("stale", D(104)),
        ("mirrored", D(106)),
    ]
    assert at.coins(1) == 106


def test_a_stopped_line_is_seen_at_the_next_statement_of_a_running_transaction(database_url: str) -> None:
    at = place(database_url, rows=1)
    engine = at.engine.execution_options(isolation_level="REPEATABLE READ")
    with engine.begin() as connection:
        assert at.adapter.credit(connection, 1, 1, type="deposit").mode == "dual_write"
        execute(at.engine, "select wallet.set_line(false)")
        assert at.adapter.credit(connection, 1, 1, type="deposit").mode == "legacy"
        execute(at.engine, "select wallet.set_line(true)")
        assert at.adapter.credit(connection, 1, 1, type="deposit").mode == "dual_write"
    assert at.account(1) == ("mirrored", D(103))
    at.check()


def test_the_phase_may_change_under_a_running_adapter(database_url: str) -> None:
    at = place(database_url, rows=1, phase="legacy")
    modes = []
    for phase in ("legacy", "dual_write", "legacy", "wallet_only"):
        set_phase(at.engine, phase)
        with at.engine.begin() as connection:
            modes.append(at.adapter.credit(connection, 1, 1, type="deposit").mode)
    assert modes == ["legacy", "dual_write", "legacy", "dual_write"]
    at.check()


def test_two_mappings_in_one_database_do_not_touch_each_other(make_database: MakeDatabase) -> None:
    url = make_database()
    at = place(url, rows=1)
    both = custom(
        url,
        "create table shops (id bigint primary key, till numeric(12, 2) not null); insert into shops values (1, 50)",
        {
            "name": "shops",
            "table": "public.shops",
            "key": "id",
            "columns": [{"bucket": "cash", "column": "till", "currency": "EUR", "scale": 2}],
        },
    )
    with at.engine.begin() as connection:
        at.adapter.credit(connection, 1, 5, type="deposit")
        posted = both.adapter.credit(connection, 1, 7, type="sale")
        with pytest.raises(UnknownTransaction):
            at.adapter.reverse(connection, posted.transaction_id or 0, reason="not mine")
    assert (at.account(1), both.account(1)) == (("mirrored", D(105)), ("mirrored", D(57)))
    at.check()
    both.check()
