"""Whether the ledger's tables have the columns and guards that they were made with, and none of anybody else's."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from sqlalchemy import Connection, text

from walletmigrate import schema
from walletmigrate.checkup import INSTALLATION, Finding
from walletmigrate.checkup_guards import GUARDS, Guard
from walletmigrate.config import Settings
from walletmigrate.schema import quoted, render

_TABLE: Final = re.compile(r"^create table \S+?\.(\w+) \(\n(.*?)^\)", re.MULTILINE | re.DOTALL)
_COLUMN: Final = re.compile(
    r"^    (?!check\b|unique\b|primary\b|--|\))(\w+) ([\w.\"]+(?: precision)?(?:\[\])?)([^\n]*)", re.MULTILINE
)
_SET: Final = re.compile(r"\bnot null\b|\bprimary key\b")
_DOMAIN: Final = re.compile(r"^create domain \S+?\.(\w+) ", re.MULTILINE)
_ANEW: Final = "walletmigrate verify, then make it anew as the ledger's migration has it"

# An index of somebody else's forbids nothing, unless it is unique. Nor does an invalid one of the ledger's.
_STANDING: Final = """
select
    s.kind, s.name, s.relation, s.decides,
    -- As the record has it: without the schema's name, which stands there or not as the session's search_path is.
    replace(s.definition, format('%I.', cast(:ledger as text)), '') as definition
from (
    select 'constraint' as kind, k.conname as name, coalesce(c.relname, t.typname) as relation, true as decides,
        pg_get_constraintdef(k.oid) as definition
    from pg_constraint as k
    left join pg_class as c on c.oid = k.conrelid
    left join pg_type as t on t.oid = k.contypid
    where k.connamespace = cast(:schema as regnamespace) and k.contype in ('p', 'u', 'c', 'f', 'x')
    union all
    select 'index', i.relname, c.relname, x.indisunique, pg_get_indexdef(x.indexrelid)
    from pg_index as x
    inner join pg_class as c on c.oid = x.indrelid
    inner join pg_class as i on i.oid = x.indexrelid
    where
        c.relnamespace = cast(:schema as regnamespace) and x.indisvalid
        and not exists (select from pg_constraint as k where k.conindid = x.indexrelid)
    union all
    select 'trigger', t.tgname, c.relname, true, pg_get_triggerdef(t.oid)
    from pg_trigger as t inner join pg_class as c on c.oid = t.tgrelid
    where c.relnamespace = cast(:schema as regnamespace) and not t.tgisinternal
) as s
order by 3, 1, 2
"""


def examine(connection: Connection, settings: Settings) -> Iterator[Finding]:
    """All findings of this kind; none while the schema is another release's, which may have others."""
    if schema.revision(connection, settings.ledger_schema) != schema.head():
        return
    made = render("ledger", schema=quoted(settings.ledger_schema))
    yield from _columns(connection, settings, made)
    yield from _guards(connection, settings, made)


def _guards(connection: Connection, settings: Settings, made: str) -> Iterator[Finding]:
    name = settings.ledger_schema
    rows = connection.execute(text(_STANDING), {"schema": quoted(name), "ledger": name})
    there = {Guard(row.kind, row.name, row.relation): row for row in rows}
    for one, definition in GUARDS.items():
        now = there.get(one)
        if now is None and one.kind != "trigger":  # those are looked at with what they fire at
            yield Finding(f"the {one.kind} {one.name} of the ledger {name} is missing", _ANEW, INSTALLATION)
        elif now is not None and now.definition != definition:
            what = f"the {one.kind} {one.name} on {name}.{one.relation} is not as it was made: {now.definition}"
            yield Finding(what, _ANEW, INSTALLATION)
    domains = set(_DOMAIN.findall(made))
    of_ledger = {table for table, _ in _TABLE.findall(made)} | domains
    for one, row in there.items():
        if row.decides and one.relation in of_ledger and one not in GUARDS:
            what = f"the {one.kind} {one.name} on {name}.{one.relation} is not the ledger's: postings may fail by it"
            yield Finding(what, _dropping(name, one, "domain" if one.relation in domains else "table"), INSTALLATION)


def _columns(connection: Connection, settings: Settings, made: str) -> Iterator[Finding]:
    wanted = [(table, *column) for table, body in _TABLE.findall(made) for column in _COLUMN.findall(body)]
    rows = connection.execute(
        text(
            "select w.relation, w.name, a.attname is not null as there, a.atttypid = to_regtype(w.type) as of_type, "
            "w.is_set and not a.attnotnull as empty, format_type(a.atttypid, a.atttypmod) as type "
            "from unnest(cast(:relations as text[]), cast(:names as text[]), cast(:types as text[]), "
            "cast(:set as boolean[])) as w (relation, name, type, is_set) left join pg_attribute as a "
            "on a.attrelid = to_regclass(format('%I.%I', cast(:schema as text), w.relation)) "
            "and a.attname = w.name and a.attnum > 0 and not a.attisdropped"
        ),
        {
            "schema": settings.ledger_schema,
            "relations": [relation for relation, *_ in wanted],
            "names": [name for _, name, *_ in wanted],
            "types": [type_ for _, _, type_, _ in wanted],
            "set": [bool(_SET.search(more)) for *_, more in wanted],
        },
    )
    for row in rows:
        what = f"the column {row.name} of {settings.ledger_schema}.{row.relation}"
        if not row.there:
            mend = f"stop the application's postings, and restore the table {row.relation} from a backup"
            yield Finding(f"{what} is missing", mend, INSTALLATION)
        elif not row.of_type:
            yield Finding(f"{what} is not as it was made: {row.type}", _ANEW, INSTALLATION)
        elif row.empty:
            yield Finding(f"{what} is not as it was made: it may be null", _ANEW, INSTALLATION)


def _dropping(ledger: str, one: Guard, of: str) -> str:
    on = f"{quoted(ledger)}.{quoted(one.relation)}"
    statement = {
        "constraint": f"alter {of} {on} drop constraint {quoted(one.name)}",
        "index": f"drop index {quoted(ledger)}.{quoted(one.name)}",
        "trigger": f"drop trigger {quoted(one.name)} on {on}",
    }[one.kind]
    return f"ask who made it, and what for; then, as the ledger's owner: {statement}"
