"""Commands on a pseudo-terminal, and what a person there sees."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager

from commandline import Project

COLUMNS = 120


class Screen:
    """A process on a pseudo-terminal of 120 columns, and everything that it has shown."""

    def __init__(self, process: subprocess.Popen[str], main: int) -> None:
        self.process = process
        self._main = main
        self.shown = ""

    def until(self, words: str, seconds: float = 60) -> None:
        """Read until it has shown the words anew."""
        seen = len(self.shown)
        deadline = time.monotonic() + seconds
        while words not in self.shown[seen:]:
            assert time.monotonic() < deadline, f"{words!r} was not shown: {self.shown[-2000:]}"
            if select.select([self._main], [], [], 0.2)[0]:
                self.shown += os.read(self._main, 65536).decode()

    def left(self) -> str:
        """What it has shown and nobody has read."""
        there = select.select([self._main], [], [], 0)[0]
        return os.read(self._main, 65536).decode() if there else ""


@contextmanager
def terminal(rows: int = 50) -> Iterator[tuple[int, int]]:
    """A pseudo-terminal: the side that shows what is written, and the side of the program."""
    main, program = pty.openpty()
    fcntl.ioctl(program, termios.TIOCSWINSZ, struct.pack("HHHH", rows, COLUMNS, 0, 0))
    try:
        yield main, program
    finally:
        os.close(main)
        os.close(program)


@contextmanager
def on_terminal(project: Project, *words: str, streams: tuple[str, ...], rows: int = 50) -> Iterator[Screen]:
    """Run a command that has a terminal for these of its streams (stdin, stdout, stderr); it is killed at the end."""
    with terminal(rows) as (main, program):
        process = project.start(*words, **dict.fromkeys(streams, program))
        try:
            yield Screen(process, main)
        finally:
            process.kill()
            process.communicate()
