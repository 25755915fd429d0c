"""The words of SQL: identifiers, strings, and holes for what is filled in at run time; comments are left out."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

HOLE: Final = "\0"
"""Stands in a text for what is filled in at run time."""

_STATEMENT = re.compile(
    r"\b(?:select\b.+?\bfrom\b|insert\s+into\b|update\s+\S.{0,200}?\bset\b|delete\s+from\b|merge\s+into\b"
    r"|truncate\s+\S|copy\s+\S.{0,2000}?\b(?:from|to)\b|(?:alter|create)\s+.{0,60}?\b(?:table|view|trigger|function"
    r"|procedure|rule|policy|index)\b|returning\s+\S)",
    re.IGNORECASE | re.DOTALL,
)
_TOKEN = re.compile(
    r"(?P<skip>\s+|--[^\n]*|/\*.*?\*/|\{%.*?%\}|\{\#.*?\#\})"
    r"|(?P<body>\$(?P<tag>[A-Za-z_]\w*|)\$(?P<inner>.*?)\$(?P=tag)\$)"
    r"|(?P<text>[eE]?'(?:[^']|'')*')"
    r"|(?P<hole>\0|\{\{.*?\}\}|\{[^{}\n]*\}|%s|%[IL])"
    r"|(?P<value>%\(\w+\)s|(?<![:\w]):[A-Za-z_]\w*|\$\d+|\d[\w.]*)"
    r'|(?P<quoted>"(?:[^"]|"")+")'
    r"|(?P<word>[^\W\d][\w$]*)"
    r"|(?P<mark>::|:=|.)",
    re.DOTALL,
)


@dataclass(frozen=True)
class Token:
    """A word, a name in quotes, a string, a value, a hole or a mark, with its offset in the text."""

    kind: str
    text: str
    offset: int

    @property
    def low(self) -> str:
        """A bare word in lower case; anything else as it stands."""
        return self.text.lower() if self.kind == "word" else self.text

    @property
    def name(self) -> str | None:
        """The identifier that this is, as the catalog spells it."""
        if self.kind == "quoted":
            return self.text[1:-1].replace('""', '"')
        return self.text.lower() if self.kind == "word" else None


def is_sql(text: str) -> bool:
    """Whether a text holds what may be a statement."""
    return bool(_STATEMENT.search(text))


def statements_in(text: str) -> Iterator[tuple[int, str]]:
    """Statements inside another language's text, with their offsets: up to a semicolon or an empty line."""
    at = 0
    while match := _STATEMENT.search(text, at):
        end = re.compile(r";|\n\s*\n").search(text, match.end())
        at = end.start() if end else len(text)
        yield match.start(), text[match.start() : at]


def tokens_of(text: str) -> Iterator[Token]:
    """The words of a text; what is between ``$$`` is one of kind "body"."""
    for match in _TOKEN.finditer(text):
        if match.lastgroup != "skip":
            kind = "body" if match["body"] is not None else str(match.lastgroup)
            yield Token(kind, match[0], match.start())
