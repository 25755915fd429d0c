"""Situations in which something installed, granted, deployed or standing around the ledger is not as it should be."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import psycopg
from sqlalchemy import make_url

from ledger import execute, scalar
from monitoring import until
from releases import next_release
from runbook_faults import BEATING, running
from runbook_procedures import with_migrations
from runbook_stage import CONFIGURATION, Stage, backfilled, cut_over, cut_over_from
from servers import Postgres
from standby import pair

THROTTLED = CONFIGURATION.replace("\n[[mappings]]", "\n[throttle]\nreplica_lag_seconds = 1\n\n[[mappings]]", 1)
CLOCK = """
import os, time

_true = time.time
time.time = lambda: _true() + (90 if os.path.exists(os.path.join(os.path.dirname(__file__), "wrong")) else 0)
"""


def altered(server: Postgres, url: str, folder: Path) -> Stage:
    """As `cut_over`; then a superuser "tidied up": a sequence is gone, and a function; another runs as its owner, a
    table is the superuser's, the journal's trigger does not fire in replica role, an index is gone that keeps a posting
    from being reversed twice, and a constraint forbids bookings.
    """
    stage = cut_over(server, url, folder)
    for statement in (
        "drop sequence wallet.ceiling",
        "drop function wallet.cut_users(text, text, integer)",
        "alter function wallet.lock_users(bigint[]) security definer",
        "alter table wallet.failures owner to current_user",
        "alter table wallet.transactions enable trigger append_only",
        "drop index wallet.transactions_reversed_once",
        "alter table wallet.transactions add constraint no_bookings check (type <> 'booking') not valid",
    ):
        execute(stage.engine, statement)
    return stage


def disallowed(server: Postgres, url: str, folder: Path) -> Stage:
    """As `cut_over`; then a right was taken from the operators, and everybody may read the accounts. The application
    has a new login, which nobody has made a member of its role.
    """
    stage = cut_over(server, url, folder)
    login = f"shop_{make_url(url).database}"
    execute(stage.engine, f'create role "{login}" login')
    stage.cleanup.callback(execute, stage.engine, f'drop owned by "{login}"; drop role "{login}"')
    stage.variables["SHOP_LOGIN"] = login
    for statement in (
        "revoke execute on function wallet.set_line(boolean) from wallet_operator",
        "grant select on wallet.accounts to public",
    ):
        execute(stage.engine, statement)
    return stage


def half_deployed(server: Postgres, url: str, folder: Path) -> Stage:
    """As `cut_over`; the operators' machine has the next release, and so has one of the application's two processes.
    It was not installed.
    """
    stage = cut_over(server, url, folder)
    made = next_release(folder / "next")
    file = made.path / "walletmigrate" / "heartbeat.py"
    text = file.read_text(encoding="utf-8")
    assert text.count('version("walletmigrate")') == 1
    # Both are one distribution here; what tells a release of one's own is its number.
    file.write_text(text.replace('version("walletmigrate")', '"99.0"'), encoding="utf-8")
    beat = (sys.executable, str(BEATING), "walletmigrate.toml", "flags/environment.json")
    alive = ExitStack()
    stage.cleanup.push(alive)
    old = stage.cleanup.enter_context(running(stage, *beat))
    stage.variables["PYTHONPATH"] = str(made.path)
    alive.enter_context(running(stage, *beat))
    _alive(stage, 2)

    def deployed() -> None:
        """The last of the old processes is replaced; a minute later it is forgotten."""
        old.kill()
        old.wait()
        alive.enter_context(running(stage, *beat))
        execute(
            stage.engine, f"update wallet.processes set seen_at = seen_at - interval '1 minute' where pid = {old.pid}"
        )
        _alive(stage, 2)

    stage.meanwhile["deployed"] = deployed
    return stage


def _alive(stage: Stage, count: int) -> None:
    query = "select count(*) from wallet.processes where seen_at > clock_timestamp() - interval '1 minute'"
    log = stage.folder / "started.log"
    until(lambda: scalar(stage.engine, query) == count, lambda: log.read_text(encoding="utf-8"))


def apart(server: Postgres, _url: str, folder: Path) -> Stage:
    """As `cut_over`, on a primary with a standby that somebody told to pause its replay, and on a machine whose clock
    is 90 s ahead (for what runs in this shell; no machine's clock is set).
    """
    with ExitStack() as cleanup:
        servers = cleanup.enter_context(pair(server))
        stage = cut_over_from(
            backfilled(server, servers.primary.create_database("shop"), folder, configuration=THROTTLED)
        )
        assert servers.standby is not None
        servers.caught_up()
        replica = servers.standby.url_for("shop")
        clock = folder / "clock"
        clock.mkdir()
        (clock / "sitecustomize.py").write_text(CLOCK, encoding="utf-8")
        (clock / "wrong").touch()
        stage.variables.update(PYTHONPATH=str(clock), WALLETMIGRATE_REPLICA_URLS=replica, REPLICA_URL=replica)
        stage.meanwhile["clock"] = (clock / "wrong").unlink
        with psycopg.connect(replica, autocommit=True) as connection:
            connection.execute("select pg_wal_replay_pause()")
            until(lambda: _paused(connection, stage))
        return replace(stage, cleanup=cleanup.pop_all())


def _paused(replica: psycopg.Connection, stage: Stage) -> bool:
    """It pauses before the next record; what was received since is not replayed, for longer than a second."""
    execute(stage.engine, "update public.users set tenant = tenant where id = 1")
    row = replica.execute(
        "select pg_get_wal_replay_pause_state() = 'paused' and pg_last_wal_receive_lsn() > pg_last_wal_replay_lsn() "
        "and clock_timestamp() - pg_last_xact_replay_timestamp() > interval '1.5 seconds'"
    ).fetchone()
    return row == (True,)


def retiring(server: Postgres, url: str, folder: Path) -> Stage:
    """As `with_migrations`; when the column is gone, the table is restructured, loses a trigger, and user 9 goes."""
    stage = with_migrations(server, url, folder)

    def lose() -> None:
        execute(stage.engine, "drop trigger walletmigrate_users_r_delete on public.users")
        execute(stage.engine, "delete from public.users where id = 9")

    stage.meanwhile["restructured"] = lose
    return stage


INSTALLATIONS: dict[str, Callable[[Postgres, str, Path], Stage]] = {
    "clocks-and-replicas": apart,
    "installation-altered": altered,
    "releases": half_deployed,
    "retire": retiring,
    "rights": disallowed,
}
