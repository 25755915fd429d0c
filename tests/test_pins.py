"""What is pinned can be installed where the README says that it can."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[1]
PROMISED = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["requires-python"]
OLDEST = PROMISED.removeprefix(">=") + ".0"


def pinned() -> dict[str, str]:
    """Version by package, as in constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_every_pinned_package_runs_on_the_oldest_python_that_is_promised() -> None:
    assert re.fullmatch(r">=3\.\d+", PROMISED)
    wrong, seen = {}, 0
    for name, version in pinned().items():
        try:
            found = metadata(name)
        except PackageNotFoundError:  # of another platform or Python
            continue
        assert found["Version"] == version, f"{name}: the tests run with another version than is pinned; make setup"
        seen += 1
        # Some say nothing, and to ask for that is an error where importlib_metadata stands in.
        wants = found["Requires-Python"] if "Requires-Python" in found else None  # noqa: SIM401 - its type has no get
        if wants and OLDEST not in SpecifierSet(wants):
            wrong[name] = wants
    assert seen > 50
    assert wrong == {}
