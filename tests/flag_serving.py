"""A flag server of the tests' own, and what tests of flag sources share: clocks, threads, forked children."""

from __future__ import annotations

import os
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from flag_documents import body, document
from walletmigrate.flag_server import FlagsmithSource
from walletmigrate.flag_sources import DocumentSource
from walletmigrate.flags import Decision

KEY = "ser.secret-of-the-tests"
ON = Decision(True, True, True)
WRITING = Decision(dual_write=True)
LONG = 3600.0
PATIENCE = 20.0
"""Seconds until a test that waits for an event gives up; none waits that long unless something is broken."""

forks = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


class Clock:
    """A clock that stands still until it is told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def wanted(source: DocumentSource, **traits: str) -> Decision:
    return source.snapshot().decide("42", traits)


def problem(source: DocumentSource) -> str:
    return source.problem or ""


def turns(least: int, seen: set[Decision]) -> Iterator[int]:
    """Count turns until there were enough, and the readers have seen more than one document."""
    for turn in range(1000):
        if turn >= least and len(seen) > 1:
            return
        yield turn


def in_child(act: Callable[[], bool]) -> bool:
    """What ``act`` returns in a forked child, which ends as a worker does that is killed."""
    pid = os.fork()
    if pid == 0:
        good = False
        try:
            good = act()
        except BaseException:  # noqa: BLE001 - the parent is told by the exit status
            traceback.print_exc()
        finally:
            os._exit(0 if good else 1)
    return os.waitpid(pid, 0)[1] == 0


def together(count: int, act: Callable[[int], None]) -> None:
    """Run ``act`` in threads that start at once, and raise what one of them raised."""
    barrier, faults = threading.Barrier(count), list[BaseException]()

    def run(number: int) -> None:
        try:
            barrier.wait(PATIENCE)
            act(number)
        except BaseException as error:  # noqa: BLE001 - raised again in the test's own thread
            faults.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if faults:
        raise faults[0]


class FlagServer(ThreadingHTTPServer):
    """Answers like Flagsmith's server, or as a test wants."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer = body(document())
        self.status = 200
        self.headers: dict[str, str] = {}
        self.hang: threading.Event | None = None
        self.drip = False
        self.arrived = threading.Event()
        self.requests: list[tuple[str, dict[str, str]]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/api/v1/"


class Handler(BaseHTTPRequestHandler):
    server: FlagServer

    def do_GET(self) -> None:
        server = self.server
        server.requests.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
        server.arrived.set()
        if server.hang is not None:
            server.hang.wait(PATIENCE)
        known = self.path == "/api/v1/environment-document/"
        refused = self.headers.get("X-Environment-Key") != KEY
        status = server.status if server.status != 200 else 404 if not known else 403 if refused else 200
        answer = server.answer if status == 200 else b'{"detail": "no"}'
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        for name, value in server.headers.items():
            self.send_header(name, value)
        self.end_headers()
        try:
            self._send(answer)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _send(self, answer: bytes) -> None:
        if not self.server.drip:
            self.wfile.write(answer)
            return
        never = threading.Event()
        for byte in answer:
            self.wfile.write(bytes([byte]))
            never.wait(0.05)

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def flag_server() -> Iterator[FlagServer]:
    """A running server."""
    with FlagServer() as found:
        thread = threading.Thread(target=found.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield found
        if found.hang is not None:
            found.hang.set()
        found.shutdown()
        thread.join()


Make = Callable[..., FlagsmithSource]


@contextmanager
def making() -> Iterator[Make]:
    """Makes sources that are closed at the end; none polls by itself more than once unless asked to."""
    made: list[weakref.ref[FlagsmithSource]] = []

    def build(url: str, key: str = KEY, poll_seconds: float = LONG, **options: object) -> FlagsmithSource:
        options.setdefault("report", lambda _: None)
        source = FlagsmithSource(url, key, poll_seconds, **options)  # type: ignore[arg-type]
        made.append(weakref.ref(source))
        return source

    yield build
    for each in made:
        if (source := each()) is not None:
            source.close()


def closed_address() -> str:
    """Where nobody answers."""
    with FlagServer() as found:
        return found.url


def polling_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "walletmigrate-flags"]
