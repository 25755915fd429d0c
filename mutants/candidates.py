"""Which tests may miss a guard, the likely ones first."""

from __future__ import annotations

import json
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Any

from mutants.record import Entries, killed

_LEFT_OUT = (
    *("torture", "rehears", "alert", "runbook", "dashboard", "export", "pooling", "properties", "docs", "monitoring"),
    *("embedded", "testing", "binaries", "example", "init", "flag", "discover", "config", "test_model.", "watch"),
    *("test_cli", "async", "throttle", "heartbeat", "job_workers", "observe", "traffic", "orphans", "connect"),
)
"""Words of files whose tests are slow, or do not come to the SQL that writes."""


class Candidates:
    """The tests that reach a guard, as `reach` found them; and those that miss others of the same function."""

    FOLDER = Path(__file__).parent.parent / ".mutants"

    def __init__(self, entries: Entries) -> None:
        self._killed = killed(entries)
        self._played = Counter(self._killed.values())

    @staticmethod
    def files() -> list[str]:
        """The files of tests that reach the SQL and are fast."""
        folder = Path(__file__).parent.parent / "tests"
        names = [path.name for path in sorted(folder.glob("test_*.py"))]
        return [name for name in names if not any(word in name for word in _LEFT_OUT)]

    @cached_property
    def _reached(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for path in sorted(self.FOLDER.glob("*.json")):
            found.update(json.loads(path.read_text(encoding="utf-8")))
        return found

    def of(self, guard: str) -> list[str]:
        """Tests for a guard: those that reach it, few others, fast; else those of its function; else of its file."""
        place = guard.partition(": ")[0]
        template = place.partition(".")[0]
        direct = {test for test, seen in self._reached.items() if guard in seen["guards"]}
        near = {test for test, seen in self._reached.items() if any(g.startswith(f"{place}: ") for g in seen["guards"])}
        kin = Counter(test for other, test in self._killed.items() if other.startswith(f"{place}: "))
        family = Counter(test for other, test in self._killed.items() if other.startswith(f"{template}."))

        def rank(test: str) -> tuple[bool, float]:
            seen = self._reached.get(test, {"seconds": 2.0, "guards": []})
            narrow = len(seen["guards"]) or 300
            return test not in direct, seen["seconds"] * narrow / (1 + kin[test])

        ranked = sorted(direct or near, key=rank)
        ranked += [test for test, _ in kin.most_common(5)] + [test for test, _ in family.most_common(5)]
        return list(dict.fromkeys(ranked or [test for test, _ in self._played.most_common(40)]))
