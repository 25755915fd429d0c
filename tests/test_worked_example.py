"""The worked examples of the documentation, run as they stand: each command, its output and its exit code.

The first is the damage that a real backfill report tells of, made anew without the people in it.
"""

from __future__ import annotations

import contextlib
import re
import shlex
from pathlib import Path

from sqlalchemy import Connection, Engine
from sqlalchemy.pool import NullPool
from typer.testing import CliRunner

from commandline import app
from invariants import assert_sound
from ledger import ACT, rows, scalar, unguarded
from runbook_stage import CONFIGURATION, Ran, Shell, Stage
from servers import Postgres
from test_runbooks import Reader
from walletmigrate import LegacyBalanceAdapter, Settings, connect, phases, traffic
from walletmigrate.backfill import backfill
from walletmigrate.flag_file import FlagFile
from walletmigrate.flag_sources import FileSource
from walletmigrate.flags import DUAL_WRITE, StaticSource
from walletmigrate.install import install
from walletmigrate.starter import write_configuration

DOCS = Path(__file__).parents[1] / "docs"

USERS, COINS = 196, 525_357
OPEN, IN_LEDGER = 87, 177_067
OFF = {5: 10, 17: 8, 42: 3}
ABSENT, EMPTY, ZERO = 38, 59, 12
POSTINGS = 10


def started(server: Postgres, url: str, folder: Path, table: str, configuration: str) -> Stage:
    """A legacy table with its ledger, in phase dual_write and with dual-write on."""
    engine = connect.engine(url, application_name="walletmigrate-test", poolclass=NullPool)
    with engine.begin() as connection:
        connection.exec_driver_sql(table)
    config = folder / "walletmigrate.toml"
    write_configuration(config, configuration)
    settings = Settings.load(config, database_url=url)
    install(engine, settings, ACT)
    stage = Stage(server, engine, settings, FlagFile(settings.flags.path), folder)
    phases.advance(engine, settings, FileSource(settings.flags.path), ACT)
    phases.set_flag(engine, settings, stage.flags, DUAL_WRITE, True, ACT, everyone=True)
    return stage


class Inside(Shell):
    """A shell that runs the library's own commands in this process, which is much quicker, and other blocks as bash."""

    def run(self, commands: str) -> Ran:
        """Run one block; it ends at the first command that fails."""
        lines = [re.sub(r"\$(\w+)", lambda name: self.environment[name[1]], line) for line in commands.splitlines()]
        if not all(line.startswith("walletmigrate ") for line in lines):
            return super().run(commands)
        seen, code = "", 0
        with contextlib.chdir(self.folder):
            for line in lines:
                done = CliRunner().invoke(app, shlex.split(line)[1:], env=self.environment, prog_name="walletmigrate")
                seen, code = seen + done.output, done.exit_code
                if code:
                    break
        return Ran(code, seen)


def shell(stage: Stage) -> Shell:
    """The shell of somebody who works through a page."""
    made = stage.shell()
    return Inside(made.folder, made.environment)


def parts(total: int, count: int) -> list[int]:
    """``total`` in so many amounts, all different from 0 and most from each other."""
    shares = [1 + 37 * place % 101 for place in range(count)]
    made = [total * share // sum(shares) for share in shares]
    made[-1] += total - sum(made)
    return made


def add(connection: Connection, first: int, coins: list[int]) -> None:
    values = ", ".join(f"({first + place}, {amount})" for place, amount in enumerate(coins))
    connection.exec_driver_sql(f"insert into users (id, total_coins) values {values}")


def damaged(server: Postgres, url: str, folder: Path) -> Stage:
    """196 users; the ledger is right for 84 and, being empty, for 12; wrong for 3 and 59; absent for 38."""
    configuration = CONFIGURATION.replace('"EUR"', '"COINS"').replace("scale = 2", "scale = 0")
    configuration = re.sub(r"traits = .*\n", "", configuration)
    table = "create table users (id bigint primary key, total_coins bigint not null)"
    stage = started(server, url, folder, table, configuration)
    engine, mapping = stage.engine, stage.settings.mapping(None)
    posted = list(range(1, POSTINGS + 1))
    with engine.begin() as connection:
        add(connection, 1, parts(IN_LEDGER - sum(posted), OPEN))
    backfill(engine, stage.settings, mapping, ACT)
    adapter = LegacyBalanceAdapter(stage.settings, StaticSource({DUAL_WRITE: True}))
    with engine.begin() as connection:
        for amount in posted:
            adapter.credit(connection, 60 + amount, amount, type="prize")
    # As a superuser with triggers off, as real damage is done.
    with unguarded(engine, "users") as connection:
        add(connection, OPEN + 1, parts(COINS - IN_LEDGER - sum(OFF.values()), ABSENT + EMPTY) + [0] * ZERO)
        for key, amount in OFF.items():
            connection.exec_driver_sql(f"update users set total_coins = total_coins + {amount} where id = {key}")
        connection.exec_driver_sql(
            "insert into wallet.accounts (mapping, key, bucket, currency, state, balance) "
            "select 'users', id::text, 'cash', 'COINS', 'mirrored', 0 from users "
            f"where id > {OPEN + ABSENT} order by id"
        )
    return stage


def figures(engine: Engine) -> dict[str, int]:
    """What the report counted at its beginning, asked of the tables themselves."""
    state = (
        "from users as u left join wallet.accounts as a on a.key = u.id::text "
        "left join (select distinct account_id from wallet.wallet_entries) as e on e.account_id = a.id"
    )
    return {
        "users": scalar(engine, "select count(*) from users"),
        "coins": int(scalar(engine, "select sum(total_coins) from users")),
        "with entries": scalar(engine, f"select count(*) {state} where e.account_id is not null"),
        "in the ledger": int(scalar(engine, "select sum(balance) from wallet.accounts")),
        "absent": scalar(engine, f"select count(*) {state} where a.id is null"),
        "no entries": scalar(engine, f"select count(*) {state} where e.account_id is null and total_coins > 0")
        - ABSENT,
        "empty": scalar(engine, f"select count(*) {state} where e.account_id is null and total_coins = 0"),
        "transactions": scalar(engine, "select count(*) from wallet.transactions"),
        "off": int(scalar(engine, f"select sum(total_coins - balance) {state} where e.account_id is not null")),
    }


def test_the_first_report_s_damage_is_found_and_mended_to_no_drift_at_all(
    server: Postgres, database_url: str, tmp_path: Path
) -> None:
    stage = damaged(server, database_url, tmp_path)
    engine = stage.engine
    assert figures(engine) == {
        "users": USERS,
        "coins": COINS,
        "with entries": OPEN,
        "in the ledger": IN_LEDGER,
        "absent": ABSENT,
        "no entries": EMPTY,
        "empty": ZERO,
        "transactions": OPEN + POSTINGS,
        "off": 21,
    }
    assert Reader(shell(stage)).work_through(DOCS / "worked-example.md") >= 8
    by_kind = "select kind::text, count(*), sum(amount)::int from wallet.transactions group by kind order by min(id)"
    absent = sum(parts(COINS - IN_LEDGER - 21, ABSENT + EMPTY)[:ABSENT])
    assert rows(engine, by_kind) == [
        ("opening", OPEN + ABSENT, IN_LEDGER - 55 + absent),
        ("posting", POSTINGS, 55),
        ("correction", len(OFF), 21),
        ("resync", EMPTY, COINS - IN_LEDGER - 21 - absent),
    ]
    assert scalar(engine, "select sum(balance) from wallet.system_balances") == -COINS
    assert scalar(engine, "select count(*) from wallet.accounts where state = 'mirrored'") == USERS
    assert_sound(engine, stage.settings)


def test_the_figures_that_the_page_tells_are_those_of_the_example() -> None:
    said = (DOCS / "worked-example.md").read_text(encoding="utf-8")
    for figure in (USERS, COINS, OPEN, IN_LEDGER, ABSENT, EMPTY, ZERO, COINS - IN_LEDGER, 21, *OFF.values()):
        assert re.search(rf"(?<![\d,]){figure:,}(?![\d,])", said), figure


def test_the_bank_s_own_balances_are_held_against_the_replayed_accounts(
    server: Postgres, database_url: str, tmp_path: Path, shared_data: Path
) -> None:
    """The page's own program makes the truth; its commands and figures are those of the real file."""
    configuration = CONFIGURATION.replace('"EUR"', '"CZK"').replace(', role = "role"', "")
    table = "create table users (id bigint primary key, tenant text not null, total_coins numeric(20, 2) not null)"
    stage = started(server, database_url, tmp_path, table, configuration)
    replayed = traffic.read(shared_data)
    with stage.engine.begin() as connection:
        connection.exec_driver_sql(
            "insert into users values (%s, %s, %s)",
            [(int(key), replayed.tenants[key], balance) for key, balance in replayed.expected.items()],
        )
    backfill(stage.engine, stage.settings, stage.settings.mapping(None), ACT)
    (tmp_path / "bank-transactions.csv.gz").symlink_to(shared_data)
    page = (DOCS / "reconcile.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[:1]
    (tmp_path / "bank_truth.py").write_text(program, encoding="utf-8")
    before = scalar(stage.engine, "select sum(total_coins) from users")
    assert Reader(shell(stage)).work_through(DOCS / "reconcile.md") >= 4
    assert scalar(stage.engine, "select sum(total_coins) from users") == before == sum(replayed.expected.values())
    assert_sound(stage.engine, stage.settings)
