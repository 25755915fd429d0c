"""A fence that was down: install mends it, says so, and the gates ask for a verification that began after."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError

import commandline
from adapting import READ, placed
from ledger import ACT, engine_named, execute, install_users, rows, scalar, set_phase, until_blocked, users_settings
from walletmigrate import StaticSource, capture, phases
from walletmigrate.backfill import backfill
from walletmigrate.config import Settings
from walletmigrate.install import InstallResult, install
from walletmigrate.verify import verify

Ledger = tuple[Engine, Settings]
DOWN = {
    "disabled": "alter table users disable trigger all",
    "dropped": "drop trigger walletmigrate_users_update on users",
    "not in replica role": "alter table users enable trigger walletmigrate_users_update",
    "off and on again": "alter table users disable trigger walletmigrate_users_update; "
    "alter table users enable always trigger walletmigrate_users_update",
    "hollow": "create or replace function wallet.fence_users() returns trigger language plpgsql as "
    "'begin return null; end'",
}
PAST = "update users set total_coins = 7 where id = 4"


@pytest.fixture
def made(database_url: str) -> Ledger:
    """Ten mirrored accounts, verified, and everything open for the next phase but the exercise."""
    engine, settings = install_users(database_url, phase="dual_write")
    settings = settings.model_copy(update={"observation_window": timedelta(0)})
    backfill(engine, settings, settings.mapping(), ACT)
    assert verify(engine, settings, settings.mapping(), ACT).clean
    return engine, settings


def mend(made: Ledger, **options: Any) -> InstallResult:
    return install(*made, ACT, **options)


def missing(made: Ledger, window: timedelta = timedelta(0)) -> list[tuple[str, str]]:
    """What keeps the phase read_ledger closed, but for the exercise."""
    engine, settings = made
    wide = settings.model_copy(update={"observation_window": window})
    with engine.connect() as connection:
        found = phases.reasons(connection, wide, StaticSource(READ), "read_ledger")
    return [(what, mend) for what, mend in found if "exercised" not in what]


def mendings(engine: Engine) -> list[tuple[Any, ...]]:
    return rows(engine, "select mapping, details -> 'problems' from wallet.audit_log where action = 'fence mended'")


@pytest.mark.parametrize("change", DOWN.values(), ids=DOWN)
def test_a_fence_that_was_down_closes_the_gates_until_a_verification_that_began_after(
    made: Ledger, change: str
) -> None:
    engine, settings = made
    execute(engine, change)
    assert mend(made).mended == ("users",)
    ((mapping, problems),) = mendings(engine)
    assert mapping == "users"
    assert problems
    ((what, command),) = missing(made)
    assert what.startswith("the fence of 'users' was down until ")
    assert command == "walletmigrate verify --mark-stale --mapping users --reason '…'"
    assert verify(engine, settings, settings.mapping(), ACT).clean
    assert missing(made) == []


def test_what_was_written_past_the_fence_is_never_read_and_turns_stale_by_the_verification(made: Ledger) -> None:
    engine, settings = made
    execute(engine, DOWN["disabled"])
    execute(engine, PAST)
    mend(made)
    set_phase(engine, "read_ledger")
    at = placed(engine, settings, READ)
    with engine.begin() as connection:
        seen = at.adapter.balance(connection, 4)
    assert (seen.amount, seen.source, seen.compare) == (Decimal(7), "fallback", "mismatch")
    verify(engine, settings, settings.mapping(), ACT, mark_stale=True)
    assert rows(engine, "select key from wallet.accounts where state = 'stale'") == [("4",)]
    assert "1 stale of 10 accounts" in " ".join(what for what, _ in missing(made))
    backfill(engine, settings, settings.mapping(), ACT)
    verify(engine, settings, settings.mapping(), ACT)
    assert missing(made) == []


def test_a_fence_that_was_down_begins_the_observation_window_anew(made: Ledger) -> None:
    engine, settings = made
    execute(engine, DOWN["disabled"])
    mend(made)
    verify(engine, settings, settings.mapping(), ACT)
    told = [what for what, _ in missing(made, timedelta(hours=1))]
    assert any(what.startswith("1 mendings of a fence that was down in the observation window") for what in told)


def test_an_install_that_finds_the_fence_as_it_was_made_says_nothing_of_it(made: Ledger) -> None:
    assert (mend(made).mended, mend(made, dry_run=True).mended) == ((), ())
    assert (mendings(made[0]), missing(made)) == ([], [])


def test_a_first_install_and_a_column_that_the_mapping_gets_later_are_no_mending(database_url: str) -> None:
    engine, _ = install_users(database_url)
    more = users_settings(database_url, with_promo=True)
    done = install(engine, more, ACT)
    assert (done.fences_made, done.mended) == (("users",), ())
    assert mendings(engine) == []


def test_a_mending_waits_for_the_writers_that_went_past_the_fence(made: Ledger, database_url: str) -> None:
    """A verification that begins after it has seen them all, also where only the function had been replaced."""
    engine, settings = made
    execute(engine, DOWN["hollow"])
    with engine_named(database_url).begin() as writer:
        writer.exec_driver_sql(PAST)
        with pytest.raises(DBAPIError, match="lock timeout"):
            install_once(engine, settings)
        assert mendings(engine) == []
    assert mend(made).mended == ("users",)
    assert verify(engine, settings, settings.mapping(), ACT).drift_accounts == 1


def test_between_two_tries_the_traffic_passes(made: Ledger, database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, settings = made
    execute(engine, DOWN["hollow"])
    passed: list[float] = []
    with engine_named(database_url).begin() as slow, engine_named(database_url, lock_timeout_ms=1).connect() as quick:
        slow.exec_driver_sql("update users set total_coins = total_coins + 1 where id = 1")

        def traffic(seconds: float) -> None:
            quick.exec_driver_sql("update users set total_coins = total_coins + 1 where id = 2")
            quick.commit()
            passed.append(seconds)

        monkeypatch.setattr("walletmigrate.capture.FENCE_ATTEMPTS", 3)
        monkeypatch.setattr("walletmigrate.capture.time.sleep", traffic)
        with pytest.raises(DBAPIError, match="lock timeout"):
            install(engine, settings, ACT)
    assert passed == [0.5, 0.5]


@pytest.mark.parametrize(("sqlstate", "tries"), [("40P01", 2), ("55P03", 2), ("42501", 1)])
def test_what_waits_for_each_other_is_tried_again_and_nothing_else(
    made: Ledger, monkeypatch: pytest.MonkeyPatch, sqlstate: str, tries: int
) -> None:
    """A transaction that has read the table and then writes it may meet an install in a deadlock."""
    engine, _ = made
    monkeypatch.setattr("walletmigrate.capture.time.sleep", lambda _: None)
    tried: list[int] = []

    def work(connection: Connection) -> int:
        tried.append(1)
        if len(tried) == 1:
            connection.exec_driver_sql(f"do $$ begin raise exception 'no' using errcode = '{sqlstate}'; end $$")
        return 7

    with nullcontext() if tries == 2 else pytest.raises(DBAPIError):
        assert capture.with_short_locks(engine, work) == 7
    assert len(tried) == tries


def install_once(engine: Engine, settings: Settings) -> None:
    """An install that tries for the lock once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("walletmigrate.capture.FENCE_ATTEMPTS", 1)
        install(engine, settings, ACT)


def test_a_verification_that_looked_before_the_mending_does_not_count(made: Ledger, database_url: str) -> None:
    """Its snapshot is older than the mending, although it has hardly begun its work."""
    engine, settings = made
    verifier = engine_named(database_url, "verifier", lock_timeout_ms=60_000)
    with engine.begin() as blocker:
        blocker.exec_driver_sql("lock table wallet.system_accounts in access exclusive mode")
        thread = threading.Thread(target=lambda: verify(verifier, settings, settings.mapping(), ACT))
        thread.start()
        until_blocked(engine, "verifier")
        blocker.exec_driver_sql(
            "insert into wallet.audit_log (action, actor, reason, mapping) values ('fence mended', 'a', 'b', 'users')"
        )
    thread.join()
    assert scalar(engine, "select count(*) from wallet.verifications") == 2
    assert ["was down until" in what for what, _ in missing(made)] == [True]


def test_the_command_says_that_the_fence_was_down_and_what_to_do(database_url: str, tmp_path: Path) -> None:
    project, engine = commandline.project_at(tmp_path, database_url, "dual_write")
    execute(engine, DOWN["disabled"])
    said = project.change("install").stdout.splitlines()
    assert said[-2] == "the fence of users was down, and writes may have gone past it"
    assert said[-1] == "next: walletmigrate verify --mark-stale --reason '…'"
    execute(engine, DOWN["disabled"])
    assert project.run("install", "--json", *commandline.REASON).document["mended"] == ["users"]
