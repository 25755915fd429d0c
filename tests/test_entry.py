"""How a command begins: Ctrl-C while it is loaded, and a password where everybody sees it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from commandline import REASON, SCRIPT, Project, project_at
from walletmigrate.connect import has_secret

SECRET = "hunter2"
# As the console script does, with Ctrl-C at the moment in which one of the modules is looked for.
_INTERRUPTED = """
import importlib.metadata, os, signal, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Finder())
(script,) = importlib.metadata.entry_points(group="console_scripts", name="walletmigrate")
sys.argv = ["walletmigrate", "verify"]
script.load()()
"""


@pytest.mark.parametrize("module", ["typer", "sqlalchemy", "walletmigrate.commands", "walletmigrate.cli_verify"])
def test_ctrl_c_while_the_command_is_loaded_ends_like_any_other(module: str) -> None:
    code = _INTERRUPTED.format(module=module)
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted before anything was done\n")


def test_the_package_runs_as_a_module_too() -> None:
    words = ["--json", "version"]
    said = [
        subprocess.run([*program, *words], check=True, capture_output=True, text=True, timeout=60).stdout
        for program in ([sys.executable, "-m", "walletmigrate"], [str(SCRIPT)])
    ]
    assert said[0] == said[1]


@pytest.mark.parametrize(
    ("words", "option", "variable"),
    [
        (("--database-url", f"postgresql://u:{SECRET}@127.0.0.1:1/x"), "--database-url", "WALLETMIGRATE_DATABASE_URL"),
        ((f"--database-url=postgres://u:{SECRET}@127.0.0.1:1/x",), "--database-url", "WALLETMIGRATE_DATABASE_URL"),
        (
            ("--database-url", f"postgresql+psycopg://u@127.0.0.1:1/x?password={SECRET}"),
            "--database-url",
            "WALLETMIGRATE_DATABASE_URL",
        ),
        (
            ("--from-database", f"postgresql://u:{SECRET}@127.0.0.1:1/x"),
            "--from-database",
            "WALLETMIGRATE_FROM_DATABASE",
        ),
    ],
)
def test_a_password_in_an_argument_is_told_on_stderr_once_and_never_quoted(
    words: tuple[str, ...], option: str, variable: str, tmp_path: Path
) -> None:
    command = "rehearse" if option == "--from-database" else "status"
    for more in ((), ("--json",)):
        said = Project(tmp_path, "").run(command, *words, *more)
        first, *others = said.stderr.splitlines()
        assert first.startswith(
            f"a password stands in {option}, where `ps` and the shell's history show it: put the URL"
        )
        assert variable in first
        assert "PGPASSFILE" in first
        assert not [line for line in others if "a password stands" in line]
        assert SECRET not in said.stdout + said.stderr
        assert said.exit_code == 5
        assert bool(more) == bool(said.stdout)
        if more:
            assert said.document["command"] == command


def test_the_same_url_in_the_environment_is_not_told(tmp_path: Path) -> None:
    said = Project(tmp_path, f"postgresql://u:{SECRET}@127.0.0.1:1/x").run("status")
    assert "a password stands" not in said.stderr


@pytest.mark.parametrize(
    "url",
    ["postgresql://u@h/x", "postgresql:///x?host=/tmp&service=shop", "http://h:9464", "tenant=acme", "users", "a:b@c"],
)
def test_what_has_no_password_is_none(url: str) -> None:
    assert not has_secret(url)


def test_a_service_file_may_say_where_the_database_is(database_url: str, tmp_path: Path) -> None:
    project, engine = project_at(tmp_path, database_url, "dual_write")
    url = engine.url
    where = {"host": url.host or url.query["host"], "port": url.port or url.query["port"]}
    lines = {**where, "dbname": url.database, "user": url.username}.items()
    file = tmp_path / "services.conf"
    file.write_text("\n".join(["[shop]", *(f"{name}={value}" for name, value in lines), ""]), encoding="utf-8")
    named, env = "postgresql:///?service=shop", {"PGSERVICEFILE": str(file)}
    for words in (["status"], ["doctor"], ["verify", *REASON]):
        said = project.run(*words, url=named, env=env)
        assert said.exit_code == 0, said
        assert "a password stands" not in project.run("--database-url", named, *words, url="", env=env).stderr
