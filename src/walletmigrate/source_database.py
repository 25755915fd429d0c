"""What a database knows of the mapped columns: views, functions, triggers, rules, keys; and what the fence saw.

Reads only. An object is accepted by its COMMENT, ``walletmigrate: ignore <reason>``, or by such a comment in
the body of a function.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

from sqlalchemy import Connection, Row, text

from walletmigrate.config import Mapping, Settings
from walletmigrate.findings import Access, Finding, Ignores, Wanted, reason_in, shortened
from walletmigrate.schema import quoted
from walletmigrate.source_sql import Side, read_sql
from walletmigrate.source_text import read_body

# The tree of a table without partitions is empty.
_PARTITIONS = """
select c.relname
from pg_class as c
where c.oid = to_regclass(:table) or c.oid in (select p.relid from pg_partition_tree(to_regclass(:table)) as p)
order by c.oid
"""

# What depends on a balance column. A column's own default depends on it, too, and touches nothing.
_DEPENDENTS = """
select distinct
    d.classid::regclass::text as class, a.attname as column_name, v.relkind::text as kind, r.rulename,
    case
        when r.rulename = '_RETURN' then format('%I.%I', n.nspname, v.relname)
        else pg_describe_object(d.classid, d.objid, 0)
    end as name,
    case
        when r.rulename = '_RETURN' then pg_get_viewdef(v.oid)
        when r.oid is not null then pg_get_ruledef(r.oid)
        when t.oid is not null then pg_get_triggerdef(t.oid)
        when g.oid is not null then pg_get_expr(g.adbin, g.adrelid)
        when k.oid is not null then pg_get_constraintdef(k.oid)
        else coalesce(pg_get_expr(p.polqual, p.polrelid), pg_get_expr(p.polwithcheck, p.polrelid), '')
    end as definition,
    case when r.rulename = '_RETURN' then obj_description(v.oid, 'pg_class')
        else obj_description(d.objid, d.classid::regclass::text)
    end as comment,
    k.confupdtype::text as on_update, k.confdeltype::text as on_delete
from pg_depend as d
inner join pg_attribute as a on a.attrelid = d.refobjid and a.attnum = d.refobjsubid
left join pg_rewrite as r on d.classid = 'pg_rewrite'::regclass and r.oid = d.objid
left join pg_class as v on v.oid = r.ev_class
left join pg_namespace as n on n.oid = v.relnamespace
left join pg_trigger as t on d.classid = 'pg_trigger'::regclass and t.oid = d.objid
left join pg_proc as f on f.oid = t.tgfoid
left join pg_namespace as fn on fn.oid = f.pronamespace
left join pg_attrdef as g on d.classid = 'pg_attrdef'::regclass and g.oid = d.objid
left join pg_policy as p on d.classid = 'pg_policy'::regclass and p.oid = d.objid
left join pg_constraint as k on d.classid = 'pg_constraint'::regclass and k.oid = d.objid and k.contype = 'f'
where
    d.refclassid = 'pg_class'::regclass and d.refobjid = to_regclass(:table) and a.attname = any(:columns)
    and coalesce(r.oid, t.oid, g.oid, p.oid, k.oid) is not null
    and (t.oid is null or not t.tgisinternal and fn.nspname <> :ledger)
    and (g.oid is null or not (g.adrelid = d.refobjid and g.adnum = d.refobjsubid))
order by 1, 5
"""

# A foreign key of the mapped table that deletes its rows, or changes its key or a balance, when another row goes.
_CASCADES = """
select
    c.conname, c.confrelid::regclass::text as referenced, pg_get_constraintdef(c.oid) as definition,
    obj_description(c.oid, 'pg_constraint') as comment
from pg_constraint as c
where c.contype = 'f' and c.conrelid = to_regclass(:table) and c.conparentid = 0 and c.confdeltype = 'c'
order by 1
"""

_FUNCTIONS = """
select
    p.oid, p.oid::regprocedure::text as name, l.lanname as language,
    coalesce(nullif(p.prosrc, ''), pg_get_function_sqlbody(p.oid), '') as body,
    obj_description(p.oid, 'pg_proc') as comment,
    array(
        select format('%I on %s', t.tgname, t.tgrelid::regclass)
        from pg_trigger as t
        where t.tgfoid = p.oid and not t.tgisinternal and t.tgparentid = 0
        order by 1
    ) as triggers,
    exists (
        select from pg_trigger as t
        where
            t.tgfoid = p.oid
            and (
                t.tgrelid = to_regclass(:table)
                or t.tgrelid in (select relid from pg_partition_tree(to_regclass(:table)))
            )
    ) as on_table,
    p.prorettype = 'trigger'::regtype as is_trigger
from pg_proc as p
inner join pg_namespace as n on n.oid = p.pronamespace
inner join pg_language as l on l.oid = p.prolang
where
    n.nspname not in ('pg_catalog', 'information_schema', :ledger) and n.nspname not like 'pg\\_%'
    and p.prokind in ('f', 'p') and l.lanname not in ('c', 'internal')
    and not exists (
        select from pg_depend as e
        where e.classid = 'pg_proc'::regclass and e.objid = p.oid and e.deptype = 'e'
    )
    and exists (
        select from unnest(cast(:words as text[])) as w
        where strpos(lower(coalesce(nullif(p.prosrc, ''), pg_get_function_sqlbody(p.oid), '')), lower(w)) > 0
    )
order by 2
"""

_RUNTIME = """
select
    fingerprint, bucket, currency, operation, count(*) as writes, max(at) as last, max(query) as query,
    string_agg(distinct application_name, ', ') as applications, string_agg(distinct database_user, ', ') as users
from {schema}.bypasses
where mapping = :mapping and (cast(:window as interval) is null or at >= clock_timestamp() - cast(:window as interval))
group by fingerprint, bucket, currency, operation
order by writes desc, fingerprint, operation
"""

_SHAPES: Final = {
    "pg_rewrite": ("rule", "read"),
    "pg_trigger": ("trigger that watches the column", "read"),
    "pg_attrdef": ("generated column or default", "read"),
    "pg_policy": ("row-level security policy", "read"),
}
_CHANGES: Final = {"c": "cascade", "n": "set null", "d": "set default"}


@dataclass(frozen=True)
class _Look:
    connection: Connection
    settings: Settings
    mapping: Mapping
    wanted: Wanted

    def rows(self, sql: str, **more: Any) -> Sequence[Row[Any]]:
        given = {
            "table": f"{quoted(self.mapping.schema_name)}.{quoted(self.mapping.table_name)}",
            "columns": list(self.wanted.columns),
            "words": [*self.wanted.columns, *self.wanted.names],
            "ledger": self.settings.ledger_schema,
            **more,
        }
        return self.connection.execute(text(sql), given).all()


def partitions(connection: Connection, mapping: Mapping) -> tuple[str, ...]:
    """The names of the table and its partitions; empty when the table does not exist."""
    table = f"{quoted(mapping.schema_name)}.{quoted(mapping.table_name)}"
    return tuple(connection.scalars(text(_PARTITIONS), {"table": table}))


def look(connection: Connection, settings: Settings, mapping: Mapping, wanted: Wanted) -> list[Finding]:
    """What in this database touches the mapped columns."""
    seen = _Look(connection, settings, mapping, wanted)
    return [*_dependents(seen), *_cascades(seen), *_functions(seen)]


def seen_at_run_time(
    connection: Connection, settings: Settings, mapping: Mapping, window: timedelta | None
) -> list[Finding] | None:
    """What the fence has caught, by fingerprint; None where the ledger keeps no such catalogue (yet)."""
    name = f"{quoted(settings.ledger_schema)}.bypasses"
    if not connection.scalar(text("select to_regclass(:name) is not null"), {"name": name}):
        return None
    statement = _RUNTIME.format(schema=quoted(settings.ledger_schema))
    rows = connection.execute(text(statement), {"mapping": mapping.name, "window": window})
    columns = {(one.bucket, one.currency): one.column for one in mapping.columns}
    return [
        Finding(
            "runtime",
            row.fingerprint,
            None,
            "write",
            mapping.name,
            columns.get((row.bucket, row.currency)),
            f"{row.applications or 'no application name'} as {row.users}",
            f"{row.operation}, {row.writes} times, last {row.last:%Y-%m-%d %H:%M}",
            shortened(row.query or ""),
            accepted=reason_in(row.query),
        )
        for row in rows
    ]


def _dependents(seen: _Look) -> Iterator[Finding]:
    for row in seen.rows(_DEPENDENTS):
        how, _ = _SHAPES.get(row[0], (row[0], "read"))
        access: Access = "read"
        if row.rulename == "_RETURN":
            how = "materialized view" if row.kind == "m" else "view"
        elif row.rulename is not None:
            touches = read_sql(row.definition, seen.wanted)
            access = "write" if any(each.access == "write" for each in touches) else "read"
        elif row[0] == "pg_constraint":
            changes = [
                f"on {event} {_CHANGES[kind]}"
                for event, kind in (("update", row.on_update), ("delete", row.on_delete))
                if kind in _CHANGES
            ]
            how, access = " ".join(["foreign key", *changes]), "write" if changes else "definition"
        name = f"{how.partition(' that ')[0]} {row.name}" if row.rulename == "_RETURN" else row.name
        yield _of(seen, name, row.column_name, access, how, row.definition, row.comment)


def _cascades(seen: _Look) -> Iterator[Finding]:
    for row in seen.rows(_CASCADES):
        how = f"rows are deleted with their row in {row.referenced}"
        name = f"constraint {row.conname} on {seen.mapping.table}"
        yield _of(seen, name, None, "write", how, row.definition, row.comment)


def _functions(seen: _Look) -> Iterator[Finding]:
    for row in seen.rows(_FUNCTIONS):
        lines = row.body.splitlines()
        ignores = Ignores.of(lines)
        side: Side = "mapped" if row.on_table else "other" if row.is_trigger else "hole"
        touches = read_body(row.body, seen.wanted, row.language, side)
        scope = ", ".join(row.triggers)
        for line, touch in touches:
            code = lines[line - 1] if line <= len(lines) else ""
            found = _of(seen, f"function {row.name}", touch.column, touch.access, touch.how, code, row.comment)
            reason = found.accepted or ignores.reason(line, line)
            yield Finding(**{**vars(found), "line": line, "scope": scope, "sure": touch.sure, "accepted": reason})
        words = row.body.lower()
        if (
            not touches
            and any(column.lower() in words for column in seen.wanted.columns)
            and seen.wanted.table in words
        ):
            found = _of(seen, f"function {row.name}", None, "unknown", "names table and column", "", row.comment)
            yield Finding(**{**vars(found), "scope": scope, "sure": False})


def _of(
    seen: _Look, name: str, column: str | None, access: Access, how: str, code: str, comment: str | None
) -> Finding:
    return Finding(
        "database",
        name,
        None,
        access,
        seen.mapping.name,
        column,
        "",
        how,
        shortened(code or ""),
        accepted=reason_in(comment),
    )
