"""Flags from a file: one that changes, breaks and goes away, and what `check` has against a source."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from flag_documents import UNREADABLE, body, document, named, segment, state, tenant
from flag_serving import LONG, ON, WRITING, Clock, forks, in_child, problem, together, turns, wanted
from walletmigrate.errors import FlagDocumentInvalid, FlagsMissing, FlagSourceUnreachable
from walletmigrate.flag_file import FlagFile
from walletmigrate.flag_sources import NOTHING_GOOD, FileSource, check
from walletmigrate.flags import ALL_FLAGS, DUAL_WRITE, NO_DOCUMENT, OFF, Decision, FlagNotice, StaticSource


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


@pytest.mark.parametrize(("operator", "value"), UNREADABLE, ids=named)
def test_a_file_that_the_engine_cannot_evaluate_leaves_the_last_good_document_in_force(
    path: Path, operator: str, value: object
) -> None:
    notices: list[FlagNotice] = []
    write(path, body(document(*ALL_FLAGS)))
    source = FileSource(path, check_seconds=0, report=notices.append)
    good = source.snapshot().document_id
    write(path, body(document(segments=[segment(1, operator, "plan", value, [state(DUAL_WRITE, True, 1)])])))
    for traits in ({}, {"plan": "pro"}):
        assert wanted(source, **traits) == ON
    assert source.snapshot().document_id == good
    assert "(segment segment-1): Flagsmith's engine cannot evaluate plan" in problem(source)
    assert [notice.kind for notice in notices] == ["source_problem"]
    write(path, body(document(DUAL_WRITE)))
    assert (wanted(source), problem(source)) == (WRITING, "")


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


def test_check_has_nothing_against_fixed_flags() -> None:
    check(StaticSource())
