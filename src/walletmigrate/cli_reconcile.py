"""Commands that hold balances against a truth, and mend them: reconcile, recalculate, adjust."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal, InvalidOperation
from typing import Annotated, Any

import typer

from walletmigrate import corrections, reconciliations
from walletmigrate.commands import DASK, WORKERS, command
from walletmigrate.config import Mapping
from walletmigrate.console import (
    CUT_SHORT,
    DIFFERENCE,
    FAILURE,
    INTERRUPTED,
    OK,
    REFUSED,
    STOPPED,
    Answer,
    bar,
    job_code,
    plain,
)
from walletmigrate.corrections import Correction
from walletmigrate.errors import (
    InvalidAmount,
    InvalidKey,
    InvalidMovement,
    UnknownBucket,
    UnknownCurrency,
    UsageError,
)
from walletmigrate.invocation import Run
from walletmigrate.jobs import begin, require_installed
from walletmigrate.recalculate import recalculate as run_recalculate
from walletmigrate.reconcile import Limits, Reconciliation
from walletmigrate.reconcile import reconcile as run_reconcile
from walletmigrate.reconciliations import RunFacts
from walletmigrate.settling import LISTED
from walletmigrate.standing import shown_time
from walletmigrate.survey import inspect_mapping
from walletmigrate.truths import LEDGER, LEGACY, Truth, named

_ACCOUNT = Annotated[str | None, typer.Option("--account", metavar="KEY", help="One account, by its key.")]
_ALL = Annotated[bool, typer.Option("--all", help="All accounts.")]
_MAPPING = Annotated[str | None, typer.Option("--mapping", help="The mapping. Default: all.")]
_NEGATIVE = Annotated[bool, typer.Option("--allow-negative", help="Let a balance become negative.")]
_NUMBER = Annotated[int, typer.Argument(metavar="RUN", min=1, help="The number of the run.")]
_SHOWN = 20
_NAMED = ("opened", "resynced", "refused", "failed", "reported")
"""What a run came to besides its corrections; what it reported stands last, with its amounts."""


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = typer.Typer(help="Hold balances against a truth, and correct small differences.")
    command(group, "", group="reconcile", changes=True)(reconcile)
    command(group, "undo", group="reconcile", changes=True)(undo)
    command(group, "list", group="reconcile")(list_runs)
    command(group, "show", group="reconcile")(show)
    app.add_typer(group, name="reconcile")
    command(app, "recalculate", changes=True)(recalculate)
    command(app, "adjust", changes=True)(adjust)


def reconcile(
    run: Run,
    account: _ACCOUNT = None,
    every: _ALL = False,
    truth: Annotated[
        str, typer.Option(metavar="legacy|ledger|FILE.csv|python:MODULE:CALLABLE", help="What is true.")
    ] = "legacy",
    tolerance: Annotated[str, typer.Option(metavar="AMOUNT", help="Differences up to this are in order.")] = "0",
    correct_up_to: Annotated[
        str, typer.Option(metavar="AMOUNT", help="Differences up to this are corrected, larger ones reported.")
    ] = "1.00",
    create_missing: Annotated[bool, typer.Option("--create-missing", help="Open accounts that are missing.")] = False,
    allow_negative: _NEGATIVE = False,
    mapping: _MAPPING = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", min=1, max=100_000, help="Keys of a batch; else it tunes itself.")
    ] = None,
    workers: WORKERS = None,
    dask: DASK = None,
) -> Answer:
    """Hold balances against a truth; correct small differences by transactions, report larger ones. Exit 3 on those."""
    act, chosen = run.act(), _one_or_all(run, account, every, mapping)
    if account is not None and (workers, dask) != (None, None):
        raise UsageError("--workers and --dask go with --all: one account needs no second hand")
    limits = Limits(
        _amount("--tolerance", tolerance), _amount("--correct-up-to", correct_up_to), create_missing, allow_negative
    )
    truths = {one.name: _truth(run, truth, one, chosen) for one in chosen}
    done: list[Reconciliation] = []
    with run.interruptible(), _as_put(), run.hands(workers, dask) as hands:
        for one in run.until_stopped(chosen):
            with bar(f"reconcile {one.name}", as_json=run.as_json) as progress:
                made = run_reconcile(
                    *(run.engine, run.settings, one, act),
                    truth=truths[one.name],
                    limits=limits,
                    account=account,
                    dry_run=run.dry_run,
                    batch_size=batch_size,
                    **hands,
                    progress=progress,
                    stop=run.stop,
                )
            done.append(made)
    return _reconciled(run, done)


def undo(run: Run, number: _NUMBER) -> Answer:
    """Take back exactly what a run corrected, each account at most once."""
    with run.interruptible():
        done = reconciliations.undo(run.engine, run.settings, number, run.act(), dry_run=run.dry_run, stop=run.stop)
    would = "would undo" if done.dry_run else "undid"
    lines = [
        f"{done.mapping}: {would} {done.undone} corrections of run {number}, {done.undone_before} undone before, "
        f"{len(done.left)} cannot be undone" + (f" (run {done.run}, {done.state})" if done.run else ""),
        *_items(done.left),
    ]
    code = job_code([done.state], _code(done.left))
    notes = [f"{done.open} corrections are open: run the same command again to go on"] if done.open else []
    notes += [CUT_SHORT] if job_code([done.state], OK) == FAILURE else []
    return Answer(plain(done), tuple(lines), tuple(notes), code)


def list_runs(
    run: Run, limit: Annotated[int, typer.Option(min=1, max=10_000, help="How many, newest first.")] = 50
) -> Answer:
    """List the runs of reconcile, newest first."""
    with run.engine.connect() as connection:
        found = reconciliations.runs(connection, run.settings, limit=limit)
    lines = tuple(_run_line(one) for one in found) or ("no reconciliation yet",)
    return Answer({"runs": plain(found)}, lines)


def show(run: Run, number: _NUMBER) -> Answer:
    """Show one run: what it changed, and what it left."""
    with run.engine.connect() as connection:
        found = reconciliations.show(connection, run.settings, number)
    lines = [_run_line(found.run), f"  by {found.run.actor}: {found.run.reason}"]
    return Answer(plain(found), (*lines, *_items(found.changed), *_items(found.left)))


def recalculate(run: Run, account: _ACCOUNT = None, every: _ALL = False, mapping: _MAPPING = None) -> Answer:
    """Make stored balances the sum of their journal. No money moves; who then differs from legacy turns stale."""
    act, chosen = run.act(), _one_or_all(run, account, every, mapping)
    with run.interruptible(), _as_put():
        found = [
            run_recalculate(run.engine, run.settings, one, act, account=account, dry_run=run.dry_run, stop=run.stop)
            for one in chosen
        ]
    lines = []
    for one in found:
        changed = sum(item.outcome in ("recalculated", "turned_stale") for item in one.items)
        verb = "would be set" if one.dry_run else "set"
        lines += [f"{one.mapping}: {one.accounts} accounts, {changed} balances {verb} to their journal's sum"]
        lines += _items(one.items)
    left = [item for one in found for item in one.items if item.outcome in ("refused", "failed")]
    stale = any(item.outcome == "turned_stale" for one in found for item in one.items)
    notes = ("stale accounts are read from legacy; walletmigrate backfill brings them up",) if stale else ()
    document = {"dry_run": run.dry_run, "mappings": [plain(one) for one in found]}
    return Answer(document, tuple(lines), notes, INTERRUPTED if run.stop() else _code(left))


def adjust(
    run: Run,
    account: Annotated[str, typer.Option("--account", metavar="KEY", help="The account, by its key.")],
    amount: Annotated[str, typer.Option("--amount", metavar="±X", help="What to add, signed, in major units.")],
    bucket: Annotated[str | None, typer.Option(help="The bucket. Default: the first.")] = None,
    currency: Annotated[str | None, typer.Option(help="The currency. Default: the bucket's only one.")] = None,
    notes: Annotated[str | None, typer.Option(help="More words, in the table that can be erased.")] = None,
    allow_negative: _NEGATIVE = False,
    mapping: _MAPPING = None,
) -> Answer:
    """Correct one balance by an amount, on both sides, as an operator with a reason."""
    act, chosen = run.act(), run.mappings(mapping)
    if len(chosen) > 1:
        raise UsageError("there are several mappings: name one with --mapping")
    with _as_put():
        made = corrections.adjust(
            *(run.engine, run.settings, chosen[0], act, account, _amount("--amount", amount, signed=True)),
            bucket=bucket,
            currency=currency,
            notes=notes,
            allow_negative=allow_negative,
            dry_run=run.dry_run,
        )
    document = {"dry_run": run.dry_run, "mapping": chosen[0].name, **plain(made)}
    return Answer(document, (f"{'would be ' if run.dry_run else ''}{_item(made)}",))


@contextmanager
def _as_put() -> Iterator[None]:
    """What was typed and is no key, amount or column is wrong usage here, not a refused posting."""
    try:
        yield
    except (InvalidKey, InvalidAmount, InvalidMovement, UnknownBucket, UnknownCurrency) as error:
        raise UsageError(str(error)) from None


def _one_or_all(run: Run, account: str | None, every: bool, mapping: str | None) -> tuple[Mapping, ...]:
    if (account is not None) == every:
        raise UsageError("say which: --account KEY, or --all")
    chosen = run.mappings(mapping)
    if account is not None and len(chosen) > 1:
        raise UsageError("there are several mappings: name one with --mapping")
    return chosen


def _truth(run: Run, text: str, mapping: Mapping, chosen: tuple[Mapping, ...]) -> Truth:
    if text in ("legacy", "ledger"):
        return LEGACY if text == "legacy" else LEDGER
    if len(chosen) > 1:
        raise UsageError("a file or a function is the truth of one mapping: name it with --mapping")
    with begin(run.engine) as connection:
        require_installed(connection, run.settings, mapping)
        return named(text, mapping, inspect_mapping(connection, mapping).key_type)


def _amount(option: str, text: str, *, signed: bool = False) -> Decimal:
    try:
        value = Decimal(text.strip())
    except InvalidOperation:
        value = Decimal("NaN")
    if not value.is_finite() or (value < 0 and not signed):
        raise UsageError(f"{option} {text!r}: write plain digits, for example 0.50")
    return value


def _reconciled(run: Run, done: list[Reconciliation]) -> Answer:
    lines, notes, items = [], [], []
    for one in done:
        shown = ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in one.counts.items() if n) or "no account"
        number = f" (run {one.run}, {one.state}{', resumed' if one.resumed else ''})" if one.run else " (dry run)"
        lines += [f"{one.mapping} against {one.truth}: {shown}{number}"]
        lines += [f"  reported: {amount} {currency}" for currency, amount in one.reported_amount.items() if amount]
        lines += _items(one.items)
        items += [
            *one.items,
            *(Correction(name, "", "", "") for name in ("reported", "refused", "failed") if one.counts[name]),
        ]
        notes += (
            [f"to take it back: walletmigrate reconcile undo {one.run}"] if one.run and one.counts["corrected"] else []
        )
    if any(one.counts["reported"] for one in done):
        notes.append("what is reported is left as it is: larger than --correct-up-to; see docs/reconcile.md")
    states = run.states(done)
    interrupted = "paused" in states
    if interrupted:
        notes.append(STOPPED)
    if job_code(states, OK) == FAILURE:
        notes.append(CUT_SHORT)
    document = {"dry_run": run.dry_run, "interrupted": interrupted, "mappings": [plain(one) for one in done]}
    return Answer(document, tuple(lines), tuple(notes), job_code(states, _code(items)))


def _code(left: Any) -> int:
    """1 if an account failed, 3 if a difference is left, 4 if one was refused."""
    outcomes = {one.outcome for one in left}
    found = [
        code for name, code in (("failed", FAILURE), ("reported", DIFFERENCE), ("refused", REFUSED)) if name in outcomes
    ]
    return found[0] if found else OK


def _items(items: Any) -> list[str]:
    shown = [f"  {_item(one)}" for one in items[:_SHOWN]]
    if len(items) >= LISTED:
        return [*shown, f"  … the first {LISTED} stand on record; --json lists them, and counts all"]
    return shown + ([f"  … {len(items)} accounts in all; --json lists them"] if len(items) > _SHOWN else [])


def _item(one: Correction) -> str:
    words = [f"{one.key} ({one.bucket}, {one.currency}): {one.outcome.replace('_', ' ')}"]
    if one.why:
        words.append(one.why)
    for name, before, after in (
        ("legacy", one.legacy_before, one.legacy_after),
        ("ledger", one.ledger_before, one.ledger_after),
    ):
        if before != after:
            words.append(f"{name} {'none' if before is None else before} → {after}")
        elif before is not None and one.outcome in ("reported", "refused"):
            words.append(f"{name} {before}")
    if one.difference:
        words.append(f"difference {one.difference:+f}")
    if one.transaction_id is not None:
        words.append(f"transaction {one.transaction_id}")
    return ", ".join(words)


def _run_line(one: RunFacts) -> str:
    what = (
        f"undoes {one.undoes}"
        if one.undoes
        else f"against {one.truth}" + (f", account {one.account}" if one.account else "")
    )
    amounts = [f"{amount} {currency}" for currency, amount in one.reported_amount.items() if amount]
    reported = f" ({', '.join(amounts)})" if amounts else ""
    undone = f", {one.undone} undone" if one.undone else ""
    others = "".join(f", {one.counts[name]} {name}" for name in _NAMED if one.counts.get(name))
    counted = "" if one.undoes else f": {one.corrected} corrected{undone}{others}{reported}"
    return f"{one.id}  {shown_time(one.started_at)}  {one.mapping} {what}, {one.state}{counted}"
