"""What Python sources say of the mapped tables: classes, tables, the names of their attributes, adapters.

Classes and tables are known by their ``__tablename__`` or table name, through all files; nothing is imported.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

_COLUMN_MAKERS: Final = frozenset({"Column", "mapped_column", "deferred", "column_property", "Field", "column"})
_ALIAS_MAKERS: Final = frozenset({"synonym", "composite"})
_ADAPTERS: Final = frozenset({"LegacyBalanceAdapter", "AsyncLegacyBalanceAdapter"})


class Kind(Enum):
    """What an expression stands for: the mapped class, table or a statement on it; a row of it; another's; unknown."""

    MODEL = "model"
    ROW = "row"
    OTHER_MODEL = "other model"
    OTHER = "other"
    UNKNOWN = "unknown"


@dataclass
class Entity:
    """A class or a Table variable. ``columns`` are columns by attribute name, ``members`` all attributes seen.

    ``uses`` are the attributes that a hybrid property touches, by its name; ``table_ref`` is the variable that
    holds the table of the class, ``imported`` where the names of its bases come from; ``has_key``: it has a primary
    key of its own, so that it is no mixin.
    """

    name: str
    module: tuple[str, ...]
    bases: tuple[str, ...] = ()
    is_table: bool = False
    table: str | None = None
    schema: str | None = None
    table_ref: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    members: set[str] = field(default_factory=set)
    uses: dict[str, set[str]] = field(default_factory=dict)
    imported: dict[str, tuple[str, ...]] = field(default_factory=dict)
    has_key: bool = False


@dataclass
class Sources:
    """What all Python files define together. ``adapters`` are names that hold an adapter, ``watched`` the
    attributes that an adapter's ``watch`` was given."""

    entities: dict[str, list[Entity]] = field(default_factory=dict)
    functions: dict[str, set[str]] = field(default_factory=dict)
    adapters: set[str] = field(default_factory=set)
    watched: set[str] = field(default_factory=set)

    def add(self, tree: ast.Module, module: tuple[str, ...]) -> None:
        """Take in one file."""
        nodes = list(ast.walk(tree))
        imported = _imported(nodes)
        for node in nodes:
            if isinstance(node, ast.ClassDef):
                self._keep(_class(node, module, imported))
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                arguments = (*node.args.args, *node.args.kwonlyargs)
                self.functions.setdefault(node.name, set()).update(one.arg for one in arguments)
                self._adapter_names(node)
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                self._assigned(node, module)
        for node in nodes:
            if isinstance(node, ast.Call):
                self._called(node, module)

    def _keep(self, entity: Entity) -> None:
        self.entities.setdefault(entity.name, []).append(entity)

    def _assigned(self, node: ast.Assign | ast.AnnAssign, module: tuple[str, ...]) -> None:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        names = [last_name(target) for target in targets]
        mentions = {last_name(one) for one in ast.walk(node) if isinstance(one, ast.Name | ast.Attribute)}
        if mentions & _ADAPTERS:
            self.adapters.update(name for name in names if name)
        call = node.value
        if isinstance(call, ast.Call) and last_name(call.func) in {"Table", "table"} and names[0]:
            table = text_of(call.args[0]) if call.args else None
            if table is not None:
                self._keep(_table(names[0], module, call, table))
        elif isinstance(call, ast.Attribute) and names[0] and ".classes." in ast.unparse(call):  # automap
            self._keep(Entity(names[0], module, table=call.attr))

    def _adapter_names(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        if node.returns is not None and _mentions_adapter(node.returns):
            self.adapters.add(node.name)
        for argument in (*node.args.args, *node.args.kwonlyargs):
            if argument.annotation is not None and _mentions_adapter(argument.annotation):
                self.adapters.add(argument.arg)

    def _called(self, node: ast.Call, module: tuple[str, ...]) -> None:
        name = last_name(node.func)
        if name in {"map_imperatively", "mapper"} and len(node.args) >= 2:
            entity = next(
                (one for one in self.entities.get(last_name(node.args[0]) or "", ()) if not one.is_table), None
            )
            if entity is None:
                entity = Entity(last_name(node.args[0]) or "", module)
                self._keep(entity)
            entity.table_ref = last_name(node.args[1])
            for keyword in node.keywords:
                if keyword.arg == "properties" and isinstance(keyword.value, ast.Dict):
                    for key, value in zip(keyword.value.keys, keyword.value.values, strict=True):
                        _column_of(entity, text_of(key) or "", value)
        elif name == "watch" and isinstance(node.func, ast.Attribute) and last_name(node.func.value) in self.adapters:
            self.watched.update(one.attr for one in node.args if isinstance(one, ast.Attribute))


def last_name(node: ast.AST | None) -> str | None:
    """The last identifier of a name, an attribute or a call: ``session`` of ``self.session``."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return node.attr
    return last_name(node.func) if isinstance(node, ast.Call) else None


def text_of(node: ast.AST | None) -> str | None:
    """The text of a string constant."""
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def _imported(nodes: Iterable[ast.AST]) -> dict[str, tuple[str, ...]]:
    """Where the names of a file come from."""
    imports = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    return {one.asname or one.name: tuple((node.module or "").split(".")) for node in imports for one in node.names}


def _class(node: ast.ClassDef, module: tuple[str, ...], imported: dict[str, tuple[str, ...]]) -> Entity:
    bases = tuple(name for one in node.bases if (name := last_name(one)))
    entity = Entity(node.name, module, bases)
    # A base written as ``models.User`` comes from the module that the first name stands for.
    entity.imported = {name: imported[name] for name in bases if name in imported}
    entity.imported |= {last_name(one) or "": () for one in node.bases if isinstance(one, ast.Attribute)}
    entity.has_key = any(isinstance(one, ast.keyword) and one.arg == "primary_key" for one in ast.walk(node))
    sqlmodel = any(one.arg == "table" for one in node.keywords)
    if sqlmodel:
        entity.table = node.name.lower()
    for statement in node.body:
        if isinstance(statement, ast.Assign):
            for target in statement.targets:
                _class_name(entity, last_name(target), statement.value, None)
        elif isinstance(statement, ast.AnnAssign):
            annotation = ast.unparse(statement.annotation)
            is_column = annotation.rpartition(".")[2].startswith("Mapped[") or "Mapped[" in annotation or sqlmodel
            _class_name(entity, last_name(statement.target), statement.value, annotation if is_column else None)
        elif isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            _method(entity, statement)
    return entity


def _class_name(entity: Entity, name: str | None, value: ast.expr | None, annotation: str | None) -> None:
    if name is None:
        return
    entity.members.add(name)
    if name == "__tablename__":
        entity.table = text_of(value) or entity.table
    elif name == "__table__":
        if isinstance(value, ast.Call) and value.args:
            entity.table = text_of(value.args[0])
            entity.columns.update(_columns(value.args[1:]))
        else:
            entity.table_ref = last_name(value)
    elif name == "__table_args__" and value is not None:
        entity.schema = _schema(value) or entity.schema
    elif value is not None:
        _column_of(entity, name, value)
        if annotation is not None:
            entity.columns.setdefault(name, name)
    elif annotation is not None:
        entity.columns[name] = name


def _column_of(entity: Entity, name: str, value: ast.expr) -> None:
    """What column an attribute stands for, from the expression that it is given."""
    for node in ast.walk(value):
        if isinstance(node, ast.Attribute) and last_name(node.value) in {"c", "columns"}:
            entity.columns[name] = node.attr
    if not isinstance(value, ast.Call):
        return
    maker = last_name(value.func)
    if maker in _COLUMN_MAKERS:
        inner = next((one for one in ast.walk(value) if _is_named_column(one)), None)
        entity.columns.setdefault(name, (_column_name(inner) if inner else None) or name)
    elif maker in _ALIAS_MAKERS:
        entity.uses[name] = {text for one in ast.walk(value) if (text := text_of(one) or last_name(one))}


def _is_named_column(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and last_name(node.func) in {"Column", "mapped_column", "column"}


def _column_name(call: ast.AST) -> str | None:
    if not isinstance(call, ast.Call):
        return None
    named = next((text_of(one.value) for one in call.keywords if one.arg == "name"), None)
    return named or (text_of(call.args[0]) if call.args else None)


def _method(entity: Entity, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
    entity.members.add(node.name)
    decorators = {last_name(one) for one in node.decorator_list}
    owners = {last_name(one.value) for one in node.decorator_list if isinstance(one, ast.Attribute)}
    attributes = [one for one in ast.walk(node) if isinstance(one, ast.Attribute) and isinstance(one.value, ast.Name)]
    entity.members.update(one.attr for one in attributes if isinstance(one.ctx, ast.Store))
    if node.name == "__tablename__":
        returned = (text_of(one.value) for one in ast.walk(node) if isinstance(one, ast.Return))
        entity.table = next((one for one in returned if one), entity.table)
    elif "declared_attr" in decorators:
        for one in ast.walk(node):
            if isinstance(one, ast.Return) and one.value is not None:
                _column_of(entity, node.name, one.value)
    elif decorators & {"hybrid_property", "hybrid_method"} or owners & entity.uses.keys():
        entity.uses.setdefault(node.name, set()).update(one.attr for one in attributes)


def _table(name: str, module: tuple[str, ...], call: ast.Call, table: str) -> Entity:
    schema, _, bare = table.rpartition(".")
    entity = Entity(name, module, is_table=True, table=bare, schema=schema or _schema(call))
    entity.columns = _columns(call.args[1:])
    return entity


def _columns(arguments: Iterable[ast.expr]) -> dict[str, str]:
    """The columns of a Table by the names under which ``.c`` has them."""
    found = {}
    for call in arguments:
        name = _column_name(call) if _is_named_column(call) else None
        if name and isinstance(call, ast.Call):
            key = next((text_of(one.value) for one in call.keywords if one.arg == "key"), None)
            found[key or name] = name
    return found


def _schema(node: ast.expr) -> str | None:
    """The schema in ``__table_args__`` or in the keywords of a Table."""
    for one in ast.walk(node):
        if isinstance(one, ast.Dict):
            for key, value in zip(one.keys, one.values, strict=True):
                if text_of(key) == "schema":
                    return text_of(value)
        elif isinstance(one, ast.keyword) and one.arg == "schema":
            return text_of(one.value)
    return None


def _mentions_adapter(node: ast.expr) -> bool:
    return any(name in ast.unparse(node) for name in _ADAPTERS)
