"""Sources to look through, with a project whose database is never asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from commandline import Project

MODELS = (
    "class User(Base):\n    __tablename__ = 'users'\n    total_coins = mapped_column(Numeric)\n"
    "class Order(Base):\n    __tablename__ = 'orders'\n    total_coins = mapped_column(Numeric)\n"
)
"""Models of the mapped table, and of another with a column of the same name."""


@pytest.fixture
def project(tmp_path: Path) -> Project:
    folder = tmp_path / "configuration"
    folder.mkdir()
    return Project(folder, "postgresql://nobody@127.0.0.1:1/none")


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """An empty folder for them."""
    folder = tmp_path / "sources"
    folder.mkdir()
    return folder
