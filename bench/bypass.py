"""Writes past the adapter: what the fence and its catalogue cost a bare UPDATE.

With one client as applications write: through SQLAlchemy, in a transaction of its own (`crowd` has eight). And, for
information, with 16 clients inside the database, where nothing but the database's own work is left to compare with.
"""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

import stage
from client import BLOCK, bare_update, block
from figures import Figure, at_least, ratio_note
from pgbench import CLIENTS, in_turns
from sqlalchemy import Engine, text
from stage import AMOUNT, BARE, USERS, Scale

from walletmigrate.embedded import Server

ROWS = 100_000
HALF = ROWS // 2

_WRITES = {
    "absent": ("of accounts that the ledger does not have", USERS.name, HALF + 1, ROWS),
    "stale": ("of accounts that are stale", USERS.name, 1, HALF),
}


def measure(server: Server, scale: Scale) -> list[Figure]:
    """Throughput ratios, fenced ÷ bare. Raises RuntimeError unless every write past the adapter is on record."""
    seconds = 4 if scale.quick else 8
    pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in _WRITES}
    alone: dict[str, list[tuple[float, float]]] = {name: [] for name in _WRITES}
    with stage.database(server, "bench_bypass") as url, tempfile.TemporaryDirectory() as name:
        engine, folder = stage.application(url), Path(name)
        try:
            for table in (USERS, BARE):
                stage.make_users(engine, table, ROWS)
            stage.install_ledger(url, "dual_write")
            stage.mirror(engine, HALF)
            with engine.begin() as connection:
                connection.execute(text("update wallet.accounts set state = 'stale'"))
            stage.settle(engine)
            (folder / "bare").write_text(_script(BARE.name, 1, ROWS))
            for kind, (_, table_name, low, high) in _WRITES.items():
                (folder / kind).write_text(_script(table_name, low, high))
            for _ in range(scale.rounds(full=5, quick=2)):
                for kind in _WRITES:
                    pairs[kind].append(_round(server, url, folder, kind, seconds))
            for number in range(scale.rounds(full=100, quick=15)):
                for kind, (_, _, low, high) in _WRITES.items():
                    alone[kind].append(_one_client(engine, low, high, number))
            written = stage.count(engine, "select count(*) from wallet.bypasses")
            moved = f"select (sum(total_coins - 1000) / {AMOUNT})::bigint from users"
            if written != stage.count(engine, moved):
                raise RuntimeError("not every write past the adapter is on record: the figures mean nothing")
        finally:
            engine.dispose()
    crowd = [_figure(f"bypass.{kind}", CLIENTS, _WRITES[kind][0], pairs[kind]) for kind in _WRITES]
    return [*crowd, *(_figure(f"bypass.client.{kind}", 1, _WRITES[kind][0], alone[kind]) for kind in _WRITES)]


def _round(server: Server, url: str, folder: Path, kind: str, seconds: int) -> tuple[float, float]:
    bare, fenced = in_turns(server, url, (folder / "bare", folder / kind), seconds)
    return fenced.per_second, bare.per_second


def _one_client(engine: Engine, low: int, high: int, number: int) -> tuple[float, float]:
    chosen = random.Random(number)
    keys = [chosen.randint(low, high) for _ in range(BLOCK)]
    found: dict[str, float] = {}
    for table in (USERS, BARE) if number % 2 else (BARE, USERS):
        found[table.name] = 1 / block(bare_update(engine, table), keys)
    return found[USERS.name], found[BARE.name]


def _script(table: str, low: int, high: int) -> str:
    update = f"update {table} set total_coins = total_coins + {AMOUNT} where id = :id;"
    return f"\\set id random({low}, {high})\n{update}\n"


def _figure(name: str, clients: int, what: str, pairs: list[tuple[float, float]]) -> Figure:
    fenced, bare = zip(*pairs, strict=True)
    return Figure(
        name,
        f"{clients} client{'s' if clients > 1 else ''} past the adapter: updates {what}",
        tuple(a / b for a, b in pairs),
        "× the bare throughput",
        at_least(0.65, binding=clients == 1),
        ratio_note(fenced, bare, "a second"),
    )
