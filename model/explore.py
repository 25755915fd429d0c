"""Every state that a few sessions can reach, breadth first, and the shortest way to one that is wrong."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TypeVar

from model.server import Server
from model.sessions import Actor, Local, Move, Sessions
from model.transactions import Database, after_commit_of_another, holding, said

T = TypeVar("T")

_BITS = 24
_MASK = (1 << _BITS) - 1


@dataclass(frozen=True)
class Configuration:
    """Who runs together, and the databases that they may begin with."""

    name: str
    actors: tuple[Actor, ...]
    databases: tuple[Database, ...]


@dataclass(frozen=True)
class Result:
    """What was found. `trace` is empty when every state is right; `events` are the words of all steps taken."""

    name: str
    states: int
    steps: int
    depth: int
    seconds: float
    broken: str | None = None
    trace: tuple[str, ...] = ()
    events: frozenset[str] = field(default_factory=frozenset)


@dataclass(frozen=True)
class _Step:
    session: int
    local: int
    database: int
    changes: int
    move: Move


def explore(configuration: Configuration, *, symmetry: bool = True, limit: int | None = None) -> Result:
    """Visit every state once. Stops at the first that breaks an invariant, with a shortest trace.

    `symmetry`: actors of one kind are interchangeable (a trace then would mix up their names, so it is found
    without). `limit`: raise RuntimeError past so many states.
    """
    result = _Explorer(configuration, symmetry).run(limit)
    if result.broken and symmetry:
        return _Explorer(configuration, symmetry=False).run(limit)
    return result


class _Explorer:
    """States are kept as one integer each: the numbers of the database and of each session's place, packed."""

    def __init__(self, configuration: Configuration, symmetry: bool) -> None:
        self._configuration = configuration
        first = {actor.kind: actor.programs for actor in reversed(configuration.actors)}
        # The same programs, so that those who are alike stand at the same places in them.
        self._actors = [replace(actor, programs=first[actor.kind]) for actor in configuration.actors]
        keys = tuple(sorted({key for actor in self._actors for key in actor.keys}))
        self._server = Server(
            keys,
            moving_line=any(actor.moves_line for actor in self._actors),
            moving_phase=any(actor.moves_phase for actor in self._actors),
            shared=frozenset(key for key in keys if sum(key in actor.keys for actor in self._actors) > 1),
        )
        self._sessions = Sessions(self._server)
        self._databases: dict[Database, int] = {}
        self._database_list: list[Database] = []
        self._locals: dict[Local, int] = {}
        self._local_list: list[Local] = []
        self._holds: list[int] = []
        self._memo: dict[tuple[int, int, int, int], tuple[list[_Step], int]] = {}
        self._bumped: dict[tuple[int, int], int] = {}
        self._events: set[str] = set()
        kinds = [actor.kind for actor in self._actors]
        self._alike = [
            [i for i, kind in enumerate(kinds) if kind == one] for one in sorted(set(kinds)) if kinds.count(one) > 1
        ]
        if not symmetry:
            self._alike = []

    def run(self, limit: int | None) -> Result:
        began = time.monotonic()
        parents: dict[int, int] = {}
        for database in self._configuration.databases:
            places = [self._place(Local(actor.transactions)) for actor in self._actors]
            parents[self._pack(self._database(database), places)] = -1
        frontier, depth, steps = list(parents), 0, 0

        def result(broken: str | None = None, trace: Sequence[str] = ()) -> Result:
            seconds = time.monotonic() - began
            events = frozenset(self._events)
            return Result(self._configuration.name, len(parents), steps, depth, seconds, broken, tuple(trace), events)

        while frontier:
            found: list[int] = []
            for state in frontier:
                for step, after, broken in self._successors(state):
                    steps += 1
                    if broken:
                        return result(broken, [*self._trace(parents, state), *self._told(step)])
                    if after not in parents:
                        parents[after] = state
                        found.append(after)
            if limit is not None and len(parents) > limit:
                raise RuntimeError(f"{self._configuration.name}: more than {limit} states")
            frontier = found
            depth += bool(found)
        return result()

    def _successors(self, state: int) -> Iterator[tuple[_Step | None, int, str | None]]:
        database, places = self._unpack(state)
        holds = [self._holds[place] for place in places]
        waits: dict[int, int] = {}
        for session, place in enumerate(places):
            others = 0
            for other, bits in enumerate(holds):
                if other != session:
                    others |= bits
            moves, blocked = self._moves(session, place, database, others)
            if blocked:
                waits[session] = blocked
            for step in moves:
                after = list(places)
                after[session] = step.local
                if step.changes:
                    for other in range(len(places)):
                        if other != session:
                            after[other] = self._bump(after[other], step.changes)
                yield step, self._pack(step.database, after), step.move.broken
        if len(waits) > 1 and _circle(waits, holds):
            yield None, state, "invariant 10: a deadlock"

    def _moves(self, session: int, place: int, database: int, others: int) -> tuple[list[_Step], int]:
        question = (session, place, database, others)
        known = self._memo.get(question)
        if known is None:
            moves, blocked = self._sessions.moves(
                self._actors[session], self._local_list[place], self._database_list[database], others
            )
            for move in moves:
                self._events.update(move.words)
            known = (
                [
                    _Step(session, self._place(move.local), self._database(move.database), move.changes, move)
                    for move in moves
                ],
                blocked,
            )
            self._memo[question] = known
        return known

    def _bump(self, place: int, changes: int) -> int:
        question = (place, changes)
        if question not in self._bumped:
            local = self._local_list[place]
            if local.transaction is not None:
                isolated = self._sessions.isolated(local.transaction)
                local = local._replace(transaction=after_commit_of_another(local.transaction, isolated, changes))
            self._bumped[question] = self._place(local)
        return self._bumped[question]

    def _database(self, database: Database) -> int:
        return _number(self._databases, self._database_list, database)

    def _place(self, local: Local) -> int:
        place = _number(self._locals, self._local_list, local)
        if place == len(self._holds):
            work = local.transaction.work if local.transaction else None
            self._holds.append(holding(work, self._server.keys) if work else 0)
        return place

    def _pack(self, database: int, places: list[int]) -> int:
        for alike in self._alike:
            for i, place in zip(alike, sorted(places[i] for i in alike), strict=True):
                places[i] = place
        state = database
        for place in places:
            state = state << _BITS | place
        return state

    def _unpack(self, state: int) -> tuple[int, list[int]]:
        places = []
        for _ in self._actors:
            places.append(state & _MASK)
            state >>= _BITS
        return state, places[::-1]

    def _trace(self, parents: dict[int, int], state: int) -> list[str]:
        path = [state]
        while parents[path[-1]] != -1:
            path.append(parents[path[-1]])
        path.reverse()
        database = self._database_list[self._unpack(path[0])[0]]
        phase = ", phase frozen" if database.frozen else ""
        told = [f"At first: legacy {said(database.row)}, account {said(database.account)}{phase}."]
        for before, after in pairwise(path):
            told += self._told(next(step for step, reached, _ in self._successors(before) if reached == after))
        return told

    def _told(self, step: _Step | None) -> list[str]:
        if step is None:
            return ["Everybody waits for somebody else."]
        return [f"{self._actors[step.session].name}: {'; '.join(step.move.words)}."]


def _circle(waits: dict[int, int], holds: list[int]) -> bool:
    """Whether sessions wait for each other in a circle. Each waits for one that holds a bit it wants."""
    for begin in waits:
        seen, at = set[int](), begin
        while at in waits and at not in seen:
            seen.add(at)
            at = next(other for other, bits in enumerate(holds) if other != at and bits & waits[at])
        if at in seen:
            return True
    return False


def _number(numbers: dict[T, int], values: list[T], value: T) -> int:
    number = numbers.setdefault(value, len(values))
    if number == len(values):
        values.append(value)
    return number
