"""Flags from a server: one that is down, hangs or answers garbage, and the thread that polls it."""

from __future__ import annotations

import gc
import gzip
import threading
from collections.abc import Iterator

import pytest

import walletmigrate.flag_http
from flag_documents import UNREADABLE, body, document, named, segment, state, tenant
from flag_serving import (
    KEY,
    ON,
    PATIENCE,
    Clock,
    FlagServer,
    Make,
    closed_address,
    flag_server,
    forks,
    in_child,
    making,
    polling_threads,
    problem,
    together,
    turns,
    wanted,
)
from walletmigrate.errors import ConfigError, FlagDocumentInvalid, FlagsMissing, FlagSourceUnreachable
from walletmigrate.flag_server import FlagsmithSource
from walletmigrate.flag_sources import check
from walletmigrate.flags import ALL_FLAGS, DUAL_WRITE, NO_DOCUMENT, OFF, Decision, FlagNotice, Json


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


def test_a_poll_is_an_unconditional_get_with_the_key_in_its_header(flagsmith: FlagServer, make: Make) -> None:
    flagsmith.answer = body(document(*ALL_FLAGS))
    flagsmith.headers = {"ETag": '"1"', "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT"}
    source = make(flagsmith.url)
    source.refresh()
    assert source.refresh().decide("42", {}) == ON
    assert not problem(source)
    assert [path for path, _ in flagsmith.requests] == ["/api/v1/environment-document/"] * 2
    for _, headers in flagsmith.requests:
        assert headers["x-environment-key"] == KEY
        assert not {"if-none-match", "if-modified-since"} & set(headers)


def test_an_api_url_without_its_last_slash_is_meant_the_same(flagsmith: FlagServer, make: Make) -> None:
    source = make(flagsmith.url.rstrip("/"))
    source.refresh()
    assert not problem(source)


def test_a_compressed_answer_is_read(flagsmith: FlagServer, make: Make) -> None:
    flagsmith.answer = gzip.compress(body(document(*ALL_FLAGS)))
    flagsmith.headers = {"Content-Encoding": "gzip"}
    assert make(flagsmith.url).refresh().decide("42", {}) == ON


def test_nothing_starts_before_flags_are_asked_for(flagsmith: FlagServer, make: Make) -> None:
    before = polling_threads()
    source = make(flagsmith.url)
    assert polling_threads() == before
    assert flagsmith.requests == []
    assert source.wait(PATIENCE)
    assert len(polling_threads()) == len(before) + 1


def test_the_first_snapshots_of_many_threads_start_one_poll(flagsmith: FlagServer, make: Make) -> None:
    flagsmith.hang = threading.Event()
    source = make(flagsmith.url)
    before = len(polling_threads())
    together(16, lambda _: None if wanted(source) == OFF else pytest.fail("not off"))
    assert len(polling_threads()) == before + 1
    assert flagsmith.arrived.wait(PATIENCE)
    assert len(flagsmith.requests) == 1
    flagsmith.hang.set()


def test_a_server_that_hangs_at_the_start_makes_nobody_wait(flagsmith: FlagServer, make: Make) -> None:
    flagsmith.hang = threading.Event()
    flagsmith.answer = body(document(*ALL_FLAGS))
    source = make(flagsmith.url, timeout_seconds=PATIENCE)
    assert wanted(source) == OFF
    assert flagsmith.arrived.wait(PATIENCE)
    # The request is in the server's hands and stays there: what is answered now was answered without it.
    for _ in range(100):
        assert wanted(source) == OFF
    assert not source.wait(0)
    flagsmith.hang.set()
    assert source.wait(PATIENCE)
    assert wanted(source) == ON


def test_a_hanging_server_is_given_up_after_the_time_out(flagsmith: FlagServer, make: Make) -> None:
    flagsmith.hang = threading.Event()
    source = make(flagsmith.url, timeout_seconds=0.05)
    assert source.refresh().decide("42", {}) == OFF
    assert "no answer within 0.05 s" in problem(source)


def test_a_server_that_drips_its_answer_is_given_up_too(flagsmith: FlagServer, make: Make) -> None:
    flagsmith.drip = True
    source = make(flagsmith.url, timeout_seconds=0.3)  # each byte comes in time, all of them would take a minute
    source.refresh()
    assert "did not end in time" in problem(source)


def test_an_answer_that_is_too_long_is_given_up(
    flagsmith: FlagServer, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(walletmigrate.flag_http, "MAX_BYTES", 100)
    source = make(flagsmith.url)
    source.refresh()
    assert "longer than 100 bytes" in problem(source)


def test_a_server_that_is_down_at_the_start_means_off_until_it_is_up(closed_port: str, make: Make) -> None:
    source = make(closed_port)
    assert source.refresh().decide("42", {}) == OFF
    assert source.snapshot().document_id == NO_DOCUMENT
    assert problem(source)
    with pytest.raises(FlagSourceUnreachable) as caught:
        check(source)
    assert caught.value.exit_code == 5


def test_an_outage_leaves_the_last_good_document_in_force_and_its_age_grows(flagsmith: FlagServer, make: Make) -> None:
    notices: list[FlagNotice] = []
    clock = Clock()
    flagsmith.answer = body(document(*ALL_FLAGS))
    source = make(flagsmith.url, clock=clock, report=notices.append)
    source.refresh()
    flagsmith.status = 503
    for _ in range(3):
        clock.now += 10
        assert source.refresh().decide("42", {}) == ON
    assert source._current.age_seconds() == 30
    assert "503" in problem(source)
    assert len(notices) == 1
    flagsmith.status = 200
    assert source.refresh().age_seconds() == 0
    assert not problem(source)


@pytest.mark.parametrize("status", [401, 403])
def test_a_wrong_key_is_said_to_be_one(flagsmith: FlagServer, make: Make, status: int) -> None:
    flagsmith.status = status
    source = make(flagsmith.url)
    assert source.refresh().decide("42", {}) == OFF
    assert "refused the environment key" in problem(source)
    assert "ser." in problem(source)


def test_a_wrong_address_is_said_to_be_one(flagsmith: FlagServer, make: Make) -> None:
    source = make(flagsmith.url.replace("v1", "v2"))
    source.refresh()
    assert "api_url" in problem(source)


def test_the_key_is_not_carried_along_by_a_redirect(flagsmith: FlagServer, make: Make) -> None:
    with FlagServer() as other:
        thread = threading.Thread(target=other.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        flagsmith.status = 302
        flagsmith.headers = {"Location": other.url + "environment-document/"}
        source = make(flagsmith.url)
        source.refresh()
        other.shutdown()
        thread.join()
        assert len(flagsmith.requests) == 1
        assert other.requests == []
    assert "redirects (302)" in problem(source)


@pytest.mark.parametrize(
    "garbage",
    [b"", b"<html>", b"null", b"{}", body(document())[:-9], body(document(names=ALL_FLAGS[1:]))],
    ids=["empty", "html", "null", "hollow", "cut", "flag missing"],
)
def test_garbage_from_the_server_leaves_the_last_good_document_in_force(
    flagsmith: FlagServer, make: Make, garbage: bytes
) -> None:
    flagsmith.answer = body(document(*ALL_FLAGS))
    source = make(flagsmith.url)
    good = source.refresh()
    flagsmith.answer = garbage
    assert source.refresh().document_id == good.document_id
    assert wanted(source) == ON
    assert problem(source)
    with pytest.raises((FlagDocumentInvalid, FlagsMissing)):
        check(source)


@pytest.mark.parametrize(("operator", "value"), UNREADABLE, ids=named)
def test_a_document_that_the_engine_cannot_evaluate_leaves_the_last_good_one_in_force(
    flagsmith: FlagServer, make: Make, operator: str, value: object
) -> None:
    kept: list[Json] = []
    flagsmith.answer = body(document(*ALL_FLAGS))
    source = make(flagsmith.url, remember=kept.append)
    good = source.refresh()
    asked = segment(1, operator, "plan", value, [state(DUAL_WRITE, True, 1)])
    flagsmith.answer = body(document(segments=[asked]))
    assert source.refresh().document_id == good.document_id
    for traits in ({}, {"plan": "pro"}):
        assert wanted(source, **traits) == ON
    assert "(segment segment-1): Flagsmith's engine cannot evaluate plan" in problem(source)
    assert kept == [document(*ALL_FLAGS)], "what cannot be evaluated is remembered for nobody"
    with pytest.raises(FlagDocumentInvalid):
        check(source)


def test_a_flag_that_the_server_does_not_know_is_named(flagsmith: FlagServer, make: Make) -> None:
    flagsmith.answer = body(document(names=ALL_FLAGS[1:]))
    with pytest.raises(FlagsMissing) as caught:
        check(make(flagsmith.url))
    assert caught.value.missing == (DUAL_WRITE,)
    assert caught.value.exit_code == 4


def test_the_thread_picks_up_changes_by_itself(flagsmith: FlagServer, make: Make) -> None:
    stored = threading.Event()
    source = make(flagsmith.url, poll_seconds=0.01, remember=lambda _: stored.set())
    assert source.wait(PATIENCE)
    assert stored.wait(PATIENCE)
    assert wanted(source) == OFF
    stored.clear()
    flagsmith.answer = body(document(*ALL_FLAGS))
    assert stored.wait(PATIENCE)
    assert wanted(source) == ON


def test_the_thread_goes_on_after_an_outage(flagsmith: FlagServer, make: Make) -> None:
    failed = threading.Event()
    flagsmith.status = 500
    source = make(flagsmith.url, poll_seconds=0.01, report=lambda _: failed.set())
    assert wanted(source) == OFF
    assert failed.wait(PATIENCE)
    flagsmith.answer = body(document(*ALL_FLAGS))
    flagsmith.status = 200
    assert source.wait(PATIENCE)
    assert wanted(source) == ON


def test_readers_never_see_flags_that_no_document_had_while_documents_swap(flagsmith: FlagServer, make: Make) -> None:
    source = make(flagsmith.url)
    source.refresh()
    answers = [body(document(segments=[tenant(1, "acme", *flags)])) for flags in ((), ALL_FLAGS)]
    done, seen = threading.Event(), set[Decision]()

    def act(number: int) -> None:
        if number == 0:
            try:
                for turn in turns(16, seen):
                    flagsmith.answer = answers[turn % 2]
                    source.refresh()
            finally:
                done.set()
            return
        while not done.is_set():
            snapshot = source.snapshot()
            one = {snapshot.decide(str(key), {"tenant": "acme", "role": str(number)}) for key in range(20)}
            assert len(one) == 1
            seen.update(one)

    together(3, act)
    assert seen == {ON, OFF}


def test_an_equal_document_keeps_its_decisions_and_renews_its_age(flagsmith: FlagServer, make: Make) -> None:
    clock = Clock()
    flagsmith.answer = body(document(segments=[tenant(1, "acme", DUAL_WRITE)]))
    source = make(flagsmith.url, clock=clock)
    first = source.refresh()
    first.decide("42", {"tenant": "acme"})
    clock.now += 50
    again = source.refresh()
    assert (first.age_seconds(), again.age_seconds()) == (50, 0)
    assert source._current.document is not None
    assert source._current.document.memoised == 1


@forks
def test_a_forked_child_starts_with_the_last_good_document_and_polls_by_itself(
    flagsmith: FlagServer, make: Make
) -> None:
    changed = threading.Event()

    def remember(content: Json) -> None:
        if content["feature_states"][0]["enabled"]:
            changed.set()

    source = make(flagsmith.url, remember=remember)
    assert source.wait(PATIENCE)
    polled = len(flagsmith.requests)
    old = source.snapshot().document_id
    flagsmith.answer = body(document(*ALL_FLAGS))

    def child() -> bool:
        inherited = source._current.document_id == old and source.wait(0)
        return inherited and changed.wait(PATIENCE) and wanted(source) == ON

    with source._lock, source._starting:  # as threads of the parent may hold them at the moment of the fork
        assert in_child(child)
    assert len(flagsmith.requests) == polled + 1
    assert wanted(source) == OFF  # the parent's own next poll is an hour away


@forks
def test_a_source_that_was_closed_stays_so_in_a_child(flagsmith: FlagServer, make: Make) -> None:
    source = make(flagsmith.url)
    assert source.wait(PATIENCE)
    source.close()
    polled = len(flagsmith.requests)
    assert in_child(lambda: wanted(source) == OFF and not polling_threads())
    assert len(flagsmith.requests) == polled


def test_a_closed_source_keeps_its_flags_and_polls_no_more(flagsmith: FlagServer, make: Make) -> None:
    flagsmith.answer = body(document(*ALL_FLAGS))
    source = make(flagsmith.url, poll_seconds=0.01)
    assert source.wait(PATIENCE)
    before = set(polling_threads())
    source.close()
    source.close()
    assert len(polling_threads()) == len(before) - 1
    assert wanted(source) == ON
    assert len(polling_threads()) == len(before) - 1


def test_a_source_closed_before_its_first_use_never_polls(flagsmith: FlagServer, make: Make) -> None:
    source = make(flagsmith.url)
    source.close()
    assert wanted(source) == OFF
    assert not source.wait(0)
    assert flagsmith.requests == []


def test_a_source_that_nobody_closed_is_collected_and_its_thread_ends(flagsmith: FlagServer, make: Make) -> None:
    source = make(flagsmith.url, poll_seconds=0.01)
    assert source.wait(PATIENCE)
    thread = source._thread
    assert thread is not None
    del source
    gc.collect()
    thread.join(PATIENCE)
    assert not thread.is_alive()


@pytest.mark.parametrize("key", [KEY, "ser.line\nbreak", "ser.schlüssel-✓"])
def test_the_key_is_shown_nowhere(flagsmith: FlagServer, make: Make, key: str) -> None:
    notices: list[FlagNotice] = []
    flagsmith.status = 403
    url = flagsmith.url.replace("127.0.0.1", "user:hush@127.0.0.1")
    source = make(url, key=key, report=notices.append)
    source.refresh()
    shown = f"{source.problem} {source.name} {source!r} {notices} {source.snapshot().source}"
    assert key not in shown
    assert key.split("\n", maxsplit=1)[0] not in shown
    assert "hush" not in shown
    assert len(notices) == 1


def test_a_source_without_a_key_or_an_address_is_refused_with_the_fix() -> None:
    with pytest.raises(ConfigError, match="WALLETMIGRATE_FLAGSMITH_KEY"):
        FlagsmithSource("http://127.0.0.1:1/api/v1/", "")
    for url in (
        "",
        "127.0.0.1:8000",
        "ftp://hush@127.0.0.1/",
        "http://",
        "http://127.0.0.1:hush/",
        "http://[hush",
    ):
        with pytest.raises(ConfigError) as caught:
            FlagsmithSource(url, KEY)
        assert "hush" not in str(caught.value)
        assert caught.value.__cause__ is None
