"""Who runs together: the actors, the databases they begin with, and the configurations that are explored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product

from model import adapter, neighbours
from model.protocol import Movement, Rules
from model.sessions import FOREVER, Actor, Program
from model.statements import Account, SetLine, SetPhase, Steps
from model.transactions import Database

LEVELS = {False: "read committed", True: "snapshot isolation"}
BOTH = (False, True)
KEY = "k"

NO_ACCOUNT = Database(10, None)
NO_ACCOUNT_FROZEN = Database(10, None, frozen=True)
MIRRORED = Database(10, Account("mirrored", 10))
STALE = Database(10, Account("stale", 14))
FROZEN = Database(10, Account("frozen", 12))
CLOSED = Database(None, Account("closed", 5))
NOTHING = Database(None, None)
ANY = (NOTHING, NO_ACCOUNT, NO_ACCOUNT_FROZEN, MIRRORED, STALE, FROZEN, CLOSED)
"""Every state of an account. Amounts are such that a raw write can make a stale or a closed one equal by chance."""

Part = Callable[[Rules], Steps[None]]


def programs(rules: Rules, name: str, parts: Sequence[Part], levels: Sequence[bool]) -> list[Program]:
    """One transaction of these parts, at each isolation level."""

    def at(isolated: bool) -> Program:
        own = replace(rules, isolated=isolated)

        def start() -> Steps[None]:
            for part in parts:
                yield from part(own)

        return Program(f"{name} ({LEVELS[isolated]})", isolated, start)

    return [at(isolated) for isolated in levels]


def writer(
    rules: Rules,
    name: str,
    *,
    amount: int = 1,
    key: str | None = KEY,
    levels: Sequence[bool] = BOTH,
    flags: Sequence[bool] = BOTH,
    ways: Sequence[bool] = BOTH,
    transactions: int = 1,
    leg_may_fail: bool = False,
    calls: Sequence[str] = ("post",),
) -> Actor:
    """A process that credits through the adapter, the flag as it pleases each time, again with the same key.

    `calls` make up each of its transactions: "post", "raw" (an update past the adapter), "read".
    """
    made: list[Program] = []
    for dual, short_way in product(flags, ways):
        movement = Movement(amount, key, dual, leg_may_fail)

        def call(own: Rules, movement: Movement = movement, short_way: bool = short_way) -> Steps[None]:
            return adapter.post(own, movement, short_way=short_way)

        known: dict[str, Part] = {"post": call, "raw": raw_update, "read": neighbours.read}
        words = f"credits {amount} {'the short way' if short_way else 'the long way'}, flag {'on' if dual else 'off'}"
        made += programs(rules, words, [known[each] for each in calls], levels)
    kind = f"writer {rules} {amount} {key} {levels} {flags} {ways} {transactions} {leg_may_fail} {calls}"
    return Actor(name, kind, tuple(made), transactions, frozenset() if key is None else frozenset({key}))


def raw(
    rules: Rules,
    *,
    levels: Sequence[bool] = BOTH,
    transactions: int = 1,
    what: Sequence[str] = ("update", "delete", "insert", "replace", "forged"),
) -> Actor:
    """Somebody else's program, which writes the column, the row, or under a label that it forged."""

    def insert(own: Rules) -> Steps[None]:
        return neighbours.raw_insert(own, 5)

    def forged(own: Rules) -> Steps[None]:
        return neighbours.forged_update(own, Movement(4, None, dual=True))

    parts: dict[str, tuple[Part, ...]] = {
        "update": (raw_update,),
        "delete": (neighbours.raw_delete,),
        "insert": (insert,),
        "replace": (neighbours.raw_delete, insert),
        "forged": (forged,),
    }
    made = [program for each in what for program in programs(rules, each, parts[each], levels)]
    return Actor("raw SQL", f"raw {rules} {levels} {what}", tuple(made), transactions)


def operator(rules: Rules, *jobs: str, transactions: int = 1, name: str = "operator") -> Actor:
    """Runs jobs, in any order: "backfill", "freeze", "unfreeze", "phase" (to frozen and back). READ COMMITTED."""
    parts: dict[str, Part] = {
        "backfill": neighbours.backfill,
        "freeze": neighbours.freeze,
        "unfreeze": neighbours.unfreeze,
        "to frozen": lambda _: _one(SetPhase(True)),
        "from frozen": lambda _: _one(SetPhase(False)),
    }
    wanted = [job for job in jobs if job != "phase"] + (["to frozen", "from frozen"] if "phase" in jobs else [])
    made = [program for job in wanted for program in programs(rules, job, (parts[job],), (False,))]
    return Actor(
        name, f"operator {rules} {jobs} {transactions}", tuple(made), transactions, moves_phase="phase" in jobs
    )


def line_stopper(rules: Rules) -> Actor:
    """Stops the line and lets it run again, at any moments."""
    made = [
        *programs(rules, "stop", (lambda _: _one(SetLine(False)),), (False,)),
        *programs(rules, "resume", (lambda _: _one(SetLine(True)),), (False,)),
    ]
    return Actor("line", "line", tuple(made), FOREVER, moves_line=True)


def reader(rules: Rules) -> Actor:
    """Reads, again and again."""
    return Actor("reader", "reader", tuple(programs(rules, "a read", (neighbours.read,), (False,))), FOREVER)


def raw_update(rules: Rules) -> Steps[None]:
    """An update past the adapter."""
    return neighbours.raw_update(rules, 4)


def _one(request: SetLine | SetPhase) -> Steps[None]:
    yield request
