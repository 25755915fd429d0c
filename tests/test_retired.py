"""Postings to a retired mapping: each side is locked, opened and brought up by the ledger's accounts alone."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from functools import partial
from typing import Any

import pytest
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError

import interleaving
from interleaving import Stage
from invariants import violations
from ledger import ACT, rows, scalar, set_phase
from town import CASH, COLUMNS, DOLLARS, DUAL, FROZEN, PROMO, Account, Town, movement
from walletmigrate import LegacyBalanceAdapter, Movement, capture
from walletmigrate.errors import UnknownAccount
from walletmigrate.install import install

CLOSED = (
    "insert into users values (4, 'acme', null, 5, 7), (5, 'acme', 5, null, 7), (6, 'acme', 5, 7, null)",
    "insert into clubs values (9, 'acme', 1, 2, 3)",
    "select wallet.backfill_users(null, null, null)",
    "select wallet.backfill_clubs(null, null, null)",
    "update users set coins = -6 where id = 1",
    "select wallet.backfill_users(null, null, null)",
    "delete from users where id in (1, 2, 4, 5, 6)",
    "delete from clubs where id = 1",
)
"""Closed accounts with balances, positive and negative; of keys 4 to 6 one account each was never opened."""


@pytest.fixture
def town(database_url: str) -> Town:
    """Rows 1, 4, 5, 6 and 9 have come after the retirement; 1 and 4 to 6 had been there, and 9 is a club's key too."""
    made = Town(database_url)
    for step in (*CLOSED, *FROZEN):
        made.sql(step)
    with made.engine.begin() as connection:
        for mapping in made.settings.mappings:
            capture.remove_triggers(connection, made.settings, mapping)
    set_phase(made.engine, "retired")
    install(made.engine, made.settings, ACT)
    made.sql("insert into users (id) values (1), (4), (5), (6), (9)")
    return made


def credit(key: int, column: tuple[str, str] = CASH, **fields: Any) -> Movement:
    bucket, currency = column
    return Movement(
        operation="credit", key=key, amount=Decimal(5), bucket=bucket, currency=currency, type="test", **fields
    )


def posting(town: Town, *movements: Movement) -> Callable[[Connection], object]:
    adapter = LegacyBalanceAdapter(town.settings, DUAL, mapping="users")
    return lambda connection: adapter.apply(connection, movements)


def pay(town: Town, movement: Movement, *, mapping: str) -> None:
    adapter = LegacyBalanceAdapter(town.settings, DUAL, mapping=mapping)
    with town.engine.begin() as connection:
        adapter.apply(connection, [movement])


def changed(town: Town, act: Callable[[], object]) -> set[Account]:
    before = town.accounts()
    act()
    return {account for account, found in town.accounts().items() if before.get(account) != found}


def balances(town: Town, key: int) -> dict[tuple[str, str], tuple[str, Decimal]]:
    query = "select bucket, currency, state::text, balance from wallet.accounts where mapping = 'users' and key = :key"
    return {
        (bucket, currency): (state, held) for bucket, currency, state, held in rows(town.engine, query, key=str(key))
    }


def assert_sound(town: Town) -> None:
    """No row is compared: the columns say nothing any more, and no account is mirrored."""
    with town.engine.connect() as connection:
        assert violations(connection, town.settings) == []


def test_a_posting_changes_its_own_account_alone(town: Town) -> None:
    for table, key in (("users", 3), ("clubs", 2), ("clubs", 3)):
        for column in COLUMNS:
            post = partial(pay, town, credit(key, column), mapping=table)
            assert changed(town, post) == {(table, str(key), *column)}
    assert_sound(town)


@pytest.mark.parametrize(("key", "column"), [(4, CASH), (5, DOLLARS), (6, PROMO), (9, CASH)])
def test_an_account_that_never_was_is_opened_though_others_of_the_key_are_there(
    town: Town, key: int, column: tuple[str, str]
) -> None:
    town.post(credit(key, column))
    assert balances(town, key) == {other: ("frozen", Decimal(5 if other == column else 0)) for other in COLUMNS}
    assert_sound(town)


def test_a_row_that_came_again_brings_its_own_accounts_to_nothing_and_no_others(town: Town) -> None:
    last = scalar(town.engine, "select max(id) from wallet.transactions")
    assert changed(town, lambda: town.post(credit(1))) == {("users", "1", *column) for column in COLUMNS}
    assert balances(town, 1) == {CASH: ("frozen", Decimal(5)), DOLLARS: ("frozen", 0), PROMO: ("frozen", 0)}
    legs = (
        "select d.name, c.name, t.kind::text, t.amount, t.currency, t.reason from wallet.transactions as t "
        "left join wallet.system_accounts as d on d.id = t.debit_account "
        "left join wallet.system_accounts as c on c.id = t.credit_account where t.id > :last order by t.id"
    )
    was = "the account was closed"
    assert rows(town.engine, legs, last=last) == [
        ("bypass", None, "resync", 6, "EUR", was),
        (None, "bypass", "resync", 101, "USD", was),
        (None, "bypass", "resync", 201, "EUR", was),
        ("external", None, "posting", 5, "EUR", None),
    ]
    assert_sound(town)


def test_an_account_that_was_closed_at_nothing_is_frozen_without_a_transaction(town: Town) -> None:
    close = "update wallet.accounts set state = 'closed' where mapping = 'clubs' and key = '3'"
    town.sql(close)
    pay(town, credit(3), mapping="clubs")
    town.sql(close)
    before = scalar(town.engine, "select count(*) from wallet.transactions")
    pay(town, credit(3, PROMO), mapping="clubs")
    # Cash goes back to nothing, promo is paid; dollars were at nothing.
    assert scalar(town.engine, "select count(*) from wallet.transactions") == before + 2
    assert_sound(town)


@pytest.fixture
def stage(town: Town, database_url: str) -> Any:
    with interleaving.stage(database_url) as made:
        yield made


def test_a_posting_waits_for_no_other_account_of_its_key_as_long_as_all_are_frozen(town: Town, stage: Stage) -> None:
    town.sql("update wallet.accounts set state = 'closed' where mapping = 'clubs' and key = '3'")
    holder, poster = stage.session(), stage.session()
    holder.sql("select from wallet.accounts where mapping <> 'users' or key <> '3' or bucket <> 'cash' for update")
    holder.sql("select from wallet.accounts where currency <> 'EUR' for update")
    poster.sql("set local lock_timeout = '2s'")
    poster.do(posting(town, credit(3)))
    poster.commit()
    assert balances(town, 3)[CASH] == ("frozen", Decimal(8))


def pay_while_paid(town: Town, stage: Stage, one: Movement, other: Movement) -> None:
    """The other posting comes to wait for the one, which is in flight; both commit."""
    first, second = stage.session(), stage.session()
    first.do(posting(town, one))
    waiting = second.waiting(posting(town, other), on=first)
    first.commit()
    waiting.result(interleaving.PATIENCE_SECONDS)
    second.commit()
    assert_sound(town)


def test_two_postings_at_once_to_one_account_are_both_in_its_balance(town: Town, stage: Stage) -> None:
    pay_while_paid(town, stage, credit(3), credit(3))
    assert balances(town, 3)[CASH] == ("frozen", Decimal(13))


def test_who_waits_for_the_first_posting_of_a_row_that_came_again_brings_nothing_to_nothing_twice(
    town: Town, stage: Stage
) -> None:
    pay_while_paid(town, stage, credit(1), credit(1, PROMO))
    assert balances(town, 1) == {CASH: ("frozen", Decimal(5)), DOLLARS: ("frozen", 0), PROMO: ("frozen", Decimal(5))}


def test_two_first_postings_of_a_row_that_came_later_open_its_accounts_once(town: Town, stage: Stage) -> None:
    town.sql("insert into users (id) values (10)")
    pay_while_paid(town, stage, credit(10), credit(10, PROMO))
    assert balances(town, 10) == {CASH: ("frozen", Decimal(5)), DOLLARS: ("frozen", 0), PROMO: ("frozen", Decimal(5))}


def test_the_accounts_of_a_row_that_came_again_are_locked_by_id(town: Town, stage: Stage) -> None:
    """Of key 4 cash is opened last, and what was opened first lies behind the others in the table."""
    town.post(credit(4))
    town.sql("update wallet.accounts set state = 'closed' where mapping = 'users' and key = '4'")
    query = "select id from wallet.accounts where mapping = 'users' and key = '4' order by "
    ids = [found for (found,) in rows(town.engine, query + "id")]
    town.sql(f"update wallet.accounts set opened_at = clock_timestamp() where id = {ids[0]}")
    assert [found for (found,) in rows(town.engine, query + "ctid")][-1] == ids[0]
    holder, poster, other = stage.session(), stage.session(), stage.session()
    holder.sql("select from wallet.accounts where id = :id for update", id=ids[0])
    # An index of the keys would give them in an order of its own.
    poster.sql("set local enable_indexscan = off; set local enable_bitmapscan = off")
    waiting = poster.waiting(posting(town, credit(4)), on=holder)
    other.sql("set local lock_timeout = '2s'")
    other.sql("select from wallet.accounts where id = any(:rest) for update", rest=ids[1:])
    other.rollback()
    holder.rollback()
    waiting.result(interleaving.PATIENCE_SECONDS)
    poster.commit()
    assert_sound(town)


@pytest.mark.parametrize(
    ("refused", "key"),
    [
        (movement("credit", 99, 1), 99),
        (movement("debit", 99, 1), 99),
        (movement("transfer", 99, 1, payee=3), 99),
        (movement("transfer", 3, 1, payee=99), 99),
    ],
    ids=["credit", "debit", "payer", "payee"],
)
def test_a_key_without_a_row_is_told_whichever_side_it_is_of(town: Town, refused: Movement, key: int) -> None:
    def post() -> None:
        with pytest.raises(UnknownAccount) as raised:
            town.post(refused)
        assert raised.value.key == key

    assert changed(town, post) == set()


def test_what_was_posted_stays_posted_when_its_row_is_gone_since(town: Town) -> None:
    paid = credit(3, idempotency_key="once")
    number = town.post(paid)
    town.sql("delete from users where id = 3")
    assert town.post(paid) == number
    with pytest.raises(UnknownAccount):
        town.post(credit(3))


def test_a_caller_of_another_configuration_is_refused(town: Town) -> None:
    with town.engine.connect() as connection, pytest.raises(DBAPIError, match="from another configuration"):
        connection.execute(text("select wallet.plain_users('0', 'strict', 3, 'cash', 'EUR', 5, '{}')"))
