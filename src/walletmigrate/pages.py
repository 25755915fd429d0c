"""A report as one HTML page that needs no network: its style and its charts are in it, and no script."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from itertools import islice
from pathlib import Path
from typing import Final

from walletmigrate.charts import svg
from walletmigrate.documents import Document, Table, shown

MAX_ROWS: Final = 5000
"""Rows of one table that a page shows; it says so where there are more."""

_STYLE: Final = """
body{font:14px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:1100px;padding:0 1rem;color:#1a1a1a;background:#fff}
h1{font-size:1.6rem}
h2{font-size:1.15rem;margin-top:2rem}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.2rem 1rem}
dt{color:#555}
dd{margin:0;overflow-wrap:anywhere}
table{border-collapse:collapse;width:100%}
th,td{padding:.25rem .5rem;text-align:left;border-bottom:1px solid #ddd;vertical-align:top;overflow-wrap:anywhere}
thead th{position:sticky;top:0;background:#f3f3f3}
.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
svg{width:100%;height:auto}
svg text{font-size:12px;fill:#333}
.grid{stroke:#bbb;stroke-width:1}
.legend{list-style:none;padding:0;display:flex;flex-wrap:wrap;gap:1rem}
.legend span{display:inline-block;width:.8em;height:.8em;margin-right:.4em}
.none,.more{color:#555}
@media print{thead{display:table-header-group}thead th{position:static}}
"""


def write(document: Document, path: Path) -> None:
    """Write the page, row by row."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(_parts(document))


def _parts(document: Document) -> Iterator[str]:
    title = escape(document.title)
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    yield '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
    yield f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<title>{title}</title><style>{_STYLE}</style></head>\n<body><h1>{title}</h1>\n<dl>"
    for name, value in document.facts:
        yield f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>"
    yield "</dl>\n"
    for chart in document.charts:
        yield f"<section><h2>{escape(chart.title)}</h2>{svg(chart)}</section>\n"
    for table in document.tables:
        yield from _table(table)
    yield "</body></html>\n"


def _table(table: Table) -> Iterator[str]:
    numbers = [one.kind in ("amount", "count") for one in table.headings]
    marks = [' class="n"' if number else "" for number in numbers]
    yield f"<section><h2>{escape(table.title)}</h2><table><thead><tr>"
    for heading, mark in zip(table.headings, marks, strict=True):
        yield f"<th{mark}>{escape(heading.title)}</th>"
    yield "</tr></thead><tbody>\n"
    rows = iter(table.rows)
    count = 0
    for row in islice(rows, MAX_ROWS):
        count += 1
        cells = zip(row, table.headings, marks, strict=True)
        yield "<tr>" + "".join(f"<td{mark}>{escape(shown(cell, one))}</td>" for cell, one, mark in cells) + "</tr>\n"
    yield "</tbody></table>"
    if not count:
        yield '<p class="none">Nothing to show.</p>'
    elif next(rows, None) is not None:
        yield f'<p class="more">The first {MAX_ROWS} rows; a .csv or .xlsx of the same report has all.</p>'
    yield "</section>\n"
