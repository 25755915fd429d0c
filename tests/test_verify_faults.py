"""Each fault that was ever seeded is found by the forms that claim to find it, and load is not taken for a fault."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.exc import DBAPIError

from ledger import ACT, execute, fence_down, post, scalar, unguarded
from verifying import Ledger, prepared, run
from walletmigrate import fences
from walletmigrate.adapter import LegacyBalanceAdapter
from walletmigrate.capture import FenceProblem
from walletmigrate.errors import Retryable
from walletmigrate.flags import DUAL_WRITE, StaticSource
from walletmigrate.references import Reference
from walletmigrate.verify import Verification


@pytest.fixture
def made(database_url: str) -> Ledger:
    made = prepared(database_url)
    assert run(made).clean
    return made


def legacy(statement: str) -> Callable[[Ledger], None]:
    def seed(made: Ledger) -> None:
        with fence_down(*made) as superuser:
            superuser.exec_driver_sql(statement)

    return seed


def ledger(*statements: str) -> Callable[[Ledger], None]:
    def seed(made: Ledger) -> None:
        for statement in statements:
            execute(made[0], statement)

    return seed


def journal(statement: str) -> Callable[[Ledger], None]:
    def seed(made: Ledger) -> None:
        with unguarded(made[0], "wallet.transactions") as superuser:
            superuser.exec_driver_sql(statement)

    return seed


def null(made: Ledger) -> None:
    with unguarded(made[0], "users") as superuser:
        superuser.exec_driver_sql("update users set total_coins = null where id = 4")


@dataclass(frozen=True)
class Fault:
    """How it is made, and whether an incremental run claims to find it, which knows what was written in the ledger."""

    seed: Callable[[Ledger], None]
    incremental: bool


OPENING = "(select credit_account from wallet.transactions where id = {0})"
FAULTS = {
    "legacy + 1": Fault(legacy("update users set total_coins = total_coins + 1 where id = 4"), False),
    "legacy - 1": Fault(legacy("update users set total_coins = total_coins - 1 where id = 4"), False),
    "ledger + 1": Fault(ledger("update wallet.accounts set balance = balance + 1 where key = '4'"), True),
    "ledger - 1": Fault(ledger("update wallet.accounts set balance = balance - 1 where key = '4'"), True),
    "two legacy balances swapped": Fault(
        legacy("update users set total_coins = case id when 1 then 110 else 97.50 end where id in (1, 2)"), False
    ),
    "two ledger balances swapped": Fault(
        ledger("update wallet.accounts set balance = case key when '1' then 110 else 97.5 end where key in ('1', '2')"),
        True,
    ),
    "missing account": Fault(ledger("delete from wallet.accounts where key = '4'"), False),
    "missing account, and its journal too": Fault(
        journal(
            "with gone as (delete from wallet.accounts where key = '4' returning id) "
            "delete from wallet.transactions as t using gone where t.credit_account = gone.id"
        ),
        False,
    ),
    "duplicate account": Fault(
        ledger(
            "alter table wallet.accounts drop constraint accounts_key_mapping_bucket_currency_key",
            "insert into wallet.accounts (mapping, key, bucket, currency, state, balance) "
            "select mapping, key, bucket, currency, state, 0 from wallet.accounts where key = '3'",
        ),
        True,
    ),
    "NULL": Fault(null, False),
    "deleted user": Fault(legacy("delete from users where id = 4"), False),
    "amount edited": Fault(journal("update wallet.transactions set amount = amount + 1 where id = 4"), False),
    "both sides of two transactions exchanged": Fault(
        # Each step still leads from one balance to the next, only in another order: sums and sets come out.
        journal(
            "with two as (select max(id) as last, min(id) as first from (select id from wallet.transactions "
            "where credit_account = (select id from wallet.accounts where key = '1') order by id desc limit 2) as x) "
            "update wallet.transactions set id = case id when two.last then -two.first else -two.last end "
            "from two where id in (two.first, two.last)"
        ),
        False,
    ),
    "a transaction deleted": Fault(journal("delete from wallet.transactions where id = 4"), False),
    "a transaction from nowhere": Fault(
        ledger(
            "insert into wallet.transactions (id, debit_account, credit_account, kind, amount, currency, type) "
            "select -1, 0, id, 'posting', 5, 'EUR', 'forged' from wallet.accounts where key = '4'"
        ),
        True,
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_every_seeded_fault_is_found(made: Ledger, name: str) -> None:
    fault = FAULTS[name]
    fault.seed(made)
    assert not run(made, dry_run=True, since_last=True).clean or not fault.incremental
    if name != "a transaction from nowhere":  # nor a sample: it looks at each key's own accounts, here of all keys
        assert not run(made, dry_run=True, sample=100).clean
    result = run(made)
    assert not result.clean
    assert scalar(made[0], "select clean from wallet.verifications order by id desc limit 1") is False


def test_a_duplicate_is_named_with_the_index_that_is_gone(made: Ledger) -> None:
    FAULTS["duplicate account"].seed(made)
    result = run(made)
    (ids,) = [one.target for one in result.references]
    assert result.references == (Reference("several accounts of one owner", "users 3 cash EUR", ids),)
    assert len(ids.split()) == 2
    gone = "unique index on wallet.accounts (bucket, currency, key, mapping)"
    assert FenceProblem(gone, "is missing") in result.guards


ORPHANS = {
    "idempotency key of a transaction that does not exist": (
        "insert into wallet.idempotency_keys (key, transaction_id, request) values ('k', 9999, gen_random_uuid())"
    ),
    "details of a transaction that does not exist": (
        "insert into wallet.transaction_details (transaction_id, description) values (9999, 'x')"
    ),
    "audit row of a transaction that does not exist": (
        "insert into wallet.audit_log (action, actor, reason, details) "
        "values ('adjust', 'x', 'x', '{\"transaction_id\": 9999}')"
    ),
    "reversal of a transaction that does not exist": "update wallet.transactions set reverses = 9999 where id = 4",
    "group of a transaction that does not exist": "update wallet.transactions set group_id = 9999 where id = 4",
    "snapshot balance of an account that does not exist": (
        "with s as (insert into wallet.snapshots (state, horizon, next_xid, in_flight, last_id, restored_id, cursor, "
        "actor, reason) values ('complete', 1, 1, '{}', 4, 0, 4, 'x', 'x') returning id) insert into "
        "wallet.snapshot_balances (account_id, snapshot_id, transaction_id, balance, transactions) "
        "select 9999, id, 4, 0, 1 from s"
    ),
    "snapshot balance of a transaction that does not exist": (
        "with s as (insert into wallet.snapshots (state, horizon, next_xid, in_flight, last_id, restored_id, cursor, "
        "actor, reason) values ('complete', 1, 1, '{}', 4, 0, 4, 'x', 'x') returning id) insert into "
        "wallet.snapshot_balances (account_id, snapshot_id, transaction_id, balance, transactions) "
        "select a.id, s.id, 9999, 0, 1 from s, wallet.accounts as a where a.key = '4'"
    ),
    "snapshot that counts from one that does not exist": (
        "insert into wallet.snapshots (state, previous, horizon, next_xid, in_flight, last_id, restored_id, cursor, "
        "actor, reason) values ('complete', 77, 1, 1, '{}', 4, 0, 4, 'x', 'x')"
    ),
    "balance in a snapshot that does not exist": (
        "insert into wallet.snapshot_balances (account_id, snapshot_id, transaction_id, balance, transactions) "
        "select id, 77, 4, 0, 1 from wallet.accounts where key = '4'"
    ),
    "total in a snapshot that does not exist": (
        "insert into wallet.snapshot_totals (snapshot_id, mapping, bucket, currency, accounts, balance, changed, "
        "opening, resync, posting, correction, reversal, transactions) values (77, 'users', 'cash', 'EUR', "
        "0, 0, 0, 0, 0, 0, 0, 0, 0)"
    ),
    "account of a mapping, bucket or currency that the ledger does not know": (
        "insert into wallet.accounts (mapping, key, bucket, currency, state, balance) "
        "values ('shops', '4', 'cash', 'EUR', 'mirrored', 0)"
    ),
}


@pytest.mark.parametrize("problem", ORPHANS)
def test_what_points_at_nothing_is_named(made: Ledger, problem: str) -> None:
    with unguarded(made[0], "wallet.transactions") as superuser:
        superuser.exec_driver_sql(ORPHANS[problem], execution_options={"no_parameters": True})
    result = run(made, limit=1)
    assert (result.clean, result.reference_count) == (False, 1)
    assert [one.problem for one in result.references] == [problem]
    assert result.journal == ()


@dataclass(frozen=True)
class Twice:
    """How a unique index goes, of which table and columns it was, and how something then comes to stand twice."""

    index: str
    drop: str
    seed: str


TWICE = {
    "several accounts with one id": Twice(
        "accounts (id)",
        "alter table wallet.accounts drop constraint accounts_pkey",
        "insert into wallet.accounts (id, mapping, key, bucket, currency, state, balance) overriding system value "
        "select id, mapping, '44', bucket, currency, state, balance from wallet.accounts where key = '4'",
    ),
    "several system accounts of one name": Twice(
        "system_accounts (currency, name)",
        "alter table wallet.system_accounts drop constraint system_accounts_name_currency_key",
        "insert into wallet.system_accounts (id, name, currency) "
        "select -77, name, currency from wallet.system_accounts where name = 'external'",
    ),
    "several transactions with one id": Twice(
        "transactions (id)",
        "alter table wallet.transactions drop constraint transactions_pkey",
        "insert into wallet.transactions select * from wallet.transactions where id = 4",
    ),
    "several reversals of one transaction": Twice(
        "transactions (reverses)",
        "drop index wallet.transactions_reversed_once",
        "update wallet.transactions set reverses = 1 where id in (3, 4)",
    ),
    "one idempotency key several times": Twice(
        "idempotency_keys (key)",
        "alter table wallet.idempotency_keys drop constraint idempotency_keys_pkey",
        "insert into wallet.idempotency_keys (key, transaction_id, request) "
        "select 'k', g, gen_random_uuid() from generate_series(3, 4) as g",
    ),
}


@pytest.mark.parametrize("problem", TWICE)
def test_what_stands_twice_is_named_with_the_index_that_is_gone(made: Ledger, problem: str) -> None:
    fault = TWICE[problem]
    with unguarded(made[0], "wallet.transactions") as superuser:
        superuser.exec_driver_sql(fault.drop)
        superuser.exec_driver_sql(fault.seed)
    result = run(made)
    assert not result.clean
    assert [one.problem for one in result.references] == [problem]
    assert FenceProblem(f"unique index on wallet.{fault.index}", "is missing") in result.guards


def test_references_are_counted_in_full_and_listed_up_to_the_limit(made: Ledger) -> None:
    execute(
        made[0],
        "insert into wallet.idempotency_keys (key, transaction_id, request) "
        "select 'k' || g, 9990 + g, gen_random_uuid() from generate_series(1, 5) as g",
    )
    result = run(made, limit=2)
    assert (result.reference_count, [one.subject for one in result.references]) == (5, ["k1", "k2"])


@dataclass
class Load:
    """Three writers on ten accounts, until told to stop: the adapter, transfers in SQL, and raw SQL past both."""

    engine: Engine
    settings: Any
    stop: threading.Event
    failures: list[BaseException]
    written: list[int]

    def write(self, number: int) -> None:
        chosen = random.Random(number)
        adapter = LegacyBalanceAdapter(self.settings, StaticSource({DUAL_WRITE: True}))
        while not self.stop.is_set():
            try:
                with self.engine.begin() as connection:
                    self._once(number, connection, adapter, chosen.sample(range(1, 11), 2))
                self.written[number] += 1
            except Retryable:
                continue  # two keys in two orders, as documented
            except DBAPIError as error:
                if str(getattr(error.orig, "sqlstate", "")).startswith("40"):
                    continue
                self.failures.append(error)
                return

    def _once(self, number: int, connection: Any, adapter: LegacyBalanceAdapter, keys: list[int]) -> None:
        one, other = keys
        if number == 0:
            adapter.credit(connection, one, Decimal("0.25"), type="load")
        elif number == 1:
            post(connection, self.settings, "credit", one, 1)
            post(connection, self.settings, "transfer", one, 1, payee=other)
        else:
            statement = "update users set total_coins = total_coins + 1 where id = :id"
            connection.execute(text(statement), {"id": one})


def test_a_clean_database_is_clean_under_load(made: Ledger) -> None:
    """Each form while others write; the fence mirrors what comes past the adapter."""
    engine, settings = made
    fences.set_mode(engine, settings, settings.mapping(), "mirror", ACT)
    load = Load(engine, settings, threading.Event(), [], [0, 0, 0])
    threads = [threading.Thread(target=load.write, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    seen: list[Verification] = []
    try:
        while (len(seen) < 18 or min(load.written) < 5) and not load.failures:
            seen += [run(made), run(made, sample=5), run(made, since_last=True)]
    finally:
        load.stop.set()
        for thread in threads:
            thread.join()
    assert not load.failures
    assert [one for one in seen if not one.clean or one.passing_accounts] == []
    assert any(one.accounts for one in seen if one.form == "incremental")
    assert run(made).clean
    assert _sides(engine) == (0, 0)


def _sides(engine: Engine) -> tuple[int, int]:
    """Accounts whose sides differ, and accounts that are not mirrored."""
    query = (
        "select count(*) filter (where a.balance <> u.total_coins), count(*) filter (where a.state <> 'mirrored') "
        "from wallet.accounts a join users u on u.id::text = a.key"
    )
    with engine.connect() as connection:
        row = connection.execute(text(query)).one()
    return int(row[0]), int(row[1])
