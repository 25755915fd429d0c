"""Jupyter notebooks: their code cells below one another, each line as Python, as SQL, or as other text."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Final, NamedTuple

from walletmigrate.findings import Finding, Ignores, words
from walletmigrate.source_files import UNPARSED, parsed, why
from walletmigrate.source_python import read_python
from walletmigrate.source_text import read_text_file
from walletmigrate.source_view import View

_CELL_MAGIC = re.compile(r"%%(\w+)")
_SQL_MAGIC = re.compile(  # up to the statement: options, a connection, a variable for the result
    r"%%sql\b.*?(?=\b(?:select|insert|update|delete|merge|truncate|copy|with|alter|create)\b|$)", re.IGNORECASE
)
_OTHER: Final = words("bash sh script system cmd html javascript js latex markdown svg perl ruby R")
_TIMED = re.compile(r"(\s*)%(?:time|timeit|prun|memit)\s+(?:-\w+\s*\d*\s+)*(?=\S)")  # what follows is Python
_MAGIC = re.compile(r"\s*(?:[\w., ]+=\s*)?[%!?]|\s*[\w.*]+\?\??\s*$")


class _Place(NamedTuple):
    """Where a line of a notebook's code stands: its cell, and the line in the file where that is known."""

    cell: str
    line: int | None


class _Cell(NamedTuple):
    """A cell's lines by what they are, empty where they are something else; why it is no Python, if it should be."""

    python: Sequence[str]
    sql: Sequence[str]
    other: Sequence[str]
    problem: str | None = None


class Notebook:
    """The code of a notebook. ``unparsed`` are the cells that are no Python: why, and their lines in their places."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.unparsed: list[tuple[str, list[str]]] = []
        self._python: list[str] = []
        self._sql: list[str] = []
        self._other: list[str] = []
        self._places: list[_Place] = []

    @cached_property
    def tree(self) -> ast.Module:
        """The syntax tree of all cells that parse. Raises one of UNPARSED."""
        return parsed("\n".join(self._python), "")

    @cached_property
    def ignores(self) -> Ignores:
        """The ignore comments of all cells."""
        return Ignores.of(self.lines)

    def findings(self, view: View, path: str, module: tuple[str, ...]) -> list[Finding]:
        """What the notebook does to one mapped table."""
        names = {**view.derived, **view.attributes}
        found = read_python(view, path, module, self.tree, self._python)
        found += read_text_file(f"{path}.sql", "\n".join(self._sql), view.wanted, names)
        found += read_text_file(path, "\n".join(self._other), view.wanted, names)
        return [self._placed(one, path) for one in found]

    def _placed(self, one: Finding, path: str) -> Finding:
        at = one.line or 1
        cell, line = self._places[at - 1]
        accepted = one.accepted or self.ignores.reason(at, at)
        return replace(
            one, file=path, line=line, scope=f"{cell}, {one.scope}" if one.scope else cell, accepted=accepted
        )

    def add(self, number: int, source: list[str], start: int | None, python: bool) -> None:
        """Take in one cell: its source as the file has it, whose first piece stands in line ``start``."""
        lines = "".join(source).split("\n")
        cell = _cell(lines, python)
        if cell.problem:
            self.unparsed.append((f"cell {number}: {cell.problem}", [""] * len(self.lines) + lines))
        # The line between two cells ends a statement of SQL, and what a comment holds for.
        self.lines += [*lines, ""]
        self._python += [*cell.python, ""]
        self._sql += [*cell.sql, ";"]
        self._other += [*cell.other, ""]
        for at in range(len(lines) + 1):
            line = None if start is None else start + _piece(source, at)
            self._places.append(_Place(f"cell {number}" if line else f"cell {number} line {at + 1}", line))


def read_notebook(text: str) -> Notebook:
    """The code cells of a notebook. Raises ValueError or RecursionError for what is none."""
    document = json.loads(text)
    try:
        cells = document["cells"]
        starts = _starts(text, cells)
        about = document.get("metadata", {})
        language = about.get("kernelspec", {}).get("language") or about.get("language_info", {}).get("name", "python")
        book = Notebook()
        for number, cell in enumerate(cells, 1):
            if cell["cell_type"] == "code":
                book.add(number, _source(cell), starts.get(number), language.lower() == "python")
    except (KeyError, TypeError, AttributeError):
        raise ValueError("this is no notebook of format 4") from None
    return book


def _source(cell: dict[str, Any]) -> list[str]:
    source = cell["source"]
    pieces = [source] if isinstance(source, str) else list(source)
    return [piece.replace("\r\n", "\n") for piece in pieces]


def _starts(text: str, cells: list[dict[str, Any]]) -> dict[int, int]:
    """The line of each cell's first piece, by the cell's number, where the file has a line for each piece."""
    keys = [number for number, line in enumerate(text.split("\n"), 1) if line.strip() == '"source": [']
    lists = [number for number, cell in enumerate(cells, 1) if isinstance(cell["source"], list) and cell["source"]]
    return {number: key + 1 for number, key in zip(lists, keys, strict=True)} if len(lists) == len(keys) else {}


def _piece(source: list[str], line: int) -> int:
    """Which piece of a source holds a line of it, both from 0."""
    ended = 0
    for at, piece in enumerate(source):
        ended += piece.count("\n")
        if ended > line:
            return at
    return max(len(source) - 1, 0)


def _cell(lines: list[str], python: bool) -> _Cell:
    blank = [""] * len(lines)
    first = next((at for at, line in enumerate(lines) if line.strip()), 0)
    magic = _CELL_MAGIC.match(lines[first])
    if magic and magic[1] == "sql":
        return _Cell(blank, [*lines[:first], _SQL_MAGIC.sub("", lines[first]), *lines[first + 1 :]], blank)
    if not python or (magic and magic[1] in _OTHER):
        return _Cell(blank, blank, lines)
    problem = _problem(lines)
    if problem is None:
        return _Cell(lines, blank, blank)
    plain, magics = _apart(lines)
    problem = _problem(plain)
    return _Cell(blank, blank, lines, problem) if problem else _Cell(plain, blank, magics)


def _apart(lines: list[str]) -> tuple[list[str], list[str]]:
    """The lines with ``pass`` for each magic, shell escape and call for help, and these."""
    plain, magics = [], []
    goes_on = False
    for line in lines:
        python = _TIMED.sub(r"\1", line)
        magic = goes_on or bool(_MAGIC.match(python))
        indent = line[: len(line) - len(line.lstrip())]
        plain.append(python if not magic else "" if goes_on else f"{indent}pass")
        magics.append(line if magic else "")
        goes_on = magic and line.endswith("\\")
    return plain, magics


def _problem(lines: list[str]) -> str | None:
    try:
        parsed("\n".join(lines), "")
    except UNPARSED as error:
        return why(error)
    return None
