"""What is read from a database: the catalog's facts, values that do not convert."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, text
from sqlalchemy.exc import DataError, NotSupportedError

import skips
from cataloguing import connection, loaded, run
from walletmigrate.config import Mapping
from walletmigrate.errors import ConfigError
from walletmigrate.survey import LegacyTrait, inspect_mapping, unconvertible

__all__ = ["connection"]


def balance(**fields: Any) -> dict[str, Any]:
    return {"bucket": "cash", "column": "balance", "currency": "EUR", "scale": 2, **fields}


def mapped(*columns: dict[str, Any], **fields: Any) -> Mapping:
    given = {"name": "users", "table": "users", "key": "id", "columns": columns or (balance(),), **fields}
    return Mapping(**given)


def limits(connection: Connection, sql_type: str, **fields: Any) -> tuple[Decimal, Decimal]:
    run(connection, f"drop table if exists users; create table users (id int primary key, balance {sql_type})")
    column = inspect_mapping(connection, mapped(balance(**fields))).columns[0]
    return column.minimum, column.maximum


# The catalog's facts


def test_a_mapping_is_inspected_with_key_columns_and_traits(connection: Connection) -> None:
    run(
        connection,
        "create domain money_amount as numeric(12,2) check (value > -1000);"
        "create table users (id uuid primary key, tenant text, level smallint, balance money_amount not "
        "null, bonus double precision)",
    )
    bonus = balance(bucket="promo", column="bonus")
    found = inspect_mapping(connection, mapped(balance(), bonus, traits={"tenant": "tenant", "level": "level"}))
    assert (found.schema, found.table) == ("public", "users")
    assert (found.key_type, found.key_sql_type) == ("uuid", "uuid")
    assert (found.has_rls, found.partitioned) == (False, False)
    assert found.traits == (
        LegacyTrait("tenant", "tenant", "text"),
        LegacyTrait("level", "level", "smallint"),
    )
    cash, promo = found.columns
    assert (cash.name, cash.sql_type, cash.is_float, cash.nullable) == (
        "balance",
        "money_amount",
        False,
        False,
    )
    assert cash.maximum == Decimal("9999999999.99")
    assert (promo.sql_type, promo.is_float, promo.nullable) == ("double precision", True, True)
    assert found.column("bonus") is promo


@pytest.mark.parametrize(
    ("sql_type", "key_type", "key_sql_type"),
    [
        ("smallint", "integer", "smallint"),
        ("serial", "integer", "integer"),
        ("bigint generated always as identity", "integer", "bigint"),
        ("uuid", "uuid", "uuid"),
        ("text", "text", "text"),
        ("varchar(36)", "text", "character varying"),
    ],
)
def test_the_kind_of_key_is_read_from_its_type(
    connection: Connection, sql_type: str, key_type: str, key_sql_type: str
) -> None:
    run(connection, f"create table users (id {sql_type} primary key, balance numeric)")
    found = inspect_mapping(connection, mapped())
    assert (found.key_type, found.key_sql_type) == (key_type, key_sql_type)


@pytest.mark.parametrize(
    ("definition", "key"),
    [
        ("id int primary key, balance numeric", "id"),
        ("id int not null unique, other int primary key, balance numeric", "id"),
        ("id int not null unique, a int, b int, balance numeric, primary key (a, b)", "id"),
        ("id int, b int, balance numeric, primary key (id, b), unique (id)", "id"),
    ],
)
def test_a_key_that_is_unique_and_not_null_is_enough(connection: Connection, definition: str, key: str) -> None:
    run(connection, f"create table users ({definition})")
    assert inspect_mapping(connection, mapped(key=key)).key_type == "integer"


@pytest.mark.parametrize(
    ("sql", "says"),
    [
        ("create table users (id int, balance numeric)", "key 'id' is not unique"),
        ("create table users (id int not null, balance numeric)", "key 'id' is not unique"),
        ("create table users (id int unique, balance numeric)", "key 'id' can be NULL"),
        (
            "create table users (id int, b int, balance numeric, primary key (id, b))",
            "key 'id' is only a part of a composite primary key",
        ),
        (
            (
                "create table users (id int not null, balance numeric);"
                "create unique index on users (id) where balance > 0"
            ),
            "key 'id' is not unique",
        ),
        (
            "create table users (id int not null, balance numeric); create unique index on users ((id + 1))",
            "key 'id' is not unique",
        ),
        (
            "create table users (id int not null unique deferrable, balance numeric)",
            "key 'id' is not unique",
        ),
        ("create table users (id char(8) primary key, balance numeric)", "is of type character"),
        ("create table users (id numeric primary key, balance numeric)", "is of type numeric"),
        ("create table users (id timestamptz primary key, balance numeric)", "is of type timestamp"),
        ("create table users (uid int primary key, balance numeric)", "has no column 'id'"),
    ],
)
def test_a_key_that_does_not_identify_a_row_is_refused(connection: Connection, sql: str, says: str) -> None:
    run(connection, sql)
    with pytest.raises(ConfigError) as raised:
        inspect_mapping(connection, mapped())
    assert says in raised.value.message
    assert raised.value.fix


def test_a_key_whose_collation_takes_two_texts_for_one_is_refused(connection: Connection) -> None:
    collation = "create collation loose (provider = icu, locale = 'und-u-ks-level2', deterministic = false)"
    try:
        run(connection, collation)
    except NotSupportedError:
        skips.skip("icu")
    run(connection, "create table users (id text collate loose primary key, balance numeric)")
    with pytest.raises(ConfigError, match="nondeterministic collation"):
        inspect_mapping(connection, mapped())


def test_a_not_null_that_was_never_validated_is_not_believed(connection: Connection) -> None:
    version = connection.dialect.server_version_info
    assert version is not None
    if version < (18,):
        skips.skip("not valid")
    run(
        connection,
        "create table users (id int unique, balance numeric); insert into users values (null, 1);"
        "alter table users add constraint id_there not null id not valid",
    )
    with pytest.raises(ConfigError, match="can be NULL"):
        inspect_mapping(connection, mapped())


@pytest.mark.parametrize(
    ("sql", "says"),
    [
        ("create view users as select 1 as id, 1.0 as balance", "is a view"),
        ("create materialized view users as select 1 as id, 1.0 as balance", "is a materialized view"),
        ("create temp table users (id int primary key, balance numeric)", "has no table"),
        (
            "create table users (id int primary key, balance numeric); create table more () inherits (users)",
            "inheriting tables",
        ),
        (
            (
                "create table t (id int primary key, balance int) partition by list (id);"
                "create table users partition of t default"
            ),
            "one partition of a table",
        ),
        ("create sequence users", "is no table"),
        ("create table userz (id int primary key, balance numeric)", "did you mean 'public.userz'?"),
    ],
)
def test_what_the_fence_cannot_guard_is_refused(connection: Connection, sql: str, says: str) -> None:
    run(connection, sql)
    with pytest.raises(ConfigError) as raised:
        inspect_mapping(connection, mapped())
    assert says in str(raised.value)
    assert raised.value.fix


def test_a_partitioned_table_and_row_security_are_reported(connection: Connection) -> None:
    run(
        connection,
        "create table users (id int primary key, balance numeric) partition by range (id);"
        "alter table users enable row level security",
    )
    found = inspect_mapping(connection, mapped())
    assert (found.partitioned, found.has_rls) == (True, True)


@pytest.mark.parametrize(
    ("sql_type", "fields", "says"),
    [
        ("numeric generated always as (id * 2) stored", {}, "is generated by the database"),
        ("bigint generated always as identity", {"scale": 0}, "is generated by the database"),
        ("money", {}, "is of type money"),
        ("text", {}, "is of type text"),
        ("numeric(12,1)", {}, "keeps 1 decimals, and the mapping needs 2"),
        ("bigint", {}, "keeps 0 decimals, and the mapping needs 2"),
        ("numeric(4,-2)", {"scale": 0}, "keeps -2 decimals, and the mapping needs 0"),
        ("numeric(4,-2)", {"unit": "minor"}, "keeps -2 decimals, and the mapping needs 0"),
    ],
)
def test_a_column_that_cannot_hold_the_balance_is_refused(
    connection: Connection, sql_type: str, fields: dict[str, Any], says: str
) -> None:
    run(connection, f"create table users (id int primary key, balance {sql_type})")
    with pytest.raises(ConfigError) as raised:
        inspect_mapping(connection, mapped(balance(**fields)))
    assert says in raised.value.message
    assert raised.value.fix


def test_the_fix_of_an_integer_column_names_the_minor_unit(connection: Connection) -> None:
    run(connection, "create table users (id int primary key, balance int)")
    with pytest.raises(ConfigError, match='set unit = "minor"'):
        inspect_mapping(connection, mapped())
    inspect_mapping(connection, mapped(balance(unit="minor")))
    inspect_mapping(connection, mapped(balance(scale=0)))


def test_an_error_of_the_catalog_names_the_line_of_the_setting(connection: Connection, tmp_path: Path) -> None:
    run(connection, 'create table users (id int primary key, "totalCoins" int, tenant text)')
    settings = loaded(
        tmp_path,
        '[[mappings]]\nname = "users"\ntable = "users"\nkey = "uid"\ntraits = { tenant = "tenent" }\n'
        '[[mappings.columns]]\nbucket = "cash"\ncolumn = "totalcoins"\ncurrency = "EUR"\nscale = 2\n',
    )
    with pytest.raises(ConfigError) as raised:
        inspect_mapping(connection, settings.mapping())
    file = tmp_path / "walletmigrate.toml"
    problems = [str(raised.value), *raised.value.__notes__]
    assert [problem.split(": ")[0] for problem in problems] == [f"{file}:4", f"{file}:5", f"{file}:8"]
    assert "did you mean 'tenant'?" in problems[1]
    assert "did you mean 'totalCoins'?" in problems[2]


@pytest.mark.parametrize(
    ("sql_type", "fields", "minimum", "maximum"),
    [
        ("smallint", {"scale": 0}, "-32768", "32767"),
        ("int", {"scale": 2, "unit": "minor"}, "-21474836.48", "21474836.47"),
        ("bigint", {"scale": 0}, "-9223372036854775808", "9223372036854775807"),
        ("bigint", {"scale": 18, "unit": "minor"}, "-9.223372036854775808", "9.223372036854775807"),
        ("numeric(5,2)", {}, "-999.99", "999.99"),
        ("numeric(5,4)", {}, "-9.99", "9.99"),
        ("numeric(5,2)", {"unit": "minor"}, "-9.99", "9.99"),
        ("numeric(40,2)", {}, "-" + "9" * 30 + ".99", "9" * 30 + ".99"),
        ("numeric", {}, "-" + "9" * 30 + ".99", "9" * 30 + ".99"),
        ("numeric(1000,18)", {"scale": 18}, "-" + "9" * 30 + "." + "9" * 18, "9" * 30 + "." + "9" * 18),
        ("double precision", {}, "-9999999999999.99", "9999999999999.99"),
        ("double precision", {"unit": "minor"}, "-9999999999999.99", "9999999999999.99"),
        ("real", {}, "-9999.99", "9999.99"),
    ],
)
def test_the_outermost_balances_of_a_column_type_are_known(
    connection: Connection, sql_type: str, fields: dict[str, Any], minimum: str, maximum: str
) -> None:
    low, high = limits(connection, sql_type, **fields)
    assert (format(low, "f"), format(high, "f")) == (minimum, maximum)


def stored(connection: Connection, sql_type: str, value: Decimal) -> Decimal:
    query = text(f"select cast(cast(cast(:value as numeric) as {sql_type}) as numeric)")
    return Decimal(connection.execute(query, {"value": value}).scalar_one())


@pytest.mark.parametrize("sql_type", ["smallint", "int", "bigint", "numeric(5,2)", "numeric(9,4)"])
def test_a_column_keeps_its_outermost_balances_and_overflows_beyond(connection: Connection, sql_type: str) -> None:
    scale = 0 if sql_type.endswith("int") else 2
    low, high = limits(connection, sql_type, scale=scale)
    assert (stored(connection, sql_type, low), stored(connection, sql_type, high)) == (low, high)
    with pytest.raises(DataError):
        stored(connection, sql_type, high + Decimal(1).scaleb(-scale))


@pytest.mark.parametrize("sql_type", ["double precision", "real"])
def test_a_float_column_tells_neighbours_apart_up_to_its_outermost_balances(
    connection: Connection, sql_type: str
) -> None:
    low, high = limits(connection, sql_type)
    for value in (low, low + Decimal("0.01"), high - Decimal("0.01"), high):
        assert stored(connection, sql_type, value) == value
    assert stored(connection, sql_type, high + Decimal("0.02")) != high + Decimal("0.02")


# Values that do not convert


def listed(connection: Connection, **fields: Any) -> list[tuple[str, str]]:
    found = unconvertible(connection, mapped(balance(**fields)))
    assert {column for _, column, _ in found} <= {"balance"}
    return [(key, value) for key, _, value in found]


def test_numeric_values_that_are_no_exact_amounts_are_listed(connection: Connection) -> None:
    run(
        connection,
        "create table users (id int primary key, balance numeric);"
        "insert into users values (1, 12.50), (2, null), (3, 'NaN'), (4, 'Infinity'), (5, '-Infinity'), "
        "(6, 1.005), (7, 1.500), (8, -3), (9, 0), (10, 1e30), (11, 1e30 - 0.01), (12, 0.0001)",
    )
    assert listed(connection) == [
        ("2", "NULL"),
        ("3", "NaN"),
        ("4", "Infinity"),
        ("5", "-Infinity"),
        ("6", "1.005"),
        ("10", "1" + "0" * 30),
        ("12", "0.0001"),
    ]


def test_a_column_of_cents_must_hold_whole_cents(connection: Connection) -> None:
    run(
        connection,
        "create table users (id int primary key, balance numeric);"
        "insert into users values (1, 1250), (2, 1250.5), (3, 1250.00), (4, -1), (5, 1e31), (6, 1e32)",
    )
    assert listed(connection, unit="minor") == [("2", "1250.5"), ("6", "1" + "0" * 32)]


def test_an_integer_column_can_only_hold_null(connection: Connection) -> None:
    run(
        connection,
        "create table users (id int primary key, balance bigint);"
        "insert into users values (1, 9223372036854775807), (2, null), (3, -5)",
    )
    assert listed(connection, scale=0) == [("2", "NULL")]


def test_float_noise_converts_and_a_real_fraction_does_not(connection: Connection) -> None:
    run(
        connection,
        "create table users (id int primary key, balance double precision);"
        "insert into users values (1, 0.1::float8 + 0.2::float8), (2, 99.9999999999), (3, 12.345), "
        "(4, 12.3401), (5, null), (6, 'NaN'), (7, 'Infinity'), (8, 9999999999999.99), (9, 10000000000000), "
        "(10, -0.07), (11, 1e-14), (12, '-0'), (13, 1e300), (14, 0.001), (15, 123456789.125), "
        "(16, '-Infinity'), (17, 12.3400000005), (18, 12.3400000001), (19, 50000000.0001), "
        "(20, 50000000.000005)",
    )
    assert [key for key, _ in listed(connection)] == [
        "3",
        "4",
        "5",
        "6",
        "7",
        "9",
        "13",
        "14",
        "15",
        "16",
        "17",
        "19",
    ]
    assert dict(listed(connection))["3"] == "12.345"


def test_a_sum_of_many_float_postings_still_converts(connection: Connection) -> None:
    total = 0.0
    for step in range(10_000):
        total += 0.1 if step % 3 else 1234.56
    run(
        connection,
        f"create table users (id int primary key, balance double precision);insert into users values (1, {total!r})",
    )
    assert round(total, 2) != total
    assert listed(connection) == []


def test_a_real_column_keeps_six_digits(connection: Connection) -> None:
    run(
        connection,
        "create table users (id int primary key, balance real);"
        "insert into users values (1, 1234.56), (2, 0.1), (3, 12.345), (4, 10000), (5, 9999.99)",
    )
    assert [key for key, _ in listed(connection)] == ["3", "4"]


def test_float_values_are_those_that_rounding_gives_back(connection: Connection) -> None:
    run(
        connection,
        "create table users (id int primary key, balance double precision);"
        "insert into users select n, mod(n * 79190021::bigint, 100000007)::numeric / 100 "
        "from generate_series(1, 20000) as n",
    )
    assert listed(connection) == []


def test_the_list_is_cut_at_its_limit_across_columns(connection: Connection) -> None:
    run(
        connection,
        "create table users (id uuid primary key, balance numeric, bonus numeric);"
        "insert into users select gen_random_uuid(), null, 0.5 from generate_series(1, 7)",
    )
    mapping = mapped(balance(), balance(bucket="promo", column="bonus", scale=0))
    assert len(unconvertible(connection, mapping)) == 14
    cut = unconvertible(connection, mapping, limit=9)
    assert [found.column for found in cut] == ["balance"] * 7 + ["bonus"] * 2
    assert cut[0].key < cut[1].key
    assert cut[8].value == "0.5"


def test_names_that_need_quotes_are_quoted(connection: Connection) -> None:
    run(
        connection,
        'create schema "Shop";'
        'create table "Shop"."order" ("user" int primary key, "select" numeric, "grün$" text);'
        'insert into "Shop"."order" values (1, 0.001)',
    )
    mapping = mapped(balance(column="select"), table="Shop.order", key="user", traits={"colour": "grün$"})
    assert inspect_mapping(connection, mapping).traits[0].column == "grün$"
    assert unconvertible(connection, mapping) == [("1", "select", "0.001")]


def test_row_security_that_hides_rows_stops_the_listing(connection: Connection) -> None:
    run(
        connection,
        "create table users (id int primary key, balance numeric); insert into users values (1, null);"
        "alter table users enable row level security; create role rls_reader;"
        "grant select on users to rls_reader",
    )
    assert len(unconvertible(connection, mapped())) == 1
    run(connection, "set role rls_reader")
    with pytest.raises(ConfigError, match="row-level security hides rows"):
        unconvertible(connection, mapped())
    connection.rollback()
