"""The legacy table that a rehearsal migrates, as it is made in the scratch database.

Either a small table of the rehearsal's own, for the accounts of a file, every one at 0; or a copy of somebody's
own table, with its keys' type, its balance columns as they are declared, and its traits.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from decimal import Decimal, localcontext
from pathlib import Path
from typing import Final, Protocol

import psycopg
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError

from walletmigrate.config import Column, FlagSettings, KeyType, Mapping, Roles, Settings
from walletmigrate.errors import DatabaseFailed
from walletmigrate.functions import relation
from walletmigrate.install import make_roles
from walletmigrate.rehearsal_raw import NOTES
from walletmigrate.rehearsal_report import CopiedFrom
from walletmigrate.rehearsal_source import MADE_UP, Source
from walletmigrate.rehearsal_traffic import Holding, Limits, likeness
from walletmigrate.schema import quoted
from walletmigrate.starter import blank_document
from walletmigrate.traffic import EXACT, Traffic

CURRENCY: Final = "XXX"
"""ISO 4217's code for no currency: a file does not say."""


class Ground(Protocol):
    """What a rehearsal stands on. ``count`` is how many transactions there will be."""

    mapping: Mapping
    count: int
    copied_from: CopiedFrom | None

    @property
    def key_type(self) -> KeyType:
        """The kind of the table's keys."""
        ...

    def make(self, connection: Connection) -> Traffic:
        """Make the table and fill it, in the caller's transaction; the traffic that fits it."""
        ...


class FileGround:
    """A table for the accounts of a file, or of made-up traffic."""

    copied_from: CopiedFrom | None = None

    def __init__(self, read: Traffic) -> None:
        self.mapping = Mapping(
            name="accounts",
            table="public.accounts",
            key="id",
            traits={"tenant": "tenant"},
            columns=(Column(bucket="cash", column="balance", currency=CURRENCY, scale=2),),
        )
        self.count = len(read.transactions)
        self._read = read

    @property
    def key_type(self) -> KeyType:
        """Integers where all account ids are."""
        return "integer" if self._read.integer_keys else "text"

    def make(self, connection: Connection) -> Traffic:
        """The application's table, every account at 0."""
        integers = self._read.integer_keys
        kind = "bigint" if integers else 'text collate "C"'
        key = int if integers else str
        rows = [{"id": key(account), "tenant": tenant} for account, tenant in self._read.tenants.items()]
        connection.exec_driver_sql(
            f"create table public.accounts (id {kind} primary key, tenant text not null, "
            "balance numeric(20, 2) not null default 0) with (fillfactor = 70)"
        )
        connection.execute(text("insert into public.accounts (id, tenant) values (:id, :tenant)"), rows)
        return self._read


class CopyGround:
    """A copy of a source's table."""

    def __init__(self, source: Source, *, seed: int, count: int) -> None:
        """``count`` transactions are made for it."""
        mapping = source.mapping
        self.mapping = mapping if mapping.traits else mapping.model_copy(update={"traits": {MADE_UP: MADE_UP}})
        self.count = count
        self.copied_from: CopiedFrom | None = source.facts
        self._source = source
        self._seed = seed

    @property
    def key_type(self) -> KeyType:
        """As the source has it."""
        return self._source.legacy.key_type

    def make(self, connection: Connection) -> Traffic:
        """Copy the rows, then make traffic of what was copied."""
        self._create(connection)
        self._fill(connection)
        self._source.close()
        key = quoted(self.mapping.key)
        connection.exec_driver_sql(f"alter table {relation(self.mapping)} add primary key ({key})")
        kept = [
            name for name, definition in self._source.checks.items() if definition and self._bound(connection, name)
        ]
        if self.copied_from is not None:
            lost = set(self._source.checks) - set(kept)
            self.copied_from = replace(self.copied_from, checks_copied=tuple(kept), checks_left_out=tuple(sorted(lost)))
        return likeness(
            self.mapping.table,
            list(self._holdings(connection)),
            list(self._limits(bound=bool(kept))),
            trait=self._source.trait,
            seed=self._seed,
            count=self.count,
        )

    def _create(self, connection: Connection) -> None:
        columns = ", ".join(
            f"{quoted(one.name)} {one.sql_type}{' not null' if one.not_null else ''}" for one in self._source.columns
        )
        connection.exec_driver_sql(f"create schema if not exists {quoted(self.mapping.schema_name)}")
        connection.exec_driver_sql(f"create table {relation(self.mapping)} ({columns}) with (fillfactor = 70)")

    def _fill(self, connection: Connection) -> None:
        names = ", ".join(quoted(one.name) for one in self._source.columns)
        driver = connection.connection.driver_connection
        assert driver is not None
        try:
            with driver.cursor() as cursor, cursor.copy(f"copy {relation(self.mapping)} ({names}) from stdin") as into:
                for chunk in self._source.chunks():
                    into.write(chunk)
        except psycopg.Error as error:
            said = error.diag.message_primary or type(error).__name__
            raise DatabaseFailed(error.sqlstate or "", f"the copy was not taken: {said}") from error
        connection.exec_driver_sql(f"analyze {relation(self.mapping)}")

    def _bound(self, connection: Connection, name: str) -> bool:
        """Add a CHECK; False where it cannot be, such as one that calls a function of the application's."""
        definition = self._source.checks[name]
        try:
            with connection.begin_nested():
                connection.exec_driver_sql(
                    f"alter table {relation(self.mapping)} add constraint {quoted(name)} {definition}",
                    execution_options={"no_parameters": True},
                )
        except DBAPIError:
            return False
        return True

    def _holdings(self, connection: Connection) -> Iterator[Holding]:
        """The rows by key. What a balance is worth is worked out here, not by the SQL that the ledger is made of."""
        trait = self.mapping.traits[self._source.trait]
        columns = ", ".join(f"{quoted(column.column)}::text" for column in self.mapping.columns)
        key = quoted(self.mapping.key)
        rows = connection.execute(
            text(f"select {key}::text, {quoted(trait)}::text, {columns} from {relation(self.mapping)} order by {key}")
        )
        for account, tenant, *raw in rows:
            amounts = zip(self.mapping.columns, raw, strict=True)
            yield Holding(
                account, tenant or "", tuple(_units(column, amount_of(column, value)) for column, value in amounts)
            )

    def _limits(self, *, bound: bool) -> Iterator[Limits]:
        for column in self.mapping.columns:
            floor = None if column.floor is None else _units(column, column.floor)
            most = _units(column, self._source.legacy.column(column.column).maximum)
            yield Limits(column.scale, most, floor, coarse=bound)


def amount_of(column: Column, raw: str) -> Decimal:
    """What a column's text says, in major units at its scale; a float's is rounded to it."""
    with localcontext(EXACT):
        value = Decimal(raw)
        return (value.scaleb(-column.scale) if column.unit == "minor" else value).quantize(column.quantum)


def _units(column: Column, amount: Decimal) -> int:
    with localcontext(EXACT):
        return int(amount.scaleb(column.scale))


def prepare(connection: Connection, ground: Ground, roles: Roles) -> Traffic:
    """The roles, the legacy table and the application's rights on it; the traffic to replay."""
    app, table = quoted(roles.app), relation(ground.mapping)
    make_roles(connection, roles)
    # Whoever makes a role may grant it, but is not always allowed to act as it.
    connection.exec_driver_sql(f"grant {app} to current_user")
    read = ground.make(connection)
    connection.exec_driver_sql(f"create table {NOTES} (transaction_id text primary key)")
    connection.exec_driver_sql(f"grant usage on schema {quoted(ground.mapping.schema_name)} to {app}")
    connection.exec_driver_sql(f"grant select, update on {table} to {app}")
    connection.exec_driver_sql(f"grant select, insert on {NOTES} to {app}")
    return read


def settings_of(mapping: Mapping, roles: Roles, folder: Path) -> Settings:
    """Everything is given here, so that the environment of the user's own migration has no say."""
    flag_file = folder / "environment.json"
    flag_file.write_text(json.dumps(blank_document(), indent=2) + "\n", encoding="utf-8")
    return Settings(
        database_url=None,
        flagsmith_key=None,
        ledger_schema="wallet" if mapping.schema_name != "wallet" else "wallet_ledger",
        observation_window=timedelta(0),
        compare_share=1.0,
        flags=FlagSettings(path=flag_file),
        roles=roles,
        mappings=(mapping,),
    )
