"""Rolling deploys: two releases of the library on one schema, both posting, while one of them installs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from decimal import Decimal
from threading import Thread
from typing import Any

import pytest
from sqlalchemy import Engine

import adapting
from conftest import MakeDatabase
from ledger import engine_named, execute, install_users, scalar, until_blocked
from release_steps import step
from releases import Poster, Release, legacy_total, next_release, this_release
from walletmigrate import LegacyBalanceAdapter, Settings, StaticSource


@pytest.fixture(scope="module")
def newer(tmp_path_factory: pytest.TempPathFactory) -> Release:
    return next_release(tmp_path_factory.mktemp("next"))


@pytest.fixture
def url(make_database: MakeDatabase) -> str:
    return make_database()


@pytest.fixture
def place(url: str) -> tuple[Engine, Settings]:
    return install_users(url, phase="dual_write")


Begin = Callable[[Release, str], Poster]


@pytest.fixture
def begin(url: str) -> Iterator[Begin]:
    """Starts processes that post; those that a failed test leaves behind are ended."""
    made: list[Poster] = []

    def start(release: Release, name: str) -> Poster:
        made.append(Poster(release, url, name))
        return made[-1]

    yield start
    for one in made:
        one.kill()


def check(engine: Engine, settings: Settings, told: list[dict[str, Any]]) -> None:
    """No posting failed or went past the ledger, every one is in the sum, and the ledger is sound."""
    assert [one["errors"] for one in told] == [[]] * len(told)
    assert {mode for one in told for mode in one["modes"]} == {"dual_write"}
    assert legacy_total(engine) == 1000 + sum(Decimal(one["change"]) for one in told)
    assert scalar(engine, "select count(*) from wallet.failures") == 0
    adapting.check_invariants(engine, settings)


def test_two_releases_post_on_one_schema_while_the_newer_one_is_installed(
    place: tuple[Engine, Settings], url: str, newer: Release, begin: Begin
) -> None:
    engine, settings = place
    old, new = begin(this_release(), "old"), begin(newer, "new")  # the newer one on the old schema
    for one in (old, new):
        one.more()
    assert newer.run(url, "install") == ["0002"]
    for one in (old, new):
        one.more()
    late = begin(this_release(), "late")  # a process of the older release that is started only now
    late.more()
    told = [one.end() for one in (old, new, late)]
    assert [one["functions"] for one in told] == [newer.version - 1, newer.version, newer.version - 1]
    check(engine, settings, told)
    count = "select count(*) from wallet.transactions where release = 'the next' and type = :name"
    assert all(scalar(engine, count, name=name) > 0 for name in ("old", "new", "late"))
    assert scalar(engine, "select functions_version from wallet.mappings") == newer.version


def test_what_an_operator_does_works_with_either_release_on_either_schema(
    place: tuple[Engine, Settings], url: str, newer: Release
) -> None:
    engine, settings = place
    execute(engine, "delete from public.users where id > 6")
    opened, clean, phase, before, _, after = newer.run(
        url, "backfill", "verify", "status", "doctor", "install", "doctor"
    )
    assert (opened, clean, phase, after) == (6, True, "dual_write", [])
    assert [one.partition(",")[2] for one in before] == [
        " this release makes 2",
        " this release has 0002: it was not installed yet",
    ]
    execute(engine, "insert into public.users (id, tenant, role, total_coins) values (20, 'acme', 'member', 7)")
    assert step(url, "backfill") == 1
    assert step(url, "verify") is True
    assert step(url, "status") == "dual_write"
    found = step(url, "doctor")
    assert [("a newer release was installed" in one) for one in found] == [True] * 2, found
    adapting.check_invariants(engine, settings)


def test_an_older_release_takes_nothing_back_that_a_newer_one_has_put_in(
    place: tuple[Engine, Settings], url: str, newer: Release
) -> None:
    engine, _ = place
    newer.run(url, "install")
    bodies = "select md5(string_agg(prosrc, '' order by oid)) from pg_proc where pronamespace = 'wallet'::regnamespace"
    before = scalar(engine, bodies)
    for name, said in (("install", "at revision 0002, which this release does not know"), ("mode", "newer release")):
        error, code, words = step(url, name)
        assert (error, code, said in words) == ("PreconditionRefused", 4, True), words
    # Also where a release has newer functions and no newer migration.
    execute(engine, "update wallet.schema_version set version_num = '0001'")
    error, code, words = step(url, "install")
    assert (error, code, "a newer one made them" in words) == ("PreconditionRefused", 4, True), words
    assert scalar(engine, bodies) == before
    assert scalar(engine, "select capture_mode from wallet.mappings") == "stale"
    execute(engine, "update wallet.schema_version set version_num = '0002'")
    assert newer.run(url, "mode") == ["mirror"]


@pytest.mark.parametrize("description", [None, "the long way"])
def test_a_posting_that_begins_with_older_functions_ends_with_newer_ones(
    place: tuple[Engine, Settings], url: str, newer: Release, description: str | None
) -> None:
    """It waits for its account in the middle, and everything is replaced under it."""
    engine, settings = place
    adapter = LegacyBalanceAdapter(settings, StaticSource({"wallet.dualWrite": True}))
    with engine.begin() as connection:
        adapter.credit(connection, 1, 5, type="before")
    other = engine_named(url, "in the middle", lock_timeout_ms=0)
    done: list[Any] = []

    def post() -> None:
        with other.begin() as connection:
            done.append(adapter.credit(connection, 1, 7, type="across", description=description))

    with engine.connect() as holder:
        holder.exec_driver_sql("select * from wallet.accounts where key = '1' for update")
        thread = Thread(target=post)
        thread.start()
        until_blocked(engine, "in the middle")
        assert newer.run(url, "install") == ["0002"]
        assert thread.is_alive()
        holder.rollback()
        thread.join(60)
    assert [(one.mode, one.ledger_balance) for one in done] == [("dual_write", Decimal(112))]
    query = "select release from wallet.transactions where type = 'across'"
    assert scalar(engine, query) == "the next"
    adapting.check_invariants(engine, settings)


def test_a_fence_that_is_mended_by_the_newer_release_is_mended_under_traffic(
    place: tuple[Engine, Settings], url: str, newer: Release, begin: Begin
) -> None:
    """The install has to lock the legacy table and the journal, in the order in which postings do."""
    engine, settings = place
    posters = [begin(this_release(), f"old {number}") for number in range(2)]
    execute(engine, "drop trigger walletmigrate_users_truncate on users")
    assert newer.run(url, "install") == ["0002"]
    for one in posters:
        one.more()
    check(engine, settings, [one.end() for one in posters])
