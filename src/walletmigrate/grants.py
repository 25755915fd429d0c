"""What each role may do in the ledger's schema: said once, granted by `install` and looked after by `doctor`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from sqlalchemy import Connection, text

from walletmigrate.config import Settings
from walletmigrate.schema import quoted

Kind = Literal["schema", "table", "sequence", "function"]

SNAPSHOTS: Final = (
    "begin_snapshot",
    "fold_snapshot",
    "advance_snapshot",
    "merge_snapshots",
    "drop_snapshots",
    "adopt_journal",
)
_POSTING: Final = ("turn_stale", "diverged", "resolve", "replay", "enter_batch", "labelled")
_POSTING_OF: Final = ("post", "lock", "leg", "plain", "settle", "move")
_WORKING: Final = (*SNAPSHOTS, "fold_system_accounts", "fill_accounts", "set_line", "undo_openings", "erase")
_WORKING_OF: Final = (
    *("cut", "last", "span", "backfill", "late", "open", "freeze", "seal", "unfreeze", "unseal", "close"),
    *("amend", "rewrite", "correct", "recount", "recalculate", "standing"),
)


@dataclass(frozen=True)
class Grant:
    """Privileges (lower case) of some roles on one thing. ``name`` is a relation's, or a function's signature with
    its schema; for the schema itself it is the schema's.
    """

    kind: Kind
    name: str
    privileges: tuple[str, ...]
    roles: tuple[str, ...]


def grant(connection: Connection, settings: Settings) -> None:
    """Give each role what it may do in the ledger's schema, and the public nothing. As the owner, or a superuser."""
    schema = quoted(settings.ledger_schema)
    connection.exec_driver_sql(f"revoke all on all functions in schema {schema} from public")
    for one in wanted(connection, settings):
        name = one.name if one.kind == "function" else quoted(one.name)
        target = f"{schema}.{name}" if one.kind in ("table", "sequence") else name
        roles = ", ".join(quoted(role) for role in one.roles)
        connection.exec_driver_sql(f"grant {', '.join(one.privileges)} on {one.kind} {target} to {roles}")


def wanted(connection: Connection, settings: Settings) -> Iterator[Grant]:
    """Every grant of a whole installation, on what stands in the schema now."""
    app, operator, auditor = settings.roles.app, settings.roles.operator, settings.roles.auditor
    yield Grant("schema", settings.ledger_schema, ("usage",), (app, operator, auditor))
    for name in _relations(connection, settings.ledger_schema):
        yield Grant("table", name, ("select",), (operator, auditor))
    for name in ("line", "ceiling", "transaction_ids", *(f"rejected_{each}" for each in _mappings(settings))):
        yield Grant("sequence", name, ("select",), (operator, auditor))
    yield Grant("sequence", "line", ("select",), (app,))  # a decision asks whether it runs
    for name in ("accounts", "transactions", "wallet_entries", "control", "mappings", "flag_documents", "processes"):
        yield Grant("table", name, ("select",), (app,))
    yield Grant("table", "flag_documents", ("insert", "update"), (app, operator))
    yield Grant("table", "processes", ("insert", "update", "delete"), (app, operator))
    yield from _of_operator(operator)
    yield from _functions(connection, settings)


def _of_operator(operator: str) -> Iterator[Grant]:
    for name in ("audit_log", "verifications"):
        yield Grant("table", name, ("insert",), (operator,))
    yield Grant("table", "jobs", ("insert", "update"), (operator,))
    yield Grant("table", "control", ("update",), (operator,))
    yield Grant("table", "job_batches", ("insert", "update", "delete"), (operator,))
    yield Grant("table", "bypasses", ("delete",), (operator,))
    yield Grant("table", "bypasses_pruned", ("insert", "update"), (operator,))
    for name in ("snapshots", "snapshot_balances", "snapshot_totals", "snapshot_checksums"):
        yield Grant("table", name, ("insert", "update", "delete"), (operator,))


def _functions(connection: Connection, settings: Settings) -> Iterator[Grant]:
    names = _mappings(settings)
    posting = {*_POSTING, *(f"{one}_{name}" for one in _POSTING_OF for name in names)}
    working = {*_WORKING, *(f"{one}_{name}" for one in _WORKING_OF for name in names)}
    rows = connection.execute(
        text(
            "select p.oid::regprocedure::text, p.proname from pg_proc p join pg_namespace n on n.oid = p.pronamespace "
            "where n.nspname = :schema order by 1"
        ),
        {"schema": settings.ledger_schema},
    )
    for signature, name in rows:
        if name in posting:
            yield Grant("function", signature, ("execute",), (settings.roles.app, settings.roles.operator))
        elif name in working:
            yield Grant("function", signature, ("execute",), (settings.roles.operator,))


def _relations(connection: Connection, schema: str) -> Sequence[str]:
    """Tables and views, as GRANT … ON ALL TABLES takes them."""
    query = (
        "select c.relname from pg_class c join pg_namespace n on n.oid = c.relnamespace "
        "where n.nspname = :schema and c.relkind in ('r', 'p', 'v', 'm', 'f') order by 1"
    )
    return connection.scalars(text(query), {"schema": schema}).all()


def _mappings(settings: Settings) -> list[str]:
    return [mapping.name for mapping in settings.mappings]
