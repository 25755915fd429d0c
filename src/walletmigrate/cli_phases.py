"""Commands that move the migration: phases, and reads of cohorts."""

from __future__ import annotations

from typing import Annotated

import typer

from walletmigrate import phases
from walletmigrate.commands import command
from walletmigrate.console import Answer, plain, reasons_as_json, reasons_as_lines
from walletmigrate.errors import UsageError
from walletmigrate.flags import READ_FROM_LEDGER
from walletmigrate.invocation import Run, cohort, server_steps
from walletmigrate.phases import FlagChange, PhaseChange
from walletmigrate.standing import REASON, shown_time

_TO = Annotated[str | None, typer.Option("--to", help="The phase to be in after it; being there already is fine.")]
_COHORT = Annotated[str | None, typer.Option("--cohort", metavar="TRAIT=VALUE", help="For example tenant=acme.")]
_EVERYONE = Annotated[bool, typer.Option("--everyone", help="All accounts.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = typer.Typer(help="Where the migration stands: show, advance, back.", no_args_is_help=True)
    command(group, "show", group="phase")(show)
    command(group, "advance", group="phase", changes=True)(advance)
    command(group, "back", group="phase", changes=True)(back)
    app.add_typer(group, name="phase")
    command(app, "cutover", changes=True, confirms=True)(cutover)
    command(app, "rollback", changes=True)(rollback)


def show(run: Run) -> Answer:
    """Say the phase, and what is missing for the next one."""
    with run.engine.connect() as plain_connection:
        connection = plain_connection.execution_options(postgresql_readonly=True)
        state = phases.show(connection, run.settings)
        missing = phases.reasons(connection, run.settings, run.source, state.next) if state.next else []
    since = f" since {shown_time(state.since)}" if state.since else " (the ledger is not installed)"
    lines = [f"{state.phase}{since}"]
    if state.next:
        lines.append(f"the way to {state.next} is " + ("open" if not missing else "closed:"))
    document = {**plain(state), "next": state.next, "previous": state.previous, "reasons": reasons_as_json(missing)}
    return Answer(document, (*lines, *reasons_as_lines(missing)))


def advance(run: Run, to: _TO = None) -> Answer:
    """Go to the next phase, if its gate is met."""
    done = phases.advance(run.engine, run.settings, run.source, run.act(), to=to, dry_run=run.dry_run)
    return _phase_answer(done)


def back(run: Run, to: _TO = None) -> Answer:
    """Go back to the phase before. Never gated; phase frozen is left by unfreeze."""
    return _phase_answer(phases.back(run.engine, run.settings, run.act(), to=to, dry_run=run.dry_run))


def cutover(run: Run, who: _COHORT = None, everyone: _EVERYONE = False) -> Answer:
    """Read a cohort's balances from the ledger, if every account of it is in step."""
    chosen = cohort(who)
    if (chosen is None) != everyone:
        raise UsageError("name exactly one: --cohort tenant=acme, or --everyone")
    act = run.act()
    flags = run.editable_flags(READ_FROM_LEDGER, _by_hand(who, "on"))
    run.confirmed()
    done = phases.cutover(run.engine, run.settings, flags, chosen, act, dry_run=run.dry_run)
    off = [one.value or one.segment for one in done.after.overrides if not one.enabled]
    notes = [f"still off for {', '.join(off)}: an override that is off wins"] if off else []
    return Answer({"flag": plain(done)}, (flag_line(done), *impact_lines(done)), tuple(notes))


def rollback(
    run: Run,
    who: _COHORT = None,
    everyone: _EVERYONE = False,
    exercise: Annotated[bool, typer.Option("--exercise", help="Go back a phase and forward again, on record.")] = False,
) -> Answer:
    """Read balances from legacy again: a cohort's by its flag, everyone's (the default) by flag and phase."""
    chosen = cohort(who)
    if sum((chosen is not None, everyone, exercise)) > 1:
        raise UsageError("name at most one of --cohort, --everyone and --exercise")
    act = run.act()
    if exercise:
        return _exercise(run)
    if chosen is not None:
        run.editable_flags(READ_FROM_LEDGER, _by_hand(who, "off"))
    done = phases.rollback(run.engine, run.settings, run.editor, act, cohort=chosen, dry_run=run.dry_run)
    lines = [_moved(done.phase_before, done.phase_after, dry_run=run.dry_run)] if chosen is None else []
    notes = [f"the flag was not switched: {done.flag_problem}"] if done.flag_problem else []
    if done.flag:
        lines += [flag_line(done.flag), *impact_lines(done.flag)]
    elif run.editor is None:
        notes.append("; ".join(server_steps(run.settings, READ_FROM_LEDGER, _by_hand(None, "off"))))
    return Answer(plain(done), tuple(lines), tuple(notes))


def flag_line(change: FlagChange) -> str:
    """A flag's flip in a sentence."""
    if not change.changed:
        return f"{change.flag} for {change.who}: nothing to change"
    also = f" (moved along: {', '.join(change.also)})" if change.also else ""
    return f"{change.flag} for {change.who}{_flipped(change)}{also}; default {_switch(change.after.default)}" + "".join(
        f", {one.value or one.segment} {_switch(one.enabled)}" for one in change.after.overrides
    )


def impact_lines(change: FlagChange) -> list[str]:
    """What a dry run counted, a line for each mapping."""
    lines = []
    for one in change.impact or ():
        flags = [f"{flag.flag} {flag.on} on, {flag.off} off" for flag in one.flags]
        what = f" ({'; '.join(flags)})" if flags else ""
        lines.append(f"  {one.mapping}: {one.changed} of {one.accounts} accounts would change{what}")
    return lines


def _flipped(change: FlagChange) -> str:
    """What became of the flag for those whom the change names."""
    verb = "would be" if change.dry_run else "is"
    if change.who == "everyone":
        return f" {verb} {_switch(change.after.default)}"
    made = [one for one in change.after.overrides if one not in change.before.overrides]
    if made:
        return f" {verb} {_switch(made[-1].enabled)}"
    return ": override would be removed" if change.dry_run else ": override removed"


def _exercise(run: Run) -> Answer:
    done = phases.exercise(run.engine, run.settings, run.source, run.act(), dry_run=run.dry_run)
    said = "would go" if done.dry_run else "went"
    note = f"accounts written in between may be stale: walletmigrate backfill {REASON}"
    return Answer(
        {"exercise": plain(done)},
        (f"{said} from {done.phase} to {done.through} and to {done.phase} again",),
        () if done.dry_run else (note,),
    )


def _phase_answer(done: PhaseChange) -> Answer:
    return Answer(plain(done), (_moved(done.before, done.after, dry_run=done.dry_run),))


def _moved(before: str, after: str, *, dry_run: bool) -> str:
    if before == after:
        return f"the phase is {after}, as it was"
    return f"the phase {'would go' if dry_run else 'went'} from {before} to {after}"


def _switch(enabled: bool) -> str:
    return "on" if enabled else "off"


def _by_hand(who: str | None, switch: str) -> str:
    if who is None:
        return f"switch it {switch} for the environment"
    return f"switch it {switch} in the override of the segment {who} (make the segment if need be)"
