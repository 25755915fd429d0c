"""Commands that verify: verify itself, and the log of what was verified."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from decimal import Decimal
from typing import Annotated, Any

import typer

from walletmigrate import verifications
from walletmigrate.commands import command
from walletmigrate.console import DIFFERENCE, OK, Answer, plain
from walletmigrate.cross_checks import CrossCheck
from walletmigrate.errors import UsageError
from walletmigrate.invocation import Run
from walletmigrate.journals import JournalProblem
from walletmigrate.standing import REASON, shown_time
from walletmigrate.verifications import Verification, VerificationRun, drift_line, reference_line
from walletmigrate.verify import verify as run_verify
from walletmigrate.verify_findings import FOUND, left_out

_MAPPING = Annotated[str | None, typer.Option("--mapping", help="One mapping. Default: all, one after the other.")]
_SHOWN = 20
_REASONS = {"full": "a full verification", "incremental": "a verification of what changed", "sample": "a sample"}


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = typer.Typer(help="Compare every account with its legacy row, and the ledger with itself.")
    command(group, "", group="verify", changes=True)(verify)
    command(group, "list", group="verify")(list_runs)
    command(group, "show", group="verify")(show)
    app.add_typer(group, name="verify")


def verify(
    run: Run,
    mapping: _MAPPING = None,
    limit: Annotated[int, typer.Option(min=1, max=1_000_000, help="How many differences to list.")] = 1000,
    mark_stale: Annotated[
        bool, typer.Option("--mark-stale", help="Turn accounts that differ stale, for a backfill; close orphans.")
    ] = False,
    sample: Annotated[
        int | None, typer.Option("--sample", metavar="N", min=1, max=1_000_000, help="Only N keys drawn at random.")
    ] = None,
    since_last: Annotated[
        bool, typer.Option("--since-last", help="Only accounts that changed in the ledger since the last run.")
    ] = False,
) -> Answer:
    """Compare every account with its legacy row, and the balances with the journal. Exit 3 on a difference."""
    if sample is not None and since_last:
        raise UsageError("pass --sample N or --since-last, not both")
    form = "sample" if sample is not None else "incremental" if since_last else "full"
    act = run.act(None if mark_stale else _REASONS[form])
    with run.unwinding():
        found = [
            run_verify(
                *(run.engine, run.settings, one, act),
                limit=limit,
                dry_run=run.dry_run,
                mark_stale=mark_stale,
                sample=sample,
                since_last=since_last,
            )
            for one in run.mappings(mapping)
        ]
    clean = all(one.clean for one in found)
    lines = [line for one in found for line in _lines(one)]
    notes = [] if clean else ["see runbooks/balance-drift.md"]
    lags = [one.replica_lag for one in found if one.replica_lag is not None]
    if lags:
        notes.append(f"on a standby, {max(lags):.1f} s behind its primary: nothing was put on record")
    if mark_stale and not run.dry_run and any(one.turned_stale for one in found):
        notes.append(f"next: walletmigrate backfill {REASON}")
    document = {"clean": clean, "mappings": [_verification(one) for one in found]}
    return Answer(document, tuple(lines), tuple(notes), OK if clean else DIFFERENCE)


def list_runs(
    run: Run,
    mapping: _MAPPING = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="How many, newest first.")] = 50,
) -> Answer:
    """List the verifications on record, newest first: one for each currency."""
    name = None if mapping is None else run.mappings(mapping)[0].name
    with run.engine.connect() as connection:
        found = verifications.runs(connection, run.settings, mapping=name, limit=limit)
    lines = tuple(_run_line(one) for one in found) or ("no verification yet",)
    return Answer({"verifications": [_run(one) for one in found]}, lines)


def show(
    run: Run,
    number: Annotated[int, typer.Argument(metavar="ID", min=1, help="The number, as `verify list` shows it.")],
) -> Answer:
    """Show one verification on record, with what it found."""
    with run.engine.connect() as connection:
        found = verifications.show(connection, run.settings, number)
    lines = [_run_line(found), f"  by {found.actor}, began {shown_time(found.started_at)}", *_detail_lines(found)]
    return Answer({"verification": _run(found)}, tuple(lines))


def _run(one: VerificationRun) -> dict[str, Any]:
    return {field.name: plain(getattr(one, field.name)) for field in dataclasses.fields(one)}


def _run_line(one: VerificationRun) -> str:
    verdict = "clean" if one.clean else "NOT CLEAN" if one.complete else "NOT CLEAN, and ended early"
    drift = f", drift {one.drift_amount} in {one.drift_accounts}" if one.drift_accounts else ""
    missing = f", {one.missing} missing" if one.missing else ""
    return (
        f"{one.id}  {shown_time(one.finished_at)}  {one.form}  {one.mapping} {one.currency}: {verdict}, "
        f"{one.accounts} accounts{missing}{drift}"
    )


def _detail_lines(one: VerificationRun) -> Iterator[str]:
    cut = left_out(one.details)
    for name, value in one.details.items():
        title = name.replace("_", " ")
        if isinstance(value, list):
            if value:
                yield f"  {title}:"
                yield from (f"    {each}" for each in value[:_SHOWN])
                yield from _more(len(value), title)
                if name in cut:
                    yield f"    {cut[name]}"
        elif name == FOUND:
            continue
        elif isinstance(value, dict):
            if value:
                yield f"  {title}: " + ", ".join(f"{key} {each}" for key, each in value.items())
        elif value:
            yield f"  {title}: {value}"


def _verification(one: Verification) -> dict[str, Any]:
    fields = (field.name for field in dataclasses.fields(one) if field.name != "groups")
    return {name: plain(getattr(one, name)) for name in fields}


def _lines(one: Verification) -> Iterator[str]:
    verdict = "clean" if one.clean else "NOT CLEAN"
    yield f"{one.mapping}: {verdict}, {one.accounts} accounts in {one.seconds:.1f} s"
    yield from _form_lines(one)
    for currency, amount in one.legacy_total.items():
        ledger = one.ledger_total.get(currency, Decimal(0))
        imbalance = f", imbalance {one.imbalance.get(currency, 0)}" if one.form == "full" else ""
        yield f"  {currency}: legacy {amount}, ledger {ledger}{imbalance}"
    for each in one.totals[:_SHOWN]:
        who = f"{each.trait}={each.value} ({each.bucket}, {each.currency})"
        yield f"  {who}: legacy {each.legacy}, ledger {each.ledger}"
    yield from _more(len(one.totals), "totals")
    yield from _account_lines(one)
    for check in one.cross_checks:
        yield from _check_lines(check)
    yield from (f"  journal: account {p.key or p.account}: {p.problem}{_at(p)}" for p in one.journal[:_SHOWN])
    yield from _more(len(one.journal), "problems of the journal")
    yield from (f"  reference: {reference_line(each)}" for each in one.references[:_SHOWN])
    yield from _more(one.reference_count, "references")
    yield from (f"  guard: {guard.trigger} {guard.problem}" for guard in one.guards)


def _form_lines(one: Verification) -> Iterator[str]:
    if one.sample is not None:
        share = f"{one.sample.at_most:.3%}"
        told = (
            f"these are all, {share} of them wrong"
            if one.sample.whole
            else f"with {one.sample.confidence:.0%} confidence at most {share} of all keys are wrong"
        )
        yield f"  a sample of {one.sample.keys} keys, {one.sample.wrong} of them wrong: {told}"
    if one.widened is not None:
        yield f"  all accounts, not only what changed: the fence was down until {shown_time(one.widened)}, unseen since"
    if one.since is not None:
        yield f"  only what changed in the ledger since {shown_time(one.since)}"


def _account_lines(one: Verification) -> Iterator[str]:
    if one.missing or one.stale:
        yield f"  behind: {one.missing} missing, {one.stale} stale"
        yield from (f"    {each.key} ({each.bucket}, {each.currency}): {each.state}" for each in one.behind[:_SHOWN])
        yield from _more(one.missing + one.stale, "accounts behind")
    if one.drift_accounts:
        yield f"  drift in {one.drift_accounts} accounts:"
        yield from (f"    {drift_line(each)}" for each in one.drift[:_SHOWN])
        yield from _more(one.drift_accounts, "drifted accounts")
    if one.passing_accounts:
        yield f"  differed at the first look only, and the ledger tells how it ended: {one.passing_accounts} accounts:"
        yield from (f"    {drift_line(each)}" for each in one.passing[:_SHOWN])
        yield from _more(one.passing_accounts, "such accounts")
    if one.turned_stale is not None:
        yield f"  {'would be turned' if one.dry_run else 'turned'} stale: {one.turned_stale} accounts"
    if one.closed:
        yield f"  {'would be closed' if one.dry_run else 'closed'}, their rows are gone: {one.closed} accounts"


def _check_lines(check: CrossCheck) -> Iterator[str]:
    what = f"  cross-check {check.name} ({check.bucket}, {check.currency})"
    yield f"{what}: {check.differing} of {check.compared} balances differ"
    for one in check.differences[:_SHOWN]:
        yield f"    {one.key}: expected {one.expected}, found {one.found}"
    yield from _more(check.differing, f"differences of {check.name}")


def _at(problem: JournalProblem) -> str:
    return f" (transaction {problem.transaction_id})" if problem.transaction_id else ""


def _more(count: int, what: str) -> Sequence[str]:
    return [f"  … {count} {what} in all; --json lists them"] if count > _SHOWN else []
