"""No test skips without a listed reason, and in CI none for want of something that can be installed."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import skips
from skips import REASONS

FOLDER = Path(__file__).parent
CONTRIBUTING = FOLDER.parent / "CONTRIBUTING.md"
SKIPPING = re.compile(
    r"\b(?:pytest\.(?:skip|importorskip|xfail|mark\.(?:skip|skipif|xfail))|unittest\.skip\w*|SkipTest)$"
)


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Every call, with the name of what is called."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def skipping(source: str) -> list[str]:
    """What a source skips by, `skips` apart: calls, and marks without arguments."""
    names = (ast.unparse(node) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute | ast.Name))
    exceptions = {match[0] for match in re.finditer(r"pytest\.\w+(?=\.Exception)", source)}
    return sorted({name for name in names if SKIPPING.search(name)} - exceptions)


SOURCES = {
    path: path.read_text(encoding="utf-8")
    for path in sorted(FOLDER.rglob("*.py"))
    if "apps" not in path.parts  # to be read by `discover`; nothing of it runs
}


def test_nothing_in_the_tests_skips_but_by_a_listed_reason() -> None:
    found = {path.name: names for path, source in SOURCES.items() if (names := skipping(source))}
    assert found == {"skips.py": ["pytest.mark.skipif", "pytest.skip"]}


@pytest.mark.parametrize(
    "source",
    ["pytest.skip('x')", "@pytest.mark.skip\ndef t(): ...", "m = pytest.importorskip('x')", "raise unittest.SkipTest"],
)
def test_a_skip_of_one_s_own_is_recognised(source: str) -> None:
    assert skipping(source)


def test_every_reason_is_used_and_none_is_made_up() -> None:
    places = {"skips.skip": 0, "skips.unless": 1}
    used = {
        ast.literal_eval(call.args[places[name]])
        for path, source in SOURCES.items()
        if path != Path(__file__)
        for name, call in calls(ast.parse(source))
        if name in places
    }
    assert used == set(REASONS)


def test_the_list_for_contributors_is_the_code_s() -> None:
    text = CONTRIBUTING.read_text(encoding="utf-8")
    (table,) = re.findall(r"^\| a test skips because .*\n\|[-|]+\|\n((?:\|.*\n)+)", text, re.MULTILINE)
    rows = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in table.splitlines()]
    assert rows == [(one.why, one.mend, "fails" if one.installable else "skips") for one in REASONS.values()]


@pytest.mark.parametrize("name", REASONS)
def test_in_ci_a_test_fails_for_want_of_what_can_be_installed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="looked for in vain"):
        skips.skip(name, "looked for in vain")
    monkeypatch.setenv("CI", "true")
    ends = pytest.fail.Exception if REASONS[name].installable else pytest.skip.Exception
    with pytest.raises(ends, match="looked for in vain"):
        skips.skip(name, "looked for in vain")
    if not REASONS[name].installable:
        assert skips.unless(False, name).args == (True,)
        assert skips.unless(True, name).args == (False,)
