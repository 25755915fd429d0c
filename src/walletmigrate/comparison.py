"""Every account of a mapping beside its legacy row, compared inside the database: for verify and dry runs.

Read-only, in the caller's transaction and so of one snapshot if that is REPEATABLE READ.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Final

from sqlalchemy import Connection, Engine, Row, text

from walletmigrate import functions, retired
from walletmigrate.config import Mapping, Settings
from walletmigrate.schema import quoted, render

_MARK: Final = "-- name: "
_MEMORY: Final = "64MB"


@dataclass(frozen=True)
class Group:
    """Accounts of one bucket that stand alike: ``accounts`` of them, with the sums of their balances.

    ``lives``: the legacy row exists. ``exact``: its value is an exact amount. ``equal``: legacy and ledger
    are the same, None where one of them has no value. ``ledger`` leaves out closed accounts without a row;
    ``apart`` is the sum of the distances. Amounts are in major units.
    """

    bucket: str
    currency: str
    state: str
    lives: bool
    exact: bool
    equal: bool | None
    accounts: int
    legacy: Decimal
    ledger: Decimal
    apart: Decimal

    @property
    def problem(self) -> str | None:
        """What is wrong with these accounts, named as in the statement ``differences``; None: nothing."""
        if self.state == "absent":
            return "missing"
        if self.state == "closed":
            return "reopened" if self.lives else None
        if not self.lives:
            return "orphan"
        if self.state == "mirrored":
            return "no_value" if self.equal is None else None if self.equal else "differs"
        return "stale" if self.state == "stale" else None


@dataclass(frozen=True)
class Total:
    """The balances of all accounts that share a trait's value (None: the row has none, or is gone)."""

    trait: str
    value: str | None
    bucket: str
    currency: str
    legacy: Decimal
    ledger: Decimal


class Comparison:
    """The statements of ``sql/verify.sql``, made for one mapping as its table and the ledger are now."""

    def __init__(
        self, connection: Connection, settings: Settings, mapping: Mapping, *, with_traits: bool = False
    ) -> None:
        """Raises ConfigError when table and mapping do not fit."""
        self.mapping: Final = mapping
        self.legacy: Final = retired.legacy_table(connection, settings.ledger_schema, mapping)
        self.traits: Final = tuple(mapping.traits) if with_traits else ()
        rows = connection.execute(
            text(f"select name, currency, id from {quoted(settings.ledger_schema)}.system_accounts")
        )
        system = {(row.name, row.currency): row.id for row in rows}
        self.names: Final = functions.context(
            settings.ledger_schema, mapping, self.legacy, system, roles=settings.roles
        )
        source = self.names["relation"]
        if retired.is_retired(connection, settings.ledger_schema):
            # There is nothing left to compare with; journal and sums are looked at all the same.
            source = retired.stand_in(settings, mapping, self.legacy)
        columns = [quoted(mapping.traits[trait]) for trait in self.traits]
        parts = render("verify", **{**self.names, "relation": source}, traits=columns).split(_MARK)[1:]
        self._statements = dict(part.split("\n", 1) for part in parts)

    def run(self, connection: Connection, name: str, **parameters: Any) -> list[Row[Any]]:
        """The rows of one statement."""
        # The driver reads a percent sign as a placeholder; text() sees to that.
        statement = self._statements[name].rstrip().removesuffix(";")
        return list(connection.execute(text(statement), parameters))

    def groups(self, connection: Connection, limit: int = 1000) -> tuple[list[Group], list[Total]]:
        """One pass over legacy and ledger: a handful of groups, and the totals by trait and value.

        Of each trait and bucket at most ``limit`` totals, those first whose legacy and ledger differ most.
        """
        groups: list[Group] = []
        totals: list[Total] = []
        for row in self.run(connection, "census", limit=limit):
            if row.state is not None:
                groups.append(
                    Group(
                        *(row.bucket, row.currency, row.state, row.lives, row.exact, row.equal),
                        *(row.accounts, row.legacy, row.ledger, row.apart),
                    )
                )
                continue
            index = self._trait_of(row.which)
            value = row._mapping[f"trait_{index + 1}"]
            totals.append(Total(self.traits[index], value, row.bucket, row.currency, row.legacy, row.ledger))
        return groups, totals

    def _trait_of(self, which: int) -> int:
        """Which trait a row was grouped by: its bit in GROUPING() is the one that is clear."""
        bits = f"{which >> 1:0{len(self.traits)}b}"
        return bits.index("0")


@contextmanager
def snapshot(engine: Engine) -> Iterator[Connection]:
    """A read-only transaction that sees one state of the database throughout, and writes nothing."""
    isolated = engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
    with isolated.begin() as connection:
        # One sort or hash of a million rows fits; nothing else of the session is changed.
        connection.exec_driver_sql(f"set local work_mem = '{_MEMORY}'")
        yield connection
