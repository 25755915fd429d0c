"""Flags on a Flagsmith server as something to edit, through its Admin API.

An edit is made on the document, as with the file; what differs afterwards becomes calls.
"""

from __future__ import annotations

import copy
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
from walletmigrate.flag_plan import Plan, Step, feature_of, overrides, renamed
from walletmigrate.flags import ALL_FLAGS, Document, Json

# What an answer of another shape than known leads to.
_ODD: Final = (KeyError, TypeError, ValueError, AttributeError, StopIteration)


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
                _put_flag(content, flag, self._api.flag(environment, feature_of(content, flag)))
        except _ODD as error:
            raise FlagDocumentInvalid(self.name, f"the Admin API answers otherwise than known ({error!r})") from None
        _leave_others_percentages(content)
        return content

    def apply(self, edit: Edit, *, dry_run: bool) -> tuple[Json, Json]:
        """Edit the flags on the server: wholly, or not at all, or `FlagChangeIncomplete` says what was done."""
        before = self.read()
        Document(before, self.name)  # as with the file
        after = copy.deepcopy(before)
        edit(after)
        _settle(before, after)
        Document(after, self.name)
        if before != after and not dry_run:
            self._carry_out(list(Plan(self._api, before, after).steps()), before, after)
        return before, after

    def _carry_out(self, steps: list[Step], before: Json, after: Json) -> None:
        for place, step in enumerate(steps):
            error = self._try(step)
            if error is None:
                continue
            if isinstance(error, NotKnown) and self._states() == _states(after):
                return  # the answer was lost, and what it would have said is that all is done
            self._give_up(steps, place, error, before)

    def _try(self, step: Step) -> FlagSourceUnreachable | FlagServerRefused | None:
        try:
            step.do()
        except (FlagSourceUnreachable, FlagServerRefused) as error:
            return error
        except _ODD as odd:
            return NotKnown(self.name, f"asked to {step.what}, it answered otherwise than known ({odd!r})")
        return None

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
        except (FlagSourceUnreachable, FlagServerRefused, *_ODD) as again:
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


def _put_segment(content: Json, listed: Json) -> None:
    """A segment as the project has it now; one that no flag uses may be missing from the document."""
    rules = [renamed(rule, "property", "property_") for rule in listed["rules"]]
    for segment in segments(content):
        if str(segment["id"]) == str(listed["id"]):
            segment |= {"name": listed["name"], "rules": rules}
            return
    segments(content).append({"id": listed["id"], "name": listed["name"], "rules": rules, "feature_states": []})


def _put_flag(content: Json, flag: str, state: Json) -> None:
    default(content, flag)["enabled"] = state["environment_default"]["enabled"]
    standing = {one["segment"]["id"]: one for one in state["segment_overrides"]}
    for segment in segments(content):
        others = [one for one in segment.get("feature_states") or () if one["feature"]["name"] != flag]
        override = standing.pop(segment["id"], None)
        if override is not None:
            others.append(new_state(content, flag, override["enabled"], {"priority": override["priority"]}))
        segment["feature_states"] = others
    if standing:
        raise KeyError(f"segment {next(iter(standing))}")


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
    stood, wanted = overrides(before, flag), dict(overrides(after, flag))
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


def _states(content: Json) -> set[tuple[object, ...]]:
    """What the document says of our flags, whatever the order."""
    found: list[FlagState] = [state_of(content, flag) for flag in ALL_FLAGS]
    defaults: set[tuple[object, ...]] = {(state.flag, state.default) for state in found}
    return defaults | {(state.flag, override) for state in found for override in state.overrides}


def _suffix(content: Json) -> str:
    return f"-{content['name']}"
