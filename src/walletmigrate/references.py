"""What in the ledger points at something that does not exist, or stands twice: referential integrity, each named.

The ledger has no foreign keys between accounts and transactions: they would cost every posting, and an owner can drop
them. So a verification looks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, text

from walletmigrate.capture import FenceProblem
from walletmigrate.config import Settings
from walletmigrate.schema import quoted, statements


@dataclass(frozen=True)
class Reference:
    """One row that points at nothing, or one of several that there must be one of.

    ``subject`` is the row (an id, a key), ``target`` what it points at, or the ids of all that stand there.
    """

    problem: str
    subject: str
    target: str


@dataclass(frozen=True)
class References:
    """``count`` rows are wrong, of which ``found`` has the first of each kind."""

    count: int
    found: tuple[Reference, ...]


def look(
    connection: Connection,
    settings: Settings,
    ledger: Sequence[Row[Any]],
    earlier: Mapping[str, Any] | None,
    *,
    grouped: bool,
    horizon: int,
    limit: int,
) -> References:
    """Look at all references of the ledger, at most ``limit`` of each kind being listed, and whether something is gone
    that the last clean run saw: ``earlier`` is its number (``run``), its snapshot (``seen``), and how many
    ``transactions`` that had.

    ``ledger`` are the sums that `Comparison.whole` saw; ``grouped`` says whether any transaction is of a group. A
    ``horizon`` other than 0 says that every transaction stands as an earlier clean run saw it: what was written by
    transactions of the database below it, and not since, points at one still.
    """
    schema = quoted(settings.ledger_schema)
    queries = statements("references", schema=schema)
    wanted = ["references", *(["groups"] if grouped else [])]
    known = {tuple(row) for row in connection.execute(text(queries["known"]))}
    if any((row.mapping, row.bucket, row.currency) not in known for row in ledger):
        wanted.append("strangers")
    if any(missing_indexes(connection, settings)):
        wanted.append("duplicates")
    if earlier is not None and not horizon:
        wanted.append("gone")
    values = {"horizon": horizon, "limit": limit, **(earlier or {})}
    rows = [row for name in wanted for row in _rows(connection, queries[name], values)]
    counts = {row.problem: row.in_all for row in rows}
    found = tuple(Reference(row.problem, row.subject, row.target) for row in rows)
    return References(sum(counts.values()), found)


def _rows(connection: Connection, query: str, values: dict[str, Any]) -> Sequence[Row[Any]]:
    return connection.execute(text(query), {name: value for name, value in values.items() if f":{name}" in query}).all()


def missing_indexes(connection: Connection, settings: Settings) -> Iterator[FenceProblem]:
    """Unique indexes of the ledger that do not stand: without them there may be two of what there is one of."""
    query = statements("references", schema=quoted(settings.ledger_schema))["uniqueness"]
    for row in connection.execute(text(query), {"schema": settings.ledger_schema}):
        yield FenceProblem(f"unique index on {settings.ledger_schema}.{row.relation} ({row.columns})", "is missing")
