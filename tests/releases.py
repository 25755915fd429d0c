"""Another release of the library: a copy of the package with an additive migration and newer functions."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Engine

import walletmigrate
from walletmigrate import functions

POSTER = Path(__file__).with_name("release_poster.py")
STEPS = Path(__file__).with_name("release_steps.py")

_MIGRATION = '''"""What a minor release may do: add, and take nothing away."""

from alembic import context, op

from walletmigrate.schema import quoted

revision, down_revision = "0002", "0001"
branch_labels = depends_on = None


def upgrade() -> None:
    schema = quoted(context.config.attributes["schema"])
    op.execute(f"alter table {schema}.transactions add column release text")
    op.execute(f"alter table {schema}.transactions alter column release set default 'the next'")
    op.execute(f"create table {schema}.notes (id bigint generated always as identity primary key, note text)")
'''

_HELPER = """
create or replace function {{ schema }}.note() returns integer
language sql
set search_path = pg_catalog, {{ schema }}, pg_temp
as $$ select count(*)::integer from notes $$;
"""


@dataclass(frozen=True)
class Release:
    """A release that processes can run: ``path`` is the folder in front of the module search path."""

    path: Path
    version: int

    def start(self, script: Path, *words: str, **options: Any) -> subprocess.Popen[str]:
        """Start a Python script with this release."""
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(self.path), str(Path(__file__).parent)))}
        options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
        return subprocess.Popen([sys.executable, str(script), *words], env=environment, text=True, **options)

    def run(self, url: str, *steps: str) -> list[Any]:
        """Take steps of release_steps.py, in one process; what came of each."""
        process = self.start(STEPS, url, *steps, stdin=subprocess.DEVNULL)
        stdout, stderr = process.communicate(timeout=120)
        assert process.returncode == 0, stderr
        version, *found = json.loads(stdout)
        assert version == self.version, "another release was run than was meant"
        return list(found)


def this_release() -> Release:
    """The one under test."""
    return Release(Path(walletmigrate.__file__).parents[1], functions.FUNCTIONS_VERSION)


def next_release(folder: Path) -> Release:
    """Make the next one: an additive migration, a function that is new, and others that call it."""
    package = folder / "walletmigrate"
    shutil.copytree(Path(walletmigrate.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    version = functions.FUNCTIONS_VERSION + 1
    _edit(package / "functions.py", f"FUNCTIONS_VERSION = {version - 1}\n", f"FUNCTIONS_VERSION = {version}\n")
    (package / "migrations" / "versions" / "0002_notes.py").write_text(_MIGRATION, encoding="utf-8")
    posting = package / "sql" / "posting.sql"
    _edit(posting, "begin\n    if p_debit > 0 then\n", "begin\n    perform note();\n    if p_debit > 0 then\n")
    posting.write_text(posting.read_text(encoding="utf-8") + _HELPER, encoding="utf-8")
    fence = (package / "sql" / "fence.sql").read_text(encoding="utf-8")
    head, begin, body = fence.partition("begin\n")
    (package / "sql" / "fence.sql").write_text(f"{head}{begin}    perform note();\n{body}", encoding="utf-8")
    return Release(folder, version)


def _edit(file: Path, old: str, new: str) -> None:
    text = file.read_text(encoding="utf-8")
    assert text.count(old) == 1, (file, old)
    file.write_text(text.replace(old, new), encoding="utf-8")


class Poster:
    """A process of the application that posts without a pause, on the accounts that all of them share."""

    def __init__(self, release: Release, url: str, name: str) -> None:
        """Start it, and wait until it has posted for the first time."""
        self._process = release.start(POSTER, url, name)
        self._beyond(0)

    def more(self, times: int = 20) -> None:
        """Wait until it has posted so often from now on: what it says first it may have said a while ago."""
        assert self._process.stdin is not None
        self._process.stdin.write("now\n")
        self._process.stdin.flush()
        told = self._line()
        while "now" not in told:
            told = self._line()
        self._beyond(told["now"] + times)

    def kill(self) -> None:
        """End it at once, unless it has ended."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.communicate()

    def _beyond(self, count: int) -> None:
        while self._line()["posted"] <= count:
            pass

    def _line(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        line = self._process.stdout.readline()
        assert line, f"it ended: {self._process.stderr.read()}"
        told: dict[str, Any] = json.loads(line)
        return told

    def end(self) -> dict[str, Any]:
        """Let it end; all that it has to say: its functions' version, postings by mode, errors."""
        stdout, stderr = self._process.communicate(timeout=60)
        assert self._process.returncode == 0, stderr
        found: dict[str, Any] = json.loads(stdout.splitlines()[-1])
        return found


def legacy_total(engine: Engine) -> Any:
    """What all legacy balances come to."""
    with engine.connect() as connection:
        return connection.exec_driver_sql("select sum(total_coins) from public.users").scalar()
