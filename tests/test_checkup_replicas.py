"""What doctor says of replicas, with a real one that streams from a server of this test's own."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator

import pytest
from pydantic import SecretStr
from sqlalchemy import make_url
from sqlalchemy.pool import NullPool

import skips
from findings import assert_told
from ledger import execute, install_users
from monitoring import until
from servers import Postgres
from walletmigrate import Settings, connect, doctor, embedded
from walletmigrate.config import ThrottleSettings
from walletmigrate.embedded import DURABILITY_OFF, Server

LIMIT = 0.5


class Pair:
    """A primary with a ledger, and its standby."""

    def __init__(self, primary: Server, standby: Server, settings: Settings) -> None:
        self.primary = connect.engine(primary.url_for("shop"), application_name="test", poolclass=NullPool)
        self.standby_url = standby.url_for("shop")
        self.standby = connect.engine(self.standby_url, application_name="test", poolclass=NullPool)
        update = {"throttle": ThrottleSettings(replica_lag_seconds=LIMIT)}
        self.settings = settings.model_copy(update={**update, "replica_urls": SecretStr(self.standby_url)})

    def found(self, settings: Settings | None = None) -> list[str]:
        with self.primary.connect() as connection:
            found = doctor.examine(connection, settings or self.settings)
        assert_told(found)
        return [one.what for one in found]

    def found_after_a_write(self, settings: Settings | None = None) -> list[str]:
        self.write()
        return self.found(settings)

    def write(self) -> None:
        execute(self.primary, "create table if not exists written (at timestamptz default now())")
        execute(self.primary, "insert into written default values")


@pytest.fixture(scope="module")
def pair(server: Postgres) -> Iterator[Pair]:
    if server.binaries is None:
        skips.skip("container")
    home = embedded._scratch_folder(embedded._account())
    try:
        with Server.start(server.binaries, home / "primary", DURABILITY_OFF, persistent=True) as primary:
            _, settings = install_users(primary.create_database("shop"))
        # Stopped, the folder is a base backup.
        subprocess.run(["cp", "-a", home / "primary", home / "standby"], check=True)
        signal = home / "standby" / "standby.signal"
        signal.touch()
        os.chown(signal, *(getattr(embedded._account(), name) for name in ("uid", "gid")))
        with Server.start(server.binaries, home / "primary", DURABILITY_OFF) as primary:
            host = make_url(primary.url).query["host"]
            follow = {"primary_conninfo": f"user=postgres host={host} port=5432 application_name=standby"}
            with Server.start(server.binaries, home / "standby", {**DURABILITY_OFF, **follow}) as standby:
                yield Pair(primary, standby, settings)
    finally:
        shutil.rmtree(home)


def test_a_replica_that_keeps_up_is_no_finding_and_one_that_does_not_is(pair: Pair) -> None:
    alone = pair.settings.model_copy(update={"replica_urls": None})
    # Each look in a transaction of its own: within one, who is connected stays as it was at the first look.
    with pair.primary.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        query = "select count(*) from pg_stat_replication where state = 'streaming' and replay_lsn is not null"
        until(lambda: connection.exec_driver_sql(query).scalar() == 1, pair.found)
    pair.write()
    until(lambda: pair.found() == [], pair.found)
    # As the primary sees it.
    admin = pair.standby.execution_options(isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.exec_driver_sql("alter system set recovery_min_apply_delay = '1s'")
        connection.exec_driver_sql("select pg_reload_conf()")
    until(
        lambda: any(one.startswith("replica standby is ") for one in pair.found_after_a_write(alone)),
        lambda: pair.found(alone),
    )
    # Asked directly: what is received and not replayed.
    with admin.connect() as connection:
        connection.exec_driver_sql("alter system reset recovery_min_apply_delay")
        connection.exec_driver_sql("select pg_reload_conf()")
        connection.exec_driver_sql("select pg_wal_replay_pause()")
        name = connect.masked(pair.standby_url)
        assert f"replica {name} was told to pause its replay" in pair.found()
        state = "select pg_get_wal_replay_pause_state()"  # what it is told it does when it is about to replay next
        until(lambda: pair.found_after_a_write() != [] and connection.exec_driver_sql(state).scalar() == "paused")
        until(
            lambda: any(one.startswith(f"replica {name} is ") for one in pair.found_after_a_write()),
            pair.found,
        )
        connection.exec_driver_sql("select pg_wal_replay_resume()")
    until(lambda: pair.found_after_a_write() == [], pair.found)


def test_a_replica_that_is_none_or_does_not_answer_is_found(pair: Pair) -> None:
    primary = pair.primary.url.render_as_string(hide_password=False)
    away = "postgresql://nobody:hunter2@127.0.0.1:1/shop"
    wrong = pair.settings.model_copy(update={"replica_urls": SecretStr(f"{primary} {away}")})
    one, other = pair.found(wrong)
    assert "is configured as a replica, and is none" in one
    assert "does not answer" in other
    assert "hunter2" not in other


def test_a_doctor_that_was_sent_to_the_replica_says_so(pair: Pair) -> None:
    with pair.standby.connect() as connection:
        found = doctor.examine(connection, pair.settings)
    assert [one.what for one in found] == ["this database is a replica itself: nothing can be posted in it"]
    assert_told(found)
