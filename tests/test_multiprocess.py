"""The metrics of the example shop under gunicorn with two workers: all of them, added up as they must be."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import signal
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import ledger
from commandline import Project
from monitoring import until
from scrapes import Series, assert_well_formed, everything, process_series, scraped
from shopping import SHOP, WORKERS, Shop, make_tables, serving
from walletmigrate import observe
from walletmigrate.observe import FlagsSeen, LostUpdate, Mismatch, Posted, Read, Unrouted

APPS = Path(__file__).parent / "apps"
POSTED = Posted("debit", "ledger", "ok", 0.25, "users", "cash", "EUR", None, None, committed=True)
PLACE = ("users", "cash", "EUR")
TIMING = (("mode", "ledger"), ("operation", "debit"))
DURATION = "walletmigrate_dual_write_duration_seconds"


@pytest.fixture
def config(database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The configuration of the shop, in phase dual_write, to be served with `tests/apps/told.py` around it."""
    project = Project(tmp_path, database_url)
    make_tables(database_url)
    shutil.copy(SHOP / "walletmigrate.toml", project.config)
    for step in (("install",), ("phase", "advance"), ("flags", "set", "wallet.dualWrite", "on", "--everyone")):
        project.change(*step)
    monkeypatch.setenv("PYTHONPATH", str(APPS))
    return project.config


@pytest.fixture
def shop(database_url: str, tmp_path: Path, config: Path) -> Iterator[Shop]:
    """The running shop."""
    with serving("told", database_url, tmp_path, config) as served:
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


def pids(shop: Shop, told: str) -> list[int]:
    """Of the processes that logged this."""
    return [int(pid) for pid in re.findall(rf"\[(\d+)\] \[INFO\] {told}", shop.log.read_text(encoding="utf-8"))]


def kill_all(shop: Shop) -> None:
    """The master first, so that it does not see its workers die."""
    for process in (*pids(shop, "Starting gunicorn"), *pids(shop, "Booting worker")):
        with suppress(ProcessLookupError):  # a worker sees that its master is gone
            os.kill(process, signal.SIGKILL)


def test_what_the_workers_of_a_killed_server_left_does_not_count_for_the_next_one(
    database_url: str, tmp_path: Path, config: Path
) -> None:
    with serving("told", database_url, tmp_path, config) as killed:
        worker = tell(killed, (FlagsSeen(4000.0, "file", "d"), 1), (POSTED, 3))
        assert ages(scraped(page(killed))) == {4000}
        kill_all(killed)
    left = {file.name for file in (tmp_path / "metrics").glob("*.db")}
    assert f"gauge_livemax_{worker}.db" in left, "nobody marked it dead"
    with serving("told", database_url, tmp_path, config) as again:
        seen = scraped(page(again))
        assert seen.keys() == process_series()
        assert max(ages(seen)) < 4000
        assert seen[labelled("dual_write_total", operation="debit", outcome="ok")] == 0


def test_an_application_that_is_loaded_before_the_fork_has_every_series_from_the_first_scrape_on(
    database_url: str, tmp_path: Path, config: Path
) -> None:
    """Gunicorn loads it in the master then, before `on_starting`."""
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics" / "gauge_livemax_1.db").touch()
    with serving("told", database_url, tmp_path, config, "--preload") as shop:
        assert not (tmp_path / "metrics" / "gauge_livemax_1.db").exists()
        assert scraped(page(shop)).keys() == process_series()
        one = tell(shop, (FlagsSeen(900.0, "file", "d"), 1), (POSTED, 3))
        with held(one):
            assert tell(shop, (FlagsSeen(500.0, "file", "d"), 1), (POSTED, 4)) != one
        seen = everything(page(shop))
        assert (ages(seen), seen[labelled("dual_write_total", operation="debit", outcome="ok")]) == ({900}, 7)
        os.kill(one, signal.SIGKILL)
        until(lambda: ages(scraped(page(shop))) == {500}, lambda: page(shop))


def test_a_reload_keeps_what_was_counted(shop: Shop) -> None:
    tell(shop, (POSTED, 3))
    (master,) = pids(shop, "Starting gunicorn")
    os.kill(master, signal.SIGHUP)
    until(lambda: len(pids(shop, "Worker exiting")) == WORKERS, lambda: shop.log.read_text(encoding="utf-8"))
    assert scraped(page(shop))[labelled("dual_write_total", operation="debit", outcome="ok")] == 3


@pytest.mark.parametrize(("replaced", "left"), [(0, []), (17, ["gauge_livemax_18.db"])])
def test_a_server_that_replaces_a_running_one_keeps_the_files_of_its_workers(
    replaced: int, left: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after USR2; ``replaced`` is the old server's process, 0 where there is none."""
    (tmp_path / "gauge_livemax_18.db").touch()
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    runpy.run_path(str(SHOP / "gunicorn.conf.py"))["on_starting"](
        SimpleNamespace(master_pid=replaced, cfg=SimpleNamespace(preload_app=False))
    )
    assert [file.name for file in tmp_path.iterdir()] == left
