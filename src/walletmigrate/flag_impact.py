"""Whom a change of the flags concerns: accounts counted in the database, decided by Flagsmith's own engine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from typing import Any

from sqlalchemy import Connection, text

from walletmigrate import functions
from walletmigrate.census import trait_of
from walletmigrate.config import Mapping, Settings
from walletmigrate.flag_sources import DocumentSnapshot
from walletmigrate.flags import ALL_FLAGS, Decision, Document, Json, Snapshot, Traits
from walletmigrate.schema import quoted

SAMPLE = 10_000


@dataclass(frozen=True)
class FlagImpact:
    """How many accounts get a flag, and how many lose it."""

    flag: str
    on: int
    off: int


@dataclass(frozen=True)
class Impact:
    """What a change of the flags means for a mapping.

    ``accounts`` are the rows of its legacy table, ``changed`` those for which any flag becomes another. The flags are
    counted as they are heard: reads from the ledger count as off without dual-write. The phase is not looked at.
    """

    mapping: str
    accounts: int
    changed: int
    flags: tuple[FlagImpact, ...]


def impact(connection: Connection, settings: Settings, before: Json, after: Json) -> tuple[Impact, ...]:
    """Count, for each mapping, the accounts that ``after`` decides otherwise than ``before``: all of them, exactly.

    Accounts of equal traits are decided together, unless a percentage of accounts decides: then each is, about
    10,000 a second.
    """
    old, new = (Document(content, "a change of flags", lambda _: None) for content in (before, after))
    return tuple(_of_mapping(connection, mapping, old, new) for mapping in settings.mappings)


def rollout(connection: Connection, settings: Settings, snapshot: Snapshot) -> dict[str, float]:
    """For which share of all accounts each flag is on, as it is heard; the phase is not looked at.

    Where a percentage decides account by account, this is an estimate from about `SAMPLE` accounts of each mapping
    (whole blocks of the table, chosen at random); else it is exact. Raises SQLAlchemy's errors.
    """
    on, accounts = dict.fromkeys(ALL_FLAGS, 0.0), 0.0
    document = snapshot.document if isinstance(snapshot, DocumentSnapshot) else None
    if document is None:
        return on
    for mapping in settings.mappings:
        groups = [(document.decide(who, traits), n) for who, traits, n in _sample(connection, mapping, document)]
        seen = sum(count for _, count in groups)
        rows = max(_estimate(connection, mapping), 1.0)
        accounts += rows if seen else 0
        for decision, count in groups:
            for flag, wanted in zip(ALL_FLAGS, astuple(decision), strict=True):
                on[flag] += rows * count / seen if wanted else 0
    return {flag: count / accounts if accounts else 0.0 for flag, count in on.items()}


def _sample(connection: Connection, mapping: Mapping, document: Document) -> Iterator[tuple[str, Traits, int]]:
    rows = _estimate(connection, mapping)
    share = f" tablesample system ({100 * SAMPLE / rows:.6f})" if document.by_identity and rows > SAMPLE else ""
    return _groups(connection, mapping, document, document, share)


def _estimate(connection: Connection, mapping: Mapping) -> float:
    """How many rows the table has, by the statistics; partitions together."""
    query = (
        "select sum(greatest(c.reltuples, 0)) from pg_class as c where c.relkind = 'r' "
        "and (c.oid = cast(:t as regclass) or c.oid in (select relid from pg_partition_tree(cast(:t as regclass))))"
    )
    return float(connection.scalar(text(query), {"t": functions.relation(mapping)}) or 0)


def _of_mapping(connection: Connection, mapping: Mapping, old: Document, new: Document) -> Impact:
    accounts, changed = 0, 0
    on, off = Counter[str](), Counter[str]()
    for identifier, traits, count in _groups(connection, mapping, old, new):
        accounts += count
        first, then = old.decide(identifier, traits), new.decide(identifier, traits)
        changed += count if first != then else 0
        for flag, before, after in _flags(first, then):
            (on if after else off)[flag] += count if before != after else 0
    flags = tuple(FlagImpact(flag, on[flag], off[flag]) for flag in ALL_FLAGS if on[flag] or off[flag])
    return Impact(mapping.name, accounts, changed, flags)


def _flags(first: Decision, then: Decision) -> Iterator[tuple[str, bool, bool]]:
    return zip(ALL_FLAGS, astuple(first), astuple(then), strict=True)


def _groups(
    connection: Connection, mapping: Mapping, old: Document, new: Document, share: str = ""
) -> Iterator[tuple[str, Traits, int]]:
    """Who is decided alike: an identifier that stands for them all, their traits, and how many they are."""
    names = [name for name in mapping.traits if name in {*old.traits, *new.traits}]
    columns = [f"l.{quoted(mapping.traits[name])}" for name in names]
    key, relation = f"l.{quoted(mapping.key)}::text", functions.relation(mapping)
    named = sorted(old.named | new.named)

    def rows(query: str, **parameters: Any) -> Iterator[tuple[str, Traits, int]]:
        found = connection.execute(text(query), parameters, execution_options={"yield_per": 5000})
        for identifier, count, *values in found:
            pairs = zip(names, values, strict=True)
            yield identifier, {name: trait_of(value) for name, value in pairs if value is not None}, count

    each = ", ".join([key, "1", *columns])
    if old.by_identity or new.by_identity:
        yield from rows(f"select {each} from {relation} as l{share}")
        return
    together = ", ".join(["''", "count(*)", *columns])
    grouped = f" group by {', '.join(columns)}" if columns else ""
    yield from rows(f"select {together} from {relation} as l where {key} <> all(:named){grouped}", named=named)
    if named:
        yield from rows(f"select {each} from {relation} as l where {key} = any(:named)", named=named)
