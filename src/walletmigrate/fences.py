"""The operator's hand on the fence: put it up, take it down, say what it does to a mirrored account."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, get_args

from sqlalchemy import Connection, Engine, text

from walletmigrate import capture, functions, survey
from walletmigrate.audit import Act, record
from walletmigrate.config import Mapping, Settings
from walletmigrate.errors import PreconditionRefused, UsageError
from walletmigrate.functions import relation
from walletmigrate.schema import quoted
from walletmigrate.standing import FENCE_MENDED, REASON, Reason, confirmation, require_installed, show

Mode = Literal["stale", "mirror", "reject"]
MODES: Final[tuple[Mode, ...]] = get_args(Mode)


@dataclass(frozen=True)
class FenceChange:
    """What became of one mapping's fence. ``before`` and ``after`` are its mode, None where it does not stand."""

    mapping: str
    before: str | None
    after: str | None
    changed: bool
    dry_run: bool


def put_up(engine: Engine, settings: Settings, act: Act, *, dry_run: bool = False) -> tuple[FenceChange, ...]:
    """Put the fence on every mapped table and partition where it does not stand as it was made. Idempotent.

    The lock on a table is asked for with a short limit, many times, so that the traffic is never blocked behind it.
    Raises LedgerNotInstalled, and PreconditionRefused where its functions were replaced: these `install` makes.
    """
    done = []
    for mapping in settings.mappings:
        with engine.begin() as connection:
            mode = _mode(connection, settings, mapping)
            stood = capture.fence_recorded(connection, settings, mapping)
            wrong = capture.fence_problems(connection, settings, mapping)
            _refuse_replaced(connection, settings, mapping, "capture install")
        if wrong and not dry_run:

            def work(connection: Connection, mapping: Mapping = mapping) -> None:
                down = capture.fence_recorded(connection, settings, mapping)
                found = [
                    f"{one.trigger} {one.problem}" for one in capture.fence_problems(connection, settings, mapping)
                ]
                capture.install_fence(connection, settings, mapping)
                record(connection, settings, "capture install", act, mapping=mapping.name)
                if down and found:
                    # Under the lock: a verification that begins later has seen all that was written before.
                    details = {"problems": found}
                    record(connection, settings, FENCE_MENDED, act, mapping=mapping.name, details=details)

            capture.with_short_locks(engine, work)
        done.append(FenceChange(mapping.name, mode if stood and not wrong else None, mode, bool(wrong), dry_run))
    return tuple(done)


def take_down(engine: Engine, settings: Settings, act: Act, *, dry_run: bool = False) -> tuple[FenceChange, ...]:
    """Take every mapping's fence down; mirrored accounts turn stale first. Idempotent.

    Raises PreconditionRefused unless the phase is `legacy` (a dual-write without a fence would mirror what nobody
    guards) and no account is frozen.
    """
    with engine.begin() as connection:
        _refuse_to_take_down(connection, settings)
    done = []
    for mapping in settings.mappings:
        with engine.begin() as connection:
            stood = capture.fence_recorded(connection, settings, mapping)
            mode = _mode(connection, settings, mapping)
        if stood and not dry_run:
            _take_down(engine, settings, mapping, act)
        done.append(FenceChange(mapping.name, mode if stood else None, None, stood, dry_run))
    return tuple(done)


def set_mode(
    engine: Engine, settings: Settings, mapping: Mapping, mode: Mode, act: Act, *, dry_run: bool = False
) -> FenceChange:
    """Say what the fence does to a mirrored account that is written past the adapter, from the next statement on.

    stale: the account turns stale. mirror: the ledger follows the row. reject: the write fails (WM031).
    Raises UsageError for another word, PreconditionRefused where the phase has no use for it or where the fence's
    functions were replaced: made anew here, nobody would learn of it.
    """
    if mode not in MODES:
        raise UsageError(f"{mode!r} is no mode: choose one of {', '.join(MODES)}")
    with engine.begin() as connection:
        require_installed(connection, settings)
        phase = show(connection, settings, lock=True).phase
        before = _mode(connection, settings, mapping)
        if mode != "stale" and phase in ("legacy", "retired"):
            what = f"the phase is {phase}: no account is mirrored in it"
            raise PreconditionRefused(f"capture mode {mode}", [(what, _way_to_a_mode(phase))])
        _refuse_replaced(connection, settings, mapping, f"capture mode {mode}")
        if before != mode and not dry_run:
            connection.execute(
                text(f"update {quoted(settings.ledger_schema)}.mappings set capture_mode = :mode where name = :name"),
                {"mode": mode, "name": mapping.name},
            )
            _make_anew(connection, settings, mapping)
            details = {"from": before, "to": mode}
            record(connection, settings, "capture mode", act, mapping=mapping.name, details=details)
        return FenceChange(mapping.name, before, mode, before != mode, dry_run)


def _refuse_replaced(connection: Connection, settings: Settings, mapping: Mapping, step: str) -> None:
    found = capture.function_problems(connection, settings, mapping)
    if found:
        raise PreconditionRefused(
            step, [(f"{one.trigger} {one.problem}", f"walletmigrate install {REASON}") for one in found]
        )


def _way_to_a_mode(phase: str) -> str:
    return f"walletmigrate phase advance {REASON}" if phase == "legacy" else ""


def _make_anew(connection: Connection, settings: Settings, mapping: Mapping) -> None:
    """The mode is compiled into the fence's function: no raw write looks it up."""
    legacy = survey.inspect_mapping(connection, mapping)
    connection.exec_driver_sql(f"set local role {quoted(settings.roles.owner)}")
    functions.make_functions(connection, settings, mapping, legacy)
    connection.exec_driver_sql("reset role")


def _take_down(engine: Engine, settings: Settings, mapping: Mapping, act: Act) -> None:
    more = True
    while more:
        with engine.begin() as connection:
            more = capture.turn_stale(connection, settings, mapping, "fence removed", skip_locked=True)

    def work(connection: Connection) -> None:
        # Legacy before accounts, as everyone locks: then the last states, then the fence.
        connection.exec_driver_sql(f"lock table {relation(mapping)} in access exclusive mode")
        _refuse_to_take_down(connection, settings)
        while capture.turn_stale(connection, settings, mapping, "fence removed"):
            pass
        capture.remove_triggers(connection, settings, mapping)
        connection.execute(
            text(f"update {quoted(settings.ledger_schema)}.mappings set fence = '{{}}' where name = :name"),
            {"name": mapping.name},
        )
        record(connection, settings, "capture remove", act, mapping=mapping.name)

    capture.with_short_locks(engine, work)


def _refuse_to_take_down(connection: Connection, settings: Settings) -> None:
    require_installed(connection, settings)
    reasons: list[Reason] = []
    phase = show(connection, settings).phase
    if phase != "legacy":
        what = f"the phase is {phase}: dual-writes would go on without a fence"
        reasons.append((what, f"walletmigrate phase back {REASON}  # until legacy"))
    accounts = f"{quoted(settings.ledger_schema)}.accounts"
    frozen = connection.scalar(text(f"select count(*) from {accounts} where state = 'frozen'"))
    if frozen:
        mend = f"walletmigrate unfreeze --confirm {confirmation(settings)} {REASON}"
        reasons.append((f"{frozen} accounts are frozen: the ledger alone is true", mend))
    if reasons:
        raise PreconditionRefused("capture remove", reasons)


def _mode(connection: Connection, settings: Settings, mapping: Mapping) -> str:
    require_installed(connection, settings)
    query = text(f"select capture_mode from {quoted(settings.ledger_schema)}.mappings where name = :name")
    return connection.scalar(query, {"name": mapping.name}) or "stale"


def modes(connection: Connection, settings: Settings) -> dict[str, str]:
    """The mode of each mapping's fence."""
    return {mapping.name: _mode(connection, settings, mapping) for mapping in settings.mappings}


def problems(connection: Connection, settings: Settings) -> Sequence[capture.FenceProblem]:
    """Everything in which a fence is not as it was made."""
    return [one for mapping in settings.mappings for one in capture.fence_problems(connection, settings, mapping)]
