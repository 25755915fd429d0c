"""Discovery in sources: what touches the mapped columns is found, what has the same name is not."""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import shop
from commandline import Project
from discovering import MODELS, project, sources
from walletmigrate.discover import discover
from walletmigrate.errors import UsageError
from walletmigrate.findings import Catalogue, Finding
from walletmigrate.source_files import MAX_BYTES

__all__ = ["project", "sources"]

DOCUMENT = Path(__file__).parents[1] / "docs" / "discover.md"


def found_in(folder: Path, **options: Any) -> Catalogue:
    return discover(shop.settings(), [folder], **options)


def python(folder: Path, text: str, name: str = "code.py") -> list[Finding]:
    """What is found in one module beside a model of the table."""
    (folder / "models.py").write_text(MODELS)
    (folder / name).write_text(text, encoding="utf-8")
    return [one for one in found_in(folder).findings if one.file.endswith(name)]


def test_every_line_of_the_shop_is_found_as_its_comment_says_and_nothing_else() -> None:
    there = shop.truth()
    found = shop.places(discover(shop.settings(), [shop.SHOP]))
    wanted = there.there + there.false
    assert found - wanted == Counter(), "found, and not marked"
    assert wanted - found == Counter(), "marked, and not found"
    assert found & there.missed == Counter(), "marked as missed, and found after all"
    assert sum(wanted.values()) > 140


def test_the_counts_in_the_documentation_are_those_of_the_shop() -> None:
    there = shop.truth()
    text = DOCUMENT.read_text(encoding="utf-8")
    for access in ("write", "read", "definition", "unknown"):
        counts = [sum(n for place, n in each.items() if place[2] == access) for each in (there.there, there.missed)]
        false = sum(n for place, n in there.false.items() if place[2] == access)
        row = f"| {access} | {counts[0] + counts[1]} | {counts[0]} | {counts[1]} | {false} |"
        assert row in text, row


def test_a_finding_names_file_line_function_access_and_code(sources: Path) -> None:
    (one,) = python(sources, "class Till:\n    def pay(self, user):\n        user.total_coins += 10\n")
    assert (one.line, one.access, one.column, one.scope) == (3, "write", "total_coins", "Till.pay")
    assert (one.code, one.sure, one.adapter, one.left) == ("user.total_coins += 10", True, False, True)


@pytest.mark.parametrize(
    ("code", "access"),
    [
        ("def f(x):\n    x.total_coins = 1", "write"),
        ("def f(payee):\n    return payee.total_coins", "read"),
        ("import models\ndef f(s):\n    s.get(models.User, 1).total_coins = 2", "write"),
        ("from models import User as U\nU(total_coins=1)", "write"),
        ("from models import User\nfor row in q.execute(select(User)).scalars():\n    row.total_coins = 3", "write"),
        ("from models import User\nmaker = {'total_coins': 1}\nUser(**maker)", "write"),
        ('SQL = """\nupdate users\nset total_coins = 1\n"""', "write"),
        ("sql = 'update ' + name + ' set total_coins = 0'", "write"),
        ("sql = f'update {name} set total_coins = 0'", "write"),
    ],
)
def test_a_place_that_touches_the_column_is_found(sources: Path, code: str, access: str) -> None:
    assert access in {one.access for one in python(sources, code)}


@pytest.mark.parametrize(
    "code",
    [
        "from models import Order\ndef f(x: Order):\n    x.total_coins = 1",
        "from models import Order\ndef f(s):\n    s.query(Order).filter(Order.id > 1).update({'total_coins': 0})",
        "from models import Order\nfor x in s.scalars(select(Order)):\n    x.total_coins = 1",
        "class Basket:\n    def f(self):\n        self.total_coins = 1",
        "from models import Order\ndef f(order):\n    order.total_coins = 1",
        "def f():\n    'Sets users.total_coins: update users set total_coins = 1'",
        "log.info('cannot update the total_coins of users')",
        "import total\ntotal.total_coins = 1",
        "s.execute(text('update orders set total_coins = :total_coins'), {'total_coins': 1})",
    ],
)
def test_what_only_has_the_same_name_is_not(sources: Path, code: str) -> None:
    assert python(sources, code) == []


def test_attributes_that_an_adapter_watches_go_through_it_and_bulk_statements_do_not(sources: Path) -> None:
    found = python(
        sources,
        "from models import User\nfrom walletmigrate import LegacyBalanceAdapter\n"
        "adapter = LegacyBalanceAdapter.from_config()\nadapter.watch(User.total_coins)\n"
        "def f(user: User):\n    user.total_coins += 1\n    s.execute(update(User).values(total_coins=0))\n",
    )
    assert {one.line: one.adapter for one in found if one.access == "write"} == {6: True, 7: False}


def test_the_same_calls_of_what_is_no_adapter_are_not_taken_for_it(sources: Path) -> None:
    assert python(sources, "bank.credit(session, 1, 2)\n") == []


@pytest.mark.parametrize(
    ("comment", "reason"),
    [
        ("  # walletmigrate: ignore the importer", "the importer"),
        ("  # noqa: E501  # walletmigrate: ignore the importer", "the importer"),
        ("  # walletmigrate: ignore the importer (#12)  # noqa: E501", "the importer (#12)"),
        ("  # walletmigrate: ignore", None),
        ("  # walletmigrate: keep", None),
    ],
)
def test_an_ignore_comment_accepts_with_its_reason_only(sources: Path, comment: str, reason: str | None) -> None:
    (one,) = python(sources, f"user.total_coins = 1{comment}\n")
    assert (one.accepted, one.left) == (reason, reason is None)


def test_an_ignore_comment_holds_for_its_statement_and_not_for_the_next(sources: Path) -> None:
    found = python(
        sources,
        "# walletmigrate: ignore the first\ns.execute(\n    'update users set '\n    'total_coins = 1'\n)\n"
        "user.total_coins = 2\nif user.total_coins == 1:  # walletmigrate: ignore the head\n    user.total_coins = 3\n",
    )
    accepted = {one.line: one.accepted for one in found}
    assert accepted == {4: "the first", 6: None, 7: "the head", 8: None}


def test_a_whole_file_can_be_accepted(sources: Path) -> None:
    found = python(sources, "# walletmigrate: ignore-file written before the ledger\nuser.total_coins = 1\n")
    assert [one.accepted for one in found] == ["written before the ledger"]


def test_what_cannot_be_read_is_listed_and_the_rest_is_read(sources: Path) -> None:
    (sources / "broken.py").write_text("def f(:\n    x('update users set total_coins = 1')\n")
    (sources / "latin.py").write_bytes(b"x = '\xe9'\nuser.total_coins = 1\n")
    (sources / "declared.py").write_bytes(b"# coding: latin-1\n# \xe9\nuser.total_coins = 1\n")
    (sources / "deep.py").write_text("x = " + "(" * 5000 + ")" * 5000)
    (sources / "long.py").write_text(f"x = 1{' + 1' * 2000}\nsql = 'update users set total_coins = 1'\n")
    (sources / "huge.sql").write_text("select 1;\n" * (MAX_BYTES // 10 + 1))
    found = found_in(sources)
    assert {Path(one.file).name for one in found.unread} == {"broken.py", "latin.py", "deep.py", "long.py", "huge.sql"}
    assert {Path(one.file).name for one in found.left} == {"broken.py", "declared.py", "long.py"}


def test_links_binaries_and_other_people_s_folders_are_not_read(sources: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.py"
    outside.write_text("user.total_coins = 1\n")
    code = outside.read_text()
    (sources / "link.py").symlink_to(outside)
    (sources / "loop").symlink_to(sources)
    (sources / "gone.py").symlink_to(tmp_path / "nothing")
    (sources / "image.py").write_bytes(b"\0" + code.encode())
    os.mkfifo(sources / "pipe.py")
    for folder in (".git", ".venv", "node_modules", "myenv"):
        (sources / folder).mkdir()
        (sources / folder / "code.py").write_text(code)
    (sources / "myenv" / "pyvenv.cfg").touch()
    found = found_in(sources)
    assert (found.findings, found.unread, found.files) == ((), (), 0)


def test_excluded_paths_are_left_out_and_a_file_given_twice_is_read_once(sources: Path) -> None:
    (sources / "tests").mkdir()
    (sources / "tests" / "test_it.py").write_text("user.total_coins = 1\n")
    (sources / "app.py").write_text("user.total_coins = 1\n")
    found = discover(shop.settings(), [sources, sources / "app.py"], exclude=["tests"])
    assert [Path(one.file).name for one in found.findings] == ["app.py"]


def test_a_source_that_does_not_exist_is_refused(sources: Path) -> None:
    with pytest.raises(UsageError, match=r"there is no .*nowhere"):
        found_in(sources / "nowhere")


def test_without_a_mapped_class_the_column_s_own_name_is_looked_for_and_that_is_said(sources: Path) -> None:
    (sources / "app.py").write_text("def f(user):\n    user.total_coins = 1\n")
    found = found_in(sources)
    assert len(found.left) == 1
    assert any("no class or table of public.users" in note for note in found.notes)


def test_the_command_ends_with_3_while_direct_writes_are_left_and_needs_no_database(
    project: Project, sources: Path
) -> None:
    code = sources / "app.py"
    code.write_text("def pay(user):\n    user.total_coins += 1\n")
    said = project.run("discover", "--source", str(sources), "--no-database")
    assert said.exit_code == 3, said
    assert re.search(r"app\.py:2 +write\? +total_coins +pay +attribute\n", said.stdout)
    assert "direct writes left: 1; reads 0" in said.stdout
    code.write_text("def pay(user):\n    print(user.total_coins)\n")
    assert project.run("discover", "--source", str(sources), "--no-database").exit_code == 0


def test_what_nobody_looked_at_is_not_called_clean(project: Project, sources: Path) -> None:
    words = ("discover", "--source", str(sources), "--no-database")
    said = project.run(*words)
    assert said.exit_code == 2
    assert "no file was read under" in said.stderr
    (sources / "app.py").write_text("print(1)\n")
    (sources / "broken.py").write_text("def (")
    assert project.run(*words).exit_code == 0, "it was read as plain text"
    (sources / "huge.sql").write_text("-- nothing\n" * (MAX_BYTES // 10))
    said = project.run(*words)
    assert said.exit_code == 3
    assert "1 not read at all" in said.stderr
    assert project.run(*words, "--exclude", "*.sql").exit_code == 0


def test_json_is_one_document_with_every_finding(project: Project, sources: Path) -> None:
    (sources / "app.py").write_text("def pay(user):\n    user.total_coins += 1\n")
    (sources / "bad.py").write_text("def (")
    said = project.run("discover", "--source", str(sources), "--no-database", "--json")
    assert said.exit_code == 3
    assert (said.document["left"], said.document["files"]) == (1, 2)
    (one,) = said.document["findings"]
    assert (one["line"], one["access"], one["column"], one["left"]) == (2, "write", "total_coins", True)
    assert [Path(each["file"]).name for each in said.document["unread"]] == ["bad.py"]


def test_the_check_list_has_an_open_box_for_what_is_left_and_a_ticked_one_for_what_is_not(
    project: Project, sources: Path, tmp_path: Path
) -> None:
    (sources / "app.py").write_text(
        "def pay(user):\n    user.total_coins += 1\n    user.total_coins = 0  # walletmigrate: ignore a test user\n"
    )
    file = tmp_path / "moving.md"
    project.run("discover", "--source", str(sources), "--no-database", "--markdown", str(file))
    text = file.read_text(encoding="utf-8")
    assert re.search(r"## Direct writes\n\n- \[ \] `.*app\.py:2` in pay: write", text)
    assert re.search(r"## Accepted\n\n- \[x\] `.*app\.py:3` in pay: .*accepted: a test user", text)
    printed = project.run("discover", "--source", str(sources), "--no-database", "--format", "markdown").stdout
    assert printed == text


@pytest.mark.parametrize(
    "words", [("--source", "nowhere"), ("--source", ".", "--since", "soon"), ("--source", ".", "--markdown", "/no/x")]
)
def test_bad_input_of_the_command_ends_with_2(project: Project, sources: Path, words: tuple[str, ...]) -> None:
    given = [str(sources) if word == "." else word for word in words]
    assert project.run("discover", *given, "--no-database").exit_code == 2


def test_a_database_that_is_away_is_said_and_nothing_is_half_done(project: Project, sources: Path) -> None:
    assert project.run("discover", "--source", str(sources)).exit_code == 5
