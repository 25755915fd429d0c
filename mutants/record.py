"""The record: by which test each guard is missed, or why no test can miss it."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path

from mutants.guards import Guard, all_guards
from mutants.triggers import TRIGGERS, Trigger

RECORD = Path(__file__).with_name("record.toml")
REASON = "because: "

Entries = dict[str, str]
"""A guard's id → a test's name, or ``because: …``. A guard without an entry is open."""

_HEAD = """\
# Each guard of the SQL, and the test that fails without it; or `because: …`, why no test can tell.
# Written by `python -m mutants discover`; reasons are written by hand. See CONTRIBUTING.md.
"""


def known() -> dict[str, Guard | Trigger]:
    """Every guard there is, by its id."""
    return {**all_guards(), **{trigger.id: trigger for trigger in TRIGGERS}}


def load() -> Entries:
    """The record as it stands."""
    if not RECORD.is_file():
        return {}
    document = tomllib.loads(RECORD.read_text(encoding="utf-8"))
    return {f"{place}: {name}": value for place, names in document.items() for name, value in names.items()}


def save(entries: Mapping[str, str]) -> None:
    """Write the record anew, at once: another process may read it meanwhile."""
    made = RECORD.with_suffix(f".{os.getpid()}")
    made.write_text(written(entries), encoding="utf-8")
    made.replace(RECORD)


def written(entries: Mapping[str, str]) -> str:
    """The record's text, in the order of the guards. Entries without a guard go."""
    return "\n".join(_lines(entries)) + "\n"


def _lines(entries: Mapping[str, str]) -> Iterator[str]:
    yield _HEAD.rstrip()
    places: dict[str, list[str]] = {}
    for guard in known():
        if guard in entries:
            places.setdefault(guard.partition(": ")[0], []).append(guard)
    for place, found in places.items():
        yield f'\n["{place}"]'
        yield from (f"{_string(g.removeprefix(f'{place}: '))} = {_string(entries[g])}" for g in found)


def _string(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)


def reasons(entries: Mapping[str, str]) -> Entries:
    """Those no test can tell, with why."""
    return {guard: value.removeprefix(REASON) for guard, value in entries.items() if value.startswith(REASON)}


def killed(entries: Mapping[str, str]) -> Entries:
    """Those that a test misses, with its name."""
    return {guard: value for guard, value in entries.items() if not value.startswith(REASON)}
