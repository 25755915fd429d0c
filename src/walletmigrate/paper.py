"""A report as a PDF: landscape A4, the heads on each page, long cells on several lines. Needs reportlab."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from walletmigrate.documents import Document, Heading, Table, shown
from walletmigrate.errors import ExportRefused, ExtraMissing

if TYPE_CHECKING:
    from reportlab.pdfgen.canvas import Canvas

MAX_ROWS: Final = 50_000
"""Rows of a PDF: its pages are held until the last one is known."""

_PAGE: Final = (841.89, 595.28)
_MARGIN: Final = 36.0
_SIZE: Final = 7.5
_LEAD: Final = 9.5
_PAD: Final = 3.0
_SAMPLE: Final = 200
_WORD: Final = 60.0
"""A word of free text that is wider may be broken, in points."""
_FACES: Final = (
    ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf"),  # the system's, where it has them: many more letters
    ("Vera.ttf", "VeraBd.ttf"),  # reportlab's own
)


def write(document: Document, path: Path) -> None:
    """Write the file. Raises ExtraMissing, and ExportRefused for more than 50,000 rows."""
    try:
        from reportlab.pdfgen.canvas import Canvas
    except ImportError:
        raise ExtraMissing("a PDF file", "reportlab", "reports") from None
    canvas = Canvas(str(path), pagesize=_PAGE, pageCompression=1)
    canvas.setTitle(document.title)
    canvas.setCreator("walletmigrate")
    sheet = _Paper(canvas, document.title)
    sheet.facts(document.facts)
    for table in document.tables:
        sheet.table(table)
    sheet.end()
    canvas.save()


class _Paper:
    """Pages that fill from the top; knows where on the page it stands."""

    def __init__(self, canvas: Canvas, title: str) -> None:
        self._canvas, self._title = canvas, title
        self._plain, self._bold = _fonts()
        self._widths: dict[tuple[str, str], float] = {}
        self._page = 0
        self._rows = 0
        self._y = 0.0
        self._turn()

    def facts(self, facts: Sequence[tuple[str, str]]) -> None:
        """Names on the left, values beside them."""
        for name, value in facts:
            lines = self._broken(value, self._plain, _PAGE[0] - 2 * _MARGIN - 160)
            for number, line in enumerate(lines):
                self._room(_LEAD)
                if not number:
                    self._write(_MARGIN, self._y, name, self._bold)
                self._write(_MARGIN + 160, self._y, line, self._plain)
                self._y -= _LEAD
        self._y -= _LEAD

    def table(self, table: Table) -> None:
        """The title, then heads and rows; the heads again on each page."""
        rows = iter(table.rows)
        sample = list(islice(rows, _SAMPLE))
        columns = self._columns(table.headings, sample)
        titles = [one.title + (" (UTC)" if one.kind == "time" else "") for one in table.headings]
        heads = self._row(titles, columns, self._bold)
        self._room(5 * _LEAD + self._height(heads))
        self._y -= _LEAD
        self._write(_MARGIN, self._y, table.title, self._bold, 10)
        self._y -= 1.2 * _LEAD
        self._draw(heads, columns, table.headings, self._bold)
        for row in chain(sample, rows):
            self._rows += 1
            if self._rows > MAX_ROWS:
                more = f"the report has more than {MAX_ROWS} rows, and a PDF that long is of no use"
                raise ExportRefused(self._title, more, "Write .csv or .xlsx, or ask for less")
            cells = [shown(cell, one) for cell, one in zip(row, table.headings, strict=True)]
            self._lay(self._row(cells, columns, self._plain), columns, table, heads)
        if not sample:
            self._write(_MARGIN, self._y, "Nothing to show.", self._plain)
            self._y -= _LEAD

    def end(self) -> None:
        """Finish the last page."""
        self._foot()
        self._canvas.showPage()

    def _lay(self, lines: list[list[str]], columns: list[float], table: Table, heads: list[list[str]]) -> None:
        """One row; it goes to the next page if it does not fit, and over several if it fits on none."""
        most = int((_PAGE[1] - 2 * _MARGIN - 4 * _LEAD - self._height(heads)) / _LEAD)
        length = max(len(cell) for cell in lines)
        for start in range(0, length, most):
            part = [cell[start : start + most] for cell in lines]
            if self._y - self._height(part) < _MARGIN + _LEAD:
                self._turn()
                self._write(_MARGIN, self._y, f"{table.title} (continued)", self._plain)
                self._y -= 1.2 * _LEAD
                self._draw(heads, columns, table.headings, self._bold)
            self._draw(part, columns, table.headings, self._plain)

    def _draw(self, lines: list[list[str]], columns: list[float], headings: Sequence[Heading], font: str) -> None:
        height, x = self._height(lines), _MARGIN
        if font == self._bold:
            self._canvas.setFillGray(0.92)
            self._canvas.rect(_MARGIN, self._y - height + _LEAD - 2, sum(columns), height, stroke=0, fill=1)
            self._canvas.setFillGray(0)
        for cell, width, heading in zip(lines, columns, headings, strict=True):
            for number, line in enumerate(cell):
                right = heading.kind in ("amount", "count")
                start = x + width - _PAD - self._wide(line, font) if right else x + _PAD
                self._write(start, self._y - number * _LEAD, line, font)
            x += width
        self._canvas.setStrokeGray(0.8)
        self._canvas.line(_MARGIN, self._y - height + _LEAD - 2, _MARGIN + sum(columns), self._y - height + _LEAD - 2)
        self._y -= height

    def _columns(self, headings: Sequence[Heading], sample: list[Sequence[Any]]) -> list[float]:
        """Widths: what no word is broken with, and what is left of the page shared where more is wanted."""
        least, wanted = [], []
        for at, heading in enumerate(headings):
            cells = [shown(row[at], heading) for row in sample]
            words = [self._wide(word, self._plain) for cell in cells for word in cell.split(" ")]
            title = max(self._wide(word, self._bold) for word in (*heading.title.split(" "), "(UTC)"))
            longest = max(words, default=0)
            least.append(max(title, min(longest, _WORD) if heading.kind == "text" else longest) + 2 * _PAD + 1)
            wanted.append(max([least[-1], *(self._wide(cell, self._plain) + 2 * _PAD + 1 for cell in cells)]))
        room = _PAGE[0] - 2 * _MARGIN
        spare = room - sum(least)
        if spare < 0:  # too many columns for the page: words are broken, nothing is cut
            return [one * room / sum(least) for one in least]
        given: dict[int, float] = {}
        for at in sorted(range(len(wanted)), key=lambda one: wanted[one] - least[one]):
            share = (spare - sum(given.values())) / (len(wanted) - len(given))
            given[at] = min(wanted[at] - least[at], share)
        return [least[at] + given[at] for at in range(len(wanted))]

    def _row(self, cells: Sequence[str], columns: list[float], font: str) -> list[list[str]]:
        pairs = zip(cells, columns, strict=True)
        return [self._broken(cell, font, width - 2 * _PAD) for cell, width in pairs]

    def _broken(self, words: str, font: str, width: float) -> list[str]:
        """Text on as many lines as it takes: at spaces where it can, else anywhere."""
        lines = []
        for paragraph in words.splitlines() or [""]:
            line = ""
            for word in self._known(paragraph, font).split(" "):
                longer = f"{line} {word}" if line else word
                if self._wide(longer, font) <= width:
                    line = longer
                    continue
                if line:
                    lines.append(line)
                line = word
                while self._wide(line, font) > width and len(line) > 1:
                    fits = next((n for n in range(len(line) - 1, 1, -1) if self._wide(line[:n], font) <= width), 1)
                    lines.append(line[:fits])
                    line = line[fits:]
            lines.append(line)
        return lines

    def _known(self, words: str, font: str) -> str:
        """The text, with letters that the font does not have by their numbers: nothing turns into a blank box."""
        if words.isascii() and words.isprintable():
            return words
        from reportlab.pdfbase import pdfmetrics

        letters = getattr(getattr(pdfmetrics.getFont(font), "face", None), "charToGlyph", {})
        return "".join(one if ord(one) in letters and one.isprintable() else f"\\u{ord(one):04x}" for one in words)

    def _wide(self, words: str, font: str) -> float:
        found = self._widths.get((font, words))
        if found is None:
            from reportlab.pdfbase import pdfmetrics

            found = float(pdfmetrics.stringWidth(words, font, _SIZE))
            if len(self._widths) < 50_000:
                self._widths[font, words] = found
        return found

    def _height(self, lines: list[list[str]]) -> float:
        return max(len(cell) for cell in lines) * _LEAD + 3

    def _write(self, x: float, y: float, words: str, font: str, size: float = _SIZE) -> None:
        self._canvas.setFont(font, size)
        self._canvas.drawString(x, y, self._known(words, font))

    def _room(self, height: float) -> None:
        if self._y - height < _MARGIN + _LEAD:
            self._turn()

    def _turn(self) -> None:
        if self._page:
            self._foot()
            self._canvas.showPage()
        self._page += 1
        self._y = _PAGE[1] - _MARGIN - 6
        size = 12 if self._page == 1 else 9
        self._write(_MARGIN, self._y, self._title, self._bold, size)
        self._y -= 2 * _LEAD

    def _foot(self) -> None:
        self._write(_PAGE[0] - _MARGIN - 40, _MARGIN - 14, f"Page {self._page}", self._plain)


def _fonts() -> tuple[str, str]:
    """The first pair of faces that is there, embedded into the file: plain and bold."""
    from reportlab.pdfbase import pdfmetrics
    from reportlab.pdfbase.ttfonts import TTFError, TTFont

    for faces in _FACES:
        try:
            for face in faces:
                pdfmetrics.registerFont(TTFont(face.removesuffix(".ttf"), face))
        except TTFError:
            continue
        return faces[0].removesuffix(".ttf"), faces[1].removesuffix(".ttf")
    return "Helvetica", "Helvetica-Bold"
