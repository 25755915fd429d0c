"""The steps that a migration takes in a rehearsal: the operator's side, by the functions of the command line."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, TypeVar

from sqlalchemy import Engine, text

from walletmigrate import line, phases
from walletmigrate.audit import Act
from walletmigrate.backfill import backfill
from walletmigrate.config import Settings
from walletmigrate.errors import PreconditionRefused, WalletMigrateError
from walletmigrate.flag_edits import can_name
from walletmigrate.flag_file import FlagFile
from walletmigrate.flag_sources import FileSource
from walletmigrate.flags import DUAL_WRITE
from walletmigrate.freeze import FreezeResult, freeze, unfreeze
from walletmigrate.install import install
from walletmigrate.rehearsal_crew import Crew
from walletmigrate.schema import quoted
from walletmigrate.traffic import Traffic
from walletmigrate.verify import Verification, verify

WRITING_TENANTS: Final = 20
"""How many tenants, at most, are written to the ledger before everybody is; each takes an edit of the flags."""

COHORT_TENANTS: Final = 3
"""How many tenants, at most, read from the ledger before everybody does."""

EXERCISE_UNTIL: Final = 0.6
"""Up to which share of the leg the phase stays back at legacy."""

SHOWN: Final = 3
"""How many single accounts a message names."""

BATCH_SIZE: Final = 100
"""Small batches, so that jobs meet traffic in the midst of their work."""

BATCHES: Final = 50
"""Into how many batches, at most, a larger table is cut, so that jobs are not the most of a rehearsal."""

LARGEST_BATCH: Final = 5_000

STOP_SECONDS: Final = 30.0
"""How long a posting in flight may go on after the line is stopped."""

Done = TypeVar("Done")


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
        self.trait = traffic.trait
        # Whom no flag can name is left to the steps for everyone, as in a real migration.
        tenants = sorted(name for name in set(traffic.tenants.values()) if can_name((self.trait, name)))
        random.Random(f"{seed} cohorts").shuffle(tenants)
        self.writing = tenants[: min((len(tenants) + 1) // 2, WRITING_TENANTS)]
        self.reading = self.writing[:COHORT_TENANTS]
        self._batch_size = min(max(BATCH_SIZE, len(traffic.tenants) // BATCHES), LARGEST_BATCH)
        self._written = 0

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
        first = self._backfill(crew)
        self._agreed(crew)
        return f"{first}; {self._backfill(crew)}"

    def lose_a_worker(self, crew: Crew) -> str:
        """A worker is killed in the midst; its transactions are sent again with the same idempotency keys."""
        return crew.replace_one()

    def read_some(self, crew: Crew) -> str:
        """Verify, open the phase, and read a cohort's balances from the ledger."""
        said = self._gated(crew, lambda: self._advance_verified("reads may come from the ledger"))
        self._gated(crew, lambda: self._cut_over(*[(self.trait, tenant) for tenant in self.reading]))
        return f"{said}; ledger reads for {len(self.reading)} tenants"

    def read_all(self, crew: Crew) -> str:
        """Read everybody's balances from the ledger."""
        self._gated(crew, lambda: self._cut_over(None))
        self._agreed(crew)
        return "ledger reads for everyone"

    def stop_the_line(self, crew: Crew) -> str:  # noqa: ARG002 - as all steps
        """Nothing more is written to the ledger, in any process, once the postings in flight have ended."""
        line.stop(self.engine, self.settings, _act("stop the line under traffic"))
        left = line.wait(self.engine, self.settings, timeout=STOP_SECONDS)
        if left:
            raise StepFailed(f"{len(left)} transactions in flight have not ended in {STOP_SECONDS:.0f} s")
        self._written = self._transactions()
        return "stopped, postings in flight waited out"

    def resume(self, crew: Crew) -> str:
        """Make sure that nothing was written, and let the line run again."""
        since = self._transactions() - self._written
        if since:
            raise StepFailed(f"{since} transactions were written to the ledger while the line was stopped")
        line.resume(self.engine, self.settings, _act("the line may run again"))
        return f"resumed; {self._backfill(crew)}"

    def roll_back(self, crew: Crew) -> str:  # noqa: ARG002 - as all steps
        """Read everybody's balances from legacy again: by the phase at once, whenever the flag arrives."""
        phases.rollback(self.engine, self.settings, self.flags, _act("reads back to legacy"))
        return "reads back to legacy"

    def forward(self, crew: Crew) -> str:
        """Verify once more, and read everybody's balances from the ledger."""
        said = self._gated(crew, lambda: self._advance_verified("forward again"))
        return f"{said}; {self.read_all(crew)}"

    def freeze(self, crew: Crew) -> str:
        """The ledger alone is written, account by account."""
        self._gated(crew, lambda: self._advance_verified("the wallet's own features may be used"))
        again = _act("the way back, exercised again")
        self._gated(crew, lambda: phases.exercise(self.engine, self.settings, self.source, again))
        self._gated(crew, self.verified)
        self._gated(crew, lambda: phases.enter_frozen(self.engine, self.settings, self.source, _act("freeze")))
        frozen = 0

        def seal() -> None:
            nonlocal frozen
            found = freeze(
                self.engine,
                self.settings,
                self.mapping,
                _act("freeze"),
                batch_size=self._batch_size,
                stop=lambda: crew.failed,
            )
            frozen += found.changed
            _all_moved(found, "frozen")

        self._gated(crew, seal)
        return f"{frozen} accounts frozen"

    def unfreeze(self, crew: Crew) -> str:
        """Bring the legacy column up to the ledger; both are written from then on."""
        phases.leave_frozen(self.engine, self.settings, _act("unfreeze"))
        found = unfreeze(
            self.engine,
            self.settings,
            self.mapping,
            _act("unfreeze"),
            batch_size=self._batch_size,
            stop=lambda: crew.failed,
        )
        _all_moved(found, "unfrozen")
        return f"{found.changed} accounts unfrozen"

    def verify(self, crew: Crew) -> str:
        """A full verification as a step of its own."""
        return self._gated(crew, self.verified)

    def verified(self) -> str:
        """A full verification, on record. Raises StepFailed unless it is clean."""
        found = verify(self.engine, self.settings, self.mapping, _act("the gate asks for it"))
        if not found.clean:
            raise StepFailed(f"the verification is not clean: {'; '.join(_findings(found))}")
        return f"verified {found.accounts} accounts"

    def _gated(self, crew: Crew, step: Callable[[], Done]) -> Done:
        """Take a step whose gate closes while an account is stale, which raw SQL may make of one at any moment.

        So the operator brings all accounts up, and tries again, until the traffic of the leg is over at last.
        """
        quiet = False
        while True:
            try:
                return step()
            except (PreconditionRefused, StepFailed):
                if quiet or crew.failed:
                    raise
            quiet = crew.quiet
            self._backfill(crew)

    def _advance_verified(self, reason: str) -> str:
        said = self.verified()
        phases.advance(self.engine, self.settings, self.source, _act(reason))
        return said

    def _cut_over(self, *cohorts: tuple[str, str] | None) -> None:
        for cohort in cohorts:
            phases.cutover(self.engine, self.settings, self.flags, cohort, _act("read from the ledger"))

    def _transactions(self) -> int:
        with self.engine.begin() as connection:
            name = quoted(self.settings.ledger_schema)
            return int(connection.scalar(text(f"select count(*) from {name}.transactions")) or 0)

    def _dual_write(self, tenant: str | None) -> None:
        who: dict[str, Any] = {"everyone": True} if tenant is None else {"trait": (self.trait, tenant)}
        act = _act("dual-write for a cohort" if tenant else "dual-write for everyone")
        phases.set_flag(self.engine, self.settings, self.flags, DUAL_WRITE, True, act, **who)

    def _backfill(self, crew: Crew) -> str:
        found = backfill(
            self.engine,
            self.settings,
            self.mapping,
            _act("open the accounts"),
            batch_size=self._batch_size,
            rate=math.inf,  # the traffic beside it is the rehearsal's own
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


def _all_moved(found: FreezeResult, how: str) -> None:
    if found.refused:
        raise StepFailed(f"{found.refused} accounts could not be {how}")


def _act(reason: str) -> Act:
    return Act("rehearsal", reason)
