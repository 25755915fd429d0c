"""The runs of `reconcile` on record: list and show them, and take one back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any, Final

from sqlalchemy import Connection, Engine, Row, text

from walletmigrate import config, job_batches, job_rows, job_turns, jobs
from walletmigrate.audit import Act
from walletmigrate.config import Settings
from walletmigrate.corrections import Correction, Corrector, changed_by, recorded, refuse, stopped
from walletmigrate.errors import UsageError
from walletmigrate.movements import digest
from walletmigrate.reconcile import KIND, ONE
from walletmigrate.schema import quoted
from walletmigrate.standing import REASON, require_installed

UNDO: Final = "reconcile undo"
_PAGE: Final = 500


@dataclass(frozen=True)
class RunFacts:
    """One run. ``undoes`` is the run that it took back; ``undone`` counts its corrections that were taken back.

    ``counts`` is empty, and ``reported_amount`` too, of a run that has not come to its end.
    """

    id: int
    kind: str
    mapping: str
    state: str
    truth: str | None
    account: str | None
    undoes: int | None
    actor: str
    reason: str
    started_at: datetime
    finished_at: datetime | None
    corrected: int
    undone: int
    counts: Mapping[str, int]
    reported_amount: Mapping[str, Decimal]


@dataclass(frozen=True)
class RunDetails:
    """A run with its accounts: ``changed`` as the audit log has them, ``left`` those only told of, at most 1000."""

    run: RunFacts
    changed: tuple[Correction, ...]
    left: tuple[Correction, ...]


@dataclass(frozen=True)
class Undo:
    """What an undo came to. ``left`` are the corrections that could not be undone, each with its reason; those that
    were undone before are counted apart, and ``open`` are those that it has not come to: it was stopped. ``run`` is
    None of a dry run.
    """

    run: int | None
    undoes: int
    mapping: str
    undone: int
    undone_before: int
    left: tuple[Correction, ...]
    open: int
    dry_run: bool
    state: str


def runs(connection: Connection, settings: Settings, *, limit: int = 50) -> tuple[RunFacts, ...]:
    """The newest runs, newest first. Raises LedgerNotInstalled."""
    require_installed(connection, settings)
    query = f"{_select(settings)} order by j.id desc limit :limit"
    rows = connection.execute(text(query), {"kinds": [KIND, ONE, UNDO], "limit": limit})
    return tuple(_facts(row) for row in rows)


def show(connection: Connection, settings: Settings, run: int) -> RunDetails:
    """One run and its accounts. Raises UsageError when there is none of that number."""
    row = _row(connection, settings, run)
    changed = changed_by(connection, settings, run)
    left = tuple(recorded(one) for one in row.details.get("items", []))
    return RunDetails(_facts(row), changed, left)


def undo(
    engine: Engine,
    settings: Settings,
    run: int,
    act: Act,
    *,
    dry_run: bool = False,
    stop: jobs.Stop | None = None,
) -> Undo:
    """Take back exactly the corrections of a run, each at most once, one account at a time; itself a run.

    Each side goes back by what the correction moved on it, the ledger by a reversal; postings since then stay. Where
    the correction moved one side alone, the two differ again as they did before it, and the account turns stale.
    Openings and resyncs stay. A job of turns (`job_turns`), an account each: ``stop``, and an operator's pause or
    cancellation, hold from the next account on, and the next call goes on with what is open. A run that is not done is
    cancelled by it: the next one begins anew. Raises UsageError when
    there is no such run, PreconditionRefused while the run, or a batch of it, is at work, in phase `legacy`, while the
    line is stopped or without the fence.
    """
    if not dry_run:
        with jobs.begin(engine) as connection:
            _undoable(connection, settings, run)
        # What a batch in flight corrected after the last page was read would stand for good.
        job_batches.rest(engine, settings, run, UNDO)
    with jobs.begin(engine) as connection:
        if not dry_run:
            job_rows.give_up(connection, settings, run, act)
        facts, mapping = _undoable(connection, settings, run)
        job = None if dry_run else _start(connection, settings, facts, act)
    undoing = _Undoing(Corrector(engine, settings, mapping, act), run, job.id if job else None)
    if job is None:
        undoing.look(engine, settings)
    else:
        job = undoing.as_job(engine, settings, job, act, stop)
    before = facts.undone + undoing.before
    return Undo(
        run=job.id if job else None,
        undoes=run,
        mapping=mapping.name,
        undone=undoing.undone,
        undone_before=before,
        left=tuple(undoing.left),
        open=facts.corrected - before - undoing.undone - len(undoing.left),
        dry_run=dry_run,
        state=job.state if job else "planned",
    )


class _Undoing:
    """One undo: what it took back so far, and what it could not. ``job`` None: it only looks."""

    def __init__(self, corrector: Corrector, run: int, job: int | None) -> None:
        self.undone = self.before = 0
        self.left: list[Correction] = []
        self._corrector, self._run, self._job = corrector, run, job
        self._page: list[Row[Any]] = []
        self._after = 0

    def look(self, engine: Engine, settings: Settings) -> None:
        """All of them, changing nothing."""
        while True:
            with jobs.begin(engine) as connection:
                one = self._next(connection, settings)
            if one is None:
                return
            self.take_back(one)

    def _next(self, connection: Connection, settings: Settings) -> Row[Any] | None:
        """The next correction that was not undone, None: there is none left.

        `take_back` takes it off the page, so that a lost connection leaves none out.
        """
        if not self._page:
            self._page = _corrections(connection, settings, self._run, self._after)
        return self._page[0] if self._page else None

    def take_back(self, one: Row[Any]) -> bool:
        """Take the first one of the page back, in a transaction of its own; whether that was done now."""
        details = one.details
        mapping, number = self._corrector.mapping, details.get("transaction_id")
        request = {
            "audit": one.id,
            "dry": self._job is None,
            "run": self._job,
            "request": digest(mapping.name, "reverse", number) if number else None,
        }
        column = mapping.column(details["bucket"], details["currency"])
        made = self._corrector.call("correct", details["key"], column, **request)
        self._page.remove(one)
        self._after = one.id
        if made.outcome == "undone":
            self.undone += 1
        elif made.refusal == "undone_before":
            self.before += 1
        else:
            self.left.append(made)
        return made.outcome == "undone"

    def as_job(
        self,
        engine: Engine,
        settings: Settings,
        job: jobs.Job,
        act: Act,
        stop: jobs.Stop | None,
    ) -> jobs.Job:
        """All of them, a turn each, while the job runs. Raises PreconditionRefused if the fence fell meanwhile."""

        def turn(connection: Connection, _: int) -> jobs.Batch:
            one = self._next(connection, settings)
            return jobs.Batch(0, 0, 0, {}) if one is None else jobs.Batch(1, int(self.take_back(one)), 0, {})

        def closing(connection: Connection) -> dict[str, Any]:
            refuse(UNDO, jobs.obstacles(connection, settings, self._corrector.mapping))
            self._note(connection, settings)
            return {"undoes": self._run, "undone": self.undone, "left": len(self.left)}

        job = job_turns.run_turns(engine, settings, job, turn, act, size=1, closing=closing, stop=stop)
        if job.state != "done":
            with jobs.begin(engine) as connection:
                self._note(connection, settings)
        return job

    def _note(self, connection: Connection, settings: Settings) -> None:
        assert self._job is not None
        job_rows.change(connection, settings, self._job, "items_failed = :left", left=len(self.left))


def _undoable(connection: Connection, settings: Settings, run: int) -> tuple[RunFacts, config.Mapping]:
    """The run as it stands now, and its mapping, if it may be undone."""
    facts = _facts(_row(connection, settings, run))
    if facts.kind == UNDO:
        raise UsageError(f"run {run} is itself an undo; what it took back can be reconciled again")
    mapping = settings.mapping(facts.mapping)
    reasons = jobs.obstacles(connection, settings, mapping) + stopped(connection, settings)
    if facts.state == "running":
        reasons.append((f"run {run} is at work", f"wait for its end, or: walletmigrate jobs cancel {run} {REASON}"))
    refuse(UNDO, reasons)
    return facts, mapping


def _start(connection: Connection, settings: Settings, facts: RunFacts, act: Act) -> jobs.Job:
    def of_same(found: jobs.Job) -> bool:
        # Each correction is undone at most once, whoever does it: nothing is lost with the job of another undo.
        return bool(found.details.get("undoes") == facts.id)

    more: dict[str, Any] = {"total": facts.corrected - facts.undone, "details": {"undoes": facts.id}}
    return jobs.started(connection, settings, UNDO, facts.mapping, act, wanted=of_same, **more)


def _corrections(connection: Connection, settings: Settings, run: int, after: int) -> list[Row[Any]]:
    """A page of the audit rows of a run's corrections that were not undone."""
    name = quoted(settings.ledger_schema)
    query = text(
        f"select a.id, a.details from {name}.audit_log as a where a.job_id = :run and a.action = 'reconcile corrected' "
        f"and a.id > :after and not exists (select from {name}.audit_log as u where u.action = 'reconcile undone' "
        "and u.details ->> 'undoes' = a.id::text) order by a.id limit :page"
    )
    return list(connection.execute(query, {"run": run, "after": after, "page": _PAGE}))


def _select(settings: Settings) -> str:
    name = quoted(settings.ledger_schema)
    return (
        "select j.id, j.kind, j.mapping, j.state, j.actor, j.reason, j.started_at, j.finished_at, j.details, "
        f"(select count(*) from {name}.audit_log as a where a.job_id = j.id and a.action = 'reconcile corrected') "
        f"as corrected, (select count(*) from {name}.audit_log as a inner join {name}.audit_log as u "
        "on u.action = 'reconcile undone' and u.details ->> 'undoes' = a.id::text "
        "where a.job_id = j.id and a.action = 'reconcile corrected') as undone "
        f"from {name}.jobs as j where j.kind = any(:kinds)"
    )


def _row(connection: Connection, settings: Settings, run: int) -> Row[Any]:
    require_installed(connection, settings)
    query = f"{_select(settings)} and j.id = :run"
    row = connection.execute(text(query), {"kinds": [KIND, ONE, UNDO], "run": run}).one_or_none()
    if row is None:
        raise UsageError(f"there is no reconciliation {run}; see: walletmigrate reconcile list")
    return row


def _facts(row: Row[Any]) -> RunFacts:
    details = row.details
    differences = details.get("differences", {})
    return RunFacts(
        *(row.id, row.kind, row.mapping, row.state),
        truth=details.get("options", {}).get("truth"),
        account=details.get("account"),
        undoes=details.get("undoes"),
        actor=row.actor,
        reason=row.reason,
        started_at=row.started_at,
        finished_at=row.finished_at,
        corrected=row.corrected,
        undone=row.undone,
        counts={name: int(n) for name, n in details.get("counts", {}).items() if " " not in name},
        reported_amount={currency: Decimal(one["amount"]) for currency, one in differences.items()},
    )
