"""Commands of flags: who would change, why an account is where it is, and flips on a server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import flagsmith_stub
import ledger
from commandline import REASON, Project, project_at
from flagging import audited, bare, project
from flagsmith_stub import ADMIN_KEY, ENVIRONMENT_KEY, FlagsmithStub
from walletmigrate.flags import DUAL_WRITE, ENABLE_WITHDRAWALS, READ_FROM_LEDGER, Json, leaf_conditions

__all__ = ["bare", "project"]

KEYS = {"WALLETMIGRATE_FLAGSMITH_KEY": ENVIRONMENT_KEY, "WALLETMIGRATE_FLAGSMITH_ADMIN_KEY": ADMIN_KEY}


class Served(Project):
    """A project whose flags come from a server, and whose commands have both keys."""

    def environment(self, url: str | None) -> dict[str, str]:
        return super().environment(url) | KEYS


@pytest.fixture
def flagsmith() -> Iterator[FlagsmithStub]:
    with flagsmith_stub.running() as server:
        yield server


@pytest.fixture
def served(flagsmith: FlagsmithStub, database_url: str, tmp_path: Path) -> Served:
    """A project in phase read_ledger, whose flags then come from the server: dual-write is on for everyone."""
    project_at(tmp_path, database_url, "read_ledger")
    flagsmith.project.defaults[flagsmith.flag(DUAL_WRITE)] = True
    return Served(tmp_path, database_url, flags=f'source = "flagsmith"\napi_url = "{flagsmith.api_url}"')


def explained(project: Project, account: str) -> dict[str, Any]:
    said = project.run("flags", "explain", account, "--json")
    assert said.exit_code == 0, said
    return said.document


def pocket(project: Project, account: str) -> tuple[str, str, str]:
    (found,) = explained(project, account)["pockets"]
    return found["state"], found["reads"], found["writes"]


# A dry run counts


@pytest.mark.parametrize(
    ("who", "changed"),
    [
        (("--everyone",), 10),
        (("--tenant", "acme"), 5),
        (("--cohort", "role=vip"), 2),
        (("--cohort", "tenant=nobody"), 0),
        (("--account", "7"), 1),
        (("--account", "70"), 0),
        (("--percent", "100", "--percent-of", "tenant"), 10),
    ],
)
def test_a_dry_run_counts_the_accounts_that_would_change(project: Project, who: tuple[str, ...], changed: int) -> None:
    said = project.run("flags", "set", READ_FROM_LEDGER, "on", *who, "--dry-run", "--json")
    (counted,) = said.document["flag"]["impact"]
    assert (counted["mapping"], counted["accounts"], counted["changed"]) == ("users", 10, changed)
    assert counted["flags"] == ([{"flag": READ_FROM_LEDGER, "on": changed, "off": 0}] if changed else [])
    shown = project.run("flags", "set", READ_FROM_LEDGER, "on", *who, "--dry-run").stdout
    assert f"users: {changed} of 10 accounts would change" in shown


def test_a_count_follows_what_stands_already_and_what_flags_do_to_each_other(project: Project) -> None:
    project.change("flags", "set", READ_FROM_LEDGER, "on", "--everyone")
    project.change("flags", "set", READ_FROM_LEDGER, "off", "--account", "3")

    def counted(*words: str) -> Any:
        return project.run("flags", "set", *words, "--dry-run", "--json").document["flag"]["impact"][0]

    assert counted(READ_FROM_LEDGER, "on", "--tenant", "acme")["changed"] == 0
    off = counted(DUAL_WRITE, "off", "--tenant", "acme")  # without dual-write, reads count as off
    assert off["flags"] == [{"flag": DUAL_WRITE, "on": 0, "off": 5}, {"flag": READ_FROM_LEDGER, "on": 0, "off": 4}]
    assert counted(READ_FROM_LEDGER, "remove", "--account", "3")["flags"][0]["on"] == 1


def test_a_percentage_of_accounts_is_counted_account_by_account(project: Project) -> None:
    ledger.add_users(ledger.engine_named(project.url), 11, 400)
    words = ("flags", "set", READ_FROM_LEDGER, "on", "--percent", "30")
    counted = project.run(*words, "--dry-run", "--json").document["flag"]["impact"][0]
    project.change(*words)
    keys = [str(key) for key in range(1, 401)]
    decide = project.flags.document().decide
    assert counted["changed"] == sum(decide(key, {}).read_from_ledger for key in keys)
    assert 60 < counted["changed"] < 180


def test_a_dry_run_of_a_cutover_and_of_a_rollback_counts_as_well(project: Project) -> None:
    said = project.run("cutover", "--cohort", "tenant=acme", "--dry-run")
    assert "users: 5 of 10 accounts would change (wallet.readFromLedger 5 on, 0 off)" in said.stdout
    project.change("cutover", "--everyone", "--confirm", "users")
    assert "users: 10 of 10 accounts would change" in project.run("rollback", "--dry-run").stdout


def test_a_dry_run_without_a_database_says_that_nothing_was_counted(bare: Project) -> None:
    said = bare.run("flags", "set", DUAL_WRITE, "on", "--everyone", "--dry-run")
    assert said.exit_code == 0
    assert "were not counted" in said.stderr


def test_a_trait_that_no_mapping_has_is_told(project: Project) -> None:
    said = project.run("flags", "set", DUAL_WRITE, "on", "--cohort", "plan=pro", *REASON)
    assert "no mapping has the trait plan" in said.stderr


def test_a_tenant_is_a_cohort_and_a_segment_is_named_by_its_name(project: Project) -> None:
    project.change("flags", "set", DUAL_WRITE, "off", "--tenant", "acme")
    said = project.run("flags", "set", DUAL_WRITE, "on", "--cohort", "tenant-acme", "--json", *REASON)
    assert said.document["flag"]["who"] == "segment tenant-acme"
    assert project.flags.document().decide("1", {"tenant": "acme"}).dual_write
    wrong = project.run("flags", "set", DUAL_WRITE, "on", "--cohort", "acme", *REASON)
    assert (wrong.exit_code, "there are: tenant-acme" in wrong.stderr) == (2, True)
    both = project.run("flags", "set", DUAL_WRITE, "on", "--cohort", "acme", "--tenant", "acme", *REASON)
    assert both.exit_code == 2


# An account that there is not


@pytest.mark.parametrize("account", ["abc", "4.2", "007", "9" * 30])
def test_a_flag_is_set_for_no_key_that_an_account_cannot_have(project: Project, account: str) -> None:
    stood, rows = project.flag_path.read_bytes(), audited(project)
    for more in (REASON, ("--dry-run",)):
        for switch in ("on", "off"):
            said = project.run("flags", "set", READ_FROM_LEDGER, switch, "--account", account, "--json", *more)
            assert (said.exit_code, said.document["error"]["code"]) == (2, "usage")
            assert "of mapping 'users': pass " in said.document["error"]["message"]
    assert (project.flag_path.read_bytes(), audited(project)) == (stood, rows)


def test_an_override_of_a_key_that_is_none_can_be_removed(project: Project) -> None:
    project.flags.set(READ_FROM_LEDGER, True, account="abc")
    project.change("flags", "set", READ_FROM_LEDGER, "remove", "--account", "abc")
    assert project.flags.list()[1].overrides == ()


def test_an_account_that_nobody_has_is_told_and_set(project: Project) -> None:
    said = project.run("flags", "set", READ_FROM_LEDGER, "on", "--account", "4711", *REASON)
    assert (said.exit_code, "no mapping has the account 4711 now" in said.stderr) == (0, True)
    assert audited(project)[-1][3]["who"] == "account 4711"
    assert "account" not in project.run("flags", "set", READ_FROM_LEDGER, "on", "--account", "7", *REASON).stderr
    engine = ledger.engine_named(project.url)
    ledger.execute(engine, "delete from public.users where id = 3")
    assert "no mapping" not in project.run("flags", "set", DUAL_WRITE, "off", "--account", "3", *REASON).stderr, (
        "closed"
    )


def test_a_table_that_is_away_keeps_nobody_from_switching_an_account_off(project: Project) -> None:
    ledger.execute(ledger.engine_named(project.url), "alter table public.users rename to hidden")
    said = project.run("flags", "set", READ_FROM_LEDGER, "off", "--account", "7", *REASON)
    assert (said.exit_code, "account 7 was not looked for: " in said.stderr) == (0, True), said


def test_without_a_database_an_account_is_not_looked_for_and_that_is_said(bare: Project) -> None:
    for more in (("--no-audit", *REASON), ("--dry-run",)):
        said = bare.run("flags", "set", DUAL_WRITE, "on", "--account", "abc", *more)
        assert (said.exit_code, "account abc was not looked for: there is no database" in said.stderr) == (0, True)


# The server


def test_a_flip_on_the_server_leaves_an_audit_row(served: Served, flagsmith: FlagsmithStub) -> None:
    said = served.run("flags", "set", READ_FROM_LEDGER, "on", "--tenant", "acme", "--json", *REASON)
    assert said.exit_code == 0, said
    (number,) = flagsmith.project.overrides[flagsmith.flag(READ_FROM_LEDGER)]
    assert flagsmith.project.segments[number]["name"] == "tenant-acme"
    action, actor, reason, details = audited(served)[-1]
    assert (action, actor, reason, details["who"]) == ("flags set", "tests", "a test", "tenant=acme")
    assert flagsmith.api_url in details["source"]
    assert said.document["flag"]["audit_id"]


def test_a_dry_run_against_the_server_counts_and_writes_nothing(served: Served, flagsmith: FlagsmithStub) -> None:
    rows = audited(served)
    said = served.run("flags", "set", READ_FROM_LEDGER, "on", "--tenant", "acme", "--dry-run")
    assert "users: 5 of 10 accounts would change" in said.stdout
    assert "estimate" in served.run("flags", "set", READ_FROM_LEDGER, "on", "--percent", "20", "--dry-run").stderr
    assert (flagsmith.writes, audited(served)) == ([], rows)


def test_a_cohort_is_cut_over_and_rolled_back_on_the_server(served: Served, flagsmith: FlagsmithStub) -> None:
    served.change("cutover", "--cohort", "tenant=acme", "--confirm", "users")
    assert pocket(served, "1") == ("mirrored", "ledger", "legacy and ledger")
    assert pocket(served, "2") == ("mirrored", "legacy", "legacy and ledger")
    served.change("rollback", "--cohort", "tenant=acme")
    assert pocket(served, "1") == ("mirrored", "legacy", "legacy and ledger")
    assert [row[0] for row in audited(served)[-2:]] == ["cutover", "rollback"]


def test_a_cutover_is_refused_by_what_the_server_says_of_dual_write(served: Served, flagsmith: FlagsmithStub) -> None:
    served.change("flags", "set", DUAL_WRITE, "off", "--account", "7")
    said = served.run("cutover", "--everyone", "--confirm", "users", *REASON)
    assert said.exit_code == 4
    assert "wallet.dualWrite is off for 1 accounts of users, for example 7" in said.stderr


def test_a_rollback_of_everyone_switches_the_server_and_lowers_the_phase(
    served: Served, flagsmith: FlagsmithStub
) -> None:
    served.change("cutover", "--everyone", "--confirm", "users")
    said = served.run("rollback", "--json", *REASON)
    assert (said.exit_code, said.document["phase_after"], said.document["flag_problem"]) == (0, "dual_write", None)
    assert not flagsmith.project.defaults[flagsmith.flag(READ_FROM_LEDGER)]


@pytest.mark.parametrize("fault", [{"status": 500}, {"status": 401}, {}], ids=["500", "401", "cut off"])
def test_a_rollback_of_everyone_lowers_the_phase_whatever_the_server_does(
    served: Served, flagsmith: FlagsmithStub, fault: dict[str, Any]
) -> None:
    flagsmith.fail("GET", "projects", **fault)
    said = served.run("rollback", "--json", *REASON)
    assert (said.exit_code, said.document["phase_after"]) == (0, "dual_write")
    assert "the flag was not switched" in said.stderr


def test_the_phase_is_lowered_before_the_server_is_asked(served: Served, flagsmith: FlagsmithStub) -> None:
    seen: list[Any] = []
    answer = flagsmith.document

    def document_of() -> Json:
        seen.append(ledger.scalar(ledger.engine_named(served.url), "select phase from wallet.control"))
        return answer()

    flagsmith.document = document_of  # type: ignore[method-assign]
    served.change("rollback")
    assert seen
    assert set(seen) == {"dual_write"}


@pytest.mark.parametrize(
    ("fault", "exit_code", "code"),
    [
        ({"status": 401}, 4, "flag_server_refused"),
        ({"status": 409}, 4, "flag_server_refused"),
        ({"status": 500}, 5, "flag_source_unreachable"),
    ],
)
def test_a_flip_that_the_server_refuses_is_on_record_as_failed(
    served: Served, flagsmith: FlagsmithStub, fault: dict[str, Any], exit_code: int, code: str
) -> None:
    begun = len(audited(served))
    flagsmith.fail("PATCH", "features", **fault)
    for words in (["flags", "set", DUAL_WRITE, "off", "--everyone"], ["rollback", "--cohort", "tenant=acme"]):
        said = served.run(*words, "--json", *REASON)
        assert (said.exit_code, said.document["error"]["code"]) == (exit_code, code)
        assert audited(served)[-1][3]["cause"] == said.document["error"]["message"]
    tried = [row[0] for row in audited(served)[begun:]]
    assert tried == ["flags set", "flags set failed", "rollback", "rollback failed"]


def test_a_change_that_stops_in_the_midst_is_on_record_with_what_is_left(
    served: Served, flagsmith: FlagsmithStub
) -> None:
    served.change("flags", "set", READ_FROM_LEDGER, "on", "--tenant", "acme")
    served.change("flags", "set", READ_FROM_LEDGER, "on", "--everyone")
    flagsmith.fail("DELETE", "segment-overrides", status=403)
    said = served.run("flags", "set", READ_FROM_LEDGER, "off", "--everyone", "--json", *REASON)
    assert (said.exit_code, said.document["error"]["code"]) == (1, "flag_change_incomplete")
    (intended, stopped) = audited(served)[-2:]
    assert (intended[0], stopped[0]) == ("flags set", "flags set incomplete")
    assert stopped[3]["done"] == [f"switch {READ_FROM_LEDGER} off for everyone, off for tenant-acme"]
    assert stopped[3]["left"] == [f"end the override of {READ_FROM_LEDGER} for tenant-acme"]


def test_no_flip_without_an_audit_row_on_the_server(served: Served, flagsmith: FlagsmithStub) -> None:
    ledger.execute(ledger.engine_named(served.url), "alter table wallet.audit_log rename to hidden")
    assert served.run("flags", "set", DUAL_WRITE, "off", "--everyone", *REASON).exit_code != 0
    assert flagsmith.writes == []


def test_check_tries_the_admin_key_and_says_whether_flags_can_be_switched(
    served: Served, flagsmith: FlagsmithStub
) -> None:
    assert served.run("flags", "check", "--json").document["writable"]
    assert "only read" in served.run("flags", "check", env={"WALLETMIGRATE_FLAGSMITH_ADMIN_KEY": ""}).stdout
    assert served.run("flags", "check", env={"WALLETMIGRATE_FLAGSMITH_ADMIN_KEY": "wrong"}).exit_code == 4
    flagsmith.project.features[31] = "wallet.dualwrite"
    assert "must be spelt wallet.dualWrite" in served.run("flags", "check").stderr
    flagsmith.fail("GET", "environment-document", status=502)
    assert served.run("flags", "check").exit_code == 5


def test_a_condition_on_the_server_that_cannot_be_evaluated_is_refused_and_nothing_is_written(
    served: Served, flagsmith: FlagsmithStub
) -> None:
    served.change("flags", "set", READ_FROM_LEDGER, "on", "--tenant", "acme")
    (number,) = flagsmith.project.overrides[flagsmith.flag(READ_FROM_LEDGER)]
    (condition,) = leaf_conditions(flagsmith.project.segments[number]["rules"])
    condition.update(operator="REGEX", value="(")
    written = list(flagsmith.writes)
    for words in (["check"], ["list"], ["set", DUAL_WRITE, "off", "--everyone", *REASON]):
        said = served.run("flags", *words, "--json")
        assert (said.exit_code, said.document["error"]["code"]) == (2, "flag_document"), said
        assert "(segment tenant-acme): Flagsmith's engine cannot evaluate tenant REGEX '('" in said.stderr
    assert flagsmith.writes == written


def test_no_command_shows_a_key(served: Served, flagsmith: FlagsmithStub) -> None:
    flagsmith.fail("PATCH", "features", status=400)
    for words in (["flags", "check"], ["flags", "set", DUAL_WRITE, "off", "--everyone", *REASON], ["flags", "list"]):
        for form in ([], ["--json"]):
            said = served.run(*words, *form)
            assert ADMIN_KEY not in said.stdout + said.stderr
            assert ENVIRONMENT_KEY not in said.stdout + said.stderr


# Explain


def test_explain_says_where_each_flag_came_from(project: Project) -> None:
    project.change("flags", "set", READ_FROM_LEDGER, "on", "--tenant", "acme")
    project.change("flags", "set", ENABLE_WITHDRAWALS, "on", "--percent", "100")
    project.change("flags", "set", DUAL_WRITE, "off", "--account", "9")
    flags = {flag["flag"]: flag for flag in explained(project, "1")["flags"]}
    assert flags[DUAL_WRITE]["cause"] == "what everyone has"
    assert flags[READ_FROM_LEDGER]["cause"] == "segment tenant-acme (tenant=acme)"
    assert flags[ENABLE_WITHDRAWALS]["cause"] == "segment percent-of-accounts (100 %)"
    assert [flag["heard"] for flag in flags.values()] == [True, True, False]
    assert flags[ENABLE_WITHDRAWALS]["why_not"] == "the phase is read_ledger, and lets it count from wallet_only on"
    nine = {flag["flag"]: flag for flag in explained(project, "9")["flags"]}
    assert (nine[DUAL_WRITE]["on"], nine[DUAL_WRITE]["cause"]) == (False, "the override of account 9")
    assert "without it this counts as off" in nine[READ_FROM_LEDGER]["why_not"]


def test_explain_reads_as_a_sentence(project: Project) -> None:
    project.change("cutover", "--cohort", "tenant=acme", "--confirm", "users")
    said = project.run("flags", "explain", "1").stdout
    assert "account 1 of users: tenant=acme, role=member" in said
    assert "phase read_ledger, the line runs; flags from file" in said
    assert "  cash, EUR: mirrored; legacy 100.00, ledger 100.00" in said
    assert "reads: ledger, because wallet.readFromLedger is on, and the account is mirrored" in said
    assert "writes: legacy and ledger, because wallet.dualWrite is on, and the account is mirrored" in said


def test_explain_follows_the_state_of_the_account(project: Project) -> None:
    engine = ledger.engine_named(project.url)
    project.change("flags", "set", READ_FROM_LEDGER, "on", "--everyone")
    ledger.add_users(engine, 11, 11)
    ledger.execute(engine, "update public.users set total_coins = 7 where id = 2")
    ledger.execute(engine, "delete from public.users where id = 3")
    assert pocket(project, "1") == ("mirrored", "ledger", "legacy and ledger")
    assert pocket(project, "11") == ("absent", "legacy", "legacy and ledger")
    assert pocket(project, "2") == ("stale", "legacy", "legacy and ledger")
    assert pocket(project, "3") == ("closed", "nothing", "nothing")
    project.change("stop-the-line")
    assert pocket(project, "1") == ("mirrored", "ledger", "legacy")
    assert "the line is stopped; the account turns stale" in project.run("flags", "explain", "1").stdout
    project.change("resume")
    project.change("rollback")
    assert pocket(project, "1") == ("mirrored", "legacy", "legacy and ledger")
    project.change("phase", "back")
    assert pocket(project, "1") == ("mirrored", "legacy", "legacy")
    assert "the phase is legacy, and lets it count from dual_write on" in project.run("flags", "explain", "1").stdout


def test_explain_says_of_a_frozen_account_that_flags_do_not_matter(database_url: str, tmp_path: Path) -> None:
    project, engine = project_at(tmp_path, database_url, "frozen")
    project.change("flags", "set", DUAL_WRITE, "off", "--everyone")
    assert pocket(project, "1") == ("frozen", "ledger", "ledger")
    ledger.add_users(engine, 11, 11)
    assert pocket(project, "11") == ("absent", "legacy", "legacy")
    project.change("flags", "set", DUAL_WRITE, "on", "--everyone")
    assert pocket(project, "11") == ("absent", "legacy", "ledger")


def test_explain_before_an_install_and_of_nobody(project: Project, database_url: str) -> None:
    said = project.run("flags", "explain", "4711")
    assert (said.exit_code, "4711" in said.stderr) == (2, True)
    assert project.run("flags", "explain", "not-a-number").exit_code == 2
    project.change("rollback")
    project.change("phase", "back")
    project.change("uninstall", "--confirm", "users", "--drop-ledger")
    assert pocket(project, "1") == ("absent", "legacy", "legacy")
    assert "the ledger is not installed" in project.run("flags", "explain", "1").stdout


@pytest.mark.parametrize(("document", "code"), [("{", 2), ("{}", 2), (None, 5)])
def test_explain_does_not_take_flags_that_it_cannot_read_for_off(
    project: Project, document: str | None, code: int
) -> None:
    if document is None:
        project.flag_path.unlink()
    else:
        project.flag_path.write_text(document, encoding="utf-8")
    said = project.run("flags", "explain", "1", "--json")
    assert said.exit_code == code
    assert "error" in said.document
    assert "environment.json" in said.stderr


def test_explain_tells_the_same_as_the_adapter_does(project: Project) -> None:
    """What is explained for a write is what a posting then does."""
    engine = ledger.engine_named(project.url)
    project.change("flags", "set", DUAL_WRITE, "off", "--tenant", "globex")
    settings = project.settings
    for account, dual in (("1", True), ("2", False)):
        _, _, writes = pocket(project, account)
        with engine.begin() as connection:
            ledger.post(connection, settings, "credit", account, "1.00", dual=dual)
        kinds = ledger.scalar(
            engine,
            "select count(*) from wallet.transactions as t inner join wallet.accounts as a "
            "on a.id in (t.debit_account, t.credit_account) where a.key = :key and t.kind = 'posting'",
            key=account,
        )
        assert (writes == "legacy and ledger") is (kinds > 0)
