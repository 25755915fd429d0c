"""The exporter as a service: looks, outages, scrapes over HTTP, and what it asks the flags."""

from __future__ import annotations

import json
import logging
import math
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from sqlalchemy import Engine, event
from sqlalchemy.pool import NullPool

import capturing
from exporting import (
    EXPORTED,
    POSTINGS,
    SCHEMA,
    SCOPE,
    Clock,
    Execute,
    engine_of,
    executing,
    facts,
    install,
    of,
    samples,
    scrape,
    settings,
)
from flag_documents import document, segment, state, tenant
from ledger import ACT, install_users, post
from monitoring import free_port
from scrapes import assert_well_formed
from walletmigrate import bypasses, connect
from walletmigrate.config import CaptureSettings, ExporterSettings
from walletmigrate.errors import ConfigError, UsageError
from walletmigrate.exporter import CONNECT_SECONDS, HOLD_SECONDS, DatabaseFacts, serve
from walletmigrate.facts import TREATMENTS
from walletmigrate.flag_impact import rollout
from walletmigrate.flag_sources import FileSource
from walletmigrate.observe import FLAGS, PrometheusObserver


@pytest.fixture
def ledger(database_url: str) -> str:
    """The URL of a database with a ledger that has seen nothing yet."""
    install(database_url)
    return database_url


@pytest.fixture
def execute(database_url: str) -> Iterator[Execute]:
    with executing(database_url) as made:
        yield made


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    made = engine_of(database_url)
    yield made
    made.dispose()


@pytest.mark.parametrize("schema", ["Wallet", "wallet 2", 'a"b'])
def test_the_schemas_name_is_quoted(database_url: str, engine: Engine, schema: str) -> None:
    install(database_url, schema)
    assert of(facts(engine, schema), "phase")["legacy"] == 1


def test_a_look_is_one_read_only_transaction(
    ledger: str, engine: Engine, execute: Execute, caplog: pytest.LogCaptureFixture
) -> None:
    execute("alter table control rename to control_rows")
    execute(
        "create function intrude() returns text language sql volatile"
        " as 'insert into wallet.control_rows (phase) values (''frozen'') returning phase'"
    )
    execute("create view control as select intrude() as phase")
    assert samples(DatabaseFacts(engine, SCHEMA)) == {("walletmigrate_exporter_up", ""): 0}
    assert "ReadOnlySqlTransaction (25006)" in caplog.text


def test_a_storm_of_scrapes_costs_one_look_until_the_time_is_up(ledger: str, engine: Engine, execute: Execute) -> None:
    looks: list[object] = []
    event.listen(engine, "begin", looks.append)
    clock = Clock()
    collector = DatabaseFacts(engine, SCHEMA, SCOPE, ttl=10, clock=clock)
    phases: list[float] = []
    threads = [
        threading.Thread(target=lambda: phases.append(of(samples(collector), "phase")["legacy"])) for _ in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (phases, len(looks)) == ([1.0] * 16, 1)
    execute("update control set phase = 'frozen'")
    clock.now += 9.9
    assert of(samples(collector), "phase")["legacy"] == 1
    clock.now += 0.1
    assert of(samples(collector), "phase")["frozen"] == 1
    assert len(looks) == 2


def test_registering_does_not_touch_the_database(ledger: str, engine: Engine) -> None:
    looks: list[object] = []
    event.listen(engine, "begin", looks.append)
    CollectorRegistry().register(DatabaseFacts(engine, SCHEMA))
    assert looks == []


def test_without_a_ledger_only_the_exporters_own_state_is_served_and_it_recovers(
    database_url: str, engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    collector = DatabaseFacts(engine, SCHEMA, SCOPE, clock=clock)
    for _ in range(3):
        assert samples(collector) == {("walletmigrate_exporter_up", ""): 0}
        clock.now += 60
    assert [record.levelno for record in caplog.records] == [logging.WARNING], "once per outage"
    install(database_url)
    seen = samples(collector)
    assert of(seen, "exporter_up") == {"": 1}
    assert {name for name, _ in seen} == EXPORTED


def test_a_database_that_is_down_is_told_without_an_error_and_without_its_password(
    caplog: pytest.LogCaptureFixture,
) -> None:
    url = f"postgresql://someone:s3cret@127.0.0.1:{free_port()}/bank"
    exporter = serve(settings(url), 0)
    try:
        seen = scrape(exporter.port)
    finally:
        exporter.close()
    assert seen == {("walletmigrate_exporter_up", ""): 0}
    assert "OperationalError" in caplog.text
    assert "s3cret" not in caplog.text


def test_serve_answers_a_scrape_over_http_and_close_frees_the_port(ledger: str, execute: Execute) -> None:
    execute(POSTINGS)
    exporter = serve(settings(ledger), 0)
    try:
        seen = scrape(exporter.port)
        with pytest.raises(UsageError, match=f"127.0.0.1:{exporter.port}"):
            serve(settings(ledger), exporter.port)
    finally:
        exporter.close()
    exporter.wait()
    assert {name for name, _ in seen} == EXPORTED
    assert of(seen, "accounts")["mirrored"] == 2
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", exporter.port), timeout=5)


def test_without_a_database_url_serve_says_how_to_set_one() -> None:
    with pytest.raises(ConfigError, match="WALLETMIGRATE_DATABASE_URL"):
        serve(settings(None), 0)


def test_the_exporters_connection_is_named_and_limited(ledger: str) -> None:
    made: list[dict[str, Any]] = []

    def note(_dialect: object, _record: object, _arguments: object, parameters: dict[str, Any]) -> None:
        made.append(parameters)

    event.listen(Engine, "do_connect", note)
    exporter = serve(settings(ledger), 0)
    try:
        scrape(exporter.port)
    finally:
        exporter.close()
        event.remove(Engine, "do_connect", note)
    assert [(one["application_name"], one["connect_timeout"]) for one in made] == [("walletmigrate exporter", 3)]


@pytest.mark.parametrize(("seconds", "up"), [(0.3, 0), (0.0001, 0), (30, 1)])
def test_a_look_may_take_as_long_as_is_configured(
    ledger: str, execute: Execute, caplog: pytest.LogCaptureFixture, seconds: float, up: int
) -> None:
    execute("alter table control rename to control_rows")
    execute("create view control as select phase from control_rows where pg_sleep(1) is not null")
    exporter = serve(settings(ledger, ExporterSettings(look_seconds=seconds)), 0)
    try:
        assert of(scrape(exporter.port), "exporter_up") == {"": up}
    finally:
        exporter.close()
    assert ("QueryCanceled (57014)" in caplog.text) is not bool(up), "as the runbook has it"


@pytest.mark.parametrize(("seconds", "served"), [(3600, "legacy"), (0.001, "frozen")])
def test_a_look_is_served_for_as_long_as_is_configured(
    ledger: str, execute: Execute, seconds: float, served: str
) -> None:
    exporter = serve(settings(ledger, ExporterSettings(hold_seconds=seconds)), 0)
    try:
        assert of(scrape(exporter.port), "phase")["legacy"] == 1
        execute("update control set phase = 'frozen'")
        time.sleep(0.01)
        assert of(scrape(exporter.port), "phase")[served] == 1
    finally:
        exporter.close()


def test_without_a_setting_a_look_takes_and_lasts_as_it_did() -> None:
    limits = ExporterSettings()
    assert (limits.look_seconds, limits.hold_seconds) == (6, HOLD_SECONDS)
    assert limits.look_seconds + CONNECT_SECONDS < 10, "Prometheus' usual scrape timeout"


def test_writes_past_the_adapter_are_counted_by_treatment_and_never_fall(database_url: str) -> None:
    place = capturing.Place(database_url)
    place.write("update users set total_coins = total_coins + 1 where id = 3")
    place.write(capturing.ADD)
    place.mode("reject")
    place.write("update users set total_coins = total_coins + 1 where id = 4")
    place.mode("stale")
    counted = of(facts(place.engine), "bypass_writes_total")
    assert counted == dict.fromkeys(TREATMENTS, 0) | {"absent": 2, "turned_stale": 1}
    with place.engine.begin() as connection:
        post(connection, place.settings, "credit", 5, 1)
    place.mode("reject")
    assert place.write("update users set total_coins = total_coins + 1 where id = 5") == capturing.REJECTED
    place.mode("stale")
    settings_now = place.settings.model_copy(update={"capture": CaptureSettings(retention=timedelta(0))})
    assert bypasses.prune(place.engine, settings_now, ACT) == 3
    place.write("update users set total_coins = total_coins + 1 where id = 3")
    assert of(facts(place.engine), "bypass_writes_total") == counted | {"absent": 3, "rejected": 1}


def test_the_rollout_ratio_is_the_share_of_accounts_for_which_a_flag_is_on(database_url: str, tmp_path: Path) -> None:
    _, settings = install_users(database_url, rows=10)
    acme = tenant(1, "acme", "wallet.dualWrite")
    (tmp_path / "flags.json").write_text(json.dumps(document("wallet.enableWithdrawals", segments=[acme])))
    source = FileSource(tmp_path / "flags.json")
    engine = connect.engine(database_url, application_name="walletmigrate-test", poolclass=NullPool)
    with engine.begin() as connection:
        connection.exec_driver_sql("analyze users")
    exporter = DatabaseFacts(engine, SCHEMA, SCOPE, rollout=lambda c: rollout(c, settings, source.snapshot()))
    seen = of(samples(exporter), "flag_rollout_ratio")
    assert seen == {"wallet.dualWrite": 0.5, "wallet.readFromLedger": 0, "wallet.enableWithdrawals": 1}


def test_without_a_flag_document_every_flag_is_off_and_its_share_is_0(database_url: str, tmp_path: Path) -> None:
    engine, settings = install_users(database_url, rows=10)
    source = FileSource(tmp_path / "none.json")
    exporter = DatabaseFacts(engine, SCHEMA, SCOPE, rollout=lambda c: rollout(c, settings, source.snapshot()))
    assert of(samples(exporter), "flag_rollout_ratio") == dict.fromkeys(FLAGS, 0)


def test_the_rollout_of_a_percentage_is_estimated_from_a_sample_of_a_large_table(
    database_url: str, tmp_path: Path
) -> None:
    _, settings = install_users(database_url, rows=40_000)
    split = segment(1, "PERCENTAGE_SPLIT", "", "25", [state("wallet.dualWrite", enabled=True, priority=0)])
    (tmp_path / "flags.json").write_text(json.dumps(document(segments=[split])))
    source = FileSource(tmp_path / "flags.json")
    engine = connect.engine(database_url, application_name="walletmigrate-test", poolclass=NullPool)
    with engine.begin() as connection:
        connection.exec_driver_sql("analyze users")
    sampled: list[str] = []
    event.listen(engine, "after_cursor_execute", lambda *given: sampled.append(given[2]))
    with engine.connect() as connection:
        ratio = rollout(connection, settings, source.snapshot())["wallet.dualWrite"]
    assert sum("tablesample" in query for query in sampled) == 1
    # About 10,000 accounts decide: five standard deviations of that estimate.
    assert ratio == pytest.approx(0.25, abs=5 * math.sqrt(0.25 * 0.75 / 8_000))


def test_a_rollout_that_cannot_be_counted_is_unknown_until_it_can_and_costs_no_other_fact(
    ledger: str, engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    answers: list[dict[str, float] | None] = [None, {"wallet.dualWrite": 0.5}, None]

    def asked(_: object) -> dict[str, float]:
        if (answer := answers.pop(0)) is None:
            raise UsageError("no such trait")
        return answer

    clock = Clock()
    collector = DatabaseFacts(engine, SCHEMA, SCOPE, rollout=asked, clock=clock)
    seen = samples(collector)
    assert {name for name, _ in seen} == EXPORTED
    ratios = of(seen, "flag_rollout_ratio")
    assert (set(ratios), all(map(math.isnan, ratios.values()))) == (set(FLAGS), True), "a 0 would say: nobody has it"
    assert "cannot count for whom the flags are on" in caplog.text
    clock.now += 60
    assert of(samples(collector), "flag_rollout_ratio") == dict.fromkeys(FLAGS, 0) | {"wallet.dualWrite": 0.5}
    clock.now += 60
    assert all(map(math.isnan, of(samples(collector), "flag_rollout_ratio").values())), "what it was may be no more"


def test_promtool_finds_nothing_wrong_with_a_scrape(ledger: str) -> None:
    exporter = serve(settings(ledger), 0, rollout=lambda _: {"wallet.dualWrite": 0.5})
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{exporter.port}/metrics", timeout=30) as answer:
            page = answer.read()
    finally:
        exporter.close()
    registry = CollectorRegistry()
    PrometheusObserver(registry)
    for scraped in (page, generate_latest(registry)):
        assert_well_formed(scraped)
