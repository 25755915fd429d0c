"""What an operator may set of a job while it runs, and how the size of a batch finds its target time.

The way in which the size tunes itself is that of GitLab's batched background migrations: the time of a batch over
the time that it should take is its efficiency; smoothed over the last batches it is to stand between 0.90 and 0.95.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Final

from walletmigrate.errors import UsageError

EVERYTHING: Final = "(all)"
"""The mapping of a job that works on the whole ledger, as a snapshot does."""

STALLED_SECONDS: Final = 60
"""After how long without a batch, and without a word that it is held, a job that counts as running is stalled."""

PACE: Final = 3_000.0
"""Accounts a second, for each worker, of a backfill to which nobody said another rate: what an application that writes
beside it does not feel (`make bench`).
"""

BURST_SECONDS: Final = 0.02
"""The time whose share of a rate is done at once, in one batch: so many small commits, and none that others have to
wait for. A fiftieth of the pace is sixty accounts; by five hundred a payment beside it is held up (`make bench`).
"""

LONGEST_BURST_SECONDS: Final = 0.1
"""As much as that at once, where the batches before found accounts that needed nothing, and so left their time."""

FIRST_SIZE: Final = 1000
"""Keys of the first batches of a job that tunes itself."""

SMOOTHED: Final = 20
"""How many batches the smoothing looks back."""

_ALPHA: Final = 0.4
_AIM: Final = (0.90, 0.95)
_LARGEST_STEP: Final = 1.2


@dataclass(frozen=True)
class Options:
    """Settings of one job. ``batch_size`` (legacy rows) None means that it tunes itself between the bounds.

    ``rate`` are accounts a second over all workers, None: as fast as it goes. More than ``max_failures`` legacy
    rows that are set aside fail the job. Within ``lease_seconds`` a worker must have begun a batch that it claimed.
    """

    batch_size: int | None = None
    min_batch_size: int = 100
    max_batch_size: int = 10_000
    target_seconds: float = 0.5
    rate: float | None = None
    max_failures: int = 100
    lease_seconds: float = 10.0

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> Options:
        """The settings of a job's row; what this release does not know is left alone."""
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in stored.items() if name in known})

    def burst(self, per_key: int = 1, left: float = LONGEST_BURST_SECONDS) -> int | None:
        """How many keys, with ``per_key`` accounts each, a batch may have under the rate, when the ones before have
        ``left`` so many seconds of it. None: there is no rate.
        """
        seconds = min(max(left, BURST_SECONDS), LONGEST_BURST_SECONDS)
        return None if self.rate is None else max(1, int(self.rate * seconds / per_key))

    def shown(self) -> dict[str, str]:
        """The settings as `parsed` reads them."""
        return {
            _word(name): _NONE.get(name, "") if value is None else f"{value:.15g}"
            for name, value in asdict(self).items()
        }

    def size(self, current: int | None, seconds: Sequence[float]) -> int:
        """Keys of the next batch; ``seconds`` are those of the last batches, the newest first."""
        if self.batch_size is not None:
            return self.batch_size
        size = current or FIRST_SIZE
        efficiency = _smoothed([one / self.target_seconds for one in seconds[:SMOOTHED]])
        if efficiency and not _AIM[0] <= efficiency <= _AIM[1]:
            size = math.ceil(size * min(_AIM[1] / efficiency, _LARGEST_STEP))
        return min(max(size, self.min_batch_size), self.max_batch_size)


def parsed(words: Iterable[str]) -> dict[str, Any]:
    """Settings out of ``batch-size=500``, ``rate=none`` …, as a job's row stores them. Raises UsageError."""
    found: dict[str, Any] = {}
    for word in words:
        name, mark, value = word.partition("=")
        read = _READ.get(name.strip())
        if read is None or not mark:
            known = ", ".join(f"{each}=…" for each in _READ)
            raise UsageError(f"{word!r} is no setting of a job; there are {known}")
        try:
            found[name.strip().replace("-", "_")] = read(value.strip())
        except ValueError as error:
            raise UsageError(f"{name}={value}: {error}") from None
    return found


def _smoothed(newest_first: Sequence[float]) -> float:
    """Exponential smoothing: each batch weighs 0.6 of the one after it."""
    weights = [(1 - _ALPHA) ** age for age in range(len(newest_first))]
    total = sum(weight * one for weight, one in zip(weights, newest_first, strict=True))
    return total / sum(weights) if weights else 0.0


def _word(name: str) -> str:
    return name.replace("_", "-")


def _count(least: int, most: int) -> Callable[[str], int]:
    def read(value: str) -> int:
        if not re.fullmatch(r"[0-9]{1,9}", value) or not least <= int(value) <= most:
            raise ValueError(f"a whole number from {least} to {most} is wanted")
        return int(value)

    return read


def _number(least: float, most: float) -> Callable[[str], float]:
    def read(value: str) -> float:
        if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,6})?", value) or not least <= float(value) <= most:
            raise ValueError(f"a number from {least:g} to {most:g} is wanted")
        return float(value)

    return read


def _or(word: str, read: Callable[[str], Any]) -> Callable[[str], Any]:
    return lambda value: None if value == word else read(value)


_NONE: Final = {"batch_size": "auto", "rate": "none"}
_READ: Final[dict[str, Callable[[str], Any]]] = {
    "batch-size": _or("auto", _count(1, 100_000)),
    "min-batch-size": _count(1, 100_000),
    "max-batch-size": _count(1, 100_000),
    "target-seconds": _number(0.01, 60),
    "rate": _or("none", _number(0.1, 100_000_000)),
    "max-failures": _count(0, 1_000_000),
    "lease-seconds": _number(1, 3600),
}
