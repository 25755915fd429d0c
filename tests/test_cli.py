"""The command line: exit codes, the one JSON document, secrets, reasons and actors, and wrong usage."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import make_url
from typer.main import get_command

import ledger
import walletmigrate.rehearse
from commandline import REASON, SECRET, Project, app, bare, engine_of, everything, project
from walletmigrate import cli_jobs, commands, console
from walletmigrate.console import Answer
from walletmigrate.errors import UnreadableInput
from walletmigrate.freeze import FreezeResult
from walletmigrate.invocation import Run
from walletmigrate.rehearsal_report import Report

__all__ = ["bare", "project"]

CONFIGURED = (
    "install",
    "uninstall",
    "phase show",
    "phase advance",
    "phase back",
    "cutover --everyone",
    "rollback",
    "stop-the-line",
    "resume",
    "backfill",
    "verify",
    "freeze",
    "unfreeze",
    "status",
    "flags list",
    "flags set wallet.dualWrite on --everyone",
    "exporter",
)
CHANGING = tuple(one for one in CONFIGURED if one not in ("phase show", "verify", "status", "flags list", "exporter"))
NEEDS_DATABASE = tuple(one for one in CONFIGURED if one not in ("flags list", "exporter"))


@pytest.mark.parametrize("words", CONFIGURED)
def test_a_missing_configuration_ends_with_2_and_one_json_document(tmp_path: Path, words: str) -> None:
    said = Project(tmp_path, "").run(*words.split(), "--json", "--config", str(tmp_path / "none.toml"), *reason(words))
    assert said.exit_code == 2
    document = said.document
    assert document["schema_version"] == 1
    assert document["command"] == " ".join(re.findall(r"^[a-z-]+(?: (?:show|advance|back|list|set))?", words))
    assert document["error"]["code"] == "config"
    assert document["error"]["fields"]["file"] == str(tmp_path / "none.toml")
    assert "walletmigrate init" in said.stderr


@pytest.mark.parametrize("words", NEEDS_DATABASE)
def test_an_unreachable_database_ends_with_5_and_never_shows_the_password(bare: Project, words: str) -> None:
    plain = bare.run(*words.split(), *reason(words))
    said = bare.run(*words.split(), *reason(words), "--json")
    for one in (plain, said):
        assert one.exit_code == 5, one
        assert "cannot be reached" in one.stderr
        assert "postgresql://bob:***@127.0.0.1" in one.stderr
        assert SECRET not in one.stdout + one.stderr
        assert "s3cret" not in one.stdout + one.stderr
    assert said.document["error"]["code"] == "database_unreachable"


def test_the_password_stays_out_of_a_refused_login(bare: Project, project: Project) -> None:
    url = make_url(project.url).set(username="nobody_of_that_name", password=SECRET)
    said = project.run("status", "--json", url=url.render_as_string(hide_password=False))
    assert said.exit_code == 5
    assert "nobody_of_that_name" in said.stderr
    assert "s3cret" not in said.stdout + said.stderr


def test_an_unreadable_url_is_not_quoted(project: Project) -> None:
    said = project.run("status", "--json", url=f"postgresql://bob:{SECRET}@host:notaport/app")
    assert said.exit_code == 2
    assert "s3cret" not in said.stdout + said.stderr


def test_a_secret_in_the_configuration_is_refused_without_being_quoted(project: Project) -> None:
    text = project.config.read_text(encoding="utf-8")
    project.config.write_text(f'database_url = "postgresql://bob:{SECRET}@h/app"\n{text}', encoding="utf-8")
    said = project.run("status", "--json", url="")
    assert said.exit_code == 2
    assert "s3cret" not in said.stdout + said.stderr


def test_a_change_without_a_reason_is_refused_and_changes_nothing(project: Project) -> None:
    before = everything(project)
    for words in CHANGING:
        said = project.run(*words.split(), "--json", "--confirm" if confirms(words) else "--actor", "users")
        assert said.exit_code == 2, words
        assert said.document["error"]["code"] == "usage"
        assert "--reason" in said.document["error"]["message"]
    assert everything(project) == before


def test_an_empty_reason_is_none(project: Project) -> None:
    assert project.run("phase", "advance", "--reason", "  ").exit_code == 2


def test_the_actor_is_the_option_else_the_variable_else_the_user(project: Project) -> None:
    def actor_of(*words: str, actor: str) -> str:
        said = project.run("phase", *words, *REASON, env={"WALLETMIGRATE_ACTOR": actor})
        assert said.exit_code == 0, said
        query = "select actor from wallet.audit_log order by id desc limit 1"
        return str(ledger.scalar(engine_of(project), query))

    assert actor_of("advance", "--actor", "admin:7", actor="ci") == "admin:7"
    assert actor_of("back", actor="ci") == "ci"
    assert re.fullmatch(r"user:\S+", actor_of("advance", actor=""))


WRONG = (
    "phase advnace",
    "flags set wallet.dualWrite maybe --everyone",
    "flags set",
    "backfill --batch-size 0",
    "cutover",
    "cutover --cohort tenant",
    "cutover --cohort tenant=acme --everyone",
    "rollback --cohort tenant=acme --everyone",
    "flags set wallet.dualwrite on --everyone",
    "flags set wallet.dualWrite on",
    "flags set wallet.dualWrite on --percent 0",
    "phase advance --to nowhere",
    "status --nonsense",
)


def test_wrong_usage_ends_with_2_and_changes_nothing(project: Project) -> None:
    before = everything(project)
    for words in WRONG:
        said = project.run(*words.split(), "--json", *(() if words.startswith("status") else REASON))
        assert said.exit_code == 2, (words, said)
        assert said.document["error"]["code"] == "usage"
        assert said.document["error"]["message"]
        assert said.stderr.startswith("error: ")
    assert everything(project) == before


@pytest.mark.parametrize(
    "words", ["verify", "capture mode stale --reason r", "capture mode stale --reason r --dry-run"]
)
def test_an_unknown_mapping_is_named_with_those_there_are(project: Project, words: str) -> None:
    said = project.run(*words.split(), "--mapping", "nobody", "--json")
    assert said.exit_code == 2
    assert said.document["error"]["message"] == "no mapping 'nobody'; the configuration has users"


def test_options_that_all_commands_take_stand_before_or_after_the_name(project: Project) -> None:
    before = project.run("--json", "phase", "show")
    assert before.document == project.run("phase", "show", "--json").document
    assert before.document["phase"] == "legacy"


def test_without_a_command_the_help_goes_to_stderr(bare: Project) -> None:
    said = bare.run()
    assert (said.exit_code, said.stdout) == (2, "")
    assert "cutover" in said.stderr
    assert bare.run("--help").exit_code == 0


def test_every_command_says_what_it_does() -> None:
    def walk(command: Any, name: str) -> Iterator[tuple[str, str]]:
        for sub, found in getattr(command, "commands", {}).items():
            yield from walk(found, f"{name} {sub}")
            yield f"{name} {sub}", found.help or ""

    told = dict(walk(get_command(app), "walletmigrate"))
    assert len(told) > 20  # which they are, the documentation is tested for
    assert [name for name, help_text in told.items() if not help_text.strip()] == []


def test_an_error_that_nobody_foresaw_still_ends_with_one_document(project: Project) -> None:
    ledger.execute(engine_of(project), "alter table wallet.audit_log rename to hidden")
    said = project.run("phase", "advance", "--json", *REASON)
    assert said.exit_code == 4
    assert said.document["error"]["code"] == "not_installed"
    ledger.execute(engine_of(project), "alter table wallet.hidden rename to audit_log")
    ledger.execute(engine_of(project), "alter table wallet.audit_log add check (actor <> 'nobody')")
    said = project.run("phase", "advance", "--json", "--actor", "nobody", *REASON)
    assert said.exit_code == 1
    assert said.document["error"]["fields"]["sqlstate"] == "23514"


def test_a_role_that_may_not_is_told_which_one_may(project: Project) -> None:
    engine = engine_of(project)
    name = f"intruder_{os.getpid()}"
    ledger.execute(engine, f"create role {name} login")
    try:
        url = make_url(project.url).set(username=name).render_as_string(hide_password=False)
        said = project.run("phase", "show", "--json", url=url)
    finally:
        ledger.execute(engine, f"drop role {name}")
    assert said.exit_code == 4
    assert said.document["error"]["fields"] == {
        "command": "phase show",
        "role": name,
        "needs": "wallet_auditor",
        "member": False,
        "detail": "permission denied for schema wallet",
    }
    assert f"grant wallet_auditor to {name}" in said.stderr


def test_rehearse_passes_its_options_on_and_ends_with_3_if_it_fails(
    bare: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}

    def rehearse(transactions: Path | None, **options: Any) -> Report:
        given.update(options, transactions=transactions)
        zero = Decimal(0)
        return Report("fail", 1, 2, 2, 0, 1, Decimal("1.50"), zero, zero, zero, (), "18.4", ())

    monkeypatch.setattr(walletmigrate.rehearse, "rehearse", rehearse)
    words = "rehearse --transactions t.csv --workers 3 --seed 7 --flag-lag 0.5 --report r.json --balances b.csv --json"
    said = bare.run(*words.split(), "--metrics-port", "9464")
    assert said.exit_code == 3
    assert (said.document["verdict"], said.document["drift_amount"]) == ("fail", "1.50")
    assert given == {
        "transactions": Path("t.csv"),
        "workers": 3,
        "seed": 7,
        "report": Path("r.json"),
        "balances": Path("b.csv"),
        "database_url": bare.url,
        "progress": False,
        "flag_lag": 0.5,
        "metrics_port": 9464,
    }


def test_unreadable_transactions_are_listed_by_line_and_end_with_2(
    bare: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rehearse(*_: Any, **__: Any) -> Report:
        raise UnreadableInput("t.csv", [(7, "amount 'x' is no number")])

    monkeypatch.setattr(walletmigrate.rehearse, "rehearse", rehearse)
    said = bare.run("rehearse", "--json", url="")
    assert said.exit_code == 2
    problems = said.document["error"]["fields"]["problems"]
    assert problems == [{"line": 7, "problem": "amount 'x' is no number"}]
    assert "t.csv:7" in said.stderr


def reason(words: str) -> tuple[str, ...]:
    """What a command needs beside its name to get to the point."""
    more = ("--confirm", "users") if confirms(words) else ()
    return (*REASON, *more) if words in CHANGING or words == "verify" else ()


def confirms(words: str) -> bool:
    return words.split(maxsplit=1)[0] in ("uninstall", "cutover", "freeze", "unfreeze")


@pytest.mark.parametrize(
    ("command", "then"),
    [
        ("adjust", "look, before you run the same command again, at: walletmigrate history --account KEY"),
        ("phase advance", "look, before you run the same command again, at: walletmigrate phase show"),
        ("phase back", "look, before you run the same command again, at: walletmigrate phase show"),
        ("backfill", "the same command goes on from there"),
        ("verify", "the same command begins anew"),
    ],
)
def test_who_cuts_a_command_short_hears_whether_it_may_be_run_again(
    command: str, then: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """An adjustment may be booked by then, and a second one would book it twice."""

    def cut_short(_: Run) -> Answer:
        raise KeyboardInterrupt

    assert commands.carry_out(Run(command, config=None, database_url=None, as_json=False), cut_short) == 130
    assert then in capsys.readouterr().err


def test_a_stop_that_leaves_mappings_untouched_is_no_success(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first came to its end all the same: else a script would take the rest for done."""
    chosen = [SimpleNamespace(name="users"), SimpleNamespace(name="shops")]
    for name, value in (("engine", None), ("settings", None), ("mappings", lambda *_: chosen)):
        monkeypatch.setattr(Run, name, value)
    run = Run("freeze", config=None, database_url=None, as_json=False, reason="a test", changes=True)

    def job(*_: Any, **__: Any) -> FreezeResult:
        run._stopped.set()
        return FreezeResult("freeze", 1, 0, 0, 0, 0.0, dry_run=False, resumed=False, state="done")

    results = cli_jobs.run_over(run, None, job, workers=None, dask=None)
    answer = cli_jobs.jobs_answer(run, results, [], [], 0)
    assert ([name for name, _ in results], run.left) == (["users"], ("shops",))
    assert (answer.exit_code, answer.document["interrupted"], answer.notes) == (130, True, (console.STOPPED,))


def test_every_command_of_which_is_said_how_it_goes_on_is_one() -> None:
    assert set(commands.LOOK_FIRST) | commands.BEGIN_ANEW <= set(commands.ROLES)
