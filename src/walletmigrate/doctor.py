"""Look whether everything is as it should be, and name the command and the runbook for what is not. Reads only."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from sqlalchemy import Connection

from walletmigrate import checkup_around, checkup_ledger, checkup_operation, checkup_rights, checkup_tables
from walletmigrate.checkup import Finding
from walletmigrate.config import Settings
from walletmigrate.flags import FlagSource
from walletmigrate.standing import require_installed

__all__ = ["Finding", "examine", "notes"]


def examine(
    connection: Connection,
    settings: Settings,
    source: FlagSource | None = None,
    *,
    exporter: str | None = None,
    logins: Sequence[str] = (),
    now: Callable[[], float] = time.time,
) -> tuple[Finding, ...]:
    """All problems, each once. ``source`` are the flags to be checked, ``exporter`` the address of the metrics (None:
    that of the configuration), ``logins`` the roles that the application logs in with; without them these are not
    looked at. ``now`` is this machine's clock, in seconds since 1970.

    Raises LedgerNotInstalled, and UsageError for an address that is none.
    """
    require_installed(connection, settings)
    found = _all(connection, settings, source, _address(settings, exporter), logins, now)
    return tuple(dict.fromkeys(found))


def notes(connection: Connection, settings: Settings, *, exporter: str | None = None) -> tuple[Finding, ...]:
    """What `examine` with the same ``exporter`` could not look at and may well be as it should be; each of severity
    ``note``.
    """
    unseen = () if _address(settings, exporter) is not None else (checkup_around.unseen(),)
    if checkup_ledger.missing(connection, settings):
        return unseen
    return (*checkup_around.unheard(connection, settings), *unseen)


def _address(settings: Settings, exporter: str | None) -> str | None:
    """What is named at the call before what the configuration names; None: neither does."""
    return exporter if exporter is not None else settings.exporter.url or None


def _all(
    connection: Connection,
    settings: Settings,
    source: FlagSource | None,
    exporter: str | None,
    logins: Sequence[str],
    now: Callable[[], float],
) -> Iterator[Finding]:
    gone = checkup_ledger.missing(connection, settings)
    yield from gone
    if not gone:
        for mapping in settings.mappings:
            yield from checkup_ledger.of_mapping(connection, settings, mapping)
        yield from checkup_ledger.of_schema(connection, settings)
        yield from checkup_tables.examine(connection, settings)
        yield from checkup_rights.examine(connection, settings, logins)
        yield from checkup_operation.examine(connection, settings)
        yield from checkup_around.processes(connection, settings)
        if exporter is not None:
            yield from checkup_around.exporter(connection, settings, exporter)
    if source is not None:
        yield from checkup_around.flags(source)
        if not gone:
            yield from checkup_around.elsewhere(connection, settings, source)
    yield from checkup_around.clock(connection, now)
    yield from checkup_around.replicas(connection, settings)
