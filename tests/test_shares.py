"""Shares of the torture: disjoint, together everything, and one of so many as before."""

from __future__ import annotations

import pytest

from shares import Share
from torture_stories import STORIES


def test_the_shares_are_disjoint_and_together_all_orders() -> None:
    everything = [str(order) for order in STORIES["a_old_snapshots"]()]
    parts = [list(Share.named(f"{number}/40").choose(everything)) for number in range(1, 41)]
    assert sorted(order for part in parts for order in part) == sorted(everything)
    assert len(set(everything)) == len(everything)
    assert list(Share.named("10").choose(everything)) == everything[::10]
    assert list(Share.named("1").choose(everything)) == everything


@pytest.mark.parametrize("name", ["0", "0/3", "4/3", "3/", "-1", "a"])
def test_what_is_no_share_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="is no share"):
        Share.named(name)
