"""Balances held against the application's own tables: each difference named, each unusable query refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from commandline import Project
from ledger import ACT, execute, rows
from verifying import Ledger, prepared
from walletmigrate.configchecks import CrossCheck
from walletmigrate.errors import ConfigError, CrossCheckFailed
from walletmigrate.verify import Verification, verify

DEPOSITS = "select user_id as key, sum(amount) as expected from orders group by 1"


@pytest.fixture
def made(database_url: str) -> Ledger:
    """Ten accounts, and a table of orders that says the same as their balances; 3 has nothing, and no order."""
    engine, settings = prepared(database_url)
    execute(engine, "create table orders (user_id bigint, amount numeric(20, 2), rate double precision default 1)")
    execute(engine, "insert into orders select id, total_coins - 1 from users where total_coins <> 0")
    execute(engine, "insert into orders select id, 1 from users where total_coins <> 0")
    return engine, settings


def checked(made: Ledger, sql: str = DEPOSITS, **options: Any) -> Verification:
    """A full verification with one cross-check."""
    engine, settings = made
    check = CrossCheck.model_validate({"name": "deposits-orders", "sql": sql, **options})
    mapping = settings.mapping().model_copy(update={"cross_checks": (check,)})
    return verify(engine, settings, mapping, ACT)


def differences(result: Verification) -> dict[str, tuple[Any, Any]]:
    (check,) = result.cross_checks
    assert check.differing == len(check.differences)
    return {one.key: (one.expected, one.found) for one in check.differences}


def test_balances_that_the_orders_explain_are_in_order(made: Ledger) -> None:
    result = checked(made)
    assert (result.clean, differences(result)) == (True, {})
    assert result.cross_checks[0].compared == 10


def test_each_difference_is_named_and_the_run_is_not_clean(made: Ledger) -> None:
    engine, _ = made
    execute(engine, "update orders set amount = amount + 1 where user_id = 4")  # twice
    execute(engine, "delete from orders where user_id = 5")
    execute(engine, "insert into orders values (3, 7), (77, 5)")
    result = checked(made)
    assert not result.clean
    assert result.drift == ()
    assert differences(result) == {"3": (7, 0), "4": (102, 100), "5": (0, 100), "77": (5, None)}
    (kept,) = rows(engine, "select clean, details -> 'cross_checks' ->> 'deposits-orders' from wallet.verifications")
    assert kept == (False, "4")


def test_tolerance_and_keys_that_are_not_asked_for_are_as_configured(made: Ledger) -> None:
    execute(made[0], "update orders set amount = amount + 0.25 where user_id = 4")
    execute(made[0], "delete from orders where user_id = 5")
    assert differences(checked(made, tolerance="0.49")) == {"4": (Decimal("100.50"), 100), "5": (0, 100)}
    assert differences(checked(made, tolerance="0.50")) == {"5": (0, 100)}
    assert differences(checked(made, tolerance="0.50", others="ignore")) == {}


def test_the_balance_is_the_one_that_a_read_would_give(made: Ledger) -> None:
    """Of a stale account legacy's, of a frozen one the ledger's."""
    engine, _ = made
    execute(engine, "update users set total_coins = 90 where id = 4")
    execute(engine, "update wallet.accounts set state = 'frozen', balance = balance + 3 where key = '5'")
    assert differences(checked(made)) == {"4": (100, 90), "5": (100, 103)}


def test_a_query_sees_the_snapshot_of_the_run_and_writes_nothing(made: Ledger) -> None:
    execute(made[0], "create sequence seen")
    writing = f"select key, expected from ({DEPOSITS}) as q where nextval('seen') > 0"
    with pytest.raises(CrossCheckFailed, match=r"deposits-orders.*read-only transaction"):
        checked(made, writing)
    with pytest.raises(CrossCheckFailed, match="deposits-orders"):
        checked(made, f"{DEPOSITS}) as q; delete from orders; select * from ({DEPOSITS}")
    assert rows(made[0], "select count(*) from orders") == [(18,)]


def test_percent_signs_colons_comments_and_a_semicolon_are_part_of_the_query(made: Ledger) -> None:
    sql = f"with q as ({DEPOSITS}) select key::text, expected from q where ':x %s' like '%' -- all of them"
    assert checked(made, sql + "\n;").clean


@pytest.mark.parametrize(
    ("sql", "problem"),
    [
        ("select nonsense", 'column "nonsense" does not exist'),
        ("select user_id as key from orders", "one column expected"),
        ("select user_id, amount from orders", "one column key and one column expected"),
        ("select user_id as key, amount as expected from orders", "18 rows for 9 keys"),
        ("select null as key, 1 as expected", "1 of its rows have no key"),
        ("select 4 as key, null as expected", "NULL, NaN or infinite in 1 rows, for example of key 4"),
        ("select 4 as key, 'NaN'::numeric as expected", "NULL, NaN or infinite"),
        ("select 4 as key, 'Infinity'::float8 as expected", "NULL, NaN or infinite"),
        ("select 4 as key, 'much' as expected", "invalid input syntax for type numeric"),
        ("select 4 as key, 1 / 0 as expected", "division by zero"),
        ("delete from orders", "syntax error"),
    ],
)
def test_a_query_that_cannot_be_used_is_a_typed_error_and_leaves_nothing_on_record(
    made: Ledger, sql: str, problem: str
) -> None:
    with pytest.raises(CrossCheckFailed) as raised:
        checked(made, sql)
    assert (raised.value.check, raised.value.mapping, raised.value.exit_code) == ("deposits-orders", "users", 2)
    assert problem in str(raised.value)
    assert rows(made[0], "select * from wallet.verifications") == []


def test_samples_and_incremental_runs_leave_cross_checks_alone(made: Ledger) -> None:
    engine, settings = made
    check = CrossCheck(name="broken", sql="select nonsense")
    checked(made)
    mapping = settings.mapping().model_copy(update={"cross_checks": (check,)})
    for options in ({"sample": 3}, {"since_last": True}):
        assert verify(engine, settings, mapping, ACT, **options).cross_checks == ()


CHECK = """
  [[mappings.cross_checks]]
  name = "deposits-orders"
  sql = \"\"\"
    select user_id as key, sum(amount) as expected
    from orders group by 1
  \"\"\"
  bucket = "cash"
  tolerance = "0.50"
"""


def written(folder: Path, url: str, change: Callable[[str], str] = str) -> Project:
    project = Project(folder, url)
    project.config.write_text(project.config.read_text() + change(CHECK))
    return project


def test_a_cross_check_is_read_from_the_file(tmp_path: Path, database_url: str) -> None:
    (check,) = written(tmp_path, database_url).settings.mapping().cross_checks
    assert (check.name, check.bucket, check.tolerance, check.others) == (
        *("deposits-orders", "cash"),
        *(Decimal("0.50"), "zero"),
    )


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('name = "deposits-orders"', 'name = "Deposits"', "is no usable name"),
        ('bucket = "cash"', 'bucket = "bonus"', "no column of the mapping for cross-check 'deposits-orders'"),
        ('bucket = "cash"', 'currency = "USD"', "no column of the mapping"),
        ('tolerance = "0.50"', "tolerance = 0.5", "must be exact"),
        ('tolerance = "0.50"', 'tolerance = "-1"', "is no tolerance"),
        ('tolerance = "0.50"', "tolerance = -1", "not negative"),
        ('tolerance = "0.50"', 'others = "none"', "must be 'zero' or 'ignore'"),
        ('tolerance = "0.50"', 'tolerence = "1"', "did you mean 'tolerance'?"),
        ('tolerance = "0.50"', f'{CHECK}\n  tolerance = "1"'.replace('  tolerance = "0.50"\n', ""), "two cross-checks"),
    ],
)
def test_what_is_wrong_with_it_in_the_file_names_the_line(
    tmp_path: Path, database_url: str, old: str, new: str, said: str
) -> None:
    project = written(tmp_path, database_url, lambda text: text.replace(old, new, 1))
    with pytest.raises(ConfigError, match=re.escape(said)) as raised:
        _ = project.settings
    wrong = project.config.read_text().splitlines()[(raised.value.line or 0) - 1]
    assert wrong.strip() in (new, 'name = "deposits-orders"')


def test_a_query_that_says_nothing_is_refused_in_the_file(tmp_path: Path, database_url: str) -> None:
    project = written(tmp_path, database_url, lambda text: re.sub(r'""".*"""', '" ; "', text, flags=re.DOTALL))
    with pytest.raises(ConfigError, match="not a query"):
        _ = project.settings


def test_the_command_line_names_the_differences(tmp_path: Path, made: Ledger, database_url: str) -> None:
    project = written(tmp_path, database_url)
    execute(made[0], "update orders set amount = amount + 1 where user_id = 4")
    said = project.run("verify")
    assert said.exit_code == 3
    assert "cross-check deposits-orders (cash, EUR): 1 of 10 balances differ" in said.stdout
    assert "    4: expected 102.00, found 100.00" in said.stdout
    execute(made[0], "drop table orders")
    said = project.run("verify")
    assert (said.exit_code, "cross-check 'deposits-orders'" in said.stderr) == (2, True)
