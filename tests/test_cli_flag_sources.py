"""The commands that list and set flags, in a file and of a server."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

import ledger
from commandline import REASON, Project, bare, engine_of, project, project_at
from walletmigrate.starter import blank_document

__all__ = ["bare", "project"]


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
