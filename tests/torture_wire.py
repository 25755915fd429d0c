"""What the torture itself asks of its database in every order: prepared once, and without any layer between."""

from __future__ import annotations

from typing import Any

import psycopg
from psycopg import pq
from psycopg.errors import error_from_result

Texts = tuple[Any, ...]
"""The values of a row as texts, or None."""


class Wire:
    """A connection in autocommit whose statements are prepared at their first use."""

    def __init__(self, connection: psycopg.Connection[object]) -> None:
        assert connection.autocommit
        self._pgconn: pq.abc.PGconn = connection.pgconn
        self._prepared: dict[str, bytes] = {}

    def ask(self, query: str, *values: str | int | bool) -> list[Texts]:
        """Run a statement ($1, $2, …), and give its rows as text. Raises psycopg.Error."""
        name = self._prepared.get(query)
        if name is None:
            name = self._prepared[query] = f"torture_{len(self._prepared)}".encode()
            _good(self._pgconn.prepare(name, query.encode()))
        result = _good(self._pgconn.exec_prepared(name, [str(value).encode() for value in values]))
        return [
            tuple(_text(result.get_value(row, column)) for column in range(result.nfields))
            for row in range(result.ntuples)
        ]


def array(values: list[int] | list[str]) -> str:
    """An array of integers or plain words, as PostgreSQL reads it."""
    return "{" + ",".join(map(str, values)) + "}"


def _good(result: pq.abc.PGresult) -> pq.abc.PGresult:
    if result.status not in (pq.ExecStatus.COMMAND_OK, pq.ExecStatus.TUPLES_OK):
        raise error_from_result(result)
    return result


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode()
