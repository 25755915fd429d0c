"""Which grant a command lacked, when the database refused one of its statements."""

from __future__ import annotations

from typing import Final

from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from walletmigrate import connect
from walletmigrate.errors import GrantMissing, WalletMigrateError
from walletmigrate.invocation import Run

REFUSED: Final = "42501"
"""insufficient_privilege"""


def missing(run: Run, role: str, error: DBAPIError) -> GrantMissing | None:
    """The error for a refused statement of a command that runs with ``role``; None for any other failure.

    Who was refused is asked on a new connection: the one that failed has an aborted transaction.
    """
    if connect.sqlstate(error) != REFUSED:
        return None
    said = str(getattr(getattr(error.orig, "diag", None), "message_primary", None) or "permission denied")
    try:
        needs = None if role in ("installer", "none") else str(getattr(run.settings.roles, role))
        with run.engine.connect() as connection:
            who = str(connection.scalar(text("select current_user")))
            known = text("select exists (select from pg_roles where rolname = :needs)")
            member = False
            if needs and connection.scalar(known, {"needs": needs}):
                query = text("select pg_has_role(current_user, cast(:needs as name), 'usage')")
                member = bool(connection.scalar(query, {"needs": needs}))
    except (DBAPIError, WalletMigrateError):
        return None
    return GrantMissing(run.command, who, needs, member, said)
