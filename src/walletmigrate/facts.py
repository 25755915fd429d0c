"""What one look at the ledger's schema sees: accounts, phase, line, jobs, drift, imbalance. Reads only."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Final

import sqlalchemy as sa

from walletmigrate.heartbeat import LIVE_SECONDS
from walletmigrate.job_options import EVERYTHING, STALLED_SECONDS
from walletmigrate.schema import quoted
from walletmigrate.sums import by_name, total

PHASES: Final = ("legacy", "dual_write", "read_ledger", "wallet_only", "frozen", "retired")
TREATMENTS: Final = ("absent", "stale", "turned_stale", "mirrored", "closed", "rejected")
STATES: Final = ("absent", "mirrored", "stale", "frozen", "closed")
JOB_KINDS: Final = (
    *("backfill", "backfill undo", "verify", "verify changes", "verify sample", "freeze", "unfreeze", "archive"),
    *("reconcile", "reconcile account", "reconcile undo"),
)
WHOLE_KINDS: Final = ("snapshot take", "snapshot verify")
"""Kinds of jobs on the whole ledger; the others are on one mapping."""
LINE_STOPPED: Final = 2
VOIDED: Final = 1.0
"""As a time it is 1970: older than any limit, and not the 0 of what was never verified, which may be no fault yet."""

_REPORTED: Final = """
select distinct on (j.mapping, r.outside)
    j.id, j.mapping, r.outside, j.details #>> '{options,truth}' as truth, j.details -> 'differences' as differences
from {schema}.jobs as j
cross join lateral (select j.details #>> '{options,kind}' in ('file', 'callable') as outside) as r
where
    j.kind = 'reconcile' and j.state = 'done' and j.details -> 'differences' is not null
    and (
        r.outside or not exists (
            select from {schema}.verifications as v
            where v.mapping = j.mapping and v.full_run and v.started_at > j.finished_at
        )
    )
order by j.mapping, r.outside, j.id desc
"""


@dataclass(frozen=True)
class JobFacts:
    """The newest job of one kind on one mapping; ``remaining`` is NaN while its total is unknown."""

    items: int = 0
    failed: int = 0
    paused: int = 0
    remaining: float = 0
    batch_seconds: float = 0


@dataclass(frozen=True)
class Facts:
    """What one look at the ledger's schema saw. Amounts are in major units, by currency; ``last_success`` is Unix time:
    `VOIDED` if a mapping's clean full verification was followed by one of any form that was not clean, else 0 if a
    mapping never had any. ``mismatches`` counts an account that differs once for each verification that met it.
    """

    phase: str
    line_stopped: bool
    accounts: Mapping[str, int]
    jobs: Mapping[tuple[str, str], JobFacts]
    imbalance: Mapping[str, Decimal]
    drift_accounts: Mapping[str, int]
    drift_amount: Mapping[str, Decimal]
    last_success: float
    bypasses: Mapping[str, int] = field(default_factory=dict)
    documents: int = 0
    mismatches: int = 0


def read_facts(connection: sa.Connection, schema: str, scope: Collection[tuple[str, str]] = ()) -> Facts:
    """Read the facts of the ledger in ``schema``, as of the connection's snapshot.

    ``scope`` are the configured (mapping, currency) pairs: only their verifications and jobs count, and their
    currencies are there before they have a row; without it everything in the database counts. Raises
    SQLAlchemy's errors, also when no ledger is installed.
    """
    control = _table(schema, "control", "phase")
    line = _table(schema, "line", "last_value")
    states, imbalance = _balances(connection, schema)
    drift = _drift(connection, schema, scope)
    differences = _differences(connection, schema, scope, drift)
    currencies = sorted({currency for _, currency in scope} | imbalance.keys() | differences.keys())
    return Facts(
        phase=connection.scalar(sa.select(control.c.phase)) or "",
        line_stopped=connection.scalar(sa.select(line.c.last_value)) == LINE_STOPPED,
        # Counting the absent means reading the legacy table; the last verification has done that.
        accounts={**dict.fromkeys(STATES, 0), **states, "absent": sum(int(row.missing) for row in drift)},
        jobs=_jobs(connection, schema, scope),
        imbalance=dict.fromkeys(currencies, Decimal(0)) | imbalance,
        drift_accounts=dict.fromkeys(currencies, 0) | {name: found[0] for name, found in differences.items()},
        drift_amount=dict.fromkeys(currencies, Decimal(0)) | {name: found[1] for name, found in differences.items()},
        last_success=_last_success(connection, schema, scope),
        bypasses=dict.fromkeys(TREATMENTS, 0) | _bypasses(connection, schema),
        documents=_documents(connection, schema),
        mismatches=_mismatches(connection, schema),
    )


def _bypasses(connection: sa.Connection, schema: str) -> dict[str, int]:
    """Writes past the adapter by treatment: those in the catalogue, those pruned from it, those refused."""
    counts: dict[str, int] = defaultdict(int)
    lines, pruned = _table(schema, "bypasses", "treatment"), _table(schema, "bypasses_pruned", "treatment", "writes")
    for treatment, count in connection.execute(
        sa.select(lines.c.treatment, sa.func.count()).group_by(lines.c.treatment)
    ):
        counts[treatment] += count
    for treatment, count in connection.execute(sa.select(pruned.c.treatment, pruned.c.writes)):
        counts[treatment] += count
    refused = sa.text(
        "select coalesce(sum(pg_sequence_last_value(c.oid::regclass)), 0) from pg_class as c "
        "where c.relnamespace = cast(:schema as regnamespace) and c.relkind = 'S' "
        "and starts_with(c.relname, 'rejected_')"
    )
    counts["rejected"] += int(connection.scalar(refused, {"schema": quoted(schema)}) or 0)
    return dict(counts)


def _mismatches(connection: sa.Connection, schema: str) -> int:
    """Accounts that differed in the verifications on record, of all mappings there ever were: a sum that never falls,
    since a counter that does is taken for one that began anew. Nobody may remove a row.
    """
    runs = _table(schema, "verifications", "drift_accounts")
    return int(connection.scalar(sa.select(sa.func.sum(runs.c.drift_accounts))) or 0)


def _documents(connection: sa.Connection, schema: str) -> int:
    """Different flag documents of the processes whose heart beat in the last minute."""
    processes = _table(schema, "processes", "document_id", "seen_at")
    alive = sa.func.extract("epoch", sa.func.clock_timestamp() - processes.c.seen_at) < LIVE_SECONDS
    return int(connection.scalar(sa.select(sa.func.count(processes.c.document_id.distinct())).where(alive)) or 0)


def _table(schema: str, name: str, *columns: str) -> sa.TableClause:
    return sa.table(name, *(sa.column(column) for column in columns), schema=schema)


def imbalance(connection: sa.Connection, schema: str) -> dict[str, Decimal]:
    """What all balances of the ledger come to, in major units, by currency, where that is not nothing."""
    return {currency: amount for currency, amount in _balances(connection, schema)[1].items() if amount}


def _balances(connection: sa.Connection, schema: str) -> tuple[dict[str, int], dict[str, Decimal]]:
    """Accounts by state, and the sum of all balances by currency: one pass over the accounts for both."""
    accounts = _table(schema, "accounts", "state", "currency", "balance")
    system = _table(schema, "system_balances", "currency", "balance")
    state = sa.cast(accounts.c.state, sa.Text).label("state")
    states: dict[str, int] = defaultdict(int)
    sums: list[tuple[str, Decimal]] = []
    owned = sa.select(state, accounts.c.currency, sa.func.count(), sa.func.sum(accounts.c.balance))
    for name, currency, count, balance in connection.execute(owned.group_by(state, accounts.c.currency)):
        states[name] += count
        sums.append((currency, balance))
    of_system = sa.select(system.c.currency, sa.func.sum(system.c.balance)).group_by(system.c.currency)
    for currency, balance in connection.execute(of_system):
        sums.append((currency, balance))
    return dict(states), by_name((), sums)


def _full_runs(schema: str, scope: Collection[tuple[str, str]]) -> tuple[sa.TableClause, sa.ColumnElement[bool]]:
    """The verifications, and the condition for those that count."""
    runs = _table(
        schema,
        "verifications",
        *("id", "mapping", "currency", "started_at", "finished_at", "clean", "full_run"),
        *("missing", "drift_accounts", "drift_amount"),
    )
    # A sample says nothing about the accounts it left out, so only full runs are taken for the whole.
    counts = sa.and_(runs.c.full_run, runs.c.finished_at.is_not(None))
    if scope:
        counts = sa.and_(counts, sa.tuple_(runs.c.mapping, runs.c.currency).in_(list(scope)))
    return runs, counts


def _drift(connection: sa.Connection, schema: str, scope: Collection[tuple[str, str]]) -> list[sa.Row[Any]]:
    """missing, accounts and amount by currency, from the last full verification of each mapping; or, if that is more,
    from a later one of samples or changes: it can raise them until the next full one, never lower them.
    """
    runs, counts = _full_runs(schema, scope)
    last = sa.select(sa.func.max(runs.c.id)).where(counts).group_by(runs.c.mapping, runs.c.currency)
    newest = sa.select(runs).where(runs.c.id.in_(last)).subquery()
    later = runs.alias("later")
    since = sa.select(
        later.c.mapping,
        later.c.currency,
        sa.func.max(later.c.drift_accounts).label("accounts"),
        sa.func.max(later.c.drift_amount).label("amount"),
    ).select_from(
        later.join(
            newest,
            sa.and_(
                *(later.c.mapping == newest.c.mapping, later.c.currency == newest.c.currency),
                *(later.c.started_at > newest.c.started_at, ~later.c.full_run),
            ),
        )
    )
    more = since.group_by(later.c.mapping, later.c.currency).subquery()
    both = newest.outerjoin(more, sa.and_(more.c.mapping == newest.c.mapping, more.c.currency == newest.c.currency))
    summed = sa.select(
        newest.c.currency,
        sa.func.sum(newest.c.missing).label("missing"),
        sa.func.sum(sa.func.greatest(newest.c.drift_accounts, more.c.accounts)).label("accounts"),
        sa.func.sum(sa.func.greatest(newest.c.drift_amount, more.c.amount)).label("amount"),
    )
    return list(connection.execute(summed.select_from(both).group_by(newest.c.currency)))


def _differences(
    connection: sa.Connection, schema: str, scope: Collection[tuple[str, str]], drift: list[sa.Row[Any]]
) -> dict[str, tuple[int, Decimal]]:
    """Accounts and amount by currency: as verified, or, if that is more, as a later reconciliation of legacy with the
    ledger reported them; and besides what the last reconciliation with an outside truth reported.
    """
    found: dict[str, tuple[int, Decimal]] = {row.currency: (int(row.accounts), row.amount) for row in drift}
    of_sides: dict[str, tuple[int, Decimal]] = defaultdict(lambda: (0, Decimal(0)))
    outside: dict[str, tuple[int, Decimal]] = defaultdict(lambda: (0, Decimal(0)))
    mappings = {mapping for mapping, _ in scope}
    for run in reported(connection, schema):
        if mappings and run.mapping not in mappings:
            continue
        for currency, one in run.differences.items():
            accounts, amount = (outside if run.outside else of_sides)[currency]
            both = (accounts + int(one["accounts"]), total((amount, Decimal(one["amount"]))))
            (outside if run.outside else of_sides)[currency] = both
    for currency in {*found, *of_sides, *outside}:
        accounts, amount = max(found.get(currency, (0, Decimal(0))), of_sides[currency])
        found[currency] = (accounts + outside[currency][0], total((amount, outside[currency][1])))
    return found


def reported(connection: sa.Connection, schema: str) -> list[sa.Row[Any]]:
    """The last reconciliation of each mapping with an outside truth, and the last of legacy with the ledger where no
    full verification came after it: id, mapping, outside, truth, and differences (accounts and amount, by currency).
    """
    return list(connection.execute(sa.text(_REPORTED.replace("{schema}", quoted(schema)))))


def _last_success(connection: sa.Connection, schema: str, scope: Collection[tuple[str, str]]) -> float:
    """The oldest of the mappings' last clean full runs: one that is verified daily must not hide another. A run of any
    form that was not clean voids those that began before it; that is told before what was never verified.
    """
    runs, counts = _full_runs(schema, scope)
    later = runs.alias("later")
    voided = sa.exists().where(
        *(later.c.mapping == runs.c.mapping, later.c.currency == runs.c.currency),
        *(~later.c.clean, later.c.started_at >= runs.c.started_at),
    )
    when = sa.extract("epoch", sa.func.max(runs.c.finished_at).filter(~voided))
    clean = sa.select(runs.c.mapping, runs.c.currency, when).where(counts, runs.c.clean)
    rows = connection.execute(clean.group_by(runs.c.mapping, runs.c.currency))
    times = {(mapping, currency): VOIDED if at is None else float(at) for mapping, currency, at in rows}
    if VOIDED in times.values():
        return VOIDED
    return min((times.get(pair, 0.0) for pair in scope or times), default=0.0)


def _jobs(
    connection: sa.Connection, schema: str, scope: Collection[tuple[str, str]]
) -> dict[tuple[str, str], JobFacts]:
    """By kind and mapping: added up, one that goes on would hide another that stands still."""
    columns = (
        "id",
        "kind",
        "mapping",
        "state",
        "items_total",
        "items_done",
        "items_failed",
        "last_batch_seconds",
        *("held", "updated_at"),
    )
    jobs = _table(schema, "jobs", *columns)
    newest = sa.select(sa.func.max(jobs.c.id)).group_by(jobs.c.kind, jobs.c.mapping)
    mappings = sorted({mapping for mapping, _ in scope})
    if scope:  # nobody finishes the jobs of a mapping that is no longer configured; some jobs are of no mapping
        newest = newest.where(jobs.c.mapping.in_({EVERYTHING, *mappings}))
    facts = {(kind, mapping): JobFacts() for kind in JOB_KINDS for mapping in mappings}
    facts |= {(kind, EVERYTHING): JobFacts() for kind in WHOLE_KINDS}
    # One that waits says so every few seconds; one that was held when its process died says nothing.
    alive = (sa.func.extract("epoch", sa.func.clock_timestamp() - jobs.c.updated_at) < STALLED_SECONDS).label("alive")
    for job in connection.execute(sa.select(jobs, alive).where(jobs.c.id.in_(newest))):
        facts[job.kind, job.mapping or EVERYTHING] = JobFacts(
            items=job.items_done,
            failed=_failed(job),
            paused=int(job.state == "paused" or (job.state == "running" and job.held is not None and job.alive)),
            remaining=_remaining(job),
            batch_seconds=float(job.last_batch_seconds or 0),
        )
    return facts


def _failed(job: sa.Row[Any]) -> int:
    """A job can fail before any of its items did, and must show all the same; one that was given up is dealt with."""
    return 0 if job.state == "cancelled" else max(int(job.items_failed), int(job.state == "failed"))


def _remaining(job: sa.Row[Any]) -> float:
    if job.state in ("done", "cancelled"):
        return 0
    if job.items_total is None:
        return float("nan")
    return max(int(job.items_total) - int(job.items_done) - int(job.items_failed), 0)
