"""Python sources read by their syntax tree: each place that touches a mapped column, in ORM, Core or SQL."""

from __future__ import annotations

import ast
from collections.abc import Callable

from walletmigrate.findings import Access, Finding
from walletmigrate.source_calls import CallReader
from walletmigrate.source_models import Kind, text_of
from walletmigrate.source_scopes import VALUES
from walletmigrate.source_sql import read_sql
from walletmigrate.source_tokens import is_sql
from walletmigrate.source_view import View


class PythonReader(CallReader):
    """Reads one file for one mapped table: attributes, items and strings, and what calls are."""

    # -- attributes and items

    def visit_Attribute(self, node: ast.Attribute) -> None:
        """``user.total_coins``, ``User.total_coins``, ``users.c.total_coins``."""
        if node.attr in self.names and id(node) not in self._handled:
            owner = node.value
            in_core = isinstance(owner, ast.Attribute) and owner.attr in {"c", "columns"}
            whose = owner.value if isinstance(owner, ast.Attribute) and in_core else owner
            kind = self.types.receiver(whose, node.attr)
            access: Access = "read" if isinstance(node.ctx, ast.Load) and id(node) not in self._written else "write"
            how = "table column" if in_core else "attribute of the class" if kind is Kind.MODEL else "attribute"
            if node.attr in self.view.derived:
                how = f"{how}, through {node.attr}"
            if id(node) in self._written:
                how = VALUES
            self._tell_of(kind, node, node.attr, access, how, watched=not in_core and access == "write")
        self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        """``users.c["total_coins"]``, ``row["total_coins"]``, and keys of a dict that becomes values."""
        name = text_of(node.slice)
        if name in self.names and id(node.slice) not in self._handled:
            self._handled.add(id(node.slice))
            self._item(node, name)
        self.generic_visit(node)

    def _item(self, node: ast.Subscript, name: str) -> None:
        owner = node.value
        stored = not isinstance(node.ctx, ast.Load)
        if isinstance(owner, ast.Attribute) and owner.attr in {"c", "columns"}:
            access: Access = "write" if stored or id(node) in self._written else "read"
            self._tell_of(self.types.receiver(owner.value, name), node, name, access, "table column")
        elif stored and self._in_sink(owner):
            self._tell_of(Kind.MODEL, node, name, "write", VALUES)
        else:
            kind = self.types.kind(owner.value if isinstance(owner, ast.Attribute) else owner)
            if kind in {Kind.ROW, Kind.MODEL}:
                self._tell_of(kind, node, name, "write" if stored else "read", "item of a row")
            elif kind is Kind.UNKNOWN and self.knows:
                self._tell_of(kind, node, name, "unknown", "item of what may be a row")

    # -- strings

    def visit_Constant(self, node: ast.Constant) -> None:
        """A statement in SQL, or the bare name of a column."""
        if isinstance(node.value, str) and id(node) not in self._handled:
            self._text(node, node.value)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """An f-string: what it fills in is a hole, or a constant of this file."""
        text = self.types.text(node)
        if text is not None and id(node) not in self._handled:
            self._text(node, text)
        for one in node.values:
            if isinstance(one, ast.FormattedValue):
                self.visit(one.value)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        """Strings put together with ``+`` and ``%``."""
        text = (
            self.types.text(node) if isinstance(node.op, ast.Add | ast.Mod) and id(node) not in self._handled else None
        )
        if text is not None and is_sql(text):
            self._text(node, text)
            self._handled.update(
                id(one) for one in ast.walk(node) if isinstance(one, ast.Constant | ast.JoinedStr | ast.BinOp)
            )
        self.generic_visit(node)

    def visit_Dict(self, node: ast.Dict) -> None:
        """Keys of a dict are columns only where the dict becomes values, which is told there."""
        for key in node.keys:
            if key is not None and text_of(key) is not None and id(key) not in self._handled:
                self._handled.add(id(key))
        self.generic_visit(node)

    def _text(self, node: ast.expr, text: str) -> None:
        wanted = self.view.wanted
        low = text.lower()
        if is_sql(text) and any(word.lower() in low for word in (*wanted.columns, *wanted.names)):
            places = self._places(node)
            for touch in read_sql(text, wanted):
                line = places(text[: touch.offset], touch.column)
                self._tell(node, touch.column, touch.access, touch.how, touch.sure, line=line)
            return
        table, _, name = text.rpartition(".")
        if name in self.names and self.knows and (not table or self.view.is_table(table)):
            self._tell(node, self.names[name], "unknown", "named in a string", sure=False)

    def _places(self, node: ast.expr) -> Callable[[str, str | None], int]:
        """Where in the source a word of a string stands: the same occurrence of it in the source's lines."""
        first, last = node.lineno, node.end_lineno or node.lineno
        source = [line.lower() for line in self.lines[first - 1 : last]]

        def line_of(before: str, column: str | None) -> int:
            if column is None or first == last:
                return min(first + before.count("\n"), last)
            nth = before.lower().count(column.lower())
            for number, line in enumerate(source, first):
                nth -= line.count(column.lower())
                if nth < 0:
                    return number
            return first

        return line_of


def read_python(view: View, path: str, module: tuple[str, ...], tree: ast.Module, lines: list[str]) -> list[Finding]:
    """What one file does to one mapped table."""
    return PythonReader(view, path, module, tree, lines).read()
