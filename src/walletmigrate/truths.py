"""What balances are held against: legacy, the ledger, a file, or a function of the user's."""

from __future__ import annotations

import csv
import hashlib
import importlib
import io
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Final, Literal

from walletmigrate import config
from walletmigrate.config import Column, KeyType
from walletmigrate.corrections import amount_of, key_of
from walletmigrate.errors import InvalidAmount, InvalidKey, UnknownBucket, UnknownCurrency, UnreadableInput, UsageError

Kind = Literal["legacy", "ledger", "file", "callable"]
Balance = Decimal | int | None
Source = Callable[[str, str, str], Balance]
"""``source(key, bucket, currency)``: the true balance in major units, None where it is not known."""

PREFIX: Final = "python:"
COLUMNS: Final = ("key", "balance", "bucket", "currency")
_AMOUNT: Final = re.compile(r"[+-]?[0-9]{1,40}(\.[0-9]{1,40})?")


@dataclass(frozen=True)
class Truth:
    """A source of balances. ``name`` is what the records say; ``digest`` tells two files of one name apart."""

    kind: Kind
    name: str
    digest: str = ""
    balances: Mapping[tuple[str, str, str], Decimal] = field(default_factory=dict, repr=False)
    source: Source | None = field(default=None, repr=False)

    @property
    def outside(self) -> bool:
        """Whether it is neither of the two sides."""
        return self.kind in ("file", "callable")

    def of(self, key: str, column: Column) -> Decimal | None:
        """The true balance of an account, None where it is not known. Raises InvalidAmount, and what a source does."""
        if self.source is None:
            return self.balances.get((key, column.bucket, column.currency))
        found = self.source(key, column.bucket, column.currency)
        return None if found is None else amount_of(found, column)


LEGACY: Final = Truth("legacy", "legacy")
LEDGER: Final = Truth("ledger", "ledger")


def named(text: str, mapping: config.Mapping, key_type: KeyType) -> Truth:
    """The truth that ``--truth`` names: legacy, ledger, python:module:callable, or a CSV file.

    Raises UsageError, and UnreadableInput with every line that cannot be read.
    """
    if text in ("legacy", "ledger"):
        return LEGACY if text == "legacy" else LEDGER
    if text.startswith(PREFIX):
        return asked(_imported(text), text)
    return read(Path(text), mapping, key_type)


def asked(source: Source, name: str) -> Truth:
    """The truth of a function, which is asked for one account after the other, without any lock."""
    return Truth("callable", name, source=source)


def read(path: Path, mapping: config.Mapping, key_type: KeyType) -> Truth:
    """The truth of a CSV file with the columns key, balance and, where they are needed, bucket and currency.

    Raises UnreadableInput with every line that cannot be read; nothing has been done then.
    """
    reader = _Reader(mapping, key_type)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from None
    # Bytes that are no UTF-8 become surrogates, which no key may hold, so that they are found with their line.
    reader.read(io.StringIO(content.decode("utf-8-sig", errors="surrogateescape"), newline=""))
    if not reader.balances and not reader.problems:
        reader.problems.append((1, "the file has no balance"))
    if reader.problems:
        raise UnreadableInput(str(path), tuple(reader.problems))
    return Truth("file", path.name, hashlib.sha256(content).hexdigest()[:16], reader.balances)


class _Reader:
    def __init__(self, mapping: config.Mapping, key_type: KeyType) -> None:
        self._mapping = mapping
        self._key_type = key_type
        self._lines: dict[tuple[str, str, str], int] = {}
        self.balances: dict[tuple[str, str, str], Decimal] = {}
        self.problems: list[tuple[int, str]] = []

    def read(self, lines: io.StringIO) -> None:
        rows = csv.reader(lines, strict=True)
        try:
            header = [name.strip() for name in next(rows, [])]
            self.problems += [(1, problem) for problem in _header_problems(header)]
            if self.problems:
                return
            begins = rows.line_num + 1
            for row in rows:
                # Where it begins: a field in quotes may have lines of its own.
                at, begins = begins, rows.line_num + 1
                if row:
                    self._take(row, header, at)
        except csv.Error as error:
            self.problems.append((rows.line_num, f"not CSV: {error}"))

    def _take(self, row: list[str], header: list[str], line: int) -> None:
        if len(row) != len(header):
            self.problems.append((line, f"has {len(row)} fields, the header has {len(header)}"))
            return
        fields = dict(zip(header, (value.strip() for value in row), strict=True))
        try:
            column = self._mapping.column(fields.get("bucket") or None, fields.get("currency") or None)
            key = key_of(fields["key"], self._key_type, self._mapping)
            if not key:
                self.problems.append((line, "key is empty"))
                return
            if not _AMOUNT.fullmatch(fields["balance"]):
                shown = fields["balance"][:40]
                self.problems.append((line, f"balance {shown!a} is no amount: write plain digits"))
                return
            balance = amount_of(Decimal(fields["balance"]), column)
        except (InvalidKey, InvalidAmount, UnknownBucket, UnknownCurrency) as error:
            self.problems.append((line, str(error)))
            return
        place = (key, column.bucket, column.currency)
        if place in self.balances:
            self.problems.append((line, f"account {key!r} stands in line {self._lines[place]} already"))
            return
        self.balances[place], self._lines[place] = balance, line


def _header_problems(header: list[str]) -> Iterator[str]:
    if not header:
        yield f"the file is empty; its first line names the columns {', '.join(COLUMNS[:2])}"
        return
    for name in COLUMNS:
        if header.count(name) > 1 or (name not in header and name in COLUMNS[:2]):
            yield f"column {name} is {'there more than once' if name in header else 'missing'}"


def _imported(text: str) -> Source:
    module, mark, name = text.removeprefix(PREFIX).partition(":")
    if not mark or not module or not name:
        raise UsageError(f"--truth {text}: write python:module:callable")
    if "" not in sys.path:
        sys.path.insert(0, "")  # a module beside the configuration, as other tools find it
    try:
        found = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"--truth {text}: {error}") from None
    if not callable(found):
        raise UsageError(f"--truth {text}: {name} cannot be called")
    return found
