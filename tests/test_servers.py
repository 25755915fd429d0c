"""A server that cannot be run here is refused before any test starts, with what to do instead."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

import servers


def test_a_container_without_a_docker_engine_is_refused_before_any_test_and_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/nobody.sock")
    with pytest.raises(pytest.UsageError) as refused:
        servers.check("docker:16")
    said = str(refused.value)
    assert said.startswith("--postgres docker:16 needs a Docker engine, and none answers (")
    assert said.endswith("the tests bring a PostgreSQL of their own.")
    assert "\n" not in said
    del refused
    gc.collect()  # a connection that the client left open would be told here, and in a real run below the sentence


def test_a_folder_without_a_server_is_refused_and_other_names_are_given(tmp_path: Path) -> None:
    with pytest.raises(pytest.UsageError, match=r"has no program postgres; give 18, 16, 15"):
        servers.check(str(tmp_path))
