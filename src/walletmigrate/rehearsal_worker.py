"""One worker process of a rehearsal: the application, posting its share of the traffic through the adapter.

A worker owns its accounts: nobody else posts to them, and it posts their transactions in order. So it knows
what every balance must be, and compares each answer of the adapter with that. Now and then it reads a balance,
and it sends a transaction a second time, as a client does that has lost the first answer. Some transactions come
as raw SQL from another connection: each is held back until the account's next posting has taken its snapshot, and
is committed then, so that the posting meets it at the worst moment.
"""

from __future__ import annotations

import decimal
import random
import signal
import time
import traceback
from collections import defaultdict
from collections.abc import Callable
from decimal import Decimal
from multiprocessing.connection import Connection as Pipe
from typing import Final, TypeVar

import sqlalchemy
from sqlalchemy import Engine, event
from sqlalchemy.engine.interfaces import IsolationLevel
from sqlalchemy.exc import DBAPIError

from walletmigrate import connect
from walletmigrate.adapter import LegacyBalanceAdapter
from walletmigrate.errors import LedgerNotInstalled, WalletMigrateError
from walletmigrate.flag_sources import FileSource
from walletmigrate.heartbeat import Heartbeat
from walletmigrate.postings import Posting
from walletmigrate.reads import Balance
from walletmigrate.rehearsal_flags import LateSource
from walletmigrate.rehearsal_messages import Assignment, Beat, Failed, Message, Order, Quit, Restart, Run, Tally
from walletmigrate.rehearsal_metrics import beating, counting
from walletmigrate.rehearsal_raw import RawWriter, is_raw
from walletmigrate.schema import quoted
from walletmigrate.traffic import EXACT, Place, Transaction

ATTEMPTS: Final = 20
"""How often a transaction is tried when the database says that trying again may help."""

READ_SHARE: Final = 0.25
REPEAT_SHARE: Final = 0.05
BEAT_SECONDS: Final = 0.1
FLAG_SECONDS: Final = 0.05

Answer = TypeVar("Answer")

_LIMITS: Final = "set lock_timeout = '20s'; set statement_timeout = '60s'"


def work(assignment: Assignment, pipe: Pipe[Message, Order]) -> None:
    """Run a worker until it is told to quit, or its parent is gone."""
    # Ctrl-C on a terminal reaches every process; the parent decides what it means. It was blocked until here.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    decimal.setcontext(EXACT.copy())
    engine = _engine(assignment, f"walletmigrate-rehearse-{assignment.number}", assignment.isolation)
    other = _engine(assignment, f"rehearsal-job-{assignment.number}", "READ COMMITTED")
    worker = Worker(assignment, pipe, engine, RawWriter(other, assignment.settings.mapping(), assignment.key_type))
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
        other.dispose()


class Worker:
    """The application in one process. ``place`` says what it is at."""

    def __init__(self, assignment: Assignment, pipe: Pipe[Message, Order], engine: Engine, raw: RawWriter) -> None:
        self.assignment = assignment
        self.place = ""
        self._engine = engine
        self._raw = raw
        self._pipe = pipe
        self._dice = random.Random(f"{assignment.seed} worker {assignment.number}")
        self._columns = assignment.settings.mapping().columns
        self._balances: defaultdict[Place, Decimal] = defaultdict(Decimal, assignment.start)
        self._keyed: list[Transaction] = []
        self._held: dict[str, Transaction] = {}
        self._done = 0
        self._restarts = int(assignment.from_leg > 0)
        self._resent = False
        self._next_beat = 0.0
        self._observers = counting(assignment.metrics) if assignment.metrics else ()
        self._heartbeat: Heartbeat | None = None
        self._adapter = self._new_adapter()
        for leg in assignment.legs[: assignment.from_leg]:
            for one in leg:
                self._done += 1
                self._balances[one.account, one.place] += one.amount

    def serve(self) -> None:
        """Follow orders until told to quit."""
        running = True
        while running:
            if self._pipe.poll(BEAT_SECONDS):
                running = self._follow(self._pipe.recv())
            self._beat()

    def _follow(self, order: Order) -> bool:
        match order:
            case Run(leg, seconds):
                self._pipe.send(self._run(leg, seconds))
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
        own = self.assignment
        source = LateSource(FileSource(own.flag_file, FLAG_SECONDS), own.flag_delay)
        if self._observers and self._restarts:  # before the first restart there is no table to beat in
            self._heartbeat = beating(own.settings, own.url, source, self._observers, f"worker {own.number}")
        return LegacyBalanceAdapter(own.settings, source, observers=self._observers)

    def _run(self, leg: int, seconds: float) -> Tally:
        tally, share, began = Tally(leg), self.assignment.legs[leg], time.monotonic()
        self._resent = 0 < self.assignment.from_leg == leg
        for place, one in enumerate(share):
            self._attend(began + seconds * place / len(share))
            held = self._held.pop(one.account, None)
            if is_raw(self.assignment.seed, one):
                if held is not None:
                    self._send_raw(held, tally)
                self._held[one.account] = one
            else:
                self._apply(one, tally, held)
                if self._dice.random() < READ_SHARE and not self._resent:
                    self._read(one, tally)
            if self._keyed and self._dice.random() < REPEAT_SHARE:
                self._repeat(self._dice.choice(self._keyed), tally)
        for one in self._held.values():
            self._send_raw(one, tally)
        self._held.clear()
        self.place = ""
        self._next_beat = 0.0
        self._beat()
        return tally

    def _attend(self, until: float) -> None:
        """Give signs of life and follow orders, at least once, until that time of the monotonic clock."""
        waiting = True
        while waiting:
            left = until - time.monotonic()
            waiting = left > 0
            if self._pipe.poll(max(0.0, min(left, BEAT_SECONDS))):
                self._follow(self._pipe.recv())
            self._beat()

    def _apply(self, one: Transaction, tally: Tally, held: Transaction | None = None) -> None:
        started = time.perf_counter()
        posted = self._post(one, tally) if held is None else self._post_overtaken(one, held, tally)
        if held is None:
            tally.seconds.append(time.perf_counter() - started)
        tally.replayed += posted.replayed
        if posted.replayed and not self._resent:
            tally.wrong(f"{self.place}it was posted before")
            return
        tally.modes[posted.mode] += 1
        self._count(one, tally)
        if self._restarts:  # before the first restart the ledger was not there to keep the key
            self._keyed.append(one)
        expected = self._balances[one.account, one.place]
        for side, balance in (("legacy", posted.legacy_balance), ("ledger", posted.ledger_balance)):
            if balance is not None and balance != expected:
                tally.wrong(f"{self.place}the {side} balance is {balance} after it, and must be {expected}")
        if posted.mismatch or posted.outcome == "ledger_failed":
            tally.wrong(f"{self.place}the ledger did not follow ({posted.outcome})")

    def _count(self, one: Transaction, tally: Tally) -> None:
        tally.applied += 1
        self._done += 1
        self._balances[one.account, one.place] += one.amount

    def _post_overtaken(self, one: Transaction, held: Transaction, tally: Tally) -> Posting:
        """Post in a transaction that took its snapshot before a raw write to the same account was committed."""
        written = False
        if not self._resent:  # what is sent again may stand in the database already: a read would see the future
            try:
                with self._engine.begin() as connection:
                    self._compare(one, self._balance(connection, one), tally)
                    self.place = _place(held)
                    written = self._raw.write(held)
                    if written:
                        self._count(held, tally)
                        return self._call(connection, one)
            except (LedgerNotInstalled, DBAPIError) as error:
                _retry(error, tally)
        if not written:
            self._send_raw(held, tally)
        return self._post(one, tally)

    def _send_raw(self, one: Transaction, tally: Tally) -> None:
        """Raw SQL; through the adapter if the fence rejects it, as a job does that has been moved to it."""
        self.place = _place(one)
        if self._raw.write(one):
            self._count(one, tally)
        else:
            tally.rejected += 1
            self._apply(one, tally)

    def _repeat(self, one: Transaction, tally: Tally) -> None:
        if self._post(one, tally).replayed:
            tally.replayed += 1
        else:
            tally.wrong(f"{self.place}sent a second time, it was posted a second time")

    def _read(self, one: Transaction, tally: Tally) -> None:
        found = self._again(tally, lambda connection: self._balance(connection, one))
        tally.reads[found.source] += 1
        self._compare(one, found, tally)

    def _compare(self, one: Transaction, found: Balance, tally: Tally) -> None:
        expected = self._balances[one.account, one.place]
        if found.amount != expected or found.compare == "mismatch":
            tally.wrong(
                f"account {one.account}: read {found.amount} from {found.source} (legacy "
                f"{found.legacy_balance}, ledger {found.ledger_balance}), and it must be {expected}"
            )

    def _balance(self, connection: sqlalchemy.Connection, one: Transaction) -> Balance:
        column = self._columns[one.place]
        return self._adapter.balance(
            connection,
            self._key(one.account),
            bucket=column.bucket,
            currency=column.currency,
            traits=self._traits(one),
        )

    def _post(self, one: Transaction, tally: Tally) -> Posting:
        return self._again(tally, lambda connection: self._call(connection, one))

    def _call(self, connection: sqlalchemy.Connection, one: Transaction) -> Posting:
        self.place = _place(one)
        column = self._columns[one.place]
        post = self._adapter.credit if one.amount > 0 else self._adapter.debit
        return post(
            connection,
            self._key(one.account),
            abs(one.amount),
            type=one.type,
            reference=("transaction", one.id),
            idempotency_key=f"tx:{one.id}",
            bucket=column.bucket,
            currency=column.currency,
            traits=self._traits(one),
        )

    def _again(self, tally: Tally, call: Callable[[sqlalchemy.Connection], Answer]) -> Answer:
        """Call in a transaction of its own, and again when the database asks for that."""
        for _ in range(ATTEMPTS - 1):
            try:
                with self._engine.begin() as connection:
                    return call(connection)
            except (LedgerNotInstalled, DBAPIError) as error:
                _retry(error, tally)
        with self._engine.begin() as connection:
            return call(connection)

    def _key(self, account: str) -> int | str:
        return int(account) if self.assignment.key_type == "integer" else account

    def _traits(self, one: Transaction) -> dict[str, str]:
        return {self.assignment.trait: one.tenant} if one.tenant else {}


def _place(one: Transaction) -> str:
    return f"transaction {one.id} (line {one.line}): "


def _retry(error: LedgerNotInstalled | DBAPIError, tally: Tally) -> None:
    """Count a failure after which trying again may help; raise any other."""
    if isinstance(error, DBAPIError):
        if not connect.conflicted(error):
            raise error
        tally.serialization += connect.sqlstate(error) == "40001"
    tally.retried += 1


def _engine(assignment: Assignment, name: str, isolation: IsolationLevel) -> Engine:
    """An engine as an application has one; it acts as the application's role, so that grants are rehearsed."""
    made = sqlalchemy.create_engine(
        connect.parsed(assignment.url),
        pool_size=1,
        isolation_level=isolation,
        connect_args={"application_name": name},
    )

    @event.listens_for(made, "connect")
    def _as_application(connection: sqlalchemy.engine.interfaces.DBAPIConnection, _record: object) -> None:
        cursor = connection.cursor()
        cursor.execute(f"{_LIMITS}; set role {quoted(assignment.role)}")
        cursor.close()
        connection.commit()

    return made
