"""Flag documents for tests, in the shape that Flagsmith's server answers with."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from walletmigrate.flags import ALL_FLAGS, Json

UNREADABLE: list[tuple[str, object]] = [
    ("REGEX", "("),
    ("REGEX", "a{99999999999999999999}"),
    ("IN", 5),
    ("IN", None),
    ("IN", {"acme": 1}),
    ("IN", "[" * 100_000),
    ("PERCENTAGE_SPLIT", None),
    ("PERCENTAGE_SPLIT", ["25"]),
    ("MODULO", 5),
    ("MODULO", "0|0"),
    ("EQUAL", 1e999),
]
"""Operators and values at which Flagsmith's engine raises, some only for an account that has the trait."""


def named(value: object) -> str:
    """A value in a test's name."""
    return str(value)[:12]


def state(name: str, enabled: bool, priority: int | None = None) -> Json:
    """One feature state; with a priority it is a segment's."""
    number = ALL_FLAGS.index(name) + 1 if name in ALL_FLAGS else 99
    return {
        "feature": {"id": number, "name": name, "type": "STANDARD"},
        "enabled": enabled,
        "feature_state_value": None,
        "django_id": number,
        "featurestate_uuid": f"00000000-0000-4000-8000-{number:012d}",
        "feature_segment": None if priority is None else {"priority": priority},
        "multivariate_feature_state_values": [],
    }


def segment(number: int, operator: str, path: str, value: object, states: Iterable[Json]) -> Json:
    """A segment of one condition."""
    condition = {"operator": operator, "property_": path, "value": value}
    inner = {"type": "ANY", "rules": [], "conditions": [condition]}
    return {
        "id": number,
        "name": f"segment-{number}",
        "rules": [{"type": "ALL", "conditions": [], "rules": [inner]}],
        "feature_states": list(states),
    }


def tenant(number: int, name: str, *flags: str, enabled: bool = True) -> Json:
    """A segment of one tenant that switches flags."""
    return segment(number, "EQUAL", "tenant", name, [state(flag, enabled, 0) for flag in flags])


def identity(identifier: str, *states: Json) -> Json:
    """Overrides of one account."""
    return {
        "identifier": identifier,
        "environment_api_key": "test",
        "identity_uuid": "00000000-0000-4000-8000-000000000042",
        "created_date": "2026-01-01T00:00:00+00:00",
        "identity_traits": [],
        "identity_features": list(states),
    }


def document(
    *on: str,
    segments: Sequence[Json] = (),
    identities: Sequence[Json] = (),
    names: Sequence[str] = ALL_FLAGS,
) -> Json:
    """An environment document that knows ``names`` and has the flags ``on`` for everyone."""
    return {
        "id": 1,
        "api_key": "test",
        "name": "test",
        "updated_at": "2026-01-01T00:00:00+00:00",
        "project": {
            "id": 1,
            "name": "wallet",
            "hide_disabled_flags": False,
            "organisation": {"id": 1, "name": "lab", "feature_analytics": False},
            "segments": list(segments),
        },
        "feature_states": [state(name, name in on) for name in names],
        "identity_overrides": list(identities),
    }


def body(content: Json) -> bytes:
    """The document as it stands in a file or an answer."""
    return json.dumps(content).encode()
