"""What an operator wants of an account: three flags, decided together from one immutable document.

A `Document` is one environment document of Flagsmith's, evaluated by Flagsmith's own engine offline. It never
changes: a source that reads a new document makes a new one and swaps one reference, so that no reader can see
flags which no document ever had. Where documents come from is the business of `walletmigrate.flag_sources`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from typing import Any, Final, Literal, Protocol, TypeAlias

from walletmigrate import flag_shape, flag_trial
from walletmigrate.errors import FlagDocumentInvalid, FlagsMissing, UsageError
from walletmigrate.observe import kind_of

DUAL_WRITE: Final = "wallet.dualWrite"
READ_FROM_LEDGER: Final = "wallet.readFromLedger"
ENABLE_WITHDRAWALS: Final = "wallet.enableWithdrawals"
ALL_FLAGS: Final = (DUAL_WRITE, READ_FROM_LEDGER, ENABLE_WITHDRAWALS)

NO_DOCUMENT: Final = "none"
"""The ``document_id`` of a snapshot that had no document to decide by: everything is off."""

MEMO_SIZE: Final = 50_000
"""Decisions remembered per document; the least recently used is forgotten first."""

Json: TypeAlias = dict[str, Any]
Trait: TypeAlias = str | int | bool
Traits: TypeAlias = Mapping[str, Trait]

# Paths of the evaluation context that depend on who is asked for but on no trait, and on neither.
_IDENTITY_PATHS: Final = frozenset({"$.identity.identifier", "$.identity.key"})
_CONSTANT_PATHS: Final = frozenset({"$.environment.name", "$.environment.key"})


@dataclass(frozen=True, slots=True)
class Decision:
    """What is wanted of one account. It is no more than wanted: states in the database say what is true."""

    dual_write: bool = False
    read_from_ledger: bool = False
    enable_withdrawals: bool = False

    @property
    def guarded(self) -> Decision:
        """The same, but reading from the ledger without writing to it counts as off."""
        if self.read_from_ledger and not self.dual_write:
            return Decision(False, False, self.enable_withdrawals)
        return self


OFF: Final = Decision()


class Snapshot(Protocol):
    """All flags at one moment. Take one per call, and answer every question of the call from it."""

    def decide(self, identifier: str, traits: Traits) -> Decision:
        """What is wanted of account ``identifier`` (its key as text). Never raises, never waits."""
        ...

    @property
    def document_id(self) -> str:
        """Equal for equal documents, in every process; `NO_DOCUMENT` if there is none."""
        ...

    @property
    def needs_traits(self) -> bool:
        """False if no trait can change a decision, so that none need be looked up."""
        ...

    @property
    def source(self) -> str:
        """Where the flags came from, for people; holds no secret."""
        ...

    def age_seconds(self) -> float:
        """Seconds since the source last confirmed the document; it grows during an outage."""
        ...


class FlagSource(Protocol):
    """Gives the snapshot in force. It never waits for a network and never raises."""

    def snapshot(self) -> Snapshot:
        """The flags in force."""
        ...


@dataclass(frozen=True, slots=True)
class FlagNotice:
    """Something an operator should know; told once per document or per outage, not once per call."""

    kind: Literal["read_without_dual_write", "evaluation_failed", "source_problem"]
    source: str
    document_id: str
    detail: str


Report: TypeAlias = Callable[[FlagNotice], None]


def log_notice(notice: FlagNotice) -> None:
    """The default report: one warning to the standard library's logger ``walletmigrate``."""
    logging.getLogger("walletmigrate").warning("flags: %s: %s", notice.source, notice.detail)


def missing_flags(document: Json) -> tuple[str, ...]:
    """Which of `ALL_FLAGS` the document has no default for. Names are case-sensitive."""
    known = set(_names(document))
    return tuple(name for name in ALL_FLAGS if name not in known)


def unknown_flag(name: str, known: tuple[str, ...]) -> UsageError:
    """The error for a flag name that is not among ``known``, with what may have been meant."""
    folded = {flag.casefold(): flag for flag in known}
    close = get_close_matches(name.casefold(), folded, n=1, cutoff=0.5)
    hint = f"Did you mean {folded[close[0]]}?" if close else f"There are {', '.join(known)}."
    return UsageError(f"no flag named {name!r}. {hint} Names are case-sensitive.")


def read_document(body: bytes, source: str) -> Json:
    """Parse ``body`` and check what the decisions rest on. Raises `FlagDocumentInvalid` or `FlagsMissing`."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise FlagDocumentInvalid(source, f"it is not JSON ({error})") from None
    if not isinstance(content, dict):
        raise FlagDocumentInvalid(source, f"it is a JSON {type(content).__name__}, not an object")
    fault = flag_shape.fault(content)
    if fault is not None:
        raise FlagDocumentInvalid(source, fault)
    _check_switches(content, source)
    missing = missing_flags(content)
    if missing:
        raise FlagsMissing(source, missing, _near_names(content, missing))
    return content


class Document:
    """One environment document, immutable and evaluable, with a bounded memory of its decisions.

    Raises `FlagDocumentInvalid` if Flagsmith's engine cannot evaluate ``content``, which `read_document` made.
    """

    def __init__(self, content: Json, source: str, report: Report | None = None) -> None:
        from flagsmith import Flagsmith  # not above: slow to load, and most of a command line decides nothing

        try:
            text = json.dumps(content, sort_keys=True)
            # The client shares parts of what it is given; the text gives it a copy that nobody else holds.
            client = Flagsmith(offline_mode=True, offline_handler=flag_trial.Handler(json.loads(text)))
            scope = _Scope.of(content)
            fault = flag_trial.fault(content, ALL_FLAGS)
        except Exception as error:  # noqa: BLE001 - the engine raises whatever a shape leads it to
            raise _misshapen(source, error) from None
        if fault is not None:
            raise FlagDocumentInvalid(source, fault)
        self.id: Final = hashlib.sha256(text.encode()).hexdigest()[:16]
        self.source: Final = source
        self._text = text
        self._client = client
        self._scope = scope
        self._report = report or log_notice
        self._told = {"read_without_dual_write": threading.Lock(), "evaluation_failed": threading.Lock()}
        self._memo = lru_cache(maxsize=MEMO_SIZE, typed=True)(self._evaluate_named)

    def says(self, content: Json) -> bool:
        """Whether it was made of an equal ``content``."""
        return json.dumps(content, sort_keys=True) == self._text

    @property
    def content(self) -> Json:
        """A copy of the document."""
        content: Json = json.loads(self._text)
        return content

    @property
    def needs_traits(self) -> bool:
        """Whether a trait can change a decision."""
        return self._scope.opaque or bool(self._scope.traits)

    @property
    def traits(self) -> tuple[str, ...]:
        """The traits that decisions look at."""
        return self._scope.traits

    @property
    def named(self) -> frozenset[str]:
        """The identifiers that have an override of their own."""
        return self._scope.named

    @property
    def by_identity(self) -> bool:
        """Whether others than those that are `named` can differ although their traits are equal."""
        return self._scope.opaque or self._scope.by_identity

    def causes(self, identifier: str, traits: Traits) -> dict[str, tuple[bool, str]]:
        """Each flag as the document has it, unguarded, and the engine's word on where that came from."""
        flags = self._client.get_identity_flags(identifier, dict(traits))
        found = {name: flags.get_flag(name) for name in ALL_FLAGS}
        return {name: (flag.enabled, str(getattr(flag, "reason", None) or "")) for name, flag in found.items()}

    @property
    def memoised(self) -> int:
        """How many decisions are remembered, at most `MEMO_SIZE`."""
        return self._memo.cache_info().currsize

    def decide(self, identifier: str, traits: Traits) -> Decision:
        """What the document wants of ``identifier``; what cannot be evaluated counts as off."""
        scope = self._scope
        if scope.opaque:
            return self._evaluate(identifier, traits)
        # Whoever is not named in the document and not split by name shares one decision per set of traits.
        who = identifier if scope.by_identity or identifier in scope.named else ""
        try:
            return self._memo(who, *map(traits.get, scope.traits))
        except TypeError:  # a trait that cannot be hashed cannot be memoised
            return self._evaluate(identifier, traits)

    def _evaluate_named(self, who: str, *values: Trait | None) -> Decision:
        pairs = zip(self._scope.traits, values, strict=True)
        return self._evaluate(who, {name: value for name, value in pairs if value is not None})

    def _evaluate(self, identifier: str, traits: Traits) -> Decision:
        try:
            flags = self._client.get_identity_flags(identifier, dict(traits))
            wanted = Decision(*(flags.is_feature_enabled(name) for name in ALL_FLAGS))
        except Exception as error:  # noqa: BLE001 - no fault in a document may fail a money write
            self._tell("evaluation_failed", f"counts as off, the engine raised {type(error).__name__}")
            return OFF
        if wanted.guarded is not wanted:
            self._tell("read_without_dual_write", f"{READ_FROM_LEDGER} counts as off without {DUAL_WRITE}")
        return wanted.guarded

    def _tell(self, kind: Literal["read_without_dual_write", "evaluation_failed"], detail: str) -> None:
        if self._told[kind].acquire(blocking=False):  # a latch that only one thread ever takes
            tell(self._report, FlagNotice(kind, self.source, self.id, detail))


def tell(report: Report, notice: FlagNotice) -> None:
    """Hand a notice over; a report that fails must not fail a money write."""
    try:
        report(notice)
    except Exception as error:  # noqa: BLE001 - so that it fails none
        logging.getLogger("walletmigrate").debug("a report of flags failed: %s", kind_of(error))


@dataclass(frozen=True, slots=True)
class FixedSnapshot:
    """The same decision for everyone; always as new as can be."""

    decision: Decision
    document_id: str = "static"
    source: str = "static"
    needs_traits: bool = False

    def decide(self, identifier: str, traits: Traits) -> Decision:  # noqa: ARG002 - as the protocol has it
        """``decision``, whoever is asked for."""
        return self.decision

    def age_seconds(self) -> float:
        """Zero: what is fixed does not age."""
        return 0.0


class StaticSource:
    """Flags that stand in the program: for tests, and for adapters that are built from objects."""

    def __init__(self, flags: Decision | Mapping[str, bool] = OFF) -> None:
        self._current = FixedSnapshot(_decision(flags))

    def snapshot(self) -> Snapshot:
        """The flags as last set."""
        return self._current

    def set(self, flags: Decision | Mapping[str, bool]) -> None:
        """Put other flags in force at once. Names that a mapping leaves out are off."""
        self._current = FixedSnapshot(_decision(flags))


def _decision(flags: Decision | Mapping[str, bool]) -> Decision:
    if isinstance(flags, Decision):
        return flags.guarded
    for name in flags:
        if name not in ALL_FLAGS:
            raise unknown_flag(name, ALL_FLAGS)
    return Decision(*(flags.get(name, False) for name in ALL_FLAGS)).guarded


@dataclass(frozen=True, slots=True)
class _Scope:
    """What the decisions of one document can depend on."""

    traits: tuple[str, ...]
    named: frozenset[str]  # identifiers with an override of their own
    by_identity: bool  # a segment looks at the identifier itself
    opaque: bool  # a segment looks at something of which no account can be given: nothing is memoised

    @classmethod
    def of(cls, content: Json) -> _Scope:
        segments = [s for s in content["project"]["segments"] if _ours(s.get("feature_states"))]
        conditions = [c for segment in segments for c in leaf_conditions(segment["rules"])]
        looked_at = {c.get("property_") or "" for c in conditions}
        paths = {name for name in looked_at if name.startswith("$.")}
        split = any(not c.get("property_") and c["operator"] == "PERCENTAGE_SPLIT" for c in conditions)
        overrides = content.get("identity_overrides") or []
        named = frozenset(o["identifier"] for o in overrides if _ours(o["identity_features"]))
        return cls(
            traits=tuple(sorted(looked_at - paths - {""})),
            named=named,
            by_identity=split or bool(paths & _IDENTITY_PATHS) or "" in named,
            opaque=bool(paths - _IDENTITY_PATHS - _CONSTANT_PATHS),
        )


def leaf_conditions(rules: list[Json]) -> Iterator[Json]:
    """Every condition of a segment's rules, however deep."""
    return (condition for _, condition in flag_trial.leaves(rules, "rules"))


def all_states(content: Json) -> Iterator[Json]:
    """Every feature state of a document: defaults, then those of segments and of identities."""
    yield from content["feature_states"]
    for segment in content["project"]["segments"]:
        yield from segment.get("feature_states") or ()
    for override in content.get("identity_overrides") or ():
        yield from override["identity_features"]


def _ours(states: list[Json] | None) -> list[Json]:
    return [state for state in states or () if state["feature"]["name"] in ALL_FLAGS]


def _names(document: Json) -> tuple[str, ...]:
    return tuple(state["feature"]["name"] for state in document["feature_states"])


def _check_switches(content: Json, source: str) -> None:
    # Flagsmith hands on what it finds: the text "false" would be on.
    for state in _ours(list(all_states(content))):
        if not isinstance(state["enabled"], bool):
            name = state["feature"]["name"]
            raise FlagDocumentInvalid(source, f"'enabled' of {name} is {state['enabled']!r}, not true or false")


def _near_names(content: Json, missing: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    # The dashboard lowercases what people type, so the likeliest fault is a name that differs in case alone.
    known = {name.casefold(): name for name in _names(content) if name not in ALL_FLAGS}
    close = [(get_close_matches(name.casefold(), known, n=1, cutoff=0.8), name) for name in missing]
    return tuple((known[found[0]], name) for found, name in close if found)


def _misshapen(source: str, error: Exception) -> FlagDocumentInvalid:
    detail = f"it lacks {error}" if isinstance(error, KeyError) else f"{type(error).__name__}: {error}"
    return FlagDocumentInvalid(source, detail)
