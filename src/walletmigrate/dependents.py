"""Who still needs the balance columns: readers before the freeze, and what keeps them from being dropped."""

from __future__ import annotations

from collections.abc import Iterator

from sqlalchemy import Connection, text

from walletmigrate import functions, source_database
from walletmigrate.config import Mapping, Settings
from walletmigrate.findings import wanted
from walletmigrate.schema import quoted
from walletmigrate.standing import REASON, Reason, confirmation, of_mapping

_ACCEPT = (
    "walletmigrate discover --source .  # then let them ask the ledger, or accept each: "
    "comment on … is 'walletmigrate: ignore <reason>'"
)
SHOWN = 5
"""How many objects a reason names before it says that there are more."""


def readers(connection: Connection, settings: Settings) -> Iterator[Reason]:
    """Views, functions, triggers and policies that read a balance column which will stand still while frozen.

    One that an operator has looked at is accepted by its comment. What reads it outside the database, `discover` lists.
    """
    names = {one.name: source_database.partitions(connection, one) for one in settings.mappings}
    for mapping, target in zip(settings.mappings, wanted(settings, names), strict=True):
        found = source_database.look(connection, settings, mapping, target)
        open_ = [one for one in found if one.access in ("read", "write") and one.sure and one.accepted is None]
        left = list(dict.fromkeys(one.file for one in open_ if one.column is not None))
        if left:
            more = f" and {len(left) - SHOWN} more" if len(left) > SHOWN else ""
            yield (
                f"{mapping.table}: its balances are still used by {', '.join(left[:SHOWN])}{more}",
                _ACCEPT,
            )


def kept_by(connection: Connection, settings: Settings) -> Iterator[Reason]:
    """What must be out of the way before the columns can be dropped and new rows can do without them."""
    for mapping in settings.mappings:
        named = {"table": functions.relation(mapping), "columns": [one.column for one in mapping.columns]}
        dependents = list(connection.execute(text(_DEPENDENTS), {**named, "ledger": settings.ledger_schema}).scalars())
        if dependents:
            yield (
                f"{mapping.table}: {', '.join(dependents)} depend on the balance columns",
                "drop them, or make them anew from the ledger (wallet_entries, accounts)",
            )
        for column, default in connection.execute(text(_DEFAULTS), named):
            yield (
                f"{mapping.table}.{column} has the default {default}: new rows would bring money that is lost with it",
                f"alter table {mapping.table} alter column {column} set default 0",
            )


def alive(connection: Connection, settings: Settings) -> Iterator[Reason]:
    """Every row's money is in a frozen account; reads the whole table."""
    for mapping in settings.mappings:
        yield from _unfrozen(connection, settings, mapping)


def _unfrozen(connection: Connection, settings: Settings, mapping: Mapping) -> Iterator[Reason]:
    accounts, key = f"{quoted(settings.ledger_schema)}.accounts", f"l.{quoted(mapping.key)}"
    mend = (
        f"walletmigrate backfill{of_mapping(settings, mapping.name)} {REASON}; "
        f"walletmigrate freeze{of_mapping(settings, mapping.name)} --confirm {mapping.name} {REASON}"
    )
    for column in mapping.columns:
        row = connection.execute(
            text(
                f'select count(*) as left, min({key}::text collate "C") as example '
                f"from {functions.relation(mapping)} as l left join {accounts} as a "
                f'on a.mapping = :mapping and a.key = {key}::text collate "C" '
                "and a.bucket = :bucket and a.currency = :currency "
                "where a.state is distinct from 'frozen' "
                # A row that came since the freeze, with nothing in it, is opened by its first posting.
                f"and (a.id is not null or l.{quoted(column.column)} <> 0)"
            ),
            {"mapping": mapping.name, "bucket": column.bucket, "currency": column.currency},
        ).one()
        if row.left:
            kind = f"{mapping.name} ({column.bucket}, {column.currency})"
            yield f"{kind}: {row.left} accounts are not frozen, for example {row.example}", mend
    orphans = connection.scalar(
        text(f"select count(*) from {accounts} where mapping = :mapping and state in ('mirrored', 'stale')"),
        {"mapping": mapping.name},
    )
    if orphans:
        close = f"walletmigrate verify --mark-stale --mapping {mapping.name} {REASON}"
        yield f"{mapping.name}: {orphans} accounts are mirrored or stale", f"{mend}; {close}"


def archived(connection: Connection, settings: Settings) -> Iterator[Reason]:
    """An archive of every mapping that proved, taken since the accounts were last frozen."""
    name = quoted(settings.ledger_schema)
    for mapping in settings.mappings:
        done = connection.scalar(
            text(
                f"select exists (select from {name}.audit_log where action = 'archive' and mapping = :mapping "
                "and details ->> 'proven' = 'true' and details ->> 'phase' = 'frozen' and id > coalesce("
                f"(select max(id) from {name}.audit_log where details ->> 'to' = 'frozen'), 0))"
            ),
            {"mapping": mapping.name},
        )
        if not done:
            yield (
                f"mapping {mapping.name!r} has no archive that proved since its accounts are frozen",
                f"walletmigrate archive{of_mapping(settings, mapping.name)} --to {mapping.name}.jsonl.gz {REASON}",
            )


def the_step(settings: Settings) -> Reason:
    """That a column is retired by a command of its own."""
    archives = " ".join(f"--archive {mapping.name}.jsonl.gz" for mapping in settings.mappings)
    command = f"walletmigrate retire {archives} --migrations FOLDER --confirm {confirmation(settings)} {REASON}"
    return "the column is retired by a command of its own, which looks at the archive again", command


_DEPENDENTS = """
select distinct pg_describe_object(d.classid, d.objid, 0)
from pg_depend as d
inner join pg_attribute as a on a.attrelid = d.refobjid and a.attnum = d.refobjsubid
left join pg_trigger as t on d.classid = 'pg_trigger'::regclass and t.oid = d.objid
left join pg_proc as f on f.oid = t.tgfoid
left join pg_namespace as n on n.oid = f.pronamespace
where
    d.refclassid = 'pg_class'::regclass and d.refobjid = to_regclass(:table) and a.attname = any(:columns)
    and d.deptype = 'n' and n.nspname is distinct from :ledger
    -- The table's own constraints go with the column.
    and not exists (
        select from pg_constraint as k
        where d.classid = 'pg_constraint'::regclass and k.oid = d.objid and k.conrelid = d.refobjid
    )
order by 1
"""

# What a default comes to cannot be seen: only the plain ones are known to bring nothing.
_DEFAULTS = """
select a.attname, pg_get_expr(d.adbin, d.adrelid)
from pg_attrdef as d
inner join pg_attribute as a on a.attrelid = d.adrelid and a.attnum = d.adnum
where
    d.adrelid = to_regclass(:table) and a.attname = any(:columns)
    and pg_get_expr(d.adbin, d.adrelid) !~ '^\\(?''?0(\\.0*)?''?\\)?(::[a-z ]+(\\([0-9, ]+\\))?)?$'
order by 1
"""
