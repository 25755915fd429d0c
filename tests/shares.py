"""Shares of what is too much for one run: `make torture SHARE=3/40` takes the third of forty, together they are all."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import pytest

T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """Number ``number``, from 1 on, of ``of`` disjoint shares."""

    number: int
    of: int

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    @classmethod
    def named(cls, name: str) -> Share:
        """The share of this name: "3/40", or "40" for the first of forty. Raises ValueError."""
        found = re.fullmatch(r"(?:([0-9]+)/)?([0-9]+)", name)
        number, of = (int(found[1] or 1), int(found[2])) if found else (0, 0)
        if not 1 <= number <= of:
            raise ValueError(f"{name!r} is no share: give 10 for the first of ten, or 3/40 for the third of forty")
        return cls(number, of)

    def choose(self, things: Iterable[T]) -> Iterator[T]:
        """One of so many, always the same ones; a prime ``of`` meets every kind of thing that comes in turns."""
        return islice(things, self.number - 1, None, self.of)


def asked(config: pytest.Config) -> Share | None:
    """The share that ``--torture`` names; None without it. Raises a usage error."""
    name: str | None = config.getoption("--torture")
    try:
        return None if name is None else Share.named(name)
    except ValueError as error:
        raise pytest.UsageError(f"--torture: {error}") from None
