"""What discovery looks for and what it finds: one finding is one place that touches a mapped balance column."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from walletmigrate.config import Settings

Access = Literal["read", "write", "definition", "unknown"]
Origin = Literal["python", "text", "database", "runtime"]

_IGNORE = re.compile(
    r"(?:#|--|//|/\*|<!--|\{#)\s*walletmigrate:\s*ignore(?P<file>-file)?\b[ :]*(?P<reason>.*?)(?:\s+# .*?)?\s*"
    r"(?:\*/|-->|#\}|['\"]+\)?,?)?\s*$"
)
_IN_TEXT = re.compile(r"walletmigrate:\s*ignore\b[ :]*(?P<reason>.+)")
_ONLY_COMMENT = re.compile(r"\s*(?:#|--|//|/\*|<!--|\{#)")


@dataclass(frozen=True)
class Wanted:
    """A mapped table as sources name it. ``names`` are the table and its partitions, without their schema."""

    mapping: str
    schema: str
    table: str
    columns: tuple[str, ...]
    names: frozenset[str]


@dataclass(frozen=True)
class Finding:
    """One place that touches a mapped column.

    ``file`` is a path, the name of a database object, or the fingerprint of a statement that was seen at run
    time; ``line`` is 1-based. ``column`` is None where whole rows are meant. ``scope`` is the enclosing function,
    ``how`` what it is in words. Not ``sure``: the name fits, but whose it is cannot be seen. ``adapter``: it goes
    through the adapter already. ``accepted`` is the reason of an ignore comment.
    """

    origin: Origin
    file: str
    line: int | None
    access: Access
    mapping: str
    column: str | None
    scope: str
    how: str
    code: str
    sure: bool = True
    adapter: bool = False
    accepted: str | None = None

    @property
    def left(self) -> bool:
        """Whether this is a direct write that is still to be moved."""
        return self.access == "write" and not self.adapter and self.accepted is None


@dataclass(frozen=True)
class Unread:
    """A file that could not be read as what it is, and why; ``as_text``: as plain text it was.

    ``left``: a direct write may stand in it. That is so unless it was read as text, and names nothing mapped.
    """

    file: str
    problem: str
    as_text: bool = False
    left: bool = True


@dataclass(frozen=True)
class Catalogue:
    """All that was found, by place. ``files`` were read; ``notes`` say what was not looked at."""

    findings: tuple[Finding, ...]
    unread: tuple[Unread, ...]
    files: int
    notes: tuple[str, ...]

    @property
    def left(self) -> tuple[Finding, ...]:
        """The direct writes that are still to be moved, or to be accepted with a reason."""
        return tuple(one for one in self.findings if one.left)

    @property
    def unseen(self) -> tuple[Unread, ...]:
        """The files that could not be looked at, or not well enough: a write may stand there."""
        return tuple(one for one in self.unread if one.left)


@dataclass(frozen=True)
class Ignores:
    """The ignore comments of one text: ``# walletmigrate: ignore <reason>``, also in SQL and templates.

    A comment accepts what is on its own line, in the statement around it, or right below it when it stands
    alone; ``ignore-file`` accepts the whole text. Without a reason it accepts nothing.
    """

    lines: Sequence[str]
    reasons: dict[int, str] = field(default_factory=dict)
    whole: str | None = None

    @classmethod
    def of(cls, lines: Sequence[str]) -> Ignores:
        """Read the comments of a text."""
        reasons, whole = {}, None
        for number, line in enumerate(lines, 1):
            match = _IGNORE.search(line) if "walletmigrate" in line else None
            if match and match["reason"] and match["file"]:
                whole = match["reason"]
            elif match and match["reason"]:
                reasons[number] = match["reason"]
        return cls(lines, reasons, whole)

    def reason(self, first: int, last: int) -> str | None:
        """Why the lines ``first`` to ``last`` are accepted; None if they are not."""
        if not self.reasons:
            return self.whole
        above = first - 1
        while above > 0 and _ONLY_COMMENT.match(self.lines[above - 1]):
            if above in self.reasons:
                return self.reasons[above]
            above -= 1
        return next((self.reasons[line] for line in range(first, last + 1) if line in self.reasons), self.whole)


def reason_in(comment: str | None) -> str | None:
    """Why a database object is accepted, from its COMMENT: ``walletmigrate: ignore <reason>``."""
    match = _IN_TEXT.search(comment or "")
    return match["reason"].strip() if match else None


def wanted(settings: Settings, partitions: Mapping[str, Iterable[str]] | None = None) -> tuple[Wanted, ...]:
    """What to look for: a Wanted for each mapping; ``partitions`` are names of tables by mapping."""
    return tuple(
        Wanted(
            mapping.name,
            mapping.schema_name,
            mapping.table_name,
            tuple(column.column for column in mapping.columns),
            frozenset({mapping.table_name, *(partitions or {}).get(mapping.name, ())}),
        )
        for mapping in settings.mappings
    )


def shortened(line: str) -> str:
    """A line of source as a table can show it."""
    words = " ".join(line.split())
    return words if len(words) <= 120 else words[:119] + "…"


def words(text: str) -> frozenset[str]:
    """The words of a text, as a set."""
    return frozenset(text.split())
