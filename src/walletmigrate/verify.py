"""Whether the ledger is true: every account against its legacy row, and the ledger against itself.

One read-only snapshot, so that money in flight is seen whole or not at all. Nothing is repaired; accounts that
differ can be turned stale.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from decimal import Decimal
from typing import Any, Final

from sqlalchemy import Connection, Engine, text

from walletmigrate import config, cross_checks, job_reads, journals, marking, references, samples
from walletmigrate.audit import Act
from walletmigrate.capture import FenceProblem, fence_problems
from walletmigrate.comparison import Comparison, Group, KeyRange, Scope, Total, snapshot
from walletmigrate.config import Settings
from walletmigrate.cross_checks import CrossCheck
from walletmigrate.errors import PreconditionRefused, UsageError
from walletmigrate.jobs import require_installed, visibility
from walletmigrate.journals import Journal, JournalProblem, Known
from walletmigrate.references import References
from walletmigrate.samples import Sample
from walletmigrate.schema import quoted, render
from walletmigrate.sums import by_name, less
from walletmigrate.verifications import (
    BEHIND,
    Bound,
    Drift,
    Form,
    Verification,
    counted,
    last_bound,
    last_known,
    put_on_record,
    wrong,
)

__all__ = ["BEHIND", "Drift", "JournalProblem", "Verification", "verify"]

AGAIN: Final = 10_000
"""Up to how many differing accounts are looked at again. More differ of no moment's making."""
AT_A_TIME: Final = 5_000
"""Keys that a sample or an incremental run compares in one statement."""

KINDS: Final[dict[Form, str]] = {"full": "verify", "incremental": "verify changes", "sample": "verify sample"}
"""The kinds of the jobs."""

_BODY: Final = re.compile(
    r"^create (?:or replace )?function \S+\.(\w+)\(\) returns trigger\b.*?^as \$\$(.*?)\$\$;",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class _Moment:
    """The snapshot that is looked at: where it stands among the database's transactions, and on which server."""

    at: datetime
    seen: str
    bound: Bound
    replica_lag: float | None


@dataclass
class _Look:
    """What one look gathers. ``keys`` are those that are wrong, in a sample."""

    form: Form = "full"
    groups: list[Group] = field(default_factory=list)
    totals: list[Total] = field(default_factory=list)
    ranges: tuple[KeyRange, ...] = ()
    scopes: list[Scope] = field(default_factory=list)
    drift: list[Drift] = field(default_factory=list)
    behind: list[Drift] = field(default_factory=list)
    passing: list[Drift] = field(default_factory=list)
    journal: Journal = field(default_factory=lambda: Journal((), 0, {}, grouped=False))
    references: References = field(default_factory=lambda: References(0, ()))
    guards: tuple[FenceProblem, ...] = ()
    checks: tuple[CrossCheck, ...] = ()
    since: Bound | None = None
    sample: Sample | None = None


def verify(
    engine: Engine,
    settings: Settings,
    mapping: config.Mapping,
    act: Act,
    *,
    limit: int = 1000,
    dry_run: bool = False,
    mark_stale: bool = False,
    sample: int | None = None,
    since_last: bool = False,
) -> Verification:
    """Verify a mapping in full; then, unless ``dry_run``, put the result and an audit row on record.

    ``sample`` keys drawn at random, or with ``since_last`` the accounts whose journal or row in the ledger was written
    since the last clean full or incremental run, are looked at instead, each with its own journal. Such a run is on
    record, and if it finds something it takes back what full runs before it have shown; but no gate takes it for a full
    one.

    ``mark_stale`` then turns the mirrored accounts that differ stale, if they still do: from then on they are read
    from legacy alone, and a backfill brings them up. Mirrored and stale accounts whose row is gone are closed. The
    result tells of the snapshot before.

    A job of one snapshot (`job_reads`): listed while it runs, held back by the throttle, ended when it is cancelled. On
    a standby it has no row among the jobs and nothing is put on record; the result has its lag. Raises JobCancelled,
    LedgerNotInstalled, ConfigError when table and mapping do not fit, CrossCheckFailed for a query of the configuration
    that cannot be used, UsageError for contradictory options, and PreconditionRefused where row-level security hides
    rows from this role, where there is no run to go on from, while the same runs already, or for a mark on a standby. A
    difference is a result, not an error.
    """
    if sample is not None and (since_last or sample < 1):
        raise UsageError("a sample has at least one key, and is not of what changed: pass --sample N or --since-last")
    form: Form = "sample" if sample is not None else "incremental" if since_last else "full"
    began = time.monotonic()
    with engine.connect() as connection:
        require_installed(connection, settings, mapping)
    with job_reads.run(engine, settings, KINDS[form], mapping.name, act, listed=not dry_run) as run:
        with snapshot(engine) as connection, run.cutting(connection):
            moment = _moment(connection)
            _refuse_on_a_standby(moment, mark_stale and not dry_run)
            visibility(connection, mapping, "verify")
            comparison = Comparison(connection, settings, mapping, with_traits=form == "full")
            look = _looked(comparison, connection, settings, limit, run, form, sample)
            found: list[marking.Suspect] = []
            if mark_stale and wrong(look.groups):
                found = [one for scope in look.scopes for one in marking.suspects(comparison, connection, scope)]
            doubtful = _doubtful(comparison, connection, look)
        if doubtful:
            run.at("what differs, once more")
            _look_again(engine, comparison, look, doubtful, moment, limit)
        result = replace(_result(mapping, look, moment, limit), dry_run=dry_run, seconds=time.monotonic() - began)
        if mark_stale:
            passed = {_place(one) for one in look.passing}
            found = [one for one in found if (one.key, one.bucket, one.currency) not in passed]
            gone = sum(one.gone for one in found)
            result = replace(result, turned_stale=len(found) - gone, closed=gone)
        if dry_run or moment.replica_lag is not None:
            return result
        bound = moment.bound if look.form != "sample" else None
        journal = Known(moment.seen, look.journal.transactions) if look.form == "full" else None
        with engine.begin() as connection:
            run.finish(connection, result.accounts)
            put_on_record(connection, settings, result, act, bound, journal)
    if found:
        marked = marking.mark(engine, settings, mapping, comparison, found, act)
        result = replace(result, turned_stale=len(marked.stale), closed=len(marked.closed))
    return result


def _looked(
    comparison: Comparison,
    connection: Connection,
    settings: Settings,
    limit: int,
    run: job_reads.Run,
    form: Form,
    sample: int | None,
) -> _Look:
    """The look of a form, with the guards, which every form asks for."""
    if sample is not None:
        look = _at_sample(comparison, connection, limit, sample, run)
    elif form == "incremental":
        look = _since_last(comparison, connection, settings, limit, run)
    else:
        look = _at_all(comparison, connection, settings, limit, run)
    look.guards += _guards(comparison, connection, settings)
    return look


def _refuse_on_a_standby(moment: _Moment, marks: bool) -> None:
    if moment.replica_lag is not None and marks:
        what = "this is a standby, which writes nothing"
        raise PreconditionRefused("verify --mark-stale", [(what, "run it on the primary")])


def _moment(connection: Connection) -> _Moment:
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
    return _Moment(row.at, row.seen, bound, float(row.lag or 0) if row.standby else None)


def _at_all(
    comparison: Comparison, connection: Connection, settings: Settings, limit: int, run: job_reads.Run
) -> _Look:
    cross_checks.tried(comparison, connection)
    run.at("balances, 1 of 4")
    seen = comparison.whole(connection, limit)
    accounts = counted(seen.groups)
    run.at("journal, 2 of 4", done=accounts, total=accounts)
    known = last_known(connection, settings, comparison.mapping)
    journal = journals.whole(comparison, connection, limit, seen.ledger, known)
    look = _Look(groups=seen.groups, totals=seen.totals, ranges=seen.ranges, journal=journal)
    if seen.scope is not None:
        look.scopes = [seen.scope]
        _list(look, comparison, connection, limit, look.groups, seen.scope)
    run.at("references, 3 of 4")
    look.references = references.look(
        connection, settings, seen.ledger, grouped=journal.grouped, horizon=journal.horizon, limit=limit
    )
    run.at("cross-checks, 4 of 4")
    look.checks = cross_checks.run(comparison, connection, limit)
    return look


def _at_sample(comparison: Comparison, connection: Connection, limit: int, size: int, run: job_reads.Run) -> _Look:
    run.at("keys of the sample")
    keys = samples.draw(comparison, connection, size)
    look = _at_keys(_Look(form="sample"), comparison, connection, limit, keys, run)
    # The lists of a look may be cut short; how many keys are wrong must not be.
    bad = {row.key for scope in look.scopes for row in _rows(comparison, connection, scope, behind=False)}
    for scope in look.scopes:
        bad |= {one.key or "" for one in journals.of_accounts(comparison, connection, size, scope)[0]}
    look.sample = samples.judged(len(keys), len(bad), whole=len(keys) < size)
    return look


def _since_last(
    comparison: Comparison, connection: Connection, settings: Settings, limit: int, run: job_reads.Run
) -> _Look:
    since = last_bound(connection, settings, comparison.mapping)
    if since is None:
        what = f"no clean full verification of mapping {comparison.mapping.name!r} by this cluster stands on record"
        mend = f"walletmigrate verify --mapping {comparison.mapping.name}"
        raise PreconditionRefused("verify --since-last", [(what, mend)])
    run.at("what changed")
    changed = [row.key for row in comparison.run(connection, "changed", since=since.horizon)]
    return _at_keys(_Look(form="incremental", since=since), comparison, connection, limit, changed, run)


def _at_keys(
    look: _Look,
    comparison: Comparison,
    connection: Connection,
    limit: int,
    keys: Sequence[str],
    run: job_reads.Run,
) -> _Look:
    """Look at single keys, some at a time: at both sides and at the accounts' own transactions."""
    problems: list[JournalProblem] = []
    accounts = 0
    columns = len(comparison.mapping.columns)
    for at in range(0, len(keys), AT_A_TIME):
        run.at("keys, each with its journal", done=at * columns, total=len(keys) * columns)
        scope = comparison.keys(connection, keys[at : at + AT_A_TIME])
        groups = comparison.census(connection, scope)
        _list(look, comparison, connection, limit, groups, scope)
        found, count = journals.of_accounts(comparison, connection, limit, scope)
        problems += found
        accounts += count
        look.groups += groups
        look.scopes.append(scope)
    look.journal = Journal(tuple(problems[:limit]), accounts, {}, grouped=False)
    return look


def _list(
    look: _Look, comparison: Comparison, connection: Connection, limit: int, groups: list[Group], scope: Scope
) -> None:
    """Name the first accounts that differ, and that are behind, of those that ``groups`` counts."""
    if wrong(groups) and len(look.drift) < limit:
        look.drift += _rows(comparison, connection, scope, behind=False, limit=limit - len(look.drift))
    if any(group.problem in BEHIND for group in groups) and len(look.behind) < limit:
        look.behind += _rows(comparison, connection, scope, behind=True, limit=limit - len(look.behind))


def _rows(
    comparison: Comparison, connection: Connection, scope: Scope, *, behind: bool, limit: int | None = None
) -> list[Drift]:
    rows = comparison.run(connection, "differences", scope, behind=behind, limit=limit)
    return [Drift(row.key, row.bucket, row.currency, row.legacy, row.ledger, row.state, row.problem) for row in rows]


def _doubtful(comparison: Comparison, connection: Connection, look: _Look) -> list[Drift]:
    """All accounts that differ, for a second look; none where there are too many for a moment's difference."""
    if not 0 < counted(wrong(look.groups)) <= AGAIN:
        return []
    return [one for scope in look.scopes for one in _rows(comparison, connection, scope, behind=False)]


def _look_again(
    engine: Engine, comparison: Comparison, look: _Look, doubtful: list[Drift], moment: _Moment, limit: int
) -> None:
    """Look at what differed once more, in a snapshot of its own. What is gone is counted apart, if the ledger says why.

    A difference that ended without a transaction and without a closing was not mended by anything that keeps the
    ledger true: it stays a difference.
    """
    still: set[tuple[str, str, str]] = set()
    explained: set[tuple[str, str, str]] = set()
    keys = sorted({one.key for one in doubtful})
    with snapshot(engine) as connection:
        for at in range(0, len(keys), AT_A_TIME):
            scope = comparison.keys(connection, keys[at : at + AT_A_TIME])
            still |= {_place(one) for one in _rows(comparison, connection, scope, behind=False)}
            explained |= {tuple(row) for row in comparison.run(connection, "explained", scope, snapshot=moment.seen)}
    gone = [one for one in doubtful if _place(one) in explained - still]
    places = {_place(one) for one in gone}
    look.passing = gone
    look.drift = [one for one in doubtful if _place(one) not in places][:limit]
    for one in gone:
        look.groups += _moved(one)


def _place(one: Drift) -> tuple[str, str, str]:
    return one.key, one.bucket, one.currency


def _moved(one: Drift) -> Iterator[Group]:
    """One account less among those that differ, and one more among those in step."""
    apart = less(one.legacy or Decimal(0), one.ledger or Decimal(0)).copy_abs()
    equal = None if one.problem == "no_value" else False
    lives = one.problem != "orphan"
    zero = Decimal(0)
    yield Group(one.bucket, one.currency, one.state, lives, False, equal, -1, zero, zero, apart.copy_negate())
    yield Group(one.bucket, one.currency, "mirrored", True, True, True, 1, zero, zero, zero)


def _result(mapping: config.Mapping, look: _Look, moment: _Moment, limit: int) -> Verification:
    groups = look.groups
    behind = [group for group in groups if group.problem in BEHIND]
    differing = sum(check.differing for check in look.checks)
    found = (
        *(counted(behind), counted(wrong(groups)), look.journal.accounts, look.references.count, differing),
        *(len(look.guards), any(look.journal.imbalance.values())),
    )
    currencies = list(dict.fromkeys(column.currency for column in mapping.columns))
    states = sorted({group.state for group in groups})
    return Verification(
        mapping=mapping.name,
        clean=not any(found),
        accounts=counted(group for group in groups if group.state != "absent"),
        states={state: counted(g for g in groups if g.state == state) for state in states},
        missing=counted(group for group in behind if group.problem == "missing"),
        stale=counted(group for group in behind if group.problem == "stale"),
        drift_accounts=counted(wrong(groups)),
        drift_amount=by_name(currencies, ((group.currency, group.apart) for group in wrong(groups))),
        drift=tuple(look.drift),
        behind=tuple(look.behind),
        journal_accounts=look.journal.accounts,
        journal=look.journal.problems,
        imbalance=look.journal.imbalance,
        guards=look.guards,
        totals=tuple(sorted(look.totals, key=_order)),
        legacy_total=by_name(currencies, ((group.currency, group.legacy) for group in groups)),
        ledger_total=by_name(currencies, ((group.currency, group.ledger) for group in groups)),
        started_at=moment.at,
        seconds=0.0,
        form=look.form,
        since=look.since.at if look.since else None,
        sample=look.sample,
        passing_accounts=len(look.passing),
        passing=tuple(look.passing[:limit]),
        ranges=look.ranges,
        reference_count=look.references.count,
        references=look.references.found,
        cross_checks=look.checks,
        replica_lag=moment.replica_lag,
        groups=tuple(groups),
    )


def _guards(comparison: Comparison, connection: Connection, settings: Settings) -> tuple[FenceProblem, ...]:
    return (
        *fence_problems(connection, settings, comparison.mapping),
        *_append_only(comparison, connection, settings),
        *_bodies(comparison, connection, settings),
        *references.missing_indexes(connection, settings),
    )


def _append_only(comparison: Comparison, connection: Connection, settings: Settings) -> Iterator[FenceProblem]:
    """Whether the triggers that keep journal, audit log and verifications from being changed stand as made."""
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


def _order(total: Total) -> tuple[Any, ...]:
    return total.trait, total.bucket, total.currency, total.value is None, total.value or ""
