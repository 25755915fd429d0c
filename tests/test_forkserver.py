"""The fork server of the tests is the real script but for the time: what a command sees, says, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import forkserver
from forkserver import SCRIPT, ForkServer
from monitoring import until

PROBE = f"""\
#!{sys.executable}
import __main__, json, locale, os, signal, stat, sys, threading, time, walletmigrate

def disposition(number):
    return str(signal.getsignal(number))

def kind(number):
    try:
        return stat.filemode(os.fstat(number).st_mode)[0]
    except OSError:
        return "closed"

seen = {{
    "argv": sys.argv, "path": sys.path, "name": __name__, "main": [__main__.__file__, str(__main__.__spec__)],
    "folder": os.getcwd(), "environment": dict(os.environ), "umask": os.umask(0),
    "signals": {{int(one): disposition(one) for one in signal.valid_signals()}},
    "blocked": sorted(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, []))),
    "open": sorted(os.listdir("/proc/self/fd"))[:3], "count": len(os.listdir("/proc/self/fd")),
    "kinds": [kind(one) for one in (0, 1, 2)],
    "stdin": sys.stdin and sys.stdin.read(), "threads": threading.active_count(),
    "locale": locale.setlocale(locale.LC_ALL, None),
    "streams": [one and (one.encoding, one.errors, one.line_buffering) for one in (sys.stdin, sys.stdout, sys.stderr)],
    "group": [os.getpgrp(), os.getsid(0)], "zone": time.tzname,
}}
print(json.dumps(seen))
print("child of", os.getppid(), file=sys.stderr)
sys.exit(7)
"""
ENVIRONMENT = {"PATH": os.defpath, "LC_ALL": "C.UTF-8", "HOME": "/nowhere"}


WAITING = f"""\
#!{sys.executable}
import os, sys, time
try:
    print(os.getpid(), flush=True)
    time.sleep(600)
except KeyboardInterrupt:
    print("interrupted")
    sys.exit(130)
"""


@contextmanager
def served(folder: Path, text: str) -> Iterator[ForkServer]:
    """A fork server of a script that was just written."""
    script = folder / "script"
    script.write_text(text, encoding="utf-8")
    script.chmod(0o755)
    server = ForkServer(script)
    try:
        yield server
    finally:
        server.close()


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    """Give the server of a script that tells all that it sees."""
    with served(tmp_path_factory.mktemp("probe"), PROBE) as server:
        yield server


@pytest.fixture(scope="module")
def waiting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    """Give the server of a script that tells its process's number, and waits."""
    with served(tmp_path_factory.mktemp("waiting"), WAITING) as server:
        yield server


def both(server: ForkServer, *words: str, **options: Any) -> list[subprocess.CompletedProcess[str]]:
    """What the real script does, and what its double of the fork server does."""
    options = {"input": "", "env": ENVIRONMENT, "timeout": 60, **options}
    programs = (server.script, server.folder / server.script.name)
    return [subprocess.run([one, *words], capture_output=True, text=True, check=False, **options) for one in programs]


def ignoring(number: int) -> Callable[[], object]:
    return lambda: signal.signal(number, signal.SIG_IGN)


@pytest.mark.parametrize(
    ("options", "forked"),
    [
        pytest.param({"input": "two\nlines"}, True, id="what it reads"),
        pytest.param({"umask": 0o27, "cwd": "/"}, True, id="folder and umask"),
        pytest.param({"preexec_fn": ignoring(signal.SIGINT)}, True, id="in the background of a shell"),
        pytest.param({"preexec_fn": ignoring(signal.SIGHUP)}, True, id="under nohup"),
        pytest.param({"env": {**ENVIRONMENT, "WALLETMIGRATE_ACTOR": "ä b\nc", "COLUMNS": "40"}}, True, id="variables"),
        pytest.param({"env": {**ENVIRONMENT, "TZ": "Asia/Tokyo"}}, False, id="a time zone"),
        pytest.param({"env": {"LC_ALL": "C"}}, False, id="a locale"),
        pytest.param({"env": {**ENVIRONMENT, "PYTHONPATH": "/somewhere"}}, False, id="other modules"),
        pytest.param({"env": {**ENVIRONMENT, "NO_COLOR": "1"}}, False, id="a variable that a module reads when loaded"),
        pytest.param({"preexec_fn": lambda: os.close(0), "stdin": None}, False, id="a closed file"),
    ],
)
def test_a_command_sees_of_its_surroundings_what_the_real_script_sees(
    options: dict[str, Any], forked: bool, probe: ForkServer
) -> None:
    real, quick = both(probe, "a b", "", "--ç", **options)
    assert json.loads(quick.stdout) == json.loads(real.stdout)
    assert (quick.returncode, real.returncode) == (7, 7)
    assert real.stderr == f"child of {os.getpid()}\n"
    assert quick.stderr == (f"child of {probe.pid}\n" if forked else real.stderr)


@pytest.fixture
def hangups_heard() -> Iterator[None]:
    """Also under `nohup`, which lets all that begins there ignore them."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def begun(server: ForkServer) -> tuple[subprocess.Popen[str], int]:
    """A caller, and the number of the process that works for it."""
    words = [str(server.folder / server.script.name)]
    caller = subprocess.Popen(words, env=ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    assert caller.stdout is not None
    return caller, int(caller.stdout.readline())


def lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.usefixtures("hangups_heard")
@pytest.mark.parametrize(
    ("number", "code", "said"),
    [(signal.SIGINT, 130, "interrupted\n"), (signal.SIGTERM, -signal.SIGTERM, ""), (signal.SIGHUP, -signal.SIGHUP, "")],
)
def test_a_signal_to_the_caller_reaches_the_command_whose_end_is_the_callers(
    number: int, code: int, said: str, waiting: ForkServer
) -> None:
    caller, process = begun(waiting)
    assert process != caller.pid
    caller.send_signal(number)
    assert (caller.communicate(timeout=60)[0], caller.returncode) == (said, code)
    assert not lives(process)


def test_a_command_whose_caller_is_killed_is_killed_and_another_goes_on(waiting: ForkServer) -> None:
    (killed, process), (other, its) = begun(waiting), begun(waiting)
    killed.kill()
    killed.communicate(timeout=60)
    until(lambda: not lives(process))
    assert lives(its)
    other.terminate()
    other.communicate(timeout=60)


def test_a_command_that_is_killed_ends_its_caller_alike(waiting: ForkServer) -> None:
    caller, process = begun(waiting)
    os.kill(process, signal.SIGKILL)
    assert (caller.communicate(timeout=60)[0], caller.returncode) == ("", -signal.SIGKILL)


def test_with_the_server_ends_what_it_began(tmp_path: Path) -> None:
    with served(tmp_path, WAITING) as server:
        caller, process = begun(server)
    assert (caller.communicate(timeout=60)[0], caller.returncode) == ("", 70)
    until(lambda: not lives(process))


@pytest.mark.parametrize(
    "words",
    [
        ("--help",),
        ("version",),
        ("nonsense",),
        ("status", "--json"),
        ("phase", "advance", "--reason", "a test"),
        ("backfill", "--rate", "fast"),
        ("discover", "--json", "."),
        ("--config", "other.toml", "init"),
        ("uninstall", "--confirm", "users", "--reason", "a test"),
    ],
    ids=" ".join,
)
def test_walletmigrate_says_and_ends_as_its_real_script_does(words: tuple[str, ...], tmp_path: Path) -> None:
    quick, real = (
        subprocess.run(
            [folder / "walletmigrate", *words],
            env={**ENVIRONMENT, "COLUMNS": "60"},
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        for folder in (forkserver.commands(), SCRIPT.parent)
    )
    assert forkserver.commands() != SCRIPT.parent
    assert (quick.returncode, quick.stdout, quick.stderr) == (real.returncode, real.stdout, real.stderr)
    assert quick.stdout + quick.stderr
