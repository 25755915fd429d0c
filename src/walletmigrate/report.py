"""What an operator wants to know at a glance: where it stands, what runs, what is wrong, what comes next."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal

from sqlalchemy import Connection, Engine, Row, text

from walletmigrate.census import Census
from walletmigrate.config import Settings
from walletmigrate.facts import imbalance, reported
from walletmigrate.flag_edits import FlagState
from walletmigrate.flag_sources import DocumentSource
from walletmigrate.flags import FlagSource
from walletmigrate.gates import census_of_all, reasons
from walletmigrate.job_options import EVERYTHING, STALLED_SECONDS
from walletmigrate.job_rows import READS
from walletmigrate.schema import quoted
from walletmigrate.standing import REASON, Reason, confirmation, flag_states, of_mapping, show

STATES = ("absent", "mirrored", "stale", "frozen", "closed")


@dataclass(frozen=True)
class JobStatus:
    """The newest job of a kind on a mapping. Items are accounts; ``share`` of them is done, 0 to 1.

    ``stalled``: it counts as running, and for a minute no batch was committed, and nobody said that it is ``held``.
    ``rate`` is items per second over the batches of the last minute: since the start would count pauses. ``rate`` and
    ``eta_seconds`` are None unless it really runs (after a pause: until it has done a batch), and ``share`` and
    ``eta_seconds`` while the total is not known.
    """

    id: int
    kind: str
    mapping: str | None
    state: str
    stalled: bool
    items_total: int | None
    items_done: int
    items_failed: int
    rate: float | None
    eta_seconds: float | None
    updated_at: datetime
    actor: str
    reason: str
    held: str | None = None
    share: float | None = None

    @property
    def runs(self) -> bool:
        """Whether a process is at work on it, as far as can be seen."""
        return self.state == "running" and not self.stalled


@dataclass(frozen=True)
class VerificationStatus:
    """The last full verification of one mapping in one currency; ``drift_amount`` in major units.

    ``voided``: when a later verification, of a sample or of what changed, was not clean.
    """

    mapping: str
    currency: str
    finished_at: datetime
    clean: bool
    accounts: int
    missing: int
    drift_accounts: int
    drift_amount: Decimal
    voided: datetime | None = None


@dataclass(frozen=True)
class ReconciliationStatus:
    """What the last reconciliation of a mapping with this ``truth`` reported and left, and no later one has lifted:
    ``accounts`` that differ, by ``amount`` in major units of ``currency``.
    """

    id: int
    mapping: str
    truth: str
    currency: str
    accounts: int
    amount: Decimal


@dataclass(frozen=True)
class FlagsStatus:
    """The flags in force: where from, how old, what is wrong with the source."""

    source: str
    age_seconds: float
    problem: str | None
    flags: tuple[FlagState, ...]


@dataclass(frozen=True)
class Stopped:
    """Who stopped the line, when, and why, as the audit log has it."""

    at: datetime
    actor: str
    reason: str


@dataclass(frozen=True)
class Status:
    """The whole state of a migration. ``accounts`` counts by state; ``imbalance`` is what all balances come to, in
    major units by currency, where that is not 0; ``refused`` are the reasons against ``next_phase``; ``next_command``
    is what an operator would run now. ``stopped`` is None where the line runs, or was stopped past `stop-the-line`.
    """

    installed: bool
    phase: str
    since: datetime | None
    line_running: bool
    flags: FlagsStatus
    accounts: dict[str, int]
    drifted: int
    imbalance: dict[str, Decimal]
    failures: int
    jobs: tuple[JobStatus, ...]
    verifications: tuple[VerificationStatus, ...]
    reconciliations: tuple[ReconciliationStatus, ...]
    next_phase: str | None
    refused: tuple[Reason, ...]
    next_command: str
    stopped: Stopped | None = None


def status(engine: Engine, settings: Settings, source: FlagSource) -> Status:
    """Look at everything in one read-only transaction; it compares every account, like the gates."""
    with engine.connect() as plain:
        connection = plain.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
        state = show(connection, settings)
        flags = _flags(source)
        if not state.installed:
            command = f"walletmigrate install {REASON}"
            refused = tuple(reasons(connection, settings, source, "dual_write"))
            none = dict.fromkeys(STATES, 0)
            return Status(
                False, "legacy", None, True, flags, none, 0, {}, 0, (), (), (), "dual_write", refused, command
            )
        counted = census_of_all(connection, settings)
        unbalanced = imbalance(connection, settings.ledger_schema)
        wanted = tuple(reasons(connection, settings, source, state.next, counted, unbalanced)) if state.next else ()
        accounts = _accounts(connection, settings, counted)
        jobs = tuple(_jobs(connection, settings))
        return Status(
            installed=True,
            phase=state.phase,
            since=state.since,
            line_running=state.line_running,
            flags=flags,
            accounts=accounts,
            drifted=sum(one.drifted for one in counted),
            imbalance=unbalanced,
            failures=_failures(connection, settings),
            jobs=jobs,
            verifications=tuple(_verifications(connection, settings)),
            reconciliations=tuple(_reconciliations(connection, settings)),
            next_phase=state.next,
            refused=wanted,
            next_command=_unless_it_runs(_next(settings, state.phase, wanted, counted, source), jobs),
            stopped=None if state.line_running else _stopped(connection, settings),
        )


def _stopped(connection: Connection, settings: Settings) -> Stopped | None:
    row = connection.execute(
        text(
            f"select action, at, actor, reason from {quoted(settings.ledger_schema)}.audit_log "
            "where action in ('stop-the-line', 'resume') order by id desc limit 1"
        )
    ).first()
    return Stopped(row.at, row.actor, row.reason) if row is not None and row.action == "stop-the-line" else None


def _flags(source: FlagSource) -> FlagsStatus:
    snapshot = source.snapshot()
    problem = source.problem if isinstance(source, DocumentSource) else None
    return FlagsStatus(snapshot.source, snapshot.age_seconds(), problem, flag_states(source))


def _accounts(connection: Connection, settings: Settings, counted: Sequence[Census]) -> dict[str, int]:
    accounts = dict.fromkeys(STATES, 0)
    rows = connection.execute(
        text(
            f"select state::text as state, count(*) as count from {quoted(settings.ledger_schema)}.accounts "
            "where mapping = any(:mappings) group by state"
        ),
        {"mappings": [mapping.name for mapping in settings.mappings]},
    )
    accounts.update((state, count) for state, count in rows)
    return {**accounts, "absent": sum(one.absent for one in counted)}


def _failures(connection: Connection, settings: Settings) -> int:
    """Postings whose ledger leg failed, or differed, in the observation window."""
    found = connection.scalar(
        text(
            f"select count(*) from {quoted(settings.ledger_schema)}.failures "
            "where at >= clock_timestamp() - :window and mapping = any(:mappings)"
        ),
        {"window": settings.observation_window, "mappings": [mapping.name for mapping in settings.mappings]},
    )
    return int(found or 0)


_JOBS = """
select distinct on (j.kind, j.mapping)
    j.id, j.kind, j.mapping, j.state, j.items_total, j.items_done, j.items_failed, j.updated_at, j.actor, j.reason,
    j.updated_at < clock_timestamp() - make_interval(secs => :stalled) as old,
    case when j.state = 'running' and j.updated_at >= clock_timestamp() - make_interval(secs => :stalled) then j.held
    end as held,
    extract(epoch from j.updated_at - j.started_at)::float8 as seconds,
    b.items as recent_items, b.seconds as recent_seconds,
    exists (select from {schema}.job_batches as x where x.job_id = j.id and x.state = 'done') as batched
from {schema}.jobs as j
left join lateral (
    select
        sum(x.done + x.failed)::float8 as items,
        extract(epoch from max(x.at) - min(x.at - make_interval(secs => coalesce(x.seconds, 0))))::float8 as seconds
    from {schema}.job_batches as x
    where x.job_id = j.id and x.state = 'done' and x.at > clock_timestamp() - make_interval(secs => :stalled)
) as b on j.state = 'running'
where
    j.mapping = any(:mappings)
    -- What these found when they were done stands elsewhere.
    and not (j.kind = any(:reads) and j.state = 'done')
order by j.kind, j.mapping, j.id desc
"""


def _jobs(connection: Connection, settings: Settings) -> Iterator[JobStatus]:
    query = text(_JOBS.replace("{schema}", quoted(settings.ledger_schema)))
    names = [EVERYTHING, *(mapping.name for mapping in settings.mappings)]
    values = {"stalled": STALLED_SECONDS, "mappings": names, "reads": sorted(READS)}
    for row in sorted(connection.execute(query, values), key=lambda row: row.id):
        rate, eta = _speed(row)
        done = row.items_done + row.items_failed
        yield JobStatus(
            row.id,
            row.kind,
            row.mapping,
            row.state,
            row.state == "running" and row.old,
            row.items_total,
            row.items_done,
            row.items_failed,
            rate,
            eta,
            row.updated_at,
            row.actor,
            row.reason,
            row.held,
            min(done / row.items_total, 1.0) if row.items_total else None,
        )


def _speed(row: Row[tuple[object, ...]]) -> tuple[float | None, float | None]:
    """Items per second and seconds left; nothing for a job that stands still, whose ETA would be a lie."""
    done = row.items_done + row.items_failed
    if row.state != "running" or row.old or row.held is not None or row.seconds <= 0 or not done:
        return None, None
    if row.recent_items and row.recent_seconds:
        rate = row.recent_items / row.recent_seconds
    elif row.batched:
        return None, None  # just resumed: all the time since its start has the pause in it
    else:
        rate = done / row.seconds
    if row.items_total is None:
        return rate, None
    return rate, max(row.items_total - done, 0) / rate


def _verifications(connection: Connection, settings: Settings) -> Iterator[VerificationStatus]:
    query = (
        "select distinct on (v.mapping, v.currency) v.mapping, v.currency, v.finished_at, v.clean, v.accounts, "
        "v.missing, v.drift_accounts, v.drift_amount, (select max(w.finished_at) from {name} as w where "
        "w.mapping = v.mapping and w.currency = v.currency and not w.clean and not w.full_run "
        "and w.started_at >= v.started_at) as voided "
        "from {name} as v where v.full_run and v.mapping = any(:mappings) order by v.mapping, v.currency, v.id desc"
    ).format(name=f"{quoted(settings.ledger_schema)}.verifications")
    names = [mapping.name for mapping in settings.mappings]
    for row in connection.execute(text(query), {"mappings": names}):
        yield VerificationStatus(*row)


def _reconciliations(connection: Connection, settings: Settings) -> Iterator[ReconciliationStatus]:
    names = {mapping.name for mapping in settings.mappings}
    for run in reported(connection, settings.ledger_schema):
        for currency, one in sorted(run.differences.items()):
            if run.mapping in names and one["accounts"]:
                left = (int(one["accounts"]), Decimal(one["amount"]))
                yield ReconciliationStatus(run.id, run.mapping, run.truth, currency, *left)


def _next(
    settings: Settings,
    phase: str,
    refused: Sequence[Reason],
    counted: Sequence[Census],
    source: FlagSource,
) -> str:
    """The one command that an operator would run now."""
    if isinstance(source, DocumentSource) and source.failure is not None:
        # What flags seem to lack is then not known, and a switch could not be written.
        return "walletmigrate flags check"
    confirm = f"--confirm {confirmation(settings)} {REASON}"
    if phase in ("frozen", "retired"):
        waiting = [one for one in counted if one.frozen < one.rows]
        if waiting and phase == "frozen":
            name = waiting[0].mapping
            return f"walletmigrate freeze{of_mapping(settings, name)} --confirm {name} {REASON}"
        if phase == "retired":
            return "none: the ledger alone is true. `alembic upgrade head` drops the column, if it still stands"
        return (
            "none: the ledger alone is true. `walletmigrate unfreeze` is the way back, `walletmigrate retire` the end"
        )
    thawing = [one for one in counted if one.frozen]
    if thawing:
        name = thawing[0].mapping
        return f"walletmigrate unfreeze{of_mapping(settings, name)} --confirm {name} {REASON}"
    if refused:
        mends = [mend for _, mend in refused]
        return next((mend for mend in mends if mend.startswith("walletmigrate ")), mends[0])
    if phase == "wallet_only":
        return f"walletmigrate freeze {confirm}"
    return f"walletmigrate phase advance {REASON}"


def _unless_it_runs(command: str, jobs: Sequence[JobStatus]) -> str:
    """The command, or, where its job is at work already, the one that looks at it."""
    words = f"{command} "
    for job in jobs:
        mine = words.startswith(f"walletmigrate {job.kind} -")
        other = "--mapping " in words and f"--mapping {shlex.quote(job.mapping or '')} " not in words
        if job.runs and mine and not other:
            return f"walletmigrate jobs show {job.id}  # the {job.kind} runs"
    return command
