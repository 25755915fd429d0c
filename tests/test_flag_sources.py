"""Where flags come from: a file that changes and breaks, a server that is down, hangs or answers garbage."""

from __future__ import annotations

import gc
import gzip
import os
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import walletmigrate.flag_http
from flag_documents import body, document, tenant
from walletmigrate.errors import ConfigError, FlagDocumentInvalid, FlagsMissing, FlagSourceUnreachable
from walletmigrate.flag_file import FlagFile
from walletmigrate.flag_server import FlagsmithSource
from walletmigrate.flag_sources import NOTHING_GOOD, DocumentSource, FileSource, check
from walletmigrate.flags import (
    ALL_FLAGS,
    DUAL_WRITE,
    NO_DOCUMENT,
    OFF,
    Decision,
    FlagNotice,
    Json,
    StaticSource,
)

KEY = "ser.secret-of-the-tests"
ON = Decision(True, True, True)
WRITING = Decision(dual_write=True)
LONG = 3600.0
PATIENCE = 20.0
"""Seconds until a test that waits for an event gives up; none waits that long unless something is broken."""

forks = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


class Clock:
    """A clock that stands still until it is told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def wanted(source: DocumentSource, **traits: str) -> Decision:
    return source.snapshot().decide("42", traits)


def problem(source: DocumentSource) -> str:
    return source.problem or ""


def turns(least: int, seen: set[Decision]) -> Iterator[int]:
    """Count turns until there were enough, and the readers have seen more than one document."""
    for turn in range(1000):
        if turn >= least and len(seen) > 1:
            return
        yield turn


def in_child(act: Callable[[], bool]) -> bool:
    """What ``act`` returns in a forked child."""
    pid = os.fork()
    if pid == 0:
        good = False
        try:
            good = act()
        except BaseException:  # noqa: BLE001 - the parent is told by the exit status
            traceback.print_exc()
        finally:
            os._exit(0 if good else 1)
    return os.waitpid(pid, 0)[1] == 0


def together(count: int, act: Callable[[int], None]) -> None:
    """Run ``act`` in threads that start at once, and raise what one of them raised."""
    barrier, faults = threading.Barrier(count), list[BaseException]()

    def run(number: int) -> None:
        try:
            barrier.wait(PATIENCE)
            act(number)
        except BaseException as error:  # noqa: BLE001 - raised again in the test's own thread
            faults.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if faults:
        raise faults[0]


# --- the file


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "environment.json"


def write(path: Path, content: bytes, age_seconds: float = 60.0) -> None:
    """Write the file in place, with a time stamp that does not depend on the machine's clock tick."""
    path.write_bytes(content)
    stamp = time.time_ns() - int(age_seconds * 1e9)
    os.utime(path, ns=(stamp, stamp))


def test_a_missing_file_means_everything_off_and_is_told_once(path: Path) -> None:
    notices: list[FlagNotice] = []
    clock = Clock()
    source = FileSource(path, report=notices.append, clock=clock)
    for _ in range(3):
        clock.now += 10
        assert wanted(source) == OFF
    assert source.snapshot().document_id == NO_DOCUMENT
    assert source.snapshot().age_seconds() == 30
    assert str(path) in problem(source)
    assert problem(source).endswith(NOTHING_GOOD)
    assert [notice.kind for notice in notices] == ["source_problem"]
    with pytest.raises(FlagSourceUnreachable):
        check(source)


def test_a_file_that_appears_later_is_taken(path: Path) -> None:
    source = FileSource(path, check_seconds=0, report=lambda _: None)
    write(path, body(document(*ALL_FLAGS)))
    assert wanted(source) == ON
    assert not problem(source)
    check(source)


def test_a_change_is_seen_at_the_next_look_and_not_before(path: Path) -> None:
    write(path, body(document()))
    clock = Clock()
    source = FileSource(path, check_seconds=1.0, clock=clock)
    write(path, body(document(*ALL_FLAGS)))
    clock.now += 0.9
    assert wanted(source) == OFF
    clock.now += 0.2
    assert wanted(source) == ON


def test_refresh_looks_at_once(path: Path) -> None:
    write(path, body(document()))
    source = FileSource(path, check_seconds=LONG)
    write(path, body(document(*ALL_FLAGS)))
    assert wanted(source) == OFF
    assert source.refresh().decide("42", {}) == ON


@pytest.mark.parametrize("broken", [b"", b"{", body(document())[:-20], b"[1]", body(document(names=ALL_FLAGS[:2]))])
def test_a_broken_file_leaves_the_last_good_document_in_force(path: Path, broken: bytes) -> None:
    notices: list[FlagNotice] = []
    clock = Clock()
    write(path, body(document(*ALL_FLAGS)))
    source = FileSource(path, check_seconds=1, report=notices.append, clock=clock)
    good = source.snapshot()
    write(path, broken)
    for _ in range(5):
        clock.now += 2
        assert wanted(source) == ON
    assert source.snapshot().document_id == good.document_id
    assert source.snapshot().age_seconds() == 10
    assert problem(source)
    assert NOTHING_GOOD not in problem(source)
    assert len(notices) == 1
    fresh = FileSource(path, report=notices.append)
    assert (wanted(fresh), problem(fresh).endswith(NOTHING_GOOD)) == (OFF, True), "it has no last good document"
    with pytest.raises((FlagDocumentInvalid, FlagsMissing)):
        check(source)
    write(path, body(document(DUAL_WRITE)))
    clock.now += 2
    assert wanted(source) == WRITING
    assert not problem(source)
    assert source.snapshot().age_seconds() == 0


def test_a_file_that_goes_away_leaves_the_last_good_document_in_force(path: Path) -> None:
    write(path, body(document(*ALL_FLAGS)))
    source = FileSource(path, check_seconds=0, report=lambda _: None)
    path.unlink()
    assert wanted(source) == ON
    assert problem(source)
    path.mkdir()
    assert wanted(source) == ON
    assert problem(source)


def test_a_document_without_one_of_the_flags_is_named_by_check(path: Path) -> None:
    write(path, body(document(names=("wallet.dualwrite", *ALL_FLAGS[1:]))))
    source = FileSource(path, report=lambda _: None)
    assert wanted(source) == OFF
    with pytest.raises(FlagsMissing) as caught:
        check(source)
    assert caught.value.missing == (DUAL_WRITE,)
    assert list(caught.value.near) == [("wallet.dualwrite", DUAL_WRITE)]


def test_a_good_file_does_not_age_and_keeps_what_it_remembers(path: Path) -> None:
    write(path, body(document(segments=[tenant(1, "acme", DUAL_WRITE)])))
    clock = Clock()
    source = FileSource(path, clock=clock)
    first = source.snapshot()
    clock.now += 100
    assert first.age_seconds() == 100
    assert source.snapshot().age_seconds() == 0
    assert source._current.document is not None
    document_before = source._current.document
    assert wanted(source, tenant="acme") == WRITING
    source.refresh()
    assert source._current.document is document_before
    assert document_before.memoised == 1


def test_an_unchanged_file_is_not_read_again(path: Path) -> None:
    write(path, body(document(segments=[tenant(1, "acme", DUAL_WRITE)])))
    found = path.stat()
    source = FileSource(path, check_seconds=0)
    path.write_bytes(body(document(segments=[tenant(1, "ajax", DUAL_WRITE)])))
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
    assert wanted(source, tenant="ajax") == OFF  # nothing that a look at the file's data would show has changed
    source.refresh()
    assert wanted(source, tenant="ajax") == WRITING


def test_a_second_write_within_one_tick_of_the_file_systems_clock_is_seen(path: Path) -> None:
    write(path, body(document(segments=[tenant(1, "acme", DUAL_WRITE)])), age_seconds=-60)
    found = path.stat()
    source = FileSource(path, check_seconds=0)
    path.write_bytes(body(document(segments=[tenant(1, "ajax", DUAL_WRITE)])))
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
    assert path.stat().st_size == found.st_size
    assert wanted(source, tenant="ajax") == WRITING


def test_readers_never_see_flags_that_no_document_had_while_the_file_is_replaced(path: Path) -> None:
    write(path, body(document()))
    source = FileSource(path, check_seconds=0)
    done, seen = threading.Event(), set[Decision]()

    def act(number: int) -> None:
        if number == 0:
            try:
                for turn in turns(40, seen):
                    spare = path.with_suffix(".new")
                    spare.write_bytes(body(document(*ALL_FLAGS) if turn % 2 else document()))
                    spare.replace(path)
                    source.snapshot()
            finally:
                done.set()
            return
        while not done.is_set():
            snapshot = source.snapshot()
            one = {snapshot.decide(str(key), {"tenant": str(number)}) for key in range(20)}
            assert len(one) == 1  # one snapshot, one answer, whatever was swapped meanwhile
            seen.update(one)

    together(3, act)
    assert seen == {ON, OFF}
    assert not problem(source)


@forks
def test_a_child_forked_while_a_thread_looked_at_the_file_still_sees_changes(path: Path) -> None:
    write(path, body(document()))
    source = FileSource(path, check_seconds=0)
    with source._lock:  # as another thread would hold it at the moment of the fork
        seen = in_child(
            lambda: FlagFile(path).set(DUAL_WRITE, True, everyone=True).changed and wanted(source) == WRITING
        )
    assert seen


# --- the server


class FlagServer(ThreadingHTTPServer):
    """Answers like Flagsmith's server, or as a test wants."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer = body(document())
        self.status = 200
        self.headers: dict[str, str] = {}
        self.hang: threading.Event | None = None
        self.drip = False
        self.arrived = threading.Event()
        self.requests: list[tuple[str, dict[str, str]]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/api/v1/"


class Handler(BaseHTTPRequestHandler):
    server: FlagServer

    def do_GET(self) -> None:
        server = self.server
        server.requests.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
        server.arrived.set()
        if server.hang is not None:
            server.hang.wait(PATIENCE)
        known = self.path == "/api/v1/environment-document/"
        refused = self.headers.get("X-Environment-Key") != KEY
        status = server.status if server.status != 200 else 404 if not known else 403 if refused else 200
        answer = server.answer if status == 200 else b'{"detail": "no"}'
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        for name, value in server.headers.items():
            self.send_header(name, value)
        self.end_headers()
        try:
            self._send(answer)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _send(self, answer: bytes) -> None:
        if not self.server.drip:
            self.wfile.write(answer)
            return
        never = threading.Event()
        for byte in answer:
            self.wfile.write(bytes([byte]))
            never.wait(0.05)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def flagsmith() -> Iterator[FlagServer]:
    with FlagServer() as found:
        thread = threading.Thread(target=found.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield found
        if found.hang is not None:
            found.hang.set()
        found.shutdown()
        thread.join()


Make = Callable[..., FlagsmithSource]


@pytest.fixture
def make() -> Iterator[Make]:
    """Makes sources that are closed at the end; none polls by itself more than once unless asked to."""
    made: list[weakref.ref[FlagsmithSource]] = []

    def build(url: str, key: str = KEY, poll_seconds: float = LONG, **options: object) -> FlagsmithSource:
        options.setdefault("report", lambda _: None)
        source = FlagsmithSource(url, key, poll_seconds, **options)  # type: ignore[arg-type]
        made.append(weakref.ref(source))
        return source

    yield build
    for each in made:
        if (source := each()) is not None:
            source.close()


@pytest.fixture
def closed_port() -> str:
    with FlagServer() as found:
        return found.url


def polling_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "walletmigrate-flags"]


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


def test_check_has_nothing_against_fixed_flags() -> None:
    check(StaticSource())
