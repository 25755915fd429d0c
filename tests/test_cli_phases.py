"""The commands that move a migration, from the first step to the last and back."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, text

import ledger
from commandline import REASON, Project, engine_of, everything, project_at
from walletmigrate.flag_sources import FileSource
from walletmigrate.flags import Decision


@pytest.fixture
def reading(database_url: str, tmp_path: Path) -> Project:
    """A project in phase read_ledger."""
    return project_at(tmp_path, database_url, "read_ledger")[0]


def phase(project: Project) -> str:
    return str(project.run("phase", "show", "--json").document["phase"])


def decision(project: Project, tenant: str) -> Decision:
    return FileSource(project.flag_path).snapshot().decide("1", {"tenant": tenant, "role": "member"})


def test_a_migration_walks_forward_to_frozen_and_back_to_legacy(database_url: str, tmp_path: Path) -> None:
    engine, _ = ledger.install_users(database_url, rows=12)
    project = Project(tmp_path, database_url)
    walked = []
    for words in (
        "phase advance",
        "flags set wallet.dualWrite on --everyone",
        "backfill",
        "verify",
        "rollback --exercise",
        "phase advance",
        "cutover --cohort tenant=acme --confirm users",
        "cutover --everyone --confirm users",
        "phase advance",
        "verify",
        "rollback --exercise",
        "freeze --confirm users",
        "unfreeze --confirm users",
        "verify",
        "rollback",
        "phase back",
        "uninstall --confirm users",
    ):
        project.change(*words.split())
        walked.append(phase(project))
    assert list(dict.fromkeys(walked)) == ["dual_write", "read_ledger", "wallet_only", "frozen", "legacy"]
    assert walked[-5:] == ["wallet_only", "wallet_only", "dual_write", "legacy", "legacy"]
    assert ledger.rows(engine, "select distinct total_coins from public.users") == [(100,)]
    actors = ledger.rows(engine, "select distinct actor, reason from wallet.audit_log where actor = 'tests'")
    assert ("tests", "a test") in actors


def test_phase_show_says_why_the_way_is_closed_and_how_to_open_it(database_url: str, tmp_path: Path) -> None:
    ledger.install_users(database_url)
    project = Project(tmp_path, database_url, window="7d")
    project.change("phase", "advance")
    said = project.run("phase", "show")
    assert said.exit_code == 0
    assert "dual_write since 20" in said.stdout
    assert "the way to read_ledger is closed:" in said.stdout
    assert "    → walletmigrate backfill --mapping users --reason '…'" in said.stdout
    document = project.run("phase", "show", "--json").document
    assert (document["next"], document["previous"], document["line_running"]) == ("read_ledger", "legacy", True)
    assert {"what", "mend"} == set(document["reasons"][0])


def test_a_refused_step_ends_with_4_and_all_reasons_in_the_document(database_url: str, tmp_path: Path) -> None:
    ledger.install_users(database_url)
    project = Project(tmp_path, database_url, window="7d")
    project.change("phase", "advance")
    said = project.run("phase", "advance", "--json", *REASON)
    assert said.exit_code == 4
    fields = said.document["error"]["fields"]
    assert fields["step"] == "phase read_ledger"
    assert len(fields["reasons"]) == 5
    assert phase(project) == "dual_write"


def test_each_command_changes_nothing_in_a_dry_run_and_needs_no_reason(reading: Project) -> None:
    for words, code in {
        "install": 0,
        "uninstall": 4,
        "phase advance": 4,
        "phase back": 0,
        "cutover --cohort tenant=acme": 0,
        "cutover --everyone": 0,
        "rollback": 0,
        "rollback --exercise": 0,
        "rollback --cohort tenant=acme": 0,
        "stop-the-line": 0,
        "resume": 0,
        "backfill": 0,
        "verify": 0,
        "freeze": 4,
        "unfreeze": 0,
        "flags set wallet.enableWithdrawals on --everyone": 0,
    }.items():
        before = everything(reading)
        said = reading.run(*words.split(), "--dry-run", "--json")
        assert said.exit_code == code, (words, said)
        assert everything(reading) == before, words


def test_a_dry_run_of_freeze_tells_what_it_would_do(database_url: str, tmp_path: Path) -> None:
    project, engine = project_at(tmp_path, database_url, "wallet_only")
    project.change("rollback", "--exercise")
    before = everything(project)
    said = project.run("freeze", "--dry-run", "--json")
    assert said.exit_code == 0, said
    assert (said.document["phase"]["after"], said.document["mappings"][0]["changed"]) == ("frozen", 10)
    assert everything(project) == before
    assert ledger.scalar(engine, "select phase from wallet.control") == "wallet_only"


def test_cutover_reads_a_cohort_from_the_ledger_and_rollback_takes_it_back(reading: Project) -> None:
    said = reading.run("cutover", "--cohort", "tenant=acme", "--confirm", "users", "--json", *REASON)
    assert said.exit_code == 0
    assert said.document["flag"]["who"] == "tenant=acme"
    assert decision(reading, "acme").read_from_ledger
    assert not decision(reading, "globex").read_from_ledger
    reading.change("rollback", "--cohort", "tenant=acme")
    assert not decision(reading, "acme").read_from_ledger
    assert phase(reading) == "read_ledger"


def test_cutover_of_everyone_says_who_stays_out(reading: Project) -> None:
    reading.change("rollback", "--cohort", "tenant=acme")
    said = reading.change("cutover", "--everyone", "--confirm", "users")
    assert "still off for tenant=acme" in said.stderr
    assert decision(reading, "globex").read_from_ledger
    assert not decision(reading, "acme").read_from_ledger


def test_rollback_never_asks_and_takes_everyone_by_default(reading: Project) -> None:
    reading.change("cutover", "--everyone", "--confirm", "users")
    said = reading.run("rollback", "--json", *REASON)
    assert (said.exit_code, said.document["phase_after"]) == (0, "dual_write")
    assert not decision(reading, "acme").read_from_ledger
    assert reading.run("rollback", "--json", *REASON).document["changed"] is False


def test_rollback_goes_through_with_a_broken_flag_file_and_says_so(reading: Project) -> None:
    reading.flag_path.write_text("{")
    said = reading.run("rollback", *REASON)
    assert said.exit_code == 0
    assert "the flag was not switched" in said.stderr
    assert phase(reading) == "dual_write"


def test_a_drifted_account_is_found_by_verify_and_stops_the_cutover(reading: Project) -> None:
    engine = engine_of(reading)
    with ledger.unguarded(engine, "public.users") as connection:
        connection.execute(text("update public.users set total_coins = 97.50 where id = 3"))
    said = reading.run("verify", "--json")
    assert said.exit_code == 3
    assert said.document["clean"] is False
    (found,) = said.document["mappings"][0]["drift"]
    assert (found["key"], found["legacy"], found["ledger"]) == ("3", "97.50", "100.00")
    refused = reading.run("cutover", "--cohort", "tenant=acme", "--confirm", "users", *REASON)
    assert refused.exit_code == 4
    assert "differ in 1 accounts, for example 3" in refused.stderr
    shown = reading.run("verify")
    assert "users: NOT CLEAN" in shown.stdout
    assert "3 (cash, EUR): legacy 97.50, ledger 100.00" in shown.stdout
    assert "runbooks/balance-drift.md" in shown.stderr


def test_verify_turns_stale_what_differs_and_names_what_is_behind(reading: Project) -> None:
    engine = engine_of(reading)
    with ledger.unguarded(engine, "public.users") as connection:
        connection.execute(text("update public.users set total_coins = 97.50 where id in (3, 4)"))
    assert reading.run("verify", "--mark-stale").exit_code == 2
    wanted = reading.run("verify", "--mark-stale", "--dry-run")
    assert wanted.exit_code == 3
    assert "  would be turned stale: 2 accounts" in wanted.stdout
    assert "next:" not in wanted.stderr
    said = reading.run("verify", "--mark-stale", "--json", *REASON)
    assert (said.exit_code, said.document["mappings"][0]["turned_stale"]) == (3, 2)
    ledger.add_users(engine, 11, 40)
    shown = reading.run("verify").stdout.splitlines()
    begin = shown.index("  behind: 30 missing, 2 stale") + 1
    assert [line.split()[0] for line in shown[begin : begin + 20]] == [*map(str, range(11, 30)), "3"]
    assert shown[begin] == "    11 (cash, EUR): absent"
    assert shown[begin + 19 : begin + 21] == [
        "    3 (cash, EUR): stale",
        "  … 32 accounts behind in all; --json lists them",
    ]


def test_a_flip_says_what_was_done(reading: Project) -> None:
    def first(*words: str) -> str:
        return reading.change(*words).stdout.splitlines()[0].partition(";")[0]

    cohort = ("--cohort", "tenant=acme")
    flag = "wallet.readFromLedger for"
    assert first("cutover", *cohort, "--confirm", "users", "--dry-run") == f"{flag} tenant=acme would be on"
    assert first("cutover", *cohort, "--confirm", "users") == f"{flag} tenant=acme is on"
    assert first("rollback", *cohort, "--dry-run") == f"{flag} tenant=acme would be off"
    assert first("rollback", *cohort) == f"{flag} tenant=acme is off"
    remove = ("flags", "set", "wallet.readFromLedger", "remove", *cohort)
    assert first(*remove, "--dry-run") == f"{flag} tenant=acme: override would be removed"
    assert first(*remove) == f"{flag} tenant=acme: override removed"
    assert first(*remove) == f"{flag} tenant=acme: nothing to change"
    assert first("flags", "set", "wallet.readFromLedger", "on", "--everyone") == f"{flag} everyone is on"
    assert first("flags", "set", "wallet.readFromLedger", "off", "--everyone") == f"{flag} everyone is off"
    assert first("flags", "set", "wallet.readFromLedger", "on", "--account", "7") == f"{flag} account 7 is on"
    percent = ("flags", "set", "wallet.dualWrite", "on", "--percent")
    assert first(*percent, "10") == "wallet.dualWrite for 10 % is on"
    assert first(*percent, "20") == "wallet.dualWrite for 20 % is on"


def test_verify_gives_totals_per_tenant_and_role(reading: Project) -> None:
    document = reading.run("verify", "--json").document["mappings"][0]
    totals = {(one["trait"], one["value"]): one["legacy"] for one in document["totals"]}
    assert totals == {
        ("tenant", "acme"): "500.00",
        ("tenant", "globex"): "500.00",
        ("role", "member"): "800.00",
        ("role", "vip"): "200.00",
    }
    assert document["legacy_total"] == document["ledger_total"] == {"EUR": "1000.00"}


def test_freeze_makes_the_column_reject_writes_and_unfreeze_gives_it_back(database_url: str, tmp_path: Path) -> None:
    project, engine = project_at(tmp_path, database_url, "wallet_only")
    project.change("rollback", "--exercise")
    said = project.run("freeze", "--confirm", "users", "--json", *REASON)
    assert said.exit_code == 0, said
    assert (said.document["phase"]["after"], said.document["mappings"][0]["changed"]) == ("frozen", 10)
    with pytest.raises(Exception, match="is frozen"):
        ledger.execute(engine, "update public.users set total_coins = 1 where id = 3")
    with engine.begin() as connection:
        assert ledger.post(connection, project.settings, "credit", 3, 5)["mode"] == "ledger"
    assert project.run("freeze", "--confirm", "users", *REASON).exit_code == 0
    assert project.run("phase", "back", *REASON).exit_code == 4
    said = project.run("unfreeze", "--confirm", "users", "--json", *REASON)
    assert (said.exit_code, said.document["mappings"][0]["changed"]) == (0, 10)
    assert ledger.scalar(engine, "select total_coins from public.users where id = 3") == 105
    assert project.run("verify").exit_code == 0


def test_unfreeze_ends_with_4_while_accounts_stay_frozen(database_url: str, tmp_path: Path) -> None:
    project, engine = project_at(tmp_path, database_url, "frozen")
    with engine.begin() as connection:
        ledger.post(connection, project.settings, "credit", 3, 5)
    ledger.execute(engine, "alter table public.users add constraint low check (total_coins <= 100)")
    said = project.run("unfreeze", "--confirm", "users", *REASON)
    assert (said.exit_code, "1 accounts stay frozen" in said.stderr) == (4, True)
    assert ledger.rows(engine, "select key from wallet.accounts where state = 'frozen'") == [("3",)]
    ledger.execute(engine, "alter table public.users drop constraint low")
    assert project.run("unfreeze", "--confirm", "users", *REASON).exit_code == 0
    assert ledger.scalar(engine, "select total_coins from public.users where id = 3") == 105


def test_freeze_ends_with_4_while_accounts_are_refused_and_goes_on_after_a_backfill(
    database_url: str, tmp_path: Path
) -> None:
    project, engine = project_at(tmp_path, database_url, "wallet_only")
    ledger.set_phase(engine, "frozen")
    ledger.execute(engine, "update public.users set total_coins = 1 where id = 3")
    said = project.run("freeze", "--confirm", "users", "--json", *REASON)
    assert (said.exit_code, said.document["mappings"][0]["refused"]) == (4, 1)
    assert "walletmigrate backfill" in said.stderr
    project.change("backfill")
    project.change("freeze", "--confirm", "users")
    assert ledger.scalar(engine, "select count(*) from wallet.accounts where state = 'frozen'") == 10


def test_backfill_ends_with_4_for_values_that_are_no_exact_amounts(database_url: str, tmp_path: Path) -> None:
    engine, _ = ledger.install_users(database_url)
    project = Project(tmp_path, database_url)
    project.change("phase", "advance")
    ledger.execute(engine, "update public.users set total_coins = 'NaN' where id = 3")
    said = project.run("backfill", "--json", *REASON)
    assert (said.exit_code, said.document["mappings"][0]["failed"]) == (4, 1)
    assert "install --dry-run" in said.stderr


def test_the_line_is_stopped_and_resumed_on_record(reading: Project) -> None:
    engine = engine_of(reading)
    said = reading.run("stop-the-line", "--json", *REASON)
    assert (said.exit_code, said.document["line_running"], said.document["changed"]) == (0, False, True)
    with engine.begin() as connection:
        assert ledger.post(connection, reading.settings, "credit", 3, 5)["mode"] == "legacy"
    assert reading.run("stop-the-line", "--json", *REASON).document["changed"] is False
    assert "line: STOPPED" in reading.run("status").stdout
    reading.change("resume")
    with engine.begin() as connection:
        assert ledger.post(connection, reading.settings, "credit", 3, 5)["mode"] == "dual_write"
    actions = ledger.rows(engine, "select action from wallet.audit_log order by id desc limit 2")
    assert actions == [("resume",), ("stop-the-line",)]


def test_status_names_phase_flags_accounts_and_the_next_command(reading: Project) -> None:
    shown = reading.run("status").stdout
    for line in (
        "line: runs",
        "  wallet.dualWrite: on for everyone",
        "accounts: 0 absent, 10 mirrored, 0 stale, 0 frozen, 0 closed; 0 drifted",
        "the way to wallet_only is closed:",
        "next: walletmigrate cutover --everyone --confirm users --reason '…'",
    ):
        assert line in shown.splitlines()
    document = reading.run("status", "--json").document
    assert (document["phase"], document["accounts"]["mirrored"]) == ("read_ledger", 10)
    assert document["next_command"] in shown


@pytest.fixture
def blocked(database_url: str, tmp_path: Path) -> Iterator[tuple[Project, Engine, threading.Event]]:
    """A project in phase dual_write; another transaction holds row 25 of 40 until the event is set."""
    engine, _ = ledger.install_users(database_url, rows=40)
    project = Project(tmp_path, database_url)
    project.change("phase", "advance")
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with engine.begin() as connection:
            connection.execute(text("select 1 from public.users where id = 25 for update"))
            held.set()
            release.wait(60)

    worker = threading.Thread(target=hold)
    worker.start()
    held.wait(60)
    yield project, engine, release
    release.set()
    worker.join()


def wait_until_it_waits(engine: Engine, process: Any) -> None:
    """Wait until a backfill waits for the held row: its batches before that one are committed."""
    query = (
        "select count(*) from pg_stat_activity where application_name = 'walletmigrate backfill' "
        "and wait_event_type = 'Lock'"
    )
    while not ledger.scalar(engine, query):
        assert process.poll() is None


def test_ctrl_c_leaves_a_checkpoint_says_how_to_go_on_and_ends_with_130(
    blocked: tuple[Project, Engine, threading.Event],
) -> None:
    project, engine, release = blocked
    process = project.start("backfill", "--batch-size", "10", "--json", *REASON)
    wait_until_it_waits(engine, process)
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    assert "stopping after this batch" in process.stderr.readline()
    release.set()
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert '"interrupted": true' in stdout
    assert "run the same command again" in stderr
    assert ledger.rows(engine, "select state, items_done from wallet.jobs") == [("paused", 30)]
    said = project.run("backfill", "--json", *REASON)
    (done,) = said.document["mappings"]
    assert (said.exit_code, done["resumed"], done["opened"], done["state"]) == (0, True, 40, "done")
    assert ledger.scalar(engine, "select count(*) from wallet.transactions where kind = 'opening'") == 40
    assert project.run("verify").exit_code == 0


def test_a_second_ctrl_c_stops_in_the_midst_and_the_batch_is_undone(
    blocked: tuple[Project, Engine, threading.Event],
) -> None:
    project, engine, release = blocked
    process = project.start("backfill", "--batch-size", "10", "--json", *REASON)
    wait_until_it_waits(engine, process)
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    assert "once more to stop at once" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert '"code": "interrupted"' in stdout
    assert "the same command goes on" in stderr
    assert ledger.rows(engine, "select state, items_done from wallet.jobs") == [("paused", 20)]
    release.set()
    assert project.run("backfill", *REASON).exit_code == 0
    assert ledger.scalar(engine, "select count(*) from wallet.transactions where kind = 'opening'") == 40


def test_every_connection_names_its_command_and_limits_its_waits(
    blocked: tuple[Project, Engine, threading.Event],
) -> None:
    project, engine, release = blocked
    ledger.execute(
        engine,
        "create table public.seen as select current_setting('application_name') as name, "
        "current_setting('lock_timeout') as waits, current_setting('statement_timeout') as runs",
    )
    ledger.execute(engine, "truncate public.seen")
    ledger.execute(
        engine,
        "create function public.see() returns trigger language plpgsql as $$ begin insert into public.seen values "
        "(current_setting('application_name'), current_setting('lock_timeout'), "
        "current_setting('statement_timeout')); return null; end $$",
    )
    ledger.execute(
        engine,
        "create trigger see after insert on wallet.audit_log for each statement execute function public.see()",
    )
    release.set()
    for words in (
        "backfill",
        "verify",
        "rollback --exercise",
        "stop-the-line",
        "flags set wallet.dualWrite on --everyone",
    ):
        project.change(*words.split())
    names = {f"walletmigrate {name}" for name in ("backfill", "verify", "rollback", "stop-the-line", "flags set")}
    assert {row[0] for row in ledger.rows(engine, "select name from public.seen")} == names
    assert ledger.rows(engine, "select distinct waits, runs from public.seen") == [("5s", "5min")]
