"""Erase what is personal about one owner: texts beside transactions, raw statements, messages of failures.

None of it is money: every transaction stays, with its amount, balances and time, and so does every proof.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from sqlalchemy import Connection, Engine, text

from walletmigrate.audit import Act, record
from walletmigrate.config import Mapping, Settings
from walletmigrate.corrections import key_of
from walletmigrate.errors import UsageError
from walletmigrate.retired import legacy_table
from walletmigrate.schema import quoted
from walletmigrate.standing import require_installed


@dataclass(frozen=True)
class Erasure:
    """What was erased about an owner, or would be (``dry_run``).

    ``details`` are transactions whose description and address went, ``queries`` lines of the catalogue that lost
    the statement as it was sent, ``messages`` failures that lost the database's words. ``audit_id`` is None where
    there was nothing to erase.
    """

    mapping: str
    key: str
    details: int
    queries: int
    messages: int
    dry_run: bool
    audit_id: int | None

    @property
    def total(self) -> int:
        """How many texts."""
        return self.details + self.queries + self.messages


def erase(
    engine: Engine, settings: Settings, mapping: Mapping, key: str, act: Act, *, dry_run: bool = False
) -> Erasure:
    """Erase the texts about the owner with that key, in all buckets, in one transaction. Idempotent.

    A text that stands beside a transfer goes for both of its sides. The audit row has the key and the counts, and
    ``act`` itself is kept for ever: its reason must not name the person. Raises InvalidKey, and UsageError where
    the ledger knows nobody with that key.
    """
    name = quoted(settings.ledger_schema)
    with engine.begin() as connection:
        require_installed(connection, settings)
        table = legacy_table(connection, settings.ledger_schema, mapping)
        known = key_of(key, table.key_type, mapping)
        _require_known(connection, name, mapping, known)
        row = connection.execute(
            text(f"select details, queries, messages from {name}.erase(:mapping, :key, :dry_run)"),
            {"mapping": mapping.name, "key": known, "dry_run": dry_run},
        ).one()
        found = Erasure(mapping.name, known, row.details, row.queries, row.messages, dry_run, None)
        if dry_run or not found.total:
            return found
        counts = {"details": found.details, "queries": found.queries, "messages": found.messages}
        audit_id = record(connection, settings, "erase", act, mapping=mapping.name, details={"key": known, **counts})
    return replace(found, audit_id=audit_id)


def _require_known(connection: Connection, name: str, mapping: Mapping, key: str) -> None:
    tables = ("accounts", "bypasses", "failures")
    known = " or ".join(f"exists (select from {name}.{one} where mapping = :mapping and key = :key)" for one in tables)
    if not connection.scalar(text(f"select {known}"), {"mapping": mapping.name, "key": key}):
        raise UsageError(f"the ledger knows nobody with key {key!r} in mapping {mapping.name!r}: nothing to erase")
