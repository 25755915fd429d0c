"""What jobs do to a span of keys they do to these keys, this mapping and what is due: called as a batch calls them."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import Engine

import interleaving
from invariants import assert_sound
from ledger import execute, install_users, rows
from town import ALL_OF_ONE, CASH, DOLLARS, FIRST, FROZEN, ONE, PROMO, RAW, Account, Town
from walletmigrate import Movement

NEW = "insert into {} select g, 'acme', g, 100 + g, 200 + g from generate_series({}, {}) as g"


@pytest.fixture
def town(database_url: str) -> Town:
    return Town(database_url)


def keys(town: Town) -> set[str]:
    """Of users with all their accounts."""
    query = "select key from wallet.accounts where mapping = 'users' group by key having count(*) >= 3"
    return {key for (key,) in rows(town.engine, query)}


def committed(town: Town, statement: str, *, waits: bool = False) -> list[tuple[Any, ...]]:
    """What a statement yields in a transaction of its own, which waits for locks of nobody unless it may."""
    with town.engine.begin() as connection:
        if not waits:
            connection.exec_driver_sql("set local lock_timeout = '5s'")
        return [tuple(row) for row in connection.exec_driver_sql(statement)]


def changed(town: Town, statement: str) -> set[Account]:
    before = town.accounts()
    committed(town, statement)
    after = town.accounts()
    return {account for account, found in before.items() if after[account] != found}


def one(engine: Engine, statement: str) -> tuple[Any, ...]:
    with engine.begin() as connection:
        return tuple(connection.exec_driver_sql(statement).one())


# Spans


def test_a_batch_opens_the_keys_of_its_span_and_no_others(database_url: str) -> None:
    engine, _ = install_users(database_url, rows=9, phase="dual_write")
    assert one(engine, "select * from wallet.cut_users('3', '6', 10)") == ("6", 3)
    assert one(engine, "select * from wallet.cut_users('3', null, 2)") == ("5", 2)
    assert one(engine, "select * from wallet.cut_users('9', null, 2)") == (None, 0)
    assert one(engine, "select * from wallet.backfill_users('3', '6', null)") == (3, 3, 0, 0)
    assert rows(engine, "select key from wallet.accounts order by key") == [("4",), ("5",), ("6",)]


def test_a_last_pass_opens_the_late_keys_of_its_span_and_no_others(town: Town) -> None:
    town.sql(NEW.format("users", 11, 15))
    assert committed(town, f"select * from wallet.late_users('11', '14', {town.job})") == [(3, 9, 0, 0)]
    assert keys(town) == {"1", "2", "3", "12", "13", "14"}


# Values that are no amount


BAD = ("'NaN'", "'Infinity'", "'-Infinity'", "100.005", "null")


@pytest.fixture
def engine(database_url: str) -> Engine:
    return install_users(database_url, rows=3, coins_type="numeric", phase="dual_write")[0]


@pytest.mark.parametrize("value", BAD)
def test_a_value_that_is_no_amount_is_neither_opened_nor_brought_up_and_is_counted(engine: Engine, value: str) -> None:
    broken = f"update users set total_coins = {value} where id = 2"
    execute(engine, broken)
    assert one(engine, "select * from wallet.backfill_users(null, '1', null)") == (1, 1, 0, 0)
    assert one(engine, "select * from wallet.late_users(null, '1', null)") == (1, 0, 0, 0)
    assert one(engine, "select * from wallet.backfill_users(null, null, null)") == (3, 1, 0, 1)
    assert one(engine, "select * from wallet.late_users(null, null, null)") == (3, 0, 0, 1)
    assert rows(engine, "select key from wallet.accounts order by id") == [("1",), ("3",)]
    execute(engine, "update users set total_coins = 100 where id = 2")
    assert one(engine, "select * from wallet.backfill_users(null, null, null)") == (3, 1, 0, 0)
    execute(engine, broken)
    assert one(engine, "select * from wallet.backfill_users(null, null, null)") == (3, 0, 0, 1)
    assert rows(engine, "select state::text, balance from wallet.accounts where key = '2'") == [("stale", 100)]


# Opening and bringing up


def test_columns_that_are_stale_at_once_are_each_brought_to_their_own_balance(town: Town) -> None:
    for table in ("users", "clubs"):
        town.sql(f"update {table} set coins = coins + 5, dollars = dollars - 7 where id in (1, 2)")
    meant = {("users", key, *column) for key in ("1", "2") for column in (CASH, DOLLARS)}
    assert changed(town, "select * from wallet.backfill_users(null, null, null)") == meant
    assert {found[:2] for account, found in town.accounts().items() if account in meant} == {
        ("mirrored", 6),
        ("mirrored", 7),
        ("mirrored", 94),
        ("mirrored", 95),
    }
    assert_sound(town.engine, town.settings)


def test_a_balance_below_zero_is_opened_and_brought_up_with_its_history(town: Town) -> None:
    town.sql("insert into users values (11, 'acme', -5, -6, -7)")
    town.sql("update users set coins = -8 where id = 1")
    committed(town, "select * from wallet.backfill_users(null, null, null)")
    query = (
        "select distinct on (e.account_id) a.balance - e.balance_after from wallet.wallet_entries as e "
        "join wallet.accounts as a on a.id = e.account_id order by e.account_id, e.transaction_id desc"
    )
    assert set(rows(town.engine, query)) == {(0,)}
    assert_sound(town.engine, town.settings)


def test_a_batch_brings_up_from_the_balance_that_it_finds_under_the_lock(town: Town) -> None:
    """Somebody recounts the account meanwhile: the difference to what it was before would be in the journal."""
    town.sql(RAW)
    town.sql(f"update wallet.accounts set balance = 77 where {FIRST}")
    with interleaving.stage(town.engine.url.render_as_string(hide_password=False)) as stage:
        recount, batch = stage.session(), stage.session()
        recount.sql(f"update wallet.accounts set balance = 1 where {FIRST}")
        statement = "select * from wallet.backfill_users(null, null, null)"
        waiting = batch.waiting(lambda connection: connection.exec_driver_sql(statement).all(), on=recount)
        recount.commit()
        waiting.result(interleaving.PATIENCE_SECONDS)
        batch.commit()
    assert_sound(town.engine, town.settings)


# The last pass


def aside(town: Town, job: int, key: int, state: str) -> None:
    town.sql(
        "insert into wallet.job_batches (job_id, number, pass, upto_key, keys, state) "
        f"values ({job}, {900 + key}, 1, '{key}', 1, '{state}')"
    )


def test_a_last_pass_leaves_out_what_its_own_job_has_set_aside_and_nothing_else(town: Town) -> None:
    town.sql(NEW.format("users", 11, 13))
    aside(town, town.jobs[1], 11, "set_aside")
    aside(town, town.job, 12, "done")
    aside(town, town.job, 13, "set_aside")
    assert committed(town, f"select opened from wallet.late_users(null, null, {town.job})") == [(6,)]
    assert keys(town) == {"1", "2", "3", "11", "12"}


def test_a_last_pass_goes_by_when_its_own_job_began(town: Town) -> None:
    """The other job began so late that nothing was written since."""
    for own, (table, other) in enumerate((("users", 1), ("clubs", 0))):
        town.sql(NEW.format(table, 11, 11))
        later = f"update wallet.jobs set row_xid = row_xid {{}} 1000000 where id = {town.jobs[other]}"
        town.sql(later.format("+"))
        town.sql(f"update wallet.jobs set actor = actor where id = {town.jobs[own]}")  # to the end of the table
        assert committed(town, f"select opened from wallet.late_{table}(null, null, {town.jobs[own]})") == [(3,)]
        town.sql(later.format("-"))


def test_a_job_that_is_older_than_half_the_transaction_ids_looks_at_every_row(town: Town) -> None:
    """Then a row's xmin does not tell any more whether it is older than the job."""
    town.sql(NEW.format("users", 11, 11))
    town.sql(f"update wallet.jobs set row_xid = -2147483648 where id = {town.job}")
    assert committed(town, f"select opened from wallet.late_users(null, null, {town.job})") == [(3,)]


def test_a_last_pass_counts_no_account_of_a_column_that_is_not_mapped(town: Town) -> None:
    town.sql(NEW.format("users", 11, 11))
    town.sql(
        "insert into wallet.accounts (mapping, key, bucket, currency, state, balance) "
        "select 'users', '11', 'gone', c, 'mirrored', 0 from unnest(array['EUR', 'USD', 'GBP']) as c"
    )
    assert committed(town, f"select opened from wallet.late_users(null, null, {town.job})") == [(3,)]


def test_a_last_pass_waits_for_no_row_that_is_in_step(town: Town) -> None:
    town.sql("update users set tenant = 'globex'")
    with town.engine.begin() as holder:
        holder.exec_driver_sql("select from users for update")
        assert committed(town, f"select * from wallet.late_users(null, null, {town.job})") == [(3, 0, 0, 0)]


# Locks


@pytest.mark.parametrize(
    ("first", "held", "statement"),
    [
        (
            (RAW, RAW.replace("= 1", "= 2"), RAW.replace("users", "clubs")),
            f"not ({FIRST})",
            "select wallet.backfill_users(null, '1', null)",
        ),
        (FROZEN[:1], "not (mapping = 'users' and key = '1')", "select wallet.freeze_users(null, '1')"),
        (FROZEN, "not (mapping = 'users' and key = '1')", "select wallet.unfreeze_users(null, '1')"),
        (FROZEN, f"not ({FIRST})", "select * from wallet.unseal_users(array[1]::bigint[], 'cash', 'EUR')"),
    ],
    ids=["backfill", "freeze", "unfreeze", "one column of an unfreeze"],
)
def test_a_batch_waits_for_no_account_that_is_none_of_its_business(
    town: Town, first: tuple[str, ...], held: str, statement: str
) -> None:
    for step in first:
        town.sql(step)
    with town.engine.begin() as holder:
        holder.exec_driver_sql(f"select from wallet.accounts where {held} for update")
        assert len(committed(town, statement)) == 1


# Freeze and unfreeze


def test_a_freeze_takes_what_is_mirrored_and_equals_its_own_row_and_refuses_the_rest(town: Town) -> None:
    for table in ("users", "clubs"):
        town.sql(f"update {table} set coins = 55, dollars = 55, promo = 55")
        town.sql(f"select wallet.backfill_{table}(null, null, null)")
    town.past_the_fence(
        "update users set dollars = 56, promo = 56 where id = 1; update users set coins = 56 where id = 2"
    )
    for change in ("+ 5", "- 5"):
        town.sql(f"update users set coins = coins {change} where id = 3")  # stale, and equal again
    town.sql(FROZEN[0])
    before = town.accounts()
    assert committed(town, "select * from wallet.freeze_users(null, '1')") == [(1, 1, 2)]
    town.sql(FROZEN[2])
    assert committed(town, "select * from wallet.freeze_users('1', null)") == [(2, 4, 2)]
    after = town.accounts()
    frozen = ONE | {("users", key, *column) for key in ("2", "3") for column in (DOLLARS, PROMO)}
    assert {a for a, found in before.items() if after[a] != found and a[0] == "users"} == frozen
    assert {after[account][0] for account in frozen} == {"frozen"}


def test_an_unfreeze_writes_to_each_column_the_balance_of_its_own_account(town: Town) -> None:
    for step in FROZEN:
        town.sql(step)
    for amount, (bucket, currency) in enumerate((CASH, DOLLARS, PROMO), start=5):
        fields: dict[str, Any] = {"amount": Decimal(amount), "bucket": bucket, "currency": currency, "type": "test"}
        town.post(Movement(operation="credit", key=1, **fields))
    assert committed(town, "select * from wallet.unfreeze_users(null, '1')") == [(1, 3)]
    assert rows(town.engine, "select coins, dollars, promo from users where id = 1") == [(6, 107, 208)]
    assert {town.accounts()[account][0] for account in ALL_OF_ONE} == {"mirrored"}


def test_an_unfreeze_leaves_what_is_not_frozen_and_its_row_alone(town: Town) -> None:
    town.sql(RAW)
    for step in FROZEN:
        town.sql(step)
    assert committed(town, "select * from wallet.unfreeze_users(null, '1')") == [(1, 2)]
    assert town.accounts()["users", "1", *CASH][:2] == ("stale", 1)
    assert rows(town.engine, "select coins from users where id = 1") == [(6,)]


# Closings


CLOSE = "select wallet.close_users(id, 'gone') from wallet.accounts where {}"


def test_an_account_of_another_mapping_is_not_closed(town: Town) -> None:
    town.past_the_fence("delete from users where id = 1")
    assert changed(town, CLOSE.format(FIRST.replace("users", "clubs"))) == set()


@pytest.mark.parametrize("state", ["frozen", "closed"])
def test_an_account_that_is_frozen_or_closed_stays_so_when_its_row_is_gone(town: Town, state: str) -> None:
    for step in FROZEN if state == "frozen" else ("delete from users where id = 1",):
        town.sql(step)
    town.past_the_fence("delete from users where id = 1")
    assert changed(town, CLOSE.format("mapping = 'users' and key = '1'")) == set()
    assert {town.accounts()[account][0] for account in ALL_OF_ONE} == {state}
