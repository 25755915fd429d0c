"""Commands that bring the ledger into a database, and a place to try them."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from walletmigrate import proposal, retired
from walletmigrate.commands import command
from walletmigrate.console import Answer, plain
from walletmigrate.errors import UsageError
from walletmigrate.install import InstallResult
from walletmigrate.install import install as install_ledger
from walletmigrate.install import uninstall as uninstall_ledger
from walletmigrate.invocation import Run, wait_for_the_end
from walletmigrate.standing import REASON
from walletmigrate.starter import write_configuration

if TYPE_CHECKING:
    from walletmigrate.sandbox import Sandbox


def register(app: typer.Typer) -> None:
    """Add the commands."""
    command(app, "init", role="none")(init)
    command(app, "install", changes=True, role="installer")(install)
    command(app, "uninstall", changes=True, confirms=True, role="installer")(uninstall)
    command(app, "sandbox", role="none")(sandbox)


def init(
    run: Run,
    table: Annotated[str | None, typer.Option(help="Legacy table, as schema.table. Default: the likeliest.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Write the file anew if it exists.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the file instead of writing it.")] = False,
) -> Answer:
    """Look at the database and write a configuration for it."""
    path = run.config_path
    if path.exists() and not (force or dry_run):
        raise UsageError(f"{path} exists already: pass --force to write it anew, or --config for another")
    with run.connected(run.url).connect() as plain_connection:
        connection = plain_connection.execution_options(postgresql_readonly=True)
        found = proposal.survey(connection, table)
        text = proposal.render(found, proposal.facts(connection))
    asked = proposal.questions(found)
    document = {
        "file": path,
        "written": not dry_run,
        "tables": [f"{one.schema}.{one.table}" for one in found],
        "questions": list(asked),
    }
    if dry_run:
        return Answer({**document, "content": text}, tuple(text.splitlines()), asked)
    made = write_configuration(path, text, replace=force)
    lines = [f"wrote {path}" + (" and flags/environment.json beside it" if made else "")]
    lines += [f"  ? {question}" for question in asked]
    lines.append(f"Read it, then: walletmigrate install{_with_config(run)} --reason '…'")
    return Answer(document, tuple(lines))


def install(
    run: Run,
    grant_to: Annotated[
        list[str] | None,
        typer.Option(metavar="ROLE", help="The role that the application logs in with. Can be repeated."),
    ] = None,
) -> Answer:
    """Make the ledger's schema, its functions, the roles and the fence. Idempotent."""
    act = run.act()
    done = install_ledger(run.engine, run.settings, act, dry_run=run.dry_run, grant_to=grant_to or ())
    document = {
        "schema": done.schema,
        "revision": done.revision,
        "mappings": done.mappings,
        "fences_made": done.fences_made,
        "granted_to": done.granted_to,
        "mended": done.mended,
        "phase": done.phase,
        "dry_run": done.dry_run,
        "unconvertible": [
            {"mapping": mapping, "key": key, "column": column, "value": value}
            for mapping, key, column, value in done.unconvertible
        ],
    }
    return Answer(document, tuple(_install_lines(run, done)), exit_code=4 if done.unconvertible else 0)


def uninstall(
    run: Run,
    drop_ledger: Annotated[
        bool, typer.Option("--drop-ledger", help="Drop the ledger too, with its journal and audit log.")
    ] = False,
) -> Answer:
    """Take the fence and the functions out. The journal stays unless --drop-ledger. Idempotent."""
    act = run.act()
    run.confirmed()
    uninstall_ledger(run.engine, run.settings, act, drop_ledger=drop_ledger, dry_run=run.dry_run)
    said = "would be taken out" if run.dry_run else "is out"
    what = "the ledger with its journal" if drop_ledger else "the fence (the journal stays)"
    document = {"schema": run.settings.ledger_schema, "dropped_ledger": drop_ledger, "dry_run": run.dry_run}
    return Answer(document, (f"{what} {said}: the adapter writes legacy alone",))


def sandbox(
    run: Run,
    folder: Annotated[Path, typer.Argument(help="Where its files go.")] = Path("walletmigrate-sandbox"),
    rows: Annotated[int, typer.Option(min=1, max=1_000_000, help="How many users.")] = 1000,
    empty: Annotated[
        bool, typer.Option("--empty", help="No table and no files: for an application that makes its own.")
    ] = False,
) -> Answer:
    """Run a scratch database with a legacy table, to try every command on. Ctrl-C ends it."""
    from walletmigrate.sandbox import sandbox as running

    with running(None if empty else folder, rows) as made:
        document = {**plain(made), "running": True}
        wait_for_the_end(run, Answer(document, (*_sandbox_lines(made), "Ctrl-C ends it, and removes the database.")))
    return Answer({}, printed=True)


def _sandbox_lines(made: Sandbox) -> tuple[str, ...]:
    if made.folder is None:
        return (f"PostgreSQL {made.postgres_version}, an empty database: {made.url}",)
    return (
        f"PostgreSQL {made.postgres_version} with {made.rows} users: {made.url}",
        f"In another terminal:  cd {shlex.quote(str(made.folder))}",
        "  walletmigrate status",
        "  walletmigrate install --reason 'a first look'",
        "  walletmigrate phase advance --reason 'a first look'",
        "  walletmigrate flags set wallet.dualWrite on --everyone --reason 'a first look'",
        "  walletmigrate backfill --reason 'a first look'",
        "  walletmigrate verify",
    )


def _with_config(run: Run) -> str:
    return "" if run.config_path == Path("walletmigrate.toml") else f" --config {shlex.quote(str(run.config_path))}"


def _install_lines(run: Run, done: InstallResult) -> list[str]:
    if done.unconvertible:
        lines = [f"{mapping}: {column} of {key} holds {value}" for mapping, key, column, value in done.unconvertible]
        return [*lines, f"{len(lines)} values are no exact amounts: install will be refused until they are mended"]
    if done.dry_run:
        return [*_views(run), f"install can go ahead: schema {done.schema}, revision {done.revision}"]
    fences = f"made the fence of {', '.join(done.fences_made)}" if done.fences_made else "every fence stood already"
    lines = [f"the ledger stands in schema {done.schema}, revision {done.revision}; {fences}"]
    if done.granted_to:
        lines.append(f"{', '.join(done.granted_to)} may post: member of {run.settings.roles.app}")
    if done.mended:
        lines.append(f"the fence of {', '.join(done.mended)} was down, and writes may have gone past it")
        return [*lines, f"next: walletmigrate verify --mark-stale {REASON}"]
    return [*lines, "next: walletmigrate " + (f"phase advance {REASON}" if done.phase == "legacy" else "status")]


def _views(run: Run) -> list[str]:
    """What is known of the mapped tables, for a dry run."""
    lines = []
    with run.engine.connect() as connection:
        for mapping in run.settings.mappings:
            table = retired.legacy_table(connection, run.settings.ledger_schema, mapping)
            kinds = ", ".join(f"{one.name} {one.sql_type}" for one in table.columns)
            lines.append(f"{mapping.name}: {mapping.table}, key {mapping.key} ({table.key_sql_type}), {kinds}")
    return lines
