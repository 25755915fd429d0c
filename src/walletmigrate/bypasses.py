"""The catalogue of writes past the adapter: a list of the code paths that are still to be moved."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal

from sqlalchemy import Connection, Engine, text

from walletmigrate.audit import Act, record
from walletmigrate.config import Settings
from walletmigrate.schema import quoted
from walletmigrate.standing import require_installed

PRUNE_BATCH = 10_000
"""Lines removed in one transaction."""


@dataclass(frozen=True)
class CodePath:
    """Writes past the adapter by statements that differ only in their values.

    ``moved`` is the sum of what they changed, in major units of ``currency`` (None where that is not known);
    ``treatments`` says how many were only recorded (absent, stale), turned_stale, mirrored or closed.
    """

    mapping: str
    relation: str
    column: str | None
    currency: str | None
    operation: str
    fingerprint: str
    application_names: tuple[str, ...]
    database_users: tuple[str, ...]
    writes: int
    accounts: int
    treatments: dict[str, int]
    moved: Decimal | None
    first: datetime
    last: datetime
    example: str | None


@dataclass(frozen=True)
class Catalogue:
    """The code paths, most writes first. ``rejected`` counts refused writes by mapping since the install."""

    paths: tuple[CodePath, ...]
    writes: int
    rejected: dict[str, int]
    since: datetime | None


_REPORT = """
with chosen as (
    select *, row(mapping, relation, column_name, currency, operation, fingerprint)::text as path
    from {schema}.bypasses
    where (cast(:since as timestamptz) is null or at >= :since) and mapping = any(:mappings)
), treated as (
    select path, jsonb_object_agg(treatment, writes) as treatments
    from (select path, treatment, count(*) as writes from chosen group by path, treatment) as each
    group by path
)
select
    c.mapping, c.relation::text as relation, c.column_name, c.currency, c.operation, c.fingerprint, t.treatments,
    count(*) as writes, count(distinct c.key) as accounts,
    sum(coalesce(c.new_value, 0) - coalesce(c.old_value, 0)) as moved,
    min(c.at) as first, max(c.at) as last, max(c.query) as example,
    array_agg(distinct c.application_name) as applications, array_agg(distinct c.database_user) as users
from chosen as c
inner join treated as t on t.path = c.path
group by c.mapping, c.relation, c.column_name, c.currency, c.operation, c.fingerprint, t.treatments
order by writes desc, last desc
"""


def report(connection: Connection, settings: Settings, *, window: timedelta | None = None) -> Catalogue:
    """What was written past the adapter, by code path; ``window`` looks back only so far. Reads only."""
    require_installed(connection, settings)
    since = connection.scalar(text("select clock_timestamp()")) - window if window else None
    rows = connection.execute(
        text(_REPORT.format(schema=quoted(settings.ledger_schema))),
        {"since": since, "mappings": [mapping.name for mapping in settings.mappings]},
    )
    paths = tuple(
        CodePath(
            mapping=row.mapping,
            relation=row.relation,
            column=row.column_name,
            currency=row.currency,
            operation=row.operation,
            fingerprint=row.fingerprint,
            application_names=tuple(row.applications),
            database_users=tuple(row.users),
            writes=row.writes,
            accounts=row.accounts,
            treatments=dict(row.treatments),
            moved=row.moved,
            first=row.first,
            last=row.last,
            example=row.example,
        )
        for row in rows
    )
    return Catalogue(paths, sum(path.writes for path in paths), rejected(connection, settings), since)


def rejected(connection: Connection, settings: Settings) -> dict[str, int]:
    """Writes that the fence refused, by mapping: counted although their transactions are gone."""
    found = {}
    for mapping in settings.mappings:
        name = f"{quoted(settings.ledger_schema)}.rejected_{mapping.name}"
        query = f"select case when is_called then last_value else 0 end from {name}"
        found[mapping.name] = int(connection.scalar(text(query)) or 0)
    return found


# A counter never falls: what is removed stays counted.
_PRUNE = """
with gone as (
    delete from {schema}.bypasses where ctid in (select ctid {old} limit {limit}) returning treatment
), counted as (
    insert into {schema}.bypasses_pruned as p (treatment, writes)
    select treatment, count(*) from gone group by treatment order by treatment
    on conflict (treatment) do update set writes = p.writes + excluded.writes
)
select count(*) from gone
"""


def prune(engine: Engine, settings: Settings, act: Act, *, dry_run: bool = False) -> int:
    """Remove lines older than the configured retention, in batches of their own; returns how many."""
    name, done = quoted(settings.ledger_schema), 0
    old = f"from {name}.bypasses where at < clock_timestamp() - cast(:retention as interval)"
    parameters = {"retention": settings.capture.retention}
    with engine.begin() as connection:
        require_installed(connection, settings)
        due = int(connection.scalar(text(f"select count(*) {old}"), parameters) or 0)
    if dry_run or not due:
        return due
    while True:
        with engine.begin() as connection:
            statement = _PRUNE.format(schema=name, old=old, limit=PRUNE_BATCH)
            gone = int(connection.scalar(text(statement), parameters) or 0)
            done += gone
            if gone < PRUNE_BATCH:
                record(connection, settings, "capture prune", act, details={"removed": done})
                return done
