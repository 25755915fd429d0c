"""Balances held against the application's own tables, by queries of the configuration: deposits − orders = balance."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Final

from sqlalchemy import Connection, CursorResult
from sqlalchemy.exc import DBAPIError

from walletmigrate import configchecks, connect
from walletmigrate.comparison import Comparison
from walletmigrate.errors import CrossCheckFailed

_NOT_ITS_FAULT: Final = ("08", "40", "53", "57")
"""Classes of SQLSTATE that say nothing about the query: connection, conflict, resources, an operator's hand."""


@dataclass(frozen=True)
class CrossDifference:
    """One balance that is not what the query says (major units); ``found`` is None where there is no such balance.

    ``expected`` is 0 for a key that the query does not give.
    """

    key: str
    expected: Decimal
    found: Decimal | None


@dataclass(frozen=True)
class CrossCheck:
    """What one cross-check saw: ``compared`` keys, ``differing`` ones, and the first of these."""

    name: str
    bucket: str
    currency: str
    compared: int
    differing: int
    differences: tuple[CrossDifference, ...]


def tried(comparison: Comparison, connection: Connection) -> None:
    """Ask each query of the mapping for no row: what it is called by, and whether it can be run at all.

    Raises CrossCheckFailed.
    """
    for check in comparison.mapping.cross_checks:
        names = list(
            _asked(comparison, connection, check, f"select * from ({_query(check)}) as q limit %(limit)s", 0).keys()
        )
        missing = [name for name in ("key", "expected") if names.count(name) != 1]
        if missing:
            what = f"its columns are {', '.join(names)}; it must have one column {' and one column '.join(missing)}"
            raise _failed(comparison, check, what)


def run(comparison: Comparison, connection: Connection, limit: int) -> tuple[CrossCheck, ...]:
    """Run all cross-checks of the mapping in the connection's snapshot, listing at most ``limit`` differences of each.

    What counts as the balance is what a read would give: the ledger's of a mirrored or frozen account, else legacy's.
    Raises CrossCheckFailed for a query that fails, a key that is NULL or comes twice, an amount that is none.
    """
    return tuple(_run(comparison, connection, check, limit) for check in comparison.mapping.cross_checks)


def _run(comparison: Comparison, connection: Connection, check: configchecks.CrossCheck, limit: int) -> CrossCheck:
    column = next(
        one
        for one in comparison.mapping.columns
        if check.bucket in (None, one.bucket) and check.currency in (None, one.currency)
    )
    expected = f'select q.key::text collate "C" as key, q.expected::numeric as expected from ({_query(check)}) as q'
    _usable(comparison, connection, check, expected)
    side = "left" if check.others == "ignore" else "full"
    balances = comparison.statement("balances").replace("%", "%%")
    differing = f"""
        with expected as materialized ({expected}),
        found as materialized (
            select b.key, b.balance from ({balances}) as b
            where b.bucket = '{column.bucket}' and b.currency = '{column.currency}'
        ),
        held as (
            select
                coalesce(e.key, f.key) as key, coalesce(e.expected, 0) as expected, f.balance as found,
                case
                    when f.key is null then abs(e.expected) > {check.tolerance:f}
                    else (abs(f.balance - coalesce(e.expected, 0)) <= {check.tolerance:f}) is not true
                end as differs
            from expected as e {side} join found as f on e.key = f.key
        )
        select null as key, count(*)::numeric as expected, count(*) filter (where differs)::numeric as found from held
        union all
        (select key, expected, found from held where differs order by key limit %(limit)s)
    """
    first, *rest = _asked(comparison, connection, check, differing, limit).all()
    return CrossCheck(
        name=check.name,
        bucket=column.bucket,
        currency=column.currency,
        compared=int(first.expected),
        differing=int(first.found),
        differences=tuple(CrossDifference(row.key, row.expected, row.found) for row in rest),
    )


def _usable(comparison: Comparison, connection: Connection, check: configchecks.CrossCheck, expected: str) -> None:
    """Raises CrossCheckFailed for keys and amounts that cannot be compared."""
    finite = "(x.expected > '-Infinity' and x.expected < 'Infinity')"
    row = _asked(
        comparison,
        connection,
        check,
        f"select count(*) as in_all, count(x.key) as named, count(distinct x.key) as keys, "
        f"count(*) filter (where {finite}) as amounts, min(x.key) filter (where {finite} is not true) as unfit "
        f"from ({expected}) as x limit %(limit)s",
        1,
    ).one()
    if row.named < row.in_all:
        raise _failed(comparison, check, f"{row.in_all - row.named} of its rows have no key")
    if row.keys < row.named:
        raise _failed(comparison, check, f"it gives {row.named} rows for {row.keys} keys; it must give one for each")
    if row.amounts < row.in_all:
        what = f"expected is NULL, NaN or infinite in {row.in_all - row.amounts} rows, for example of key {row.unfit}"
        raise _failed(comparison, check, what)


def _query(check: configchecks.CrossCheck) -> str:
    """The query as a subquery has it; a comment at its end must not swallow the bracket."""
    return "\n" + check.sql.replace("%", "%%") + "\n"


def _asked(
    comparison: Comparison, connection: Connection, check: configchecks.CrossCheck, statement: str, limit: int
) -> CursorResult[Any]:
    try:
        # With a parameter the server takes one statement only, in a transaction that may not write.
        return connection.exec_driver_sql(statement, {"limit": limit})
    except DBAPIError as error:
        state = connect.sqlstate(error)
        if not state or state.startswith(_NOT_ITS_FAULT):
            raise
        said = str(getattr(getattr(error.orig, "diag", None), "message_primary", None) or error.orig)
        raise _failed(comparison, check, f"{said} (SQLSTATE {state})") from None


def _failed(comparison: Comparison, check: configchecks.CrossCheck, problem: str) -> CrossCheckFailed:
    return CrossCheckFailed(comparison.mapping.name, check.name, problem)
