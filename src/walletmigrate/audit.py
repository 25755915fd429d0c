"""The audit log: who did what to the migration, and why."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, text

from walletmigrate import observe
from walletmigrate.config import Settings
from walletmigrate.schema import quoted


@dataclass(frozen=True)
class Act:
    """Who changes something and why; both are words for the auditor, neither may be empty. What is done under
    it has its ``correlation_id``; without one, each audit row has that of the context in which it is written.
    """

    actor: str
    reason: str
    correlation_id: str | None = None

    def __post_init__(self) -> None:
        if not self.actor.strip() or not self.reason.strip():
            raise ValueError("an act has an actor and a reason")

    def correlation(self) -> str:
        """The correlation id of what is done now: its own, else that of the caller's context, else one made."""
        return self.correlation_id or observe.correlation_id()


def record(
    connection: Connection,
    settings: Settings,
    action: str,
    act: Act,
    *,
    mapping: str | None = None,
    job_id: int | None = None,
    details: dict[str, Any] | None = None,
) -> int:
    """Write one audit row in the caller's transaction and return its id."""
    return int(
        connection.execute(
            text(
                f"insert into {quoted(settings.ledger_schema)}.audit_log "
                "(action, actor, reason, mapping, job_id, correlation_id, details) values "
                "(:action, :actor, :reason, :mapping, :job, :correlation, cast(:details as jsonb)) returning id"
            ),
            {
                "action": action,
                "actor": act.actor,
                "reason": act.reason,
                "mapping": mapping,
                "job": job_id,
                "correlation": act.correlation(),
                "details": json.dumps(details or {}, default=str),
            },
        ).scalar_one()
    )
