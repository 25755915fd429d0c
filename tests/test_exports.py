"""Files of reports: what is in them by parsing them, harmless text, constant memory, and what is refused."""

from __future__ import annotations

import base64
import csv
import re
import sys
import tracemalloc
import zipfile
import zlib
from collections.abc import Iterator
from datetime import UTC, datetime
from decimal import Decimal
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from walletmigrate import pages, paper, spreadsheets
from walletmigrate.charts import svg
from walletmigrate.documents import Chart, Document, Heading, Series, Table, harmless, shown
from walletmigrate.errors import ExportRefused, ExtraMissing
from walletmigrate.exports import WRITERS, export

D = Decimal
WHEN = datetime(2026, 11, 21, 8, 30, 15, 123456, tzinfo=UTC)
HEADINGS = (Heading("id", "count"), Heading("at", "time"), Heading("amount", "amount", 2), Heading("reason"))
NAMESPACE = {"x": "http://schemas.openxmlformats.org/spreadsheetml/2006/main"}
FORMULAS = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", " =1", "＝1", "=cmd|' /C calc'!A0", '=HYPERLINK("x")']


def document(*rows: tuple[Any, ...]) -> Document:
    return Document("A title", (("Verdict", "=clean"),), (Table("Entries", HEADINGS, iter(rows)),))


def written(folder: Path, kind: str, made: Document) -> Path:
    path = folder / f"report.{kind}"
    export(made, path)
    return path


def sheet(path: Path, number: int = 2) -> list[dict[str, Any]]:
    """The rows of a sheet: cells by column letter, as numbers or as text."""
    with zipfile.ZipFile(path) as archive:
        strings = []
        if "xl/sharedStrings.xml" in archive.namelist():
            root = ElementTree.fromstring(archive.read("xl/sharedStrings.xml"))
            strings = ["".join(part.text or "" for part in one.iter() if part.text) for one in root]
        root = ElementTree.fromstring(archive.read(f"xl/worksheets/sheet{number}.xml"))
    assert root.findall(".//x:f", NAMESPACE) == [], "a formula"
    found = []
    for row in root.iterfind(".//x:row", NAMESPACE):
        cells: dict[str, Any] = {}
        for cell in row:
            letter = re.sub(r"\d", "", cell.get("r", ""))
            value = cell.findtext("x:v", namespaces=NAMESPACE)
            inline = "".join(part.text or "" for part in cell.iterfind(".//x:t", NAMESPACE))
            kind = cell.get("t")
            cells[letter] = (
                strings[int(value or 0)] if kind == "s" else inline if kind == "inlineStr" else D(value or 0)
            )
        found.append(cells)
    return found


def drawn(path: Path) -> list[list[str]]:
    """What each page of a PDF writes, in order: reportlab leaves ASCII letters of a face as they are."""
    texts = []
    for stream in re.findall(rb"stream\r?\n(.*?)endstream", path.read_bytes(), re.DOTALL):
        try:
            page = zlib.decompress(
                base64.a85decode(stream.strip(), adobe=False)
                if stream.strip()[-2:] != b"~>"
                else base64.a85decode(b"<~" + stream.strip(), adobe=True)
            )
        except (ValueError, zlib.error):
            continue
        found = re.findall(rb"\(((?:[^()\\]|\\.)*)\) Tj", page)
        if found:
            texts.append([re.sub(r"\\([()\\])", r"\1", one.decode("latin-1")) for one in found])
    return texts


# CSV


def test_csv_has_exact_amounts_and_times_in_utc(tmp_path: Path) -> None:
    rows = [
        (1, WHEN, D("-12.5"), "a"),
        (2, WHEN, D("123456789012345678901234567890.12"), None),
        (3, WHEN, D("0.001"), ""),
    ]
    path = tmp_path / "one.csv"
    export(Document("t", tables=(Table("Entries", HEADINGS, iter(rows)),)), path)
    with path.open(newline="", encoding="utf-8") as file:
        assert list(csv.reader(file)) == [
            ["id", "at", "amount", "reason"],
            ["1", "2026-11-21 08:30:15.123456Z", "-12.50", "a"],
            ["2", "2026-11-21 08:30:15.123456Z", "123456789012345678901234567890.12", ""],
            ["3", "2026-11-21 08:30:15.123456Z", "0.001", ""],
        ]


def test_csv_of_a_report_has_its_facts_and_a_title_above_each_table(tmp_path: Path) -> None:
    path = written(tmp_path, "csv", document((1, WHEN, D(1), "a")))
    with path.open(newline="", encoding="utf-8") as file:
        assert [row[:1] for row in csv.reader(file)] == [["Verdict"], [], ["Entries"], ["id"], ["1"]]


@pytest.mark.parametrize("words", FORMULAS)
def test_free_text_is_no_formula_in_a_csv_or_a_workbook(tmp_path: Path, words: str) -> None:
    with written(tmp_path, "csv", document((1, WHEN, D(1), words))).open(newline="", encoding="utf-8") as file:
        assert list(csv.reader(file))[-1][-1] == f"'{words}"
    cell = sheet(written(tmp_path, "xlsx", document((1, WHEN, D(1), words))))[-1]["D"]
    assert cell.replace("_x000D_", "\r") == words


@pytest.mark.parametrize("words", ["", "plain", "a=b", "1-2", "'quoted", "deposit"])
def test_plain_text_stays_as_it_is(words: str) -> None:
    assert harmless(words) == words


# XLSX


def test_a_workbook_has_numbers_with_their_decimals_and_times_as_times(tmp_path: Path) -> None:
    big = D("12345678901234567890.12")
    path = written(tmp_path, "xlsx", document((7, WHEN, D("-1234.50"), "x" * 40_000), (8, None, big, None)))
    assert [row["A"] for row in sheet(path, 1)][:2] == ["A title", "Summary"]
    rows = sheet(path)
    assert rows[2] == {"A": "id", "B": "at (UTC)", "C": "amount", "D": "reason"}
    assert (rows[3]["A"], rows[3]["C"]) == (7, D("-1234.5"))
    assert abs(rows[3]["B"] - D("46347.354341706667")) < D("0.0000001")
    assert rows[3]["D"].endswith("and 8000 characters more")
    assert (rows[4]["C"], "B" in rows[4]) == (str(big), False)
    with zipfile.ZipFile(path) as archive:
        styles, layout = archive.read("xl/styles.xml").decode(), archive.read("xl/worksheets/sheet2.xml").decode()
        book = archive.read("xl/workbook.xml").decode()
    assert 'formatCode="#,##0.00"' in styles
    assert "yyyy-mm-dd hh:mm:ss.000" in styles
    assert 'state="frozen"' in layout
    assert "_xlnm.Print_Titles" in book


def test_a_long_table_goes_on_in_another_sheet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spreadsheets, "MAX_ROWS", 3)
    path = written(tmp_path, "xlsx", document(*((number, WHEN, D(1), "a") for number in range(7))))
    assert [row["A"] for part in (2, 3, 4) for row in sheet(path, part)[3:]] == list(range(7))
    assert sheet(path, 4)[1:3] == [{"A": "Entries (part 3)"}, sheet(path, 2)[2]]


# PDF


def test_a_pdf_has_title_heads_and_number_on_each_page_and_all_of_every_cell(tmp_path: Path) -> None:
    long = " ".join(f"word{number}" for number in range(400)) + "x" * 500
    rows = [(number, WHEN, D(number), f"reason-{number}") for number in range(150)]
    path = written(tmp_path, "pdf", document(*rows, (999, WHEN, D("12345678901234567890.12"), long)))
    found = drawn(path)
    assert len(found) > 4
    for number, page in enumerate(found, 1):
        assert {"A title", "amount", "reason", f"Page {number}"} <= set(page)
    words = [word for page in found for word in page]
    assert [word for word in words if word.startswith("reason-")] == [f"reason-{number}" for number in range(150)]
    together = "".join(words).replace(" ", "")
    assert all(f"word{number}" in together for number in range(400))
    assert together.count("x") >= 500
    assert "12345678901234567890.12" in words
    sizes = re.findall(rb"/MediaBox \[ ([\d. ]+) \]", path.read_bytes())
    assert len(sizes) == len(found)


def test_letters_without_a_glyph_are_shown_by_their_numbers(tmp_path: Path) -> None:
    found = drawn(written(tmp_path, "pdf", document((1, WHEN, D(1), "日本 \x07"))))
    assert "\\u65e5\\u672c" in "".join(word for page in found for word in page)


def test_a_pdf_that_nobody_reads_is_refused_and_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paper, "MAX_ROWS", 5)
    with pytest.raises(ExportRefused, match=r"\.csv or \.xlsx"):
        written(tmp_path, "pdf", document(*((number, WHEN, D(1), "a") for number in range(6))))
    assert list(tmp_path.iterdir()) == []


# HTML


class _Reader(HTMLParser):
    """What a page has: tags with their attributes, and text."""

    def __init__(self, words: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(words)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


CHARTS = (
    Chart("States", ("2026-01-01", "2026-01-02"), (Series("in <step>", (1, 3)), Series("stale", (2, 0))), "areas"),
    Chart("One look", ("now",), (Series("in step", (D("5.50"),)),), "areas"),
    Chart("Drift", ("acme", "<b>globex"), (Series("drift", (D("-1.50"), D(0))),), "bars"),
    Chart("Nothing", (), (), "bars"),
)


def test_a_page_needs_no_network_and_runs_no_script(tmp_path: Path) -> None:
    made = Document(
        "T & <t>", (("a", "<script>alert(1)</script>"),), (Table("Rows", HEADINGS, [(1, WHEN, D(1), "<b>")]),)
    )
    path = written(tmp_path, "html", Document(made.title, made.facts, made.tables, CHARTS))
    words = path.read_text(encoding="utf-8")
    page = _Reader(words)
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "img", "iframe", "b", "object", "image", "use"}
    assert not re.search(r"https?://|//\w|url\(|@import", words)
    assert not {name for _, attributes in page.tags for name in attributes if name.startswith("on")}
    assert [tag for tag, _ in page.tags].count("svg") == 3
    assert "default-src 'none'" in words
    assert {"<script>alert(1)</script>", "<b>", "1.00", "T & <t>"} <= set(page.text)


def test_charts_are_drawn_to_scale() -> None:
    (states, one, drift, none) = map(svg, CHARTS)
    shapes = [
        [tuple(map(float, point.split(","))) for point in one.split()]
        for one in re.findall(r'points="([^"]+)"', states)
    ]
    heights = [
        [floor[1] - top[1] for top, floor in zip(shape[:2], reversed(shape[2:]), strict=True)] for shape in shapes
    ]
    assert heights == [[80.0, 240.0], [160.0, 0.0]]
    for text in (states, one, drift):
        ElementTree.fromstring(re.search(r"<svg.*</svg>", text, re.DOTALL)[0])  # type: ignore[index]
    widths = [float(width) for width in re.findall(r'<rect [^>]*width="([\d.]+)"', drift)]
    assert widths == [270.0, 1.0]
    assert "Nothing to show" in none


def test_a_page_says_that_it_does_not_show_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "MAX_ROWS", 2)
    words = written(tmp_path, "html", document(*((n, WHEN, D(1), f"r{n}") for n in range(3)))).read_text(
        encoding="utf-8"
    )
    assert ("r1" in words, "r2" in words, "The first 2 rows" in words) == (True, False, True)


# All


@pytest.mark.parametrize("kind", ["csv", "xlsx", "html"])
def test_a_long_table_is_written_in_constant_memory(tmp_path: Path, kind: str) -> None:
    def rows(count: int) -> Iterator[tuple[Any, ...]]:
        for number in range(count):
            yield number, WHEN, D(number), f"reason {number} " + "x" * 300

    written(tmp_path, kind, document(*rows(1)))
    (tmp_path / f"report.{kind}").unlink()
    tracemalloc.start()
    try:
        made = Document("t", tables=(Table("Entries", HEADINGS, rows(6000)),))
        written(tmp_path, kind, made)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1_500_000, "the rows alone are more than 4 MB"


@pytest.mark.parametrize("kind", sorted(WRITERS))
def test_a_file_that_exists_is_kept_unless_forced(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"x{kind}"
    path.write_text("mine")
    with pytest.raises(ExportRefused, match="the file exists"):
        export(document((1, WHEN, D(1), "a")), path)
    assert path.read_text() == "mine"
    export(document((1, WHEN, D(1), "a")), path, force=True)
    assert path.read_bytes() != b"mine"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    def rows() -> Iterator[tuple[Any, ...]]:
        yield 1, WHEN, D(1), "a"
        raise RuntimeError("the connection is gone")

    path = tmp_path / "x.csv"
    path.write_text("mine")
    with pytest.raises(RuntimeError):
        export(Document("t", tables=(Table("Entries", HEADINGS, rows()),)), path, force=True)
    assert [one.read_text() for one in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("x.doc", "no type to write"),
        ("x", "without an ending"),
        ("no/x.csv", "cannot be written"),
        ("d.csv", "cannot be"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused_before_any_work(tmp_path: Path, name: str, problem: str) -> None:
    (tmp_path / "d.csv").mkdir()
    with pytest.raises(ExportRefused, match=problem) as refused:
        export(document((1, WHEN, D(1), "a")), tmp_path / name)
    assert refused.value.exit_code == 2


@pytest.mark.parametrize(("kind", "library"), [("xlsx", "xlsxwriter"), ("pdf", "reportlab.pdfgen.canvas")])
def test_without_the_extra_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, library: str
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ExtraMissing, match=r"pip install 'walletmigrate\[reports\]'"):
        written(tmp_path, kind, document((1, WHEN, D(1), "a")))
    assert list(tmp_path.iterdir()) == []


def test_amounts_are_never_rounded() -> None:
    amount = Heading("amount", "amount", 2)
    assert [shown(D(words), amount) for words in ("1", "1.10", "1.1000", "1.125", "1E+3", "-0.5")] == [
        *("1.00", "1.10", "1.10", "1.125", "1000.00", "-0.50")
    ]
