"""Why one account is read and written where it is: its flags, the ceiling of the phase, the line, its state."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple, dataclass
from decimal import Decimal
from typing import Final, Literal

from sqlalchemy import Connection, text

from walletmigrate.config import Column, Mapping, Settings, key_text
from walletmigrate.errors import InvalidKey, UnknownAccount
from walletmigrate.flag_edits import Override, state_of
from walletmigrate.flag_sources import DocumentSnapshot, DocumentSource
from walletmigrate.flags import (
    ALL_FLAGS,
    DUAL_WRITE,
    ENABLE_WITHDRAWALS,
    READ_FROM_LEDGER,
    Document,
    FlagSource,
    Snapshot,
    Traits,
)
from walletmigrate.functions import relation
from walletmigrate.reads import Balance, read_balance
from walletmigrate.schema import quoted
from walletmigrate.sites import Site, Sites
from walletmigrate.standing import PhaseState, reached, show
from walletmigrate.traits import TraitCache

Target = Literal["legacy", "ledger", "legacy and ledger", "nothing"]

_NEEDS: Final = {DUAL_WRITE: "dual_write", READ_FROM_LEDGER: "read_ledger", ENABLE_WITHDRAWALS: "wallet_only"}
"""The first phase in which a flag is heard."""


@dataclass(frozen=True)
class FlagReason:
    """One flag of one account. ``cause`` is where its value came from; ``heard`` whether it has an effect now, and
    ``why_not`` says, of a flag that is on, what keeps it from having one.
    """

    flag: str
    on: bool
    cause: str
    heard: bool
    why_not: str | None


@dataclass(frozen=True)
class Pocket:
    """One balance of the account. ``state`` is "absent" without a ledger account; balances are in major units."""

    bucket: str
    currency: str
    state: str
    legacy_balance: Decimal | None
    ledger_balance: Decimal | None
    reads: Target
    reads_because: str
    writes: Target
    writes_because: str


@dataclass(frozen=True)
class Explanation:
    """Everything that decides where one account is read and written, and what comes of it."""

    mapping: str
    key: str
    traits: Traits
    source: str
    document_id: str
    problem: str | None
    phase: str
    line_running: bool
    flags: tuple[FlagReason, ...]
    pockets: tuple[Pocket, ...]


def explain(
    connection: Connection, settings: Settings, mapping: Mapping, source: FlagSource, account: str
) -> Explanation:
    """Explain the account with that key, read as the adapter reads it, with the flags that are in force now.

    Raises InvalidKey, and UnknownAccount where there is neither a legacy row nor a ledger account.
    """
    site = Sites(settings.ledger_schema, mapping).at(connection)
    key = _key(site, account)
    state = show(connection, settings)
    traits = TraitCache(mapping).of(connection, site, key, None)
    snapshot = source.snapshot()
    flags = tuple(_flags(snapshot, state, key, traits))
    heard = {flag.flag: flag for flag in flags}
    pockets = tuple(_pocket(connection, settings, site, state, column, key, heard) for column in mapping.columns)
    if not traits and all(pocket.state == "absent" and pocket.writes == "nothing" for pocket in pockets):
        raise UnknownAccount(mapping.name, account)
    problem = source.problem if isinstance(source, DocumentSource) else None
    return Explanation(
        mapping.name,
        key,
        traits,
        snapshot.source,
        snapshot.document_id,
        problem,
        state.phase,
        state.line_running,
        flags,
        pockets,
    )


def known(connection: Connection, settings: Settings, account: str) -> bool:
    """Whether a mapping has an account that its flags are asked for by the text ``account``.

    Looks by key into each legacy table, and into the ledger. Raises InvalidKey where no mapping's key can be that.
    """
    keys: list[str] = []
    refused: list[InvalidKey] = []
    for mapping in settings.mappings:
        site = Sites(settings.ledger_schema, mapping).at(connection)
        try:
            key = _key(site, account)
        except InvalidKey as error:
            refused.append(error)
            continue
        keys.append(key)
        if key == account and _has(connection, site, key):
            return True
    if account in keys or not settings.mappings:
        return False
    raise refused[0] if refused else InvalidKey(settings.mappings[0].name, account, f"it as it is stored, {keys[0]}")


def _key(site: Site, account: str) -> str:
    integer = site.key_type == "integer" and account.removeprefix("-").isdecimal()
    return key_text(int(account) if integer else account, site.key_type, site.mapping.name)


def _has(connection: Connection, site: Site, key: str) -> bool:
    mapping = site.mapping
    row = f"select from {relation(mapping)} where {quoted(mapping.key)} = cast(:own as {site.key_sql_type})"
    held = f"select from {quoted(site.schema)}.accounts where mapping = :mapping and key = :key"
    either = f"exists ({row}) or exists ({held})" if site.installed else f"exists ({row})"
    return bool(connection.scalar(text(f"select {either}"), {"own": key, "key": key, "mapping": mapping.name}))


def _flags(snapshot: Snapshot, state: PhaseState, key: str, traits: Traits) -> Iterator[FlagReason]:
    document = snapshot.document if isinstance(snapshot, DocumentSnapshot) else None
    decided = dict(zip(ALL_FLAGS, astuple(snapshot.decide(key, traits)), strict=True))
    causes = {flag: (on, "fixed by the program") for flag, on in decided.items()}
    if document is not None:
        causes = {flag: (on, _cause(document, flag, said, key)) for flag, (on, said) in _causes(document, key, traits)}
    elif isinstance(snapshot, DocumentSnapshot):
        causes = dict.fromkeys(ALL_FLAGS, (False, "there is no document, so everything is off"))
    for flag in ALL_FLAGS:
        on, cause = causes[flag]
        why_not = _unheard(flag, decided[flag], state) if on else None
        yield FlagReason(flag, on, cause, on and why_not is None, why_not)


def _causes(document: Document, key: str, traits: Traits) -> Iterator[tuple[str, tuple[bool, str]]]:
    yield from document.causes(key, traits).items()


def _cause(document: Document, flag: str, said: str, key: str) -> str:
    """The engine's word, with the rule of the segment that it names."""
    mark = "segment="
    if mark not in said:
        return "what everyone has"
    overrides = state_of(document.content, flag).overrides
    own = [one for one in overrides if one.kind == "account" and one.value == key]
    if own:
        return f"the override of account {key}"
    name = said.partition(mark)[2]
    return f"segment {name}" + next((_rule(one) for one in overrides if one.segment == name), "")


def _rule(override: Override) -> str:
    shown = {"trait": override.value, "percent": f"{override.value} %"}.get(override.kind, "rules of its own")
    return f" ({shown})"


def _unheard(flag: str, decided: bool, state: PhaseState) -> str | None:
    """What keeps a flag that is on from having an effect; None if nothing does."""
    if not state.installed:
        return "the ledger is not installed"
    if not decided:
        return f"{DUAL_WRITE} is off for this account, and without it this counts as off"
    if not reached(state.phase, _NEEDS[flag]):
        return f"the phase is {state.phase}, and lets it count from {_NEEDS[flag]} on"
    if flag != READ_FROM_LEDGER and not state.line_running:
        return "the line is stopped"
    return None


def _pocket(
    connection: Connection,
    settings: Settings,
    site: Site,
    state: PhaseState,
    column: Column,
    key: str,
    flags: dict[str, FlagReason],
) -> Pocket:
    wanted = flags[READ_FROM_LEDGER].heard
    try:
        found = read_balance(connection, settings.ledger_schema, site, column, key, key, wanted, compared=True)
    except UnknownAccount:
        left = _left(connection, settings, site, column, key)
        gone = "there is no legacy row"
        return Pocket(column.bucket, column.currency, left[0], None, left[1], "nothing", gone, "nothing", gone)
    writes, writes_because = _writes(found, state, flags[DUAL_WRITE])
    return Pocket(
        column.bucket,
        column.currency,
        found.state or "absent",
        found.legacy_balance,
        found.ledger_balance,
        "ledger" if found.source == "ledger" else "legacy",
        _reads_because(found, flags[READ_FROM_LEDGER]),
        writes,
        writes_because,
    )


def _left(
    connection: Connection, settings: Settings, site: Site, column: Column, key: str
) -> tuple[str, Decimal | None]:
    """State and balance of an account whose legacy row is gone."""
    row = None
    if site.installed:
        row = connection.execute(
            text(
                f"select state::text, balance from {quoted(settings.ledger_schema)}.accounts where mapping = :mapping "
                "and key = :key and bucket = :bucket and currency = :currency"
            ),
            {"mapping": site.mapping.name, "key": key, "bucket": column.bucket, "currency": column.currency},
        ).one_or_none()
    return ("absent", None) if row is None else (row[0], row[1])


def _reads_because(found: Balance, flag: FlagReason) -> str:
    if found.state == "frozen":
        return "the account is frozen: the ledger alone is true, whatever the flags say"
    if found.source == "ledger":
        return f"{READ_FROM_LEDGER} is on, and the account is mirrored and equal to its legacy row"
    if found.source == "fallback":
        state = "differs from its legacy row" if found.state == "mirrored" else f"is {found.state or 'absent'}"
        return f"{READ_FROM_LEDGER} is on, but the account {state}: legacy answers instead"
    return f"{READ_FROM_LEDGER} is {_unasked(flag)}"


def _writes(found: Balance, state: PhaseState, flag: FlagReason) -> tuple[Target, str]:
    if found.state == "frozen":
        return "ledger", "the account is frozen: the ledger alone is true, and the legacy column rejects writes"
    if not flag.heard:
        after = "; the account turns stale at the next write" if found.state == "mirrored" else ""
        return "legacy", f"{DUAL_WRITE} is {_unasked(flag)}{after}"
    if found.state == "mirrored":
        return "legacy and ledger", f"{DUAL_WRITE} is on, and the account is mirrored"
    if found.state is not None:
        return "legacy and ledger", f"{DUAL_WRITE} is on; the account is {found.state}, and is resynced first"
    if reached(state.phase, "frozen"):
        return "ledger", "the account is absent and the phase is frozen: it is opened frozen"
    return "legacy and ledger", f"{DUAL_WRITE} is on; the account is absent, and is opened first"


def _unasked(flag: FlagReason) -> str:
    return f"on, but {flag.why_not}" if flag.on else f"off ({flag.cause})"
