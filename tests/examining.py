"""What the tests of doctor share: a healthy place, faults that are rolled back, and what is said to mend them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import pytest
from sqlalchemy import Connection

from capturing import Place
from commandline import parsed
from servers import Postgres
from walletmigrate import connect
from walletmigrate.doctor import Finding

HOLLOW = "returns trigger language plpgsql set search_path = pg_catalog, pg_temp as 'begin return new; end'"
JOB = (
    "insert into wallet.jobs (kind, mapping, state, actor, reason, version, items_failed, held, updated_at) "
    "values ('backfill', 'users', '{}', 'ana', 'test', '1', {}, {}, clock_timestamp() - interval '{} s')"
)


@pytest.fixture(scope="module")
def place(server: Postgres) -> Iterator[Place]:
    with connect.scratch_database(server.url) as url:
        yield Place(url)


@pytest.fixture
def connection(place: Place) -> Iterator[Connection]:
    """A transaction that is rolled back, so that a fault made in it is gone afterwards."""
    with place.engine.connect() as connection:
        yield connection
        connection.rollback()


def run(connection: Connection, statements: str) -> None:
    connection.exec_driver_sql(statements, execution_options={"no_parameters": True})


def assert_it_can_be_run(found: Sequence[Finding]) -> None:
    """Each command in what mends has its options, known and whole, and its reason."""
    for one in found:
        for command in re.findall(r"walletmigrate [a-z][^;#,]*", one.mend):
            assert parsed(command), one
