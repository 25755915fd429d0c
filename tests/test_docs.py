"""The texts: every command has its section, what they show exists, and they name nobody and no machine."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
from collections.abc import Iterator
from importlib import import_module
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import typer

from commandline import app, parsed

ROOT = Path(__file__).parents[1]
COMMANDS = ROOT / "docs" / "commands.md"
MADE = {"build", "dist", "__pycache__", "report.json", "balances.csv"}
SCANNED = {".ci", ".github", ".gitignore"}

# Split, so that this file does not hold what it looks for.
REGISTRIES = re.compile(
    "|".join(["pypi" + r"\.org", "pythonhosted" + r"\.org", "index" + "-url", "npmjs" + r"\.(org|com)"])
)
HOMES = re.compile(r"(?<![\w.\-/])/(" + "|".join(["work", "root", "Users", "home/[a-z]+", "workspace"]) + r")/")
ADDRESS = re.compile(r"(?<![\w.+-])\w[\w.+-]*@([\w-]+(?:\.[\w-]+)+)")
NOBODYS = re.compile(r"(^|\.)(example(\.(com|org|net))?|invalid|test|localhost)$|^[\d.]+$")


def is_kept(path: Path) -> bool:
    """Whether a file is part of the repository, and not made by a tool."""
    parts = path.relative_to(ROOT).parts
    hidden = parts[0].startswith(".") and parts[0] not in SCANNED
    return path.is_file() and not hidden and not MADE.intersection(parts) and ".egg-info" not in str(path)


KEPT = sorted(path for path in ROOT.rglob("*") if is_kept(path))
TEXTS = [path for path in KEPT if path.suffix == ".md"]


def named(path: Path) -> str:
    """A path as people read it."""
    return str(path.relative_to(ROOT))


def leaves(command: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every command of a click command, groups walked through, as (name, command)."""
    inner = getattr(command, "commands", None)
    if inner is None:
        yield name, command
        return
    if command.invoke_without_command and name:
        yield name, command  # a group that does something by itself
    for word, one in inner.items():
        own = word == getattr(command, "default", None)  # the command itself, which has others below it
        yield from leaves(one, name if own else f"{name} {word}".strip())


CLI = dict(leaves(typer.main.get_command(app)))


def fences(path: Path, language: str) -> list[str]:
    """The fenced blocks of a language, at any indentation."""
    pattern = rf"^[ ]*```{language}\n(.*?)^[ ]*```$"
    return re.findall(pattern, path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def shown_commands(path: Path) -> list[str]:
    """What a text shows as commands: the lines of bash blocks, and code between backticks."""
    prose = re.sub(r"^[ ]*```.*?^[ ]*```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    inline = re.findall(r"`([^`\n]+)`", prose)
    found = [*inline, *(line for block in fences(path, "(?:bash|sh)") for line in block.splitlines())]
    return [
        match[1] for line in found if (match := re.match(r"(?:[A-Z_]+=\S+ )*(?:\.venv/bin/)?walletmigrate (.+)", line))
    ]


WITHOUT_A_CALL = {"init", "sandbox", "rehearse", "watch", "exporter", "version"}
"""Commands that are a program of their own, and no step of somebody else's."""


def test_every_command_has_its_call_from_python_beside_it() -> None:
    sections = re.split(r"\n### `walletmigrate ", COMMANDS.read_text(encoding="utf-8"))[1:]
    calls = {each.partition("`")[0]: re.findall(r"\bPython:\s([^\n]*(?:\n[^\n]+)*)", each) for each in sections}
    assert {name for name, found in calls.items() if not found} <= WITHOUT_A_CALL
    said = "\n".join(text for found in calls.values() for text in found)
    names = re.findall(r"`(?:walletmigrate\.)?((?!walletmigrate)\w+)\.(\w+)[`(]", said)
    assert len(names) > 40
    for module, name in names:
        assert callable(getattr(import_module(f"walletmigrate.{module}"), name)), f"{module}.{name}"


def test_every_command_has_a_section_with_an_example_and_its_end() -> None:
    parts = re.split(r"^### `walletmigrate (.+)`$", COMMANDS.read_text(encoding="utf-8"), flags=re.MULTILINE)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    assert sorted(sections) == sorted(CLI)
    assert len(parts[1::2]) == len(sections), "a command has two sections"
    for name, section in sections.items():
        assert re.search(rf"^```bash\nwalletmigrate {re.escape(name)}\b", section, re.MULTILINE), name
        assert re.search(r"^Ends with 0", section, re.MULTILINE), name


@pytest.mark.parametrize("path", TEXTS, ids=named)
def test_every_command_that_a_text_shows_exists_with_its_options(path: Path) -> None:
    wrong = []
    for shown in shown_commands(path):
        words = shlex.split(shown.replace("…", "x"), comments=True)
        if words[0].isupper() or words[0].startswith("-"):
            continue  # `walletmigrate COMMAND --help`
        plain = list(takewhile(lambda word: not word.startswith("-"), words))
        command = CLI.get(" ".join(plain[:2])) or CLI.get(plain[0])
        options = {option for one in command.params for option in one.opts} | {"--help"} if command else set()
        unknown = [word for word in words if word.startswith("-") and word.partition("=")[0] not in options]
        if unknown or command is None:
            wrong.append(shown)
    assert wrong == []


@pytest.mark.parametrize("path", TEXTS, ids=named)
def test_every_link_within_the_repository_leads_somewhere(path: Path) -> None:
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        if not target.exists() or (anchor and anchor not in anchors(target)):
            dead.append(link)
    assert dead == []


def anchors(path: Path) -> set[str]:
    """The anchors that a Markdown file's headings give."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_python_block_of_the_readme_compiles() -> None:
    blocks = fences(ROOT / "README.md", "python")
    assert blocks
    for block in blocks:
        ast.parse(block)


def test_the_lines_for_cron_hand_the_file_s_settings_to_the_command(tmp_path: Path) -> None:
    lines = re.findall(r"^(?:[\d*]+ +){5}wallet +(.+)$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(lines) == 4
    settings, stub = tmp_path / "env", tmp_path / "walletmigrate"
    settings.write_text("WALLETMIGRATE_DATABASE_URL=postgresql://wallet@/shop\n", encoding="utf-8")
    stub.write_text('#!/bin/sh\necho "$WALLETMIGRATE_DATABASE_URL $*"\n', encoding="utf-8")
    stub.chmod(0o755)
    for line in lines:
        command = line.replace("/etc/walletmigrate/env", str(settings))
        path = f"{tmp_path}:/usr/bin:/bin"
        said = subprocess.run(
            ["/bin/sh", "-c", command], env={"PATH": path}, capture_output=True, text=True, check=True
        )
        assert said.stdout.startswith("postgresql://wallet@/shop "), said
        assert "--actor cron" in said.stdout


def test_what_the_readme_schedules_can_be_run_and_every_alert_on_its_absence_has_it() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for form in (r"^[\d*]+ [\d*]+ \* \* \* .*?(walletmigrate .+)$", r"^ExecStart=(walletmigrate .+)$"):
        scheduled = sorted(map(parsed, re.findall(form, text, re.MULTILINE)))
        assert scheduled == ["reconcile", "snapshot take", "snapshot verify", "verify"]


@pytest.mark.parametrize("path", sorted((ROOT / "runbooks").glob("*.md")), ids=named)
def test_a_runbook_has_only_commands_and_what_they_show(path: Path) -> None:
    languages = re.findall(r"^[ >]*(?:```|~~~)(.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    assert set(languages[0::2]) <= {"bash", "output"}
    assert set(languages[1::2]) <= {""}


def test_no_file_names_a_package_registry_a_folder_of_one_machine_or_a_person() -> None:
    assert ROOT / "README.md" in KEPT
    assert Path(__file__) in KEPT
    found = []
    for path in KEPT:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # not a text
        found += [f"{named(path)}: {match[0]}" for match in (*REGISTRIES.finditer(text), *HOMES.finditer(text))]
        found += [f"{named(path)}: {match[0]}" for match in ADDRESS.finditer(text) if not NOBODYS.search(match[1])]
    assert found == []


@pytest.mark.parametrize(
    ("text", "caught"),
    [
        ("--index" + "-url x", True),
        ("see /" + "root/x", True),
        ('"/' + "home/someone/x", True),
        ("somebody@" + "gmail.com", True),
        ("mail@example.com and me@127.0.0.1", False),
        ("src/" + "work/list and a/" + "root/b", False),
        ("postgresql://user:password@host:5432/database", False),
    ],
)
def test_what_a_text_must_not_have_is_recognised(text: str, caught: bool) -> None:
    addresses = [match for match in ADDRESS.finditer(text) if not NOBODYS.search(match[1])]
    assert bool(REGISTRIES.search(text) or HOMES.search(text) or addresses) is caught
