"""The transactions of one batch are a group; and what each movement moved is told."""

from __future__ import annotations

from decimal import Decimal

import pytest

from adapting import DUAL, OFF, Place, custom, place
from ledger import execute, rows
from walletmigrate import Movement
from walletmigrate.errors import InsufficientFunds

D = Decimal


@pytest.fixture
def at(database_url: str) -> Place:
    return place(database_url, rows=4, floor=D(0))


def groups(at: Place) -> dict[int, int | None]:
    """The group of every transaction that is no opening, by its id."""
    found: list[tuple[int, int | None]] = [
        (number, group)
        for number, group in rows(at.engine, "select id, group_id from wallet.transactions where kind <> 'opening'")
    ]
    return dict(found)


def shared(numbers: list[int]) -> dict[int | None, int | None]:
    """One group of these transactions."""
    return dict.fromkeys(numbers, numbers[0])


def batch(at: Place, *movements: Movement) -> list[int]:
    """Carry out a batch, and give the ids of its transactions."""
    with at.engine.begin() as connection:
        return [one.transaction_id or 0 for one in at.adapter.apply(connection, movements)]


def test_the_transactions_of_a_batch_have_the_first_ones_number_as_their_group(at: Place) -> None:
    made = batch(
        at,
        Movement.credit(2, 5, type="a"),
        Movement.debit(1, 5, type="b"),
        Movement(operation="transfer", key=3, payee=4, amount=1, type="c"),
    )
    assert groups(at) == shared(made)
    with at.engine.begin() as connection:
        entries = [at.adapter.history(connection, key)[0] for key in range(1, 5)]
        opening = at.adapter.history(connection, 1)[-1]
    assert [entry.group_id for entry in entries] == [made[0]] * 4
    assert (opening.kind, opening.group_id) == ("opening", None)
    at.check()


def test_two_batches_are_two_groups_and_a_single_posting_is_none(at: Place) -> None:
    one = batch(at, Movement.credit(1, 5, type="a"), Movement.credit(2, 5, type="a"))
    other = batch(at, Movement.credit(1, 5, type="a"), Movement.credit(2, 5, type="a"))
    (alone,) = batch(at, Movement.credit(1, 5, type="a"))
    with at.engine.begin() as connection:
        long = at.adapter.transfer(connection, 1, 2, 5, type="a").transaction_id
    assert groups(at) == {**shared(one), **shared(other), alone: None, long: None}


def test_a_replay_in_a_batch_belongs_to_the_group_of_its_first_call(at: Place) -> None:
    first = batch(at, Movement.credit(1, 5, type="a", idempotency_key="k"), Movement.credit(2, 5, type="a"))
    again = batch(
        at,
        Movement.credit(1, 5, type="a", idempotency_key="k"),
        Movement.credit(2, 5, type="a"),
        Movement.credit(3, 5, type="a"),
    )
    assert again[0] == first[0]
    assert groups(at) == {**shared(first), **shared(again[1:])}


def test_one_transaction_of_a_group_is_reversed_alone(at: Place) -> None:
    made = batch(at, *(Movement.credit(key, 5, type="a") for key in (1, 2, 3)))
    with at.engine.begin() as connection:
        undone = at.adapter.reverse(connection, made[1], reason="refund").transaction_id
        assert at.adapter.reverse(connection, made[1], reason="refund").replayed
    assert [at.coins(key) for key in (1, 2, 3)] == [105, 100, 105]
    assert groups(at) == {**shared(made), undone: None}
    reversals = [Movement(operation="reverse", transaction_id=number, reason="refund") for number in (made[0], made[2])]
    rest = batch(at, *reversals)
    assert [at.coins(key) for key in (1, 2, 3)] == [100, 100, 100]
    assert [groups(at)[number] for number in rest] == [rest[0]] * 2
    at.check()


def test_half_a_transfer_in_a_batch_is_of_the_batchs_group(database_url: str) -> None:
    """The column of the payee holds no exact amount: one half of the transfer stands in the ledger."""
    at = place(database_url, rows=4, coins_type="numeric(20, 4)")
    execute(at.engine, "update users set total_coins = 1.0001 where id = 3")
    made = batch(
        at,
        Movement.credit(1, 5, type="a"),
        Movement(operation="transfer", key=1, payee=3, amount=1, type="b"),
        Movement.credit(2, 5, type="a"),
    )
    assert groups(at) == shared(made)
    assert ("posting", "1", "transit", D(1)) in at.legs()
    with at.engine.begin() as connection:
        alone = at.adapter.transfer(connection, 1, 3, 1, type="b").transaction_id or 0
    assert groups(at) == {**shared(made), **shared([alone])}, "half a transfer says by its group that it is half"


def test_a_refused_batch_leaves_no_group(at: Place) -> None:
    with pytest.raises(InsufficientFunds), at.engine.begin() as connection:
        at.adapter.apply(connection, [Movement.credit(1, 5, type="a"), Movement.debit(2, 1000, type="a")])
    assert groups(at) == {}


@pytest.mark.parametrize("flags", [DUAL, OFF], ids=["on", "off"])
def test_observers_are_told_what_each_movement_moved(at: Place, flags: dict[str, bool]) -> None:
    at.flags(flags)
    with at.engine.begin() as connection:
        first = at.adapter.credit(connection, 1, D("12.50"), type="a", idempotency_key="k")
        at.adapter.credit(connection, 1, D("12.50"), type="a", idempotency_key="k")
        at.adapter.debit(connection, 1, 2, type="a", description="the long way")
        at.adapter.transfer(connection, 1, 2, 3, type="a")
        at.adapter.set_balance(connection, 4, 70, actor="tests", reason="as counted")
        at.adapter.set_balance(connection, 4, 70, actor="tests", reason="as counted")
        at.adapter.open_account(connection, 3)
        with pytest.raises(InsufficientFunds):
            at.adapter.debit(connection, 1, 1000, type="a")
        if first.transaction_id:
            at.adapter.reverse(connection, first.transaction_id, reason="refund")
    moved = [D("12.50"), None, D(2), D(3), D(30), None, None, None]
    assert [event.amount for event in at.heard.posted] == moved + ([D("12.50")] if flags else [])


def test_what_a_movement_moved_is_told_without_a_ledger_too(database_url: str) -> None:
    mapping = {
        "name": "users",
        "table": "public.users",
        "key": "id",
        "columns": [{"bucket": "cash", "column": "coins", "currency": "EUR", "scale": 2}],
    }
    ddl = "create table users (id bigint primary key, coins numeric(12, 2)); insert into users values (1, 9), (2, 9)"
    at = custom(database_url, ddl, mapping, installed=False)
    with at.engine.begin() as connection:
        at.adapter.debit(connection, 1, 2, type="a")
        at.adapter.transfer(connection, 1, 2, 3, type="a")
        at.adapter.set_balance(connection, 1, 70, actor="tests", reason="as counted")
    assert [event.amount for event in at.heard.posted] == [D(2), D(3), None]
