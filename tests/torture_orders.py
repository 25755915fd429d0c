"""Which orders there are: every interleaving of every pair, and every pair around every pause inside a call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import product

from torture_operations import HOLDS, OPERATIONS
from torture_scheduler import Actor, Order

STATES = ("absent", "mirrored", "stale", "frozen", "closed")
ENDS = ("commit", "rollback")
LEVELS = ("rc", "rr", "ser")
MODES = ("stale", "mirror", "reject")
RAW_WRITES = ("raw", "insert", "delete", "reinsert", "swap")

PAIRED = (
    *("credit", "long", "off", "pay", "repay", "raw", "insert", "new", "delete", "reinsert", "swap"),
    *("backfill", "freeze", "unfreeze", "stop"),
)


def pairs(operations: Sequence[str] = PAIRED, *, first: str = "") -> Iterator[Order]:
    """Two transactions under each mode, in every interleaving of their steps that another snapshot can tell apart.

    At two different levels only under the mode stale: there old snapshots meet everything.
    """
    for mode, (place, one) in product(MODES, enumerate(operations)):
        if first in ("", one):
            for other in operations[place:]:
                yield from pair(one, other, states=starts(STATES, mode), mixed=mode == "stale")


def starts(states: Sequence[str], mode: str) -> list[str]:
    """States at the start, under a mode of the fence."""
    return [state if mode == "stale" else f"{state}+{mode}" for state in states]


def pair(one: str, other: str, *, states: Sequence[str] = STATES, mixed: bool = False) -> Iterator[Order]:
    """All orders of two operations, at one level or ``mixed``."""
    for state, actors in product(states, casts(one, other, mixed=mixed)):
        for steps in interleavings(actors):
            yield Order(state, actors, steps)


def pauses(operations: Sequence[str] = PAIRED, *, first: str = "") -> Iterator[Order]:
    """Pauses under each mode; under mirror and reject with a raw write, for nobody else meets the mode."""
    for mode in MODES:
        for order in pauses_of(operations, operations, first=first, states=starts(STATES, mode)):
            if mode == "stale" or any(actor.operation in RAW_WRITES for actor in order.actors):
                yield order


def pauses_of(
    ones: Sequence[str], others: Sequence[str], *, first: str = "", states: Sequence[str] = STATES
) -> Iterator[Order]:
    """Session 1 stands still inside its call while session 2 comes, and ends before, after or with it."""
    for one, other, hold, state in product(ones, others, HOLDS, states):
        if first not in ("", one):
            continue
        if hold in ("control", "ceiling") and (OPERATIONS[one].before or OPERATIONS[other].before):
            continue  # the step of the phase before a freeze writes both: it would wait before the order begins
        if hold == "key" and OPERATIONS[one].again is None:
            continue
        steps, more = ["1"] * len(OPERATIONS[one].steps), ["2"] * len(OPERATIONS[other].steps)
        for actors in casts(one, other):
            if actors[0].end == actors[1].end == "rollback":
                continue  # nothing is left of either
            begin = (f"h={hold}", *steps, *more)
            yield Order(state, actors, (*begin, "e2", "r", "e1"))
            yield Order(state, actors, (*begin, "r", "e2", "e1"))
            yield Order(state, actors, (*begin, "r", "e1", "e2"))


def interleavings(actors: Sequence[Actor], *, chained: int = 0) -> Iterator[tuple[str, ...]]:
    """Every merge of the actors' steps; those behind the first ``chained`` follow each other.

    A snapshot is taken at a transaction's first statement, or before everything where that makes a difference.
    """
    chains = [
        (*[str(number)] * len(OPERATIONS[actor.operation].steps), f"e{number}")
        for number, actor in enumerate(actors, start=1)
    ]
    if chained:
        chains = [*chains[:chained], tuple(step for chain in chains[chained:] for step in chain)]
    for merged in _merges(tuple(chains)):
        early = [
            (False, True) if actor.level != "rc" and _something_ended_before(merged, str(number)) else (False,)
            for number, actor in enumerate(actors, start=1)
        ]
        for looks in product(*early):
            yield (*(f"l{number}" for number, look in enumerate(looks, start=1) if look), *merged)


def casts(one: str, other: str, *, mixed: bool = False) -> Iterator[tuple[Actor, Actor]]:
    """Levels and ends. Jobs run at READ COMMITTED."""
    for level, second in product(levels(one), levels(other)):
        if not mixed and level != second and not (OPERATIONS[one].job or OPERATIONS[other].job):
            continue
        for end, ending in product(ENDS, ENDS):
            yield Actor(one, level, end), Actor(other, second, ending)


def levels(operation: str) -> tuple[str, ...]:
    return LEVELS[:1] if OPERATIONS[operation].job else LEVELS


@cache
def _merges(chains: tuple[tuple[str, ...], ...]) -> tuple[tuple[str, ...], ...]:
    if not any(chains):
        return ((),)
    return tuple(
        (chain[0], *merged)
        for place, chain in enumerate(chains)
        if chain
        for merged in _merges((*chains[:place], chain[1:], *chains[place + 1 :]))
    )


def _something_ended_before(merged: Sequence[str], token: str) -> bool:
    return any(each.startswith("e") for each in merged[: merged.index(token)])
