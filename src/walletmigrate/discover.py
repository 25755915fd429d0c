"""Discovery: all code paths that touch the mapped columns, from sources, the database, and what the fence saw."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from sqlalchemy import Connection

from walletmigrate import source_database
from walletmigrate.config import Settings
from walletmigrate.errors import UsageError
from walletmigrate.findings import Catalogue, Finding, Ignores, Unread, Wanted, wanted
from walletmigrate.source_files import UNPARSED, SourceFile, Tree, why
from walletmigrate.source_models import Sources
from walletmigrate.source_notebook import Notebook, read_notebook
from walletmigrate.source_python import read_python
from walletmigrate.source_text import read_text_file
from walletmigrate.source_view import View


def discover(
    settings: Settings,
    sources: Sequence[Path],
    *,
    connection: Connection | None = None,
    exclude: Sequence[str] = (),
    window: timedelta | None = None,
) -> Catalogue:
    """Catalogue what touches the mapped columns: in the files under ``sources``, and in a database if one is given.

    ``exclude`` are patterns of paths to leave out; ``window`` is how far back the fence's catalogue counts (None:
    all that it keeps). Nothing is imported, run or written. Raises UsageError for a source that does not exist.
    """
    missing = [str(one) for one in sources if not one.exists()]
    if missing:
        raise UsageError(f"there is no {', '.join(missing)}: pass --source with a folder or a file")
    names, notes, found = {}, [], []
    if connection is not None:
        names = {one.name: source_database.partitions(connection, one) for one in settings.mappings}
        notes += [
            f"table {one.table} is not in this database: its columns were looked for in the sources only"
            for one in settings.mappings
            if not names[one.name]
        ]
    targets = wanted(settings, names)
    read = _Reading(targets, Tree(sources, exclude, []))
    found += read.findings()
    notes += read.notes()
    if connection is None:
        notes.append("no database was looked at: views, functions and what the fence saw are not listed")
    else:
        for mapping, target in zip(settings.mappings, targets, strict=True):
            found += source_database.look(connection, settings, mapping, target)
            seen = source_database.seen_at_run_time(connection, settings, mapping, window)
            found += seen or []
            if seen is None:
                notes.append(f"{mapping.name}: the ledger keeps no catalogue of bypasses here")
    ordered = sorted(dict.fromkeys(found), key=_place)
    return Catalogue(tuple(ordered), tuple(read.tree.unread), read.files, tuple(dict.fromkeys(notes)))


@dataclass
class _Reading:
    """The files, gone through twice: for the classes and tables of all of them, then for what each does."""

    targets: tuple[Wanted, ...]
    tree: Tree
    files: int = 0

    def __post_init__(self) -> None:
        self.sources = Sources()
        self.broken: dict[str, str] = {}
        for file in self.tree.files():
            self.files += 1
            self._learn(file)
        self.views = [View(self.sources, one) for one in self.targets]

    def findings(self) -> list[Finding]:
        """What every file does to every mapped table."""
        found: list[Finding] = []
        again = Tree(self.tree.roots, self.tree.exclude, [])
        worth = _any_of({word for view in self.views for word in view.words()} | self.sources.adapters, re.IGNORECASE)
        for file in again.files():
            book = read_notebook(file.text()) if file.notebook and file.path not in self.broken else None
            text = "" if file.path.endswith(".pyi") else file.text()  # stubs say what is what, and do nothing
            text = "\n".join(book.lines) if book else text
            if worth.search(text):
                found += self._file(file, text, book)
            if book is not None:
                for problem, lines in book.unparsed:
                    self._unparsed(file.path, problem, lines, book.ignores)
            if file.path in self.broken:
                lines = text.splitlines()
                self._unparsed(file.path, self.broken[file.path], lines, Ignores.of(lines))
        return found

    def notes(self) -> list[str]:
        """What the sources do not show."""
        binary = [f"not read, since it is binary: {one}; save it as UTF-8 if it is text" for one in self.tree.binary]
        return binary + [
            f"no class or table of {view.wanted.schema}.{view.wanted.table} was found in the sources: attributes are "
            "looked for by the columns' own names"
            for view in self.views
            if not view.classes
        ]

    def _learn(self, file: SourceFile) -> None:
        try:
            if file.python:
                self.sources.add(file.tree(), file.module)
            elif file.notebook:
                self.sources.add(read_notebook(file.text()).tree, file.module)
        except UNPARSED as error:
            self.broken[file.path] = why(error)

    def _file(self, file: SourceFile, text: str, book: Notebook | None) -> list[Finding]:
        found: list[Finding] = []
        tree = file.tree() if file.python and file.path not in self.broken else None
        for view in self.views:
            try:
                if book is not None:
                    found += book.findings(view, file.path, file.module)
                    continue
                if tree is not None:
                    found += read_python(view, file.path, file.module, tree, text.splitlines())
                    continue
            except RecursionError:
                self.broken[file.path] = "nested too deeply"
            found += read_text_file(file.path, text, view.wanted, {**view.derived, **view.attributes})
        return found

    def _unparsed(self, path: str, problem: str, lines: list[str], ignores: Ignores) -> None:
        """Tell what was read as plain text. The ORM's writes in it are not seen: one may be left if a name fits."""
        named = _any_of({word for view in self.views for word in (*view.attributes, *view.derived, *view.classes)})
        hits = (
            match for at, line in enumerate(lines, 1) if (match := named.search(line)) and not ignores.reason(at, at)
        )
        hit = next(hits, None)
        names = f", and names {hit[0]}" if hit else ""
        problem = f"{problem}; it was read as plain text{names}"
        self.tree.unread.append(Unread(path, problem, as_text=True, left=hit is not None))


def _any_of(names: Iterable[str], flags: re.RegexFlag = re.NOFLAG) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, sorted(names)))})(?!\w)", flags)


def _place(one: Finding) -> tuple[int, str, int, str]:
    order = ("python", "text", "database", "runtime").index(one.origin)
    return min(order, 1), one.file, one.line or 0, one.access
