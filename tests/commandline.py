"""The command line in tests: a folder with configuration and flags, in-process runs, and the real script."""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
from sqlalchemy import Engine
from sqlalchemy.pool import NullPool
from typer.testing import CliRunner

import ledger
from copies import copied
from walletmigrate import connect
from walletmigrate.cli import program
from walletmigrate.config import Settings
from walletmigrate.flag_file import FlagFile
from walletmigrate.starter import blank_document

app = program()
"""The whole command line, every room loaded."""

SCRIPT = Path(sys.executable).with_name("walletmigrate")
REASON = ("--reason", "a test")
SECRET = "s3cret-p@ss"

_CONFIG = """
observation_window = "{window}"

[flags]
{flags}

[[mappings]]
name = "users"
table = "public.users"
key = "id"
traits = {{ tenant = "tenant", role = "role" }}

  [[mappings.columns]]
  bucket = "cash"
  column = "total_coins"
  currency = "EUR"
  scale = 2
"""


def parsed(line: str) -> str:
    """The name of the command in a line as it is shown; a comment after it is left out. Raises click's errors for an
    option that is unknown or missing, and AssertionError where a change has no reason.
    """
    program, *words = shlex.split(line.replace("…", "x"), comments=True)
    assert program == "walletmigrate", line
    command, names = typer.main.get_command(app), []
    while inner := getattr(command, "commands", None):
        named = bool(words) and words[0] in inner
        name = words.pop(0) if named else getattr(command, "default", None)
        if name is None:
            break
        names += [name] if named else []
        command = inner[name]
    values = command.make_context(" ".join(names), words).params
    assert values.get("reason", "none is asked for") or values["dry_run"] or names == ["verify"], f"no reason: {line}"
    return " ".join(names)


@dataclass(frozen=True)
class Said:
    """What a command printed, and its exit code."""

    exit_code: int
    stdout: str
    stderr: str

    @property
    def document(self) -> dict[str, Any]:
        """The one JSON document on stdout."""
        found: dict[str, Any] = json.loads(self.stdout)
        return found


class Project:
    """A folder with a configuration of ``public.users`` and a flag file; ``url`` is the database's."""

    def __init__(self, folder: Path, url: str, *, window: str = "0s", flags: str = 'source = "file"') -> None:
        self.folder = folder
        self.url = url
        self.config = folder / "walletmigrate.toml"
        self.config.write_text(_CONFIG.format(window=window, flags=flags), encoding="utf-8")
        self.flag_path = folder / "flags" / "environment.json"
        self.flag_path.parent.mkdir(exist_ok=True)
        self.flag_path.write_text(json.dumps(blank_document()), encoding="utf-8")
        self.flags = FlagFile(self.flag_path)

    @property
    def settings(self) -> Settings:
        """The configuration as the command line loads it."""
        return Settings.load(self.config, database_url=self.url)

    def run(self, *words: str, url: str | None = None, env: dict[str, str] | None = None) -> Said:
        """Run a command in this process; ``url`` "" names no database."""
        given = self.environment(url) | (env or {})
        done = CliRunner().invoke(app, list(words), env=given, prog_name="walletmigrate")
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        return Said(done.exit_code, done.stdout, done.stderr)

    def change(self, *words: str) -> Said:
        """Run a command that changes something, with its reason; it must succeed."""
        said = self.run(*words, *REASON)
        assert said.exit_code == 0, said
        return said

    def start(self, *words: str, **options: Any) -> subprocess.Popen[str]:
        """Start the real console script in a process of its own."""
        options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
        environment = {**os.environ, **self.environment(None)}
        return subprocess.Popen([str(SCRIPT), *words], env=environment, cwd=self.folder, text=True, **options)

    def script(self, *words: str) -> Said:
        """Run the real console script to its end."""
        process = self.start(*words)
        stdout, stderr = process.communicate(timeout=120)
        return Said(process.returncode, stdout, stderr)

    def environment(self, url: str | None) -> dict[str, str]:
        """The variables that a command sees."""
        return {
            "WALLETMIGRATE_CONFIG": str(self.config),
            "WALLETMIGRATE_DATABASE_URL": self.url if url is None else url,
            "WALLETMIGRATE_ACTOR": "tests",
        }


def project_at(folder: Path, url: str, phase: str, *, rows: int = 10, window: str = "0s") -> tuple[Project, Engine]:
    """A project whose migration has come to ``phase``, by the commands that an operator would run."""
    made = Project(folder, url, window=window)
    steps = {
        "dual_write": ("phase advance", "flags set wallet.dualWrite on --everyone", "backfill", "verify"),
        "read_ledger": ("rollback --exercise", "phase advance"),
        "wallet_only": ("cutover --everyone --confirm users", "phase advance"),
        "frozen": ("rollback --exercise", "freeze --confirm users"),
    }

    def walk() -> bytes:
        ledger.install_users(url, rows=rows)
        for name, commands in steps.items():
            if phase == "legacy":
                break
            for words in commands:
                made.change(*words.split())
            if name == phase:
                break
        return made.flag_path.read_bytes()

    made.flag_path.write_bytes(copied(url, f"project_at {phase} {rows} {window}", walk))
    return made, ledger.engine_named(url)


def first_document(process: subprocess.Popen[str]) -> dict[str, Any]:
    """The document that a service prints when it is ready; it goes on running."""
    assert process.stdout is not None
    text = ""
    for line in process.stdout:
        text += line
        if line == "}\n":
            found: dict[str, Any] = json.loads(text)
            return found
    assert process.stderr is not None
    raise AssertionError(process.stderr.read())


def end(process: subprocess.Popen[str]) -> None:
    """Leave no process behind, and no pipe open."""
    if process.poll() is None:
        process.kill()
    process.communicate()


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


def engine_of(project: Project) -> Engine:
    return connect.engine(project.url, application_name="test", poolclass=NullPool)


def everything(project: Project) -> tuple[Any, ...]:
    """All that a command could change: the ledger's tables, the line, the triggers, the flag file."""
    engine = engine_of(project)
    tables = ledger.rows(
        engine, "select c.relname from pg_class c where c.relnamespace = 'wallet'::regnamespace and relkind = 'r'"
    )
    names = sorted(f"wallet.{name}" for (name,) in tables)
    digests = [
        f"select '{name}', md5(coalesce(string_agg(t::text, '|' order by t::text), '')) from {name} t"
        for name in (*names, "public.users")
    ]
    content = ledger.rows(engine, f"{' union all '.join(digests)} order by 1")
    line = ledger.scalar(engine, "select last_value from wallet.line")
    triggers = ledger.rows(engine, "select tgname, xmin::text from pg_trigger where not tgisinternal order by 1")
    return names, content, line, triggers, project.flag_path.read_bytes()
