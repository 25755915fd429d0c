"""Whether what runs over the ledger is well: the line, jobs, verifications, the planner's statistics."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Final

from sqlalchemy import Connection, text

from walletmigrate.checkup import DRIFT, LATENCY, Finding
from walletmigrate.config import Settings
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
    yield from _jobs(connection, settings)
    yield from _verifications(connection, settings)
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
            mend = f"walletmigrate jobs show {job.id}  # names the rows; mend them, then: {resume}"
            yield Finding(f"{name} has set {job.items_failed} accounts aside", mend, "runbooks/job-failed.md")


def _verifications(connection: Connection, settings: Settings) -> Iterator[Finding]:
    """From dual_write to frozen: before the first clean run only once something can be read from the ledger."""
    phase = show(connection, settings).phase
    if phase in ("legacy", "retired"):
        return
    query = text(
        "select bool_and(v.clean) filter (where v.newest) as clean, "
        "max(v.finished_at) filter (where v.clean) as last_clean, clock_timestamp() as now from ("
        "select x.clean, x.finished_at, x.started_at = max(x.started_at) over () as newest "
        f"from {quoted(settings.ledger_schema)}.verifications as x where x.full_run and x.mapping = :mapping) as v"
    )
    begun = in_force_since(connection, settings, "read_ledger") if reached(phase, "read_ledger") else None
    for mapping in settings.mappings:
        run = connection.execute(query, {"mapping": mapping.name}).one()
        again = f"walletmigrate verify --mapping {mapping.name}"
        if run.clean is False:
            what = f"the last full verification of {mapping.name!r} found differences"
            yield Finding(what, f"{again}  # names the accounts", DRIFT)
        since = run.last_clean or begun
        if since is not None and run.now - since > VERIFIED_WITHIN:
            age = f"the last is {shown_span(run.now - since)} old" if run.last_clean else "there never was one"
            what = f"no clean full verification of {mapping.name!r} within {shown_span(VERIFIED_WITHIN)}: {age}"
            yield Finding(what, again, "runbooks/verification-stale.md")


def _statistics(connection: Connection, settings: Settings) -> Iterator[Finding]:
    """Without them the planner takes the tables for small."""
    values = {"schema": settings.ledger_schema, "many": MANY_ROWS}
    for row in connection.execute(text(_STATISTICS), values):
        name = f"{quoted(settings.ledger_schema)}.{row.relname}"
        how = "was never analysed" if row.never else "has changed more than all its rows since it was last analysed"
        what = f"{name} {how}, and has about {row.rows} rows"
        yield Finding(what, f"as the ledger's owner, in psql: analyze {name}", LATENCY)
