"""The alert rules as they are committed, read for tests and documents."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "dashboards"
RULES = FOLDER / "alerts" / "walletmigrate.rules.yml"
PREFIX = "WalletMigrate"
RUNBOOKS = "https://example.com/walletmigrate/runbooks/"


@dataclass(frozen=True)
class Alert:
    """One alerting rule; ``name`` is without the prefix, ``window`` tells those of one name apart."""

    name: str
    window: str | None
    severity: str
    labels: dict[str, str]
    annotations: dict[str, str]

    @property
    def runbook(self) -> str:
        """The runbook's file: the name in kebab-case."""
        return re.sub(r"(?<=[a-z])(?=[A-Z])", "-", self.name).lower() + ".md"


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def recorded() -> set[str]:
    return {rule["record"] for rule in rules() if "record" in rule}


def alerts() -> list[Alert]:
    return [
        Alert(
            rule["alert"].removeprefix(PREFIX),
            rule["labels"].get("window"),
            rule["labels"]["severity"],
            rule["labels"],
            rule["annotations"],
        )
        for rule in rules()
        if "alert" in rule
    ]
