"""Every operation of the adapter on every account state: what both sides of the money do then."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from decimal import Decimal
from itertools import count

import pytest
from sqlalchemy import Connection

import servers
from adapting import Place, asked_for, bring_into, place
from ledger import scalar
from walletmigrate import LegacyBalanceAdapter, Posting, connect
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
