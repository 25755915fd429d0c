"""One client through the adapter, against the statement that the application ran before.

Each comparison is paired: a small block of bare calls and a block of the adapter's stand next to each other, in
alternate order, and give one ratio. All comparisons take turns in every round.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from statistics import median

import stage
from figures import Figure, Target, at_most, ratio_note
from prometheus_client import CollectorRegistry
from sqlalchemy import Engine, Table, bindparam, select, text, update
from sqlalchemy.orm import DeclarativeBase, Session
from stage import AMOUNT, BARE, USERS, Scale

from walletmigrate import Balance, LegacyBalanceAdapter, Posting
from walletmigrate.embedded import Server
from walletmigrate.flag_sources import FileSource
from walletmigrate.observe import PrometheusObserver

ROWS = 5_000
"""Keys of each kind: 1 … ROWS mirrored, then as many stale, then as many without an account."""

BLOCK = 20
"""Calls between two looks at the clock."""

Call = Callable[[int], object]


@dataclass(frozen=True)
class Pair:
    """A bare call, the adapter's call in its place, and what the adapter's has to answer."""

    name: str
    what: str
    bare: Call
    subject: Call
    first_key: int
    expected: str
    target: Target | None
    ratios: list[float] = field(default_factory=list)
    bare_seconds: list[float] = field(default_factory=list)
    subject_seconds: list[float] = field(default_factory=list)


class _Bare(DeclarativeBase):
    metadata = stage.metadata


class BareUser(_Bare):
    """The bare table as an ORM class."""

    __table__ = BARE


def measure(server: Server, scale: Scale) -> list[Figure]:
    """Time ratios, adapter ÷ bare, of whole transactions including their commit."""
    with (
        tempfile.TemporaryDirectory() as folder,
        stage.database(server, "bench_client") as url,
        stage.database(server, "bench_plain") as plain_url,
    ):
        engine, plain = stage.application(url), stage.application(plain_url)
        try:
            _prepare(engine, plain, url)
            pairs = _pairs(engine, plain, Path(folder))
            _run(pairs, scale.rounds(full=100, quick=15))
            stage.check_mirrored(engine, ROWS)
        finally:
            engine.dispose()
            plain.dispose()
    return [_figure(pair) for pair in pairs]


def _prepare(engine: Engine, plain: Engine, url: str) -> None:
    for each in (engine, plain):
        for table in (USERS, BARE):
            stage.make_users(each, table, 3 * ROWS)
    stage.install_ledger(url, "read_ledger")
    stage.mirror(engine, 2 * ROWS)
    with engine.begin() as connection:
        connection.execute(text("update wallet.accounts set state = 'stale' where key::bigint > :n"), {"n": ROWS})
    for each in (engine, plain):
        stage.settle(each)


def _pairs(engine: Engine, plain: Engine, folder: Path) -> list[Pair]:
    on, off = (FileSource(stage.flag_file(folder, on=each)) for each in (True, False))
    observers = (PrometheusObserver(CollectorRegistry()),)
    shadow, strict = (
        LegacyBalanceAdapter(stage.settings_of(policy), on, observers=observers) for policy in ("shadow", "strict")
    )
    idle = LegacyBalanceAdapter(stage.settings_of(), off, observers=observers)
    bare, once, orm, read = bare_update(engine, BARE), _update_once(engine, BARE), _orm_update(engine), _select(engine)
    stale, absent = ROWS + 1, 2 * ROWS + 1
    return [
        Pair("dual_write.shadow", "dual-write, shadow", bare, _credit(engine, shadow), 1, "dual_write", at_most(1.5)),
        Pair("dual_write.strict", "dual-write, strict", bare, _credit(engine, strict), 1, "dual_write", at_most(1.5)),
        Pair("flags_off", "flags off", bare, _credit(engine, idle), absent, "legacy", at_most(1.2)),
        Pair("dual_write.once", "dual-write, bare made once", once, _credit(engine, shadow), 1, "dual_write", None),
        Pair("flags_off.once", "flags off, bare made once", once, _credit(engine, idle), absent, "legacy", None),
        Pair("flags_off.stale", "flags off, account stale", bare, _credit(engine, idle), stale, "legacy", None),
        Pair("flags_off.keyless", "flags off, no key", bare, _keyless(engine, idle), absent, "legacy", None),
        Pair(
            "not_installed",
            "ledger not installed",
            bare_update(plain, BARE),
            _credit(plain, shadow),
            1,
            "legacy",
            at_most(1.2, binding=False),
        ),
        Pair("read", "ledger read, compared", read, _balance(engine, shadow), 1, "match", at_most(1.3)),
        Pair("session.shadow", "dual-write, ORM Session", orm, _session(engine, shadow), 1, "dual_write", None),
    ]


def _run(pairs: Sequence[Pair], rounds: int) -> None:
    chosen = random.Random(1)
    for pair in pairs:
        _check(pair)
        # The driver prepares a statement at its sixth run, and the server settles on a plan at another sixth.
        for call in (pair.bare, pair.subject):
            block(call, _keys(chosen, pair))
    for number in range(rounds):
        for pair in pairs:
            keys = _keys(chosen, pair)
            if number % 2:
                subject, bare = block(pair.subject, keys), block(pair.bare, keys)
            else:
                bare, subject = block(pair.bare, keys), block(pair.subject, keys)
            pair.bare_seconds.append(bare)
            pair.subject_seconds.append(subject)
            pair.ratios.append(subject / bare)


def _keys(chosen: random.Random, pair: Pair) -> list[int]:
    return [pair.first_key + chosen.randrange(ROWS) for _ in range(BLOCK)]


def block(call: Call, keys: Sequence[int]) -> float:
    """Seconds per call, over the calls for these keys."""
    started = time.perf_counter()
    for key in keys:
        call(key)
    return (time.perf_counter() - started) / len(keys)


def _check(pair: Pair) -> None:
    """Raise RuntimeError unless the adapter does what the figure's name says."""
    found = pair.subject(pair.first_key)
    said: str | None = None
    if isinstance(found, Posting):
        said = found.mode
    elif isinstance(found, Balance) and found.source == "ledger":
        said = found.compare
    if said != pair.expected:
        raise RuntimeError(f"{pair.what}: the adapter answered {said}, not {pair.expected}")


def _figure(pair: Pair) -> Figure:
    subject, bare = ([value * 1e6 for value in values] for values in (pair.subject_seconds, pair.bare_seconds))
    return Figure(
        f"client.{pair.name}",
        f"one client: {pair.what}",
        tuple(pair.ratios),
        "× the bare time",
        pair.target,
        f"{ratio_note(subject, bare, 'µs a call')}, {median(subject) - median(bare):+,.0f} µs",
    )


def bare_update(engine: Engine, table: Table) -> Call:
    """The update as an application writes it, where it is needed, in a transaction of its own."""

    def call(key: int) -> None:
        with engine.begin() as connection:
            connection.execute(update(table).where(table.c.id == key).values(total_coins=table.c.total_coins + AMOUNT))

    return call


def _update_once(engine: Engine, table: Table) -> Call:
    """The same by a statement that was made once for all calls: the least that SQLAlchemy can take."""
    statement = (
        update(table)
        .where(table.c.id == bindparam("key"))
        .values(total_coins=table.c.total_coins + bindparam("amount", type_=table.c.total_coins.type))
    )

    def call(key: int) -> None:
        with engine.begin() as connection:
            connection.execute(statement, {"key": key, "amount": AMOUNT})

    return call


def _orm_update(engine: Engine) -> Call:
    def call(key: int) -> None:
        with Session(engine) as session, session.begin():
            session.execute(
                update(BareUser)
                .where(BARE.c.id == key)
                .values(total_coins=BARE.c.total_coins + AMOUNT)
                .execution_options(synchronize_session=False)
            )

    return call


def _select(engine: Engine) -> Call:
    statement = select(BARE.c.total_coins).where(BARE.c.id == bindparam("key"))

    def call(key: int) -> object:
        with engine.begin() as connection:
            return connection.execute(statement, {"key": key}).scalar_one()

    return call


def _balance(engine: Engine, adapter: LegacyBalanceAdapter) -> Call:
    def call(key: int) -> Balance:
        with engine.begin() as connection:
            return adapter.balance(connection, key)

    return call


_numbers = count()


def new_key() -> str:
    """An idempotency key of 36 characters that was never used."""
    return f"deposit:{next(_numbers):028d}"


def _credit(engine: Engine, adapter: LegacyBalanceAdapter) -> Call:
    def call(key: int) -> Posting:
        with engine.begin() as connection:
            return adapter.credit(
                connection, key, AMOUNT, type="deposit", reference=("deposit", key), idempotency_key=new_key()
            )

    return call


def _keyless(engine: Engine, adapter: LegacyBalanceAdapter) -> Call:
    def call(key: int) -> Posting:
        with engine.begin() as connection:
            return adapter.credit(connection, key, AMOUNT, type="deposit", reference=("deposit", key))

    return call


def _session(engine: Engine, adapter: LegacyBalanceAdapter) -> Call:
    def call(key: int) -> Posting:
        with Session(engine) as session, session.begin():
            return adapter.credit(
                session, key, AMOUNT, type="deposit", reference=("deposit", key), idempotency_key=new_key()
            )

    return call
