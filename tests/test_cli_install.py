"""The commands that set a migration up and take it out again: init, install, uninstall."""

from __future__ import annotations

import json
import os
import pty
import secrets
from pathlib import Path

import pytest

import ledger
from commandline import REASON, Project, bare, engine_of, everything, project
from walletmigrate.config import Settings
from walletmigrate.starter import blank_document

__all__ = ["bare", "project"]


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


@pytest.mark.parametrize(
    "words",
    [
        *("backfill --reason x", "verify", "reconcile --all --reason x", "overview", "jobs list", "snapshot list"),
        *("recalculate --all --reason x", "adjust --account 1 --amount 5 --reason x", "report overview --to made.csv"),
        *("history --account 1", "snapshot take --reason x", "stop-the-line --reason x"),
    ],
)
def test_a_command_that_needs_the_ledger_says_how_an_operator_puts_it_there(
    database_url: str, tmp_path: Path, words: str
) -> None:
    ledger.execute(
        ledger.engine_named(database_url),
        "create table users (id bigint primary key, tenant text, role text, total_coins numeric(12, 2) not null)",
    )
    said = Project(tmp_path, database_url).run(*words.split())
    assert said.exit_code == 4, said
    assert "as the owner of the tables: walletmigrate install --reason '…'" in said.stderr
    assert "Retry the transaction" not in said.stderr


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
