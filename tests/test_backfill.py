"""Backfill: each account exactly once, whatever kills it and whoever writes meanwhile."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import Engine, text

import ledger
from ledger import ACT, engine_named, execute, install_users, journal, post, rows, scalar, set_phase
from walletmigrate import job_batches, jobs, phases
from walletmigrate.backfill import BackfillResult, backfill
from walletmigrate.config import Settings
from walletmigrate.errors import JobFailed, LedgerNotInstalled, PreconditionRefused
from walletmigrate.install import uninstall

Ledger = tuple[Engine, Settings]
ROWS = 20


@pytest.fixture
def made(database_url: str) -> Ledger:
    return install_users(database_url, rows=ROWS, coins="100 + g", phase="dual_write")


def run(made: Ledger, **options: Any) -> BackfillResult:
    engine, settings = made
    return backfill(engine, settings, settings.mapping(), ACT, **{"batch_size": 5, **options})


def assert_whole(engine: Engine, accounts: int = ROWS) -> None:
    """Every row has one account with its balance, and one opening explains it."""
    assert scalar(engine, "select count(*) from wallet.accounts") == accounts
    wrong = rows(
        engine,
        "select u.id, u.total_coins, a.balance, t.openings from users as u "
        'left join wallet.accounts as a on a.key = u.id::text collate "C" '
        "and a.bucket = 'cash' and a.state = 'mirrored' "
        "left join lateral (select count(*) as openings, sum(amount) as amount from wallet.transactions "
        "where credit_account = a.id and debit_account = -1 and kind = 'opening') as t on true "
        "where a.balance is distinct from u.total_coins or t.openings <> 1",
    )
    assert wrong == []
    assert scalar(
        engine,
        "select sum(balance) from (select balance from wallet.accounts "
        "union all select balance from wallet.system_balances) as x",
    ) == Decimal(0)


def test_every_row_gets_an_account_and_an_opening_that_names_the_job(made: Ledger) -> None:
    engine, _ = made
    result = run(made)
    assert (result.opened, result.resynced, result.failed, result.keys) == (ROWS, 0, 0, ROWS)
    assert (result.state, result.resumed, result.dry_run) == ("done", False, False)
    assert_whole(engine)
    assert rows(engine, "select distinct job_id, kind::text from wallet.transactions") == [(result.job_id, "opening")]
    assert rows(engine, "select distinct job_id from wallet.accounts") == [(result.job_id,)]
    job = rows(engine, "select state, items_total, items_done, items_failed from wallet.jobs")
    assert job == [("done", ROWS, ROWS, 0)]
    audit = rows(engine, "select action, actor, reason, job_id from wallet.audit_log where mapping = 'users'")
    assert audit == [(f"backfill {word}", ACT.actor, ACT.reason, result.job_id) for word in ("start", "done")]


ROOM = "select reloptions from pg_class where oid = 'wallet.accounts'::regclass"


def test_openings_leave_room_that_postings_then_use_up_before_they_look_for_dead_versions(made: Ledger) -> None:
    engine, _ = made
    seen = []
    run(made)
    assert scalar(engine, ROOM) == ["fillfactor=90"]
    run(made, progress=lambda *_: seen.append(scalar(engine, ROOM)))
    assert seen
    assert set(map(tuple, seen)) == {("fillfactor=70",)}
    assert scalar(engine, ROOM) == ["fillfactor=90"]


def test_room_that_a_vacuum_holds_fast_stops_no_backfill(made: Ledger) -> None:
    engine, _ = made
    with engine.connect() as vacuum:
        vacuum.exec_driver_sql("lock table wallet.accounts in share update exclusive mode")
        assert run(made).opened == ROWS
    assert scalar(engine, ROOM) == ["fillfactor=70"]
    assert run(made).state == "done"
    assert scalar(engine, ROOM) == ["fillfactor=90"]


def test_running_twice_changes_nothing(made: Ledger) -> None:
    run(made)
    before = journal(made[0])
    again = run(made)
    assert (again.opened, again.resynced, again.failed, again.keys) == (0, 0, 0, ROWS)
    assert journal(made[0]) == before


def test_a_balance_of_zero_opens_without_a_transaction_and_a_debt_opens_as_it_is(database_url: str) -> None:
    made = install_users(database_url, rows=3, coins="(g - 2) * 10.5", phase="dual_write")
    run(made)
    engine = made[0]
    assert rows(engine, "select key, balance from wallet.accounts order by key") == [
        ("1", Decimal("-10.50")),
        ("2", Decimal("0.00")),
        ("3", Decimal("10.50")),
    ]
    openings = rows(engine, "select debit_account < 0, amount from wallet.transactions order by id")
    assert openings == [(False, Decimal("10.50")), (True, Decimal("10.50"))]


@pytest.mark.parametrize("key", [1, 9, 20])
def test_a_row_that_fails_is_set_aside_with_its_reason_and_the_next_run_opens_it(made: Ledger, key: int) -> None:
    engine, settings = made
    execute(
        engine,
        "create function public.stopper() returns trigger language plpgsql as "
        f"$$ begin if new.key = '{key}' then raise exception 'stopped'; end if; return new; end $$",
    )
    execute(
        engine,
        "create trigger stopper before insert on wallet.accounts for each row execute function public.stopper()",
    )
    result = run(made)
    assert (result.state, result.opened, result.failed, result.keys) == ("done", ROWS - 1, 1, ROWS - 1)
    with engine.connect() as connection:
        (aside,) = job_batches.set_aside(connection, settings, result.job_id or 0)
    assert (aside.key, aside.reason) == (str(key), "stopped (P0001)")
    assert rows(engine, "select items_done, items_failed, items_total from wallet.jobs") == [(ROWS - 1, 1, ROWS)]
    execute(engine, "drop trigger stopper on wallet.accounts")
    result = run(made)
    assert (result.resumed, result.opened, result.failed, result.keys) == (False, 1, 0, ROWS)
    assert_whole(engine)


def test_a_function_that_is_broken_is_not_tried_row_by_row(made: Ledger) -> None:
    engine, _ = made
    execute(
        engine,
        "create function public.stopper() returns trigger language plpgsql as $$ begin raise 'stopped'; end $$",
    )
    execute(engine, "create trigger stopper before insert on wallet.accounts execute function public.stopper()")
    with pytest.raises(JobFailed, match="the first 10 batches failed for the same reason: stopped"):
        run(made, batch_size=ROWS)
    assert scalar(engine, "select count(*) from wallet.job_batches where state = 'set_aside'") == 0
    execute(engine, "drop trigger stopper on wallet.accounts")
    result = run(made)
    assert (result.resumed, result.opened, result.keys, result.failed) == (True, ROWS, ROWS, 0)
    assert_whole(engine)


@pytest.mark.parametrize("key_type", ["bigint", "uuid"])
def test_rows_that_appear_or_turn_stale_while_it_runs_are_covered_by_its_last_pass(
    database_url: str, key_type: str
) -> None:
    engine, _ = made = install_users(database_url, rows=ROWS, key_type=key_type, coins="100 + g", phase="dual_write")
    first = rows(engine, "select min(id::text) from users")[0][0]

    def meanwhile(job: jobs.Job) -> None:
        if job.items_done != 10:
            return
        # Behind the cursor, before the first key, and beyond what was the largest key.
        ledger.add_users(engine, ROWS + 1, ROWS + 2, key_type=key_type, coins="100 + g")
        ledger.add_users(engine, 0, 0, key_type=key_type, coins="100 + g")
        execute(engine, "update users set total_coins = 7 where id::text = :key", key=first)

    result = run(made, progress=meanwhile)
    assert (result.opened, result.resynced, result.failed, result.keys) == (ROWS + 3, 1, 0, ROWS + 3)
    assert rows(engine, "select items_total, items_done, items_failed from wallet.jobs") == [(ROWS + 3, ROWS + 3, 0)]
    found = rows(engine, "select state::text, count(*) from wallet.accounts group by 1")
    assert found == [("mirrored", ROWS + 3)]


def test_a_table_that_always_grows_has_an_end(made: Ledger) -> None:
    engine, _ = made
    keys = iter(range(ROWS + 1, 10_000))
    result = run(made, progress=lambda _: ledger.add_users(engine, *[next(keys)] * 2))
    assert result.state == "done"
    assert scalar(engine, "select count(*) from users") < ROWS + 20


def test_its_last_pass_knows_old_rows_from_new_ones_by_their_transaction(made: Ledger) -> None:
    """Rows that nobody has written since the job began are not looked up: the test takes the account of one away."""
    engine, _ = made

    def take(job: jobs.Job) -> None:
        if job.items_done == ROWS and job.job_pass == 1:
            for key in (3, 4):
                execute(engine, "delete from wallet.accounts where key = :key", key=str(key))
            execute(engine, "update users set total_coins = 1 where id = 4")

    result = run(made, progress=take)
    assert result.opened == ROWS + 1
    assert scalar(
        engine, "select array_agg(id) from users where id::text not in (select key from wallet.accounts)"
    ) == [3]


def test_values_mended_or_broken_while_it_runs_are_counted_as_they_are_at_its_end(made: Ledger) -> None:
    engine, _ = made
    execute(engine, "update users set total_coins = null where id in (1, 2)")

    def meanwhile(job: jobs.Job) -> None:
        if job.items_done == 8:
            execute(engine, "update users set total_coins = 5 where id = 1")
            execute(engine, "update users set total_coins = 'NaN' where id in (3, 19)")

    result = run(made, progress=meanwhile)
    assert result.failed == 3
    assert rows(engine, "select items_failed from wallet.jobs") == [(3,)]
    assert scalar(engine, "select count(*) from wallet.accounts where state = 'mirrored'") == ROWS - 3


@contextmanager
def other_process(url: str) -> Iterator[subprocess.Popen[str]]:
    """A process that backfills in batches of 5, and after each says so and waits for a line."""
    program = (
        "import sys; import ledger; from walletmigrate.backfill import backfill\n"
        f"engine = ledger.engine_named({url!r}, 'walletmigrate-other')\n"
        f"settings = ledger.users_settings({url!r})\n"
        "def told(job): print(job.items_done, flush=True); sys.stdin.readline()\n"
        "backfill(engine, settings, settings.mapping(), ledger.ACT, batch_size=5, progress=told)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={"PYTHONPATH": ":".join(path for path in sys.path if path)},
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def read_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def let_go_on(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def test_a_process_killed_between_two_batches_is_succeeded_by_another(made: Ledger, database_url: str) -> None:
    with other_process(database_url) as process:
        assert read_line(process) == "5"
        let_go_on(process)
        assert read_line(process) == "10"
        process.kill()
        process.wait()
    assert rows(made[0], "select state, cursor, items_done from wallet.jobs") == [("running", "10", 10)]
    result = run(made)
    assert (result.resumed, result.opened, result.keys) == (True, ROWS, ROWS)
    assert scalar(made[0], "select count(*) from wallet.jobs") == 1
    assert_whole(made[0])


def test_a_process_killed_inside_a_batch_is_succeeded_by_another(made: Ledger, database_url: str) -> None:
    engine, _ = made
    with other_process(database_url) as process, engine.connect() as holder:
        assert read_line(process) == "5"
        # Row 8 is in the middle of the second batch, which stops there.
        holder.exec_driver_sql("select from users where id = 8 for update")
        let_go_on(process)
        ledger.until_blocked(engine, "walletmigrate-other")
        process.kill()
        process.wait()
    assert scalar(engine, "select count(*) from wallet.accounts") == 5
    result = run(made)
    assert (result.resumed, result.opened, result.keys) == (True, ROWS, ROWS)
    assert_whole(engine)


def test_two_processes_at_once_open_each_account_once(made: Ledger) -> None:
    with ThreadPoolExecutor(2) as pool:
        results = [future.result() for future in [pool.submit(run, made, batch_size=1) for _ in range(2)]]
    assert {result.opened for result in results} <= {0, ROWS}
    assert max(result.opened for result in results) == ROWS
    assert_whole(made[0])


@pytest.mark.parametrize("dual", [True, False])
@pytest.mark.parametrize("ends", ["commit", "rollback"])
def test_it_waits_for_a_posting_in_flight_and_reads_after_it(
    made: Ledger, database_url: str, dual: bool, ends: str
) -> None:
    engine, settings = made
    other = engine_named(database_url, "walletmigrate-other"), settings
    with engine.connect() as writer, ThreadPoolExecutor(1) as pool:
        post(writer, settings, "credit", 8, "5.25", dual=dual)
        running = pool.submit(run, other)
        ledger.until_blocked(engine, "walletmigrate-other")
        getattr(writer, ends)()
        result = running.result(timeout=60)
    by_adapter = dual and ends == "commit"
    assert result.opened == (ROWS - 1 if by_adapter else ROWS)
    expected = Decimal("113.25") if ends == "commit" else Decimal(108)
    assert scalar(engine, "select balance from wallet.accounts where key = '8'") == expected
    assert_whole_but_for_postings(engine)


def assert_whole_but_for_postings(engine: Engine) -> None:
    wrong = rows(
        engine,
        'select u.id from users as u left join wallet.accounts as a on a.key = u.id::text collate "C" '
        "and a.state = 'mirrored' and a.balance = u.total_coins where a.id is null",
    )
    assert wrong == []
    assert scalar(engine, "select count(*) from wallet.transactions where kind = 'opening'") == ROWS


def test_a_posting_waits_for_a_batch_in_flight_and_finds_its_account(made: Ledger, database_url: str) -> None:
    engine, settings = made
    other = engine_named(database_url, "walletmigrate-other")

    def credit() -> dict[str, Any]:
        with other.begin() as connection:
            return post(connection, settings, "credit", 3, 1)

    with engine.connect() as batch, ThreadPoolExecutor(1) as pool:
        batch.execute(text("select * from wallet.backfill_users(null, '5', null)"))
        running = pool.submit(credit)
        ledger.until_blocked(engine, "walletmigrate-other")
        batch.commit()
        posted = running.result(timeout=60)
    assert (posted["outcome"], posted["creditor_ledger"]) == ("ok", 104)
    kinds = "select kind::text from wallet.transactions where credit_account = "
    account = "(select id from wallet.accounts where key = '3') order by id"
    assert rows(engine, kinds + account) == [("opening",), ("posting",)]


def test_a_stale_and_a_reopened_account_are_brought_up_by_a_resync_of_the_job(made: Ledger) -> None:
    engine, settings = made
    run(made)
    execute(engine, "update users set total_coins = total_coins + 7 where id = 2")
    execute(engine, "update users set total_coins = total_coins - 9 where id = 3")
    execute(engine, "delete from users where id = 4")
    with ledger.fence_down(engine, settings) as superuser:
        superuser.exec_driver_sql("insert into users values (4, 'acme', 'member', 50, 0)")
    states = "select key, state::text from wallet.accounts where state <> 'mirrored' order by key"
    assert rows(engine, states) == [("2", "stale"), ("3", "stale"), ("4", "closed")]

    result = run(made)
    assert (result.opened, result.resynced, result.failed) == (0, 3, 0)
    assert rows(engine, states) == []
    resyncs = rows(
        engine,
        "select job_id, amount, debit_account = (select id from wallet.system_accounts where name = 'bypass') "
        "from wallet.transactions where kind = 'resync' order by id",
    )
    assert resyncs == [
        (result.job_id, Decimal(7), True),
        (result.job_id, Decimal(9), False),
        (result.job_id, Decimal(54), False),
    ]
    assert_whole(engine)


def test_a_value_that_is_no_amount_is_counted_and_left_alone(made: Ledger) -> None:
    engine, _ = made
    execute(engine, "update users set total_coins = 'NaN' where id = 4")
    execute(engine, "update users set total_coins = null where id = 7")
    planned = run(made, dry_run=True)
    result = run(made)
    assert (result.opened, result.failed) == (planned.opened, planned.failed) == (ROWS - 2, 2)
    assert rows(engine, "select items_done, items_failed from wallet.jobs") == [(ROWS - 2, 2)]
    assert scalar(engine, "select count(*) from wallet.accounts where key in ('4', '7')") == 0

    execute(engine, "update users set total_coins = 1 where id in (4, 7)")
    assert run(made).opened == 2
    assert_whole(engine)


def test_a_dry_run_says_what_the_run_then_does_and_writes_nothing(made: Ledger) -> None:
    engine, settings = made
    with engine.begin() as connection:
        post(connection, settings, "credit", 1, 5)
        post(connection, settings, "credit", 2, 5)
    execute(engine, "update users set total_coins = 1 where id = 2")
    execute(engine, "update users set total_coins = null where id = 3")
    before = journal(engine)
    planned = run(made, dry_run=True)
    assert journal(engine) == before
    assert scalar(engine, "select count(*) from wallet.jobs") == 0
    assert (planned.job_id, planned.dry_run, planned.state) == (None, True, "planned")
    result = run(made)
    for name in ("opened", "resynced", "failed", "keys"):
        assert getattr(planned, name) == getattr(result, name), name
    assert (result.opened, result.resynced, result.failed) == (17, 1, 1)


def test_a_paused_backfill_says_so_and_goes_on(made: Ledger) -> None:
    answers = iter([False, False, True])
    paused = run(made, stop=lambda: next(answers))
    assert (paused.state, paused.opened, paused.keys) == ("paused", 10, 10)
    result = run(made)
    assert (result.state, result.resumed, result.job_id) == ("done", True, paused.job_id)
    assert_whole(made[0])


@pytest.mark.parametrize("key_type", ["text", "uuid"])
def test_keys_may_be_text_or_uuid(database_url: str, key_type: str) -> None:
    made = install_users(database_url, rows=ROWS, key_type=key_type, phase="dual_write")
    assert run(made).opened == ROWS
    assert_whole(made[0])
    assert run(made).opened == 0


def test_text_keys_may_have_a_collation_of_their_own(database_url: str) -> None:
    made = install_users(database_url, rows=ROWS, key_type='text collate "ucs_basic"', phase="dual_write")
    assert run(made).opened == ROWS
    execute(made[0], "update users set total_coins = 3")
    assert run(made).resynced == ROWS
    assert_whole_but_for_postings(made[0])


def test_text_keys_that_look_like_nothing_else_are_taken_as_they_are(database_url: str) -> None:
    engine, settings = install_users(database_url, rows=0, key_type="text", phase="dual_write")
    odd = ["", " ", "%", "'", '"', "{}", "null", "NULL", "a,b", "ä", "Z", "a", "\\", "\t", "🂡"]
    with engine.begin() as connection:
        for key in odd:
            values = {"key": key}
            connection.execute(text("insert into users values (:key, 'acme', 'member', 5, 0)"), values)
    assert backfill(engine, settings, settings.mapping(), ACT, batch_size=2).opened == len(odd)
    assert {key for (key,) in rows(engine, "select key from wallet.accounts")} == set(odd)


def test_each_column_of_a_mapping_has_an_account_of_its_own(database_url: str) -> None:
    made = install_users(database_url, rows=ROWS, with_promo=True, phase="dual_write")
    result = run(made)
    assert (result.opened, result.keys) == (2 * ROWS, ROWS)
    assert rows(made[0], "select items_total, items_done from wallet.jobs") == [(2 * ROWS, 2 * ROWS)]
    balances = "select bucket, count(*), sum(balance) from wallet.accounts group by bucket order by bucket"
    assert rows(made[0], balances) == [("cash", ROWS, Decimal(2000)), ("promo", ROWS, Decimal(100))]
    assert run(made).opened == 0


def test_a_float_column_is_read_as_rounded_to_the_scale(database_url: str) -> None:
    made = install_users(
        database_url, rows=ROWS, coins_type="double precision", coins="0.1 + g * 0.2", phase="dual_write"
    )
    assert run(made).opened == ROWS
    assert rows(made[0], "select balance from wallet.accounts where key in ('1', '2') order by key") == [
        (Decimal("0.30"),),
        (Decimal("0.50"),),
    ]


@pytest.mark.parametrize("coins_type", ["bigint", "numeric"])
def test_a_column_that_counts_cents_opens_in_major_units(database_url: str, coins_type: str) -> None:
    made = install_users(database_url, rows=3, coins_type=coins_type, coins="g * 101", unit="minor", phase="dual_write")
    assert run(made).opened == 3
    balances = rows(made[0], "select balance from wallet.accounts order by key")
    assert balances == [(Decimal("1.01"),), (Decimal("2.02"),), (Decimal("3.03"),)]


@pytest.mark.parametrize("workers", [1, 2])
def test_it_ends_where_the_phase_goes_back_and_goes_on_once_it_is_advanced(made: Ledger, workers: int) -> None:
    engine, settings = made

    def back(job: jobs.Job) -> None:
        phases.back(engine, settings, ACT, to="legacy")

    with pytest.raises(PreconditionRefused, match=r"(?s)the phase is legacy.*phase advance"):
        run(made, progress=back)
    if workers == 1:
        assert scalar(engine, "select count(*) from wallet.accounts") == 5
    assert rows(engine, "select state, details ->> 'error' like '%phase is legacy%' from wallet.jobs") == [
        ("failed", True)
    ]
    set_phase(engine, "dual_write")
    assert run(made).state == "done"
    assert_whole(engine)


def test_in_phase_frozen_new_accounts_open_frozen(made: Ledger) -> None:
    set_phase(made[0], "frozen")
    run(made)
    assert rows(made[0], "select distinct state::text from wallet.accounts") == [("frozen",)]


def test_it_is_refused_in_phase_legacy_and_without_the_fence_all_reasons_at_once(made: Ledger) -> None:
    engine, _ = made
    set_phase(engine, "legacy")
    execute(engine, "alter table users disable trigger walletmigrate_users_update")
    execute(engine, "drop trigger walletmigrate_users_delete on users")
    for dry_run in (True, False):
        with pytest.raises(PreconditionRefused) as caught:
            run(made, dry_run=dry_run)
        reasons = [(what, mend) for what, mend in caught.value.reasons]
        assert len(reasons) == 3
        assert [mend for what, mend in reasons if "fence" in what] == ["walletmigrate install --reason '…'"] * 2
        assert [mend for what, mend in reasons if "legacy" in what] == ["walletmigrate phase advance --reason '…'"]
    assert scalar(engine, "select count(*) from wallet.jobs") == 0
    assert journal(engine) == []


def test_it_is_refused_when_the_functions_are_of_another_configuration(made: Ledger, database_url: str) -> None:
    other = ledger.users_settings(database_url, floor=Decimal(1))
    with pytest.raises(PreconditionRefused, match="another configuration"):
        run((made[0], other))


def test_it_is_refused_without_an_installed_ledger(made: Ledger) -> None:
    set_phase(made[0], "legacy")
    uninstall(*made, ACT, drop_ledger=True)
    with pytest.raises(LedgerNotInstalled):
        run(made)


def test_it_is_refused_to_a_role_from_which_rows_are_hidden(made: Ledger, database_url: str) -> None:
    engine, settings = made
    execute(engine, "alter table users enable row level security")
    execute(engine, "create policy some_rows on users using (id < 5)")
    operator = engine_named(database_url, role="wallet_operator")
    with pytest.raises(PreconditionRefused, match="row-level security hides rows"):
        run((operator, settings))


def test_the_operators_role_may_do_it(made: Ledger, database_url: str) -> None:
    engine, settings = made
    operator = engine_named(database_url, role="wallet_operator")
    assert run((operator, settings)).opened == ROWS
    assert scalar(operator, "select current_user") == "wallet_operator"
    assert_whole(engine)


def test_a_fence_that_falls_meanwhile_fails_the_job_at_its_end(made: Ledger) -> None:
    engine, _ = made

    def cut(job: jobs.Job) -> None:
        if job.items_done == 10:
            execute(engine, "drop trigger walletmigrate_users_update on users")

    with pytest.raises(PreconditionRefused, match="walletmigrate_users_update"):
        run(made, progress=cut)
    assert rows(engine, "select state from wallet.jobs") == [("failed",)]


def test_it_ends_with_a_fold_of_the_system_accounts(made: Ledger) -> None:
    run(made)
    folded = "select balance from wallet.system_accounts where name = 'opening'"
    assert scalar(made[0], folded) == -scalar(made[0], "select sum(total_coins) from users")
