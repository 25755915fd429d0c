"""What Python sources say of the mapped tables: classes, tables, the names of their attributes, adapters.

Classes and tables are known by their ``__tablename__`` or table name, through all files; nothing is imported.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from walletmigrate.findings import Wanted

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
        imported = _imported(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                self._keep(_class(node, module, imported))
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                arguments = (*node.args.args, *node.args.kwonlyargs)
                self.functions.setdefault(node.name, set()).update(one.arg for one in arguments)
                self._adapter_names(node)
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                self._assigned(node, module)
        for node in ast.walk(tree):
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


class View:
    """The sources as one mapped table sees them: whose an entity is, and what names its columns go by."""

    def __init__(self, sources: Sources, wanted: Wanted) -> None:
        self.sources = sources
        self.wanted = wanted
        self._kinds: dict[int, Kind] = {}
        self.attributes: dict[str, str] = {column: column for column in wanted.columns}
        self.derived: dict[str, str] = {}
        self._above = self._ancestors()
        for entity in self._all():
            if self._own(entity) in {Kind.MODEL, Kind.UNKNOWN}:
                for name, column in entity.columns.items():
                    if column in wanted.columns:
                        self.attributes[name] = column
        for entity in self._all():
            if self.kind(entity) is Kind.MODEL:
                for name, used in entity.uses.items():
                    if name not in self.attributes and (hit := used & self.attributes.keys()):
                        self.derived[name] = self.attributes[min(hit)]
        self.classes = {one.name for one in self._all() if self.kind(one) is Kind.MODEL}
        self._words = self._word_index()

    def kind(self, entity: Entity) -> Kind:
        """MODEL, OTHER_MODEL, OTHER; UNKNOWN for a mixin or base class of the mapped class."""
        kind = self._own(entity)
        return Kind.UNKNOWN if kind is not Kind.MODEL and id(entity) in self._above else kind

    def _own(self, entity: Entity) -> Kind:
        if id(entity) not in self._kinds:
            self._kinds[id(entity)] = Kind.OTHER  # against circles
            self._kinds[id(entity)] = self._judge(entity)
        return self._kinds[id(entity)]

    def resolve(self, name: str, module: tuple[str, ...], origin: tuple[str, ...] | None) -> Kind:
        """What a class's or table's name stands for in a module; ``origin`` is where it was imported from."""
        found = self.sources.entities.get(name, [])
        if origin is None:
            found = [one for one in found if one.module == module] or found
        else:
            found = [one for one in found if _within(origin, one.module)] or found
        kinds = {self.kind(one) for one in found}
        order = (Kind.MODEL, Kind.UNKNOWN, Kind.OTHER_MODEL, Kind.OTHER)
        return next((kind for kind in order if kind in kinds), Kind.UNKNOWN)

    def by_name(self, identifier: str, attribute: str) -> Kind:
        """A guess from a variable's name: ``invoice`` is an Invoice, if that has the attribute."""
        for word in (identifier, identifier.rpartition("_")[2]):
            for kind, members in self._words.get(_plain(word), ()):
                if kind is Kind.ROW or attribute in members:
                    return kind
        return Kind.UNKNOWN

    def words(self) -> set[str]:
        """What a file must contain one of, in lower case, to be worth reading."""
        tables = {name.lower() for name in self.wanted.names}
        return {one.lower() for one in (*self.attributes, *self.derived, *self.classes)} | tables

    def is_table(self, name: str) -> bool:
        """Whether a string names the mapped table, with or without its schema."""
        schema, _, table = name.rpartition(".")
        return table in self.wanted.names and schema in {"", self.wanted.schema}

    def _all(self) -> Iterator[Entity]:
        for found in self.sources.entities.values():
            yield from found

    def _ancestors(self) -> set[int]:
        """The classes that a mapped class inherits from, by identity."""
        above: set[int] = set()
        ahead = [entity for entity in self._all() if self._own(entity) is Kind.MODEL]
        while ahead:
            entity = ahead.pop()
            for base in entity.bases:
                new = [one for one in self._bases(base, entity) if id(one) not in above]
                above.update(id(one) for one in new)
                ahead += new
        return above

    def _judge(self, entity: Entity) -> Kind:
        table = self._table_entity(entity)
        fits = table is not None and table.schema in {None, self.wanted.schema} and table.table in self.wanted.names
        kinds = [self._base(base, entity) for base in entity.bases]
        if fits or Kind.MODEL in kinds:  # a subclass, with a table of its own or without, has its parent's columns
            return Kind.MODEL
        if table is not None:
            return Kind.OTHER_MODEL
        if entity.columns and self._fits_by_name(entity):
            return Kind.MODEL
        if not entity.has_key and any(column in self.wanted.columns for column in entity.columns.values()):
            return Kind.UNKNOWN  # a mixin: whose it becomes is said elsewhere
        return Kind.OTHER_MODEL if entity.columns or Kind.OTHER_MODEL in kinds else Kind.OTHER

    def _table_entity(self, entity: Entity) -> Entity | None:
        if entity.table is not None:
            return entity
        tables = self.sources.entities.get(entity.table_ref or "", ())
        return next((one for one in tables if one.is_table), None)

    def _base(self, name: str, entity: Entity) -> Kind:
        kinds = [self._own(one) for one in self._bases(name, entity)]
        return Kind.MODEL if Kind.MODEL in kinds else kinds[0] if kinds else Kind.OTHER

    def _bases(self, name: str, entity: Entity) -> list[Entity]:
        """The classes that a base class's name may mean: of the same file, else of wherever it came from."""
        found = [one for one in self.sources.entities.get(name, []) if one is not entity]
        path = entity.imported.get(name)
        if path is not None:
            return [one for one in found if _within(path, one.module)] or found
        return [one for one in found if one.module == entity.module]

    def _fits_by_name(self, entity: Entity) -> bool:
        """A class whose table name is made by its base: Flask-SQLAlchemy, SQLModel, a declared_attr."""
        snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", entity.name).lower()
        names = {snake, entity.name.lower(), f"{snake}s", f"{entity.name.lower()}s"}
        mapped = any(column in self.wanted.columns for column in entity.columns.values())
        return mapped and bool(names & self.wanted.names)

    def _word_index(self) -> dict[str, list[tuple[Kind, set[str]]]]:
        index: dict[str, list[tuple[Kind, set[str]]]] = {}
        for entity in self._all():
            kind = self.kind(entity)
            told = {Kind.MODEL: Kind.ROW, Kind.OTHER_MODEL: Kind.OTHER, Kind.OTHER: Kind.OTHER}.get(kind)
            if told is not None:
                index.setdefault(_plain(entity.name), []).append((told, entity.members | set(entity.columns)))
        for found in index.values():
            found.sort(key=lambda one: one[0] is not Kind.ROW)
        return index


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


def _imported(tree: ast.Module) -> dict[str, tuple[str, ...]]:
    """Where the names of a file come from."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return {one.asname or one.name: tuple((node.module or "").split(".")) for node in nodes for one in node.names}


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


def _within(part: tuple[str, ...], whole: tuple[str, ...]) -> bool:
    """Whether a dotted path stands somewhere in another: ``app.models`` in ``src.app.models.user``."""
    return any(whole[at : at + len(part)] == part for at in range(len(whole) - len(part) + 1))


def _plain(identifier: str) -> str:
    """A variable's or class's name without underscores, numbers, case and plural."""
    return re.sub(r"[\d_]", "", identifier).lower().removesuffix("s")
