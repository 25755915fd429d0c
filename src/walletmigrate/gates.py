"""What is still missing for a phase: a list of reasons, each with the command that mends it.

An empty list opens the gate. Nothing here writes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from decimal import Decimal

from sqlalchemy import Connection, text

from walletmigrate import capture, dependents, functions, observation, schema, survey
from walletmigrate.census import Census, census
from walletmigrate.config import Mapping, Settings
from walletmigrate.errors import (
    ConfigError,
    FlagDocumentInvalid,
    FlagsMissing,
    FlagSourceUnreachable,
    UsageError,
)
from walletmigrate.facts import imbalance
from walletmigrate.flag_sources import check
from walletmigrate.flags import FlagSource
from walletmigrate.job_rows import has_own_command, resuming
from walletmigrate.schema import quoted
from walletmigrate.standing import PHASES, REASON, Reason, of_mapping, show

SHOWN = 5
"""How many single values a reason names before it says that there are more."""


def reasons(
    connection: Connection,
    settings: Settings,
    source: FlagSource,
    to_phase: str,
    counted: Sequence[Census] | None = None,
    unbalanced: dict[str, Decimal] | None = None,
) -> list[Reason]:
    """Everything that keeps the migration from entering ``to_phase``. ``counted`` spares a second census, and
    ``unbalanced`` a second sum (`facts.imbalance`).
    """
    if to_phase not in PHASES:
        raise UsageError(f"no phase {to_phase!r}; there are {', '.join(PHASES)}")
    if not schema.installed(connection, settings.ledger_schema):
        return [("the ledger is not installed in this database", f"walletmigrate install {REASON}")]
    if to_phase == "legacy":
        return []
    if to_phase == "dual_write":
        return [*_foundations(connection, settings), *_known_flags(source)]
    balanced = observation.balanced(imbalance(connection, settings.ledger_schema) if unbalanced is None else unbalanced)
    if to_phase == "retired":
        return [*_guarded(connection, settings), *balanced, *_retirable(connection, settings)]
    found = [*_guarded(connection, settings), *_line(connection, settings)]
    found += in_step(census_of_all(connection, settings) if counted is None else counted)
    found += _unfinished(connection, settings)
    found += balanced
    found += observation.verified(connection, settings)
    found += observation.observed(connection, settings)
    unknown = list(_known_flags(source))
    found += unknown
    if to_phase == "wallet_only":
        return found if unknown else [*found, *observation.read_by_everyone(connection, settings, source)]
    if not unknown:
        found += observation.dual_written(settings, source)
    if to_phase == "frozen":
        found += no_way_back(connection, settings.mappings)
        found += dependents.readers(connection, settings)
        return [*found, *observation.exercised(connection, settings, "wallet_only")]
    return [*found, *observation.exercised(connection, settings)]


def _retirable(connection: Connection, settings: Settings) -> Iterator[Reason]:
    """Everything is in the ledger, proven and on file, and nothing in the database needs the columns any more."""
    yield from dependents.alive(connection, settings)
    yield from _unfinished(connection, settings)
    yield from observation.verified(connection, settings)
    yield from dependents.kept_by(connection, settings)
    yield from dependents.archived(connection, settings)


def census_of_all(connection: Connection, settings: Settings) -> tuple[Census, ...]:
    """The census of every mapping."""
    return tuple(one for mapping in settings.mappings for one in census(connection, settings, mapping))


def _foundations(connection: Connection, settings: Settings) -> Iterator[Reason]:
    """The functions fit the configuration, the fence stands, and the legacy values convert."""
    for mapping in settings.mappings:
        stands = functions.installed_mapping(connection, settings.ledger_schema, mapping.name)
        if stands is None or stands.fingerprint != functions.fingerprint(mapping):
            what = "is not installed" if stands is None else "was changed in the configuration since the install"
            yield f"mapping {mapping.name!r} {what}", f"walletmigrate install {REASON}"
            continue
        yield from _fence(connection, settings, mapping)
        yield from _values(connection, mapping)


def _guarded(connection: Connection, settings: Settings) -> Iterator[Reason]:
    for mapping in settings.mappings:
        yield from _fence(connection, settings, mapping)


def _fence(connection: Connection, settings: Settings, mapping: Mapping) -> Iterator[Reason]:
    for problem in capture.fence_problems(connection, settings, mapping):
        yield f"the fence of {mapping.name!r}: {problem.trigger} {problem.problem}", f"walletmigrate install {REASON}"


def _values(connection: Connection, mapping: Mapping) -> Iterator[Reason]:
    try:
        found = survey.unconvertible(connection, mapping, SHOWN + 1)
    except ConfigError as error:
        yield f"mapping {mapping.name!r} does not fit its table: {error.message}", error.fix
        return
    if found:
        shown = ", ".join(f"{one.column} of {one.key} holds {one.value}" for one in found[:SHOWN])
        more = " and more" if len(found) > SHOWN else ""
        yield (
            f"{mapping.table} has values that are no exact amounts: {shown}{more}",
            "walletmigrate install --dry-run  # lists all of them; then update the rows",
        )


def no_way_back(connection: Connection, mappings: Sequence[Mapping]) -> Iterator[Reason]:
    """Why accounts could not be unfrozen: while frozen only a floor keeps a balance from what a CHECK would refuse."""
    for mapping in mappings:
        free = [column.column for column in mapping.columns if column.floor is None]
        rows = connection.execute(
            text(
                "select c.conname, a.attname from pg_constraint as c inner join pg_attribute as a "
                "on a.attrelid = c.conrelid and a.attnum = any(c.conkey) where c.contype = 'c' "
                "and c.conrelid = cast(:relation as regclass) and a.attname = any(:free) order by 1, 2"
            ),
            {"relation": functions.relation(mapping), "free": free},
        )
        for constraint, column in rows:
            what = f"{mapping.table} checks {column} by constraint {constraint}, and the column has no floor"
            yield (
                f"{what}: a balance that the ledger allows while frozen could not be written back",
                f"set a floor for {column!r} in the configuration; then: walletmigrate install {REASON}",
            )


def _known_flags(source: FlagSource) -> Iterator[Reason]:
    try:
        check(source)
    except FlagsMissing as error:
        yield str(error), "make the flag in the source, off for everyone; then: walletmigrate flags list"
    except (FlagDocumentInvalid, FlagSourceUnreachable) as error:
        yield str(error), "mend the flag source; then: walletmigrate flags list"


def _line(connection: Connection, settings: Settings) -> Iterator[Reason]:
    if not show(connection, settings).line_running:
        yield "the line is stopped, so accounts turn stale at their next write", f"walletmigrate resume {REASON}"


def in_step(counted: Sequence[Census]) -> Iterator[Reason]:
    """Every account is there, and none is stale or drifted."""
    for one in counted:
        kind = f"{one.mapping} ({one.bucket}, {one.currency})"
        waiting = [f"{n} {what}" for n, what in ((one.absent, "absent"), (one.stale, "stale")) if n]
        if waiting:
            yield (
                f"{kind}: {' and '.join(waiting)} of {one.rows} accounts, for example {one.example}",
                f"walletmigrate backfill --mapping {one.mapping} {REASON}",
            )
        if one.drifted:
            yield (
                f"{kind}: ledger and legacy differ in {one.drifted} accounts, for example {one.drifted_example}",
                f"walletmigrate verify --mapping {one.mapping}  # then see runbooks/balance-drift.md",
            )


def _unfinished(connection: Connection, settings: Settings) -> Iterator[Reason]:
    """The newest backfill and unfreeze of each mapping have ended, unless they were given up."""
    query = (
        "select distinct on (kind, mapping) id, kind, mapping, state, details "
        f"from {quoted(settings.ledger_schema)}.jobs "
        "where kind in ('backfill', 'backfill undo', 'unfreeze') order by kind, mapping, id desc"
    )
    for job in connection.execute(text(query)):
        if job.state in ("running", "paused", "failed"):
            options = of_mapping(settings, job.mapping)
            if job.kind == "unfreeze":
                options += f" --confirm {job.mapping}"
            again = resuming(job) if has_own_command(job) else f"walletmigrate {job.kind}{options} {REASON}"
            yield f"{job.kind} job {job.id} of {job.mapping} is {job.state}", f"{again}  # goes on where it stopped"
