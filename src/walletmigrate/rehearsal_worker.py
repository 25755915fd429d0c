"""One worker process of a rehearsal: the application, posting its share of the traffic through the adapter.

A worker owns its accounts: nobody else posts to them, and it posts their transactions in order. So it knows
what every balance must be, and compares each answer of the adapter with that. Now and then it reads a balance,
and it sends a transaction a second time, as a client does that has lost the first answer.
"""

from __future__ import annotations

import random
import signal
import time
import traceback
from array import array
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Final, TypeAlias, TypeVar

import sqlalchemy
from sqlalchemy import Engine, event
from sqlalchemy.exc import DBAPIError

from walletmigrate import connect
from walletmigrate.adapter import LegacyBalanceAdapter
from walletmigrate.config import Settings
from walletmigrate.errors import LedgerNotInstalled, WalletMigrateError
from walletmigrate.flag_sources import FileSource
from walletmigrate.postings import Posting, sqlstate
from walletmigrate.schema import quoted
from walletmigrate.traffic import Transaction

ATTEMPTS: Final = 10
"""How often a transaction is tried when the database says that trying again may help."""

READ_SHARE: Final = 0.25
REPEAT_SHARE: Final = 0.05
BEAT_SECONDS: Final = 0.1
FLAG_SECONDS: Final = 0.05
EXAMPLES: Final = 3

Answer = TypeVar("Answer")

_LIMITS: Final = "set lock_timeout = '20s'; set statement_timeout = '60s'"


@dataclass(frozen=True)
class Assignment:
    """What a worker gets at its start. ``url`` may hold a password: it travels through a pipe, not as argument.

    ``role`` is the database role of the application; ``legs`` are its share of each leg of the rehearsal.
    """

    number: int
    seed: int
    url: str
    role: str
    settings: Settings
    flag_file: Path
    integer_keys: bool
    legs: tuple[tuple[Transaction, ...], ...]


@dataclass(frozen=True, slots=True)
class Run:
    """Order: post the transactions of this leg."""

    leg: int


@dataclass(frozen=True, slots=True)
class Restart:
    """Order: start the application anew, in the midst of its traffic, as a rolling deploy does."""


@dataclass(frozen=True, slots=True)
class Quit:
    """Order: end."""


@dataclass(frozen=True, slots=True)
class Beat:
    """Sign of life: transactions posted so far, restarts so far, and the flag document it decides by."""

    done: int
    restarts: int
    document_id: str


@dataclass(slots=True)
class Tally:
    """What a worker counted in one leg. ``mismatches`` are answers that were not as they must be; ``seconds``
    are the durations of its transactions, commit included; ``modes`` counts postings by mode.
    """

    leg: int
    applied: int = 0
    repeated: int = 0
    retried: int = 0
    mismatches: int = 0
    examples: list[str] = field(default_factory=list)
    modes: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    reads: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    seconds: array[float] = field(default_factory=lambda: array("d"))

    def wrong(self, what: str) -> None:
        """Count an answer that was not as it must be."""
        self.mismatches += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(what)

    def add(self, other: Tally) -> None:
        """Add what another worker counted."""
        self.applied += other.applied
        self.repeated += other.repeated
        self.retried += other.retried
        self.mismatches += other.mismatches
        self.examples = (self.examples + other.examples)[:EXAMPLES]
        for mine, theirs in ((self.modes, other.modes), (self.reads, other.reads)):
            for name, count in theirs.items():
                mine[name] += count
        self.seconds.extend(other.seconds)


@dataclass(frozen=True, slots=True)
class Failed:
    """The worker gave up, and why."""

    what: str
    trace: str


Order: TypeAlias = Run | Restart | Quit
Message: TypeAlias = Beat | Tally | Failed


def work(assignment: Assignment, pipe: Pipe[Message, Order]) -> None:
    """Run a worker until it is told to quit, or its parent is gone."""
    # Ctrl-C on a terminal reaches every process; the parent decides what it means. It was blocked until here.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    engine = _engine(assignment)
    worker = Worker(assignment, pipe, engine)
    try:
        worker.serve()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except Exception as error:  # noqa: BLE001 (whatever it is, the parent must hear of it)
        words = " ".join(str(error).partition("\n")[0].split())
        # A trace says where in the code; an error of the library or the database says all by itself.
        trace = "" if isinstance(error, WalletMigrateError | DBAPIError) else traceback.format_exc()
        pipe.send(Failed(f"{worker.place}{type(error).__name__}: {words}", trace))
        raise SystemExit(1) from None
    finally:
        engine.dispose()


class Worker:
    """The application in one process. ``place`` says what it is at."""

    def __init__(self, assignment: Assignment, pipe: Pipe[Message, Order], engine: Engine) -> None:
        self.assignment = assignment
        self.place = ""
        self._engine = engine
        self._pipe = pipe
        self._dice = random.Random(f"{assignment.seed} worker {assignment.number}")
        self._balances: defaultdict[str, Decimal] = defaultdict(Decimal)
        self._keyed: list[Transaction] = []
        self._done = 0
        self._restarts = 0
        self._next_beat = 0.0
        self._adapter = self._new_adapter()

    def serve(self) -> None:
        """Follow orders until told to quit."""
        running = True
        while running:
            if self._pipe.poll(BEAT_SECONDS):
                running = self._follow(self._pipe.recv())
            self._beat()

    def _follow(self, order: Order) -> bool:
        match order:
            case Run(leg):
                self._pipe.send(self._run(leg))
            case Restart():
                self._restarts += 1
                self._adapter = self._new_adapter()
            case Quit():
                return False
        return True

    def _beat(self) -> None:
        now = time.monotonic()
        if now >= self._next_beat:
            self._next_beat = now + BEAT_SECONDS
            seen = self._adapter.source.snapshot().document_id
            self._pipe.send(Beat(self._done, self._restarts, seen))

    def _new_adapter(self) -> LegacyBalanceAdapter:
        source = FileSource(self.assignment.flag_file, FLAG_SECONDS)
        return LegacyBalanceAdapter(self.assignment.settings, source)

    def _run(self, leg: int) -> Tally:
        tally = Tally(leg)
        for one in self.assignment.legs[leg]:
            if self._pipe.poll():
                self._follow(self._pipe.recv())
            self._beat()
            self._apply(one, tally)
            if self._dice.random() < READ_SHARE:
                self._read(one, tally)
            if self._keyed and self._dice.random() < REPEAT_SHARE:
                self._repeat(self._dice.choice(self._keyed), tally)
        self.place = ""
        self._next_beat = 0.0
        self._beat()
        return tally

    def _apply(self, one: Transaction, tally: Tally) -> None:
        started = time.perf_counter()
        posted = self._post(one, tally)
        tally.seconds.append(time.perf_counter() - started)
        if posted.replayed:
            tally.wrong(f"{self.place}it was posted before")
            return
        tally.applied += 1
        tally.modes[posted.mode] += 1
        self._done += 1
        self._balances[one.account] += one.amount
        if self._restarts:  # before the first restart the ledger was not there to keep the key
            self._keyed.append(one)
        expected = self._balances[one.account]
        for side, balance in (("legacy", posted.legacy_balance), ("ledger", posted.ledger_balance)):
            if balance is not None and balance != expected:
                tally.wrong(f"{self.place}the {side} balance is {balance} after it, and must be {expected}")
        if posted.mismatch or posted.outcome == "ledger_failed":
            tally.wrong(f"{self.place}the ledger did not follow ({posted.outcome})")

    def _repeat(self, one: Transaction, tally: Tally) -> None:
        if self._post(one, tally).replayed:
            tally.repeated += 1
        else:
            tally.wrong(f"{self.place}sent a second time, it was posted a second time")

    def _read(self, one: Transaction, tally: Tally) -> None:
        key, traits = self._key(one.account), {"tenant": one.tenant}
        found = self._again(tally, lambda connection: self._adapter.balance(connection, key, traits=traits))
        tally.reads[found.source] += 1
        expected = self._balances[one.account]
        if found.amount != expected or found.compare == "mismatch":
            tally.wrong(
                f"account {one.account}: read {found.amount} from {found.source} (legacy "
                f"{found.legacy_balance}, ledger {found.ledger_balance}), and it must be {expected}"
            )

    def _post(self, one: Transaction, tally: Tally) -> Posting:
        self.place = f"transaction {one.id} (line {one.line}): "
        post = self._adapter.credit if one.amount > 0 else self._adapter.debit
        return self._again(
            tally,
            lambda connection: post(
                connection,
                self._key(one.account),
                abs(one.amount),
                type=one.type,
                reference=("transaction", one.id),
                idempotency_key=f"tx:{one.id}",
                traits={"tenant": one.tenant},
            ),
        )

    def _again(self, tally: Tally, call: Callable[[sqlalchemy.Connection], Answer]) -> Answer:
        """Call in a transaction of its own, and again when the database asks for that."""
        for _ in range(ATTEMPTS - 1):
            try:
                with self._engine.begin() as connection:
                    return call(connection)
            except LedgerNotInstalled:
                tally.retried += 1
            except DBAPIError as error:
                if not (sqlstate(error).startswith("40") or sqlstate(error) == "55P03"):
                    raise
                tally.retried += 1
        with self._engine.begin() as connection:
            return call(connection)

    def _key(self, account: str) -> int | str:
        return int(account) if self.assignment.integer_keys else account


def _engine(assignment: Assignment) -> Engine:
    """An engine as an application has one; it acts as the application's role, so that grants are rehearsed."""
    made = sqlalchemy.create_engine(
        connect.parsed(assignment.url),
        pool_size=1,
        connect_args={"application_name": f"walletmigrate-rehearse-{assignment.number}"},
    )

    @event.listens_for(made, "connect")
    def _as_application(connection: sqlalchemy.engine.interfaces.DBAPIConnection, _record: object) -> None:
        cursor = connection.cursor()
        cursor.execute(f"{_LIMITS}; set role {quoted(assignment.role)}")
        cursor.close()
        connection.commit()

    return made
