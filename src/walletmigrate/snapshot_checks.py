"""The proof of a snapshot: each balance, each total and the journal's rows, against the journal."""

from __future__ import annotations

import time
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Final

from sqlalchemy import Connection, Engine, Row, text

from walletmigrate import checksums, job_reads
from walletmigrate.audit import Act, record
from walletmigrate.config import Settings
from walletmigrate.errors import UsageError
from walletmigrate.job_options import EVERYTHING
from walletmigrate.job_rows import said
from walletmigrate.schema import quoted, statements
from walletmigrate.snapshots import SYSTEM, TAKEN, Snapshot, SnapshotTotal, get, totals
from walletmigrate.sums import total

VERIFY: Final = "snapshot verify"
"""The kind of the job."""


@dataclass(frozen=True)
class SnapshotProblem:
    """Something of a snapshot that the journal does not say. Amounts in major units, None: there is no such value.

    ``problem`` is ``missing`` (no row), ``unexplained`` (a row, no transaction), ``differs`` (balance),
    ``journal_broken`` (the journal's last balance is not the sum of its amounts), ``transactions``, ``kinds``,
    ``total`` (the accounts do not add up to the total that was kept), ``system``, ``imbalance``, or ``edited``: the
    journal's transactions with ids from ``first_id`` to ``first_id`` + 9,999 that are of the window of snapshot
    ``window`` are not the rows that it folded (``expected`` is how many there are, ``found`` how many there were).
    """

    problem: str
    account: int | None
    mapping: str | None
    key: str | None
    bucket: str | None
    expected: Decimal | None
    found: Decimal | None
    window: int | None = None
    first_id: int | None = None


@dataclass(frozen=True)
class SnapshotVerification:
    """What a verification saw. ``problems`` has at most ``limit`` entries, ``found`` counts all. ``unchecked``:
    transactions of older snapshots that keep no checksums, so that edits of these are not seen.
    """

    snapshot: Snapshot
    clean: bool
    accounts: int
    unchecked: int
    found: int
    problems: tuple[SnapshotProblem, ...]
    seconds: float
    dry_run: bool


def verify(
    engine: Engine,
    settings: Settings,
    act: Act,
    *,
    snapshot_id: int | None = None,
    limit: int = 1000,
    batch_size: int = 20_000,
    dry_run: bool = False,
) -> SnapshotVerification:
    """Prove a snapshot (None: the newest complete one) against the journal, from its first transaction.

    Each account's balance, its last transaction and its sums by kind; the totals; the system accounts; that everything
    adds up to zero per currency; and that the journal's rows are those that were folded. In ranges of ``batch_size``,
    each a transaction of its own: the snapshot is the same in all. Unless ``dry_run`` it is a job (`job_reads`), and
    the verdict is kept with the snapshot, and an audit row; also that of a run which has seen a problem and does not
    come to its end. Raises UnknownRun, UsageError for one that is not complete, PreconditionRefused while another one
    is verified, and JobCancelled.
    """
    began = time.monotonic()
    with engine.connect() as connection:
        snapshot = get(connection, settings, snapshot_id)
        kept = totals(connection, settings, snapshot)
    if snapshot.state != "complete":
        raise UsageError(f"snapshot {snapshot.id} is {snapshot.state}: finish it first, by {TAKEN}")
    with job_reads.run(engine, settings, VERIFY, EVERYTHING, act, listed=not dry_run) as run:
        check = _Check(engine, settings, snapshot, limit, batch_size, run)

        def keep(connection: Connection, unfinished: str | None = None) -> None:
            _keep(connection, settings, check, act, unfinished)

        try:
            check.owners()
            check.system()
            check.compare(kept)
            check.journal()
            if not dry_run:
                with engine.begin() as connection:
                    run.finish(connection, check.accounts)
                    keep(connection)
        except BaseException as error:
            if check.found and not dry_run:
                why, what = said(run.translated(error)), f"snapshot {snapshot.id} has {check.found} problems"
                job_reads.insist(engine, lambda made: keep(made, why), what)
            raise
    return SnapshotVerification(
        snapshot=snapshot,
        clean=not check.found,
        accounts=check.accounts,
        unchecked=check.unchecked,
        found=check.found,
        problems=tuple(check.problems),
        seconds=time.monotonic() - began,
        dry_run=dry_run,
    )


def _keep(connection: Connection, settings: Settings, check: _Check, act: Act, unfinished: str | None) -> None:
    """The verdict with the snapshot, and an audit row."""
    snapshot, clean = check.snapshot.id, not check.found
    connection.execute(
        text(
            f"update {quoted(settings.ledger_schema)}.snapshots "
            "set verified_at = clock_timestamp(), verified_clean = :clean where id = :id"
        ),
        {"id": snapshot, "clean": clean},
    )
    facts = {"snapshot": snapshot, "clean": clean, "found": check.found}
    record(connection, settings, VERIFY, act, details=facts | ({"unfinished": unfinished} if unfinished else {}))


class _Check:
    """One verification: what was counted, and the first problems."""

    def __init__(
        self,
        engine: Engine,
        settings: Settings,
        snapshot: Snapshot,
        limit: int,
        batch_size: int,
        run: job_reads.Run,
    ) -> None:
        self.snapshot = snapshot
        self.accounts = self.unchecked = self.found = 0
        self.problems: list[SnapshotProblem] = []
        self._engine, self._settings, self._job = engine, settings, run
        self._limit, self._batch = limit, batch_size
        self._balances: dict[tuple[str, str, str], tuple[int, Decimal]] = {}

    def owners(self) -> None:
        """Every account's rows against its transactions; the last range has no end, for ids that nobody knows."""
        after = 0
        while after < checksums.LAST:
            self._job.at("accounts, 1 of 3", done=self.accounts, total=self.snapshot.accounts)
            with self._engine.begin() as connection, self._job.cutting(connection):
                found = self._run(connection, "next_account", after=after, limit=self._batch)[0].upto
                upto = checksums.LAST if found is None else found
                for row in self._run(connection, "problems", after=after, upto=upto):
                    self._tell(row.problem, row.account, row.mapping, row.key, row.bucket, row.expected, row.found)
                for row in self._run(connection, "owners", after=after, upto=upto):
                    self._add((row.mapping, row.bucket, row.currency), row.accounts, row.balance)
                    self.accounts += row.accounts
            after = upto

    def system(self) -> None:
        """The system accounts' balances, from every transaction of the snapshot."""
        after: int | None = 0
        while after is not None:
            self._job.at("system accounts, 2 of 3", done=self.accounts)
            with self._engine.begin() as connection, self._job.cutting(connection):
                upto = self._run(connection, "next_transaction", after=after, limit=self._batch)[0].upto
                for row in self._run(connection, "system", after=after, upto=upto) if upto is not None else ():
                    self._add((SYSTEM, row.name, row.currency), 0, row.balance)
            after = upto

    def compare(self, kept: tuple[SnapshotTotal, ...]) -> None:
        """What was added up against the totals that the snapshot keeps, and against zero."""
        stored = {(one.mapping, one.bucket, one.currency): (one.accounts, one.balance) for one in kept}
        for place in sorted(stored.keys() | self._balances.keys()):
            wanted, found = self._balances.get(place, (0, Decimal(0))), stored.get(place, (0, Decimal(0)))
            if wanted != found:
                problem = "system" if place[0] == SYSTEM else "total"
                self._tell(problem, None, place[0], None, f"{place[1]} {place[2]}", wanted[1], found[1])
        for currency in sorted({place[2] for place in stored}):
            balance = total(amount for place, (_, amount) in stored.items() if place[2] == currency)
            if balance:
                self._tell("imbalance", None, None, None, currency, Decimal(0), balance)

    def journal(self) -> None:
        """The journal's rows against the checksums that this snapshot and those before it keep of them."""
        number = self.snapshot.id
        with self._engine.begin() as connection:
            bare = checksums.bare(connection, self._settings, number)
        self.unchecked = bare.transactions
        for one in checksums.edited_in_turns(self._engine, self._settings, number, bare, self._batch, self._job):
            self._tell("edited", *[None] * 4, Decimal(one.held), Decimal(one.kept), one.snapshot, one.first)

    def _run(self, connection: Connection, name: str, **parameters: Any) -> list[Row[Any]]:
        values = {"snapshot": self.snapshot.id, **parameters}
        known = statements("snapshot_checks", schema=quoted(self._settings.ledger_schema))
        return list(connection.execute(text(known[name]), values))

    def _add(self, place: tuple[str, str, str], accounts: int, balance: Decimal) -> None:
        before = self._balances.get(place, (0, Decimal(0)))
        self._balances[place] = (before[0] + accounts, before[1] + balance)

    def _tell(self, *problem: Any) -> None:
        self.found += 1
        if len(self.problems) < self._limit:
            self.problems.append(SnapshotProblem(*problem))
