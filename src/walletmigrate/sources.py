"""The flag source that the configuration names, with the database as memory of the last good document."""

from __future__ import annotations

import json
from typing import Any

from sqlalchemy import Engine, text
from sqlalchemy.pool import NullPool

from walletmigrate.config import Settings
from walletmigrate.connect import engine
from walletmigrate.errors import ConfigError
from walletmigrate.flag_admin import FlagAdmin
from walletmigrate.flag_editor import FlagEditor
from walletmigrate.flag_file import FlagFile
from walletmigrate.flag_server import FlagsmithSource
from walletmigrate.flag_sources import FileSource
from walletmigrate.schema import quoted

START_SECONDS = 2.0
"""How long a starting process waits for its first document, so that it does not begin with everything off."""


def source_of(settings: Settings) -> FileSource | FlagsmithSource:
    """The file or the server. Raises ConfigError when a server is named and its key is not in the environment."""
    flags = settings.flags
    if flags.source == "file":
        return FileSource(flags.path)
    if settings.flagsmith_key is None:
        raise ConfigError(
            "the flag server needs its environment key",
            fix="set WALLETMIGRATE_FLAGSMITH_KEY to a server-side key",
        )
    memory = _Memory(settings) if settings.database_url is not None else None
    source = FlagsmithSource(
        flags.api_url,
        settings.flagsmith_key.get_secret_value(),
        flags.poll_seconds,
        fallback=memory.fetch if memory else None,
        remember=memory.store if memory else None,
    )
    source.wait(START_SECONDS)
    return source


def editor_of(settings: Settings) -> FlagEditor | None:
    """The flags of the configured source, to be switched; None for a server without both its keys.

    Raises ConfigError for an address that is none.
    """
    flags = settings.flags
    if flags.source == "file":
        return FlagFile(flags.path)
    if settings.flagsmith_key is None or settings.flagsmith_admin_key is None:
        return None
    return FlagAdmin(
        flags.api_url, settings.flagsmith_key.get_secret_value(), settings.flagsmith_admin_key.get_secret_value()
    )


class _Memory:
    """The last good document, in a table. Runs in the polling thread, on connections of its own."""

    def __init__(self, settings: Settings) -> None:
        assert settings.database_url is not None
        self._table = f"{quoted(settings.ledger_schema)}.flag_documents"
        # No pool: a forked worker would go on with the connection of its parent, and both would spoil it.
        self._engine: Engine = engine(settings.database_url, application_name="walletmigrate flags", poolclass=NullPool)

    def fetch(self) -> dict[str, Any] | None:
        """The stored document, None when there is none."""
        with self._engine.begin() as connection:
            found = connection.scalar(text(f"select document from {self._table}"))
        return None if found is None else dict(found)

    def store(self, document: dict[str, Any]) -> None:
        """Put a document in the place of the stored one."""
        with self._engine.begin() as connection:
            connection.execute(
                text(
                    f"insert into {self._table} (document) values (cast(:document as jsonb)) "
                    "on conflict (singleton) do update set document = excluded.document, "
                    "stored_at = clock_timestamp()"
                ),
                {"document": json.dumps(document)},
            )
