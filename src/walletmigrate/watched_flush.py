"""Watched attributes in a flush: what was assigned is posted first, then the ORM's own UPDATE finds it done.

The ORM's statements stay as they are, with version ids, ``onupdate`` columns and the history that other listeners
read: once the adapter has posted, the row is locked and holds what was assigned, so that for the balance the UPDATE
changes nothing, and the fence, which asks whether ledger and row agree, has nothing to do.

Posting happens in the mapper's ``before_update``, inside the flush: there an error rolls the transaction back, in
``before_flush`` it would not. The first object of a flush takes all others along, in one batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from sqlalchemy import Connection, inspect, select
from sqlalchemy.orm import InstanceState, Mapper, Session, UOWTransaction, object_session

from walletmigrate import observe
from walletmigrate.assignments import Door, Rule, change, is_expression, literal, obstacle
from walletmigrate.config import WIDE, Column, Mapping
from walletmigrate.errors import AssignmentRefused, LegacyValueInvalid, PostingRefused
from walletmigrate.movements import Key, Movement
from walletmigrate.postings import Posting
from walletmigrate.sessions import attributes_of, tell_when_committed

OPENED_AT_ONCE = 1000
"""How many new rows' accounts are opened in one round trip."""


@dataclass
class Round:
    """One flush. ``handled`` is what was posted, or told to be unrouted, by object and attribute."""

    context: UOWTransaction
    handled: dict[tuple[InstanceState[Any], str], Any] = field(default_factory=dict)
    inserted: list[tuple[Connection, Key]] = field(default_factory=list)
    locked: bool = False
    active: bool = False


@dataclass(frozen=True, eq=False)
class Write:
    """One watched attribute of one object, and the movement that it comes to. Balances are in major units.

    ``expected`` is what the object had loaded, None where that is not known; ``to`` what was assigned, None for
    column ± amount; ``movement`` is None for column ± 0.
    """

    state: InstanceState[Any]
    name: str
    rule: Rule
    key: Key
    value: Any
    to: Any
    expected: Decimal | int | None
    movement: Movement | None


class FlushHooks:
    """Listeners of sessions and mappers for the watched attributes of one adapter."""

    def __init__(self, mapping: Mapping, door: Door, rules: list[Rule]) -> None:
        self._mapping = mapping
        self._door = door
        self._rules = rules
        self._place = ("walletmigrate_watch", id(self))

    def before_flush(self, session: Session, context: UOWTransaction, _objects: object) -> None:
        """Begin a flush: what an earlier one handled is forgotten."""
        session.info[self._place] = Round(context)

    def before_update(self, mapper: Mapper[Any], connection: Connection, target: object) -> None:
        """Post what this object, and all others of the flush, have pending. Raises the adapter's errors."""
        session, flush = self._round(target)
        if session is None or flush is None or not self._door.installed(connection):
            return
        flush.active = True
        if not self._pending(flush, inspect(target)):
            return
        # With sharding, another object may live in another database.
        alone = session.connection_callable is not None
        states = [inspect(target)] if alone else list(self._flushed(flush, mapper))
        writes = [write for state in states for write in self._writes(session, connection, flush, state)]
        if reason := obstacle(connection):
            for write in writes:
                self._unrouted(session, flush, write.state, write.name, write.value, reason)
            return
        self._lock(connection, flush, states, writes)
        self._post(session, connection, flush, writes)

    def before_insert(self, mapper: Mapper[Any], connection: Connection, target: object) -> None:
        """A new object in the place of one that is deleted in the same flush is written by an UPDATE."""
        session = object_session(target)
        if session is not None and mapper.identity_key_from_instance(target) in session.identity_map:
            self.before_update(mapper, connection, target)

    def after_insert(self, mapper: Mapper[Any], connection: Connection, target: object) -> None:
        """Remember a new row: its account is opened when all rows of the flush are there."""
        _, flush = self._round(target)
        names = attributes_of(mapper, self._mapping, self._mapping.key)
        if flush is not None and names and (key := inspect(target).dict.get(names[0])) is not None:
            flush.inserted.append((connection, key))

    def after_flush(self, session: Session, _context: UOWTransaction) -> None:
        """Open the accounts of new rows, and tell of what was assigned behind the hooks' back."""
        flush: Round | None = session.info.pop(self._place, None)
        if flush is None:
            return
        for start in range(0, len(flush.inserted), OPENED_AT_ONCE):
            self._open(session, flush.inserted[start : start + OPENED_AT_ONCE])
        for state in self._states(flush) if flush.active else ():
            if state.obj() not in session.new:
                for name, value in self._pending(flush, state).items():
                    self._unrouted(session, flush, state, name, value, "assigned by a later hook of the flush")

    def _round(self, target: object) -> tuple[Session | None, Round | None]:
        session = object_session(target)
        return session, None if session is None else session.info.get(self._place)

    def _states(self, flush: Round) -> Iterator[InstanceState[Any]]:
        """Everything of watched classes that the flush inserts or updates."""
        for state, (deleted, listed) in list(flush.context.states.items()):
            if not deleted and not listed and self._names(state.mapper):
                yield state

    def _flushed(self, flush: Round, mapper: Mapper[Any]) -> Iterator[InstanceState[Any]]:
        """What will be UPDATEd besides the object at hand, of its table."""
        for state in self._states(flush):
            if state.mapper.base_mapper is mapper.base_mapper and (state.key is not None or self._switched(state)):
                yield state

    def _switched(self, state: InstanceState[Any]) -> bool:
        session = state.session
        return session is not None and state.mapper.identity_key_from_instance(state.obj()) in session.identity_map

    def _names(self, mapper: Mapper[Any]) -> dict[str, Rule]:
        return {
            name: rule
            for rule in self._rules
            if mapper.isa(rule.mapper)
            for name in attributes_of(mapper, self._mapping, rule.column.column)
        }

    def _pending(self, flush: Round, state: InstanceState[Any]) -> dict[str, Any]:
        """Watched attributes with a change that was not handled yet, and their values."""
        found = {}
        for name in self._names(state.mapper):
            added = state.attrs[name].history.added
            if added and not _same(flush.handled.get((state, name), flush), added[0]):
                found[name] = added[0]
        return found

    def _writes(
        self, session: Session, connection: Connection, flush: Round, state: InstanceState[Any]
    ) -> Iterator[Write]:
        names = self._names(state.mapper)
        for name, value in self._pending(flush, state).items():
            rule, key = names[name], self._key(state)
            loaded = state.attrs[name].history.deleted
            if is_expression(value):
                by = change(value, rule, connection.dialect)
                if by is None:
                    self._unrouted(session, flush, state, name, value, "an SQL expression other than column ± amount")
                    continue
                movement = rule.change_by(session, key, by, state.obj()) if by else None
                yield Write(state, name, rule, key, value, None, None, movement)
                continue
            to = literal(value, rule, connection.dialect)
            if to is None:
                self._unrouted(session, flush, state, name, value, "NULL is no balance")
                continue
            known = literal(loaded[0], rule, connection.dialect) if loaded else None
            expected = known if isinstance(known, int | Decimal) else None
            yield Write(state, name, rule, key, value, to, expected, rule.set_to(session, key, to, state.obj()))

    def _key(self, state: InstanceState[Any]) -> Any:
        """The key under which the row stands in the database, before this flush."""
        (name,) = attributes_of(state.mapper, self._mapping, self._mapping.key)
        history = state.attrs[name].history
        return history.deleted[0] if history.deleted else getattr(state.obj(), name)

    def _lock(
        self, connection: Connection, flush: Round, states: Iterable[InstanceState[Any]], writes: list[Write]
    ) -> None:
        """Lock every row that the flush will UPDATE, by key, where the posting alone would lock some of them first."""
        posted = {write.key for write in writes if write.movement}
        if flush.locked or not posted:
            return
        flush.locked = True
        keys = {self._key(state) for state in states if state.modified}
        if keys - posted:
            key = writes[0].rule.key
            connection.execute(select(key).where(key.in_(keys)).order_by(key).with_for_update(key_share=True))

    def _post(self, session: Session, connection: Connection, flush: Round, writes: list[Write]) -> None:
        flush.handled.update({(write.state, write.name): write.value for write in writes})
        asked = [(write, write.movement) for write in writes if write.movement is not None]
        if not asked:
            return
        try:
            postings, tell = self._door.post(connection, [movement for _, movement in asked])
        except LegacyValueInvalid as error:
            # The row holds NULL, or more decimals than money has: only the ORM's own UPDATE can overwrite that.
            unfit = [w for w, _ in asked if (w.key, w.rule.column.column) == (error.key, error.column)]
            if any(write.to is None for write in unfit):
                raise
            for write in unfit:
                self._unrouted(session, flush, write.state, write.name, write.value, "the row holds no exact amount")
            self._post(session, connection, flush, [write for write in writes if write not in unfit])
            return
        for (write, _), posting in zip(asked, postings, strict=True):
            if posting.mode == "ledger" and write.to is not None and not posting.replayed:
                raise AssignmentRefused(self._mapping.name, write.key, write.rule.attribute)
            if write.to is None or posting.replayed:
                # What the row holds now is what the ORM's UPDATE is to write.
                held = connection.scalar(select(write.rule.balance).where(write.rule.key == write.key))
                write.state.dict[write.name] = flush.handled[write.state, write.name] = held
        tell_when_committed(session, tell)
        for (write, _), posting in zip(asked, postings, strict=True):
            self._look_for_a_lost_update(session, write, posting)

    def _look_for_a_lost_update(self, session: Session, write: Write, posting: Posting) -> None:
        if write.expected is None or write.to is None or posting.replayed:
            return
        found = WIDE.subtract(Decimal(write.to), posting.legacy_change or 0)
        if found == write.expected:
            return
        event = observe.LostUpdate(
            mapping=self._mapping.name,
            bucket=posting.bucket,
            currency=posting.currency,
            attribute=write.rule.attribute,
            correlation_id=posting.correlation_id,
            transaction_id=posting.transaction_id,
            key=write.key,
            expected=Decimal(write.expected),
            found=found,
            assigned=Decimal(write.to),
        )
        tell_when_committed(session, lambda _: self._door.tell(event))

    def _open(self, session: Session, inserted: list[tuple[Connection, Key]]) -> None:
        """Open the ledger accounts of new rows, where dual-write is on."""
        for connection in dict.fromkeys(connection for connection, _ in inserted):
            if not self._door.installed(connection):
                continue
            keys = self._door.dual_written(connection, [key for at, key in inserted if at is connection])
            movements = [self._opening(key, column) for key in keys for column in self._mapping.columns]
            if movements and not self._opened(session, connection, movements):
                for movement in movements:
                    self._opened(session, connection, [movement])

    def _opening(self, key: Key, column: Column) -> Movement:
        return Movement(operation="open_account", key=key, bucket=column.bucket, currency=column.currency)

    def _opened(self, session: Session, connection: Connection, movements: list[Movement]) -> bool:
        """Whether these accounts could be opened. One that could not, because its row holds NULL, stays absent."""
        try:
            _, tell = self._door.post(connection, movements)
        except PostingRefused as error:
            event = observe.Unrouted("insert", self._mapping.name, self._mapping.table, error.code, movements[0].key)
            if len(movements) == 1:
                tell_when_committed(session, lambda _: self._door.tell(event))
            return False
        tell_when_committed(session, tell)
        return True

    def _unrouted(
        self, session: Session, flush: Round, state: InstanceState[Any], name: str, value: Any, reason: str
    ) -> None:
        """Leave the write to the ORM, and so to the fence; say so once."""
        flush.handled[state, name] = value
        attribute = self._names(state.mapper)[name].attribute
        event = observe.Unrouted("flush", self._mapping.name, attribute, reason, self._key(state))
        tell_when_committed(session, lambda _: self._door.tell(event))


def _same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    return not is_expression(one) and not is_expression(other) and bool(one == other)
