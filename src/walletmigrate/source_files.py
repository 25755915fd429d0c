"""The files of a source tree that discovery reads, and what it cannot read."""

from __future__ import annotations

import ast
import codecs
import fnmatch
import io
import os
import stat
import tokenize
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from walletmigrate.findings import Unread, words
from walletmigrate.source_text import SQL_SUFFIXES

SKIPPED_FOLDERS: Final = frozenset(
    {
        ".git",
        ".hg",
        ".svn",
        ".tox",
        ".nox",
        ".venv",
        "venv",
        "node_modules",
        "__pycache__",
        ".mypy_cache",
        ".ruff_cache",
        ".pytest_cache",
        ".eggs",
        ".ipynb_checkpoints",
        "site-packages",
    }
)
MAX_BYTES: Final = 4 * 1024 * 1024
"""Files that are larger are listed, and not read."""

UNPARSED: Final = (SyntaxError, ValueError, RecursionError, MemoryError)
"""What parsing a source can raise."""

_PYTHON: Final = frozenset({".py", ".pyw", ".pyi"})
_TEXT: Final = words(
    ".cfg .csv .htm .html .ini .ipynb .j2 .jinja .jinja2 .js .json .mako .md .ps1 .rst .sh .toml .txt .xml .yaml .yml"
).union(_PYTHON, SQL_SUFFIXES)
"""Names that promise text: it is told when such a file is binary."""
# UTF-32 first: its mark begins with that of UTF-16.
_MARKS: Final = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def parsed(code: str | bytes, path: str) -> ast.Module:
    """The syntax tree of a Python source. Raises one of UNPARSED."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(code, path)


def why(error: BaseException) -> str:
    """Why a source could not be parsed, with the line."""
    line = getattr(error, "lineno", None)
    what = getattr(error, "msg", None) or str(error) or type(error).__name__
    return f"line {line}: {what}" if line else what


@dataclass(frozen=True)
class SourceFile:
    """One file of text. ``python`` says that it should parse as Python; ``module`` is its path as names."""

    path: str
    module: tuple[str, ...]
    content: bytes
    python: bool

    @property
    def notebook(self) -> bool:
        """Whether it should be a Jupyter notebook."""
        return self.path.lower().endswith(".ipynb")

    def text(self) -> str:
        """Its text, by its byte order mark where it has one; bytes that are none are replaced."""
        if encoding := _marked(self.content):
            return self.content.decode(encoding, "replace")
        if not self.python:
            return self.content.decode("utf-8-sig", "replace")
        try:
            encoding, _ = tokenize.detect_encoding(io.BytesIO(self.content).readline)
            return self.content.decode(encoding)
        except (SyntaxError, UnicodeDecodeError, LookupError):
            return self.content.decode("utf-8", "replace")

    def tree(self) -> ast.Module:
        """Its syntax tree. Raises one of UNPARSED."""
        return parsed(self.content, self.path)


@dataclass
class Tree:
    """The files under some folders, each once; ``unread`` fills while they are gone through.

    So does ``binary``: files whose names promise text.
    """

    roots: Sequence[Path]
    exclude: Sequence[str]
    unread: list[Unread]
    binary: list[str] = field(default_factory=list)

    def files(self) -> Iterator[SourceFile]:
        """Every regular text file. Symbolic links are not followed; binary files are left out."""
        seen: set[tuple[int, int]] = set()
        for root in self.roots:
            for path in self._paths(root):
                if found := self._file(path, seen):
                    yield found

    def _paths(self, root: Path) -> Iterator[Path]:
        if not root.is_dir():
            yield root
            return

        def failed(error: OSError) -> None:
            self.unread.append(Unread(str(error.filename), error.strerror or "cannot be listed"))

        for folder, inner, names in os.walk(root, onerror=failed):
            here = Path(folder)
            inner[:] = sorted(name for name in inner if not self._skipped(here / name, root))
            for name in sorted(names):
                path = here / name
                if not self._excluded(path.relative_to(root)):
                    yield path

    def _skipped(self, folder: Path, root: Path) -> bool:
        virtual = (folder / "pyvenv.cfg").is_file()
        return folder.name in SKIPPED_FOLDERS or virtual or self._excluded(folder.relative_to(root))

    def _excluded(self, path: Path) -> bool:
        return any(fnmatch.fnmatch(path.as_posix(), one) or fnmatch.fnmatch(path.name, one) for one in self.exclude)

    def _file(self, path: Path, seen: set[tuple[int, int]]) -> SourceFile | None:
        try:
            about = path.lstat()
            if not stat.S_ISREG(about.st_mode) or (about.st_dev, about.st_ino) in seen:
                return None
            seen.add((about.st_dev, about.st_ino))
            with path.open("rb") as file:
                head = file.read(8192)
                if b"\0" in head and not _marked(head):
                    if path.suffix.lower() in _TEXT:
                        self.binary.append(str(path))
                    return None
                if about.st_size > MAX_BYTES:
                    self.unread.append(Unread(str(path), f"larger than {MAX_BYTES // 1024 // 1024} MiB"))
                    return None
                content = head + file.read()
        except OSError as error:
            self.unread.append(Unread(str(path), error.strerror or "cannot be read"))
            return None
        python = path.suffix in _PYTHON or (not path.suffix and head.startswith(b"#!") and b"python" in head[:80])
        # The whole path: nobody knows which folder of it is the package's root.
        module = tuple(part for part in path.absolute().with_suffix("").parts if part != "__init__")
        return SourceFile(str(path), module, content, python)


def _marked(content: bytes) -> str | None:
    """The encoding that a byte order mark names, besides UTF-8, which is taken for granted."""
    return next((name for mark, name in _MARKS if content.startswith(mark)), None)
