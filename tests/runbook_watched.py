"""Faults that a real Prometheus is asked about: an exporter that is down, postings that are slow."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from wsgiref.simple_server import WSGIServer

import psycopg
from prometheus_client import start_http_server
from sqlalchemy import make_url

from binaries import program
from ledger import engine_named, execute, scalar, until_blocked
from monitoring import Server as Monitor
from monitoring import free_port, prometheus, until
from runbook_alerts import EXPORTER
from runbook_faults import SECONDS, command, running
from runbook_stage import Stage, backfilled, cut_over_from
from servers import Postgres
from walletmigrate.embedded import DURABILITY_OFF, Server

SLOW, QUICK = 10, 600
"""Postings: more than one of a hundred is slow."""
SLOW_SECONDS = 0.4
"""How long each of the slow postings waits: more than the quarter of a second that the alert lets pass."""
REPORTED = 9999
"""The user whom the report looks at: a backfill that has just begun is far from it."""


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


def unwatched(server: Postgres, _url: str, folder: Path) -> Stage:
    """As `cut_over`, on a server of its own, with an exporter that logs in as ``watch`` and a Prometheus that scrapes
    it. Then somebody tidied up the roles, the exporter's among them, and the exporter's process was killed.
    """
    with ExitStack() as cleanup:
        own = cleanup.enter_context(Server.start(server.binaries, settings=DURABILITY_OFF))
        stage = backfilled(server, own.create_database("shop"), folder)
        execute(stage.engine, "create role watch login in role wallet_auditor")
        login = make_url(own.url_for("shop")).set(username="watch").render_as_string(hide_password=False)
        port = free_port()
        stage = replace(stage, exporter_url=f"http://127.0.0.1:{port}")
        stage.variables.update(EXPORTER_URL=f"http://127.0.0.1:{port}", EXPORTER_DATABASE_URL=login)
        cleanup.callback(_end, folder / "exporter.pid")
        with running(stage, *command("--database-url", login, "exporter", "--port", str(port))) as exporter:
            monitor = cleanup.enter_context(watched(stage, walletmigrate_exporter=port))
            until(lambda: bool(monitor.query("walletmigrate_exporter_up == 1")))
            stage.seen.clear()
            stage = cut_over_from(stage)
            execute(stage.engine, "revoke wallet_auditor from watch")
            exporter.kill()
            exporter.wait()
            until(lambda: bool(monitor.query(f'up{{job="{EXPORTER["job"]}"}} == 0')))
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
        day = command("backfill", "--rate", "5", "--batch-size", "50", "--reason", "CHG-44: once more over all")
        cleanup.enter_context(running(stage, *day))
        moving = "select count(*) from wallet.jobs where state = 'running' and items_done > 0"
        until(lambda: scalar(stage.engine, moving) == 1, lambda: (folder / "started.log").read_text(encoding="utf-8"))
        _scraped(monitor, SLOW + QUICK)

        def payments() -> None:
            _pay(stage, 1000)
            _scraped(monitor, SLOW + QUICK + 1000)

        stage.meanwhile["payments"] = payments
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
        url = stage.engine.url.render_as_string(hide_password=False)
        with suppress(Exception), engine_named(url, "shop").begin() as connection:
            connection.exec_driver_sql("set local lock_timeout = 0")
            stage.adapter().credit(connection, key, 1, type="deposit")

    thread = threading.Thread(target=pay, daemon=True)
    thread.start()
    yield
    thread.join(SECONDS)


def _scraped(monitor: Monitor, count: int) -> None:
    query = f"sum(walletmigrate_dual_write_duration_seconds_count) >= {count}"
    until(lambda: bool(monitor.query(query)))


def _close(web: WSGIServer, thread: threading.Thread) -> None:
    web.shutdown()
    web.server_close()
    thread.join()


WATCHED: dict[str, Callable[[Postgres, str, Path], Stage]] = {
    "exporter-down": unwatched,
    "ledger-latency-high": slow,
}
