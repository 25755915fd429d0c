"""The application that discovery is tried on: each line says in a comment what a reader finds there.

``# = write read`` lists the accesses of its line, one for each column; ``adapter`` and ``accepted`` are ones in
order; ``missed write`` is there and is not found; ``false write`` is found and is not there. A line without such a
comment has none.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from walletmigrate.config import Column, Mapping, Settings
from walletmigrate.findings import Catalogue, Finding

SHOP = Path(__file__).parent / "apps" / "shop"
_MARK = re.compile(r"(?:#|--|\{#|<!--)(?P<above> \^)? = (?P<words>[a-z ]+?)\s*(?:#\}|-->)?$")

Place = tuple[str, int, str]


@dataclass(frozen=True)
class Truth:
    """What the comments say: by (file, line, access) the number of findings; ``missed`` and ``false`` of them."""

    there: Counter[Place]
    missed: Counter[Place]
    false: Counter[Place]


def truth() -> Truth:
    """Read the comments."""
    counters: dict[str, Counter[Place]] = {"": Counter(), "missed": Counter(), "false": Counter()}
    for path in sorted(one for one in SHOP.rglob("*") if one.is_file()):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            match = _MARK.search(line)
            kind = ""
            for word in match["words"].split() if match else ():
                if word in counters:
                    kind = word
                    continue
                at = number - bool(match and match["above"])
                counters[kind][str(path.relative_to(SHOP)), at, word] += 1
    return Truth(counters[""], counters["missed"], counters["false"])


def places(found: Catalogue) -> Counter[Place]:
    """What was found, in the same words."""
    return Counter((str(Path(one.file).relative_to(SHOP)), one.line or 0, _word(one)) for one in found.findings)


def settings() -> Settings:
    """The shop's configuration: two buckets of one table."""
    columns = [
        Column(bucket="cash", column="total_coins", currency="EUR", scale=2),
        Column(bucket="promo", column="promo", currency="EUR", scale=2),
    ]
    mapping = Mapping.model_validate({"name": "users", "table": "public.users", "key": "id", "columns": columns})
    return Settings(mappings=(mapping,))


def _word(one: Finding) -> str:
    return "adapter" if one.adapter else "accepted" if one.accepted is not None else one.access
