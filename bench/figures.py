"""Measured figures, their targets, and the two ways they are shown: a table and a JSON document."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class Target:
    """A bound that the median is held against. One that is not ``binding`` is shown for information only."""

    bound: float
    side: Literal["at_most", "at_least"]
    binding: bool = True

    def met(self, value: float) -> bool:
        """Whether the value is within the bound."""
        return value <= self.bound if self.side == "at_most" else value >= self.bound


def at_most(bound: float, *, binding: bool = True) -> Target:
    """A cost: the less the better."""
    return Target(bound, "at_most", binding)


def at_least(bound: float, *, binding: bool = True) -> Target:
    """A yield: the more the better."""
    return Target(bound, "at_least", binding)


@dataclass(frozen=True, slots=True)
class Figure:
    """One thing measured: a sample per round, in ``unit``. ``note`` holds the absolute values behind it."""

    name: str
    what: str
    samples: tuple[float, ...]
    unit: str
    target: Target | None = None
    note: str = ""

    @property
    def median(self) -> float:
        """The middle sample."""
        return median(self.samples)

    @property
    def verdict(self) -> str:
        """``met`` or ``missed``; a dash where nothing binds."""
        if self.target is None or not self.target.binding:
            return "–"
        return "met" if self.target.met(self.median) else "missed"


def ratio_note(subject: Sequence[float], base: Sequence[float], unit: str) -> str:
    """The two medians behind a ratio, such as ``520 against 400 µs a call``."""
    return f"{median(subject):,.0f} against {median(base):,.0f} {unit}"


def table(figures: Sequence[Figure]) -> str:
    """The figures as aligned text."""
    rows = [("what", "measured", "min – max", "target", "", "medians behind it")]
    rows += [
        (
            figure.what,
            f"{_number(figure.median, figure.unit)} {figure.unit}",
            f"{_number(min(figure.samples), figure.unit)} – {_number(max(figure.samples), figure.unit)}",
            _target_text(figure),
            figure.verdict,
            figure.note,
        )
        for figure in figures
    ]
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "─" * max(map(len, lines)), *lines[1:]])


def write_json(path: Path, figures: Sequence[Figure], setup: dict[str, Any]) -> None:
    """One document with everything the table says, and every sample."""
    document = {
        "schema_version": SCHEMA_VERSION,
        "setup": setup,
        "figures": [_document(figure) for figure in figures],
    }
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _document(figure: Figure) -> dict[str, Any]:
    target = figure.target
    return {
        "name": figure.name,
        "what": figure.what,
        "unit": figure.unit,
        "median": figure.median,
        "min": min(figure.samples),
        "max": max(figure.samples),
        "target": None if target is None else {target.side: target.bound, "binding": target.binding},
        "met": None if target is None else target.met(figure.median),
        "note": figure.note,
        "samples": list(figure.samples),
    }


def _number(value: float, unit: str) -> str:
    return f"{value:.3f}" if unit.startswith("×") else f"{value:,.1f}"


def _target_text(figure: Figure) -> str:
    if figure.target is None:
        return "–"
    sign = "≤" if figure.target.side == "at_most" else "≥"
    text = f"{sign} {figure.target.bound:g}"
    return text if figure.target.binding else f"({text})"
