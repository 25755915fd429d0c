"""Every account of a mapping beside its legacy row, compared inside the database: for verify and dry runs.

Read-only, in the caller's transaction and so of one snapshot if that is REPEATABLE READ. Count, sum and a hash of both
sides are compared first, of the whole and then of ranges of keys; only ranges that differ are compared row by row.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Final, Literal

from sqlalchemy import Connection, Engine, Row, text

from walletmigrate import functions, retired
from walletmigrate.config import Mapping, Settings
from walletmigrate.connect import unhurried
from walletmigrate.schema import quoted, statements
from walletmigrate.sums import less, total

RANGES: Final = 1024
"""Ranges of keys, by the keys' hashes: equally large whatever the keys are, and the same on both sides."""

_MEMORY: Final = "64MB"
_INTEGER: Final = re.compile(r"0|-?[1-9][0-9]{0,18}")
_UUID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


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


@dataclass(frozen=True)
class KeyRange:
    """A range of keys in which the two sides differ, of one bucket; its number is of this run alone.

    Accounts are legacy rows on the one side and mirrored accounts on the other; amounts in major units, None of none.
    """

    number: int
    bucket: str
    currency: str
    legacy_accounts: int
    legacy: Decimal | None
    ledger_accounts: int
    ledger: Decimal | None


@dataclass(frozen=True)
class Scope:
    """Which keys are compared row by row: ``all``, those of ``ranges``, or these ``keys`` with their account ids."""

    within: Literal["all", "ranges", "keys"] = "all"
    ranges: tuple[int, ...] = ()
    keys: tuple[str, ...] = ()
    accounts: tuple[int, ...] = ()


@dataclass(frozen=True)
class Seen:
    """A comparison of a whole mapping. ``scope`` is what had to be compared row by row, None where nothing differs."""

    groups: list[Group]
    totals: list[Total]
    ranges: tuple[KeyRange, ...]
    scope: Scope | None
    ledger: list[Row[Any]]


ALL: Final = Scope()


class Comparison:
    """The statements of ``sql/verify.sql`` and ``journals.sql``, made for one mapping as table and ledger are now."""

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
        self._seed = secrets.randbits(62)
        names = {**self.names, "relation": source, "traits": columns, "last_range": RANGES - 1}
        self._statements = {
            within: {**statements("verify", within=within, **names), **statements("journals", within=within, **names)}
            for within in ("all", "ranges", "keys")
        }

    def run(self, connection: Connection, name: str, scope: Scope = ALL, **parameters: Any) -> list[Row[Any]]:
        """The rows of one statement."""
        # The driver reads a percent sign as a placeholder; text() sees to that.
        statement = text(self._statements[scope.within][name])
        known = {
            "seed": self._seed,
            "ranges": list(scope.ranges),
            "keys": list(scope.keys),
            "legacy_keys": [key for key in scope.keys if self._possible(key)],
            "accounts": list(scope.accounts),
            **parameters,
        }
        wanted = {name: value for name, value in known.items() if name in statement._bindparams}
        return list(connection.execute(statement, wanted))

    def statement(self, name: str) -> str:
        """The text of a statement over all keys, for use within another one."""
        return self._statements["all"][name]

    def groups(self, connection: Connection, limit: int = 1000) -> tuple[list[Group], list[Total]]:
        """What `whole` sees: a handful of groups, and the totals by trait and value."""
        seen = self.whole(connection, limit)
        return seen.groups, seen.totals

    def whole(self, connection: Connection, limit: int = 1000) -> Seen:
        """Compare all keys. Of each trait and bucket at most ``limit`` totals, those first that differ most."""
        legacy = self.run(connection, "legacy", limit=limit)
        ledger = self.run(connection, "ledger")
        whole = next(row for row in legacy if self._trait_of(row.which) is None)
        own = [row for row in ledger if row.mapping == self.mapping.name]
        if self._agrees(whole, own):
            groups = list(self._in_step(own, []))
            return Seen(groups, list(self._totals(legacy)), (), None, ledger)
        ranges: tuple[KeyRange, ...] = ()
        scope = ALL
        others = sum(row.accounts for row in own if row.state in ("stale", "frozen"))
        if others < RANGES and whole.accounts and own:  # else there is hardly a range without one
            ranges = self._differing(connection)
            numbers = tuple(sorted({one.number for one in ranges}))
            scope = Scope("ranges", numbers) if len(numbers) < RANGES // 2 else ALL
        compared = self.census(connection, scope)
        rest = self._in_step(own, compared) if scope is not ALL else iter(())
        totals = self.run(connection, "totals", scope, limit=limit) if self.traits else []
        return Seen(
            groups=[*compared, *rest],
            totals=[
                Total(self.traits[row.which - 1], row.value, row.bucket, row.currency, row.legacy, row.ledger)
                for row in totals
            ],
            ranges=ranges,
            scope=scope,
            ledger=ledger,
        )

    def census(self, connection: Connection, scope: Scope) -> list[Group]:
        """Compare row by row, and count what stands alike."""
        return [
            Group(
                *(row.bucket, row.currency, row.state, row.lives, row.exact, row.equal),
                *(row.accounts, row.legacy, row.ledger, row.apart),
            )
            for row in self.run(connection, "census", scope)
        ]

    def keys(self, connection: Connection, keys: Sequence[str]) -> Scope:
        """These keys, with the ids of their accounts."""
        ids = self.run(connection, "ids", keys=list(keys))
        return Scope("keys", keys=tuple(keys), accounts=tuple(row.id for row in ids))

    def _possible(self, key: str) -> bool:
        """Whether the legacy table can have this key: to ask for another one would end the statement."""
        if self.legacy.key_type == "integer":
            return _INTEGER.fullmatch(key) is not None and -(2**63) <= int(key) < 2**63
        return self.legacy.key_type == "text" or _UUID.fullmatch(key) is not None

    def _agrees(self, whole: Row[Any], own: list[Row[Any]]) -> bool:
        """Whether count, sum and hash are the same on both sides, and no account stands otherwise than mirrored."""
        kinds = {(column.bucket, column.currency) for column in self.mapping.columns}
        if any(row.state not in ("mirrored", "closed") for row in own if (row.bucket, row.currency) in kinds):
            return False
        mirrored = {(row.bucket, row.currency): row for row in own if row.state == "mirrored"}
        for index, column in enumerate(self.mapping.columns, start=1):
            legacy = (whole._mapping[f"sum_{index}"], whole._mapping[f"hash_{index}"])
            ledger = mirrored.get((column.bucket, column.currency))
            if (ledger.accounts if ledger else 0) != whole.accounts:
                return False
            if legacy != ((ledger.balance, ledger.hash) if ledger else (None, None)):
                return False
        return True

    def _differing(self, connection: Connection) -> tuple[KeyRange, ...]:
        rows = self.run(connection, "ranges")
        return tuple(
            KeyRange(
                *(row.number, row.bucket, row.currency),
                *(row.legacy_accounts, row.legacy, row.ledger_accounts, row.ledger),
            )
            for row in rows
        )

    def _in_step(self, own: list[Row[Any]], compared: list[Group]) -> Iterator[Group]:
        """The accounts that were not compared row by row: mirrored and equal, or closed with their rows."""
        for column in self.mapping.columns:
            kind = (column.bucket, column.currency)
            for state in ("mirrored", "closed"):
                rows = [row for row in own if (row.bucket, row.currency, row.state) == (*kind, state)]
                found = [one for one in compared if (one.bucket, one.currency, one.state) == (*kind, state)]
                count = sum(row.accounts for row in rows) - sum(one.accounts for one in found)
                if not count:
                    continue
                lives = state == "mirrored"
                amount = Decimal(0)
                if lives:
                    amount = less(total(row.balance for row in rows), total(one.ledger for one in found))
                equal = True if lives else None
                yield Group(*kind, state, lives, lives, equal, count, amount, amount, Decimal(0))

    def _totals(self, legacy: list[Row[Any]]) -> Iterator[Total]:
        """The totals by trait, where the ledger has the same as legacy."""
        for row in legacy:
            trait = self._trait_of(row.which)
            if trait is None:
                continue
            value = row._mapping[f"trait_{trait + 1}"]
            for index, column in enumerate(self.mapping.columns, start=1):
                amount = row._mapping[f"sum_{index}"]
                yield Total(self.traits[trait], value, column.bucket, column.currency, amount, amount)

    def _trait_of(self, which: int) -> int | None:
        """Which trait a row was grouped by: its bit in GROUPING() is the one that is clear; None: by none."""
        bits = f"{which:0{len(self.traits)}b}" if self.traits else ""
        return bits.index("0") if "0" in bits else None


@contextmanager
def snapshot(engine: Engine) -> Iterator[Connection]:
    """A read-only transaction that sees one state of the database throughout, and writes nothing.

    It has no time limit, whatever the role, the database or the server set: a table of a hundred million rows is read
    for longer than a job may take, and while the throttle holds a run its transaction is idle.
    """
    isolated = engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
    with isolated.begin() as connection:
        # One sort or hash of a million rows fits; nothing else of the session is changed.
        own = f"set local work_mem = '{_MEMORY}'; set local statement_timeout = 0"
        connection.exec_driver_sql(f"{own}; {unhurried(connection)}")
        yield connection
