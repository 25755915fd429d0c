"""Events of the adapter, and the observers that turn them into metrics and logs.

An event is frozen and goes one way: an observer gets it and gives nothing back, so it cannot change what
was posted, and one that fails cannot fail a money write. The adapter tells events of a Session after its
outermost commit (``committed=True``); on a bare Connection nobody can know of the commit, so the event only
says *posted*.

Importing this module registers no metric and configures no log. It loads neither library: only who observes does.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, get_args

from walletmigrate.loggers import default_logger, stdlib_logger
from walletmigrate.metrics import METRICS

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry, Counter

Operation = Literal["credit", "debit", "set_balance", "transfer", "reverse", "apply", "open_account"]
Mode = Literal["legacy", "dual_write", "ledger"]
Outcome = Literal["ok", "ledger_failed", "skipped", "replayed", "refused"]
Source = Literal["legacy", "ledger", "fallback"]
Compare = Literal["match", "mismatch", "stale"]
Where = Literal["write", "read"]

OPERATIONS: Final[tuple[Operation, ...]] = get_args(Operation)
MODES: Final[tuple[Mode, ...]] = get_args(Mode)
OUTCOMES: Final[tuple[Outcome, ...]] = get_args(Outcome)
SOURCES: Final[tuple[Source, ...]] = get_args(Source)
COMPARES: Final[tuple[Compare, ...]] = get_args(Compare)
PLACES: Final[tuple[Where, ...]] = get_args(Where)
VERIFIED: Final = "verify"
"""The further place of a mismatch, which the exporter serves: a verification mostly is a command, and never scraped."""
WATCHED: Final = ("lost_update", "unrouted")
FLAGS: Final = ("wallet.dualWrite", "wallet.readFromLedger", "wallet.enableWithdrawals")

# 0.5 ms to 5 s: one round trip to a near database is below the first bounds, a lock wait above the last ones.
BUCKETS: Final = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)

FLAGS_SECONDS: Final = 1.0
"""How often calls tell of flags that are still the same; a scrape looks no more often."""


@dataclass(frozen=True, slots=True)
class Posted:
    """One movement that the adapter carried out or refused, or that the ledger broke (ledger_failed, not committed).

    ``seconds`` is the call's duration; None for a refusal, and for the second and later movements of one call, so
    that a batch is measured once. ``committed`` is False on a bare Connection and for what failed. ``error`` is a
    code or SQLSTATE, never a message. ``amount`` is what moved, in major units and without a sign; None where
    nothing did (a replay, a refusal) or where it is not known.
    """

    operation: Operation
    mode: Mode
    outcome: Outcome
    seconds: float | None
    mapping: str
    bucket: str | None
    currency: str | None
    transaction_id: int | None
    correlation_id: str | None
    committed: bool
    key: object = None
    amount: Decimal | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Read:
    """One balance read. ``source`` is the side that answered (fallback: the ledger was asked for and could
    not answer); ``compare`` is None if the two sides were not compared. A mismatch is told as `Mismatch`
    too.
    """

    source: Source
    compare: Compare | None
    seconds: float
    mapping: str
    bucket: str
    currency: str
    correlation_id: str | None = None
    key: object = None
    balance: Decimal | None = None


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Legacy and ledger differ for one account; balances are in major units."""

    where: Where
    mapping: str
    bucket: str
    currency: str
    correlation_id: str | None = None
    transaction_id: int | None = None
    key: object = None
    legacy: Decimal | None = None
    ledger: Decimal | None = None


@dataclass(frozen=True, slots=True)
class Adjusted:
    """A balance that an operator adjusted (`corrections.adjust`), told after the commit. Its audit row has the same
    correlation id. ``amount`` is signed, in major units.
    """

    mapping: str
    bucket: str
    currency: str
    transaction_id: int | None
    correlation_id: str | None
    key: object = None
    amount: Decimal | None = None


@dataclass(frozen=True, slots=True)
class FlagsSeen:
    """The flag document in force, and its age then. Told by a call that decides by another one than the adapter's last
    call, or a second after it was last told; and by each beat of a `Heartbeat` that has observers, so that the age
    goes on in a process without work.
    """

    age_seconds: float
    source: str
    document_id: str


@dataclass(frozen=True, slots=True)
class LostUpdate:
    """A watched attribute was assigned a value made from a balance that was not the latest: the update in between
    is lost, as it was before the attribute was watched. Balances are in major units.

    ``expected`` is what the object had loaded, ``found`` what the row held under its lock.
    """

    mapping: str
    bucket: str
    currency: str
    attribute: str
    correlation_id: str | None = None
    transaction_id: int | None = None
    key: object = None
    expected: Decimal | None = None
    found: Decimal | None = None
    assigned: Decimal | None = None


@dataclass(frozen=True, slots=True)
class Unrouted:
    """A write to a watched column that could not be sent through the adapter. Legacy alone was written; the fence has
    caught it. ``where`` says whether in a flush or by an UPDATE or INSERT statement, ``reason`` why.
    """

    where: Literal["flush", "update", "insert"]
    mapping: str
    attribute: str
    reason: str
    key: object = None


Event = Posted | Read | Mismatch | Adjusted | FlagsSeen | LostUpdate | Unrouted


class Observer(Protocol):
    """Anything that can be told an event. It must not write to the caller's database connection."""

    def __call__(self, event: Event, /) -> None:
        """Take note of the event. What it raises is swallowed by `Observers.tell`."""


class Observers:
    """A fixed row of observers; `tell` never raises. ``failures`` counts the exceptions it swallowed.

    The log has the first of each observer, by its type and SQLSTATE: its words may quote what the event says. With a
    `LogObserver` among them that logs values it has the whole traceback.
    """

    def __init__(self, observers: Iterable[Observer] = ()) -> None:
        self._observers = tuple(observers)
        self._lock = threading.Lock()
        self._reported: set[int] = set()
        self.failures = 0

    def __iter__(self) -> Iterator[Observer]:
        return iter(self._observers)

    def __len__(self) -> int:
        return len(self._observers)

    def tell(self, event: Event) -> None:
        """Hand the event to every observer, whatever the one before did."""
        for place, observer in enumerate(self._observers):
            try:
                observer(event)
            except Exception as error:  # noqa: BLE001 - money is committed by now; no fault here may reach the caller
                self._failed(place, observer, error)

    def _failed(self, place: int, observer: Observer, error: Exception) -> None:
        with self._lock:
            self.failures += 1
            first = place not in self._reported
            self._reported.add(place)
        if first:  # once each: a broken observer would otherwise write a traceback for every posting
            with contextlib.suppress(Exception):
                stdlib_logger().error(
                    "observer %s failed: %s at %s; its further failures are only counted",
                    getattr(observer, "__qualname__", type(observer).__qualname__),
                    kind_of(error),
                    _raised_at(error),
                    exc_info=any(isinstance(one, LogObserver) and one.log_values for one in self),
                )


def kind_of(error: BaseException) -> str:
    """What a log may say of an error: its type, and of the database's errors the driver's with the SQLSTATE. Never its
    words, which may quote a key, a balance, or the address of a database.
    """
    cause = getattr(error, "orig", None) or error
    state = getattr(cause, "sqlstate", None)
    return type(cause).__name__ + (f" ({state})" if state else "")


def _raised_at(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "nowhere"


class PrometheusObserver:
    """Counts events in ``registry``. One per process and registry: prometheus_client refuses a second one.

    Every label set stands at 0 from the start, since a counter that first appears at 1 has an `increase` of
    0. Only counters, a histogram and plainly set gauges are used, which all survive multiprocess mode;
    there, let the server's exit hook call ``prometheus_client.multiprocess.mark_process_dead``.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        from prometheus_client import Gauge, Histogram

        writes = _counter("dual_write_total", registry)
        reads = _counter("read_total", registry)
        compares = _counter("read_compare_total", registry)
        mismatches = _counter("mismatch_total", registry)
        watched = _counter("watched_write_total", registry)
        timing = METRICS["dual_write_duration_seconds"]
        seconds = Histogram(timing.full_name, timing.help, timing.labels, registry=registry, buckets=BUCKETS)
        flag_age = METRICS["flag_age_seconds"]
        # The worst of the processes that live: one that lost its flag server must not hide behind the others.
        age = Gauge(flag_age.full_name, flag_age.help, flag_age.labels, registry=registry, multiprocess_mode="livemax")
        self._writes = {pair: writes.labels(*pair) for pair in product(OPERATIONS, OUTCOMES)}
        self._seconds = {pair: seconds.labels(*pair) for pair in product(OPERATIONS, MODES)}
        self._reads = {source: reads.labels(source) for source in SOURCES}
        self._compares = {outcome: compares.labels(outcome) for outcome in COMPARES}
        self._mismatches = {where: mismatches.labels(where) for where in PLACES}
        self._lost, self._unrouted = (watched.labels(outcome) for outcome in WATCHED)
        self._ages = [age.labels(flag) for flag in FLAGS]

    def __call__(self, event: Event, /) -> None:
        """Count the event, unless it is an operator's deed (`Adjusted`), which is no traffic of the application.

        Raises KeyError for a label value outside the closed sets.
        """
        match event:
            case Posted():
                self._writes[event.operation, event.outcome].inc()
                # A refusal mostly never reaches the database; its microseconds would flatter the latency.
                if event.seconds is not None and event.outcome != "refused":
                    self._seconds[event.operation, event.mode].observe(event.seconds)
            case Read():
                self._reads[event.source].inc()
                if event.compare is not None:
                    self._compares[event.compare].inc()
            case Mismatch():
                self._mismatches[event.where].inc()
            case LostUpdate():
                self._lost.inc()
            case Unrouted():
                self._unrouted.inc()
            case FlagsSeen():
                for age in self._ages:
                    age.set(event.age_seconds)


def _counter(name: str, registry: CollectorRegistry) -> Counter:
    from prometheus_client import Counter

    metric = METRICS[name]
    return Counter(metric.full_name, metric.help, metric.labels, registry=registry)


class LogObserver:
    """Writes events as structured log lines with their correlation id.

    Without ``logger`` they go as JSON to the standard library's logger ``walletmigrate``: postings and adjustments
    at INFO, reads at DEBUG, a failed ledger leg, a mismatch, a lost update and an
    unrouted write at WARNING. Pass a structlog logger to use your own
    chain. Account keys, amounts and balances are left out unless ``log_values`` is true.
    """

    def __init__(self, logger: Any = None, *, log_values: bool = False) -> None:
        self._log = default_logger() if logger is None else logger
        self.log_values: Final = log_values

    def __call__(self, event: Event, /) -> None:
        """Write the event as one line, if its level is wanted."""
        match event:
            case Posted():
                level = self._log.warning if event.outcome == "ledger_failed" else self._log.info
                level(_posted_name(event), **self._fields(event, ("key", "amount")))
            case Read():
                self._log.debug("wallet.read", **self._fields(event, ("key", "balance")))
            case Mismatch():
                self._log.warning("wallet.mismatch", **self._fields(event, ("key", "legacy", "ledger")))
            case LostUpdate():
                values = ("key", "expected", "found", "assigned")
                self._log.warning("wallet.lost_update", **self._fields(event, values))
            case Unrouted():
                self._log.warning("wallet.unrouted", **self._fields(event, ("key",)))
            case Adjusted():
                self._log.info("wallet.adjusted", **self._fields(event, ("key", "amount")))
            case FlagsSeen():
                pass  # told with every call and beat; the metric has it

    def _fields(self, event: Event, values: tuple[str, ...]) -> dict[str, object]:
        hidden = () if self.log_values else values
        names = (name for name in event.__slots__ if name not in hidden)
        return {name: value for name in names if (value := getattr(event, name)) is not None}


def _posted_name(event: Posted) -> str:
    if event.outcome == "refused":
        return "wallet.refused"
    return "wallet.committed" if event.committed else "wallet.posted"


def correlation_id() -> str:
    """The ``correlation_id`` that the caller bound in structlog's context variables; else the trace id of
    OpenTelemetry's current span, where that is installed; else a new one. The latter two have 32 hexadecimal
    digits (W3C Trace Context). It is not bound here: the context belongs to the caller.
    """
    import structlog

    bound = structlog.contextvars.get_contextvars().get("correlation_id")
    return str(bound) if bound else _trace_id() or os.urandom(16).hex()


def _trace_id() -> str | None:
    # Not imported here: who uses it has done so, and who does not shall not pay for it.
    tracing: Any = sys.modules.get("opentelemetry.trace")
    if tracing is None:
        return None
    context = tracing.get_current_span().get_span_context()
    return format(context.trace_id, "032x") if context.is_valid else None
