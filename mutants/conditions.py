"""Conditions and their operands: what stands after `if`, `when`, `where` … and between `and` and `or`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mutants.tokens import Group, Node

_INTRODUCE = ("if", "elsif", "when", "where", "having", "on")
_CUT = (
    *("if", "elsif", "when", "where", "having", "check", "then", "else", "end", "loop", "begin", "return", "exit"),
    *(
        "returning",
        "group",
        "order",
        "for",
        "limit",
        "offset",
        "union",
        "except",
        "intersect",
        "select",
        "from",
        "into",
    ),
    *("as", "set", "values", "using", "declare", "on", "join", "left", "cross", "inner", "trigger"),
    *(",", ";", ":=", "$$"),
)


@dataclass(frozen=True)
class Operand:
    """A part of a condition that can be put down as a constant: ``literal``."""

    start: int
    end: int
    literal: str


def operands(group: Group) -> Iterator[Operand]:
    """Every operand of every condition in a group, and in the groups inside."""
    for head, nodes in _segments(group):
        if head == "handler":
            yield from _handler(nodes)
        elif head == "trigger":
            continue  # its events are not a condition
        elif head == "check":
            yield _operand(nodes[:1], "(true)")
        elif _simple_case(group) and head == "when":
            yield _operand(nodes, "null")
        elif head in _INTRODUCE or _splits(nodes):
            yield from _chain(nodes, head)
    for node in group.nodes:
        if isinstance(node, Group):
            yield from operands(node)


def _chain(nodes: list[Node], head: str) -> Iterator[Operand]:
    """A disjunction of conjunctions. A condition that leads somewhere is also taken as never true."""
    parts = _split(nodes, "or")
    for part in parts:
        conjuncts = _split(part, "and")
        if len(parts) > 1:
            yield _operand(part, "false")
        if len(conjuncts) > 1 or (len(parts) == 1 and head in ("where", "having", "on")):
            for conjunct in conjuncts:
                yield _operand(conjunct, "true")
    if len(parts) == 1 and head in ("if", "elsif", "when"):
        yield _operand(nodes, "false")


def _operand(nodes: list[Node], literal: str) -> Operand:
    return Operand(nodes[0].start, nodes[-1].end, literal)


def _splits(nodes: list[Node]) -> bool:
    return len(_split(nodes, "or")) > 1 or len(_split(nodes, "and")) > 1


def _split(nodes: list[Node], word: str) -> list[list[Node]]:
    """The parts between the words; the `and` of a `between` is none."""
    parts: list[list[Node]] = [[]]
    between = False
    for node in nodes:
        if node.text == "between" and node.kind == "word":
            between = True
        if node.text == word and node.kind == "word" and not (between and word == "and"):
            parts.append([])
            continue
        if node.text == "and" and node.kind == "word":
            between = False
        parts[-1].append(node)
    return [part for part in parts if part]


def _segments(group: Group) -> Iterator[tuple[str, list[Node]]]:
    """Runs of nodes without a word that ends an expression, each with the word before it."""
    head = ""
    run: list[Node] = []
    for index, node in enumerate(group.nodes):
        if _cuts(group.nodes, index):
            if run:
                yield head, run
            head, run = _head(group, index), []
        else:
            run.append(node)
    if run:
        yield head, run


def _cuts(nodes: list[Node], index: int) -> bool:
    node = nodes[index]
    if node.kind not in ("word", "mark") or node.text not in _CUT:
        return False
    return not (node.text == "from" and index and nodes[index - 1].text == "distinct")


def _head(group: Group, index: int) -> str:
    """The word that introduces what follows; nothing where it is another construct's."""
    nodes, text = group.nodes, group.nodes[index].text
    before = nodes[index - 1].text if index else ""
    if text == "if" and before in ("end", "sequence", "table", "schema"):
        return ""
    if (
        text == "when"
        and group.text != "case"
        and "exit" not in (node.text for node in nodes[max(0, index - 2) : index])
    ):
        return "handler"
    if text == "on" and "join" not in (node.text for node in nodes[max(0, index - 8) : index]):
        return ""
    return text


def _handler(nodes: list[Node]) -> Iterator[Operand]:
    """The errors that a handler catches, where it names several."""
    named = _split(nodes, "or")
    return (_operand(name, "sqlstate 'WM999'") for name in named if len(named) > 1)


def _simple_case(group: Group) -> bool:
    return group.text == "case" and bool(group.nodes) and group.nodes[0].text != "when"
