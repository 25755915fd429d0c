"""The sources as one mapped table sees them: which classes are its own, and what names its columns go by."""

from __future__ import annotations

import re
from collections.abc import Iterator

from walletmigrate.findings import Wanted
from walletmigrate.source_models import Entity, Kind, Sources


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
        """What a file must contain one of, as a word, to be worth reading."""
        return {*self.attributes, *self.derived, *self.classes, *self.wanted.names}

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


def _within(part: tuple[str, ...], whole: tuple[str, ...]) -> bool:
    """Whether a dotted path stands somewhere in another: ``app.models`` in ``src.app.models.user``."""
    return any(whole[at : at + len(part)] == part for at in range(len(whole) - len(part) + 1))


def _plain(identifier: str) -> str:
    """A variable's or class's name without underscores, numbers, case and plural."""
    return re.sub(r"[\d_]", "", identifier).lower().removesuffix("s")
