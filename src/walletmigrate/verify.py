"""Whether the ledger is true: every account against its legacy row, and the ledger against itself.

One read-only snapshot, so that money in flight is seen whole or not at all. Nothing is repaired; accounts that
differ can be turned stale.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from decimal import Decimal
from typing import Any, Final

from sqlalchemy import Connection, Engine, Row, text

from walletmigrate import config, marking
from walletmigrate.audit import Act, record
from walletmigrate.capture import FenceProblem, fence_problems
from walletmigrate.comparison import Comparison, Group, Total, snapshot
from walletmigrate.config import Settings
from walletmigrate.jobs import require_installed, visibility
from walletmigrate.schema import quoted, render

BEHIND: Final = ("missing", "stale")
"""Problems of accounts that the ledger is known not to follow; all others are money that is wrong."""

_BODY: Final = re.compile(
    r"^create (?:or replace )?function \S+\.(\w+)\(\) returns trigger\b.*?^as \$\$(.*?)\$\$;",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Drift:
    """One account that is not what its legacy row says (major units; None: there is no such value).

    ``problem`` is ``differs``, ``no_value`` (legacy is NULL, NaN or infinite), ``orphan`` (the row is gone,
    the account is not closed), ``reopened`` (the row lives, the account is closed), ``missing`` or ``stale``.
    """

    key: str
    bucket: str
    currency: str
    legacy: Decimal | None
    ledger: Decimal | None
    state: str
    problem: str


@dataclass(frozen=True)
class JournalProblem:
    """One contradiction between the transactions and an account, whose id is negative if it is the system's.

    ``expected`` is what the transactions say, ``found`` what is stored, where the problem is about amounts;
    ``transaction_id`` is the first transaction that does not fit, where one can be told.
    """

    account: int
    key: str | None
    bucket: str | None
    currency: str | None
    problem: str
    transaction_id: int | None = None
    expected: Decimal | None = None
    found: Decimal | None = None


@dataclass(frozen=True)
class Verification:
    """What one full verification of a mapping saw. Lists have at most ``limit`` entries, counts are in full.

    ``drift`` is money that is wrong; ``behind`` are accounts that are absent (``missing``) or ``stale``;
    ``journal_accounts`` are those with a journal problem. ``guards`` are triggers that do not stand as made.
    ``imbalance`` by currency, of the whole ledger, is zero. Totals are by currency; a frozen account's legacy
    column counts as it stands, although the ledger alone is true. ``clean``: there is nothing to report.
    ``turned_stale`` and ``closed``: how many accounts were afterwards, or would be (``dry_run``); None: not asked for.
    """

    mapping: str
    clean: bool
    accounts: int
    states: Mapping[str, int]
    missing: int
    stale: int
    drift_accounts: int
    drift_amount: Mapping[str, Decimal]
    drift: tuple[Drift, ...]
    behind: tuple[Drift, ...]
    journal_accounts: int
    journal: tuple[JournalProblem, ...]
    imbalance: Mapping[str, Decimal]
    guards: tuple[FenceProblem, ...]
    totals: tuple[Total, ...]
    legacy_total: Mapping[str, Decimal]
    ledger_total: Mapping[str, Decimal]
    started_at: datetime
    seconds: float
    dry_run: bool = False
    turned_stale: int | None = None
    closed: int | None = None
    groups: tuple[Group, ...] = field(default=(), repr=False)


def verify(
    engine: Engine,
    settings: Settings,
    mapping: config.Mapping,
    act: Act,
    *,
    limit: int = 1000,
    dry_run: bool = False,
    mark_stale: bool = False,
) -> Verification:
    """Verify a mapping in full; then, unless ``dry_run``, put the result and an audit row on record.

    ``mark_stale`` then turns the mirrored accounts that differ stale, if they still do: from then on they are read
    from legacy alone, and a backfill brings them up. Mirrored and stale accounts whose row is gone are closed. The
    result tells of the snapshot before.

    Raises LedgerNotInstalled, ConfigError when table and mapping do not fit, and PreconditionRefused where
    row-level security hides rows from this role. A difference is a result, not an error.
    """
    began = time.monotonic()
    with snapshot(engine) as connection:
        require_installed(connection, settings, mapping)
        visibility(connection, mapping, "verify")
        comparison = Comparison(connection, settings, mapping, with_traits=True)
        seen = _look(comparison, connection, settings, limit)
        found = marking.suspects(comparison, connection) if mark_stale and seen.drift_accounts else ()
    result = replace(seen, seconds=time.monotonic() - began, dry_run=dry_run)
    if mark_stale:
        gone = sum(one.gone for one in found)
        result = replace(result, turned_stale=len(found) - gone, closed=gone)
    if not dry_run:
        with engine.begin() as connection:
            _record(connection, settings, result, act)
        if found:
            marked = marking.mark(engine, settings, mapping, comparison, found, act)
            result = replace(result, turned_stale=len(marked.stale), closed=len(marked.closed))
    return result


def _look(comparison: Comparison, connection: Connection, settings: Settings, limit: int) -> Verification:
    mapping = comparison.mapping
    # Not the time of this statement: the snapshot is older, and what happened in between it has not seen.
    started_at = connection.execute(text("select transaction_timestamp()")).scalar_one()
    groups, totals = comparison.groups(connection, limit)
    behind = [group for group in groups if group.problem in BEHIND]
    wrong = [group for group in groups if group.problem not in (None, *BEHIND)]
    journal, journal_accounts = _journal(comparison, connection, limit)
    of_system, balances = _system(comparison, connection)
    for row in comparison.run(connection, "owners"):
        balances[row.currency] = balances.get(row.currency, Decimal(0)) + row.balance
    guards = (
        *fence_problems(connection, settings, mapping),
        *_append_only(comparison, connection, settings),
        *_bodies(comparison, connection, settings),
    )
    found = (behind, wrong, journal, of_system, guards, any(balances.values()))
    currencies = list(dict.fromkeys(column.currency for column in mapping.columns))
    return Verification(
        mapping=mapping.name,
        clean=not any(found),
        accounts=_count(group for group in groups if group.state != "absent"),
        states={state: _count(g for g in groups if g.state == state) for state in _states(groups)},
        missing=_count(group for group in behind if group.problem == "missing"),
        stale=_count(group for group in behind if group.problem == "stale"),
        drift_accounts=_count(wrong),
        drift_amount=_sums(currencies, ((group.currency, group.apart) for group in wrong)),
        drift=_differences(comparison, connection, limit, behind=False) if wrong else (),
        behind=_differences(comparison, connection, limit, behind=True) if behind else (),
        journal_accounts=journal_accounts + len({problem.account for problem in of_system}),
        journal=(*of_system, *journal),
        imbalance=balances,
        guards=guards,
        totals=tuple(sorted(totals, key=_order)),
        legacy_total=_sums(currencies, ((group.currency, group.legacy) for group in groups)),
        ledger_total=_sums(currencies, ((group.currency, group.ledger) for group in groups)),
        started_at=started_at,
        seconds=0.0,
        groups=tuple(groups),
    )


def _differences(comparison: Comparison, connection: Connection, limit: int, *, behind: bool) -> tuple[Drift, ...]:
    rows = comparison.run(connection, "differences", behind=behind, limit=limit)
    return tuple(
        Drift(row.key, row.bucket, row.currency, row.legacy, row.ledger, row.state, row.problem) for row in rows
    )


def _journal(comparison: Comparison, connection: Connection, limit: int) -> tuple[tuple[JournalProblem, ...], int]:
    """The problems of the first ``limit`` accounts that have one, and how many accounts have one."""
    rows = comparison.run(connection, "journal", limit=limit)
    return tuple(problem for row in rows for problem in _explained(row)), rows[0].found if rows else 0


def _explained(row: Row[Any]) -> Iterator[JournalProblem]:
    place = (row.account, row.key, row.bucket, row.currency)
    if row.unknown:
        yield JournalProblem(*place, "transactions of an account that does not exist", None, row.total)
        return
    if row.broken_at is not None:
        what = "the balance after a transaction does not follow from the one before"
        yield JournalProblem(*place, what, row.broken_at)
    if row.unexplained:
        what = "the balance is not the sum of the account's transactions"
        yield JournalProblem(*place, what, None, row.total, row.balance)
    if row.not_last:
        what = "the balance is not the one after the last transaction"
        yield JournalProblem(*place, what, None, row.last_balance, row.balance)
    if row.other_currency:
        yield JournalProblem(*place, "a transaction is in another currency than the account")


def _system(comparison: Comparison, connection: Connection) -> tuple[tuple[JournalProblem, ...], dict[str, Decimal]]:
    """Problems of system accounts, and the sum of their balances by currency."""
    problems: list[JournalProblem] = []
    balances: dict[str, Decimal] = {}
    for row in comparison.run(connection, "system"):
        place = (row.account, row.name, None, row.currency)
        balances[row.currency] = balances.get(row.currency, Decimal(0)) + row.balance
        if row.unknown:
            what = "transactions of a system account that does not exist"
            problems.append(JournalProblem(*place, what, None, row.total))
        elif row.balance != row.total:
            what = "the folded balance is not the sum of the account's transactions"
            problems.append(JournalProblem(*place, what, None, row.total, row.balance))
        if row.other_currency:
            problems.append(JournalProblem(*place, "a transaction is in another currency than the account"))
    return tuple(problems), balances


def _append_only(comparison: Comparison, connection: Connection, settings: Settings) -> Iterator[FenceProblem]:
    """Whether the triggers that keep the journal and the audit log from being changed stand as made."""
    for row in comparison.run(connection, "append_only", schema=settings.ledger_schema):
        name = f"{row.name} on {settings.ledger_schema}.{row.relation}"
        if not row.stands:
            yield FenceProblem(name, "is missing")
        elif row.enabled != "A":
            yield FenceProblem(name, "is disabled, or does not fire in replica role")
        elif not row.as_made:
            yield FenceProblem(name, "was replaced or altered")


def _bodies(comparison: Comparison, connection: Connection, settings: Settings) -> Iterator[FenceProblem]:
    """Whether the function under the append-only triggers has the body that the migration gave it."""
    made = dict(_BODY.findall(render("ledger", schema=quoted(settings.ledger_schema))))
    wanted = {"refuse_change": made["refuse_change"]}
    found = {row.name: row.body for row in comparison.run(connection, "bodies", schema=settings.ledger_schema)}
    for name, body in wanted.items():
        if name not in found:
            yield FenceProblem(f"function {settings.ledger_schema}.{name}", "is missing")
        elif found[name] != body:
            yield FenceProblem(f"function {settings.ledger_schema}.{name}", "was replaced")


def _record(connection: Connection, settings: Settings, result: Verification, act: Act) -> None:
    """One row per currency, each clean only if all is; then the audit row."""
    for currency in result.legacy_total:
        groups = [group for group in result.groups if group.currency == currency]
        wrong = [group for group in groups if group.problem not in (None, *BEHIND)]
        connection.execute(
            text(
                f"insert into {quoted(settings.ledger_schema)}.verifications (mapping, started_at, clean, "
                "full_run, accounts, missing, drift_accounts, drift_amount, currency, actor, details) values "
                "(:mapping, :started_at, :clean, true, :accounts, :missing, :drift_accounts, :drift_amount, "
                ":currency, :actor, cast(:details as jsonb))"
            ),
            {
                "mapping": result.mapping,
                "started_at": result.started_at,
                "clean": result.clean,
                "accounts": _count(group for group in groups if group.state != "absent"),
                "missing": _count(group for group in groups if group.problem == "missing"),
                "drift_accounts": _count(wrong),
                "drift_amount": sum((group.apart for group in wrong), Decimal(0)),
                "currency": currency,
                "actor": act.actor,
                "details": json.dumps(_facts(result), default=str),
            },
        )
    facts = {"clean": result.clean, "accounts": result.accounts, "missing": result.missing, **_facts(result)}
    record(connection, settings, "verify", act, mapping=result.mapping, details=facts)


def _facts(result: Verification) -> dict[str, Any]:
    return {
        "stale": result.stale,
        "drift_accounts": result.drift_accounts,
        "journal_accounts": result.journal_accounts,
        "guards": [f"{guard.trigger} {guard.problem}" for guard in result.guards],
        "imbalance": {currency: amount for currency, amount in result.imbalance.items() if amount},
        "seconds": round(result.seconds, 3),
    }


def _count(groups: Iterator[Group] | list[Group]) -> int:
    return sum(group.accounts for group in groups)


def _states(groups: list[Group]) -> list[str]:
    return sorted({group.state for group in groups})


def _sums(currencies: list[str], amounts: Iterator[tuple[str, Decimal]]) -> dict[str, Decimal]:
    sums = dict.fromkeys(currencies, Decimal(0))
    for currency, amount in amounts:
        sums[currency] += amount
    return sums


def _order(total: Total) -> tuple[str, str, str, bool, str]:
    return total.trait, total.bucket, total.currency, total.value is None, total.value or ""
