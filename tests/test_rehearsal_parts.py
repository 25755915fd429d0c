"""What the rehearsal brings to go wrong: raw SQL that is exact, flags that arrive late, and every isolation level."""

from __future__ import annotations

import json
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import pytest
from sqlalchemy import Engine

from ledger import engine_named, execute, rows, scalar, users_settings
from walletmigrate import rehearsal_flags, traffic
from walletmigrate.config import Column, Mapping
from walletmigrate.flags import OFF, FixedSnapshot, Snapshot
from walletmigrate.rehearsal_flags import LateSource
from walletmigrate.rehearsal_raw import NOTES, ONE_IN, RawWriteFailed, RawWriter, is_raw
from walletmigrate.rehearsal_steps import COHORT_TENANTS, WRITING_TENANTS, Migration
from walletmigrate.rehearse import _isolation
from walletmigrate.starter import blank_document
from walletmigrate.traffic import Traffic, Transaction

MAPPING = Mapping(
    name="accounts",
    table="public.accounts",
    key="id",
    columns=(Column(bucket="cash", column="balance", currency="XXX", scale=2),),
)
ONE = Transaction("t-1", "7", "north", "fee", Decimal("-1.50"), 2)


@pytest.fixture
def accounts(database_url: str) -> Iterator[Engine]:
    engine = engine_named(database_url)
    execute(engine, "create table public.accounts (id bigint primary key, balance numeric(20, 2) not null)")
    execute(engine, "insert into public.accounts values (7, 10)")
    execute(engine, f"create table {NOTES} (transaction_id text primary key)")
    yield engine
    engine.dispose()


def refuse_with(engine: Engine, state: str) -> None:
    execute(
        engine,
        "create function public.refuse() returns trigger language plpgsql as $$ "
        f"begin raise exception 'no' using errcode = '{state}'; end $$",
    )
    execute(
        engine,
        "create trigger refuse before update on public.accounts for each row execute function public.refuse()",
    )


def balance(engine: Engine) -> Decimal:
    found: Decimal = scalar(engine, "select balance from public.accounts where id = 7")
    return found


def test_raw_sql_moves_money_once_however_often_it_is_sent(accounts: Engine) -> None:
    assert [RawWriter(accounts, MAPPING, "integer").write(ONE) for _ in range(2)] == [True, True]
    assert balance(accounts) == Decimal("8.50")


def test_raw_sql_that_the_fence_rejects_is_said_and_leaves_no_note(accounts: Engine) -> None:
    refuse_with(accounts, "WM030")
    assert RawWriter(accounts, MAPPING, "integer").write(ONE) is False
    assert rows(accounts, f"select * from {NOTES}") == []


def test_raw_sql_that_fails_otherwise_is_no_rejection(accounts: Engine) -> None:
    refuse_with(accounts, "22000")
    with pytest.raises(RawWriteFailed, match="no"):
        RawWriter(accounts, MAPPING, "integer").write(ONE)


def test_one_transaction_in_twenty_comes_as_raw_sql_whoever_asks() -> None:
    made = traffic.generate(1).transactions
    chosen = [one for one in made if is_raw(1, one)]
    assert 0.9 < len(chosen) * ONE_IN / len(made) < 1.1
    assert chosen != [one for one in made if is_raw(2, one)]


class Told:
    """A source that says what it was told."""

    def __init__(self) -> None:
        self.says = "first"

    def snapshot(self) -> Snapshot:
        return FixedSnapshot(OFF, self.says)


class Clock:
    """The time, as the test sets it."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


def test_each_document_arrives_after_the_delay_in_order_and_what_stands_at_the_start_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock()
    monkeypatch.setattr(rehearsal_flags, "time", clock)
    told = Told()
    late = LateSource(told, 3.0)
    seen = []
    for clock.now, told.says in [(0, "first"), (1, "second"), (3, "third"), (3.9, "third"), (4, "third"), (6, "third")]:
        seen.append(late.snapshot().document_id)
    assert seen == ["first", "first", "first", "first", "second", "third"]
    assert LateSource(told, 3.0).snapshot().document_id == "third"


def test_late_flags_are_worked_out_by_one_thread_at_a_time() -> None:
    """A worker's heartbeat asks beside the worker: two at once would take the same document out of the queue."""
    late, alone = LateSource(Told(), 3.0), []

    class Asked(Told):
        def snapshot(self) -> Snapshot:
            alone.append(late._lock.locked())
            return super().snapshot()

    late._source = Asked()
    late.snapshot()
    assert alone == [True]


def test_the_last_two_workers_run_at_the_higher_isolation_levels() -> None:
    assert [_isolation(from_the_last) for from_the_last in (3, 2, 1, 0)] == [
        "READ COMMITTED",
        "READ COMMITTED",
        "REPEATABLE READ",
        "SERIALIZABLE",
    ]


def migration(folder: Path, database_url: str, tenants: list[str]) -> Migration:
    flags = folder / "environment.json"
    flags.write_text(json.dumps(blank_document()), encoding="utf-8")
    accounts = {str(at): tenant for at, tenant in enumerate(tenants)}
    read = Traffic("here", (), accounts)
    return Migration(engine_named(database_url), users_settings(database_url), flags, read, 1)


def test_cohorts_are_of_tenants_that_a_flag_can_name_and_of_no_more_than_can_be_switched_in_time(
    tmp_path: Path, database_url: str
) -> None:
    odd = migration(tmp_path, database_url, ["", " odd ", "$.path", "two\nlines", "ok", "1:semver"])
    assert (odd.writing, odd.reading) == (["ok"], ["ok"])
    many = migration(tmp_path, database_url, [f"tenant {n}" for n in range(500)])
    assert (len(many.writing), len(many.reading)) == (WRITING_TENANTS, COHORT_TENANTS)
    few = migration(tmp_path, database_url, ["a", "b", "c"])
    assert len(few.writing) == 2
