"""Facts that stand in the database, served as metrics: accounts, phase, line, jobs, drift, imbalance.

Counters live in the application's processes (see `observe`). What the database knows is the same for all of
them and outlives the short commands that made it, so one exporter serves it. It reads and never writes.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from decimal import Decimal
from typing import TYPE_CHECKING, Final
from wsgiref.simple_server import WSGIServer

import sqlalchemy as sa
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool

from walletmigrate import connect
from walletmigrate.errors import ConfigError, UsageError, WalletMigrateError
from walletmigrate.facts import PHASES, Facts, read_facts
from walletmigrate.metrics import METRICS
from walletmigrate.observe import FLAGS, VERIFIED, kind_of

if TYPE_CHECKING:
    from walletmigrate.config import Settings

# With one statement of the default `look_seconds`, below Prometheus' usual scrape timeout of 10 s. Of a look's dozen
# statements the one that adds up all accounts is by far the longest, and grows with them.
CONNECT_SECONDS: Final = 3

Family = CounterMetricFamily | GaugeMetricFamily
Rollout = Callable[[sa.Connection], Mapping[str, float]]
"""Asks for whom the flags are on: the share of accounts by flag."""
HOLD_SECONDS: Final = 10.0
ROLLOUT_LOOKS: Final = 6

_log = logging.getLogger("walletmigrate")


def _family(name: str, *samples: tuple[tuple[str, ...], float | Decimal]) -> Family:
    metric = METRICS[name]
    kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    family = kind(metric.full_name, metric.help, labels=metric.labels)
    for labels, value in samples:
        family.add_metric(labels, float(value))
    return family


def _by_label(name: str, values: Mapping[str, float | Decimal]) -> Family:
    return _family(name, *(((label,), value) for label, value in values.items()))


def _by_job(facts: Facts, what: str) -> Family:
    return _family(f"job_{what}", *((job, getattr(one, what)) for job, one in facts.jobs.items()))


def families(facts: Facts) -> Iterator[Family]:
    """The facts as Prometheus' metric families. Only here does money become a float, to be drawn."""
    yield _by_label("bypass_writes_total", facts.bypasses)
    yield _family("mismatch_total", ((VERIFIED,), facts.mismatches))
    yield _family("flag_documents", ((), facts.documents))
    yield _by_label("phase", {phase: float(phase == facts.phase) for phase in PHASES})
    yield _family("line_stopped", ((), facts.line_stopped))
    yield _by_label("accounts", facts.accounts)
    yield _by_label("drift_accounts", facts.drift_accounts)
    yield _by_label("drift_amount", facts.drift_amount)
    yield _family("verification_last_success_timestamp_seconds", ((), facts.last_success))
    for what in ("items", "failed", "paused", "remaining", "batch_seconds"):
        yield _by_job(facts, what)
    yield _by_label("ledger_imbalance", facts.imbalance)


class DatabaseFacts(Collector):
    """A Prometheus collector of the facts in ``schema``; register it in a registry of its own.

    Each look is one read-only transaction with one snapshot. It is kept for ``ttl`` seconds and shared by
    scrapes that come together, so that a storm of them costs the database one look; a failed look is kept
    too. When the database does not answer, only ``walletmigrate_exporter_up 0`` is served: a 0 for a
    stopped line or a drift would be a false all-clear. ``rollout`` is kept six times as long, since it may have to
    decide for many accounts. Until it has been asked ``flag_rollout_ratio`` is 0; while it fails, it is NaN: a 0
    would say that nobody has the flag.
    """

    def __init__(
        self,
        engine: sa.Engine,
        schema: str,
        scope: Collection[tuple[str, str]] = (),
        *,
        rollout: Rollout | None = None,
        ttl: float = HOLD_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._schema = schema
        self._scope = frozenset(scope)
        self._rollout = rollout
        self._ratios: Mapping[str, float] = dict.fromkeys(FLAGS, 0.0)
        self._asked_at: float | None = None
        self._ttl = ttl
        self._clock = clock
        self._lock = threading.Lock()
        self._facts: Facts | None = None
        self._looked_at: float | None = None

    def describe(self) -> Iterator[Family]:
        """The families without samples, so that registering does not touch the database."""
        return (_family(metric.name) for metric in METRICS.values() if metric.served("exporter"))

    def collect(self) -> Iterator[Family]:
        """Never raises for the database's sake."""
        facts = self._current()
        yield _family("exporter_up", ((), facts is not None))
        if facts is not None:
            yield from families(facts)
            yield _by_label("flag_rollout_ratio", self._ratios)

    def _current(self) -> Facts | None:
        with self._lock:
            if self._looked_at is None or self._clock() - self._looked_at >= self._ttl:
                self._facts = self._look()
                self._looked_at = self._clock()
            return self._facts

    def _look(self) -> Facts | None:
        try:
            with self._engine.connect() as plain:
                connection = plain.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
                facts = read_facts(connection, self._schema, self._scope)
            self._ask()
            return facts
        except SQLAlchemyError as error:
            if self._looked_at is None or self._facts is not None:  # said once per outage, not per look
                _warn(self._schema, error)
            return None

    def _ask(self) -> None:
        if self._rollout is None:
            return
        if self._asked_at is not None and self._clock() - self._asked_at < ROLLOUT_LOOKS * self._ttl:
            return
        self._asked_at = self._clock()
        try:
            with self._engine.connect() as plain:
                counted = self._rollout(plain.execution_options(postgresql_readonly=True))
            self._ratios = dict.fromkeys(FLAGS, 0.0) | dict(counted)
        except (SQLAlchemyError, WalletMigrateError) as error:
            self._ratios = dict.fromkeys(FLAGS, math.nan)
            _log.warning("exporter cannot count for whom the flags are on: %s", kind_of(error))


def _warn(schema: str, error: SQLAlchemyError) -> None:
    _log.warning("exporter cannot read schema %s: %s", schema, kind_of(error))


class Exporter:
    """A running HTTP server with the facts under ``/metrics``; ``port`` is the one it listens on."""

    def __init__(self, server: WSGIServer, thread: threading.Thread) -> None:
        self._server = server
        self._thread = thread
        self.port = int(server.server_port)

    def close(self) -> None:
        """Stop serving; scrapes under way are finished."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def wait(self) -> None:
        """Block until the server is closed from another thread, or a signal's exception ends the wait."""
        self._thread.join()


def serve(settings: Settings, port: int, address: str = "127.0.0.1", *, rollout: Rollout | None = None) -> Exporter:
    """Serve the facts of the configured ledger over HTTP, from a registry of their own; ``port`` 0 takes a
    free one. How long a look may take, and is served, says the configuration. ``rollout`` says for whom the flags are
    on, see `walletmigrate.flag_impact.rollout`. A database that does not answer is no error: it is what
    ``walletmigrate_exporter_up`` tells.

    Raises ConfigError without a usable database URL, UsageError when the address cannot be listened on.
    """
    if settings.database_url is None:
        raise ConfigError("no database URL is set", fix="set WALLETMIGRATE_DATABASE_URL or pass --database-url")
    engine = connect.engine(
        settings.database_url,
        application_name="walletmigrate exporter",
        statement_timeout_ms=math.ceil(settings.exporter.look_seconds * 1000),  # never 0, which is no limit
        connect_args={"connect_timeout": CONNECT_SECONDS},
        # One look every `hold_seconds`: a kept connection would only go stale.
        poolclass=NullPool,
    )
    registry = CollectorRegistry()
    hold = settings.exporter.hold_seconds
    registry.register(DatabaseFacts(engine, settings.ledger_schema, scope_of(settings), rollout=rollout, ttl=hold))
    return listen(registry, port, address)


def scope_of(settings: Settings) -> frozenset[tuple[str, str]]:
    """The (mapping, currency) pairs of the configuration, whose facts are to be served."""
    return frozenset((mapping.name, column.currency) for mapping in settings.mappings for column in mapping.columns)


def listen(registry: CollectorRegistry, port: int, address: str = "127.0.0.1") -> Exporter:
    """Serve a registry over HTTP; ``port`` 0 takes a free one. Raises UsageError when it cannot be listened on."""
    try:
        server, thread = start_http_server(port, addr=address, registry=registry)
    except OSError as error:
        message = f"cannot listen on {address}:{port}: {error.strerror}. Choose another port or address."
        raise UsageError(message) from error
    return Exporter(server, thread)
