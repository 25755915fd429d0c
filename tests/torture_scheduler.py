"""A deterministic scheduler: it drives sessions through the steps of an order.

An order has a name, and the name is all of it: `mirrored:credit.rc.commit,backfill.rc.rollback:1-2-e1-e2` starts
with mirrored accounts; session 1 credits, session 2 runs a batch of the backfill (and waits for the row), session 1
commits, session 2 rolls back. Steps: `1` the next step of session 1, `e1` its commit or rollback, `l1` its snapshot
taken early, `h=<what>` a further session takes a lock, at which session 1 then waits inside its call, `r` it lets go.

As in PostgreSQL's own isolation tester, a step has ended when its result is there, or when the server says that its
session waits for another one of the order: of several that go on, that all of them wait, in one answer. What a waiting
session still has to do comes as soon as it can. Two things are left to PostgreSQL: who is the victim of a deadlock, and
who goes on first of two that wait for one table.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from typing import Any

import psycopg
from sqlalchemy import Connection, Engine
from sqlalchemy.engine.interfaces import IsolationLevel
from sqlalchemy.exc import DBAPIError

from interleaving import PATIENCE_SECONDS, READ_COMMITTED, REPEATABLE_READ, SERIALIZABLE, Session
from torture_operations import HOLDS, OPERATIONS
from torture_steps import Effect, Operation, Scene
from torture_wire import Wire, array
from walletmigrate.errors import WalletMigrateError

LEVELS: dict[str, IsolationLevel] = {"rc": READ_COMMITTED, "rr": REPEATABLE_READ, "ser": SERIALIZABLE}

_FIRST_LOOK_SECONDS, _LAST_LOOK_SECONDS = 0.001, 0.008
"""Between two looks at sessions of which one has neither ended its step nor waits: it paces, and orders nothing."""

_ALL_BLOCKED = "select bool_and(pg_blocking_pids(p) && $1::integer[]) from unnest($2::integer[]) as p"


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
        wire = self.monitor.connection.driver_connection
        assert isinstance(wire, psycopg.Connection)
        self.wire = Wire(wire)

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
        self._settle(scene, players, released=step[0] in "er")

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

    def _settle(self, scene: Scene, players: Sequence[Player], *, released: bool) -> None:
        """Return when every session has ended its step or waits for another one.

        ``released``: a transaction has ended, and those that waited most likely go on.
        """
        pause = _FIRST_LOOK_SECONDS
        while busy := [p.session.pid for p in players if p.future is not None]:
            if self._taken(scene, players, pause):
                pause = _FIRST_LOOK_SECONDS if released else 0.0
            elif self._all_blocked(busy):
                return
            else:
                pause = min(max(2 * pause, _FIRST_LOOK_SECONDS), _LAST_LOOK_SECONDS)

    def _all_blocked(self, busy: list[int]) -> bool:
        everybody = [session.pid for session in self._sessions.values()]
        return self.wire.ask(_ALL_BLOCKED, array(everybody), array(busy)) == [("t",)]

    def _await_any(self, scene: Scene, players: Sequence[Player]) -> None:
        if not self._taken(scene, players, PATIENCE_SECONDS):
            raise AssertionError("the sessions wait for each other, and the server does not end it")
        self._settle(scene, players, released=True)

    def _taken(self, scene: Scene, players: Sequence[Player], seconds: float) -> bool:
        """Whether a step ends within so many seconds; then the results of all that have ended are taken."""
        ended = wait([p.future for p in players if p.future is not None], seconds, FIRST_COMPLETED).done
        for player in players:
            if player.future in ended:
                self._take(scene, player, player.future)
        return bool(ended)

    def _take(self, scene: Scene, player: Player, future: Future[Any]) -> None:
        error, player.future = future.exception(), None
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

    def _clear(self, players: Sequence[Player]) -> None:
        """Leave nothing open behind an order that was given up."""
        holder = self._session(0, "rc")
        if holder.connection.in_transaction():
            holder.rollback()
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
