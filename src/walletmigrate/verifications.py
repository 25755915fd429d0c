"""Verifications: what one saw, and the log of all of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from decimal import Decimal
from typing import Any, Final, Literal

from sqlalchemy import Connection, text

from walletmigrate import config
from walletmigrate.audit import Act, record
from walletmigrate.capture import FenceProblem
from walletmigrate.comparison import Group, KeyRange, Total
from walletmigrate.config import Settings
from walletmigrate.cross_checks import CrossCheck
from walletmigrate.errors import UnknownRun
from walletmigrate.journals import JournalProblem, Known
from walletmigrate.references import Reference
from walletmigrate.samples import Sample
from walletmigrate.schema import quoted
from walletmigrate.standing import FENCE_MENDED, require_installed
from walletmigrate.sums import by_name
from walletmigrate.verify_findings import Finding, in_words, on_record

BEHIND: Final = ("missing", "stale")
"""Problems of accounts that the ledger is known not to follow; all others are money that is wrong."""

Form = Literal["full", "incremental", "sample"]

_COLUMNS: Final = (
    "id, mapping, currency, form, started_at, finished_at, clean, complete, accounts, missing, drift_accounts, "
    "drift_amount, actor, details"
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
class Verification:
    """What one verification of a mapping saw. Lists have at most ``limit`` entries, counts are in full.

    ``form`` is ``full``; or ``incremental``, of accounts that changed since the last run (``since``: when that
    looked); or ``sample``, which ``sample`` tells of. ``widened``: an incremental run was asked for, and is a full one
    because the fence was mended then, after the last clean full run. Only a full one has ``imbalance``, ``references``,
    ``cross_checks``, ``ranges`` and ``totals``; in the others counts and sums are of the accounts that were looked at.

    ``drift`` is money that is wrong, at two looks; ``passing`` are differences that a transaction or a closing had
    ended by the second look. ``behind`` are accounts that are absent (``missing``) or ``stale``; ``journal_accounts``
    have a journal problem. ``guards`` are triggers, functions and indexes that do not stand as made. ``imbalance`` by
    currency, of the whole ledger, is zero. Totals are by currency; a frozen account's legacy column counts as it
    stands, although the ledger alone is true. ``clean``: there is nothing to report. ``turned_stale`` and ``closed``:
    how many accounts were afterwards, or would be (``dry_run``); None: not asked for. ``replica_lag``: seconds, if it
    ran on a standby.
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
    form: Form = "full"
    since: datetime | None = None
    widened: datetime | None = None
    sample: Sample | None = None
    passing_accounts: int = 0
    passing: tuple[Drift, ...] = ()
    ranges: tuple[KeyRange, ...] = ()
    reference_count: int = 0
    references: tuple[Reference, ...] = ()
    cross_checks: tuple[CrossCheck, ...] = ()
    replica_lag: float | None = None
    groups: tuple[Group, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Bound:
    """Where an incremental run begins: what transactions of the database below ``horizon`` wrote has been looked at.

    ``horizon`` is an xid of the cluster ``system_identifier``, ``at`` the time of that look.
    """

    system_identifier: int
    horizon: int
    at: datetime


@dataclass(frozen=True)
class LastClean:
    """The last full run that was clean, and what it saw of the journal; ``doubted`` if a run since has found anything.

    What is gone of what it saw is told all the same; but that the rest is in order is known only if nobody doubts it.
    """

    run: int
    journal: Known
    doubted: bool

    @property
    def known(self) -> Known | None:
        """What need not be followed again."""
        return None if self.doubted else self.journal


@dataclass(frozen=True)
class VerificationRun:
    """A verification on record: one row for each currency of the mapping. ``drift_amount`` is in major units.

    ``clean`` is that of the whole run. One that is not ``complete`` was ended when it had seen a fault
    (``details["unfinished"]`` says by what); its counts are of what it had seen. ``details`` has the other findings in
    words, at most `verify_findings.KEPT` of each kind, and how many there were in ``details["found"]``.
    """

    id: int
    mapping: str
    currency: str
    form: Form
    started_at: datetime
    finished_at: datetime
    clean: bool
    complete: bool
    accounts: int
    missing: int
    drift_accounts: int
    drift_amount: Decimal
    actor: str
    details: Mapping[str, Any]


def wrong(groups: tuple[Group, ...] | list[Group]) -> list[Group]:
    """The groups whose money is wrong."""
    return [group for group in groups if group.problem not in (None, *BEHIND)]


def counted(groups: Iterator[Group] | list[Group]) -> int:
    """How many accounts groups have."""
    return sum(group.accounts for group in groups)


def put_on_record(
    connection: Connection,
    settings: Settings,
    result: Verification,
    act: Act,
    bound: Bound | None,
    journal: Known | None = None,
    unfinished: str | None = None,
) -> None:
    """One row per currency, each clean only if all is; then the audit row.

    ``bound``: where the next incremental run begins. ``journal``: what a full run saw of it, for `last_clean`.
    ``unfinished``: why it did not come to its end; such a run is not complete, whatever it saw.
    """
    told = facts(result)
    told |= {"unfinished": unfinished} if unfinished else {}
    seen = {"journal_seen": vars(journal)} if journal else {}
    for currency in result.legacy_total:
        groups = [group for group in result.groups if group.currency == currency]
        connection.execute(
            text(
                f"insert into {quoted(settings.ledger_schema)}.verifications (mapping, started_at, clean, form, "
                "complete, system_identifier, horizon, accounts, missing, drift_accounts, drift_amount, currency, "
                "actor, details) values "
                "(:mapping, :started_at, :clean, :form, :complete, :system_identifier, :horizon, :accounts, :missing, "
                ":drift_accounts, :drift_amount, :currency, :actor, cast(:details as jsonb))"
            ),
            {
                "mapping": result.mapping,
                "started_at": result.started_at,
                "clean": result.clean,
                "form": result.form,
                "complete": unfinished is None,
                "system_identifier": bound.system_identifier if bound else None,
                "horizon": bound.horizon if bound else None,
                "accounts": counted(group for group in groups if group.state != "absent"),
                "missing": counted(group for group in groups if group.problem == "missing"),
                "drift_accounts": counted(wrong(groups)),
                "drift_amount": by_name([currency], ((currency, group.apart) for group in wrong(groups)))[currency],
                "currency": currency,
                "actor": act.actor,
                "details": json.dumps({**told, **seen, **_findings(result, currency)}, default=str),
            },
        )
    first = {"form": result.form, "clean": result.clean, "accounts": result.accounts, "missing": result.missing}
    record(connection, settings, "verify", act, mapping=result.mapping, details={**first, **told})


def facts(result: Verification) -> dict[str, Any]:
    """The counts of a run that its columns do not have."""
    facts: dict[str, Any] = {
        "states": result.states,
        "stale": result.stale,
        "drift_accounts": result.drift_accounts,
        "journal_accounts": result.journal_accounts,
        "guards": [f"{guard.trigger} {guard.problem}" for guard in result.guards],
        "imbalance": {currency: amount for currency, amount in result.imbalance.items() if amount},
        "seconds": round(result.seconds, 3),
    }
    if result.passing_accounts:
        facts["passing_accounts"] = result.passing_accounts
    if result.reference_count:
        facts["references"] = result.reference_count
    if result.sample is not None:
        facts["sample"] = vars(result.sample)
    if result.since is not None:
        facts["since"] = result.since.isoformat()
    if result.widened is not None:
        facts["widened"] = result.widened.isoformat()
    checks = {check.name: check.differing for check in result.cross_checks}
    return {**facts, **({"cross_checks": checks} if checks else {})}


def _findings(result: Verification, currency: str) -> dict[str, Any]:
    """The first findings of each kind, so that a run can be read again when its accounts stand otherwise."""
    here = [group for group in result.groups if group.currency == currency]
    counts = {
        "drift": counted(wrong(here)),
        # The groups do not know them. Where the list is cut, those of another currency that it has not are among them.
        "passing": result.passing_accounts - sum(one.currency != currency for one in result.passing),
        "behind": counted(group for group in here if group.problem in BEHIND),
        "journal": result.journal_accounts,
        "unresolved": result.reference_count,
        "cross_check_differences": sum(check.differing for check in result.cross_checks),
    }
    return on_record(list(_each(result, currency)), counts)


def _each(result: Verification, currency: str) -> Iterator[Finding]:
    """What is listed of one currency, and what is of none."""
    for kind, accounts in (("drift", result.drift), ("passing", result.passing), ("behind", result.behind)):
        yield from (_finding(kind, one) for one in accounts if one.currency == currency)
    for each in result.journal:
        place = (each.bucket, each.currency, None, each.found, each.expected)
        yield Finding("journal", each.key or str(each.account), each.problem, *place)
    for row in result.references:
        yield Finding("unresolved", row.subject, row.problem, target=row.target)
    for check in result.cross_checks:
        for one in check.differences:
            place = (check.bucket, check.currency, None, one.found, one.expected)
            yield Finding("cross_check_differences", one.key, check.name, *place)


def _finding(kind: str, one: Drift) -> Finding:
    place = (one.bucket, one.currency, one.legacy, one.ledger)
    return Finding(kind, one.key, one.problem, *place, state=one.state)


def drift_line(one: Drift) -> str:
    """One account in words."""
    return _finding("drift", one).words


def reference_line(one: Reference) -> str:
    """One reference in words."""
    return f"{one.problem}: {one.subject} → {one.target}"


def last_bound(connection: Connection, settings: Settings, mapping: config.Mapping) -> Bound | None:
    """Where the runs on record have come to without a gap and a finding; None: no clean full run stands on record.

    Behind the first finding that no full clean run has lifted nothing is taken for seen: what was wrong then is
    written no more, and a run from there on would never meet it.
    """
    name = quoted(settings.ledger_schema)
    row = connection.execute(
        text(
            f"select system_identifier, horizon, started_at from {name}.verifications "
            "where mapping = :mapping and horizon is not null and clean and started_at < coalesce(("
            f"select min(started_at) from {name}.verifications "
            "where mapping = :mapping and horizon is not null and not clean and started_at >= coalesce(("
            f"select max(started_at) from {name}.verifications where mapping = :mapping and full_run and clean"
            "), '-infinity')), 'infinity') "
            "and system_identifier = (select system_identifier from pg_control_system()) "
            "order by horizon desc, id desc limit 1"
        ),
        {"mapping": mapping.name},
    ).one_or_none()
    return None if row is None else Bound(*row)


def unseen_since(connection: Connection, settings: Settings, mapping: config.Mapping) -> datetime | None:
    """When the fence was mended after the last clean full run began: what was written while it was down stands in
    legacy rows alone, and nothing in the ledger tells which. None: no incremental run has to fear that.
    """
    name = quoted(settings.ledger_schema)
    found: datetime | None = connection.scalar(
        text(
            f"select max(at) from {name}.audit_log where action = :action and mapping = :mapping and at >= ("
            f"select max(started_at) from {name}.verifications where mapping = :mapping and full_run and clean)"
        ),
        {"action": FENCE_MENDED, "mapping": mapping.name},
    )
    return found


def last_clean(connection: Connection, settings: Settings, mapping: config.Mapping) -> LastClean | None:
    """The last clean full run of this cluster that kept what it saw of the journal.

    None too where it is so long ago that the numbers of the database's transactions might have gone round.
    """
    name = quoted(settings.ledger_schema)
    row = connection.execute(
        text(
            "select id, details -> 'journal_seen' ->> 'seen' as seen, "
            "(details -> 'journal_seen' ->> 'transactions')::bigint as transactions, "
            f"exists (select from {name}.verifications as v "
            "where v.mapping = r.mapping and not v.clean and v.started_at >= r.started_at) as doubted "
            f"from {name}.verifications as r where mapping = :mapping and full_run and clean "
            "and details ? 'journal_seen' "
            "and system_identifier = (select system_identifier from pg_control_system()) "
            "and pg_snapshot_xmax(pg_current_snapshot())::text::bigint - horizon < 2000000000 "
            "order by started_at desc, id desc limit 1"
        ),
        {"mapping": mapping.name},
    ).one_or_none()
    return None if row is None else LastClean(row.id, Known(row.seen, row.transactions), row.doubted)


def runs(
    connection: Connection, settings: Settings, *, mapping: str | None = None, limit: int = 50
) -> tuple[VerificationRun, ...]:
    """The newest verifications on record, newest first. Raises LedgerNotInstalled."""
    require_installed(connection, settings)
    rows = connection.execute(
        text(
            f"select {_COLUMNS} from {quoted(settings.ledger_schema)}.verifications "
            "where cast(:mapping as text) is null or mapping = :mapping order by id desc limit :limit"
        ),
        {"mapping": mapping, "limit": limit},
    )
    return tuple(_told(VerificationRun(*row)) for row in rows)


def show(connection: Connection, settings: Settings, number: int) -> VerificationRun:
    """One verification on record. Raises UnknownRun, LedgerNotInstalled."""
    require_installed(connection, settings)
    row = connection.execute(
        text(f"select {_COLUMNS} from {quoted(settings.ledger_schema)}.verifications where id = :id"), {"id": number}
    ).one_or_none()
    if row is None:
        raise UnknownRun("verification", str(number), "See: walletmigrate verify list")
    return _told(VerificationRun(*row))


def _told(run: VerificationRun) -> VerificationRun:
    return replace(run, details=in_words(run.details))
