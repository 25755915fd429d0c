"""What tests begin with by a copy is what they would have made, and nothing that somebody has used is replaced."""

from __future__ import annotations

import uuid

import pytest
from sqlalchemy import make_url

import copies
from conftest import MakeDatabase
from ledger import engine_named, execute, install_users, journal, rows
from walletmigrate.capture import fence_problems


def test_the_third_who_asks_gets_a_copy_with_what_belongs_to_it(make_database: MakeDatabase) -> None:
    made: list[str] = []
    what = str(uuid.uuid4())

    def begun(url: str) -> tuple[str, list[tuple[object, ...]]]:
        def make() -> str:
            made.append(url)
            execute(engine_named(url), "create table one as select 1 as n")
            return url

        given = copies.copied(url, what, make)
        return given, rows(engine_named(url), "select n from one")

    first, second, third, fourth = (make_database() for _ in range(4))
    assert begun(first) == (first, [(1,)])
    assert begun(second) == (second, [(1,)])
    execute(engine_named(second), "update one set n = 2")
    assert begun(third) == begun(fourth) == (second, [(1,)])
    assert made == [first, second]


@pytest.mark.parametrize(
    "use",
    ["create table mine ()", "alter database {0} set lock_timeout = '1s'", "alter database {0} connection limit 9"],
)
def test_a_database_that_somebody_has_used_is_not_replaced(make_database: MakeDatabase, use: str) -> None:
    what, made = str(uuid.uuid4()), []
    for _ in range(2):
        copies.copied(make_database(), what, lambda: made.append("anew"))
    used = make_database()
    name = used.rpartition("?")[0].rpartition("/")[2]
    at = make_database() if use.startswith("alter") else used
    execute(engine_named(at), use.format(name))
    copies.copied(used, what, lambda: made.append("anew"))
    assert made == ["anew"] * 3


def test_a_copy_in_whose_place_another_one_comes_is_given_to_nobody(make_database: MakeDatabase) -> None:
    """Nobody has been in it, and it is not empty."""
    one, more = str(uuid.uuid4()), str(uuid.uuid4())

    def begun(url: str) -> None:
        copies.copied(url, one, lambda: execute(engine_named(url), "create table one ()"))
        copies.copied(url, more, lambda: execute(engine_named(url), "create table more ()"))

    tables = "select relname from pg_class where relname in ('one', 'more') order by 1"
    made = [make_database() for _ in range(4)]
    for url in made:
        begun(url)
    assert [rows(engine_named(url), tables) for url in made] == [[("more",), ("one",)]] * 4
    for _ in range(4):  # first come those that are to spare
        assert rows(engine_named(make_database()), tables) == []


def test_an_unused_database_goes_to_the_next_who_asks_when_a_copy_takes_its_place(make_database: MakeDatabase) -> None:
    what, here = str(uuid.uuid4()), engine_named(make_database())

    def identity(url: str) -> list[tuple[object, ...]]:
        return rows(here, f"select oid from pg_database where datname = '{make_url(url).database}'")

    for _ in range(2):
        copies.copied(make_database(), what, lambda: None)
    url = make_database()
    unused = identity(url)
    copies.copied(url, what, lambda: None)
    assert identity(url) != unused == identity(make_database())


def test_a_copied_ledger_is_the_one_that_an_install_makes(
    make_database: MakeDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        install_users(make_database(), rows=2)
    copy, settings = install_users(make_database(), rows=2)
    monkeypatch.setattr(copies, "ANEW", ["to compare"])
    anew, _ = install_users(make_database(), rows=2)
    functions = "select oid::regprocedure::text, prosrc, proacl::text from pg_proc where oid >= 16384 order by 1"
    assert rows(copy, functions) == rows(anew, functions)
    assert journal(copy) == journal(anew)
    with copy.connect() as connection:
        assert fence_problems(connection, settings, settings.mapping(None)) == []
