"""Journal, audit log and verifications are never changed or removed: not by any role, not in any way but DDL."""

from __future__ import annotations

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.exc import DBAPIError

from copies import copied
from ledger import ACT, engine_named, execute, install_users, rows
from walletmigrate.backfill import backfill
from walletmigrate.verify import verify

TABLES = ("transactions", "audit_log", "verifications")
CHANGES = {
    "update": "update wallet.{table} set {column} = 'another'",
    "update to the same": "update wallet.{table} set {column} = {column}",
    "delete": "delete from wallet.{table}",
    "truncate": "truncate wallet.{table}",
    "merge": "merge into wallet.{table} as t using (values (1)) as v (n) on true when matched then delete",
    "upsert": "insert into wallet.{table} select * from wallet.{table} limit 1 "
    "on conflict (id) do update set {column} = 'another'",
}


@pytest.fixture
def made(database_url: str) -> Engine:
    def make() -> None:
        engine, settings = install_users(database_url, phase="dual_write")
        backfill(engine, settings, settings.mapping(), ACT)
        verify(engine, settings, settings.mapping(), ACT)

    copied(database_url, "append-only", make)
    return engine_named(database_url)


def sqlstate_of(engine: Engine, statement: str, *first: str) -> str | None:
    """The SQLSTATE that a statement is refused with, None if it is not."""
    try:
        with engine.begin() as connection:
            for one in first:
                connection.execute(text(one))
            connection.execute(text(statement))
    except DBAPIError as error:
        return str(getattr(error.orig, "sqlstate", None))
    return None


def changing(change: str, table: str) -> str:
    """A statement that would change the table's rows."""
    statement = CHANGES[change].format(table=table, column="actor" if table == "verifications" else "reason")
    if table != "verifications":
        # Its ids are generated.
        return statement.replace("audit_log select", "audit_log overriding system value select")
    names = "mapping, started_at, clean, accounts, missing, drift_accounts, drift_amount, currency, actor"
    return statement.replace(
        "verifications select *", f"verifications (id, {names}) overriding system value select id, {names}"
    )


def contents(engine: Engine, table: str) -> list[tuple[object, ...]]:
    return rows(engine, f"select * from wallet.{table} order by id")


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("role", ["postgres", "wallet_owner"])
def test_neither_a_superuser_nor_the_owner_changes_a_row(
    made: Engine, database_url: str, role: str, table: str, change: str
) -> None:
    before = contents(made, table)
    assert before
    engine = engine_named(database_url, role=role)
    statement = changing(change, table)
    assert sqlstate_of(engine, statement) == "WM040"
    assert contents(made, table) == before


@pytest.mark.parametrize("change", ["update", "delete", "truncate"])
@pytest.mark.parametrize("table", TABLES)
def test_the_replication_role_does_not_get_past_it(made: Engine, table: str, change: str) -> None:
    before = contents(made, table)
    statement = changing(change, table)
    assert sqlstate_of(made, statement, "set local session_replication_role = replica") == "WM040"
    assert contents(made, table) == before


@pytest.mark.parametrize("role", ["wallet_app", "wallet_operator", "wallet_auditor"])
def test_no_working_role_has_the_right_to_change_the_ledger(made: Engine, database_url: str, role: str) -> None:
    engine = engine_named(database_url, role=role)
    columns = {
        "transactions": "reason",
        "audit_log": "reason",
        "verifications": "clean",
        "accounts": "balance",
        "system_accounts": "balance",
        "idempotency_keys": "mode",
    }
    for table, column in columns.items():
        assert sqlstate_of(engine, f"update wallet.{table} set {column} = {column}") == "42501", table
        assert sqlstate_of(engine, f"delete from wallet.{table}") == "42501", table
        assert sqlstate_of(engine, f"truncate wallet.{table}") == "42501", table


@pytest.mark.parametrize("role", ["wallet_app", "wallet_operator", "wallet_auditor"])
def test_no_working_role_writes_a_transaction_or_an_account_by_hand(made: Engine, database_url: str, role: str) -> None:
    engine = engine_named(database_url, role=role)
    forged = (
        "insert into wallet.transactions (id, debit_account, credit_account, kind, amount, currency, type) "
        "values (-1, -1, 1, 'posting', 5, 'EUR', 'forged')"
    )
    assert sqlstate_of(engine, forged) == "42501"
    account = (
        "insert into wallet.accounts (mapping, key, bucket, currency, state, balance) "
        "values ('users', '77', 'cash', 'EUR', 'mirrored', 5)"
    )
    assert sqlstate_of(engine, account) == "42501"


@pytest.mark.parametrize("role", ["wallet_app", "wallet_auditor"])
def test_only_operators_write_the_audit_log_and_run_jobs(made: Engine, database_url: str, role: str) -> None:
    engine = engine_named(database_url, role=role)
    entry = "insert into wallet.audit_log (action, actor, reason) values ('freeze', 'me', 'why')"
    assert sqlstate_of(engine, entry) == "42501"
    assert sqlstate_of(engine, "select * from wallet.backfill_users(null, null, null)") == "42501"
    assert sqlstate_of(engine, "select * from wallet.freeze_users(null, null)") == "42501"
    assert sqlstate_of(engine, "update wallet.control set phase = 'legacy'") == "42501"


def test_personal_data_stands_apart_and_can_be_erased(made: Engine) -> None:
    columns = rows(
        made,
        "select column_name from information_schema.columns "
        "where table_schema = 'wallet' and table_name = 'transactions'",
    )
    assert not {"description", "address"} & {name for (name,) in columns}
    execute(made, "insert into wallet.transaction_details values (1, 'for the rent', '10.0.0.1')")
    before = contents(made, "transactions")
    execute(made, "delete from wallet.transaction_details")
    assert contents(made, "transactions") == before
