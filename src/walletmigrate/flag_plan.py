"""What calls lead from one state of the flags on a server to another, and in which order.

Where one call does not suffice, nobody gets a flag that was not asked for: what makes nobody a difference comes
first, what switches comes next, tidying comes last.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Final

from walletmigrate.flag_api import AdminApi
from walletmigrate.flag_edits import default, segments, shape, state_of
from walletmigrate.flags import ALL_FLAGS, Json, leaf_conditions

AGAIN: Final = "run the same command again"


@dataclass(frozen=True, slots=True)
class Step:
    """One call of a change. ``counts`` is False for what makes nobody a difference; ``mend`` does it later."""

    what: str
    do: Callable[[], None]
    mend: str = AGAIN
    undo: Callable[[], None] | None = None
    counts: bool = True


class Plan:
    """The calls that lead from one document to the other."""

    def __init__(self, api: AdminApi, before: Json, after: Json) -> None:
        self._api = api
        self._before = before
        self._after = after
        self._environment: str = before["api_key"]
        self._project = int(before["project"]["id"])
        self._ids: dict[int, int] = {}
        """Ids on the server of segments that the edit made under a number of its own."""

    def steps(self) -> Iterator[Step]:
        """The calls in order."""
        yield from self._segments()
        flips = [self._flip(flag) for flag in ALL_FLAGS]
        yield from (step for switched, _ in flips for step in switched)
        for flag in ALL_FLAGS:
            yield from self._accounts(flag)
        yield from (step for _, tidied in flips for step in tidied)

    def _segments(self) -> Iterator[Step]:
        known = {segment["id"]: segment for segment in segments(self._before)}
        for segment in segments(self._after):
            number, name = segment["id"], segment["name"]
            if number not in known:
                yield Step(f"make segment {name}", partial(self._make, segment), counts=False)
            elif segment["rules"] != known[number]["rules"]:
                wanted, stood = (shape(one)[2] for one in (segment, known[number]))
                what = f"move segment {name} from {stood} to {wanted} percent"
                yield Step(
                    what, partial(self._move, number, wanted, what), undo=partial(self._move, number, stood, "undo it")
                )

    def _make(self, segment: Json) -> None:
        rules = [renamed(rule, "property_", "property") for rule in segment["rules"]]
        what = f"make segment {segment['name']}"
        self._ids[segment["id"]] = self._api.make_segment(self._project, segment["name"], rules, what)

    def _move(self, number: int, percent: str, what: str) -> None:
        body = self._api.segment(self._project, number)
        next(leaf_conditions(body["rules"]))["value"] = percent
        self._api.replace_segment(self._project, number, body, what)

    def _flip(self, flag: str) -> tuple[list[Step], list[Step]]:
        """One call that switches, and those that end overrides which it has made meaningless."""
        feature, enabled = feature_of(self._before, flag), default(self._after, flag)["enabled"]
        names = {segment["id"]: segment["name"] for one in (self._before, self._after) for segment in segments(one)}
        before, after = dict(overrides(self._before, flag)), dict(overrides(self._after, flag))
        ended = [number for number in before if number not in after]
        changed = {number: state for number, state in after.items() if before.get(number) != state}
        changes: dict[int, Json] = {
            number: {"enabled": state["enabled"], "priority": state["feature_segment"]["priority"]}
            for number, state in changed.items()
        }
        flipped = default(self._before, flag)["enabled"] != enabled
        if flipped or len(ended) > 1:
            # All at once what everyone shall have now; the overrides themselves are removed one by one.
            changes |= {number: {"enabled": enabled} for number in ended if before[number]["enabled"] != enabled}
        told = [f"{_word(enabled)} for everyone"] if flipped else []
        told += [f"{_word(change['enabled'])} for {names[number]}" for number, change in changes.items()]
        what = f"switch {flag} {', '.join(told)}"
        switched = [Step(what, partial(self._patch, feature, enabled if flipped else None, changes, what))]
        return (switched if told else []), [self._end(flag, feature, number, names[number]) for number in ended]

    def _patch(self, feature: int, enabled: bool | None, changes: dict[int, Json], what: str) -> None:
        body: Json = {} if enabled is None else {"environment_default": {"enabled": enabled}}
        if changes:
            body["segment_overrides"] = [
                {"segment": {"id": self._ids.get(number, number)}, **change} for number, change in changes.items()
            ]
        self._api.set_flag(self._environment, feature, body, what)

    def _end(self, flag: str, feature: int, number: int, name: str) -> Step:
        what = f"end the override of {flag} for {name}"
        drop = partial(self._api.drop_override, self._environment, feature, number, what)
        return Step(what, drop, _command(flag, "remove", "--cohort", name))

    def _accounts(self, flag: str) -> Iterator[Step]:
        feature = feature_of(self._before, flag)
        before, after = _accounts(self._before, flag), _accounts(self._after, flag)
        for account in sorted(before.keys() | after.keys()):
            enabled = after.get(account)
            if before.get(account) == enabled:
                continue
            if enabled is None:
                what = f"end the override of {flag} for account {account}"
                drop = partial(self._api.drop_account, self._environment, account, feature, what)
                yield Step(what, drop, _command(flag, "remove", "--account", account))
            else:
                what = f"switch {flag} {_word(enabled)} for account {account}"
                switch = partial(self._api.override_account, self._environment, account, feature, enabled, what)
                yield Step(what, switch, _command(flag, _word(enabled), "--account", account))


def overrides(content: Json, flag: str) -> list[tuple[int, Json]]:
    """The flag's overrides by segment, the first to be heard first."""
    found = [
        (segment["id"], state)
        for segment in segments(content)
        for state in segment["feature_states"]
        if state["feature"]["name"] == flag
    ]
    return sorted(found, key=lambda one: (one[1]["feature_segment"]["priority"], one[0]))


def feature_of(content: Json, flag: str) -> int:
    """The flag's id on the server."""
    return int(default(content, flag)["feature"]["id"])


def renamed(rule: Json, old: str, new: str) -> Json:
    """A rule in which conditions call their trait by another name: document and Admin API differ there."""
    conditions = [
        {"operator": one["operator"], new: one.get(old), "value": one["value"]} for one in rule.get("conditions") or ()
    ]
    rules = [renamed(inner, old, new) for inner in rule.get("rules") or ()]
    return {"type": rule["type"], "rules": rules, "conditions": conditions}


def _accounts(content: Json, flag: str) -> dict[str, bool]:
    overrides = state_of(content, flag).overrides
    return {override.value: override.enabled for override in overrides if override.kind == "account"}


def _command(flag: str, switch: str, option: str, value: str) -> str:
    return f"walletmigrate flags set {flag} {switch} {option} {shlex.quote(value)} --reason '…'"


def _word(enabled: bool) -> str:
    return "on" if enabled else "off"
