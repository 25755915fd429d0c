"""The shape that a flag document must have, as far as decisions and edits rest on it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, StrictInt, StrictStr, ValidationError

SHOWN = 3
"""How many faults are named before it is only said that there are more."""


class _Feature(BaseModel):
    name: StrictStr


class _State(BaseModel):
    feature: _Feature
    enabled: Any


class _Condition(BaseModel):
    operator: StrictStr
    property_: StrictStr | None = None
    value: Any  # what Flagsmith's engine can make of it, `flag_trial` asks


class _Rule(BaseModel):
    type: Literal["ALL", "ANY", "NONE"]
    rules: list[_Rule] = []
    conditions: list[_Condition] = []


class _Segment(BaseModel):
    id: StrictInt | StrictStr
    name: StrictStr
    rules: list[_Rule]
    feature_states: list[_State] | None = None


class _Project(BaseModel):
    segments: list[_Segment]


class _Identity(BaseModel):
    identifier: StrictStr
    identity_features: list[_State]


class _Environment(BaseModel):
    api_key: StrictStr
    name: StrictStr
    feature_states: list[_State]
    project: _Project
    identity_overrides: list[_Identity] | None = None


def fault(content: object) -> str | None:
    """What is wrong with the shape, with the place of each fault, such as ``feature_states[2].enabled is missing``."""
    try:
        _Environment.model_validate(content)
    except ValidationError as error:
        found = list(dict.fromkeys(_told(tuple(one["loc"]), one["type"], one["msg"]) for one in error.errors()))
        more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        return "; ".join(found[:SHOWN]) + more
    except RecursionError:
        return "its rules are nested too deeply"
    return None


def _told(place: tuple[int | str, ...], kind: str, message: str) -> str:
    # The last part of a place that has two allowed types is the type's name; nobody looks for that in the file.
    named = "".join(
        f"[{part}]" if isinstance(part, int) else f".{part}" for part in place if part not in ("int", "str")
    )
    path = named.lstrip(".") or "it"
    if kind == "missing":
        return f"{path} is missing"
    wanted = message.removeprefix("Input should be ").replace("a valid dictionary or instance of", "an object:")
    return f"{path} is not {wanted.partition(':')[0]}"
