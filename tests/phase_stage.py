"""What the tests of the phases share: an installed ledger with ten users, its flag file, and an operator's steps."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine

import flag_documents
import ledger
from copies import copied
from walletmigrate import phases
from walletmigrate.audit import Act
from walletmigrate.backfill import backfill
from walletmigrate.config import Settings
from walletmigrate.flag_file import FlagFile
from walletmigrate.flags import DUAL_WRITE, Decision, StaticSource
from walletmigrate.freeze import freeze
from walletmigrate.verify import verify

ACT = Act("admin:7", "a test of the phases")
KNOWN = StaticSource(Decision(True, False, False))
EVERYONE = StaticSource(Decision(True, True, False))


class Stage:
    """An installed ledger with ten users, its flag file, and the steps of an operator."""

    def __init__(self, url: str, folder: Path, *, window: timedelta = timedelta(0), rows: int = 10) -> None:
        self._url, self._begun_as = url, f"{rows} {window}"
        self.engine, settings = ledger.install_users(url, rows=rows)
        self.settings = settings.model_copy(update={"observation_window": window})
        self.path = folder / "environment.json"
        self.path.write_bytes(flag_documents.body(flag_documents.document(DUAL_WRITE)))
        self.flags = FlagFile(self.path)

    def with_window(self, window: timedelta) -> Settings:
        return self.settings.model_copy(update={"observation_window": window})

    def advance(self, source: Any = KNOWN, **options: Any) -> phases.PhaseChange:
        return phases.advance(self.engine, self.settings, source, ACT, **options)

    def back(self, **options: Any) -> phases.PhaseChange:
        return phases.back(self.engine, self.settings, ACT, **options)

    def backfill(self) -> None:
        backfill(self.engine, self.settings, self.settings.mapping(), ACT)

    def verify(self) -> bool:
        return verify(self.engine, self.settings, self.settings.mapping(), ACT).clean

    def cutover(self, cohort: tuple[str, str] | None, **options: Any) -> phases.FlagChange:
        return phases.cutover(self.engine, self.settings, self.flags, cohort, ACT, **options)

    def to(self, phase: str) -> Stage:
        """Walk there as an operator would; by a copy, if nothing was done since the ledger was installed."""
        if phase != "legacy":
            copied(self._url, f"phase_stage {phase} {self._begun_as}", lambda: self._walk(phase))
        return self

    def _walk(self, phase: str) -> None:
        self.advance()
        self.backfill()
        self.verify()
        if phase == "dual_write":
            return
        phases.exercise(self.engine, self.settings, KNOWN, ACT)
        self.advance()
        if phase == "read_ledger":
            return
        self.advance(EVERYONE)
        if phase == "frozen":
            phases.exercise(self.engine, self.settings, KNOWN, ACT)
            phases.enter_frozen(self.engine, self.settings, KNOWN, ACT)
            freeze(self.engine, self.settings, self.settings.mapping(), ACT)

    @property
    def phase(self) -> str:
        with self.engine.connect() as connection:
            return phases.show(connection, self.settings).phase

    def reasons(self, to: str, source: Any = KNOWN, settings: Settings | None = None) -> list[str]:
        with self.engine.connect() as connection:
            return [what for what, _ in phases.reasons(connection, settings or self.settings, source, to)]

    def audited(self) -> list[tuple[Any, ...]]:
        query = "select action, actor, reason, details from wallet.audit_log order by id"
        return ledger.rows(self.engine, query)


@pytest.fixture
def stage(database_url: str, tmp_path: Path) -> Stage:
    return Stage(database_url, tmp_path)


def fence(stage: Stage, event: str) -> str:
    """The name of the fence's trigger for an event."""
    query = "select tgname from pg_trigger where tgrelid = 'public.users'::regclass and tgname like :pattern"
    return str(ledger.scalar(stage.engine, query, pattern=f"walletmigrate%{event}"))


def failed(engine: Engine, at: str) -> None:
    """A posting whose ledger leg failed."""
    ledger.execute(
        engine,
        "insert into wallet.failures (at, mapping, key, bucket, currency, operation, sqlstate, message) "
        f"values ({at}, 'users', '3', 'cash', 'EUR', 'credit', '22003', 'a test')",
    )
