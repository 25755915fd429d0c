"""Edits of a flag document in memory: who has which flag.

Of several overrides an account's own wins, then a trait's, then the percentage's, then everyone's. Among
traits off wins over on, so that switching a cohort off holds for all of it.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, Literal, TypeAlias

from walletmigrate.errors import UsageError
from walletmigrate.flags import (
    ALL_FLAGS,
    Json,
    all_states,
    leaf_conditions,
)

Kind: TypeAlias = Literal["trait", "percent", "account", "segment"]

# Flagsmith takes the override of the lowest priority; an account's own override is always before these.
TRAIT_OFF, TRAIT_ON, PERCENT = 10, 20, 30
IDENTIFIER: Final = "$.identity.identifier"
_ACCOUNT_PATHS: Final = frozenset({"", IDENTIFIER, "$.identity.key"})


@dataclass(frozen=True, slots=True)
class Override:
    """Who differs from everyone. ``value`` is ``name=value`` of a trait, a percentage without its sign, an
    account's key as text, or empty for a ``segment`` with other rules; ``segment`` is empty for an account.
    """

    segment: str
    kind: Kind
    value: str
    enabled: bool


@dataclass(frozen=True, slots=True)
class FlagState:
    """One flag: what everyone has (``default``), and who differs, in the order of the file."""

    flag: str
    default: bool
    overrides: tuple[Override, ...] = ()


def set_everyone(content: Json, flag: str, enabled: bool) -> None:
    """Switch the default; off also ends every override of the flag that is on."""
    default(content, flag)["enabled"] = enabled
    if not enabled:
        # Whoever says "off for everyone" is rolling back, and a forgotten cohort must not stay behind.
        drop(content, flag, lambda override: override.enabled)


def set_trait(content: Json, flag: str, enabled: bool, trait: tuple[str, str]) -> None:
    """Switch the flag for the accounts of a trait (name, value), in the segment that all flags share."""
    name, value = _checked_trait(trait)
    found = [s for s in segments(content) if shape(s) == ("trait", name, value)]
    segment = found[0] if found else _new_segment(content, f"{name}-{value}", "EQUAL", name, value)
    _switch(content, segment, flag, enabled, TRAIT_ON if enabled else TRAIT_OFF)


def set_percent(content: Json, flag: str, enabled: bool, percent: int, of: str | None) -> None:
    """Switch the flag for a percentage of accounts, or of the values of trait ``of``, in a shared segment."""
    _check_percent(percent)
    path = IDENTIFIER if of is None else _checked_text("trait", of)
    segment = _percent_segment(content, path)
    if segment is None:
        segment = _new_segment(content, f"percent-of-{of or 'accounts'}", "PERCENTAGE_SPLIT", path, str(percent))
    _, _, standing = shape(segment)
    inside = [state["feature"]["name"] for state in segment.get("feature_states") or ()]
    if standing not in (str(percent), f"{percent}.0"):
        if inside and flag not in inside:
            raise UsageError(
                f"the percentage is shared by all flags and stands at {standing} ({', '.join(inside)}). "
                f"Set {flag} for {standing} percent, or move {inside[0]} to {percent} first."
            )
        next(leaf_conditions(segment["rules"]))["value"] = str(percent)
    _switch(content, segment, flag, enabled, PERCENT)


def _percent_segment(content: Json, path: str) -> Json | None:
    # Two segments of one percentage pick different people, so there is one; a segment that also carries the
    # application's own flags is left alone, since moving it would move those.
    found = [s for s in segments(content) if shape(s)[0] == "percent" and _only_ours(s)]
    if not found:
        return None
    wanted = _shape_path(path)
    for segment in found:
        if shape(segment)[1] == wanted:
            return segment
    raise UsageError(
        f"the percentage is shared by all flags, and {found[0]['name']!r} splits by "
        f"{shape(found[0])[1] or 'account'}: take the percentage of that"
    )


def set_segment(content: Json, flag: str, enabled: bool, name: str) -> None:
    """Switch the flag for a segment that the document has, whatever its rules."""
    segment = named_segment(content, name)
    kind = shape(segment)[0]
    _switch(content, segment, flag, enabled, PERCENT if kind == "percent" else TRAIT_ON if enabled else TRAIT_OFF)


def named_segment(content: Json, name: str) -> Json:
    """The segment of that name. Raises UsageError, with the names that there are."""
    found = [segment for segment in segments(content) if segment["name"] == name]
    if len(found) != 1:
        names = ", ".join(sorted(segment["name"] for segment in segments(content))) or "none"
        what = "several segments are" if found else "no segment is"
        raise UsageError(f"{what} named {name!r} (there are: {names}). A trait is written tenant=acme.")
    return found[0]


def set_account(content: Json, flag: str, enabled: bool, account: str) -> None:
    """Switch the flag for one account, named by its key as text."""
    if not account:
        raise UsageError("name the account by its key")
    overrides = content.get("identity_overrides")
    if overrides is None:
        overrides = content["identity_overrides"] = []
    own = [override for override in overrides if override["identifier"] == account]
    states = [s for o in own for s in o["identity_features"] if s["feature"]["name"] == flag]
    if states:
        for state in states:
            state["enabled"] = enabled
        return
    if not own:
        own = [_new_identity(content, account)]
        overrides.extend(own)
    own[0]["identity_features"].append(new_state(content, flag, enabled, None))


def _switch(content: Json, segment: Json, flag: str, enabled: bool, priority: int) -> None:
    states = segment["feature_states"] = segment.get("feature_states") or []
    for state in states:
        if state["feature"]["name"] == flag:
            state["enabled"] = enabled
            state["feature_segment"] = {**(state.get("feature_segment") or {}), "priority": priority}
            return
    states.append(new_state(content, flag, enabled, {"priority": priority}))


def drop(content: Json, flag: str, ended: Callable[[Override], bool]) -> None:
    """End the overrides of the flag for which ``ended`` says so."""
    for segment in list(segments(content)):
        states = segment.get("feature_states") or []
        kept = [s for s in states if not (_is(s, flag) and ended(_segment_override(segment, s)))]
        if len(kept) != len(states):
            segment["feature_states"] = kept
            # A trait cohort that no flag uses says nothing. A percentage stays: under a new id it would
            # pick other people.
            if not kept and _made(segment):
                segments(content).remove(segment)
    for own in content.get("identity_overrides") or ():
        states = own["identity_features"]
        kept = [s for s in states if not (_is(s, flag) and ended(_account_override(own, s)))]
        own["identity_features"] = kept
    if content.get("identity_overrides"):
        content["identity_overrides"] = [o for o in content["identity_overrides"] if o["identity_features"]]


def state_of(content: Json, flag: str) -> FlagState:
    """What the document says of one flag."""
    overrides = [
        _segment_override(segment, state)
        for segment in segments(content)
        for state in segment.get("feature_states") or ()
        if _is(state, flag)
    ]
    overrides += [
        _account_override(own, state)
        for own in content.get("identity_overrides") or ()
        for state in own["identity_features"]
        if _is(state, flag)
    ]
    return FlagState(flag, default(content, flag)["enabled"], tuple(overrides))


def _segment_override(segment: Json, state: Json) -> Override:
    kind, name, value = shape(segment)
    return Override(segment["name"], kind, f"{name}={value}" if kind == "trait" else value, state["enabled"])


def _account_override(own: Json, state: Json) -> Override:
    return Override("", "account", own["identifier"], state["enabled"])


def shape(segment: Json) -> tuple[Kind, str, str]:
    """What a segment's rules come to: kind, trait (empty: the account itself) and value."""
    conditions = list(leaf_conditions(segment["rules"]))
    if len(conditions) == 1 and not _negates(segment["rules"]):
        name, value = conditions[0].get("property_") or "", str(conditions[0]["value"])
        if conditions[0]["operator"] == "PERCENTAGE_SPLIT":
            return "percent", _shape_path(name), value
        if conditions[0]["operator"] == "EQUAL" and name and not name.startswith("$."):
            return "trait", name, value
    return "segment", "", ""


def _shape_path(path: str) -> str:
    return "" if path in _ACCOUNT_PATHS else path


def _negates(rules: list[Json]) -> bool:
    return any(rule["type"] == "NONE" or _negates(rule.get("rules") or []) for rule in rules)


def _made(segment: Json) -> bool:
    kind, name, value = shape(segment)
    return kind == "trait" and segment["name"] == f"{name}-{value}"


def _only_ours(segment: Json) -> bool:
    return all(state["feature"]["name"] in ALL_FLAGS for state in segment.get("feature_states") or ())


def segments(content: Json) -> list[Json]:
    """The segments of the document, to be changed in place."""
    found: list[Json] = content["project"]["segments"]
    return found


def _is(state: Json, flag: str) -> bool:
    return bool(state["feature"]["name"] == flag)


def default(content: Json, flag: str) -> Json:
    """The feature state that everyone has, to be changed in place."""
    # The last one, as Flagsmith's engine takes it.
    found: Json = [state for state in content["feature_states"] if _is(state, flag)][-1]
    return found


def new_state(content: Json, flag: str, enabled: bool, segment: Json | None) -> Json:
    """A feature state; ``segment`` holds the priority of a segment's."""
    return {
        "feature": dict(default(content, flag)["feature"]),
        "enabled": enabled,
        "feature_state_value": None,
        "django_id": 1 + max((state.get("django_id") or 0 for state in all_states(content)), default=0),
        "featurestate_uuid": str(uuid.uuid4()),
        "feature_segment": segment,
        "multivariate_feature_state_values": [],
    }


def _new_segment(content: Json, name: str, operator: str, path: str, value: str) -> Json:
    condition = {"operator": operator, "property_": path, "value": value}
    inner = {"type": "ANY", "rules": [], "conditions": [condition]}
    segment: Json = {
        "id": 1 + max((_number(known["id"]) for known in segments(content)), default=0),
        "name": name,
        "rules": [{"type": "ALL", "conditions": [], "rules": [inner]}],
        "feature_states": [],
    }
    segments(content).append(segment)
    return segment


def _number(key: object) -> int:
    text = str(key)
    return int(text) if text.isdecimal() else 0


def _new_identity(content: Json, account: str) -> Json:
    return {
        "identifier": account,
        "environment_api_key": content["api_key"],
        "identity_uuid": str(uuid.uuid4()),
        "created_date": datetime.now(UTC).isoformat(timespec="seconds"),
        "identity_traits": [],
        "identity_features": [],
    }


def can_name(trait: tuple[str, str]) -> bool:
    """Whether a flag can be switched for who has this trait: a name, and a value as the database has it."""
    try:
        _checked_trait(trait)
    except UsageError:
        return False
    return True


def _checked_trait(trait: tuple[str, str]) -> tuple[str, str]:
    name, value = trait
    if value.endswith(":semver"):  # the engine would compare version numbers
        raise UsageError(f"value {value!r} of trait {name}: Flagsmith reads the ending :semver as its own")
    return _checked_text("trait", name), _checked_text(f"value of trait {name}", value)


def _checked_text(what: str, text: str) -> str:
    if not text or text.startswith("$.") or text != text.strip() or not text.isprintable():
        raise UsageError(f"{what} {text!r}: write it without spaces around it, printable, and not as a path ($.…)")
    return text


def _check_percent(percent: int) -> None:
    if type(percent) is not int or not 1 <= percent <= 100:
        raise UsageError(
            f"percentage {percent!r}: write a whole number from 1 to 100. 0 would still let some in: "
            "remove the override, or switch it off"
        )
