"""The code of docs/recipes.md, and what its tests have in common."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import Engine

import adapting
from commandline import Project
from walletmigrate import connect

RECIPES = Path(__file__).parents[1] / "docs" / "recipes.md"


def code_of(heading: str) -> str:
    """The one block of Python under a heading."""
    text = RECIPES.read_text(encoding="utf-8").partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    (code,) = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return str(code)


@contextmanager
def checked(project: Project) -> Iterator[Engine]:
    """An engine for a test's own look at the ledger, whose invariants are held at the end."""
    made = connect.engine(project.url, application_name="test")
    yield made
    adapting.check_invariants(made, project.settings)
    made.dispose()
