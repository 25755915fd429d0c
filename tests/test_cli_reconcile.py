"""reconcile, recalculate and adjust on the command line: options, exit codes, documents; and by which role."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import pytest
from sqlalchemy import Engine
from sqlalchemy.exc import ProgrammingError

from commandline import REASON, Project, project_at
from invariants import assert_sound
from ledger import ACT, engine_named, execute, fence_down, rows, scalar, unguarded
from walletmigrate.corrections import adjust
from walletmigrate.errors import InvalidAmount, PreconditionRefused
from walletmigrate.freeze import freeze
from walletmigrate.recalculate import recalculate
from walletmigrate.reconcile import Limits, reconcile
from walletmigrate.reconciliations import undo
from walletmigrate.truths import asked

D = Decimal


@pytest.fixture
def made(tmp_path: Path, database_url: str) -> tuple[Project, Engine]:
    """Ten mirrored accounts of 100, with a flag file and a configuration."""
    return project_at(tmp_path, database_url, "dual_write")


def account(engine: Engine, key: int) -> tuple[object, ...]:
    query = (
        "select a.state::text, a.balance, u.total_coins from users u join wallet.accounts a on a.key = u.id::text "
        "where u.id = :key"
    )
    return rows(engine, query, key=key)[0]


def test_a_reconciliation_is_run_listed_shown_and_undone(made: tuple[Project, Engine], tmp_path: Path) -> None:
    project, engine = made
    truth = tmp_path / "bank.csv"
    truth.write_text("key,balance\n1,100.40\n2,99.30\n3,150\n")
    options = ("reconcile", "--all", "--truth", str(truth), "--tolerance", "0.50", *REASON)
    planned = project.run(*options, "--dry-run")
    assert (planned.exit_code, scalar(engine, "select count(*) from wallet.jobs where kind = 'reconcile'")) == (3, 0)
    said = project.run(*options)
    assert said.exit_code == 3
    assert "users against bank.csv: 1 in order, 1 corrected, 1 reported, 7 unlisted (run " in said.stdout
    assert "2 (cash, EUR): corrected, legacy 100.00 → 99.30, ledger 100.00 → 99.30, difference -0.70" in said.stdout
    assert "3 (cash, EUR): reported, legacy 100.00, ledger 100.00, difference +50.00" in said.stdout
    run = scalar(engine, "select max(id) from wallet.jobs where kind = 'reconcile'")
    assert f"walletmigrate reconcile undo {run}" in said.stderr
    assert "1 corrected, 1 reported (50.00 EUR)" in project.run("reconcile", "list").stdout
    shown = project.run("reconcile", "show", str(run), "--json").document
    assert (shown["run"]["reason"], shown["changed"][0]["key"], shown["left"][0]["difference"]) == (
        *("a test", "2"),
        "50.00",
    )
    undone = project.change("reconcile", "undo", str(run))
    assert "undid 1 corrections" in undone.stdout
    assert account(engine, 2) == ("mirrored", D(100), D(100))
    assert "1 corrected, 1 undone" in project.run("reconcile", "list").stdout
    assert_sound(engine, project.settings)


def test_the_list_names_what_a_run_came_to_besides_its_corrections(made: tuple[Project, Engine]) -> None:
    project, engine = made
    execute(engine, "update wallet.accounts set state = 'stale' where key in ('1', '2')")
    execute(engine, "update wallet.accounts set state = 'closed' where key = '3'")
    assert project.run("reconcile", "--all", *REASON).exit_code == 4
    said = project.run("reconcile", "list").stdout
    assert said.endswith("users against legacy, done: 0 corrected, 2 resynced, 1 refused\n")


def test_all_accounts_are_held_against_a_file_by_two_processes(made: tuple[Project, Engine], tmp_path: Path) -> None:
    project, engine = made
    truth = tmp_path / "bank.csv"
    truth.write_text("key,balance\n" + "".join(f"{key},100.50\n" for key in range(1, 10)) + "10,150\n77,1\n")
    words = ("reconcile", "--all", "--truth", str(truth), "--batch-size", "2", "--workers", "2", "--json")
    assert project.run(*words, "--dry-run").document["mappings"][0]["counts"]["corrected"] == 9
    said = project.run(*words, *REASON)
    found = said.document["mappings"][0]
    assert {name: n for name, n in found["counts"].items() if n} == {"corrected": 9, "reported": 1, "refused": 1}
    keys = [(one["key"], one["outcome"]) for one in found["items"]]
    assert keys == [*((str(key), "corrected") for key in range(1, 10)), ("10", "reported"), ("77", "refused")]
    assert (said.exit_code, account(engine, 9)) == (3, ("mirrored", D("100.50"), D("100.50")))
    one = project.run("reconcile", "--account", "1", "--workers", "2", *REASON)
    assert (one.exit_code, "go with --all" in one.stderr) == (2, True)
    assert_sound(engine, project.settings)


def test_a_key_that_was_set_aside_is_a_failure(made: tuple[Project, Engine]) -> None:
    project, engine = made
    # A row that the comparison itself breaks on: no batch with it can be looked at.
    execute(engine, "alter function wallet.standing_users(bigint[]) rename to standing_before")
    execute(
        engine,
        "create function wallet.standing_users(p_keys bigint[]) returns table (key text, bucket text, currency text, "
        "state text, legacy numeric, ledger numeric) language plpgsql as $$ begin "
        "if 4 = any(p_keys) then raise exception 'broken'; end if; "
        "return query select * from wallet.standing_before(p_keys); end $$",
    )
    said = project.run("reconcile", "--all", "--json", *REASON)
    found = said.document["mappings"][0]
    assert (said.exit_code, found["counts"]["in_order"], found["counts"]["failed"]) == (1, 9, 1)
    assert [(one["key"], one["outcome"], one["error"]) for one in found["items"]] == [("4", "failed", "broken (P0001)")]
    shown = project.run("reconcile", "show", str(found["run"]), "--json").document
    assert (shown["left"][0]["key"], shown["run"]["counts"]["failed"]) == ("4", 1)


def test_what_cannot_be_carried_out_as_it_was_put_is_usage(made: tuple[Project, Engine]) -> None:
    project, _ = made
    for words, said in {
        "reconcile": "--account KEY, or --all",
        "reconcile --all --account 1": "--account KEY, or --all",
        "reconcile --all --tolerance a": "--tolerance",
        "reconcile --all --correct-up-to -1": "--correct-up-to",
        "reconcile --account x": "integer",
        "reconcile --all --truth nowhere.csv": "nowhere.csv cannot be read",
        "reconcile undo 999": "no reconciliation 999",
        "recalculate": "--account KEY, or --all",
        "adjust --account 1 --amount much": "--amount",
        "adjust --account 1 --amount 0.005": "decimals",
    }.items():
        done = project.run(*words.split(), *REASON)
        assert (done.exit_code, said in done.stderr) == (2, True), done
    assert project.run("reconcile", "show", "999").exit_code == 2


def test_a_file_with_a_line_that_cannot_be_read_ends_with_2_and_its_number(
    made: tuple[Project, Engine], tmp_path: Path
) -> None:
    project, engine = made
    truth = tmp_path / "bank.csv"
    truth.write_text("key,balance\n1,150\n2,1.234\n")
    done = project.run("reconcile", "--all", "--truth", str(truth), "--correct-up-to", "100", "--json", *REASON)
    assert (done.exit_code, done.document["error"]["fields"]["problems"][0]["line"]) == (2, 3)
    assert account(engine, 1) == ("mirrored", D(100), D(100))


def test_each_end_has_its_exit_code(made: tuple[Project, Engine]) -> None:
    project, engine = made
    assert project.run("reconcile", "--account", "1", *REASON).exit_code == 0
    execute(engine, "insert into users values (11, 'acme', 'member', 7, 0)")
    refused = project.run("reconcile", "--all", *REASON)
    assert (refused.exit_code, "it has no ledger account" in refused.stdout) == (4, True)
    assert project.run("reconcile", "--all", "--create-missing", *REASON).exit_code == 0
    missing_reason = project.run("reconcile", "--all")
    assert (missing_reason.exit_code, "--reason" in missing_reason.stderr) == (2, True)
    project.change("stop-the-line")
    assert project.run("reconcile", "--all", *REASON).exit_code == 4


def test_an_adjustment_moves_both_sides_by_an_amount_and_is_on_record(made: tuple[Project, Engine]) -> None:
    project, engine = made
    words = ("adjust", "--account", "4", "--amount", "-12.50", "--actor", "user:anna", "--notes", "call of Monday")
    assert project.run(*words, *REASON, "--dry-run").exit_code == 0
    assert account(engine, 4) == ("mirrored", D(100), D(100))
    said = project.run(*words, *REASON)
    assert (said.exit_code, "ledger 100.00 → 87.50" in said.stdout) == (0, True), said
    assert account(engine, 4) == ("mirrored", D("87.50"), D("87.50"))
    query = (
        "select t.kind::text, t.type, t.amount, t.actor, t.reason, d.description from wallet.transactions t "
        "join wallet.transaction_details d on d.transaction_id = t.id"
    )
    assert rows(engine, query) == [("correction", "adjust", D("12.50"), "user:anna", "a test", "call of Monday")]
    assert scalar(engine, "select actor from wallet.audit_log where action = 'adjust'") == "user:anna"
    assert scalar(engine, "select count(*) from wallet.bypasses") == 0
    negative = project.run("adjust", "--account", "4", "--amount", "-100", *REASON)
    assert (negative.exit_code, "--allow-negative" in negative.stderr) == (4, True)
    assert project.run("adjust", "--account", "4", "--amount", "-100", "--allow-negative", *REASON).exit_code == 0
    assert account(engine, 4) == ("mirrored", D("-12.50"), D("-12.50"))
    assert_sound(engine, project.settings)


def test_an_adjustment_goes_by_the_account_s_state(made: tuple[Project, Engine]) -> None:
    project, engine = made
    mapping = project.settings.mappings[0]
    execute(engine, "insert into users values (11, 'acme', 'member', 7, 0)")
    with pytest.raises(PreconditionRefused, match="no ledger account"):
        adjust(engine, project.settings, mapping, ACT, "11", 5)
    with pytest.raises(InvalidAmount):
        adjust(engine, project.settings, mapping, ACT, "1", D("0.005"))
    execute(engine, "update users set total_coins = 60 where id = 2")
    adjust(engine, project.settings, mapping, ACT, "2", 5)
    assert account(engine, 2) == ("mirrored", D(65), D(65))
    with fence_down(engine, project.settings) as connection:
        connection.exec_driver_sql("update users set total_coins = 101 where id = 3")
    with pytest.raises(PreconditionRefused, match="legacy and ledger differ"):
        adjust(engine, project.settings, mapping, ACT, "3", 5)
    execute(engine, "update wallet.control set phase = 'frozen'")
    freeze(engine, project.settings, mapping, ACT)
    adjust(engine, project.settings, mapping, ACT, "1", 5)
    assert account(engine, 1) == ("frozen", D(105), D(100))


def test_balances_are_made_what_the_journal_says(made: tuple[Project, Engine]) -> None:
    project, engine = made
    with unguarded(engine, "wallet.accounts") as connection:
        connection.exec_driver_sql("update wallet.accounts set balance = 90.00 where key in ('2', '3', '4')")
    with fence_down(engine, project.settings) as connection:
        # The legacy row of 3 was damaged with its account: who is right is not for a recalculation to say.
        connection.exec_driver_sql("update users set total_coins = 90 where id = 3")
    planned = project.run("recalculate", "--all", *REASON, "--dry-run")
    assert "10 accounts, 3 balances would be set" in planned.stdout
    assert account(engine, 2) == ("mirrored", D(90), D(100))
    one = project.change("recalculate", "--account", "2")
    assert "ledger 90.00 → 100.00" in one.stdout
    said = project.change("recalculate", "--all")
    assert "10 accounts, 2 balances set" in said.stdout
    assert "walletmigrate backfill" in said.stderr
    assert [account(engine, key) for key in (2, 3, 4)] == [
        ("mirrored", D(100), D(100)),
        ("stale", D(100), D(90)),
        ("mirrored", D(100), D(100)),
    ]
    audited = rows(
        engine,
        "select details ->> 'key', details ->> 'ledger_before', details ->> 'ledger_after', reason from "
        "wallet.audit_log where action = 'recalculate' order by id",
    )
    assert audited == [(key, "90.00", "100.00", "a test") for key in ("2", "3", "4")]
    assert scalar(engine, "select count(*) from wallet.transactions where kind <> 'opening'") == 0
    assert "0 balances set" in project.change("recalculate", "--all").stdout
    assert project.run("recalculate", "--account", "99", *REASON).exit_code == 4
    assert_sound(engine, project.settings)


def test_the_operator_s_role_is_enough_and_the_application_s_is_not(made: tuple[Project, Engine]) -> None:
    project, _ = made
    settings, mapping = project.settings, project.settings.mappings[0]
    operator = engine_named(project.url, role="wallet_operator")
    truth = asked(lambda _key, _bucket, _currency: D("100.50"), "a function")
    done = reconcile(operator, settings, mapping, ACT, truth=truth, limits=Limits())
    assert done.counts["corrected"] == 10
    assert undo(operator, settings, done.run or 0, ACT).undone == 10
    assert adjust(operator, settings, mapping, ACT, "1", 5).outcome == "corrected"
    assert recalculate(operator, settings, mapping, ACT).items == ()
    for role in ("wallet_app", "wallet_auditor"):
        with engine_named(project.url, role=role).connect() as connection:
            for call in ("correct_users('{}')", "amend_users('{}', false)", "recount_users('{}')"):
                with pytest.raises(ProgrammingError, match="permission denied"):
                    connection.exec_driver_sql(f"select * from wallet.{call}")
                connection.rollback()
