"""Move money from a mutable balance column to a double-entry ledger, and back, under live traffic."""

from walletmigrate.adapter import LegacyBalanceAdapter
from walletmigrate.async_adapter import AsyncLegacyBalanceAdapter
from walletmigrate.config import Column, Mapping, Settings
from walletmigrate.errors import PostingRefused, WalletMigrateError
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
