"""Orders that are asked for by name, besides the pairs; each story under a letter and a title."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product

from torture_operations import OPERATIONS
from torture_orders import (
    ENDS,
    LEVELS,
    MODES,
    RAW_WRITES,
    STATES,
    casts,
    interleavings,
    levels,
    pair,
    pauses_of,
    starts,
)
from torture_scheduler import Actor, Order

POSTINGS = ("credit", "long", "off", "pay", "repay")
ROLES = ("before", "early_same", "late_same", "early_other", "late_other")
ALIVE = ("absent", "mirrored", "stale")


def old_snapshots() -> Iterator[Order]:
    """A snapshot is taken, another opens, resyncs, freezes, unfreezes, deletes or stops; then each kind of write."""
    others = ("backfill", "credit", "freeze", "unfreeze", "delete", "stop")
    for mode in MODES:
        writes = (*POSTINGS, *RAW_WRITES) if mode == "stale" else RAW_WRITES
        for write, other, state, level in product(writes, (*others, "raw"), starts(STATES, mode), LEVELS[1:]):
            actors = (Actor(write, level, "commit"), Actor(other, "rc", "commit"))
            steps = ["1"] * len(OPERATIONS[write].steps)
            yield Order(state, actors, ("l1", "2", "e2", *steps, "e1"))


def postings_that_wait_for_jobs() -> Iterator[Order]:
    """A posting waits for a freeze, a backfill or an unfreeze that commits, or that rolls back."""
    yield from _waits(POSTINGS, ("freeze", "backfill", "unfreeze"), STATES, waiting_first=True)


def backfills_that_wait() -> Iterator[Order]:
    """A backfill waits for a posting that opens or resyncs."""
    yield from _waits(("credit", "long", "off", "pay"), ("backfill",), ALIVE, waiting_first=False)


def keys() -> Iterator[Order]:
    """One key twice: in flight, rolled back, with the flag off, after a failed leg, stopped, elsewhere, in batches."""
    shared = ("same", "same_long", "same_off", "same_failed", "same_other")
    for place, one in enumerate(shared):
        for other in shared[place:]:
            for state, stopped in product(("absent", "mirrored", "stale"), ("", "stopped")):
                yield from pair(one, other, states=[_start(state, stopped)])
    for one, other in (("batch", "batch"), ("batch", "batch_back"), ("batch_back", "pay"), ("batch", "raw")):
        yield from pair(one, other)


def failing_legs() -> Iterator[Order]:
    """A shadow leg fails with a check violation, 40001, 40P01, 55P03, next to every kind of traffic."""
    failures = ("fail_check", "fail_serial", "fail_deadlock", "fail_lock")
    for mode in MODES:
        others = ("credit", "off", "raw", "delete", "backfill", "pay") if mode == "stale" else ("raw", "delete")
        for one, other in product(failures, others):
            yield from pair(one, other, states=starts(ALIVE, mode))


def readers() -> Iterator[Order]:
    """A reader at every place of resync → freeze → post, of post → unfreeze → post, of raw → freeze → post."""
    ways = {
        "stale": ("backfill", "freeze", "credit"),
        "frozen": ("credit", "unfreeze", "credit"),
        **dict.fromkeys(starts(["mirrored"], "mirror"), ("raw", "freeze", "credit")),
    }
    for (state, way), reader, level in product(ways.items(), ("read", "read_in_two"), LEVELS):
        if (reader, level) == ("read_in_two", "rc"):
            continue  # two statements need a snapshot
        actors = (Actor(reader, level, "commit"), *(Actor(each, "rc", "commit") for each in way))
        for steps in interleavings(actors, chained=1):
            yield Order(f"{state}+reading", actors, steps)


def triggers() -> Iterator[Order]:
    """The application's own triggers, before and after the fence, on the same row and another."""
    ones, others = ("credit", "long", "off", "raw"), ("credit", "raw", "backfill", "repay")
    for mode, role, one, other in product(MODES, ROLES, ones, others):
        yield from pair(one, other, states=starts([_start(state, role) for state in ALIVE], mode))


def forgeries() -> Iterator[Order]:
    """A forged label; a raw write after the adapter's, after a savepoint that was rolled back."""
    kinds = ("forged", "forged_off", "forged_amount", "forged_key", "after_adapter", "after_savepoint", "after_forgery")
    for mode, one, other in product(MODES, kinds, ("credit", "off", "raw", "backfill", "freeze")):
        yield from pair(one, other, states=starts(STATES, mode))


def transfers() -> Iterator[Order]:
    """Transfers against each other over every pair of states, flags on and off, the line running and stopped."""
    for payer, payee, stopped in product(STATES, STATES, ("", "stopped")):
        for one, other in product(("pay", "pay_off"), ("repay", "repay_off")):
            yield from pair(one, other, states=[_start(payer, payee, stopped)])


def folds() -> Iterator[Order]:
    """A fold of the system accounts while transactions with lower ids are still open."""
    for mode, ones in (("stale", ("credit", "debit")), ("mirror", ("raw", "delete"))):
        for one, other, state, end, ending in product(ones, ("pay", "long"), starts(ALIVE, mode), ENDS, ENDS):
            actors = (Actor(one, "rc", end), Actor(other, "rc", ending), Actor("fold", "rc", "commit"))
            for steps in interleavings(actors):
                yield Order(state, actors, steps)


def partitions() -> Iterator[Order]:
    """A partition is truncated, detached, made, under each kind of traffic; one of both at READ COMMITTED.

    A detach fires nothing of the fence, so its own snapshot makes no difference.
    """
    others = ("credit", "long", "raw", "pay", "backfill", "freeze")
    for mode, one, other in product(MODES, ("truncate", "detach", "attach"), others):
        for actors in casts(one, other, mixed=True):
            own, level = actors[0].level, actors[1].level
            if (own == "rc" or (level == "rc" and one != "detach")) and actors[1].end == "commit":
                states = starts(("mirrored", "stale", "frozen"), mode)
                for state, steps in product(states, interleavings(actors)):
                    yield Order(state, actors, steps)


def changes_of_mode() -> Iterator[Order]:
    """The fence's mode is changed around and inside of every kind of write, and between two of a transaction."""
    ones = (*RAW_WRITES, "credit", "long", "off", "pay", "backfill", "unfreeze", "after_adapter", "after_savepoint")
    for before, after in product(MODES, MODES):
        if before != after:
            for one in ones:
                yield from pair(one, f"to_{after}", states=starts(STATES, before))
            yield from pauses_of((*RAW_WRITES, "credit"), (f"to_{after}",), states=starts(STATES, before))


STORIES: dict[str, Callable[[], Iterator[Order]]] = {
    "a_old_snapshots": old_snapshots,
    "b_postings_that_wait_for_jobs": postings_that_wait_for_jobs,
    "c_backfills_that_wait": backfills_that_wait,
    "d_keys": keys,
    "e_failing_legs": failing_legs,
    "f_readers": readers,
    "g_triggers": triggers,
    "h_forgeries": forgeries,
    "i_transfers": transfers,
    "j_folds": folds,
    "m_changes_of_mode": changes_of_mode,
}
"""Those that one arena can tell; the fence taken down (k) and partitions (l) need a table of their own."""


def _waits(
    writers: Sequence[str], jobs: Sequence[str], states: Sequence[str], *, waiting_first: bool
) -> Iterator[Order]:
    steps = ("2", "1", "e2", "e1") if waiting_first else ("1", "2", "e1", "e2")
    for writer, job, state in product(writers, jobs, states):
        for level, end, ending in product(levels(writer), ENDS, ENDS):
            yield Order(state, (Actor(writer, level, end), Actor(job, "rc", ending)), steps)


def _start(*words: str) -> str:
    return "+".join(word for word in words if word)
