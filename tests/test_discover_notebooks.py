"""Discovery in Jupyter notebooks: their cells are read as the Python and the SQL that they are."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import shop
from commandline import Project, Said
from discovering import MODELS, project, sources
from walletmigrate.discover import discover
from walletmigrate.findings import Finding

__all__ = ["project", "sources"]


@pytest.fixture(autouse=True)
def models(sources: Path) -> None:
    (sources / "models.py").write_text(MODELS)


def notebook(*cells: str, language: str = "python") -> dict[str, Any]:
    """A notebook of code cells, as Jupyter writes one."""
    made: list[dict[str, Any]] = [
        {
            "cell_type": "code",
            "execution_count": None,
            "metadata": {},
            "outputs": [{"name": "stdout", "output_type": "stream", "text": ["total_coins\n"]}],
            "source": cell.splitlines(keepends=True),
        }
        for cell in cells
    ]
    about = {"kernelspec": {"display_name": "a kernel", "language": language, "name": "kernel"}}
    return {"cells": made, "metadata": about, "nbformat": 4, "nbformat_minor": 5}


def found_in(sources: Path, document: dict[str, Any], indent: int | None = 1) -> list[Finding]:
    (sources / "book.ipynb").write_text(json.dumps(document, indent=indent))
    found = discover(shop.settings(), [sources]).findings
    return [one for one in found if one.file.endswith("book.ipynb")]


def command(project: Project, sources: Path, *words: str) -> Said:
    return project.run("discover", "--source", str(sources), "--no-database", *words)


def test_a_write_in_a_cell_is_found_with_its_line_in_the_file(project: Project, sources: Path) -> None:
    document = notebook("import models\n", "def pay(user):\n    user.total_coins += 5\n")
    document["cells"].insert(1, {"cell_type": "markdown", "metadata": {}, "source": ["On *total_coins*\n", "of users"]})
    (one,) = found_in(sources, document)
    text = (sources / "book.ipynb").read_text().split("\n")
    assert (one.access, one.sure, one.column, one.scope) == ("write", True, "total_coins", "cell 3, pay")
    assert one.line is not None
    assert "user.total_coins += 5" in text[one.line - 1]
    said = command(project, sources)
    assert said.exit_code == 3
    assert re.search(rf"book\.ipynb:{one.line} +write +total_coins +cell 3, pay +attribute\n", said.stdout)


def test_where_the_file_has_no_line_for_it_the_cell_and_its_line_are_told(project: Project, sources: Path) -> None:
    document = notebook("import models", "x = 1\nuser.total_coins += 5\nuser.total_coins += 5")
    found = found_in(sources, document, indent=None)
    assert [(one.access, one.line, one.scope) for one in found] == [
        ("write", None, "cell 2 line 2"),
        ("write", None, "cell 2 line 3"),
    ]
    said = command(project, sources)
    assert said.exit_code == 3
    assert re.search(r"book\.ipynb +write +total_coins +cell 2 line 3 +attribute\n", said.stdout)


def test_a_source_that_is_one_string_is_read_too(sources: Path) -> None:
    document = notebook("")
    document["cells"][0]["source"] = "x = 1\r\nuser.total_coins += 5"
    assert [(one.access, one.scope) for one in found_in(sources, document)] == [("write", "cell 1 line 2")]


def test_what_one_cell_says_of_a_name_holds_in_the_next(sources: Path) -> None:
    document = notebook(
        "from models import Order, User\nx = session.get(User, 1)\ny = session.get(Order, 1)\n",
        "y.total_coins = 1\nx.total_coins = 2\n",
    )
    assert [(one.access, one.sure, one.code) for one in found_in(sources, document)] == [
        ("write", True, "x.total_coins = 2")
    ]


def test_a_class_that_a_notebook_defines_is_known_everywhere(sources: Path) -> None:
    (sources / "models.py").write_text("from sqlalchemy import Numeric\n")
    (sources / "app.py").write_text("def pay(user):\n    user.coins = 1\n")
    cell = "class User(Base):\n    __tablename__ = 'users'\n    coins = mapped_column('total_coins', Numeric)\n"
    (one,) = found_in(sources, notebook(cell))
    assert (one.access, one.sure) == ("definition", True)
    (write,) = discover(shop.settings(), [sources]).left
    assert (Path(write.file).name, write.sure) == ("app.py", True)


@pytest.mark.parametrize(
    "cell",
    [
        "%%sql\nupdate users\nset total_coins = 0",
        "\n%%sql postgresql://app@host/shop\nUPDATE users SET total_coins = 0",
        "%%sql update users set total_coins = 0",
        "%sql update users set total_coins = 0",
        "rows = %sql update users set name = 'x'\nrows = %sql update users set total_coins = 0",
        '!psql -c "update users set total_coins = 0"',
        '%%bash\npsql -c "update users set total_coins = 0"',
        "%matplotlib inline\n!pip install \\\n  sqlalchemy\nuser.total_coins = 0",
        "%%time\nuser.total_coins = 0",
        "%timeit -n 3 user.total_coins += 1",
        "if True:\n    !ls\n    user.total_coins = 0",
        "session.get?\nfiles = !ls\nuser.total_coins = 0  # why?",
        "await session.execute(update(User).values(total_coins=0))",
    ],
)
def test_magics_and_shell_escapes_hide_no_write(project: Project, sources: Path, cell: str) -> None:
    found = found_in(sources, notebook("import models", cell))
    assert [(one.access, one.column) for one in found] == [("write", "total_coins")]
    said = command(project, sources)
    assert said.exit_code == 3
    assert "not read:" not in said.stderr


def test_a_statement_ends_with_its_cell(sources: Path) -> None:
    found = found_in(sources, notebook("%%sql\nselect name from users", "%%sql\nupdate orders set total_coins = 1"))
    assert found == []


@pytest.mark.parametrize(
    "cells",
    [
        ("user.total_coins = 1  # walletmigrate: ignore a trial",),
        ("# walletmigrate: ignore a trial\n%sql update users set total_coins = 0",),
        ("%%sql\n-- walletmigrate: ignore a trial\nupdate users set total_coins = 0",),
        ("# walletmigrate: ignore-file a trial", "user.total_coins = 1", "%%sql\nupdate users set total_coins = 0"),
        ("# walletmigrate: ignore-file a trial", "print 'x'\nuser.total_coins = 1"),
    ],
)
def test_ignore_comments_hold_in_a_notebook(project: Project, sources: Path, cells: tuple[str, ...]) -> None:
    assert {one.accepted for one in found_in(sources, notebook(*cells))} == {"a trial"}
    assert command(project, sources).exit_code == 0


def test_an_ignore_comment_does_not_hold_for_the_next_cell(sources: Path) -> None:
    (one,) = found_in(sources, notebook("# walletmigrate: ignore a trial", "user.total_coins = 1"))
    assert one.left


def test_a_cell_that_does_not_parse_counts_if_it_names_the_column_and_the_rest_is_read(
    project: Project, sources: Path
) -> None:
    document = notebook("user.total_coins = 1  # walletmigrate: ignore a trial", "print 'x'\n", "x = 1")
    found_in(sources, document)
    said = command(project, sources)
    assert said.exit_code == 0, said
    assert "book.ipynb: cell 2: line 1: Missing parentheses" in said.stderr
    document["cells"][1]["source"].append("user.total_coins = 1")
    found = found_in(sources, document)
    assert [(one.access, one.scope) for one in found] == [("write", "cell 1"), ("unknown", "cell 2")]
    said = command(project, sources)
    assert said.exit_code == 3
    assert "it was read as plain text, and names total_coins" in said.stderr


@pytest.mark.parametrize("text", ['{"cells": [', "[]", '{"cells": [1]}', '{"worksheets": []}', '{"cells": {"a": 1}}'])
def test_what_is_no_notebook_is_read_as_text_and_told(project: Project, sources: Path, text: str) -> None:
    (sources / "book.ipynb").write_text(text)
    said = command(project, sources)
    assert said.exit_code == 0, said
    assert re.search(r"book\.ipynb: .*it was read as plain text", said.stderr)
    (sources / "book.ipynb").write_text(f'{text}\n"user.total_coins = 1\\n",\n"update users set total_coins = 1"')
    said = command(project, sources)
    assert said.exit_code == 3
    assert re.search(r"book\.ipynb:3 +write", said.stdout)


def test_a_notebook_in_another_language_is_read_as_text(project: Project, sources: Path) -> None:
    document = notebook("x <- 1 -> y\n", 'dbExecute(con, "update users set total_coins = 0")\n', language="R")
    (one,) = found_in(sources, document)
    assert (one.access, one.scope) == ("write", "cell 2")
    assert "not read:" not in command(project, sources).stderr


def test_copies_that_jupyter_keeps_are_not_read(sources: Path) -> None:
    (sources / ".ipynb_checkpoints").mkdir()
    (sources / ".ipynb_checkpoints" / "book.ipynb").write_text(json.dumps(notebook("user.total_coins = 1")))
    assert {Path(one.file).name for one in discover(shop.settings(), [sources]).findings} == {"models.py"}
