"""What the tests of watched attributes share."""

from __future__ import annotations

from adapting import Place
from ledger import rows
from walletmigrate.observe import LostUpdate, Unrouted


def lost(at: Place) -> list[LostUpdate]:
    """The lost updates that observers were told of."""
    return [event for event in at.heard.events if isinstance(event, LostUpdate)]


def unrouted(at: Place) -> list[tuple[str, str]]:
    """The writes that went past the adapter and were told: where, and why."""
    return [(event.where, event.reason) for event in at.heard.events if isinstance(event, Unrouted)]


def movements(at: Place) -> list[tuple[str, str, str, str | None]]:
    """(kind, type, actor, reason) of all transactions but openings, in order."""
    found = rows(
        at.engine,
        "select kind::text, type, actor, reason from wallet.transactions where kind <> 'opening' order by id",
    )
    return [(kind, type_, actor, reason) for kind, type_, actor, reason in found]
