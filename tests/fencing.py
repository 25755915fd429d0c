"""What the tests of the fence share: ten users with accounts in any state, writes past the adapter, and triggers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

from invariants import assert_sound
from ledger import execute, install_users, post, scalar
from walletmigrate.adapter import LegacyBalanceAdapter
from walletmigrate.capture import fence_problems
from walletmigrate.config import Settings
from walletmigrate.flags import DUAL_WRITE, StaticSource

FROZEN = "WM030"
INSERT = "insert into users (id, tenant, role, total_coins) values (1, 'acme', 'member', 100)"
UPDATE = "update users set total_coins = total_coins + 1 where id = 1"
DELETE = "delete from users where id = 1"
NEW_KEY = "update users set id = 11 where id = 1"
TRUNCATE = "truncate users"


@dataclass
class World:
    """Ten users of 100 each and the bucket promo of 5 each, in phase dual_write."""

    engine: Engine
    settings: Settings

    def bring(self, state: str, key: int = 1) -> None:
        """Bring both accounts of a user into a state."""
        if state == "absent":
            return
        with self.engine.begin() as connection:
            for bucket in ("cash", "promo"):
                post(connection, self.settings, "open_account", key, 0, bucket=bucket)
        if state == "stale":
            execute(
                self.engine, "update users set total_coins = total_coins + 1, promo = promo + 1 where id = :k", k=key
            )
        elif state == "closed":
            execute(self.engine, "delete from users where id = :k", k=key)
        elif state == "frozen":
            self.freeze()

    def freeze(self) -> None:
        execute(self.engine, "select * from wallet.freeze_users(null, null)")

    def write(self, *statements: str) -> str:
        """Run statements in one transaction, and give the SQLSTATE of their failure, or nothing."""
        try:
            with self.engine.begin() as connection:
                for statement in statements:
                    connection.exec_driver_sql(statement)
        except DBAPIError as error:
            return str(getattr(error.orig, "sqlstate", ""))
        return ""

    def state(self, key: int = 1, bucket: str = "cash") -> str:
        found = scalar(
            self.engine, "select state::text from wallet.accounts where key = :k and bucket = :b", k=str(key), b=bucket
        )
        return found or "absent"

    def legacy(self, key: int = 1, column: str = "total_coins") -> Any:
        return scalar(self.engine, f"select {column} from users where id = :k", k=key)

    def adapter(self, *, dual: bool = True) -> LegacyBalanceAdapter:
        return LegacyBalanceAdapter(self.settings, StaticSource({DUAL_WRITE: dual}))

    def assert_sound(self) -> None:
        assert_sound(self.engine, self.settings)


def make_world(url: str, *, policy: str = "shadow") -> World:
    engine, settings = install_users(url, with_promo=True, policy=policy, phase="dual_write")
    return World(engine, settings)


@pytest.fixture
def world(database_url: str) -> Iterator[World]:
    made = make_world(database_url)
    yield made
    made.assert_sound()


def application_trigger(world: World, when: str, body: str) -> None:
    function = (
        "create function app_trigger() returns trigger language plpgsql as "
        f"$$ begin if pg_trigger_depth() > 1 then return new; end if; {body} end $$"
    )
    trigger = f"create trigger app_trigger {when} on users for each row execute function app_trigger()"
    assert world.write(function, trigger) == ""


def found_by(world: World) -> dict[str, str]:
    with world.engine.connect() as connection:
        problems = fence_problems(connection, world.settings, world.settings.mapping(None))
    return {problem.trigger: problem.problem for problem in problems}
