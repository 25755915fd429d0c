"""The fence: the triggers on a legacy table, their installation, and whether they still stand as made."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine, Row, text
from sqlalchemy.exc import OperationalError

from walletmigrate import connect
from walletmigrate.config import Mapping, Settings
from walletmigrate.functions import guards, made_guards, relation
from walletmigrate.retired import is_retired
from walletmigrate.schema import quoted

FENCE_ATTEMPTS = 20
FENCE_PAUSE_SECONDS = 0.5
"""Between two tries: as long as a try lets the traffic wait."""

STALE_BATCH = 5_000
"""Accounts turned stale in one statement."""

T = TypeVar("T")

EVENTS = ("insert", "delete", "update", "truncate")

_TRIGGERS = """
select
    format('%I on %I.%I', t.tgname, n.nspname, c.relname) as name, t.tgenabled::text as enabled,
    t.xmin::text as xmin, t.tgparentid = 0 as own,
    -- Numbers of transactions are a cluster's own: a dump that was restored elsewhere may have the same one by chance.
    (select s.system_identifier::text from pg_control_system() as s) as cluster
from pg_trigger as t
join pg_class as c on c.oid = t.tgrelid
join pg_namespace as n on n.oid = c.relnamespace
where
    t.tgname = any(:names)
    and (c.oid = to_regclass(:table) or c.oid in (select relid from pg_partition_tree(to_regclass(:table))))
    -- On a table that the mapping named before, or on a partition that was detached.
    or t.tgfoid in (
        select p.oid from pg_proc as p join pg_namespace as s on s.oid = p.pronamespace
        where s.nspname = :schema and p.proname = any(:functions)
    )
order by 1
"""


@dataclass(frozen=True)
class FenceProblem:
    """One way in which the fence is not as it was made; ``trigger`` is "name on relation", or "function name".

    ``blind``: writes may have gone past it, of columns that it was made to watch.
    """

    trigger: str
    problem: str
    blind: bool = True


def install_fence(connection: Connection, settings: Settings, mapping: Mapping) -> bool:
    """Put the fence on the legacy table and on each of its partitions; False when it stood already.

    Takes a SHARE ROW EXCLUSIVE lock, under the lock time limit of the caller's transaction: writers in
    flight are waited out, so that every later write meets the fence.
    """
    if fence_recorded(connection, settings, mapping) and not fence_problems(connection, settings, mapping):
        return False
    remove_triggers(connection, settings, mapping)
    for statement in _statements(connection, settings, mapping):
        connection.exec_driver_sql(statement)
    connection.execute(
        text(f"update {quoted(settings.ledger_schema)}.mappings set fence = cast(:fence as jsonb) where name = :name"),
        {"fence": json.dumps(_made(connection, settings, mapping)), "name": mapping.name},
    )
    return True


def fence_recorded(connection: Connection, settings: Settings, mapping: Mapping) -> bool:
    """Whether a fence was ever put on the table of this mapping and not removed since."""
    return bool(_recorded(connection, settings, mapping))


def fence_problems(connection: Connection, settings: Settings, mapping: Mapping) -> list[FenceProblem]:
    """How the fence differs from what was made: missing, replaced, disabled, or a partition without it.

    Its functions count: a trigger keeps its identity while the function under it is replaced.
    """
    recorded = _recorded(connection, settings, mapping)
    standing = _standing(connection, settings, mapping)
    if not recorded and is_retired(connection, settings.ledger_schema):
        return []  # there is nothing left to guard
    if not recorded:
        return [FenceProblem(f"the fence on {mapping.table}", "was never installed")]
    problems = []
    wanted = _expected(connection, mapping)
    for name, made in recorded.items():
        now = standing.get(name)
        if name not in wanted:
            continue  # a detached or dropped partition: its rows are no longer the table's
        if now is None:
            problems.append(FenceProblem(name, "is missing"))
        elif now["enabled"] != "A":
            problems.append(FenceProblem(name, "is disabled, or does not fire in replica role"))
        elif now["xmin"] != made["xmin"] or now["cluster"] != made.get("cluster", now["cluster"]):
            problems.append(FenceProblem(name, "was replaced or altered"))
        elif made.get("watches") != _watched(mapping):
            problems.append(FenceProblem(name, "was made for other columns than the mapping has", blind=False))
    late = sorted(wanted - recorded.keys())
    problems += [FenceProblem(name, "is missing on a relation that came later") for name in late]
    return problems + function_problems(connection, settings, mapping)


def function_problems(connection: Connection, settings: Settings, mapping: Mapping) -> list[FenceProblem]:
    """Which functions of the fence are not as they were made; `install` makes them anew."""
    standing = guards(connection, settings.ledger_schema, mapping.name)
    return [
        FenceProblem(f"function {settings.ledger_schema}.{name}", "was replaced" if name in standing else "is missing")
        for name, made in sorted(made_guards(connection, settings.ledger_schema, mapping.name).items())
        if standing.get(name) != made
    ]


def remove_triggers(connection: Connection, settings: Settings, mapping: Mapping) -> None:
    """Drop the fence's triggers, wherever they stand. What becomes of the accounts is the caller's to say first."""
    for row in _triggers(connection, settings, mapping):
        if row.own:  # a row trigger that was cloned to a partition goes with its parent's
            trigger, _, target = row.name.partition(" on ")
            connection.exec_driver_sql(f"drop trigger {trigger} on {target}")


def turn_stale(
    connection: Connection, settings: Settings, mapping: Mapping, reason: str, *, skip_locked: bool = False
) -> bool:
    """Turn a batch of mirrored accounts stale, locked by id; whether there may be more.

    ``skip_locked`` leaves out what a posting in flight has locked: who does not hold the legacy row, as a posting
    does, could deadlock with it.
    """
    accounts = f"{quoted(settings.ledger_schema)}.accounts"
    done = connection.execute(
        text(
            f"with batch as materialized (select id from {accounts} where mapping = :name and state = 'mirrored' "
            f"order by id limit :limit for no key update {'skip locked' if skip_locked else ''}) "
            f"update {accounts} as a set state = 'stale', state_at = clock_timestamp(), state_reason = :reason "
            "from batch where a.id = batch.id"
        ),
        {"name": mapping.name, "limit": STALE_BATCH, "reason": reason},
    ).rowcount
    return done == STALE_BATCH


def with_short_locks(engine: Engine, work: Callable[[Connection], T]) -> T:
    """Do ``work`` in a transaction that waits for a lock only shortly, many times over.

    A fence needs one short lock on the legacy table; who waits for it blocks all the traffic behind. So between two
    tries it stands back.
    """
    for attempt in range(FENCE_ATTEMPTS):
        try:
            with engine.begin() as connection:
                connection.exec_driver_sql("set local lock_timeout = '500ms'")
                return work(connection)
        except OperationalError as error:
            # Or a transaction that has read the table and now would write it, and waits for this one.
            if not connect.conflicted(error) or attempt == FENCE_ATTEMPTS - 1:
                raise
        time.sleep(FENCE_PAUSE_SECONDS)
    raise AssertionError("unreachable")


def _name(mapping: Mapping, event: str) -> str:
    """At most 63 characters for every mapping's name; two mappings of one table have a fence each."""
    return f"walletmigrate_{mapping.name}_{event}"


def _statements(connection: Connection, settings: Settings, mapping: Mapping) -> list[str]:
    function = f"{quoted(settings.ledger_schema)}.fence_{mapping.name}()"
    truncate = f"{quoted(settings.ledger_schema)}.fence_truncate_{mapping.name}()"
    table = relation(mapping)
    # Of an update without a column list: a BEFORE trigger of the application may change a balance that was not
    # assigned. And without WHEN, which is parsed at every update of the table (6 % of a posting): the function sees
    # for itself that nothing changed. That of a delete is always true; PostgreSQL alters no column that it names.
    named = " or ".join(f"old.{quoted(n)} is not null" for n in _watched(mapping))
    row_triggers = {"insert": "", "delete": f"when ({named}) ", "update": ""}
    made = [
        f"create trigger {_name(mapping, event)} after {event} on {table} "
        f"for each row {when}execute function {function}"
        for event, when in row_triggers.items()
    ]
    tables = relations(connection, mapping)
    made += [
        f"create trigger {_name(mapping, 'truncate')} after truncate on {name} "
        f"for each statement execute function {truncate}"
        for name in tables
    ]
    return made + [
        f"alter table only {name} enable always trigger {_name(mapping, event)}" for name in tables for event in EVENTS
    ]


def relations(connection: Connection, mapping: Mapping) -> list[str]:
    """The legacy table and all its partitions, quoted."""
    rows = connection.execute(
        text(
            "select format('%I.%I', n.nspname, c.relname) from pg_class c "
            "join pg_namespace n on n.oid = c.relnamespace where c.oid = to_regclass(:t) "
            "or c.oid in (select relid from pg_partition_tree(to_regclass(:t))) order by c.oid"
        ),
        {"t": relation(mapping)},
    )
    return list(rows.scalars())


def _expected(connection: Connection, mapping: Mapping) -> set[str]:
    """The triggers a whole fence has today, as "name on relation"."""
    return {f"{_name(mapping, event)} on {name}" for name in relations(connection, mapping) for event in EVENTS}


def _watched(mapping: Mapping) -> list[str]:
    """The columns whose change the fence looks for; a bucket that the mapping gets later needs a new one."""
    return [mapping.key, *(column.column for column in mapping.columns)]


def _made(connection: Connection, settings: Settings, mapping: Mapping) -> dict[str, dict[str, Any]]:
    found = _standing(connection, settings, mapping)
    return {name: {**identity, "watches": _watched(mapping)} for name, identity in found.items()}


def _standing(connection: Connection, settings: Settings, mapping: Mapping) -> dict[str, dict[str, str]]:
    found = _triggers(connection, settings, mapping)
    return {row.name: {"enabled": row.enabled, "xmin": row.xmin, "cluster": row.cluster} for row in found}


def _triggers(connection: Connection, settings: Settings, mapping: Mapping) -> Sequence[Row[Any]]:
    """The triggers with the fence's names on the table and its partitions, and those with its functions anywhere."""
    return connection.execute(
        text(_TRIGGERS),
        {
            "table": relation(mapping),
            "names": [_name(mapping, event) for event in EVENTS],
            "schema": settings.ledger_schema,
            "functions": [f"fence_{mapping.name}", f"fence_truncate_{mapping.name}"],
        },
    ).all()


def _recorded(connection: Connection, settings: Settings, mapping: Mapping) -> dict[str, dict[str, Any]]:
    found = connection.scalar(
        text(f"select fence from {quoted(settings.ledger_schema)}.mappings where name = :name"),
        {"name": mapping.name},
    )
    return dict(found or {})
