"""Erasure of one owner's texts: all of them go, nobody else's, and neither money nor proof changes."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import pytest

import ledger
from adapting import DUAL, Place, place
from commandline import REASON, project_at
from walletmigrate.audit import Act
from walletmigrate.config import CaptureSettings
from walletmigrate.erasure import erase
from walletmigrate.errors import InvalidKey, UsageError
from walletmigrate.install import install

ACT = Act("privacy:7", "CASE-9: request of 3 November")
TEXTS = "select transaction_id, description, address from wallet.transaction_details order by transaction_id"


@pytest.fixture
def made(database_url: str) -> Place:
    """Users 1 to 3 with texts beside their transactions, in both buckets, and one transfer between 1 and 2."""
    made = place(database_url, rows=3, with_promo=True)
    settings = made.settings.model_copy(update={"capture": CaptureSettings(raw_queries=True)})
    install(made.engine, settings, ledger.ACT)
    made.flags(DUAL)
    with made.engine.begin() as connection:
        for key in (1, 2, 3):
            made.adapter.credit(connection, key, 5, type="deposit", description=f"by Ada {key}", address="10.0.0.7")
        made.adapter.credit(connection, 1, 1, bucket="promo", type="gift", description="birthday")
        made.adapter.transfer(connection, 1, 2, 2, type="gift", description="from Ada to Bob")
    return made


def texts(made: Place) -> set[str]:
    return {str(description) for _, description, _ in ledger.rows(made.engine, TEXTS)}


def test_all_texts_of_one_owner_go_and_nobody_else_s(made: Place) -> None:
    done = erase(made.engine, made.settings, made.mapping, "1", ACT)
    assert (done.key, done.details, done.queries, done.messages) == ("1", 3, 0, 0)
    assert texts(made) == {"by Ada 2", "by Ada 3"}


def test_no_transaction_and_no_balance_changes(made: Place) -> None:
    before = ledger.journal(made.engine)
    erase(made.engine, made.settings, made.mapping, "1", ACT)
    assert ledger.journal(made.engine) == before
    made.check()


def test_the_audit_row_has_the_key_and_the_counts_and_none_of_the_texts(made: Place) -> None:
    done = erase(made.engine, made.settings, made.mapping, "1", ACT)
    found = ledger.rows(
        made.engine, "select id, actor, reason, mapping, details from wallet.audit_log where action = 'erase'"
    )
    counts = {"key": "1", "details": 3, "queries": 0, "messages": 0}
    assert found == [(done.audit_id, ACT.actor, ACT.reason, "users", counts)]


def test_done_twice_is_done_once_and_a_dry_run_only_counts(made: Place) -> None:
    planned = erase(made.engine, made.settings, made.mapping, "1", ACT, dry_run=True)
    assert (planned.details, planned.audit_id, len(texts(made))) == (3, None, 5)
    erase(made.engine, made.settings, made.mapping, "1", ACT)
    again = erase(made.engine, made.settings, made.mapping, "1", ACT)
    assert (again.total, again.audit_id) == (0, None)
    assert ledger.scalar(made.engine, "select count(*) from wallet.audit_log where action = 'erase'") == 1


def test_a_raw_statement_goes_from_every_line_that_it_stands_in(made: Place) -> None:
    for statement in (
        "update users set total_coins = total_coins + 1 where id < 3 /* Ada and Bob */",
        "update users set total_coins = total_coins + 1 where id = 2 /* Bob */",
    ):
        ledger.execute(made.engine, statement)
    assert ledger.scalar(made.engine, "select count(*) from wallet.bypasses where query is not null") == 3
    assert erase(made.engine, made.settings, made.mapping, "1", ACT).queries == 2
    left = "select key, query is null from wallet.bypasses order by at"
    assert ledger.rows(made.engine, left) == [("1", True), ("2", True), ("2", False)]
    assert ledger.scalar(made.engine, "select count(*) from wallet.bypasses where fingerprint like '%?%'") == 3


def test_the_words_of_a_failure_go_and_the_failure_stays(made: Place) -> None:
    ledger.execute(
        made.engine, "alter table wallet.transactions add constraint no_fees check (type <> 'fee') not valid"
    )
    with made.engine.begin() as connection:
        made.adapter.debit(connection, 1, 1, type="fee")
        made.adapter.debit(connection, 3, 1, type="fee")
    assert erase(made.engine, made.settings, made.mapping, "1", ACT).messages == 1
    found = ledger.rows(made.engine, "select key, message = '', sqlstate from wallet.failures order by key")
    assert found == [("1", True, "23514"), ("3", False, "23514")]


def test_an_owner_whose_row_is_gone_is_erased_too(made: Place) -> None:
    ledger.execute(made.engine, "delete from users where id = 1")
    assert made.account(1) == ("closed", Decimal(103))
    assert erase(made.engine, made.settings, made.mapping, "1", ACT).details == 3
    made.check()


def test_whom_the_ledger_does_not_know_is_told_and_nothing_is_recorded(made: Place) -> None:
    with pytest.raises(UsageError, match="knows nobody with key '4'"):
        erase(made.engine, made.settings, made.mapping, "4", ACT)
    with pytest.raises(InvalidKey):
        erase(made.engine, made.settings, made.mapping, "Ada", ACT)
    assert ledger.scalar(made.engine, "select count(*) from wallet.audit_log where action = 'erase'") == 0


def test_the_command_says_what_goes_and_what_stays(database_url: str, tmp_path: Path) -> None:
    project, engine = project_at(tmp_path, database_url, "dual_write", rows=2)
    project.change("adjust", "--account", "1", "--amount", "1", "--notes", "call of Monday")
    planned = project.run("erase", "--account", "1", "--dry-run")
    assert (planned.exit_code, planned.stdout.partition(";")[0]) == (
        0,
        "users 1: would erase the texts of 1 transactions, 0 statements, 0 messages",
    )
    assert project.run("erase", "--account", "1").exit_code == 2, "a reason is wanted"
    said = project.run("erase", "--account", "1", *REASON, "--json").document
    assert (said["details"], said["dry_run"], said["key"]) == (1, False, "1")
    for nobody in ("7", "Ada"):
        assert project.run("erase", "--account", nobody, *REASON).exit_code == 2
    assert ledger.scalar(engine, "select balance from wallet.accounts where key = '1'") == Decimal(101)
