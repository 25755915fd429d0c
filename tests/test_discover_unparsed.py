"""Discovery in what cannot be read as what it is: the exit code does not call clean what nobody understood."""

from __future__ import annotations

import codecs
from pathlib import Path

import pytest

from commandline import Project, Said
from discovering import project, sources

__all__ = ["project", "sources"]

WRITE = "def pay(u):\n    u.total_coins = 1\n"
BROKEN = "print 'paid'\n"


@pytest.fixture(autouse=True)
def models(sources: Path) -> None:
    (sources / "models.py").write_text(
        "class User(Base):\n    __tablename__ = 'users'\n    coins = mapped_column('total_coins', Numeric)\n"
    )


def discover(project: Project, sources: Path, *words: str) -> Said:
    return project.run("discover", "--source", str(sources), "--no-database", *words)


@pytest.mark.parametrize(
    "code",
    [
        f"type Coins = int\n{WRITE}",  # Python 3.12
        f"{BROKEN}{WRITE}",  # Python 2
        f"def f(:\n{WRITE}",
        f"{BROKEN}u.coins = 1\n",  # by the attribute's name
        f"{BROKEN}session.query(User).delete()\n",  # whole rows, by the class
        f"{BROKEN}u.total_coins = 1  # walletmigrate: ignore\n",  # without a reason
    ],
)
def test_python_that_does_not_parse_and_names_what_is_mapped_may_hold_a_write(
    project: Project, sources: Path, code: str
) -> None:
    (sources / "app.py").write_text(code)
    assert discover(project, sources).exit_code == 3


def test_it_is_said_why_python_was_not_parsed_and_what_to_do(project: Project, sources: Path) -> None:
    (sources / "app.py").write_text(f"{BROKEN}{WRITE}")
    said = discover(project, sources)
    assert "app.py: line 1: Missing parentheses" in said.stderr
    assert "it was read as plain text, and names total_coins" in said.stderr
    assert "1 not parsed, where a write may stand" in said.stderr
    assert "the application's own Python" in said.stderr
    assert "not read at all" not in said.stderr
    (one,) = discover(project, sources, "--json").document["unread"]
    assert (one["as_text"], one["left"]) == (True, True)


@pytest.mark.parametrize(
    "code",
    [
        f"{BROKEN}order.amount = 1\n",
        f"# walletmigrate: ignore-file a Python 2 script that nobody runs\n{BROKEN}{WRITE}",
        f"{BROKEN}u.total_coins = 1  # walletmigrate: ignore a test user\n",
        f"{BROKEN}sum_of_total_coins = 1\n",
    ],
)
def test_broken_python_that_names_nothing_mapped_or_is_accepted_does_not_block(
    project: Project, sources: Path, code: str
) -> None:
    (sources / "app.py").write_text(code)
    said = discover(project, sources)
    assert said.exit_code == 0, said
    assert "app.py: line" in said.stderr


def test_a_broken_stub_does_nothing_and_does_not_block(project: Project, sources: Path) -> None:
    (sources / "app.pyi").write_text("class User(:\n    total_coins: int\n")
    assert discover(project, sources).exit_code == 0


def test_python_that_is_nested_too_deeply_to_be_followed_may_hold_a_write(project: Project, sources: Path) -> None:
    (sources / "app.py").write_text(f"x = 1{' + 1' * 2000}\n{WRITE}")
    said = discover(project, sources)
    assert said.exit_code == 3
    assert "nested too deeply" in said.stderr or "recursion" in said.stderr


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_text_is_read_by_its_byte_order_mark(project: Project, sources: Path, encoding: str) -> None:
    marks = {"utf-16-le": codecs.BOM_UTF16_LE, "utf-16-be": codecs.BOM_UTF16_BE}
    sql = "update users\nset total_coins = 0;\n"
    (sources / "reset.sql").write_bytes(marks.get(encoding, b"") + sql.encode(encoding))
    said = discover(project, sources)
    assert said.exit_code == 3, said
    assert "reset.sql:2" in said.stdout


def test_python_in_utf_16_which_python_cannot_run_either_is_told(project: Project, sources: Path) -> None:
    (sources / "app.py").write_bytes(WRITE.encode("utf-16"))
    said = discover(project, sources)
    assert said.exit_code == 3
    assert "null bytes" in said.stderr


def test_a_binary_file_whose_name_promises_text_is_told_and_others_are_not(project: Project, sources: Path) -> None:
    (sources / "reset.sql").write_bytes("update users set total_coins = 0".encode("utf-16-le"))  # without a mark
    (sources / "logo.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    said = discover(project, sources)
    assert said.exit_code == 0
    assert "reset.sql; save it as UTF-8 if it is text" in said.stderr
    assert "logo.png" not in said.stderr
