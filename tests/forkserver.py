"""The command line as a process of its own without a second of imports: forked from one that has them done.

`commands` gives a folder to stand first in a PATH. The `walletmigrate` in it hands its words, folder, environment and
files to the server, which forks; the child runs the real console script, and its end is the caller's end. A variable
that was read while the modules were loaded is found out: a caller who has another value of it gets the real script.
"""

from __future__ import annotations

import array
import gc
import marshal
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Final

SCRIPT: Final = Path(sys.executable).with_name("walletmigrate")
PASSED: Final = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that the caller passes on; what is ignored there is ignored by the command."""
OTHERS: Final = (
    *("sqlalchemy.dialects.postgresql.psycopg", "sqlalchemy.orm", "psycopg_binary", "alembic.command"),
    *("alembic.runtime.migration", "structlog", "rich.console", "rich.live", "typer.main"),
)
"""What many commands load when they need it."""
NUMBER: Final = 8
"""Bytes of a number on the line."""

# Nothing is imported that takes time: `-I` and `-S` leave out all but the standard library.
_CALLER: Final = """\
#!{python} -IS
import array, marshal, os, signal, socket, sys

PASSED = {passed}
closed = None in (sys.stdin, sys.stdout, sys.stderr)  # then what is opened next has the number
signal.pthread_sigmask(signal.SIG_BLOCK, PASSED)
line = socket.socket(socket.AF_UNIX)


def number():
    found = b""
    while len(found) < {number} and (more := line.recv({number} - len(found))):
        found += more
    return int.from_bytes(found, "big", signed=True) if found else None


def ask():
    line.connect({address!r})
    ignored = [one for one in PASSED if signal.getsignal(one) is signal.SIG_IGN]
    umask = os.umask(0)
    os.umask(umask)
    asked = marshal.dumps((sys.argv[1:], os.getcwdb(), dict(os.environb), ignored, umask))
    files = array.array("i", (0, 1, 2))
    sent = line.sendmsg(
        [len(asked).to_bytes({number}, "big"), asked], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, files)]
    )
    line.sendall((len(asked).to_bytes({number}, "big") + asked)[sent:])
    return number(), ignored


try:
    process, ignored = (None, ()) if closed else ask()
except OSError:  # the folder is gone, or the server
    process = None
if process is None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED)
    os.execv({script!r}, [{script!r}, *sys.argv[1:]])
for one in PASSED:
    if one not in ignored:
        signal.signal(one, lambda found, _: os.kill(process, found))
signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED)
code = number()
if code is None:
    sys.stderr.write("the fork server of the tests has ended\\n")
    code = 70
elif code < 0:  # ended by a signal
    if -code != signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
os._exit(code)
"""

_running: list[ForkServer] = []


def commands() -> Path:
    """The folder with the quick `walletmigrate`; the real one's where processes cannot be waited for in this way."""
    if not hasattr(os, "pidfd_open"):
        return SCRIPT.parent
    if not _running:
        _running.append(ForkServer(SCRIPT))
    return _running[0].folder


def leave() -> None:
    """End the server, and whatever it has begun."""
    while _running:
        _running.pop().close()


class ForkServer:
    """A process that runs ``script`` in forks of its own; ``folder`` has the program that asks for it."""

    def __init__(self, script: Path) -> None:
        self.script = script
        self._kept = tempfile.TemporaryDirectory(prefix="wm-fork-")
        self.folder = Path(self._kept.name)
        address = str(self.folder / "line")
        passed = tuple(map(int, PASSED))
        caller = self.folder / script.name
        text = _CALLER.format(python=sys.executable, address=address, script=str(script), number=NUMBER, passed=passed)
        caller.write_text(text, encoding="utf-8")
        caller.chmod(0o755)
        self._process = subprocess.Popen(
            [sys.executable, __file__, address, str(script)],
            env={"PATH": os.defpath, "LC_ALL": "C.UTF-8"},
            stdin=subprocess.PIPE,  # the server ends with this process
            stdout=subprocess.PIPE,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"ready\n"

    @property
    def pid(self) -> int:
        """The number of the server's process."""
        return self._process.pid

    def close(self) -> None:
        """End the process, and whatever it has begun."""
        self._process.communicate(timeout=60)
        self._kept.cleanup()


@dataclass(frozen=True)
class Asked:
    """What a command is to run with; ``files`` become its 0, 1 and 2."""

    words: list[str]
    folder: bytes
    environment: dict[bytes, bytes]
    ignored: list[int]
    umask: int
    files: list[int]


class Recorded(os._Environ):  # type: ignore[type-arg]
    """An environment that remembers which names were asked for."""

    names: Final[set[str]] = set()

    def __getitem__(self, name: str) -> str:
        self.names.add(name)
        found: str = super().__getitem__(name)
        return found


def load() -> set[str]:
    """Load all that commands load; the variables that were read meanwhile."""
    sysconfig.get_config_vars()  # it reads where a user's own packages are, of which a virtual environment has none
    os.environ.__class__ = Recorded
    rooms = import_module("walletmigrate.cli").ROOMS
    for name in (*(f"walletmigrate.cli_{room}" for room in rooms), *OTHERS):
        import_module(name)
    os.environ.__class__ = os._Environ
    assert threading.active_count() == 1, threading.enumerate()
    gc.collect()
    gc.freeze()
    return Recorded.names


def received(line: socket.socket) -> Asked:
    """Read what a caller asks for."""
    text, files = b"", array.array("i")
    while len(text) < NUMBER or len(text) < NUMBER + int.from_bytes(text[:NUMBER], "big"):
        more, sent, *_ = line.recvmsg(1 << 16, socket.CMSG_SPACE(3 * files.itemsize))
        if not more:
            raise ConnectionError
        text += more
        for *_, data in sent:
            files.frombytes(data)
    words, folder, environment, ignored, umask = marshal.loads(text[NUMBER:])
    return Asked(words, folder, environment, ignored, umask, list(files))


class Serving:
    """The server's side: who is waited for, and on which line its end is told."""

    def __init__(self, listener: socket.socket, read: set[str]) -> None:
        self._listener = listener
        self._read = read
        self._begun = dict(os.environb)
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ, self._accept)
        self._selector.register(0, selectors.EVENT_READ, self._stop)
        self._running: dict[int, tuple[socket.socket, int]] = {}
        self._ended = False

    def serve(self) -> Asked | None:
        """Fork for every caller. Gives in a child what it is to run, and in the server None, at its end."""
        while not self._ended:
            for key, _ in self._selector.select():
                asked: Asked | None = key.data()
                if asked is not None:
                    return asked
        return None

    def _stop(self) -> None:
        self._ended = True
        for process in self._running:
            self._kill(process)

    def _accept(self) -> Asked | None:
        line, _ = self._listener.accept()
        line.settimeout(60)
        try:
            asked = received(line)
        except OSError:  # the caller was killed before it had said all
            line.close()
            return None
        process = os.fork() if self._same(asked.environment) else -1
        if process == 0:
            line.close()
            self._forget()
            return asked
        for file in asked.files:
            os.close(file)
        if process == -1:
            line.close()  # the caller becomes the real script
        else:
            self._await(process, line)
        return None

    def _await(self, process: int, line: socket.socket) -> None:
        end = os.pidfd_open(process)
        self._running[process] = line, end
        self._selector.register(line, selectors.EVENT_READ, lambda: self._kill(process))
        self._selector.register(end, selectors.EVENT_READ, lambda: self._tell(process))
        with suppress(OSError):
            line.sendall(process.to_bytes(NUMBER, "big", signed=True))

    def _kill(self, process: int) -> None:
        """The caller is gone, killed perhaps: so is the command."""
        if process in self._running:
            with suppress(KeyError):
                self._selector.unregister(self._running[process][0])
            os.kill(process, signal.SIGKILL)

    def _tell(self, process: int) -> None:
        line, end = self._running.pop(process)
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        for one in (line, end):
            with suppress(KeyError):
                self._selector.unregister(one)
        os.close(end)
        with line, suppress(OSError):
            line.sendall(code.to_bytes(NUMBER, "big", signed=True))

    def _same(self, environment: dict[bytes, bytes]) -> bool:
        """Whether nothing was loaded, or begun, otherwise than this environment wants it."""
        given = environment.keys() | self._begun.keys()
        names = {os.fsencode(name) for name in self._read}
        names |= {name for name in given if name.startswith((b"PYTHON", b"LC_", b"LANG", b"TZ", b"LD_", b"MALLOC_"))}
        return all(environment.get(name) == self._begun.get(name) for name in names)

    def _forget(self) -> None:
        """Leave nothing open in a child that is the server's."""
        for line, end in self._running.values():
            line.close()
            os.close(end)
        self._selector.close()
        self._listener.close()


def become(asked: Asked) -> None:
    """Make of this process what the caller would have become."""
    for number, file in enumerate(asked.files):
        os.dup2(file, number)
    for file in asked.files:
        os.close(file)
    sys.stdout.reconfigure(line_buffering=os.isatty(1))  # type: ignore[union-attr]
    os.chdir(asked.folder)
    os.umask(asked.umask)
    os.environ.clear()
    os.environb.update(asked.environment)
    for one in PASSED:
        usual: Any = signal.default_int_handler if one == signal.SIGINT else signal.SIG_DFL
        signal.signal(one, signal.SIG_IGN if one in asked.ignored else usual)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED)


def main(address: str, script: str) -> None:
    """The server's process, and in its children the script."""
    sys.path[0] = os.path.dirname(script)
    signal.pthread_sigmask(signal.SIG_BLOCK, PASSED)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen(64)
        serving = Serving(listener, load())
        os.write(1, b"ready\n")
        asked = serving.serve()
    if asked is not None:
        become(asked)
        sys.argv = [script, *asked.words]
        runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
