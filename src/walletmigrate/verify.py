"""Whether the ledger is true: every account against its legacy row, and the ledger against itself.

One read-only snapshot, so that money in flight is seen whole or not at all. Nothing is repaired; accounts that
differ can be turned stale.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from typing import Any, Final

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from walletmigrate import config, job_reads, marking, references
from walletmigrate.audit import Act
from walletmigrate.capture import FenceProblem, fence_problems
from walletmigrate.comparison import Comparison, Total, snapshot
from walletmigrate.config import Settings
from walletmigrate.errors import PreconditionRefused, UsageError
from walletmigrate.job_rows import said
from walletmigrate.jobs import require_installed, visibility
from walletmigrate.journals import JournalProblem, Known
from walletmigrate.looks import Look, Moment, look_again, look_at, moment, place
from walletmigrate.schema import quoted, render
from walletmigrate.sums import by_name
from walletmigrate.verifications import (
    BEHIND,
    Drift,
    Form,
    Verification,
    counted,
    facts,
    put_on_record,
    unseen_since,
    wrong,
)

__all__ = ["BEHIND", "Drift", "JournalProblem", "Verification", "verify"]

KINDS: Final[dict[Form, str]] = {"full": "verify", "incremental": "verify changes", "sample": "verify sample"}
"""The kinds of the jobs."""

_BODY: Final = re.compile(
    r"^create (?:or replace )?function \S+\.(\w+)\(\) returns trigger\b.*?^as \$\$(.*?)\$\$;",
    re.DOTALL | re.MULTILINE,
)


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
    one. Where the fence was mended since the last clean full run began, ``since_last`` is a full run (``widened``):
    nothing in the ledger tells what went past the fence.

    ``mark_stale`` then turns the mirrored accounts that differ stale, if they still do: from then on they are read
    from legacy alone, and a backfill brings them up. Mirrored and stale accounts whose row is gone are closed. The
    result tells of the snapshot before.

    A job of one snapshot (`job_reads`): listed while it runs, held back by the throttle, ended when it is cancelled.
    One that has seen a fault and does not come to its end is on record all the same, as not clean and not complete. On
    a standby it has no row among the jobs and nothing is put on record; the result has its lag. Raises JobCancelled,
    SnapshotTooOld, LedgerNotInstalled, ConfigError when table and mapping do not fit, CrossCheckFailed for a query of
    the configuration that cannot be used, UsageError for contradictory options, and PreconditionRefused where row-level
    security hides rows from this role, where there is no run to go on from, while the same runs already, or for a mark
    on a standby. A difference is a result, not an error.
    """
    if sample is not None and (since_last or sample < 1):
        raise UsageError("a sample has at least one key, and is not of what changed: pass --sample N or --since-last")
    form: Form = "sample" if sample is not None else "incremental" if since_last else "full"
    with engine.connect() as connection:
        require_installed(connection, settings, mapping)
        widened = unseen_since(connection, settings, mapping) if since_last else None
    if widened is not None:
        form = "full"
    with job_reads.run(engine, settings, KINDS[form], mapping.name, act, listed=not dry_run) as run:
        one = _One(engine, settings, mapping, act, run, limit, dry_run=dry_run, widened=widened)
        try:
            return one.verified(form, sample, mark_stale=mark_stale)
        except BaseException as error:
            one.keep(run.translated(error))
            raise


class _One:
    """One verification: what it has seen so far, and whether that is on record."""

    def __init__(
        self,
        engine: Engine,
        settings: Settings,
        mapping: config.Mapping,
        act: Act,
        run: job_reads.Run,
        limit: int,
        *,
        dry_run: bool,
        widened: datetime | None,
    ) -> None:
        self._engine, self._settings, self._mapping, self._act = engine, settings, mapping, act
        self._run, self._limit, self._dry_run, self._widened = run, limit, dry_run, widened
        self._began = time.monotonic()
        self._seen: tuple[Comparison, Look] | None = None
        self._recorded = False

    def verified(self, form: Form, sample: int | None, *, mark_stale: bool) -> Verification:
        """Look, look again at what differs, put it on record, and mark."""
        comparison, look, found = self._looked(form, sample, mark_stale=mark_stale)
        if look.doubtful:
            self._run.at("what differs, once more")
            look_again(self._engine, comparison, look, self._limit)
        result = self._result(look)
        if mark_stale:
            passed = {place(one) for one in look.passing}
            found = [one for one in found if (one.key, one.bucket, one.currency) not in passed]
            gone = sum(one.gone for one in found)
            result = replace(result, turned_stale=len(found) - gone, closed=gone)
        if self._dry_run or look.moment.replica_lag is not None:
            return result
        with self._engine.begin() as connection:
            if found:
                self._run.require(connection)
            else:
                self._run.finish(connection, result.accounts)
            self._record(connection, look, result)
        self._recorded = True
        return self._marked(comparison, result, found) if found else result

    def keep(self, error: BaseException) -> None:
        """Put on record what a run saw that does not come to its end: no fault is forgotten because somebody, or
        something, ended the run that found it.
        """
        if self._seen is None or self._recorded or self._dry_run or self._seen[1].moment.replica_lag is not None:
            return
        comparison, look = self._seen
        if look.doubtful:
            # What differs at one look may be a moment's difference. Without a second look it counts.
            with suppress(SQLAlchemyError):
                look_again(self._engine, comparison, look, self._limit)
        result = self._result(look)
        if result.clean:
            return
        why, what = said(error), f"a verification of {self._mapping.name} saw faults ({facts(result)})"
        job_reads.insist(self._engine, lambda made: self._record(made, look, result, why), what)

    def _looked(
        self, form: Form, sample: int | None, *, mark_stale: bool
    ) -> tuple[Comparison, Look, list[marking.Suspect]]:
        """The first look, with the guards, which every form asks for; and what it would mark."""
        found: list[marking.Suspect] = []
        with snapshot(self._engine) as connection, self._run.reading(connection):
            seen = moment(connection)
            _refuse_on_a_standby(seen, mark_stale and not self._dry_run)
            visibility(connection, self._mapping, "verify")
            comparison = Comparison(connection, self._settings, self._mapping, with_traits=form == "full")
            look = Look(seen, form)
            self._seen = comparison, look
            look_at(look, comparison, connection, self._settings, self._run, limit=self._limit, sample=sample)
            look.guards = _guards(comparison, connection, self._settings)
            if mark_stale and wrong(look.groups):
                found = [one for scope in look.scopes for one in marking.suspects(comparison, connection, scope)]
        return comparison, look, found

    def _result(self, look: Look) -> Verification:
        result = _result(self._mapping, look, self._limit)
        seconds = time.monotonic() - self._began
        return replace(result, dry_run=self._dry_run, widened=self._widened, seconds=seconds)

    def _record(self, connection: Connection, look: Look, result: Verification, unfinished: str | None = None) -> None:
        bound = look.moment.bound if look.form != "sample" else None
        journal = None
        if look.form == "full" and unfinished is None:
            journal = Known(look.moment.seen, look.journal.transactions)
        put_on_record(connection, self._settings, result, self._act, bound, journal, unfinished)

    def _marked(self, comparison: Comparison, result: Verification, found: Sequence[marking.Suspect]) -> Verification:
        """Mark what the run on record found; the job is done when that is."""
        marked = marking.mark(self._engine, self._settings, self._mapping, comparison, found, self._act, self._run)
        with self._engine.begin() as connection:
            self._run.finish(connection, result.accounts)
        return replace(result, turned_stale=len(marked.stale), closed=len(marked.closed))


def _refuse_on_a_standby(seen: Moment, marks: bool) -> None:
    if seen.replica_lag is not None and marks:
        what = "this is a standby, which writes nothing"
        raise PreconditionRefused("verify --mark-stale", [(what, "run it on the primary")])


def _result(mapping: config.Mapping, look: Look, limit: int) -> Verification:
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
        started_at=look.moment.at,
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
        replica_lag=look.moment.replica_lag,
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
