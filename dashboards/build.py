"""Make the Grafana dashboards in ``grafana/``: ``python dashboards/build.py``.

With ``--check`` nothing is written; the exit code is 1 if a file is not what this program makes, or is none of its own.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import board_dual_write
import board_jobs
import board_overview
import board_reconciliation
from grafana_foundation_sdk.builders import dashboard
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import DashboardCursorSync, DashboardLinkType
from panels import Board

FOLDER: Final = Path(__file__).with_name("grafana")
TAG: Final = "walletmigrate"


def links() -> dashboard.DashboardLink:
    """One link to each dashboard of this tag, in every head; the time and the data source go along."""
    link = dashboard.DashboardLink("walletmigrate").type(DashboardLinkType.DASHBOARDS).tags([TAG])
    return link.as_dropdown(False).include_vars(True).keep_time(True)


def encoded(board: Board) -> str:
    """The dashboard as JSON, always the same text."""
    source = dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus")
    made = (
        dashboard.Dashboard(board.title)
        .uid(f"walletmigrate-{board.name}")
        .description(board.description)
        .tags([TAG])
        .links([links()])
        .readonly()
        .time("now-6h", "now")
        .timezone("browser")
        .refresh("30s")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .with_variable(source)
    )
    numbers = itertools.count(1)  # Grafana wants them unique on a dashboard, rows included
    for title, panels in board.rows:
        made.with_row(dashboard.Row(title).id(next(numbers)))
        for panel in panels:
            made.with_panel(panel.id(next(numbers)))
    return JSONEncoder(indent=2, sort_keys=True).encode(made.build()) + "\n"


def build() -> Mapping[str, str]:
    """The text of each file by its name."""
    boards = (
        board_overview.overview(),
        board_dual_write.dual_write(),
        board_jobs.jobs(),
        board_reconciliation.reconciliation(),
    )
    return {f"{board.name}.json": encoded(board) for board in boards}


def main(arguments: Sequence[str]) -> int:
    """Write the files, or with ``--check`` compare them; the result is the exit code."""
    made = build()
    if "--check" in arguments:
        found = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.json")}
        other = sorted(name for name in {*made, *found} if made.get(name) != found.get(name))
        if other:
            sys.stderr.write(f"not what the code makes: {', '.join(other)}; run python dashboards/build.py\n")
        return 1 if other else 0
    for name, text in made.items():
        (FOLDER / name).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
