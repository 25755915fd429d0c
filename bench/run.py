"""Measure the speed and hold it against the targets: ``make bench ARGS='--quick --only inside'``.

All ratios are of interleaved runs on one embedded PostgreSQL with fsync and synchronous_commit on. It is no test:
it exits 0 whether targets are met or missed.
"""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psycopg
from figures import Figure, table, write_json
from stage import Scale

from walletmigrate.embedded import Server

BENCHMARKS = {
    "client": "client",
    "inside": "inside",
    "bypass": "bypass",
    "handwritten": "crowd",
    "backfill": "openings",
    "workers": "workers",
    "verify": "comparing",
}
"""What ``--only`` knows, and the module that measures it."""

_DURABLE = {"fsync": "on", "synchronous_commit": "on", "full_page_writes": "on"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the chosen benchmarks on one server and print their table."""
    chosen = _parse(arguments)
    scale = Scale(chosen.quick, chosen.accounts or (100_000 if chosen.quick else 1_000_000))
    with Server.start(data=chosen.data) as server:
        setup = _setup(server, scale)
        print(" · ".join(f"{name} {value}" for name, value in setup.items()), flush=True)
        figures: list[Figure] = []
        try:
            for name in chosen.only or BENCHMARKS:
                figures += _measured(name, server, scale)
        finally:  # what was measured before another one failed took its time
            print(f"\n{table(figures)}")
            if chosen.json:
                write_json(chosen.json, figures, setup)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", action="append", choices=list(BENCHMARKS), help="measure this alone; may be repeated")
    parser.add_argument("--quick", action="store_true", help="few short rounds: rough figures in about two minutes")
    parser.add_argument("--accounts", type=int, help="size of the backfill (1,000,000; with --quick 100,000)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures with all samples to FILE")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="a new folder for the data, on the disk to measure")
    return parser.parse_args(arguments)


def _measured(name: str, server: Server, scale: Scale) -> list[Figure]:
    measure: Callable[[Server, Scale], list[Figure]] = importlib.import_module(BENCHMARKS[name]).measure
    started = time.monotonic()
    print(f"{name} …", end="", file=sys.stderr, flush=True)
    figures = measure(server, scale)
    print(f" {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    return figures


def _setup(server: Server, scale: Scale) -> dict[str, Any]:
    """What the figures were measured on. Raises RuntimeError on a server that does not wait for its disk."""
    with psycopg.connect(server.url) as connection:
        found = {name: str(_shown(connection, name)) for name in (*_DURABLE, "wal_sync_method", "shared_buffers")}
    for name, value in _DURABLE.items():
        if found[name] != value:
            raise RuntimeError(f"{name} is {found[name]}: figures without durability mean nothing")
    return {
        "PostgreSQL": server.version,
        **found,
        "processors": os.cpu_count(),
        "load": f"{os.getloadavg()[0]:.2f}",
        "Python": platform.python_version(),
        "SQLAlchemy": version("sqlalchemy"),
        "psycopg": version("psycopg"),
        "quick": scale.quick,
        "accounts": scale.accounts,
    }


def _shown(connection: psycopg.Connection[Any], name: str) -> object:
    row = connection.execute("select current_setting(%s)", (name,)).fetchone()
    assert row is not None
    return row[0]


if __name__ == "__main__":
    main()
