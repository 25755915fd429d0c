"""Reports of what was run, as documents: snapshots, jobs, verifications, rehearsals, the overview, a history."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields
from decimal import Decimal
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Connection, Engine, Row, text

from walletmigrate import exports, snapshots
from walletmigrate.comparison import Comparison, snapshot
from walletmigrate.config import Mapping, Settings
from walletmigrate.documents import Chart, Document, Heading, Series, Table
from walletmigrate.errors import UnreadableInput, UsageError
from walletmigrate.history import Account, Selection, entries
from walletmigrate.overview import Overview, overview
from walletmigrate.run_documents import (
    RUNS,
    amounts_of,
    facts_of,
    money_of,
    of_job,
    of_verification,
    scale_of,
)
from walletmigrate.schema import quoted
from walletmigrate.standing import require_installed
from walletmigrate.sums import less

KINDS: Final = ("snapshot", "job", "verification", "overview")
_BARS: Final = 40
_SEEN: Final = ("mirrored", "frozen", "stale", "closed", "absent", "drifted")
_KINDS_OF_MONEY: Final = snapshots.KINDS


def report(engine: Engine, settings: Settings, run: str, path: Path, *, force: bool = False) -> Document:
    """Write the report of a run to a .csv, .xlsx, .pdf or .html file, streamed; returns what it was made from.

    ``run`` is ``snapshot:3``, ``job:12``, ``verification:7`` (without a number: the newest), or ``overview``. Reads one
    state of the database. Raises UnknownRun, ExportRefused, ExtraMissing, LedgerNotInstalled.
    """
    exports.writer_of(path, force=force)
    kind, _, number = run.partition(":")
    if kind.isdigit() and not number:
        kind, number = "job", kind
    if kind not in KINDS or (number and not number.isdigit()) or (kind == "overview" and number):
        raise UsageError(
            f"run {run!r}: write snapshot:3, job:12, verification:7, overview, or a rehearsal's report.json"
        )
    whole = overview(engine, settings) if kind == "overview" else None
    with snapshot(engine) as connection:
        require_installed(connection, settings)
        charts = _charts(connection, settings) if path.suffix.lower() == ".html" else ()
        if whole is not None:
            document = of_overview(whole, settings, charts)
        else:
            make = {"snapshot": _of_snapshot, "job": of_job, "verification": of_verification}[kind]
            document = make(connection, settings, int(number) if number else None, charts)
        exports.export(document, path, force=force)
    return document


def report_rehearsal(source: Path, path: Path, *, force: bool = False) -> Document:
    """Write a rehearsal's report file (JSON) as a .csv, .xlsx, .pdf or .html file; needs no database."""
    exports.writer_of(path, force=force)
    document = of_rehearsal(source)
    exports.export(document, path, force=force)
    return document


def export_history(
    connection: Connection,
    settings: Settings,
    account: Account,
    selection: Selection,
    path: Path,
    *,
    force: bool = False,
) -> None:
    """Write an account's history, newest first, streamed, to a .csv, .xlsx or .pdf file. Raises ExportRefused."""
    kinds = (".csv", ".xlsx", ".pdf")
    exports.writer_of(path, kinds=kinds, force=force)
    amount = [Heading(title, "amount", account.scale) for title in ("amount", "balance before", "balance after")]
    headings = (
        *(Heading("transaction", "count"), Heading("posted at", "time"), Heading("kind"), Heading("type"), *amount),
        *(Heading("currency"), Heading("reference"), Heading("reverses", "count"), Heading("reversed by", "count")),
        *(Heading("actor"), Heading("reason"), Heading("correlation id"), Heading("job", "count")),
    )
    rows = (
        (
            *(one.transaction_id, one.posted_at, one.kind, one.type, one.amount, one.balance_before, one.balance_after),
            *(one.currency, " ".join(one.reference) if one.reference else None, one.reverses, one.reversed_by),
            *(one.actor, one.reason, one.correlation_id, one.job_id),
        )
        for one in entries(connection, settings, account, selection)
    )
    title = f"History of {account.mapping} {account.key}, {account.bucket}, {account.currency}"
    exports.export(Document(title, tables=(Table("History", headings, rows),)), path, kinds=kinds, force=force)


def of_overview(one: Overview, settings: Settings, charts: tuple[Chart, ...] = ()) -> Document:
    """The overview as a document."""
    scale = scale_of(settings)
    money = [field.name for field in fields(one.buckets[0])][4:] if one.buckets else []
    buckets = tuple(
        (b.mapping, b.bucket, b.currency, b.accounts, *(getattr(b, name) for name in money)) for b in one.buckets
    )
    names = tuple(Heading(name) for name in ("mapping", "bucket", "currency"))
    amounts = tuple(Heading(name, "amount", scale) for name in money)
    traits = (
        (m, t.trait, t.value, t.bucket, t.currency, t.legacy, t.ledger, less(t.legacy, t.ledger)) for m, t in one.traits
    )
    of_trait = (*(Heading(n) for n in ("mapping", "trait", "value", "bucket", "currency")), *money_of(scale))
    of_system = (Heading("account"), Heading("currency"), *amounts_of(scale, "balance", "expected", "discrepancy"))
    facts = (
        ("Verdict", "sound" if one.sound else "NOT SOUND"),
        *((f"Imbalance {currency}", f"{amount:f}") for currency, amount in one.imbalance.items()),
        ("Newest snapshot", str(one.snapshot_id) if one.snapshot_id else "none"),
    )
    tables = (
        Table("Totals", (*names, Heading("accounts", "count"), *amounts), buckets),
        Table("Traits", of_trait, traits),
        Table(
            "System accounts",
            of_system,
            ((s.name, s.currency, s.balance, s.expected, s.discrepancy) for s in one.system),
        ),
    )
    return Document("Overview", facts, tables, charts)


def of_rehearsal(path: Path) -> Document:
    """A rehearsal's report file as a document. Raises UsageError without one, UnreadableInput if it is none."""
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
        stages = [dict(one) for one in read.pop("stages")]
        verdict = str(read.pop("verdict"))
        # Of a copied table: where it came from, and its sums by bucket and currency.
        source, sums = dict(read.pop("source", {})), read.pop("totals", [])
        of_copy = (_of_copy(sums),) if sums else ()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError):
        raise UnreadableInput(str(path), [(1, "is not a rehearsal's report")]) from None
    names = list(dict.fromkeys(name for stage in stages for name in stage))
    headings = tuple(Heading(name, "text" if name == "name" else "amount") for name in names)
    rows = [tuple(_number(stage.get(name)) for name in names) for stage in stages]
    speed = Series("per second", tuple(_decimal(stage.get("per_second")) for stage in stages))
    chart = Chart("Transactions per second, by stage", tuple(str(one.get("name")) for one in stages), (speed,), "bars")
    facts = [("Verdict", verdict), *((name.replace("_", " "), str(value)) for name, value in read.items())]
    for name, value in source.items():
        shown = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        facts.append((f"source {name.replace('_', ' ')}", shown))
    return Document("Rehearsal", tuple(facts), (Table("Stages", headings, rows), *of_copy), (chart,))


def _of_copy(sums: list[dict[str, Any]]) -> Table:
    """The sums of a rehearsal on a copied table, in major units."""
    sides = ("legacy", "ledger", "expected")
    of_sides = (Heading(side, "amount") for side in sides)
    headings = (Heading("bucket"), Heading("currency"), Heading("accounts", "count"), *of_sides)
    amounts = (tuple(Decimal(str(one[side])) for side in sides) for one in sums)
    rows = [(one["bucket"], one["currency"], one["accounts"], *three) for one, three in zip(sums, amounts, strict=True)]
    return Table("Totals", headings, rows)


def _of_snapshot(connection: Connection, settings: Settings, number: int | None, charts: tuple[Chart, ...]) -> Document:
    one = snapshots.get(connection, settings, number)
    scale, kept = scale_of(settings), snapshots.totals(connection, settings, one)
    of_kinds = amounts_of(scale, *_KINDS_OF_MONEY)
    counts = (Heading("accounts", "count"), Heading("balance", "amount", scale), Heading("changed", "count"))
    names = tuple(Heading(name) for name in ("mapping", "bucket", "currency"))
    totals = Table(
        "Totals, and sums by kind since the snapshot before",
        (*names, *counts, *of_kinds, Heading("transactions", "count")),
        [tuple(getattr(total, field.name) for field in fields(total)) for total in kept],
    )
    shown_names = tuple(Heading(name) for name in ("mapping", "key", "bucket", "currency"))
    rows = (
        (b.mapping, b.key, b.bucket, b.currency, b.balance, b.opening, b.resync, b.posting, b.correction, b.reversal)
        for b in snapshots.balances(connection, settings, one)
    )
    balances = Table("Balances", (*shown_names, Heading("balance", "amount", scale), *of_kinds), rows)
    return Document(f"Snapshot {one.id}", facts_of(one), (totals, balances), charts)


def _charts(connection: Connection, settings: Settings) -> tuple[Chart, ...]:
    """States over time as the verifications saw them, and drift by tenant as it is now."""
    return (
        *(_states(connection, settings, mapping) for mapping in settings.mappings),
        *(chart for mapping in settings.mappings for chart in _drift(connection, settings, mapping)),
    )


def _states(connection: Connection, settings: Settings, mapping: Mapping) -> Chart:
    rows = connection.execute(
        text(
            "select * from (select started_at, sum(accounts) as accounts, sum(missing) as missing, "
            "sum(drift_accounts) as drifted, max(coalesce((details ->> 'stale')::bigint, 0)) as stale, "
            "(array_agg(details -> 'states'))[1] as states "
            f"from {quoted(settings.ledger_schema)}.verifications where mapping = :mapping and full_run "
            f"group by started_at order by started_at desc limit {RUNS}) as x order by started_at"
        ),
        {"mapping": mapping.name},
    ).all()
    seen = [_seen(row) for row in rows]
    series = tuple(Series(name, tuple(one[name] for one in seen)) for name in _SEEN)
    places = tuple(f"{row.started_at:%Y-%m-%d %H:%M}" for row in rows)
    return Chart(f"Accounts of {mapping.name} by state, as full verifications saw them", places, series, "areas")


def _seen(row: Row[Any]) -> dict[str, int]:
    """The accounts that a run saw in each state, and apart from these what differed. An earlier release wrote down
    less: what was neither stale nor absent counts as mirrored.
    """
    states = row.states or {"mirrored": row.accounts - row.stale, "stale": row.stale, "absent": row.missing}
    found = {name: int(states.get(name, 0)) for name in _SEEN}
    found["drifted"] = min(int(row.drifted), found["mirrored"])
    found["mirrored"] -= found["drifted"]
    return found


def _drift(connection: Connection, settings: Settings, mapping: Mapping) -> Iterator[Chart]:
    """Legacy − ledger by the trait ``tenant``, else by the first; nothing without a trait or a legacy column."""
    phase = connection.scalar(text(f"select phase from {quoted(settings.ledger_schema)}.control"))
    if not mapping.traits or phase == "retired":
        return
    trait = "tenant" if "tenant" in mapping.traits else next(iter(mapping.traits))
    comparison = Comparison(connection, settings, mapping, with_traits=True)
    found = [one for one in comparison.groups(connection, _BARS)[1] if one.trait == trait]
    for column in mapping.columns:
        here = [one for one in found if (one.bucket, one.currency) == (column.bucket, column.currency)]
        bars = Series("drift", tuple(less(one.legacy, one.ledger) for one in here))
        title = f"Drift by {trait} now: legacy − ledger, {mapping.name}, {column.bucket}, {column.currency}"
        yield Chart(title, tuple(one.value or "(none)" for one in here), (bars,), "bars")


def _number(value: Any) -> Any:
    return Decimal(str(value)) if isinstance(value, int | float) else value


def _decimal(value: Any) -> Decimal:
    return Decimal(str(value)) if isinstance(value, int | float) else Decimal(0)
