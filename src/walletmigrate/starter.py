"""The files that a newcomer begins with: an empty flag document, and the configuration beside it."""

from __future__ import annotations

import json
from pathlib import Path

from walletmigrate.errors import UsageError
from walletmigrate.flags import ALL_FLAGS, Json


def blank_document() -> Json:
    """A flag document in Flagsmith's format with all three flags, off for everyone."""
    organisation = {
        "id": 1,
        "name": "wallet",
        "feature_analytics": False,
        "stop_serving_flags": False,
        "persist_trait_data": False,
    }
    project: Json = {
        "id": 1,
        "name": "wallet",
        "hide_disabled_flags": False,
        "organisation": organisation,
        "segments": [],
    }
    states: list[Json] = [
        {
            "feature": {"id": number, "name": flag, "type": "STANDARD"},
            "enabled": False,
            "feature_state_value": None,
            "django_id": number,
            "featurestate_uuid": f"00000000-0000-4000-8000-{number:012d}",
            "feature_segment": None,
            "multivariate_feature_state_values": [],
        }
        for number, flag in enumerate(ALL_FLAGS, 1)
    ]
    return {
        "id": 1,
        "api_key": "walletmigrate",
        "name": "walletmigrate",
        "updated_at": "2026-01-01T00:00:00+00:00",
        "project": project,
        "feature_states": states,
        "identity_overrides": [],
    }


def write_configuration(path: Path, text: str, *, replace: bool = False) -> bool:
    """Write the configuration, and a blank flag document in ``flags/`` beside it unless one is there.

    Returns whether the flag document was made. Raises UsageError when the configuration exists already (unless
    ``replace``) or cannot be written.
    """
    flags = path.parent / "flags" / "environment.json"
    try:
        flags.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w" if replace else "x", encoding="utf-8") as file:
            file.write(text)
        if flags.exists():
            return False
        flags.write_text(json.dumps(blank_document(), indent=2) + "\n", encoding="utf-8")
    except FileExistsError:
        raise UsageError(f"{path} exists already: pass --force to write it anew, or --config for another") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}. Name another with --config.") from None
    return True
