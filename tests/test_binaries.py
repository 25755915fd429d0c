"""The fetching of programs for tests: once for all processes, and never a silent skip in CI."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import binaries

_STUB = """#!/bin/sh
echo "$0 $*" >>"{log}"
case "$0 $*" in
*/apt-get*download*) : >thing_1_all.deb ;;
*/dpkg-deb*-x*) mkdir -p "$3/usr/bin" && cp /bin/true "$3/usr/bin/thing" ;;
esac
"""

_FETCH = """
import sys
from pathlib import Path
import binaries
print(binaries.found("thing", "thing", places=sys.argv[1], folder=Path(sys.argv[2])).path)
"""


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A folder with an apt-get and a dpkg-deb that write down how they are called."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for name in ("apt-get", "dpkg-deb"):
        path = folder / name
        path.write_text(_STUB.format(log=tmp_path / "calls"), encoding="utf-8")
        path.chmod(0o755)
    return folder


def test_processes_that_want_a_program_at_once_fetch_it_once(tools: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    places = os.pathsep.join((str(tools), os.defpath))
    command = [sys.executable, "-c", _FETCH, places, str(cache)]
    environment = {**os.environ, "PYTHONPATH": str(Path(binaries.__file__).parent)}
    processes = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    said = [process.communicate(timeout=60)[0].strip() for process in processes]
    assert said == [str(cache / "thing/usr/bin/thing")] * 4
    calls = (tmp_path / "calls").read_text(encoding="utf-8")
    assert calls.count("download thing") == 1


def test_a_fetch_that_was_cut_short_is_begun_anew(tools: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    (cache / "thing.unfinished/usr").mkdir(parents=True)
    made = binaries.found("thing", "thing", places=os.pathsep.join((str(tools), os.defpath)), folder=cache)
    assert made.path == cache / "thing/usr/bin/thing"
    assert not (cache / "thing.unfinished").exists()


def test_a_program_on_the_path_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "thing").write_text("#!/bin/sh\n", encoding="utf-8")
    (tmp_path / "thing").chmod(0o755)
    made = binaries.found("thing", "thing", places=str(tmp_path), folder=tmp_path / "cache")
    assert made == binaries.Program(tmp_path / "thing")
    assert not (tmp_path / "cache").exists()


def test_without_apt_get_a_test_skips_and_in_ci_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(binaries.Unavailable, match="has no apt-get") as caught:
        binaries.found("thing", "thing", places=str(tmp_path), folder=tmp_path / "cache")
    monkeypatch.setattr(binaries, "_once", lambda *_: str(caught.value))
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="it is in Debian's package thing"):
        binaries.program("thing", "thing")
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="it is in Debian's package thing"):
        binaries.program("thing", "thing")


def test_a_package_that_cannot_be_fetched_is_told_with_the_last_words_of_apt_get(tools: Path, tmp_path: Path) -> None:
    (tools / "apt-get").write_text("#!/bin/sh\necho 'E: no such thing' >&2\nexit 100\n", encoding="utf-8")
    with pytest.raises(binaries.Unavailable, match="E: no such thing"):
        binaries.found("thing", "thing", places=os.pathsep.join((str(tools), os.defpath)), folder=tmp_path / "cache")
