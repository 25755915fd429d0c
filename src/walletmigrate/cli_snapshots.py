"""Commands that take, prove, list and prune snapshots of all balances."""

from __future__ import annotations

from typing import Annotated

import typer

from walletmigrate import checksums, snapshot_checks, snapshots
from walletmigrate.commands import command
from walletmigrate.console import CUT_SHORT, DIFFERENCE, INTERRUPTED, OK, STOPPED, Answer, job_code, plain
from walletmigrate.invocation import Run
from walletmigrate.job_options import EVERYTHING
from walletmigrate.job_rows import newest
from walletmigrate.snapshot_checks import SnapshotProblem
from walletmigrate.snapshots import Snapshot
from walletmigrate.standing import shown_time

_BATCH = Annotated[int, typer.Option("--batch-size", min=1, max=1_000_000, help="Rows in one transaction.")]
_SHOWN = 20


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = typer.Typer(no_args_is_help=True, help="All balances at one point: taken, proved, pruned.")
    app.add_typer(group, name="snapshot")
    command(group, "take", group="snapshot", changes=True)(take)
    command(group, "verify", group="snapshot", changes=True)(verify)
    command(group, "list", group="snapshot")(list_)
    command(group, "prune", group="snapshot", changes=True)(prune)


def take(run: Run, batch_size: _BATCH = 20_000) -> Answer:
    """Take a snapshot of all balances, or finish the one that was begun. Locks nothing. Resumable."""
    act = run.act()
    with run.interruptible():
        made = snapshots.take(run.engine, run.settings, act, batch_size=batch_size, dry_run=run.dry_run, stop=run.stop)
    document = {"snapshot": plain(made), "dry_run": run.dry_run}
    if run.dry_run:
        said = "would begin a snapshot" if made is None else f"would go on with snapshot {made.id}"
        return Answer(document, (said,))
    assert made is not None
    if made.state == "running":
        with run.engine.connect() as connection:
            job = newest(connection, run.settings, snapshots.TAKE, EVERYTHING)
        code = job_code([job.state if job else "paused"], INTERRUPTED)
        note = STOPPED if code == INTERRUPTED else CUT_SHORT
        return Answer({**document, "interrupted": code == INTERRUPTED}, (_line(made),), (note,), code)
    with run.engine.connect() as connection:
        totals = snapshots.totals(connection, run.settings, made)
    lines = [_line(made)]
    lines += [f"  {one.mapping} {one.bucket} {one.currency}: {one.balance:f}, {one.changed} changed" for one in totals]
    return Answer({**document, "totals": plain(totals)}, tuple(lines))


def verify(
    run: Run,
    snapshot: Annotated[int | None, typer.Argument(min=1, help="Its number. Default: the newest.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=1_000_000, help="How many problems to list.")] = 1000,
    batch_size: _BATCH = 20_000,
) -> Answer:
    """Prove a snapshot against the whole journal. Exit 3 when it is not what the journal says."""
    act = run.act("a snapshot's verification")
    with run.unwinding():
        found = snapshot_checks.verify(
            *(run.engine, run.settings, act),
            snapshot_id=snapshot,
            limit=limit,
            batch_size=batch_size,
            dry_run=run.dry_run,
        )
    verdict = "clean" if found.clean else f"NOT CLEAN, {found.found} problems"
    lines = [f"snapshot {found.snapshot.id}: {verdict}, {found.accounts} accounts in {found.seconds:.1f} s"]
    lines += [f"  {one.problem}: {_told(one)}" for one in found.problems[:_SHOWN]]
    notes = [] if found.clean else ["see runbooks/balance-drift.md"]
    if found.unchecked:
        notes.append(
            f"{found.unchecked} transactions have no checksum, edits of these would not be seen: docs/history.md"
        )
    return Answer(plain(found), tuple(lines), tuple(notes), OK if found.clean else DIFFERENCE)


def _told(one: SnapshotProblem) -> str:
    if one.first_id is not None:
        ids = f"transactions {one.first_id} to {one.first_id + checksums.RANGE - 1}"
        window = "" if one.window is None else f" of snapshot {one.window}"
        return f"{ids}{window} are not the rows that were folded: {one.expected} now, {one.found} then"
    place = " ".join(str(part) for part in (one.mapping, one.key or one.account, one.bucket) if part is not None)
    return f"{place}: the journal says {one.expected}, kept is {one.found}"


def list_(run: Run) -> Answer:
    """All snapshots, newest first."""
    with run.engine.connect() as connection:
        found = snapshots.listing(connection, run.settings)
    lines = [_line(one) for one in found] or ["no snapshot yet: walletmigrate snapshot take --reason '…'"]
    return Answer({"snapshots": plain(found)}, tuple(lines))


def prune(
    run: Run,
    keep: Annotated[int, typer.Option("--keep", help="How many of the newest to keep.")],
    batch_size: _BATCH = 20_000,
) -> Answer:
    """Merge old snapshots into the oldest that is kept. No balance of any time is lost."""
    done = snapshots.prune(run.engine, run.settings, run.act(), keep=keep, batch_size=batch_size, dry_run=run.dry_run)
    word = "would prune" if run.dry_run else "pruned"
    names = ", ".join(str(one) for one in done.pruned) or "none"
    return Answer(plain(done), (f"{word} snapshots: {names}; kept: {len(done.kept)}",))


def _line(one: Snapshot) -> str:
    proof = {None: "not verified", True: "verified", False: "NOT CLEAN"}[one.verified_clean]
    counts = f"{one.accounts} accounts, {one.changed} changed by {one.transactions} transactions"
    return f"snapshot {one.id}: {one.state}, {shown_time(one.taken_at)}, {counts}, {proof}"
