"""Whether the ledger's tables have the columns and guards that they were made with, and none of anybody else's."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from sqlalchemy import Connection, text

from walletmigrate import schema
from walletmigrate.checkup import INSTALLATION, Finding
from walletmigrate.config import Settings
from walletmigrate.schema import quoted, render

_NAMES: Final = """
mappings_capture_mode_check mappings_pkey
control_phase_check control_pkey control_singleton_check
accounts_key_mapping_bucket_currency_key accounts_pkey
system_accounts_id_check system_accounts_name_currency_key system_accounts_pkey
transactions_pkey
transaction_details_pkey
idempotency_keys_pkey
failures_pkey
bypasses_pruned_pkey
jobs_pkey jobs_state_check
job_batches_job_id_fkey job_batches_pkey job_batches_state_check
verifications_check verifications_form_check verifications_pkey
snapshots_pkey snapshots_state_check
snapshot_balances_pkey
snapshot_totals_pkey
snapshot_checksums_pkey
audit_log_pkey
flag_documents_pkey flag_documents_singleton_check
processes_pkey
schema_version_pkc
"""
CONSTRAINTS: Final = frozenset(_NAMES.split())
"""As PostgreSQL names them, table by table; a test compares them with a fresh schema."""
TRIGGERS: Final = frozenset({"append_only", "append_only_truncate", "ceiling"})
_INDEX: Final = re.compile(r"^create (?:unique )?index (\w+) on \S+?\.(\w+)", re.MULTILINE)
_TABLE: Final = re.compile(r"^create table \S+?\.(\w+) \(\n(.*?)^\)", re.MULTILINE | re.DOTALL)
_COLUMN: Final = re.compile(r"^    (?!check\b|unique\b|primary\b|--|\))(\w+) ", re.MULTILINE)

# An index of somebody else's forbids nothing, unless it is unique. Nor does an invalid one of the ledger's.
_STANDING: Final = """
select c.relname as relation, 'constraint' as kind, k.conname as name, true as decides
from pg_constraint as k inner join pg_class as c on c.oid = k.conrelid
where c.relnamespace = cast(:schema as regnamespace) and k.contype in ('p', 'u', 'c', 'f', 'x')
union all
select c.relname, 'index', i.relname, x.indisunique
from pg_index as x
inner join pg_class as c on c.oid = x.indrelid
inner join pg_class as i on i.oid = x.indexrelid
where
    c.relnamespace = cast(:schema as regnamespace) and x.indisvalid
    and not exists (select from pg_constraint as k where k.conindid = x.indexrelid)
union all
select c.relname, 'trigger', t.tgname, true
from pg_trigger as t inner join pg_class as c on c.oid = t.tgrelid
where c.relnamespace = cast(:schema as regnamespace) and not t.tgisinternal
order by 1, 2, 3
"""


def examine(connection: Connection, settings: Settings) -> Iterator[Finding]:
    """All findings of this kind; none while the schema is another release's, which may have others."""
    if schema.revision(connection, settings.ledger_schema) != schema.head():
        return
    made = render("ledger", schema=quoted(settings.ledger_schema))
    yield from _columns(connection, settings, made)
    rows = connection.execute(text(_STANDING), {"schema": quoted(settings.ledger_schema)}).all()
    indexes = dict(_INDEX.findall(made))
    there = {(row.kind, row.name) for row in rows}
    name = settings.ledger_schema
    for kind, wanted in (("constraint", CONSTRAINTS), ("index", frozenset(indexes))):
        for one in sorted(wanted):
            if (kind, one) not in there:
                mend = "walletmigrate verify, then make it anew as the ledger's migration has it"
                yield Finding(f"the {kind} {one} of the ledger {name} is missing", mend, INSTALLATION)
    tables = {table for table, _ in _TABLE.findall(made)}
    known = CONSTRAINTS | TRIGGERS | frozenset(indexes)
    for row in rows:
        if row.decides and row.relation in tables and row.name not in known:
            what = f"the {row.kind} {row.name} on {name}.{row.relation} is not the ledger's: postings may fail by it"
            yield Finding(what, _dropping(settings, row.kind, row.name, row.relation), INSTALLATION)


def _columns(connection: Connection, settings: Settings, made: str) -> Iterator[Finding]:
    rows = connection.execute(
        text(
            "select c.relname, a.attname from pg_attribute as a inner join pg_class as c on c.oid = a.attrelid "
            "where c.relnamespace = cast(:schema as regnamespace) and a.attnum > 0 and not a.attisdropped"
        ),
        {"schema": quoted(settings.ledger_schema)},
    )
    there = {tuple(row) for row in rows}
    for table, body in _TABLE.findall(made):
        for column in _COLUMN.findall(body):
            if (table, column) not in there:
                what = f"the column {column} of {settings.ledger_schema}.{table} is missing"
                mend = f"stop the application's postings, and restore the table {table} from a backup"
                yield Finding(what, mend, INSTALLATION)


def _dropping(settings: Settings, kind: str, name: str, relation: str) -> str:
    table = f"{quoted(settings.ledger_schema)}.{quoted(relation)}"
    statement = {
        "constraint": f"alter table {table} drop constraint {quoted(name)}",
        "index": f"drop index {quoted(settings.ledger_schema)}.{quoted(name)}",
        "trigger": f"drop trigger {quoted(name)} on {table}",
    }[kind]
    return f"ask who made it, and what for; then, as the ledger's owner: {statement}"
