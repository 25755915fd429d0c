"""Traits of accounts, for flags: from the caller, else from the legacy row, kept for a while per process."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Sequence

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
        known = self._known_of(key)
        if known is not None:
            return known
        # Not kept where there is no row: it may be inserted next.
        return self._read(connection, site, [key]).get(key, {})

    def fill(self, connection: Connection, site: Site, keys: Sequence[str]) -> None:
        """Read what is not known of these accounts in one round trip."""
        unknown = [key for key in keys if self._known_of(key) is None] if self._mapping.traits else []
        if unknown:
            self._read(connection, site, unknown)

    def _known_of(self, key: str) -> Traits | None:
        with self._lock:
            found = self._known.get(key)
        return found[1] if found is not None and time.monotonic() - found[0] < KEEP_SECONDS else None

    def _keep(self, key: str, traits: Traits) -> None:
        with self._lock:
            self._known[key] = (time.monotonic(), traits)
            self._known.move_to_end(key)
            if len(self._known) > KEEP_ACCOUNTS:
                self._known.popitem(last=False)

    def _read(self, connection: Connection, site: Site, keys: Sequence[str]) -> dict[str, Traits]:
        names, key = list(self._mapping.traits), f"l.{quoted(self._mapping.key)}"
        columns = ", ".join(f"l.{quoted(self._mapping.traits[name])}" for name in names)
        rows = connection.execute(
            text(
                f"select {key}::text, {columns} from {relation(self._mapping)} as l "
                f"where {key} = any(cast(:keys as {site.key_sql_type}[]))"
            ),
            {"keys": list(keys)},
        )
        found: dict[str, Traits] = {}
        for owner, *values in rows:
            found[owner] = {
                name: value if isinstance(value, str | int | bool) else str(value)
                for name, value in zip(names, values, strict=True)
                if value is not None
            }
            self._keep(owner, found[owner])
        return found
