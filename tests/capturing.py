"""A ledger with accounts in several states, and other programs that write past the adapter."""

from __future__ import annotations

from sqlalchemy.exc import DBAPIError

from copies import copied
from ledger import ACT, engine_named, execute, install_users, post, rows, users_settings
from walletmigrate import bypasses, connect, fences
from walletmigrate.bypasses import CodePath
from walletmigrate.config import Settings

ADD = "update users set total_coins = total_coins + 5 where id = 1"
REJECTED = "WM031"


class Place:
    """Ten users of 100 each in phase dual_write; the first has an account, the second a stale one."""

    def __init__(self, url: str, *, with_promo: bool = False) -> None:
        self.engine, self.settings = engine_named(url), users_settings(url, with_promo=with_promo)
        copied(url, f"capturing {with_promo}", lambda: self._make(url, with_promo))

    def _make(self, url: str, with_promo: bool) -> None:
        install_users(url, phase="dual_write", with_promo=with_promo)
        with self.engine.begin() as connection:
            for key in (1, 2):
                post(connection, self.settings, "open_account", key, 0)
        self.write("update users set total_coins = total_coins + 1 where id = 2")
        execute(self.engine, "delete from wallet.bypasses")

    def write(self, *statements: str, name: str = "cron") -> str:
        """One transaction of another program; the SQLSTATE it ended with, empty when it committed."""
        engine = connect.engine(self.settings.database_url or "", application_name=name)
        try:
            with engine.begin() as connection:
                for statement in statements:
                    connection.exec_driver_sql(statement, execution_options={"no_parameters": True})
        except DBAPIError as error:
            return str(getattr(error.orig, "sqlstate", ""))
        finally:
            engine.dispose()
        return ""

    def mode(self, mode: fences.Mode) -> None:
        fences.set_mode(self.engine, self.settings, self.settings.mapping(None), mode, ACT)

    def state(self, key: int = 1) -> tuple[object, ...]:
        found = rows(
            self.engine,
            "select a.state::text, a.balance, u.total_coins from wallet.accounts as a "
            "left join users as u on u.id::text = a.key where a.key = :key and a.bucket = 'cash'",
            key=str(key),
        )
        return found[0]

    def catalogued(self) -> list[tuple[object, ...]]:
        query = "select operation, key, column_name, treatment, old_value, new_value from wallet.bypasses order by at"
        return rows(self.engine, query)

    def paths(self, settings: Settings | None = None) -> tuple[CodePath, ...]:
        with self.engine.connect() as connection:
            return bypasses.report(connection, settings or self.settings).paths

    def rejected(self) -> int:
        with self.engine.connect() as connection:
            return bypasses.rejected(connection, self.settings)["users"]
