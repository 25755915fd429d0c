"""The protocol with one guard taken away: what breaks, and the few sessions that it takes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from model.configurations import JOBS, Crowd
from model.crowds import ANY, operator, raw, reader, writer
from model.explore import Configuration, Result, explore
from model.protocol import Guards, Rules
from model.sessions import Actor


@dataclass(frozen=True)
class Mutant:
    """`guard`: the field of Guards that is off. `breaks`: how what is found begins; None: another guard covers it."""

    guard: str
    name: str
    crowd: Crowd
    breaks: str | None

    def hunt(self) -> Result:
        """Explore until something breaks. The trace is a shortest one."""
        rules = Rules(replace(Guards(), **{self.guard: False}))
        return explore(Configuration(self.name, self.crowd(rules), ANY), symmetry=False)


ONE, FOUR, SEVEN = "invariant 1:", "invariant 4:", "invariant 7:"
DEADLOCK, LOST = "invariant 10:", "conservation:"


def _job(*jobs: str) -> Crowd:
    return lambda r: (writer(r, "writer"), operator(r, *jobs))


def _raw_and_job(*jobs: str) -> Crowd:
    return lambda r: (raw(r), operator(r, *jobs))


def _writers(r: Rules) -> tuple[Actor, ...]:
    return (writer(r, "writer A"), writer(r, "writer B"))


def _everybody(r: Rules) -> tuple[Actor, ...]:
    return (writer(r, "writer"), raw(r), operator(r, *JOBS), reader(r))


MUTANTS = (
    Mutant("state_under_lock", "the state is read without a lock", _raw_and_job("backfill"), ONE),
    Mutant("probe", "no probe for an account that is not seen", _raw_and_job("backfill"), ONE),
    Mutant("state_in_new_statement", "the state is read in the statement that waits for legacy", _job("unfreeze"), ONE),
    Mutant("backfill_locks", "the backfill does not lock", _raw_and_job("backfill"), ONE),
    Mutant("backfill_rereads", "the backfill does not read again under the lock", _raw_and_job("backfill"), ONE),
    Mutant("stale_mark", "nobody marks an account stale", lambda r: (writer(r, "writer"),), ONE),
    Mutant("fence", "no fence", lambda r: (raw(r),), ONE),
    Mutant("key_under_lock", "the key is looked up before the locks", _writers, FOUR),
    Mutant("key_kept_when_off", "the key is not kept while the flag is off", _writers, FOUR),
    Mutant("frozen_locks_all", "a frozen account's balance alone is locked", _job("unfreeze"), ONE),
    Mutant("closed_apart", "closed is treated as mirrored", lambda r: (raw(r), reader(r)), SEVEN),
    Mutant(
        "read_in_one_statement",
        "the reader takes two statements",
        lambda r: (operator(r, "backfill"), reader(r)),
        SEVEN,
    ),
    Mutant("short_asks_state", "the short way does not ask for the state", _job("freeze"), LOST),
    Mutant("short_knows_isolation", "the short way believes an old snapshot", _job("backfill"), ONE),
    Mutant(
        "look_knows_isolation", "raw SQL's look without a lock believes an old snapshot", _raw_and_job("backfill"), ONE
    ),
    Mutant("order_of_locks", "a job locks the account first", _job("freeze"), DEADLOCK),
    Mutant("frozen_rejects", "raw writes to a frozen account's column pass", lambda r: (raw(r),), LOST),
    Mutant("adapter_marks_stale", "only the fence marks stale, not the adapter", _everybody, None),
    Mutant("compares", "the adapter does not compare after writing", _everybody, None),
    Mutant("freeze_compares", "freeze trusts that mirrored is equal", _everybody, None),
)
