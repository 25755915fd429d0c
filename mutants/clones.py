"""Databases installed once and copied for each test: a mutant costs one template's functions, not an install."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, Engine
from sqlalchemy.engine import make_url
from sqlalchemy.pool import NullPool

import ledger
from mutants.guards import Guard
from walletmigrate import connect, functions, schema, survey
from walletmigrate.config import Settings

AT_INSTALL = ("posting", "capture", "mapping", "batches", "reconcile", "fence", "undo", "snapshots")
"""The templates that an install renders for each mapping, over the tables of `ledger`."""
IMPORTED = {"windows": "snapshots"}
"""Templates of macros, and which of those has functions that are made of them."""

_OF_SETTINGS = ("unit", "scale", "floor", "with_promo", "policy")


@dataclass(frozen=True)
class Original:
    """A database that was installed with all guards, and what its templates were rendered with."""

    database: str
    settings: dict[str, Any]
    names: dict[str, Any]


@dataclass
class Clones:
    """Stands in for `ledger.install_users` while a guard is missing."""

    guard: Guard | None = None
    _made: dict[str, Original] = field(default_factory=dict)
    _install: Any = ledger.install_users

    def put_in(self) -> None:
        """Let every test that was collected install through this."""
        for module in list(sys.modules.values()):
            if getattr(module, "install_users", None) is self._install:
                module.install_users = self  # type: ignore[attr-defined]

    def __call__(self, url: str, **how: Any) -> tuple[Engine, Settings]:
        """Install as asked, without the guard."""
        guard = self.guard
        if guard is None or guard.template == "ledger":
            engine, settings = self._install(url, **how)
            return engine, settings
        original = self._made.get(repr(how)) or self._original(url, how)
        database = make_url(url).database
        with _server(url) as connection:
            connection.exec_driver_sql(f'drop database "{database}" with (force)')
            connection.exec_driver_sql(
                f'create database "{database}" template "{original.database}" strategy file_copy'
            )
        engine = connect.engine(url, application_name="walletmigrate-test", poolclass=NullPool)
        settings = ledger.users_settings(url, **original.settings)
        template = IMPORTED.get(guard.template, guard.template)
        if template in AT_INSTALL:
            with engine.begin() as connection:
                name = settings.ledger_schema
                connection.exec_driver_sql(f"set local search_path = pg_catalog, {schema.quoted(name)}, pg_temp")
                schema.run_script(connection, schema.render(template, **original.names))
                functions._record_guards(connection, name, settings.mapping(None).name)
        return engine, settings

    def _original(self, url: str, how: dict[str, Any]) -> Original:
        database = f"original_{len(self._made)}"
        with _server(url) as connection:
            connection.exec_driver_sql(f'create database "{database}"')
        there = make_url(url).set(database=database).render_as_string(hide_password=False)
        with whole():
            engine, settings = self._install(there, **how)
        mapping = settings.mapping(None)
        with engine.begin() as connection:
            names = functions.context(
                settings.ledger_schema,
                mapping,
                survey.inspect_mapping(connection, mapping),
                functions.system_accounts(connection, settings.ledger_schema),
                roles=settings.roles,
            )
        kept: dict[str, Any] = {
            key: how[key] for key in ("unit", "scale", "floor", "with_promo", "policy") if key in how
        }
        self._made[repr(how)] = Original(database, kept, names)
        return self._made[repr(how)]


@contextmanager
def whole() -> Iterator[None]:
    """Render the templates as they are, inside of a time in which they are mutated."""
    environment = schema._environment()
    mutated = environment.__dict__.pop("get_template", None)
    try:
        yield
    finally:
        if mutated is not None:
            environment.get_template = mutated  # type: ignore[method-assign]


@contextmanager
def _server(url: str) -> Iterator[Connection]:
    engine = connect.engine(
        make_url(url).set(database="postgres").render_as_string(hide_password=False),
        application_name="mutants",
        isolation_level="AUTOCOMMIT",
        poolclass=NullPool,
    )
    with engine.connect() as connection:
        yield connection
