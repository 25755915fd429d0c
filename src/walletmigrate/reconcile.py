"""Hold balances against a truth, account by account, and correct small differences.

A run is a job: its number stands in every transaction and audit row that it made, and `undo` takes it back.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import asdict, dataclass, replace
from decimal import Decimal
from typing import Any, Final

from sqlalchemy import Connection, Engine, text

from walletmigrate import config, job_batches, jobs, survey
from walletmigrate.audit import Act, record
from walletmigrate.comparison import snapshot
from walletmigrate.config import WIDE, Settings
from walletmigrate.corrections import Correction, Corrector, changed_by, key_of, recorded, refuse, stopped
from walletmigrate.errors import PreconditionRefused
from walletmigrate.schema import quoted
from walletmigrate.settling import CHANGED, DIGITS, LISTED, Limits, Settling, Tally
from walletmigrate.standing import REASON
from walletmigrate.truths import LEGACY, Truth

__all__ = ["KIND", "ONE", "Limits", "Reconciliation", "reconcile"]

KIND: Final = "reconcile"
ONE: Final = "reconcile account"
_LOOKED: Final = 500
"""How many keys a dry run looks at at once."""
_ASKED_FOR: Final = {"min_batch_size": 1, "max_batch_size": 100}
"""A function may take its time, and a pause holds at the end of a batch."""
_COUNTED: Final = ("in_order", *CHANGED, "reported", "refused", "failed", "unlisted")


@dataclass(frozen=True)
class Reconciliation:
    """What a run came to, over all its parts if it was interrupted; ``run`` is None of a dry run.

    ``counts`` has in_order, corrected, opened, resynced, reported, refused, failed, and unlisted (accounts that the
    truth does not know). ``reported_amount`` is by currency, in major units. ``items`` are accounts that are not in
    order, or were not, in the order of their keys, at most 1000. ``state`` is done, paused, cancelled or planned.
    """

    run: int | None
    mapping: str
    truth: str
    counts: Mapping[str, int]
    reported_amount: Mapping[str, Decimal]
    items: tuple[Correction, ...]
    dry_run: bool
    resumed: bool
    state: str
    seconds: float


def reconcile(
    engine: Engine,
    settings: Settings,
    mapping: config.Mapping,
    act: Act,
    *,
    truth: Truth = LEGACY,
    limits: Limits | None = None,
    account: str | None = None,
    dry_run: bool = False,
    batch_size: int | None = None,
    workers: int = 1,
    executor: Executor | None = None,
    progress: jobs.Progress | None = None,
    stop: jobs.Stop | None = None,
) -> Reconciliation:
    """Hold all accounts of a mapping, or the one of key ``account``, against ``truth``, and correct small differences.

    Each account is compared and corrected in one SQL function, under the locks of its legacy row and its account, in
    a transaction of its own. One that fails is counted and told; the others go on. A run that was interrupted goes on
    where it stood when it is called again with the same options; what it corrected it does not correct twice.
    ``batch_size``, ``workers`` and ``executor`` as in `jobs.run_batches`: the truth then travels to them, pickled.

    Raises PreconditionRefused in phase `legacy`, while the line is stopped, without the fence as it was made, for
    truth `legacy` in phase `frozen`, and while a run with other options is at work; LedgerNotInstalled; InvalidKey;
    and what `jobs.run_batches` raises.
    """
    run = _Run(engine, settings, mapping, act, truth, limits or Limits(), dry_run=dry_run)
    with snapshot(engine) as connection:
        legacy = run.check(connection)
        total = jobs.count_items(connection, mapping)
    if account is not None:
        return run.one(key_of(account, legacy.key_type, mapping))
    if dry_run:
        return run.planned(batch_size or _LOOKED)
    more = {"workers": workers, "executor": executor, "progress": progress, "stop": stop}
    return run.all(total, {"batch_size": batch_size, **more})


class _Run:
    def __init__(
        self,
        engine: Engine,
        settings: Settings,
        mapping: config.Mapping,
        act: Act,
        truth: Truth,
        limits: Limits,
        *,
        dry_run: bool,
    ) -> None:
        self._engine, self._settings, self._mapping, self._act = engine, settings, mapping, act
        self._truth, self._limits, self._dry = truth, limits, dry_run
        self._schema = quoted(settings.ledger_schema)
        self._corrector = Corrector(engine, settings, mapping, act)
        self._settling = Settling(settings, mapping, act, truth, limits, "", None)
        self._order: Callable[[Correction], Any] = lambda one: one.key
        self._began = time.monotonic()

    def check(self, connection: Connection) -> survey.LegacyTable:
        reasons = jobs.obstacles(connection, self._settings, self._mapping) + stopped(connection, self._settings)
        if self._truth.kind == "legacy" and jobs.phase(connection, self._settings) == "frozen":
            what = "the phase is frozen: the ledger alone is true, and legacy cannot be the truth"
            reasons.append((what, f"walletmigrate reconcile --all --truth FILE.csv {REASON}"))
        refuse("reconcile", reasons)
        jobs.visibility(connection, self._mapping, "reconcile")
        legacy = survey.inspect_mapping(connection, self._mapping)
        self._settling = replace(self._settling, key_type=legacy.key_sql_type)
        if legacy.key_type == "integer":
            self._order = lambda one: int(one.key)
        return legacy

    def one(self, key: str) -> Reconciliation:
        """One key, all its columns; the job is done when it appears."""
        run = None
        if not self._dry:
            with jobs.begin(self._engine) as connection:
                run = self._insert_done(connection, key)
        tally, settling = Tally(), replace(self._settling, run=run)
        for column in self._mapping.columns:
            if self._truth.kind == "file" and self._truth.of(key, column) is None:
                tally.add(Correction("unlisted", key, column.bucket, column.currency))
            else:
                tally.add(settling.settle(key, column, self._corrector))
        if run is not None:
            with jobs.begin(self._engine) as connection:
                settling.keep(connection, tally)
                self._conclude(connection, run, {name: int(n) for name, n in tally.counts.items()})
                record(connection, self._settings, f"{ONE} done", self._act, job_id=run, **self._facts(tally.counts))
        return self._result(run, tally.counts, tally.items, "planned" if self._dry else "done", resumed=False)

    def planned(self, batch_size: int) -> Reconciliation:
        """The same look at all accounts, with every write left out."""
        tally, after = Tally(), None
        cut = text(f"select upto from {self._schema}.cut_{self._mapping.name}(cast(:after as text), null, :limit)")
        while True:
            with jobs.begin(self._engine) as connection:
                upto = connection.scalar(cut, {"after": after, "limit": batch_size})
                rows = self._settling.standing(connection, after, upto)[1] if upto is not None else []
            if upto is None:
                break
            self._settling.go_through(rows, self._corrector, tally)
            after = upto
        self._unknown(tally)
        return self._result(None, tally.counts, tally.items, "planned", resumed=False)

    def all(self, total: int, options: dict[str, Any]) -> Reconciliation:
        """Run the job, or the rest of it, with these options of `jobs.run_batches`."""
        with jobs.begin(self._engine) as connection:
            job = self._start(connection, total)
        settling = replace(self._settling, run=job.id)
        job = jobs.run_batches(self._engine, self._settings, job, settling, **options)
        if job.state == "running":
            tally = jobs.persist(self._engine, job, lambda: self._unmet(job.id))

            def closing(connection: Connection, now: jobs.Job) -> Mapping[str, Any]:
                # With the end of the job, in one transaction: cut short before it, nothing is counted twice.
                counts = Counter(now.counts)
                counts.update(tally.counts)
                settling.keep(connection, tally)
                self._count_changed(connection, job.id, counts)
                self._conclude(connection, job.id, counts)
                return dict(self._facts(counts)["details"])

            job = jobs.finish(self._engine, self._settings, self._mapping, job, self._act, closing=closing)
        items = jobs.persist(self._engine, job, lambda: self._items(job))
        return self._result(job.id, job.counts, items, job.state, resumed=job.resumed)

    def _unmet(self, run: int) -> Tally:
        """What no batch could tell."""
        tally = Tally()
        self._unknown(tally)
        self._set_aside(run, tally)
        return tally

    def _items(self, job: jobs.Job) -> list[Correction]:
        """As they stand on record: several processes may have met them."""
        with jobs.begin(self._engine) as connection:
            changed = changed_by(connection, self._settings, job.id, limit=LISTED)
            kept = jobs.get(connection, self._settings, job.id).details.get("items", [])
        return sorted([*changed, *map(recorded, kept)], key=self._order)[:LISTED]

    def _unknown(self, tally: Tally) -> None:
        """Keys of the file that the table has no row of: nobody has met them."""
        places = sorted(self._truth.balances)
        for first in range(0, len(places), LISTED):
            part = places[first : first + LISTED]
            with jobs.begin(self._engine) as connection:
                known = {row.key for row in self._settling.accounts(connection, [key for key, _, _ in part])}
            for key, bucket, currency in part:
                if key not in known:
                    tally.add(Correction("refused", key, bucket, currency, refusal="no_row"))

    def _set_aside(self, run: int, tally: Tally) -> None:
        """Keys that no batch could look at: nothing is known of their accounts."""
        with jobs.begin(self._engine) as connection:
            aside = job_batches.set_aside(connection, self._settings, run)
        for row in aside:
            for column in self._mapping.columns:
                tally.add(Correction("failed", row.key, column.bucket, column.currency, error=row.reason))

    def _options(self) -> dict[str, Any]:
        """What decides of a run: it goes on only with the same."""
        limits = {name: str(value) for name, value in asdict(self._limits).items()}
        return {"truth": self._truth.name, "kind": self._truth.kind, "digest": self._truth.digest, **limits}

    def _start(self, connection: Connection, total: int) -> jobs.Job:
        options = self._options()

        def of_same(found: jobs.Job) -> bool:
            theirs = found.details.get("options", {})
            # One that is stalled has no process any more: it is given up, as one that was paused.
            if theirs != options and found.state == "running" and not found.stalled:
                what = f"run {found.id} is at work with other options ({theirs.get('truth')})"
                mend = f"wait for its end, or: walletmigrate jobs cancel {found.id} {REASON}"
                raise PreconditionRefused("reconcile", [(what, mend)])
            return bool(theirs == options)

        more: dict[str, Any] = {"total": total, "details": {"options": options}, "wanted": of_same}
        if self._truth.kind == "callable":
            more["options"] = _ASKED_FOR
        return jobs.started(connection, self._settings, KIND, self._mapping.name, self._act, **more)

    def _insert_done(self, connection: Connection, key: str) -> int:
        details = json.dumps({"options": self._options(), "account": key})
        return int(
            connection.execute(
                text(
                    f"insert into {self._schema}.jobs (kind, mapping, state, actor, reason, version, items_total, "
                    "items_done, finished_at, details) values (:kind, :mapping, 'done', :actor, :reason, '', :items, "
                    ":items, clock_timestamp(), cast(:details as jsonb)) returning id"
                ),
                {
                    "kind": ONE,
                    "mapping": self._mapping.name,
                    "actor": self._act.actor,
                    "reason": self._act.reason,
                    "items": len(self._mapping.columns),
                    "details": details,
                },
            ).scalar_one()
        )

    def _count_changed(self, connection: Connection, run: int, counts: Counter[str]) -> None:
        """By the audit log: a batch that was cut short has corrected what it then did not count, and found in order."""
        rows = connection.execute(
            text(
                f"select substr(action, 11) as outcome, count(*) as accounts from {self._schema}.audit_log "
                "where job_id = :run and action = any(:actions) group by action"
            ),
            {"run": run, "actions": [f"{KIND} {outcome}" for outcome in CHANGED]},
        )
        for outcome, accounts in rows:
            counts["in_order"] -= accounts - counts[outcome]
            counts[outcome] = accounts

    def _conclude(self, connection: Connection, run: int, counts: Mapping[str, int]) -> None:
        """What was reported, by currency, for `exporter`."""
        found = {
            currency: {"accounts": counts.get(f"reported {currency}", 0), "amount": amount}
            for currency, amount in self._amounts(counts).items()
        }
        facts = {"differences": found, "counts": dict(counts)}
        connection.execute(
            text(f"update {self._schema}.jobs set details = details || cast(:facts as jsonb) where id = :id"),
            {"id": run, "facts": json.dumps(facts, default=str)},
        )

    def _facts(self, counts: Mapping[str, int]) -> dict[str, Any]:
        shown = {name: counts.get(name, 0) for name in _COUNTED}
        details = {**self._options(), **shown, "reported_amount": self._amounts(counts)}
        return {"mapping": self._mapping.name, "details": details}

    def _amounts(self, counts: Mapping[str, int]) -> dict[str, Decimal]:
        """What was reported, by currency, in major units."""
        found: dict[str, Decimal] = {}
        for column in self._mapping.columns:
            units = Decimal(counts.get(f"amount {column.currency}", 0))
            found[column.currency] = units.scaleb(-DIGITS, WIDE).quantize(column.quantum, context=WIDE)
        return found

    def _result(
        self, run: int | None, counts: Mapping[str, int], items: list[Correction], state: str, *, resumed: bool
    ) -> Reconciliation:
        return Reconciliation(
            run=run,
            mapping=self._mapping.name,
            truth=self._truth.name,
            counts={name: counts.get(name, 0) for name in _COUNTED},
            reported_amount=self._amounts(counts),
            items=tuple(items),
            dry_run=self._dry,
            resumed=resumed,
            state=state,
            seconds=time.monotonic() - self._began,
        )
