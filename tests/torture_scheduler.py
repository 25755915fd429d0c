"""A deterministic scheduler: it drives sessions through the steps of an order.

An order has a name, and the name is all of it: `mirrored:credit.rc.commit,backfill.rc.rollback:1-2-e1-e2` starts
with mirrored accounts; session 1 credits, session 2 runs a batch of the backfill (and waits for the row), session 1
commits, session 2 rolls back. Steps: `1` the next step of session 1, `e1` its commit or rollback, `l1` its snapshot
taken early, `h=<what>` a further session takes a lock, at which session 1 then waits inside its call, `r` it lets go.

As in PostgreSQL's own isolation tester, a step has ended when its result is there, or when the server says that its
session waits for another one of the order. What a waiting session still has to do comes as soon as it can. Two
things are left to PostgreSQL: who is the victim of a deadlock, and who goes on first of two that wait for one table.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, Engine, text
from sqlalchemy.engine.interfaces import IsolationLevel
from sqlalchemy.exc import DBAPIError

from interleaving import PATIENCE_SECONDS, READ_COMMITTED, REPEATABLE_READ, SERIALIZABLE, Session
from torture_operations import HOLDS, OPERATIONS
from torture_steps import Effect, Operation, Scene
from walletmigrate.errors import WalletMigrateError

LEVELS: dict[str, IsolationLevel] = {"rc": READ_COMMITTED, "rr": REPEATABLE_READ, "ser": SERIALIZABLE}

_LOOK_SECONDS = 0.001
"""Between two looks at a session that has neither ended its step nor waits: it paces, and orders nothing."""

_BLOCKED = text(
    "select p from unnest(cast(:busy as integer[])) as p where pg_blocking_pids(p) && cast(:everybody as integer[])"
)


@dataclass(frozen=True)
class Actor:
    """What one session does, at which isolation level, and whether it commits."""

    operation: str
    level: str
    end: str

    def __str__(self) -> str:
        return f"{self.operation}.{self.level}.{self.end}"


@dataclass(frozen=True)
class Order:
    """States of the accounts A and B at the start (one if they are the same) with other words, actors, steps."""

    start: str
    actors: tuple[Actor, ...]
    steps: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.start}:{','.join(map(str, self.actors))}:{'-'.join(self.steps)}"

    @classmethod
    def named(cls, name: str) -> Order:
        """The order of this name."""
        start, actors, steps = name.split(":")
        return cls(start, tuple(Actor(*each.split(".")) for each in actors.split(",")), tuple(steps.split("-")))

    @property
    def pause(self) -> tuple[str, ...]:
        """What decides whether session 1 comes to wait at the held lock; empty for an order without one."""
        if not self.steps[0].startswith("h="):
            return ()
        return (self.start, self.actors[0].operation, self.actors[0].level, self.steps[0])


class OrderImpossibleError(Exception):
    """Session 1 never needs the lock that is held."""


@dataclass
class Player:
    """One actor at work: its session, what it has to do, and what came of it (SQLSTATE or refusal, or nothing)."""

    number: int
    actor: Actor
    operation: Operation
    session: Session
    done: int = 0
    future: Future[Any] | None = None
    ending: bool = False
    effects: list[Effect] = field(default_factory=list)
    outcome: str = ""
    aborted: bool = False
    committed: bool = False


class Crew:
    """The sessions of one database, used again for every order."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._sessions: dict[tuple[int, str], Session] = {}
        self.monitor = engine.connect().execution_options(isolation_level="AUTOCOMMIT")

    def close(self) -> None:
        """Close all connections."""
        for session in self._sessions.values():
            session.close()
        self.monitor.close()

    def play(self, order: Order, scene: Scene) -> list[Player]:
        """Drive the sessions through an order, to the end of all transactions. Raises OrderImpossibleError."""
        players = [
            Player(number, actor, OPERATIONS[actor.operation], self._session(number, actor.level))
            for number, actor in enumerate(order.actors, start=1)
        ]
        try:
            self._play(order, scene, players)
        finally:
            self._clear(players)
        return players

    def _play(self, order: Order, scene: Scene, players: list[Player]) -> None:
        remaining = list(order.steps)
        pausing = bool(order.pause)
        while remaining:
            waiting = {str(p.number) for p in players if p.future is not None}
            step = next((each for each in remaining if each.lstrip("el") not in waiting), None)
            if step is None:
                self._await_any(scene, players)  # they wait for each other: the server ends it
                continue
            if pausing and step != "1" and not step.startswith("h="):
                pausing = False
                if players[0].future is None:
                    raise OrderImpossibleError
            remaining.remove(step)
            self._perform(step, scene, players)
            scene.waited |= any(p.future is not None for p in players)
        while any(p.future is not None for p in players):
            self._await_any(scene, players)

    def _perform(self, step: str, scene: Scene, players: list[Player]) -> None:
        if step.startswith("h="):
            self._session(0, "rc").sql(HOLDS[step[2:]].format(**scene.words))
        elif step == "r":
            self._session(0, "rc").rollback()
        else:
            self._start(step, scene, players[int(step[-1]) - 1])
        self._settle(scene, players)

    def _start(self, step: str, scene: Scene, player: Player) -> None:
        session, actor = player.session, player.actor
        if step[0] == "e":
            player.ending = True
            commits = actor.end == "commit" and not player.aborted
            player.future = session.start(_commit if commits else _roll_back)
            return
        if actor.level != "rc":
            scene.snapshots.setdefault(player.number, dict(scene.truth))
        if step[0] == "l":
            session.look()
        elif not player.outcome:
            if player.done == 0 and player.operation.before:
                self.monitor.exec_driver_sql(player.operation.before)
            work = player.operation.steps[player.done]
            player.done += 1
            player.future = session.start(lambda connection: work(scene, player.number, connection))

    def _settle(self, scene: Scene, players: Sequence[Player]) -> None:
        """Return when every session has ended its step or waits for another one."""
        busy = [p for p in players if p.future is not None]
        everybody = [session.pid for session in self._sessions.values()]
        while busy:
            busy = [p for p in busy if not self._taken(scene, p)]
            if busy:
                pids = {"busy": [p.session.pid for p in busy], "everybody": everybody}
                blocked = set(self.monitor.execute(_BLOCKED, pids).scalars())
                busy = [p for p in busy if p.session.pid not in blocked]

    def _await_any(self, scene: Scene, players: Sequence[Player]) -> None:
        waiting = [p for p in players if p.future is not None]
        for _ in range(int(PATIENCE_SECONDS / _LOOK_SECONDS)):
            if any(self._taken(scene, player) for player in waiting):
                self._settle(scene, players)
                return
        raise AssertionError("the sessions wait for each other, and the server does not end it")

    def _taken(self, scene: Scene, player: Player) -> bool:
        """Whether the step has ended; then its result is taken."""
        assert player.future is not None
        try:
            error = player.future.exception(_LOOK_SECONDS)
        except NotYet:
            return False
        future, player.future = player.future, None
        if isinstance(error, DBAPIError | WalletMigrateError):
            cause = error if isinstance(error, DBAPIError) else error.__cause__
            sqlstate = getattr(getattr(cause, "orig", None), "sqlstate", None)
            player.outcome = str(sqlstate or type(error).__name__)
            player.aborted |= sqlstate is not None
        elif error is not None:
            raise error
        elif not player.ending:
            player.effects.append(future.result())
        elif future.result():
            player.committed = True
            scene.add(player.effects)
        return True

    def _clear(self, players: Sequence[Player]) -> None:
        """Leave nothing open behind an order that was given up."""
        self._session(0, "rc").rollback()
        for player in players:
            if player.future is not None:
                player.future.exception(PATIENCE_SECONDS)
                player.future = None
            if player.session.connection.in_transaction():
                player.session.rollback()

    def _session(self, number: int, level: str) -> Session:
        made = self._sessions.get((number, level))
        if made is None:
            made = self._sessions[number, level] = Session(self._engine, LEVELS[level])
        return made


def _commit(connection: Connection) -> bool:
    try:
        connection.commit()
    finally:
        connection.rollback()  # of a commit that failed; of any other nothing is left
    return True


def _roll_back(connection: Connection) -> bool:
    connection.rollback()
    return False
