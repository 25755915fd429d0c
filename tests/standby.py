"""A primary of its own with a standby beside it: servers that a test may crash and promote."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psycopg
from sqlalchemy import make_url

import skips
from servers import Postgres
from walletmigrate.embedded import Server

SETTINGS = {
    **{"fsync": "off", "full_page_writes": "off", "synchronous_commit": "on"},
    "wal_retrieve_retry_interval": "100ms",  # else a standby without a primary heeds a promotion after five seconds
}
"""What outlives a crash of the processes; a power cut is not what these tests make."""
SECONDS = 60.0


@dataclass
class Pair:
    """The two servers. ``standby`` is None while it is down; its data stay."""

    binaries: Path
    primary: Server
    data: Path
    standby: Server | None = None

    def start_standby(self) -> Server:
        """Start the standby, which follows the primary as far as there is one."""
        self.standby = Server.start(self.binaries, data=self.data, persistent=True, settings=SETTINGS)
        return self.standby

    def stop_standby(self) -> None:
        """Stop the standby in order; what the primary commits from now on it does not get."""
        assert self.standby is not None
        self.standby.stop()
        self.standby = None

    def crash_primary(self) -> None:
        """End the primary at once, without a checkpoint and without a word to anybody."""
        with psycopg.connect(self.primary.url) as connection:
            row = connection.execute("show data_directory").fetchone()
        assert row is not None
        process = int(Path(row[0], "postmaster.pid").read_text(encoding="utf-8").split()[0])
        os.kill(process, signal.SIGQUIT)
        until(lambda: not _answers(self.primary.url), "the primary is down")

    def caught_up(self) -> None:
        """Wait until the standby has replayed all that the primary has written."""
        assert self.standby is not None
        with psycopg.connect(self.primary.url) as connection:
            row = connection.execute("select pg_current_wal_lsn()").fetchone()
        assert row is not None
        with psycopg.connect(self.standby.url, autocommit=True) as replica:
            query = "select pg_last_wal_replay_lsn() >= %s::pg_lsn"
            until(lambda: replica.execute(query, row).fetchone() == (True,), "the standby has caught up")

    def promote(self) -> None:
        """Make the standby the primary; back when it takes writes."""
        assert self.standby is not None
        with psycopg.connect(self.standby.url, autocommit=True) as replica:
            assert replica.execute("select pg_promote()").fetchone() == (True,)

    def synchronous(self) -> None:
        """Let every commit of the primary wait for the standby, from now on."""
        with psycopg.connect(self.primary.url, autocommit=True) as connection:
            connection.execute("alter system set synchronous_standby_names = '*'")
            connection.execute("select pg_reload_conf()")
            query = "select sync_state in ('sync', 'quorum') from pg_stat_replication"
            until(lambda: connection.execute(query).fetchone() == (True,), "the standby is synchronous")


@contextmanager
def pair(server: Postgres) -> Iterator[Pair]:
    """A fresh primary of the same programs as ``server``, and a standby that has caught up."""
    if server.binaries is None:
        skips.skip("container")
    folder = Path(tempfile.mkdtemp(prefix="wm-standby-"))
    made = None
    try:
        with Server.start(server.binaries, settings=SETTINGS) as primary:
            made = Pair(server.binaries, primary, folder / "data")
            _copy(primary, made.data)
            made.start_standby()
            made.caught_up()
            yield made
    finally:
        if made is not None and made.standby is not None:
            made.standby.stop()
        shutil.rmtree(folder, ignore_errors=True)


def until(true: Callable[[], bool], what: str) -> None:
    """Look until something is so."""
    deadline = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < deadline, f"not within {SECONDS:g} s: {what}"
        time.sleep(0.01)  # the pause between two looks


def _copy(primary: Server, data: Path) -> None:
    url = make_url(primary.url)
    socket = str(url.query["host"])
    account = os.stat(socket)
    words = ["--pgdata", str(data), "--write-recovery-conf", "--checkpoint", "fast", "--no-sync"]
    command = [str(primary.binaries / "pg_basebackup"), "--dbname", primary.url, *words]
    subprocess.run(command, check=True, capture_output=True, timeout=SECONDS)
    for path in (data.parent, data, *data.rglob("*")):
        with suppress(PermissionError):  # not root: everything is the own account's already
            os.chown(path, account.st_uid, account.st_gid, follow_symlinks=False)


def _answers(url: str) -> bool:
    try:
        psycopg.connect(url, connect_timeout=5).close()
    except psycopg.OperationalError:
        return False
    return True
