"""A report as an XLSX file, row by row in constant memory. Needs XlsxWriter (extra ``reports``)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from walletmigrate.documents import Document, Heading, Table, shown
from walletmigrate.errors import ExtraMissing

if TYPE_CHECKING:
    from xlsxwriter import Workbook
    from xlsxwriter.worksheet import Worksheet

MAX_ROWS: Final = 1_000_000
"""Rows of a sheet (the format has 1,048,576); a longer table goes on in the next one."""

_DIGITS: Final = 15
_CELL: Final = 32_000
_SAMPLE: Final = 200
_WIDEST: Final = 60


def write(document: Document, path: Path) -> None:
    """Write the workbook: the facts, then a sheet or more for each table. Raises ExtraMissing.

    Text is written as text, whatever it begins with. An amount of more than 15 digits, which a spreadsheet would
    round, is written as text too.
    """
    try:
        import xlsxwriter
    except ImportError:
        raise ExtraMissing("an XLSX file", "XlsxWriter", "reports") from None
    options = {"constant_memory": True, "strings_to_formulas": False, "strings_to_urls": False}
    with xlsxwriter.Workbook(str(path), {**options, "strings_to_numbers": False}) as book:
        book.set_properties({"title": document.title, "comments": "Made by walletmigrate"})
        sheets = _Sheets(book, document.title)
        if document.facts:
            sheets.write(Table("Summary", (Heading("what"), Heading("value")), document.facts))
        for table in document.tables:
            sheets.write(table)


class _Sheets:
    """The sheets of a workbook, and the formats that they share."""

    def __init__(self, book: Workbook, title: str) -> None:
        self._book = book
        self._title = title
        self._names: set[str] = set()
        self._bold = book.add_format({"bold": True, "font_size": 14})
        self._head = book.add_format({"bold": True, "bg_color": "#eeeeee", "bottom": 1, "text_wrap": True})
        self._text = book.add_format({"text_wrap": True, "valign": "top", "num_format": "@"})
        self._time = book.add_format({"num_format": "yyyy-mm-dd hh:mm:ss.000", "valign": "top", "align": "left"})
        self._count = book.add_format({"num_format": "#,##0", "valign": "top"})
        self._amounts: dict[int, Any] = {}

    def write(self, table: Table) -> None:
        """Write a table, with its title and its heads on each sheet and each printed page."""
        rows = iter(table.rows)
        sample = list(islice(rows, _SAMPLE))
        widths = [_width(heading, at, sample) for at, heading in enumerate(table.headings)]
        left: Iterator[Sequence[Any]] = chain(sample, rows)
        first = next(left, None)
        number = 1
        while first is not None or number == 1:
            sheet = self._begin(table, number, widths)
            at = 3
            while first is not None and at < MAX_ROWS + 3:
                for column, (cell, heading) in enumerate(zip(first, table.headings, strict=True)):
                    self._cell(sheet, at, column, cell, heading)
                at += 1
                first = next(left, None)
            sheet.autofilter(2, 0, max(at - 1, 3), len(table.headings) - 1)
            number += 1

    def _begin(self, table: Table, number: int, widths: list[int]) -> Worksheet:
        sheet = self._book.add_worksheet(self._name(table.title, number))
        for column, width in enumerate(widths):
            sheet.set_column(column, column, width)
        sheet.write_string(0, 0, self._title, self._bold)
        sheet.write_string(1, 0, table.title + (f" (part {number})" if number > 1 else ""))
        for column, heading in enumerate(table.headings):
            sheet.write_string(2, column, heading.title + (" (UTC)" if heading.kind == "time" else ""), self._head)
        sheet.freeze_panes(3, 0)
        sheet.repeat_rows(2)
        sheet.set_landscape()
        sheet.set_paper(9)
        sheet.fit_to_pages(1, 0)
        sheet.set_footer("&L&F&RPage &P of &N")
        return sheet

    def _cell(self, sheet: Worksheet, row: int, column: int, cell: Any, heading: Heading) -> None:
        if cell is None:
            return
        if isinstance(cell, datetime):
            sheet.write_datetime(row, column, cell.astimezone(UTC).replace(tzinfo=None), self._time)
        elif isinstance(cell, int) and not isinstance(cell, bool) and len(str(abs(cell))) <= _DIGITS:
            sheet.write_number(row, column, cell, self._count if heading.kind == "count" else None)
        elif isinstance(cell, Decimal) and len(shown(cell, heading).lstrip("-").replace(".", "")) <= _DIGITS:
            decimals = shown(cell, heading).partition(".")[2]
            sheet.write_number(row, column, float(cell), self._amount(len(decimals)))
        else:
            words = shown(cell, heading)
            kept = words if len(words) <= _CELL else f"{words[:_CELL]} … and {len(words) - _CELL} characters more"
            sheet.write_string(row, column, kept, self._text)

    def _amount(self, decimals: int) -> Any:
        if decimals not in self._amounts:
            form = "#,##0" + ("." + "0" * decimals if decimals else "")
            self._amounts[decimals] = self._book.add_format({"num_format": form, "valign": "top"})
        return self._amounts[decimals]

    def _name(self, title: str, number: int) -> str:
        """A sheet's name: at most 31 characters, some of them not allowed, none twice."""
        plain = "".join("-" if one in "[]:*?/\\'" else one for one in title)[:24].strip() or "Sheet"
        name, again = (plain if number == 1 else f"{plain} {number}"), 1
        while name.casefold() in self._names:
            again += 1
            name = f"{plain} ({again})"
        self._names.add(name.casefold())
        return name


def _width(heading: Heading, column: int, sample: list[Sequence[Any]]) -> int:
    if heading.kind == "time":
        return 24
    cells = (len(shown(row[column], heading)) * (1.25 if heading.kind == "amount" else 1) for row in sample)
    return int(min(_WIDEST, max([len(heading.title) + 3, 9, *cells]) + 2))
