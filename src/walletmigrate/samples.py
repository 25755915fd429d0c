"""A random sample of accounts, and what it says about all of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from sqlalchemy import Connection

from walletmigrate.comparison import Comparison

CONFIDENCE: Final = 0.95


@dataclass(frozen=True)
class Sample:
    """``keys`` were looked at, drawn at random without replacement; ``wrong`` of them had a wrong balance or journal.

    With the stated ``confidence`` (a share of 1) at most the share ``at_most`` of all keys are wrong. ``whole``: the
    sample is all there is, and ``at_most`` the share itself.
    """

    keys: int
    wrong: int
    whole: bool
    confidence: float
    at_most: float


def draw(comparison: Comparison, connection: Connection, size: int) -> list[str]:
    """Keys of legacy rows and of accounts, each set of ``size`` keys equally likely; all keys if there are fewer."""
    return [row.key for row in comparison.run(connection, "sample", limit=size)]


def judged(keys: int, wrong: int, *, whole: bool) -> Sample:
    """What a sample of so many keys with so many wrong ones says."""
    share = wrong / keys if keys else 0.0
    return Sample(keys, wrong, whole, CONFIDENCE, share if whole else at_most(wrong, keys))


def at_most(wrong: int, keys: int, confidence: float = CONFIDENCE) -> float:
    """The upper end of the exact one-sided confidence interval for the share of wrong keys (0 to 1).

    It is the share p at which so few wrong ones, or fewer, would be seen with a probability of 1 − ``confidence`` only:
    the p with P(X ≤ wrong) = 1 − confidence for X binomial (keys, p). Clopper and Pearson, "The use of confidence or
    fiducial limits illustrated in the case of the binomial", Biometrika 26 (1934), 404–413. For wrong = 0 it is
    1 − (1 − confidence)^(1/keys), which at 95 % is nearly 3/keys, the rule of three (Hanley and Lippman-Hand,
    JAMA 249 (1983), 1743–1745). A sample drawn without replacement, as here, says no less than that.
    """
    if wrong >= keys:
        return 1.0
    tail = 1 - confidence
    low, high = wrong / keys, 1.0
    for _ in range(100):  # halves the interval each time: far below what a float can tell
        middle = (low + high) / 2
        low, high = (middle, high) if _at_most(wrong, keys, middle) > tail else (low, middle)
    return high


def _at_most(wrong: int, keys: int, share: float) -> float:
    """P(X ≤ wrong) for X binomial (keys, share), with 0 < wrong + 1 ≤ keys."""
    if share >= 1:
        return 0.0
    if share <= 0:
        return 1.0
    logs = [
        math.lgamma(keys + 1)
        - math.lgamma(k + 1)
        - math.lgamma(keys - k + 1)
        + k * math.log(share)
        + (keys - k) * math.log1p(-share)
        for k in range(wrong + 1)
    ]
    return min(1.0, math.fsum(math.exp(one) for one in logs))
