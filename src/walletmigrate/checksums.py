"""The journal against the checksums that snapshots keep of it: are the rows that a snapshot folded still the same?

An edit that fits in itself (amounts, the balances behind it, the account and the legacy column together, or only a
reason) is seen by no sum and no balance. A snapshot has kept, for every 10,000 ids, how many transactions of its own it
folded there and the sum of their rows' hashes. Whoever may write both tables can make them fit again: a folder of
evidence, kept elsewhere, has them too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Final

from sqlalchemy import Connection, Engine, Row, text

from walletmigrate.config import Settings
from walletmigrate.job_reads import Run
from walletmigrate.schema import quoted, statements

RANGE: Final = 10_000
"""Ids under one checksum."""

LAST: Final = 2**63 - 1
FIRST: Final = -LAST
"""Below every id, also below those that nobody gave."""


@dataclass(frozen=True)
class Bare:
    """What cannot be checked: ``transactions`` of the snapshots up to ``upto``, which keep no checksums.

    They were taken before checksums were kept, or somebody removed these. None and 0: everything can.
    """

    upto: int | None
    transactions: int


@dataclass(frozen=True)
class Range:
    """Transactions of a snapshot with ids from ``first`` on: how many were folded (``kept``), are there (``held``)."""

    first: int
    kept: int
    kept_checksum: Decimal
    held: int
    held_checksum: Decimal

    @property
    def same(self) -> bool:
        """Whether they are the rows that were folded."""
        return (self.kept, self.kept_checksum) == (self.held, self.held_checksum)


@dataclass(frozen=True)
class Edited:
    """Transactions that are not the ones that were folded: ids from ``first`` to ``first`` + 9,999, of the window of
    a snapshot (None: which one is not known); ``kept`` and ``held`` as in `Range`.
    """

    first: int
    snapshot: int | None
    kept: int
    held: int


def bare(connection: Connection, settings: Settings, snapshot_id: int) -> Bare:
    """What of a snapshot has no checksum."""
    row = _run(connection, settings, "bare", snapshot=snapshot_id)[0]
    return Bare(row.upto, int(row.transactions))


def ranges(
    connection: Connection, settings: Settings, snapshot_id: int, unchecked: Bare, after: int = FIRST, upto: int = LAST
) -> list[Range]:
    """The ranges of ids behind ``after`` up to ``upto``, in order: of what the snapshot has and is not bare."""
    rows = _run(connection, settings, "checksums", snapshot=snapshot_id, bare=unchecked.upto, after=after, upto=upto)
    return [Range(r.first_id, int(r.kept), r.kept_checksum, int(r.held), r.held_checksum) for r in rows]


def edited(
    connection: Connection, settings: Settings, snapshot_id: int, unchecked: Bare, found: list[Range]
) -> Iterator[Edited]:
    """Of these ranges, what is not as it was, by the snapshots in whose windows it is."""
    for one in found:
        if one.same:
            continue
        values = {"snapshot": snapshot_id, "bare": unchecked.upto, "first": one.first}
        parts = _run(connection, settings, "windows", **values)
        yield from (Edited(one.first, part.snapshot_id, int(part.kept), int(part.held)) for part in parts)
        if not parts:
            yield Edited(one.first, None, one.kept, one.held)


def edited_in_turns(
    engine: Engine, settings: Settings, snapshot_id: int, unchecked: Bare, size: int, run: Run
) -> Iterator[Edited]:
    """The same of the whole journal: about ``size`` transactions in a database transaction, always whole ranges. A part
    of the job ``run``.
    """
    after = FIRST
    while after < LAST:
        run.at("rows of the journal, 3 of 3")
        with engine.begin() as connection, run.cutting(connection):
            row = _run(connection, settings, "next_transaction", snapshot=snapshot_id, after=after, limit=size)[0]
            upto = LAST if row.upto is None else row.upto // RANGE * RANGE + RANGE - 1
            found = ranges(connection, settings, snapshot_id, unchecked, after, upto)
            unlike = list(edited(connection, settings, snapshot_id, unchecked, found))
        yield from unlike
        after = upto


def _run(connection: Connection, settings: Settings, name: str, **values: Any) -> list[Row[Any]]:
    known = statements("snapshot_checks", schema=quoted(settings.ledger_schema))
    return list(connection.execute(text(known[name]), values))
