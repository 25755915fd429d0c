"""LegacyBalanceAdapter: the one door for every change of a balance.

It writes the legacy column and, as flags, phase and account state allow, the ledger: atomically, in one round
trip, in the caller's transaction. It never commits.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, Unpack

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from walletmigrate import line, observe, standing
from walletmigrate.config import Mapping, Settings, key_text
from walletmigrate.errors import LedgerNotInstalled, UnknownTransaction, UsageError, WalletMigrateError
from walletmigrate.flags import OFF, Decision, FlagSource, Snapshot
from walletmigrate.ledger import Entry, balance_at, history, touched_by
from walletmigrate.legacy import LedgerAppearedError, post_legacy
from walletmigrate.movements import Details, Key, Movement, Prepared, Traits, prepare, transaction_number
from walletmigrate.postings import Calls, Posting, failed, posted, posting, refused, typed
from walletmigrate.reads import Balance, read_balance, read_balances, told
from walletmigrate.sessions import Target, Tell, connection_of, expire, listen, tell_when_committed
from walletmigrate.sites import Site, Sites
from walletmigrate.sources import source_of
from walletmigrate.traits import TraitCache
from walletmigrate.watch import Watch, WatchDetails, Watches


class LegacyBalanceAdapter:
    """Posts to one mapping. Thread-safe; make one per process and share it.

    ``source`` says what the operator wants of each account; ``observers`` hear of every posting and read.
    Every method takes a Session or a Connection first and runs in its transaction or savepoint. Amounts are
    Decimal or int in major units. A refused posting (`errors.PostingRefused`) has written nothing and leaves
    the transaction usable; a database error reaches the caller as SQLAlchemy raises it. With ``reload``,
    balances of loaded objects are read anew at once, not at the next look.
    """

    def __init__(
        self,
        settings: Settings,
        source: FlagSource,
        *,
        mapping: str | None = None,
        observers: Iterable[observe.Observer] = (),
        reload: bool = False,
    ) -> None:
        self.settings = settings
        self.mapping: Mapping = settings.mapping(mapping)
        self.source = source
        self._observers = observe.Observers(observers)
        self._sites = Sites(settings.ledger_schema, self.mapping)
        self._traits = TraitCache(self.mapping)
        self._reload = reload
        self._calls = Calls(settings.ledger_schema, self.mapping)
        self._watches = Watches(self.mapping, _Door(self))
        self._seen: Snapshot | None = None
        self._seen_until = 0.0
        listen()

    @classmethod
    def from_config(
        cls,
        path: Path | str | None = None,
        *,
        mapping: str | None = None,
        source: FlagSource | None = None,
        observers: Iterable[observe.Observer] | None = None,
        reload: bool = False,
    ) -> LegacyBalanceAdapter:
        """Build from walletmigrate.toml. Logs postings and reads unless ``observers`` says otherwise.

        Raises ConfigError, with file, line and fix.
        """
        settings = Settings.load(path)
        heard = (observe.LogObserver(),) if observers is None else observers
        return cls(settings, source or source_of(settings), mapping=mapping, observers=heard, reload=reload)

    def credit(
        self, target: Target, key: Key, amount: Decimal | int, *, type: str, **details: Unpack[Details]
    ) -> Posting:
        """Add to a balance. Raises UnknownAccount, InvalidAmount, AmountOverflow and the other refusals."""
        return self._one(target, Movement(operation="credit", key=key, amount=amount, type=type, **details))

    def debit(
        self, target: Target, key: Key, amount: Decimal | int, *, type: str, **details: Unpack[Details]
    ) -> Posting:
        """Take from a balance. Raises InsufficientFunds below the column's floor."""
        return self._one(target, Movement(operation="debit", key=key, amount=amount, type=type, **details))

    def transfer(
        self,
        target: Target,
        payer: Key,
        payee: Key,
        amount: Decimal | int,
        *,
        type: str,
        **details: Unpack[Details],
    ) -> Posting:
        """Move money between two accounts of the mapping. Raises SelfTransfer when they are one."""
        movement = Movement(operation="transfer", key=payer, payee=payee, amount=amount, type=type, **details)
        return self._one(target, movement)

    def set_balance(self, target: Target, key: Key, balance: Decimal | int, **details: Unpack[Details]) -> Posting:
        """Bring a balance to a value, as an administrator with an actor and a reason. The floor does not bind.

        Where the ledger is installed it leaves a row in the audit log, in every mode, also where legacy alone is
        written. A replay, a refusal and a balance that has the value already change nothing, and leave none.
        """
        return self._one(target, Movement(operation="set_balance", key=key, amount=balance, **details))

    def reverse(self, target: Target, transaction_id: int, **details: Unpack[Details]) -> Posting:
        """Undo one transaction by its opposite, at most once: a second call replays the first one's result. It is its
        own idempotency key, and takes no other.

        The first leaves a row in the audit log, in every mode, under ``actor``, or the database's user without one.
        """
        return self._one(target, Movement(operation="reverse", transaction_id=transaction_id, **details))

    def open_account(
        self, target: Target, key: Key, *, traits: Traits | None = None, correlation_id: str | None = None
    ) -> tuple[Posting, ...]:
        """Open the ledger accounts of a new legacy row, one per column, where dual-write is on."""
        return self.apply(
            target,
            [
                Movement(
                    operation="open_account",
                    key=key,
                    bucket=column.bucket,
                    currency=column.currency,
                    traits=traits,
                    correlation_id=correlation_id,
                )
                for column in self.mapping.columns
            ],
        )

    def apply(self, target: Target, movements: Iterable[Movement]) -> tuple[Posting, ...]:
        """Carry out a batch in one round trip, in the order given: all of it, or, if one is refused, nothing. Each
        reversal in it takes one more before, to see whose transaction it is.

        Raises UsageError for what is no collection of Movements.
        """
        batch = _batch(movements)
        if not batch:
            return ()
        prepared, postings, tell = self._carry_out(connection_of(target, self.mapping), batch)
        keys = {key for each in prepared for key in each.keys}
        expire(target, self.mapping, keys, reload=self._reload)
        # A savepoint that is rolled back takes with it what a look at the balance found in between.
        tell_when_committed(target, tell, undo=lambda session: expire(session, self.mapping, keys))
        return postings

    def watch(self, attribute: Any, **details: Unpack[WatchDetails]) -> Watch:
        """Send what the application's ORM code writes to a balance through this adapter, the code unchanged.

        ``attribute`` is the mapped attribute, for example ``User.total_coins``. A value that is assigned to a loaded
        object becomes a `set_balance` in the flush, with legacy's own meaning: the assigned value wins; an update
        that was lost by that is told to the observers (`observe.LostUpdate`). ``column + amount`` becomes a credit or
        a debit. What cannot be routed is left as it is, the fence catches it, and it is told (`observe.Unrouted`).
        Works for every Session and AsyncSession of the process, until the watch is stopped. Where the ledger is not
        installed nothing changes.

        ``type`` (default "orm") names the movements; ``actor`` is a text, or a function of the session; ``reason``
        stands in the ledger; ``idempotency_key`` is a function of the object that is flushed. Raises UsageError for
        what is no plain attribute of a configured column. See docs/watch.md.
        """
        return self._watches.add(attribute, details)

    def balance(
        self,
        target: Target,
        key: Key,
        *,
        bucket: str | None = None,
        currency: str | None = None,
        traits: Traits | None = None,
    ) -> Balance:
        """Read a balance, from the ledger where the flags ask for it and the account's state allows it.

        Legacy and ledger are read in one statement and compared; a difference is counted, never raised.
        Raises UnknownAccount, UnknownBucket, UnknownCurrency, and LegacyValueInvalid where the column is NULL.
        """
        connection = connection_of(target, self.mapping)
        started = time.perf_counter()
        column = self.mapping.column(bucket, currency)
        compared = random.random() < self.settings.compare_share
        with self._typed(connection):
            site = self._sites.at(connection)
            text = key_text(key, site.key_type, self.mapping.name)
            wanted = site.installed and self._decide(connection, site, self._snapshot(), text, traits).read_from_ledger
            found = read_balance(connection, self.settings.ledger_schema, site, column, key, text, wanted, compared)
        if len(self._observers):
            self._tell(told(self.mapping.name, found, time.perf_counter() - started))
        return found

    def balances(
        self, target: Target, keys: Iterable[Key], *, bucket: str | None = None, currency: str | None = None
    ) -> dict[Key, Balance]:
        """Read many balances in one statement and one snapshot, each as `balance` does: for lists and exports.

        In the order of ``keys``; an account that is unknown is left out. Hand a long list over in parts of a few
        thousand. Raises UnknownBucket, UnknownCurrency, and LegacyValueInvalid where a column is NULL.
        """
        connection = connection_of(target, self.mapping)
        started = time.perf_counter()
        column = self.mapping.column(bucket, currency)
        compared = random.random() < self.settings.compare_share
        with self._typed(connection):
            site = self._sites.at(connection)
            texts = {key_text(key, site.key_type, self.mapping.name): key for key in keys}
            snapshot = self._snapshot()
            if site.installed and snapshot.needs_traits:
                self._traits.fill(connection, site, list(texts))

            def wanted(key: str) -> bool:
                return site.installed and self._decide(connection, site, snapshot, key, None).read_from_ledger

            found = read_balances(connection, self.settings.ledger_schema, site, column, texts, wanted, compared)
        seconds = (time.perf_counter() - started) / max(len(found), 1)
        self._tell(event for one in found.values() for event in told(self.mapping.name, one, seconds))
        return found

    def history(
        self,
        target: Target,
        key: Key,
        *,
        bucket: str | None = None,
        currency: str | None = None,
        limit: int = 50,
        before: int | None = None,
    ) -> tuple[Entry, ...]:
        """The account's ledger entries, newest first. ``before`` is the transaction id to go on from."""
        connection = connection_of(target, self.mapping)
        column = self.mapping.column(bucket, currency)
        schema, name = self.settings.ledger_schema, self.mapping.name
        with self._typed(connection):
            site = self._sites.at(connection)
            text = key_text(key, site.key_type, name)
            if not site.installed:
                return ()
            return history(connection, schema, name, text, column, limit=limit, before=before)

    def balance_at(
        self, target: Target, key: Key, at: datetime, *, bucket: str | None = None, currency: str | None = None
    ) -> Decimal | None:
        """The ledger's balance at a past time, which has a time zone; None before the first transaction."""
        connection = connection_of(target, self.mapping)
        column = self.mapping.column(bucket, currency)
        with self._typed(connection):
            site = self._sites.at(connection)
            text = key_text(key, site.key_type, self.mapping.name)
            if not site.installed:
                return None
            return balance_at(connection, self.settings.ledger_schema, self.mapping.name, text, column, at)

    def decision(self, target: Target, key: Key, *, traits: Traits | None = None) -> Decision:
        """What is in force for this account: what the flags ask, as far as phase and line allow it now.

        One snapshot answers all three flags. While the line is stopped, dual-write and the features of the
        wallet alone are off. Raises LedgerNotInstalled where the ledger is gone since the last call.
        """
        connection = connection_of(target, self.mapping)
        with self._typed(connection):
            site = self._sites.at(connection)
            text = key_text(key, site.key_type, self.mapping.name)
            if not site.installed:
                return OFF
            wanted = self._decide(connection, site, self._snapshot(), text, traits)
            return line.in_force(wanted, standing.show(connection, self.settings))

    def _carry_out(
        self, connection: Connection, movements: Sequence[Movement]
    ) -> tuple[list[Prepared], tuple[Posting, ...], Tell]:
        """Post on a connection; nothing of a session is flushed or expired. The caller tells when it is committed."""
        started = time.perf_counter()
        correlation_id = observe.correlation_id()
        try:
            with self._typed(connection):
                site = self._sites.at(connection)
                prepared = [self._prepare(connection, site, each, correlation_id) for each in movements]
                postings = self._post(connection, site, prepared)
        except (WalletMigrateError, DBAPIError) as error:
            seconds = time.perf_counter() - started
            self._tell(failed(self.mapping.name, movements, correlation_id, error, seconds))
            raise
        seconds = time.perf_counter() - started

        def tell(committed: bool) -> None:
            for place, each in enumerate(postings if len(self._observers) else ()):
                self._tell(posted(self.mapping.name, each, seconds if place == 0 else None, committed))

        return prepared, tuple(postings), tell

    def _one(self, target: Target, movement: Movement) -> Posting:
        return self.apply(target, [movement])[0]

    def _snapshot(self) -> Snapshot:
        """The flags of one call: all its questions are answered by one document."""
        snapshot, now = self.source.snapshot(), time.monotonic()
        if snapshot is not self._seen or now >= self._seen_until:
            self._seen, self._seen_until = snapshot, now + observe.FLAGS_SECONDS
            if len(self._observers):
                self._observers.tell(observe.FlagsSeen(snapshot.age_seconds(), snapshot.source, snapshot.document_id))
        return snapshot

    def _decide(
        self, connection: Connection, site: Site, snapshot: Snapshot, key: str, traits: Traits | None
    ) -> Decision:
        known = self._traits.of(connection, site, key, traits) if traits or snapshot.needs_traits else {}
        return snapshot.decide(key, known)

    def _prepare(self, connection: Connection, site: Site, movement: Movement, correlation_id: str) -> Prepared:
        name, touched = self.mapping.name, None
        if movement.operation == "reverse":
            number = transaction_number(movement)
            if not site.installed:
                raise LedgerNotInstalled(name, "a reversal needs the ledger")
            # The transaction alone knows its accounts, and the flags are asked by account.
            touched = touched_by(connection, self.settings.ledger_schema, name, number)
            if touched is None:
                raise UnknownTransaction(number)
        return prepare(movement, self.mapping, site.key_type, correlation_id, touched)

    def _post(self, connection: Connection, site: Site, prepared: list[Prepared]) -> list[Posting]:
        if not site.installed:
            try:
                return post_legacy(connection, site, prepared)
            except LedgerAppearedError:
                self._sites.forget(connection)
                site = self._sites.at(connection)
        snapshot = self._snapshot()
        for each in prepared:
            # If either side asks for dual-write, both get it. The caller's traits are the first account's.
            asked = [
                self._decide(connection, site, snapshot, key, each.movement.traits if place == 0 else None)
                for place, key in enumerate(each.keys)
            ]
            each.request["dual"] = any(decision.dual_write for decision in asked)
        rows = self._calls.post(connection, prepared)
        if rows[0].refusal is not None:
            raise refused(self.mapping.name, site.legacy, prepared, rows[0])
        return [posting(prepared[row.ordinal], row) for row in rows]

    @contextmanager
    def _typed(self, connection: Connection) -> Iterator[None]:
        """Turn what the library's own functions raise, and their absence, into its errors."""
        try:
            yield
        except DBAPIError as error:
            found = typed(self.mapping.name, error)
            if isinstance(found, LedgerNotInstalled):
                self._sites.forget(connection)
            if found is None:
                raise
            raise found from error

    def _tell(self, events: Iterable[observe.Event]) -> None:
        for event in events:
            self._observers.tell(event)


class _Door:
    """What the hooks of a watched attribute use of the adapter: all of it on a connection, inside a flush."""

    def __init__(self, adapter: LegacyBalanceAdapter) -> None:
        self._adapter = adapter

    def installed(self, connection: Connection) -> bool:
        with self._adapter._typed(connection):
            return self._adapter._sites.at(connection).installed

    def dual_written(self, connection: Connection, keys: Sequence[Key]) -> list[Key]:
        adapter = self._adapter
        site, snapshot = adapter._sites.at(connection), adapter._snapshot()

        def asked(key: Key) -> bool:
            text = key_text(key, site.key_type, adapter.mapping.name)
            return adapter._decide(connection, site, snapshot, text, None).dual_write

        return [key for key in keys if asked(key)]

    def post(self, connection: Connection, movements: Sequence[Movement]) -> tuple[tuple[Posting, ...], Tell]:
        return self._adapter._carry_out(connection, movements)[1:]

    def tell(self, event: observe.Event) -> None:
        self._adapter._tell([event])


def _batch(movements: Any) -> tuple[Movement, ...]:
    """As they were given; also of a generator, which can be gone through only once."""
    if isinstance(movements, Movement):
        raise UsageError("apply takes several Movements; for one: [movement]")
    batch = tuple(movements)
    strange = next((type(one).__name__ for one in batch if not isinstance(one, Movement)), None)
    if strange is not None:
        raise UsageError(f"apply takes Movements, not {strange}; make them by Movement.credit and its like")
    return batch
