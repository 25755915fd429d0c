"""What the tests of install and uninstall share: settings with another column or mapping, and what a role gets."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from ledger import ACT, set_phase
from walletmigrate import connect
from walletmigrate.adapter import LegacyBalanceAdapter
from walletmigrate.config import Column, Mapping, Settings
from walletmigrate.errors import PreconditionRefused
from walletmigrate.flags import DUAL_WRITE, StaticSource
from walletmigrate.install import uninstall

FENCES = "select tgrelid::regclass::text || ' ' || tgname from pg_trigger where tgname like 'walletmigrate%' order by 1"


def plain_engine(url: str) -> Engine:
    return connect.engine(url, application_name="walletmigrate-test", poolclass=NullPool)


def adapter_of(settings: Settings, mapping: str | None = None) -> LegacyBalanceAdapter:
    return LegacyBalanceAdapter(settings, StaticSource({DUAL_WRITE: True}), mapping=mapping)


def with_columns(settings: Settings, **changes: Any) -> Settings:
    """The same settings with another first column."""
    mapping = settings.mapping(None)
    column = Column.model_validate({**mapping.columns[0].model_dump(), **changes})
    return with_mapping(settings, columns=(column, *mapping.columns[1:]))


def with_mapping(settings: Settings, **changes: Any) -> Settings:
    mapping = Mapping.model_validate({**settings.mapping(None).model_dump(), **changes})
    return Settings(database_url=settings.database_url, mappings=(mapping,))


def reasons(error: pytest.ExceptionInfo[PreconditionRefused]) -> str:
    return "\n".join(what for what, _ in error.value.reasons)


def job(engine: Engine, statement: str) -> tuple[Any, ...]:
    """Run one batch of a job, and give its counts."""
    with engine.begin() as connection:
        return tuple(connection.exec_driver_sql(statement).one())


def failure(engine: Engine, *statements: str) -> str:
    """The SQLSTATE with which a transaction of these statements fails, or nothing."""
    try:
        with engine.begin() as connection:
            for statement in statements:
                connection.exec_driver_sql(statement)
    except DBAPIError as error:
        return str(getattr(error.orig, "sqlstate", ""))
    return ""


def uninstall_in_legacy(engine: Engine, settings: Settings) -> None:
    set_phase(engine, "legacy")
    uninstall(engine, settings, ACT)
