"""Heartbeats: which processes live, and by which flag document each decides."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from sqlalchemy import Engine
from sqlalchemy.exc import OperationalError
from sqlalchemy.pool import NullPool

import ledger
import skips
from flag_documents import document
from walletmigrate import Settings, StaticSource, connect
from walletmigrate.errors import ConfigError
from walletmigrate.facts import read_facts
from walletmigrate.flag_sources import FileSource
from walletmigrate.heartbeat import Heartbeat
from walletmigrate.observe import Event, PrometheusObserver


def until(holds: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 30
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


@pytest.fixture
def place(database_url: str) -> tuple[Engine, Settings]:
    return ledger.install_users(database_url, rows=1)


def documents(engine: Engine) -> int:
    with engine.connect() as connection:
        return read_facts(connection, "wallet").documents


def processes(engine: Engine) -> list[tuple[object, ...]]:
    return ledger.rows(engine, "select name, pid, document_id from wallet.processes order by started_at")


def test_a_beat_says_who_lives_and_by_which_document(place: tuple[Engine, Settings]) -> None:
    engine, settings = place
    source = StaticSource({"wallet.dualWrite": True})
    beating = Heartbeat(settings, source, name="shop")
    beating.beat()
    beating.beat()
    assert processes(engine) == [("shop", os.getpid(), source.snapshot().document_id)]


def test_processes_that_decide_by_different_documents_are_counted_until_they_are_gone(
    place: tuple[Engine, Settings], tmp_path: Path
) -> None:
    engine, settings = place
    assert documents(engine) == 0
    on, off = (tmp_path / f"{name}.json" for name in ("on", "off"))
    on.write_text(json.dumps(document("wallet.dualWrite")), encoding="utf-8")
    off.write_text(json.dumps(document()), encoding="utf-8")
    for file in (on, off, on):
        Heartbeat(settings, FileSource(file)).beat()
    assert documents(engine) == 2
    gone = "update wallet.processes set seen_at = seen_at - interval '61 s' where document_id = :id"
    ledger.execute(engine, gone, id=FileSource(off).snapshot().document_id)
    assert documents(engine) == 1


def test_a_process_that_is_long_gone_is_forgotten(place: tuple[Engine, Settings]) -> None:
    engine, settings = place
    Heartbeat(settings, StaticSource({}), name="old").beat()
    ledger.execute(engine, "update wallet.processes set seen_at = seen_at - interval '61 minutes'")
    Heartbeat(settings, StaticSource({}), name="new").beat()
    assert [name for name, *_ in processes(engine)] == ["new"]


def test_it_beats_by_itself_and_tells_of_a_new_document(place: tuple[Engine, Settings], tmp_path: Path) -> None:
    engine, settings = place
    file = tmp_path / "environment.json"
    file.write_text(json.dumps(document()), encoding="utf-8")
    source = FileSource(file, check_seconds=0)
    beating = Heartbeat(settings, source, seconds=0.02).start()
    try:
        assert until(lambda: len(processes(engine)) == 1)
        before = processes(engine)
        file.write_text(json.dumps(document("wallet.dualWrite")), encoding="utf-8")
        assert until(lambda: processes(engine) != before)
    finally:
        beating.close()
    ledger.execute(engine, "delete from wallet.processes")
    assert beating.start() is beating
    assert processes(engine) == []


def test_each_beat_tells_the_observers_how_old_the_flags_are_though_nothing_calls_and_the_database_is_away(
    place: tuple[Engine, Settings], tmp_path: Path
) -> None:
    engine, settings = place
    file, now, registry = tmp_path / "environment.json", 0.0, CollectorRegistry()
    file.write_text(json.dumps(document()), encoding="utf-8")
    source = FileSource(file, clock=lambda: now)

    def fails(_: Event) -> None:
        raise RuntimeError("an observer is broken")

    def age() -> float | None:
        return registry.get_sample_value("walletmigrate_flag_age_seconds", {"flag": "wallet.dualWrite"})

    beating = Heartbeat(settings, source, observers=(fails, PrometheusObserver(registry)))
    beating.beat()
    assert age() == 0
    file.write_text("broken", encoding="utf-8")
    now = 400.0
    away = engine.url.set(database="nowhere")
    beating._engine = connect.engine(away, application_name="walletmigrate-test", poolclass=NullPool)
    with pytest.raises(OperationalError):
        beating.beat()
    assert age() == 400
    file.write_text(json.dumps(document()), encoding="utf-8")
    now = 402.0
    beating._beat_somehow()
    assert age() == 0


@skips.unless(hasattr(os, "fork"), "fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning")
def test_a_forked_worker_beats_as_a_process_of_its_own(place: tuple[Engine, Settings]) -> None:
    engine, settings = place
    beating = Heartbeat(settings, StaticSource({}), seconds=0.02).start()
    assert until(lambda: len(processes(engine)) == 1)
    wake, woken = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(woken)
        os.read(wake, 1)
        os._exit(0)
    os.close(wake)
    try:
        assert until(lambda: len(processes(engine)) == 2)
        assert {pid for _, pid, _ in processes(engine)} == {os.getpid(), child}
    finally:
        os.close(woken)
        os.waitpid(child, 0)
        beating.close()


def test_a_database_that_is_down_is_told_once_and_without_its_password(
    place: tuple[Engine, Settings], caplog: pytest.LogCaptureFixture
) -> None:
    engine, settings = place
    name = engine.url.database
    beating = Heartbeat(settings, StaticSource({}), seconds=0.01)
    admin = connect.engine(
        engine.url.set(database="postgres"), application_name="walletmigrate-test", isolation_level="AUTOCOMMIT"
    )
    with caplog.at_level(logging.WARNING, "walletmigrate"), admin.connect() as connection:
        connection.exec_driver_sql(f'alter database "{name}" allow_connections false')
        try:
            beating.start()
            assert until(lambda: bool(caplog.records))
            with pytest.raises(OperationalError):
                beating.beat()
            beating._beat_somehow()
            assert len(caplog.records) == 1
        finally:
            connection.exec_driver_sql(f'alter database "{name}" allow_connections true')
    assert until(lambda: len(processes(engine)) == 1)
    beating.close()
    admin.dispose()
    said = caplog.records[0].getMessage()
    assert said.startswith("no heartbeat: ")
    assert engine.url.password is None or engine.url.password not in said


def test_the_applications_role_may_beat(place: tuple[Engine, Settings]) -> None:
    engine, settings = place
    beating = Heartbeat(settings, StaticSource({}))
    beating._engine = ledger.engine_named(engine.url.render_as_string(hide_password=False), role="wallet_app")
    beating.beat()
    assert len(processes(engine)) == 1


def test_without_a_database_url_it_says_how_to_set_one() -> None:
    with pytest.raises(ConfigError, match="WALLETMIGRATE_DATABASE_URL"):
        Heartbeat(Settings(), StaticSource({}))
