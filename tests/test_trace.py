"""The whole way of one mutation, by its correlation id."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from decimal import Decimal
from pathlib import Path

import pytest
import structlog
from opentelemetry.sdk.trace import TracerProvider
from sqlalchemy.orm import Session

import adapting
import ledger
from commandline import Project, project_at
from walletmigrate.audit import Act
from walletmigrate.console import INTERRUPTED
from walletmigrate.corrections import adjust
from walletmigrate.invocation import Run
from walletmigrate.observe import LogObserver
from walletmigrate.recalculate import recalculate
from walletmigrate.reconcile import reconcile
from walletmigrate.reconciliations import undo
from walletmigrate.settling import Limits
from walletmigrate.trace import Trace, trace


@pytest.fixture
def place(database_url: str) -> adapting.Place:
    return adapting.place(database_url)


IDS = "select id from wallet.transactions"
MADE = "made"


@contextmanager
def bound() -> Iterator[str]:
    with structlog.contextvars.bound_contextvars(correlation_id="request-7"):
        yield "request-7"


@contextmanager
def spanned() -> Iterator[str]:
    with TracerProvider().get_tracer("shop").start_as_current_span("booking") as span:
        yield format(span.get_span_context().trace_id, "032x")


@contextmanager
def nothing() -> Iterator[str]:
    yield MADE


SOURCES = {"structlog": bound, "OpenTelemetry": spanned, "made": nothing}
"""Where a correlation id comes from: each gives the one that is to be found, or MADE."""


@contextmanager
def logged(caplog: pytest.LogCaptureFixture) -> Iterator[list[tuple[str, str]]]:
    """Fills with (event, correlation id) of each line of the log."""
    lines: list[tuple[str, str]] = []
    with caplog.at_level(logging.INFO, logger="walletmigrate"):
        yield lines
    for record in caplog.records:
        line = json.loads(record.getMessage())
        lines.append((line["event"], line["correlation_id"]))


def found(place: adapting.Place, identifier: str, since: timedelta | None = timedelta(days=1)) -> list[Trace]:
    with place.engine.connect() as connection:
        return list(trace(connection, place.settings, identifier, since=since))


def booked(place: adapting.Place, key: int, request: str, idempotency_key: str) -> None:
    with structlog.contextvars.bound_contextvars(correlation_id=request), place.engine.begin() as connection:
        place.adapter.debit(connection, key, Decimal("12.50"), type="booking", idempotency_key=idempotency_key)


def test_a_posting_is_traced_from_its_key_to_its_transactions(place: adapting.Place) -> None:
    booked(place, 1, "request-1", "key-1")
    booked(place, 2, "request-2", "key-2")
    opening, posting = (number for (number,) in ledger.rows(place.engine, f"{IDS} where correlation_id = 'request-1'"))
    assert [(one.where, one.what) for one in found(place, "request-1")] == [
        ("ledger", f"transaction {opening}: opening opening, 100.00 EUR from opening to users/1 (cash)"),
        ("ledger", f"transaction {posting}: posting booking, 12.50 EUR from users/1 (cash) to external"),
        ("key", f"idempotency key key-1: mode dual_write, transaction {posting}"),
    ]


@pytest.mark.parametrize("source", SOURCES)
def test_the_log_event_and_the_ledger_rows_of_a_booking_carry_one_correlation_id(
    place: adapting.Place, caplog: pytest.LogCaptureFixture, source: str
) -> None:
    adapter = place.another(observers=[LogObserver()])
    with logged(caplog) as lines, SOURCES[source]() as given, Session(place.engine) as session, session.begin():
        result = adapter.debit(session, 1, Decimal("12.50"), type="booking", idempotency_key="key-1")
    ((event, identifier),) = lines
    assert (event, result.correlation_id) == ("wallet.committed", identifier)
    assert given in (identifier, MADE)
    kinds = ledger.rows(place.engine, "select kind::text, correlation_id from wallet.transactions order by id")
    assert kinds == [("opening", identifier), ("posting", identifier)]
    assert [one.where for one in found(place, identifier)] == ["ledger", "ledger", "key"]


@pytest.mark.parametrize("source", SOURCES)
def test_the_log_event_the_ledger_row_and_the_audit_row_of_an_adjustment_carry_one_correlation_id(
    place: adapting.Place, caplog: pytest.LogCaptureFixture, source: str
) -> None:
    booked(place, 1, "request-0", "key-0")
    act, observers = Act("ada", "a gift"), [LogObserver()]
    with logged(caplog) as lines, SOURCES[source]() as given:
        made = adjust(place.engine, place.settings, place.mapping, act, "1", 5, observers=observers)
    ((event, identifier),) = lines
    assert (event, made.correlation_id) == ("wallet.adjusted", identifier)
    assert given in (identifier, MADE)
    (row,) = ledger.rows(place.engine, f"{IDS} where correlation_id = '{identifier}'")
    assert row == (made.transaction_id,)
    audited = "select actor, details ->> 'transaction_id' from wallet.audit_log where correlation_id = :id"
    assert ledger.rows(place.engine, audited, id=identifier) == [("ada", str(made.transaction_id))]
    assert [(one.where, one.what) for one in found(place, identifier)] == [
        ("ledger", f"transaction {made.transaction_id}: correction adjust, 5.00 EUR from correction to users/1 (cash)"),
        ("audit", "adjust by ada: a gift"),
    ]


def test_what_was_corrected_undone_or_recalculated_carries_its_correlation_id_in_the_ledger_and_the_audit_log(
    place: adapting.Place,
) -> None:
    booked(place, 1, "request-0", "key-0")
    where = (place.engine, place.settings)
    with ledger.fence_down(place.engine, place.settings) as connection:
        connection.exec_driver_sql("update users set total_coins = 90 where id = 1")
    limits = Limits(correct_up_to=Decimal(5))
    reconciled = reconcile(*where, place.mapping, Act("ada", "drift", "run-1"), limits=limits, account="1")
    assert reconciled.run is not None
    assert undo(*where, reconciled.run, Act("ada", "not so", "run-2")).undone == 1
    ledger.execute(place.engine, "update wallet.accounts set balance = 1 where key = '1'")
    recalculate(*where, place.mapping, Act("ada", "mended", "run-3"), account="1")
    kinds = ledger.rows(
        place.engine,
        "select kind::text, correlation_id from wallet.transactions where correlation_id like 'run-%' order by id",
    )
    assert kinds == [("correction", "run-1"), ("reversal", "run-2")]
    audited = dict(
        ledger.rows(
            place.engine, "select action, correlation_id from wallet.audit_log where correlation_id like 'run-%'"
        )
    )
    assert audited == {
        "reconcile corrected": "run-1",
        "reconcile account done": "run-1",
        "reconcile undone": "run-2",
        "reconcile undo start": "run-2",
        "reconcile undo done": "run-2",
        "recalculate": "run-3",
    }


def test_a_log_of_an_adjustment_has_neither_its_account_nor_its_amount_unless_that_is_switched_on(
    place: adapting.Place, caplog: pytest.LogCaptureFixture
) -> None:
    booked(place, 1, "request-0", "key-0")
    observers = [LogObserver(), LogObserver(log_values=True)]
    with caplog.at_level(logging.INFO, logger="walletmigrate"):
        adjust(place.engine, place.settings, place.mapping, ledger.ACT, "1", 5, observers=observers)
        adjust(place.engine, place.settings, place.mapping, ledger.ACT, "1", 5, observers=observers, dry_run=True)
    silent, spoken = (json.loads(record.getMessage()) for record in caplog.records)
    assert (spoken["key"], spoken["amount"]) == ("1", "5.00")
    assert spoken.keys() - silent.keys() == {"key", "amount"}


def test_an_idempotency_key_leads_to_the_same(place: adapting.Place) -> None:
    booked(place, 1, "request-1", "key-1")
    assert found(place, "key-1") == found(place, "request-1") != []
    assert {one.correlation_id for one in found(place, "key-1")} == {"request-1"}


def test_a_reversal_names_what_it_reverses_and_the_other_way_round(place: adapting.Place) -> None:
    booked(place, 1, "request-1", "key-1")
    booking = place.last_id()
    with structlog.contextvars.bound_contextvars(correlation_id="request-9"), place.engine.begin() as connection:
        place.adapter.reverse(connection, booking, actor="ada", reason="cancelled")
    (first,) = [one.what for one in found(place, "request-1") if "booking" in one.what]
    assert first.endswith(f", reversed by {place.last_id()}")
    (second,) = [one.what for one in found(place, "request-9") if one.where == "ledger"]
    assert second.endswith(f", reverses {booking}")


def test_a_failed_shadow_leg_is_part_of_the_way(place: adapting.Place) -> None:
    ledger.execute(place.engine, "alter table wallet.transactions add constraint broken check (type <> 'booking')")
    booked(place, 1, "request-1", "key-1")
    assert [one.where for one in found(place, "request-1")].count("failure") == 1


def test_the_journal_is_read_from_the_time_on_that_was_asked_for(place: adapting.Place) -> None:
    for number in range(1, 9):
        booked(place, number, f"request-{number}", f"key-{number}")
    with ledger.unguarded(place.engine, "wallet.transactions") as connection:
        connection.exec_driver_sql(
            "update wallet.transactions set posted_at = posted_at - interval '3 days' "
            "where correlation_id <= 'request-4'"
        )
    assert found(place, "request-4") == []
    assert [one.where for one in found(place, "request-5")].count("ledger") >= 1
    assert found(place, "request-4", timedelta(days=4)) == found(place, "request-4", None) != []
    assert found(place, "key-4") != []


def test_every_audit_row_has_a_correlation_id_and_those_of_one_command_have_the_same(
    database_url: str, tmp_path: Path
) -> None:
    _, engine = project_at(tmp_path, database_url, "dual_write")
    found = ledger.rows(engine, "select action, correlation_id from wallet.audit_log order by id")
    assert all(identifier for _, identifier in found)
    of = dict(found)
    assert of["backfill start"] == of["backfill done"]
    assert len({of[action] for action in ("phase advance", "flags set", "backfill done", "verify")}) == 4


def test_the_audit_row_of_a_job_that_is_cut_short_has_the_id_of_its_command_and_the_next_command_has_another(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project, engine = project_at(tmp_path, database_url, "dual_write")
    monkeypatch.setattr(Run, "stop", lambda _: True)
    assert project.run("backfill", "--reason", "cut short").exit_code == INTERRUPTED
    monkeypatch.undo()
    project.change("backfill")
    newest = (
        "select action, correlation_id from wallet.audit_log where action like 'backfill%' order by id desc limit 4"
    )
    (done, last), (resumed, again), (paused, left), (started, first) = ledger.rows(engine, newest)
    assert [started, paused, resumed, done] == ["backfill start", "backfill pause", "backfill resume", "backfill done"]
    assert first == left != again == last


def test_nothing_found_is_no_error_of_the_library(place: adapting.Place) -> None:
    assert found(place, "nobody") == []


def test_the_command_prints_it_and_ends_with_1_when_nothing_carries_the_id(database_url: str, tmp_path: Path) -> None:
    project, engine = project_at(tmp_path, database_url, "dual_write")
    with engine.begin() as connection:
        ledger.post(connection, project.settings, "credit", 1, 5, correlation_id="request-1", idempotency_key="key-1")
    said = project.run("trace", "request-1")
    assert said.exit_code == 0
    assert "credit" not in said.stderr
    assert "test, 5.00 EUR from external to users/1 (cash)" in said.stdout
    assert [one["where"] for one in project.run("trace", "key-1", "--json").document["rows"]] == ["ledger", "key"]
    assert shown(project, "request-1") == shown(project, "key-1") != []
    missing = project.run("trace", "nobody", "--since", "7d")
    assert (missing.exit_code, missing.stdout) == (1, "")
    assert "--since all" in missing.stderr
    assert project.run("trace", "request-1", "--since", "soon").exit_code == 2


def test_the_command_says_where_a_part_of_the_way_may_be_older_than_it_looked(
    database_url: str, tmp_path: Path
) -> None:
    project, engine = project_at(tmp_path, database_url, "dual_write")
    act = (
        "insert into wallet.audit_log (action, actor, reason, correlation_id) values ('adjust', 'a', 'b', 'request-1')"
    )
    ledger.execute(engine, act)
    said = project.run("trace", "request-1")
    assert (said.exit_code, "adjust" in said.stdout, "--since all" in said.stderr) == (0, True, True)
    assert "--since all" not in project.run("trace", "request-1", "--since", "all").stderr


def shown(project: Project, identifier: str) -> list[str]:
    """What the command prints, without the times."""
    said = project.run("trace", identifier)
    assert (said.exit_code, said.stderr) == (0, "")
    return [line.split("  ", 1)[1] for line in said.stdout.splitlines()]


def test_the_command_prints_the_whole_way_of_a_booking_and_of_an_adjustment(database_url: str, tmp_path: Path) -> None:
    project, engine = project_at(tmp_path, database_url, "dual_write")
    place = adapting.placed(engine, project.settings)
    booked(place, 1, "request-1", "key-1")
    booking = place.last_id()
    assert shown(project, "request-1") == [
        f"ledger   transaction {booking}: posting booking, 12.50 EUR from users/1 (cash) to external",
        f"key      idempotency key key-1: mode dual_write, transaction {booking}",
    ]
    made = project.change("adjust", "--account", "1", "--amount", "5", "--json").document
    assert shown(project, made["correlation_id"]) == [
        f"ledger   transaction {made['transaction_id']}: correction adjust, 5.00 EUR from correction to users/1 (cash)",
        "audit    adjust by tests: a test",
    ]
