"""Backfill of many accounts, against the same inserts as plain SQL in the same batches.

Both start from copies of one database, in a process of their own, and alternate. The plain rival neither locks
legacy rows, nor finds open accounts, nor keeps a checkpoint.
"""

from __future__ import annotations

import math
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import stage
from figures import Figure, at_least, at_most, ratio_note
from sqlalchemy import Engine, text
from stage import ACT, USERS, Scale

from walletmigrate import connect
from walletmigrate.backfill import backfill
from walletmigrate.embedded import Server

BATCH = 5_000

_TEMPLATE = "bench_openings"
_COPY = "bench_openings_copy"
_PLAIN = """
with batch as materialized (
    select l.id, l.total_coins from users as l where l.id > :after and l.id <= :upto order by l.id limit :limit
), fresh as (
    insert into wallet.accounts (mapping, key, bucket, currency, state, balance)
    select 'users', b.id::text, 'cash', 'EUR', 'mirrored', b.total_coins from batch as b order by b.id
    returning id, balance
), opening as (
    insert into wallet.transactions (id, debit_account, credit_account, kind, type, amount, credit_balance, currency)
    select nextval('wallet.transaction_ids'), :system, f.id, 'opening', 'opening', f.balance, f.balance, 'EUR'
    from fresh as f
    where f.balance > 0
)
select max(b.id) from batch as b
"""


@dataclass(frozen=True)
class Run:
    """One run over all accounts. ``growth`` is what the client's memory grew by after the first batch, in MiB."""

    seconds: float
    growth: float


def measure(server: Server, scale: Scale) -> list[Figure]:
    """The ratio of the rates, backfill ÷ plain SQL, and the growth of the client's memory."""
    with stage.database(server, _TEMPLATE) as url:
        engine = stage.application(url)
        stage.make_users(engine, USERS, scale.accounts)
        stage.install_ledger(url, "dual_write")
        stage.settle(engine)
        engine.dispose()
        runs: list[tuple[Run, Run]] = []
        for number in range(scale.rounds(full=3, quick=2)):
            order = (plain_run, backfill_run) if number % 2 else (backfill_run, plain_run)
            found = {each: _on_copy(server, each, scale.accounts) for each in order}
            runs.append((found[backfill_run], found[plain_run]))
    rates = [[scale.accounts / run.seconds for run in column] for column in zip(*runs, strict=True)]
    return [
        Figure(
            "openings.rate",
            f"backfill of {scale.accounts:,} accounts",
            tuple(a / b for a, b in zip(*rates, strict=True)),
            "× the plain rate",
            at_least(0.60),
            ratio_note(rates[0], rates[1], "accounts a second"),
        ),
        Figure(
            "openings.memory",
            "backfill: growth of client memory",
            tuple(run.growth for run, _ in runs),
            "MiB",
            at_most(4.0),
            "resident, from the first batch to the highest",
        ),
    ]


def _on_copy(server: Server, run: Callable[[str], Run], accounts: int) -> Run:
    """Run on a fresh copy, in a fresh process: its memory tells of this run alone."""
    url = server.create_database(_COPY, _TEMPLATE)
    engine = stage.application(url)
    try:
        stage.checkpoint(engine)
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            found = pool.submit(run, url).result()
        _check(engine, accounts)
        return found
    finally:
        engine.dispose()
        server.drop_database(_COPY)


def _check(engine: Engine, accounts: int) -> None:
    stage.check_mirrored(engine, accounts)
    openings = stage.count(engine, "select count(*) from wallet.transactions where kind = 'opening'")
    if openings != accounts:
        raise RuntimeError(f"{openings} openings for {accounts} accounts")


def backfill_run(url: str) -> Run:
    """The product's backfill, as the command line runs it."""
    engine = connect.engine(url, application_name="walletmigrate-bench")
    settings = stage.settings_of()
    memory: list[float] = []
    started = time.perf_counter()
    backfill(
        engine,
        settings,
        settings.mapping(None),
        ACT,
        batch_size=BATCH,
        rate=math.inf,
        progress=lambda _job: memory.append(resident()),
    )
    seconds = time.perf_counter() - started
    engine.dispose()
    return Run(seconds, max(memory) - memory[0])


def plain_run(url: str) -> Run:
    """The same rows by one statement a batch, each committed."""
    started = time.perf_counter()
    plain_span(url, 0, None)
    return Run(time.perf_counter() - started, 0.0)


def plain_span(url: str, after: int, upto: int | None) -> None:
    """The rows with after < id <= upto, by one statement a batch."""
    engine = connect.engine(url, application_name="walletmigrate-bench")
    statement = text(_PLAIN)
    with engine.begin() as connection:
        system = connection.scalar(
            text("select id from wallet.system_accounts where name = 'opening' and currency = 'EUR'")
        )
    last: int | None = after
    while last is not None:
        with engine.begin() as connection:
            values = {"after": last, "upto": upto or 2**62, "limit": BATCH, "system": system}
            last = connection.scalar(statement, values)
    engine.dispose()


def resident() -> float:
    """This process's resident memory in MiB; where the system does not tell, its highest so far."""
    pages = Path("/proc/self/statm")
    if pages.exists():
        return int(pages.read_text().split()[1]) * resource.getpagesize() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
