"""A real PgBouncer that pools transactions, on loopback, in front of a test's server."""

from __future__ import annotations

import os
import pwd
import re
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import quote

import psycopg
from sqlalchemy import make_url

from binaries import Program, program

_START_SECONDS = 30.0
_STOP_SECONDS = 30.0

# Standard input is the lifeline: when this process ends, in whatever way, the pooler is told to end.
_SUPERVISOR = """
exec 3<&0 </dev/null
"$@" 3<&- &
pooler=$!
read -r _ <&3
kill -TERM "$pooler"
wait "$pooler"
"""

_CONFIG = """
[databases]
* = host={host} port={port}

[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {listen}
unix_socket_dir =
auth_type = trust
auth_file = {folder}/users
pool_mode = transaction
default_pool_size = {size}
max_client_conn = 100
query_wait_timeout = 30
{prepared}
"""


@dataclass(frozen=True)
class Pooler:
    """A running PgBouncer. ``prepares``: it keeps the statements that clients prepared, over its connections."""

    port: int
    version: tuple[int, ...]
    prepares: bool

    def url_for(self, url: str) -> str:
        """The URL through the pooler of the database that ``url`` names."""
        read = make_url(url)
        return f"postgresql://{quote(read.username or 'postgres')}@127.0.0.1:{self.port}/{read.database}"


def version_of(made: Program) -> tuple[int, ...]:
    """PgBouncer's version, as (1, 21, 0)."""
    said = subprocess.run(
        [str(made.path), "--version"], env=made.environment, capture_output=True, text=True, timeout=60, check=True
    )
    number = re.search(r"PgBouncer ([0-9.]+)", said.stdout)
    assert number is not None, said.stdout
    return tuple(int(part) for part in number[1].split("."))


@contextmanager
def pooler(url: str, *, size: int = 1) -> Iterator[Pooler]:
    """Pool transactions to the server of ``url`` over at most ``size`` connections per database.

    Prepared statements of clients are kept where PgBouncer can: since 1.21.
    """
    made = program("pgbouncer", "pgbouncer")
    version = version_of(made)
    prepares = version >= (1, 21)
    read = make_url(url)
    host, port = str(read.query.get("host", read.host)), read.query.get("port", read.port or 5432)
    with TemporaryDirectory(prefix="wm-pool-") as name:
        folder, listen = Path(name), _free_port()
        folder.chmod(0o755)
        (folder / "users").write_text(f'"{read.username or "postgres"}" ""\n', encoding="utf-8")
        config = folder / "pgbouncer.ini"
        config.write_text(
            _CONFIG.format(
                host=host,
                port=port,
                listen=listen,
                folder=folder,
                size=size,
                prepared="max_prepared_statements = 100" if prepares else "",
            ),
            encoding="utf-8",
        )
        command = [str(made.path), *_account(host), str(config)]
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                ["/bin/sh", "-c", _SUPERVISOR, "pooler", *command],
                env=made.environment,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        running = Pooler(listen, version, prepares)
        try:
            _until_ready(running.url_for(url), folder / "log")
            yield running
        finally:
            assert process.stdin is not None
            process.stdin.close()
            process.wait(_STOP_SECONDS)


def _account(host: str) -> list[str]:
    """PgBouncer refuses to run as root: then it runs as whoever may reach the server's socket."""
    if os.geteuid() != 0:
        return []
    name = pwd.getpwuid(Path(host).stat().st_uid).pw_name if host.startswith("/") else "nobody"
    return [f"--user={name}"]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _until_ready(url: str, log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while True:
        try:
            psycopg.connect(url, connect_timeout=5, prepare_threshold=None).close()
            return
        except psycopg.OperationalError as error:
            if time.monotonic() > deadline:
                words = log.read_text(encoding="utf-8", errors="replace")
                raise AssertionError(f"PgBouncer did not answer ({error}); its log:\n{words}") from error
        time.sleep(0.02)
