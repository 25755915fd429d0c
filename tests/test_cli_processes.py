"""The command line as a process: what it loads, its script and its streams, versions, exporter and sandbox."""

from __future__ import annotations

import signal
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
from sqlalchemy import make_url
from typer.main import get_command

import ledger
import walletmigrate.rehearse
from commandline import REASON, SCRIPT, Project, bare, end, first_document, project
from walletmigrate import __version__
from walletmigrate.cli import ROOMS, program

__all__ = ["bare", "project"]


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


def test_version_says_what_is_installed(bare: Project) -> None:
    said = bare.run("version", "--json")
    assert said.document["versions"]["walletmigrate"] == __version__
    assert bare.run("version").stdout.startswith(f"walletmigrate {__version__} (")


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
