"""The phase machine: one step at a time, forward through a gate, back at any time, each on record.

The flag functions take a `FlagEditor`: the file, or a Flagsmith server through its Admin API.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import DBAPIError

from walletmigrate.audit import Act, record
from walletmigrate.census import Cohort
from walletmigrate.config import Settings
from walletmigrate.cutovers import cohort_reasons
from walletmigrate.dependents import the_step
from walletmigrate.errors import PreconditionRefused, UsageError
from walletmigrate.flag_editor import FLAG_PROBLEMS, FlagEditor
from walletmigrate.flags import READ_FROM_LEDGER, FlagSource
from walletmigrate.flips import FlagChange, flip, set_flag
from walletmigrate.gates import reasons
from walletmigrate.job_rows import said
from walletmigrate.retire import reinstate
from walletmigrate.schema import quoted
from walletmigrate.standing import PHASES, REASON, PhaseState, confirmation, reached, require_installed, show

__all__ = [
    "PHASES",
    "Exercise",
    "FlagChange",
    "PhaseChange",
    "PhaseState",
    "Rollback",
    "advance",
    "back",
    "cutover",
    "enter_frozen",
    "exercise",
    "leave_frozen",
    "reasons",
    "rollback",
    "set_flag",
    "show",
]


RETIRED = (
    "the legacy column is retired: the ledger alone is true",
    f"while the column stands: walletmigrate phase back {REASON}",
)


@dataclass(frozen=True)
class PhaseChange:
    """One step of the phase. ``audit_id`` is None where nothing was changed."""

    before: str
    after: str
    changed: bool
    dry_run: bool
    audit_id: int | None


@dataclass(frozen=True)
class Rollback:
    """Reads back to legacy. ``flag`` is None where the flag was not switched; ``flag_problem`` says what kept
    it from being switched.
    """

    phase_before: str
    phase_after: str
    flag: FlagChange | None
    flag_problem: str | None
    changed: bool
    dry_run: bool


@dataclass(frozen=True)
class Exercise:
    """The way back, tried: from ``phase`` to ``through`` and to ``phase`` again."""

    phase: str
    through: str
    dry_run: bool
    audit_ids: tuple[int, ...]


def advance(
    engine: Engine,
    settings: Settings,
    source: FlagSource,
    act: Act,
    *,
    to: str | None = None,
    dry_run: bool = False,
) -> PhaseChange:
    """Go to the next phase. With ``to``, a phase that is reached already is no error.

    Raises PreconditionRefused with every reason at once.
    """
    with engine.begin() as connection:
        state = show(connection, settings)
        if to is not None and reached(state.phase, _known(to)):
            return PhaseChange(state.phase, state.phase, False, dry_run, None)
        target = state.next
        if target is None:
            raise PreconditionRefused("a further phase", [("retired is the last phase", "")])
        found = reasons(connection, settings, source, target)
        if to not in (None, target):
            found.insert(
                0, (f"the phase is {state.phase}: one step at a time", f"walletmigrate phase advance {REASON}")
            )
        if target == "frozen":
            freeze = f"walletmigrate freeze --confirm {confirmation(settings)} {REASON}"
            found.append(("accounts are frozen one by one, by a job of its own", freeze))
        if target == "retired":
            found.append(the_step(settings))
        if found:
            raise PreconditionRefused(f"phase {target}", found)
        now = _locked(connection, settings, state, target)
        if now.phase == target:
            return PhaseChange(target, target, False, dry_run, None)
        return _move(connection, settings, "phase advance", state.phase, target, act, dry_run=dry_run)


def back(engine: Engine, settings: Settings, act: Act, *, to: str | None = None, dry_run: bool = False) -> PhaseChange:
    """Go to the phase before, ungated. With ``to``, a phase that is left already is no error.

    Raises PreconditionRefused in phase legacy, before which there is none, frozen, which `unfreeze` leaves, and
    retired where the column is gone.
    """
    with engine.begin() as connection:
        retired = show(connection, settings).phase == "retired" and to != "retired"
    if retired and to in (None, "frozen"):
        return PhaseChange("retired", "frozen", True, dry_run, reinstate(engine, settings, act, dry_run=dry_run))
    with engine.begin() as connection:
        state = show(connection, settings, lock=True)
        if to is not None and reached(_known(to), state.phase):
            return PhaseChange(state.phase, state.phase, False, dry_run, None)
        if state.previous is None:
            mend = f"walletmigrate uninstall --confirm {confirmation(settings)} {REASON}"
            raise PreconditionRefused("a step back", [("legacy is the first phase", mend if state.installed else "")])
        _not_frozen(settings, state, "a step back")
        if to not in (None, state.previous):
            what = f"the phase is {state.phase}: one step at a time"
            raise PreconditionRefused(f"phase {to}", [(what, f"walletmigrate phase back {REASON}")])
        return _move(connection, settings, "phase back", state.phase, state.previous, act, dry_run=dry_run)


def enter_frozen(
    engine: Engine, settings: Settings, source: FlagSource, act: Act, *, dry_run: bool = False
) -> PhaseChange:
    """Put the phase to frozen, before any account is: new accounts open frozen from then on. Idempotent.

    Raises PreconditionRefused with every reason at once.
    """
    with engine.begin() as connection:
        state = show(connection, settings)
        if reached(state.phase, "frozen"):
            return PhaseChange(state.phase, state.phase, False, dry_run, None)
        found = reasons(connection, settings, source, "frozen")
        if state.phase != "wallet_only":
            found.insert(0, (f"the phase is {state.phase}, not wallet_only", f"walletmigrate phase advance {REASON}"))
        if found:
            raise PreconditionRefused("freeze", found)
        if _locked(connection, settings, state, "frozen").phase == "frozen":
            return PhaseChange("frozen", "frozen", False, dry_run, None)
        return _move(connection, settings, "freeze", state.phase, "frozen", act, dry_run=dry_run)


def leave_frozen(engine: Engine, settings: Settings, act: Act, *, dry_run: bool = False) -> PhaseChange:
    """Put the phase to wallet_only, before any account is unfrozen. Never gated, and idempotent."""
    with engine.begin() as connection:
        require_installed(connection, settings)
        state = show(connection, settings, lock=True)
        if state.phase == "retired":
            raise PreconditionRefused("unfreeze", [RETIRED])
        if state.phase != "frozen":
            return PhaseChange(state.phase, state.phase, False, dry_run, None)
        return _move(connection, settings, "unfreeze", "frozen", "wallet_only", act, dry_run=dry_run)


def cutover(
    engine: Engine,
    settings: Settings,
    flags: FlagEditor,
    cohort: Cohort | None,
    act: Act,
    *,
    dry_run: bool = False,
) -> FlagChange:
    """Read the balances of a cohort (None: of everyone) from the ledger. The phase stays as it is.

    Raises PreconditionRefused with every reason at once, UsageError for a trait that no mapping has.
    """
    with engine.connect() as connection:
        found = cohort_reasons(connection, settings, flags, cohort)
        if found:
            raise PreconditionRefused(f"cutover of {_who(cohort)}", found)
        return _switch_reads(connection, settings, flags, "cutover", act, cohort, on=True, dry_run=dry_run)


def rollback(
    engine: Engine,
    settings: Settings,
    flags: FlagEditor | None,
    act: Act,
    *,
    cohort: Cohort | None = None,
    dry_run: bool = False,
) -> Rollback:
    """Read balances from legacy again: of a cohort, by its flag; of everyone, by the flag and the phase.

    For everyone the phase goes back to dual_write, which is enough on its own: the phase is the ceiling of the
    flags, so ``flags`` may be None. Never gated. Raises PreconditionRefused in phase frozen, where the ledger
    alone is true, and UsageError for a cohort without flags to switch.
    """
    if cohort is not None and flags is None:
        raise UsageError("a cohort is rolled back by its flag, and the flag source cannot be written from here")
    with engine.begin() as connection:
        require_installed(connection, settings)
        state = show(connection, settings, lock=True)
        _not_frozen(settings, state, "rollback")
        target = "dual_write" if cohort is None and reached(state.phase, "read_ledger") else state.phase
        moved = target != state.phase
        if moved:
            _move(connection, settings, "rollback", state.phase, target, act, dry_run=dry_run)
    # The phase alone sends every read to legacy: it is in force by now, whatever a file or a server does.
    flag, problem = None, None
    survived: tuple[type[Exception], ...] = (*FLAG_PROBLEMS, DBAPIError)
    try:
        if flags is not None:
            with engine.connect() as connection:
                flag = _switch_reads(connection, settings, flags, "rollback", act, cohort, on=False, dry_run=dry_run)
    except survived as error:
        if cohort is not None:
            raise
        problem = said(error) if isinstance(error, DBAPIError) else str(error)
    return Rollback(state.phase, target, flag, problem, moved or bool(flag and flag.changed), dry_run)


def exercise(engine: Engine, settings: Settings, source: FlagSource, act: Act, *, dry_run: bool = False) -> Exercise:
    """Go back one phase and forward again at once, to see that the way back works.

    The two steps are two transactions, so that running programs really see the earlier phase. In between, an
    account that is written with dual-write off in force turns stale: run a backfill after it. Raises
    PreconditionRefused where there is no step to exercise, or where the way forward would be closed.
    """
    with engine.begin() as connection:
        state = show(connection, settings)
        _not_frozen(settings, state, "the exercise")
        if state.previous is None:
            mend = f"walletmigrate phase advance {REASON}"
            raise PreconditionRefused("the exercise", [("legacy is the first phase: there is no way back", mend)])
        found = reasons(connection, settings, source, "dual_write")
        if found:
            raise PreconditionRefused("the exercise", found)
        _locked(connection, settings, state, state.phase)
        step = _move(
            connection, settings, "phase back", state.phase, state.previous, act, dry_run=dry_run, exercise=True
        )
    ids: tuple[int | None, ...] = (step.audit_id,)
    try:
        with engine.begin() as connection:
            # Whoever moved the phase in between had a reason: then it stays where they put it.
            if not dry_run and show(connection, settings, lock=True).phase == step.after:
                again = _move(
                    connection, settings, "phase advance", step.after, step.before, act, dry_run=False, exercise=True
                )
                ids = (step.audit_id, again.audit_id)
    except DBAPIError as error:
        # The same command again would begin one phase lower.
        what = f"the phase went back from {step.before} to {step.after}, and perhaps not forward again: {said(error)}"
        mend = f"walletmigrate phase advance --to {step.before} {REASON}"
        raise PreconditionRefused("the exercise's second half", [(what, mend)]) from error
    return Exercise(step.before, step.after, dry_run, tuple(one for one in ids if one is not None))


def _switch_reads(
    connection: Connection,
    settings: Settings,
    flags: FlagEditor,
    action: str,
    act: Act,
    cohort: Cohort | None,
    *,
    on: bool,
    dry_run: bool,
) -> FlagChange:
    who: dict[str, Any] = {"everyone": True} if cohort is None else {"trait": cohort}
    return flip(connection, settings, flags, action, act, READ_FROM_LEDGER, on, dry_run=dry_run, **who)


def _move(
    connection: Connection,
    settings: Settings,
    action: str,
    before: str,
    after: str,
    act: Act,
    *,
    dry_run: bool,
    exercise: bool = False,
) -> PhaseChange:
    """The one write gate of the phase."""
    if dry_run:
        return PhaseChange(before, after, True, True, None)
    connection.execute(
        text(f"update {quoted(settings.ledger_schema)}.control set phase = :phase, changed_at = clock_timestamp()"),
        {"phase": after},
    )
    details: dict[str, Any] = {"from": before, "to": after}
    if exercise:
        details["exercise"] = True
    audit_id = record(connection, settings, action, act, details=details)
    return PhaseChange(before, after, True, False, audit_id)


def _locked(connection: Connection, settings: Settings, seen: PhaseState, target: str) -> PhaseState:
    """Keep other steps out, and make sure that none came since the gate was looked at.

    The gate is looked at without a lock: it may take minutes, and a rollback must never wait for it.
    """
    now = show(connection, settings, lock=True)
    if now.phase not in (seen.phase, target):
        what = f"the phase went from {seen.phase} to {now.phase} meanwhile"
        raise PreconditionRefused(f"phase {target}", [(what, "walletmigrate phase show")])
    return now


def _not_frozen(settings: Settings, state: PhaseState, step: str) -> None:
    if state.phase == "frozen":
        mend = f"walletmigrate unfreeze --confirm {confirmation(settings)} {REASON}"
        raise PreconditionRefused(step, [("the phase is frozen: the ledger alone is true", mend)])
    if state.phase == "retired":
        raise PreconditionRefused(step, [RETIRED])


def _known(phase: str) -> str:
    if phase not in PHASES:
        raise UsageError(f"no phase {phase!r}; there are {', '.join(PHASES)}")
    return phase


def _who(cohort: Cohort | None) -> str:
    return "everyone" if cohort is None else "=".join(cohort)
