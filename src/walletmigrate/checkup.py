"""What a check-up finds: one thing that is not as it should be, what mends it, and where it is explained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from walletmigrate.standing import REASON

INSTALL: Final = f"walletmigrate install {REASON}"
DRIFT: Final = "runbooks/balance-drift.md"
CHANGED: Final = "runbooks/currency-or-scale-change.md"
INSTALLATION: Final = "runbooks/installation-altered.md"
RETIRED: Final = "runbooks/retire.md"
LATENCY: Final = "runbooks/ledger-latency-high.md"
AROUND: Final = "runbooks/clocks-and-replicas.md"
BYPASSES: Final = "runbooks/bypass-writes.md"
RELEASES: Final = "runbooks/releases.md"
RIGHTS: Final = "runbooks/rights.md"


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be, the command that mends it, and the runbook that explains it.

    ``severity`` is problem, or note for what may well be as it should be, and could not be looked at.
    """

    what: str
    mend: str
    runbook: str
    severity: Literal["problem", "note"] = "problem"
