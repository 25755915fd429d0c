"""A real Prometheus and a real Alertmanager on loopback: own folder, free port, stopped by their own pid."""

from __future__ import annotations

import json
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from binaries import CACHE, Program, program

SECONDS = 60.0
_ATTEMPTS = 3
_TEMPLATES = b"/usr/share/prometheus/alertmanager"


@dataclass(frozen=True)
class Server:
    """A running server of either kind."""

    port: int

    def get(self, path: str, **query: str) -> Any:
        """The JSON that its API answers. Raises OSError while it does not answer."""
        words = urllib.parse.urlencode(query)
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}?{words}", timeout=10) as answer:
            return json.load(answer)

    def ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/-/ready", timeout=10) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Prometheus' answer now: a vector, each element with ``metric`` and ``value``."""
        found: list[dict[str, Any]] = self.get("/api/v1/query", query=expression)["data"]["result"]
        return found

    def history(self, expression: str, begin: float, end: float) -> list[dict[str, Any]]:
        """Prometheus' answers for each second between two Unix times, each element with ``metric`` and ``values``."""
        asked = {"query": expression, "start": f"{begin}", "end": f"{end}", "step": "1"}
        found: list[dict[str, Any]] = self.get("/api/v1/query_range", **asked)["data"]["result"]
        return found


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def until(holds: Callable[[], bool], told: Callable[[], object] = str, seconds: float = SECONDS) -> float:
    """Ask again and again until it holds; give the seconds that it took. Else the test fails with what is ``told``."""
    began = time.monotonic()
    while not holds():
        if time.monotonic() - began > seconds:
            raise AssertionError(f"not after {seconds:.0f} s: {told()}")
        time.sleep(0.1)
    return time.monotonic() - began


@contextmanager
def prometheus(
    folder: Path,
    targets: dict[str, int],
    *,
    rules: Sequence[Path] = (),
    alertmanager: int | None = None,
    times: dict[str, str] | None = None,
) -> Iterator[Server]:
    """Prometheus on ``targets`` (job → port), scraped each second, as all rules are evaluated; or as ``times`` say, and
    the groups of rules themselves.
    """
    if times is None:
        rules = [hurried(path, folder) for path in rules]
    config: dict[str, Any] = {
        "global": times or {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(path) for path in rules],
        "scrape_configs": [
            {"job_name": job, "static_configs": [{"targets": [f"127.0.0.1:{port}"]}]} for job, port in targets.items()
        ],
    }
    if alertmanager is not None:
        config["alerting"] = {"alertmanagers": [{"static_configs": [{"targets": [f"127.0.0.1:{alertmanager}"]}]}]}
    with configured_prometheus(folder, config) as server:
        yield server


@contextmanager
def configured_prometheus(folder: Path, config: dict[str, Any]) -> Iterator[Server]:
    """Prometheus with this configuration, whose paths are absolute."""
    file = folder / "prometheus.yml"
    file.write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    options = [f"--config.file={file}", f"--storage.tsdb.path={folder / 'data'}", "--log.level=warn"]
    with _running(program("prometheus", "prometheus"), options, folder) as server:
        yield server


def hurried(rules: Path, folder: Path) -> Path:
    """The rules with no interval of a group."""
    content = yaml.safe_load(rules.read_text(encoding="utf-8"))
    for group in content["groups"]:
        group.pop("interval", None)
    copy = folder / rules.name
    copy.write_text(json.dumps(content), encoding="utf-8")
    return copy


@contextmanager
def alertmanager(folder: Path, config: dict[str, Any]) -> Iterator[Server]:
    """Alertmanager alone: it looks for no other of its kind."""
    file = folder / "alertmanager.yml"
    file.write_text(json.dumps(config), encoding="utf-8")
    options = [f"--config.file={file}", f"--storage.path={folder / 'alerts'}", "--cluster.listen-address="]
    found = program("prometheus-alertmanager", "prometheus-alertmanager")
    if not found.path.is_relative_to(CACHE):
        with _running(found, [*options, "--log.level=warn"], folder) as server:
            yield server
        return
    moved = _moved(found, folder)
    try:
        with _running(moved, [*options, "--log.level=warn"], folder, place=found.path.parents[2]) as server:
            yield server
    finally:
        moved.path.unlink()


def _moved(found: Program, folder: Path) -> Program:
    """A copy that looks for its templates below its working folder.

    Debian builds an absolute folder into the program, which is not there where the package is unpacked and not
    installed. The text that takes its place is as long: it lacks the slash in front and has one behind.
    """
    copy = folder / found.path.name
    copy.write_bytes(found.path.read_bytes().replace(_TEMPLATES, _TEMPLATES[1:] + b"/"))
    copy.chmod(0o755)
    return Program(copy, found.libraries)


@contextmanager
def _running(found: Program, options: list[str], folder: Path, place: Path | None = None) -> Iterator[Server]:
    name = found.path.name
    for attempt in range(1, _ATTEMPTS + 1):
        server = Server(free_port())
        command = [str(found.path), *options, f"--web.listen-address=127.0.0.1:{server.port}"]
        log = folder / f"{name}.{attempt}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                env=found.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=place or folder,
            )
        try:
            until(lambda: server.ready() or process.poll() is not None)  # noqa: B023 - called at once
            if process.poll() is None:
                yield server
                return
        finally:
            process.terminate()
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if attempt == _ATTEMPTS or "address already in use" not in log.read_text(errors="replace"):
            raise AssertionError(f"{name} ended at once:\n{log.read_text(errors='replace')[-2000:]}")
