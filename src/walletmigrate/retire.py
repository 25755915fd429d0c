"""Retire the balance columns: the phase's last step, with its migration, and back as long as the columns stand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Connection, Engine, text

from walletmigrate import capture, dependents, functions, retired_guards, survey
from walletmigrate.archive_check import ArchiveCheck, check
from walletmigrate.audit import Act, record
from walletmigrate.config import Mapping, Settings
from walletmigrate.errors import ConfigError, PreconditionRefused, UsageError
from walletmigrate.flags import FlagSource
from walletmigrate.gates import reasons
from walletmigrate.grants import grant
from walletmigrate.retirement import Script, script
from walletmigrate.schema import quoted
from walletmigrate.standing import REASON, Reason, of_mapping, require_installed, show


@dataclass(frozen=True)
class Retirement:
    """What was done: the phase, and the migration that is yours to apply. ``audit_id`` is None in a dry run, and where
    the phase was retired before.
    """

    before: str
    after: str
    migration: str
    revision: str
    down_revision: str | None
    archives: tuple[ArchiveCheck, ...]
    dry_run: bool
    audit_id: int | None


def retire(
    engine: Engine,
    settings: Settings,
    source: FlagSource,
    archives: Sequence[Path],
    folder: Path,
    act: Act,
    *,
    down_revision: str | None = None,
    dry_run: bool = False,
) -> Retirement:
    """Write the migration that drops the balance columns, and move the phase to retired, after which nothing in the
    ledger needs them. Applying the migration is the application's own `alembic upgrade`.

    Every archive is proved again, one for each mapping. From the step on until the drop, writes to the columns are
    refused. Raises PreconditionRefused with every reason at once, UsageError for a folder without a clear head, and
    what `archive_check.check` raises.
    """
    checked = tuple(check(engine, settings, path) for path in archives)
    with engine.begin() as connection:
        require_installed(connection, settings)
        before = show(connection, settings).phase
        found = reasons(connection, settings, source, "retired") if before != "retired" else []
        if before not in ("frozen", "retired"):
            found.insert(0, (f"the phase is {before}, not frozen", f"walletmigrate phase show  # {REASON}"))
        elif before == "retired":
            found += _gone(connection, settings)
        found += _unproven(settings, checked)
        if found:
            raise PreconditionRefused("retire", found)
        names = [(Path(one.path).name, one.sha256) for one in checked]
        made = script(connection, settings, names, folder, down_revision)
    audit_id = None
    if not dry_run:
        earlier = made.path.read_text(encoding="utf-8") if made.path.exists() else None
        _save(made)
        if before != "retired":
            try:
                audit_id = _take_the_step(engine, settings, act, made, checked)
            except BaseException:
                _put_back(made.path, earlier)
                raise
    return Retirement(before, "retired", str(made.path), made.revision, made.down_revision, checked, dry_run, audit_id)


def reinstate(engine: Engine, settings: Settings, act: Act, *, dry_run: bool = False) -> int | None:
    """Go back from retired to frozen, as long as the columns stand, or stand again. Gives the audit row's id.

    Functions and fence are made as they were. Raises PreconditionRefused where a column is gone.
    """
    with engine.begin() as connection:
        tables = {mapping.name: _standing(connection, mapping) for mapping in settings.mappings}
    if dry_run:
        return None

    def work(connection: Connection) -> int:
        show(connection, settings, lock=True)
        _make(connection, settings, tables, retired=False)
        for mapping in settings.mappings:
            retired_guards.drop(connection, mapping)
            capture.install_fence(connection, settings, mapping)
        _set_phase(connection, settings, "frozen")
        return record(connection, settings, "phase back", act, details={"from": "retired", "to": "frozen"})

    return capture.with_short_locks(engine, work)


def _gone(connection: Connection, settings: Settings) -> list[Reason]:
    """Columns that were dropped: there is nothing left that a migration could say of them."""
    found: list[Reason] = []
    for mapping in settings.mappings:
        try:
            survey.inspect_mapping(connection, mapping)
        except ConfigError as error:
            found.append((f"the phase is retired, and the column is dropped: {error.message}", ""))
    return found


def _unproven(settings: Settings, checked: Sequence[ArchiveCheck]) -> list[Reason]:
    """An archive of each mapping, taken while frozen, that proves now."""
    found: list[Reason] = []
    for mapping in settings.mappings:
        again = f"walletmigrate archive{of_mapping(settings, mapping.name)} --to NEW-FILE {REASON}"
        mine = [one for one in checked if one.mapping == mapping.name]
        if not mine:
            found.append((f"no archive of mapping {mapping.name!r} was named", f"{again}; then name it by --archive"))
        for one in mine:
            if not one.proven:
                said = one.problems[0].problem
                look = f"walletmigrate archive check {one.path}"
                found.append((f"{one.path} does not prove ({one.problem_count} problems, first: {said})", look))
            elif one.phase != "frozen":
                found.append((f"{one.path} was taken in phase {one.phase}, not while frozen", again))
    return found


def _save(made: Script) -> None:
    try:
        made.path.write_text(made.text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{made.path} cannot be written ({error.strerror}): name another folder") from error


def _put_back(path: Path, earlier: str | None) -> None:
    if earlier is None:
        path.unlink(missing_ok=True)
    else:
        path.write_text(earlier, encoding="utf-8")


def _take_the_step(engine: Engine, settings: Settings, act: Act, made: Script, checked: Sequence[ArchiveCheck]) -> int:
    """The guards first, which wait out every writer; then a look at all rows, behind which none can bring money that
    would be lost; then functions, fence and phase at once.
    """
    with engine.begin() as connection:
        tables = {mapping.name: _standing(connection, mapping) for mapping in settings.mappings}
    capture.with_short_locks(engine, lambda connection: _put_up_guards(connection, settings))
    try:
        with engine.begin() as connection:
            left = list(dependents.alive(connection, settings))
        if left:
            raise PreconditionRefused("retire", left)

        def work(connection: Connection) -> int:
            phase = show(connection, settings, lock=True).phase
            if phase != "frozen":
                what = f"the phase went from frozen to {phase} meanwhile"
                raise PreconditionRefused("retire", [(what, "walletmigrate phase show")])
            _make(connection, settings, tables, retired=True)
            for mapping in settings.mappings:
                capture.remove_triggers(connection, settings, mapping)
                retired_guards.watch_keys(connection, settings, mapping)
            connection.execute(text(f"update {quoted(settings.ledger_schema)}.mappings set fence = '{{}}'"))
            _set_phase(connection, settings, "retired")
            facts = {
                "from": "frozen",
                "to": "retired",
                "revision": made.revision,
                "archives": {one.mapping: one.sha256 for one in checked},
            }
            return record(connection, settings, "retire", act, details=facts)

        return capture.with_short_locks(engine, work)
    except BaseException:
        capture.with_short_locks(engine, lambda connection: _drop_all_guards(connection, settings))
        raise


def _standing(connection: Connection, mapping: Mapping) -> survey.LegacyTable:
    """The table with its columns. Raises PreconditionRefused where one is gone."""
    try:
        return survey.inspect_mapping(connection, mapping)
    except ConfigError as error:
        mend = "alembic downgrade to the revision before the one that retired it; then run this again"
        raise PreconditionRefused("a step back", [(f"the legacy column is gone: {error.message}", mend)]) from None


def _make(connection: Connection, settings: Settings, tables: dict[str, survey.LegacyTable], *, retired: bool) -> None:
    connection.exec_driver_sql(f"set local role {quoted(settings.roles.owner)}")
    for mapping in settings.mappings:
        functions.make_functions(connection, settings, mapping, tables[mapping.name], retired=retired)
    grant(connection, settings)
    connection.exec_driver_sql("reset role")


def _put_up_guards(connection: Connection, settings: Settings) -> None:
    for mapping in settings.mappings:
        retired_guards.drop(connection, mapping)
        retired_guards.watch_columns(connection, settings, mapping)


def _drop_all_guards(connection: Connection, settings: Settings) -> None:
    for mapping in settings.mappings:
        retired_guards.drop(connection, mapping)


def _set_phase(connection: Connection, settings: Settings, phase: str) -> None:
    connection.execute(
        text(f"update {quoted(settings.ledger_schema)}.control set phase = :phase, changed_at = clock_timestamp()"),
        {"phase": phase},
    )
