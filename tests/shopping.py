"""The example shop under a real gunicorn, spoken to over HTTP."""

from __future__ import annotations

import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

SHOP = Path(__file__).resolve().parent.parent / "examples" / "shop"
WORKERS = 2


@dataclass(frozen=True)
class Answer:
    """What came back: the status and the body, read if it is JSON."""

    status: int
    body: Any


@dataclass
class Shop:
    """A running shop."""

    port: int
    log: Path

    def ask(self, path: str, body: dict[str, Any] | None = None, request_id: str | None = None) -> Answer:
        """GET, or POST with a JSON body."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}")
        if body is not None:
            request.data = json.dumps(body).encode()
            request.add_header("Content-Type", "application/json")
        if request_id:
            request.add_header("X-Request-Id", request_id)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                said, status = answer.read().decode(), answer.status
        except urllib.error.HTTPError as error:
            said, status = error.read().decode(), error.code
        try:
            return Answer(status, json.loads(said))
        except ValueError:
            return Answer(status, said)

    def join(self, tenant: str = "acme") -> int:
        made = self.ask("/users", {"tenant": tenant})
        assert made.status == 201, made
        return int(made.body["user"])

    def balance(self, user: int) -> Decimal:
        return Decimal(self.ask(f"/users/{user}/balance").body["balance"])

    def book(self, user: int, price: str, request_id: str | None = None) -> Answer:
        return self.ask("/bookings", {"user": user, "price": price}, request_id)

    def refund(self, booking: int) -> Answer:
        return self.ask(f"/bookings/{booking}/refund", {})

    def adjust(self, user: int, balance: str) -> Answer:
        wanted = {"user": user, "balance": balance, "administrator": "ada", "reason": "a gift"}
        return self.ask("/admin/balance", wanted)

    def export(self) -> dict[int, Decimal]:
        first, *lines = self.ask("/export.csv").body.splitlines()
        assert first == "user,tenant,balance"
        return {int(user): Decimal(balance) for user, _, balance in (line.split(",") for line in lines)}


def make_tables(url: str) -> None:
    """Make the shop's tables, as before its first start."""
    subprocess.run([sys.executable, "models.py"], cwd=SHOP, env={**os.environ, **_address(url)}, check=True)


def _address(url: str) -> dict[str, str]:
    return {"SHOP_DATABASE_URL": url.replace("postgresql://", "postgresql+psycopg://", 1)}


@contextmanager
def serving(module: str, url: str, folder: Path, config: Path | None = None, *options: str) -> Iterator[Shop]:
    """Serve ``before`` or ``after`` with two workers on a free port, with further options of gunicorn; ended by its own
    process id.
    """
    metrics = folder / "metrics"
    metrics.mkdir(exist_ok=True)
    environment = {**os.environ, **_address(url)}
    environment |= {"WALLETMIGRATE_DATABASE_URL": url, "PROMETHEUS_MULTIPROC_DIR": str(metrics)}
    environment |= {"WALLETMIGRATE_CONFIG": str(config)} if config else {}
    command = [sys.executable, "-m", "gunicorn", "-c", "gunicorn.conf.py", "-w", str(WORKERS), "-b", "127.0.0.1:0"]
    command += ["--no-control-socket"]
    log = folder / f"{module}.log"
    with subprocess.Popen(
        [*command, *options, f"{module}:app"], cwd=SHOP, env=environment, stderr=subprocess.PIPE, text=True
    ) as server:
        lines: queue.Queue[str] = queue.Queue()
        reader = threading.Thread(target=_read, args=(server, log, lines), daemon=True)
        reader.start()
        try:
            yield Shop(_port(server, lines), log)
        finally:
            server.send_signal(signal.SIGTERM)
            try:
                server.wait(timeout=60)  # gunicorn itself gives its workers 30
            finally:
                if server.poll() is None:
                    server.kill()
                reader.join(timeout=30)


def _read(server: subprocess.Popen[str], log: Path, lines: queue.Queue[str]) -> None:
    assert server.stderr is not None
    with log.open("a", encoding="utf-8") as file:
        for line in server.stderr:
            file.write(line)
            file.flush()
            lines.put(line)
    lines.put("")


def _port(server: subprocess.Popen[str], lines: queue.Queue[str]) -> int:
    """The port, once all workers are there."""
    port, workers, said = 0, 0, ""
    while workers < WORKERS:
        line = lines.get(timeout=60)
        said += line
        if not line:
            raise AssertionError(f"gunicorn ended with {server.wait(timeout=30)}:\n{said}")
        found = re.search(r"Listening at: http://127\.0\.0\.1:(\d+)", line)
        port = int(found[1]) if found else port
        workers += "Booting worker" in line
    return port
