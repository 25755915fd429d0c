"""The situations before a planned procedure, really made; those of faults are in `runbook_stage`."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import weakref
from contextlib import suppress
from decimal import Decimal
from pathlib import Path

from ledger import ACT, add_users, engine_named, execute
from retiring import FIRST
from runbook_stage import SECONDS, Ran, Stage, backfilled, cut_over
from servers import Postgres
from shopping import SHOP
from walletmigrate import LegacyBalanceAdapter, phases
from walletmigrate.archive_check import archive
from walletmigrate.flag_sources import FileSource
from walletmigrate.freeze import freeze
from walletmigrate.verify import verify

USERS = 200
END = "-- the end of this block --"
PAYMENTS = """
create table public.payments (
    id bigint generated always as identity primary key,
    user_id bigint not null references public.users (id),
    paid_at timestamptz not null,
    kind text not null,
    amount numeric(12, 2)
)
"""
HISTORY = """
insert into public.payments (user_id, paid_at, kind, amount)
select
    1 + mod(g * 7, 10), timestamptz '2026-01-01' + g * interval '1 hour',
    case when mod(g, 3) = 0 then 'booking' else 'deposit' end,
    case when g = 77 then null when mod(g, 3) = 0 then -5.25 else 10.10 end
from generate_series(1, 120) as g
"""
ENVIRONMENT = """
import os

from alembic import context
from sqlalchemy import create_engine

url = os.environ["OWNER_DATABASE_URL"].replace("postgresql://", "postgresql+psycopg://", 1)
with create_engine(url).begin() as connection:
    context.configure(connection=connection)
    context.run_migrations()
"""


def with_history(server: Postgres, url: str, folder: Path) -> Stage:
    """As `backfilled`, beside the application's own table of 120 payments; one of them has no amount."""
    stage = backfilled(server, url, folder)
    for statement in (PAYMENTS, HISTORY, "grant select on public.payments to wallet_operator"):
        execute(stage.engine, statement)
    return stage


def before_the_backfill(server: Postgres, url: str, folder: Path) -> Stage:
    """Phase dual_write, dual-write on for everyone, and 200 users of whom none has an account."""
    stage = backfilled(server, url, folder, opened=False)
    add_users(stage.engine, 11, USERS)
    return stage


def mid_posting(server: Postgres, url: str, folder: Path) -> Stage:
    """As `cut_over`; a prize run of the application has paid user 2, and does not commit."""
    stage = cut_over(server, url, folder)
    adapter = LegacyBalanceAdapter(stage.settings, FileSource(stage.settings.flags.path), observers=())
    connection = engine_named(url, "prizes").connect()
    adapter.credit(connection, 2, 10, type="prize")
    weakref.finalize(stage, connection.invalidate)  # open for as long as the runbook is worked through
    return stage


def read_by_everyone(server: Postgres, url: str, folder: Path) -> Stage:
    """Phase wallet_only, and all accounts are read from the ledger."""
    stage = cut_over(server, url, folder)
    phases.cutover(stage.engine, stage.settings, stage.flags, None, ACT)
    phases.advance(stage.engine, stage.settings, FileSource(stage.settings.flags.path), ACT)
    return stage


def before_the_freeze(server: Postgres, url: str, folder: Path) -> Stage:
    """As `read_by_everyone`; a report of the application's own is a view of the column."""
    stage = read_by_everyone(server, url, folder)
    view = "create view public.rich_users as select id, total_coins from public.users where total_coins > 50"
    execute(stage.engine, view)
    return stage


def frozen(server: Postgres, url: str, folder: Path) -> Stage:
    """Phase frozen, all ten accounts frozen; user 3 was paid since, which only the ledger knows; verified."""
    return _frozen(read_by_everyone(server, url, folder))


def _frozen(stage: Stage) -> Stage:
    engine, settings, source = stage.engine, stage.settings, FileSource(stage.settings.flags.path)
    phases.exercise(engine, settings, source, ACT)
    phases.enter_frozen(engine, settings, source, ACT)
    freeze(engine, settings, settings.mapping(None), ACT)
    adapter = LegacyBalanceAdapter(settings, source, observers=())
    with engine.begin() as connection:
        adapter.credit(connection, 3, Decimal("12.50"), type="deposit")
    verify(engine, settings, settings.mapping(None), ACT)
    return stage


def with_migrations(server: Postgres, url: str, folder: Path) -> Stage:
    """As `frozen`, with an archive from before the freeze, and Alembic migrations of the application's."""
    stage = read_by_everyone(server, url, folder)
    archive(stage.engine, stage.settings, stage.settings.mapping(None), folder / "early.jsonl.gz", ACT)
    stage = _frozen(stage)
    versions = folder / "alembic" / "versions"
    versions.mkdir(parents=True)
    (versions / "0001_first.py").write_text(FIRST, encoding="utf-8")
    (versions.parent / "env.py").write_text(ENVIRONMENT, encoding="utf-8")
    (folder / "alembic.ini").write_text("[alembic]\nscript_location = alembic\npath_separator = os\n", encoding="utf-8")
    assert stage.shell().run("alembic upgrade head").code == 0
    return stage


class Terminal:
    """One bash for all blocks, as a newcomer has it: what a block exports, starts or changes into is there in the next.

    It and what was started in it are a session of their own, which is ended with it.
    """

    def __init__(self, folder: Path) -> None:
        home = folder / "home"
        home.mkdir()
        # Nothing of this project or of PostgreSQL is on the path: the clone has the one, the sandbox brings the other.
        self._bash = subprocess.Popen(
            ["bash", "-euo", "pipefail"],
            cwd=folder,
            env={"PATH": os.defpath, "HOME": str(home), "LC_ALL": "C.UTF-8"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._write(f"trap 'echo \"{END} $?\"' EXIT")

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._bash.pid, signal.SIGTERM)
        self._bash.communicate(timeout=SECONDS)

    def run(self, commands: str) -> Ran:
        """Run a block; the terminal ends with the first command that fails."""
        assert self._bash.stdout is not None
        self._write(f"{{\n{commands}\n}} </dev/null\necho '{END} 0'")
        guard = threading.Timer(SECONDS, os.killpg, (self._bash.pid, signal.SIGKILL))
        guard.start()
        seen = ""
        try:
            for line in self._bash.stdout:
                if line.startswith(END):
                    return Ran(int(line.removeprefix(END)), seen)
                seen += line
            return Ran(self._bash.wait(), seen)  # the guard has ended it
        finally:
            guard.cancel()

    def _write(self, line: str) -> None:
        assert self._bash.stdin is not None
        self._bash.stdin.write(line + "\n")
        self._bash.stdin.flush()


def newcomer(folder: Path) -> Terminal:
    """A clone in which `make demo` was run, as far as it matters: the examples, and `.venv`."""
    (folder / ".venv").symlink_to(Path(sys.executable).parent.parent)
    shutil.copytree(SHOP, folder / "examples" / "shop", ignore=shutil.ignore_patterns("__pycache__"))
    return Terminal(folder)
