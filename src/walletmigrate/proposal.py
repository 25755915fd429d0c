"""A first configuration for a database: which tables look like balances, written as a walletmigrate.toml.

Read-only, in the caller's transaction. Everything here is a guess from names, types and a sample of the rows;
what cannot be guessed is a question to the operator.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, text

from walletmigrate.config import Column, KeyType, Mapping
from walletmigrate.configfields import SQL_NAME
from walletmigrate.configfile import MAX_SCALE
from walletmigrate.errors import UsageError
from walletmigrate.survey import FLOAT_DIGITS, INTEGER_BITS, KEY_TYPES

PLACEHOLDER_CURRENCY = "XXX"
"""Written where the currency is not known (ISO 4217: no currency). It works, and should be replaced."""

SAMPLE_ROWS = 10_000


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


_BALANCE = _set("balance coins coin credits credit wallet points point promo bonus cash funds money tokens")
_NO_BALANCE = _set(
    "id count at on version limit score rate ratio pct percent number no type status rank level days max min "
    "before after old new previous opening closing initial last card expiry"
)
_PROMO = _set("promo promotional bonus gift voucher free reward rewards points")
_MINOR = _set("cents cent minor pence kopecks")
_TRAITS = _set("tenant org organisation organization company role plan tier region country market brand segment")
_OWNERS = _set("user users account accounts wallet wallets customer customers member members player players")
_CURRENCIES = _set(
    "EUR USD GBP CHF JPY CNY INR AUD CAD NZD SEK NOK DKK PLN CZK HUF RON BGN TRY BRL MXN ARS CLP COP ZAR KES "
    "NGN GHS EGP AED SAR ILS KRW VND THB IDR MYR PHP SGD HKD TWD PKR BDT LKR UAH RUB KZT GEL ISK KWD BHD OMR "
    "JOD TND BTC ETH USDT USDC"
)
# Decimals of a currency that has not two (ISO 4217).
_DECIMALS = dict.fromkeys(_set("JPY KRW VND CLP ISK"), 0) | dict.fromkeys(_set("KWD BHD OMR JOD TND"), 3)

# One row per column of every permanent table that is no part of another and no ledger of this tool.
_TABLES = """
select
    c.oid::bigint as oid, n.nspname as schema, c.relname as name, greatest(c.reltuples, 0)::bigint as rows,
    has_table_privilege(c.oid, 'select') as readable, a.attname as column, b.typname as base,
    format_type(a.atttypid, a.atttypmod) as sql_type,
    case when t.typtype = 'd' then t.typtypmod else a.atttypmod end as typmod, b.typtype::text = 'e' as enum,
    a.attgenerated::text <> '' or a.attidentity::text <> '' as generated,
    coalesce(p.indnkeyatts = 1 and p.indkey[0] = a.attnum, false) as key,
    exists (
        select from pg_constraint as f
        where f.conrelid = c.oid and f.contype = 'f' and a.attnum = any(f.conkey)
    ) as foreign_key
from pg_class as c
join pg_namespace as n on n.oid = c.relnamespace
join pg_attribute as a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
join pg_type as t on t.oid = a.atttypid
join pg_type as b on b.oid = case when t.typtype = 'd' then t.typbasetype else t.oid end
left join pg_index as p on p.indrelid = c.oid and p.indisprimary and p.indisvalid
where
    c.relkind in ('r', 'p') and not c.relispartition and c.relpersistence <> 't'
    and n.nspname !~ '^pg_' and n.nspname <> 'information_schema'
    and num_nulls(
        to_regclass(quote_ident(n.nspname) || '.system_accounts'),
        to_regclass(quote_ident(n.nspname) || '.idempotency_keys')
    ) > 0
order by n.nspname, c.relname, a.attnum
"""


@dataclass(frozen=True)
class DatabaseFacts:
    """What a proposal says about the database; ``ledger_schema`` is a name that is free for the ledger."""

    database: str
    server_version: str
    ledger_schema: str


@dataclass(frozen=True)
class CandidateColumn:
    """A column that looks like a balance, with the guesses. ``notes`` are sentences for the operator."""

    column: str
    sql_type: str
    bucket: str
    currency: str
    scale: int
    unit: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Candidate:
    """A table that looks as if it held balances.

    ``rows`` is the planner's estimate; ``traits`` are (trait, column).
    """

    name: str
    schema: str
    table: str
    key: str
    key_type: KeyType
    columns: tuple[CandidateColumn, ...]
    traits: tuple[tuple[str, str], ...]
    rows: int


def facts(connection: Connection) -> DatabaseFacts:
    """The database's name, its server's version and a schema for the ledger."""
    row = connection.execute(
        text(
            "select current_database() as name, current_setting('server_version') as version, "
            "to_regnamespace('wallet') is not null and to_regclass('wallet.system_accounts') is null as taken"
        )
    ).one()
    return DatabaseFacts(row.name, row.version.split()[0], "wallet_ledger" if row.taken else "wallet")


def survey(connection: Connection, table: str | None = None) -> list[Candidate]:
    """The tables that look as if they held balances, the likeliest first; with ``table``, that one.

    Looks at tables with a primary key of one column. Raises UsageError when a named table does not exist or
    cannot be proposed; without a name, an empty list means that nothing was found.
    """
    tables: dict[str, list[Row[Any]]] = {}
    for row in connection.execute(text(_TABLES)):
        if SQL_NAME.fullmatch(row.schema) and SQL_NAME.fullmatch(row.name) and SQL_NAME.fullmatch(row.column):
            tables.setdefault(f"{row.schema}.{row.name}", []).append(row)
    if table is not None:
        named = _named(tables, table)
        return [_candidate(connection, tables[named], _suitable(named, tables[named]))]
    found = [
        _candidate(connection, columns, balances)
        for columns in tables.values()
        if (balances := [row for row in columns if _is_balance(row)]) and _key(columns)
    ]
    return sorted(found, key=lambda one: (not _words(one.table) & _OWNERS, -len(one.traits), -one.rows, one.table))


def questions(candidates: Sequence[Candidate]) -> tuple[str, ...]:
    """What the operator must still decide in the rendered file: one sentence each, for the active mapping."""
    asked = []
    for candidate in candidates[:1]:
        for column in candidate.columns:
            place = f"{candidate.schema}.{candidate.table}.{column.column}"
            if column.currency == PLACEHOLDER_CURRENCY:
                asked.append(f"Set the currency of {place}: {PLACEHOLDER_CURRENCY} stands for one that is not known.")
            asked += [f"{place}: {note}" for note in column.notes]
    return tuple(asked)


def mapping_of(candidate: Candidate) -> Mapping:
    """The mapping that `render` writes for a candidate."""
    names = ("bucket", "column", "currency", "scale", "unit")
    return Mapping(
        name=candidate.name,
        table=f"{candidate.schema}.{candidate.table}",
        key=candidate.key,
        traits=dict(candidate.traits),
        columns=tuple(Column(**{name: getattr(one, name) for name in names}) for one in candidate.columns),
    )


def render(candidates: Sequence[Candidate], about: DatabaseFacts) -> str:
    """A commented walletmigrate.toml that `Settings.load` accepts: the first candidate, others as comments.

    Raises UsageError when there is no candidate.
    """
    if not candidates:
        raise UsageError("no table looks as if it held balances. Name one: `walletmigrate init --table schema.table`")
    parts = [_HEAD.format(database=_one_line(about.database), version=about.server_version, schema=about.ledger_schema)]
    parts.append(_mapping_text(candidates[0]))
    if candidates[1:]:
        parts.append("# Other tables that look as if they held balances. Remove the # to migrate one of them too.\n")
        parts += [_commented(_mapping_text(candidate)) for candidate in candidates[1:]]
    return "\n".join(parts)


_HEAD = """\
# Configuration of walletmigrate for the database {database} (PostgreSQL {version}), proposed by
# `walletmigrate init`. The mappings at the end are guesses: read them before `walletmigrate install`.
# The database URL and Flagsmith's key are secrets; they come from the environment:
# WALLETMIGRATE_DATABASE_URL and WALLETMIGRATE_FLAGSMITH_KEY.

schema = "{schema}"               # the ledger's own schema
observation_window = "7d"         # how long the gates look back
compare_share = 1.0               # share of reads that compare legacy and ledger

[flags]
source = "file"                   # or "flagsmith", with api_url
path = "flags/environment.json"   # relative to this file
# api_url = "http://localhost:8000/api/v1/"
poll_seconds = 10

# [exporter]                      # where `walletmigrate exporter` is found, so that `doctor` looks at it
# url = "http://localhost:9464"

[capture]                         # the catalogue of writes past the adapter
raw_queries = false               # their text as it was sent; it may hold personal data
retention = "30d"                 # what `walletmigrate capture prune` keeps

[roles]                           # database roles, made by `walletmigrate install`
owner = "wallet_owner"
app = "wallet_app"
operator = "wallet_operator"
auditor = "wallet_auditor"
"""


def _mapping_text(candidate: Candidate) -> str:
    traits = ", ".join(f"{_key_text(name)} = {_quoted(column)}" for name, column in candidate.traits)
    lines = [
        "[[mappings]]",
        f"name = {_quoted(candidate.name)}",
        f"table = {_quoted(f'{candidate.schema}.{candidate.table}')}",
        _noted(f"key = {_quoted(candidate.key)}", candidate.key_type),
        _noted('policy = "shadow"', 'or "strict": a difference fails the posting'),
        f"traits = {{ {traits} }}" if traits else '# traits = { tenant = "tenant_id" }   # none was found',
    ]
    for column in candidate.columns:
        currency = f"  currency = {_quoted(column.currency)}"
        if column.currency == PLACEHOLDER_CURRENCY:
            currency = _noted(currency, "SET THIS: the column's name does not tell the currency")
        lines += ["", "  [[mappings.columns]]", f"  bucket = {_quoted(column.bucket)}"]
        lines += [_noted(f"  column = {_quoted(column.column)}", column.sql_type), currency]
        lines += [f"  scale = {column.scale}", f"  unit = {_quoted(column.unit)}"]
        lines += [
            _noted('  # floor = "0"', "uncomment to refuse debits that go below it"),
            *(f"  # {note}" for note in column.notes),
        ]
    return "\n".join(lines) + "\n"


def _noted(line: str, note: str) -> str:
    return f"{line:<33} # {_one_line(note)}"


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)


def _key_text(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _quoted(name)


def _commented(block: str) -> str:
    return "".join(f"# {line}".rstrip() + "\n" for line in block.splitlines())


def _one_line(name: str) -> str:
    return re.sub(r"[\x00-\x1f\x7f]", "?", name)


# Guesses


def _words(name: str) -> set[str]:
    """The words of an SQL name in small letters: totalCoins and total_coins both give total, coins."""
    return set(re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().split("_"))


def _slug(name: str, length: int) -> str:
    """A name in the form that mappings and buckets have."""
    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
    plain = re.sub(r"[^a-z0-9]+", "_", snake).strip("_")
    return (plain if plain[:1].isalpha() else f"t_{plain}")[:length]


def _named(tables: dict[str, list[Row[Any]]], table: str) -> str:
    full = table if "." in table else f"public.{table}"
    if full in tables:
        return full
    near = difflib.get_close_matches(full.lower(), [name.lower() for name in tables], n=1)
    hint = f" Did you mean {next(name for name in tables if name.lower() == near[0])!r}?" if near else ""
    raise UsageError(f"the database has no table {table!r} that could be mapped.{hint}")


def _suitable(name: str, columns: list[Row[Any]]) -> list[Row[Any]]:
    """The balance columns of a table that was named. Raises UsageError with what stands in the way."""
    if not _key(columns):
        raise UsageError(
            f"{name} has no primary key of one column of an integer type, uuid or text. Give it a unique "
            "column that is not null, and name it as key in a mapping written by hand"
        )
    balances = [row for row in columns if _is_balance(row)]
    if not balances:
        numbers = ", ".join(row.column for row in columns if _is_number(row) and not row.key) or "none"
        raise UsageError(
            f"no column of {name} is named like a balance; its numeric columns: {numbers}. Write the mapping by hand"
        )
    return balances


def _key(columns: list[Row[Any]]) -> Row[Any] | None:
    return next((row for row in columns if row.key and row.base in KEY_TYPES), None)


def _is_number(row: Row[Any]) -> bool:
    return row.base == "numeric" or row.base in INTEGER_BITS or row.base in FLOAT_DIGITS


def _is_balance(row: Row[Any]) -> bool:
    words = _words(row.column)
    fits = _is_number(row) and not row.generated and not row.key and not row.foreign_key
    return fits and bool(words & _BALANCE) and not words & _NO_BALANCE


def _candidate(connection: Connection, columns: list[Row[Any]], balances: list[Row[Any]]) -> Candidate:
    key = _key(columns)
    assert key is not None  # the callers have looked
    sample = _sample(connection, columns[0], balances)
    traits: dict[str, str] = {}
    for row in columns:
        plain = row.base in KEY_TYPES or row.base == "bool" or row.enum
        if plain and row is not key and row not in balances and _words(row.column) & _TRAITS:
            traits.setdefault(re.sub(r"_(id|code|name|key)$", "", _slug(row.column, 40)), row.column)
    guessed: list[CandidateColumn] = []
    for row in balances:
        guessed.append(_column(row, sample.get(row.column), guessed))
    return Candidate(
        _slug(key.name, 40), key.schema, key.name, key.column, KEY_TYPES[key.base], tuple(guessed),
        tuple(traits.items()), key.rows,
    )  # fmt: skip


def _sample(
    connection: Connection, table: Row[Any], balances: list[Row[Any]]
) -> dict[str, tuple[int | None, bool, bool]]:
    """By column: the most decimals, whether there is a NULL, and a NaN or infinity, in the first rows."""
    if not table.readable:
        return {}
    quote = connection.dialect.identifier_preparer.quote_identifier
    seen: dict[str, tuple[int | None, bool, bool]] = {}
    names = ", ".join(quote(row.column) for row in balances)
    figures = ", ".join(
        f"max(scale(trim_scale({name}::numeric))), bool_or({name} is null), "
        f"bool_or({name}::numeric in ('NaN', 'Infinity', '-Infinity'))"
        for name in (quote(row.column) for row in balances)
    )
    source = f"select {names} from {quote(table.schema)}.{quote(table.name)} limit {SAMPLE_ROWS}"
    row = connection.execute(text(f"select {figures} from ({source}) as sample")).one()
    for at, column in enumerate(balances):
        decimals, null, special = row[3 * at : 3 * at + 3]
        seen[column.column] = (decimals, bool(null), bool(special))
    return seen


def _column(
    row: Row[Any], sample: tuple[int | None, bool, bool] | None, before: list[CandidateColumn]
) -> CandidateColumn:
    decimals, has_null, has_special = sample or (None, False, False)
    words = _words(row.column)
    currency = next((word.upper() for word in sorted(words) if word.upper() in _CURRENCIES), PLACEHOLDER_CURRENCY)
    bucket = _bucket(row.column, {one.bucket for one in before if one.currency == currency})
    minor = bool(words & _MINOR)
    usual = _DECIMALS.get(currency, 2)
    notes = []
    scale = usual if minor else _scale(row, usual, decimals)
    if row.base in FLOAT_DIGITS:
        notes.append("A floating-point column: it is read as rounded to the scale. Check the scale.")
    elif row.base in INTEGER_BITS and usual and not minor and currency != PLACEHOLDER_CURRENCY:
        fix = f'set unit = "minor" and scale = {usual}'
        notes.append(f"A column of whole numbers, taken as whole {currency}. If it counts the smallest coin, {fix}.")
    elif row.base == "numeric" and row.typmod < 4 and not minor:
        notes.append("The column is declared without a scale: this one is from a sample of the rows. Check it.")
    if has_null:
        notes.append("Some values are NULL. `walletmigrate install --dry-run` lists them.")
    if has_special:
        notes.append("Some values are NaN or infinite. `walletmigrate install --dry-run` lists them.")
    unit = "minor" if minor else "major"
    return CandidateColumn(row.column, row.sql_type, bucket, currency, scale, unit, tuple(notes))


def _bucket(column: str, taken: set[str]) -> str:
    """The kind of money by the column's name; if that bucket is taken, one named after the column."""
    own = _slug(column, 28)
    names = ["promo" if _words(column) & _PROMO else "cash", own, *(f"{own}_{n}" for n in range(2, 100))]
    return next(name for name in names if name not in taken)


def _scale(row: Row[Any], usual: int, sampled: int | None) -> int:
    """Decimals of a column in major units: as declared, or as the sample needs, at least the currency's ``usual``."""
    if row.base in INTEGER_BITS:
        return 0
    if row.base == "numeric" and row.typmod >= 4:
        declared: int = (((row.typmod - 4) & 0x7FF) ^ 1024) - 1024
        return min(max(declared, 0), MAX_SCALE)
    most = 6 if row.base in FLOAT_DIGITS else MAX_SCALE
    return usual if sampled is None or sampled > most else max(sampled, usual)
