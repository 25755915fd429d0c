"""Whether the runbook of a finding tells of it: it shows the words of the finding, with ``…`` for what differs."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from walletmigrate.doctor import Finding

ROOT = Path(__file__).parents[1]
LETTERS = 7
"""A text with fewer letters of its own would tell of everything."""


def assert_told(found: Iterable[Finding]) -> None:
    """Each finding names a runbook that is there, and shows what was found."""
    for one in found:
        assert one.runbook.startswith("runbooks/"), one
        assert any(pattern.fullmatch(one.what) for pattern in _told(one.runbook)), one


@cache
def _told(runbook: str) -> tuple[re.Pattern[str], ...]:
    shown = re.findall(r"`([^`\n]+)`", (ROOT / runbook).read_text(encoding="utf-8"))
    wide = [text for text in shown if sum(letter.isalpha() for letter in text) >= LETTERS]
    return tuple(re.compile(".+".join(map(re.escape, text.split("…"))), re.DOTALL) for text in wide)
