"""The test of findings is one: a runbook that does not tell of a finding is found out."""

from __future__ import annotations

import pytest

from findings import assert_told
from walletmigrate.doctor import Finding


@pytest.mark.parametrize(
    ("what", "runbook", "told"),
    [
        ("the line is stopped: accounts turn stale at their next write", "runbooks/line-stopped.md", True),
        ("shop lacks select on public.users", "runbooks/rights.md", True),
        ("the moon is full", "runbooks/line-stopped.md", False),
        ("the line is stopped: accounts turn stale at their next write", "runbooks/rights.md", False),
        ("the line is stopped: accounts turn stale at their next write", "docs/roles.md", False),
    ],
)
def test_a_finding_is_told_by_the_runbook_that_shows_its_words(what: str, runbook: str, told: bool) -> None:
    finding = Finding(what, "mend it", runbook)
    if told:
        assert_told([finding])
    else:
        with pytest.raises(AssertionError):
            assert_told([finding])
