"""Write the alert rules for your objective and your runbooks: ``python dashboards/rules.py --objective 99.95 > FILE``.

The committed file is taken as it is, and only the values that are asked for are changed in it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Final

RULES: Final = Path(__file__).with_name("alerts") / "walletmigrate.rules.yml"
RUNBOOKS: Final = "https://example.com/walletmigrate/runbooks"
OBJECTIVE: Final = "0.999"
MINIMUM: Final = "100"
LEAST: Final = Decimal("93.06")
"""Percent: the first alert asks for 14.4 times the budget, and more than all postings cannot fail."""


def rendered(objective: Decimal | None = None, minimum: int | None = None, runbooks: str | None = None) -> str:
    """The text of the rules. ``objective`` is the share, between 0 and 1, of dual-writes whose ledger leg must not
    fail; with fewer than ``minimum`` postings in the long window no budget alert fires. None leaves what is committed.
    """
    text = RULES.read_text(encoding="utf-8")
    if objective is not None:
        text = _recorded(text, "objective", OBJECTIVE, f"{objective.normalize():f}")
    if minimum is not None:
        text = _recorded(text, "minimum", MINIMUM, str(minimum))
    return text.replace(f"{RUNBOOKS}/", f"{runbooks}/") if runbooks else text


def _recorded(text: str, name: str, before: str, after: str) -> str:
    """The text with another value of a recorded constant."""
    rule = f"- record: walletmigrate:dual_write:{name}\n        expr: vector({{}})\n"
    if text.count(rule.format(before)) != 1:
        raise ValueError(f"{RULES.name} does not record {name} as {before}: it was edited; take it as it was")
    return text.replace(rule.format(before), rule.format(after))


def objective_of(words: str) -> Decimal:
    """The share that a text in percent says. Raises ArgumentTypeError for one that no alert could keep watch over."""
    try:
        percent = Decimal(words.strip().removesuffix("%").strip())
    except InvalidOperation:
        percent = Decimal("NaN")
    if not percent.is_finite() or not LEAST <= percent < 100:
        raise argparse.ArgumentTypeError(
            f"{words!r}: write percent, {LEAST} or more and below 100, for example 99.95. At 100 there is no budget, "
            f"and below {LEAST} it cannot burn as fast as the first alert asks for, though every posting fails"
        )
    return percent / 100


def minimum_of(words: str) -> int:
    """A number of postings. Raises ArgumentTypeError."""
    if not (words.isascii() and words.isdigit()):
        raise argparse.ArgumentTypeError(f"{words!r}: write a whole number of postings, 0 or more")
    return int(words)


def address_of(words: str) -> str:
    """An address without a slash at its end. Raises ArgumentTypeError."""
    if not words.startswith(("https://", "http://")):
        raise argparse.ArgumentTypeError(f"{words!r}: write an address that begins with https://")
    return words.rstrip("/")


def main(arguments: Sequence[str]) -> int:
    """Write the rules to standard output; the result is the exit code."""
    parser = argparse.ArgumentParser(description="Write the alert rules, with your values, to standard output.")
    parser.add_argument("--objective", type=objective_of, metavar="PERCENT", help="of dual-writes; committed: 99.9")
    parser.add_argument("--minimum", type=minimum_of, metavar="POSTINGS", help="below it no alert; committed: 100")
    parser.add_argument("--runbooks", type=address_of, metavar="URL", help="where your on-call reads the runbooks")
    given = parser.parse_args(arguments)
    try:
        sys.stdout.write(rendered(given.objective, given.minimum, given.runbooks))
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
