"""Observers: what is counted and logged, what never is, and that none of it can hurt a posting."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import threading
import urllib.request
from decimal import Decimal
from pathlib import Path

import pytest
import structlog
from opentelemetry.sdk.trace import TracerProvider
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.multiprocess import MultiProcessCollector
from sqlalchemy.exc import DBAPIError

from scrapes import Series, process_series, scraped
from walletmigrate import flags, observe
from walletmigrate.metrics import METRICS
from walletmigrate.observe import (
    Event,
    FlagsSeen,
    LogObserver,
    LostUpdate,
    Mismatch,
    Observers,
    Posted,
    PrometheusObserver,
    Read,
    Unrouted,
)

POSTED = Posted(
    operation="credit",
    mode="dual_write",
    outcome="ok",
    seconds=0.004,
    mapping="users",
    bucket="cash",
    currency="EUR",
    transaction_id=7,
    correlation_id="c-1",
    committed=True,
    key=4711,
    amount=Decimal("12.50"),
)
READ = Read("ledger", "mismatch", 0.001, "users", "cash", "EUR", "c-1", 4711, Decimal("12.50"))
MISMATCH = Mismatch("read", "users", "cash", "EUR", "c-1", None, 4711, Decimal("12.50"), Decimal("13.50"))

LOST = LostUpdate(
    *("users", "cash", "EUR", "User.total_coins", "c-1", 7, 4711), Decimal("12.50"), Decimal("13.50"), Decimal("12.50")
)
UNROUTED = Unrouted("flush", "users", "User.total_coins", "a SQL expression", 4711)


def posted(**changes: object) -> Posted:
    fields = {name: getattr(POSTED, name) for name in POSTED.__slots__}
    return Posted(**{**fields, **changes})


def scrape(registry: CollectorRegistry) -> dict[Series, float]:
    """What an HTTP scrape on loopback gives."""
    server, thread = start_http_server(0, addr="127.0.0.1", registry=registry)
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/metrics", timeout=10) as answer:
            return scraped(answer.read().decode())
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_a_scrape_before_the_first_event_has_every_label_set_at_zero() -> None:
    registry = CollectorRegistry()
    PrometheusObserver(registry)
    samples = scrape(registry)
    assert samples.keys() == process_series()
    assert set(samples.values()) == {0.0}


def test_events_are_counted_under_their_labels_and_nowhere_else() -> None:
    registry = CollectorRegistry()
    observer = PrometheusObserver(registry)
    for event in (POSTED, posted(outcome="ledger_failed", seconds=0.5), READ, MISMATCH):
        observer(event)
    observer(FlagsSeen(12.5, "file", "doc-1"))
    counted = {series: value for series, value in scrape(registry).items() if value}
    timing = (("mode", "dual_write"), ("operation", "credit"))
    ages = {("walletmigrate_flag_age_seconds", (("flag", flag),)): 12.5 for flag in observe.FLAGS}
    assert counted == ages | {
        ("walletmigrate_dual_write_total", (("operation", "credit"), ("outcome", "ok"))): 1,
        ("walletmigrate_dual_write_total", (("operation", "credit"), ("outcome", "ledger_failed"))): 1,
        ("walletmigrate_dual_write_duration_seconds_count", timing): 2,
        ("walletmigrate_dual_write_duration_seconds_sum", timing): 0.504,
        ("walletmigrate_read_total", (("source", "ledger"),)): 1,
        ("walletmigrate_read_compare_total", (("outcome", "mismatch"),)): 1,
        ("walletmigrate_mismatch_total", (("where", "read"),)): 1,
    }


@pytest.mark.parametrize("unmeasured", [posted(outcome="refused"), posted(seconds=None)])
def test_a_refusal_and_the_later_movements_of_a_batch_are_counted_but_not_timed(unmeasured: Posted) -> None:
    registry = CollectorRegistry()
    PrometheusObserver(registry)(unmeasured)
    counted = {name for (name, _), value in scrape(registry).items() if value}
    assert counted == {"walletmigrate_dual_write_total"}


def test_a_read_that_was_not_compared_is_in_no_compare_outcome() -> None:
    registry = CollectorRegistry()
    PrometheusObserver(registry)(Read("legacy", None, 0.001, "users", "cash", "EUR"))
    counted = {name for (name, _), value in scrape(registry).items() if value}
    assert counted == {"walletmigrate_read_total"}


def test_no_label_carries_a_user_an_account_or_an_amount() -> None:
    labels = {label for metric in METRICS.values() for label in metric.labels}
    assert labels == {
        "operation",
        "outcome",
        "mode",
        "source",
        "where",
        "flag",
        "phase",
        "state",
        "currency",
        "kind",
        "mapping",
        "treatment",
    }


def test_the_flags_are_those_that_are_decided_by() -> None:
    assert observe.FLAGS == flags.ALL_FLAGS


def test_the_histogram_reaches_from_half_a_millisecond_to_five_seconds() -> None:
    assert (observe.BUCKETS[0], observe.BUCKETS[-1]) == (0.0005, 5)
    assert list(observe.BUCKETS) == sorted(set(observe.BUCKETS))


def test_importing_the_package_registers_no_metric_and_leaves_structlog_alone() -> None:
    program = """
import prometheus_client, structlog
before = set(prometheus_client.REGISTRY._names_to_collectors)
import walletmigrate.observe, walletmigrate.exporter
walletmigrate.observe.LogObserver()
assert set(prometheus_client.REGISTRY._names_to_collectors) == before
assert not structlog.is_configured()
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


WORKER = """
import sys
from decimal import Decimal
from prometheus_client import CollectorRegistry
from walletmigrate.observe import FlagsSeen, Posted, PrometheusObserver, Read

observer = PrometheusObserver(CollectorRegistry())
print("ready", flush=True)
for line in sys.stdin:
    count, age = line.split()
    for _ in range(int(count)):
        observer(Posted("debit", "ledger", "ok", 0.01, "users", "cash", "EUR", 1, None, True))
        observer(Read("fallback", "stale", 0.01, "users", "cash", "EUR"))
    observer(FlagsSeen(float(age), "file", "doc"))
    print("done", flush=True)
"""


def test_two_processes_add_up_in_multiprocess_mode_and_start_with_every_label_set_at_zero(
    tmp_path: Path,
) -> None:
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    try:
        for worker in workers:
            assert worker.stdout is not None
            assert worker.stdout.readline() == "ready\n"
        at_start = scrape_directory(tmp_path)
        for worker, order in zip(workers, ("3 5", "4 60"), strict=True):
            assert worker.stdin is not None
            assert worker.stdout is not None
            worker.stdin.write(order + "\n")
            worker.stdin.flush()
            assert worker.stdout.readline() == "done\n"
        after = scrape_directory(tmp_path)
    finally:
        for worker in workers:
            worker.communicate(timeout=30)
    assert at_start.keys() == process_series()
    assert set(at_start.values()) == {0.0}
    timing = (("mode", "ledger"), ("operation", "debit"))
    worst = {("walletmigrate_flag_age_seconds", (("flag", flag),)): 60.0 for flag in observe.FLAGS}
    assert {series: value for series, value in after.items() if value} == worst | {
        ("walletmigrate_dual_write_total", (("operation", "debit"), ("outcome", "ok"))): 7,
        ("walletmigrate_dual_write_duration_seconds_count", timing): 7,
        ("walletmigrate_dual_write_duration_seconds_sum", timing): pytest.approx(0.07),
        ("walletmigrate_read_total", (("source", "fallback"),)): 7,
        ("walletmigrate_read_compare_total", (("outcome", "stale"),)): 7,
    }


def scrape_directory(directory: Path) -> dict[Series, float]:
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(directory))  # type: ignore[no-untyped-call]
    return scrape(registry)


class Broken:
    def __call__(self, event: Event, /) -> None:
        raise RuntimeError(f"cannot take {type(event).__name__}")


def test_a_failing_observer_is_swallowed_counted_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[Event] = []
    observers = Observers([Broken(), seen.append])
    for event in (POSTED, READ, MISMATCH):
        observers.tell(event)
    assert seen == [POSTED, READ, MISMATCH]
    assert observers.failures == 3
    assert [re.sub(r":\d+;", ":LINE;", record.getMessage()) for record in caplog.records] == [
        "observer Broken failed: RuntimeError at test_observe.py:LINE; its further failures are only counted"
    ]


class Quoting:
    """An observer whose errors say what it was told, as a database's often do."""

    def __call__(self, event: Event, /) -> None:
        raise DBAPIError("insert", {}, Refused(f"the value {event} is no use"))


class Refused(Exception):
    sqlstate = "23514"


@pytest.mark.parametrize("log_values", [False, True])
def test_the_words_of_a_failure_are_logged_only_where_values_are(
    caplog: pytest.LogCaptureFixture, log_values: bool
) -> None:
    Observers([Quoting(), LogObserver(log_values=log_values)]).tell(POSTED)
    (record,) = [one for one in caplog.records if one.levelno == logging.ERROR]
    assert record.getMessage().startswith("observer Quoting failed: Refused (23514) at test_observe.py:")
    assert ("12.50" in caplog.text, "4711" in caplog.text) == (log_values, log_values)


def test_each_failing_observer_is_logged_for_itself(caplog: pytest.LogCaptureFixture) -> None:
    observers = Observers([Broken(), Broken()])
    observers.tell(POSTED)
    observers.tell(POSTED)
    assert (observers.failures, len(caplog.records)) == (4, 2)


def test_an_observer_that_fails_while_its_failure_cannot_be_logged_still_does_not_raise() -> None:
    logger = logging.getLogger("walletmigrate")

    def refuse(record: logging.LogRecord) -> bool:
        raise OSError("log disk is full")

    logger.addFilter(refuse)
    try:
        observers = Observers([Broken()])
        observers.tell(POSTED)
    finally:
        logger.removeFilter(refuse)
    assert observers.failures == 1


def test_failures_of_many_threads_are_all_counted() -> None:
    observers = Observers([Broken()])

    def tell_many() -> None:
        for _ in range(200):
            observers.tell(POSTED)

    threads = [threading.Thread(target=tell_many) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert observers.failures == 1600


def test_observers_are_a_fixed_row() -> None:
    seen: list[Event] = []
    observers = Observers([seen.append])
    assert len(observers) == 1
    assert [*observers] == [seen.append]
    assert len(Observers()) == 0


def logged(caplog: pytest.LogCaptureFixture, observer: LogObserver, event: Event) -> dict[str, object]:
    with caplog.at_level(logging.DEBUG, logger="walletmigrate"):
        observer(event)
    (record,) = caplog.records
    line: dict[str, object] = json.loads(record.getMessage())
    return {**line, "level": record.levelname}


def test_a_committed_posting_is_logged_with_its_correlation_id(caplog: pytest.LogCaptureFixture) -> None:
    line = logged(caplog, LogObserver(), POSTED)
    line.pop("timestamp")
    assert line == {
        "event": "wallet.committed",
        "level": "INFO",
        "operation": "credit",
        "mode": "dual_write",
        "outcome": "ok",
        "seconds": 0.004,
        "mapping": "users",
        "bucket": "cash",
        "currency": "EUR",
        "transaction_id": 7,
        "correlation_id": "c-1",
        "committed": True,
    }


@pytest.mark.parametrize(
    ("event", "name", "level"),
    [
        (POSTED, "wallet.committed", "INFO"),
        (posted(committed=False), "wallet.posted", "INFO"),
        (posted(committed=False, outcome="refused"), "wallet.refused", "INFO"),
        (posted(outcome="ledger_failed", error="23514"), "wallet.committed", "WARNING"),
        (READ, "wallet.read", "DEBUG"),
        (MISMATCH, "wallet.mismatch", "WARNING"),
    ],
)
def test_the_log_says_what_is_known_and_warns_of_what_is_wrong(
    caplog: pytest.LogCaptureFixture, event: Event, name: str, level: str
) -> None:
    line = logged(caplog, LogObserver(), event)
    assert (line["event"], line["level"], line["correlation_id"]) == (name, level, "c-1")


@pytest.mark.parametrize("event", [POSTED, READ, MISMATCH, LOST, UNROUTED])
def test_keys_amounts_and_balances_are_logged_only_if_asked_for(caplog: pytest.LogCaptureFixture, event: Event) -> None:
    silent = logged(caplog, LogObserver(), event)
    caplog.clear()
    open_line = logged(caplog, LogObserver(log_values=True), event)
    values = {"key", "amount", "balance", "legacy", "ledger", "expected", "found", "assigned"}
    assert values.isdisjoint(silent)
    assert not any("4711" in str(value) or "12.50" in str(value) for value in silent.values())
    assert open_line["key"] == 4711
    assert set(open_line) - set(silent) == values & set(event.__slots__)


def test_the_log_takes_a_logger_of_the_applications_own() -> None:
    with structlog.testing.capture_logs() as lines:
        LogObserver(structlog.get_logger())(POSTED)
    assert [(line["event"], line["correlation_id"]) for line in lines] == [("wallet.committed", "c-1")]


def test_an_unconfigured_application_gets_warnings_on_stderr_and_nothing_on_stdout() -> None:
    program = """
from walletmigrate.observe import LogObserver, Mismatch, Posted
observer = LogObserver()
observer(Posted("credit", "dual_write", "ok", 0.1, "users", "cash", "EUR", 1, "c-1", True))
observer(Mismatch("write", "users", "cash", "EUR", "c-1"))
"""
    ran = subprocess.run([sys.executable, "-c", program], check=True, timeout=60, capture_output=True, text=True)
    assert ran.stdout == ""
    (line,) = ran.stderr.splitlines()
    assert json.loads(line)["event"] == "wallet.mismatch"


def test_the_trace_id_of_the_current_span_is_the_correlation_id_unless_the_caller_bound_another() -> None:
    with TracerProvider().get_tracer("shop").start_as_current_span("booking") as span:
        trace_id = format(span.get_span_context().trace_id, "032x")
        assert observe.correlation_id() == trace_id
        with structlog.contextvars.bound_contextvars(correlation_id="request-9"):
            assert observe.correlation_id() == "request-9"
    assert observe.correlation_id() != trace_id


def test_without_opentelemetry_nothing_of_it_is_imported() -> None:
    code = "import sys, walletmigrate.observe as o; o.correlation_id(); assert 'opentelemetry' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_callers_correlation_id_is_used_and_otherwise_one_is_made() -> None:
    made = {observe.correlation_id() for _ in range(100)}
    assert len(made) == 100
    assert all(len(one) == 32 and int(one, 16) >= 0 for one in made)
    with structlog.contextvars.bound_contextvars(correlation_id="request-9"):
        assert observe.correlation_id() == "request-9"
    assert observe.correlation_id() != "request-9"
