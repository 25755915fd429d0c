"""What the tests of the migration's end share: accounts that are frozen, an adapter, and the application's Alembic."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

import ledger
from adapting import READ
from walletmigrate import LegacyBalanceAdapter, Mapping, StaticSource
from walletmigrate.archive_check import ArchiveCheck, archive
from walletmigrate.backfill import backfill
from walletmigrate.freeze import freeze
from walletmigrate.retire import Retirement, retire
from walletmigrate.verify import verify

ACT = ledger.ACT
SOURCE = StaticSource(READ)

_ENV = """
from alembic import context

context.configure(connection=context.config.attributes["connection"], version_table="app_versions")
context.run_migrations()
"""

FIRST = """
revision = "0001"
down_revision = None


def upgrade():
    pass


def downgrade():
    pass
"""


class End:
    """Ten users with 100 each, in phase frozen once `freeze` was called, and the application's migrations."""

    def __init__(self, url: str, folder: Path, **table: Any) -> None:
        self.engine, self.settings = ledger.install_users(url, phase="dual_write", **table)
        self.url, self.folder = url, folder
        self.file = folder / "users.jsonl.gz"
        self.migrations = folder / "alembic" / "versions"
        self.migrations.mkdir(parents=True)
        (folder / "alembic" / "env.py").write_text(_ENV, encoding="utf-8")
        (self.migrations / "0001_first.py").write_text(FIRST, encoding="utf-8")
        backfill(self.engine, self.settings, self.mapping, ACT)

    @property
    def mapping(self) -> Mapping:
        return self.settings.mapping(None)

    def adapter(self) -> LegacyBalanceAdapter:
        """An adapter of a process that starts now."""
        return LegacyBalanceAdapter(self.settings, SOURCE)

    def freeze(self) -> End:
        ledger.set_phase(self.engine, "frozen")
        freeze(self.engine, self.settings, self.mapping, ACT)
        assert self.verify()
        return self

    def verify(self) -> bool:
        seen = verify(self.engine, self.settings, self.mapping, ACT)
        assert seen.clean, (seen.drift, seen.behind, seen.journal, seen.guards, seen.imbalance)
        return True

    def archive(self) -> ArchiveCheck:
        checked = archive(self.engine, self.settings, self.mapping, self.file, ACT)[1]
        assert checked is not None
        return checked

    def retire(self, archives: Sequence[Path] | None = None, **options: Any) -> Retirement:
        files = [self.file] if archives is None else archives
        return retire(self.engine, self.settings, SOURCE, files, self.migrations, ACT, **options)

    def migrate(self, to: str = "head", *, down: bool = False) -> None:
        """What the application does: alembic upgrade, alembic downgrade."""
        with self.engine.begin() as connection:
            config = Config()
            config.set_main_option("script_location", str(self.folder / "alembic"))
            config.set_main_option("path_separator", "os")
            config.attributes["connection"] = connection
            (command.downgrade if down else command.upgrade)(config, to)

    def columns(self) -> set[str]:
        query = "select attname::text from pg_attribute where attrelid = 'public.users'::regclass and attnum > 0"
        return {name for (name,) in ledger.rows(self.engine, query)} & {"total_coins", "promo"}

    def balance(self, adapter: LegacyBalanceAdapter, key: object, bucket: str = "cash") -> Decimal:
        with self.engine.connect() as connection:
            return adapter.balance(connection, key, bucket=bucket).amount  # type: ignore[arg-type]


def behind(end: End, first: Callable[[Connection], object], second: Callable[[Connection], object]) -> str | None:
    """Let ``second`` come to wait for ``first``, which is in flight, then commit both; the SQLSTATE it failed with."""
    other, said = ledger.engine_named(end.url, "second"), []

    def follow() -> None:
        try:
            with other.begin() as connection:
                second(connection)
        except DBAPIError as error:
            said.append(str(getattr(error.orig, "sqlstate", None)))

    with end.engine.connect() as connection:
        first(connection)
        follower = threading.Thread(target=follow)
        follower.start()
        ledger.until_blocked(end.engine, "second")
        connection.commit()
    follower.join()
    return said[0] if said else None
