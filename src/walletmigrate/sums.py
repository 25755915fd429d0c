"""Exact sums of amounts: Python's own context rounds every addition to 28 digits, and a total may have more."""

from __future__ import annotations

from collections.abc import Iterable
from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal, Inexact, InvalidOperation
from typing import Final

_EXACT: Final = Context(prec=200_000, Emin=MIN_EMIN, Emax=MAX_EMAX, traps=[Inexact, InvalidOperation])
"""More digits than PostgreSQL's numeric has; only what an amount really has is worked with."""


def total(amounts: Iterable[Decimal]) -> Decimal:
    """The sum, exact to the last digit; 0 of none."""
    found = Decimal(0)
    for amount in amounts:
        found = _EXACT.add(found, amount)
    return found


def less(amount: Decimal, other: Decimal) -> Decimal:
    """``amount`` − ``other``, exact to the last digit."""
    return _EXACT.subtract(amount, other)


def by_name(names: Iterable[str], amounts: Iterable[tuple[str, Decimal]]) -> dict[str, Decimal]:
    """The sums of amounts by name, such as a currency; ``names`` are there in any case."""
    sums = dict.fromkeys(names, Decimal(0))
    for name, amount in amounts:
        sums[name] = _EXACT.add(sums.get(name, Decimal(0)), amount)
    return sums
