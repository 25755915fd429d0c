"""The triggers of a retired mapping: on its keys for good, on its balance columns for as long as these stand."""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import Connection, text

from walletmigrate import capture, functions
from walletmigrate.config import Mapping, Settings
from walletmigrate.grants import grant
from walletmigrate.retirement import GUARDS, KEPT, guard_name
from walletmigrate.schema import quoted, render, run_script

# What a trigger is in the catalog: of a row (1) or a statement (0), before it 2, by insert 4, delete 8, update 16,
# truncate 32.
_TYPES: Final = {"delete": 9, "move": 19, "key": 17, "empty": 32, "insert": 5, "update": 17}

_CHANGES: Final = "old.%1$I is distinct from new.%1$I"
_STATES: Final = """
select
    w.relation, t.oid is null as missing, t.tgenabled <> 'A' as sleeps,
    t.tgfoid is distinct from to_regproc(w.function)::oid or t.tgtype <> w.type or cardinality(t.tgattr::int2[]) > 0
    or (w.said = '{}') <> (t.tgqual is null) or exists (
        select from unnest(w.said) as s (part) where position(lower(s.part) in lower(pg_get_triggerdef(t.oid))) = 0
    ) as differs
from (
    select
        r as relation, cast(:function as text) as function, cast(:type as int) as type, cast(:name as text) as name,
        coalesce((select array_agg(format(:watched, c)) from unnest(cast(:columns as text[])) as c), '{}') as said
    from unnest(cast(:relations as text[])) as r
) as w
left join pg_trigger as t on t.tgname = w.name and t.tgrelid = to_regclass(w.relation)
order by 1
"""


def watch_keys(connection: Connection, settings: Settings, mapping: Mapping) -> None:
    """Put up the triggers on the keys: a row that goes closes its accounts."""
    function = f"{quoted(settings.ledger_schema)}.gone_{mapping.name}()"
    table = functions.relation(mapping)
    for event, when in KEPT.items():
        name = guard_name(mapping, event)
        for one in capture.relations(connection, mapping) if event == "empty" else [table]:
            what = when.format(table=one, key=quoted(mapping.key))
            connection.exec_driver_sql(f"create trigger {name} {what} execute function {function}")
            connection.exec_driver_sql(f"alter table {one} enable always trigger {name}")


def watch_columns(connection: Connection, settings: Settings, mapping: Mapping) -> None:
    """Put up the triggers on the columns, which nobody may write any more, and their function."""
    connection.exec_driver_sql(f"set local role {quoted(settings.roles.owner)}")
    run_script(connection, guard(settings, mapping))
    grant(connection, settings)
    connection.exec_driver_sql("reset role")
    columns = [quoted(column.column) for column in mapping.columns]
    watched = {
        "insert": " or ".join(f"new.{name} <> 0" for name in columns),
        "update": " or ".join(f"old.{name} is distinct from new.{name}" for name in columns),
    }
    table = functions.relation(mapping)
    for event in GUARDS:
        connection.exec_driver_sql(
            f"create trigger {guard_name(mapping, event)} after {event} on {table} for each row "
            f"when ({watched[event]}) execute function {quoted(settings.ledger_schema)}.retired_{mapping.name}()"
        )
        connection.exec_driver_sql(f"alter table {table} enable always trigger {guard_name(mapping, event)}")


def drop(connection: Connection, mapping: Mapping) -> None:
    """Take down whichever of them stand."""
    for event in (*GUARDS, *KEPT):
        for table in capture.relations(connection, mapping) if event == "empty" else [functions.relation(mapping)]:
            connection.exec_driver_sql(f"drop trigger if exists {guard_name(mapping, event)} on {table}")


def guard(settings: Settings, mapping: Mapping) -> str:
    """The function of the columns' triggers, as SQL."""
    names = {"schema": quoted(settings.ledger_schema), "mapping": mapping.name}
    return render("guard", **names, relation=functions.relation(mapping))


def mend(connection: Connection, settings: Settings, mapping: Mapping) -> list[str]:
    """Put up anew what is not as it was made; gives the problems that there were. Takes a SHARE ROW EXCLUSIVE lock."""
    found = problems(connection, settings, mapping)
    if found:
        drop(connection, mapping)
        watch_keys(connection, settings, mapping)
        if columns_stand(connection, mapping):
            watch_columns(connection, settings, mapping)
    return found


def problems(connection: Connection, settings: Settings, mapping: Mapping) -> list[str]:
    """How the triggers of a mapping in phase retired differ from what was made: missing, asleep, another."""
    schema, key = quoted(settings.ledger_schema), [mapping.key]
    wanted = [(event, "gone", _CHANGES, key if event in ("move", "key") else []) for event in KEPT]
    if columns_stand(connection, mapping):
        columns = [column.column for column in mapping.columns]
        wanted += [("insert", "retired", "new.%1$I <> ", columns), ("update", "retired", _CHANGES, columns)]
    relations = capture.relations(connection, mapping)
    found = []
    for event, function, watched, columns in wanted:
        name = guard_name(mapping, event)
        values: dict[str, Any] = {"name": name, "relations": relations, "columns": columns, "watched": watched}
        values |= {"type": _TYPES[event], "function": f"{schema}.{function}_{mapping.name}"}
        for row in connection.execute(text(_STATES), values):
            how = "is missing" if row.missing else "is disabled, or does not fire in replica role" if row.sleeps else ""
            if how or row.differs:
                found.append(f"{name} on {row.relation} {how or 'was replaced'}")
    return found


def columns_stand(connection: Connection, mapping: Mapping) -> bool:
    """Whether the balance columns are there still."""
    query = text(
        "select count(*) from pg_attribute "
        "where attrelid = to_regclass(:table) and attname = any(:columns) and not attisdropped"
    )
    columns = [column.column for column in mapping.columns]
    found = connection.scalar(query, {"table": functions.relation(mapping), "columns": columns})
    return bool(found == len(columns))
