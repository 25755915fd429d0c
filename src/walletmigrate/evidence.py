"""A folder that tells how a migration stands to somebody without access to the database, with checksums of it all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Connection, Engine, text

from walletmigrate import checksums, functions, schema
from walletmigrate.archive import digest
from walletmigrate.audit import Act
from walletmigrate.comparison import snapshot
from walletmigrate.config import Settings
from walletmigrate.console import plain, reasons_as_json
from walletmigrate.errors import UsageError
from walletmigrate.flag_sources import DocumentSnapshot
from walletmigrate.flags import FlagSource
from walletmigrate.gates import reasons
from walletmigrate.schema import quoted
from walletmigrate.standing import flag_states, require_installed, show
from walletmigrate.verify import verify

FORMAT: Final = "walletmigrate evidence 1"
MANIFEST: Final = "manifest.json"
RANGE: Final = 50_000
"""Ids of transactions under one checksum of the journal."""


@dataclass(frozen=True)
class Evidence:
    """What was written. ``clean``: every mapping's verification was, and the journal has the rows that the newest
    snapshot and those before it folded; ``files`` are (name, SHA-256).
    """

    folder: str
    clean: bool
    phase: str
    transactions: int
    audit_rows: int
    files: tuple[tuple[str, str], ...]


def gather(engine: Engine, settings: Settings, source: FlagSource, folder: Path) -> Evidence:
    """Write the evidence into a new or empty folder. Reads the database only; the journal and the totals in one
    snapshot, and each mapping's verification in one of its own just before. Cut short, it leaves the folder empty.

    Raises UsageError for a folder that holds something or cannot be written, LedgerNotInstalled, and what `verify`
    raises.
    """
    _make(folder)
    try:
        return _gathered(engine, settings, source, folder)
    except BaseException as error:
        for half in folder.iterdir():
            half.unlink()
        if isinstance(error, OSError):
            raise UsageError(f"{folder} cannot be written: {error.strerror}") from None
        raise


def _gathered(engine: Engine, settings: Settings, source: FlagSource, folder: Path) -> Evidence:
    with snapshot(engine) as connection:
        require_installed(connection, settings)
    act = Act("evidence", "for the evidence")
    runs = [verify(engine, settings, mapping, act, dry_run=True) for mapping in settings.mappings]
    verified = all(run.clean for run in runs)
    with snapshot(engine) as connection:
        found = moment(connection, settings)
        journal = {**found, **journal_of(connection, settings, found)}
        rows, chain = _write_audit(connection, settings, folder / "audit.jsonl")
        kept = _checksums(connection, settings)
        clean = verified and not kept["edited"]
        state = show(connection, settings)
        missing = reasons(connection, settings, source, state.next) if state.next else []
        documents = {
            "versions.json": _versions(connection, settings),
            "phase.json": {**plain(state), "next": state.next, "reasons": reasons_as_json(missing)},
            "totals.json": totals(connection, settings),
            "verification.json": {
                "clean": verified,
                "runs": [_without_groups(plain(run)) for run in runs],
                "on_record": _verifications(connection, settings),
            },
            "flags.json": _flags(source),
            "journal.json": journal,
            "snapshots.json": kept,
        }
    for name, document in documents.items():
        _write(folder / name, document)
    files = {name: digest(folder / name)[0] for name in sorted([*documents, "audit.jsonl"])}
    manifest = {
        "format": FORMAT,
        "made_at": found["taken_at"],
        "clean": clean,
        "files": files,
        "audit": {"rows": rows, "chain": chain},
    }
    _write(folder / MANIFEST, manifest)
    count = sum(one["rows"] for one in journal["ranges"])
    return Evidence(str(folder), clean, state.phase, count, rows, tuple(files.items()))


def moment(connection: Connection, settings: Settings) -> dict[str, Any]:
    """By what a later look tells what this snapshot sees."""
    row = connection.execute(
        text(
            f"select {_TIME.format('transaction_timestamp()')} as taken_at, "
            "pg_current_snapshot()::text as seen, "
            f"(select last_value from {quoted(settings.ledger_schema)}.transaction_ids) as last_id"
        )
    ).one()
    return {"taken_at": row.taken_at, "snapshot": row.seen, "last_transaction": row.last_id}


def journal_of(connection: Connection, settings: Settings, seen: dict[str, Any]) -> dict[str, Any]:
    """Checksums of the journal as it stood at a moment, range by range of ids, and sums by currency."""
    name = f"{quoted(settings.ledger_schema)}.transactions"
    first = int(connection.scalar(text(f"select coalesce(min(id), 0) from {name}")) or 0)
    then = {"last": seen["last_transaction"], "seen": seen["snapshot"]}
    ranges = []
    for start in range(first - first % RANGE, seen["last_transaction"] + 1, RANGE):
        row = connection.execute(text(_RANGE.format(name=name)), {**then, "first": start, "size": RANGE}).one()
        if row.found:
            ranges.append({"from": start, "rows": row.found, "sha256": row.sha256})
    sums = {
        row.currency: {"rows": row.found, "amount": f"{row.amount:f}"}
        for row in connection.execute(text(_SUMS.format(name=name)), then)
    }
    return {"ranges": ranges, "currencies": sums}


def _checksums(connection: Connection, settings: Settings) -> dict[str, Any]:
    """What the newest complete snapshot and those before it keep of the journal, and where the journal is not that."""
    name = quoted(settings.ledger_schema)
    number = connection.scalar(text(f"select max(id) from {name}.snapshots where state = 'complete'"))
    if number is None:
        return {"snapshot": None, "unchecked": 0, "ranges": [], "edited": []}
    bare = checksums.bare(connection, settings, number)
    found = checksums.ranges(connection, settings, number, bare)
    edited = checksums.edited(connection, settings, number, bare, found)
    return {
        "snapshot": number,
        "unchecked": bare.transactions,
        "ranges": [kept_range(one) for one in found if one.kept],
        "edited": [plain(one) for one in edited],
    }


def kept_range(one: checksums.Range) -> dict[str, Any]:
    """A range of ids as snapshots keep it."""
    return {"from": one.first, "rows": one.kept, "checksum": f"{one.kept_checksum:f}"}


def totals(connection: Connection, settings: Settings) -> dict[str, Any]:
    """Balances by currency: of owners by mapping, bucket and state, of the system by name, and what they come to."""
    name = quoted(settings.ledger_schema)
    found: dict[str, Any] = {}
    owners = connection.execute(
        text(
            "select currency, mapping, bucket, state::text as state, count(*) as accounts, sum(balance) as balance "
            f"from {name}.accounts group by currency, mapping, bucket, state order by 1, 2, 3, 4"
        )
    )
    for row in owners:
        figures = {"accounts": row.accounts, "balance": f"{row.balance:f}"}
        one = found.setdefault(row.currency, {"owners": [], "system": []})
        one["owners"].append({"mapping": row.mapping, "bucket": row.bucket, "state": row.state, **figures})
    system = connection.execute(text(f"select currency, name, balance from {name}.system_balances order by 1, 2"))
    for row in system:
        one = found.setdefault(row.currency, {"owners": [], "system": []})
        one["system"].append({"name": row.name, "balance": f"{row.balance:f}"})
    return found


def audit_rows(connection: Connection, settings: Settings, last: int | None = None) -> Iterator[dict[str, Any]]:
    """The audit log in the order of its ids, all values as texts that mean the same anywhere."""
    rows = connection.execute(
        text(_AUDIT.format(name=quoted(settings.ledger_schema), time=_TIME.format("at"))),
        {"last": last},
        execution_options={"yield_per": 1000},
    )
    for row in rows:
        yield dict(row._mapping)


def chained(before: str, row: dict[str, Any]) -> str:
    """The link of an audit row: SHA-256 over the link before it and the row without its own."""
    said = {name: value for name, value in row.items() if name != "chain"}
    canonical = json.dumps(said, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(f"{before}\n{canonical}".encode()).hexdigest()


def _write_audit(connection: Connection, settings: Settings, path: Path) -> tuple[int, str]:
    count, chain = 0, ""
    with path.open("w", encoding="utf-8") as file:
        for row in audit_rows(connection, settings):
            chain = chained(chain, row)
            file.write(json.dumps({**row, "chain": chain}, ensure_ascii=False) + "\n")
            count += 1
    return count, chain


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        holds = any(folder.iterdir())
    except OSError as error:
        raise UsageError(f"{folder} cannot be made ({error.strerror}): name another folder") from None
    if holds:
        raise UsageError(f"{folder} is not empty: evidence is never written over, name a new folder")


def _write(path: Path, document: Any) -> None:
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _versions(connection: Connection, settings: Settings) -> dict[str, Any]:
    known = {
        mapping.name: functions.installed_mapping(connection, settings.ledger_schema, mapping.name)
        for mapping in settings.mappings
    }
    return {
        "walletmigrate": version("walletmigrate"),
        "postgresql": connection.scalar(text("select version()")),
        "schema": settings.ledger_schema,
        "revision": schema.revision(connection, settings.ledger_schema),
        "mappings": {
            name: {
                "fingerprint": one.fingerprint,
                "functions_version": one.functions_version,
                "definition": one.definition,
            }
            for name, one in known.items()
            if one is not None
        },
    }


def _verifications(connection: Connection, settings: Settings) -> list[dict[str, Any]]:
    """The last hundred verifications on record, newest first."""
    rows = connection.execute(
        text(f"select * from {quoted(settings.ledger_schema)}.verifications order by id desc limit 100")
    )
    return [plain(dict(row._mapping)) for row in rows]


def _without_groups(run: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in run.items() if name != "groups"}


def _flags(source: FlagSource) -> dict[str, Any]:
    seen = source.snapshot()
    document = seen.document if isinstance(seen, DocumentSnapshot) else None
    return {
        "source": seen.source,
        "document_id": seen.document_id,
        "flags": plain(flag_states(source)),
        "document": document.content if document else None,
    }


_TIME = """to_char({} at time zone 'UTC', 'YYYY-MM-DD"T"HH24\\:MI\\:SS.US"Z"')"""

_VISIBLE = "t.id <= :last and pg_visible_in_snapshot(t.xid::text::xid8, cast(:seen as pg_snapshot))"

_RANGE = (
    """
select
    count(*) as found,
    encode(sha256(convert_to(coalesce(string_agg(concat_ws(
        '|', t.id, t.debit_account, t.credit_account, t.kind, t.amount, t.currency,
        coalesce(t.debit_balance::text, '-'),
        coalesce(t.credit_balance::text, '-'), extract(epoch from t.posted_at), t.xid, coalesce(t.group_id::text, '-'),
        coalesce(t.reverses::text, '-'), coalesce(t.job_id::text, '-'), to_json(array[
            t.type, t.reference_type, t.reference_id, t.correlation_id, t.actor, t.reason
        ])
    ), E'\\n' order by t.id), ''), 'UTF8')), 'hex') as sha256
from {name} as t
where t.id >= :first and t.id < :first + :size and """
    + _VISIBLE
)

_SUMS = (
    "select t.currency, count(*) as found, sum(t.amount) as amount from {name} as t where "
    + _VISIBLE
    + " group by t.currency order by 1"
)

_AUDIT = """
select
    id, {time} as at, action, actor, reason, mapping, job_id, correlation_id, database_user,
    details::text as details
from {name}.audit_log
where cast(:last as bigint) is null or id <= :last
order by id
"""
