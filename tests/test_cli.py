"""The command line: exit codes, streams, the one JSON document, secrets, setup, flags and services."""

from __future__ import annotations

import json
import os
import pty
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator, Sequence
from decimal import Decimal
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, cast

import pytest
from sqlalchemy import Engine, make_url
from sqlalchemy.pool import NullPool
from typer.main import get_command

import ledger
import walletmigrate.rehearse
from commandline import REASON, SCRIPT, Project, app, end, first_document, project_at
from walletmigrate import __version__, connect
from walletmigrate.cli import ROOMS, program
from walletmigrate.config import Settings
from walletmigrate.errors import UnreadableInput
from walletmigrate.rehearsal_report import Report
from walletmigrate.starter import blank_document

SECRET = "s3cret-p@ss"
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


@pytest.fixture
def project(database_url: str, tmp_path: Path) -> Project:
    ledger.install_users(database_url)
    return Project(tmp_path, database_url)


@pytest.fixture
def bare(tmp_path: Path) -> Project:
    """A project whose database is on a port where nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    url = f"postgresql://bob:{SECRET.replace('@', '%40')}@127.0.0.1:{port}/app"
    return Project(tmp_path, url)


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


def test_an_unknown_mapping_is_named_with_those_there_are(project: Project) -> None:
    said = project.run("verify", "--mapping", "nobody", "--json")
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


def commands_of(words: Sequence[str]) -> list[str]:
    """The names that the command line knows when it is loaded for these words."""
    return list(cast("Any", get_command(program(words))).commands)


@pytest.mark.parametrize(("room", "names"), ROOMS.items(), ids=ROOMS)
def test_a_room_registers_the_commands_that_it_is_loaded_for(room: str, names: tuple[str, ...]) -> None:
    for name in names:
        for words in ([name], ["--json", "--config", "verify", name, "status"], ["--database-url=x", name, "--help"]):
            assert sorted(commands_of(words)) == sorted(names)


@pytest.mark.parametrize(
    "words", [(), ("--help", "status"), ("nonsense", "status"), ("--config",), ("--config", "status")]
)
def test_words_that_name_no_command_get_the_whole_command_line(words: tuple[str, ...]) -> None:
    every = [name for names in ROOMS.values() for name in names]
    assert sorted(commands_of(words)) == sorted(every)
    assert len(set(every)) == len(every)


def test_a_command_starts_without_what_it_does_not_use() -> None:
    heavy = ("alembic", "flagsmith", "prometheus_client", "requests", "rich", "sqlalchemy.orm", "structlog")
    for word in ("status", "stop-the-line", "backfill", "verify"):
        code = f"import sys; from walletmigrate.cli import program; program([{word!r}]); print(*sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60)
        assert {"typer", "sqlalchemy"} <= set(done.stdout.split())
        assert set(heavy) & set(done.stdout.split()) == set()


def test_the_package_gives_every_name_that_it_says_and_no_other() -> None:
    names = walletmigrate.__all__
    assert [getattr(walletmigrate, name).__name__ for name in names] == list(names)
    with pytest.raises(AttributeError, match="'walletmigrate' has no attribute 'LegacyAdapter'"):
        walletmigrate.LegacyAdapter  # noqa: B018


def test_the_script_sends_data_to_stdout_and_the_rest_to_stderr(project: Project) -> None:
    said = project.script("phase", "show", "--json")
    assert (said.exit_code, said.stderr) == (0, "")
    assert said.document["next"] == "dual_write"
    refused = project.script("backfill", *REASON)
    assert (refused.exit_code, refused.stdout) == (4, "")
    assert "→ walletmigrate phase advance --reason '…'\n" in refused.stderr


def test_the_script_ends_with_3_on_a_difference_and_2_on_wrong_usage(project: Project) -> None:
    project.change("phase", "advance")
    assert project.script("verify").exit_code == 3
    assert project.script("phase", "advance").exit_code == 2


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


def test_version_says_what_is_installed(bare: Project) -> None:
    said = bare.run("version", "--json")
    assert said.document["versions"]["walletmigrate"] == __version__
    assert bare.run("version").stdout.startswith(f"walletmigrate {__version__} (")


# Setup


def test_init_writes_a_configuration_that_loads_and_a_blank_flag_file(database_url: str, tmp_path: Path) -> None:
    ledger.install_users(database_url)
    folder = tmp_path / "new"
    folder.mkdir()
    words = ("init", "--json", "--config", str(folder / "walletmigrate.toml"))
    said = Project(tmp_path, database_url).run(*words)
    assert said.exit_code == 0, said
    assert said.document["tables"] == ["public.users"]
    assert [one.table for one in Settings.load(folder / "walletmigrate.toml").mappings] == ["public.users"]
    assert json.loads((folder / "flags" / "environment.json").read_text()) == blank_document()


def test_init_overwrites_nothing_unless_forced_and_keeps_the_flags(project: Project) -> None:
    text, flags = project.config.read_bytes(), project.flag_path.read_bytes()
    said = project.run("init")
    assert (said.exit_code, project.config.read_bytes()) == (2, text)
    assert "--force" in said.stderr
    project.flags.set("wallet.dualWrite", True, everyone=True)
    flags = project.flag_path.read_bytes()
    assert project.run("init", "--force").exit_code == 0
    assert project.config.read_bytes() != text
    assert project.flag_path.read_bytes() == flags


def test_init_prints_the_file_instead_of_writing_it_in_a_dry_run(project: Project, tmp_path: Path) -> None:
    said = project.run("init", "--dry-run", "--config", str(tmp_path / "other.toml"))
    assert said.exit_code == 0
    assert 'table = "public.users"' in said.stdout
    assert not (tmp_path / "other.toml").exists()


def test_init_without_a_database_says_which_variable_to_set(bare: Project) -> None:
    said = bare.run("init", "--force", url="")
    assert said.exit_code == 2
    assert "WALLETMIGRATE_DATABASE_URL" in said.stderr


def test_install_reports_what_it_made_and_does_nothing_the_second_time(database_url: str, tmp_path: Path) -> None:
    ledger.install_users(database_url)
    project = Project(tmp_path, database_url)
    project.change("uninstall", "--confirm", "users", "--drop-ledger")
    assert project.run("install", "--dry-run").exit_code == 0
    assert project.run("phase", "show", "--json").document["installed"] is False
    first = project.run("install", "--json", *REASON)
    assert (first.exit_code, first.document["fences_made"]) == (0, ["users"])
    assert project.run("install", "--json", *REASON).document["fences_made"] == []


def test_install_says_what_comes_next_and_to_whom_it_granted(project: Project) -> None:
    engine, shops = engine_of(project), [f"shop_{secrets.token_hex(4)}" for _ in range(2)]
    for shop in shops:
        ledger.execute(engine, f"create role {shop}")
    try:
        granted = project.change("install", "--grant-to", shops[0], "--grant-to", shops[1])
    finally:
        for shop in shops:
            ledger.execute(engine, f"drop role {shop}")
    assert granted.stdout.splitlines()[1:] == [
        f"{shops[0]}, {shops[1]} may post: member of wallet_app",
        "next: walletmigrate phase advance --reason '…'",
    ]
    project.change("phase", "advance")
    assert project.change("install").stdout.splitlines()[1:] == ["next: walletmigrate status"]
    refused = project.run("install", "--grant-to", "nobody at all", "--json", *REASON)
    assert (refused.exit_code, refused.document["error"]["code"]) == (4, "precondition")


def test_install_lists_values_that_do_not_convert_and_is_refused_until_they_are_mended(project: Project) -> None:
    project.change("uninstall", "--confirm", "users", "--drop-ledger")
    ledger.execute(engine_of(project), "update public.users set total_coins = 'NaN' where id in (3, 4)")
    listed = project.run("install", "--dry-run", "--json")
    assert listed.exit_code == 4
    assert [(one["key"], one["value"]) for one in listed.document["unconvertible"]] == [("3", "NaN"), ("4", "NaN")]
    refused = project.run("install", "--json", *REASON)
    assert refused.exit_code == 4
    assert len(refused.document["error"]["fields"]["reasons"]) == 2
    ledger.execute(engine_of(project), "update public.users set total_coins = 1 where id in (3, 4)")
    assert project.run("install", *REASON).exit_code == 0


def test_uninstall_takes_the_fence_out_and_keeps_the_journal(project: Project) -> None:
    project.change("uninstall", "--confirm", "users")
    fences = "select count(*) from pg_trigger where tgrelid = 'public.users'::regclass and not tgisinternal"
    assert ledger.scalar(engine_of(project), fences) == 0
    assert ledger.scalar(engine_of(project), "select to_regclass('wallet.transactions') is not null")
    project.change("uninstall", "--confirm", "users")


def test_a_confirmation_is_the_mappings_name_and_without_a_terminal_it_must_be_given(project: Project) -> None:
    before = everything(project)
    for given in ((), ("--confirm", "user"), ("--confirm", "users,shops")):
        said = project.run("uninstall", "--json", *REASON, *given)
        assert said.exit_code == 2, said
        assert "users" in said.document["error"]["message"]
    assert everything(project) == before


@pytest.mark.parametrize(("typed", "expected"), [("users", 0), ("yes", 2)])
def test_on_a_terminal_the_mappings_name_is_asked_for(project: Project, typed: str, expected: int) -> None:
    main, terminal = pty.openpty()
    try:
        process = project.start("uninstall", *REASON, stdin=terminal, stderr=terminal)
        os.close(terminal)
        shown = b""
        while b"type users to go on" not in shown:
            shown += os.read(main, 1024)
        os.write(main, typed.encode() + b"\n")
        stdout, _ = process.communicate(timeout=60)
    finally:
        os.close(main)
    assert process.returncode == expected
    assert ("journal stays" in stdout) == (expected == 0)


# Flags


def test_flags_are_listed_without_a_database_with_what_is_doubtful(bare: Project) -> None:
    bare.flags.set("wallet.readFromLedger", True, trait=("tenant", "acme"))
    said = bare.run("flags", "list")
    assert said.exit_code == 0
    assert "wallet.readFromLedger: off for everyone; tenant=acme on (trait)" in said.stdout
    assert "counts as off" in said.stderr
    document = bare.run("flags", "list", "--json").document
    assert document["flags"][0]["flag"] == "wallet.dualWrite"
    assert len(document["doubts"]) == 1


def test_a_flag_is_set_for_each_kind_of_whom_with_an_audit_row(project: Project) -> None:
    for who in ("--everyone", "--cohort tenant=acme", "--percent 25", "--account 7"):
        said = project.run("flags", "set", "wallet.dualWrite", "on", *who.split(), "--json", *REASON)
        assert said.exit_code == 0
        assert said.document["flag"]["changed"]
        query = "select details ->> 'who' from wallet.audit_log where id = :id"
        row = ledger.scalar(engine_of(project), query, id=said.document["flag"]["audit_id"])
        assert row == said.document["flag"]["who"]
    kinds = {one.kind for one in project.flags.list()[0].overrides}
    assert kinds == {"trait", "percent", "account"}
    for who in ("--cohort tenant=acme", "--percent 25", "--account 7"):
        project.change("flags", "set", "wallet.dualWrite", "remove", *who.split())
    assert project.flags.list()[0].overrides == ()


def test_without_a_database_a_flag_is_set_only_if_no_audit_row_is_asked_for(bare: Project) -> None:
    before = bare.flag_path.read_bytes()
    words = ("flags", "set", "wallet.dualWrite", "on", "--everyone", *REASON)
    assert bare.run(*words).exit_code == 5
    assert bare.flag_path.read_bytes() == before
    said = bare.run(*words, "--no-audit")
    assert said.exit_code == 0
    assert "no audit row" in said.stderr
    assert bare.flags.list()[0].default


def test_doctor_of_a_database_without_a_ledger_speaks_to_an_operator(database_url: str, tmp_path: Path) -> None:
    said = Project(tmp_path, database_url).run("doctor")
    assert said.exit_code == 4
    assert "Retry the transaction" not in said.stderr
    assert "Is it the right database? Then, as the owner of the tables: walletmigrate install --reason" in said.stderr


def test_without_a_ledger_a_flag_is_set_only_if_no_audit_row_is_asked_for(database_url: str, tmp_path: Path) -> None:
    project = Project(tmp_path, database_url)
    said = project.run("flags", "set", "wallet.dualWrite", "on", "--everyone", "--json", *REASON)
    assert (said.exit_code, said.document["error"]["code"]) == (4, "not_installed")
    assert not project.flags.list()[0].default


def test_a_dry_run_of_a_flag_needs_no_database_and_no_reason(bare: Project) -> None:
    before = bare.flag_path.read_bytes()
    said = bare.run("flags", "set", "wallet.dualWrite", "on", "--everyone", "--dry-run", "--json")
    assert said.exit_code == 0
    assert said.document["flag"]["after"]["default"] is True
    assert bare.flag_path.read_bytes() == before


def test_a_broken_flag_file_ends_with_2_and_a_missing_one_with_5(project: Project) -> None:
    project.flag_path.write_text("{")
    assert project.run("flags", "list", "--json").document["error"]["code"] == "flag_document"
    project.flag_path.unlink()
    said = project.run("flags", "list", "--json")
    assert (said.exit_code, said.document["error"]["code"]) == (5, "flag_source_unreachable")


@pytest.fixture
def flagsmith(tmp_path: Path, database_url: str) -> Iterator[Project]:
    """A project whose flags come from a server on this machine, which answers as Flagsmith does."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps(blank_document()).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    flags = f'source = "flagsmith"\napi_url = "http://127.0.0.1:{server.server_port}/api/v1/"'
    try:
        project_at(tmp_path, database_url, "read_ledger")
        yield Project(tmp_path, database_url, flags=flags)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


KEY = {"WALLETMIGRATE_FLAGSMITH_KEY": "ser.k3y-of-the-environment"}


def test_flags_of_a_server_are_listed_and_its_key_is_not_shown(flagsmith: Project) -> None:
    said = flagsmith.run("flags", "list", env=KEY)
    assert said.exit_code == 0, said
    assert "wallet.dualWrite: off for everyone" in said.stdout
    assert "k3y" not in said.stdout + said.stderr
    assert "WALLETMIGRATE_FLAGSMITH_KEY" in flagsmith.run("flags", "list").stderr


@pytest.mark.parametrize(
    "words",
    [
        "flags set wallet.dualWrite on --everyone",
        "cutover --cohort tenant=acme --confirm users",
        "rollback --cohort tenant=acme",
    ],
)
def test_flags_of_a_server_are_not_written_from_here_and_the_manual_steps_are_told(
    flagsmith: Project, words: str
) -> None:
    said = flagsmith.run(*words.split(), "--json", *REASON, env=KEY)
    assert said.exit_code == 4
    (told,) = said.document["error"]["fields"]["reasons"]
    assert "only read without an admin key" in told["what"]
    assert "in Flagsmith" in told["mend"]


def test_a_rollback_of_everyone_lowers_the_phase_where_flags_come_from_a_server(flagsmith: Project) -> None:
    said = flagsmith.run("rollback", "--json", *REASON, env=KEY)
    assert (said.exit_code, said.document["phase_after"], said.document["flag"]) == (0, "dual_write", None)
    assert "in Flagsmith" in said.stderr


# Services


def test_the_exporter_serves_metrics_until_it_is_told_to_end(project: Project) -> None:
    process = project.start("exporter", "--port", "0", "--json")
    try:
        url = first_document(process)["url"]
        with urllib.request.urlopen(url, timeout=30) as answer:
            text = answer.read().decode()
        assert 'walletmigrate_phase{phase="legacy"} 1.0' in text
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
    finally:
        end(process)


def test_the_sandbox_has_all_that_the_first_commands_need_and_goes_without_a_trace(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [str(SCRIPT), "sandbox", "place", "--rows", "60", "--json"],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        made = first_document(process)
        assert (made["rows"], made["folder"]) == (60, "place")
        project = Project(tmp_path, "")
        config = ("--config", str(tmp_path / "place" / "walletmigrate.toml"))
        for words in (
            "install",
            "phase advance",
            "flags set wallet.dualWrite on --everyone",
            "backfill",
            "verify",
            "rollback --exercise",
            "phase advance",
            "cutover --everyone --confirm users",
            "phase advance",
            "rollback --exercise",
            "freeze --confirm users",
            "unfreeze --confirm users",
        ):
            said = project.run(*words.split(), *config, *REASON, url="")
            assert said.exit_code == 0, (words, said)
        assert project.run("verify", *config, url="").exit_code == 0
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0
        assert project.run("status", *config, url="").exit_code == 5
        socket_folder = Path(str(make_url(made["url"]).query["host"]))
        assert not socket_folder.exists()
    finally:
        end(process)


def test_an_empty_sandbox_is_a_database_and_nothing_else(tmp_path: Path) -> None:
    process = Project(tmp_path, "").start("sandbox", "place", "--empty", "--json")
    try:
        made = first_document(process)
        tables = "select count(*) from pg_tables where schemaname = 'public'"
        assert ledger.scalar(ledger.engine_named(made["url"]), tables) == 0
        assert (made["folder"], made["rows"]) == (None, 0)
        assert not (tmp_path / "place").exists()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
    finally:
        end(process)


def test_a_sandbox_does_not_overwrite_a_configuration_of_somebody_elses(tmp_path: Path) -> None:
    (tmp_path / "walletmigrate.toml").write_text("# mine\n")
    said = Project(tmp_path, "").run("sandbox", str(tmp_path), "--json", url="")
    assert said.exit_code == 2
    assert (tmp_path / "walletmigrate.toml").read_text() != ""


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


def engine_of(project: Project) -> Engine:
    return connect.engine(project.url, application_name="test", poolclass=NullPool)


def everything(project: Project) -> tuple[Any, ...]:
    """All that a command could change: the ledger's tables, the line, the triggers, the flag file."""
    engine = engine_of(project)
    tables = ledger.rows(
        engine, "select c.relname from pg_class c where c.relnamespace = 'wallet'::regnamespace and relkind = 'r'"
    )
    names = sorted(f"wallet.{name}" for (name,) in tables)
    content = [
        ledger.scalar(engine, f"select md5(coalesce(string_agg(t::text, '|' order by t::text), '')) from {name} t")
        for name in (*names, "public.users")
    ]
    line = ledger.scalar(engine, "select last_value from wallet.line")
    triggers = ledger.rows(engine, "select tgname, xmin::text from pg_trigger where not tgisinternal order by 1")
    return names, content, line, triggers, project.flag_path.read_bytes()


def test_the_version_is_that_of_the_release_and_of_what_it_installs(database_url: str, tmp_path: Path) -> None:
    engine, _ = ledger.install_users(database_url, rows=1)
    said = Project(tmp_path, "").run("--version", url="")
    assert said == Project(tmp_path, "").run("version", url="")
    revision = ledger.scalar(engine, "select version_num from wallet.schema_version")
    functions = ledger.scalar(engine, "select functions_version from wallet.mappings")
    first, second = said.stdout.splitlines()
    assert (said.exit_code, first.startswith(f"walletmigrate {__version__} ("), said.stderr) == (0, True, "")
    assert second == f"installs schema revision {revision}, functions version {functions}"
    for words in (("--version", "--json"), ("--json", "--version"), ("--json", "--version", "status")):
        found = Project(tmp_path, "").run(*words, url="").document
        assert (found["command"], found["versions"]["walletmigrate"]) == ("version", __version__)
        assert (found["schema_revision"], found["functions_version"]) == (revision, functions)
