"""Verify on a hot standby: a real one, made by pg_basebackup of the tests' server."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from sqlalchemy import Engine, make_url, text

import skips
from commandline import Project
from ledger import ACT, engine_named, execute, post, rows, scalar
from servers import SETTINGS, Postgres
from verifying import Ledger, prepared
from walletmigrate.embedded import Server
from walletmigrate.errors import PreconditionRefused
from walletmigrate.verify import verify


@pytest.fixture
def made(server: Postgres, database_url: str) -> Ledger:
    if server.binaries is None:
        skips.skip("container")
    if not (server.binaries / "pg_basebackup").is_file():
        skips.skip("pg_basebackup", f"{server.binaries}")
    engine, settings = prepared(database_url)
    verify(engine, settings, settings.mapping(), ACT)
    return engine, settings


@pytest.fixture
def standby(server: Postgres, made: Ledger) -> Iterator[Server]:
    """A hot standby that has replayed everything up to now."""
    assert server.binaries is not None
    socket = Path(parse_qs(urlsplit(server.url).query)["host"][0])
    owner = socket.stat()
    folder = Path(tempfile.mkdtemp(prefix="wm-standby-"))
    try:
        data = folder / "data"
        where = ["-h", str(socket), "-p", "5432", "-U", "postgres", "-D", str(data)]
        copied = subprocess.run(
            [str(server.binaries / "pg_basebackup"), *where, "--write-recovery-conf", "--checkpoint=fast", "--no-sync"],
            capture_output=True,
            text=True,
            check=False,
            env={"PATH": os.defpath, "LC_ALL": "C"},
        )
        assert copied.returncode == 0, copied.stderr
        for path in (folder, *folder.rglob("*")):
            os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)
        with Server.start(server.binaries, data=data, settings=SETTINGS) as started:
            replayed(made[0], started)
            yield started
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def replayed(primary: Engine, standby: Server, *, received_only: bool = False) -> None:
    """Return once the standby has replayed (or only received) what the primary has written until now."""
    written = scalar(primary, "select pg_current_wal_insert_lsn()::text")
    what = "receive" if received_only else "replay"
    until(engine_named(standby.url), f"select pg_last_wal_{what}_lsn() >= '{written}'")


def until(engine: Engine, query: str) -> None:
    """Return once the query says true."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if scalar(engine, query):
            return
        time.sleep(0.01)  # the pause between two looks, not what makes the order
    raise AssertionError(f"not after a minute: {query}")


def on(standby: Server, made: Ledger) -> Ledger:
    engine, settings = made
    return engine_named(standby.url_for(make_url(engine.url).database or "")), settings


def log(engine: Engine) -> int:
    return int(scalar(engine, "select count(*) from wallet.verifications"))


def test_each_form_runs_on_a_standby_and_puts_nothing_on_record(made: Ledger, standby: Server) -> None:
    engine, settings = on(standby, made)
    assert scalar(engine, "select pg_is_in_recovery()")
    with made[0].begin() as connection:
        post(connection, settings, "credit", 6, 5)
        execute(made[0], "update wallet.accounts set balance = balance + 1 where key = '4'")
    replayed(made[0], standby)
    before = log(made[0])
    for options in ({}, {"sample": 100}, {"since_last": True}):
        result = verify(engine, settings, settings.mapping(), ACT, **options)
        assert [one.key for one in result.drift] == ["4"], options
        assert result.replica_lag is not None
        assert result.accounts == (2 if "since_last" in options else 10)
    assert log(made[0]) == before
    assert rows(made[0], "select state::text from wallet.accounts where state <> 'mirrored'") == []
    with pytest.raises(PreconditionRefused, match="standby"):
        verify(engine, settings, settings.mapping(), ACT, mark_stale=True)
    assert verify(engine, settings, settings.mapping(), ACT, mark_stale=True, dry_run=True).turned_stale == 1
    assert verify(made[0], settings, settings.mapping(), ACT, dry_run=True).replica_lag is None


def test_it_tells_how_far_the_standby_is_behind(made: Ledger, standby: Server, tmp_path: Path) -> None:
    engine, settings = on(standby, made)
    project = Project(tmp_path, engine.url.render_as_string(hide_password=False))
    replayed(made[0], standby)
    said = project.run("verify")
    assert (said.exit_code, "on a standby, 0.0 s behind its primary: nothing was put on record" in said.stderr) == (
        *(0, True),
    )
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("select pg_wal_replay_pause()"))
        until(engine, "select pg_get_wal_replay_pause_state() = 'paused'")
        try:
            execute(made[0], "update wallet.accounts set balance = balance + 1 where key = '4'")
            replayed(made[0], standby, received_only=True)
            late = verify(engine, settings, settings.mapping(), ACT)
            assert late.clean
            assert late.replica_lag is not None
            assert late.replica_lag > 0
        finally:
            connection.execute(text("select pg_wal_replay_resume()"))
    replayed(made[0], standby)
    assert project.run("verify").exit_code == 3
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("alter system set primary_conninfo = ''"))
        connection.execute(text("select pg_reload_conf()"))
    until(engine, "select not exists (select from pg_stat_wal_receiver)")
    alone = verify(engine, settings, settings.mapping(), ACT).replica_lag
    assert alone is not None
    assert alone > 0, "it has replayed all that it received, and receives nothing"
