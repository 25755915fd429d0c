"""Move money from a mutable balance column to a double-entry ledger, and back, under live traffic."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from walletmigrate.errors import PostingRefused, WalletMigrateError

if TYPE_CHECKING:
    from walletmigrate.adapter import LegacyBalanceAdapter
    from walletmigrate.async_adapter import AsyncLegacyBalanceAdapter
    from walletmigrate.config import Column, Mapping, Settings
    from walletmigrate.flags import Decision, StaticSource
    from walletmigrate.ledger import Entry
    from walletmigrate.movements import Movement
    from walletmigrate.postings import Posting
    from walletmigrate.reads import Balance
    from walletmigrate.schema import hide_from_autogenerate

__version__ = "0.1.0"

__all__ = [
    "AsyncLegacyBalanceAdapter",
    "Balance",
    "Column",
    "Decision",
    "Entry",
    "LegacyBalanceAdapter",
    "Mapping",
    "Movement",
    "Posting",
    "PostingRefused",
    "Settings",
    "StaticSource",
    "WalletMigrateError",
    "hide_from_autogenerate",
]

_ROOMS = {
    "AsyncLegacyBalanceAdapter": "async_adapter",
    "Balance": "reads",
    "Column": "config",
    "Decision": "flags",
    "Entry": "ledger",
    "LegacyBalanceAdapter": "adapter",
    "Mapping": "config",
    "Movement": "movements",
    "Posting": "postings",
    "Settings": "config",
    "StaticSource": "flags",
    "hide_from_autogenerate": "schema",
}


def __getattr__(name: str) -> Any:
    # Loaded when first asked for: a command of the command line starts without the adapter and all below it.
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_ROOMS[name]}"), name)
    return value
