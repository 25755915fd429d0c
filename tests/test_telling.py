"""A build tells what failed when it fails; elsewhere it stands at the end alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


@pytest.mark.parametrize("build", [True, False], ids=["build", "by hand"])
@pytest.mark.parametrize("processes", [0, 1])
def test_what_failed_is_told_before_the_next_test_where_it_is_a_build(
    tmp_path: Path, build: bool, processes: int
) -> None:
    (tmp_path / "conftest.py").write_text(
        "import telling\n\n\ndef pytest_sessionstart(session):\n    telling.register(session.config)\n"
    )
    (tmp_path / "test_two.py").write_text("def test_a():\n    assert 6 * 7 == 41\n\n\ndef test_b():\n    pass\n")
    environment = {**os.environ, "PYTHONPATH": str(TESTS), "CI": "true" if build else "false"}
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-n", str(processes), str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    told = done.stdout.partition("= FAILURES =")[0]
    assert ("call of test_two.py::test_a, after 0 s:" in told) is build
    assert told.count("assert (6 * 7) == 41") == build
