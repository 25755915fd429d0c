"""Flags of a server during an outage: at start, later, and in forked workers, with the database as memory."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from pydantic import SecretStr
from sqlalchemy import Engine

import flagsmith_stub
import ledger
from flag_documents import document
from flag_serving import in_child
from flagsmith_stub import ENVIRONMENT_KEY, FlagsmithStub
from walletmigrate import sources
from walletmigrate.config import FlagSettings, Settings
from walletmigrate.errors import FlagSourceUnreachable
from walletmigrate.flag_server import FlagsmithSource
from walletmigrate.flag_sources import check
from walletmigrate.flags import DUAL_WRITE, NO_DOCUMENT, OFF, READ_FROM_LEDGER, Decision

PATIENCE = 20.0
WRITING = Decision(dual_write=True)
READING = Decision(dual_write=True, read_from_ledger=True)

forks = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
quiet = pytest.mark.usefixtures("short_start")


@pytest.fixture
def flagsmith() -> Iterator[FlagsmithStub]:
    with flagsmith_stub.running() as server:
        server.project.defaults[server.flag(DUAL_WRITE)] = True
        yield server


@pytest.fixture
def short_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that starts in vain does not wait for two seconds here."""
    monkeypatch.setattr(sources, "START_SECONDS", 0.2)


@pytest.fixture
def engine(database_url: str) -> Engine:
    """A database with the ledger installed."""
    return ledger.install_users(database_url)[0]


def settings(engine: Engine, api_url: str) -> Settings:
    flags = FlagSettings(source="flagsmith", api_url=api_url, poll_seconds=0.05)
    url = engine.url.render_as_string(hide_password=False)
    base = ledger.users_settings(url)
    return base.model_copy(update={"flags": flags, "flagsmith_key": SecretStr(ENVIRONMENT_KEY)})


def started(engine: Engine, api_url: str) -> FlagsmithSource:
    """What a process that starts has: the source of its configuration."""
    made = sources.source_of(settings(engine, api_url))
    assert isinstance(made, FlagsmithSource)
    return made


def wanted(source: FlagsmithSource) -> Decision:
    return source.snapshot().decide("42", {})


def until(true: Callable[[], bool]) -> bool:
    """Whether something comes true before the patience ends."""
    deadline = time.monotonic() + PATIENCE
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)  # the pause between two looks, not what makes the order
    return True


def stored(engine: Engine) -> dict[str, bool]:
    """The flags of the document that the database remembers."""
    found = ledger.scalar(engine, "select document from wallet.flag_documents")
    return {state["feature"]["name"]: state["enabled"] for state in found["feature_states"]} if found else {}


def down() -> str:
    """The address of a server that is not there."""
    with flagsmith_stub.running() as gone:
        return gone.api_url


def remember(engine: Engine, content: object) -> None:
    ledger.execute(
        engine,
        "insert into wallet.flag_documents (document) values (cast(:document as jsonb)) "
        "on conflict (singleton) do update set document = excluded.document",
        document=json.dumps(content),
    )


def test_a_document_of_the_server_is_remembered_in_the_database(flagsmith: FlagsmithStub, engine: Engine) -> None:
    source = started(engine, flagsmith.api_url)
    assert wanted(source) == WRITING
    assert until(lambda: stored(engine).get(DUAL_WRITE, False))
    flagsmith.project.defaults[flagsmith.flag(READ_FROM_LEDGER)] = True
    assert until(lambda: stored(engine)[READ_FROM_LEDGER])
    source.close()


@quiet
def test_a_process_that_starts_in_an_outage_takes_the_document_from_the_database(engine: Engine) -> None:
    remember(engine, document(DUAL_WRITE))
    source = started(engine, down())
    assert wanted(source) == WRITING
    assert until(lambda: "the connection failed" in (source.problem or ""))
    with pytest.raises(FlagSourceUnreachable):
        check(source)
    age = source.snapshot().age_seconds()
    assert until(lambda: source.snapshot().age_seconds() > age)
    source.close()


@quiet
@pytest.mark.parametrize(
    "kept", [None, {}, {"feature_states": "none"}, document("wallet.other", names=("wallet.other",))]
)
def test_a_process_that_starts_in_an_outage_without_a_good_document_has_everything_off(
    engine: Engine, kept: object
) -> None:
    if kept is not None:
        remember(engine, kept)
    source = started(engine, down())
    assert wanted(source) == OFF
    assert source.snapshot().document_id == NO_DOCUMENT
    source.close()


@quiet
def test_without_the_ledger_an_outage_at_start_means_off_and_nothing_fails(database_url: str) -> None:
    engine = ledger.engine_named(database_url)
    source = started(engine, down())
    assert wanted(source) == OFF
    assert until(lambda: "cannot be fetched" in (source.problem or ""))
    source.close()


@quiet
def test_a_process_that_started_in_an_outage_follows_the_server_once_it_is_back(
    flagsmith: FlagsmithStub, engine: Engine
) -> None:
    remember(engine, document())
    flagsmith.fail("GET", "environment-document", status=503)
    source = started(engine, flagsmith.api_url)
    assert wanted(source) == OFF
    flagsmith.faults.clear()
    assert until(lambda: wanted(source) == WRITING)
    assert until(lambda: source.problem is None)
    source.close()


@pytest.mark.parametrize("fault", [{"status": 500}, {"status": 403}, {"status": 200}, {}])
def test_an_outage_later_leaves_the_last_good_document_in_force_and_in_the_database(
    flagsmith: FlagsmithStub, engine: Engine, fault: dict[str, int]
) -> None:
    source = started(engine, flagsmith.api_url)
    assert until(lambda: bool(stored(engine)))
    flagsmith.fail("GET", "environment-document", **fault)
    assert until(lambda: source.problem is not None)
    assert wanted(source) == WRITING
    assert stored(engine)[DUAL_WRITE]
    source.close()


# Workers, forked from a parent that loaded the application


@forks
def test_workers_forked_from_a_parent_that_polls_poll_by_themselves(flagsmith: FlagsmithStub, engine: Engine) -> None:
    source = started(engine, flagsmith.api_url)
    assert until(lambda: bool(stored(engine)))
    asked, ask = os.pipe()

    def work() -> bool:
        had = wanted(source) == WRITING  # the parent's document, at once
        os.write(ask, b"!")
        return had and until(lambda: wanted(source) == READING)

    def switch_when_asked() -> None:
        for _ in range(2):
            os.read(asked, 1)
        flagsmith.project.defaults[flagsmith.flag(READ_FROM_LEDGER)] = True

    parent = threading.Thread(target=switch_when_asked, daemon=True)
    parent.start()
    with ThreadPoolExecutor(2) as waiting:  # two workers at a time
        assert list(waiting.map(lambda _: in_child(work), range(2))) == [True, True]
    parent.join(PATIENCE)
    os.close(asked)
    os.close(ask)
    source.close()


@forks
def test_a_worker_forked_in_an_outage_goes_on_with_the_parents_document(
    flagsmith: FlagsmithStub, engine: Engine
) -> None:
    source = started(engine, flagsmith.api_url)
    assert until(lambda: bool(stored(engine)))
    flagsmith.fail("GET", "environment-document", status=503)
    assert until(lambda: source.problem is not None)
    assert in_child(lambda: wanted(source) == WRITING and until(lambda: source.problem is not None))
    assert wanted(source) == WRITING
    source.close()


@forks
@quiet
def test_workers_that_start_their_own_source_in_an_outage_take_the_document_from_the_database(engine: Engine) -> None:
    remember(engine, document(DUAL_WRITE))
    url = down()
    workers = multiprocessing.get_context("fork")
    with workers.Pool(2) as pool:
        found = pool.map(_decide, [(engine.url.render_as_string(hide_password=False), url)] * 4)
    assert found == [WRITING] * 4


def _decide(where: tuple[str, str]) -> Decision:
    source = started(ledger.engine_named(where[0]), where[1])
    try:
        return wanted(source)
    finally:
        source.close()


def test_a_fork_finds_no_connection_of_the_memory_to_share(flagsmith: FlagsmithStub, engine: Engine) -> None:
    source = started(engine, flagsmith.api_url)
    assert until(lambda: bool(stored(engine)))
    kept = "select count(*) from pg_stat_activity where application_name = 'walletmigrate flags'"
    assert until(lambda: ledger.scalar(engine, kept) == 0)
    source.close()
