"""How far a long command is: a bar where standard error is a terminal, and nowhere else."""

from __future__ import annotations

import io
import os
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

import ledger
from commandline import REASON, Project
from terminals import on_terminal, terminal
from walletmigrate import rehearsal_display
from walletmigrate.rehearsal_display import Lines, Live, Silence
from walletmigrate.rehearsal_report import Stage

HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"
"""What takes a terminal's cursor away, and what gives it back."""


@pytest.fixture(autouse=True)
def a_terminal_that_can_do_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever terminal the tests themselves run on."""
    monkeypatch.setenv("TERM", "xterm")
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)


def test_a_job_on_a_terminal_shows_how_many_accounts_of_how_many_are_done(database_url: str, tmp_path: Path) -> None:
    engine, _ = ledger.install_users(database_url, rows=40)
    project = Project(tmp_path, database_url)
    project.change("phase", "advance")
    words = ("backfill", "--batch-size", "10", *REASON)
    with engine.connect() as holder:
        holder.exec_driver_sql("select 1 from public.users where id = 25 for update")  # the third batch waits for it
        with on_terminal(project, *words, streams=("stderr",)) as screen:
            screen.until("20/40")
            assert "backfill users" in screen.shown
            holder.rollback()
            screen.until("40/40")
            assert screen.process.wait(timeout=60) == 0
            assert screen.process.stdout is not None
            assert "/40" not in screen.process.stdout.read()


def test_a_job_in_json_shows_no_bar_on_a_terminal_either(database_url: str, tmp_path: Path) -> None:
    ledger.install_users(database_url)
    project = Project(tmp_path, database_url)
    project.change("phase", "advance")
    with on_terminal(project, "backfill", "--json", *REASON, streams=("stderr",)) as screen:
        stdout, _ = screen.process.communicate(timeout=60)
        assert '"state": "done"' in stdout
        assert screen.process.returncode == 0
        assert screen.left() == ""


class Shown(io.StringIO):
    """What was written for a terminal, without the words that style it."""

    def until(self, words: str) -> str:
        """Wait until the bar, which is drawn eight times in a second, is drawn with these words: its newest lines."""
        deadline = time.monotonic() + 60
        while words not in (newest := self.getvalue().rpartition("\r")[2]):
            assert time.monotonic() < deadline, f"{words!r} is not in {newest!r}"
            time.sleep(0.01)
        return newest


def test_a_rehearsal_on_a_terminal_shows_a_bar_with_the_stage_and_the_step() -> None:
    shown = Shown()
    live = Live(Console(file=shown, force_terminal=True, width=120, color_system=None), 400)
    with live:
        live.begin("dual write")
        live.step("backfill")
        live.done(100)
        drawn = shown.until("100/400")
        assert "━" in drawn
        assert "dual write · backfill" in drawn
        live.end(Stage("dual write", 100, 2.0, 50.0, 1.5, 9.0), "240 opened")
        assert "dual write               100 transactions,     50/s, p50 1.5 ms, p99 9.0 ms" in shown.getvalue()
        assert "  240 opened" in shown.getvalue()
        live.begin("observation")
        assert "dual write" not in shown.until("observation")
    assert shown.getvalue().count(HIDE) == shown.getvalue().count(SHOW) == 1


def test_a_rehearsal_is_live_on_a_terminal_tells_lines_elsewhere_and_nothing_unless_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with terminal() as (_, program), os.fdopen(os.dup(program), "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        assert type(rehearsal_display.display(10, progress=True)) is Live
        assert type(rehearsal_display.display(10, progress=False)) is Silence
        monkeypatch.setattr(sys, "stderr", io.StringIO())
        assert type(rehearsal_display.display(10, progress=True)) is Lines
        monkeypatch.undo()
