"""What all commands that change something promise: a dry run that changes nothing, a reason, and a word of consent.

Every one of them is tried, on the way of a whole migration, where it can be carried out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from commandline import REASON, Project, app, everything
from walking import SERVICES, begun, carried_out, files, steps
from walletmigrate.commands import ROLES

CONSENT = ("--confirm", "users")

WITHOUT_A_REASON = {"verify", "snapshot verify"}
"""They look, and keep what they saw; whoever wants to may say why."""


def commands_with(option: str) -> set[str]:
    """The names of all commands that take this option, from the program itself."""

    def walk(command: Any, names: tuple[str, ...]) -> set[str]:
        own = {" ".join(names)} if any(each.name == option for each in command.params) else set()
        default, below = getattr(command, "default", None), getattr(command, "commands", {})
        return own.union(*(walk(one, names if name == default else (*names, name)) for name, one in below.items()))

    return walk(typer.main.get_command(app), ())


def test_every_command_that_changes_something_keeps_its_promises(database_url: str, tmp_path: Path) -> None:
    project, engine = begun(tmp_path, database_url)
    changing, confirmed = commands_with("dry_run"), commands_with("confirm")
    seen: set[str] = set()
    broken: list[tuple[object, ...]] = []
    for line, words, command in steps(engine, project):
        if command in changing:
            seen.add(command)
            asked = [word for word in words if word not in CONSENT] if command in confirmed else words
            broken += [(line, *how) for how in promises(project, command, words, asked)]
        done = project.run(*words, *(REASON if command in changing else ()), "--json")
        if not carried_out(command, done):
            broken.append((line, "is not carried out", done.exit_code, done.stdout))
    assert broken == [], "\n" + "\n".join(map(str, broken))
    assert seen == changing - SERVICES
    assert seen == {name for name, role in ROLES.items() if role in ("operator", "installer")} - SERVICES


def promises(project: Project, command: str, words: list[str], asked: list[str]) -> list[tuple[object, ...]]:
    """What a command did not keep; ``asked`` are its words without the consent."""
    tries: dict[str, tuple[list[str], set[int]]] = {"--dry-run": ([*asked, "--dry-run"], {0, 3})}
    if command not in WITHOUT_A_REASON:
        tries["no reason"] = (words, {2})
    if asked != words:
        tries["no consent"] = ([*asked, *REASON], {2})
    found: list[tuple[object, ...]] = []
    before = (everything(project), files(project.folder))
    for name, (given, codes) in tries.items():
        said = project.run(*given, "--json")
        if said.exit_code not in codes:
            found.append((name, said.exit_code, said.stdout))
        if (everything(project), files(project.folder)) != before:
            found.append((name, "has changed something"))
    return found
