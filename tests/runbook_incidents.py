"""More situations of runbooks: what happens once in a system's life, with keys, people, backups and servers."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
from sqlalchemy import make_url

import flagsmith_stub
import skips
from ledger import ACT, engine_named, execute, unguarded
from runbook_stage import CONFIGURATION, Stage, backfilled, cut_over, cut_over_from, drifted
from servers import Postgres
from standby import pair
from walletmigrate import LegacyBalanceAdapter, Posting, Settings, line, snapshots
from walletmigrate.audit import Act
from walletmigrate.embedded import DURABILITY_OFF, Server
from walletmigrate.flag_sources import FileSource
from walletmigrate.flags import DUAL_WRITE
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
        skips.skip("container")
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


def journal_edited(server: Postgres, url: str, folder: Path) -> Stage:
    """As `cut_over`; user 7 was paid 20 and 5, and a backup was made, ``shop.dump``. Then a superuser switched the
    triggers of the journal off, and made 25 of the 20; later user 7 was paid 1.
    """
    if server.binaries is None:
        skips.skip("container")
    stage = cut_over(server, url, folder)
    credit(stage, 7, 20, "deposit:41")
    credit(stage, 7, 5, "deposit:42")
    words = ["--format", "custom", "--file", str(folder / "shop.dump"), "--dbname", url]
    subprocess.run([str(server.binaries / "pg_dump"), *words], check=True, capture_output=True)
    with unguarded(stage.engine, "wallet.transactions") as connection:
        connection.exec_driver_sql("update wallet.transactions set amount = 25.00 where amount = 20")
    credit(stage, 7, 1, "deposit:43")
    return stage


FLAG_SERVER = """
[flags]
source = "flagsmith"
api_url = "{}"

[[mappings]]"""
LOGINS = {"shop": "wallet_app", "ops": "wallet_operator", "watch": "wallet_auditor"}


def rotating(server: Postgres, _url: str, folder: Path) -> Stage:
    """Phase dual_write, flags on a server, passwords asked for: logins of the application, the operators and the
    exporter. Each has a new password waiting in the environment, and the flag server's two keys a successor. A night
    job has a session of the application's old login.
    """
    if server.binaries is None:
        skips.skip("container")
    with ExitStack() as cleanup:
        stub = cleanup.enter_context(flagsmith_stub.running())
        stub.project.defaults[stub.flag(DUAL_WRITE)] = True
        stub.succeed(stub.environment_keys, flagsmith_stub.ENVIRONMENT_KEY, "ser.new-key")
        stub.succeed(stub.admin_keys, flagsmith_stub.ADMIN_KEY, "new-admin-key")
        own = cleanup.enter_context(Server.start(server.binaries, settings=DURABILITY_OFF))
        stage = backfilled(server, own.create_database("shop"), folder)
        configuration = CONFIGURATION.replace("\n[[mappings]]", FLAG_SERVER.format(stub.api_url), 1)
        (folder / "walletmigrate.toml").write_text(configuration, encoding="utf-8")
        for name, role in LOGINS.items():
            execute(stage.engine, f"create role {name} login password 'old-{name}' in role {role}")
        execute(stage.engine, "grant select, update on users to shop")
        ask_for_passwords(own)
        url = make_url(own.url_for("shop"))

        def address(name: str, password: str) -> str:
            return url.set(username=name, password=password).render_as_string(hide_password=False)

        variables = {f"NEW_{name.upper()}_PASSWORD": f"new-{name}" for name in LOGINS}
        variables |= {f"NEW_{name.upper()}_URL": address(f"{name}_2", f"new-{name}") for name in LOGINS}
        variables |= {
            "OLD_SHOP_URL": address("shop", "old-shop"),
            "WALLETMIGRATE_DATABASE_URL": address("ops", "old-ops"),
            "WALLETMIGRATE_FLAGSMITH_KEY": flagsmith_stub.ENVIRONMENT_KEY,
            "WALLETMIGRATE_FLAGSMITH_ADMIN_KEY": flagsmith_stub.ADMIN_KEY,
            "NEW_FLAGSMITH_KEY": "ser.new-key",
            "NEW_FLAGSMITH_ADMIN_KEY": "new-admin-key",
        }
        night = psycopg.connect(variables["OLD_SHOP_URL"], application_name="night-job")
        cleanup.callback(night.close)
        return replace(stage, variables=variables, cleanup=cleanup.pop_all())


def ask_for_passwords(server: Server) -> None:
    """Let everybody but the superuser show a password, from the next connection on."""
    with psycopg.connect(server.url, autocommit=True) as connection:
        row = connection.execute("show hba_file").fetchone()
        assert row is not None
        rules = "local all postgres trust\nlocal all all scram-sha-256\n"
        Path(row[0]).write_text(rules, encoding="utf-8")
        connection.execute("select pg_reload_conf()")


def paid(server: Postgres, url: str, folder: Path) -> Stage:
    """As `cut_over`, and user 3 has paid 10."""
    stage = cut_over_from(backfilled(server, url, folder))
    credit(stage, 3, 10, "deposit:41")
    return stage


def complaining(server: Postgres, url: str, folder: Path) -> Stage:
    """As `cut_over`; user 3 was booked twice for one order, by two requests of a client that had no patience."""
    stage = cut_over_from(backfilled(server, url, folder))
    adapter = adapter_of(stage)
    with stage.engine.begin() as connection:
        adapter.credit(connection, 3, 50, type="deposit", reference=("deposit", 41), correlation_id="req-7a10")
        for attempt, request in enumerate(("req-7a11", "req-7a12")):
            adapter.debit(
                connection,
                3,
                30,
                type="booking",
                reference=("order", 900),
                idempotency_key=f"booking:900:{attempt}",
                correlation_id=request,
            )
    return stage


def undecided(server: Postgres, url: str, folder: Path) -> Stage:
    """Phase dual_write, everything backfilled; then a night job wrote two balances past the adapter."""
    stage = backfilled(server, url, folder)
    with engine_named(url, "night-job").begin() as connection:
        connection.exec_driver_sql("update users set total_coins = total_coins + 1 where id in (2, 4)")
    return stage


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
    "currency-or-scale-change": paid,
    "erasure": personal,
    "escalation": drifted,
    "failover": failed_over,
    "go-no-go": undecided,
    "journal-edited": journal_edited,
    "restore": restored,
    "rotate-keys": rotating,
    "support-playbook": complaining,
}
