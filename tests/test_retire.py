"""The end of a migration: the column is dropped by the application's own Alembic, and everything goes on."""

from __future__ import annotations

import runpy
import threading
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import pytest
from sqlalchemy.exc import DBAPIError

import ledger
from retiring import ACT, SOURCE, End, behind
from walletmigrate import phases
from walletmigrate.bypasses import rejected
from walletmigrate.doctor import examine
from walletmigrate.errors import InsufficientFunds, PreconditionRefused, UnknownAccount, UsageError
from walletmigrate.explain import explain
from walletmigrate.freeze import unfreeze
from walletmigrate.install import install
from walletmigrate.report import status
from walletmigrate.retire import retire
from walletmigrate.standing import show

D = Decimal


@pytest.fixture
def end(database_url: str, tmp_path: Path) -> End:
    return End(database_url, tmp_path, with_promo=True, floor=D(0))


def phase(end: End) -> str:
    with end.engine.connect() as connection:
        return show(connection, end.settings).phase


def test_the_column_is_dropped_and_processes_that_ran_before_go_on_without_an_error(end: End) -> None:
    before = end.adapter()
    with end.engine.begin() as connection:
        before.credit(connection, 1, 5, type="deposit")
    assert end.balance(before, 1) == 105
    end.freeze()
    assert end.archive().proven
    done = end.retire()
    assert (done.before, done.after, phase(end)) == ("frozen", "retired", "retired")
    with end.engine.begin() as connection:
        assert before.credit(connection, 1, 5, type="deposit").mode == "ledger"
        assert before.balance(connection, 2).amount == 100
    end.migrate()
    assert end.columns() == set()
    for adapter in (before, end.adapter()):
        with end.engine.begin() as connection:
            posted = adapter.debit(connection, 1, 10, type="booking", idempotency_key=f"k{id(adapter)}")
            assert (posted.mode, posted.legacy_balance) == ("ledger", None)
            assert adapter.debit(connection, 1, 10, type="booking", idempotency_key=f"k{id(adapter)}").replayed
            assert adapter.transfer(connection, 2, 3, 1, type="gift", bucket="promo").mode == "ledger"
            assert adapter.set_balance(connection, 4, 7, actor="admin:7", reason="case").ledger_balance == 7
            undone = adapter.reverse(connection, posted.transaction_id or 0, reason="refund")
            assert undone.ledger_balance == posted.ledger_balance + 10  # type: ignore[operator]
            with pytest.raises(InsufficientFunds):
                adapter.debit(connection, 4, 8, type="booking")
            with pytest.raises(UnknownAccount):
                adapter.credit(connection, 99, 1, type="deposit")
            assert adapter.history(connection, 1, limit=1)[0].balance_after == undone.ledger_balance
    assert end.balance(before, 1) == 110
    assert end.balance(before, 2, "promo") == 3
    assert end.verify()


def test_a_row_that_comes_after_the_drop_begins_at_nothing_and_can_be_paid(end: End) -> None:
    end.freeze().archive()
    end.retire()
    end.migrate()
    ledger.execute(end.engine, "insert into public.users values (50, 'acme', 'member'), (51, 'acme', 'member')")
    adapter = end.adapter()
    assert end.balance(adapter, 50) == 0
    with end.engine.begin() as connection:
        assert adapter.credit(connection, 50, 5, type="deposit").ledger_balance == 5
        assert [one.ledger_balance for one in adapter.open_account(connection, 51)] == [0, 0]
    assert end.balance(adapter, 50) == 5
    assert end.verify()


def test_a_row_that_was_deleted_and_comes_again_does_not_inherit_the_old_balance(end: End) -> None:
    ledger.execute(end.engine, "delete from public.users where id = 3")
    assert ledger.rows(end.engine, "select state::text from wallet.accounts where key = '3'") == [("closed",)] * 2
    end.freeze().archive()
    end.retire()
    end.migrate()
    ledger.execute(end.engine, "insert into public.users values (3, 'acme', 'member')")
    adapter = end.adapter()
    assert end.balance(adapter, 3) == 0
    with end.engine.begin() as connection:
        assert adapter.credit(connection, 3, 5, type="deposit").ledger_balance == 5
    assert end.verify()


def test_what_looks_at_the_whole_works_without_the_column(end: End) -> None:
    end.freeze().archive()
    end.retire()
    end.migrate()
    told = status(end.engine, end.settings, SOURCE)
    assert (told.phase, told.next_phase, told.accounts["frozen"], told.drifted) == ("retired", None, 20, 0)
    install(end.engine, end.settings, ACT)
    with end.engine.connect() as connection:
        assert examine(connection, end.settings) == ()
        told_of = explain(connection, end.settings, end.mapping, SOURCE, "1")
        assert [(one.reads, one.writes) for one in told_of.pockets] == [("ledger", "ledger")] * 2
    with end.engine.begin() as connection:
        assert end.adapter().credit(connection, 1, 5, type="deposit").mode == "ledger"
    with pytest.raises(PreconditionRefused, match="the legacy column is gone"):
        phases.back(end.engine, end.settings, ACT)


def test_the_downgrade_brings_the_column_back_with_the_ledger_s_balances_and_what_stood_on_it(end: End) -> None:
    ledger.execute(end.engine, "alter table public.users alter total_coins set not null")
    ledger.execute(end.engine, "alter table public.users add constraint decent check (total_coins > -1000)")
    ledger.execute(end.engine, "create index rich on public.users (total_coins) where promo > 1")
    ledger.execute(end.engine, "comment on column public.users.promo is 'it''s \\:free of \"charge\"'")
    look = (
        "select pg_get_constraintdef(oid) from pg_constraint where conname = 'decent' union all "
        "select indexdef from pg_indexes where indexname = 'rich' union all "
        "select col_description(a.attrelid, a.attnum) || format_type(atttypid, atttypmod) || attnotnull "
        "|| coalesce(pg_get_expr(d.adbin, d.adrelid), '') from pg_attribute as a left join pg_attrdef as d "
        "on d.adrelid = a.attrelid and d.adnum = a.attnum "
        "where a.attrelid = 'public.users'::regclass and attname = 'promo'"
    )
    before = ledger.rows(end.engine, look)
    assert len(before) == 3
    end.freeze().archive()
    end.retire()
    end.migrate()
    with end.engine.begin() as connection:
        end.adapter().credit(connection, 1, 5, type="deposit")
    end.migrate("0001", down=True)
    assert ledger.rows(end.engine, look) == before
    assert ledger.rows(end.engine, "select total_coins, promo from public.users where id < 3 order by id") == [
        (D(105), D(5)),
        (D(100), D(5)),
    ]
    assert phases.back(end.engine, end.settings, ACT).after == "frozen"
    assert end.verify()
    with end.engine.begin() as connection:
        assert end.adapter().credit(connection, 1, 1, type="deposit").ledger_balance == 106
    with pytest.raises(DBAPIError, match="is frozen"):
        ledger.execute(end.engine, "update public.users set total_coins = 1 where id = 1")


def test_until_the_drop_nobody_writes_the_column_and_the_step_can_be_taken_back(end: End) -> None:
    end.freeze().archive()
    end.retire()
    with pytest.raises(DBAPIError, match="are retired"):
        ledger.execute(end.engine, "update public.users set total_coins = 1 where id = 1")
    with pytest.raises(DBAPIError, match="are retired"):
        ledger.execute(end.engine, "insert into public.users values (60, 'acme', 'member', 50, 0)")
    ledger.execute(end.engine, "insert into public.users values (60, 'acme', 'member', 0, 0)")
    with pytest.raises(DBAPIError, match="depend"):
        ledger.execute(end.engine, "alter table public.users drop column total_coins")
    assert phases.back(end.engine, end.settings, ACT, dry_run=True).after == "frozen"
    assert phase(end) == "retired"
    assert phases.back(end.engine, end.settings, ACT).after == "frozen"
    with pytest.raises(PreconditionRefused, match="unfreeze"):
        phases.back(end.engine, end.settings, ACT)
    with pytest.raises(DBAPIError, match="the phase is not retired"):
        end.migrate()
    assert end.columns() == {"total_coins", "promo"}


def test_what_the_guard_of_retired_columns_refuses_is_counted_and_nothing_else_is_refused(end: End) -> None:
    end.freeze().archive()
    end.retire()
    update = "update public.users set total_coins = 1 where id = 1"
    insert = "insert into public.users values (60, 'acme', 'member', 50, 0)"
    for refused in (update, insert):
        for first in ("select 1", "set local session_replication_role = replica"):
            with end.engine.connect() as connection:
                connection.exec_driver_sql(first)
                with pytest.raises(DBAPIError, match="are retired"):
                    connection.exec_driver_sql(refused)
    with end.engine.connect() as connection:
        assert rejected(connection, end.settings) == {"users": 4}
    ledger.execute(end.engine, "update public.users set role = 'vip', total_coins = total_coins where id = 1")
    assert ledger.scalar(end.engine, "select role from public.users where id = 1") == "vip"


def test_the_guard_of_retired_columns_sees_what_an_application_s_trigger_puts_there(end: End) -> None:
    ledger.execute(
        end.engine,
        "create function bonus() returns trigger language plpgsql as $$ begin new.total_coins := 7; return new; end $$",
    )
    end.freeze().archive()
    end.retire()
    ledger.execute(
        end.engine,
        "create trigger zz_last before insert or update on public.users for each row execute function bonus()",
    )
    for statement in (
        "update public.users set total_coins = total_coins, role = 'vip' where id = 1",
        "insert into public.users values (60, 'acme', 'member', 0, 0)",
    ):
        with pytest.raises(DBAPIError, match="are retired"):
            ledger.execute(end.engine, statement)


def test_the_migration_follows_the_only_head_and_runs_on_a_database_without_a_ledger(
    end: End, make_database: object
) -> None:
    end.freeze().archive()
    done = end.retire()
    assert done.down_revision == "0001"
    made = runpy.run_path(done.migration)
    assert (made["revision"], made["down_revision"]) == (done.revision, "0001")
    ledger.execute(end.engine, "drop schema wallet cascade")
    with pytest.raises(DBAPIError, match="the columns hold balances"):
        end.migrate()
    ledger.execute(end.engine, "truncate public.users")
    end.migrate()
    assert end.columns() == set()


def test_retire_is_refused_without_an_archive_that_proves_with_every_reason_at_once(end: End, tmp_path: Path) -> None:
    end.freeze()
    ledger.execute(end.engine, "create view public.rich as select id from public.users where total_coins > 1000")
    ledger.execute(end.engine, "alter table public.users alter promo set default 5")
    ledger.execute(end.engine, "insert into public.users values (70, 'acme', 'member', 9, 0)")
    with pytest.raises(PreconditionRefused) as refused:
        end.retire([])
    told = [what for what, _ in refused.value.reasons]
    for part in (
        "users (cash, EUR): 1 accounts are not frozen, for example 70",
        "rule _RETURN on view rich depend on the balance columns",
        "public.users.promo has the default 5",
        "has no archive that proved",
        "no archive of mapping 'users' was named",
    ):
        assert [one for one in told if part in one], (part, told)
    assert all(mend for _, mend in refused.value.reasons)
    assert (phase(end), list(end.migrations.glob("*retire*"))) == ("frozen", [])


def test_a_dry_run_of_retire_writes_nothing(end: End) -> None:
    end.freeze().archive()
    done = end.retire(dry_run=True)
    assert (done.after, done.audit_id, Path(done.migration).exists(), phase(end)) == ("retired", None, False, "frozen")


def test_an_archive_of_before_the_freeze_is_not_enough(end: End, tmp_path: Path) -> None:
    assert end.archive().proven
    end.freeze()
    with pytest.raises(PreconditionRefused) as refused:
        end.retire()
    assert "was taken in phase dual_write" in str(refused.value)
    assert "has no archive that proved since" in str(refused.value)


def test_two_heads_need_the_revision_to_follow(end: End) -> None:
    end.freeze().archive()
    first = end.migrations / "0001_first.py"
    (end.migrations / "0002.py").write_text(first.read_text(encoding="utf-8").replace("0001", "0002"))
    with pytest.raises(UsageError, match="several heads"):
        end.retire()
    assert end.retire(down_revision="0002").down_revision == "0002"


def test_money_that_comes_while_the_step_is_taken_is_found_and_the_step_is_not_taken(
    end: End, monkeypatch: pytest.MonkeyPatch
) -> None:
    end.freeze().archive()
    from walletmigrate import retire as module

    put_up = module._put_up_guards

    def late(*given: object) -> None:
        ledger.execute(end.engine, "insert into public.users values (80, 'acme', 'member', 9, 0)")
        put_up(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "_put_up_guards", late)
    with pytest.raises(PreconditionRefused, match="for example 80"):
        end.retire()
    assert (phase(end), list(end.migrations.glob("*retire*"))) == ("frozen", [])
    ledger.execute(end.engine, "update public.users set total_coins = 8 where id = 80")


def test_the_step_waits_for_a_posting_in_flight_and_a_posting_that_waits_for_the_step_goes_through(end: End) -> None:
    end.freeze().archive()
    adapter = end.adapter()
    raised: list[Exception] = []

    def background(work: Callable[[], object]) -> threading.Thread:
        def run() -> None:
            try:
                work()
            except Exception as error:  # noqa: BLE001 - told by the test
                raised.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    def post() -> None:
        with ledger.engine_named(end.url, "second").begin() as connection:
            adapter.credit(connection, 1, 7, type="deposit")

    stepping = ledger.engine_named(end.url, "stepping")
    with end.engine.connect() as first:
        adapter.credit(first, 1, 5, type="deposit")
        step = background(lambda: retire(stepping, end.settings, SOURCE, [end.file], end.migrations, ACT))
        ledger.until_blocked(end.engine, "stepping")
        second = background(post)
        ledger.until_blocked(end.engine, "second")
        first.commit()
    step.join()
    second.join()
    assert (raised, phase(end)) == ([], "retired")
    assert end.balance(adapter, 1) == 112
    assert end.verify()


def test_two_first_postings_of_a_row_that_came_later_are_both_posted(end: End) -> None:
    end.freeze().archive()
    end.retire()
    end.migrate()
    ledger.execute(end.engine, "insert into public.users values (50, 'acme', 'member')")
    adapter = end.adapter()
    first, second = (lambda on, amount=amount: adapter.credit(on, 50, amount, type="deposit") for amount in (5, 7))
    assert behind(end, first, second) is None
    assert end.balance(adapter, 50) == 12
    assert end.verify()


def test_other_keys_and_units_go_the_same_way_there_and_back(database_url: str, tmp_path: Path) -> None:
    end = End(
        database_url, tmp_path, key_type="uuid", coins="1234", coins_type="integer", unit="minor", policy="strict"
    )
    key = "00000000-0000-4000-8000-000000000001"
    end.freeze().archive()
    end.retire()
    end.migrate()
    with end.engine.begin() as connection:
        assert end.adapter().credit(connection, key, D("0.01"), type="deposit").ledger_balance == D("12.35")
    assert end.verify()
    end.migrate("0001", down=True)
    assert ledger.rows(end.engine, f"select total_coins from public.users where id = '{key}'") == [(1235,)]
    assert phases.back(end.engine, end.settings, ACT).after == "frozen"
    with pytest.raises(DBAPIError, match="is frozen"):
        ledger.execute(end.engine, f"update public.users set total_coins = 1 where id = '{key}'")
    ledger.set_phase(end.engine, "wallet_only")
    assert unfreeze(end.engine, end.settings, end.mapping, ACT).changed == 10
    assert end.verify()


def test_a_retirement_that_was_killed_in_between_harms_no_unfreeze(end: End) -> None:
    end.freeze().archive()
    from walletmigrate import retire as module

    with end.engine.begin() as connection:
        module._put_up_guards(connection, end.settings)
    with pytest.raises(DBAPIError):
        ledger.execute(end.engine, "insert into public.users values (60, 'acme', 'member', 50, 0)")
    ledger.set_phase(end.engine, "wallet_only")
    assert unfreeze(end.engine, end.settings, end.mapping, ACT).changed == 20
    ledger.execute(end.engine, "insert into public.users values (60, 'acme', 'member', 50, 0)")
    assert ledger.scalar(end.engine, "select total_coins from public.users where id = 60") == 50
    with end.engine.begin() as connection:
        assert end.adapter().credit(connection, 1, 5, type="deposit").mode == "dual_write"
