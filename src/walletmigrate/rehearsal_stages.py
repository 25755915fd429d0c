"""The stages of a rehearsal: which steps the migration takes, in which order, while traffic runs.

A stage is a row of legs. Beside each leg's traffic the migration takes one step; a leg without a step says how
its postings must be written and its balances read now, so that a step without an effect is noticed.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from walletmigrate.rehearsal_crew import Crew
from walletmigrate.rehearsal_display import Display
from walletmigrate.rehearsal_messages import Tally
from walletmigrate.rehearsal_report import Stage, stage
from walletmigrate.rehearsal_steps import Migration
from walletmigrate.traffic import Transaction

BEGIN_STEP_AT: Final = 0.25
"""The share of a leg's transactions that is done before its step begins."""

BEGIN_FLIP_AT: Final = 0.05
"""The same for a step that waits until a flag has arrived everywhere: most traffic is to run meanwhile."""


@dataclass(frozen=True)
class Leg:
    """A part of a stage: the step beside its traffic, or how that traffic must be written and read.

    ``settled`` lets the step wait for the end of the traffic. ``flips``: the step waits until a flag flip has
    arrived in every process, and the traffic is spread over that time.
    """

    step: Callable[[Migration, Crew], str] | None = None
    what: str = ""
    mode: str | None = None
    source: str | None = None
    settled: bool = False
    flips: bool = False

    @property
    def begin_at(self) -> float:
        """The share of the traffic that is done before the step begins."""
        return 1 if self.settled else BEGIN_FLIP_AT if self.flips else BEGIN_STEP_AT


STAGES: Final[tuple[tuple[str, tuple[Leg, ...]], ...]] = (
    ("legacy only", (Leg(mode="legacy", source="legacy"),)),
    (
        "install and backfill",
        (
            Leg(Migration.install, "install"),
            Leg(Migration.write_some, "dual-write for some tenants, backfill"),
            Leg(source="legacy"),
            Leg(Migration.exercise, "the way back, exercised"),
        ),
    ),
    (
        "dual-write",
        (
            Leg(Migration.write_all, "dual-write for all, backfill", flips=True),
            Leg(Migration.lose_a_worker, "a worker killed, its work sent again", mode="dual_write", source="legacy"),
        ),
    ),
    (
        "ledger reads",
        (
            Leg(Migration.read_some, "verify, ledger reads for a cohort"),
            Leg(mode="dual_write"),
            Leg(Migration.read_all, "ledger reads for all", flips=True),
            Leg(mode="dual_write", source="ledger"),
        ),
    ),
    (
        "the line stopped",
        (
            Leg(Migration.stop_the_line, "stop the line"),
            Leg(mode="legacy"),
            Leg(Migration.resume, "resume"),
            Leg(mode="dual_write", source="ledger"),
        ),
    ),
    (
        "rollback and forward",
        (
            Leg(Migration.roll_back, "reads back to legacy"),
            Leg(mode="dual_write", source="legacy"),
            Leg(Migration.forward, "verify, ledger reads for all", flips=True),
            Leg(mode="dual_write", source="ledger"),
        ),
    ),
    (
        "ledger only",
        (
            Leg(Migration.freeze, "freeze"),
            Leg(mode="ledger", source="ledger"),
        ),
    ),
    (
        "unfreeze",
        (
            Leg(Migration.unfreeze, "unfreeze"),
            Leg(mode="dual_write", source="ledger"),
        ),
    ),
    (
        "final verification",
        (Leg(Migration.verify, "verify", mode="dual_write", source="ledger", settled=True),),
    ),
)


def legs_of(transactions: Sequence[Transaction]) -> tuple[tuple[Transaction, ...], ...]:
    """Cut the traffic, in order, into one slice for each leg; every stage gets the same share."""
    cuts = []
    for place, (_, legs) in enumerate(STAGES):
        for leg in range(len(legs)):
            share = (place + leg / len(legs)) / len(STAGES)
            cuts.append(round(share * len(transactions)))
    cuts.append(len(transactions))
    return tuple(tuple(transactions[a:b]) for a, b in pairwise(cuts))


class Walk:
    """The walk through all stages. ``stages`` and ``total`` hold what is finished, however the walk ends."""

    def __init__(self, migration: Migration, crew: Crew, shown: Display, flag_lag: float) -> None:
        """``flag_lag`` is how many seconds a flag flip takes to the last process."""
        self.stages: list[Stage] = []
        self.total = Tally(-1)
        self._migration = migration
        self._crew = crew
        self._shown = shown
        self._flag_lag = flag_lag
        self._leg = 0

    def go(self) -> None:
        """Walk. Raises WorkersFailed, or what a step was refused or failed with."""
        for name, legs in STAGES:
            self._shown.begin(name)
            count, seconds, durations, remarks, rejected = 0, 0.0, array("d"), [], 0
            for leg in legs:
                tally, took, remark = self._walk_leg(leg)
                count, seconds = count + tally.applied, seconds + took
                durations.extend(tally.seconds)
                remarks += [remark] if remark else []
                rejected += tally.rejected
                self.total.add(tally)
            if rejected:
                remarks.append(f"{rejected} raw writes rejected, and sent again through the adapter")
            self.stages.append(stage(name, count, seconds, durations))
            self._shown.end(self.stages[-1], "; ".join(remarks))

    def _walk_leg(self, leg: Leg) -> tuple[Tally, float, str]:
        remark = ""
        self._crew.run(self._leg, self._flag_lag if leg.flips else 0)
        if leg.step is not None:
            self._crew.wait_for_share(leg.begin_at)
            self._shown.step(leg.what)
            remark = leg.step(self._migration, self._crew)
        tally, seconds = self._crew.finish()
        self._leg += 1
        _check(leg, tally)
        return tally, seconds, remark


def _check(leg: Leg, tally: Tally) -> None:
    """A step without an effect is noticed here: all traffic after it must go the way it asked for."""
    for what, wanted, found in (("written", leg.mode, tally.modes), ("read", leg.source, tally.reads)):
        for name in [name for name in found if wanted not in (None, name)]:
            tally.wrong(f"{found[name]} balances were {what} in mode {name}, after the step to {wanted}")
