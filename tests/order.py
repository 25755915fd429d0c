"""The order of tests where several processes share them: what takes long is begun first, so that none waits for it.

`--dist worksteal` gives each process an equal run of the list; who is done takes the end of another's. A test of two
minutes that comes last keeps one process at work and all others idle.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, TypeVar

Test = TypeVar("Test")

LONG: Final = (
    *("test_mutants", "test_runbooks", "test_rehearsal_metrics", "test_example", "test_monitoring", "test_rehearse"),
    *("test_verify_faults", "test_recipe_worker", "test_standby", "test_alerts", "test_multiprocess"),
    *("test_job_workers", "test_site", "test_deploys", "test_promises", "test_torture"),
)
"""The files with tests of more than ten seconds, the longest first."""


def longest_first(tests: Sequence[Test], files: Sequence[str], processes: int) -> list[Test]:
    """The tests (``files``: of which file each is) with the long ones at the beginning of each process's run.

    Each run keeps its tests otherwise, and so its server.
    """
    rank = {name: number for number, name in enumerate(LONG)}
    ranks = [rank.get(name, len(LONG)) for name in files]
    found, begin = [], 0
    for left in range(processes, 0, -1):
        end = begin + (len(tests) - begin) // left
        found += sorted(range(begin, end), key=ranks.__getitem__)
        begin = end
    return [tests[number] for number in found]
