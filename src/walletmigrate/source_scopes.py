"""A file of Python gone through scope by scope: what names hold, and how findings are told."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator

from walletmigrate.findings import Access, Finding, Ignores, shortened, words
from walletmigrate.source_models import Kind, last_name, text_of
from walletmigrate.source_types import Imports, Scope, Types
from walletmigrate.source_view import View

DEFINES = words(
    "Table table Column mapped_column create_table add_column drop_column alter_column create_index "
    "drop_index Index create_check_constraint CheckConstraint UniqueConstraint"
)
VALUES = "values of an insert or update"


class ScopeReader(ast.NodeVisitor):
    """Goes through one file twice for one mapped table: first to learn what names hold, then to tell."""

    def __init__(self, view: View, path: str, module: tuple[str, ...], tree: ast.Module, lines: list[str]) -> None:
        self.view = view
        self.path = path
        self.lines = lines
        self.tree = tree
        self.ignores = Ignores.of(lines)
        self.nodes = list(ast.walk(tree))
        self.types = Types(view, Imports.of(self.nodes, module))
        self.names = {**view.derived, **view.attributes}
        self.knows = self._knows_table()
        self.findings: list[Finding] = []
        self._module = module
        self._classes: list[str] = []
        self._statements: list[ast.stmt] = []
        self._scopes: dict[int, Scope] = {id(tree): self.types.scope}
        self._handled: set[int] = set()
        self._written: set[int] = set()
        self._telling = False

    def read(self) -> list[Finding]:
        """All findings of the file, each place and access once."""
        self.visit(self.tree)
        self._telling = True
        self._handled.clear()
        self.visit(self.tree)
        return list(dict.fromkeys(self.findings))

    def visit(self, node: ast.AST) -> None:
        """Keep the statement at hand: an ignore comment holds for the whole of it."""
        if not isinstance(node, ast.stmt):
            super().visit(node)
            return
        self._statements.append(node)
        super().visit(node)
        self._statements.pop()

    # -- scopes and what names hold

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        """Enter a function: its arguments hold what their annotations say."""
        for one in (*node.decorator_list, *node.args.defaults, *(d for d in node.args.kw_defaults if d)):
            self.visit(one)
        outer = self.types.scope
        name = ".".join([*self._classes, node.name])
        # A method does not see the names of its class.
        above = outer.above if outer.of_class else outer
        scope = self._scopes.setdefault(id(node), Scope(name, above))
        self.types.scope = scope
        arguments = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
        for argument in arguments:
            if argument.annotation is not None:
                scope.kinds.setdefault(argument.arg, self.types.annotated(argument.annotation))
            else:
                scope.kinds.setdefault(argument.arg, Kind.UNKNOWN)
        if self._classes and arguments and arguments[0].arg in {"self", "cls"}:
            own = self.view.resolve(self._classes[-1], self._module, None)
            scope.kinds[arguments[0].arg] = {Kind.MODEL: Kind.ROW, Kind.OTHER_MODEL: Kind.OTHER}.get(own, own)
        self._body(node.body)
        self.types.scope = outer

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        """Enter a class: what a mapped class, or a mixin of it, says of the column is a definition."""
        for one in (*node.bases, *node.keywords, *node.decorator_list):
            self.visit(one)
        self._classes.append(node.name)
        outer = self.types.scope
        name = ".".join(self._classes)
        self.types.scope = self._scopes.setdefault(id(node), Scope(name, outer, of_class=True))
        kind = self.view.resolve(node.name, self._module, None)
        for statement in node.body:
            targets = _targets(statement)
            names = [target.id for target in targets if isinstance(target, ast.Name)]
            hits = [self.names[name] for name in names if name in self.names]
            if hits and isinstance(statement, ast.Assign | ast.AnnAssign) and kind in {Kind.MODEL, Kind.UNKNOWN}:
                self._statements.append(statement)
                self._tell(statement, hits[0], "definition", "mapped attribute", kind is Kind.MODEL)
                self._statements.pop()
            makes_table = last_name(getattr(statement, "value", None)) in {"Table", "table"}
            if hits or (kind in {Kind.OTHER, Kind.OTHER_MODEL} and not makes_table):
                self._handle_column_names(statement)
        self._body(node.body)
        self.types.scope = outer
        self._classes.pop()

    def visit_Module(self, node: ast.Module) -> None:
        """The whole file."""
        self._body(node.body)

    def visit_Lambda(self, node: ast.Lambda) -> None:
        """An argument of a lambda hides what the name holds outside."""
        outer = self.types.scope
        self.types.scope = Scope(outer.name, outer, kinds={one.arg: Kind.UNKNOWN for one in node.args.args})
        self.generic_visit(node)
        self.types.scope = outer

    def visit_Assign(self, node: ast.Assign) -> None:
        """Note what the name now holds."""
        for target in node.targets:
            self._bind(target, node.value)
        self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        """Note what the annotation says."""
        if isinstance(node.target, ast.Name):
            kind = self.types.annotated(node.annotation)
            if node.value is not None:
                self._bind(node.target, node.value)
            if kind is not Kind.UNKNOWN:
                self.types.scope.kinds[node.target.id] = kind
        if node.value is not None:
            self.visit(node.value)
        if not isinstance(node.target, ast.Name):
            self.visit(node.target)

    def visit_For(self, node: ast.For | ast.AsyncFor) -> None:
        """The target of a loop over a query is a row."""
        self._bind_element(node.target, node.iter)
        self.generic_visit(node)

    visit_AsyncFor = visit_For

    def visit_comprehension(self, node: ast.comprehension) -> None:
        """Likewise in a comprehension."""
        self._bind_element(node.target, node.iter)
        self.generic_visit(node)

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        """Note what a name holds after ``:=``."""
        self._bind(node.target, node.value)
        self.generic_visit(node)

    def _comprehension(self, node: ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp) -> None:
        for one in node.generators:
            self.visit(one)
        for field in ("elt", "key", "value"):
            if (inner := getattr(node, field, None)) is not None:
                self.visit(inner)

    visit_ListComp = visit_SetComp = visit_GeneratorExp = visit_DictComp = _comprehension

    def _body(self, statements: Iterable[ast.stmt]) -> None:
        for place, statement in enumerate(statements):
            if place == 0 and isinstance(statement, ast.Expr) and text_of(statement.value) is not None:
                continue  # the docstring
            self.visit(statement)

    def _bind(self, target: ast.expr, value: ast.expr) -> None:
        scope = self.types.scope
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
            for one, part in zip(target.elts, value.elts, strict=True):
                self._bind(one, part)
        elif isinstance(target, ast.Tuple):
            self._bind_element(target, value)
        elif isinstance(target, ast.Name):
            scope.kinds[target.id] = self.types.kind(value)
            if verb := self.types.verb(value):
                scope.verbs[target.id] = verb
            if (text := self.types.text(value)) is not None:
                scope.texts[target.id] = text
            if is_literal(value):
                scope.literals.add(target.id)
            if target.id in scope.sinks:
                self._write_keys(value, VALUES, True)

    def _bind_element(self, target: ast.expr, value: ast.expr) -> None:
        kind = self.types.each(value)
        names = [one for one in ast.walk(target) if isinstance(one, ast.Name)]
        for one in names:
            # Of several names nobody knows which one is the row; what is another's stays another's.
            self.types.scope.kinds[one.id] = kind if len(names) == 1 or kind is Kind.OTHER else Kind.UNKNOWN

    # -- keys that become columns

    def _write_keys(self, value: ast.expr, how: str, sure: bool) -> None:
        for key in _keys(value):
            name = text_of(key)
            if name in self.names:
                self._handled.add(id(key))
                self._tell(key, self.names[name], "write", how, sure)
            elif isinstance(key, ast.Attribute | ast.Subscript):
                self._written.add(id(key))

    # -- telling

    def _tell_of(
        self, kind: Kind, node: ast.AST, name: str, access: Access, how: str, *, watched: bool = False
    ) -> None:
        if kind in {Kind.OTHER, Kind.OTHER_MODEL}:
            return
        adapter = watched and name in self.view.sources.watched
        self._tell(node, self.names[name], access, how, kind is not Kind.UNKNOWN, adapter=adapter)

    def _tell(
        self,
        node: ast.AST,
        column: str | None,
        access: Access,
        how: str,
        sure: bool,
        *,
        adapter: bool = False,
        line: int | None = None,
    ) -> None:
        if not self._telling:
            return
        statement = self._statements[-1] if self._statements else None
        at = line or getattr(node, "lineno", None) or 1
        first, last = _span(statement, at)
        self.findings.append(
            Finding(
                "python",
                self.path,
                at,
                access,
                self.view.wanted.mapping,
                column,
                self.types.scope.name,
                how,
                shortened(self.lines[at - 1]) if at <= len(self.lines) else "",
                sure,
                adapter,
                self.ignores.reason(first, last),
            )
        )

    def _handle_column_names(self, node: ast.AST) -> None:
        """Leave out the names of columns that are given here: they are another table's, or told already."""
        for one in ast.walk(node):
            if isinstance(one, ast.Call) and last_name(one.func) in DEFINES | {"synonym", "composite"}:
                self._handled.update(id(inner) for inner in ast.walk(one) if text_of(inner) in self.names)

    def _knows_table(self) -> bool:
        """Whether the file speaks of the mapped class or table at all: else a bare string means nothing."""
        for node in self.nodes:
            if isinstance(node, ast.Name | ast.Attribute) and self.types.kind(node) in {Kind.MODEL, Kind.ROW}:
                return True
            text = text_of(node)
            if text is not None and self.view.is_table(text):
                return True
        return False


def _targets(statement: ast.stmt) -> list[ast.expr]:
    if isinstance(statement, ast.Assign):
        return statement.targets
    return [statement.target] if isinstance(statement, ast.AnnAssign) else []


def is_literal(value: ast.expr) -> bool:
    """Whether all keys of a dict, or of a list of dicts, are written down."""
    if isinstance(value, ast.Dict):
        return all(key is not None for key in value.keys)
    if isinstance(value, ast.List | ast.Tuple):
        return all(is_literal(one) for one in value.elts)
    if isinstance(value, ast.ListComp | ast.GeneratorExp):
        return is_literal(value.elt)
    if isinstance(value, ast.Call) and last_name(value.func) == "dict":
        return not value.args and all(one.arg for one in value.keywords)
    return False


def _keys(value: ast.expr) -> Iterator[ast.expr]:
    """The keys of the dicts in an expression, the names in ``dict(…)``, the first of each pair."""
    for one in ast.walk(value):
        if isinstance(one, ast.Dict):
            yield from (key for key in one.keys if key is not None)
        elif isinstance(one, ast.Call) and last_name(one.func) == "dict":
            yield from (ast.copy_location(ast.Constant(each.arg), each) for each in one.keywords if each.arg)
        elif isinstance(one, ast.Tuple) and len(one.elts) == 2:
            yield one.elts[0]


def _span(statement: ast.stmt | None, line: int) -> tuple[int, int]:
    """The lines that an ignore comment can stand in: the statement, or the head of one that holds others."""
    if statement is None:
        return line, line
    body = getattr(statement, "body", None)
    last = statement.end_lineno or line
    if isinstance(body, list) and body:
        last = max(body[0].lineno - 1, statement.lineno)
    return (statement.lineno, last) if statement.lineno <= line <= last else (line, line)
