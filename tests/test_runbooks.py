"""The runbooks: every command in them is run, in a situation that was really made, and ends as they say.

A runbook is read with sybil. A ``bash`` block is run; ``<!-- exit: 3 -->`` before it says how it ends, if not
with 0; the ``output`` block after it is what a person sees. ``...`` in a line stands for any text of that line,
alone in a line for any lines; white space counts as one blank. What a command prints must be in the runbook.
``<!-- meanwhile: payments -->`` is where others do something that the text speaks of, and that no command here does.
``<!-- elsewhere: a fresh machine -->`` stands before a block that is not run; a test of its own holds it to the truth.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path

import pytest
from sybil import Document, Example, Region
from sybil.example import SybilFailure
from sybil.parsers.markdown import CodeBlockParser
from sybil.parsers.markdown.lexers import DirectiveInHTMLCommentLexer

from alert_rules import alerts
from runbook_alerts import Scrape, assert_it_fires_and_ends
from runbook_faults import FAULTS
from runbook_incidents import INCIDENTS
from runbook_installations import INSTALLATIONS
from runbook_procedures import (
    Terminal,
    before_the_backfill,
    before_the_freeze,
    frozen,
    mid_posting,
    newcomer,
    with_history,
)
from runbook_stage import (
    Ran,
    Shell,
    Stage,
    backfilled,
    bypassed,
    cut_over,
    imbalanced,
    stopped,
)
from runbook_watched import WATCHED
from servers import Postgres

FOLDER = Path(__file__).parents[1] / "runbooks"
INDEX = FOLDER / "README.md"
RUNBOOKS = sorted(set(FOLDER.glob("*.md")) - {INDEX})

SITUATIONS: dict[str, Callable[[Postgres, str, Path], Stage]] = {
    "README": backfilled,
    "archive": frozen,
    "backfill": before_the_backfill,
    "bypass-writes": bypassed,
    "cutover": backfilled,
    "freeze": before_the_freeze,
    "ledger-imbalance": imbalanced,
    "line-stopped": stopped,
    "rehearse": with_history,
    "rollback": cut_over,
    "stop-the-line": mid_posting,
    **FAULTS,
    **WATCHED,
    **INCIDENTS,
    **INSTALLATIONS,
}

OF_ALERTS = {alert.runbook.removesuffix(".md"): alert.name for alert in alerts()}

ALERT_SECTIONS = [
    *("Meaning", "Impact", "Verify", "Diagnosis", "Mitigation", "Rollback"),
    *("Confirm resolved", "Silencing", "Escalation"),
]
CHANGE = re.compile(
    r"walletmigrate ((un)?install|phase (advance|back)|flags set|cutover|rollback|backfill|stop-the-line|resume"
    r"|(un)?freeze|jobs (pause|resume|cancel|set)|adjust|archive --to|retire|capture (mode|install|remove)"
    r"|reconcile (--all|--account|undo)|recalculate|verify (.* )?--mark-stale|snapshot (take|prune)|erase)\b"
)
PROCEDURE_SECTIONS = ["Before you start", "Steps", "How to know it worked", "How to go back", "Who to call"]


class Reader:
    """Somebody who works through a runbook, block by block, and minds every difference."""

    def __init__(self, shell: Shell | Terminal, meanwhile: Mapping[str, Callable[[], object]] | None = None) -> None:
        self.shell = shell
        self.meanwhile = dict(meanwhile or {})
        self.ran: Ran | None = None
        self.exit: int | None = None
        self.elsewhere = False
        self.blocks = 0

    def work_through(self, path: Path) -> int:
        """Run the blocks of a document in order; how many there were. Raises SybilFailure, with the line."""
        commands, outputs = CodeBlockParser("bash", self.run), CodeBlockParser("output", self.compare)
        for example in Document.parse(str(path), commands, outputs, self.exits, self.others, self.places):
            example.evaluate()
        end = self.loose_end()
        assert end is None, f"{path.name}, at its end: {end}"
        assert not self.meanwhile, f"{path.name} does not say when: {', '.join(self.meanwhile)}"
        return self.blocks

    def exits(self, document: Document) -> Iterator[Region]:
        """The comments that announce an exit code."""
        for found in DirectiveInHTMLCommentLexer("exit")(document):
            yield Region(found.start, found.end, found.lexemes["arguments"], self.announce)

    def others(self, document: Document) -> Iterator[Region]:
        """The comments at which others do something."""
        for found in DirectiveInHTMLCommentLexer("meanwhile")(document):
            yield Region(found.start, found.end, found.lexemes["arguments"], self.let)

    def places(self, document: Document) -> Iterator[Region]:
        """The comments that keep a block from being run."""
        for found in DirectiveInHTMLCommentLexer("elsewhere")(document):
            yield Region(found.start, found.end, found.lexemes["arguments"], self.leave_out)

    def leave_out(self, _: Example) -> str | None:
        """Do not run the block that follows."""
        self.elsewhere = True
        return self.loose_end()

    def let(self, example: Example) -> str | None:
        """Let others do what the comment names, once."""
        if end := self.loose_end():
            return end
        act = self.meanwhile.pop(example.parsed.strip(), None)
        if act is None:
            return f"nobody does {example.parsed!r} here, or it was done already"
        act()
        return None

    def announce(self, example: Example) -> str | None:
        """Remember the exit code of the block that follows."""
        end = self.loose_end()
        self.exit = int(example.parsed)
        return end

    def run(self, example: Example) -> str | None:
        """Run a block, and compare its exit code."""
        if self.exit is None and (end := self.loose_end()):
            return end
        if self.elsewhere:
            self.elsewhere = False
            return None
        wanted, self.exit = self.exit or 0, None
        self.blocks += 1
        self.ran = self.shell.run(example.parsed)
        if self.ran.code != wanted:
            return f"exit code {self.ran.code}, not {wanted}. What was seen:\n{self.ran.seen}"
        return None

    def compare(self, example: Example) -> str | None:
        """Compare what was seen with what the runbook shows."""
        ran, self.ran = self.ran, None
        if ran is None or self.exit is not None:
            return "this output belongs to no block of commands"
        return None if matches(example.parsed, ran.seen) else f"what was seen is another:\n{ran.seen}"

    def loose_end(self) -> str | None:
        """What the document has left unsaid so far."""
        ran, self.ran = self.ran, None
        if self.exit is not None:
            return "an exit code without a block of commands"
        if ran is not None and ran.seen.strip():
            return f"the block before prints something, and the runbook does not show it:\n{ran.seen}"
        return None


def matches(shown: str, seen: str) -> bool:
    """Whether what was seen is what a runbook shows."""
    pattern = ""
    for line in lines(shown):
        parts = [re.escape(part) for part in line.split("...")]
        pattern += r"(?:[^\n]*\n)*?" if line == "..." else "[^\n]*?".join(parts) + r"\n"
    return re.fullmatch(pattern, "".join(line + "\n" for line in lines(seen))) is not None


def lines(text: str) -> list[str]:
    """The lines that are not empty, with one blank for each white space, and none around."""
    return [" ".join(line.split()) for line in text.splitlines() if line.strip()]


@pytest.mark.parametrize("name", sorted(SITUATIONS.keys() - OF_ALERTS.keys()))
def test_every_command_of_a_runbook_does_what_the_runbook_says(
    name: str, server: Postgres, database_url: str, tmp_path: Path
) -> None:
    stage = SITUATIONS[name](server, database_url, tmp_path)
    with stage.cleanup:
        assert Reader(stage.shell(), stage.meanwhile).work_through(FOLDER / f"{name}.md") > 0


@pytest.mark.parametrize("name", OF_ALERTS)
def test_an_alert_fires_in_its_situation_and_the_commands_of_its_runbook_end_it(
    name: str, server: Postgres, database_url: str, tmp_path: Path
) -> None:
    stage = SITUATIONS[name](server, database_url, tmp_path)
    with stage.cleanup:
        during = stage.scrape()
        assert Reader(stage.shell(), stage.meanwhile).work_through(FOLDER / f"{name}.md") > 0
        assert_it_fires_and_ends(OF_ALERTS[name], stage.seen, during, stage.scrape(), tmp_path)


def test_a_newcomer_comes_from_a_clone_to_a_cut_over_tenant_and_back(tmp_path: Path) -> None:
    with newcomer(tmp_path) as terminal:  # and its own server, so it is not for each of the tests' servers
        assert Reader(terminal).work_through(FOLDER / "newcomer.md") > 0
    assert list((tmp_path / "home").glob("[!.]*")) == []


def test_the_newcomer_begins_on_a_fresh_machine_as_the_readme_does_by_a_target_that_sets_up_what_comes_then() -> None:
    left_out = r"^<!-- elsewhere: .*\n```bash\n((?:.*\n)*?)```"
    found = {path.stem: re.findall(left_out, path.read_text(encoding="utf-8"), re.MULTILINE) for path in RUNBOOKS}
    assert {name: len(blocks) for name, blocks in found.items() if blocks} == {"newcomer": 1}
    commands = found["newcomer"][0].splitlines()
    readme = (FOLDER.parent / "README.md").read_text(encoding="utf-8").partition("```bash\n")[2].splitlines()
    assert commands == [line.partition("  #")[0].rstrip() for line in readme[: len(commands)]]
    assert commands[0].startswith("git clone ")
    words = ["make", "--dry-run", "--always-make", *commands[1].split()[1:]]
    made = subprocess.run(words, cwd=FOLDER.parent, capture_output=True, text=True, check=True).stdout
    steps = [made.find(step) for step in ("-m venv .venv", ".venv/bin/python -m pip install", "walletmigrate rehearse")]
    assert -1 not in steps
    assert steps == sorted(steps)


def test_every_runbook_has_its_situation() -> None:
    assert {path.stem for path in (INDEX, *RUNBOOKS)} == SITUATIONS.keys() | {"newcomer"}


def test_a_terminal_remembers_and_ends_with_the_first_command_that_fails(tmp_path: Path) -> None:
    with newcomer(tmp_path) as terminal:
        assert terminal.run("export WHO=me\ncd examples\nsleep 600 &\nexport PID=$!") == Ran(0, "")
        assert terminal.run('echo $WHO; basename "$PWD"; kill -0 $PID') == Ran(0, "me\nexamples\n")
        assert terminal.run("cat; echo one; false; echo two") == Ran(1, "one\n")


def test_the_index_names_every_runbook_with_its_kind() -> None:
    rows = re.findall(r"^\| \[([\w-]+)\]\(([\w-]+)\.md\) \| (.+?) \|", INDEX.read_text(encoding="utf-8"), re.MULTILINE)
    assert [(text, file) for text, file, _ in rows] == [(path.stem, path.stem) for path in RUNBOOKS]
    assert {file: kind for _, file, kind in rows} == {path.stem: kind_of(path) for path in RUNBOOKS}


@pytest.mark.parametrize("path", RUNBOOKS, ids=lambda path: path.stem)
def test_a_runbook_has_the_sections_of_its_kind(path: Path) -> None:
    kind = kind_of(path)
    camel = "".join(word.capitalize() for word in path.stem.split("-"))
    assert kind in ("procedure", f"alert `WalletMigrate{camel}`")
    wanted = PROCEDURE_SECTIONS if kind == "procedure" else ALERT_SECTIONS
    assert re.findall(r"^## (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE) == wanted


@pytest.mark.parametrize("path", RUNBOOKS, ids=lambda path: path.stem)
def test_whatever_a_runbook_changes_has_a_reason(path: Path) -> None:
    blocks = re.findall(r"^```bash\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    changes = [line for block in blocks for line in block.splitlines() if CHANGE.search(line)]
    assert [line for line in changes if "--reason '" not in line and "--dry-run" not in line] == []
    if kind_of(path) != "procedure":
        # Who reads it in a hurry may read it twice, or have left a step out.
        steps = [line for line in changes if re.search(r"walletmigrate phase (advance|back)", line)]
        assert [line for line in steps if "--to " not in line] == []


WRONG = {
    "a block that is left out, and then one that is not": (
        "<!-- elsewhere: far -->\n```bash\nfalse\n```\n\n```bash\nexit 3\n```\n",
        "exit code 3, not 0",
    ),
    "another exit code": ("```bash\nexit 3\n```\n", "exit code 3, not 0"),
    "no failure where one is announced": ("<!-- exit: 3 -->\n```bash\ntrue\n```\n", "exit code 0, not 3"),
    "a failure before the last command": ("```bash\nfalse\ntrue\n```\n", "exit code 1, not 0"),
    "another output": ("```bash\necho one\n```\n\n```output\ntwo\n```\n", "what was seen is another:\none"),
    "one line more": ("```bash\necho one; echo two\n```\n\n```output\none\n```\n", "what was seen is another"),
    "one line less": ("```bash\necho one\n```\n\n```output\none\ntwo\n```\n", "what was seen is another"),
    "a complaint on stderr": ("```bash\necho one; echo no >&2\n```\n\n```output\none\n```\n", "is another"),
    "an output that is not shown": ("```bash\necho one\n```\n\n```bash\ntrue\n```\n", "does not show it:\none"),
    "an output of nothing": ("```output\none\n```\n", "belongs to no block"),
    "something that nobody does": ("<!-- meanwhile: rain -->\n\n```bash\ntrue\n```\n", "nobody does 'rain' here"),
    "an exit code of nothing": ("<!-- exit: 3 -->\n\n<!-- exit: 4 -->\n```bash\nexit 4\n```\n", "an exit code without"),
}


@pytest.mark.parametrize(("text", "said"), WRONG.values(), ids=WRONG)
def test_a_runbook_that_is_wrong_is_found_out(text: str, said: str, tmp_path: Path) -> None:
    runbook = tmp_path / "wrong.md"
    runbook.write_text(text, encoding="utf-8")
    with pytest.raises(SybilFailure, match=re.escape(said)):
        Reader(Shell(tmp_path, {"PATH": os.defpath})).work_through(runbook)


def test_what_others_do_is_done_where_the_runbook_says_it_and_a_runbook_that_does_not_is_found_out(
    tmp_path: Path,
) -> None:
    runbook, done = tmp_path / "short.md", tmp_path / "done"
    runbook.write_text("<!-- meanwhile: work -->\n```bash\nls done\n```\n\n```output\ndone\n```\n", encoding="utf-8")
    shell = Shell(tmp_path, {"PATH": os.defpath})
    assert Reader(shell, {"work": done.touch}).work_through(runbook) == 1
    with pytest.raises(AssertionError, match=r"short\.md does not say when: more"):
        Reader(shell, {"work": done.touch, "more": done.touch}).work_through(runbook)


def of_the_line(stopped: int) -> Scrape:
    """What is served of the line; 2: nothing is."""
    series = 'walletmigrate_line_stopped{job="walletmigrate-exporter", instance="db"}'
    return Scrape(0.0, {series: float(stopped)} if stopped < 2 else {})


@pytest.mark.parametrize(
    ("before", "during", "after", "holds"),
    [(0, 1, 0, True), (0, 0, 0, False), (1, 1, 0, False), (0, 1, 1, False), (0, 1, 2, True), (2, 1, 0, True)],
)
def test_an_alert_that_does_not_fire_or_does_not_end_is_found_out(
    before: int, during: int, after: int, holds: bool, tmp_path: Path
) -> None:
    said = nullcontext() if holds else pytest.raises(AssertionError, match="LineStopped: silent, fires, silent")
    with said:
        looks = [of_the_line(one) for one in (before, during, after)]
        assert_it_fires_and_ends("LineStopped", looks[:1], looks[1], looks[2], tmp_path)


def test_a_time_that_is_served_is_moved_with_promtools_clock_and_a_counter_rises_evenly(tmp_path: Path) -> None:
    name = 'walletmigrate_verification_last_success_timestamp_seconds{job="walletmigrate-exporter", instance="db"}'
    phase = 'walletmigrate_phase{job="walletmigrate-exporter", instance="db", phase="read_ledger"}'
    young, old = (Scrape(1e9, {name: 1e9 - hours * 3600, phase: 1.0}) for hours in (1, 27))
    assert_it_fires_and_ends("VerificationStale", [young], old, young, tmp_path)
    with pytest.raises(AssertionError, match="silent, fires, silent"):
        assert_it_fires_and_ends("VerificationStale", [young], young, young, tmp_path)
    none, some = (Scrape(0.0, {'walletmigrate_bypass_writes_total{treatment="stale"}': count}) for count in (5.0, 6.0))
    assert_it_fires_and_ends("BypassWrites", [none], some, some, tmp_path)
    with pytest.raises(AssertionError, match="silent, fires, silent"):
        assert_it_fires_and_ends("BypassWrites", [none], none, some, tmp_path)


@pytest.mark.parametrize("text", ["```bash\necho one\n```\n", "```bash\ntrue\n```\n\n<!-- exit: 3 -->\n"])
def test_a_runbook_that_ends_too_early_is_found_out(text: str, tmp_path: Path) -> None:
    runbook = tmp_path / "short.md"
    runbook.write_text(text, encoding="utf-8")
    with pytest.raises(AssertionError, match=r"short\.md, at its end"):
        Reader(Shell(tmp_path, {"PATH": os.defpath})).work_through(runbook)


@pytest.mark.parametrize(
    ("shown", "seen", "same"),
    [
        ("job ..., done", "job 17, done", True),
        ("job ..., done", "job 17, paused", False),
        ("a ... c", "a b\nc", False),
        ("first\n...\nlast", "first\nsecond\nthird\nlast", True),
        ("first\n...\nlast", "first\nlast", True),
        ("first\n...\nlast", "first\nsecond", False),
        ("  wide   text", "wide text\n\n", True),
        ("1.5", "1x5", False),
        ("", "something", False),
    ],
)
def test_three_dots_stand_for_what_differs_and_for_nothing_else(shown: str, seen: str, same: bool) -> None:
    assert matches(shown, seen) is same


def test_a_shell_knows_in_the_next_block_what_a_line_of_one_before_set(tmp_path: Path) -> None:
    shell = Shell(tmp_path, {"PATH": os.defpath})
    assert shell.run("JOB=7\necho $JOB") == Ran(0, "7\n")
    assert shell.run('echo "$JOB"') == Ran(0, "7\n")


@pytest.mark.parametrize("path", RUNBOOKS, ids=lambda path: path.stem)
def test_a_runbook_writes_the_number_of_a_job_once_and_waits_for_none_that_never_comes(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    shown = re.sub(r"^```output\n.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    assert re.findall(r"(?:walletmigrate jobs \w+|--job) \d+", shown) == []
    loops = [line for line in shown.splitlines() if line.startswith("until walletmigrate ")]
    assert [line for line in loops if "|| ! kill -0 $!" not in line] == []


def kind_of(path: Path) -> str:
    """What a runbook says that it is: an alert's, by its name, or a procedure."""
    found = re.search(r"^Kind: (alert `\w+`|procedure)", path.read_text(encoding="utf-8"), re.MULTILINE)
    assert found, f"{path.name} does not say its kind"
    return found[1]
