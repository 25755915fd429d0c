"""Commands that look at flags and switch them in the flag file."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer

from walletmigrate import phases
from walletmigrate.cli_phases import flag_line
from walletmigrate.commands import command
from walletmigrate.console import Answer, plain
from walletmigrate.flag_edits import FlagState, doubts
from walletmigrate.flag_sources import DocumentSnapshot, check
from walletmigrate.invocation import Run, cohort
from walletmigrate.standing import flag_states


class Switch(StrEnum):
    """What becomes of a flag: on, off, or its override removed."""

    ON = "on"
    OFF = "off"
    REMOVE = "remove"


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = typer.Typer(help="Who has which flag: list, set.", no_args_is_help=True)
    command(group, "list", group="flags")(list_flags)
    command(group, "set", group="flags", changes=True)(set_flag)
    app.add_typer(group, name="flags")


def list_flags(run: Run) -> Answer:
    """Say who has which flag, and what is doubtful. Needs no database."""
    check(run.source)
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
    who: Annotated[str | None, typer.Option("--cohort", metavar="TRAIT=VALUE", help="For example tenant=acme.")] = None,
    percent: Annotated[int | None, typer.Option(help="1 to 100 percent, the same for all flags.")] = None,
    percent_of: Annotated[str | None, typer.Option(help="Percent of the values of this trait.")] = None,
    account: Annotated[str | None, typer.Option(help="One account, by its key.")] = None,
    everyone: Annotated[bool, typer.Option("--everyone", help="The default, for all accounts.")] = False,
    no_audit: Annotated[
        bool, typer.Option("--no-audit", help="Switch it without a database, and without an audit row.")
    ] = False,
) -> Answer:
    """Switch a flag for a cohort, a percentage, an account or everyone, with an audit row.

    Without a database to write the audit row to, nothing is switched, unless --no-audit says so.
    """
    act = run.act()
    file = run.editable_flags(flag, f"switch it {switch.value} for {who or account or percent or 'the environment'}")
    chosen: dict[str, Any] = {
        "trait": cohort(who),
        "percent": percent,
        "percent_of": percent_of,
        "account": account,
        "everyone": everyone,
    }
    wanted = None if switch is Switch.REMOVE else switch is Switch.ON
    engine = None if no_audit or run.dry_run else run.engine
    done = phases.set_flag(engine, run.settings, file, flag, wanted, act, dry_run=run.dry_run, **chosen)
    notes = list(file.validate())
    if done.changed and engine is None and not run.dry_run:
        notes.append("no audit row was left: say elsewhere who did this and why")
    return Answer({"flag": plain(done)}, (flag_line(done),), tuple(notes))


def flag_text(state: FlagState) -> str:
    """A flag in one line."""
    who = [f"{one.value or one.segment} {'on' if one.enabled else 'off'} ({one.kind})" for one in state.overrides]
    return f"  {state.flag}: {'on' if state.default else 'off'} for everyone" + (f"; {', '.join(who)}" if who else "")
