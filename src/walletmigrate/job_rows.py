"""The rows of the table ``jobs``: what a job is, and how one is found, changed and taken out of work."""

from __future__ import annotations

import json
import shlex
from collections import defaultdict
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields, replace
from datetime import datetime
from importlib.metadata import version
from typing import Any, Final

from sqlalchemy import Connection, Engine, Row, text
from sqlalchemy.exc import DBAPIError

from walletmigrate import connect
from walletmigrate.audit import Act, record
from walletmigrate.config import Settings
from walletmigrate.errors import UsageError
from walletmigrate.job_options import STALLED_SECONDS, Options
from walletmigrate.schema import quoted
from walletmigrate.standing import REASON

RESUMABLE: Final = ("running", "paused", "failed")
_OWN_COMMAND: Final = {
    "reconcile": "reconcile --all --mapping {mapping}{run}",
    "reconcile undo": "reconcile undo {undoes}",
    "backfill undo": "backfill undo --job {of}",
    "snapshot take": "snapshot take",
    "snapshot verify": "snapshot verify",
    "verify": "verify --mapping {mapping}",
    "verify changes": "verify --since-last --mapping {mapping}",
    "verify sample": "verify --sample NUMBER --mapping {mapping}",
    "archive": "archive --to FILE --mapping {mapping}",
}
"""Who goes on with jobs of these kinds: `jobs resume` runs the others."""
READS: Final = frozenset({"verify", "verify changes", "verify sample", "archive", "snapshot verify"})
"""Kinds that only read (`job_reads`)."""
TURNS: Final = frozenset({"snapshot take", "reconcile undo", "backfill undo"})
"""Kinds that go in order (`job_turns`)."""
HOLD_SECONDS: Final = 10
"""How often a job that is held says that it is still there; well below `STALLED_SECONDS`."""


@dataclass(frozen=True)
class Job:
    """A row of the table ``jobs``. Items are accounts; ``items_done`` leaves out the failed ones.

    ``state`` is running, paused, done, failed or cancelled. Batches are cut behind ``cursor``, a key as text, up to
    ``until_key``; ``job_pass`` 2 is the last pass, over what was written since the job began. ``held`` is why a
    running job stands still by itself, unless it is ``stalled``: then no process has said so, or committed a batch, for
    a minute, and it is not `running` but for its row. ``resumed`` says that `start_or_resume` found it begun.
    """

    id: int
    kind: str
    mapping: str | None
    state: str
    actor: str
    reason: str
    version: str
    functions_version: int | None
    settings: dict[str, Any]
    items_total: int | None
    items_done: int
    items_failed: int
    job_pass: int
    cursor: str | None
    until_key: str | None
    batch_size: int | None
    claims_lost: int
    proven: bool
    alike: int
    held: str | None
    held_at: datetime | None
    last_batch_seconds: float | None
    started_at: datetime
    updated_at: datetime
    finished_at: datetime | None
    details: dict[str, Any] = field(default_factory=dict)
    stalled: bool = False
    resumed: bool = False

    @property
    def counts(self) -> dict[str, int]:
        """What the batches counted so far, over all runs of this job."""
        return {name: int(value) for name, value in self.details.get("counts", {}).items()}

    @property
    def options(self) -> Options:
        """What the operator has set."""
        return Options.of(self.settings)


@dataclass(frozen=True)
class Batch:
    """What one batch did: ``keys`` are legacy rows, ``done`` and ``failed`` accounts; ``counts`` are added up.

    ``written`` are the accounts that its rate counts in full, None: all of its keys; the others needed nothing.
    """

    keys: int
    done: int
    failed: int
    counts: Mapping[str, int]
    written: int | None = None


_SAID: Final = {
    "job_pass": "pass as job_pass",
    "stalled": "(state = 'running' and updated_at < clock_timestamp() - "
    f"make_interval(secs => {STALLED_SECONDS})) as stalled",
}
COLUMNS: Final = ", ".join(_SAID.get(one.name, one.name) for one in fields(Job) if one.name != "resumed")


def opening(
    kind: str, mapping_name: str, act: Act, functions: int, details: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The values with which a row begins, whoever writes it. ``functions`` is the version of the functions it needs."""
    return {
        "kind": kind,
        "mapping": mapping_name,
        "actor": act.actor,
        "reason": act.reason,
        "version": version("walletmigrate"),
        "functions": functions,
        "details": json.dumps(details or {}, default=str),
    }


def begin(engine: Engine) -> AbstractContextManager[Connection]:
    """A transaction at READ COMMITTED, whatever the engine is set to: a batch locks first and reads after."""
    return engine.execution_options(isolation_level="READ COMMITTED").begin()


def table(settings: Settings, name: str = "jobs") -> str:
    """A table of the ledger's schema, quoted."""
    return f"{quoted(settings.ledger_schema)}.{name}"


def job_of(row: Row[Any], *, resumed: bool = False) -> Job:
    """The job that a row with `COLUMNS` is."""
    return Job(**row._mapping, resumed=resumed)


def resuming(job: Job | Row[Any]) -> str:
    """The command that goes on with a job; with the options that it was begun with, which the job may not know."""
    own = _OWN_COMMAND.get(job.kind)
    if own is None:
        return f"walletmigrate jobs resume {job.id} {REASON}"
    values = defaultdict(
        lambda: "NUMBER", job.details, mapping=shlex.quote(job.mapping or ""), run=_of_run(job.details)
    )
    return f"walletmigrate {own.format_map(values)} {REASON}"


def _of_run(details: Mapping[str, Any]) -> str:
    """The options of a reconciliation: with others it would be another one, of something else."""
    options = {"truth": "legacy", "tolerance": "0", "correct_up_to": "1.00"}
    given = {name: details.get("options", {}).get(name, usual) for name, usual in options.items()}
    said = [
        f" --{name.replace('_', '-')} {shlex.quote(given[name])}" for name in options if given[name] != options[name]
    ]
    flags = ("create_missing", "allow_negative")
    said += [f" --{name.replace('_', '-')}" for name in flags if details.get("options", {}).get(name) == "True"]
    return "".join(said)


def has_own_command(job: Job | Row[Any]) -> bool:
    """Whether `jobs resume` does not run jobs of this kind."""
    return job.kind in _OWN_COMMAND


def newest(
    connection: Connection, settings: Settings, kind: str, mapping_name: str, *, lock: bool = False
) -> Job | None:
    """The newest job of a kind on a mapping, None when there never was one."""
    row = connection.execute(
        text(
            f"select {COLUMNS} from {table(settings)} "
            "where kind = :kind and mapping = :mapping order by id desc limit 1"
            + (" for no key update" if lock else "")
        ),
        {"kind": kind, "mapping": mapping_name},
    ).one_or_none()
    return None if row is None else job_of(row)


def get(connection: Connection, settings: Settings, job_id: int, *, lock: bool = False) -> Job:
    """The job of that id; ``lock`` keeps others from claiming and committing batches. Raises UsageError."""
    row = connection.execute(
        text(f"select {COLUMNS} from {table(settings)} where id = :id" + (" for no key update" if lock else "")),
        {"id": job_id},
    ).one_or_none()
    if row is None:
        raise UsageError(f"there is no job {job_id}; walletmigrate jobs list names them")
    return job_of(row)


def change(connection: Connection, settings: Settings, job_id: int, changes: str, **values: Any) -> Job:
    """Change columns of a job, given as SQL, and give the row as it is then."""
    statement = f"update {table(settings)} set {changes} where id = :id returning {COLUMNS}"
    return job_of(connection.execute(text(statement), {"id": job_id, **values}).one())


def leave(engine: Engine, settings: Settings, job: Job, state: str, error: str | None = None) -> Job:
    """Take a running job out of work as ``paused`` or ``failed``, with its checkpoint and on record."""
    with begin(engine) as connection:
        return left(connection, settings, job, state, Act(job.actor, job.reason), error)


def left(connection: Connection, settings: Settings, job: Job, state: str, act: Act, error: str | None = None) -> Job:
    """`leave` in the caller's transaction. A job that does not run stays as it is."""
    now = get(connection, settings, job.id, lock=True)
    if now.state != "running":
        return replace(now, resumed=job.resumed)
    now = change(
        connection,
        settings,
        job.id,
        "state = :state, updated_at = clock_timestamp(), held = null, held_at = null, "
        "details = details || jsonb_strip_nulls(jsonb_build_object('error', cast(:error as text)))",
        state=state,
        error=error,
    )
    word = "pause" if state == "paused" else "failed"
    details = {"error": error} if error else None
    record(connection, settings, f"{job.kind} {word}", act, mapping=job.mapping, job_id=job.id, details=details)
    return replace(now, resumed=job.resumed)


def cancelled(connection: Connection, settings: Settings, job: Job, act: Act) -> Job:
    """Give a job up, in the caller's transaction, which has locked its row. Batches in flight are rolled back; accounts
    that have a transaction of their own (`settling`) stay.
    """
    changes = (
        "state = 'cancelled', held = null, held_at = null, finished_at = clock_timestamp(), "
        "updated_at = clock_timestamp()"
    )
    now = change(connection, settings, job.id, changes)
    record(connection, settings, f"{job.kind} cancel", act, mapping=job.mapping, job_id=job.id)
    return now


def give_up(connection: Connection, settings: Settings, job_id: int, act: Act) -> Job:
    """Cancel a job that was paused or failed, because its work is taken back: gone on with, it would leave behind its
    cursor what it did before. As it stands then, with its row locked, in the caller's transaction.
    """
    job = get(connection, settings, job_id, lock=True)
    return cancelled(connection, settings, job, act) if job.state in ("paused", "failed") else job


def configure(connection: Connection, settings: Settings, job_id: int, options: Mapping[str, Any]) -> Job:
    """Change settings of a job, from its next batch on; what another rate has used up is forgotten."""
    merged = "settings = settings || cast(:options as jsonb)" + (", paced_until = null" if "rate" in options else "")
    return change(connection, settings, job_id, merged, options=json.dumps(dict(options)))


def hold(connection: Connection, settings: Settings, job_id: int, reason: str | None) -> None:
    """Write down why a running job stands still, or that it goes on (None); nothing where that is known. While it is
    held ``updated_at`` goes on, so that a job whose process died then is not taken for one that waits.
    """
    connection.execute(
        text(
            f"update {table(settings)} set held = :reason, "
            "held_at = case when cast(:reason as text) is not null then coalesce(held_at, clock_timestamp()) end, "
            "updated_at = case when cast(:reason as text) is not null then clock_timestamp() else updated_at end "
            "where id = :id and state = 'running' and (held is distinct from :reason or "
            "held is not null and updated_at < clock_timestamp() - make_interval(secs => :seconds))"
        ),
        {"id": job_id, "reason": reason, "seconds": HOLD_SECONDS},
    )


def retryable(error: DBAPIError) -> bool:
    """Whether the same batch may well succeed when it is tried again."""
    return connect.lost(error) or connect.conflicted(error)


def said(error: BaseException) -> str:
    """The error's own words on one line; of the driver's only the server's sentence, never the statement."""
    if isinstance(error, DBAPIError):
        diagnostic = getattr(error.orig, "diag", None)
        words = getattr(diagnostic, "message_primary", None) or type(error.orig).__name__
        return f"{words} ({connect.sqlstate(error) or 'no SQLSTATE'})"
    return " ".join(str(error).split()) or type(error).__name__
