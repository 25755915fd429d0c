"""A database in which orders are played, and the judgement of what each of them left."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from sqlalchemy import Connection, Engine, create_engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from interleaving import PATIENCE_SECONDS
from invariants import violations
from torture_judging import BALANCES, twice, unexpected, unlike_the_mode
from torture_scheduler import Crew, Order, OrderImpossibleError, Player
from torture_steps import Scene, adapters
from torture_wire import Texts
from walletmigrate import connect, fences
from walletmigrate.audit import Act
from walletmigrate.config import Settings
from walletmigrate.errors import WalletMigrateError
from walletmigrate.functions import fingerprint

_MODES = frozenset({"mirror", "reject"})
_WORDS = frozenset({"stopped", "reading", *_MODES})
_KEYS_PER_ORDER = 10
_SQL = Path(__file__).with_name("torture.sql")
_TALLY = "select key, sum(change) from tally where key between %s and %s group by key"


class OrderFailedError(AssertionError):
    """After this order something does not hold."""


class Found(NamedTuple):
    """What became of a key: its row, its account, and what the journal says of it."""

    key: int
    legacy: Decimal | None
    state: str | None
    ledger: Decimal | None
    journal: Decimal
    broken: int
    accounts: int
    failure: str | None

    @classmethod
    def read(cls, row: Texts) -> Found:
        """A row of torture_look."""
        key, legacy, state, ledger, journal, broken, accounts, failure = row
        money = [None if each is None else Decimal(each) for each in (legacy, ledger)]
        return cls(int(key), money[0], state, money[1], Decimal(journal), int(broken), int(accounts), failure)


class Arena:
    """One database with a ledger, whose orders work on fresh keys each."""

    def __init__(self, url: str, settings: Settings, impossible: set[tuple[str, ...]], at_once: int) -> None:
        self.settings = settings
        self._at_once = at_once
        # An application's engine: statements are prepared, and no limits are set at the begin of each transaction.
        self.engine: Engine = create_engine(
            connect.parsed(url),
            poolclass=NullPool,
            use_native_hstore=False,
            connect_args={
                "application_name": "torture",
                "options": f"-c deadlock_timeout=20ms -c lock_timeout={PATIENCE_SECONDS:g}s -c jit=off",
            },
        )
        self.counts: Counter[str] = Counter()
        self._impossible = impossible
        self._adapters = adapters(settings)
        self._base = 0
        self._mode: str | None = None
        self.crew = Crew(self.engine)
        self._clerk: Connection = self.engine.connect()
        made = _SQL.read_text().replace("FINGERPRINT", fingerprint(settings.mapping(None)))
        self.crew.monitor.exec_driver_sql(made, execution_options={"no_parameters": True})
        for mode in fences.MODES:
            fences.set_mode(self.engine, settings, settings.mapping(None), mode, Act("torture", "an order"))
            self.crew.monitor.exec_driver_sql(
                "insert into torture_modes select %s, pg_get_functiondef(p.oid) from pg_proc as p "
                "where p.proname in ('fence_users', 'fence_truncate_users')",
                (mode,),
            )

    def close(self) -> None:
        """Close all connections."""
        self._clerk.close()
        self.crew.close()

    def run(self, order: Order) -> str:
        """Play an order and judge what it left. Returns what became of each session; raises OrderFailedError.

        An order that is not possible is counted as such, and its like is not tried again.
        """
        return self._run(order, *self.set_up([order]))

    def _run(self, order: Order, scene: Scene) -> str:
        if order.pause in self._impossible:
            self.counts["impossible"] += 1
            return "impossible"
        self._begin(scene)
        try:
            players = self.crew.play(order, scene)
        except OrderImpossibleError:
            self._impossible.add(order.pause)
            self.counts["impossible"] += 1
            return "impossible"
        problems = self._judge(order, scene, players)
        told = ", ".join(f"{p.actor.operation}: {p.outcome or 'done'}" for p in players)
        if problems:
            raise OrderFailedError(f"{order}\n  ended as {told}\n  " + "\n  ".join(problems))
        self.counts["orders"] += 1
        self.counts["in which a session waited"] += scene.waited
        self.counts["in which a session got an error or a refusal"] += any(p.outcome for p in players)
        return told

    def run_all(self, orders: Iterable[Order]) -> list[str]:
        """Play orders and count them. Returns what did not hold after those that failed, by their names."""
        failed, going = [], iter(orders)
        while some := list(islice(going, self._at_once)):
            possible = [order for order in some if order.pause not in self._impossible]
            self.counts["impossible"] += len(some) - len(possible)
            for order, scene in zip(possible, self.set_up(possible), strict=True):
                try:
                    self._run(order, scene)
                except OrderFailedError as error:
                    self.counts["failed"] += 1
                    failed.append(str(error))
        return failed

    def set_up(self, orders: list[Order]) -> list[Scene]:
        """Scenes for some orders, whose rows and accounts are there. What is of all of them waits for `_begin`."""
        scenes = [self._scene(order) for order in orders]
        keys, states, roles = list[int](), list[str](), list[str]()
        for scene in scenes:
            keys += [scene.a, scene.b]
            states += scene.states
            roles += [scene.role, ""]
        if keys:
            self.crew.monitor.exec_driver_sql("select torture_set_up(%s, %s, %s)", (keys, states, roles))
        return scenes

    def _scene(self, order: Order) -> Scene:
        words = order.start.split("+")
        states = [word for word in words if word in BALANCES]
        states *= 3 - len(states)
        mode = next((word for word in words if word in _MODES), "stale")
        changes = {actor.operation[3:] for actor in order.actors if actor.operation.startswith("to_")}
        role = next((word for word in words if word not in BALANCES and word not in _WORDS), "")
        phase = "frozen" if "frozen" in states else "read_ledger" if "reading" in words else "dual_write"
        self._base += _KEYS_PER_ORDER
        balances = [*(BALANCES[state] for state in states), Decimal(0), Decimal(0)]
        truth = dict(enumerate(balances, start=self._base + 1))
        return Scene(
            self._base,
            self._adapters,
            truth,
            (states[0], states[1]),
            phase,
            mode,
            stopped="stopped" in words,
            modes=frozenset({mode, *changes}),
            role=role,
            tolerant=bool(role),
        )

    def _begin(self, scene: Scene) -> None:
        mode = "" if scene.mode == self._mode else scene.mode
        self.crew.wire.ask("select torture_begin($1, $2, $3)", scene.phase, not scene.stopped, mode)
        self._mode = scene.mode if scene.modes == {scene.mode} else None

    def _judge(self, order: Order, scene: Scene, players: list[Player]) -> list[str]:
        found = self.look(scene)
        problems = [
            *scene.complaints,
            *unexpected(order, scene, players),
            *self._check(scene, found, "after the order"),
        ]
        problems += unlike_the_mode(order, scene, players, {row.state for row in found})
        if scene.stopped:
            self.crew.wire.ask("select wallet.set_line(true)")
            scene.stopped = False
        problems += [*twice(players), *self._send_again(scene, players)]
        found = self.look(scene, "torture_finish")
        problems += self._check(scene, found, "after everything was sent again and a backfill", final=True)
        if scene.whole:
            self.crew.monitor.exec_driver_sql("select wallet.fold_system_accounts()")
            problems += violations(self.crew.monitor, self.settings)
        return problems

    def _send_again(self, scene: Scene, players: list[Player]) -> list[str]:
        """Every posting once more under its key: a replay where it was committed, the posting itself where not."""
        problems = []
        for player in players:
            again, effect = player.operation.again, {}
            if again is None:
                continue
            moved = player.committed and any(player.effects)
            try:
                effect = again(scene, player.number, self._clerk)
                self._clerk.commit()
            except (WalletMigrateError, DBAPIError) as error:
                self._clerk.rollback()
                if moved:
                    problems.append(f"session {player.number} sent again: {error}")
            if moved and effect:
                problems.append(f"session {player.number} sent again under its key moved money a second time")
            scene.add([effect])
        return problems

    def look(self, scene: Scene, function: str = "torture_look") -> list[Found]:
        """What has become of the keys of an order."""
        return [Found.read(row) for row in self.crew.wire.ask(f"select * from {function}($1)", scene.base)]

    def _check(self, scene: Scene, found: list[Found], when: str, *, final: bool = False) -> list[str]:
        """What does not hold of the accounts of this order; ``final``: a backfill has been."""
        truth = dict(scene.truth)
        if scene.role:
            for key, change in self.crew.monitor.exec_driver_sql(_TALLY, (scene.base, scene.base + _KEYS_PER_ORDER)):
                truth[key] += change
        problems = []
        for row in found:
            broken = []
            gone = row.legacy is None
            true = row.ledger if row.state == "frozen" else row.legacy or Decimal(0)
            if true != truth[row.key]:
                broken.append(f"the committed operations make {truth[row.key]}")
            if row.state == "mirrored" and row.ledger != row.legacy and not (gone and scene.detached):
                broken.append("the mirror is not true")
            if row.ledger is not None and (row.ledger != row.journal or row.broken):
                broken.append(f"the journal says {row.journal}, and has {row.broken} broken links")
            if final and not gone and row.state not in ("mirrored", "frozen"):
                broken.append("a backfill did not bring it up")
            if row.accounts > 1:
                broken.append(f"it has {row.accounts} accounts")
            if row.failure and not scene.tolerant:
                broken.append(f"a ledger leg failed: {row.failure}")
            said = f"{when}: key {row.key - scene.base} is {row.state}, legacy {row.legacy}, ledger {row.ledger}"
            problems += [f"{said}: {each}" for each in broken]
        return problems


@contextmanager
def arena(
    url: str, settings: Settings, *, impossible: set[tuple[str, ...]] | None = None, at_once: int = 100
) -> Iterator[Arena]:
    """Give an arena in a database where `ledger.install_users` has been, with no row of users.

    ``impossible`` are the pauses that are known not to come about, and grows; ``at_once`` is how many orders are set
    up by one statement.
    """
    made = Arena(url, settings, set() if impossible is None else impossible, at_once)
    try:
        yield made
    finally:
        made.close()
