"""The order of a posting, at every isolation level, in interleavings that the test forces.

At READ COMMITTED a statement that had to wait goes on with what it then finds. Above that, a transaction whose
snapshot is older than a change it depends on must get 40001, and never write from what it saw. (COMMIT of a
transaction that got an error rolls it back, so a test may commit either way.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import Connection
from sqlalchemy.engine.interfaces import IsolationLevel

import interleaving
from interleaving import LEVELS, READ_COMMITTED, crowd, of, outcome
from ledger import execute, install_users, post, rows, scalar, set_phase
from walletmigrate.errors import InsufficientFunds
from walletmigrate.movements import Movement
from walletmigrate.postings import Posting
from worlds import World

each_level = pytest.mark.parametrize("isolation", LEVELS, ids=lambda level: level.replace(" ", "_").lower())

RETRY = "40001"
BACKFILL = "select opened, resynced, failed from wallet.backfill_users(null, null, null)"
FREEZE = "select frozen, refused from wallet.freeze_users(null, null)"
UNFREEZE = "select unfrozen from wallet.unfreeze_users(null, null)"


@pytest.fixture
def world(database_url: str) -> Iterator[World]:
    engine, settings = install_users(database_url, floor=Decimal(0), phase="dual_write")
    with interleaving.stage(database_url) as stage:
        yield World(engine, settings, stage)


def raw(key: int, amount: int = 7) -> Callable[[Connection], object]:
    """An UPDATE past the adapter."""
    statement = f"update users set total_coins = total_coins + {amount} where id = {key}"
    return lambda connection: connection.exec_driver_sql(statement).rowcount


def job(statement: str) -> Callable[[Connection], tuple[Any, ...]]:
    """One batch of a job."""
    return lambda connection: tuple(connection.exec_driver_sql(statement).one())


# Opening and resync against writers with an older snapshot


WRITERS: dict[str, Callable[[World, int], Callable[[Connection], object]]] = {
    "raw": lambda _world, key: raw(key, 5),
    "flag off": lambda world, key: world.credit(key, 5, dual=False),
    "flag on": lambda world, key: world.credit(key, 5),
}


@each_level
@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("opener", ["backfill", "posting"])
def test_a_writer_with_an_older_snapshot_never_misses_an_opening(
    world: World, isolation: IsolationLevel, writer: str, opener: str
) -> None:
    write = WRITERS[writer](world, 1)
    old = world.stage.session(isolation)
    old.look()
    if opener == "backfill":
        assert rows_of(world, BACKFILL) == [(10, 0, 0)]
    else:
        with world.engine.begin() as connection:
            world.credit(1)(connection)
    result = outcome(lambda: old.do(write))
    old.commit()
    if isolation != READ_COMMITTED:
        assert result == RETRY
        world.assert_sound()
        old.do(write)
        old.commit()
    expected = Decimal(105 if opener == "backfill" else 115)
    assert world.legacy(1) == expected
    assert scalar(world.engine, "select count(*) from wallet.accounts where key = '1'") == 1
    account = world.account(1)
    assert account is not None
    assert account[0] == ("mirrored" if writer == "flag on" else "stale")
    world.assert_sound()


@each_level
@pytest.mark.parametrize("writer", WRITERS)
def test_a_writer_with_an_older_snapshot_never_misses_a_resync(
    world: World, isolation: IsolationLevel, writer: str
) -> None:
    world.make_stale(1)
    write = WRITERS[writer](world, 1)
    old = world.stage.session(isolation)
    old.look()
    assert rows_of(world, BACKFILL) == [(9, 1, 0)]
    result = outcome(lambda: old.do(write))
    old.commit()
    if isolation != READ_COMMITTED:
        assert result == RETRY
        assert world.account(1) == ("mirrored", Decimal(101), Decimal(101))
        old.do(write)
        old.commit()
    state, _, legacy = world.account(1) or ("absent", 0, 0)
    assert (state, legacy) == ("mirrored" if writer == "flag on" else "stale", Decimal(106))
    world.assert_sound()


@each_level
@pytest.mark.parametrize("before", ["absent", "stale"])
def test_a_backfill_that_waited_for_a_posting_does_nothing_a_second_time(
    world: World, isolation: IsolationLevel, before: str
) -> None:
    if before == "stale":
        world.make_stale(1)
    poster, backfill = world.stage.session(isolation), world.stage.session()
    poster.do(world.credit(1))
    waiting = backfill.waiting(job(BACKFILL), on=poster)
    poster.commit()
    assert waiting.result() == (9, 0, 0)
    backfill.commit()
    balance = Decimal(111 if before == "stale" else 110)
    assert world.account(1) == ("mirrored", balance, balance)
    world.assert_sound()


@each_level
@pytest.mark.parametrize("before", ["absent", "stale"])
def test_a_posting_that_waited_for_a_backfill_does_nothing_a_second_time(
    world: World, isolation: IsolationLevel, before: str
) -> None:
    if before == "stale":
        world.make_stale(1)
    poster, backfill = world.stage.session(isolation), world.stage.session()
    backfill.do(job(BACKFILL))
    waiting = poster.waiting(world.credit(1), on=backfill)
    backfill.commit()
    result = of(waiting)
    poster.commit()
    if isolation != READ_COMMITTED:
        assert result == RETRY
        poster.do(world.credit(1))
        poster.commit()
    balance = Decimal(111 if before == "stale" else 110)
    assert world.account(1) == ("mirrored", balance, balance)
    kinds = "select kind::text from wallet.transactions order by id"
    made = Counter(kind for (kind,) in rows(world.engine, kinds))
    assert made == Counter(opening=10, posting=1, **({"resync": 1} if before == "stale" else {}))
    world.assert_sound()


@each_level
def test_a_backfill_that_waited_for_a_raw_update_opens_at_the_new_balance(
    world: World, isolation: IsolationLevel
) -> None:
    writer, backfill = world.stage.session(isolation), world.stage.session()
    writer.do(raw(1))
    waiting = backfill.waiting(job(BACKFILL), on=writer)
    writer.commit()
    assert waiting.result() == (10, 0, 0)
    backfill.commit()
    assert world.account(1) == ("mirrored", Decimal(107), Decimal(107))
    world.assert_sound()


@each_level
def test_a_raw_update_that_waited_for_an_opening_leaves_no_untrue_mirror(
    world: World, isolation: IsolationLevel
) -> None:
    writer, backfill = world.stage.session(isolation), world.stage.session()
    backfill.do(job(BACKFILL))
    waiting = writer.waiting(raw(1), on=backfill)
    backfill.commit()
    result = of(waiting)
    writer.commit()
    if isolation == READ_COMMITTED:
        assert world.account(1) == ("stale", Decimal(100), Decimal(107))
    else:
        assert result == RETRY
        assert world.account(1) == ("mirrored", Decimal(100), Decimal(100))
    world.assert_sound()


# Flags that differ between processes


@each_level
def test_a_process_with_the_flag_off_that_waited_for_one_with_it_on_turns_the_account_stale(
    world: World, isolation: IsolationLevel
) -> None:
    on, off = world.stage.session(isolation), world.stage.session(isolation)
    on.do(world.credit(1))
    waiting = off.waiting(world.credit(1, 5, dual=False), on=on)
    on.commit()
    result = of(waiting)
    off.commit()
    if isolation != READ_COMMITTED:
        assert result == RETRY
        off.do(world.credit(1, 5, dual=False))
        off.commit()
    assert world.account(1) == ("stale", Decimal(110), Decimal(115))
    world.assert_sound()


@each_level
def test_a_process_with_the_flag_on_that_waited_for_one_with_it_off_resyncs_first(
    world: World, isolation: IsolationLevel
) -> None:
    world.mirror(1)
    on, off = world.stage.session(isolation), world.stage.session(isolation)
    off.do(world.credit(1, 5, dual=False))
    waiting = on.waiting(world.credit(1), on=off)
    off.commit()
    result = of(waiting)
    on.commit()
    if isolation != READ_COMMITTED:
        assert result == RETRY
        on.do(world.credit(1))
        on.commit()
    assert world.account(1) == ("mirrored", Decimal(115), Decimal(115))
    kinds = rows(world.engine, "select kind::text, amount from wallet.transactions order by id")
    assert kinds == [("opening", 100), ("resync", 5), ("posting", 10)]
    world.assert_sound()


@each_level
def test_a_stopped_line_is_seen_at_the_next_statement_of_a_transaction_with_an_old_snapshot(
    world: World, isolation: IsolationLevel
) -> None:
    world.mirror(1)
    old = world.stage.session(isolation)
    assert old.do(world.credit(1)).mode == "dual_write"
    execute(world.engine, "select wallet.set_line(false)")
    stopped = old.do(world.credit(1, 5))
    assert (stopped.mode, stopped.outcome, stopped.ledger_balance) == ("legacy", "skipped", None)
    old.commit()
    assert world.account(1) == ("stale", Decimal(110), Decimal(115))
    execute(world.engine, "select wallet.set_line(true)")
    assert old.do(world.credit(1)).mode == "dual_write"
    old.commit()
    assert world.account(1) == ("mirrored", Decimal(125), Decimal(125))
    world.assert_sound()


# Freeze and unfreeze


@each_level
def test_a_freeze_waits_for_a_posting_in_flight_and_freezes_what_it_wrote(
    world: World, isolation: IsolationLevel
) -> None:
    rows_of(world, BACKFILL)
    poster, freeze = world.stage.session(isolation), world.stage.session()
    poster.do(world.credit(1))
    set_phase(world.engine, "frozen")
    waiting = freeze.waiting(job(FREEZE), on=poster)
    poster.commit()
    assert waiting.result() == (10, 0)
    freeze.commit()
    assert world.account(1) == ("frozen", Decimal(110), Decimal(110))
    world.assert_sound()


@each_level
@pytest.mark.parametrize("dual", [True, False], ids=["flag on", "flag off"])
def test_a_posting_that_waited_for_a_freeze_writes_the_ledger_alone(
    world: World, isolation: IsolationLevel, dual: bool
) -> None:
    rows_of(world, BACKFILL)
    poster, freeze = world.stage.session(isolation), world.stage.session()
    set_phase(world.engine, "frozen")
    freeze.do(job(FREEZE))
    waiting = poster.waiting(world.credit(1, dual=dual), on=freeze)
    freeze.commit()
    result = of(waiting)
    poster.commit()
    if isolation != READ_COMMITTED:
        assert result == RETRY
        poster.do(world.credit(1, dual=dual))
        poster.commit()
    assert world.account(1) == ("frozen", Decimal(110), Decimal(100))
    world.assert_sound()


@each_level
@pytest.mark.parametrize("writer", ["raw", "flag on", "flag off"])
def test_a_writer_with_a_snapshot_older_than_the_freeze_never_writes_a_frozen_column(
    world: World, isolation: IsolationLevel, writer: str
) -> None:
    rows_of(world, BACKFILL)
    old = world.stage.session(isolation)
    old.look()
    set_phase(world.engine, "frozen")
    rows_of(world, FREEZE)
    result = outcome(lambda: old.do(WRITERS[writer](world, 1)))
    old.commit()
    if isolation != READ_COMMITTED:
        assert result == RETRY
    elif writer == "raw":
        assert result == "WM030"
    assert world.legacy(1) == 100
    world.assert_sound()


@each_level
def test_a_posting_that_waited_for_an_unfreeze_writes_both_again(world: World, isolation: IsolationLevel) -> None:
    frozen_with_a_posting(world)
    poster, unfreeze = world.stage.session(isolation), world.stage.session()
    set_phase(world.engine, "wallet_only")
    assert unfreeze.do(job(UNFREEZE)) == (10,)
    waiting = poster.waiting(world.credit(1), on=unfreeze)
    unfreeze.commit()
    result = of(waiting)
    poster.commit()
    if isolation != READ_COMMITTED:
        assert result == RETRY
        poster.do(world.credit(1))
        poster.commit()
    assert world.account(1) == ("mirrored", Decimal(120), Decimal(120))
    world.assert_sound()


@each_level
def test_an_unfreeze_waits_for_a_posting_in_flight_and_takes_its_money_along(
    world: World, isolation: IsolationLevel
) -> None:
    frozen_with_a_posting(world)
    poster, unfreeze = world.stage.session(isolation), world.stage.session()
    poster.do(world.credit(1))
    set_phase(world.engine, "wallet_only")
    waiting = unfreeze.waiting(job(UNFREEZE), on=poster)
    poster.commit()
    assert waiting.result() == (10,)
    unfreeze.commit()
    assert world.account(1) == ("mirrored", Decimal(120), Decimal(120))
    world.assert_sound()


# Rows that come and go


def test_a_row_deleted_and_inserted_again_while_the_posting_waits_is_found(world: World) -> None:
    world.mirror(1)
    other, poster = world.stage.session(), world.stage.session()
    other.sql("delete from users where id = 1")
    other.sql("insert into users (id, tenant, role, total_coins) values (1, 'acme', 'member', 40)")
    waiting = poster.waiting(world.credit(1), on=other)
    other.commit()
    assert waiting.result().legacy_balance == 50
    poster.commit()
    assert world.account(1) == ("mirrored", Decimal(50), Decimal(50))
    world.assert_sound()


def test_a_row_deleted_while_the_posting_waits_is_an_unknown_account_and_nothing_is_written(world: World) -> None:
    world.mirror(1)
    other, poster = world.stage.session(), world.stage.session()
    other.sql("delete from users where id = 1")
    waiting = poster.waiting(lambda connection: post(connection, world.settings, "credit", 1, 10), on=other)
    other.commit()
    assert waiting.result()["refusal"] == "unknown_account"
    poster.commit()
    assert rows(world.engine, "select state::text, balance from wallet.accounts") == [("closed", 100)]
    world.assert_sound()


@pytest.mark.parametrize("payee", [11, -1])
def test_a_row_inserted_while_the_posting_looks_is_written_only_under_its_lock(world: World, payee: int) -> None:
    """The payee comes while the transfer waits for the payer: it is locked before it is written."""
    blocker, poster, rival = world.stage.session(), world.stage.session(), world.stage.session()
    blocker.sql("select from users where id = 1 for update")
    adapter = world.adapter()
    waiting = poster.waiting(lambda c: adapter.transfer(c, 1, payee, 30, type="test"), on=blocker)
    insert = "insert into users (id, tenant, role, total_coins) values (:id, 'acme', 'member', 5)"
    execute(world.engine, insert, id=payee)
    rival.sql("update users set total_coins = total_coins + 1 where id = :id", id=payee)
    blocker.commit()
    poster.until_blocked(waiting, by=rival)
    rival.commit()
    assert waiting.result().payee_ledger_balance == 36
    poster.commit()
    assert world.account(payee) == ("mirrored", Decimal(36), Decimal(36))
    assert world.account(1) == ("mirrored", Decimal(70), Decimal(70))
    world.assert_sound()


# Idempotency keys that meet


def test_a_second_holder_of_a_key_waits_and_replays(world: World) -> None:
    first, second = world.stage.session(), world.stage.session()
    made = first.do(world.credit(1, idempotency_key="k"))
    waiting = second.waiting(world.credit(1, idempotency_key="k"), on=first)
    first.commit()
    replayed = waiting.result()
    second.commit()
    assert (replayed.replayed, replayed.transaction_id) == (True, made.transaction_id)
    assert world.legacy(1) == 110
    world.assert_sound()


def test_a_second_holder_of_a_key_moves_the_money_when_the_first_rolls_back(world: World) -> None:
    first, second = world.stage.session(), world.stage.session()
    first.do(world.credit(1, idempotency_key="k"))
    waiting = second.waiting(world.credit(1, idempotency_key="k"), on=first)
    first.rollback()
    assert waiting.result().replayed is False
    second.commit()
    assert world.account(1) == ("mirrored", Decimal(110), Decimal(110))
    world.assert_sound()


@each_level
def test_one_key_for_two_accounts_at_once_moves_money_once(world: World, isolation: IsolationLevel) -> None:
    first, second = world.stage.session(isolation), world.stage.session(isolation)

    def other_account(connection: Connection) -> dict[str, Any]:
        digest = "00000000-0000-4000-8000-000000000002"
        return post(connection, world.settings, "credit", 2, 10, idempotency_key="k", request=digest)

    first.do(world.credit(1, idempotency_key="k"))
    waiting = second.waiting(other_account, on=first)
    first.commit()
    result = of(waiting)
    second.commit()
    if isolation == READ_COMMITTED:
        assert not isinstance(result, str)
        assert result["refusal"] == "key_reused"
    else:
        assert result == RETRY
        assert second.do(other_account)["refusal"] == "key_reused"
        second.rollback()
    assert [world.legacy(1), world.legacy(2)] == [110, 100]
    world.assert_sound()


# Many at once


@each_level
@pytest.mark.parametrize("dual", [True, False], ids=["flag on", "flag off"])
def test_32_duplicates_of_one_key_make_one_transaction_and_31_replays(
    world: World, isolation: IsolationLevel, dual: bool
) -> None:
    key = "k" * 36
    work = world.credit(1, dual=dual, idempotency_key=key, reference=("idempotency key", key))
    results, _ = crowd(world.stage.engine, isolation, [work] * 32)
    assert Counter(result.replayed for result in results) == {True: 31, False: 1}
    assert len({result.transaction_id for result in results}) == 1
    assert {result.legacy_balance for result in results} == {Decimal(110)}
    assert world.legacy(1) == 110
    expected = 1 if dual else 0
    assert scalar(world.engine, "select count(*) from wallet.transactions where kind = 'posting'") == expected
    world.assert_sound()


@each_level
@pytest.mark.parametrize("dual", [True, False], ids=["flag on", "flag off"])
def test_50_spends_of_a_balance_that_allows_one_have_one_success(
    world: World, isolation: IsolationLevel, dual: bool
) -> None:
    adapter = world.adapter(dual=dual)

    def spend(connection: Connection) -> Decimal | None:
        try:
            adapter.debit(connection, 1, 60, type="test")
        except InsufficientFunds as error:
            return error.balance
        return None

    results, _ = crowd(world.stage.engine, isolation, [spend] * 50)
    assert Counter(results) == {None: 1, Decimal(40): 49}
    assert world.legacy(1) == 40
    world.assert_sound()


@each_level
def test_crossing_transfers_of_16_workers_never_deadlock_and_lose_nothing(
    world: World, isolation: IsolationLevel
) -> None:
    adapter = world.adapter()
    pairs = [(1, 2), (2, 1), (2, 3), (3, 1)] * 4

    def work(payer: int, payee: int) -> Callable[[Connection], Posting]:
        return lambda connection: adapter.transfer(connection, payer, payee, 1, type="test")

    for _ in range(4):
        _, failures = crowd(world.stage.engine, isolation, [work(*pair) for pair in pairs])
        assert set(failures) <= {RETRY}
    total = scalar(world.engine, "select sum(total_coins) from users where id in (1, 2, 3)")
    assert total == 300
    assert scalar(world.engine, "select count(*) from wallet.transactions where kind = 'posting'") == 64
    world.assert_sound()


@each_level
def test_batches_whose_keys_stand_in_reversed_order_never_deadlock(world: World, isolation: IsolationLevel) -> None:
    adapter = world.adapter()
    world.mirror(4, 2)

    def batch(keys: list[int], names: list[str]) -> Callable[[Connection], object]:
        movements = [
            Movement.credit(key, 1, type="test", idempotency_key=name) for key, name in zip(keys, names, strict=True)
        ]
        return lambda connection: adapter.apply(connection, movements)

    upward, downward = [1, 2, 3, 4, 5], [5, 4, 3, 2, 1]
    names = ["a", "b", "c", "d", "e"]
    works = [batch(upward if worker % 2 else downward, [f"{worker}-{name}" for name in names]) for worker in range(16)]
    shared = [batch(upward, names), batch(downward, names[::-1])] * 4
    _, failures = crowd(world.stage.engine, isolation, works + shared)
    assert set(failures) <= {RETRY}
    balances = rows(world.engine, "select distinct total_coins from users where id between 1 and 5")
    assert balances == [(Decimal(117),)]  # 16 batches of their own keys, and one of the eight that share keys
    world.assert_sound()


@each_level
def test_jobs_postings_and_flips_at_once_never_deadlock_and_keep_every_invariant(
    world: World, isolation: IsolationLevel
) -> None:
    on, off = world.adapter(), world.adapter(dual=False)
    works: list[Callable[[Connection], object]] = []
    for worker in range(4):
        payer, payee = worker + 1, (worker + 2) % 4 + 1
        works += [
            lambda c, a=payer, b=payee: on.transfer(c, a, b, 1, type="test"),  # type: ignore[misc]
            lambda c, a=payer, b=payee: off.transfer(c, b, a, 1, type="test"),  # type: ignore[misc]
            lambda c, a=payer: on.debit(c, a, 1, type="test"),  # type: ignore[misc]
            raw(payer, 1),
        ]
    jobs = [job(BACKFILL), job(BACKFILL), job("select wallet.fold_system_accounts()")]
    for _ in range(3):
        _, failures = crowd(world.stage.engine, isolation, [*works, *jobs])
        assert set(failures) <= {RETRY}
        world.assert_sound()
    assert scalar(world.engine, "select sum(total_coins) from users where id <= 4") == 400


def rows_of(world: World, statement: str) -> list[tuple[Any, ...]]:
    """Run one batch of a job in a transaction of its own."""
    with world.engine.begin() as connection:
        return [job(statement)(connection)]


def frozen_with_a_posting(world: World) -> None:
    """All accounts frozen, and 10 more on account 1, in the ledger alone."""
    rows_of(world, BACKFILL)
    set_phase(world.engine, "frozen")
    assert rows_of(world, FREEZE) == [(10, 0)]
    with world.engine.begin() as connection:
        assert world.credit(1)(connection).mode == "ledger"
