"""Commands that look at flags, and switch them in the flag file or on the flag server."""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from typing import Annotated, Any

import typer
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

from walletmigrate import phases
from walletmigrate.cli_phases import flag_line, impact_lines
from walletmigrate.commands import command
from walletmigrate.console import Answer, plain
from walletmigrate.errors import (
    ConfigError,
    DatabaseUnreachable,
    InvalidKey,
    PreconditionRefused,
    UnknownAccount,
    UsageError,
)
from walletmigrate.explain import Explanation, Pocket, known
from walletmigrate.explain import explain as explain_account
from walletmigrate.flag_doubts import doubtful, doubts
from walletmigrate.flag_edits import FlagState
from walletmigrate.flag_sources import DocumentSnapshot
from walletmigrate.flag_sources import check as check_source
from walletmigrate.flags import NO_DOCUMENT, Document
from walletmigrate.invocation import KEYS, Run, cohort
from walletmigrate.job_rows import said
from walletmigrate.phases import FlagChange
from walletmigrate.standing import flag_states


class Switch(StrEnum):
    """What becomes of a flag: on, off, or its override removed."""

    ON = "on"
    OFF = "off"
    REMOVE = "remove"


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = typer.Typer(help="Who has which flag, and why: list, set, check, explain.", no_args_is_help=True)
    command(group, "list", group="flags", role="none")(list_flags)
    command(group, "set", group="flags", changes=True)(set_flag)
    command(group, "check", group="flags", role="none")(check)
    command(group, "explain", group="flags")(explain)
    app.add_typer(group, name="flags")


def list_flags(run: Run) -> Answer:
    """Say who has which flag, and what is doubtful. Needs no database."""
    check_source(run.source)
    snapshot = run.source.snapshot()
    states = flag_states(run.source)
    found = (
        list(doubts(snapshot.document.content)) if isinstance(snapshot, DocumentSnapshot) and snapshot.document else []
    )
    document = {
        "source": snapshot.source,
        "document_id": snapshot.document_id,
        "age_seconds": snapshot.age_seconds(),
        "flags": plain(states),
        "doubts": found,
    }
    return Answer(document, (snapshot.source, *(flag_text(state) for state in states)), tuple(found))


def set_flag(
    run: Run,
    flag: Annotated[str, typer.Argument(help="For example wallet.dualWrite.")],
    switch: Annotated[Switch, typer.Argument(help="remove ends the override, so that everyone's state holds.")],
    tenant: Annotated[str | None, typer.Option(help="Short for --cohort tenant=…")] = None,
    who: Annotated[
        str | None, typer.Option("--cohort", metavar="TRAIT=VALUE|SEGMENT", help="For example tenant=acme, or beta.")
    ] = None,
    percent: Annotated[int | None, typer.Option(help="1 to 100 percent, the same for all flags.")] = None,
    percent_of: Annotated[str | None, typer.Option(help="Percent of the values of this trait.")] = None,
    account: Annotated[str | None, typer.Option(help="One account, by its key.")] = None,
    everyone: Annotated[bool, typer.Option("--everyone", help="The default, for all accounts.")] = False,
    no_audit: Annotated[
        bool, typer.Option("--no-audit", help="Switch it without a database, and without an audit row.")
    ] = False,
) -> Answer:
    """Switch a flag for a cohort, a percentage, an account or everyone, with an audit row.

    Without a database to write the audit row to, nothing is switched, unless --no-audit says so. A dry run counts
    the accounts that would change.
    """
    act = run.act()
    who = _cohort(tenant, who)
    flags = run.editable_flags(flag, f"switch it {switch.value} for {who or account or percent or 'the environment'}")
    named = who is not None and "=" not in who
    chosen: dict[str, Any] = {
        "trait": None if named else cohort(who),
        "segment": who if named else None,
        "percent": percent,
        "percent_of": percent_of,
        "account": account,
        "everyone": everyone,
    }
    wanted = None if switch is Switch.REMOVE else switch is Switch.ON
    engine = None if no_audit else _database(run)
    # An override is removed whatever its key: that is how one gets rid of a key that is none.
    unknown = [] if account is None or wanted is None else list(_unknown(run, engine, account))
    done = phases.set_flag(engine, run.settings, flags, flag, wanted, act, dry_run=run.dry_run, **chosen)
    notes = [*_unmatched(run, chosen["trait"], percent_of), *unknown, *flags.validate(), *_remarks(run, done)]
    return Answer({"flag": plain(done)}, (flag_line(done), *impact_lines(done)), tuple(notes))


def check(run: Run) -> Answer:
    """Look for what is wrong with the flags: names, reads without writes, contradictions, a broken document.

    With an admin key of a flag server, that is tried as well. Needs no database.
    """
    check_source(run.source)
    snapshot = run.source.snapshot()
    document = snapshot.document if isinstance(snapshot, DocumentSnapshot) else None
    found = [*doubtful(document.content), *_foreign_traits(run, document)] if document else []
    if found:
        raise PreconditionRefused("flags check", found)
    lines = [f"{snapshot.source}: all three flags are known, and nothing contradicts"]
    if run.editor is None:
        lines.append(f"flags are only read: to switch them from here, set {KEYS}")
    else:
        run.editor.read()
    answer = {"source": snapshot.source, "document_id": snapshot.document_id, "writable": run.editor is not None}
    return Answer(answer, tuple(lines))


def explain(
    run: Run,
    account: Annotated[str, typer.Argument(help="The account's key.")],
    mapping: Annotated[str | None, typer.Option(help="The mapping, where there are several.")] = None,
) -> Answer:
    """Say where one account is read and written, and why: its flags, phase, line and state."""
    found = run.mappings(mapping)
    if len(found) != 1:
        names = ", ".join(one.name for one in found) or "none"
        raise UsageError(f"say which mapping: --mapping, one of {names}")
    try:
        with run.engine.connect() as plain_connection:
            connection = plain_connection.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
            told = explain_account(connection, run.settings, found[0], run.source, account)
    except (InvalidKey, UnknownAccount) as error:
        raise UsageError(str(error)) from None
    if told.document_id == NO_DOCUMENT:
        # Not "everything is off": running programs go on with what they had.
        check_source(run.source)
    return Answer(plain(told), tuple(_told(told)), (told.problem,) if told.problem else ())


def flag_text(state: FlagState) -> str:
    """A flag in one line."""
    who = [f"{one.value or one.segment} {'on' if one.enabled else 'off'} ({one.kind})" for one in state.overrides]
    return f"  {state.flag}: {'on' if state.default else 'off'} for everyone" + (f"; {', '.join(who)}" if who else "")


def _database(run: Run) -> Engine | None:
    """Where the audit row goes, and where a dry run counts: that one alone can do without."""
    try:
        return run.engine
    except (ConfigError, DatabaseUnreachable):
        if not run.dry_run:
            raise
        return None


def _cohort(tenant: str | None, who: str | None) -> str | None:
    if tenant is None:
        return who
    if who is not None:
        raise UsageError("name one of --tenant and --cohort")
    return f"tenant={tenant}"


def _unmatched(run: Run, trait: tuple[str, str] | None, percent_of: str | None) -> Iterator[str]:
    """A trait that no mapping has is looked for in vain."""
    name = trait[0] if trait else percent_of
    if name is not None and all(name not in mapping.traits for mapping in run.settings.mappings):
        yield f"no mapping has the trait {name}: unless the application passes it, nobody is meant by it"


def _unknown(run: Run, engine: Engine | None, account: str) -> Iterator[str]:
    """An account that nobody has is asked for in vain. Raises UsageError for a key that no account can have."""
    if engine is None:
        yield f"account {account} was not looked for: there is no database to look in"
        return
    try:
        with engine.connect() as connection:
            found = known(connection, run.settings, account)
    except InvalidKey as error:
        raise UsageError(str(error)) from None
    except (ConfigError, DBAPIError) as error:
        # A table that is locked, or changed, keeps nobody from switching an account off.
        yield f"account {account} was not looked for: {said(error)}"
        return
    if not found and run.settings.mappings:
        yield f"no mapping has the account {account} now: until one has, nobody is meant by it"


def _foreign_traits(run: Run, document: Document) -> Iterator[tuple[str, str]]:
    known = {name for mapping in run.settings.mappings for name in mapping.traits}
    for name in document.traits:
        if name not in known and run.settings.mappings:
            yield (
                f"a segment looks at the trait {name}, which no mapping has",
                "add it to `traits` in the configuration",
            )


def _remarks(run: Run, done: FlagChange) -> Iterator[str]:
    if not run.dry_run:
        if done.changed and done.audit_id is None:
            yield "no audit row was left: say elsewhere who did this and why"
        return
    if done.impact is None:
        yield "the accounts that would change were not counted: there is no database to count in"
        return
    stood = {override.segment for override in done.before.overrides}
    made = [one for one in done.after.overrides if one.kind == "percent" and one.segment not in stood]
    if made and run.settings.flags.source == "flagsmith":
        yield "whom a percentage picks follows from its segment's id, which the server gives: the count is an estimate"


def _told(told: Explanation) -> Iterator[str]:
    traits = ", ".join(f"{name}={value}" for name, value in told.traits.items()) or "no traits"
    yield f"account {told.key} of {told.mapping}: {traits}"
    yield f"phase {told.phase}, the line {'runs' if told.line_running else 'is stopped'}; flags from {told.source}"
    for flag in told.flags:
        but = f"; it does not count: {flag.why_not}" if flag.why_not else ""
        yield f"  {flag.flag}: {'on' if flag.on else 'off'}, from {flag.cause}{but}"
    for pocket in told.pockets:
        yield f"  {pocket.bucket}, {pocket.currency}: {pocket.state}{_balances(pocket)}"
        yield f"    reads: {pocket.reads}, because {pocket.reads_because}"
        yield f"    writes: {pocket.writes}, because {pocket.writes_because}"


def _balances(pocket: Pocket) -> str:
    both = (("legacy", pocket.legacy_balance), ("ledger", pocket.ledger_balance))
    said = ", ".join(f"{name} {balance:f}" for name, balance in both if balance is not None)
    return f"; {said}" if said else ""
