"""The exporter in tests: an empty ledger, what one look or one scrape shows, a clock that stands."""

from __future__ import annotations

import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psycopg
from prometheus_client.parser import text_string_to_metric_families
from psycopg import sql
from pydantic import SecretStr
from sqlalchemy import Engine
from sqlalchemy.pool import NullPool

from walletmigrate import connect
from walletmigrate.config import Column, ExporterSettings, Mapping, Settings
from walletmigrate.exporter import DatabaseFacts
from walletmigrate.metrics import METRICS
from walletmigrate.schema import migrate, quoted

Samples = dict[tuple[str, str], float]
Execute = Callable[[str], None]

SCHEMA = "wallet"
SCOPE = {("users", "EUR"), ("shops", "USD")}
EXPORTED = {metric.full_name for metric in METRICS.values() if metric.served("exporter")}

POSTINGS = """
insert into system_accounts (id, name, currency) values (-1, 'opening', 'EUR'), (-2, 'external', 'EUR');
insert into accounts (mapping, key, bucket, currency, state, balance) values
    ('users', '1', 'cash', 'EUR', 'mirrored', 12.50), ('users', '2', 'cash', 'EUR', 'mirrored', -2.25),
    ('users', '3', 'cash', 'EUR', 'stale', 0), ('users', '4', 'cash', 'EUR', 'frozen', 0);
insert into transactions (id, debit_account, credit_account, kind, amount, currency, type) values
    (1, -1, 1, 'opening', 12.50, 'EUR', 'opening'), (2, 2, -2, 'posting', 2.25, 'EUR', 'booking');
"""


def install(url: str, schema: str = SCHEMA) -> None:
    with engine_of(url).begin() as connection:
        connection.exec_driver_sql(f"create schema {quoted(schema)}")
        migrate(connection, schema)


def engine_of(url: str) -> Engine:
    return connect.engine(url, application_name="walletmigrate-test", poolclass=NullPool)


@contextmanager
def executing(url: str) -> Iterator[Execute]:
    """Runs statements on the ledger's tables, each in a transaction of its own."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(sql.SQL("set search_path = {}").format(sql.Identifier(SCHEMA)))

        def execute(statement: str) -> None:
            connection.execute(statement.encode())

        yield execute


class Clock:
    """Seconds that pass when the test says so."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def samples(collector: DatabaseFacts) -> Samples:
    """(name, label values) → value."""
    return {
        (sample.name, "".join(sample.labels.values())): sample.value
        for family in collector.collect()
        for sample in family.samples
    }


def of(seen: Samples, name: str) -> dict[str, float]:
    return {label: value for (metric, label), value in seen.items() if metric == f"walletmigrate_{name}"}


def facts(engine: Engine, schema: str = SCHEMA) -> Samples:
    seen = samples(DatabaseFacts(engine, schema, SCOPE))
    assert of(seen, "exporter_up") == {"": 1}
    return seen


def scrape(port: int) -> Samples:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        page = answer.read().decode()
    return {
        (sample.name, "".join(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }


def settings(url: str | None, exporter: ExporterSettings | None = None) -> Settings:
    mappings = tuple(
        Mapping(
            name=name,
            table=name,
            key="id",
            columns=(Column(bucket="cash", column="balance", currency=currency, scale=2),),
        )
        for name, currency in SCOPE
    )
    secret = SecretStr(url) if url else None
    return Settings(database_url=secret, mappings=mappings, exporter=exporter or ExporterSettings())
