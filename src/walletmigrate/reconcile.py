"""Hold balances against a truth, account by account, and correct small differences.

A run is a job: its number stands in every transaction and audit row that it made, and `undo` takes it back.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from decimal import Context, Decimal
from typing import Any, Final

from sqlalchemy import Connection, Engine, Row, text

from walletmigrate import config, job_batches, jobs, survey
from walletmigrate.audit import Act, record
from walletmigrate.comparison import snapshot
from walletmigrate.config import Column, Settings
from walletmigrate.corrections import Correction, Corrector, key_of, refuse, stopped
from walletmigrate.errors import PreconditionRefused, UsageError
from walletmigrate.functions import relation
from walletmigrate.schema import quoted
from walletmigrate.standing import REASON
from walletmigrate.truths import LEGACY, Truth

KIND: Final = "reconcile"
ONE: Final = "reconcile account"
LISTED: Final = 1000
"""How many accounts that are not in order a result lists, and the row of the job keeps."""
_ASKED: Final = 3
_CHANGED: Final = ("corrected", "opened", "resynced")
_COUNTED: Final = ("in_order", *_CHANGED, "reported", "refused", "failed", "unlisted")
_DIGITS: Final = 18
"""A job counts in integers: amounts are in units of ten to the minus this."""
_WIDE: Final = Context(prec=60)


@dataclass(frozen=True)
class Limits:
    """What becomes of a difference, in major units: up to ``tolerance`` it is in order, up to ``correct_up_to`` it is
    corrected, a larger one is reported. ``create_missing`` opens accounts; a negative balance is set only if allowed.
    """

    tolerance: Decimal = Decimal(0)
    correct_up_to: Decimal = Decimal(1)
    create_missing: bool = False
    allow_negative: bool = False

    def __post_init__(self) -> None:
        for name in ("tolerance", "correct_up_to"):
            value = getattr(self, name)
            if not isinstance(value, Decimal) or not value.is_finite() or value < 0:
                raise UsageError(f"{name.replace('_', '-')} {value}: pass a Decimal that is not negative")


@dataclass(frozen=True)
class Reconciliation:
    """What a run came to, over all its parts if it was interrupted; ``run`` is None of a dry run.

    ``counts`` has in_order, corrected, opened, resynced, reported, refused, failed, and unlisted (accounts that the
    truth does not know). ``reported_amount`` is by currency, in major units. ``items`` are accounts that are not in
    order, or were not, of this part of the run, at most 1000. ``state`` is done, paused, cancelled or planned.
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


@dataclass
class _Tally:
    """What one batch, or one account, came to."""

    counts: Counter[str] = field(default_factory=Counter)
    items: list[Correction] = field(default_factory=list)

    def add(self, one: Correction) -> None:
        self.counts[one.outcome] += 1
        if one.outcome not in ("in_order", "unlisted") and len(self.items) < LISTED:
            self.items.append(one)
        if one.outcome == "reported":
            self.counts[f"reported {one.currency}"] += 1
            self.counts[f"amount {one.currency}"] += int(abs(one.difference or Decimal(0)).scaleb(_DIGITS, _WIDE))


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
    batch_size: int = 500,
    progress: jobs.Progress | None = None,
    stop: jobs.Stop | None = None,
) -> Reconciliation:
    """Hold all accounts of a mapping, or the one of key ``account``, against ``truth``, and correct small differences.

    Each account is compared and corrected in one SQL function, under the locks of its legacy row and its account, in
    a transaction of its own. One that fails is counted and told; the others go on. A run that was interrupted goes on
    where it stood when it is called again with the same options; what it corrected it does not correct twice.

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
        return run.planned(batch_size)
    return run.all(total, batch_size, progress, stop)


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
        self._key_type = ""
        self._began = time.monotonic()

    def check(self, connection: Connection) -> survey.LegacyTable:
        reasons = jobs.obstacles(connection, self._settings, self._mapping) + stopped(connection, self._settings)
        if self._truth.kind == "legacy" and jobs.phase(connection, self._settings) == "frozen":
            what = "the phase is frozen: the ledger alone is true, and legacy cannot be the truth"
            reasons.append((what, f"walletmigrate reconcile --all --truth FILE.csv {REASON}"))
        refuse("reconcile", reasons)
        jobs.visibility(connection, self._mapping, "reconcile")
        legacy = survey.inspect_mapping(connection, self._mapping)
        self._key_type = legacy.key_sql_type
        return legacy

    def one(self, key: str) -> Reconciliation:
        """One key, all its columns; the job is done when it appears."""
        run = None
        if not self._dry:
            with jobs.begin(self._engine) as connection:
                run = self._insert_done(connection, key)
        tally = _Tally()
        for column in self._mapping.columns:
            if self._truth.kind == "file" and self._truth.of(key, column) is None:
                tally.add(Correction("unlisted", key, column.bucket, column.currency))
            else:
                tally.add(self._settle(key, column, run))
        if run is not None:
            with jobs.begin(self._engine) as connection:
                self._keep(connection, run, tally)
                self._conclude(connection, run, {name: int(n) for name, n in tally.counts.items()})
                record(connection, self._settings, f"{ONE} done", self._act, job_id=run, **self._facts(tally.counts))
        return self._result(run, tally.counts, tally.items, "planned" if self._dry else "done", resumed=False)

    def planned(self, batch_size: int) -> Reconciliation:
        """The same look at all accounts, with every write left out."""
        tally, after = _Tally(), None
        cut = text(f"select upto from {self._schema}.cut_{self._mapping.name}(cast(:after as text), null, :limit)")
        while True:
            with jobs.begin(self._engine) as connection:
                upto = connection.scalar(cut, {"after": after, "limit": batch_size})
                rows = self._standing(connection, after, upto)[1] if upto is not None else []
            if upto is None:
                break
            self._go_through(rows, None, tally)
            after = upto
        self._unknown(tally)
        return self._result(None, tally.counts, tally.items, "planned", resumed=False)

    def all(
        self, total: int, batch_size: int, progress: jobs.Progress | None, stop: jobs.Stop | None
    ) -> Reconciliation:
        """Run the job, or the rest of it."""
        with jobs.begin(self._engine) as connection:
            job = self._start(connection, total)
        items: list[Correction] = []

        def step(connection: Connection, after: str | None, upto: str | None) -> jobs.Batch:
            keys, rows = self._standing(connection, after, upto)
            tally = _Tally()
            self._go_through(rows, job.id, tally)
            if tally.items:
                self._keep(connection, job.id, tally)
                items.extend(tally.items[: LISTED - len(items)])
            failed = tally.counts["failed"]
            counts = {name: int(number) for name, number in tally.counts.items()}
            return jobs.Batch(len(keys), len(rows) - failed, failed, counts)

        job = jobs.run_batches(
            self._engine, self._settings, job, step, batch_size=batch_size, progress=progress, stop=stop
        )
        if job.state == "running":
            tally = _Tally()
            self._unknown(tally)
            self._set_aside(job.id, tally)
            items.extend(tally.items[: LISTED - len(items)])

            def closing(connection: Connection, now: jobs.Job) -> Mapping[str, Any]:
                # With the end of the job, in one transaction: cut short before it, nothing is counted twice.
                counts = Counter(now.counts)
                counts.update(tally.counts)
                self._keep(connection, job.id, tally)
                self._count_changed(connection, job.id, counts)
                self._conclude(connection, job.id, counts)
                return dict(self._facts(counts)["details"])

            job = jobs.finish(self._engine, self._settings, self._mapping, job, self._act, closing=closing)
        return self._result(job.id, job.counts, items, job.state, resumed=job.resumed)

    def _standing(
        self, connection: Connection, after: str | None, upto: str | None
    ) -> tuple[list[str], list[Row[Any]]]:
        """The keys of a span, and how their accounts stand. Nothing is locked."""
        key = f"l.{quoted(self._mapping.key)}"
        limits = {">": ("after", after), "<=": ("upto", upto)}
        bounds = [
            f"{key} {sign} cast(:{name} as {self._key_type})"
            for sign, (name, value) in limits.items()
            if value is not None
        ]
        where = f" where {' and '.join(bounds)}" if bounds else ""
        query = text(f"select {key}::text from {relation(self._mapping)} as l{where} order by {key}")
        keys = list(connection.scalars(query, {name: value for name, value in limits.values() if value is not None}))
        return keys, self._accounts(connection, keys)

    def _accounts(self, connection: Connection, keys: list[str]) -> list[Row[Any]]:
        """How the accounts of these keys stand, one row per column; none for a key without a row."""
        given = f"cast(cast(:keys as text[]) as {self._key_type}[])"
        query = text(f"select * from {self._schema}.standing_{self._mapping.name}({given})")
        return list(connection.execute(query, {"keys": keys})) if keys else []

    def _go_through(self, rows: Iterable[Row[Any]], run: int | None, tally: _Tally) -> None:
        for row in rows:
            column = self._mapping.column(row.bucket, row.currency)
            tally.add(self._judged(row, column) or self._settle(row.key, column, run))

    def _judged(self, row: Row[Any], column: Column) -> Correction | None:
        """What can be said without a lock: nearly all accounts are in order. None: to be looked at under its locks."""
        place = (row.key, row.bucket, row.currency)
        if row.state == "absent" and not self._limits.create_missing:
            return Correction("refused", *place, refusal="absent", legacy_before=row.legacy)
        truth = self._truth
        if truth.kind == "callable":
            return None
        if truth.kind == "file":
            wanted = truth.of(row.key, column)
            if wanted is None:
                return Correction("unlisted", *place)
        else:
            wanted = row.legacy if truth.kind == "legacy" else row.ledger
        held = (row.legacy, row.ledger) if row.state == "mirrored" else (row.ledger,) if row.state == "frozen" else ()
        if not held or wanted is None or any(one is None or abs(one - wanted) > self._limits.tolerance for one in held):
            return None
        return Correction("in_order", *place)

    def _settle(self, key: str, column: Column, run: int | None) -> Correction:
        """One account under its locks. A function is asked before, without them, and again if money moved meanwhile."""
        request: dict[str, Any] = {
            "truth": "value" if self._truth.outside else self._truth.kind,
            "tolerance": str(self._limits.tolerance),
            "limit": str(self._limits.correct_up_to),
            "create": self._limits.create_missing,
            "negative": self._limits.allow_negative,
            "dry": self._dry,
            "run": run,
            "type": KIND,
            "correlation": self._act.correlation_id,
        }
        place = (key, column.bucket, column.currency)
        for _ in range(_ASKED):
            if self._truth.kind == "callable":
                seen = self._corrector.call("correct", key, column, **{**request, "truth": "legacy", "dry": True})
                held = seen.ledger_before if seen.state == "frozen" else seen.legacy_before
                if held is None:
                    return seen
                request["seen"] = str(held)
            if self._truth.outside:
                try:
                    amount = self._truth.of(key, column)
                except Exception as error:  # noqa: BLE001 - the user's function: one account of many
                    return Correction("failed", *place, error=f"the truth: {type(error).__name__}: {error}")
                if amount is None:
                    return Correction("unlisted", *place)
                request["amount"] = str(amount)
            made = self._corrector.call("correct", key, column, **request)
            if made.outcome != "moved":
                return made
        return Correction("failed", *place, error=f"money moved while the truth was asked, {_ASKED} times")

    def _unknown(self, tally: _Tally) -> None:
        """Keys of the file that the table has no row of: nobody has met them."""
        places = sorted(self._truth.balances)
        for first in range(0, len(places), LISTED):
            part = places[first : first + LISTED]
            with jobs.begin(self._engine) as connection:
                known = {row.key for row in self._accounts(connection, [key for key, _, _ in part])}
            for key, bucket, currency in part:
                if key not in known:
                    tally.add(Correction("refused", key, bucket, currency, refusal="no_row"))

    def _set_aside(self, run: int, tally: _Tally) -> None:
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
            if theirs != options and found.state == "running":
                what = f"run {found.id} is at work with other options ({theirs.get('truth')})"
                mend = f"wait for its end, or: walletmigrate jobs cancel {found.id} {REASON}"
                raise PreconditionRefused("reconcile", [(what, mend)])
            return bool(theirs == options)

        more: dict[str, Any] = {"total": total, "details": {"options": options}, "wanted": of_same}
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

    def _keep(self, connection: Connection, run: int, tally: _Tally) -> None:
        """Put what was only reported, refused or failed on the row of the run, up to a limit."""
        kept = [asdict(one) for one in tally.items if one.outcome not in _CHANGED]
        if kept:
            connection.execute(
                text(
                    f"update {self._schema}.jobs set details = jsonb_set(details, '{{items}}', "
                    "coalesce(details -> 'items', '[]') || cast(:items as jsonb)) "
                    "where id = :id and coalesce(jsonb_array_length(details -> 'items'), 0) < :limit"
                ),
                {"id": run, "items": json.dumps(kept, default=str), "limit": LISTED},
            )

    def _count_changed(self, connection: Connection, run: int, counts: Counter[str]) -> None:
        """By the audit log: a batch that was cut short has corrected what it then did not count, and found in order."""
        rows = connection.execute(
            text(
                f"select substr(action, 11) as outcome, count(*) as accounts from {self._schema}.audit_log "
                "where job_id = :run and action = any(:actions) group by action"
            ),
            {"run": run, "actions": [f"{KIND} {outcome}" for outcome in _CHANGED]},
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
            found[column.currency] = units.scaleb(-_DIGITS, _WIDE).quantize(column.quantum, context=_WIDE)
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
