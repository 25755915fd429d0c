"""Whether what runs over the ledger is well: the line, jobs, verifications, the planner's statistics."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Final

from sqlalchemy import Connection, text

from walletmigrate import observation
from walletmigrate.checkup import DRIFT, LATENCY, Finding
from walletmigrate.config import Settings
from walletmigrate.facts import imbalance, reported
from walletmigrate.job_options import EVERYTHING, STALLED_SECONDS
from walletmigrate.job_rows import resuming
from walletmigrate.schema import quoted
from walletmigrate.standing import REASON, in_force_since, reached, show, shown_span, shown_time

VERIFIED_WITHIN: Final = timedelta(hours=26)
"""As the alert has it: one nightly verification may be late, none may be left out."""

MANY_ROWS: Final = 10_000

_JOBS: Final = """
select distinct on (kind, mapping)
    id, kind, mapping, state, items_failed, updated_at, held, details,
    updated_at < clock_timestamp() - make_interval(secs => :stalled) as old
from {schema}.jobs where mapping = any(:mappings) order by kind, mapping, id desc
"""

# A run of any form that was not clean speaks until a full one that began after it.
_RUNS: Final = """
select
    (array_agg(v.form order by v.full_run desc) filter (where not v.clean and v.started_at >= f.begun))[1] as unclean,
    max(v.finished_at) filter (where v.clean and v.full_run) as last_clean,
    clock_timestamp() as now
from {schema}.verifications as v
cross join (
    select coalesce(max(started_at), '-infinity') as begun
    from {schema}.verifications where full_run and mapping = :mapping
) as f
where v.mapping = :mapping
"""

_STATISTICS: Final = """
select s.relname, s.n_live_tup as rows, coalesce(s.last_analyze, s.last_autoanalyze) is null as never
from pg_stat_user_tables as s
where
    s.schemaname = :schema and s.relname in ('accounts', 'transactions', 'idempotency_keys')
    and s.n_live_tup >= :many
    and (coalesce(s.last_analyze, s.last_autoanalyze) is null or s.n_mod_since_analyze > s.n_live_tup)
order by 1
"""


def examine(connection: Connection, settings: Settings) -> Iterator[Finding]:
    """All findings of this kind."""
    if not show(connection, settings).line_running:
        mend = f"walletmigrate resume {REASON}  # when the reason for it is gone"
        yield Finding("the line is stopped: accounts turn stale at their next write", mend, "runbooks/line-stopped.md")
    for what, mend in observation.balanced(imbalance(connection, settings.ledger_schema)):
        yield Finding(what, mend, "runbooks/ledger-imbalance.md")
    yield from _jobs(connection, settings)
    yield from _verifications(connection, settings)
    yield from _reconciliations(connection, settings)
    yield from _statistics(connection, settings)


def _jobs(connection: Connection, settings: Settings) -> Iterator[Finding]:
    query = text(_JOBS.replace("{schema}", quoted(settings.ledger_schema)))
    values = {"stalled": STALLED_SECONDS, "mappings": [EVERYTHING, *(mapping.name for mapping in settings.mappings)]}
    for job in sorted(connection.execute(query, values), key=lambda row: row.id):
        name = f"{job.kind} job {job.id} of {job.mapping}"
        resume = resuming(job)
        if job.state == "failed":
            mend = f"walletmigrate jobs show {job.id}  # says why; then: {resume}"
            yield Finding(f"{name} has failed", mend, "runbooks/job-failed.md")
        elif job.state == "paused":
            what = f"{name} is paused since {shown_time(job.updated_at)}"
            yield Finding(what, resume, "runbooks/backfill-stalled.md")
        elif job.state == "running" and job.old:
            # Also where it was held: one that waits says so every few seconds.
            what = f"{name} counts as running, and has committed no batch since {shown_time(job.updated_at)}"
            yield Finding(what, resume, "runbooks/backfill-stalled.md")
        elif job.state == "running" and job.held is not None:
            mend = f"walletmigrate jobs show {job.id}  # goes on by itself when that is over"
            yield Finding(f"{name} waits: {job.held}", mend, "runbooks/backfill-stalled.md")
        elif job.items_failed and job.state in ("running", "done"):
            shows = "reconcile" if job.kind == "reconcile" else "jobs"
            mend = f"walletmigrate {shows} show {job.id}  # names the accounts; mend them, then: {resume}"
            if job.kind == "reconcile undo":
                mend = f"{resume}  # names what cannot be undone"
            yield Finding(f"{name} has set {job.items_failed} accounts aside", mend, "runbooks/job-failed.md")


def _verifications(connection: Connection, settings: Settings) -> Iterator[Finding]:
    """From dual_write to frozen: before the first clean run only once something can be read from the ledger."""
    phase = show(connection, settings).phase
    if phase in ("legacy", "retired"):
        return
    query = text(_RUNS.replace("{schema}", quoted(settings.ledger_schema)))
    begun = in_force_since(connection, settings, "read_ledger") if reached(phase, "read_ledger") else None
    for mapping in settings.mappings:
        run = connection.execute(query, {"mapping": mapping.name}).one()
        again = f"walletmigrate verify --mapping {mapping.name}"
        if run.unclean is not None:
            what = f"the last full verification of {mapping.name!r} found differences"
            if run.unclean != "full":
                what = (
                    f"{run.unclean} verification of {mapping.name!r} found differences, and no full one came after it"
                )
            yield Finding(what, f"{again}  # names the accounts", DRIFT)
        since = run.last_clean or begun
        if since is not None and run.now - since > VERIFIED_WITHIN:
            age = f"the last is {shown_span(run.now - since)} old" if run.last_clean else "there never was one"
            what = f"no clean full verification of {mapping.name!r} within {shown_span(VERIFIED_WITHIN)}: {age}"
            yield Finding(what, again, "runbooks/verification-stale.md")


def _reconciliations(connection: Connection, settings: Settings) -> Iterator[Finding]:
    """As the alert has it: what the last run reported, and a later one of the same kind has not lifted."""
    if show(connection, settings).phase == "legacy":
        return
    names = {mapping.name for mapping in settings.mappings}
    for run in reported(connection, settings.ledger_schema):
        accounts = sum(int(one["accounts"]) for one in run.differences.values())
        if run.mapping in names and accounts:
            what = f"reconciliation {run.id} of {run.mapping!r} with {run.truth} left {accounts} accounts that differ"
            yield Finding(what, f"walletmigrate reconcile show {run.id}  # names the accounts", DRIFT)


def _statistics(connection: Connection, settings: Settings) -> Iterator[Finding]:
    """Without them the planner takes the tables for small."""
    values = {"schema": settings.ledger_schema, "many": MANY_ROWS}
    for row in connection.execute(text(_STATISTICS), values):
        name = f"{quoted(settings.ledger_schema)}.{row.relname}"
        how = "was never analysed" if row.never else "has changed more than all its rows since it was last analysed"
        what = f"{name} {how}, and has about {row.rows} rows"
        yield Finding(what, f"as the ledger's owner, in psql: analyze {name}", LATENCY)
