"""The order of tests where several processes share them."""

from __future__ import annotations

from pathlib import Path

import pytest

from order import LONG, longest_first


def test_each_process_begins_with_the_longest_of_its_own_and_keeps_the_order_of_the_rest() -> None:
    files = ["test_a", LONG[2], "test_b", LONG[0], "test_a", "test_c", LONG[2], "test_d", LONG[1]]
    tests = list(range(len(files)))
    assert longest_first(tests, files, 2) == [3, 1, 0, 2, 8, 6, 4, 5, 7]
    assert longest_first(tests, files, 1) == [3, 8, 1, 6, 0, 2, 4, 5, 7]


@pytest.mark.parametrize("processes", [1, 2, 3, 7, 20])
def test_no_test_is_lost_and_none_comes_twice(processes: int) -> None:
    files = [LONG[number % 5] if number % 3 else "test_a" for number in range(13)]
    assert sorted(longest_first(range(13), files, processes)) == list(range(13))


def test_every_file_that_takes_long_is_there() -> None:
    assert [name for name in LONG if not Path(__file__).with_name(f"{name}.py").is_file()] == []
