"""A database in which orders are played, and the judgement of what each of them left."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, Row
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from interleaving import PATIENCE_SECONDS
from invariants import violations
from torture_operations import BYPASSES, DEADLOCK, FROZEN, GONE, MIRRORING, REJECTED, STEADY, TAKING, UNSEEN
from torture_scheduler import Crew, Order, OrderImpossibleError, Player
from torture_steps import Scene, adapters
from walletmigrate import connect, fences
from walletmigrate.audit import Act
from walletmigrate.config import Settings
from walletmigrate.errors import WalletMigrateError
from walletmigrate.functions import fingerprint

BALANCES = {
    "absent": Decimal(100),
    "mirrored": Decimal(100),
    "stale": Decimal(101),
    "frozen": Decimal(105),
    "closed": Decimal(0),
}
"""What is true of A and B at the start, by state."""

_MODES = frozenset({"mirror", "reject"})
_WORDS = frozenset({"stopped", "reading", *_MODES})
_KEYS_PER_ORDER = 10
_SQL = Path(__file__).with_name("torture.sql")
_TALLY = "select key, sum(change) from tally where key between %s and %s group by key"
_OF_TRIGGERS = frozenset({DEADLOCK, FROZEN, "WM020"})
"""What an application's trigger that writes rows of its own can bring about."""


class OrderFailedError(AssertionError):
    """After this order something does not hold."""


class Arena:
    """One database with a ledger, whose orders work on fresh keys each."""

    def __init__(self, url: str, settings: Settings) -> None:
        self.settings = settings
        self.engine: Engine = connect.engine(
            url,
            application_name="torture",
            lock_timeout_ms=int(PATIENCE_SECONDS * 1000),
            poolclass=NullPool,
            connect_args={"options": f"-c deadlock_timeout=20ms -c lock_timeout={PATIENCE_SECONDS:g}s"},
        )
        self.counts: Counter[str] = Counter()
        self._impossible: set[tuple[str, ...]] = set()
        self._adapters = adapters(settings)
        self._base = 0
        self._mode: str | None = None
        self._crew = Crew(self.engine)
        self._clerk: Connection = self.engine.connect()
        made = _SQL.read_text().replace("FINGERPRINT", fingerprint(settings.mapping(None)))
        self._crew.monitor.exec_driver_sql(made, execution_options={"no_parameters": True})
        for mode in fences.MODES:
            fences.set_mode(self.engine, settings, settings.mapping(None), mode, Act("torture", "an order"))
            self._crew.monitor.exec_driver_sql(
                "insert into torture_modes select %s, pg_get_functiondef(p.oid) from pg_proc as p "
                "where p.proname in ('fence_users', 'fence_truncate_users')",
                (mode,),
            )

    def close(self) -> None:
        """Close all connections."""
        self._clerk.close()
        self._crew.close()

    def run(self, order: Order) -> str:
        """Play an order and judge what it left. Returns what became of each session; raises OrderFailedError.

        An order that is not possible is counted as such, and its like is not tried again.
        """
        if order.pause in self._impossible:
            self.counts["impossible"] += 1
            return "impossible"
        scene = self._scene(order)
        try:
            players = self._crew.play(order, scene)
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

    def run_all(self, orders: Iterable[Order]) -> Counter[str]:
        """Play orders and count them. Raises OrderFailedError, with their names, where some failed."""
        before, failed = self.counts.copy(), []
        for order in orders:
            try:
                self.run(order)
            except OrderFailedError as error:
                failed.append(str(error))
        if failed:
            raise OrderFailedError(f"{len(failed)} orders failed:\n" + "\n".join(failed[:20]))
        return self.counts - before

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
        scene = Scene(
            self._base,
            self._adapters,
            truth,
            stopped="stopped" in words,
            modes=frozenset({mode, *changes}),
            role=role,
            tolerant=bool(role),
        )
        self._crew.monitor.exec_driver_sql(
            "select torture_start(%s, %s::text[], %s, %s, %s, %s)",
            (scene.base, states, role, phase, not scene.stopped, None if mode == self._mode else mode),
        )
        self._mode = None if changes else mode
        return scene

    def _judge(self, order: Order, scene: Scene, players: list[Player]) -> list[str]:
        found = self._look(scene)
        problems = [
            *scene.complaints,
            *_unexpected(order, scene, players),
            *self._check(scene, found, "after the order"),
        ]
        problems += _unlike_the_mode(order, scene, players, {row.state for row in found})
        if scene.stopped:
            self._crew.monitor.exec_driver_sql("select wallet.set_line(true)")
            scene.stopped = False
        problems += [*_twice(players), *self._send_again(scene, players)]
        found = self._look(scene, backfill=True)
        problems += self._check(scene, found, "after everything was sent again and a backfill", final=True)
        if scene.whole:
            self._crew.monitor.exec_driver_sql("select wallet.fold_system_accounts()")
            problems += violations(self._crew.monitor, self.settings)
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

    def _look(self, scene: Scene, *, backfill: bool = False) -> Sequence[Row[Any]]:
        return self._crew.monitor.exec_driver_sql("select * from torture_look(%s, %s)", (scene.base, backfill)).all()

    def _check(self, scene: Scene, found: Sequence[Row[Any]], when: str, *, final: bool = False) -> list[str]:
        """What does not hold of the accounts of this order; ``final``: a backfill has been."""
        truth = dict(scene.truth)
        if scene.role:
            for key, change in self._crew.monitor.exec_driver_sql(_TALLY, (scene.base, scene.base + _KEYS_PER_ORDER)):
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
def arena(url: str, settings: Settings) -> Iterator[Arena]:
    """Give an arena in a database where `ledger.install_users` has been, with no row of users."""
    made = Arena(url, settings)
    try:
        yield made
    finally:
        made.close()


def _unlike_the_mode(order: Order, scene: Scene, players: list[Player], after: set[str]) -> list[str]:
    """What mirror or reject alone would not have let come about."""
    done = {player.actor.operation for player in players}
    before = {word for word in order.start.split("+") if word in BALANCES}
    if scene.role or scene.stopped:
        return []
    if scene.modes == {"mirror"} and done <= STEADY and not before & {"stale", "closed"} and "stale" in after:
        return ["an account that mirror follows turned stale"]
    if scene.modes == {"reject"} and done <= STEADY | BYPASSES and before == {"mirrored"}:
        passed = [p for p in players if p.actor.operation in BYPASSES and p.committed and any(p.effects)]
        return [f"session {p.number} ({p.actor.operation}) was not rejected" for p in passed]
    return []


def _unexpected(order: Order, scene: Scene, players: list[Player]) -> list[str]:
    """Errors and refusals that a session may not meet, or for which nothing in this order gives a reason."""
    problems = []
    for player in players:
        allowed = set(player.operation.allowed)
        others = [other for other in players if other is not player]
        if player.actor.level == "ser" or (player.actor.level == "rr" and any(map(_left_something, others))):
            allowed.add("40001")
        allowed -= _without_reason(order, player, others)
        if scene.role:
            allowed |= _OF_TRIGGERS
        if "reject" in scene.modes and (
            scene.role or (FROZEN in player.operation.allowed and _mirrored(order, players))
        ):
            allowed.add(REJECTED)
        if player.outcome and player.outcome not in allowed:
            problems.append(f"session {player.number} ({player.actor.operation}) got {player.outcome}")
        if player.operation.passed_on and not player.outcome:
            problems.append(f"session {player.number} ({player.actor.operation}) heard nothing of the error")
    return problems


def _without_reason(order: Order, player: Player, others: list[Player]) -> set[str]:
    """Of what a session may meet, that for which neither the start nor what was committed gives a reason."""
    words = set(order.start.split("+"))
    begun = {other.actor.operation for other in others}
    done = {other.actor.operation for other in others if other.committed} | {player.actor.operation}
    reasons = {
        # Rolled back or not: the phase is frozen, in which an account is opened as frozen.
        FROZEN: words & {"frozen"} or begun & {"freeze"},
        GONE: words & {"closed"} or done & TAKING,
        UNSEEN: player.actor.level != "rc",
    }
    return {error for error, found in reasons.items() if not found}


def _mirrored(order: Order, players: list[Player]) -> bool:
    """Whether an account is mirrored at the start, or may have become so."""
    made = {player.actor.operation for player in players} & MIRRORING
    return "mirrored" in order.start.split("+") or bool(made)


def _left_something(player: Player) -> bool:
    """Whether something is committed that an older snapshot does not see."""
    return player.committed or bool(player.operation.before)


def _twice(players: list[Player]) -> list[str]:
    """Whether operations that share their keys moved more than one of them would."""
    sharing = [player for player in players if player.operation.once is not None and player.committed]
    moved = sum(change for player in sharing for effect in player.effects for change in effect.values())
    limit = max((player.operation.once or 0 for player in sharing), default=0)
    return [f"under one key {moved} moved instead of {limit}"] if moved > limit else []
