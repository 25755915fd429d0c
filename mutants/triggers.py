"""Triggers that Python makes, not a template: those of the fence and of the guard of retired columns."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Trigger:
    """A guard in the statements that make triggers: ``pattern`` of a statement, and what is put there."""

    place: str
    name: str
    pattern: re.Pattern[str]
    replacement: str

    @property
    def id(self) -> str:
        """Its name among all guards."""
        return f"{self.place}: {self.name}"

    def mutated(self, statement: str) -> str:
        """The statement without the guard; any other statement as it is."""
        return self.pattern.sub(self.replacement, statement)


def _of(place: str, names: str, events: tuple[str, ...], when: str | None = None) -> list[Trigger]:
    """``names``: a pattern of the triggers' names, up to the event at their end; ``when``: the event of a WHEN."""
    made = []

    def add(name: str, pattern: str, replacement: str) -> None:
        made.append(Trigger(place, name, re.compile(pattern, re.DOTALL), replacement))

    for event in events:
        trigger = names + event
        whole = rf"^(create trigger|alter table (only )?\S+ enable always trigger) {trigger}\b.*"
        add(f"trigger after {event} → removed", whole, "select 1")
        add(f"trigger after {event} → before", rf"^(create trigger {trigger}) after", r"\1 before")
        add(f"enable always trigger after {event} → enable", rf"enable always (trigger {trigger})$", r"enable \1")
    if when:
        add(f"when of {when} → always", rf"^(create trigger {names}{when} .*)when \(.*\) ", r"\1")
    return made


_FENCE = r"walletmigrate_(?!\w*_r_)\w+_"

TRIGGERS: list[Trigger] = [
    *_of("triggers.fence", _FENCE, ("insert", "delete", "update", "truncate"), when="delete"),
    *_of("triggers.retired", r"walletmigrate_\w+_r_", ("insert", "update"), when="update"),
    *_of("triggers.keys", r"walletmigrate_\w+_r_", ("delete", "key", "empty")),
    Trigger(
        "triggers.keys",
        "trigger before move → removed",
        re.compile(r"^(create trigger|alter table \S+ enable always trigger) walletmigrate_\w+_r_move\b.*", re.DOTALL),
        "select 1",
    ),
]
"""All of them."""
