"""Traffic for a copied legacy table, made from the table's own distribution of balances and tenants.

- Tenants have their share of the rows. Within a tenant a few accounts have much of the traffic, as in any
  application: the one of rank r has a weight of 1 / r^0.7.
- An amount is 1 unit to 30 % of a balance that is drawn from the tenant's balances of that column, so that
  large balances make large amounts, and as often as they occur. Where those are 0 it is up to 1,000 units.
- No balance leaves the range of the source's own: no debit goes below the smallest balance, or the floor if that
  is higher; no credit above the largest. A range of less than ten steps is widened upwards.

All of it is counted in units, the smallest amount of a column's currency, as int: exact at any size.
"""

from __future__ import annotations

import bisect
import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal, localcontext
from typing import Final, NamedTuple

from walletmigrate.errors import PreconditionRefused
from walletmigrate.traffic import EXACT, GENERATED, Place, Traffic, Transaction

FEWEST: Final = 2_000
PER_ACCOUNT: Final = 10

_SKEW: Final = 0.7
_DRAWS: Final = 3
_SMALL: Final = 1_000
_NARROW: Final = 10
_ATTEMPTS: Final = 20


class Holding(NamedTuple):
    """A row of the copied table: its key as text, its tenant ("" for none), its balances in units by place."""

    account: str
    tenant: str
    units: tuple[int, ...]


@dataclass(frozen=True)
class Limits:
    """What binds a column, in units: ``maximum`` is what it can hold, ``floor`` what debits stop at.

    ``coarse`` says that a CHECK binds it: then amounts are multiples of the balances' common divisor, because
    the condition may be about more than a range.
    """

    scale: int
    maximum: int
    floor: int | None = None
    coarse: bool = False


class _Range(NamedTuple):
    low: int
    high: int
    step: int


def usual_count(accounts: int) -> int:
    """How many transactions a rehearsal of so many accounts makes unless told otherwise."""
    return max(FEWEST, min(GENERATED, PER_ACCOUNT * accounts))


def likeness(
    source: str, rows: Sequence[Holding], limits: Sequence[Limits], *, trait: str, seed: int, count: int
) -> Traffic:
    """Make ``count`` transactions that fit these rows; the same for the same rows, limits and seed.

    Raises PreconditionRefused where no balance can move.
    """
    made = tuple(itertools.islice(_Teller(rows, limits, seed).transactions(count), count))
    if len(made) < count:
        mend = "look at the column's type, its floor and its balances"
        raise PreconditionRefused("the rehearsal", [("the balances leave no room for any movement", mend)])
    return Traffic(
        source,
        made,
        {row.account: row.tenant for row in rows},
        trait=trait,
        start=dict(_starts(rows, limits)),
    )


def _starts(rows: Sequence[Holding], limits: Sequence[Limits]) -> Iterator[tuple[Place, Decimal]]:
    with localcontext(EXACT):
        for place, limit in enumerate(limits):
            for row in rows:
                yield (row.account, place), Decimal(row.units[place]).scaleb(-limit.scale)


class _Teller:
    """Draws who moves how much; keeps every balance as it goes."""

    def __init__(self, rows: Sequence[Holding], limits: Sequence[Limits], seed: int) -> None:
        self._rows = rows
        self._limits = limits
        self._seed = seed
        self._dice = random.Random(f"walletmigrate likeness {seed}")
        self._balances = [list(row.units) for row in rows]
        self._ranges = [_range([row.units[place] for row in rows], limit) for place, limit in enumerate(limits)]
        tenants: dict[str, list[int]] = {}
        for at, row in enumerate(rows):
            tenants.setdefault(row.tenant, []).append(at)
        self._tenants = [tenants[name] for name in sorted(tenants)]
        for members in self._tenants:
            members.sort(key=lambda at: rows[at].account)
            self._dice.shuffle(members)
        self._shares = list(itertools.accumulate(map(len, self._tenants)))
        longest = max(map(len, self._tenants), default=0)
        self._weights = list(itertools.accumulate((1 + rank) ** -_SKEW for rank in range(longest)))

    def transactions(self, count: int) -> Iterator[Transaction]:
        """Transactions in order; ends early only where hardly anything can move."""
        number = 0
        for _ in range(_ATTEMPTS * count if self._rows else 0):
            members = self._dice.choices(self._tenants, cum_weights=self._shares)[0]
            last = len(members) - 1
            at = members[bisect.bisect(self._weights, self._dice.random() * self._weights[last], 0, last)]
            place = self._dice.randrange(len(self._limits))
            change = self._change(at, place, members)
            if change:
                number += 1
                yield self._transaction(number, at, place, change)

    def _transaction(self, number: int, at: int, place: int, change: int) -> Transaction:
        self._balances[at][place] += change
        row = self._rows[at]
        with localcontext(EXACT):
            amount = Decimal(change).scaleb(-self._limits[place].scale)
        kind = "deposit" if change > 0 else "payment"
        return Transaction(f"d{self._seed}-{number}", row.account, row.tenant, kind, amount, number, place)

    def _change(self, at: int, place: int, members: Sequence[int]) -> int:
        """A signed change in units that leaves the balance in its range; 0 if there is none."""
        low, high, step = self._ranges[place]
        balance = self._balances[at][place]
        rooms = [(1, high - balance), (-1, balance - low)]
        if self._dice.random() < 0.5:
            rooms.reverse()
        for sign, room in rooms:
            if room >= step:
                return sign * min(self._amount(place, members, step), room - room % step)
        return 0

    def _amount(self, place: int, members: Sequence[int], step: int) -> int:
        for _ in range(_DRAWS):
            most = abs(self._rows[self._dice.choice(members)].units[place]) * 3 // 10
            if most >= step:
                return self._dice.randint(1, most // step) * step
        return self._dice.randint(1, _SMALL) * step


def _range(units: Sequence[int], limit: Limits) -> _Range:
    low, high = min(units, default=0), max(units, default=0)
    if limit.floor is not None:
        low = max(low, limit.floor)
    step = (math.gcd(*units) or 1) if limit.coarse else 1
    if high - low < _NARROW * step:
        high = min(limit.maximum, low + _SMALL * step)
    return _Range(low, high, step)
