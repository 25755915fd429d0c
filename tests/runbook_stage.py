"""The situations that the runbooks are for, really made: a database, a configuration and a shell at 3 a.m.

A shell acts as the operators' role, so that a command that asks for more rights than they have fails here.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from sqlalchemy import Engine, make_url

import forkserver
from ledger import ACT, engine_named, execute, install_users, unguarded
from runbook_alerts import Scrape, Shop, scraped
from servers import Postgres
from walletmigrate import LegacyBalanceAdapter, Settings, line, phases
from walletmigrate.audit import Act
from walletmigrate.backfill import backfill
from walletmigrate.flag_file import FlagFile
from walletmigrate.flag_sources import FileSource
from walletmigrate.flags import DUAL_WRITE
from walletmigrate.functions import relation
from walletmigrate.starter import write_configuration
from walletmigrate.verify import verify

SECONDS = 120
ACME = ("tenant", "acme")

CONFIGURATION = """\
observation_window = "0s"

[[mappings]]
name = "users"
table = "public.users"
key = "id"
policy = "shadow"
traits = { tenant = "tenant", role = "role" }

  [[mappings.columns]]
  bucket = "cash"
  column = "total_coins"
  currency = "EUR"
  scale = 2
"""


@dataclass(frozen=True)
class Ran:
    """How a block of commands ended, and what a person at the terminal saw: stdout and stderr together."""

    code: int
    seen: str


@dataclass(frozen=True)
class Shell:
    """The folder with ``walletmigrate.toml`` that somebody stands in, and the environment they have."""

    folder: Path
    environment: dict[str, str]

    def run(self, commands: str) -> Ran:
        """Run one block as it would be pasted; it ends at the first command that fails.

        A variable that a line of its own sets (``JOB=1``) is there in the next blocks, as at one terminal.
        """
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", commands],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        self.environment.update(re.findall(r"^([A-Z]+)=(\w+)$", commands, re.MULTILINE))
        return Ran(done.returncode, done.stdout)


@dataclass(frozen=True)
class Stage:
    """A database of ten users, the odd ones of tenant acme, and the files that fit it.

    ``variables`` are set in the shell besides; what was entered into ``cleanup`` ends with the test. ``shop`` is what a
    process of the application counts, ``seen`` what was served before the fault; ``meanwhile`` is what others do while
    the runbook is worked through, by the name that the runbook has for it.
    """

    server: Postgres
    engine: Engine
    settings: Settings
    flags: FlagFile
    folder: Path
    variables: dict[str, str] = field(default_factory=dict)
    cleanup: ExitStack = field(default_factory=ExitStack)
    shop: Shop = field(default_factory=Shop)
    seen: list[Scrape] = field(default_factory=list)
    meanwhile: dict[str, Callable[[], object]] = field(default_factory=dict)
    exporter_url: str | None = None

    def scrape(self) -> Scrape:
        """What the exporter and the application's process serve now."""
        return scraped(self.engine, self.settings, self.shop, self.exporter_url)

    def adapter(self) -> LegacyBalanceAdapter:
        """The adapter of the application's process, by the stage's flag file."""
        source = FileSource(self.settings.flags.path)
        return LegacyBalanceAdapter(self.settings, source, observers=[self.shop.observer])

    def shell(self) -> Shell:
        """A shell whose database role is the operators', beside the address of the tables' owner."""
        url = make_url(self.engine.url).set(drivername="postgresql")
        operator = url.update_query_dict({"options": f"-crole={self.settings.roles.operator}"})
        programs = [forkserver.commands(), Path(sys.executable).parent, *filter(None, [self.server.binaries])]
        return Shell(
            self.folder,
            {
                "PATH": os.pathsep.join([*map(str, programs), os.defpath]),
                "HOME": str(self.folder),
                "LC_ALL": "C.UTF-8",
                "WALLETMIGRATE_DATABASE_URL": operator.render_as_string(hide_password=False),
                "OWNER_DATABASE_URL": url.render_as_string(hide_password=False),
                "WALLETMIGRATE_ACTOR": "on-call:test",
                **self.variables,
            },
        )


def backfilled(
    server: Postgres,
    url: str,
    folder: Path,
    *,
    opened: bool = True,
    configuration: str = CONFIGURATION,
    users: int = 10,
) -> Stage:
    """Phase dual_write, dual-write on for everyone, every account open (or none yet) and none verified."""
    engine, _ = install_users(url, rows=users)
    config = folder / "walletmigrate.toml"
    write_configuration(config, configuration)
    settings = Settings.load(config, database_url=url)
    stage = Stage(server, engine, settings, FlagFile(settings.flags.path), folder)
    phases.advance(engine, settings, FileSource(settings.flags.path), ACT)
    phases.set_flag(engine, settings, stage.flags, DUAL_WRITE, True, ACT, everyone=True)
    if opened:
        backfill(engine, settings, settings.mapping(None), ACT)
    stage.seen.append(stage.scrape())
    return stage


def cut_over(server: Postgres, url: str, folder: Path) -> Stage:
    """Phase read_ledger; the balances of tenant acme are read from the ledger, those of globex are not."""
    return cut_over_from(backfilled(server, url, folder))


def cut_over_from(stage: Stage) -> Stage:
    engine, settings = stage.engine, stage.settings
    source = FileSource(settings.flags.path)
    verify(engine, settings, settings.mapping(None), ACT)
    phases.exercise(engine, settings, source, ACT)
    phases.advance(engine, settings, source, ACT)
    phases.cutover(engine, settings, stage.flags, ACME, ACT)
    stage.seen.append(stage.scrape())
    return stage


def drifted(server: Postgres, url: str, folder: Path) -> Stage:
    """As `cut_over`; then a superuser switched the fence off, changed one balance and made one user, and
    switched it on again: user 7 has a wrong ledger balance that counts as true, and user 11 has no account.
    """
    stage = cut_over(server, url, folder)
    drift(stage)
    return stage


def drift(stage: Stage) -> None:
    with unguarded(stage.engine, relation(stage.settings.mapping(None))) as connection:
        connection.exec_driver_sql("update public.users set total_coins = total_coins + 25 where id = 7")
        connection.exec_driver_sql("insert into public.users values (11, 'acme', 'member', 40, 0)")


def imbalanced(server: Postgres, url: str, folder: Path) -> Stage:
    """As `cut_over`; then a superuser gave the ledger account of user 7 five euros that no transaction explains."""
    stage = cut_over(server, url, folder)
    execute(stage.engine, "update wallet.accounts set balance = balance + 5 where mapping = 'users' and key = '7'")
    return stage


def bypassed(server: Postgres, url: str, folder: Path) -> Stage:
    """As `cut_over`; then a night job wrote three balances past the adapter."""
    stage = cut_over(server, url, folder)
    job = engine_named(url, "night-job")
    with job.begin() as connection:
        for key in (2, 4, 4, 7):
            connection.exec_driver_sql(f"update users set total_coins = total_coins + 1 where id = {key}")
    return stage


def stopped(server: Postgres, url: str, folder: Path) -> Stage:
    """As `cut_over`; then somebody stopped the line, and users 1 and 2 were paid."""
    stage = cut_over(server, url, folder)
    line.stop(stage.engine, stage.settings, Act("ada", "INC-159: payments fail"))
    adapter = LegacyBalanceAdapter(stage.settings, FileSource(stage.settings.flags.path), observers=())
    with stage.engine.begin() as connection:
        for key in (1, 2):
            adapter.credit(connection, key, 10, type="deposit")
    return stage
