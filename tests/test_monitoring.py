"""The whole way: a database and a process with traffic, a real Prometheus that scrapes both, a real Alertmanager."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import start_http_server

import adapting
from alert_rules import FOLDER, PREFIX, ROOT, RULES, RUNBOOKS
from board_files import expressions
from commandline import Project, end, first_document, project_at
from flag_documents import document
from ledger import ACT, execute, set_phase, unguarded
from monitoring import Server, alertmanager, prometheus, until
from walletmigrate.backfill import backfill
from walletmigrate.exporter import Rollout, serve
from walletmigrate.flag_impact import rollout
from walletmigrate.flag_sources import FileSource
from walletmigrate.heartbeat import Heartbeat
from walletmigrate.verify import verify

EXPORTER = "walletmigrate-exporter"
READ, WRITTEN, BYPASSED, FAILING = 1, 2, 3, 4
"""Accounts: two with drift, to be read and written; one written past the adapter; one whose ledger leg fails."""


@contextmanager
def exporting(place: adapting.Place, rolled: Rollout | None = None) -> Iterator[int]:
    """The port of a running exporter."""
    exporter = serve(place.settings, 0, rollout=rolled)
    try:
        yield exporter.port
    finally:
        exporter.close()


@contextmanager
def exposing(place: adapting.Place) -> Iterator[int]:
    """The port under which this process serves what its adapter counted, as an application does."""
    server, thread = start_http_server(0, addr="127.0.0.1", registry=place.registry)
    try:
        yield int(server.server_port)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def prepared(url: str, flags: Path) -> tuple[adapting.Place, FileSource]:
    """A migration in phase read_ledger that was verified clean, and now has drift."""
    flags.write_text(json.dumps(document("wallet.dualWrite", "wallet.readFromLedger")), encoding="utf-8")
    source = FileSource(flags)
    place = adapting.place(url, rows=20, flags=adapting.READ)
    backfill(place.engine, place.settings, place.mapping, ACT)
    assert verify(place.engine, place.settings, place.mapping, ACT).clean
    set_phase(place.engine, "read_ledger")
    with unguarded(place.engine, "public.users") as connection:
        connection.exec_driver_sql("update users set total_coins = 90 where id in (%s, %s)", (READ, WRITTEN))
    execute(place.engine, "update users set total_coins = total_coins + 1 where id = :id", id=BYPASSED)
    execute(place.engine, "alter table wallet.transactions add check (amount <> 13)")
    execute(place.engine, "analyze users")
    Heartbeat(place.settings, source).beat()
    return place, source


def traffic(place: adapting.Place) -> None:
    """Some calls of the application."""
    for key in range(5, 15):
        with place.engine.begin() as connection:
            place.adapter.credit(connection, key, 1, type="booking")
            place.adapter.balance(connection, key)
    with place.engine.begin() as connection:
        place.adapter.balance(connection, READ)
        place.adapter.credit(connection, WRITTEN, 1, type="booking")
        place.adapter.credit(connection, FAILING, 13, type="booking")


def value(server: Server, expression: str) -> float:
    """The only number of the answer, 0 if there is none."""
    found = server.query(expression)
    return float(found[0]["value"][1]) if found else 0.0


def test_what_goes_wrong_in_a_database_and_a_process_is_what_prometheus_sees(database_url: str, tmp_path: Path) -> None:
    place, source = prepared(database_url, tmp_path / "flags.json")
    with ExitStack() as stack:
        counted = stack.enter_context(
            exporting(place, lambda connection: rollout(connection, place.settings, source.snapshot()))
        )
        targets = {EXPORTER: counted, "shop": stack.enter_context(exposing(place))}
        server = stack.enter_context(prometheus(tmp_path, targets, rules=[RULES]))
        until(lambda: value(server, "sum(up)") == len(targets))
        assert verify(place.engine, place.settings, place.mapping, ACT).drift_accounts == 2
        until(lambda: value(server, "walletmigrate_drift_accounts") == 2)
        traffic(place)
        expected = {
            'sum(walletmigrate_dual_write_total{outcome="ok"})': 11,
            'sum(walletmigrate_dual_write_total{outcome="ledger_failed"})': 1,
            'walletmigrate_bypass_writes_total{treatment="turned_stale"}': 1,
            **{
                f'walletmigrate_mismatch_total{{where="{where}"}}': count  # one source has it, and no other
                for where, count in {"read": 1, "write": 1, "verify": 2}.items()
            },
        }
        # A scrape amid the traffic has seen a part of it: the one after it sees all.

        def now() -> dict[str, float]:
            return {query: value(server, query) for query in expected}

        until(lambda: now() == expected, now)
        for query in expected:
            assert len(server.query(query)) == 1
        assert server.query("walletmigrate_phase == 1")[0]["metric"]["phase"] == "read_ledger"
        panel = expressions()["reconciliation: Mismatches B"].replace("$__rate_interval", "5m")
        assert value(server, panel) > 0, "the dashboard shows what a verification found"


class Receiver:
    """A webhook on loopback that keeps what it is sent: (path, message)."""

    def __init__(self) -> None:
        received: list[tuple[str, dict[str, Any]]] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                received.append((self.path, json.loads(body)))
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                pass

        self.received = received
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def __enter__(self) -> Receiver:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def example(name: str) -> dict[str, Any]:
    """A committed example of a configuration."""
    config: dict[str, Any] = yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))
    return config


def example_routes(port: int) -> dict[str, Any]:
    """The committed example with its receivers at this port. The end of an alert is told with the next interval of its
    group: a second here, and not five minutes.
    """
    config = example("alertmanager.yml")
    config["route"]["group_interval"] = "1s"
    for receiver in config["receivers"]:
        for hook in receiver["webhook_configs"]:
            hook["url"] = f"http://127.0.0.1:{port}/{receiver['name']}"
    return config


@contextmanager
def exporter_command(project: Project) -> Iterator[int]:
    """The port of `walletmigrate exporter`, run as an operator runs it: a process of its own."""
    process = project.start("exporter", "--port", "0", "--json")
    try:
        yield int(first_document(process)["url"].rpartition(":")[2].partition("/")[0])
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
    finally:
        end(process)


def told(path: str, message: dict[str, Any]) -> dict[str, Any]:
    """The one alert of a message, which must be that of the imbalance, for the pager."""
    (alert,) = message["alerts"]
    labels: dict[str, str] = alert["labels"]
    assert (path, message["status"]) == ("/pager", alert["status"])
    assert {name: labels[name] for name in ("alertname", "severity", "currency")} == {
        "alertname": f"{PREFIX}LedgerImbalance",
        "severity": "critical",
        "currency": "EUR",
    }
    url = alert["annotations"]["runbook_url"]
    assert url == f"{RUNBOOKS}ledger-imbalance.md"
    assert (ROOT / "runbooks" / url.removeprefix(RUNBOOKS)).is_file()
    found: dict[str, Any] = alert
    return found


@pytest.mark.timeout(300)
def test_an_imbalance_reaches_the_pager_within_a_minute_with_its_runbook_and_so_does_its_end(
    database_url: str, tmp_path: Path
) -> None:
    project, engine = project_at(tmp_path, database_url, "dual_write")
    times = example("prometheus.yml")["global"]
    with ExitStack() as stack:
        receiver = stack.enter_context(Receiver())
        targets = {EXPORTER: stack.enter_context(exporter_command(project))}
        routes = stack.enter_context(alertmanager(tmp_path, example_routes(receiver.port)))
        server = stack.enter_context(
            prometheus(tmp_path, targets, rules=[RULES], alertmanager=routes.port, times=times)
        )
        until(lambda: bool(server.query('walletmigrate_ledger_imbalance{currency="EUR"} == 0')))
        assert receiver.received == []

        execute(engine, "update wallet.accounts set balance = balance + 0.01 where key = '1'")
        broken_at = time.monotonic()
        until(lambda: bool(receiver.received), lambda: server.get("/api/v1/alerts"))
        assert time.monotonic() - broken_at < 60
        firing = told(*receiver.received[0])
        assert firing["status"] == "firing"
        assert "together are 0.01" in firing["annotations"]["description"]

        project.change("recalculate", "--account", "1")
        until(lambda: len(receiver.received) > 1, lambda: server.get("/api/v1/alerts"))
        over = told(*receiver.received[1])
        assert (over["status"], over["fingerprint"]) == ("resolved", firing["fingerprint"])
        assert over["endsAt"] > over["startsAt"] == firing["startsAt"]
        assert server.query(f'ALERTS{{alertname="{PREFIX}LedgerImbalance"}}') == []
        assert len(receiver.received) == 2
