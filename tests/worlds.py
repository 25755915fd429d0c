"""A database for tests of interleavings: what its accounts and rows hold, and calls of the adapter to be run later."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from sqlalchemy import Connection, Engine

from interleaving import Stage
from invariants import assert_sound
from ledger import execute, post, rows, scalar
from walletmigrate.adapter import LegacyBalanceAdapter
from walletmigrate.config import Settings
from walletmigrate.flags import DUAL_WRITE, StaticSource
from walletmigrate.postings import Posting


@dataclass
class World:
    """A database with users of 100 each, in phase dual_write, and a stage for sessions in it."""

    engine: Engine
    settings: Settings
    stage: Stage

    def adapter(self, *, dual: bool = True) -> LegacyBalanceAdapter:
        return LegacyBalanceAdapter(self.settings, StaticSource({DUAL_WRITE: dual}))

    def credit(
        self, key: int, amount: int = 10, *, dual: bool = True, **details: Any
    ) -> Callable[[Connection], Posting]:
        adapter = self.adapter(dual=dual)
        return lambda connection: adapter.credit(connection, key, amount, type="test", **details)

    def account(self, key: int) -> tuple[str, Decimal, Decimal] | None:
        """State, ledger balance and legacy balance."""
        query = (
            "select a.state::text, a.balance, u.total_coins from wallet.accounts a "
            "join users u on u.id::text = a.key where a.key = :key"
        )
        found = rows(self.engine, query, key=str(key))
        return found[0] if found else None

    def accounts(self) -> list[tuple[Any, ...]]:
        """Key, state and ledger balance of every account."""
        return rows(self.engine, "select key, state::text, balance from wallet.accounts order by key")

    def legacy(self, key: int) -> Decimal:
        return Decimal(scalar(self.engine, "select total_coins from users where id = :key", key=key))

    def mirror(self, *keys: int) -> None:
        with self.engine.begin() as connection:
            for key in keys:
                post(connection, self.settings, "open_account", key, 0)

    def make_stale(self, *keys: int) -> None:
        self.mirror(*keys)
        for key in keys:
            execute(self.engine, "update users set total_coins = total_coins + 1 where id = :key", key=key)

    def assert_sound(self) -> None:
        assert_sound(self.engine, self.settings)
