"""Which tests may miss a guard, the likely ones first."""

from __future__ import annotations

import json
import re
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

_POSTING = ("test_adapter", "test_groups", "test_bystanders")
_LIKELY = (
    ("security definer|set search_path", ("test_roles", "test_rights")),
    ("for no key update|order by|40%|55P03|lock_not|deadlock|serialization", ("test_conc", "test_stories", "test_tor")),
    (r"(mapping|bucket|currency|key|id|\[\d\]) (=|in) .* → true", ("test_bystanders",)),
    (r"^(posting|mapping)\.", _POSTING),
)
"""What a guard's name tells of the tests that may miss it."""


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
        """Tests for a guard: those that can miss it by what they reach, likely files, kin and fast ones first."""
        place = guard.partition(": ")[0]
        template = place.partition(".")[0]
        direct = {test for test, seen in self._reached.items() if guard in seen["guards"]}
        near = {test for test, seen in self._reached.items() if any(g.startswith(f"{place}: ") for g in seen["guards"])}
        kin = Counter(test for other, test in self._killed.items() if other.startswith(f"{place}: "))
        family = Counter(test for other, test in self._killed.items() if other.startswith(f"{template}."))
        files = next((files for pattern, files in _LIKELY if re.search(pattern, guard)), ())

        def rank(test: str) -> tuple[bool, float]:
            seen = self._reached.get(test, {"seconds": 2.0, "guards": []})
            likely = 5 if test.startswith(tuple(files)) else 1
            return test not in direct, seen["seconds"] * (len(seen["guards"]) or 300) / (1 + kin[test]) / likely

        ranked = sorted(direct or near, key=rank)
        # Not all of one test's parameters before the next test: what one does not miss, its like seldom does.
        met: Counter[str] = Counter()
        order = {}
        for number, test in enumerate(ranked):
            name = test.partition("[")[0]
            order[test] = (met[name] // 2, number)
            met[name] += 1
        ranked.sort(key=order.__getitem__)
        ranked += [test for test, _ in kin.most_common(5)] + [test for test, _ in family.most_common(5)]
        return list(dict.fromkeys(ranked or [test for test, _ in self._played.most_common(40)]))
