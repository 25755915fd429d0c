"""Charts as inline SVG: no script, no font and nothing else from a network."""

from __future__ import annotations

from decimal import Decimal
from html import escape
from typing import Final

from walletmigrate.documents import Chart

_WIDTH: Final = 900
_HEIGHT: Final = 260
_LEFT: Final = 90
_BAR: Final = 22
_LABEL: Final = 220
# Apart also in grey and for the colour-blind (Okabe and Ito).
COLOURS: Final = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#999999")


def svg(chart: Chart) -> str:
    """A chart as one SVG element; an empty one says that there is nothing to show."""
    if not chart.places or not chart.series:
        return '<p class="none">Nothing to show.</p>'
    return _areas(chart) if chart.kind == "areas" else _bars(chart)


def _areas(chart: Chart) -> str:
    """Values stacked over time; a single place is drawn as a step of the whole width."""
    places = chart.places if len(chart.places) > 1 else chart.places * 2
    values = [one.values if len(one.values) > 1 else one.values * 2 for one in chart.series]
    top = max(1, *(sum(one[at] for one in values) for at in range(len(places))))
    step = (_WIDTH - _LEFT - 20) / (len(places) - 1)
    floor: list[Decimal] = [Decimal(0)] * len(places)
    parts = []
    for number, (series, row) in enumerate(zip(chart.series, values, strict=True)):
        ceiling = [low + Decimal(value) for low, value in zip(floor, row, strict=True)]
        line = [f"{_LEFT + at * step:.1f},{_y(value, top)}" for at, value in enumerate(ceiling)]
        back = [f"{_LEFT + at * step:.1f},{_y(value, top)}" for at, value in reversed(list(enumerate(floor)))]
        colour = COLOURS[number % len(COLOURS)]
        told = f"{series.name}: {series.values[-1]}"
        parts.append(
            f'<polygon fill="{colour}" points="{" ".join(line + back)}"><title>{escape(told)}</title></polygon>'
        )
        floor = ceiling
    for share in (0, Decimal("0.5"), 1):
        at = _y(top * share, top)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - 20}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{at}" text-anchor="end" dy="4">{_plain(top * share)}</text>')
    parts.append(f'<text x="{_LEFT}" y="{_HEIGHT + 18}">{escape(chart.places[0])}</text>')
    if len(chart.places) > 1:
        parts.append(f'<text x="{_WIDTH - 20}" y="{_HEIGHT + 18}" text-anchor="end">{escape(chart.places[-1])}</text>')
    return _framed(chart, _HEIGHT + 30, parts) + _legend(chart)


def _bars(chart: Chart) -> str:
    """One bar for each place, to the right for more than nothing and to the left for less."""
    values = [Decimal(value) for value in chart.series[0].values]
    most = max([Decimal(1), *(abs(value) for value in values)])
    middle = _LABEL + (_WIDTH - _LABEL - 140) / 2
    span = Decimal((_WIDTH - _LABEL - 140) / 2)
    parts = []
    for number, (place, value) in enumerate(zip(chart.places, values, strict=True)):
        length = float(abs(value) / most * span)
        start = middle if value >= 0 else middle - length
        at = number * _BAR
        colour = COLOURS[3] if value else COLOURS[2]
        said = f"{place[:30]}…" if len(place) > 31 else place
        parts.append(
            f"<g><title>{escape(place)}: {value:f}</title>"
            f'<text x="{_LABEL - 8}" y="{at + 15}" text-anchor="end">{escape(said)}</text>'
            f'<rect x="{start:.1f}" y="{at + 4}" width="{max(length, 1):.1f}" height="{_BAR - 8}" fill="{colour}"/>'
            f'<text x="{_WIDTH - 8}" y="{at + 15}" text-anchor="end">{value:f}</text></g>'
        )
    height = len(values) * _BAR + 6
    parts.append(f'<line class="grid" x1="{middle}" x2="{middle}" y1="0" y2="{height}"/>')
    return _framed(chart, height, parts)


def _y(value: Decimal | int, top: Decimal | int) -> str:
    return f"{_HEIGHT - float(Decimal(value) / Decimal(top)) * (_HEIGHT - 20):.1f}"


def _plain(value: Decimal | int) -> str:
    return f"{Decimal(value).normalize():f}"


def _framed(chart: Chart, height: int, parts: list[str]) -> str:
    title = escape(chart.title)
    head = f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{title}">'
    return head + "".join(parts) + "</svg>"


def _legend(chart: Chart) -> str:
    named = [(COLOURS[number % len(COLOURS)], one) for number, one in enumerate(chart.series)]
    keys = (
        f'<li><span style="background:{colour}"></span>{escape(one.name)}: {one.values[-1]}</li>'
        for colour, one in named
    )
    return f'<ul class="legend">{"".join(keys)}</ul>'
