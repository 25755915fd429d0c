"""Commands that look back: an account's history and past balance, the overview, reports of runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from sqlalchemy import Connection

from walletmigrate import history, run_reports
from walletmigrate.commands import command
from walletmigrate.console import DIFFERENCE, OK, Answer, plain
from walletmigrate.errors import UnknownBucket, UnknownCurrency, UnknownMapping, UsageError
from walletmigrate.history import Account, Selection
from walletmigrate.invocation import Run
from walletmigrate.ledger import Entry
from walletmigrate.overview import BucketTotal
from walletmigrate.overview import overview as look_over
from walletmigrate.standing import database_time, shown_time

_ACCOUNT = Annotated[str, typer.Option("--account", help="The account's key.")]
_MAPPING = Annotated[str | None, typer.Option("--mapping", help="Its mapping; needed where there are several.")]
_BUCKET = Annotated[str | None, typer.Option("--bucket", help="Default: the first of the mapping.")]
_CURRENCY = Annotated[str | None, typer.Option("--currency", help="Needed where the bucket has several.")]
_FORCE = Annotated[bool, typer.Option("--force", help="Replace a file that exists.")]
_SHOWN = 20


def register(app: typer.Typer) -> None:
    """Add the commands."""
    command(app, "history")(show_history)
    command(app, "balance")(balance)
    command(app, "overview")(overview)
    command(app, "report")(report)


def show_history(
    run: Run,
    account: _ACCOUNT,
    mapping: _MAPPING = None,
    bucket: _BUCKET = None,
    currency: _CURRENCY = None,
    type_: Annotated[list[str] | None, typer.Option("--type", help="Only this type; again for more.")] = None,
    kind: Annotated[list[str] | None, typer.Option("--kind", help=f"One of {', '.join(history.KINDS)}.")] = None,
    since: Annotated[str | None, typer.Option("--from", metavar="TIME", help="Posted then or later.")] = None,
    until: Annotated[str | None, typer.Option("--to", metavar="TIME", help="Posted before.")] = None,
    page: Annotated[
        int | None, typer.Option("--page", help="From 1; counts all entries, so --after is quicker.")
    ] = None,
    after: Annotated[int | None, typer.Option("--after", metavar="ID", help="Go on behind this transaction.")] = None,
    limit: Annotated[int, typer.Option("--limit", help="Entries of a page.")] = 50,
    export: Annotated[
        Path | None, typer.Option("--export", metavar="FILE", help="All of it, as .csv, .xlsx or .pdf.")
    ] = None,
    force: _FORCE = False,
) -> Answer:
    """An account's ledger entries, newest first, a page at a time or as a file."""
    times = [None if one is None else history.read_time(one) for one in (since, until)]
    chosen = Selection(tuple(type_ or ()), tuple(kind or ()), *times)
    if export is not None and (page is not None or after is not None):
        raise UsageError("an export has all entries that are asked for: leave --page and --after out")
    with run.engine.connect() as connection:
        found = _account(run, connection, account, mapping, bucket, currency)
        if export is not None:
            run_reports.export_history(connection, run.settings, found, chosen, export, force=force)
            return Answer({"account": plain(found), "file": str(export)}, (f"written: {export}",))
        here = history.page(connection, run.settings, found, chosen, limit=limit, after=after, number=page)
    pages = f", page {here.number} of {here.pages}" if here.number is not None else ""
    lines = [f"{_named(found)}: {found.state}, {found.balance:f}{pages}", *(_entry(one) for one in here.entries)]
    notes = (f"more: --after {here.after}",) if here.after is not None else ()
    return Answer(plain(here), tuple(lines), notes)


def balance(
    run: Run,
    account: _ACCOUNT,
    at: Annotated[str | None, typer.Option("--at", metavar="TIME", help="With its zone. Default: now.")] = None,
    mapping: _MAPPING = None,
    bucket: _BUCKET = None,
    currency: _CURRENCY = None,
) -> Answer:
    """An account's ledger balance at a time. Exit 3 if the snapshot before it does not come to the same."""
    when = None if at is None else history.read_time(at)
    with run.engine.connect() as connection:
        found = _account(run, connection, account, mapping, bucket, currency)
        moment = when or database_time(connection)
        one = history.balance_at(connection, run.settings, found, moment)
    amount = "none: the account was not open yet" if one.balance is None else f"{one.balance:f} {found.currency}"
    proof = {None: "no snapshot before it", True: "proved", False: "NOT PROVED"}[one.proven]
    if one.snapshot_id is not None:
        proof += f" by snapshot {one.snapshot_id}"
    made = f"transaction {one.transaction_id}" if one.transaction_id else "no transaction"
    line = f"{_named(found)} at {shown_time(moment)}: {amount} ({made}; {proof})"
    return Answer(plain(one), (line,), exit_code=DIFFERENCE if one.proven is False else OK)


def overview(
    run: Run,
    limit: Annotated[int, typer.Option(min=1, max=1_000_000, help="Values of each trait to list.")] = 1000,
) -> Answer:
    """All money by bucket, currency and trait: what is there, what should be, where from. Exit 3 if it differs."""
    found = look_over(run.engine, run.settings, limit=limit)
    lines = [line for one in found.buckets for line in _bucket(one)]
    lines += [
        f"  {name} {one.trait}={one.value} ({one.bucket}, {one.currency}): legacy {one.legacy:f}, ledger {one.ledger:f}"
        for name, one in found.traits[:_SHOWN]
    ]
    if len(found.traits) > _SHOWN:
        lines.append(f"  … {len(found.traits)} in all; --json lists them")
    lines += [f"system {one.name} {one.currency}: {one.balance:f}, expected {one.expected:f}" for one in found.system]
    lines += [f"imbalance {currency}: {amount:f}" for currency, amount in found.imbalance.items()]
    notes = () if found.sound else ("the ledger does not agree with its journal: see runbooks/balance-drift.md",)
    document = {"sound": found.sound, **plain(found)}
    return Answer(document, tuple(lines), notes, OK if found.sound else DIFFERENCE)


def report(
    run: Run,
    of: Annotated[
        str, typer.Argument(metavar="RUN", help="snapshot:3, job:12, verification:7, overview, report.json.")
    ],
    to: Annotated[Path, typer.Option("--to", metavar="FILE", help="A .csv, .xlsx, .pdf or .html.")],
    force: _FORCE = False,
) -> Answer:
    """Write the report of a run as a file. The HTML page has charts, and needs no network."""
    if of.lower().endswith(".json"):
        made = run_reports.report_rehearsal(Path(of), to, force=force)
    else:
        made = run_reports.report(run.engine, run.settings, of, to, force=force)
    return Answer({"title": made.title, "file": str(to), "facts": dict(made.facts)}, (f"written: {to} ({made.title})",))


def _account(
    run: Run, connection: Connection, key: str, mapping: str | None, bucket: str | None, currency: str | None
) -> Account:
    """The account that the options name; what they name wrongly is an error of usage."""
    try:
        chosen = run.settings.mapping(mapping)
        return history.account_of(connection, run.settings, chosen, key, bucket, currency)
    except (UnknownMapping, UnknownBucket, UnknownCurrency) as error:
        raise UsageError(str(error)) from None


def _named(one: Account) -> str:
    return f"{one.mapping} {one.key} ({one.bucket}, {one.currency})"


def _entry(one: Entry) -> str:
    words = [f"  {one.transaction_id}  {shown_time(one.posted_at)}  {one.amount:+f}  → {one.balance_after:f}"]
    words.append(one.kind if one.kind == one.type else f"{one.kind} {one.type}")
    if one.reference:
        words.append(" ".join(one.reference))
    words += [part for part in (one.actor, one.reason) if part]
    return "  ".join(words)


def _bucket(one: BucketTotal) -> list[str]:
    legacy = "" if one.legacy is None else f"legacy {one.legacy:f}, "
    came = ", ".join(f"{kind} {getattr(one, kind):f}" for kind in history.KINDS)
    amounts = f"{legacy}ledger {one.ledger:f}, expected {one.expected:f}, discrepancy {one.discrepancy:f}"
    head = f"{one.mapping} {one.bucket} {one.currency}: {one.accounts} accounts, {amounts}"
    lines = [head]
    if one.unmirrored:
        lines.append(f"  unmirrored {one.unmirrored:f}: legacy − ledger, what is absent, stale or drifted")
    lines.append(f"  came from: {came}")
    if one.bypass is None:
        lines.append("  of this past the adapter: a snapshot keeps no such sum by bucket; see system bypass")
    elif one.bypass:
        lines.append(f"  of this past the adapter: {one.bypass:f}")
    return lines
