"""Verify: whatever is wrong is found, and what is right is not called wrong."""

from __future__ import annotations

import re
import threading
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, text

from copies import copied
from ledger import (
    ACT,
    add_users,
    engine_named,
    execute,
    fence_down,
    install_users,
    post,
    rows,
    scalar,
    set_phase,
    unguarded,
    until_blocked,
    users_settings,
)
from walletmigrate import marking
from walletmigrate.backfill import backfill
from walletmigrate.capture import FenceProblem
from walletmigrate.comparison import Comparison
from walletmigrate.config import Settings
from walletmigrate.errors import LedgerNotInstalled, PreconditionRefused
from walletmigrate.freeze import freeze
from walletmigrate.install import install, uninstall
from walletmigrate.verify import Drift, Verification, verify

Ledger = tuple[Engine, Settings]
ROWS = 10
CENT = Decimal("0.01")


def prepared(url: str, **options: Any) -> Ledger:
    """Ten mirrored accounts of 100, of which some have moved money."""
    copied(url, f"test_verify {sorted(options.items())}", lambda: _prepare(url, options))
    columns = {name: value for name, value in options.items() if name in ("unit", "scale", "with_promo", "policy")}
    return engine_named(url), users_settings(url, **columns)


def _prepare(url: str, options: dict[str, Any]) -> None:
    engine, settings = install_users(url, **{"rows": ROWS, "phase": "dual_write", **options})
    backfill(engine, settings, settings.mapping(), ACT)
    keys = [key for (key,) in rows(engine, "select u.id::text from users as u order by u.id")]
    with engine.begin() as connection:
        post(connection, settings, "credit", keys[0], 5)
        post(connection, settings, "credit", keys[0], "2.50")
        post(connection, settings, "transfer", keys[0], 10, payee=keys[1])
        post(connection, settings, "debit", keys[2], 100)


@pytest.fixture
def made(database_url: str) -> Ledger:
    return prepared(database_url)


def run(made: Ledger, **options: Any) -> Verification:
    engine, settings = made
    return verify(engine, settings, settings.mapping(), ACT, **options)


def account(engine: Engine, key: str) -> int:
    return int(scalar(engine, "select id from wallet.accounts where key = :key and bucket = 'cash'", key=key))


def assert_only(result: Verification, *parts: str) -> None:
    """These parts of the result have something to say, and no others."""
    assert not result.clean
    said = {
        "drift": bool(result.drift or result.drift_accounts),
        "behind": bool(result.behind or result.missing or result.stale),
        "journal": bool(result.journal or result.journal_accounts),
        "imbalance": any(result.imbalance.values()),
        "guards": bool(result.guards),
    }
    assert {name for name, is_said in said.items() if is_said} == set(parts)


def test_a_ledger_that_follows_its_legacy_table_is_clean(made: Ledger) -> None:
    result = run(made)
    assert result.clean
    assert (result.accounts, result.missing, result.stale, result.drift_accounts) == (ROWS, 0, 0, 0)
    assert (result.drift, result.behind, result.journal, result.guards) == ((), (), (), ())
    assert dict(result.states) == {"mirrored": ROWS}
    assert dict(result.imbalance) == {"EUR": 0}
    assert dict(result.legacy_total) == dict(result.ledger_total) == {"EUR": Decimal("907.50")}
    assert result.seconds > 0


@pytest.mark.parametrize(
    "options",
    [
        {"key_type": "text"},
        {"key_type": "uuid"},
        {"with_promo": True},
        {"coins_type": "bigint", "coins": "10000", "unit": "minor"},
        {"coins_type": "double precision", "coins": "100.1 + 0.2"},
        {"coins_type": "bigint", "scale": 0, "coins": "100"},
    ],
    ids=["text", "uuid", "two columns", "cents", "float", "whole"],
)
def test_every_kind_of_mapping_is_clean_when_it_is_right_and_not_when_it_is_wrong(
    database_url: str, options: dict[str, Any]
) -> None:
    if options.get("scale") == 0:
        engine, settings = install_users(database_url, rows=ROWS, phase="dual_write", **options)
        backfill(engine, settings, settings.mapping(), ACT)
        made = engine, settings
    else:
        made = prepared(database_url, **options)
    clean = run(made)
    assert clean.clean, clean
    assert clean.accounts == ROWS * len(made[1].mapping().columns)
    execute(
        made[0], "update wallet.accounts set balance = balance + 1 where id = (select max(id) from wallet.accounts)"
    )
    assert_only(run(made), "drift", "journal", "imbalance")


@pytest.mark.parametrize("change", [1, -1])
@pytest.mark.parametrize("unit", [CENT, Decimal(1)])
def test_drift_of_one_unit_in_the_legacy_column_is_found(made: Ledger, change: int, unit: Decimal) -> None:
    with fence_down(*made) as superuser:
        statement = text("update users set total_coins = total_coins + :change where id = 4")
        superuser.execute(statement, {"change": change * unit})
    result = run(made)
    assert_only(result, "drift")
    assert result.drift == (Drift("4", "cash", "EUR", 100 + change * unit, Decimal(100), "mirrored", "differs"),)
    assert (result.drift_accounts, dict(result.drift_amount)) == (1, {"EUR": unit})
    assert result.legacy_total["EUR"] - result.ledger_total["EUR"] == change * unit


@pytest.mark.parametrize("change", [1, -1])
def test_drift_of_one_unit_in_the_ledger_is_found(made: Ledger, change: int) -> None:
    execute(made[0], "update wallet.accounts set balance = balance + :change where key = '4'", change=change)
    result = run(made)
    assert_only(result, "drift", "journal", "imbalance")
    assert [(drift.key, drift.legacy, drift.ledger) for drift in result.drift] == [
        ("4", Decimal(100), Decimal(100 + change))
    ]
    assert dict(result.imbalance) == {"EUR": change}
    assert {(problem.key, problem.expected, problem.found) for problem in result.journal} == {
        ("4", Decimal(100), Decimal(100 + change))
    }


def test_a_shift_of_money_from_one_account_to_another_is_found_though_the_sums_are_right(made: Ledger) -> None:
    with fence_down(*made) as superuser:
        superuser.exec_driver_sql("update users set total_coins = 101 where id = 4")
        superuser.exec_driver_sql("update users set total_coins = 99 where id = 5")
    result = run(made)
    assert_only(result, "drift")
    assert [drift.key for drift in result.drift] == ["4", "5"]
    assert result.drift_amount["EUR"] == 2
    assert result.legacy_total == result.ledger_total


def test_a_missing_account_is_found(made: Ledger) -> None:
    add_users(made[0], ROWS + 1, ROWS + 1)
    result = run(made)
    assert_only(result, "behind")
    assert (result.missing, result.accounts) == (1, ROWS)
    assert result.behind == (Drift("11", "cash", "EUR", Decimal(100), None, "absent", "missing"),)


def test_a_stale_account_is_found_and_its_difference_is_no_drift(made: Ledger) -> None:
    execute(made[0], "update users set total_coins = 1 where id = 4")
    result = run(made)
    assert_only(result, "behind")
    assert (result.missing, result.stale) == (0, 1)
    assert result.behind == (Drift("4", "cash", "EUR", Decimal(1), Decimal(100), "stale", "stale"),)


@pytest.mark.parametrize("state", ["mirrored", "stale"])
def test_an_orphan_is_found(made: Ledger, state: str) -> None:
    if state == "stale":
        execute(made[0], "update users set total_coins = 1 where id = 4")
    with fence_down(*made) as superuser:
        superuser.exec_driver_sql("delete from users where id = 4")
    result = run(made)
    assert_only(result, "drift")
    assert result.drift == (Drift("4", "cash", "EUR", None, Decimal(100), state, "orphan"),)
    assert result.drift_amount["EUR"] == 100


def test_an_account_that_closed_with_its_row_is_in_order(made: Ledger) -> None:
    execute(made[0], "delete from users where id = 4")
    result = run(made)
    assert result.clean
    assert dict(result.states) == {"closed": 1, "mirrored": ROWS - 1}
    assert result.legacy_total == result.ledger_total == {"EUR": Decimal("807.50")}


def test_a_closed_account_whose_row_lives_is_found(made: Ledger) -> None:
    execute(made[0], "delete from users where id = 4")
    with fence_down(*made) as superuser:
        superuser.exec_driver_sql("insert into users values (4, 'acme', 'member', 100, 0)")
    result = run(made)
    assert_only(result, "drift")
    assert result.drift == (Drift("4", "cash", "EUR", Decimal(100), Decimal(100), "closed", "reopened"),)


@pytest.mark.parametrize("value", ["null", "'NaN'"])
def test_a_legacy_value_that_is_no_amount_is_found(made: Ledger, value: str) -> None:
    # Install would refuse such a value, so the fence keeps the trace of having been off.
    with unguarded(made[0], "users") as superuser:
        superuser.exec_driver_sql(f"update users set total_coins = {value} where id = 4")
    result = run(made)
    assert_only(result, "drift", "guards")
    assert result.drift == (Drift("4", "cash", "EUR", None, Decimal(100), "mirrored", "no_value"),)


def test_a_null_of_an_account_that_turned_stale_is_listed_with_it(made: Ledger) -> None:
    execute(made[0], "update users set total_coins = null where id = 4")
    result = run(made)
    assert_only(result, "behind")
    assert [(one.key, one.legacy, one.problem) for one in result.behind] == [("4", None, "stale")]


@pytest.mark.parametrize(
    "edit",
    [
        "set amount = amount + 1 where id = :id",
        "set credit_balance = credit_balance + 1 where id = :id",
        "set credit_balance = null where id = :id",
        "set credit_account = :other where id = :id",
        "set currency = 'USD' where id = :id",
        "delete",
    ],
)
@pytest.mark.parametrize("which", ["opening", "middle", "last"])
def test_an_edited_or_deleted_transaction_is_found(made: Ledger, edit: str, which: str) -> None:
    engine, _ = made
    ids = [
        i
        for (i,) in rows(
            engine, "select id from wallet.transactions where credit_account = :a order by id", a=account(engine, "1")
        )
    ]
    assert len(ids) == 3
    chosen = {"opening": ids[0], "middle": ids[1], "last": ids[2]}[which]
    statement = f"update wallet.transactions {edit}"
    if edit == "delete":
        statement = "delete from wallet.transactions where id = :id"
    with unguarded(engine, "wallet.transactions") as superuser:
        superuser.execute(text(statement), {"id": chosen, "other": account(engine, "9")})
    result = run(made)
    assert not result.clean
    assert result.journal
    assert result.drift == ()
    assert result.guards == ()
    assert "1" in {problem.key for problem in result.journal}


def test_a_whole_journal_of_an_account_that_is_gone_is_found(made: Ledger) -> None:
    engine, _ = made
    with unguarded(engine, "wallet.transactions") as superuser:
        superuser.execute(
            text("delete from wallet.transactions where credit_account = :a"), {"a": account(engine, "4")}
        )
    result = run(made)
    assert {(one.key, one.expected, one.found) for one in result.journal if one.key} >= {
        ("4", Decimal(0), Decimal(100))
    }


def test_an_account_that_is_gone_is_found_with_its_transactions(made: Ledger) -> None:
    engine, _ = made
    gone = account(engine, "4")
    execute(engine, "delete from wallet.accounts where id = :id", id=gone)
    result = run(made)
    assert_only(result, "behind", "journal", "imbalance")
    assert [(one.account, one.problem) for one in result.journal] == [
        (gone, "transactions of an account that does not exist")
    ]


def test_a_transaction_between_accounts_that_never_were_is_found(made: Ledger) -> None:
    execute(
        made[0],
        "insert into wallet.transactions (id, debit_account, credit_account, kind, amount, currency, type) "
        "values (-1, -99, 99999, 'posting', 5, 'EUR', 'forged')",
    )
    result = run(made)
    assert_only(result, "journal", "imbalance")
    assert {one.account for one in result.journal} == {-99, 99999}
    assert result.journal_accounts == 2


def test_a_forged_balance_of_a_system_account_is_found(made: Ledger) -> None:
    execute(made[0], "update wallet.system_accounts set balance = balance + 1 where name = 'opening'")
    result = run(made)
    assert_only(result, "journal", "imbalance")
    (problem,) = result.journal
    assert (problem.key, problem.expected, problem.found) == ("opening", Decimal(-1000), Decimal(-999))
    runbook = (Path(__file__).parents[1] / "runbooks" / "ledger-imbalance.md").read_text(encoding="utf-8")
    (mend,) = re.findall(r"update wallet\.system_accounts set [^\"]+", runbook)
    execute(made[0], mend.replace("'transit'", "'opening'"))
    assert run(made).clean


def test_a_balanced_forgery_of_ledger_and_legacy_is_found_in_the_journal(made: Ledger) -> None:
    """The thief gives one account what another loses, in both places; no transaction explains it."""
    with fence_down(*made) as superuser:
        for key, change in ((4, 50), (5, -50)):
            values = {"key": key, "change": change}
            superuser.execute(text("update users set total_coins = total_coins + :change where id = :key"), values)
            superuser.execute(
                text("update wallet.accounts set balance = balance + :change where key = cast(:key as text)"), values
            )
    result = run(made)
    assert_only(result, "journal")
    assert {one.key for one in result.journal} == {"4", "5"}


FENCE = "walletmigrate_users_update on public.users"
ROWS_FENCE = "create or replace trigger walletmigrate_users_update after update on users for each row when (false) "
ROWS_FENCE += "execute function wallet.fence_users()"
NO_DELETE = "create or replace trigger append_only before delete on wallet.transactions for each row "
NO_DELETE += "execute function wallet.refuse_change()"
EMPTY = "returns trigger language plpgsql as $$ begin return null; end $$"
SILENT = "is disabled, or does not fire in replica role"


@pytest.mark.parametrize(
    ("trigger", "problem", "tampering"),
    [
        (FENCE, SILENT, ["alter table users disable trigger all"]),
        (FENCE, SILENT, ["alter table users enable replica trigger walletmigrate_users_update"]),
        (FENCE, SILENT, [ROWS_FENCE]),
        (
            FENCE,
            "was replaced or altered",
            [ROWS_FENCE, "alter table users enable always trigger walletmigrate_users_update"],
        ),
        (FENCE, "is missing", ["drop trigger walletmigrate_users_update on users"]),
        (
            "function wallet.fence_users",
            "was replaced",
            [f"create or replace function wallet.fence_users() {EMPTY}"],
        ),
        (
            "function wallet.fence_truncate_users",
            "was replaced",
            [f"create or replace function wallet.fence_truncate_users() {EMPTY}"],
        ),
        (
            "function wallet.refuse_change",
            "was replaced",
            [f"create or replace function wallet.refuse_change() {EMPTY}"],
        ),
        (
            "append_only on wallet.transactions",
            "is missing",
            ["drop trigger append_only on wallet.transactions"],
        ),
        (
            "append_only_truncate on wallet.audit_log",
            SILENT,
            ["alter table wallet.audit_log disable trigger append_only_truncate"],
        ),
        (
            "append_only on wallet.verifications",
            SILENT,
            ["alter table wallet.verifications enable trigger append_only"],
        ),
        (
            "append_only_truncate on wallet.verifications",
            "is missing",
            ["drop trigger append_only_truncate on wallet.verifications"],
        ),
        (
            "append_only on wallet.transactions",
            "was replaced or altered",
            [NO_DELETE, "alter table wallet.transactions enable always trigger append_only"],
        ),
    ],
)
def test_a_guard_that_was_disabled_removed_or_replaced_is_found(
    made: Ledger, trigger: str, problem: str, tampering: list[str]
) -> None:
    for statement in tampering:
        execute(made[0], statement)
    result = run(made)
    assert_only(result, "guards")
    assert FenceProblem(trigger, problem) in result.guards


def test_a_reinstalled_fence_is_in_order_again(made: Ledger) -> None:
    execute(made[0], "drop trigger walletmigrate_users_update on users")
    assert_only(run(made), "guards")
    install(*made, ACT)
    assert run(made).clean


def test_differences_are_counted_in_full_and_listed_up_to_the_limit(made: Ledger) -> None:
    engine, _ = made
    add_users(engine, 11, 40)
    with fence_down(*made) as superuser:
        superuser.exec_driver_sql("update users set total_coins = total_coins + 2 where id <= 7")
    execute(engine, "update wallet.accounts set balance = balance + 1 where key::int between 4 and 8")
    result = run(made, limit=3)
    assert (result.drift_accounts, [drift.key for drift in result.drift]) == (8, ["1", "2", "3"])
    assert (result.missing, [behind.key for behind in result.behind]) == (30, ["11", "12", "13"])
    assert result.journal_accounts == 5
    assert len({problem.account for problem in result.journal}) == 3
    assert result.drift_amount["EUR"] == 3 * 2 + 4 * 1 + 1


def test_totals_are_told_by_trait_and_bucket(database_url: str) -> None:
    made = prepared(database_url, with_promo=True)
    with fence_down(*made) as superuser:
        superuser.exec_driver_sql("update users set total_coins = 1000 where id = 10")
    found = {(total.trait, total.value, total.bucket): (total.legacy, total.ledger) for total in run(made).totals}
    odd, even = Decimal("397.50"), Decimal(510)
    assert found == {
        ("role", "member", "cash"): (Decimal("707.50"), Decimal("707.50")),
        ("role", "vip", "cash"): (1100, 200),
        ("role", "member", "promo"): (40, 40),
        ("role", "vip", "promo"): (10, 10),
        ("tenant", "acme", "cash"): (odd, odd),
        ("tenant", "globex", "cash"): (even + 900, even),
        ("tenant", "acme", "promo"): (25, 25),
        ("tenant", "globex", "promo"): (25, 25),
    }


def test_of_a_trait_with_many_values_those_that_differ_most_are_told(made: Ledger) -> None:
    with fence_down(*made) as superuser:
        superuser.exec_driver_sql("update users set tenant = 'tenant ' || id, total_coins = total_coins + id")
    totals = [total for total in run(made, limit=2).totals if total.trait == "tenant"]
    assert [(total.value, total.legacy - total.ledger) for total in totals] == [
        ("tenant 10", Decimal(10)),
        ("tenant 9", Decimal(9)),
    ]


def test_a_frozen_account_is_compared_with_its_journal_and_not_with_legacy(made: Ledger) -> None:
    engine, settings = made
    set_phase(engine, "frozen")
    freeze(engine, settings, settings.mapping(), ACT)
    with engine.begin() as connection:
        post(connection, settings, "credit", 4, 5)
    result = run(made)
    assert result.clean
    assert dict(result.states) == {"frozen": ROWS}
    assert result.ledger_total["EUR"] - result.legacy_total["EUR"] == 5
    execute(engine, "update wallet.accounts set balance = balance + 1 where key = '4'")
    assert_only(run(made), "journal", "imbalance")


def test_the_row_of_a_frozen_account_that_is_gone_is_found(made: Ledger) -> None:
    engine, settings = made
    set_phase(engine, "frozen")
    freeze(engine, settings, settings.mapping(), ACT)
    with fence_down(*made) as superuser:
        superuser.exec_driver_sql("delete from users where id = 4")
    assert [(one.key, one.problem) for one in run(made).drift] == [("4", "orphan")]


def test_money_in_flight_is_seen_whole_or_not_at_all(made: Ledger) -> None:
    engine, settings = made
    with engine.connect() as writer:
        post(writer, settings, "credit", 4, 5)
        before = run(made)
        writer.commit()
    after = run(made)
    assert before.clean
    assert after.clean
    assert after.ledger_total["EUR"] - before.ledger_total["EUR"] == 5


def test_it_reads_one_snapshot_and_cannot_write(made: Ledger, database_url: str) -> None:
    """A role that may not write anything gets a full verification with ``dry_run``."""
    engine, settings = made
    before = scalar(engine, "select pg_current_xact_id()::text::bigint")
    auditor = engine_named(database_url, role="wallet_auditor")
    result = run((auditor, settings), dry_run=True)
    assert (result.clean, result.dry_run) == (True, True)
    assert scalar(engine, "select pg_current_xact_id()::text::bigint") == before + 1
    assert rows(engine, "select * from wallet.verifications") == []


def test_a_comparison_may_take_longer_than_a_statement_of_a_job(made: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """In both looks: a large table is read for longer than the limit of the engine's other statements."""
    limits: list[str] = []

    def looked(comparison: Comparison, connection: Connection, name: str, *scope: Any, **parameters: Any) -> Any:
        limits.append(connection.exec_driver_sql("show statement_timeout").scalar_one())
        return asked(comparison, connection, name, *scope, **parameters)

    asked = Comparison.run
    with fence_down(*made) as superuser:
        superuser.exec_driver_sql("update users set total_coins = total_coins - 3 where id = 4")
    monkeypatch.setattr(Comparison, "run", looked)
    assert run(made).drift_accounts == 1
    assert set(limits) == {"0"}
    assert scalar(made[0], "show statement_timeout") == "5min"


def test_the_result_is_put_on_record(made: Ledger) -> None:
    engine, _ = made
    with fence_down(*made) as superuser:
        superuser.exec_driver_sql("update users set total_coins = total_coins - 3 where id in (4, 5)")
    add_users(engine, 11, 13)
    run(made)
    assert rows(
        engine,
        "select mapping, clean, full_run, accounts, missing, drift_accounts, drift_amount, currency, actor, "
        "started_at <= finished_at from wallet.verifications",
    ) == [("users", False, True, ROWS, 3, 2, Decimal(6), "EUR", ACT.actor, True)]
    audit = rows(
        engine, "select actor, reason, mapping, details->>'clean' from wallet.audit_log where action = 'verify'"
    )
    assert audit == [(ACT.actor, ACT.reason, "users", "false")]


def test_each_currency_has_a_record_of_its_own(database_url: str) -> None:
    made = prepared(database_url, with_promo=True)
    mapping = made[1].mapping()
    dollars = mapping.columns[1].model_copy(update={"currency": "USD"})
    settings = made[1].model_copy(
        update={"mappings": (mapping.model_copy(update={"columns": (mapping.columns[0], dollars)}),)}
    )
    engine = made[0]
    execute(engine, "update wallet.control set phase = 'legacy'")
    uninstall(engine, made[1], ACT, drop_ledger=True)
    install(engine, settings, ACT)
    set_phase(engine, "dual_write")
    backfill(engine, settings, settings.mapping(), ACT)
    execute(engine, "update wallet.accounts set balance = balance + 1 where key = '4' and currency = 'USD'")
    result = run((engine, settings))
    assert dict(result.drift_amount) == dict(result.imbalance) == {"EUR": Decimal(0), "USD": Decimal(1)}
    recorded = rows(
        engine,
        "select currency, clean, accounts, drift_accounts, drift_amount from wallet.verifications order by 1",
    )
    assert recorded == [("EUR", False, ROWS, 0, 0), ("USD", False, ROWS, 1, 1)]


def test_it_is_refused_without_an_installed_ledger(made: Ledger) -> None:
    engine, _ = made
    set_phase(engine, "legacy")
    uninstall(*made, ACT, drop_ledger=True)
    with pytest.raises(LedgerNotInstalled):
        run(made)


def test_it_is_refused_to_a_role_from_which_rows_are_hidden(made: Ledger, database_url: str) -> None:
    engine, settings = made
    execute(engine, "alter table users enable row level security")
    operator = engine_named(database_url, role="wallet_operator")
    with pytest.raises(PreconditionRefused, match="row-level security hides rows"):
        run((operator, settings))


def test_text_keys_may_have_a_collation_of_their_own(database_url: str) -> None:
    made = install_users(database_url, rows=ROWS, key_type='text collate "ucs_basic"', phase="dual_write")
    backfill(*made, made[1].mapping(), ACT)
    result = run(made)
    assert (result.clean, result.accounts) == (True, ROWS)
    add_users(made[0], ROWS + 1, ROWS + 2, key_type="text")
    assert [behind.key for behind in run(made).behind] == ["user-0000011", "user-0000012"]


def test_an_empty_table_is_clean(database_url: str) -> None:
    made = install_users(database_url, rows=0)
    result = run(made)
    assert (result.clean, result.accounts) == (True, 0)
    assert dict(result.legacy_total) == {"EUR": 0}
    assert len(rows(made[0], "select * from wallet.verifications")) == 1


# Turning stale what differs


def states_of(engine: Engine) -> dict[str, str]:
    """The state of every account, by key and bucket, that is not mirrored."""
    query = "select key || ' ' || bucket, state::text from wallet.accounts where state <> 'mirrored' order by 1"
    return dict(rows(engine, query))


def marks(engine: Engine) -> list[dict[str, Any]]:
    """What the audit rows of the marks say."""
    return [
        facts for (facts,) in rows(engine, "select details from wallet.audit_log where action = 'verify mark-stale'")
    ]


@pytest.mark.parametrize("options", [{}, {"key_type": "text"}, {"key_type": "uuid"}], ids=["bigint", "text", "uuid"])
def test_a_drifted_account_is_turned_stale_and_a_backfill_brings_it_up(
    database_url: str, options: dict[str, Any]
) -> None:
    made = prepared(database_url, **options)
    engine, settings = made
    key = rows(engine, "select u.id::text from users as u order by u.id")[3][0]
    with fence_down(*made) as superuser:
        superuser.execute(text("update users set total_coins = 125 where id::text = :key"), {"key": key})
    result = run(made, mark_stale=True)
    assert_only(result, "drift")
    assert (result.drift_accounts, result.turned_stale) == (1, 1)
    assert states_of(engine) == {f"{key} cash": "stale"}
    assert scalar(engine, "select state_reason from wallet.accounts where state = 'stale'") == f"verify: {ACT.reason}"
    assert marks(engine) == [{"differed": 1, "turned_stale": 1, "keys": [key], "closed": 0, "closed_keys": []}]
    assert_only(run(made), "behind")
    done = backfill(engine, settings, settings.mapping(), ACT)
    assert (done.opened, done.resynced) == (0, 1)
    query = "select kind::text, amount, job_id from wallet.transactions order by id desc limit 1"
    assert rows(engine, query) == [("resync", Decimal(25), done.job_id)]
    after = run(made, mark_stale=True)
    assert (after.clean, after.turned_stale) == (True, 0)
    assert len(marks(engine)) == 1


def test_an_account_that_is_healed_before_it_can_be_locked_is_left_alone(made: Ledger, database_url: str) -> None:
    engine, settings = made
    with fence_down(*made) as superuser:
        superuser.exec_driver_sql("update users set total_coins = 125 where id in (4, 5)")
    found: list[Verification] = []
    marker = engine_named(database_url, "marker")
    thread = threading.Thread(target=lambda: found.append(run((marker, settings), mark_stale=True)))
    with unguarded(engine, "users") as superuser:
        superuser.exec_driver_sql("update users set total_coins = 100 where id = 4")
        thread.start()
        until_blocked(engine, "marker")
    thread.join()
    assert [drift.key for drift in found[0].drift] == ["4", "5"]
    assert found[0].turned_stale == 1
    assert states_of(engine) == {"5 cash": "stale"}
    assert marks(engine) == [{"differed": 2, "turned_stale": 1, "keys": ["5"], "closed": 0, "closed_keys": []}]


def test_a_dry_run_says_how_many_would_be_turned_stale_and_turns_none(made: Ledger) -> None:
    with fence_down(*made) as superuser:
        superuser.exec_driver_sql("update users set total_coins = 125 where id in (4, 5)")
    assert run(made, mark_stale=True, dry_run=True).turned_stale == 2
    assert (states_of(made[0]), marks(made[0])) == ({}, [])
    assert run(made).turned_stale is None
    assert (states_of(made[0]), marks(made[0])) == ({}, [])


def test_frozen_and_closed_accounts_are_left_as_they_are(made: Ledger) -> None:
    execute(made[0], "delete from users where id = 6")
    with fence_down(*made) as superuser:
        superuser.exec_driver_sql("delete from users where id = 5")
        superuser.exec_driver_sql("insert into users values (6, 'globex', 'member', 7, 0)")
    execute(made[0], "update wallet.accounts set state = 'frozen' where key = '4'")
    with unguarded(made[0], "users") as superuser:
        superuser.exec_driver_sql("delete from users where id = 4")
    result = run(made, mark_stale=True)
    assert [(drift.key, drift.state, drift.problem) for drift in result.drift] == [
        ("4", "frozen", "orphan"),
        ("5", "mirrored", "orphan"),
        ("6", "closed", "reopened"),
    ]
    assert (result.turned_stale, result.closed) == (0, 1)
    assert states_of(made[0]) == {"4 cash": "frozen", "5 cash": "closed", "6 cash": "closed"}


def test_more_than_a_batch_and_more_than_the_listed_differences_are_turned_stale(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = prepared(database_url, with_promo=True)
    monkeypatch.setattr(marking, "BATCH", 2)
    monkeypatch.setattr(marking, "LISTED", 3)
    with fence_down(*made) as superuser:
        superuser.exec_driver_sql("update users set total_coins = 125 where id between 4 and 8")
        superuser.exec_driver_sql("update users set promo = 6 where id = 7")
    result = run(made, mark_stale=True, limit=1)
    assert (len(result.drift), result.drift_accounts, result.turned_stale) == (1, 6, 6)
    assert set(states_of(made[0])) == {*(f"{key} cash" for key in range(4, 9)), "7 promo"}
    assert marks(made[0]) == [
        {"differed": 6, "turned_stale": 6, "keys": ["4", "5", "6"], "closed": 0, "closed_keys": []}
    ]
