"""The legacy balances in a file, and the proof of that file against the ledger's journal, at any later time.

A file is gzipped JSON, a document a line: a head, an array for each legacy row, a foot with sums and checksums.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal, Inexact
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Connection, Engine, text

from walletmigrate import functions, jobs, survey
from walletmigrate.audit import Act, record
from walletmigrate.comparison import snapshot
from walletmigrate.config import Mapping, Settings
from walletmigrate.errors import UsageError
from walletmigrate.job_reads import Run
from walletmigrate.schema import quoted
from walletmigrate.standing import show

FORMAT: Final = "walletmigrate archive 1"
SUFFIX: Final = ".jsonl.gz"
WIDTH: Final = 5
"""A cell of a row: text of the column, amount, state, ledger balance, time of the freeze."""
FETCHED: Final = 5000
"""Rows that are in memory at a time."""

_EXACT: Final = Context(prec=1000, Emin=MIN_EMIN, Emax=MAX_EMAX, traps=[Inexact])


@dataclass(frozen=True)
class ColumnSum:
    """One balance column of an archive. ``total`` is the exact sum of its finite values as they stand in the column.

    ``sha256`` is over a line ``key TAB value`` for each row, in the order of the file; ``nulls`` are empty values.
    """

    column: str
    bucket: str
    currency: str
    rows: int
    nulls: int
    total: Decimal
    sha256: str
    states: dict[str, int]


@dataclass(frozen=True)
class Archive:
    """What was written: ``sha256`` is the whole file's, which the audit log has too. None of both in a dry run."""

    mapping: str
    path: str
    taken_at: datetime
    phase: str
    rows: int
    columns: tuple[ColumnSum, ...]
    sha256: str | None
    bytes: int | None
    audit_id: int | None
    dry_run: bool


@dataclass
class Sums:
    """The checksums of one column while rows go by."""

    rows: int = 0
    nulls: int = 0
    total: Decimal = Decimal(0)
    digest: Any = field(default_factory=hashlib.sha256)
    states: dict[str, int] = field(default_factory=dict)

    def add(self, key: str, value: str | None, state: str) -> None:
        """Count one row's value, as the column's text has it."""
        self.rows += 1
        self.digest.update(f"{key}\t{'' if value is None else value}\n".encode())
        self.states[state] = self.states.get(state, 0) + 1
        if value is None:
            self.nulls += 1
            return
        amount = Decimal(value)
        if amount.is_finite():
            self.total = _EXACT.add(self.total, amount)

    def document(self, column: str) -> dict[str, Any]:
        """As the foot of the file has it."""
        return {
            "column": column,
            "rows": self.rows,
            "nulls": self.nulls,
            "total": f"{self.total:f}",
            "sha256": self.digest.hexdigest(),
            "states": self.states,
        }


def dump(
    engine: Engine,
    settings: Settings,
    mapping: Mapping,
    path: Path,
    *,
    dry_run: bool = False,
    run: Run | None = None,
) -> Archive:
    """Write every legacy row's key and balances, beside the ledger's, as one snapshot has them. Constant memory.

    A file that exists is not written over. ``run`` is the job that it is a part of; cancelled, it leaves no file.
    Raises UsageError where the file cannot be made, JobCancelled, LedgerNotInstalled, PreconditionRefused where row-
    level security hides rows, and ConfigError when table and mapping do not fit (in phase retired, when the column is
    gone).
    """
    refuse_to_replace(path)
    with snapshot(engine) as connection, run.reading(connection) if run else nullcontext():
        jobs.require_installed(connection, settings, mapping)
        jobs.visibility(connection, mapping, "archive")
        legacy = survey.inspect_mapping(connection, mapping)
        head = _head(connection, settings, mapping)
        if dry_run:
            rows = int(connection.scalar(text(f"select count(*) from {functions.relation(mapping)}")) or 0)
            taken_at = datetime.fromisoformat(head["taken_at"])
            return Archive(mapping.name, str(path), taken_at, head["phase"], rows, (), None, None, None, True)
        with _written(path) as file:
            sums = _write(connection, settings, mapping, legacy, head, file, run)
    sha256, size = digest(path)
    columns = tuple(_column_sum(mapping, index, one) for index, one in enumerate(sums))
    taken_at = datetime.fromisoformat(head["taken_at"])
    return Archive(mapping.name, str(path), taken_at, head["phase"], sums[0].rows, columns, sha256, size, None, False)


def refuse_to_replace(path: Path) -> None:
    """Raises UsageError for a file that exists."""
    if path.exists():
        raise UsageError(f"{path} exists already: an archive is never written over, name another file")


def put_on_record(
    engine: Engine, settings: Settings, made: Archive, act: Act, run: Run, *, proven: bool, problems: int
) -> Archive:
    """Keep an archive's checksums, and whether it proved, in the audit log; its job is done. Raises JobCancelled."""
    facts = {
        "file": Path(made.path).name,
        "sha256": made.sha256,
        "bytes": made.bytes,
        "rows": made.rows,
        "taken_at": made.taken_at.isoformat(),
        "phase": made.phase,
        "proven": proven,
        "problems": problems,
        "columns": [{**asdict(one), "total": f"{one.total:f}"} for one in made.columns],
    }
    with engine.begin() as connection:
        run.finish(connection, made.rows * len(made.columns))
        audit_id = record(connection, settings, "archive", act, mapping=made.mapping, details=facts)
    return replace(made, audit_id=audit_id)


def digest(path: Path) -> tuple[str, int]:
    """SHA-256 of a file, as hex digits, and its length in bytes."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    return found, path.stat().st_size


def _head(connection: Connection, settings: Settings, mapping: Mapping) -> dict[str, Any]:
    row = connection.execute(
        text(
            "select transaction_timestamp() as taken_at, pg_current_snapshot()::text as seen, "
            # Read behind the snapshot: what the snapshot sees has a smaller id, whatever runs beside it.
            f"(select last_value from {quoted(settings.ledger_schema)}.transaction_ids) as last_id"
        )
    ).one()
    return {
        "format": FORMAT,
        "mapping": mapping.name,
        "definition": functions.definition(mapping),
        "taken_at": row.taken_at.isoformat(),
        "phase": show(connection, settings).phase,
        "snapshot": row.seen,
        "last_transaction": row.last_id,
    }


@contextmanager
def _written(path: Path) -> Iterator[gzip.GzipFile]:
    """A compressed file that is there when it is whole, and else is not."""
    unfinished = path.with_name(path.name + ".part")
    try:
        with (
            unfinished.open("wb") as plain,
            # Without name and time, the same rows give the same bytes.
            gzip.GzipFile(filename="", fileobj=plain, mode="wb", compresslevel=6, mtime=0) as file,
        ):
            yield file
        unfinished.rename(path)
    except OSError as error:
        raise UsageError(f"{path} cannot be written ({error.strerror}): name another file") from error
    finally:
        unfinished.unlink(missing_ok=True)


def _write(
    connection: Connection,
    settings: Settings,
    mapping: Mapping,
    legacy: survey.LegacyTable,
    head: dict[str, Any],
    file: gzip.GzipFile,
    run: Run | None,
) -> list[Sums]:
    sums = [Sums() for _ in mapping.columns]
    file.write(_line(head))
    rows = connection.execute(text(_query(settings, mapping, legacy)), execution_options={"yield_per": FETCHED})
    for batch in rows.partitions():
        lines = []
        for key, *values in batch:
            cells = [values[place : place + WIDTH] for place in range(0, len(values), WIDTH)]
            lines.append(_line([key, *cells]))
            for one, (value, _, state, _, _) in zip(sums, cells, strict=True):
                one.add(key, value, state or "absent")
        file.write(b"".join(lines))
        if run is not None:
            run.at("rows to the file, 1 of 2", done=sums[0].rows * len(sums))
    foot = [one.document(column.column) for one, column in zip(sums, mapping.columns, strict=True)]
    file.write(_line({"rows": sums[0].rows, "orphans": _orphans(connection, settings, mapping), "columns": foot}))
    return sums


def _query(settings: Settings, mapping: Mapping, legacy: survey.LegacyTable) -> str:
    """Of each row the key; of each column its text, the amount that this is in major units, and the account's state,
    balance and time of the freeze.
    """
    schema, key = quoted(settings.ledger_schema), f"l.{quoted(mapping.key)}"
    selected, joins = [f"{key}::text"], []
    for place, column in enumerate(mapping.columns):
        alias = f"a{place}"
        selected += [
            f"l.{quoted(column.column)}::text",
            f"({functions.value_of(column, is_float=legacy.column(column.column).is_float)})::text",
            f"{alias}.state::text",
            f"{alias}.balance::text",
            # An account that was opened frozen holds its opening. JSON has times in ISO 8601 under any DateStyle.
            f"case when {alias}.state = 'frozen' then coalesce(to_jsonb({alias}.state_at) #>> '{{}}', 'opening') end",
        ]
        joins.append(
            f'left join {schema}.accounts as {alias} on {alias}.key = {key}::text collate "C" '
            f"and {alias}.mapping = '{mapping.name}' and {alias}.bucket = '{column.bucket}' "
            f"and {alias}.currency = '{column.currency}'"
        )
    return f"select {', '.join(selected)} from {functions.relation(mapping)} as l {' '.join(joins)} order by {key}"


def _orphans(connection: Connection, settings: Settings, mapping: Mapping) -> int:
    """Accounts that are not closed, and have no row to be archived."""
    found = connection.scalar(
        text(
            f"select count(*) from {quoted(settings.ledger_schema)}.accounts as a "
            "where a.mapping = :mapping and a.state <> 'closed' and not exists ("
            f"select from {functions.relation(mapping)} as l "
            f'where l.{quoted(mapping.key)}::text collate "C" = a.key)'
        ),
        {"mapping": mapping.name},
    )
    return int(found or 0)


def _column_sum(mapping: Mapping, place: int, sums: Sums) -> ColumnSum:
    column = mapping.columns[place]
    return ColumnSum(
        column.column,
        column.bucket,
        column.currency,
        sums.rows,
        sums.nulls,
        sums.total,
        sums.digest.hexdigest(),
        sums.states,
    )


def _line(document: dict[str, Any] | Sequence[Any]) -> bytes:
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
