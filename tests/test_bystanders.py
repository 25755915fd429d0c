"""What is done to one account is done to that one alone: not to another key's, bucket's, currency's or mapping's."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy.exc import DBAPIError

from invariants import assert_sound
from ledger import ACT, post, rows, scalar
from town import (
    ALL_OF_ONE,
    CASH,
    COLUMNS,
    DOLLARS,
    DUAL,
    FIRST,
    FROZEN,
    OFF,
    ONE,
    ONE_AND_TWO,
    PROMO,
    RAW,
    TABLES,
    USERS,
    Account,
    Town,
    movement,
)
from walletmigrate import LegacyBalanceAdapter, Movement
from walletmigrate.corrections import adjust
from walletmigrate.recalculate import recalculate
from walletmigrate.reconcile import reconcile
from walletmigrate.undo import undo

STALE = (RAW,)

Doing = Callable[[Town], object]


def mirror(town: Town) -> None:
    town.mode("mirror")


def reject(town: Town) -> None:
    town.mode("reject")


CASES: dict[str, tuple[tuple[str | Doing, ...], Doing, set[Account]]] = {
    "a credit": ((), lambda t: t.post(movement("credit", 1, 5)), ONE),
    "a debit": ((), lambda t: t.post(movement("debit", 1, 1)), ONE),
    "a balance set higher": ((), lambda t: t.post(movement("set_balance", 1, 777)), ONE),
    "a balance set lower": ((), lambda t: t.post(movement("set_balance", 1, -777)), ONE),
    "a transfer": (
        (),
        lambda t: t.post(movement("transfer", 1, 1, payee=2)),
        ONE_AND_TWO,
    ),
    "a batch": (
        (),
        lambda t: t.post(movement("credit", 2, 5, idempotency_key="b"), movement("debit", 1, 1, idempotency_key="a")),
        ONE_AND_TWO,
    ),
    "a reversal": (
        (),
        lambda t: t.post(Movement(operation="reverse", transaction_id=t.post(movement("credit", 1, 5)), reason="no")),
        ONE,
    ),
    "a replay": (
        (),
        lambda t: [t.post(movement("set_balance", 1, 5, idempotency_key="k", type="x")) for _ in "ab"],
        ONE,
    ),
    "a credit to a stale account": (STALE, lambda t: t.post(movement("credit", 1, 5)), ONE),
    "a debit of a stale account": (STALE, lambda t: t.post(movement("debit", 1, 1)), ONE),
    "a credit to a frozen account": (FROZEN, lambda t: t.post(movement("credit", 1, 5)), ONE),
    "a debit of a frozen account": (FROZEN, lambda t: t.post(movement("debit", 1, 1)), ONE),
    "a credit with the flag off": ((), lambda t: t.post(movement("credit", 1, 5), source=OFF), ONE),
    "a transfer with the flag off": (
        (),
        lambda t: t.post(movement("transfer", 1, 1, payee=2), source=OFF),
        ONE_AND_TWO,
    ),
    "a raw update": ((), lambda t: t.sql(RAW), ONE),
    "a raw update that is mirrored": ((mirror,), lambda t: t.sql(RAW), ONE),
    "a row deleted": ((), lambda t: t.sql("delete from users where id = 1"), ALL_OF_ONE),
    "a row without its key": ((), lambda t: t.sql("update users set id = 9 where id = 1"), ALL_OF_ONE),
    "a row deleted and mirrored": (
        (mirror,),
        lambda t: t.sql("delete from users where id = 1"),
        ALL_OF_ONE,
    ),
    "a row deleted and inserted": (
        ("delete from users where id = 1",),
        lambda t: t.sql("insert into users values (1, 'acme', 1, 2, 3)"),
        ALL_OF_ONE,
    ),
    "a truncate": ((), lambda t: t.sql("truncate users"), USERS),
    "a raw update of another mapping": ((), lambda t: t.sql(RAW.replace("users", "clubs")), {("clubs", "1", *CASH)}),
    "a truncate where one was closed before": (
        ("delete from users where id = 1",),
        lambda t: t.sql("truncate users"),
        USERS - ALL_OF_ONE,
    ),
    "a truncate while another mapping is frozen": (
        ("update wallet.control set phase = 'frozen'", "select wallet.freeze_clubs(null, null)"),
        lambda t: t.sql("truncate users"),
        USERS,
    ),
    "a truncate, past which the adapter alone may write, of what is stale": (
        ("update users set coins = 0, dollars = 0, promo = 0", reject),
        lambda t: t.sql("truncate users"),
        USERS,
    ),
    "a backfill of one that is stale": (STALE, lambda t: t.sql("select wallet.backfill_users(null, null, null)"), ONE),
    "a last pass over one that is stale": (
        STALE,
        lambda t: t.sql(f"select wallet.late_users(null, null, {t.job})"),
        ONE,
    ),
    "a freeze of one key": ((), lambda t: t.sql("select wallet.freeze_users(null, '1')"), ALL_OF_ONE),
    "an unfreeze of one key": (FROZEN, lambda t: t.sql("select wallet.unfreeze_users(null, '1')"), ALL_OF_ONE),
    "a closing": (
        (lambda t: t.past_the_fence("delete from users where id = 1"),),
        lambda t: t.sql(
            "select wallet.close_users(id, 'gone') from wallet.accounts where mapping = 'users' and key = '1'"
        ),
        ALL_OF_ONE,
    ),
    "an operator's correction": (
        (),
        lambda t: adjust(t.engine, t.settings, t.users, ACT, "1", 5, bucket="cash", currency="EUR"),
        ONE,
    ),
    "an operator's correction of a stale one": (
        STALE,
        lambda t: adjust(t.engine, t.settings, t.users, ACT, "1", 5, bucket="cash", currency="EUR"),
        ONE,
    ),
    "a reconciliation": (STALE, lambda t: reconcile(t.engine, t.settings, t.users, ACT), ONE),
    "a balance made the sum of its journal": (
        (f"update wallet.accounts set balance = 5 where {FIRST}",),
        lambda t: recalculate(t.engine, t.settings, t.users, ACT),
        ONE,
    ),
    "a backfill undone": ((), lambda t: undo(t.engine, t.settings, t.job, ACT), USERS),
}
"""What happens, after what; and the accounts that are not as they were."""


@pytest.fixture
def town(database_url: str) -> Town:
    return Town(database_url)


@pytest.mark.parametrize("what", CASES)
def test_it_happens_to_the_accounts_it_is_meant_for_and_to_no_other(town: Town, what: str) -> None:
    first, act, meant = CASES[what]
    for step in first:
        town.sql(step) if isinstance(step, str) else step(town)
    before = town.accounts()
    act(town)
    after = town.accounts()
    assert {account for account, found in before.items() if after.get(account) != found} == meant
    assert after.keys() == before.keys()
    assert_sound(town.engine, town.settings)


@pytest.mark.parametrize(("bucket", "currency"), list(COLUMNS))
def test_a_correction_is_made_in_the_column_it_is_of(town: Town, bucket: str, currency: str) -> None:
    before = town.accounts()
    adjust(town.engine, town.settings, town.users, ACT, "2", 5, bucket=bucket, currency=currency)
    after, own = town.accounts(), ("users", "2", bucket, currency)
    assert {account for account, found in before.items() if after[account] != found} == {own}
    assert (after[own][1], after[own][5]) == (before[own][1] + 5, before[own][5] + 5)
    assert_sound(town.engine, town.settings)


def test_what_is_in_order_is_looked_at_once_each(town: Town) -> None:
    with town.engine.begin() as holder:
        # Only what differs is looked at again under its locks.
        holder.exec_driver_sql("select from users for update")
        made = reconcile(town.engine, town.settings, town.users, ACT, batch_size=1)
    assert ({name: n for name, n in made.counts.items() if n}, made.items) == ({"in_order": 9}, ())


def test_each_balance_is_made_the_sum_of_its_own_journal(town: Town) -> None:
    sound = {account: found[:2] for account, found in town.accounts().items()}
    town.sql("update wallet.accounts set balance = balance + id")
    for mapping in reversed(town.settings.mappings):
        made = recalculate(town.engine, town.settings, mapping, ACT)
        assert {one.outcome for one in made.items} == {"recalculated"}
        assert len(made.items) == len(USERS)
    assert {account: found[:2] for account, found in town.accounts().items()} == sound
    assert_sound(town.engine, town.settings)


EQUAL = (
    "update users set coins = 50, dollars = 55, promo = 55 where id = 1",
    "update users set coins = 55 where id = 2",
    "update clubs set coins = 55 where id = 1",
    "select wallet.backfill_users(null, null, null)",
    "select wallet.backfill_clubs(null, null, null)",
    RAW,
)
"""The first account is stale, its row holds 55; four others, each alike in all but one thing, are mirrored at 55."""


def test_a_posting_to_a_stale_account_takes_no_other_of_the_same_balance_for_it(town: Town) -> None:
    for step in EQUAL:
        town.sql(step)
    before = town.accounts()
    town.post(movement("credit", 1, 5))
    after = town.accounts()
    assert {account for account, found in before.items() if after[account] != found} == ONE
    assert after["users", "1", *CASH][:2] == ("mirrored", 60)
    assert_sound(town.engine, town.settings)


@pytest.mark.parametrize(("bucket", "currency"), [DOLLARS, PROMO])
def test_a_posting_with_the_flag_off_turns_its_own_account_stale_however_stale_the_others_are(
    town: Town, bucket: str, currency: str
) -> None:
    for table in TABLES:
        town.sql(f"update {table} set coins = coins + 1, dollars = dollars + 1, promo = promo + 1")
    credit = Movement(operation="credit", key=3, amount=Decimal(5), bucket=bucket, currency=currency, type="test")
    town.post(credit)
    before = town.accounts()
    town.post(credit, source=OFF)
    after = town.accounts()
    own = ("users", "3", bucket, currency)
    assert {account for account, found in before.items() if after[account] != found} == {own}
    assert (before[own][0], after[own][0]) == ("mirrored", "stale")


def test_a_truncate_waits_for_no_account_of_another_mapping(town: Town) -> None:
    with town.engine.begin() as other, town.engine.begin() as connection:
        other.exec_driver_sql("select from wallet.accounts where mapping = 'clubs' for update")
        connection.exec_driver_sql("set local lock_timeout = '5s'")
        connection.exec_driver_sql("truncate users")
    assert {account[0] for account, found in town.accounts().items() if found[0] == "closed"} == {"users"}


def test_a_shadow_leg_that_fails_turns_its_own_account_stale_and_is_recorded_once(town: Town) -> None:
    town.sql("alter domain wallet.amount add constraint no_fives check (value <> 5)")
    before = town.accounts()
    town.post(movement("credit", 2, 6, idempotency_key="two"))
    town.post(movement("credit", 1, 5, idempotency_key="one"))
    after = town.accounts()
    changed = {account for account, found in before.items() if after[account] != found}
    assert changed == ONE_AND_TWO
    assert (after["users", "1", *CASH][0], after["users", "2", *CASH][0]) == ("stale", "mirrored")
    assert rows(town.engine, "select mapping, key, bucket, currency, operation, sqlstate from wallet.failures") == [
        ("users", "1", *CASH, "credit", "23514")
    ]
    modes = "select key, mode::text, transaction_id is null from wallet.idempotency_keys order by key"
    assert rows(town.engine, modes) == [("one", "legacy", True), ("two", None, False)]


def test_a_row_that_took_another_balance_leaves_the_others_and_their_keys_alone(town: Town) -> None:
    town.post(movement("credit", 1, 5, idempotency_key="same request"))
    town.sql(
        "create function skim() returns trigger language plpgsql as "
        "$$ begin if new.id = 1 then new.coins := new.coins - 1; end if; return new; end $$"
    )
    town.sql("create trigger skim before update on users for each row execute function skim()")
    town.post(movement("credit", 2, 6, idempotency_key="two"))
    kept = "select * from wallet.idempotency_keys where key <> 'one' order by key"
    before, key = town.accounts(), rows(town.engine, kept)
    town.post(movement("credit", 1, 5, idempotency_key="one"))
    after = town.accounts()
    assert {account for account, found in before.items() if after[account] != found} == ONE
    assert after["users", "1", *CASH][0] == "stale"
    assert rows(town.engine, kept) == key
    assert scalar(town.engine, "select balances from wallet.idempotency_keys where key = 'one'") == [
        None,
        None,
        Decimal(10),
        Decimal(11),
    ]


HELD: dict[str, tuple[str, tuple[Movement, ...]]] = {
    "a transfer": (
        "mapping <> 'users' or key = '3' or bucket <> 'cash' or currency <> 'EUR'",
        (movement("transfer", 1, 1, payee=2),),
    ),
    "a batch": ("mapping <> 'users' or key = '3'", (movement("credit", 1, 5), movement("debit", 2, 1))),
}
"""Accounts that others may hold; of the owners in a batch, all are locked."""


@pytest.mark.parametrize("what", HELD)
def test_who_holds_other_accounts_is_not_waited_for(town: Town, what: str) -> None:
    others, movements = HELD[what]
    with town.engine.begin() as holder:
        holder.exec_driver_sql(f"select from wallet.accounts where {others} for update")
        with town.engine.begin() as connection:
            connection.exec_driver_sql("set local lock_timeout = '2s'")
            LegacyBalanceAdapter(town.settings, DUAL, mapping="users").apply(connection, movements)
    assert_sound(town.engine, town.settings)


@pytest.mark.parametrize("operation", ["credit", "debit"])
def test_a_transaction_of_another_mapping_is_unknown(town: Town, operation: str) -> None:
    clubs = LegacyBalanceAdapter(town.settings, DUAL, mapping="clubs")
    with town.engine.begin() as connection:
        (made,) = clubs.apply(connection, [movement(operation, 1, 5)])
    before = town.accounts()
    alone = town.settings.model_copy(update={"mappings": (town.users,)})
    with town.engine.begin() as connection:
        refused = post(connection, alone, "reverse", 1, 5, reverses=made.transaction_id, bucket="promo")
    assert refused["refusal"] == "unknown_transaction"
    assert town.accounts() == before


def test_the_short_way_fires_the_application_s_trigger_once_whatever_the_column(town: Town) -> None:
    """The long way would fire it again, after what the short way did was taken back; a sequence has no rollback."""
    town.sql("create sequence fired")
    town.sql(
        "create function count_up() returns trigger language plpgsql as "
        "$$ begin perform nextval('fired'); return null; end $$"
    )
    town.sql("create trigger count_up after update on users for each row execute function count_up()")
    for bucket, currency in COLUMNS:
        fields: dict[str, Any] = {"key": 1, "amount": 5, "bucket": bucket, "currency": currency, "type": "test"}
        assert town.post(Movement(operation="credit", **fields))
        assert town.post(Movement(operation="debit", **fields))
    town.sql(RAW)
    town.post(movement("credit", 1, 5), source=OFF)
    town.post(movement("debit", 1, 1), source=OFF)
    assert scalar(town.engine, "select last_value from fired") == 2 * len(COLUMNS) + 3
    assert_sound(town.engine, town.settings)


@pytest.mark.parametrize("statement", [RAW, "delete from users where id = 1", "truncate users"])
def test_what_is_rejected_changes_nothing(town: Town, statement: str) -> None:
    town.mode("reject")
    before = town.accounts()
    with pytest.raises(DBAPIError, match="through the adapter only"):
        town.sql(statement)
    assert town.accounts() == before
    town.sql("update clubs set coins = coins + 5 where id = 1")
    assert {account for account, found in before.items() if town.accounts()[account] != found} == {
        ("clubs", "1", *CASH)
    }
