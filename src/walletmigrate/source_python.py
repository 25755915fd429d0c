"""Python sources read by their syntax tree: each place that touches a mapped column, in ORM, Core or SQL."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Iterator
from typing import Final

from walletmigrate.findings import Access, Finding, Ignores, shortened, words
from walletmigrate.source_models import Kind, View, last_name, text_of
from walletmigrate.source_sql import is_sql, read_sql
from walletmigrate.source_types import Imports, Scope, Types

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
_DEFINES: Final = words(
    "Table table Column mapped_column create_table add_column drop_column alter_column create_index "
    "drop_index Index create_check_constraint CheckConstraint UniqueConstraint"
)
_NAMES_TABLE: Final = frozenset({"Table", "table", "create_table", "add_column", "drop_column", "alter_column"})
_NAMES_TABLE_SECOND: Final = frozenset({"create_index", "create_check_constraint", "create_unique_constraint"})
_BULK: Final = frozenset({"bulk_update_mappings", "bulk_insert_mappings"})
_RUNS: Final = frozenset({"execute", "executemany", "scalar", "scalars", "stream", "execute_many", "exec"})
_GROWS: Final = frozenset({"append", "extend", "insert", "update", "setdefault", "add"})
_FRAGMENTS: Final = frozenset(
    {"text", "literal_column", "order_by", "group_by", "where", "filter", "having", "SQL", "column"}
)


class PythonReader(ast.NodeVisitor):
    """Reads one file for one mapped table. It goes through twice: first to learn what names hold, then to tell."""

    def __init__(self, view: View, path: str, module: tuple[str, ...], tree: ast.Module, lines: list[str]) -> None:
        self.view = view
        self.path = path
        self.lines = lines
        self.tree = tree
        self.ignores = Ignores.of(lines)
        self.types = Types(view, Imports.of(tree, module))
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
        scope = self._scopes.setdefault(id(node), Scope(name, outer))
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

    visit_AsyncFunctionDef = visit_FunctionDef  # noqa: N815

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        """Enter a class: what a mapped class, or a mixin of it, says of the column is a definition."""
        for one in (*node.bases, *node.keywords, *node.decorator_list):
            self.visit(one)
        self._classes.append(node.name)
        kind = self.view.resolve(node.name, self._module, None)
        for statement in node.body:
            targets = _targets(statement)
            names = [target.id for target in targets if isinstance(target, ast.Name)]
            hits = [self.names[name] for name in names if name in self.names]
            if hits and isinstance(statement, ast.Assign | ast.AnnAssign) and kind in {Kind.MODEL, Kind.UNKNOWN}:
                self._statements.append(statement)
                self._tell(statement, hits[0], "definition", "mapped attribute", kind is Kind.MODEL)
                self._statements.pop()
            if hits or kind in {Kind.OTHER, Kind.OTHER_MODEL}:
                self._handle_column_names(statement)
        self._body(node.body)
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

    visit_AsyncFor = visit_For  # noqa: N815

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

    visit_ListComp = visit_SetComp = visit_GeneratorExp = visit_DictComp = _comprehension  # noqa: N815

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
            if _is_literal(value):
                scope.literals.add(target.id)
            if target.id in scope.sinks:
                self._write_keys(value, "values of an insert or update", True)

    def _bind_element(self, target: ast.expr, value: ast.expr) -> None:
        kind = self.types.each(value)
        names = [one for one in ast.walk(target) if isinstance(one, ast.Name)]
        for one in names:
            # Of several names nobody knows which one is the row; what is another's stays another's.
            self.types.scope.kinds[one.id] = kind if len(names) == 1 or kind is Kind.OTHER else Kind.UNKNOWN

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
                how = "values of an insert or update"
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
            self._tell_of(Kind.MODEL, node, name, "write", "values of an insert or update")
        else:
            kind = self.types.kind(owner.value if isinstance(owner, ast.Attribute) else owner)
            if kind in {Kind.ROW, Kind.MODEL}:
                self._tell_of(kind, node, name, "write" if stored else "read", "item of a row")
            elif kind is Kind.UNKNOWN and self.knows:
                self._tell_of(kind, node, name, "unknown", "item of what may be a row")

    # -- calls

    def visit_Call(self, node: ast.Call) -> None:
        """Calls that SQLAlchemy, Python or the adapter give a meaning to."""
        name = last_name(node.func) or ""
        self._adapter(node, name)
        if name in _BY_NAME:
            self._by_name(node, *_BY_NAME[name])
        if name in _DEFINES:
            self._define(node, name)
        self._sink(node, name)
        self._keywords(node, name)
        if name == "delete":
            self._delete(node)
        if name in _GROWS and isinstance(node.func, ast.Attribute) and self._in_sink(node.func.value):
            for one in node.args:
                self._write_keys(one, "values of an insert or update", True)
        if name in _NAMES_COLUMNS | {"Index"}:
            self._named(node)
        if name in _FRAGMENTS:
            self._fragments(node)
        if name in _RUNS:
            self._bound_parameters(node)
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
            self._write_keys(value, "values of an insert or update", sure)
            names = set(_names_that_flow(value))
            scope.sinks.update(names)
            made = isinstance(value, ast.Call) and not _is_literal(value)
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
            elif name in {"filter_by", "get_by", "find_by"} and owner is not None:
                self._tell_of(self.types.kind(owner), keyword, keyword.arg, "read", "filter_by(…)")
            elif name == "dict":
                continue  # like a dict that is written out: told where it becomes values
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
        if owner is not None and not node.args:
            kinds.append(self.types.kind(owner))
        if Kind.MODEL in kinds or Kind.ROW in kinds:
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

    def _bound_parameters(self, node: ast.Call) -> None:
        """The names of bound parameters are no columns: ``execute(text(…), {"total_coins": 5})``."""
        if self.types.verb(node.args[0] if node.args else None) in {"insert", "update"}:
            return
        for given in node.args[1:]:
            for one in ast.walk(given):
                if isinstance(one, ast.Dict):
                    self._handled.update(id(key) for key in one.keys)

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
        elif text in self.names and self.knows:
            self._tell(node, self.names[text], "unknown", "named in a string", sure=False)

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
                self.types.scope.name or ".".join(self._classes),
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
            if isinstance(one, ast.Call) and last_name(one.func) in _DEFINES | {"synonym", "composite"}:
                self._handled.update(id(inner) for inner in ast.walk(one) if text_of(inner) in self.names)

    def _knows_table(self) -> bool:
        """Whether the file speaks of the mapped class or table at all: else a bare string means nothing."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Name | ast.Attribute) and self.types.kind(node) in {Kind.MODEL, Kind.ROW}:
                return True
            text = text_of(node)
            if text is not None and self.view.is_table(text):
                return True
        return False


def read_python(view: View, path: str, module: tuple[str, ...], tree: ast.Module, lines: list[str]) -> list[Finding]:
    """What one file does to one mapped table."""
    return PythonReader(view, path, module, tree, lines).read()


def _targets(statement: ast.stmt) -> list[ast.expr]:
    if isinstance(statement, ast.Assign):
        return statement.targets
    return [statement.target] if isinstance(statement, ast.AnnAssign) else []


def _is_literal(value: ast.expr) -> bool:
    """Whether all keys of a dict, or of a list of dicts, are written down."""
    if isinstance(value, ast.Dict):
        return all(key is not None for key in value.keys)
    if isinstance(value, ast.List | ast.Tuple):
        return all(_is_literal(one) for one in value.elts)
    if isinstance(value, ast.ListComp | ast.GeneratorExp):
        return _is_literal(value.elt)
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


def _span(statement: ast.stmt | None, line: int) -> tuple[int, int]:
    """The lines that an ignore comment can stand in: the statement, or the head of one that holds others."""
    if statement is None:
        return line, line
    body = getattr(statement, "body", None)
    last = statement.end_lineno or line
    if isinstance(body, list) and body:
        last = max(body[0].lineno - 1, statement.lineno)
    return (statement.lineno, last) if statement.lineno <= line <= last else (line, line)
