"""The last good document: what a process that starts in an outage goes by, and what is kept for it."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from flag_documents import body, document
from flag_serving import (
    ON,
    PATIENCE,
    WRITING,
    Clock,
    FlagServer,
    Make,
    closed_address,
    flag_server,
    making,
    problem,
    wanted,
)
from walletmigrate.errors import FlagSourceUnreachable
from walletmigrate.flag_sources import check
from walletmigrate.flags import ALL_FLAGS, DUAL_WRITE, NO_DOCUMENT, OFF, Json


@pytest.fixture
def flagsmith() -> Iterator[FlagServer]:
    with flag_server() as found:
        yield found


@pytest.fixture
def make() -> Iterator[Make]:
    with making() as build:
        yield build


@pytest.fixture
def closed_port() -> str:
    return closed_address()


def test_during_an_outage_a_new_process_takes_the_last_good_document_it_is_given(closed_port: str, make: Make) -> None:
    asked: list[int] = []

    def fallback() -> Json:
        asked.append(1)
        return document(*ALL_FLAGS)

    clock = Clock()
    source = make(closed_port, fallback=fallback, clock=clock)
    clock.now += 10
    assert source.wait(PATIENCE)
    assert wanted(source) == ON
    clock.now += 30
    # Nobody confirmed the document in the life of this process, so it is at least as old as that.
    assert source.refresh().age_seconds() == 40
    assert len(asked) == 1
    assert problem(source)
    with pytest.raises(FlagSourceUnreachable):
        check(source)


def test_a_document_that_came_from_the_fallback_is_not_remembered_again(flagsmith: FlagServer, make: Make) -> None:
    kept: list[Json] = []
    source = make(flagsmith.url, fallback=document, remember=kept.append)
    assert not source.refresh().decide("42", {}).dual_write
    assert kept == []
    flagsmith.answer = body(document(DUAL_WRITE))
    source.refresh()
    assert kept == [document(DUAL_WRITE)]


def test_the_server_wins_over_the_document_that_was_kept(flagsmith: FlagServer, make: Make) -> None:
    flagsmith.answer = body(document(DUAL_WRITE))
    source = make(flagsmith.url, fallback=lambda: document(*ALL_FLAGS))
    assert source.refresh().decide("42", {}) == WRITING


def test_a_fallback_is_asked_in_the_thread_and_makes_nobody_wait(closed_port: str, make: Make) -> None:
    asked, go = threading.Event(), threading.Event()

    def slow() -> Json:
        asked.set()
        go.wait(PATIENCE)
        return document(*ALL_FLAGS)

    source = make(closed_port, fallback=slow)
    assert wanted(source) == OFF
    assert asked.wait(PATIENCE)
    assert wanted(source) == OFF
    go.set()
    assert source.wait(PATIENCE)
    assert wanted(source) == ON


@pytest.mark.parametrize(
    "kept",
    [None, {}, document(names=ALL_FLAGS[:1]), {"set": {1}}],
    ids=["none", "hollow", "incomplete", "no json"],
)
def test_without_a_good_document_anywhere_everything_is_off(closed_port: str, make: Make, kept: Json | None) -> None:
    source = make(closed_port, fallback=lambda: kept)
    assert source.refresh().decide("42", {}) == OFF
    assert source.snapshot().document_id == NO_DOCUMENT


def test_a_fallback_that_raises_is_told_and_asked_again(closed_port: str, make: Make) -> None:
    answers: Iterator[Json | RuntimeError] = iter([RuntimeError("password=hush"), document(*ALL_FLAGS)])

    def flaky() -> Json:
        answer = next(answers)
        if isinstance(answer, RuntimeError):
            raise answer
        return answer

    source = make(closed_port, fallback=flaky)
    source.close()  # no thread of its own: each refresh asks once
    assert source.refresh().decide("42", {}) == OFF
    assert "cannot be fetched (RuntimeError)" in problem(source)
    assert "hush" not in problem(source)
    assert source.refresh().decide("42", {}) == ON
    assert "cannot be fetched" not in problem(source)


def test_each_new_good_document_is_given_to_be_remembered_once(flagsmith: FlagServer, make: Make) -> None:
    kept: list[Json] = []
    source = make(flagsmith.url, remember=kept.append)
    documents = [document(), document(), document(DUAL_WRITE), document(DUAL_WRITE), document()]
    for content in documents:
        flagsmith.answer = body(content)
        source.refresh()
    flagsmith.answer = b"garbage"
    source.refresh()
    assert kept == [document(), document(DUAL_WRITE), document()]


def test_a_document_that_could_not_be_remembered_is_offered_again(flagsmith: FlagServer, make: Make) -> None:
    kept: list[Json] = []

    def flaky(content: Json) -> None:
        kept.append(content)
        if len(kept) == 1:
            raise OSError("no such database")

    source = make(flagsmith.url, remember=flaky)
    flagsmith.answer = body(document(*ALL_FLAGS))
    assert source.refresh().decide("42", {}) == ON
    assert "cannot be stored (OSError)" in problem(source)
    source.refresh()
    assert not problem(source)
    source.refresh()
    assert len(kept) == 2
