"""The Alembic migration that drops retired balance columns, and brings them back filled from the ledger."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import Connection, Row, text

from walletmigrate import functions
from walletmigrate.config import Mapping, Settings
from walletmigrate.errors import UsageError
from walletmigrate.schema import quoted

if TYPE_CHECKING:  # Alembic is loaded where migrations are read
    from alembic.script import Script as Migration

GUARDS = ("insert", "update")
"""Of the columns: they go with these."""
KEPT = {
    "delete": "after delete on {table} for each row",
    # Of a row that its new key brings to another partition, AFTER triggers see a delete and an insert: this one sees it
    # first. The other one sees the key that a BEFORE trigger of the application has changed.
    "move": "before update on {table} for each row when (old.{key} is distinct from new.{key})",
    "key": "after update on {table} for each row when (old.{key} is distinct from new.{key})",
    "empty": "after truncate on {table} for each statement",
}
"""Of the keys: they stay. The last one stands on each partition."""


@dataclass(frozen=True)
class Script:
    """A migration as a file of the application's: its path, its revision and the one before, and its text."""

    path: Path
    revision: str
    down_revision: str | None
    text: str


def guard_name(mapping: Mapping, event: str) -> str:
    """A trigger of a retired mapping. At most 63 characters for every mapping's name."""
    return f"walletmigrate_{mapping.name}_r_{event}"


def script(
    connection: Connection, settings: Settings, archives: Sequence[tuple[str, str]], folder: Path, down: str | None
) -> Script:
    """Make the text of the migration. ``archives`` are (file name, SHA-256); ``down`` is the revision before it.

    Without ``down`` it takes the place of the one that was made for these columns before, after which somebody went
    back: of two in a row the second would find nothing to drop. Else it follows the only head in the folder. Raises
    UsageError where there are several, or the folder is none of migrations.
    """
    tables = {mapping.name: _Table(connection, settings, mapping) for mapping in settings.mappings}
    upgrade = [_check(settings), "set local lock_timeout = '5s'"]
    downgrade: list[str] = []
    for mapping in settings.mappings:
        upgrade += tables[mapping.name].drop()
        downgrade += tables[mapping.name].bring_back()
    seed = "\n".join([*upgrade, *downgrade, *(sha256 for _, sha256 in archives)])
    revision = hashlib.sha256(seed.encode()).hexdigest()[:12]
    path = folder / f"{revision}_retire_balance_columns.py"
    title = _TITLE.format(", ".join(f"{m.table}.{c.column}" for m in settings.mappings for c in m.columns))
    before = down
    if down is None:
        known = _known(folder)
        path, revision, before = _made_before(known, title) or (path, revision, _head(known, folder, revision))
    said = "\n".join(f"{name}, SHA-256 {sha256}" for name, sha256 in archives)
    body = _TEMPLATE.format(
        title=title,
        archives=said,
        revision=revision,
        down_revision=repr(before).replace("'", '"'),
        upgrade="".join(_statement(one) for one in upgrade),
        downgrade="".join(_statement(one) for one in downgrade),
    )
    return Script(path, revision, before, body)


def _known(folder: Path) -> list[Migration]:
    """The migrations in a folder, the newest first."""
    from alembic.script import ScriptDirectory

    if not folder.is_dir():
        raise UsageError(f"{folder} is no folder: name the one that holds your migrations (alembic's versions)")
    try:
        return list(ScriptDirectory(str(folder), version_locations=[str(folder)]).walk_revisions())
    except Exception as error:  # the migrations are the application's own Python
        raise UsageError(f"the migrations in {folder} cannot be read ({error}): name --down-revision") from error


def _made_before(known: Sequence[Migration], title: str) -> tuple[Path, str, str | None] | None:
    """Where the migration stands that was made for the same columns: its path, revision, and the one before it."""
    for one in known:
        if one.doc == title and not isinstance(one.down_revision, list | tuple):
            return Path(one.path), one.revision, one.down_revision
    return None


def _head(known: Sequence[Migration], folder: Path, own: str) -> str | None:
    """The newest migration in a folder, itself aside; None where there is none."""
    heads = [one.down_revision if one.revision == own else one.revision for one in known if one.is_head]
    if len(heads) > 1 or any(isinstance(one, tuple) for one in heads):
        named = ", ".join(str(one) for one in heads)
        raise UsageError(f"{folder} has several heads ({named}): name the one to follow by --down-revision")
    return str(heads[0]) if heads and heads[0] is not None else None


class _Table:
    """One mapping's statements, from the catalog as it is before the drop."""

    def __init__(self, connection: Connection, settings: Settings, mapping: Mapping) -> None:
        self._settings = settings
        self._mapping = mapping
        self._table = functions.relation(mapping)
        named = {"table": self._table, "columns": [column.column for column in mapping.columns]}
        self._columns = {row.name: row for row in connection.execute(text(_COLUMNS), named)}
        self._rest = list(connection.execute(text(_CONSTRAINTS), {**named, "quoted": self._table}).scalars())
        self._rest += connection.execute(text(_INDEXES), named).scalars()

    def drop(self) -> list[str]:
        """The guards first: they name the columns, so that nobody drops these in passing."""
        names = [quoted(column.column) for column in self._mapping.columns]
        triggers = [f"drop trigger if exists {guard_name(self._mapping, one)} on {self._table}" for one in GUARDS]
        return [*triggers, f"alter table {self._table} {', '.join(f'drop column {name}' for name in names)}"]

    def bring_back(self) -> list[str]:
        """Columns without a rewrite of the table, balances, then what stood on the columns."""
        made = []
        accounts, key = f"{quoted(self._settings.ledger_schema)}.accounts", quoted(self._mapping.key)
        for column in self._mapping.columns:
            was: Row[tuple[object, ...]] = self._columns[column.column]
            name = quoted(column.column)
            factor = f" * {10**column.scale}" if column.unit == "minor" and column.scale else ""
            filled = (
                f"update {self._table} as l set {name} = a.balance{factor} from {accounts} as a "
                f"where a.mapping = '{self._mapping.name}' and a.key = l.{key}::text collate \"C\" "
                f"and a.bucket = '{column.bucket}' and a.currency = '{column.currency}' "
                "and a.state = 'frozen' and a.balance <> 0"
            )
            default = "drop default" if was.default is None else f"set default {was.default}"
            made += [
                f"alter table {self._table} add column {name} {was.type} not null default 0",
                filled,
                f"alter table {self._table} alter column {name} {default}",
            ]
            if was.nullable:
                made.append(f"alter table {self._table} alter column {name} drop not null")
            if was.comment is not None:
                said = was.comment.replace("'", "''")
                made.append(f"comment on column {self._table}.{name} is '{said}'")
        return [*made, *self._rest]


def _check(settings: Settings) -> str:
    """A database of the ledger must have come to phase retired; one without it has nothing to lose."""
    control = f"{quoted(settings.ledger_schema)}.control"
    name = control.replace("'", "''")
    held = " or ".join(
        f"exists (select from {functions.relation(mapping)} where {quoted(column.column)} <> 0)"
        for mapping in settings.mappings
        for column in mapping.columns
    )
    return (
        "do $$ begin\n"
        f"    if to_regclass('{name}') is null then\n"
        f"        if {held} then\n"
        "            raise exception 'there is no ledger in this database, and the columns hold balances';\n"
        "        end if;\n"
        f"    elsif (select phase from {control}) <> 'retired' then\n"
        "        raise exception 'the phase is not retired' using hint = 'Run first: walletmigrate retire';\n"
        "    end if;\n"
        "end $$"
    )


def _statement(sql: str) -> str:
    """A call of op.execute; a colon before a word would be taken for a parameter."""
    escaped = re.sub(r"(?<![:\w\\]):(?=\w)", r"\\:", sql)
    if "\n" in escaped:
        whole = escaped.replace("\\", "\\\\").replace('"""', '\\"""')
        return f'    op.execute("""{whole}""")\n'
    whole = escaped.replace("\\", "\\\\").replace('"', '\\"')
    return f'    op.execute("{whole}")\n'


_TITLE = "Retire {}: the ledger alone holds the balances."
_TEMPLATE = '''"""{title}

Made by walletmigrate. The balances as they were frozen stand in
{archives}
The downgrade brings the columns back, filled from the ledger; rights on single columns are to be granted again.
"""

from alembic import op

revision = "{revision}"
down_revision = {down_revision}
branch_labels = None
depends_on = None


def upgrade() -> None:
{upgrade}

def downgrade() -> None:
{downgrade}'''

_COLUMNS = """
select
    a.attname as name, format_type(a.atttypid, a.atttypmod) as type, not a.attnotnull as nullable,
    pg_get_expr(d.adbin, d.adrelid) as default, col_description(a.attrelid, a.attnum) as comment
from pg_attribute as a
left join pg_attrdef as d on d.adrelid = a.attrelid and d.adnum = a.attnum
where a.attrelid = to_regclass(:table) and a.attname = any(:columns)
"""

# Not NOT NULL, which comes back with the column (from 18 on it is a constraint of its own).
_CONSTRAINTS = """
select distinct 'alter table ' || :quoted || format(' add constraint %I ', c.conname) || pg_get_constraintdef(c.oid)
from pg_constraint as c
inner join pg_attribute as a on a.attrelid = c.conrelid and a.attnum = any(c.conkey)
where c.conrelid = to_regclass(:table) and a.attname = any(:columns) and c.contype <> 'n' and c.conparentid = 0
order by 1
"""

_INDEXES = """
select distinct pg_get_indexdef(i.indexrelid)
from pg_index as i
inner join pg_depend as d on d.classid = 'pg_class'::regclass and d.objid = i.indexrelid
inner join pg_attribute as a on a.attrelid = d.refobjid and a.attnum = d.refobjsubid
where
    d.refclassid = 'pg_class'::regclass and d.refobjid = to_regclass(:table) and i.indrelid = d.refobjid
    and a.attname = any(:columns)
    and not exists (select from pg_constraint as c where c.conindid = i.indexrelid and c.contype in ('p', 'u', 'x'))
order by 1
"""
