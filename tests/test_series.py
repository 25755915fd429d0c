"""Ten thousand users add no series: neither to what a process counts, nor to what the exporter serves."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from prometheus_client import generate_latest
from prometheus_client.metrics_core import Metric

import adapting
from ledger import rows, unguarded
from scrapes import Series, everything
from walletmigrate import Movement
from walletmigrate.errors import InsufficientFunds
from walletmigrate.exporter import DatabaseFacts

USERS = 10_000
AT_ONCE = 1000


@pytest.fixture
def place(database_url: str) -> adapting.Place:
    """Users whose tenants and roles are as many as they."""
    made = adapting.place(database_url, rows=1, flags=adapting.READ, phase="read_ledger", floor=0)
    with made.engine.begin() as connection:
        connection.exec_driver_sql(
            "insert into users (id, tenant, role, total_coins) "
            f"select g, 'tenant ' || g, 'role ' || g, g from generate_series(2, {USERS + 1}) as g"
        )
    return made


def process(place: adapting.Place) -> dict[Series, float]:
    """What the application's process serves, every bucket included."""
    return everything(generate_latest(place.registry).decode())


def exporter(place: adapting.Place) -> dict[Series, float]:
    families: Iterable[Metric] = DatabaseFacts(place.engine, "wallet", {("users", "EUR")}).collect()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def test_ten_thousand_users_who_pay_and_look_add_no_series(place: adapting.Place) -> None:
    before = process(place), exporter(place)
    for first in range(2, USERS + 2, AT_ONCE):
        some = range(first, first + AT_ONCE)
        with place.engine.begin() as connection:
            place.adapter.apply(connection, [Movement.credit(key, key, type="booking") for key in some])
            found = place.adapter.balances(connection, list(some))
        assert {key: balance.amount for key, balance in found.items()} == {key: 2 * key for key in some}
    one_by_one(place)
    after = process(place), exporter(place)
    assert [each.keys() for each in after] == [each.keys() for each in before]
    assert len({event.key for event in place.heard.posted}) == USERS
    assert place.metric("dual_write_total", operation="credit", outcome="ok") == USERS + 1
    assert place.metric("read_total", source="ledger") == USERS + 99
    assert after[1]["walletmigrate_accounts", (("state", "mirrored"),)] == USERS - 1


def one_by_one(place: adapting.Place) -> None:
    """What else may happen to some of them: a debit, a refusal, a read, and one that differs."""
    for key in range(2, 101):
        with place.engine.begin() as connection:
            place.adapter.debit(connection, key, 1, type="booking")
            place.adapter.balance(connection, key)
            with pytest.raises(InsufficientFunds):
                place.adapter.debit(connection, key, 10 * key, type="booking")
    with unguarded(place.engine, "public.users") as connection:
        connection.exec_driver_sql("update users set total_coins = 7 where id = 101")
    with place.engine.begin() as connection:
        place.adapter.balance(connection, 101)
        place.adapter.credit(connection, 101, 1, type="booking")
    assert rows(place.engine, "select key from wallet.accounts where state = 'stale'") == [("101",)]
