"""What a verification found, one finding each, as its record keeps them: to be read again, and reported row by row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Final

KEPT: Final = 100
"""How many findings of each kind the log keeps."""
KINDS: Final = ("drift", "passing", "behind", "journal", "unresolved", "cross_check_differences")
FOUND: Final = "found"
"""Under which name a record says how many there were of each kind."""

_AMOUNTS: Final = ("legacy", "ledger", "expected")


@dataclass(frozen=True)
class Finding:
    """One of them, amounts in major units, None where there is none.

    ``key`` is the account's, its id where it has no key, or the row that points at ``target``. ``expected`` is what a
    cross-check or the journal comes to. Of records of before there is only ``problem``, which is then a sentence.
    """

    kind: str
    key: str | None
    problem: str
    bucket: str | None = None
    currency: str | None = None
    legacy: Decimal | None = None
    ledger: Decimal | None = None
    expected: Decimal | None = None
    state: str | None = None
    target: str | None = None

    @property
    def words(self) -> str:
        """It as one sentence."""
        if self.key is None:
            return self.problem
        if self.kind in ("drift", "passing"):
            sides = f"legacy {self.legacy}, ledger {self.ledger}, {self.state}, {self.problem}"
            return f"{self.key} ({self.bucket}, {self.currency}): {sides}"
        if self.kind == "behind":
            return f"{self.key} ({self.bucket}): {self.problem}"
        if self.kind == "journal":
            return f"account {self.key}: {self.problem}"
        if self.kind == "unresolved":
            return f"{self.problem}: {self.key} → {self.target}"
        return f"{self.problem}: {self.key}: expected {self.expected}, found {self.ledger}"

    def row(self) -> dict[str, str]:
        """It as it stands on record, amounts as text."""
        return {name: str(value) for name, value in vars(self).items() if value is not None and name != "kind"}


def on_record(found: list[Finding], counts: Mapping[str, int]) -> dict[str, Any]:
    """The first of each kind, and where it has any, how many there were (``counts``)."""
    rows = {kind: [one.row() for one in found if one.kind == kind] for kind in KINDS}
    there = {kind: max(counts[kind], len(rows[kind])) for kind in KINDS if rows[kind]}
    return {**{kind: rows[kind][:KEPT] for kind in there}, **({FOUND: there} if there else {})}


def of_record(details: Mapping[str, Any]) -> list[Finding]:
    """All that a record kept."""
    return [_read(kind, one) for kind in KINDS for one in details.get(kind, [])]


def in_words(details: Mapping[str, Any]) -> dict[str, Any]:
    """A record's details with its findings as sentences."""
    return {
        name: [_read(name, one).words for one in value] if name in KINDS else value for name, value in details.items()
    }


def left_out(details: Mapping[str, Any]) -> dict[str, str]:
    """Of which kinds there were more than stand on record, in words."""
    said = {}
    for kind in KINDS:
        kept = len(details.get(kind, []))
        there = details.get(FOUND, {}).get(kind)
        if there is None and kept == KEPT:
            said[kind] = f"the first {kept} are on record; how many there were is not"
        elif there is not None and there > kept:
            said[kind] = f"{kept} of {there} are on record"
    return said


def _read(kind: str, row: str | Mapping[str, str]) -> Finding:
    if isinstance(row, str):
        return Finding(kind, None, row)
    amounts = {name: Decimal(row[name]) for name in _AMOUNTS if name in row}
    return Finding(**{**row, **amounts, "kind": kind})  # type: ignore[arg-type] # by its own `row`
