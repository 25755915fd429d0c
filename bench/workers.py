"""Two workers against one, beside plain SQL from two connections against one; and what a backfill costs others.

The workers' processes stand ready before the clock starts, on both sides.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import random
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, wait
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles

import stage
from figures import Figure, Target, at_least, at_most, ratio_note
from openings import BATCH, plain_span
from sqlalchemy import Engine
from stage import ACT, AMOUNT, USERS, Scale

from walletmigrate import connect
from walletmigrate.adapter import LegacyBalanceAdapter
from walletmigrate.backfill import backfill
from walletmigrate.config import ThrottleSettings
from walletmigrate.embedded import Server
from walletmigrate.flags import DUAL_WRITE, StaticSource
from walletmigrate.job_options import PACE

GATE = "WALLETMIGRATE_BENCH_GATE"

LOOK = 1.5
"""Seconds in which the throttle, which looks once a second, has seen that the gate was opened or closed."""

_DONE = "select items_done from wallet.jobs"
_SIZE = "select coalesce(sum(done) / nullif(count(*), 0), 0) from wallet.job_batches where state = 'done'"

_TEMPLATE = "bench_workers"
_COPY = "bench_workers_copy"


def measure(server: Server, scale: Scale) -> list[Figure]:
    """The gain of a second worker ÷ plain SQL's, and p99 of adapter writes with a backfill ÷ without."""
    with stage.database(server, _TEMPLATE) as url:
        engine = stage.application(url)
        stage.make_users(engine, USERS, scale.accounts)
        stage.install_ledger(url, "dual_write")
        stage.settle(engine)
        engine.dispose()
        gains = [_round(server, scale.accounts) for _ in range(scale.rounds(full=3, quick=2))]
    job, plain = zip(*gains, strict=True)
    return [
        Figure(
            "workers.gain",
            "backfill: gain of a second worker",
            tuple(a / b for a, b in gains),
            "× plain SQL's gain",
            at_least(0.90),
            f"medians: job ×{sorted(job)[len(job) // 2]:.2f}, plain SQL ×{sorted(plain)[len(plain) // 2]:.2f}",
        ),
        _alongside(server, scale, None, int(PACE), at_most(1.5)),
        _alongside(server, scale, math.inf, 120_000, at_most(1.5, binding=False)),
    ]


def _round(server: Server, accounts: int) -> tuple[float, float]:
    seconds = {(run, workers): _timed(server, run, workers, accounts) for workers in (1, 2) for run in ("job", "plain")}
    return seconds["job", 1] / seconds["job", 2], seconds["plain", 1] / seconds["plain", 2]


def _timed(server: Server, run: str, workers: int, accounts: int) -> float:
    url = server.create_database(_COPY, _TEMPLATE)
    engine = stage.application(url)
    try:
        stage.checkpoint(engine)
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            wait([pool.submit(time.sleep, 1) for _ in range(workers)])
            wait([pool.submit(warm) for _ in range(workers)])
            began = time.perf_counter()
            if run == "plain":
                bounds = [accounts * number // workers for number in range(workers + 1)]
                parts = [pool.submit(plain_span, url, *span) for span in pairwise(bounds)]
                for part in parts:
                    part.result()
            else:
                settings = stage.settings_of()
                plain = connect.engine(url, application_name="walletmigrate-bench")
                backfill(
                    plain,
                    settings,
                    settings.mapping(None),
                    ACT,
                    batch_size=BATCH,
                    rate=math.inf,
                    executor=pool,
                    workers=workers,
                )
                plain.dispose()
            seconds = time.perf_counter() - began
        stage.check_mirrored(engine, accounts)
        return seconds
    finally:
        engine.dispose()
        server.drop_database(_COPY)


def warm() -> None:
    """Import what the work needs, in a worker."""
    time.sleep(0.5)


def _alongside(server: Server, scale: Scale, rate: float | None, fastest: int, target: Target) -> Figure:
    """Adapter writes with a backfill at this rate running and standing still, in turns.

    ``fastest``: accounts a second that it does not pass on any machine, so that there are always some left.
    """
    rounds, seconds = scale.rounds(full=16, quick=4), 2.0
    samples: list[float] = []
    notes: tuple[list[float], list[float]] = ([], [])
    rates: list[float] = []
    with stage.database(server, "bench_alongside") as url, tempfile.TemporaryDirectory() as folder:
        engine = stage.application(url)
        rows = int(fastest * rounds * (seconds + LOOK) * 1.2)
        stage.make_users(engine, USERS, rows)
        stage.install_ledger(url, "dual_write")
        stage.settle(engine)
        gate = Path(folder) / "gate"
        gate.touch()
        os.environ[GATE] = str(gate)
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            running = pool.submit(throttled, url, rate)
            _written(engine, rows, seconds)
            for _ in range(rounds):
                gate.unlink()
                time.sleep(LOOK)
                before = stage.count(engine, _DONE)
                with_job = _written(engine, rows, seconds)
                rates.append((stage.count(engine, _DONE) - before) / seconds)
                gate.touch()
                time.sleep(LOOK)
                without = _written(engine, rows, seconds)
                samples.append(with_job / without)
                notes[0].append(with_job * 1e3)
                notes[1].append(without * 1e3)
            if running.done() or not min(rates):
                told = ", ".join(f"{rate:,.0f}" for rate in rates)
                raise RuntimeError(
                    f"the backfill did not run all the time that was measured: {told} accounts a second"
                    + (", and it has ended" if running.done() else "")
                )
            with engine.begin() as connection:
                connection.exec_driver_sql("update wallet.jobs set state = 'paused' where state = 'running'")
            size = stage.count(engine, _SIZE)
            running.result()
        engine.dispose()
    return Figure(
        f"workers.alongside.{'defaults' if rate is None else 'fastest'}",
        f"adapter writes, p99 with a backfill {'as it is by default' if rate is None else 'as fast as it goes'}",
        tuple(samples),
        "× without",
        target,
        ratio_note(*notes, f"ms; {median(rates):,.0f} accounts a second, {size:,} in a batch"),
    )


def _written(engine: Engine, rows: int, seconds: float) -> float:
    """The 99th percentile of the seconds that a credit with its commit takes."""
    adapter = LegacyBalanceAdapter(stage.settings_of(), StaticSource({DUAL_WRITE: True}))
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        with engine.begin() as connection:
            adapter.credit(connection, random.randint(1, rows), AMOUNT, type="bench")
        taken.append(time.perf_counter() - began)
    return quantiles(taken, n=100)[98]


def quiet() -> bool | str:
    """The backfill's own check: it stands still as long as the gate's file is there."""
    return "the gate is closed" if Path(os.environ[GATE]).exists() else True


def throttled(url: str, rate: float | None) -> str:
    """A backfill at this rate, in a process of its own."""
    engine = connect.engine(url, application_name="walletmigrate-bench")
    settings = stage.settings_of().model_copy(update={"throttle": ThrottleSettings(check="python:workers:quiet")})
    state = backfill(engine, settings, settings.mapping(None), ACT, rate=rate).state
    engine.dispose()
    return state
