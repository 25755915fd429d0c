"""The metrics of the example shop under gunicorn with two workers: all of them, added up as they must be."""

from __future__ import annotations

import os
import shutil
import signal
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

import ledger
from commandline import Project
from monitoring import until
from scrapes import Series, assert_well_formed, everything, process_series, scraped
from shopping import SHOP, Shop, make_tables, serving
from walletmigrate import observe
from walletmigrate.observe import FlagsSeen, LostUpdate, Mismatch, Posted, Read, Unrouted

APPS = Path(__file__).parent / "apps"
POSTED = Posted("debit", "ledger", "ok", 0.25, "users", "cash", "EUR", None, None, committed=True)
PLACE = ("users", "cash", "EUR")
TIMING = (("mode", "ledger"), ("operation", "debit"))
DURATION = "walletmigrate_dual_write_duration_seconds"


@pytest.fixture
def shop(database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shop]:
    """The running shop, with `tests/apps/told.py` around it, in phase dual_write."""
    project = Project(tmp_path, database_url)
    make_tables(database_url)
    shutil.copy(SHOP / "walletmigrate.toml", project.config)
    for step in (("install",), ("phase", "advance"), ("flags", "set", "wallet.dualWrite", "on", "--everyone")):
        project.change(*step)
    monkeypatch.setenv("PYTHONPATH", str(APPS))
    with serving("told", database_url, tmp_path, project.config) as served:
        yield served


def page(shop: Shop) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{shop.port}/metrics", timeout=30) as answer:
        text: str = answer.read().decode()
    return text


def ages(counted: dict[Series, float]) -> set[float]:
    found = {value for (name, _), value in counted.items() if name == "walletmigrate_flag_age_seconds"}
    assert sum(name == "walletmigrate_flag_age_seconds" for name, _ in counted) == len(observe.FLAGS)
    return found


def tell(shop: Shop, *events: tuple[observe.Event, int]) -> int:
    """Tell each event so many times to the observers of one worker, and give its process id."""
    given: list[Any] = [[type(event).__name__, asdict(event), times] for event, times in events]
    return int(shop.ask("/tell", {"events": given}).body["worker"])


@contextmanager
def held(worker: int) -> Iterator[None]:
    """Hold a worker, so that the other one takes the next request."""
    os.kill(worker, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(worker, signal.SIGCONT)


def added(before: dict[Series, float], after: dict[Series, float]) -> dict[Series, float]:
    assert before.keys() == after.keys()
    return {series: value - before[series] for series, value in after.items() if value != before[series]}


def traffic(shop: Shop, url: str) -> None:
    """Two users join; one is adjusted, books twice, is refused once, and gets a refund; balances are read."""
    ann, bob = shop.join("acme"), shop.join("globex")
    assert shop.adjust(ann, "100").status == 200  # reads the balance too
    booked = shop.book(ann, "30")
    assert (booked.status, shop.book(ann, "20").status, shop.book(bob, "1").status) == (201, 201, 409)
    assert shop.refund(booked.body["booking"]).status == 200
    assert [shop.balance(user) for user in (ann, bob)] == [80, 0]
    with ledger.unguarded(ledger.engine_named(url), "public.users") as connection:
        connection.exec_driver_sql("update users set balance = 79 where id = %s", (ann,))
    assert shop.balance(ann) == 79
    assert shop.book(ann, "1").status == 201  # differs, so that shadow writes legacy alone
    assert shop.balance(ann) == 78


def labelled(name: str, **labels: str) -> Series:
    return f"walletmigrate_{name}", tuple(sorted(labels.items()))


def test_all_that_two_workers_count_is_in_one_scrape_from_the_first_on_and_merged_as_it_must_be(
    shop: Shop, database_url: str
) -> None:
    started = page(shop)
    assert_well_formed(started.encode())
    first = scraped(started)
    assert first.keys() == process_series()
    assert {name for (name, _), value in first.items() if value} <= {"walletmigrate_flag_age_seconds"}
    requests_are_added_up(shop, database_url)
    each_kind_is_merged_in_its_way(shop)


def requests_are_added_up(shop: Shop, url: str) -> None:
    """By whichever worker each was answered."""
    traffic(shop, url)
    used = page(shop)
    assert_well_formed(used.encode())
    counted = {series: value for series, value in scraped(used).items() if value}
    timed = {
        labelled("dual_write_duration_seconds_count", operation=operation, mode="dual_write"): count
        for operation, count in {"open_account": 2, "set_balance": 1, "debit": 3, "credit": 1}.items()
    }
    summed = {(name.replace("_count", "_sum"), labels) for name, labels in timed}
    assert {series for series, value in counted.items() if series[0].endswith("_sum") and value > 0} == summed
    assert {
        series: value
        for series, value in counted.items()
        if series not in summed and series[0] != "walletmigrate_flag_age_seconds"
    } == timed | {
        labelled("dual_write_total", operation="open_account", outcome="ok"): 2,
        labelled("dual_write_total", operation="set_balance", outcome="ok"): 1,
        labelled("dual_write_total", operation="debit", outcome="ok"): 3,
        labelled("dual_write_total", operation="debit", outcome="refused"): 1,
        labelled("dual_write_total", operation="credit", outcome="ok"): 1,
        labelled("read_total", source="legacy"): 5,
        labelled("read_compare_total", outcome="match"): 3,
        labelled("read_compare_total", outcome="mismatch"): 1,
        labelled("read_compare_total", outcome="stale"): 1,
        labelled("mismatch_total", where="read"): 1,
        labelled("mismatch_total", where="write"): 1,
    }


def each_kind_is_merged_in_its_way(shop: Shop) -> None:
    """Of what was told to one worker, to the other, and to one that then dies."""
    one = tell(shop, (FlagsSeen(9000.0, "file", "d"), 1))
    with held(one):
        other = tell(shop, (FlagsSeen(5000.0, "file", "d"), 1))
    assert one != other
    before = everything(page(shop))
    assert ages(before) == {9000}, "the worst of both, once, and neither their sum nor one for each process"

    slow = replace(POSTED, seconds=2.0)
    counted = (Mismatch("write", *PLACE), 2), (Read("fallback", "stale", 0.1, *PLACE), 1), (LostUpdate(*PLACE, "b"), 1)
    with held(other):
        assert tell(shop, (POSTED, 3), *counted) == one
    with held(one):
        assert tell(shop, (POSTED, 4), (slow, 1), *counted, (Unrouted("flush", "users", "b", "no key"), 5)) == other
    after = everything(page(shop))
    bounds: dict[str, float] = {"0.25": 7, "0.5": 7, "1.0": 7, "2.5": 8, "5.0": 8, "+Inf": 8}
    expected: dict[Series, float] = {
        **{(f"{DURATION}_bucket", (("le", bound), *TIMING)): count for bound, count in bounds.items()},
        (f"{DURATION}_count", TIMING): 8,
        (f"{DURATION}_sum", TIMING): 3.75,
        labelled("dual_write_total", operation="debit", outcome="ok"): 8,
        labelled("mismatch_total", where="write"): 4,
        labelled("read_total", source="fallback"): 2,
        labelled("read_compare_total", outcome="stale"): 2,
        labelled("watched_write_total", outcome="lost_update"): 2,
        labelled("watched_write_total", outcome="unrouted"): 5,
    }
    assert added(before, after) == expected

    os.kill(one, signal.SIGKILL)
    until(lambda: ages(scraped(page(shop))) == {5000}, lambda: page(shop))
    left = everything(page(shop))
    assert not {series for series in added(after, left) if series[0] != "walletmigrate_flag_age_seconds"}, (
        "what a worker counted outlives it"
    )
