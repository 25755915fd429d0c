"""The whole way of one mutation, by its correlation id."""

from __future__ import annotations

from datetime import timedelta
from decimal import Decimal
from pathlib import Path

import pytest
import structlog

import adapting
import ledger
from commandline import project_at
from walletmigrate.trace import Trace, trace


@pytest.fixture
def place(database_url: str) -> adapting.Place:
    return adapting.place(database_url)


def found(place: adapting.Place, identifier: str, since: timedelta | None = timedelta(days=1)) -> list[Trace]:
    with place.engine.connect() as connection:
        return list(trace(connection, place.settings, identifier, since=since))


def booked(place: adapting.Place, key: int, request: str, idempotency_key: str) -> None:
    with structlog.contextvars.bound_contextvars(correlation_id=request), place.engine.begin() as connection:
        place.adapter.debit(connection, key, Decimal("12.50"), type="booking", idempotency_key=idempotency_key)


def test_a_posting_is_traced_from_its_key_to_its_transactions(place: adapting.Place) -> None:
    booked(place, 1, "request-1", "key-1")
    booked(place, 2, "request-2", "key-2")
    said = [(one.where, one.what) for one in found(place, "request-1")]
    posted = place.last_id() - 2
    assert (
        said
        == [
            ("ledger", f"transaction {posted - 1}: opening opening, 100.00 EUR from opening to users/1 (cash)"),
            ("ledger", f"transaction {posted}: posting booking, 12.50 EUR from users/1 (cash) to external"),
            ("key", f"idempotency key key-1: mode dual_write, transaction {posted}"),
        ]
        or said
    )


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
    missing = project.run("trace", "nobody", "--since", "7d")
    assert (missing.exit_code, missing.stdout) == (1, "")
    assert "--since all" in missing.stderr
    assert project.run("trace", "request-1", "--since", "soon").exit_code == 2
