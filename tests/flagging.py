"""Projects whose flags are looked at and switched by commands, and what of it is on record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import ledger
from commandline import Project, project_at


@pytest.fixture
def project(database_url: str, tmp_path: Path) -> Project:
    """A project in phase read_ledger with flags from a file: dual-write is on for everyone."""
    return project_at(tmp_path, database_url, "read_ledger")[0]


@pytest.fixture
def bare(tmp_path: Path) -> Project:
    """A project without a database."""
    return Project(tmp_path, "")


def audited(project: Project) -> list[tuple[Any, ...]]:
    engine = ledger.engine_named(project.url)
    query = "select action, actor, reason, details from wallet.audit_log where details ? 'who' order by id"
    return ledger.rows(engine, query)
