"""Raw SQL of a rehearsal: a job of the application's that writes the balance column past the adapter.

It has a connection and an application_name of its own. That a transaction is written once, also when its sender
was killed, is the job's own care, as in real life: it notes in the same transaction what it has written.
"""

from __future__ import annotations

import time
import zlib
from typing import Final

from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import DBAPIError

from walletmigrate import connect
from walletmigrate.config import KeyType, Mapping
from walletmigrate.errors import WalletMigrateError
from walletmigrate.functions import relation
from walletmigrate.schema import quoted
from walletmigrate.traffic import Transaction

ONE_IN: Final = 20
"""One transaction of so many comes as raw SQL: 5 %."""

NOTES: Final = "public.balance_job"
"""The job's own table of what it has written."""

REJECTED: Final = frozenset({"WM030", "WM031"})
"""How the fence says that the column is frozen, or that raw writes are rejected."""

_KEY_TYPES: Final[dict[KeyType, str]] = {"integer": "bigint", "uuid": "uuid", "text": "text"}
_ATTEMPTS: Final = 100
_PAUSE_SECONDS: Final = 0.02


class RawWriteFailed(WalletMigrateError):
    """The job's statement failed for another reason than that the fence rejects it."""

    code = "raw_write_failed"


def is_raw(seed: int, one: Transaction) -> bool:
    """Whether a transaction comes as raw SQL; the same in every process."""
    return zlib.crc32(f"{seed} raw {one.id}".encode()) % ONE_IN == 0


class RawWriter:
    """The job, with its engine, on the mapped table as the application knows it: in the column's own unit."""

    def __init__(self, engine: Engine, mapping: Mapping, key_type: KeyType) -> None:
        self._engine = engine
        self._columns = mapping.columns
        kind = _KEY_TYPES[key_type]
        self._updates = [
            f"update {relation(mapping)} set {quoted(column.column)} = {quoted(column.column)} + :change "
            f"where {quoted(mapping.key)} = cast(:key as {kind})"
            for column in mapping.columns
        ]

    def write(self, one: Transaction) -> bool:
        """Add to the balance and commit; nothing if that was done before. False if the fence rejects it."""
        for _ in range(_ATTEMPTS):
            try:
                with self._engine.begin() as connection:
                    self._write(connection, one)
                return True
            except DBAPIError as error:
                if connect.sqlstate(error) in REJECTED:
                    return False
                if not connect.conflicted(error):
                    raise RawWriteFailed(f"raw SQL: {error.orig}") from error
            time.sleep(_PAUSE_SECONDS)
        raise RawWriteFailed(f"raw SQL found no way through in {_ATTEMPTS} attempts")

    def _write(self, connection: Connection, one: Transaction) -> None:
        noted = connection.execute(
            text(f"insert into {NOTES} (transaction_id) values (:id) on conflict do nothing"), {"id": one.id}
        )
        if noted.rowcount:
            column = self._columns[one.place]
            # Exact: an amount has at most the scale's decimals.
            change = one.amount.scaleb(column.scale) if column.unit == "minor" else one.amount
            connection.execute(text(self._updates[one.place]), {"change": change, "key": one.account})
