"""Eight client processes: the adapter against a dual-write written by hand, and writes past it against a bare UPDATE.

The processes live through all rounds, each with an engine of its own, and take turns together: all run one
variant for some seconds, then all the other.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from multiprocessing.connection import Connection as Pipe
from pathlib import Path

import handwritten
import stage
from figures import Figure, at_least, ratio_note
from prometheus_client import CollectorRegistry
from sqlalchemy import Engine, Table, bindparam, update
from sqlalchemy.orm import Session
from stage import AMOUNT, BARE, USERS, Scale

from walletmigrate import LegacyBalanceAdapter
from walletmigrate.embedded import Server
from walletmigrate.flag_sources import FileSource
from walletmigrate.observe import PrometheusObserver

ROWS = 10_000
CLIENTS = 8
WARM_UP = 50
RIVALS = (
    ("adapter.orm", "hand.orm"),
    ("adapter.core", "hand.core"),
    ("bare.core", "hand.core"),
    ("past.core", "bare.core"),
)
"""Adapter and hand-written, on a Session and on a Connection; what bounds any dual-write through Core; and an UPDATE of
the fenced column, of accounts that the ledger does not have."""

Call = Callable[[int, str], object]
"""``call(key, idempotency_key)``, in a transaction of its own."""


@dataclass(frozen=True)
class Task:
    """Run a variant for some seconds."""

    variant: str
    seconds: float


def measure(server: Server, scale: Scale) -> list[Figure]:
    """Throughput ratios, adapter ÷ hand-written."""
    seconds = 2.0 if scale.quick else 8.0
    rounds = scale.rounds(full=7, quick=2)
    found: dict[tuple[str, str], list[tuple[float, float]]] = {pair: [] for pair in RIVALS}
    with tempfile.TemporaryDirectory() as folder, stage.database(server, "bench_crowd") as url:
        engine = stage.application(url)
        try:
            _prepare(engine, url)
            flags = stage.flag_file(Path(folder), on=True)
            with _workers(url, flags) as pipes:
                for variant in {variant for pair in RIVALS for variant in pair}:
                    _together(pipes, Task(variant, 0.5))
                for number in range(rounds):
                    for pair in RIVALS:
                        made = {}
                        for variant in reversed(pair) if number % 2 else pair:
                            stage.checkpoint(engine)
                            made[variant] = _together(pipes, Task(variant, seconds))
                        found[pair].append((made[pair[0]], made[pair[1]]))
            _check(engine)
        finally:
            engine.dispose()
    return [_figure(subject, runs) for (subject, _), runs in found.items()]


def _prepare(engine: Engine, url: str) -> None:
    for table in (USERS, BARE):
        stage.make_users(engine, table, 2 * ROWS)
    stage.install_ledger(url, "dual_write")
    stage.mirror(engine, ROWS)
    handwritten.make(engine, ROWS)
    stage.settle(engine)


def _check(engine: Engine) -> None:
    stage.check_mirrored(engine, ROWS)
    moved = f"select (sum(total_coins - 1000) / {AMOUNT})::bigint from users where id > {ROWS}"
    if stage.count(engine, "select count(*) from wallet.bypasses") != stage.count(engine, moved):
        raise RuntimeError("not every write past the adapter is on record: the figures mean nothing")
    if wrong := handwritten.differing(engine):
        raise RuntimeError(f"the hand-written dual-write got {wrong} accounts wrong")


def _figure(subject: str, runs: list[tuple[float, float]]) -> Figure:
    name, what, target = {
        "adapter.orm": ("crowd.hand.orm", "against a dual-write by hand, ORM", at_least(2.5)),
        "adapter.core": ("crowd.hand.core", "against a dual-write by hand, Core", at_least(2.5)),
        "bare.core": ("crowd.bound", "a bare UPDATE against a dual-write by hand, Core", at_least(2.5, binding=False)),
        "past.core": ("crowd.past", "an UPDATE past the adapter against a bare one, Core", at_least(0.65)),
    }[subject]
    first, second = zip(*runs, strict=True)
    return Figure(
        name,
        f"{CLIENTS} clients: {what}",
        tuple(a / b for a, b in runs),
        "× its throughput",
        target,
        ratio_note(first, second, "a second"),
    )


@contextmanager
def _workers(url: str, flags: Path) -> Iterator[list[Pipe]]:
    context = multiprocessing.get_context("spawn")  # a fork would share what the driver has open
    pipes: list[Pipe] = []
    processes = []
    try:
        for number in range(CLIENTS):
            here, there = context.Pipe()
            process = context.Process(target=work, args=(there, url, str(flags), number), daemon=True)
            process.start()
            there.close()
            pipes.append(here)
            processes.append(process)
        yield pipes
    finally:
        for pipe in pipes:
            pipe.close()
        for process in processes:
            process.join(30)
            if process.is_alive():
                process.terminate()


def _together(pipes: list[Pipe], task: Task) -> float:
    """All workers at once: the sum of their calls per second. They start when the last one is ready."""
    answers: list[float] = []
    for order in (task, "go"):
        for pipe in pipes:
            pipe.send(order)
        try:
            answers = [pipe.recv() for pipe in pipes]
        except EOFError as error:
            raise RuntimeError(f"a client process ended during {task.variant}; its words are above") from error
    return sum(answers)


def work(pipe: Pipe, url: str, flags: str, number: int) -> None:
    """A client process: tasks in, calls per second out, until the pipe closes."""
    engine = stage.application(url)
    calls = _calls(engine, flags)
    chosen = random.Random(number)
    numbers = count()
    run = uuid.uuid4().hex[:8]
    try:
        while True:
            task: Task = pipe.recv()
            call = calls[task.variant]
            for _ in range(WARM_UP):
                call(chosen.randrange(ROWS) + 1, f"{run}:{os.getpid():08d}:{next(numbers):018d}")
            pipe.send(0.0)
            pipe.recv()
            done, started = 0, time.perf_counter()
            while (elapsed := time.perf_counter() - started) < task.seconds:
                call(chosen.randrange(ROWS) + 1, f"{run}:{os.getpid():08d}:{next(numbers):018d}")
                done += 1
            pipe.send(done / elapsed)
    except EOFError:
        pass
    finally:
        engine.dispose()


def _calls(engine: Engine, flags: str) -> dict[str, Call]:
    observers = (PrometheusObserver(CollectorRegistry()),)
    adapter = LegacyBalanceAdapter(stage.settings_of(), FileSource(flags), observers=observers)
    return {
        "adapter.core": _on_connection(engine, adapter),
        "adapter.orm": _on_session(engine, adapter),
        "bare.core": _update(engine, BARE),
        "past.core": _update(engine, USERS, behind=ROWS),
        "hand.core": _by_hand(handwritten.core(engine)),
        "hand.orm": _by_hand(handwritten.orm(engine)),
    }


def _on_connection(engine: Engine, adapter: LegacyBalanceAdapter) -> Call:
    def call(key: int, token: str) -> None:
        with engine.begin() as connection:
            adapter.credit(connection, key, AMOUNT, type="deposit", reference=("deposit", key), idempotency_key=token)

    return call


def _on_session(engine: Engine, adapter: LegacyBalanceAdapter) -> Call:
    def call(key: int, token: str) -> None:
        with Session(engine) as session, session.begin():
            adapter.credit(session, key, AMOUNT, type="deposit", reference=("deposit", key), idempotency_key=token)

    return call


def _update(engine: Engine, table: Table, *, behind: int = 0) -> Call:
    """One UPDATE, made once, of the keys ``behind`` another: what is left when nothing is written but the column."""
    raise_balance = update(table).where(table.c.id == bindparam("key")).values(total_coins=table.c.total_coins + AMOUNT)

    def call(key: int, _token: str) -> None:
        with engine.begin() as connection:
            connection.execute(raise_balance, {"key": key + behind})

    return call


def _by_hand(credit: handwritten.Credit) -> Call:
    def call(key: int, token: str) -> None:
        credit(key, AMOUNT, token, uuid.uuid4().hex)

    return call
