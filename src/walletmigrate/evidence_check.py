"""Check a folder of evidence again: by itself on any machine, and against the database where there is one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, text

from walletmigrate import checksums
from walletmigrate.archive import digest
from walletmigrate.comparison import snapshot
from walletmigrate.config import Settings
from walletmigrate.errors import UnreadableInput
from walletmigrate.evidence import FORMAT, MANIFEST, audit_rows, chained, journal_of, kept_range
from walletmigrate.schema import quoted
from walletmigrate.standing import require_installed
from walletmigrate.sums import total

_BROKEN = (KeyError, TypeError, ValueError, InvalidOperation, AttributeError)


@dataclass(frozen=True)
class EvidenceCheck:
    """What a check found. ``intact``: no problem; ``clean``: the manifest and every verification in it say so.
    ``with_database``: totals, journal, snapshots' checksums and audit log were held against the database too.
    """

    folder: str
    made_at: str
    clean: bool
    intact: bool
    with_database: bool
    problems: tuple[str, ...]


def check(folder: Path, engine: Engine | None = None, settings: Settings | None = None) -> EvidenceCheck:
    """Check sums, balance and chain; with an engine, also that the database still holds what the evidence says.

    What was posted since does not matter: the journal is read as of the evidence's snapshot. Reads only. Raises
    UnreadableInput without a manifest, LedgerNotInstalled.
    """
    manifest = _manifest(folder)
    problems = [*_files(folder, manifest)]
    unlike: list[str] = []
    if not any(problem.startswith("missing") for problem in problems):
        unlike = _guarded("verification.json", _verdict, folder, manifest)
        problems += unlike
        problems += _guarded("totals.json", _balance, folder)
        problems += _guarded("journal.json", _counts, folder)
        problems += _guarded("audit.jsonl", _chain, folder, manifest)
        if engine is not None and settings is not None:
            with snapshot(engine) as connection:
                require_installed(connection, settings)
                problems += _guarded("journal.json", _journal, folder, connection, settings)
                problems += _guarded("snapshots.json", _kept, folder, connection, settings)
                problems += _guarded("audit.jsonl", _audit, folder, connection, settings)
    return EvidenceCheck(
        str(folder),
        str(manifest.get("made_at")),
        manifest.get("clean") is True and not unlike,
        not problems,
        engine is not None,
        tuple(problems),
    )


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UnreadableInput(str(path), [(1, f"{type(error).__name__}: {error}")]) from None
    if not isinstance(found, dict) or found.get("format") != FORMAT or not isinstance(found.get("files"), dict):
        raise UnreadableInput(str(path), [(1, f"no manifest of evidence ({FORMAT!r} is expected)")])
    return found


def _guarded(name: str, look: Any, *given: Any) -> list[str]:
    """The problems that a look finds; a document of another shape is one."""
    try:
        return list(look(*given))
    except _BROKEN as error:
        return [f"{name} is not what the evidence has there ({type(error).__name__}: {error})"]


def _files(folder: Path, manifest: dict[str, Any]) -> Iterator[str]:
    for name, wanted in manifest["files"].items():
        path = folder / name
        # A manifest that was made up must not have us read elsewhere.
        if Path(name).name != name or not path.is_file():
            yield f"missing: {name}"
        elif digest(path)[0] != wanted:
            yield f"{name} is not the file that the manifest has a checksum of"
    for path in sorted(folder.iterdir()):
        if path.name not in manifest["files"] and path.name != MANIFEST:
            yield f"{path.name} is in no manifest"
    yield from (f"missing: {name}" for name in _NEEDED if name not in manifest["files"])


_NEEDED = (
    *("audit.jsonl", "flags.json", "journal.json", "phase.json", "snapshots.json", "totals.json"),
    *("verification.json", "versions.json"),
)


def _verdict(folder: Path, manifest: dict[str, Any]) -> Iterator[str]:
    """The word ``clean`` stands in three places: of each mapping's verification, of all, and of the manifest, where it
    says besides that the journal has the rows that snapshots folded.
    """
    told = _document(folder, "verification.json")
    runs = {run["mapping"]: run["clean"] for run in told["runs"]}
    if told["clean"] is not (bool(runs) and all(clean is True for clean in runs.values())):
        yield "verification.json: its verdict is not that of its runs"
    if manifest.get("clean") is not (told["clean"] and not _document(folder, "snapshots.json")["edited"]):
        yield f"{MANIFEST}: its verdict is not that of verification.json and snapshots.json"


def _balance(folder: Path) -> Iterator[str]:
    totals = _document(folder, "totals.json")
    for currency, one in totals.items():
        come_to = total(Decimal(row["balance"]) for part in ("owners", "system") for row in one[part])
        if come_to != 0:
            yield f"totals.json: the balances of {currency} come to {come_to}, not to zero"
    owned = {row["mapping"] for one in totals.values() for row in one["owners"]}
    verified = {run["mapping"] for run in _document(folder, "verification.json")["runs"]}
    yield from (f"verification.json: there is no run of {name}" for name in sorted(owned - verified))


def _counts(folder: Path) -> Iterator[str]:
    journal = _document(folder, "journal.json")
    ranges = sum(one["rows"] for one in journal["ranges"])
    sums = sum(one["rows"] for one in journal["currencies"].values())
    if ranges != sums:
        yield f"journal.json: {ranges} transactions in its ranges, {sums} in its sums"


def _chain(folder: Path, manifest: dict[str, Any]) -> Iterator[str]:
    chain, count, last = "", 0, 0
    for row in _audit_lines(folder):
        chain = chained(chain, row)
        if row.get("chain") != chain:
            yield f"audit.jsonl: the chain breaks at row {row.get('id')}"
            return
        if row["id"] <= last:
            yield f"audit.jsonl: row {row['id']} is out of order"
        last, count = row["id"], count + 1
    if {"rows": count, "chain": chain} != manifest.get("audit"):
        yield "audit.jsonl: the chain does not end as the manifest says"


def _journal(folder: Path, connection: Connection, settings: Settings) -> Iterator[str]:
    told = _document(folder, "journal.json")
    now = journal_of(connection, settings, told)
    found = {one["from"]: one for one in now["ranges"]}
    for one in told["ranges"]:
        if found.pop(one["from"], None) != one:
            yield f"the database: transactions from {one['from']} on are not those of the evidence"
    yield from (f"the database: transactions from {first} on are not in the evidence" for first in found)
    yield from _owners(folder, connection, settings, told)
    yield from _system(folder, connection, settings, told)


def _kept(folder: Path, connection: Connection, settings: Settings) -> Iterator[str]:
    """What snapshots keep of the journal, which a prune merges and does not change; and the journal against that.

    A snapshot that was pruned itself says nothing any more. What it saw, journal.json has too.
    """
    told = _document(folder, "snapshots.json")
    number, wanted = told["snapshot"], {one["from"]: one for one in told["ranges"]}
    name = quoted(settings.ledger_schema)
    query = text(f"select 1 from {name}.snapshots where id = cast(:id as bigint) and state = 'complete'")
    if connection.scalar(query, {"id": number}) is None:
        return
    found = checksums.ranges(connection, settings, number, checksums.bare(connection, settings, number))
    now = {one.first: kept_range(one) for one in found if one.kept}
    for first in sorted(wanted.keys() | now.keys()):
        if wanted.get(first) != now.get(first):
            yield f"the database: checksum {first} of snapshot {number} is not the one of the evidence"
    known = {one["first"] for one in told["edited"]}
    for one in found:
        if not one.same and one.first not in known:
            yield f"the database: transactions from {one.first} on are not those that snapshots folded"


def _owners(folder: Path, connection: Connection, settings: Settings, told: dict[str, Any]) -> Iterator[str]:
    """Owners by the journal of the evidence's moment, in all states together: an account's state may change since."""
    rows = connection.execute(
        text(_OWNERS.format(name=quoted(settings.ledger_schema))),
        {"last": told["last_transaction"], "seen": told["snapshot"]},
    )
    now = {(row.currency, row.mapping, row.bucket): row.balance for row in rows}
    found: dict[tuple[str, str, str], list[Decimal]] = {}
    for currency, one in _document(folder, "totals.json").items():
        for row in one["owners"]:
            found.setdefault((currency, row["mapping"], row["bucket"]), []).append(Decimal(row["balance"]))
    for place in sorted(now.keys() | found.keys()):
        if total(found.get(place, ())) != now.get(place, 0):
            currency, mapping, bucket = place
            yield f"the database: the journal gives the owners of {mapping} {bucket} ({currency}) another balance"


def _system(folder: Path, connection: Connection, settings: Settings, told: dict[str, Any]) -> Iterator[str]:
    """System accounts by the journal of the evidence's moment, whatever was folded since."""
    rows = connection.execute(
        text(_SYSTEM.format(name=quoted(settings.ledger_schema))),
        {"last": told["last_transaction"], "seen": told["snapshot"]},
    )
    now = {(row.currency, row.name): row.balance for row in rows}
    for currency, one in _document(folder, "totals.json").items():
        for row in one["system"]:
            if now.get((currency, row["name"])) != Decimal(row["balance"]):
                yield f"the database: the journal gives {row['name']} ({currency}) another balance"


def _audit(folder: Path, connection: Connection, settings: Settings) -> Iterator[str]:
    lines = list(_audit_lines(folder))
    last = lines[-1]["id"] if lines else 0
    told = {line["id"]: {name: value for name, value in line.items() if name != "chain"} for line in lines}
    for row in audit_rows(connection, settings, last):
        # One with a smaller id may have been committed later.
        if row["id"] in told and told.pop(row["id"]) != row:
            yield f"the database: audit row {row['id']} is not the one of the evidence"
    yield from (f"the database: audit row {one} is gone" for one in told)


def _audit_lines(folder: Path) -> Iterator[dict[str, Any]]:
    with (folder / "audit.jsonl").open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def _document(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / name).read_text(encoding="utf-8"))
    return found


_OWNERS = """
with legs as (
    select l.account, sum(l.amount) as amount
    from {name}.transactions as t
    cross join lateral (values (t.credit_account, t.amount), (t.debit_account, -t.amount)) as l (account, amount)
    where l.account > 0 and t.id <= :last and pg_visible_in_snapshot(t.xid::text::xid8, cast(:seen as pg_snapshot))
    group by l.account
)
select a.currency, a.mapping, a.bucket, sum(l.amount) as balance
from legs as l
inner join {name}.accounts as a on a.id = l.account
group by a.currency, a.mapping, a.bucket
"""

_SYSTEM = """
select
    s.currency, s.name,
    coalesce(sum(case when t.credit_account = s.id then t.amount else -t.amount end), 0) as balance
from {name}.system_accounts as s
left join {name}.transactions as t
    on s.id in (t.debit_account, t.credit_account)
    and t.id <= :last and pg_visible_in_snapshot(t.xid::text::xid8, cast(:seen as pg_snapshot))
group by s.currency, s.name
"""
