"""What a run of verify reads, lists and puts on record, and whom it is refused."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import Connection

from ledger import ACT, add_users, engine_named, execute, fence_down, install_users, post, rows, scalar, set_phase
from verifying import ROWS, Ledger, assert_only, made, prepared, run
from walletmigrate.backfill import backfill
from walletmigrate.comparison import Comparison
from walletmigrate.errors import LedgerNotInstalled, PreconditionRefused
from walletmigrate.freeze import freeze
from walletmigrate.install import install, uninstall

__all__ = ["made"]


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
