"""Facts that stand in the database, served as metrics: accounts, phase, line, jobs, drift, imbalance.

Counters live in the application's processes (see `observe`). What the database knows is the same for all of
them and outlives the short commands that made it, so one exporter serves it. It reads and never writes.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Final
from wsgiref.simple_server import WSGIServer

import sqlalchemy as sa
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.metrics_core import GaugeMetricFamily
from prometheus_client.registry import Collector
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool

from walletmigrate import connect
from walletmigrate.errors import ConfigError, UsageError
from walletmigrate.observe import METRICS

if TYPE_CHECKING:
    from walletmigrate.config import Settings

PHASES: Final = ("legacy", "dual_write", "read_ledger", "wallet_only", "frozen", "retired")
STATES: Final = ("absent", "mirrored", "stale", "frozen", "closed")
JOB_KINDS: Final = ("backfill", "verify", "freeze", "unfreeze")
LINE_STOPPED: Final = 2
# Together below Prometheus' usual scrape timeout of 10 s.
STATEMENT_TIMEOUT_MS: Final = 6000
CONNECT_SECONDS: Final = 3

_log = logging.getLogger("walletmigrate")


@dataclass(frozen=True)
class JobFacts:
    """The newest jobs of one kind, one per mapping, added up; ``remaining`` is NaN while a total is
    unknown.
    """

    items: int = 0
    failed: int = 0
    paused: int = 0
    remaining: float = 0


@dataclass(frozen=True)
class Facts:
    """What one look at the ledger's schema saw. Amounts are in major units, by currency; ``last_success``
    is Unix time, 0 if a mapping never had a clean full verification.
    """

    phase: str
    line_stopped: bool
    accounts: Mapping[str, int]
    jobs: Mapping[str, JobFacts]
    imbalance: Mapping[str, Decimal]
    drift_accounts: Mapping[str, int]
    drift_amount: Mapping[str, Decimal]
    last_success: float


def read_facts(connection: sa.Connection, schema: str, scope: Collection[tuple[str, str]] = ()) -> Facts:
    """Read the facts of the ledger in ``schema``, as of the connection's snapshot.

    ``scope`` are the configured (mapping, currency) pairs: only their verifications count, and their
    currencies are there before they have a row; without it everything in the database counts. Raises
    SQLAlchemy's errors, also when no ledger is installed.
    """
    control = _table(schema, "control", "phase")
    line = _table(schema, "line", "last_value")
    states, imbalance = _balances(connection, schema)
    drift = _drift(connection, schema, scope)
    currencies = sorted({currency for _, currency in scope} | imbalance.keys() | {row.currency for row in drift})
    return Facts(
        phase=connection.scalar(sa.select(control.c.phase)) or "",
        line_stopped=connection.scalar(sa.select(line.c.last_value)) == LINE_STOPPED,
        # Counting the absent means reading the legacy table; the last verification has done that.
        accounts={**dict.fromkeys(STATES, 0), **states, "absent": sum(int(row.missing) for row in drift)},
        jobs=_jobs(connection, schema),
        imbalance=dict.fromkeys(currencies, Decimal(0)) | imbalance,
        drift_accounts=dict.fromkeys(currencies, 0) | {row.currency: int(row.accounts) for row in drift},
        drift_amount=dict.fromkeys(currencies, Decimal(0)) | {row.currency: row.amount for row in drift},
        last_success=_last_success(connection, schema, scope),
    )


def _table(schema: str, name: str, *columns: str) -> sa.TableClause:
    return sa.table(name, *(sa.column(column) for column in columns), schema=schema)


def _balances(connection: sa.Connection, schema: str) -> tuple[dict[str, int], dict[str, Decimal]]:
    """Accounts by state, and the sum of all balances by currency: one pass over the accounts for both."""
    accounts = _table(schema, "accounts", "state", "currency", "balance")
    system = _table(schema, "system_balances", "currency", "balance")
    state = sa.cast(accounts.c.state, sa.Text).label("state")
    states: dict[str, int] = defaultdict(int)
    sums: dict[str, Decimal] = defaultdict(Decimal)
    owned = sa.select(state, accounts.c.currency, sa.func.count(), sa.func.sum(accounts.c.balance))
    for name, currency, count, balance in connection.execute(owned.group_by(state, accounts.c.currency)):
        states[name] += count
        sums[currency] += balance
    of_system = sa.select(system.c.currency, sa.func.sum(system.c.balance)).group_by(system.c.currency)
    for currency, balance in connection.execute(of_system):
        sums[currency] += balance
    return dict(states), dict(sums)


def _full_runs(schema: str, scope: Collection[tuple[str, str]]) -> tuple[sa.TableClause, sa.ColumnElement[bool]]:
    """The verifications, and the condition for those that count."""
    runs = _table(
        schema,
        "verifications",
        *("id", "mapping", "currency", "finished_at", "clean", "full_run"),
        *("missing", "drift_accounts", "drift_amount"),
    )
    # A sample says nothing about the accounts it left out, so only full runs are taken for the whole.
    counts = sa.and_(runs.c.full_run, runs.c.finished_at.is_not(None))
    if scope:
        counts = sa.and_(counts, sa.tuple_(runs.c.mapping, runs.c.currency).in_(list(scope)))
    return runs, counts


def _drift(connection: sa.Connection, schema: str, scope: Collection[tuple[str, str]]) -> list[sa.Row[Any]]:
    """missing, accounts and amount by currency, from the last full verification of each mapping."""
    runs, counts = _full_runs(schema, scope)
    newest = sa.select(sa.func.max(runs.c.id)).where(counts).group_by(runs.c.mapping, runs.c.currency)
    total = sa.select(
        runs.c.currency,
        sa.func.sum(runs.c.missing).label("missing"),
        sa.func.sum(runs.c.drift_accounts).label("accounts"),
        sa.func.sum(runs.c.drift_amount).label("amount"),
    )
    return list(connection.execute(total.where(runs.c.id.in_(newest)).group_by(runs.c.currency)))


def _last_success(connection: sa.Connection, schema: str, scope: Collection[tuple[str, str]]) -> float:
    """The oldest of the mappings' last clean full runs: one that is verified daily must not hide another."""
    runs, counts = _full_runs(schema, scope)
    when = sa.extract("epoch", sa.func.max(runs.c.finished_at))
    clean = sa.select(runs.c.mapping, runs.c.currency, when).where(counts, runs.c.clean)
    rows = connection.execute(clean.group_by(runs.c.mapping, runs.c.currency))
    times = {(mapping, currency): float(at) for mapping, currency, at in rows}
    return min((times.get(pair, 0.0) for pair in scope or times), default=0.0)


def _jobs(connection: sa.Connection, schema: str) -> dict[str, JobFacts]:
    counted = ("items_total", "items_done", "items_failed", "held")
    jobs = _table(schema, "jobs", "id", "kind", "mapping", "state", *counted)
    newest = sa.select(sa.func.max(jobs.c.id)).group_by(jobs.c.kind, jobs.c.mapping)
    facts = {kind: JobFacts() for kind in JOB_KINDS}
    for job in connection.execute(sa.select(jobs).where(jobs.c.id.in_(newest))):
        before = facts.get(job.kind, JobFacts())
        facts[job.kind] = JobFacts(
            items=before.items + job.items_done,
            # A job can fail before any of its items did; it must show all the same.
            failed=before.failed + max(job.items_failed, job.state == "failed"),
            paused=before.paused + (job.state == "paused" or (job.state == "running" and job.held is not None)),
            remaining=before.remaining + _remaining(job),
        )
    return facts


def _remaining(job: sa.Row[Any]) -> float:
    if job.state in ("done", "cancelled"):
        return 0
    if job.items_total is None:
        return float("nan")
    return max(int(job.items_total) - int(job.items_done) - int(job.items_failed), 0)


def _gauge(name: str, *samples: tuple[tuple[str, ...], float | Decimal]) -> GaugeMetricFamily:
    metric = METRICS[name]
    family = GaugeMetricFamily(metric.full_name, metric.help, labels=metric.labels)
    for labels, value in samples:
        family.add_metric(labels, float(value))
    return family


def _by_label(name: str, values: Mapping[str, float | Decimal]) -> GaugeMetricFamily:
    return _gauge(name, *(((label,), value) for label, value in values.items()))


def families(facts: Facts) -> Iterator[GaugeMetricFamily]:
    """The facts as Prometheus' metric families. Only here does money become a float, to be drawn."""
    yield _by_label("phase", {phase: float(phase == facts.phase) for phase in PHASES})
    yield _gauge("line_stopped", ((), facts.line_stopped))
    yield _by_label("accounts", facts.accounts)
    yield _by_label("drift_accounts", facts.drift_accounts)
    yield _by_label("drift_amount", facts.drift_amount)
    yield _gauge("verification_last_success_timestamp_seconds", ((), facts.last_success))
    yield _by_label("job_items", {kind: job.items for kind, job in facts.jobs.items()})
    yield _by_label("job_failed", {kind: job.failed for kind, job in facts.jobs.items()})
    yield _by_label("job_paused", {kind: job.paused for kind, job in facts.jobs.items()})
    yield _by_label("job_remaining", {kind: job.remaining for kind, job in facts.jobs.items()})
    yield _by_label("ledger_imbalance", facts.imbalance)


class DatabaseFacts(Collector):
    """A Prometheus collector of the facts in ``schema``; register it in a registry of its own.

    Each look is one read-only transaction with one snapshot. It is kept for ``ttl`` seconds and shared by
    scrapes that come together, so that a storm of them costs the database one look; a failed look is kept
    too. When the database does not answer, only ``walletmigrate_exporter_up 0`` is served: a 0 for a
    stopped line or a drift would be a false all-clear.
    """

    def __init__(
        self,
        engine: sa.Engine,
        schema: str,
        scope: Collection[tuple[str, str]] = (),
        *,
        ttl: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._schema = schema
        self._scope = frozenset(scope)
        self._ttl = ttl
        self._clock = clock
        self._lock = threading.Lock()
        self._facts: Facts | None = None
        self._looked_at: float | None = None

    def describe(self) -> Iterator[GaugeMetricFamily]:
        """The families without samples, so that registering does not touch the database."""
        return (_gauge(metric.name) for metric in METRICS.values() if metric.served_by == "exporter")

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Never raises for the database's sake."""
        facts = self._current()
        yield _gauge("exporter_up", ((), facts is not None))
        if facts is not None:
            yield from families(facts)

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
                return read_facts(connection, self._schema, self._scope)
        except SQLAlchemyError as error:
            if self._looked_at is None or self._facts is not None:  # said once per outage, not per look
                _warn(self._schema, error)
            return None


def _warn(schema: str, error: SQLAlchemyError) -> None:
    # The driver's message may quote the connection string; its class and SQLSTATE cannot.
    cause = getattr(error, "orig", None) or error
    sqlstate = getattr(cause, "sqlstate", None) or "no SQLSTATE"
    _log.warning("exporter cannot read schema %s: %s (%s)", schema, type(cause).__name__, sqlstate)


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


def serve(settings: Settings, port: int, address: str = "127.0.0.1") -> Exporter:
    """Serve the facts of the configured ledger over HTTP, from a registry of their own; ``port`` 0 takes a
    free one. A database that does not answer is no error: it is what ``walletmigrate_exporter_up`` tells.

    Raises ConfigError without a usable database URL, UsageError when the address cannot be listened on.
    """
    if settings.database_url is None:
        raise ConfigError("no database URL is set", fix="set WALLETMIGRATE_DATABASE_URL or pass --database-url")
    engine = connect.engine(
        settings.database_url,
        application_name="walletmigrate exporter",
        statement_timeout_ms=STATEMENT_TIMEOUT_MS,
        connect_args={"connect_timeout": CONNECT_SECONDS},
        # One look every ten seconds: a kept connection would only go stale.
        poolclass=NullPool,
    )
    scope = {(mapping.name, column.currency) for mapping in settings.mappings for column in mapping.columns}
    registry = CollectorRegistry()
    registry.register(DatabaseFacts(engine, settings.ledger_schema, scope))
    try:
        server, thread = start_http_server(port, addr=address, registry=registry)
    except OSError as error:
        message = f"cannot listen on {address}:{port}: {error.strerror}. Choose another port or address."
        raise UsageError(message) from error
    return Exporter(server, thread)
