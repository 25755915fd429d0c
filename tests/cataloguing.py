"""A database whose catalog is looked at, and a configuration that was proposed for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Connection, create_engine, make_url
from sqlalchemy.pool import NullPool

from walletmigrate.config import Settings


@pytest.fixture
def connection(database_url: str) -> Iterator[Connection]:
    url = make_url(database_url).set(drivername="postgresql+psycopg")
    engine = create_engine(url, poolclass=NullPool)
    with engine.connect() as connection:
        yield connection
    engine.dispose()


def run(connection: Connection, sql: str) -> None:
    connection.exec_driver_sql(sql)


def loaded(tmp_path: Path, rendered: str) -> Settings:
    file = tmp_path / "walletmigrate.toml"
    file.write_text(rendered, encoding="utf-8")
    return Settings.load(file)
