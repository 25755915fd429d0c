"""Reports as files: CSV, XLSX, PDF or HTML by the file's ending, whole or not at all."""

from __future__ import annotations

import csv
import os
import tempfile
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any, Final

from walletmigrate import pages, paper, spreadsheets
from walletmigrate.documents import Document, Heading, harmless, shown
from walletmigrate.errors import ExportRefused

Writer = Callable[[Document, Path], None]


def write_csv(document: Document, path: Path) -> None:
    """One table: a plain CSV with its head. Several, or facts: a CSV with a title above each, an empty line between.

    Amounts are exact text. Text that a spreadsheet would take for a formula gets an apostrophe before it.
    """
    with path.open("w", encoding="utf-8", newline="") as file:
        # As RFC 4180 has it; with a bare newline the writer would leave a carriage return in a cell unquoted.
        lines = csv.writer(file, lineterminator="\r\n")
        plain = len(document.tables) == 1 and not document.facts
        for name, value in document.facts:
            lines.writerow([harmless(name), harmless(value)])
        for number, table in enumerate(document.tables):
            if not plain:
                above: list[list[str]] = [[]] if number or document.facts else []
                lines.writerows([*above, [harmless(table.title)]])
            lines.writerow([one.title for one in table.headings])
            for row in table.rows:
                lines.writerow([_cell(cell, one) for cell, one in zip(row, table.headings, strict=True)])


WRITERS: Final[dict[str, Writer]] = {
    ".csv": write_csv,
    ".xlsx": spreadsheets.write,
    ".pdf": paper.write,
    ".html": pages.write,
}


def writer_of(path: Path, *, kinds: tuple[str, ...] = tuple(WRITERS), force: bool = False) -> Writer:
    """What writes a file of that ending. Raises ExportRefused before any work: ending, folder, or a file there."""
    kind = path.suffix.lower()
    if kind not in kinds:
        raise ExportRefused(str(path), f"{kind or 'a file without an ending'} is no type to write", _one_of(kinds))
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ExportRefused(str(path), "it cannot be written", "Name a file in a folder that exists and is yours")
    if path.exists() and not force:
        raise ExportRefused(str(path), "the file exists", "Name another, or add --force to replace it")
    return WRITERS[kind]


def export(document: Document, path: Path, *, kinds: tuple[str, ...] = tuple(WRITERS), force: bool = False) -> None:
    """Write a report to a file of a type in ``kinds``; an unfinished file never stands under its name.

    Raises ExportRefused (the ending, the folder, a file that exists without ``force``, a PDF that is too long) and
    ExtraMissing.
    """
    write = writer_of(path, kinds=kinds, force=force)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:40]}.", suffix=path.suffix)
    os.close(handle)
    made = Path(name)
    try:
        write(document, made)
        made.chmod(0o666 & ~_umask())
        if force:
            made.replace(path)
        else:
            _link(made, path)
    except FileExistsError:
        raise ExportRefused(str(path), "the file exists", "Name another, or add --force to replace it") from None
    finally:
        made.unlink(missing_ok=True)


def _cell(value: Any, heading: Heading) -> str:
    words = shown(value, heading)
    return words if isinstance(value, Decimal | int) else harmless(words)


def _one_of(kinds: tuple[str, ...]) -> str:
    return f"Write {', '.join(kinds[:-1])} or {kinds[-1]}"


def _link(made: Path, path: Path) -> None:
    """Give the file its name; unlike a rename, that refuses a file that came meanwhile."""
    try:
        os.link(made, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        made.replace(path)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
