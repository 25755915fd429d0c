"""Doctor on the exporter, and the command itself: what it looks at, and what it says it did not."""

from __future__ import annotations

import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from pydantic import SecretStr
from sqlalchemy import Connection

from capturing import Place
from commandline import Project
from examining import assert_it_can_be_run, connection, place, run
from findings import assert_told
from ledger import execute
from walletmigrate import Settings, checkup_around, doctor
from walletmigrate.config import ExporterSettings
from walletmigrate.errors import UsageError
from walletmigrate.exporter import serve
from walletmigrate.flag_sources import FileSource
from walletmigrate.flags import READ_FROM_LEDGER
from walletmigrate.heartbeat import Heartbeat

__all__ = ["connection", "place"]


class Stranger(BaseHTTPRequestHandler):
    """Some other server, which takes its time."""

    seconds = 0.0

    def do_GET(self) -> None:
        time.sleep(self.seconds)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"hello\n")

    def log_request(self, *_: object) -> None:
        """Nothing."""


def of_exporter(connection: Connection, settings: Settings, port: int) -> list[str]:
    found = doctor.examine(connection, settings, exporter=f"http://127.0.0.1:{port}")
    assert {one.runbook for one in found} <= {"runbooks/exporter-down.md"}
    assert_told(found)
    return [one.what for one in found]


def test_an_exporter_that_is_down_blind_or_another_s_is_found(
    connection: Connection, place: Place, database_url: str
) -> None:
    served = serve(place.settings, 0)
    try:
        assert of_exporter(connection, place.settings, served.port) == []
        changed = "update wallet.control set phase = 'read_ledger', changed_at = clock_timestamp()"
        run(connection, changed)
        assert of_exporter(connection, place.settings, served.port) == [], "it has not looked again yet"
        run(connection, f"{changed} - interval '1 minute'")
        (what,) = of_exporter(connection, place.settings, served.port)
        assert "serves phase dual_write, and the phase is read_ledger" in what
        connection.rollback()
    finally:
        served.close()
    (what,) = of_exporter(connection, place.settings, served.port)
    assert "does not answer" in what
    blind = serve(
        Settings(database_url=SecretStr(database_url), mappings=place.settings.mappings), 0
    )  # nothing is installed there
    try:
        (what,) = of_exporter(connection, place.settings, blind.port)
        assert "does not reach its database" in what
    finally:
        blind.close()


@pytest.fixture
def stranger() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Stranger)
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_what_is_no_exporter_is_found(connection: Connection, place: Place, stranger: ThreadingHTTPServer) -> None:
    (what,) = of_exporter(connection, place.settings, stranger.server_port)
    assert "is no exporter of walletmigrate" in what


def test_an_exporter_may_take_the_time_that_its_look_may_take(
    connection: Connection, place: Place, stranger: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Stranger, "seconds", 1.0)
    monkeypatch.setattr(checkup_around, "_EXPORTER_SECONDS", 0.1)
    for seconds, answer in ((0.1, "does not answer"), (30, "is no exporter of walletmigrate")):
        limits = ExporterSettings(look_seconds=seconds)
        settings = place.settings.model_copy(update={"exporter": limits})
        (what,) = of_exporter(connection, settings, stranger.server_port)
        assert answer in what


@pytest.mark.parametrize("url", ["nowhere", "file:///etc/passwd", "http://"])
def test_an_address_that_is_none_is_refused(connection: Connection, place: Place, url: str) -> None:
    with pytest.raises(UsageError, match="--exporter"):
        doctor.examine(connection, place.settings, exporter=url)


# The command


def test_the_command_looks_at_flags_logins_and_the_exporter(database_url: str, tmp_path: Path) -> None:
    Place(database_url)
    project = Project(tmp_path, database_url)
    said = project.run("doctor")
    assert (said.exit_code, said.stderr) == (0, "")
    assert said.stdout.startswith("note: no process has a heartbeat, ")
    assert said.stdout.endswith("everything else is as it should be\n")
    Heartbeat(project.settings, FileSource(project.flag_path)).beat()
    project.flags.set(READ_FROM_LEDGER, True, trait=("tenant", "acme"))
    said = project.run("doctor", "--exporter", "http://127.0.0.1:1", "--login", "nobody", "--json")
    assert said.exit_code == 3
    assert said.document["schema_version"] == 1
    texts = [one["what"] for one in said.document["findings"]]
    assert [any(part in one for one in texts) for part in ("does not answer", "'nobody'", "counts as off")] == [
        True
    ] * 3
    assert all(set(one) == {"what", "mend", "runbook", "severity"} for one in said.document["findings"])
    assert project.run("doctor", "--exporter", "nowhere").exit_code == 2
    assert project.run("doctor", url="postgresql://nobody@127.0.0.1:1/nowhere").exit_code == 5


def test_without_its_address_doctor_says_that_it_did_not_look_at_the_exporter_and_how_to(
    database_url: str, tmp_path: Path
) -> None:
    place = Place(database_url)
    project = Project(tmp_path, database_url)
    Heartbeat(project.settings, FileSource(project.flag_path)).beat()
    said = project.run("doctor")
    assert (said.exit_code, said.stderr) == (0, "")
    assert said.stdout == (
        "note: the exporter was not looked at: its address was not named\n"
        "  mend: walletmigrate doctor --exporter http://127.0.0.1:9464  # or wherever it is; [exporter] url: for good\n"
        "  runbook: runbooks/exporter-down.md\n"
        "everything else is as it should be\n"
    )
    (note,) = project.run("doctor", "--json").document["findings"]
    assert (note["severity"], note["what"].partition(":")[0]) == ("note", "the exporter was not looked at")
    execute(place.engine, "drop view wallet.wallet_entries cascade")
    said = project.run("doctor")
    assert said.exit_code == 3
    assert "\nnote: the exporter was not looked at" in said.stdout
    execute(place.engine, "drop table wallet.processes")
    with place.engine.connect() as connection:
        assert_told(doctor.notes(connection, place.settings))
    served = serve(project.settings, 0)
    try:
        url = f"http://127.0.0.1:{served.port}"
        assert "exporter" not in Project(tmp_path, database_url).run("doctor", "--exporter", url).stdout
    finally:
        served.close()


def test_the_address_of_the_exporter_is_taken_from_the_configuration_and_the_option_wins(
    connection: Connection, place: Place
) -> None:
    nowhere = place.settings.model_copy(update={"exporter": ExporterSettings(url="http://127.0.0.1:1")})
    assert [one.runbook for one in doctor.notes(connection, nowhere)] == ["runbooks/releases.md"]
    (found,) = doctor.examine(connection, nowhere)
    assert "does not answer" in found.what
    served = serve(place.settings, 0)
    try:
        assert doctor.examine(connection, nowhere, exporter=f"http://127.0.0.1:{served.port}") == ()
        there = ExporterSettings(url=f"http://127.0.0.1:{served.port}")
        assert doctor.examine(connection, place.settings.model_copy(update={"exporter": there})) == ()
    finally:
        served.close()


def test_each_note_is_told_by_its_runbook(connection: Connection, place: Place) -> None:
    told = doctor.notes(connection, place.settings)
    assert [one.what.partition(",")[0].partition(":")[0] for one in told] == [
        "no process has a heartbeat",
        "the exporter was not looked at",
    ]
    assert_told(told)
    assert_it_can_be_run(told)
