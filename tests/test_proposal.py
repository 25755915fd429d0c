"""The configuration that `init` proposes for a database."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import Connection

from cataloguing import connection, loaded, run
from walletmigrate.errors import UsageError
from walletmigrate.proposal import PLACEHOLDER_CURRENCY, facts, questions, render, survey
from walletmigrate.survey import inspect_mapping

__all__ = ["connection"]


def test_a_table_of_users_is_proposed_with_its_columns_and_traits(connection: Connection, tmp_path: Path) -> None:
    run(
        connection,
        "create table users (id bigint primary key, tenant_id int, role text, email text, login_count int, "
        "credit_limit numeric(12,2), balance_eur numeric(12,2) not null, bonus_cents bigint, balance_before "
        "numeric(12,2), created_at timestamptz)",
    )
    (found,) = survey(connection)
    assert (found.schema, found.table, found.key, found.key_type) == ("public", "users", "id", "integer")
    assert [(c.column, c.bucket, c.currency, c.scale, c.unit) for c in found.columns] == [
        ("balance_eur", "cash", "EUR", 2, "major"),
        ("bonus_cents", "promo", PLACEHOLDER_CURRENCY, 2, "minor"),
    ]
    assert found.traits == (("tenant", "tenant_id"), ("role", "role"))
    settings = loaded(tmp_path, render([found], facts(connection)))
    inspected = inspect_mapping(connection, settings.mapping())
    assert [column.name for column in inspected.columns] == ["balance_eur", "bonus_cents"]
    (question,) = questions([found])
    assert question.startswith("Set the currency of public.users.bonus_cents")
    assert "SET THIS" in render([found], facts(connection))


def test_mixed_case_names_are_proposed_as_the_catalog_spells_them(connection: Connection, tmp_path: Path) -> None:
    run(
        connection,
        'create table "AppUser" ("userId" uuid primary key, "tenantId" text, "walletBalance" numeric(10,3))',
    )
    (found,) = survey(connection)
    assert (found.name, found.table, found.key_type) == ("app_user", "AppUser", "uuid")
    assert found.traits == (("tenant", "tenantId"),)
    settings = loaded(tmp_path, render([found], facts(connection)))
    assert settings.mapping().columns[0].scale == 3
    assert inspect_mapping(connection, settings.mapping()).columns[0].name == "walletBalance"


def test_the_scale_of_an_undeclared_column_comes_from_its_rows(connection: Connection) -> None:
    run(
        connection,
        "create table accounts (id text primary key, balance numeric, coins double precision, credits int, "
        "wallet_btc numeric, points numeric);"
        "insert into accounts values ('a', 1.2345, 0.1 + 0.2, 3, null, 'NaN');"
        "insert into accounts values ('b', 1.500000, 0.125, 4, null, 1)",
    )
    (found,) = survey(connection)
    columns = {column.column: column for column in found.columns}
    assert {name: column.scale for name, column in columns.items()} == {
        "balance": 4,
        "coins": 3,
        "credits": 0,
        "wallet_btc": 2,
        "points": 2,
    }
    assert "floating-point" in columns["coins"].notes[0]
    assert "sample" in columns["balance"].notes[0]
    assert "NULL" in columns["wallet_btc"].notes[-1]
    assert "NaN" in columns["points"].notes[-1]
    assert columns["credits"].notes == ()


def test_whole_numbers_of_a_currency_with_decimals_are_a_question(connection: Connection, tmp_path: Path) -> None:
    run(
        connection,
        "create table wallets (id int primary key, balance_eur bigint, balance_jpy bigint, cents_usd int, coins int)",
    )
    (found,) = survey(connection)
    asked = [one for one in questions([found]) if "whole numbers" in one]
    fix = 'set unit = "minor" and scale = 2'
    said = f"A column of whole numbers, taken as whole EUR. If it counts the smallest coin, {fix}."
    assert asked == [f"public.wallets.balance_eur: {said}"]
    assert loaded(tmp_path, render([found], facts(connection))).mapping().columns[0].scale == 0


def test_columns_that_would_share_a_bucket_get_one_of_their_own(connection: Connection, tmp_path: Path) -> None:
    run(
        connection,
        "create table wallets (id int primary key, balance int, cash int, balance_usd int, balance_eur int, "
        "wallet_balance int)",
    )
    (found,) = survey(connection)
    assert [(c.column, c.bucket, c.currency) for c in found.columns] == [
        ("balance", "cash", "XXX"),
        ("cash", "cash_2", "XXX"),
        ("balance_usd", "cash", "USD"),
        ("balance_eur", "cash", "EUR"),
        ("wallet_balance", "wallet_balance", "XXX"),
    ]
    assert len(loaded(tmp_path, render([found], facts(connection))).mapping().columns) == 5


def test_the_likeliest_table_is_active_and_the_others_are_comments(connection: Connection, tmp_path: Path) -> None:
    run(
        connection,
        "create table gifts (id int primary key, points int);"
        "create table members (id int primary key, region text, credits numeric(9,2));"
        "create table pairs (a int, b int, balance int, primary key (a, b));"
        "create table keyless (balance int);"
        "create table notes (id int primary key, body text);"
        "create table payments (id int primary key, wallet int references members, amount int);"
        "create view balances as select id, credits as balance from members;"
        "create temp table drafts (id int primary key, balance int);"
        "create table parts (id int primary key, balance int) partition by hash (id);"
        "create table parts_0 partition of parts for values with (modulus 1, remainder 0)",
    )
    found = survey(connection)
    assert [candidate.table for candidate in found] == ["members", "gifts", "parts"]
    rendered = render(found, facts(connection))
    assert [mapping.name for mapping in loaded(tmp_path, rendered).mappings] == ["members"]
    head, mark, others = rendered.partition("# Other tables")
    uncommented = "\n".join(line.removeprefix("# ") for line in others.splitlines()[1:])
    assert mark
    assert [mapping.name for mapping in loaded(tmp_path, head + uncommented).mappings] == [
        "members",
        "gifts",
        "parts",
    ]


def test_a_named_table_is_proposed_alone(connection: Connection) -> None:
    run(
        connection,
        "create schema shop; create table shop.customers (id int primary key, balance int);"
        "create table users (id int primary key, balance int)",
    )
    assert [one.schema for one in survey(connection, "shop.customers")] == ["shop"]
    assert [one.table for one in survey(connection, "users")] == ["users"]


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ("user", r"no table 'user'.*Did you mean 'public.users'\?"),
        ("nothing.like_it", "no table 'nothing.like_it' that could be mapped"),
        ("pairs", "no primary key of one column"),
        ("notes", "its numeric columns: stars, weight"),
    ],
)
def test_a_named_table_that_cannot_be_proposed_says_why(connection: Connection, table: str, says: str) -> None:
    run(
        connection,
        "create table users (id int primary key, balance int);"
        "create table pairs (a int, b int, balance int, primary key (a, b));"
        "create table notes (id int primary key, stars int, weight real, body text)",
    )
    with pytest.raises(UsageError, match=says):
        survey(connection, table)


def test_nothing_found_is_an_error_that_names_the_option(connection: Connection) -> None:
    assert survey(connection) == []
    with pytest.raises(UsageError, match="--table"):
        render([], facts(connection))


def test_a_schema_that_the_application_has_is_not_proposed_for_the_ledger(
    connection: Connection, tmp_path: Path
) -> None:
    run(connection, "create table users (id int primary key, balance int)")
    assert facts(connection).ledger_schema == "wallet"
    run(connection, "create schema wallet")
    about = facts(connection)
    assert about.ledger_schema == "wallet_ledger"
    assert about.server_version.split(".")[0].isdigit()
    assert loaded(tmp_path, render(survey(connection), about)).ledger_schema == "wallet_ledger"


def test_the_ledgers_own_tables_are_never_proposed(connection: Connection) -> None:
    run(
        connection,
        "create schema wallet; create table wallet.system_accounts (id int primary key, balance numeric);"
        "create table wallet.idempotency_keys (id int primary key);"
        "create table wallet.accounts (id int primary key, balance numeric)",
    )
    assert survey(connection) == []
    assert facts(connection).ledger_schema == "wallet"


def test_a_table_that_may_not_be_read_is_proposed_without_a_sample(connection: Connection) -> None:
    run(
        connection,
        "create table users (id int primary key, balance numeric); insert into users values (1, 1.2345);"
        "create role init_reader; set role init_reader",
    )
    try:
        (found,) = survey(connection)
        assert found.columns[0].scale == 2
    finally:
        connection.rollback()
