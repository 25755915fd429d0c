"""The steps that a migration takes in a rehearsal: the operator's side, by the functions of the command line."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Engine

from walletmigrate import phases
from walletmigrate.audit import Act
from walletmigrate.backfill import backfill
from walletmigrate.config import Settings
from walletmigrate.errors import WalletMigrateError
from walletmigrate.flag_file import FlagFile
from walletmigrate.flag_sources import FileSource
from walletmigrate.flags import DUAL_WRITE
from walletmigrate.freeze import FreezeResult, freeze, unfreeze
from walletmigrate.install import install
from walletmigrate.rehearsal_crew import Crew
from walletmigrate.traffic import Traffic
from walletmigrate.verify import Verification, verify

COHORT_TENANTS: Final = 3
"""How many tenants, at most, read from the ledger before everybody does."""

EXERCISE_UNTIL: Final = 0.6
"""Up to which share of the leg the phase stays back at legacy."""

SHOWN: Final = 3
"""How many single accounts a message names."""

BATCH_SIZE: Final = 100
"""Small batches, so that jobs meet traffic in the midst of their work."""


class StepFailed(WalletMigrateError):
    """A step of the migration did not come out as it must."""

    code = "step_failed"


class Migration:
    """The operator's side of the rehearsal: every step by the functions that the command line calls."""

    def __init__(self, engine: Engine, settings: Settings, flag_file: Path, traffic: Traffic, seed: int) -> None:
        self.engine = engine
        self.settings = settings
        self.mapping = settings.mapping()
        self.flags = FlagFile(flag_file)
        self.source = FileSource(flag_file)
        tenants = sorted(set(traffic.tenants.values()))
        random.Random(f"{seed} cohorts").shuffle(tenants)
        self.writing = tenants[: (len(tenants) + 1) // 2]
        self.reading = self.writing[:COHORT_TENANTS]

    def install(self, crew: Crew) -> str:
        """Make ledger and fence; the application notices at its restart."""
        made = install(self.engine, self.settings, _act("install beside the traffic"))
        crew.restart()
        return f"fences: {', '.join(made.fences_made)}"

    def write_some(self, crew: Crew) -> str:
        """Dual-write for half of the tenants; open every account. Those without it turn stale as they go on."""
        phases.advance(self.engine, self.settings, self.source, _act("dual-write may begin"))
        for tenant in self.writing:
            self._dual_write(tenant)
        self._agreed(crew)
        return f"dual-write for {len(self.writing)} tenants; {self._backfill(crew)}"

    def exercise(self, crew: Crew) -> str:
        """The way back to legacy alone, and forward again."""
        phases.back(self.engine, self.settings, _act("the way back, exercised"))
        crew.wait_for_share(EXERCISE_UNTIL)
        phases.advance(self.engine, self.settings, self.source, _act("forward again"))
        return "back to legacy and forward again"

    def write_all(self, crew: Crew) -> str:
        """Dual-write for everyone; then bring every account up to its legacy balance."""
        self._dual_write(None)
        self._agreed(crew)
        return self._backfill(crew)

    def read_some(self, crew: Crew) -> str:
        """Verify, open the phase, and read a cohort's balances from the ledger."""
        said = self.verified()
        phases.advance(self.engine, self.settings, self.source, _act("reads may come from the ledger"))
        for tenant in self.reading:
            act = _act("a cohort reads from the ledger")
            phases.cutover(self.engine, self.settings, self.flags, ("tenant", tenant), act)
        self._agreed(crew)
        return f"{said}; ledger reads for {len(self.reading)} tenants"

    def read_all(self, crew: Crew) -> str:
        """Read everybody's balances from the ledger."""
        phases.cutover(self.engine, self.settings, self.flags, None, _act("everyone reads from the ledger"))
        self._agreed(crew)
        return "ledger reads for everyone"

    def roll_back(self, crew: Crew) -> str:
        """Read everybody's balances from legacy again."""
        phases.rollback(self.engine, self.settings, self.flags, _act("reads back to legacy"))
        self._agreed(crew)
        return "reads back to legacy"

    def forward(self, crew: Crew) -> str:
        """Verify once more, and read everybody's balances from the ledger."""
        said = self.verified()
        phases.advance(self.engine, self.settings, self.source, _act("forward again"))
        return f"{said}; {self.read_all(crew)}"

    def freeze(self, crew: Crew) -> str:
        """The ledger alone is written, account by account."""
        phases.advance(self.engine, self.settings, self.source, _act("the wallet's own features may be used"))
        phases.exercise(self.engine, self.settings, self.source, _act("the way back, exercised again"))
        self.verified()
        phases.enter_frozen(self.engine, self.settings, self.source, _act("freeze"))
        found = freeze(
            self.engine,
            self.settings,
            self.mapping,
            _act("freeze"),
            batch_size=BATCH_SIZE,
            stop=lambda: crew.failed,
        )
        return _moved(found, "frozen")

    def unfreeze(self, crew: Crew) -> str:
        """Bring the legacy column up to the ledger; both are written from then on."""
        phases.leave_frozen(self.engine, self.settings, _act("unfreeze"))
        found = unfreeze(
            self.engine,
            self.settings,
            self.mapping,
            _act("unfreeze"),
            batch_size=BATCH_SIZE,
            stop=lambda: crew.failed,
        )
        return _moved(found, "unfrozen")

    def verify(self, _crew: Crew) -> str:
        """A full verification as a step of its own."""
        return self.verified()

    def verified(self) -> str:
        """A full verification, on record. Raises StepFailed unless it is clean."""
        found = verify(self.engine, self.settings, self.mapping, _act("the gate asks for it"))
        if not found.clean:
            raise StepFailed(f"the verification is not clean: {'; '.join(_findings(found))}")
        return f"verified {found.accounts} accounts"

    def _dual_write(self, tenant: str | None) -> None:
        who: dict[str, Any] = {"everyone": True} if tenant is None else {"trait": ("tenant", tenant)}
        act = _act("dual-write for a cohort" if tenant else "dual-write for everyone")
        phases.set_flag(self.engine, self.settings, self.flags, DUAL_WRITE, True, act, **who)

    def _backfill(self, crew: Crew) -> str:
        found = backfill(
            self.engine,
            self.settings,
            self.mapping,
            _act("open the accounts"),
            batch_size=BATCH_SIZE,
            stop=lambda: crew.failed,
        )
        if found.failed:
            raise StepFailed(f"the backfill could not open {found.failed} accounts")
        return f"backfill: {found.opened} opened, {found.resynced} resynced"

    def _agreed(self, crew: Crew) -> None:
        """Wait until every process decides by the flags as they are now."""
        crew.wait_for_document(self.source.refresh().document_id)


def _findings(found: Verification) -> Iterator[str]:
    for one in found.drift[:SHOWN]:
        yield f"account {one.key} {one.problem}: legacy {one.legacy}, ledger {one.ledger}"
    for problem in found.journal[:SHOWN]:
        yield f"account {problem.key or problem.account}: {problem.problem}"
    for guard in found.guards:
        yield f"{guard.trigger} {guard.problem}"
    for currency, amount in found.imbalance.items():
        if amount:
            yield f"the ledger's balances in {currency} come to {amount}, not 0"
    yield f"{found.drift_accounts} accounts differ, {found.missing} are missing, {found.stale} stale"


def _moved(found: FreezeResult, how: str) -> str:
    if found.refused:
        raise StepFailed(f"{found.refused} accounts could not be {how}")
    return f"{found.changed} accounts {how}"


def _act(reason: str) -> Act:
    return Act("rehearsal", reason)
