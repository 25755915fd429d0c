"""Calls that SQLAlchemy, Alembic, Python or the adapter give a meaning to."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Final

from walletmigrate.findings import Access, words
from walletmigrate.source_models import Kind, last_name, text_of
from walletmigrate.source_scopes import DEFINES, VALUES, ScopeReader, is_literal
from walletmigrate.source_sql import read_sql
from walletmigrate.source_tokens import is_sql

ADAPTER_WRITES: Final = frozenset({"credit", "debit", "transfer", "set_balance", "reverse", "open_account", "apply"})
ADAPTER_READS: Final = frozenset({"balance", "balances", "balance_at", "history", "watch"})

_BY_NAME: Final[dict[str, tuple[int, Access]]] = {
    "setattr": (1, "write"),
    "set_attribute": (1, "write"),
    "set_committed_value": (1, "write"),
    "delattr": (1, "write"),
    "flag_modified": (1, "write"),
    "getattr": (1, "read"),
    "hasattr": (1, "read"),
    "get_history": (1, "read"),
    "get_attribute": (1, "read"),
}
_NAMES_COLUMNS: Final = words(
    "load_only defer undefer attrgetter itemgetter order_by group_by literal_column column Identifier "
    "validates refresh expire synonym composite association_proxy text having"
)
_NAMES_TABLE: Final = frozenset({"Table", "table", "create_table", "add_column", "drop_column", "alter_column"})
_NAMES_TABLE_SECOND: Final = frozenset({"create_index", "create_check_constraint", "create_unique_constraint"})
_BULK: Final = frozenset({"bulk_update_mappings", "bulk_insert_mappings"})
_RUNS: Final = frozenset({"execute", "executemany", "scalar", "scalars", "stream", "execute_many", "exec"})
_GROWS: Final = frozenset({"append", "extend", "insert", "update", "setdefault", "add"})
_FRAGMENTS: Final = frozenset(
    {"text", "literal_column", "order_by", "group_by", "where", "filter", "having", "SQL", "column"}
)


class CallReader(ScopeReader):
    """Reads calls: values of statements, keywords, attributes and columns named by a string."""

    def visit_Call(self, node: ast.Call) -> None:
        """Calls that SQLAlchemy, Python or the adapter give a meaning to."""
        name = last_name(node.func) or ""
        self._adapter(node, name)
        if name in _BY_NAME:
            self._by_name(node, *_BY_NAME[name])
        if name in DEFINES:
            self._define(node, name)
        self._sink(node, name)
        self._keywords(node, name)
        if name == "delete":
            self._delete(node)
        if name in _GROWS and isinstance(node.func, ast.Attribute) and self._in_sink(node.func.value):
            for one in node.args:
                self._write_keys(one, VALUES, True)
        if name in _NAMES_COLUMNS | {"Index"}:
            self._named(node)
        if name in _FRAGMENTS:
            self._fragments(node)
        self.generic_visit(node)

    def _adapter(self, node: ast.Call, name: str) -> None:
        if not isinstance(node.func, ast.Attribute) or last_name(node.func.value) not in self.view.sources.adapters:
            return
        for verbs, access in ((ADAPTER_WRITES, "write"), (ADAPTER_READS, "read")):
            if name in verbs:
                kind: Access = "write" if access == "write" else "read"
                self._tell(node, None, kind, f"adapter.{name}", sure=True, adapter=True)
        if name == "watch":
            self._handled.update(id(one) for one in node.args if isinstance(one, ast.Attribute))

    def _by_name(self, node: ast.Call, place: int, access: Access) -> None:
        """setattr(user, "total_coins", …) and its kin."""
        if len(node.args) <= place:
            return
        given = node.args[place]
        name = self.types.text(given)
        func = last_name(node.func)
        if name in self.names:
            self._handled.add(id(given))
            kind = self.types.receiver(node.args[0], name)
            self._tell_of(kind, node, name, access, f"{func} by name", watched=func == "setattr")
        elif name is None and access == "write" and self.types.receiver(node.args[0], "") is Kind.ROW:
            self._tell(node, None, "unknown", f"{func}, the name is made at run time", sure=True)

    def _define(self, node: ast.Call, name: str) -> None:
        """Table(…), Column(…) and what Alembic does to them."""
        texts = [text for one in node.args if (text := text_of(one)) is not None]
        ours = any(self.view.is_table(text) for text in texts)
        tables = texts[:1] if name in _NAMES_TABLE else texts[1:2] if name in _NAMES_TABLE_SECOND else []
        if tables and not ours and tables[0] not in self.names:
            self._handled.update(id(one) for one in ast.walk(node) if text_of(one) in self.names)
            return
        for one in ast.walk(node):
            column = text_of(one)
            if column in self.names and id(one) not in self._handled:
                self._handled.add(id(one))
                self._tell(one, self.names[column], "definition", f"{name}(…)", sure=ours)

    def _sink(self, node: ast.Call, name: str) -> None:
        """Calls whose dicts and keywords become values of an INSERT or UPDATE."""
        given = self._values_given(node, name)
        if given is None:
            return
        kind, values = given
        if kind in {Kind.OTHER_MODEL, Kind.OTHER}:
            return
        scope, sure = self.types.scope, kind is not Kind.UNKNOWN
        for value in values:
            self._write_keys(value, VALUES, sure)
            names = set(_names_that_flow(value))
            scope.sinks.update(names)
            made = isinstance(value, ast.Call) and not is_literal(value)
            if made or not names <= scope.literals:
                self._tell(node, None, "unknown", "values are made at run time", sure)

    def _values_given(self, node: ast.Call, name: str) -> tuple[Kind, list[ast.expr]] | None:
        """Whose values a call gives, and the expressions that hold them; None if it gives none."""
        owner = node.func.value if isinstance(node.func, ast.Attribute) else None
        starred = [one.value for one in node.keywords if one.arg is None]
        if name in {"values", "ordered_values"} and owner is not None and (node.args or node.keywords):
            return self.types.receiver(owner, ""), [*node.args, *starred]
        if name in {"on_conflict_do_update", "on_duplicate_key_update"} and owner is not None:
            return self.types.kind(owner), [one.value for one in node.keywords if one.arg in {"set_", None}]
        if name in _BULK and node.args:
            return self.types.kind(node.args[0]), node.args[1:]
        if name in _RUNS and len(node.args) >= 2 and self.types.verb(node.args[0]) in {"insert", "update"}:
            return self.types.kind(node.args[0]), node.args[1:]
        if name == "update" and owner is not None and node.args and self._is_query(owner):
            return self.types.kind(owner), [node.args[0]]
        if self._makes_row(node):
            return Kind.MODEL, starred
        return None

    def _in_sink(self, node: ast.expr) -> bool:
        return isinstance(node, ast.Name) and node.id in self.types.scope.sinks

    def _is_query(self, owner: ast.expr) -> bool:
        """Whether ``.update`` and ``.delete`` of this are a query's, and not a dict's or a session's."""
        return self.types.kind(owner) is Kind.MODEL or self.types.verb(owner) in {"query", "select"}

    def _makes_row(self, node: ast.Call) -> bool:
        return self.types.kind(node.func) is Kind.MODEL and self.types.kind(node) is Kind.ROW

    def _keywords(self, node: ast.Call, name: str) -> None:
        """``User(total_coins=0)``, ``.values(total_coins=…)``, ``.filter_by(total_coins=…)``."""
        for keyword in node.keywords:
            if keyword.arg not in self.names:
                continue
            owner = node.func.value if isinstance(node.func, ast.Attribute) else None
            if self._makes_row(node):
                self._tell(keyword, self.names[keyword.arg], "write", "keyword of the constructor", sure=True)
            elif name in {"values", "ordered_values"} and owner is not None:
                self._tell_of(self.types.receiver(owner, ""), keyword, keyword.arg, "write", "values(…)")
            elif name in _RUNS and node.args and self.types.verb(node.args[0]) in {"insert", "update"}:
                self._tell_of(self.types.kind(node.args[0]), keyword, keyword.arg, "write", VALUES)
            elif name in {"filter_by", "get_by", "find_by"} and owner is not None:
                self._tell_of(self.types.kind(owner), keyword, keyword.arg, "read", "filter_by(…)")
            elif name == "dict" or isinstance(getattr(keyword.value, "value", None), bool):
                continue  # a dict is told where it becomes values; True and False are no amounts
            elif self.types.kind(node) is Kind.UNKNOWN and not self._defined_here(name, keyword.arg):
                how = f"keyword of {name or 'a call'}"
                self._tell(keyword, self.names[keyword.arg], "unknown", how, sure=False)

    def _defined_here(self, name: str, keyword: str) -> bool:
        """Whether the sources hold a function or a class of that name: what it does is found there."""
        entities = self.view.sources.entities.get(name, ())
        return keyword in self.view.sources.functions.get(name, ()) or bool(entities)

    def _delete(self, node: ast.Call) -> None:
        """``delete(User)``, ``query.delete()``, ``session.delete(user)``."""
        owner = node.func.value if isinstance(node.func, ast.Attribute) else None
        kinds = [self.types.receiver(one, "") for one in node.args[:1]]
        rows = owner is not None and not node.args and self.types.kind(owner) is Kind.MODEL
        if rows or Kind.MODEL in kinds or Kind.ROW in kinds:
            self._tell(node, None, "write", "delete of rows", sure=True)

    def _named(self, node: ast.Call) -> None:
        """Column names given as strings: ``load_only("total_coins")``."""
        for one in [*node.args, *(keyword.value for keyword in node.keywords)]:
            name = text_of(one)
            if name in self.names and id(one) not in self._handled:
                self._handled.add(id(one))
                kind = self.types.kind(node.func.value) if isinstance(node.func, ast.Attribute) else Kind.UNKNOWN
                if kind is not Kind.OTHER_MODEL:
                    self._tell_of(kind, node, name, "unknown", f"named to {last_name(node.func)}")

    def _fragments(self, node: ast.Call) -> None:
        """SQL that is no whole statement: ``text("total_coins > 0")``."""
        owner = self.types.kind(node.func.value) if isinstance(node.func, ast.Attribute) else Kind.UNKNOWN
        for one in node.args:
            text = self.types.text(one)
            if text is None or is_sql(text) or text in self.names or id(one) in self._handled:
                continue
            self._handled.update(id(inner) for inner in ast.walk(one))
            for touch in read_sql(text, self.view.wanted, fragment=True):
                if owner is not Kind.OTHER_MODEL and touch.column is not None:
                    self._tell(one, touch.column, "unknown", "part of an SQL statement", owner is Kind.MODEL)


def _names_that_flow(value: ast.expr) -> Iterator[str]:
    """The variables whose dicts an expression passes on."""
    if isinstance(value, ast.Name):
        yield value.id
    elif isinstance(value, ast.Dict):
        for key, inner in zip(value.keys, value.values, strict=True):
            if key is None:
                yield from _names_that_flow(inner)
    elif isinstance(value, ast.List | ast.Tuple):
        for inner in value.elts:
            yield from _names_that_flow(inner)
    elif isinstance(value, ast.ListComp):
        yield from _names_that_flow(value.elt)
