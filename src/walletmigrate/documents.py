"""What a report is, before it becomes a file: facts, tables whose rows may be streamed, and charts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, Final, Literal

_FORMULA: Final = ("=", "+", "-", "@", "＝", "＋", "－", "＠", "|", "%")
_CONTROL: Final = ("\t", "\r", "\n")


@dataclass(frozen=True)
class Heading:
    """A column: its title, and what its cells hold. Amounts have ``scale`` decimals; None: as they come."""

    title: str
    kind: Literal["text", "amount", "count", "time"] = "text"
    scale: int | None = None


@dataclass(frozen=True)
class Table:
    """Rows under headings. ``rows`` may be an iterator: each writer reads it once, and keeps none of it."""

    title: str
    headings: tuple[Heading, ...]
    rows: Iterable[Sequence[Any]]


@dataclass(frozen=True)
class Series:
    """One line or one part of the bars of a chart: its name, and a value for each of the chart's places."""

    name: str
    values: tuple[Decimal | int, ...]


@dataclass(frozen=True)
class Chart:
    """Values by place: areas over time, stacked, or one bar for each place (``bars``)."""

    title: str
    places: tuple[str, ...]
    series: tuple[Series, ...]
    kind: Literal["areas", "bars"]


@dataclass(frozen=True)
class Document:
    """A report. ``facts`` are (name, value), shown above the tables; charts stand in HTML only."""

    title: str
    facts: tuple[tuple[str, str], ...] = ()
    tables: tuple[Table, ...] = ()
    charts: tuple[Chart, ...] = field(default=())


def shown(value: Any, heading: Heading) -> str:
    """A cell as text: amounts exact and with all their decimals, times in ISO 8601 and UTC, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Decimal):
        return f"{value:.{heading.scale}f}" if _fits(value, heading.scale) else f"{value:f}"
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat(sep=" ", timespec="microseconds").removesuffix("+00:00") + "Z"
    return str(value)


def harmless(words: str) -> str:
    """Text that no spreadsheet takes for a formula: an apostrophe before what begins like one."""
    start = words.lstrip(" \u00a0\ufeff")
    return f"'{words}" if start.startswith(_FORMULA) or words.startswith(_CONTROL) else words


def _fits(value: Decimal, scale: int | None) -> bool:
    """Whether that many decimals show the whole amount: nothing is ever rounded away."""
    exponent = value.normalize().as_tuple().exponent
    return scale is not None and isinstance(exponent, int) and -exponent <= scale
