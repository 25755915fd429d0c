"""pgbench: many clients inside the database, which come with the server's own binaries."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from walletmigrate.embedded import Server

CLIENTS = 16


@dataclass(frozen=True)
class Run:
    """One run of pgbench: transactions per second after the first second, and all of them."""

    per_second: float
    transactions: int


def pgbench(server: Server, url: str, script: Path, seconds: int) -> Run:
    """Run a script of pgbench's for so many seconds with all clients. Raises RuntimeError when it fails."""
    command = [str(server.binaries / "pgbench"), "-n", "-M", "prepared", "-P", "1", "-T", str(seconds)]
    command += ["-c", str(CLIENTS), "-j", "2", "-f", str(script), url]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    done = re.search(r"transactions actually processed: (\d+)", answer.stdout)
    if answer.returncode != 0 or done is None:
        raise RuntimeError(f"pgbench failed: {answer.stderr.strip()[-500:]}")
    # In the first second each connection compiles the functions it calls.
    steady = [float(found) for found in re.findall(r"progress: [\d.]+ s, ([\d.]+) tps", answer.stderr)][1:]
    if len(steady) < seconds - 2:
        raise RuntimeError(f"pgbench reported {len(steady)} of {seconds} seconds")
    return Run(mean(steady), int(done.group(1)))
