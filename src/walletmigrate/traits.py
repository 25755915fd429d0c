"""Traits of accounts, for flags: from the caller, else from the legacy row, kept for a while per process."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict

from sqlalchemy import Connection, text

from walletmigrate.config import Mapping
from walletmigrate.functions import relation
from walletmigrate.movements import Traits
from walletmigrate.schema import quoted
from walletmigrate.sites import Site

KEEP_SECONDS = 300.0
KEEP_ACCOUNTS = 50_000


class TraitCache:
    """The last traits seen of each account. A stale trait changes what is wanted, never what is true."""

    def __init__(self, mapping: Mapping) -> None:
        self._mapping = mapping
        self._known: OrderedDict[str, tuple[float, Traits]] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, connection: Connection, site: Site, key: str, given: Traits | None) -> Traits:
        """The caller's traits if given, else the cached ones, else those of the legacy row (one round trip)."""
        if given is not None:
            self._keep(key, given)
            return given
        if not self._mapping.traits:
            return {}
        with self._lock:
            found = self._known.get(key)
        if found is not None and time.monotonic() - found[0] < KEEP_SECONDS:
            return found[1]
        traits = self._read(connection, site, key)
        if traits is None:  # not kept: the row may be inserted next
            return {}
        self._keep(key, traits)
        return traits

    def _keep(self, key: str, traits: Traits) -> None:
        with self._lock:
            self._known[key] = (time.monotonic(), traits)
            self._known.move_to_end(key)
            if len(self._known) > KEEP_ACCOUNTS:
                self._known.popitem(last=False)

    def _read(self, connection: Connection, site: Site, key: str) -> Traits | None:
        names = list(self._mapping.traits)
        columns = ", ".join(f"l.{quoted(self._mapping.traits[name])}" for name in names)
        row = connection.execute(
            text(
                f"select {columns} from {relation(self._mapping)} as l "
                f"where l.{quoted(self._mapping.key)} = cast(:key as {site.key_sql_type})"
            ),
            {"key": key},
        ).one_or_none()
        if row is None:
            return None
        return {
            name: value if isinstance(value, str | int | bool) else str(value)
            for name, value in zip(names, row, strict=True)
            if value is not None
        }
