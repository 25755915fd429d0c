"""Verify looks at the journal, at the sums of money, and at the guards: a forgery of any of them is found."""

from __future__ import annotations

import re
from decimal import Decimal
from pathlib import Path

import pytest
from sqlalchemy import text

from ledger import ACT, execute, fence_down, rows, unguarded
from verifying import Ledger, account, assert_only, made, run
from walletmigrate.capture import FenceProblem
from walletmigrate.install import install

__all__ = ["made"]


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
