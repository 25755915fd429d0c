"""Freeze and unfreeze: the ledger alone is true, account by account, and legacy again."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

from ledger import (
    ACT,
    add_users,
    engine_named,
    execute,
    fence_down,
    install_users,
    journal,
    post,
    rows,
    scalar,
    set_phase,
    until_blocked,
)
from walletmigrate import job_batches, jobs, phases
from walletmigrate.backfill import backfill
from walletmigrate.config import Settings
from walletmigrate.errors import PreconditionRefused
from walletmigrate.freeze import FreezeResult, freeze, unfreeze
from walletmigrate.verify import verify

Ledger = tuple[Engine, Settings]
ROWS = 10


def prepared(url: str, **options: Any) -> Ledger:
    engine, settings = install_users(url, **{"rows": ROWS, "phase": "dual_write", **options})
    backfill(engine, settings, settings.mapping(), ACT)
    return engine, settings


@pytest.fixture
def made(database_url: str) -> Ledger:
    """Ten mirrored accounts of 100, and the phase is frozen already."""
    made = prepared(database_url)
    set_phase(made[0], "frozen")
    return made


def run_freeze(made: Ledger, **options: Any) -> FreezeResult:
    engine, settings = made
    return freeze(engine, settings, settings.mapping(), ACT, **{"batch_size": 3, **options})


def run_unfreeze(made: Ledger, **options: Any) -> FreezeResult:
    engine, settings = made
    return unfreeze(engine, settings, settings.mapping(), ACT, **{"batch_size": 3, **options})


def states(engine: Engine) -> dict[str, int]:
    pairs = rows(engine, "select state::text, count(*) from wallet.accounts group by state")
    return {str(state): int(count) for state, count in pairs}


def credit(made: Ledger, key: object, amount: object, **options: Any) -> dict[str, Any]:
    with made[0].begin() as connection:
        return post(connection, made[1], "credit", key, amount, **options)


def test_a_frozen_account_takes_postings_and_its_column_takes_no_writes(made: Ledger) -> None:
    engine, _ = made
    result = run_freeze(made)
    assert (result.changed, result.refused, result.keys, result.state) == (ROWS, 0, ROWS, "done")
    assert states(engine) == {"frozen": ROWS}
    posted = credit(made, 4, 5, dual=False)
    assert (posted["mode"], posted["creditor_ledger"]) == ("ledger", 105)
    assert scalar(engine, "select total_coins from users where id = 4") == 100
    for write in ("update users set total_coins = 1 where id = 4", "delete from users where id = 4"):
        with pytest.raises(DBAPIError) as caught:
            execute(engine, write)
        assert getattr(caught.value.orig, "sqlstate", None) == "WM030"


def test_unfreeze_writes_the_balances_back_and_mirrors_again(made: Ledger) -> None:
    engine, _ = made
    run_freeze(made)
    credit(made, 4, 5)
    credit(made, 5, "0.01")
    set_phase(engine, "wallet_only")
    result = run_unfreeze(made)
    assert (result.changed, result.refused, result.keys, result.state) == (ROWS, 0, ROWS, "done")
    assert states(engine) == {"mirrored": ROWS}
    assert rows(engine, "select id, total_coins from users where total_coins <> 100 order by id") == [
        (4, Decimal("105.00")),
        (5, Decimal("100.01")),
    ]
    assert verify(*made, made[1].mapping(), ACT).clean
    assert credit(made, 4, 1)["mode"] == "dual_write"


@pytest.mark.parametrize(
    "options",
    [
        {"key_type": "text"},
        {"key_type": "uuid"},
        {"with_promo": True},
        {"coins_type": "bigint", "coins": "10000", "unit": "minor"},
        {"coins_type": "double precision", "coins": "100.1 + 0.2"},
        {"key_type": 'text collate "ucs_basic"'},
    ],
    ids=["text", "uuid", "two columns", "cents", "float", "collation"],
)
def test_every_kind_of_mapping_goes_there_and_back(database_url: str, options: dict[str, Any]) -> None:
    made = prepared(database_url, **options)
    engine, settings = made
    accounts = ROWS * len(settings.mapping().columns)
    set_phase(engine, "frozen")
    assert run_freeze(made).changed == accounts
    key = scalar(engine, "select max(id::text) from users")
    credit(made, key, "2.50")
    set_phase(engine, "wallet_only")
    assert run_unfreeze(made).changed == accounts
    assert verify(engine, settings, settings.mapping(), ACT).clean


def test_running_twice_changes_nothing(made: Ledger) -> None:
    engine, _ = made
    run_freeze(made)
    before = journal(engine)
    again = run_freeze(made)
    assert (again.changed, again.refused) == (0, 0)
    assert journal(engine) == before
    set_phase(engine, "wallet_only")
    run_unfreeze(made)
    before = journal(engine)
    assert run_unfreeze(made).changed == 0
    assert journal(engine) == before


def test_what_is_absent_or_stale_or_differs_is_refused_until_a_backfill(made: Ledger) -> None:
    engine, settings = made
    set_phase(engine, "wallet_only")
    with fence_down(*made) as superuser:
        superuser.exec_driver_sql("update users set total_coins = 7 where id = 2")
    execute(engine, "update users set total_coins = 9 where id = 4")
    add_users(engine, 11, 11)
    set_phase(engine, "frozen")

    result = run_freeze(made)
    assert (result.changed, result.refused) == (8, 3)
    assert states(engine) == {"mirrored": 1, "stale": 1, "frozen": 8}
    assert rows(engine, "select items_done, items_failed from wallet.jobs where kind = 'freeze'") == [(8, 3)]

    backfill(engine, settings, settings.mapping(), ACT)
    result = run_freeze(made)
    # The absent one was opened frozen; the one that differs without knowing it is for verify and an operator.
    assert (result.changed, result.refused) == (1, 1)
    assert states(engine) == {"mirrored": 1, "frozen": 10}


def test_a_closed_account_is_left_out_of_account(made: Ledger) -> None:
    engine, _ = made
    execute(engine, "delete from users where id = 4")
    result = run_freeze(made)
    assert (result.changed, result.refused) == (ROWS - 1, 0)


def test_a_frozen_account_whose_row_is_gone_is_left_and_told(made: Ledger) -> None:
    engine, _ = made
    run_freeze(made)
    with fence_down(*made) as superuser:
        superuser.exec_driver_sql("delete from users where id = 4")
    set_phase(engine, "wallet_only")
    result = run_unfreeze(made)
    assert (result.changed, result.refused) == (ROWS - 1, 1)


@pytest.mark.parametrize("batches", [0, 1, 2])
def test_a_freeze_that_died_goes_on(made: Ledger, batches: int) -> None:
    class DiedError(BaseException):
        """Like a kill, it is no Exception that anything could handle."""

    left = iter(range(batches))

    def die() -> bool:
        if next(left, None) is None:
            raise DiedError
        return False

    with pytest.raises(DiedError):
        run_freeze(made, stop=die)
    assert scalar(made[0], "select count(*) from wallet.accounts where state = 'frozen'") == batches * 3
    result = run_freeze(made)
    assert (result.resumed, result.changed, result.refused) == (True, ROWS, 0)
    assert scalar(made[0], "select count(*) from wallet.jobs where kind = 'freeze'") == 1


def test_an_unfreeze_gives_up_an_unfinished_freeze_and_the_other_way_round(made: Ledger) -> None:
    engine, _ = made
    answers = iter([False, True])
    run_freeze(made, stop=lambda: next(answers))
    assert states(engine) == {"mirrored": 7, "frozen": 3}
    set_phase(engine, "wallet_only")
    assert run_unfreeze(made).changed == 3
    assert states(engine) == {"mirrored": ROWS}
    set_phase(engine, "frozen")
    # Had the first freeze been resumed, its first batch would have stayed mirrored.
    result = run_freeze(made)
    assert (result.resumed, result.changed, result.refused) == (False, ROWS, 0)
    ended = rows(engine, "select kind, state from wallet.jobs where kind <> 'backfill' order by id")
    assert ended == [("freeze", "cancelled"), ("unfreeze", "done"), ("freeze", "done")]


def test_it_waits_for_a_posting_in_flight_and_freezes_what_that_made(made: Ledger, database_url: str) -> None:
    engine, settings = made
    other = engine_named(database_url, "walletmigrate-other"), settings
    with engine.connect() as writer, ThreadPoolExecutor(1) as pool:
        post(writer, settings, "credit", 2, 5)
        running = pool.submit(run_freeze, other)
        until_blocked(engine, "walletmigrate-other")
        writer.commit()
        assert running.result(timeout=60).changed == ROWS
    found = rows(
        engine, "select a.state::text, a.balance, u.total_coins from users u, wallet.accounts a "
        "where u.id = 2 and a.key = '2'"
    )  # fmt: skip
    assert found == [("frozen", Decimal(105), Decimal(105))]


def test_the_phase_is_not_left_before_what_was_opened_in_it_is_there_to_be_unfrozen(
    made: Ledger, database_url: str
) -> None:
    """Until its transaction commits nobody else sees the account, and an unfreeze would pass it over."""
    engine, settings = made
    run_freeze(made)
    impatient = engine_named(database_url, lock_timeout_ms=100)
    with engine_named(database_url).begin() as opener:
        opener.exec_driver_sql("insert into users (id, tenant, role, total_coins) values (99, 'acme', 'member', 0)")
        post(opener, settings, "open_account", 99, 0)
        assert post(opener, settings, "credit", 99, 5)["mode"] == "ledger"
        with pytest.raises(DBAPIError, match="lock timeout"):
            phases.leave_frozen(impatient, settings, ACT)
    assert phases.leave_frozen(impatient, settings, ACT).after == "wallet_only"
    run_unfreeze(made)
    assert states(engine) == {"mirrored": ROWS + 1}
    assert scalar(engine, "select total_coins from users where id = 99") == 5


def test_who_waited_for_the_step_out_of_the_phase_opens_a_mirrored_account(made: Ledger, database_url: str) -> None:
    engine, settings = made
    add_users(engine, 99, 99)
    other = engine_named(database_url, "walletmigrate-other")

    def opened() -> str:
        with other.begin() as connection:
            return str(post(connection, settings, "open_account", 99, 0)["mode"])

    with engine.begin() as step, ThreadPoolExecutor(1) as pool:
        step.exec_driver_sql("update wallet.control set phase = 'wallet_only'")
        running = pool.submit(opened)
        until_blocked(engine, "walletmigrate-other")
        step.commit()
        assert running.result(timeout=60) == "dual_write"
    assert states(engine) == {"mirrored": ROWS + 1}


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
def test_who_still_sees_the_frozen_phase_opens_nothing_frozen_behind_the_unfreeze(
    made: Ledger, database_url: str, level: str
) -> None:
    engine, settings = made
    add_users(engine, 99, 99)
    with engine_named(database_url).connect().execution_options(isolation_level=level) as old:
        old.exec_driver_sql("select phase from wallet.control")
        phases.leave_frozen(engine, settings, ACT)
        run_unfreeze(made)
        with pytest.raises(DBAPIError, match="could not serialize access"):
            post(old, settings, "open_account", 99, 0)
    assert states(engine) == {"mirrored": ROWS}


@pytest.mark.parametrize(("run", "phase"), [(run_freeze, "wallet_only"), (run_unfreeze, "frozen")])
def test_a_dry_run_says_what_the_run_then_does_and_writes_nothing(made: Ledger, run: Any, phase: str) -> None:
    engine, _ = made
    if run is run_unfreeze:
        run_freeze(made)
        credit(made, 3, 5)
    else:
        execute(engine, "update users set total_coins = 9 where id = 4")
    # As the command does: the dry run before the phase has moved, the run after it.
    set_phase(engine, phase)
    before, jobs_before = journal(engine), scalar(engine, "select count(*) from wallet.jobs")
    planned = run(made, dry_run=True)
    assert journal(engine) == before
    assert scalar(engine, "select count(*) from wallet.jobs") == jobs_before
    set_phase(engine, "frozen" if run is run_freeze else "wallet_only")
    done = run(made)
    assert (planned.changed, planned.refused, planned.keys) == (done.changed, done.refused, done.keys)
    assert (planned.dry_run, planned.job_id, planned.state) == (True, None, "planned")


@pytest.mark.parametrize(
    ("run", "phase"), [(run_freeze, "wallet_only"), (run_freeze, "dual_write"), (run_unfreeze, "frozen")]
)
def test_the_phase_has_to_be_moved_first(made: Ledger, run: Any, phase: str) -> None:
    set_phase(made[0], phase)
    with pytest.raises(PreconditionRefused, match=f"the phase is {phase}"):
        run(made)
    assert states(made[0]) == {"mirrored": ROWS}


@pytest.mark.parametrize("run", [run_freeze, run_unfreeze])
def test_it_is_refused_without_the_fence_as_it_was_made(made: Ledger, run: Any) -> None:
    set_phase(made[0], "frozen" if run is run_freeze else "wallet_only")
    execute(made[0], "alter table users disable trigger walletmigrate_users_update")
    with pytest.raises(PreconditionRefused, match=re.escape("walletmigrate install")):
        run(made)
    assert states(made[0]) == {"mirrored": ROWS}


def test_a_balance_that_the_column_cannot_hold_is_refused_while_frozen_so_that_the_way_back_stays_open(
    database_url: str,
) -> None:
    made = prepared(database_url, coins_type="numeric(5, 2)")
    engine = made[0]
    set_phase(engine, "frozen")
    run_freeze(made)
    with engine.begin() as connection:
        assert post(connection, made[1], "credit", 5, 5000)["refusal"] == "overflow"
    set_phase(engine, "wallet_only")
    assert run_unfreeze(made).changed == ROWS


def test_a_balance_that_the_application_forbids_is_set_aside_and_all_others_are_unfrozen(made: Ledger) -> None:
    engine, settings = made
    set_phase(engine, "frozen")
    run_freeze(made)
    credit(made, 5, 5000)
    execute(engine, "alter table users add constraint at_most check (total_coins < 1000)")
    set_phase(engine, "wallet_only")
    result = run_unfreeze(made)
    assert (result.state, result.changed, result.refused) == ("done", ROWS - 1, 1)
    assert states(engine) == {"mirrored": ROWS - 1, "frozen": 1}
    with engine.connect() as connection:
        (aside,) = job_batches.set_aside(connection, settings, result.job_id or 0)
    assert aside.key == "5"
    assert "at_most" in aside.reason
    with engine.begin() as connection:
        post(connection, settings, "debit", 5, 4500)
    result = run_unfreeze(made)
    assert (result.resumed, result.changed, result.refused) == (False, 1, 0)


def test_a_row_whose_written_balance_a_trigger_changes_stays_frozen(made: Ledger) -> None:
    engine, _ = made
    run_freeze(made)
    credit(made, 5, 5)
    execute(
        engine,
        "create function public.meddle() returns trigger language plpgsql as "
        "$$ begin new.total_coins := new.total_coins + 1; return new; end $$",
    )
    execute(
        engine,
        "create trigger meddle before update on users for each row when (new.id = 5) execute function public.meddle()",
    )
    set_phase(engine, "wallet_only")
    assert run_unfreeze(made).refused == 1
    assert rows(engine, "select key from wallet.accounts where state = 'frozen'") == [("5",)]
    assert rows(engine, "select upto_key, error like '%WM020%' from wallet.job_batches") == [("5", True)]


def test_a_fence_that_falls_meanwhile_fails_the_job_at_its_end(made: Ledger) -> None:
    engine, _ = made

    def cut(job: jobs.Job) -> None:
        if job.cursor == "3":
            execute(engine, "drop trigger walletmigrate_users_update on users")

    with pytest.raises(PreconditionRefused, match="walletmigrate_users_update"):
        run_freeze(made, progress=cut)
    assert rows(engine, "select state from wallet.jobs where kind = 'freeze'") == [("failed",)]


def test_it_is_on_record_with_actor_and_reason(made: Ledger) -> None:
    engine, _ = made
    job_id = run_freeze(made).job_id
    query = "select action, actor, reason, mapping from wallet.audit_log where job_id = :id order by id"
    audit = rows(engine, query, id=job_id)
    assert audit == [(f"freeze {word}", ACT.actor, ACT.reason, "users") for word in ("start", "done")]


def test_the_operators_role_may_do_it(made: Ledger, database_url: str) -> None:
    operator = engine_named(database_url, role="wallet_operator"), made[1]
    assert run_freeze(operator).changed == ROWS
    set_phase(made[0], "wallet_only")
    assert run_unfreeze(operator).changed == ROWS


@pytest.mark.parametrize("kind", ["freeze", "unfreeze"])
def test_a_job_starts_under_the_lock_of_the_phase_that_it_needs(made: Ledger, database_url: str, kind: str) -> None:
    """The phase goes the other way, unseen yet, while the job looks at it: the job must wait, and then not start."""
    engine, settings = made
    phase, other, job = ("frozen", "wallet_only", freeze) if kind == "freeze" else ("wallet_only", "frozen", unfreeze)
    if kind == "unfreeze":
        run_freeze(made)
    set_phase(engine, phase)
    before = (states(engine), scalar(engine, "select count(*) from wallet.jobs"))
    worker = engine_named(database_url, "worker", lock_timeout_ms=60_000)
    with ThreadPoolExecutor(1) as threads, engine.connect() as operator:
        with operator.begin():
            operator.exec_driver_sql("select from wallet.control for update")
            operator.exec_driver_sql(f"update wallet.control set phase = '{other}'")
            started = threads.submit(job, worker, settings, settings.mapping(), ACT)
            until_blocked(engine, "worker")
        with pytest.raises(PreconditionRefused, match=f"the phase is {other}"):
            started.result(60)
    assert (states(engine), scalar(engine, "select count(*) from wallet.jobs")) == before
