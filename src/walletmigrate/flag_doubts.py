"""What is doubtful about a flag document: Flagsmith's engine takes it without a word, and nobody can have meant it."""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Iterator
from difflib import get_close_matches
from itertools import combinations, takewhile
from typing import Any, TypeAlias

from walletmigrate.flag_edits import Override, segments, shape, state_of
from walletmigrate.flag_trial import operators, shown, value_of
from walletmigrate.flags import ALL_FLAGS, DUAL_WRITE, READ_FROM_LEDGER, Json, all_states, leaf_conditions

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
    yield from _misspelt(content)
    yield from _unmet(content)
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


def _misspelt(content: Json) -> Iterator[Doubt]:
    """A name beside the right one that only a slip can have made: who switches that switches nothing."""
    for name in dict.fromkeys(state["feature"]["name"] for state in all_states(content)):
        for flag in ALL_FLAGS:
            if name != flag and _slipped(_letters(name), _letters(flag)):
                said = f"{name} stands beside {flag}, and nothing asks for it: names must be spelt exactly so."
                yield said, f"switch {flag} instead, and delete {name}"


def _letters(name: str) -> str:
    return "".join(letter for letter in name.casefold() if letter.isalnum())


def _slipped(name: str, flag: str) -> bool:
    """Whether the two differ by one letter more, less, other or swapped, at most. A number is no slip but a version."""
    for _ in ("from the front", "from the back"):
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(name, flag, strict=False)))
        name, flag = name[same:][::-1], flag[same:][::-1]
    swapped = len(name) == 2 and name == flag[::-1]
    return swapped or (len(name) <= 1 and len(flag) <= 1 and not name.isdecimal())


def _unmet(content: Json) -> Iterator[Doubt]:
    """Conditions that hold for nobody, because the engine passes over what it does not know."""
    ours = [segment for segment in segments(content) if any(_states(segment, flag) for flag in ALL_FLAGS)]
    known = operators() if ours else ()
    for segment in ours:
        for condition in leaf_conditions(segment["rules"]):
            operator, asked = condition["operator"], f"segment {segment['name']} asks for {shown(condition)}"
            if operator not in known:
                meant = get_close_matches(operator.upper(), known, n=1) or [", ".join(known)]
                said = f"{asked}, which holds for nobody: Flagsmith knows no operator {operator}."
                yield said, f"correct the condition in the flag source; the operator can be {meant[0]}"
            elif not _readable(operator, condition["value"]):
                said = f"{asked}, which holds for nobody: Flagsmith cannot read that value."
                yield said, f"correct the condition in the flag source; write {value_of(operator)}"


def _readable(operator: str, value: object) -> bool:
    if operator == "PERCENTAGE_SPLIT":
        return _number(value) >= 0
    if operator == "MODULO":
        parts = str(value).split("|")
        return len(parts) == 2 and not any(math.isnan(_number(part)) for part in parts)
    return True


def _number(value: Any) -> float:
    """As the engine reads it; not a number for what it passes over."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


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
