"""Whether Flagsmith's engine can evaluate a document: tried when it is read, so that no payment is the first to ask.

The engine takes what a condition says as it comes, and raises at the first account that it concerns: an account with
the trait, or one for which two overrides count. Only what overrides the flags asked for is evaluated at all.
"""

from __future__ import annotations

import reprlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, Final, NamedTuple, TypeAlias, get_args, get_type_hints

_Json: TypeAlias = dict[str, Any]

# Each of a type that the engine compares in a way of its own; None is an account without the trait.
_SAMPLES: Final = (None, "text", "1.0.0", 1, 0.5, True)

_VALUES: Final = {
    "REGEX": "a regular expression",
    "IN": "a list of texts, or a text with commas between them",
    "PERCENTAGE_SPLIT": "a number from 0 to 100",
    "MODULO": "divisor|remainder, such as 2|0 for each second one",
}


class _Condition(NamedTuple):
    place: str
    segment: _Json
    said: _Json


def fault(content: _Json, flags: Collection[str]) -> str | None:
    """What makes the engine raise when it is asked for ``flags``, with its place and what to write; None if nothing.

    ``content`` has the shape that `flag_shape` asks for.
    """
    numbers = next(chain(_ranks(content, flags), _weights(content, flags)), None)
    return numbers or _condition_at_fault(content, list(_conditions(content, flags)))


def shown(condition: _Json) -> str:
    """A condition as people say it, such as ``tenant EQUAL 'acme'``."""
    return f"{condition.get('property_') or 'account'} {condition['operator']} {reprlib.repr(condition['value'])}"


def value_of(operator: str) -> str:
    """What the value of a condition must be."""
    return _VALUES.get(operator, "its value as a text")


def operators() -> tuple[str, ...]:
    """The operators that Flagsmith knows."""
    from flagsmith.api.types import SegmentConditionModel  # not above: slow to load

    return get_args(get_type_hints(SegmentConditionModel)["operator"])


def _condition_at_fault(content: _Json, conditions: list[_Condition]) -> str | None:
    error = _raised(content, conditions)
    while error is not None and len(conditions) > 1:
        half = conditions[: len(conditions) // 2]
        found = _raised(content, half)
        conditions = conditions[len(half) :] if found is None else half
        error = found or _raised(content, conditions)
    return None if error is None else _refused(conditions[0], error)


def _ranks(content: _Json, flags: Collection[str]) -> Iterator[str]:
    """The engine compares priorities only for an account for which two overrides count."""
    for above, segment in _named(content["project"]["segments"]):
        for place, state in _states(segment, flags):
            priority = (state.get("feature_segment") or {}).get("priority", 0)
            if not isinstance(priority, int | float):
                where = f"{above}feature_states[{place}].feature_segment.priority (segment {segment['name']})"
                yield f"{where} is {reprlib.repr(priority)}: write a number, the lowest wins"


def _weights(content: _Json, flags: Collection[str]) -> Iterator[str]:
    """The engine adds up percentages of variants until one is met."""
    for where, holder in (("", content), *_named(content["project"]["segments"])):
        for place, state in _states(holder, flags):
            for variant in state.get("multivariate_feature_state_values") or ():
                number, weight = variant.get("id"), variant["percentage_allocation"]
                if not isinstance(weight, int | float) or not isinstance(number, int | None):
                    yield (
                        f"{where}feature_states[{place}].multivariate_feature_state_values: "
                        "write each id and each percentage_allocation as a number"
                    )


def _named(segments: list[_Json]) -> Iterator[tuple[str, _Json]]:
    return ((f"project.segments[{number}].", segment) for number, segment in enumerate(segments))


def _states(holder: _Json, flags: Collection[str]) -> Iterator[tuple[int, _Json]]:
    states = enumerate(holder.get("feature_states") or ())
    return ((place, state) for place, state in states if state["feature"]["name"] in flags)


def _conditions(content: _Json, flags: Collection[str]) -> Iterator[_Condition]:
    for above, segment in _named(content["project"]["segments"]):
        if any(_states(segment, flags)):
            for place, said in leaves(segment["rules"], f"{above}rules"):
                yield _Condition(place, segment, said)


def leaves(rules: list[_Json], above: str) -> Iterator[tuple[str, _Json]]:
    """Every condition of the rules that stand at ``above``, however deep, with its place."""
    for number, rule in enumerate(rules):
        for place, condition in enumerate(rule.get("conditions") or ()):
            yield f"{above}[{number}].conditions[{place}]", condition
        yield from leaves(rule.get("rules") or [], f"{above}[{number}].rules")


def _raised(content: _Json, conditions: list[_Condition]) -> Exception | None:
    """What the engine raises at one of these conditions, whatever type the trait has that it asks for."""
    from flagsmith import Flagsmith  # not above: slow to load

    tried = {
        "feature": {"id": 0, "name": "tried"},
        "enabled": False,
        "feature_state_value": None,
        "featurestate_uuid": "tried",
    }
    # Each in a segment of its own: among others, one that decides keeps the engine from looking at the next.
    segments = [
        {
            "id": f"{number}-{condition.segment['id']}",
            "name": "tried",
            "rules": [{"type": "ALL", "conditions": [condition.said], "rules": []}],
            "feature_states": [tried],
        }
        for number, condition in enumerate(conditions)
    ]
    document = {**content, "feature_states": [tried], "project": {"segments": segments}, "identity_overrides": []}
    # A path is looked for among the traits, too, before it is followed.
    names = {condition.said.get("property_") or "" for condition in conditions}
    try:
        client = Flagsmith(offline_mode=True, offline_handler=Handler(document))
        for sample in _SAMPLES:
            traits = {} if sample is None else dict.fromkeys(names, sample)
            client.get_identity_flags("tried", traits).is_feature_enabled("tried")
    except Exception as error:  # noqa: BLE001 - the engine raises whatever a value leads it to
        return error
    return None


def _refused(condition: _Condition, error: Exception) -> str:
    said = str(error) or type(error).__name__
    return (
        f"{condition.place} (segment {condition.segment['name']}): Flagsmith's engine cannot evaluate "
        f"{shown(condition.said)} ({said}); write {value_of(condition.said['operator'])}, or delete the condition"
    )


@dataclass(frozen=True, slots=True)
class Handler:
    """What Flagsmith's client asks for its document in offline mode."""

    document: Any

    def get_environment(self) -> Any:
        """The document, which the client does not copy."""
        return self.document
