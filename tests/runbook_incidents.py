"""More situations of runbooks: what happens once in a system's life, with keys, people, backups and servers."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ledger import ACT, engine_named
from runbook_stage import CONFIGURATION, Stage, backfilled, cut_over_from
from servers import Postgres
from standby import pair
from walletmigrate import LegacyBalanceAdapter, Posting, Settings, line, snapshots
from walletmigrate.audit import Act
from walletmigrate.embedded import DURABILITY_OFF, Server
from walletmigrate.flag_sources import FileSource
from walletmigrate.install import install

RAW_QUERIES = CONFIGURATION.replace("\n[[mappings]]", "\n[capture]\nraw_queries = true\n\n[[mappings]]", 1)


def adapter_of(stage: Stage) -> LegacyBalanceAdapter:
    """The application's adapter, by the stage's flag file."""
    return LegacyBalanceAdapter(stage.settings, FileSource(stage.settings.flags.path), observers=())


def personal(server: Postgres, url: str, folder: Path) -> Stage:
    """As `cut_over`, and raw statements are kept: user 7 has texts beside three payments, one of them to user 8,
    and a support tool wrote her balance past the adapter.
    """
    stage = cut_over_from(backfilled(server, url, folder, configuration=RAW_QUERIES))
    install(stage.engine, stage.settings, ACT)
    adapter = adapter_of(stage)
    with stage.engine.begin() as connection:
        adapter.credit(connection, 7, 20, type="deposit", description="Ada, by card", address="192.0.2.7")
        adapter.credit(connection, 8, 5, type="deposit", description="Bob, by card", address="192.0.2.8")
        adapter.transfer(connection, 7, 8, 3, type="gift", description="happy birthday, Bob. Ada")
    with engine_named(url, "support-tool").begin() as connection:
        connection.exec_driver_sql("update users set total_coins = total_coins + 1 where id = 7 /* Ada called */")
    return stage


def failed_over(server: Postgres, _url: str, folder: Path) -> Stage:
    """As `cut_over`, on a primary with an asynchronous standby. Payment 41 reached the standby; then it fell behind,
    user 3 paid once more (42), somebody stopped the line, the primary crashed, and the standby was promoted.

    ``provider.csv`` is what the payment provider says that users 1 to 3 have.
    """
    with ExitStack() as cleanup:
        servers = cleanup.enter_context(pair(server))
        stage = cut_over_from(backfilled(server, servers.primary.create_database("shop"), folder))
        credit(stage, 3, 10, "deposit:41")
        servers.caught_up()
        servers.stop_standby()
        credit(stage, 3, 10, "deposit:42")
        line.stop(stage.engine, stage.settings, Act("on-call:test", "INC-170: payments fail"))
        servers.crash_primary()
        url = servers.start_standby().url_for("shop")
        servers.promote()
        (folder / "provider.csv").write_text("key,balance\n1,100\n2,100\n3,120\n", encoding="utf-8")
        return moved(stage, url, cleanup=cleanup.pop_all())


def restored(server: Postgres, url: str, folder: Path) -> Stage:
    """Phase dual_write and a backup, ``shop.dump``; then payment 42, the phase read_ledger, and tenant acme cut over.
    Then the server was lost. The address leads to an empty database of a new one.
    """
    if server.binaries is None:
        pytest.skip("a container's server has no programs here to make a backup with")
    stage = backfilled(server, url, folder)
    credit(stage, 3, 10, "deposit:41")
    snapshots.take(stage.engine, stage.settings, ACT)
    words = ["--format", "custom", "--file", str(folder / "shop.dump"), "--dbname", url]
    subprocess.run([str(server.binaries / "pg_dump"), *words], check=True, capture_output=True)
    credit(stage, 3, 10, "deposit:42")
    stage = cut_over_from(stage)
    (folder / "provider.csv").write_text("key,balance\n1,100\n2,100\n3,120\n", encoding="utf-8")
    with ExitStack() as cleanup:
        new = cleanup.enter_context(Server.start(server.binaries, settings=DURABILITY_OFF))
        return moved(stage, new.create_database("shop"), cleanup=cleanup.pop_all())


def moved(stage: Stage, url: str, **changes: Any) -> Stage:
    """The same stage, with another database."""
    settings = Settings.load(stage.folder / "walletmigrate.toml", database_url=url)
    return replace(stage, engine=engine_named(url, connect_args={}), settings=settings, **changes)


def credit(stage: Stage, key: int, amount: int, idempotency_key: str) -> Posting:
    """A deposit, as the application posts it."""
    with stage.engine.begin() as connection:
        return adapter_of(stage).credit(
            connection,
            key,
            amount,
            type="deposit",
            reference=("deposit", idempotency_key[8:]),
            idempotency_key=idempotency_key,
        )


INCIDENTS: dict[str, Callable[[Postgres, str, Path], Stage]] = {
    "erasure": personal,
    "failover": failed_over,
    "restore": restored,
}
