"""Databases that many tests begin with: made anew the first times, and copied from then on.

What makes them is tested where it is made; a copy is the same database, byte by byte, in the same cluster.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Final, TypeVar, cast

from sqlalchemy import make_url

import databases

Made = TypeVar("Made")

UNTOUCHED: Final[set[str]] = set()
"""URLs of databases that `conftest.make_database` made empty, for a test that may not have begun to use them."""

ANEW: Final[list[str]] = []
"""Reasons why everything is made anew: where mutants are played, a copy would have been made of other SQL."""

_asked: Counter[tuple[databases.Databases, str]] = Counter()
_templates: dict[tuple[databases.Databases, str], tuple[str, object]] = {}


def copied(url: str, what: str, make: Callable[[], Made]) -> Made:
    """Make of the database what ``make`` makes of it; by a copy, if it is empty and ``what`` was asked for before.

    ``what`` says all that the outcome depends on. ``make`` leaves no connection open; what it gives belongs to the
    database, and is given with each copy of it.
    """
    found, database = databases.on(url), str(make_url(url).database)
    key = (found, what)
    _asked[key] += 1
    if ANEW or url not in UNTOUCHED or _asked[key] == 1 or not found.is_unused(database):
        return make()
    if key not in _templates:
        made = make()
        name = f"begun_{len(_templates)}"
        found.copy(database, name)
        _templates[key] = name, made
        return made
    name, kept = _templates[key]
    found.replace(database, name)
    return cast("Made", kept)
