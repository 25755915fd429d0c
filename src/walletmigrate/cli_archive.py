"""Commands of the migration's end: the archive, its proof, the column's retirement, a backfill taken back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from walletmigrate import archive_check, evidence_check
from walletmigrate import retire as retirement
from walletmigrate.archive_check import ArchiveCheck
from walletmigrate.commands import below, command
from walletmigrate.console import DIFFERENCE, OK, Answer, plain
from walletmigrate.errors import UsageError
from walletmigrate.evidence import gather
from walletmigrate.invocation import Run

_SHOWN = 20


def register(app: typer.Typer) -> None:
    """Add the commands."""
    command(app, "archive", changes=True)(archive)
    command(below(app, "archive"), "check", group="archive")(check)
    command(app, "evidence")(evidence)
    command(below(app, "evidence"), "check", group="evidence")(check_evidence)
    command(app, "retire", changes=True, confirms=True, role="installer")(retire)


def archive(
    run: Run,
    to: Annotated[Path, typer.Option("--to", metavar="FILE", help="The file to make: gzipped JSON lines.")],
    mapping: Annotated[str | None, typer.Option("--mapping", help="Which, where there are several.")] = None,
) -> Answer:
    """Write the legacy balances to a file, and prove it against the ledger. Exit 3 if it does not prove."""
    chosen = run.mappings(mapping)
    if len(chosen) > 1:
        raise UsageError(f"an archive is of one mapping: add --mapping, one of {', '.join(m.name for m in chosen)}")
    act = run.act()
    with run.unwinding():
        made, checked = archive_check.archive(run.engine, run.settings, chosen[0], to, act, dry_run=run.dry_run)
    verb = "would write" if run.dry_run else "wrote"
    lines = [f"{verb} {made.rows} rows of {made.mapping}, as of {made.taken_at:%Y-%m-%d %H:%M:%S %Z}, to {made.path}"]
    lines += [f"  {one.column}: total {one.total}, {one.nulls} empty, SHA-256 {one.sha256}" for one in made.columns]
    document = {"archive": plain(made), "check": plain(checked)}
    if checked is None:
        return Answer(document, tuple(lines))
    lines += [f"  file: {made.bytes} bytes, SHA-256 {made.sha256}", *_proof(checked)]
    return Answer(document, tuple(lines), (), OK if checked.proven else DIFFERENCE)


def check(
    run: Run,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="An archive.")],
    no_database: Annotated[bool, typer.Option("--no-database", help="Look at the file's own sums alone.")] = False,
) -> Answer:
    """Prove an archive against the ledger's journal of its moment, however much was posted since."""
    checked = archive_check.check(None if no_database else run.engine, run.settings, file)
    good = checked.proven or (no_database and not checked.problem_count)
    return Answer({"check": plain(checked)}, tuple(_proof(checked, no_database)), (), OK if good else DIFFERENCE)


def evidence(
    run: Run, to: Annotated[Path, typer.Option("--to", metavar="FOLDER", help="A folder, new or empty.")]
) -> Answer:
    """Write down how the migration stands, for an auditor: a folder with checksums. Exit 3 if it is not clean."""
    made = gather(run.engine, run.settings, run.source, to)
    verdict = "clean" if made.clean else "NOT CLEAN"
    lines = [f"{made.folder}: {verdict}, phase {made.phase}, {made.transactions} transactions, {made.audit_rows} acts"]
    return Answer({"evidence": plain(made)}, tuple(lines), (), OK if made.clean else DIFFERENCE)


def check_evidence(
    run: Run,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="What evidence wrote.")],
    with_database: Annotated[
        bool, typer.Option("--with-database", help="Also hold it against the configured database.")
    ] = False,
) -> Answer:
    """Check evidence again, on any machine. Exit 3 where something is not as it was written."""
    found = evidence_check.check(folder, *((run.engine, run.settings) if with_database else ()))
    how = "intact, and as the database has it" if with_database else "intact"
    lines = [f"{found.folder}, of {found.made_at}: {how if found.intact else f'{len(found.problems)} problems'}"]
    lines += [f"  {problem}" for problem in found.problems[:_SHOWN]]
    if found.intact and not found.clean:
        lines.append("  its verification was not clean")
    return Answer({"check": plain(found)}, tuple(lines), (), OK if found.intact else DIFFERENCE)


def retire(
    run: Run,
    archives: Annotated[list[Path], typer.Option("--archive", metavar="FILE", help="One for each mapping.")],
    migrations: Annotated[Path, typer.Option("--migrations", metavar="FOLDER", help="Alembic's versions, yours.")],
    down_revision: Annotated[str | None, typer.Option(help="The revision to follow. Default: the only head.")] = None,
) -> Answer:
    """Make the migration that drops the balance columns, and do without them from now on."""
    act = run.act()
    run.confirmed()
    done = retirement.retire(
        *(run.engine, run.settings, run.source, archives, migrations, act),
        down_revision=down_revision,
        dry_run=run.dry_run,
    )
    would = "would be " if run.dry_run else ""
    lines = [
        f"the phase {'would go' if run.dry_run else 'went'} from {done.before} to {done.after}"
        if done.before != done.after
        else f"the phase is {done.after}, as it was",
        f"{would}written: {done.migration}, after {done.down_revision or 'no other'}",
    ]
    notes = [] if run.dry_run else ["next: deploy what does without the columns, then: alembic upgrade head"]
    return Answer({"retirement": plain(done)}, tuple(lines), tuple(notes))


def _proof(checked: ArchiveCheck, alone: bool = False) -> list[str]:
    if checked.proven:
        return [f"proven: {checked.rows} rows agree with the journal as of {checked.taken_at}"]
    if alone and not checked.problem_count:
        return [f"{checked.rows} rows come to the sums in the file; without a ledger that proves no more"]
    lines = [f"NOT PROVEN: {checked.problem_count} problems"]
    for one in checked.problems[:_SHOWN]:
        where = f"{one.key} ({one.column}): " if one.key else f"{one.column}: " if one.column else ""
        figures = f": archived {one.archived}, ledger {one.ledger}" if one.archived or one.ledger else ""
        lines.append(f"  {where}{one.problem}{figures}")
    return lines
