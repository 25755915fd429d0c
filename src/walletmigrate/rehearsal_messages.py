"""What the processes of a rehearsal tell each other: orders to workers, and what they answer."""

from __future__ import annotations

from array import array
from collections import defaultdict
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Final, TypeAlias

from sqlalchemy.engine.interfaces import IsolationLevel

from walletmigrate.config import KeyType, Settings
from walletmigrate.traffic import Place, Transaction

EXAMPLES: Final = 3


@dataclass(frozen=True)
class Assignment:
    """What a worker gets at its start. ``url`` may hold a password: it travels through a pipe, not as argument.

    ``role`` is the database role of the application. ``start`` is what the accounts of the share begin with where
    that is not 0, ``trait`` what their tenant is called. ``legs`` are its share of each leg of the rehearsal, and
    those before ``from_leg`` were posted by a worker that was killed in this one. ``flag_delay`` is how many
    seconds after a flag flip this process decides by it. ``metrics`` is the folder to count in, if anywhere.
    """

    number: int
    seed: int
    url: str
    role: str
    settings: Settings
    flag_file: Path
    key_type: KeyType
    trait: str
    start: dict[Place, Decimal]
    legs: tuple[tuple[Transaction, ...], ...]
    isolation: IsolationLevel = "READ COMMITTED"
    flag_delay: float = 0.0
    from_leg: int = 0
    metrics: Path | None = None


@dataclass(frozen=True, slots=True)
class Run:
    """Order: post the transactions of this leg, spread over so many seconds (0: as fast as can be)."""

    leg: int
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Restart:
    """Order: start the application anew, in the midst of its traffic, as a rolling deploy does."""


@dataclass(frozen=True, slots=True)
class Quit:
    """Order: end."""


@dataclass(frozen=True, slots=True)
class Beat:
    """Sign of life: transactions posted so far, restarts so far, and the flag document it decides by."""

    done: int
    restarts: int
    document_id: str


@dataclass(slots=True)
class Tally:
    """What a worker counted in one leg.

    ``replayed`` are answers to transactions that were sent before, ``rejected`` raw writes that the fence
    refused, ``serialization`` SQLSTATE 40001, each followed by another try; ``retried`` counts every second
    try. ``mismatches`` are answers that were not as they must be; ``seconds`` are the durations of its
    transactions, commit included; ``modes`` counts postings by mode.
    """

    leg: int
    applied: int = 0
    replayed: int = 0
    rejected: int = 0
    serialization: int = 0
    retried: int = 0
    mismatches: int = 0
    examples: list[str] = field(default_factory=list)
    modes: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    reads: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    seconds: array[float] = field(default_factory=lambda: array("d"))

    def wrong(self, what: str) -> None:
        """Count an answer that was not as it must be."""
        self.mismatches += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(what)

    def add(self, other: Tally) -> None:
        """Add what another worker counted."""
        self.applied += other.applied
        self.replayed += other.replayed
        self.rejected += other.rejected
        self.serialization += other.serialization
        self.retried += other.retried
        self.mismatches += other.mismatches
        self.examples = (self.examples + other.examples)[:EXAMPLES]
        for mine, theirs in ((self.modes, other.modes), (self.reads, other.reads)):
            for name, count in theirs.items():
                mine[name] += count
        self.seconds.extend(other.seconds)


@dataclass(frozen=True, slots=True)
class Failed:
    """The worker gave up, and why."""

    what: str
    trace: str


Order: TypeAlias = Run | Restart | Quit
Message: TypeAlias = Beat | Tally | Failed
