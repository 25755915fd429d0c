"""The dashboards as they are committed, read for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent.parent / "dashboards"
FILES = sorted((FOLDER / "grafana").glob("*.json"))

Json = dict[str, Any]


def board(path: Path) -> Json:
    made: Json = json.loads(path.read_text(encoding="utf-8"))
    return made


def panels(path: Path) -> list[Json]:
    return [panel for panel in board(path)["panels"] if panel["type"] != "row"]


def expressions() -> dict[str, str]:
    """Every expression, by its dashboard, panel and letter."""
    return {
        f"{path.stem}: {panel['title']} {target['refId']}": target["expr"]
        for path in FILES
        for panel in panels(path)
        for target in panel["targets"]
    }
