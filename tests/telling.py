"""What failed is told at once in a build: one that is cut off for its time has then said why, and not only that."""

from __future__ import annotations

import os

import pytest

LONGEST = 4_000
"""Characters of a failure that are told; the whole stands at the end."""


class Telling:
    """A plugin of the process that gathers the reports."""

    def __init__(self, terminal: pytest.TerminalReporter) -> None:
        self._terminal = terminal

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Write down what failed."""
        if report.failed:
            self._terminal.ensure_newline()
            self._terminal.write_line(f"{report.when} of {report.nodeid}, after {report.duration:.0f} s:")
            self._terminal.write_line(report.longreprtext[-LONGEST:])


def register(config: pytest.Config) -> None:
    """In a build (``CI=true``); not in the processes that run the tests, which tell the one above them."""
    if os.environ.get("CI") == "true" and not hasattr(config, "workerinput"):
        terminal = config.pluginmanager.get_plugin("terminalreporter")
        assert isinstance(terminal, pytest.TerminalReporter)
        config.pluginmanager.register(Telling(terminal), "telling")
