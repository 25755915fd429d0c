"""The metrics of a rehearsal, to see the dashboards with data before anything is live.

The workers count as an application's processes behind one port do: in prometheus_client's multiprocess mode, in files
of one folder. One address serves these files together with what an exporter reads from the scratch database, so that a
Prometheus has one place to look at.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pydantic import SecretStr
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from walletmigrate import schema
from walletmigrate.config import Settings
from walletmigrate.flag_impact import rollout
from walletmigrate.flag_sources import FileSource
from walletmigrate.flags import FlagSource
from walletmigrate.heartbeat import Heartbeat
from walletmigrate.observe import Observer, PrometheusObserver

if TYPE_CHECKING:
    from prometheus_client.registry import Collector

HOLD_SECONDS: Final = 1.0
"""How long a look at the database is kept: a rehearsal is short, and alone on its database."""

BEAT_SECONDS: Final = 1.0


@contextmanager
def serving(engine: Engine, settings: Settings, folder: Path, port: int) -> Iterator[str]:
    """Serve what the workers count in ``folder`` and what stands in the database, on loopback; gives the address.

    ``port`` 0 takes a free one. Raises UsageError for a port that cannot be listened on.
    """
    # Not above: a worker loads this module too, and must not load prometheus_client before `counting`.
    from prometheus_client import CollectorRegistry
    from prometheus_client.multiprocess import MultiProcessCollector

    from walletmigrate.exporter import listen

    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(folder))  # type: ignore[no-untyped-call]  # it has no types
    registry.register(_facts(engine, settings))
    exporter = listen(registry, port)
    try:
        yield f"http://127.0.0.1:{exporter.port}/metrics"
    finally:
        exporter.close()


def _facts(engine: Engine, settings: Settings) -> Collector:
    """What stands in the database, from the install on: before, an exporter could only say that it sees nothing."""
    from prometheus_client.registry import Collector

    from walletmigrate.exporter import DatabaseFacts, Family, scope_of

    source, name = FileSource(settings.flags.path), settings.ledger_schema
    facts = DatabaseFacts(
        engine,
        name,
        scope_of(settings),
        rollout=lambda connection: rollout(connection, settings, source.snapshot()),
        ttl=HOLD_SECONDS,
    )

    class FromTheInstallOn(Collector):
        installed = False

        def collect(self) -> Iterator[Family]:
            self.installed = self.installed or _installed(engine, name)
            return facts.collect() if self.installed else iter(())

        def describe(self) -> Iterator[Family]:
            return facts.describe()

    return FromTheInstallOn()


def _installed(engine: Engine, name: str) -> bool:
    try:
        with engine.connect() as connection:
            return schema.installed(connection, name)
    except SQLAlchemyError:  # the rehearsal itself tells of a database that is gone
        return False


def counting(folder: Path) -> tuple[Observer, ...]:
    """The observers of a worker, which count in ``folder``; once per process."""
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(folder)
    from prometheus_client import CollectorRegistry, values

    # It looks at the variable when it is loaded, which the main module of whoever rehearses may have done already.
    values.ValueClass = values.get_value_class()  # type: ignore[no-untyped-call]  # it has no types
    return (PrometheusObserver(CollectorRegistry()),)


def beating(settings: Settings, url: str, source: FlagSource, observers: tuple[Observer, ...], name: str) -> Heartbeat:
    """A worker's heartbeat; it ends when nobody holds it any more."""
    known = settings.model_copy(update={"database_url": SecretStr(url)})
    return Heartbeat(known, source, name=name, seconds=BEAT_SECONDS, observers=observers).start()
