"""Fixtures of all tests: real PostgreSQL servers, a fresh database for each test, and a guard.

No test reaches a database that is not on this machine: a URL from the environment is taken away before the
first test, and an engine that would leave the machine is stopped before it connects.
"""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.engine import Engine

import copies
import databases
import forkserver
import order
import servers
import shares
import skips
import telling

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts its background jobs so, and every program that a test starts and interrupts would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)

MakeDatabase = Callable[..., str]
"""``make_database(template=None)``: create an own database for this test, and give its URL."""

_PRIVATE_VARIABLES = ("PG", "WALLETMIGRATE_")
_KEPT_VARIABLES = ("WALLETMIGRATE_SHARED_DATA",)
_MEMORY = Path("/dev/shm")
_MEMORY_BYTES = 4 << 30
"""What has to be free there; the servers of two workers hold about a quarter of it."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--postgres",
        action="append",
        metavar="SERVER",
        help="a PostgreSQL to run on: 18 or 16 (embedded), 15 or 17 (Debian's package), a bin folder, "
        "or docker:16. May be repeated. Default: 18, and 15 where it is installed.",
    )
    parser.addoption(
        "--torture",
        nargs="?",
        const="1",
        metavar="SHARE",
        help="play all interleavings of test_torture.py, one of ten (10), or the third of forty shares (3/40), "
        "which together are all; else a few of each kind",
    )
    parser.addoption("--order", action="append", metavar="NAME", help="an interleaving to play, by its name")


def pytest_configure(config: pytest.Config) -> None:
    for name in [name for name in os.environ if name.startswith(_PRIVATE_VARIABLES)]:
        if name not in _KEPT_VARIABLES:
            del os.environ[name]
    _keep_servers_in_memory()
    shares.asked(config)
    for spec in _specs(config):
        servers.check(spec)


def pytest_sessionstart(session: pytest.Session) -> None:
    telling.register(session.config)


def _keep_servers_in_memory() -> None:
    """Let scratch servers have their data in memory, where there is room and nobody names another place.

    To make a database and to drop it costs a fifth there of what it costs on a disk, and each test does both. A server
    removes its data when it ends, however it ends. What pytest itself keeps after a run stays on the disk.
    """
    if "TMPDIR" in os.environ or not _MEMORY.is_dir():
        return
    there = os.statvfs(_MEMORY)
    if there.f_bavail * there.f_frsize < _MEMORY_BYTES or there.f_flag & (os.ST_NOEXEC | os.ST_RDONLY):
        return  # programs may have to be copied there
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())
    os.environ["TMPDIR"] = str(_MEMORY)
    tempfile.tempdir = None  # it remembers the place that it found first


def pytest_report_header(config: pytest.Config) -> str:
    return f"postgres: {', '.join(servers.identifier(spec) for spec in _specs(config))}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")]
    told = [value for report in reports for name, value in report.user_properties if name == "orders"]
    if told:
        played, impossible, there_are = map(sum, zip(*told, strict=True))
        share = shares.asked(terminalreporter.config)
        terminalreporter.write_line(
            f"interleavings: share {share or '(a few of each kind)'} of {there_are}; "
            f"played: {played}, not possible: {impossible}"
        )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "postgres_spec" in metafunc.fixturenames:  # not "server": a module may have another kind of that name
        specs = _specs(metafunc.config)
        ids = [servers.identifier(spec) for spec in specs]
        metafunc.parametrize("postgres_spec", specs, scope="session", ids=ids)


@pytest.hookimpl(trylast=True)  # after pytest has put together what runs on one server
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    shared: dict[str, Any] | None = getattr(config, "workerinput", None)
    if shared is not None:
        items[:] = order.longest_first(items, [item.path.stem for item in items], shared["workercount"])


@pytest.fixture(scope="session")
def running_servers() -> Iterator[Callable[[str], servers.Postgres]]:
    """Start each server once per worker, when the first test asks for it."""
    with ExitStack() as stack:
        started: dict[str, servers.Postgres] = {}

        def get(spec: str) -> servers.Postgres:
            if spec not in started:
                started[spec] = stack.enter_context(servers.running(spec))
            return started[spec]

        yield get
        databases.leave()


@pytest.fixture(scope="session")
def server(postgres_spec: str, running_servers: Callable[[str], servers.Postgres]) -> servers.Postgres:
    """Give the server that this test runs on; a test runs once for each."""
    return running_servers(postgres_spec)


@pytest.fixture
def make_database(server: servers.Postgres) -> Iterator[MakeDatabase]:
    """Give ``make_database(template=None) -> url``; what it made is dropped after the test."""
    with ExitStack() as stack:

        def make(template: str | None = None) -> str:
            url = stack.enter_context(databases.on(server.url).scratch(template))
            if template is None:
                copies.UNTOUCHED.add(url)
                stack.callback(copies.UNTOUCHED.discard, url)
            return url

        yield make


@pytest.fixture
def database_url(make_database: MakeDatabase) -> str:
    """Give the URL of an empty database of this test's own."""
    return make_database()


@pytest.fixture(scope="session")
def shared_data(pytestconfig: pytest.Config) -> Path:
    """Give the file of real bank transactions, from WALLETMIGRATE_SHARED_DATA or beside the checkout."""
    beside = pytestconfig.rootpath.parent / "shared/data/bank-transactions.csv.gz"
    path = Path(os.environ.get("WALLETMIGRATE_SHARED_DATA", beside))
    if path.is_dir():
        path /= "bank-transactions.csv.gz"
    if not path.is_file():
        skips.skip("data", f"{path} does not exist")
    return path


@pytest.fixture(scope="session", autouse=True)
def only_this_machine() -> Iterator[None]:
    """Stop every engine that would connect to a host that is not this one."""

    def refuse(_dialect: object, _record: object, _arguments: object, parameters: dict[str, Any]) -> None:
        for host in str(parameters.get("hostaddr") or parameters.get("host") or "").split(","):
            if not _is_local(host):
                raise AssertionError(f"a test tried to connect to the database host {host!r}")

    event.listen(Engine, "do_connect", refuse)
    yield
    event.remove(Engine, "do_connect", refuse)


@pytest.fixture(scope="session", autouse=True)
def no_server_of_commands_is_left() -> Iterator[None]:
    """End the process that commands were forked from, if there was one."""
    yield
    forkserver.leave()


def _is_local(host: str) -> bool:
    if not host or host.startswith(("/", "@")) or host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _specs(config: pytest.Config) -> list[str]:
    chosen: list[str] | None = config.getoption("--postgres")
    return list(dict.fromkeys(chosen or servers.default_specs()))
