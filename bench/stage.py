"""What every benchmark stands on: legacy tables, an installed ledger, flags, and a check that it was all true."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

import sqlalchemy
from sqlalchemy import BigInteger, Engine, MetaData, Numeric, Table, Text, text

from walletmigrate import connect
from walletmigrate.audit import Act
from walletmigrate.backfill import KEPT_PERCENT
from walletmigrate.config import Column, Mapping, Settings
from walletmigrate.embedded import Server
from walletmigrate.flag_file import FlagFile
from walletmigrate.flags import DUAL_WRITE, READ_FROM_LEDGER
from walletmigrate.install import install

ACT = Act("bench", "a benchmark")
AMOUNT = Decimal("1.25")
FLAGS = Path(__file__).resolve().parent.parent / "flags" / "environment.json"

metadata = MetaData()


def _users(name: str) -> Table:
    """A legacy table. Room on the pages lets an update stay heap-only: the fastest that a bare one can be."""
    return Table(
        name,
        metadata,
        sqlalchemy.Column("id", BigInteger, primary_key=True, autoincrement=False),
        sqlalchemy.Column("tenant", Text, nullable=False),
        sqlalchemy.Column("role", Text, nullable=False),
        sqlalchemy.Column("total_coins", Numeric(20, 2), nullable=False),
        postgresql_with={"fillfactor": 70},
    )


USERS = _users("users")
BARE = _users("users_bare")


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured. ``accounts`` is the size of the backfill."""

    quick: bool
    accounts: int

    def rounds(self, full: int, quick: int) -> int:
        """The number of rounds at this scale."""
        return quick if self.quick else full


def application(url: str) -> Engine:
    """An engine as an application makes it, with the driver's own defaults."""
    return sqlalchemy.create_engine(connect.parsed(url), pool_size=1, max_overflow=0)


def settings_of(policy: str = "shadow") -> Settings:
    """The configuration of the mapping ``users``: one column, euros, a floor of zero."""
    column = Column(bucket="cash", column="total_coins", currency="EUR", scale=2, floor=Decimal(0))
    mapping = Mapping.model_validate(
        {
            "name": "users",
            "table": "public.users",
            "key": "id",
            "policy": policy,
            "traits": {"tenant": "tenant", "role": "role"},
            "columns": [column],
        }
    )
    return Settings(mappings=(mapping,))


def make_users(engine: Engine, table: Table, rows: int) -> None:
    """Make a legacy table with the keys 1 to ``rows``, 1000.00 each."""
    table.create(engine)
    with engine.begin() as connection:
        connection.exec_driver_sql(
            f"insert into {table.name} (id, tenant, role, total_coins) "
            "select g, case g % 2 when 1 then 'acme' else 'globex' end, 'member', 1000 "
            f"from generate_series(1, {int(rows)}) as g",
            execution_options={"no_parameters": True},
        )


def install_ledger(url: str, phase: str) -> None:
    """Install the ledger on ``users`` and put the migration into a phase, without any gate."""
    admin = connect.engine(url, application_name="walletmigrate-bench", pool_size=1, max_overflow=0)
    install(admin, settings_of(), ACT)
    with admin.begin() as connection:
        connection.execute(text("update wallet.control set phase = :phase"), {"phase": phase})
    admin.dispose()


def mirror(engine: Engine, upto: int) -> None:
    """Open the accounts of the keys 1 to ``upto`` at least, a batch at a time, and leave them as a backfill does."""
    with engine.begin() as connection:
        for last in range(0, upto, 5_000):
            connection.execute(
                text("select from wallet.backfill_users(cast(:after as text), cast(:upto as text), null)"),
                {"after": str(last), "upto": str(min(last + 5_000, upto))},
            )
        connection.execute(text("select wallet.fill_accounts(:percent)"), {"percent": KEPT_PERCENT})


def settle(engine: Engine) -> None:
    """Vacuum and analyze all tables and write everything out, so that no round pays for the one before."""
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("vacuum analyze"))
        connection.execute(text("checkpoint"))


def checkpoint(engine: Engine) -> None:
    """Write everything out."""
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("checkpoint"))


def count(engine: Engine, query: str) -> int:
    """The number that a query yields."""
    with engine.connect() as connection:
        return int(connection.scalar(text(query)) or 0)


def check_mirrored(engine: Engine, upto: int) -> None:
    """Raise RuntimeError unless each of the keys 1 to ``upto`` is mirrored: a wrong balance has no speed."""
    wrong = count(
        engine,
        "select count(*) from users as l left join wallet.accounts as a on a.mapping = 'users' and a.key = l.id::text "
        f"where l.id <= {int(upto)} and (a.state = 'mirrored' and a.balance = l.total_coins) is not true",
    )
    if wrong:
        raise RuntimeError(f"{wrong} accounts are not mirrored after the benchmark; its figures mean nothing")


def flag_file(folder: Path, *, on: bool) -> Path:
    """A flag document in which everyone is dual-written and read from the ledger, or no one."""
    path = folder / f"flags-{'on' if on else 'off'}.json"
    shutil.copyfile(FLAGS, path)
    if on:
        for flag in (DUAL_WRITE, READ_FROM_LEDGER):
            FlagFile(path).set(flag, True, everyone=True)
    return path


@contextmanager
def database(server: Server, name: str) -> Iterator[str]:
    """A database for one benchmark, dropped after it; yields its URL."""
    url = server.create_database(name)
    try:
        yield url
    finally:
        server.drop_database(name)
