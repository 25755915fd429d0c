"""pgbench: many clients inside the database, which come with the server's own binaries.

Two scripts are measured in one run: both have their clients connected, and they take turns of a fraction of a second,
the clients of the other one being stopped. So what the machine does meanwhile falls on both alike, which two runs one
after the other cannot say: on shared machines the same script was seen at half its speed ten seconds later.
"""

from __future__ import annotations

import re
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from walletmigrate.embedded import Server

CLIENTS = 16
TURN_SECONDS = 0.4
"""Long against the answers that are still on their way when a script is stopped, short against a machine's moods."""


@dataclass(frozen=True)
class Run:
    """What a script came to: transactions, and per second of its own turns."""

    transactions: int
    per_second: float


def in_turns(server: Server, url: str, scripts: Sequence[Path], seconds: int) -> list[Run]:
    """Run two scripts for so many seconds each, in turns, and give what each came to.

    Connecting and a first use of each function is in it, for both. Raises RuntimeError when one of them fails.
    """
    started = [_start(server, url, each, 2 * seconds) for each in scripts]
    mine = [0.0, 0.0]
    try:
        started[1].send_signal(signal.SIGSTOP)
        at = 0
        while started[at].poll() is None:
            began = time.monotonic()
            with suppress(subprocess.TimeoutExpired):
                started[at].wait(TURN_SECONDS)
            started[at].send_signal(signal.SIGSTOP)
            mine[at] += time.monotonic() - began
            at = 1 - at
            started[at].send_signal(signal.SIGCONT)
    finally:
        # The time of both is up.
        for one in started:
            one.send_signal(signal.SIGCONT)
    return [_ended(one, own) for one, own in zip(started, mine, strict=True)]


def _start(server: Server, url: str, script: Path, seconds: int) -> subprocess.Popen[str]:
    command = [str(server.binaries / "pgbench"), "-n", "-M", "prepared", "-T", str(seconds)]
    command += ["-c", str(CLIENTS), "-j", "2", "-f", str(script), url]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _ended(process: subprocess.Popen[str], seconds: float) -> Run:
    said, errors = process.communicate()
    done = re.search(r"transactions actually processed: (\d+)", said)
    if process.returncode != 0 or done is None:
        raise RuntimeError(f"pgbench failed: {errors.strip()[-500:]}")
    return Run(int(done.group(1)), int(done.group(1)) / seconds)
