"""What an expression of Python stands for, as far as names, annotations and SQLAlchemy's own verbs show it."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from walletmigrate.findings import words
from walletmigrate.source_models import Kind, last_name, text_of
from walletmigrate.source_tokens import HOLE
from walletmigrate.source_view import View

_TO_ROWS: Final = words(
    "first one one_or_none all get get_one get_or_404 first_or_404 one_or_404 scalar scalar_one "
    "scalar_one_or_none scalars merge fetchone fetchall fetchmany refresh unique partitions mappings"
)
_TO_STATEMENT: Final = words(
    "select query aliased filter filter_by where options with_for_update order_by limit offset join "
    "outerjoin execution_options populate_existing update insert delete values returning "
    "on_conflict_do_update stream execute group_by having distinct with_entities select_from "
    "with_polymorphic stream_scalars alias exec"
)
_VERBS: Final = frozenset({"insert", "update", "delete", "select", "query"})
_SCALARS: Final = words("str int float bool bytes Decimal datetime date timedelta UUID")
_WRAPPERS: Final = words(
    "dict list set tuple Any Optional Union Sequence Iterable Iterator Annotated List Dict Mapping None "
    "type Type Mapped typing t Generator AsyncIterator Collection"
)


@dataclass
class Scope:
    """What one function knows. ``literals`` are names whose dicts are written down here, ``sinks`` names whose
    dicts become values of an INSERT or UPDATE, ``verbs`` the statement that a name holds."""

    name: str
    above: Scope | None = None
    of_class: bool = False
    kinds: dict[str, Kind] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    verbs: dict[str, str] = field(default_factory=dict)
    literals: set[str] = field(default_factory=set)
    sinks: set[str] = field(default_factory=set)

    def kind(self, name: str) -> Kind | None:
        """What a variable holds, here or further out."""
        if name in self.kinds:
            return self.kinds[name]
        return self.above.kind(name) if self.above else None

    def text(self, name: str) -> str | None:
        """The string constant that a name holds."""
        if name in self.texts:
            return self.texts[name]
        return self.above.text(name) if self.above else None

    def verb(self, name: str) -> str:
        """The statement that a name holds: insert, update … or nothing."""
        if name in self.verbs:
            return self.verbs[name]
        return self.above.verb(name) if self.above else ""


@dataclass
class Imports:
    """The names that a file imports: (module, original name); no original name for a module itself."""

    module: tuple[str, ...]
    names: dict[str, tuple[tuple[str, ...], str | None]] = field(default_factory=dict)

    @classmethod
    def of(cls, nodes: Iterable[ast.AST], module: tuple[str, ...]) -> Imports:
        """Collect them, wherever in the file they stand."""
        found = cls(module)
        for node in nodes:
            if isinstance(node, ast.Import):
                for one in node.names:
                    path = tuple(one.name.split("."))
                    found.names[one.asname or path[0]] = (path if one.asname else path[:1], None)
            elif isinstance(node, ast.ImportFrom):
                for one in node.names:
                    found.names[one.asname or one.name] = (tuple((node.module or "").split(".")), one.name)
        return found


class Types:
    """Judges expressions of one file, in the scope at hand."""

    def __init__(self, view: View, imports: Imports) -> None:
        self.view = view
        self.imports = imports
        self.scope = Scope("")

    def kind(self, node: ast.AST | None) -> Kind:
        """What an expression stands for."""
        if isinstance(node, ast.Name):
            return self._name(node.id)
        if isinstance(node, ast.Attribute):
            return self._attribute(node)
        if isinstance(node, ast.Call):
            return self._call(node)
        if isinstance(node, ast.Await | ast.NamedExpr | ast.Starred):
            return self.kind(node.value)
        if isinstance(node, ast.Subscript):
            return self._subscript(node)
        if isinstance(node, ast.IfExp):
            return self._either(node.body, node.orelse)
        return self._either(*node.values) if isinstance(node, ast.BoolOp) else Kind.UNKNOWN

    def receiver(self, node: ast.expr, attribute: str) -> Kind:
        """What the object of an attribute is; by the variable's name where nothing else is known."""
        known = self.kind(node)
        if known is not Kind.UNKNOWN:
            return known
        name = last_name(node)
        return self.view.by_name(name, attribute) if name and name not in {"self", "cls"} else Kind.UNKNOWN

    def annotated(self, annotation: ast.expr) -> Kind:
        """What a variable with this annotation holds."""
        if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
            try:
                annotation = ast.parse(annotation.value, mode="eval").body
            except SyntaxError:
                return Kind.UNKNOWN
        dotted = [one for one in ast.walk(annotation) if isinstance(one, ast.Attribute)]
        within = {id(one.value) for one in dotted}
        names = [one.id for one in ast.walk(annotation) if isinstance(one, ast.Name) and id(one) not in within]
        kinds = {self._class(name) for name in names if name not in _SCALARS | _WRAPPERS}
        kinds |= {self.kind(one) for one in dotted if one.attr not in _SCALARS | _WRAPPERS}
        if Kind.MODEL in kinds:
            as_class = isinstance(annotation, ast.Subscript) and last_name(annotation.value) in {"type", "Type"}
            return Kind.MODEL if as_class else Kind.ROW
        scalar = bool(names) and not kinds and all(name in _SCALARS | {"Optional"} for name in names)
        return Kind.OTHER if (kinds and Kind.UNKNOWN not in kinds) or scalar else Kind.UNKNOWN

    def verb(self, node: ast.AST | None) -> str:
        """The statement that an expression builds: insert, update, delete, select, query, or nothing."""
        if isinstance(node, ast.Name):
            return self.scope.verb(node.id)
        if isinstance(node, ast.Await):
            return self.verb(node.value)
        if not isinstance(node, ast.Call):
            return ""
        inner = self.verb(node.func.value) if isinstance(node.func, ast.Attribute) else ""
        name = last_name(node.func) or ""
        return inner or (name if name in _VERBS else "")

    def each(self, node: ast.expr) -> Kind:
        """What one element of an expression is, when it is gone through."""
        kind = self.kind(node)
        return {Kind.MODEL: Kind.ROW, Kind.OTHER_MODEL: Kind.OTHER}.get(kind, kind)

    def text(self, node: ast.AST | None) -> str | None:
        """The text that an expression makes, with a hole for what is filled in at run time; None if it makes none."""
        if isinstance(node, ast.Constant):
            return node.value if isinstance(node.value, str) else None
        if isinstance(node, ast.JoinedStr):
            return "".join(self._piece(one) for one in node.values)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            parts = [self.text(node.left), self.text(node.right)]
            return None if parts == [None, None] else "".join(HOLE if part is None else part for part in parts)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mod):
            return self.text(node.left)
        if isinstance(node, ast.Call) and last_name(node.func) == "join" and isinstance(node.func, ast.Attribute):
            return self._joined(node, text_of(node.func.value))
        return self.scope.text(node.id) if isinstance(node, ast.Name) else None

    def _joined(self, node: ast.Call, between: str | None) -> str | None:
        if between is None or len(node.args) != 1 or not isinstance(node.args[0], ast.List | ast.Tuple):
            return None
        return between.join(HOLE if (text := self.text(one)) is None else text for one in node.args[0].elts)

    def _piece(self, node: ast.expr) -> str:
        if not isinstance(node, ast.FormattedValue):
            return text_of(node) or ""
        value = node.value
        if isinstance(value, ast.Attribute):
            model = self.kind(value.value) is Kind.MODEL
            if model and value.attr in {"__tablename__", "name", "fullname", "__table__"}:
                return self.view.wanted.table
            if model and (value.attr in self.view.attributes or value.attr == "key"):
                return self.view.attributes.get(value.attr, HOLE)
        found = self.text(value)
        return HOLE if found is None else found

    def _name(self, name: str) -> Kind:
        known = self.scope.kind(name)
        if known is not None:
            return known
        return self._class(name)

    def _class(self, name: str) -> Kind:
        path, original = self.imports.names.get(name, (None, name))
        if original is None:
            return Kind.OTHER  # a module
        return self.view.resolve(original, self.imports.module, path)

    def _attribute(self, node: ast.Attribute) -> Kind:
        if isinstance(node.value, ast.Name) and self.scope.kind(node.value.id) is None:
            path, original = self.imports.names.get(node.value.id, (None, None))
            if path is not None and node.attr in self.view.sources.entities:  # models.User
                return self.view.resolve(node.attr, self.imports.module, (*path, original) if original else path)
        kind = self.kind(node.value)
        if kind in {Kind.MODEL, Kind.OTHER_MODEL}:
            return kind
        if node.attr in self.view.classes:  # app.models.User, row.User
            return Kind.MODEL
        text = text_of(node.value.slice) if isinstance(node.value, ast.Subscript) else None
        return Kind.MODEL if text is not None and self.view.is_table(text) else Kind.UNKNOWN

    def _subscript(self, node: ast.Subscript) -> Kind:
        text = text_of(node.slice)
        if last_name(node.value) == "tables" and text is not None:
            return Kind.MODEL if self.view.is_table(text) else Kind.OTHER_MODEL
        return self.each(node.value)

    def _call(self, node: ast.Call) -> Kind:
        name = last_name(node.func) or ""
        first = text_of(node.args[0]) if node.args else None
        if name in {"Table", "table"} and first is not None:
            return Kind.MODEL if self.view.is_table(first) else Kind.OTHER_MODEL
        if name in {"list", "sorted", "reversed", "iter"} and node.args:
            return self.kind(node.args[0])
        if name in {"next", "cast"} and node.args:
            return self.each(node.args[0])
        made = Kind.UNKNOWN
        if isinstance(node.func, ast.Name) or name in self.view.sources.entities:
            made = self.kind(node.func)
        if made is not Kind.UNKNOWN and name not in _TO_STATEMENT:
            return {Kind.MODEL: Kind.ROW, Kind.OTHER_MODEL: Kind.OTHER}.get(made, made)
        return self._chained(node, name)

    def _chained(self, node: ast.Call, name: str) -> Kind:
        parts = [self.kind(one) for one in node.args]
        if isinstance(node.func, ast.Attribute):
            parts.insert(0, self.kind(node.func.value))
        if Kind.MODEL in parts:
            return Kind.ROW if name in _TO_ROWS else Kind.MODEL
        if Kind.ROW in parts and name in _TO_ROWS:
            return Kind.ROW
        if Kind.OTHER_MODEL in parts:
            return Kind.OTHER if name in _TO_ROWS else Kind.OTHER_MODEL if name in _TO_STATEMENT else Kind.UNKNOWN
        return Kind.OTHER if name in {"items", "values", "copy"} and parts[:1] == [Kind.OTHER] else Kind.UNKNOWN

    def _either(self, *nodes: ast.expr) -> Kind:
        kinds = [self.kind(one) for one in nodes]
        return next((kind for kind in kinds if kind is not Kind.UNKNOWN), Kind.UNKNOWN)
