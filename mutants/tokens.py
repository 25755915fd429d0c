"""SQL templates as a tree: tokens, and groups of them in brackets or between `case` and `end`.

It is no parser of SQL; it knows what one needs to find conditions and statements in PL/pgSQL, Jinja left as it is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_PATTERN = re.compile(
    r"""
    (?P<skip> \s+ | --[^\n]* | \{\#.*?\#\} | \{%.*?%\} )
  | (?P<jinja> \{\{.*?\}\} )
  | (?P<string> '(?:[^']|'')*' )
  | (?P<word> create\ or\ replace | [A-Za-z_#][A-Za-z_0-9]* )
  | (?P<number> [0-9][0-9.]* )
  | (?P<mark> \$\$ | :: | := | ->> | [<>=!~]+ | . )
    """,
    re.VERBOSE | re.DOTALL,
)
_DISPATCH = re.compile(r'\{\{ "if" if loop\.first else "elsif" \}\}')
_MACRO = re.compile(r"\{%-?\s*(end)?macro\b")
_CLOSING = {"(": ")", "[": "]"}


@dataclass(frozen=True)
class Token:
    """One word, mark, string or Jinja expression; ``text`` is lower case for words."""

    kind: str
    text: str
    start: int
    end: int


@dataclass
class Group:
    """What stands in brackets, or between ``case`` and ``end``; ``nodes`` are without these."""

    text: str
    start: int
    end: int = 0
    nodes: list[Node] = field(default_factory=list)
    kind: str = "group"


Node = Token | Group


def tokens(source: str) -> list[Token]:
    """All tokens but space, comments and Jinja's statements."""
    found = []
    for match in _PATTERN.finditer(source):
        kind, words = str(match.lastgroup), match.group()
        if kind == "skip" and not _MACRO.match(words):
            continue
        if kind == "skip":  # what stands in a macro ends with it
            kind, words = "mark", ";"
        if _DISPATCH.fullmatch(words):  # the branches of the mapped columns
            kind, words = "word", "if"
        found.append(Token(kind, words.lower() if kind == "word" else words, match.start(), match.end()))
    return found


def tree(source: str) -> Group:
    """The whole source as one group."""
    root = Group("", 0, len(source))
    stack = [root]
    for token in tokens(source):
        top = stack[-1]
        if (token.text in _CLOSING and token.kind == "mark") or token.text == "case":
            stack.append(Group(token.text, token.start))
            top.nodes.append(stack[-1])
        elif token.text == (_CLOSING.get(top.text) or "end" if top.text else None):
            top.end = token.end
            stack.pop()
        else:
            top.nodes.append(token)
    if len(stack) > 1:
        raise ValueError(f"what opens at {stack[-1].start} ({source[stack[-1].start :][:40]!r}) is never closed")
    return root
