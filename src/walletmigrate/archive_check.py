"""The proof of an archive: its own checksums, and each of its rows against the ledger's journal of that moment."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Connection, Engine, Row, TextClause, text

from walletmigrate import functions, job_reads
from walletmigrate.archive import FETCHED, FORMAT, WIDTH, Archive, Sums, digest, dump, put_on_record, refuse_to_replace
from walletmigrate.audit import Act, record
from walletmigrate.config import Column, Mapping, Settings
from walletmigrate.errors import UnreadableInput, UsageError
from walletmigrate.schema import quoted
from walletmigrate.standing import REASON, require_installed

LISTED: Final = 1000
"""How many problems are listed; all are counted."""


@dataclass(frozen=True)
class ArchiveProblem:
    """One thing that keeps an archive from proving; ``key`` and ``column`` are None where it is the file's.

    Amounts in major units: ``archived`` as the file has it, ``ledger`` as the journal says.
    """

    problem: str
    key: str | None = None
    column: str | None = None
    archived: str | None = None
    ledger: str | None = None


@dataclass(frozen=True)
class ArchiveCheck:
    """What the check of one archive found. ``proven``: nothing is wrong, and a ledger was there to prove it against."""

    mapping: str
    path: str
    taken_at: str
    phase: str
    sha256: str
    rows: int
    states: dict[str, int]
    proven: bool
    problem_count: int
    problems: tuple[ArchiveProblem, ...]


@dataclass
class _Found:
    """Problems as they come: all counted, the first ones kept."""

    count: int = 0
    kept: list[ArchiveProblem] = field(default_factory=list)

    def add(self, problem: str, *rest: str | None) -> None:
        self.count += 1
        if self.count <= LISTED:
            self.kept.append(ArchiveProblem(problem, *rest))


class Reading:
    """An archive that is read once, in constant memory. Raises UsageError without a file, UnreadableInput."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.head: dict[str, Any] = {}
        self.foot: dict[str, Any] = {}
        self._lines = self._documents()
        self.head = self._next()
        if self.head.get("format") != FORMAT:
            raise self._unreadable(1, f"no archive of walletmigrate ({FORMAT!r} is expected)")

    def rows(self) -> Iterator[list[Any]]:
        """Every row: its key, then a cell for each column. The foot is there when they are at an end."""
        for number, document in self._lines:
            if isinstance(document, dict):
                self.foot = document
                rest = next(self._lines, None)
                if rest is not None:
                    raise self._unreadable(rest[0], "something stands behind the foot")
                return
            width = len(self.head["definition"]["columns"])
            if not isinstance(document, list) or [len(cell) for cell in document[1:]] != [WIDTH] * width:
                raise self._unreadable(number, f"a row has a key and {width} cells of {WIDTH} values")
            yield document
        raise self._unreadable(0, "the foot is missing: the file is cut off")

    def _next(self) -> dict[str, Any]:
        number, document = next(self._lines, (1, None))
        if not isinstance(document, dict):
            raise self._unreadable(number, "the head is missing")
        return document

    def _documents(self) -> Iterator[tuple[int, Any]]:
        number = 0
        try:
            with gzip.open(self.path, "rt", encoding="utf-8") as file:
                for number, line in enumerate(file, 1):
                    yield number, json.loads(line)
        except FileNotFoundError:
            make = f"walletmigrate archive --to {self.path} {REASON}"
            raise UsageError(f"there is no archive {self.path}: {make}") from None
        except (OSError, EOFError, ValueError, zlib.error) as error:
            raise self._unreadable(number + 1, f"{type(error).__name__}: {error}") from None

    def _unreadable(self, line: int, what: str) -> UnreadableInput:
        return UnreadableInput(str(self.path), [(line, what)])


def check(
    engine: Engine | None,
    settings: Settings,
    path: Path,
    *,
    recorded: bool = True,
    run: job_reads.Run | None = None,
) -> ArchiveCheck:
    """Prove an archive: the file by its sums, each row by the journal as it stood when the archive was taken.

    A mirrored account must hold what its row says; a frozen one must have held it when it was frozen. The journal is
    read by the snapshot that the archive was taken in, so what was posted since changes nothing. ``recorded``: the
    audit log must know the file by its checksum; ``run`` is the job that it is a part of. Each batch of rows is a
    transaction of its own. Without an engine only the file's own sums are looked at, which proves nothing. Reads only.
    Raises UsageError without the file, UnreadableInput, UnknownMapping, LedgerNotInstalled, JobCancelled.
    """
    reading, found = Reading(path), _Found()
    mapping = settings.mapping(reading.head["mapping"]) if engine is not None else None
    definition = reading.head["definition"]
    if mapping is not None and functions.definition(mapping) != definition:
        found.add("the mapping is another one in the configuration than it was when the archive was taken")
        mapping = None
    sums = [Sums() for _ in definition["columns"]]
    rows = reading.rows()
    connection = engine.connect() if engine is not None else None
    try:
        if connection is not None:
            require_installed(connection, settings)
            connection.rollback()
        while batch := list(islice(rows, FETCHED)):
            for key, *cells in batch:
                for one, cell in zip(sums, cells, strict=True):
                    one.add(key, cell[0], cell[2] or "absent")
            if connection is not None and mapping is not None:
                with run.cutting(connection) if run else nullcontext():
                    _prove(connection, settings, mapping, reading.head, batch, found)
            if run is not None:
                run.at("proof, 2 of 2", done=sums[0].rows * len(sums))
        _whole(reading, sums, found)
        sha256 = digest(path)[0]
        if connection is not None and recorded:
            _on_record(connection, settings, reading, sha256, found)
    finally:
        if connection is not None:
            connection.close()
    return ArchiveCheck(
        mapping=reading.head["mapping"],
        path=str(path),
        taken_at=reading.head["taken_at"],
        phase=reading.head["phase"],
        sha256=sha256,
        rows=sums[0].rows if sums else 0,
        states=_states(sums),
        proven=engine is not None and not found.count,
        problem_count=found.count,
        problems=tuple(found.kept),
    )


def _states(sums: Sequence[Sums]) -> dict[str, int]:
    states: dict[str, int] = {}
    for one in sums:
        for state, count in one.states.items():
            states[state] = states.get(state, 0) + count
    return states


def _whole(reading: Reading, sums: Sequence[Sums], found: _Found) -> None:
    """The foot says what the rows come to."""
    columns = reading.head["definition"]["columns"]
    told = [one.document(column["column"]) for one, column in zip(sums, columns, strict=True)]
    for name, mine, theirs in zip(
        [column["column"] for column in columns], told, reading.foot.get("columns", []), strict=False
    ):
        if mine != theirs:
            found.add("the rows do not come to the sums in the foot of the file", None, name)
    if len(reading.foot.get("columns", [])) != len(columns) or reading.foot.get("rows") != sums[0].rows:
        found.add("the foot of the file counts other rows than there are")
    if reading.foot.get("orphans"):
        found.add(f"{reading.foot['orphans']} accounts had no legacy row, and are not in the archive")


def _on_record(connection: Connection, settings: Settings, reading: Reading, sha256: str, found: _Found) -> None:
    known = connection.scalar(
        text(
            f"select exists (select from {quoted(settings.ledger_schema)}.audit_log where action = 'archive' "
            "and mapping = :mapping and details ->> 'sha256' = :sha256)"
        ),
        {"mapping": reading.head["mapping"], "sha256": sha256},
    )
    if not known:
        found.add("the audit log knows no archive of this mapping with this checksum", None, None, sha256)


def _prove(
    connection: Connection,
    settings: Settings,
    mapping: Mapping,
    head: dict[str, Any],
    batch: list[list[Any]],
    found: _Found,
) -> None:
    for place, column in enumerate(mapping.columns):
        cells = [row[place + 1] for row in batch]
        journal = connection.execute(
            _statement(settings.ledger_schema),
            {
                "keys": [row[0] for row in batch],
                "frozen": [cell[4] for cell in cells],
                "mapping": mapping.name,
                "bucket": column.bucket,
                "currency": column.currency,
                "last": head["last_transaction"],
                "seen": head["snapshot"],
            },
        ).all()
        for row, cell, said in zip(batch, cells, journal, strict=True):
            _judge(row[0], column, cell, said, found)
    connection.rollback()


def _judge(key: str, column: Column, cell: list[str | None], said: Row[Any], found: _Found) -> None:
    """One row's balance. The ledger's own figure is held against the journal first, then the legacy one."""
    _, amount, state, ledger, _ = cell
    place = (key, column.column)
    if state not in ("mirrored", "frozen"):
        found.add(f"the account was {state or 'absent'}", *place, amount, None)
    elif said.account is None:
        found.add("the ledger has no such account", *place, amount, None)
    elif ledger is None or Decimal(ledger) != said.at_snapshot:
        found.add("the journal says another balance of that time", *place, ledger, f"{said.at_snapshot:f}")
    else:
        then = said.at_freeze if state == "frozen" else said.at_snapshot
        if amount is None or Decimal(amount) != then:
            found.add("the legacy balance is not the ledger's", *place, amount, f"{then:f}")


_LAST = """
    select coalesce((
        select x.balance from (
            (
                select t.id, t.credit_balance as balance from {schema}.transactions as t
                where t.credit_account > 0 and t.credit_account = a.id and t.id <= :last
                and pg_visible_in_snapshot(t.xid::text::xid8, cast(:seen as pg_snapshot)) and {more}
                order by t.id desc limit 1
            )
            union all
            (
                select t.id, t.debit_balance from {schema}.transactions as t
                where t.debit_account > 0 and t.debit_account = a.id and t.id <= :last
                and pg_visible_in_snapshot(t.xid::text::xid8, cast(:seen as pg_snapshot)) and {more}
                order by t.id desc limit 1
            )
        ) as x
        order by x.id desc
        limit 1
    ), 0) as balance
"""

_FROZEN = "case when n.frozen = 'opening' then t.kind = 'opening' else t.posted_at <= cast(n.frozen as timestamptz) end"


def _statement(schema: str) -> TextClause:
    """The balances by the journal, in the order of the keys. Ids bound it too: after a logical restore the
    cluster's transaction ids may begin anew, and the sequence of ids does not.
    """
    name = quoted(schema)
    return text(
        "select a.id as account, s.balance as at_snapshot, f.balance as at_freeze "
        "from unnest(cast(:keys as text[]), cast(:frozen as text[])) with ordinality as n (key, frozen, place) "
        f'left join {name}.accounts as a on a.mapping = :mapping and a.key = n.key collate "C" '
        "and a.bucket = :bucket and a.currency = :currency "
        f"cross join lateral ({_LAST.format(schema=name, more='true')}) as s "
        f"cross join lateral ({_LAST.format(schema=name, more=_FROZEN)}) as f "
        "order by n.place"
    )


def archive(
    engine: Engine,
    settings: Settings,
    mapping: Mapping,
    path: Path,
    act: Act,
    *,
    dry_run: bool = False,
) -> tuple[Archive, ArchiveCheck | None]:
    """Archive a mapping's legacy balances, prove the file at once, and put both on record.

    A difference is a result: the file stays, and is no proof. A job of one snapshot (`job_reads`); one that does not
    come to its end leaves no file. Raises what `dump` and `check` raise, and PreconditionRefused while another archive
    of this mapping is made. The check is None in a dry run.
    """
    if dry_run:
        return dump(engine, settings, mapping, path, dry_run=True), None
    with engine.begin() as connection:
        require_installed(connection, settings)
        # First of all: who may not leave a record has to learn it before the table is read, and leaves no file.
        record(connection, settings, "archive begin", act, mapping=mapping.name, details={"file": path.name})
    refuse_to_replace(path)
    with job_reads.run(engine, settings, "archive", mapping.name, act) as run:
        made = dump(engine, settings, mapping, path, run=run)
        try:
            run.at("proof, 2 of 2", done=0, total=made.rows * len(made.columns))
            checked = check(engine, settings, path, recorded=False, run=run)
            problems = checked.problem_count
            made = put_on_record(engine, settings, made, act, run, proven=checked.proven, problems=problems)
        except BaseException:  # cancelled, interrupted or failed: a file without a record is no archive
            path.unlink(missing_ok=True)
            raise
    return made, checked
