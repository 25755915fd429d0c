"""SQL read for what it does to a mapped column, without a grammar: tokens, the tables they stand with, the clause.

It reads statements that an application sends, scripts, and bodies of functions. What is filled in at run time
is a hole: a name that is not known.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple

from walletmigrate.findings import Access, Wanted, words
from walletmigrate.source_tokens import Token, is_sql, tokens_of

Side = Literal["mapped", "other", "hole"]

_TABLE_AFTER: Final = frozenset({"from", "join", "into", "update", "table", "using", "copy", "truncate", "on"})
_NO_ALIAS: Final = words(
    "set where on using values select join left right inner outer full cross natural group order limit "
    "offset having union except intersect returning when then for from to with default do as window fetch "
    "if not add alter drop rename owner enable disable for execute each before after instead loop end "
    "cascade restrict tablesample"
)
_ENDS_SET: Final = frozenset({"where", "from", "returning", "when", "on"})
_DEFINES = re.compile(
    r"(create (or replace )?((unlogged|temp|temporary|global|local|foreign) )*table|alter table|alter foreign table"
    r"|create (unique )?index|create (or replace )?(constraint )?trigger|comment on|grant|revoke|create policy)\b"
)
_STARTS: Final = frozenset({"", "begin", "then", "else", "loop"})


class Touch(NamedTuple):
    """What a text does at ``offset``. ``column`` None: to whole rows, or to a column named at run time."""

    offset: int
    column: str | None
    access: Access
    how: str
    sure: bool


@dataclass
class _Level:
    """What one pair of parentheses is about."""

    mode: str = ""  # "set": assignments; "columns": a list of columns that are written
    side: Side = "other"
    expects: bool = False  # in "set": the next name is assigned


@dataclass
class _State:
    levels: list[_Level] = field(default_factory=lambda: [_Level()])
    target: Side = "other"  # what INSERT, MERGE or UPDATE named last
    opens: str = ""  # the mode of the parenthesis that comes next
    touches: list[Touch] = field(default_factory=list)


def read_sql(text: str, wanted: Wanted, *, row: Side = "hole", fragment: bool = False) -> list[Touch]:
    """What a text of SQL does to a mapped table.

    ``row`` says whose row NEW and OLD are, in the body of a trigger's function. A ``fragment`` need not name a
    table.
    """
    touches: list[Touch] = []
    statement: list[Token] = []
    for token in tokens_of(text):
        if token.kind == "body":
            inner = token.text.index("$", 1) + 1
            body = read_sql(token.text[inner:-inner], wanted, row=row)
            touches += [each._replace(offset=each.offset + token.offset + inner) for each in body]
        elif token.kind == "text" and is_sql(token.text):
            inner_text = token.text.partition("'")[2][:-1].replace("''", "'")
            touches += [each._replace(offset=token.offset) for each in read_sql(inner_text, wanted, row=row)]
        if token.text == ";":
            touches += _Statement(statement, wanted, row, fragment).read()
            statement = []
        else:
            statement.append(token)
    touches += _Statement(statement, wanted, row, fragment).read()
    return sorted(set(touches), key=lambda touch: touch.offset)


class _Statement:
    """One statement's tokens, read twice: for the tables it names, then for what it does."""

    def __init__(self, tokens: list[Token], wanted: Wanted, row: Side, fragment: bool) -> None:
        self.tokens = tokens
        self.wanted = wanted
        self.fragment = fragment
        self.aliases: dict[str, Side] = {}
        self.sides: list[Side] = []
        self._at_table: dict[int, tuple[Side, int]] = {}
        head = " ".join(token.low for token in tokens[:8] if token.kind == "word")
        self.defines = bool(_DEFINES.match(head)) and not re.match(r"create .*table\b.* as\b", head)
        self._tables()
        self.aliases = {"new": row, "old": row, **self.aliases}

    def read(self) -> list[Touch]:
        """What the statement does to the mapped table."""
        relevant = "mapped" in self.sides or "hole" in self.sides or self.fragment or "mapped" in self.aliases.values()
        if not relevant and "hole" not in self.aliases.values():
            return []
        state = _State()
        for at, token in enumerate(self.tokens):
            if token.text == "(":
                state.levels.append(_Level(state.opens, state.target))
                state.opens = ""
            elif token.text == ")" and len(state.levels) > 1:
                state.levels.pop()
            elif token.kind == "word" and self._before(at) != ".":
                self._keyword(at, token.low, state)
            self._commas(token, state)
            self._name(at, token, state)
        return state.touches

    # -- the tables that it names

    def _tables(self) -> None:
        at = 0
        while at < len(self.tokens):
            token = self.tokens[at]
            if token.kind == "word" and token.low in _TABLE_AFTER and self._names_table(at):
                at = self._table_list(at + 1)
            else:
                at += 1

    def _names_table(self, at: int) -> bool:
        """Whether a table follows this word: FOR UPDATE and ON CONFLICT name none."""
        word, before, after = self.tokens[at].low, self._before(at), self._word(at + 1)
        if word == "update":
            return before not in {"for", "on", "key"} and after not in {"of", "on", "or", "set"}
        if word == "on":
            return self.defines or "trigger" in self._words(at) or "rule" in self._words(at)
        return True

    def _table_list(self, at: int) -> int:
        while True:
            while self._word(at) in {"only", "table", "lateral", "if", "not", "exists", "materialized", "concurrently"}:
                at += 1
            side, name, end = self._relation(at)
            if end == at:
                return at
            self._at_table[at] = (side, end)
            self.sides.append(side)
            if name is not None:
                self.aliases.setdefault(name, side)
            at = end
            if self._word(at) == "as":
                at += 1
            alias = self.tokens[at].name if at < len(self.tokens) else None
            if alias is not None and alias not in _NO_ALIAS:
                self.aliases[alias] = side
                at += 1
            if self._text(at) != ",":
                return at
            at += 1

    def _relation(self, at: int) -> tuple[Side, str | None, int]:
        """The table named at a place: whose it is, its name, and where the name ends."""
        parts: list[str | None] = []
        while at < len(self.tokens) and self.tokens[at].kind in {"word", "quoted", "hole"}:
            parts.append(self.tokens[at].name)
            at += 1
            if self._text(at) != ".":
                break
            at += 1
        if not parts or (len(parts) == 1 and parts[0] in _NO_ALIAS):
            return "other", None, at - len(parts)
        name = parts[-1]
        if name is None:
            return "hole", None, at
        same_schema = len(parts) == 1 or parts[-2] in {None, self.wanted.schema}
        return ("mapped" if name in self.wanted.names and same_schema else "other"), name, at

    # -- what it does

    def _keyword(self, at: int, word: str, state: _State) -> None:
        level = state.levels[-1]
        if word in {"insert", "into", "merge", "update", "delete", "truncate", "copy"}:
            self._verb(at, word, state)
        elif word == "set" and level.mode == "update":
            level.mode, level.expects = "set", True
        elif word in _ENDS_SET and level.mode == "set":
            level.mode = ""

    def _verb(self, at: int, word: str, state: _State) -> None:
        level, table = state.levels[-1], self._table_after(at)
        if word == "update" and (table or self._word(at + 1) == "set"):
            if table:
                state.target = table[0]
            level.mode, level.side = "update", state.target
        elif word == "into" and table and self._before(at) in {"insert", "merge"}:
            state.target = table[0]
            if self._before(at) == "insert":
                self._insert(at, table[1], state)
        elif word == "insert" and self._before(at) == "then":
            self._insert(at, at + 1, state)
        elif word == "delete" and self._before(at) == "then":
            self._rows(at, state.target, "merge that deletes rows", state)
        elif word in {"delete", "truncate"} and not self.defines and self._before(at) not in {"on", "or", "after"}:
            self._removal(at, word, state)
        elif word == "copy" and table and at + 1 in self._at_table:
            self._copy(at, table, state)

    def _removal(self, at: int, word: str, state: _State) -> None:
        start = at + 1 if word == "delete" else at
        for side in self._sides_after(start):
            self._rows(at, side, f"{word} of rows", state)

    def _insert(self, at: int, after: int, state: _State) -> None:
        while after < len(self.tokens) and self._text(after) != "(" and self._word(after) not in _NO_ALIAS:
            after += 1  # the alias
        while self._word(after) == "as":
            after += 2
        if self._text(after) == "(" and self._word(after + 1) not in {"select", "with", "values"}:
            state.opens = "columns"
        else:
            self._rows(at, state.target, "insert without a list of columns", state)

    def _copy(self, at: int, table: tuple[Side, int], state: _State) -> None:
        state.target = table[0]
        words = [token.low for token in self.tokens[table[1] :]]
        writes = "from" in words and "to" not in words[: words.index("from")]
        if self._text(table[1]) == "(":
            state.opens = "columns" if writes else ""
        elif writes:
            self._rows(at, state.target, "copy without a list of columns", state)
        else:
            self._touch(at, None, "read", "copy of whole rows", state.target, state)

    def _commas(self, token: Token, state: _State) -> None:
        level = state.levels[-1]
        if token.text == "," and level.mode == "set":
            level.expects = True

    def _name(self, at: int, token: Token, state: _State) -> None:
        level = state.levels[-1]
        assigned = level.mode == "set" and level.expects
        if assigned and token.text == "(":
            return
        if len(state.levels) > 1 and token.text == "(" and state.levels[-2].mode == "set" and state.levels[-2].expects:
            state.levels[-2].expects = False
            level.mode, level.side = "columns", state.levels[-2].side
        elif assigned and token.kind == "hole":
            level.expects = False
            self._touch(at, None, "unknown", "columns named at run time", level.side, state)
        elif token.text == "*":
            self._star(at, state)
        elif token.name is not None and self._text(at + 1) != ".":
            self._column(at, token.name, assigned, state)

    def _column(self, at: int, name: str, assigned: bool, state: _State) -> None:
        level = state.levels[-1]
        if assigned and name != "set":
            level.expects = False
        if name not in self.wanted.columns or self._text(at + 1) == "(" or self._before(at) in {"as", "::"}:
            return
        if (assigned and name != "set") or level.mode == "columns":
            self._touch(at, name, "write", "SQL that writes the column", level.side, state)
        elif (side := self._side(at)) is not None:
            if self.defines:
                self._touch(at, name, "definition", "SQL that defines", side, state)
            elif self._assigns(at):
                self._touch(at, name, "write", "assignment in a trigger's function", side, state)
            else:
                self._touch(at, name, "read", "SQL that reads the column", side, state)

    def _assigns(self, at: int) -> bool:
        """Whether ``NEW.column`` at this place is assigned."""
        qualified = self._before(at) == "." and self._word(at - 2) == "new"
        follows = self._text(at + 1)
        return qualified and (
            follows == ":=" or (follows == "=" and self._before(at - 2) in _STARTS) or self._before(at - 2) == "into"
        )

    def _side(self, at: int) -> Side | None:
        """Whose column a name is; None when it is none of this table's."""
        if self._before(at) == ".":
            qualifier = self.tokens[at - 2].name if at >= 2 else None
            if qualifier == "excluded":
                return self.sides[0] if self.sides else "hole"
            side = self.aliases.get(qualifier or "", "hole")
            return None if side == "other" else side
        if "mapped" in self.sides:
            return "mapped"
        return "hole" if "hole" in self.sides or (self.fragment and not self.sides) else None

    def _star(self, at: int, state: _State) -> None:
        before = self._before(at)
        if before == ".":
            side = self.aliases.get(self.tokens[at - 2].name or "", "other")
        elif before in {"select", ",", "distinct", "returning", "all"}:
            read = self.sides.count("mapped") - (self._word(0) == "insert" and state.target == "mapped")
            side = "mapped" if read > 0 else "other"
        else:
            return
        if side == "mapped":
            self._touch(at, None, "read", "SQL that reads whole rows (*)", side, state)

    def _rows(self, at: int, side: Side, how: str, state: _State) -> None:
        if side == "mapped":
            self._touch(at, None, "write", how, side, state)

    def _touch(self, at: int, column: str | None, access: Access, how: str, side: Side, state: _State) -> None:
        if side == "hole" and column is None:
            return
        if side != "other":
            state.touches.append(Touch(self.tokens[at].offset, column, access, how, side == "mapped"))

    # -- neighbours

    def _table_after(self, at: int) -> tuple[Side, int] | None:
        return next((self._at_table[one] for one in range(at + 1, at + 6) if one in self._at_table), None)

    def _sides_after(self, at: int) -> list[Side]:
        """The tables of one list: of TRUNCATE there may be several."""
        first = next((one for one in range(at + 1, at + 6) if one in self._at_table), None)
        if first is None:
            return []
        found = [self._at_table[first][0]]
        if self._word(at) == "truncate":
            found += [side for place, (side, _) in self._at_table.items() if place > first]
        return found

    def _before(self, at: int) -> str:
        return self.tokens[at - 1].low if at >= 1 else ""

    def _word(self, at: int) -> str:
        token = self.tokens[at] if 0 <= at < len(self.tokens) else None
        return token.low if token and token.kind == "word" else ""

    def _words(self, until: int) -> set[str]:
        return {token.low for token in self.tokens[:until] if token.kind == "word"}

    def _text(self, at: int) -> str:
        return self.tokens[at].text if 0 <= at < len(self.tokens) else ""
