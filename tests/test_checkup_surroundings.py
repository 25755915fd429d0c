"""Doctor on what surrounds the ledger: flags, clocks, statistics."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from sqlalchemy import Connection

import flag_documents
import flagsmith_stub
from capturing import Place
from examining import connection, place, run
from findings import assert_told
from ledger import execute
from walletmigrate import doctor
from walletmigrate.doctor import Finding
from walletmigrate.flag_server import FlagsmithSource
from walletmigrate.flag_sources import FileSource
from walletmigrate.flags import DUAL_WRITE, READ_FROM_LEDGER
from walletmigrate.heartbeat import Heartbeat

__all__ = ["connection", "place"]


def test_flags_that_cannot_be_read_are_found(connection: Connection, place: Place, tmp_path: Path) -> None:
    file = tmp_path / "environment.json"
    document = flag_documents.document(READ_FROM_LEDGER)
    for content, what in (
        (json.dumps(document), "wallet.dualWrite is not: it counts as off"),
        (json.dumps({**document, "feature_states": document["feature_states"][:2]}), "wallet.enableWithdrawals"),
        ("{", "environment.json"),
        (None, "environment.json"),
    ):
        file.unlink() if content is None else file.write_text(content, encoding="utf-8")
        found = doctor.examine(connection, place.settings, FileSource(file))
        assert any(what in one.what for one in found), found
        assert_told(found)


def test_flags_that_no_process_decides_by_are_found(place: Place, tmp_path: Path) -> None:
    file, other = tmp_path / "environment.json", tmp_path / "other.json"
    for one in (file, other):
        one.write_bytes(flag_documents.body(flag_documents.document(DUAL_WRITE)))
    beats = Heartbeat(place.settings, FileSource(other, check_seconds=0))

    def found() -> list[str]:
        beats.beat()
        with place.engine.connect() as connection:
            told = doctor.examine(connection, place.settings, FileSource(file))
        assert_told(told)
        return [one.what for one in told]

    try:
        assert found() == []
        file.write_bytes(flag_documents.body(flag_documents.document(DUAL_WRITE, READ_FROM_LEDGER)))
        what = f"no process decides by the flags that this command reads from file {file}; theirs are of file {other}"
        assert found() == [what]
        other.write_bytes(file.read_bytes())
        assert found() == []
        other.write_text("{", encoding="utf-8")
        file.write_bytes(flag_documents.body(flag_documents.document(DUAL_WRITE)))
        assert [one for one in found() if "no process" in one] == []
    finally:
        execute(place.engine, "delete from wallet.processes")


def test_a_flagsmith_server_that_lacks_a_flag_or_does_not_answer_is_found(connection: Connection, place: Place) -> None:
    with flagsmith_stub.running() as server:
        whole, lacking = (FlagsmithSource(server.api_url, flagsmith_stub.ENVIRONMENT_KEY) for _ in range(2))
        assert doctor.examine(connection, place.settings, whole) == ()
        del server.project.features[server.flag(READ_FROM_LEDGER)]
        found = doctor.examine(connection, place.settings, lacking)
        assert [READ_FROM_LEDGER in one.what for one in found] == [True]
        assert_told(found)
    found = doctor.examine(connection, place.settings, FlagsmithSource(server.api_url, flagsmith_stub.ENVIRONMENT_KEY))
    assert [one.runbook for one in found] == ["runbooks/flags-stale.md"]
    assert_told(found)


@pytest.mark.parametrize(("off", "said"), [(60, "60 s behind this machine's"), (-60, "60 s ahead of this machine's")])
def test_a_clock_that_is_off_is_found(connection: Connection, place: Place, off: int, said: str) -> None:
    """The clock of a machine that runs tests is not set: doctor takes it as a function."""
    found = doctor.examine(connection, place.settings, now=lambda: time.time() + off)
    assert [one.what for one in found] == [f"the database's clock is {said}"]
    assert_told(found)
    assert doctor.examine(connection, place.settings, now=lambda: time.time() + off / 20) == ()


def test_statistics_that_are_missing_or_old_are_found_and_analyze_mends_them(database_url: str) -> None:
    place = Place(database_url)
    grow = (
        "insert into wallet.accounts (mapping, key, bucket, currency, state, balance) "
        "select 'users', 'x' || g, 'cash', 'EUR', 'stale', 0 from generate_series(1, 10000) as g"
    )

    def found() -> list[Finding]:
        with place.engine.connect() as connection:
            return [one for one in doctor.examine(connection, place.settings) if "analyse" in one.what]

    def flushed(statement: str) -> None:
        with place.engine.begin() as connection:
            run(connection, statement)
            run(connection, "select pg_stat_force_next_flush()")

    execute(place.engine, "alter table wallet.accounts set (autovacuum_enabled = off)")
    flushed(grow)
    (one,) = found()
    assert "was never analysed, and has about 100" in one.what
    assert_told([one])
    flushed(one.mend.rpartition(": ")[2])
    assert found() == []
    for _ in range(2):
        flushed("update wallet.accounts set state_reason = 'test'")
    (one,) = found()
    assert "has changed more than all its rows" in one.what
    assert_told([one])
