"""The PostgreSQL servers that the tests run on, as ``--postgres`` names them."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from sqlalchemy import make_url

from walletmigrate.embedded import DURABILITY_OFF, Server, wheel_binaries
from walletmigrate.errors import EmbeddedUnavailable

DEBIAN = "/usr/lib/postgresql/{}/bin"
DOCKER = "docker:"
# Just-in-time compilation costs more than the queries of tests do. A log that is turned over early may stand in memory.
SETTINGS = {**DURABILITY_OFF, "jit": "off", "max_prepared_transactions": "8", "max_wal_size": "128MB"}


@dataclass(frozen=True)
class Postgres:
    """A running server; ``binaries`` is None in a container."""

    id: str
    url: str
    version: str
    binaries: Path | None

    @property
    def major(self) -> int:
        """PostgreSQL's major version."""
        return int(self.version.partition(".")[0])

    def url_for(self, database: str) -> str:
        """Give the URL of another database of the server."""
        return make_url(self.url).set(database=database).render_as_string(hide_password=False)


def default_specs() -> list[str]:
    """Give the embedded 18, and 15 where Debian's package is installed."""
    return ["18", *(["15"] if Path(DEBIAN.format(15), "postgres").is_file() else [])]


def identifier(spec: str) -> str:
    """Give the name that a test's id shows: pg18, docker16, or the folder's name."""
    if spec.startswith(DOCKER):
        return f"docker{spec.removeprefix(DOCKER)}"
    return f"pg{spec}" if spec.isdigit() else spec.strip("/").replace("/", "-")


def check(spec: str) -> None:
    """Raise a usage error where ``spec`` cannot be run here, before any test starts."""
    if spec.startswith(DOCKER):
        _check_docker(spec)
        return
    try:
        folder = binaries_of(spec)
    except EmbeddedUnavailable as error:
        raise pytest.UsageError(f"--postgres {spec}: {error}") from None
    if not (folder / "postgres").is_file():
        raise pytest.UsageError(
            f"--postgres {spec}: {folder} has no program postgres; "
            "give 18, 16, 15, a bin folder of PostgreSQL, or docker:16"
        )


def binaries_of(spec: str) -> Path:
    """Give the folder of programs: the wheel's for 16 and 18, else Debian's; or the path itself."""
    if not spec.isdigit():
        return Path(spec)
    debian = Path(DEBIAN.format(spec))
    if int(spec) not in (16, 18) and debian.is_dir():
        return debian
    return wheel_binaries(int(spec))


@contextmanager
def running(spec: str) -> Iterator[Postgres]:
    """Run the server without durability: a test's data need not outlive a power cut."""
    launch: Callable[[str], Iterator[Postgres]] = _container if spec.startswith(DOCKER) else _embedded
    yield from launch(spec)


def _embedded(spec: str) -> Iterator[Postgres]:
    with Server.start(binaries_of(spec), settings=SETTINGS) as server:
        yield Postgres(identifier(spec), server.url, server.version, server.binaries)


def _container(spec: str) -> Iterator[Postgres]:
    from testcontainers.postgres import PostgresContainer

    flags = " ".join(f"-c {name}={value}" for name, value in SETTINGS.items())
    image = f"postgres:{spec.removeprefix(DOCKER)}"
    made = PostgresContainer(image, username="postgres", dbname="postgres", driver=None)
    with made.with_command(f"postgres {flags} -c max_connections=200") as container:
        url = container.get_connection_url()
        yield Postgres(identifier(spec), url, _version(url), None)


def _version(url: str) -> str:
    import psycopg

    with psycopg.connect(url) as connection:
        number = connection.info.server_version
    return f"{number // 10_000}.{number % 10_000}"


def _check_docker(spec: str) -> None:
    reason = _no_docker()
    if reason is not None:
        raise pytest.UsageError(
            f"--postgres {spec} needs a Docker engine, and none answers ({reason}). "
            "Start one, or leave the option out: the tests bring a PostgreSQL of their own."
        )


def _no_docker() -> str | None:
    """Why no Docker engine answers; None where one does."""
    import docker

    with warnings.catch_warnings():
        # The client leaves a socket open that found nobody. Collected later, that would end the run with a traceback.
        warnings.simplefilter("ignore", ResourceWarning)
        try:
            with closing(docker.from_env()) as client:
                client.ping()
            return None
        except docker.errors.DockerException as error:
            reason = " ".join(str(error).split())
        gc.collect()
    return reason
