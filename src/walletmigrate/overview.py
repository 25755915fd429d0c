"""Where all the money is: totals by bucket, currency and trait, what they should be, and where it came from."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from sqlalchemy import Engine, text

from walletmigrate.comparison import Comparison, Total, snapshot
from walletmigrate.config import Settings
from walletmigrate.jobs import require_installed
from walletmigrate.schema import quoted, statements
from walletmigrate.snapshots import KINDS, SYSTEM
from walletmigrate.sums import less, total


@dataclass(frozen=True)
class BucketTotal:
    """All accounts of one bucket and currency of a mapping, in major units.

    ``legacy`` are the rows' column (None once the column is retired), ``ledger`` the accounts' balances; closed
    accounts are in ``closed`` instead. ``expected`` is what the journal's transactions come to, closed accounts
    left out; ``discrepancy`` = ledger − expected, and is zero in a true ledger. ``unmirrored`` = legacy − ledger:
    what is absent, stale or drifted. The net sums by kind say where the money came from, closed accounts included, and
    ``bypass`` what of them came past the adapter: from the system account of that name. None where that is not known:
    snapshots keep the kinds alone, and of several buckets of a currency that account does not say which it was.
    """

    mapping: str
    bucket: str
    currency: str
    accounts: int
    legacy: Decimal | None
    ledger: Decimal
    closed: Decimal
    expected: Decimal
    discrepancy: Decimal
    unmirrored: Decimal | None
    opening: Decimal
    resync: Decimal
    posting: Decimal
    correction: Decimal
    reversal: Decimal
    bypass: Decimal | None


@dataclass(frozen=True)
class SystemTotal:
    """One system account: its balance by the ledger's fold, and by the journal. Opposite in sign to what it gave."""

    name: str
    currency: str
    balance: Decimal
    expected: Decimal

    @property
    def discrepancy(self) -> Decimal:
        """What the fold has more than the journal."""
        return self.balance - self.expected


@dataclass(frozen=True)
class Overview:
    """Everything at one moment. ``imbalance`` is the sum of all balances by currency, zero in a true ledger.

    ``sound``: no discrepancy and no imbalance. That legacy and ledger differ is no discrepancy before the backfill.
    """

    buckets: tuple[BucketTotal, ...]
    traits: tuple[tuple[str, Total], ...]
    system: tuple[SystemTotal, ...]
    imbalance: dict[str, Decimal]
    snapshot_id: int | None

    @property
    def sound(self) -> bool:
        """Whether the ledger agrees with itself."""
        parts = [*(one.discrepancy for one in self.buckets), *(one.discrepancy for one in self.system)]
        return not any(parts) and not any(self.imbalance.values())


def overview(engine: Engine, settings: Settings, *, limit: int = 1000) -> Overview:
    """Add everything up in one read-only snapshot of the database; of each trait at most ``limit`` values.

    The newest snapshot (`snapshots.take`) spares it the journal's past: only the tail is read. Raises
    LedgerNotInstalled.
    """
    name = quoted(settings.ledger_schema)
    buckets: list[BucketTotal] = []
    traits: list[tuple[str, Total]] = []
    with snapshot(engine) as connection:
        for mapping in settings.mappings:
            require_installed(connection, settings, mapping)
        newest = connection.execute(
            text(f"select id, horizon, last_id from {name}.snapshots where state = 'complete' order by id desc limit 1")
        ).one_or_none()
        tail = {"horizon": newest and newest.horizon, "last_id": newest and newest.last_id}
        query = text(statements("snapshot_checks", schema=name)["journal"])
        journal = {(row.mapping, row.bucket, row.currency): row for row in connection.execute(query, tail)}
        bypasses = _bypasses(journal)
        phase = connection.scalar(text(f"select phase from {name}.control"))
        for mapping in settings.mappings:
            comparison = Comparison(connection, settings, mapping, with_traits=True) if phase != "retired" else None
            groups, found = comparison.groups(connection, limit) if comparison else ([], [])
            traits += [(mapping.name, one) for one in found]
            owned = {
                (row.bucket, row.currency): row
                for row in connection.execute(text(_OWNED.format(schema=name)), {"mapping": mapping.name})
            }
            for column in mapping.columns:
                place = (column.bucket, column.currency)
                here = [group for group in groups if (group.bucket, group.currency) == place]
                legacy = total(one.legacy for one in here) if comparison else None
                row = journal.pop((mapping.name, *place), None)
                past = bypasses.get((mapping.name, *place), Decimal(0))
                buckets.append(_bucket(mapping.name, place, owned.get(place), legacy, row, past))
        system = [
            SystemTotal(row.name, row.currency, row.balance, _sum(journal.pop((SYSTEM, *row[:2]), None)))
            for row in connection.execute(text(f"select name, currency, balance from {name}.system_balances"))
        ]
        left = connection.execute(text(f"select currency, sum(balance) from {name}.accounts group by currency"))
        imbalance: dict[str, Decimal] = {currency: Decimal(amount) for currency, amount in left}
    for one in system:
        imbalance[one.currency] = total((imbalance.get(one.currency, Decimal(0)), one.balance))
    ordered = tuple(sorted(system, key=lambda one: (one.currency, one.name)))
    return Overview(tuple(buckets), tuple(traits), ordered, imbalance, newest.id if newest else None)


def _bypasses(journal: dict[tuple[str, str, str], Any]) -> dict[tuple[str, str, str], Decimal | None]:
    """What came from `bypass`: by the journal, or where one bucket alone has that currency, by that account."""
    own = [place for place in journal if place[0] != SYSTEM]
    alone = Counter(currency for _, _, currency in own)
    found: dict[tuple[str, str, str], Decimal | None] = {}
    for place in own:
        account = journal.get((SYSTEM, "bypass", place[2]))
        found[place] = journal[place].bypass
        # One without a transaction gave nothing to any.
        if found[place] is None and (alone[place[2]] == 1 or account is None):
            found[place] = -_sum(account)
    return found


def _bucket(
    mapping: str,
    place: tuple[str, str],
    owned: Any,
    legacy: Decimal | None,
    journal: Any,
    bypass: Decimal | None,
) -> BucketTotal:
    ledger, closed = (owned.ledger, owned.closed) if owned else (Decimal(0), Decimal(0))
    expected = less(_sum(journal), closed)
    sums: dict[str, Decimal] = {kind: getattr(journal, kind) if journal else Decimal(0) for kind in KINDS}
    return BucketTotal(
        mapping=mapping,
        bucket=place[0],
        currency=place[1],
        accounts=owned.accounts if owned else 0,
        legacy=legacy,
        ledger=ledger,
        closed=closed,
        expected=expected,
        discrepancy=less(ledger, expected),
        unmirrored=None if legacy is None else less(legacy, ledger),
        **sums,
        bypass=bypass,
    )


def _sum(journal: Any) -> Decimal:
    return Decimal(journal.balance) if journal is not None else Decimal(0)


_OWNED = """
select bucket, currency, count(*) as accounts,
    coalesce(sum(balance) filter (where state <> 'closed'), 0) as ledger,
    coalesce(sum(balance) filter (where state = 'closed'), 0) as closed
from {schema}.accounts where mapping = :mapping group by bucket, currency
"""
