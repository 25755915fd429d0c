"""What is doubtful about a flag document: Flagsmith's engine takes it without a word, and nobody can have meant it."""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Iterator
from itertools import combinations
from typing import TypeAlias

from walletmigrate.flag_edits import Override, segments, shape, state_of
from walletmigrate.flags import ALL_FLAGS, DUAL_WRITE, READ_FROM_LEDGER, Json

Doubt: TypeAlias = tuple[str, str]
"""What is doubtful, and the command or the act that mends it."""

_SET = "walletmigrate flags set"
_REASON = "--reason '…'"


def doubts(content: Json) -> Iterator[str]:
    """Everything that is doubtful, as sentences."""
    return (what for what, _ in doubtful(content))


def doubtful(content: Json) -> Iterator[Doubt]:
    """Everything that is doubtful, each with what mends it."""
    yield from _repeated(content)
    yield from _percentages(content)
    yield from _reads_without_writes(content)
    for flag in ALL_FLAGS:
        yield from _contradictions(content, flag)
        yield from _twice_named(content, flag)


def _repeated(content: Json) -> Iterator[Doubt]:
    names = Counter(state["feature"]["name"] for state in content["feature_states"])
    for name in (name for name in ALL_FLAGS if names[name] > 1):
        yield f"{name} stands in feature_states {names[name]} times; the last one counts.", "delete the others"
    ids = Counter(str(segment["id"]) for segment in segments(content))
    for number in (number for number, count in ids.items() if count > 1):
        said = f"{ids[number]} segments have the id {number}; only the last one counts. Give each its own."
        yield said, "give each segment its own id"


def _percentages(content: Json) -> Iterator[Doubt]:
    splits = [segment for segment in segments(content) if shape(segment)[0] == "percent"]
    names = [segment["name"] for segment in splits if any(_states(segment, flag) for flag in ALL_FLAGS)]
    if len(names) > 1:
        said = f"the percentages {', '.join(names)} pick different accounts. Use one for all flags."
        yield said, f"{_SET} FLAG remove --cohort {shlex.quote(names[-1])} {_REASON}"


def _reads_without_writes(content: Json) -> Iterator[Doubt]:
    writes, reads = state_of(content, DUAL_WRITE), state_of(content, READ_FROM_LEDGER)
    mend = f"{_SET} {DUAL_WRITE} on"
    if reads.default and not writes.default:
        said = f"{READ_FROM_LEDGER} is on for everyone and {DUAL_WRITE} is not: it counts as off without it."
        yield said, f"{mend} --everyone {_REASON}"
    written = {(o.segment, o.value): o.enabled for o in writes.overrides}
    for override in reads.overrides:
        if override.enabled and not written.get((override.segment, override.value), writes.default):
            said = f"{READ_FROM_LEDGER} is on for {_who(override)} and {DUAL_WRITE} is not: it counts as off."
            option = (
                f"--account {shlex.quote(override.value)}"
                if override.kind == "account"
                else f"--cohort {shlex.quote(override.segment)}"
            )
            yield said, f"{mend} {option} {_REASON}"


def _contradictions(content: Json, flag: str) -> Iterator[Doubt]:
    """Off must win over on among cohorts, and a cohort over the percentage; here something says otherwise."""
    found = [(segment, state) for segment in segments(content) for state in _states(segment, flag)]
    for (one, first), (two, second) in combinations(found, 2):
        (kind, *what), (kind_two, *what_two) = shape(one), shape(two)
        if first["enabled"] == second["enabled"] or not {kind, kind_two} <= {"trait", "percent"}:
            continue
        on, off = ((one, first), (two, second)) if first["enabled"] else ((two, second), (one, first))
        if kind == kind_two == "trait" and what == what_two:
            said = f"{flag} is on for segment {on[0]['name']} and off for segment {off[0]['name']}: they are the same"
            yield f"{said} accounts.", f"{_SET} {flag} remove --cohort {shlex.quote(on[0]['name'])} {_REASON}"
        elif kind == kind_two == "trait" and what[0] != what_two[0] and _priority(on[1]) <= _priority(off[1]):
            yield _unheard(flag, off, on)
        elif kind != kind_two:
            trait, percent = (on, off) if shape(on[0])[0] == "trait" else (off, on)
            if _priority(percent[1]) <= _priority(trait[1]):
                yield _unheard(flag, trait, percent)


def _unheard(flag: str, wins: tuple[Json, Json], other: tuple[Json, Json]) -> Doubt:
    name, state = wins[0]["name"], "on" if wins[1]["enabled"] else "off"
    said = f"{flag} is {state} for segment {name}, and the opposite for {other[0]['name']}, which ranks no lower"
    return (
        f"{said}: who is in both may not have it {state}.",
        f"{_SET} {flag} {state} --cohort {shlex.quote(name)} {_REASON}",
    )


def _twice_named(content: Json, flag: str) -> Iterator[Doubt]:
    wanted: dict[str, set[bool]] = {}
    for override in state_of(content, flag).overrides:
        if override.kind == "account":
            wanted.setdefault(override.value, set()).add(override.enabled)
    for account in (account for account, states in wanted.items() if len(states) > 1):
        said = f"{flag} is both on and off for account {account}."
        yield said, f"{_SET} {flag} remove --account {shlex.quote(account)} {_REASON}"


def _states(segment: Json, flag: str) -> list[Json]:
    return [state for state in segment.get("feature_states") or () if state["feature"]["name"] == flag]


def _priority(state: Json) -> float:
    priority = (state.get("feature_segment") or {}).get("priority")
    return math.inf if priority is None else float(priority)


def _who(override: Override) -> str:
    return f"account {override.value}" if override.kind == "account" else f"segment {override.segment}"
