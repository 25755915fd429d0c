"""Flags on a Flagsmith server as something to edit, through its Admin API.

An edit is made on the document, as with the file; what differs afterwards becomes calls. Where one call does not
suffice, the order is such that nobody has a flag that was not asked for: what makes nobody a difference comes first,
what switches comes next, tidying comes last.
"""

from __future__ import annotations

import copy
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Final, NoReturn

from walletmigrate.errors import (
    FlagChangeIncomplete,
    FlagDocumentInvalid,
    FlagServerRefused,
    FlagSourceUnreachable,
)
from walletmigrate.flag_api import AdminApi, NotKnown
from walletmigrate.flag_editor import Edit, FlagEditor
from walletmigrate.flag_edits import FlagState, default, new_state, segments, shape, state_of
from walletmigrate.flags import ALL_FLAGS, Document, Json, leaf_conditions

AGAIN: Final = "run the same command again"


@dataclass(frozen=True, slots=True)
class Step:
    """One call of a change. ``counts`` is False for what makes nobody a difference; ``mend`` does it later."""

    what: str
    do: Callable[[], None]
    mend: str = AGAIN
    undo: Callable[[], None] | None = None
    counts: bool = True


class FlagAdmin(FlagEditor):
    """The flags of one environment on a Flagsmith server. Raises `ConfigError` for an address that is none.

    A segment belongs to the whole project: a cohort's is shared with other environments, whose flags it does not
    touch; the percentage's is made for one environment, since moving it would move the others'.
    """

    def __init__(self, api_url: str, environment_key: str, admin_key: str, timeout_seconds: float = 5.0) -> None:
        self._api = AdminApi(api_url, environment_key, admin_key, timeout_seconds)
        self.name = self._api.name

    def read(self) -> Json:
        """The document, with defaults and cohorts as the Admin API has them: it is not cached."""
        content = self._api.document()
        try:
            environment, project = content["api_key"], int(content["project"]["id"])
            for listed in self._api.segments(project):
                _put_segment(content, listed)
            for flag in ALL_FLAGS:
                _put_flag(content, flag, self._api.flag(environment, _feature(content, flag)))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FlagDocumentInvalid(self.name, f"the Admin API answers otherwise than known ({error!r})") from None
        _leave_others_percentages(content)
        return content

    def apply(self, edit: Edit, *, dry_run: bool) -> tuple[Json, Json]:
        """Edit the flags on the server: wholly, or not at all, or `FlagChangeIncomplete` says what was done."""
        before = self.read()
        after = copy.deepcopy(before)
        edit(after)
        _settle(before, after)
        Document(after, self.name)
        if before != after and not dry_run:
            self._carry_out(list(_Plan(self._api, before, after).steps()), before, after)
        return before, after

    def _carry_out(self, steps: list[Step], before: Json, after: Json) -> None:
        for place, step in enumerate(steps):
            try:
                step.do()
            except (FlagSourceUnreachable, FlagServerRefused) as error:
                if isinstance(error, NotKnown) and self._states() == _states(after):
                    return  # the answer was lost, and the last call that counts had been carried out
                self._give_up(steps, place, error, before)

    def _give_up(self, steps: list[Step], place: int, error: Exception, before: Json) -> NoReturn:
        """Undo what was done, or say what it is."""
        done = [step for step in steps[:place] if step.counts]
        incomplete = FlagChangeIncomplete(
            self.name, str(error), [step.what for step in done], [(step.what, step.mend) for step in steps[place:]]
        )
        if not all(step.undo for step in done):
            raise incomplete from error
        try:
            for step in reversed(done):
                if step.undo:
                    step.undo()
        except (FlagSourceUnreachable, FlagServerRefused) as again:
            incomplete.add_note(f"undoing it failed, too: {again}")
            raise incomplete from error
        if isinstance(error, NotKnown):
            if self._states() != _states(before):
                raise incomplete from error
            error.add_note("looked at again, nothing was changed; look once more: walletmigrate flags list")
        elif done:
            error.add_note("what was done before that was undone")
        raise error

    def _states(self) -> set[tuple[object, ...]] | None:
        try:
            return _states(self.read())
        except (FlagSourceUnreachable, FlagServerRefused, FlagDocumentInvalid):
            return None


class _Plan:
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
        rules = [_renamed(rule, "property_", "property") for rule in segment["rules"]]
        what = f"make segment {segment['name']}"
        self._ids[segment["id"]] = self._api.make_segment(self._project, segment["name"], rules, what)

    def _move(self, number: int, percent: str, what: str) -> None:
        body = self._api.segment(self._project, number)
        next(leaf_conditions(body["rules"]))["value"] = percent
        self._api.replace_segment(self._project, number, body, what)

    def _flip(self, flag: str) -> tuple[list[Step], list[Step]]:
        """One call that switches, and those that end overrides which it has made meaningless."""
        feature, enabled = _feature(self._before, flag), default(self._after, flag)["enabled"]
        names = {segment["id"]: segment["name"] for one in (self._before, self._after) for segment in segments(one)}
        before, after = dict(_overrides(self._before, flag)), dict(_overrides(self._after, flag))
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
        feature = _feature(self._before, flag)
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


def _put_segment(content: Json, listed: Json) -> None:
    """A segment as the project has it now; one that no flag uses may be missing from the document."""
    rules = [_renamed(rule, "property", "property_") for rule in listed["rules"]]
    for segment in segments(content):
        if str(segment["id"]) == str(listed["id"]):
            segment |= {"name": listed["name"], "rules": rules}
            return
    segments(content).append({"id": listed["id"], "name": listed["name"], "rules": rules, "feature_states": []})


def _put_flag(content: Json, flag: str, state: Json) -> None:
    default(content, flag)["enabled"] = state["environment_default"]["enabled"]
    overrides = {one["segment"]["id"]: one for one in state["segment_overrides"]}
    for segment in segments(content):
        others = [one for one in segment.get("feature_states") or () if one["feature"]["name"] != flag]
        override = overrides.pop(segment["id"], None)
        if override is not None:
            others.append(new_state(content, flag, override["enabled"], {"priority": override["priority"]}))
        segment["feature_states"] = others
    if overrides:
        raise KeyError(f"segment {next(iter(overrides))}")


def _leave_others_percentages(content: Json) -> None:
    """Take out percentages that this environment does not use: they may be another's, and must not move with ours."""
    suffix = _suffix(content)
    content["project"]["segments"] = [
        segment
        for segment in segments(content)
        if shape(segment)[0] != "percent" or segment["feature_states"] or segment["name"].endswith(suffix)
    ]


def _settle(before: Json, after: Json) -> None:
    """Make of an edit what the server can hold: names of its own environment, and distinct priorities."""
    known = {segment["id"] for segment in segments(before)}
    for segment in segments(after):
        if segment["id"] not in known and shape(segment)[0] == "percent":
            segment["name"] += _suffix(after)
    for flag in ALL_FLAGS:
        _rank(before, after, flag)


def _rank(before: Json, after: Json, flag: str) -> None:
    """Give an override that was switched its place among the others, which keep their order."""
    stood, wanted = _overrides(before, flag), dict(_overrides(after, flag))
    switched = [number for number, state in wanted.items() if dict(stood).get(number) != state]
    if not switched:
        return
    ranks = {
        segment["id"]: _rank_of(segment, wanted[segment["id"]])
        for segment in segments(after)
        if segment["id"] in wanted
    }
    order = [number for number, _ in stood if number in wanted and number not in switched]
    for number in switched:
        behind = (place for place, other in enumerate(order) if ranks[other] > ranks[number])
        order.insert(next(behind, len(order)), number)
    priorities = [state["feature_segment"]["priority"] for _, state in stood]
    if order != [number for number, _ in stood] or priorities != sorted(set(priorities)):
        priorities = list(range(len(order)))
    for number, priority in zip(order, priorities, strict=True):
        wanted[number]["feature_segment"]["priority"] = priority


def _rank_of(segment: Json, state: Json) -> int:
    """Among cohorts off wins over on, and both over the percentage."""
    return 2 if shape(segment)[0] == "percent" else int(state["enabled"])


def _overrides(content: Json, flag: str) -> list[tuple[int, Json]]:
    """The flag's overrides by segment, the first to be heard first."""
    found = [
        (segment["id"], state)
        for segment in segments(content)
        for state in segment["feature_states"]
        if state["feature"]["name"] == flag
    ]
    return sorted(found, key=lambda one: (one[1]["feature_segment"]["priority"], one[0]))


def _accounts(content: Json, flag: str) -> dict[str, bool]:
    overrides = state_of(content, flag).overrides
    return {override.value: override.enabled for override in overrides if override.kind == "account"}


def _states(content: Json) -> set[tuple[object, ...]]:
    """What the document says of our flags, whatever the order."""
    found: list[FlagState] = [state_of(content, flag) for flag in ALL_FLAGS]
    overrides = {(state.flag, override) for state in found for override in state.overrides}
    return {(state.flag, state.default) for state in found} | overrides


def _feature(content: Json, flag: str) -> int:
    return int(default(content, flag)["feature"]["id"])


def _suffix(content: Json) -> str:
    return f"-{content['name']}"


def _renamed(rule: Json, old: str, new: str) -> Json:
    """A rule in which conditions call their trait by another name: document and Admin API differ there."""
    conditions = [
        {"operator": one["operator"], new: one.get(old), "value": one["value"]} for one in rule.get("conditions") or ()
    ]
    rules = [_renamed(inner, old, new) for inner in rule.get("rules") or ()]
    return {"type": rule["type"], "rules": rules, "conditions": conditions}


def _command(flag: str, switch: str, option: str, value: str) -> str:
    return f"walletmigrate flags set {flag} {switch} {option} {shlex.quote(value)} --reason '…'"


def _word(enabled: bool) -> str:
    return "on" if enabled else "off"
