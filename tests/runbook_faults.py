"""Faults that the alerts' runbooks are for, where they take processes, locks or a Prometheus of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import psycopg
from prometheus_client import start_http_server
from sqlalchemy import make_url

from binaries import program
from ledger import ACT, engine_named, execute, scalar, unguarded, until_blocked
from monitoring import Server as Monitor
from monitoring import free_port, prometheus, until
from runbook_alerts import EXPORTER
from runbook_stage import Stage, backfilled, cut_over, cut_over_from, drifted
from servers import Postgres
from walletmigrate.embedded import DURABILITY_OFF, Server
from walletmigrate.flag_sources import FileSource
from walletmigrate.functions import relation
from walletmigrate.heartbeat import Heartbeat
from walletmigrate.verify import verify

REPORTED = 9999
"""The user whom the report looks at: a backfill that has just begun is far from it."""
BEATING = Path(__file__).parent / "apps" / "beating.py"
SECONDS = 60.0
SLOW, QUICK = 10, 600
"""Postings: more than one of a hundred is slow."""
SLOW_SECONDS = 0.4
"""How long each of the slow postings waits: more than the quarter of a second that the alert lets pass."""


@contextmanager
def running(stage: Stage, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process as somebody started it in the stage's shell; at the end it is killed."""
    shell = stage.shell()
    with (stage.folder / "started.log").open("ab") as log:
        process = subprocess.Popen(
            words, cwd=shell.folder, env=shell.environment, stdin=subprocess.PIPE, stdout=log, stderr=log
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdin is not None
        process.stdin.close()


def command(*words: str) -> tuple[str, ...]:
    """The command line of walletmigrate."""
    return (str(Path(sys.executable).with_name("walletmigrate")), *words)


@contextmanager
def watched(stage: Stage, **ports: int) -> Iterator[Monitor]:
    """A real Prometheus on these ports, whose address and promtool are in the stage's shell."""
    home = stage.folder / "prometheus"
    home.mkdir()
    promtool = program("prometheus", "promtool")
    found = stage.folder / "bin" / "promtool"
    found.parent.mkdir()
    libraries = promtool.environment.get("LD_LIBRARY_PATH", "")
    found.write_text(f'#!/bin/sh\nLD_LIBRARY_PATH={libraries} exec "{promtool.path}" "$@"\n', encoding="utf-8")
    found.chmod(0o755)
    with prometheus(home, {name.replace("_", "-"): port for name, port in ports.items()}) as server:
        stage.variables["PROMETHEUS_URL"] = f"http://127.0.0.1:{server.port}"
        stage.variables["PATH"] = os.pathsep.join([str(found.parent), stage.shell().environment["PATH"]])
        yield server


def drift_found(server: Postgres, url: str, folder: Path) -> Stage:
    """As `drifted`, and the nightly verification has found it."""
    stage = drifted(server, url, folder)
    assert not verify(stage.engine, stage.settings, stage.settings.mapping(None), ACT).clean
    return stage


def read_apart(server: Postgres, url: str, folder: Path) -> Stage:
    """As `drifted`; then the application read the balance of user 7 from the ledger, and compared."""
    stage = drifted(server, url, folder)

    def read() -> None:
        with stage.engine.begin() as connection:
            found = stage.adapter().balance(connection, 7)
        assert found.compare == expected.pop(0), found

    expected = ["mismatch", "match"]
    read()
    stage.meanwhile["read"] = read
    return stage


def unverified(server: Postgres, url: str, folder: Path) -> Stage:
    """As `cut_over`; then maintenance switched the fence off and on again, and the nightly verification found that:
    it was not clean, and so voids the clean one before it.
    """
    stage = cut_over(server, url, folder)
    with unguarded(stage.engine, relation(stage.settings.mapping(None))):
        pass
    assert not verify(stage.engine, stage.settings, stage.settings.mapping(None), ACT).clean
    return stage


def stalled(server: Postgres, url: str, folder: Path) -> Stage:
    """As `backfilled`, but none was open; a backfill waited for a report's lock on user 5 when its process was killed.
    That was an hour ago: the times of the job, which nobody has touched since, are put back by as much.
    """
    stage = backfilled(server, url, folder, opened=False)
    words = command("backfill", "--batch-size", "2", "--reason", "CHG-31: open all accounts")
    sessions = "select count(*) from pg_stat_activity where application_name like 'walletmigrate %' and datname = :name"
    with psycopg.connect(url, application_name="reporting") as report, running(stage, *words) as process:
        report.execute("select 1 from users where id = 5 for update")
        until_blocked(stage.engine, "walletmigrate backfill")
        process.kill()
        process.wait()
        report.rollback()
        name = make_url(url).database
        until(lambda: scalar(stage.engine, sessions, name=name) == 0, lambda: "its session has not ended")
    assert scalar(stage.engine, "select state from wallet.jobs") == "running"
    assert scalar(stage.engine, "select count(*) from wallet.job_batches where state = 'claimed'") == 1
    execute(stage.engine, "update wallet.jobs set updated_at = updated_at - interval '1 hour'")
    execute(stage.engine, "update wallet.job_batches set lease_until = lease_until - interval '1 hour'")
    return stage


def unreadable_flags(server: Postgres, url: str, folder: Path) -> Stage:
    """As `cut_over`; then somebody edited the flag file by hand, and for ten minutes a process has decided by what it
    had read before. The last good file stands beside it. (The minutes are the process's clock, which is put forward.)
    """
    stage = cut_over(server, url, folder)
    file, ahead = stage.settings.flags.path, 0.0
    source = FileSource(file, clock=lambda: time.monotonic() + ahead)
    heartbeat = Heartbeat(stage.settings, source, name="shop", observers=[stage.shop.observer])
    heartbeat.beat()
    (file.parent / "last-good.json").write_bytes(file.read_bytes())
    file.write_text(file.read_text(encoding="utf-8").replace("true", "ture", 1), encoding="utf-8")
    ahead = 600.0
    heartbeat.beat()

    def later() -> None:
        nonlocal ahead
        ahead += 10.0  # a beat comes every ten seconds
        heartbeat.beat()

    stage.meanwhile["beat"] = later
    return stage


def disagreeing(server: Postgres, url: str, folder: Path) -> Stage:
    """As `cut_over`; one process decides by the flag file, another by a copy of it from before the last flip."""
    stage = backfilled(server, url, folder)
    old = folder / "old-copy.json"
    old.write_bytes(stage.settings.flags.path.read_bytes())
    stage = cut_over_from(stage)
    alive = ExitStack()
    stage.cleanup.push(alive)
    first = alive.enter_context(_beats(stage, stage.settings.flags.path))
    second = stage.cleanup.enter_context(_beats(stage, old))

    def restart() -> None:
        """The one with the old copy is deployed anew; a minute later the one before it is forgotten."""
        second.kill()
        second.wait()
        alive.enter_context(_beats(stage, stage.settings.flags.path))
        gone = f"update wallet.processes set seen_at = seen_at - interval '1 minute' where pid = {second.pid}"
        execute(stage.engine, gone)
        assert first.poll() is None

    stage.meanwhile["restarted"] = restart
    return stage


@contextmanager
def _beats(stage: Stage, flags: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A living process of the application that has told the database of itself."""
    count = "select count(*) from wallet.processes where pid = :pid"
    with running(stage, sys.executable, str(BEATING), "walletmigrate.toml", os.path.relpath(flags, stage.folder)) as one:
        until(lambda: scalar(stage.engine, count, pid=one.pid) == 1 or one.poll() is not None)
        assert one.poll() is None, (stage.folder / "started.log").read_text(encoding="utf-8")
        yield one


def failing(server: Postgres, url: str, folder: Path) -> Stage:
    """As `cut_over`; then somebody added a constraint that every booking breaks. Of 309 payments nine were bookings."""
    stage = cut_over(server, url, folder)
    rule = "alter table wallet.transactions add constraint no_bookings check (type <> 'booking') not valid"
    execute(stage.engine, rule)
    adapter = stage.adapter()
    with stage.engine.connect() as connection:
        for turn in range(300):
            with connection.begin():
                adapter.credit(connection, 4 + turn % 6, 1, type="deposit")
        for turn in range(9):
            with connection.begin():
                adapter.debit(connection, 1 + turn % 3, 1, type="booking")

    def book() -> None:
        with stage.engine.connect() as connection:
            for turn in range(300):
                with connection.begin():
                    adapter.debit(connection, 1 + turn % 10, 1, type="booking")

    stage.meanwhile["bookings"] = book
    return stage


def unwatched(server: Postgres, _url: str, folder: Path) -> Stage:
    """As `cut_over`, on a server of its own, with an exporter that logs in as ``watch`` and a Prometheus that scrapes it.
    Then somebody tidied up the roles, the exporter's among them, and the exporter's process was killed.
    """
    with ExitStack() as cleanup:
        own = cleanup.enter_context(Server.start(server.binaries, settings=DURABILITY_OFF))
        stage = backfilled(server, own.create_database("shop"), folder)
        execute(stage.engine, "create role watch login in role wallet_auditor")
        login = make_url(own.url_for("shop")).set(username="watch").render_as_string(hide_password=False)
        port = free_port()
        stage = replace(stage, exporter_url=f"http://127.0.0.1:{port}", cleanup=cleanup.pop_all())
        with ExitStack() as cleanup:
            cleanup.push(stage.cleanup)
            stage.variables.update(EXPORTER_URL=f"http://127.0.0.1:{port}", EXPORTER_DATABASE_URL=login)
            words = command("--database-url", login, "exporter", "--port", str(port))
            with running(stage, *words) as exporter:
                monitor = cleanup.enter_context(watched(stage, walletmigrate_exporter=port))
                until(lambda: bool(monitor.query("walletmigrate_exporter_up == 1")))
                stage.seen.clear()
                stage = cut_over_from(stage)
                execute(stage.engine, "revoke wallet_auditor from watch")
                exporter.kill()
                exporter.wait()
                until(lambda: bool(monitor.query(f'up{{job="{EXPORTER["job"]}"}} == 0')))
            cleanup.callback(_end, folder / "exporter.pid")
            return replace(stage, cleanup=cleanup.pop_all())


def _end(file: Path) -> None:
    """End the process whose number the runbook has written down."""
    with suppress(FileNotFoundError, ProcessLookupError):
        os.kill(int(file.read_text(encoding="utf-8")), signal.SIGKILL)


def slow(server: Postgres, url: str, folder: Path) -> Stage:
    """Phase read_ledger, 10,000 users, and autovacuum switched off for the accounts, which so were never analysed. A
    report locks user 9999 again and again, and forgets it at last: ten payments of 610 were slow, one more waits.
    Besides, somebody runs a backfill in the middle of the day.
    """
    stage = backfilled(server, url, folder, opened=False, users=10_000)
    with ExitStack() as cleanup:
        execute(stage.engine, "alter table wallet.accounts set (autovacuum_enabled = off)")
        _backfill(stage)
        stage = cut_over_from(stage)
        web, thread = start_http_server(0, addr="127.0.0.1", registry=stage.shop.registry)
        cleanup.callback(_close, web, thread)
        monitor = cleanup.enter_context(watched(stage, shop=web.server_port))
        until(lambda: bool(monitor.query("sum(walletmigrate_dual_write_duration_seconds_count) == 0")))
        holder = psycopg.connect(url, application_name="reporting")
        cleanup.callback(holder.close)
        for _ in range(SLOW):
            holder.execute(f"select 1 from users where id = {REPORTED} for update")
            with _paying(stage, REPORTED):
                until_blocked(stage.engine, "shop")
                time.sleep(SLOW_SECONDS)  # what is made here is the waiting itself
                holder.rollback()
        _pay(stage, QUICK)
        holder.execute(f"select 1 from users where id = {REPORTED} for update")
        cleanup.enter_context(_paying(stage, REPORTED))
        until_blocked(stage.engine, "shop")
        day = command("backfill", "--rate", "50", "--batch-size", "50", "--reason", "CHG-44: once more over all")
        cleanup.enter_context(running(stage, *day))
        moving = "select count(*) from wallet.jobs where state = 'running' and items_done > 0"
        until(lambda: scalar(stage.engine, moving) == 1, lambda: (folder / "started.log").read_text(encoding="utf-8"))
        _scraped(monitor, SLOW + QUICK)
        stage.meanwhile["payments"] = lambda: (_pay(stage, 1000), _scraped(monitor, SLOW + QUICK + 1000))
        return replace(stage, cleanup=cleanup.pop_all())


def _backfill(stage: Stage) -> None:
    with running(stage, *command("backfill", "--reason", "CHG-40: open all accounts")) as process:
        assert process.wait(SECONDS) == 0


def _pay(stage: Stage, times: int) -> None:
    adapter = stage.adapter()
    with stage.engine.connect() as connection:
        for turn in range(times):
            with connection.begin():
                adapter.credit(connection, 2 + turn % 100, 1, type="deposit")


@contextmanager
def _paying(stage: Stage, key: int) -> Iterator[None]:
    """One payment in a thread of its own, which waits as long as it takes."""

    def pay() -> None:
        with suppress(Exception), engine_named(str(stage.settings.database_url.get_secret_value()), "shop").begin() as c:
            c.exec_driver_sql("set local lock_timeout = 0")
            stage.adapter().credit(c, key, 1, type="deposit")

    thread = threading.Thread(target=pay, daemon=True)
    thread.start()
    yield
    thread.join(SECONDS)


def _scraped(monitor: Monitor, count: int) -> None:
    query = f"sum(walletmigrate_dual_write_duration_seconds_count) >= {count}"
    until(lambda: bool(monitor.query(query)))


def _close(web: object, thread: threading.Thread) -> None:
    web.shutdown()  # type: ignore[attr-defined]
    web.server_close()  # type: ignore[attr-defined]
    thread.join()


FAULTS: dict[str, Callable[[Postgres, str, Path], Stage]] = {
    "backfill-stalled": stalled,
    "balance-drift": drift_found,
    "dual-write-error-budget-burn": failing,
    "exporter-down": unwatched,
    "flag-disagreement": disagreeing,
    "flags-stale": unreadable_flags,
    "ledger-latency-high": slow,
    "read-mismatch": read_apart,
    "verification-stale": unverified,
}
