"""The looks of a verification: at all accounts, at a sample, at what changed; and the second one at what differed.

A `Look` fills up as its parts are done, so that what was seen is there however the run ends.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from typing import Final

from sqlalchemy import Connection, Engine, text

from walletmigrate import cross_checks, journals, references, samples
from walletmigrate.capture import FenceProblem
from walletmigrate.comparison import Comparison, Group, KeyRange, Scope, Total, snapshot
from walletmigrate.config import Settings
from walletmigrate.cross_checks import CrossCheck
from walletmigrate.errors import PreconditionRefused
from walletmigrate.job_reads import Run
from walletmigrate.journals import Journal, JournalProblem
from walletmigrate.references import References
from walletmigrate.samples import Sample
from walletmigrate.sums import less
from walletmigrate.verifications import BEHIND, Bound, Drift, Form, counted, last_bound, last_clean, wrong

AGAIN: Final = 10_000
"""Up to how many differing accounts are looked at again. More differ of no moment's making."""
AT_A_TIME: Final = 5_000
"""Keys that a sample or an incremental run compares in one statement."""


@dataclass(frozen=True)
class Moment:
    """The snapshot that is looked at: where it stands among the database's transactions, and on which server."""

    at: datetime
    seen: str
    bound: Bound
    replica_lag: float | None


@dataclass
class Look:
    """What one look gathers. ``doubtful`` are all accounts that differ, until the second look; none where there are too
    many for a moment's difference.
    """

    moment: Moment
    form: Form = "full"
    groups: list[Group] = field(default_factory=list)
    totals: list[Total] = field(default_factory=list)
    ranges: tuple[KeyRange, ...] = ()
    scopes: list[Scope] = field(default_factory=list)
    drift: list[Drift] = field(default_factory=list)
    doubtful: list[Drift] = field(default_factory=list)
    behind: list[Drift] = field(default_factory=list)
    passing: list[Drift] = field(default_factory=list)
    journal: Journal = field(default_factory=lambda: Journal((), 0, {}, grouped=False))
    references: References = field(default_factory=lambda: References(0, ()))
    guards: tuple[FenceProblem, ...] = ()
    checks: tuple[CrossCheck, ...] = ()
    since: Bound | None = None
    sample: Sample | None = None


def moment(connection: Connection) -> Moment:
    """Of the snapshot of this transaction."""
    # Not the time of this statement: the snapshot is older, and what happened in between it has not seen.
    row = connection.execute(
        text(
            "select transaction_timestamp() as at, pg_current_snapshot()::text as seen, "
            "pg_snapshot_xmin(pg_current_snapshot())::text::bigint as horizon, s.system_identifier, "
            "pg_is_in_recovery() as standby, "
            "case when not pg_is_in_recovery() then null "
            # All that was received is replayed; but who does not receive at all is not up to date.
            "when pg_last_wal_receive_lsn() = pg_last_wal_replay_lsn() and exists (select from pg_stat_wal_receiver) "
            "then 0 else extract(epoch from clock_timestamp() - "
            "coalesce(pg_last_xact_replay_timestamp(), pg_postmaster_start_time())) end as lag "
            "from pg_control_system() as s"
        )
    ).one()
    bound = Bound(row.system_identifier, row.horizon, row.at)
    return Moment(row.at, row.seen, bound, float(row.lag or 0) if row.standby else None)


def look_at(
    look: Look,
    comparison: Comparison,
    connection: Connection,
    settings: Settings,
    run: Run,
    *,
    limit: int,
    sample: int | None = None,
) -> None:
    """The first look, of the form that ``look`` has. Raises PreconditionRefused where there is no run to go on from,
    CrossCheckFailed, JobCancelled.
    """
    if sample is not None:
        _at_sample(look, comparison, connection, limit, sample, run)
    elif look.form == "incremental":
        _since_last(look, comparison, connection, settings, limit, run)
    else:
        _at_all(look, comparison, connection, settings, limit, run)


def _at_all(
    look: Look, comparison: Comparison, connection: Connection, settings: Settings, limit: int, run: Run
) -> None:
    cross_checks.tried(comparison, connection)
    run.at("balances, 1 of 4")
    seen = comparison.whole(connection, limit)
    look.groups, look.totals, look.ranges = seen.groups, seen.totals, seen.ranges
    if seen.scope is not None:
        look.scopes = [seen.scope]
        _list(look, comparison, connection, limit, seen.groups, seen.scope)
    accounts = counted(seen.groups)
    run.at("journal, 2 of 4", done=accounts, total=accounts)
    last = last_clean(connection, settings, comparison.mapping)
    look.journal = journals.whole(comparison, connection, limit, seen.ledger, last.known if last else None)
    run.at("references, 3 of 4")
    grouped, horizon = look.journal.grouped, look.journal.horizon
    earlier = {"run": last.run, **vars(last.journal)} if last else None
    look.references = references.look(
        connection, settings, seen.ledger, earlier, grouped=grouped, horizon=horizon, limit=limit
    )
    run.at("cross-checks, 4 of 4")
    look.checks = cross_checks.run(comparison, connection, limit)


def _at_sample(look: Look, comparison: Comparison, connection: Connection, limit: int, size: int, run: Run) -> None:
    run.at("keys of the sample")
    keys = samples.draw(comparison, connection, size)
    _at_keys(look, comparison, connection, limit, keys, run)
    # The lists of a look may be cut short; how many keys are wrong must not be.
    bad = {row.key for scope in look.scopes for row in _rows(comparison, connection, scope, behind=False)}
    for scope in look.scopes:
        bad |= {one.key or "" for one in journals.of_accounts(comparison, connection, size, scope)[0]}
    look.sample = samples.judged(len(keys), len(bad), whole=len(keys) < size)


def _since_last(
    look: Look, comparison: Comparison, connection: Connection, settings: Settings, limit: int, run: Run
) -> None:
    look.since = last_bound(connection, settings, comparison.mapping)
    if look.since is None:
        what = f"no clean full verification of mapping {comparison.mapping.name!r} by this cluster stands on record"
        mend = f"walletmigrate verify --mapping {comparison.mapping.name}"
        raise PreconditionRefused("verify --since-last", [(what, mend)])
    run.at("what changed")
    changed = [row.key for row in comparison.run(connection, "changed", since=look.since.horizon)]
    _at_keys(look, comparison, connection, limit, changed, run)


def _at_keys(
    look: Look, comparison: Comparison, connection: Connection, limit: int, keys: Sequence[str], run: Run
) -> None:
    """Look at single keys, some at a time: at both sides and at the accounts' own transactions."""
    problems: list[JournalProblem] = []
    accounts = 0
    columns = len(comparison.mapping.columns)
    for at in range(0, len(keys), AT_A_TIME):
        run.at("keys, each with its journal", done=at * columns, total=len(keys) * columns)
        scope = comparison.keys(connection, keys[at : at + AT_A_TIME])
        groups = comparison.census(connection, scope)
        look.groups += groups
        look.scopes.append(scope)
        _list(look, comparison, connection, limit, groups, scope)
        found, count = journals.of_accounts(comparison, connection, limit, scope)
        problems += found
        accounts += count
        look.journal = Journal(tuple(problems[:limit]), accounts, {}, grouped=False)


def _list(
    look: Look, comparison: Comparison, connection: Connection, limit: int, groups: list[Group], scope: Scope
) -> None:
    """Name the accounts that differ, and those that are behind, of those that ``groups`` counts: the first of them, and
    all that differ while they may be a moment's difference.
    """
    many = counted(wrong(look.groups)) > AGAIN
    rest = limit - len(look.drift)
    if wrong(groups) and (rest > 0 or not many):
        found = _rows(comparison, connection, scope, behind=False, limit=rest if many else None)
        look.drift += found[:rest]
        look.doubtful += found
    if many:
        look.doubtful.clear()
    if any(group.problem in BEHIND for group in groups) and len(look.behind) < limit:
        look.behind += _rows(comparison, connection, scope, behind=True, limit=limit - len(look.behind))


def _rows(
    comparison: Comparison, connection: Connection, scope: Scope, *, behind: bool, limit: int | None = None
) -> list[Drift]:
    rows = comparison.run(connection, "differences", scope, behind=behind, limit=limit)
    return [Drift(row.key, row.bucket, row.currency, row.legacy, row.ledger, row.state, row.problem) for row in rows]


def look_again(engine: Engine, comparison: Comparison, look: Look, limit: int) -> None:
    """Look at what differed once more, in a snapshot of its own. What is gone is counted apart, if the ledger says why.

    A difference that ended without a transaction and without a closing was not mended by anything that keeps the
    ledger true: it stays a difference.
    """
    still: set[tuple[str, str, str]] = set()
    explained: set[tuple[str, str, str]] = set()
    keys = sorted({one.key for one in look.doubtful})
    seen = look.moment.seen
    with snapshot(engine) as connection:
        for at in range(0, len(keys), AT_A_TIME):
            scope = comparison.keys(connection, keys[at : at + AT_A_TIME])
            still |= {place(one) for one in _rows(comparison, connection, scope, behind=False)}
            explained |= {tuple(row) for row in comparison.run(connection, "explained", scope, snapshot=seen)}
    look.passing = [one for one in look.doubtful if place(one) in explained - still]
    places = {place(one) for one in look.passing}
    look.drift = [one for one in look.doubtful if place(one) not in places][:limit]
    for one in look.passing:
        look.groups += _moved(one)
    look.doubtful = []


def place(one: Drift) -> tuple[str, str, str]:
    """Which account it is."""
    return one.key, one.bucket, one.currency


def _moved(one: Drift) -> Iterator[Group]:
    """One account less among those that differ, and one more among those in step."""
    apart = less(one.legacy or Decimal(0), one.ledger or Decimal(0)).copy_abs()
    equal = None if one.problem == "no_value" else False
    lives = one.problem != "orphan"
    zero = Decimal(0)
    yield Group(one.bucket, one.currency, one.state, lives, False, equal, -1, zero, zero, apart.copy_negate())
    yield Group(one.bucket, one.currency, "mirrored", True, True, True, 1, zero, zero, zero)
