"""An administrator's deeds are in the audit log: balances that were set, transactions that were undone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import Connection, event
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from adapting import DUAL, OFF, Place, User, asked_for, bring_into, place, seal
from ledger import execute, rows, scalar
from walletmigrate import AsyncLegacyBalanceAdapter, LegacyBalanceAdapter, Movement
from walletmigrate.errors import AmountOverflow, InsufficientFunds, LedgerMismatch, UnknownAccount, UnknownTransaction
from walletmigrate.trace import trace

D = Decimal
ADA: dict[str, Any] = {"actor": "admin:7", "reason": "case 12", "correlation_id": "request-7"}
STATES = ("absent", "mirrored", "stale", "frozen", "closed, live")


def deeds(at: Place) -> list[tuple[Any, ...]]:
    """What the audit log has since the install, in the order of its rows."""
    query = (
        "select action, actor, reason, mapping, correlation_id, details from wallet.audit_log "
        "where action <> 'install' order by id"
    )
    return [tuple(row) for row in rows(at.engine, query)]


def details(at: Place) -> list[dict[str, Any]]:
    return [row[-1] for row in deeds(at)]


def only(said: dict[str, Any], *names: str) -> list[Any]:
    return [said.get(name) for name in names]


@pytest.mark.parametrize("wish", ["on", "off", "stopped"])
@pytest.mark.parametrize("state", STATES)
def test_a_balance_that_was_set_is_on_record_once_in_every_mode(database_url: str, state: str, wish: str) -> None:
    at = place(database_url, rows=0)
    bring_into(at, 1, state)
    with asked_for(at, wish), at.engine.begin() as connection:
        done = at.adapter.set_balance(connection, 1, 40, **ADA)
    said = {"key": "1", "bucket": "cash", "currency": "EUR", "change": -60, "mode": done.mode, "outcome": done.outcome}
    if done.transaction_id is not None:
        said["transaction_id"] = done.transaction_id
    assert (done.mode == "legacy") == (done.transaction_id is None)
    assert deeds(at) == [("set_balance", "admin:7", "case 12", "users", "request-7", said)]
    at.check()


@pytest.mark.parametrize("wish", ["on", "off", "stopped"])
@pytest.mark.parametrize("state", [state for state in STATES if state != "absent"])
def test_a_transaction_that_was_undone_is_on_record_once_in_every_mode(
    database_url: str, state: str, wish: str
) -> None:
    at = place(database_url, rows=0)
    made = bring_into(at, 1, state) or 0
    with asked_for(at, wish), at.engine.begin() as connection:
        done = at.adapter.reverse(connection, made, **ADA)
        assert at.adapter.reverse(connection, made, **ADA).replayed
    ((action, actor, reason, mapping, correlation, said),) = deeds(at)
    assert (action, actor, reason, mapping, correlation) == ("reverse", "admin:7", "case 12", "users", "request-7")
    assert only(said, "key", "change", "reverses") == ["1", -5, made]
    assert only(said, "transaction_id", "mode", "outcome") == [done.transaction_id, done.mode, done.outcome]
    at.check()


def test_a_transfer_that_was_undone_names_both_sides(database_url: str) -> None:
    at = place(database_url, rows=2)
    with at.engine.begin() as connection:
        gift = at.adapter.transfer(connection, 1, 2, 3, type="gift").transaction_id or 0
        at.adapter.reverse(connection, gift, reason="not hers")
    (said,) = details(at)
    assert only(said, "key", "payee", "change") == ["2", "1", -3]


def test_a_reversal_without_an_actor_is_that_of_the_user_of_the_database(database_url: str) -> None:
    at = place(database_url, rows=1)
    with at.engine.begin() as connection:
        number = at.adapter.credit(connection, 1, 3, type="gift").transaction_id or 0
        at.adapter.reverse(connection, number, reason="not hers")
    assert [row[:3] for row in deeds(at)] == [("reverse", scalar(at.engine, "select session_user"), "not hers")]


def everything_else(adapter: LegacyBalanceAdapter, connection: Connection) -> None:
    adapter.credit(connection, 1, 5, type="deposit", actor="admin:7", reason="a gift")
    adapter.debit(connection, 1, 5, type="booking", description="the long way", actor="admin:7", reason="a fee")
    adapter.transfer(connection, 1, 2, 5, type="gift", actor="admin:7", reason="a gift")
    adapter.open_account(connection, 3)


@pytest.mark.parametrize("flags", [DUAL, OFF], ids=["on", "off"])
def test_what_customers_do_is_not(database_url: str, flags: dict[str, bool]) -> None:
    at = place(database_url, rows=3, flags=flags)
    with at.engine.begin() as connection:
        everything_else(at.adapter, connection)
    assert deeds(at) == []


def test_nor_is_what_a_watched_attribute_was_assigned(database_url: str) -> None:
    at = place(database_url, rows=1)
    with at.adapter.watch(User.total_coins), Session(at.engine) as session, session.begin():
        session.get_one(User, 1).total_coins = D(40)
    assert (at.account(1), deeds(at)) == (("mirrored", D(40)), [])


@pytest.mark.parametrize("wish", ["on", "off"])
@pytest.mark.parametrize("state", ["absent", "mirrored", "frozen"])
def test_a_balance_that_has_the_value_already_leaves_none(database_url: str, state: str, wish: str) -> None:
    at = place(database_url, rows=0)
    bring_into(at, 1, state)
    with asked_for(at, wish), at.engine.begin() as connection:
        at.adapter.set_balance(connection, 1, 100, **ADA)
    assert deeds(at) == []


@pytest.mark.parametrize("flags", [DUAL, OFF], ids=["on", "off"])
def test_a_replay_leaves_none(database_url: str, flags: dict[str, bool]) -> None:
    at = place(database_url, rows=1, flags=flags)
    again = Movement.set_balance(1, 40, idempotency_key="k", **ADA)
    with at.engine.begin() as connection:
        at.adapter.apply(connection, [again])
        at.adapter.credit(connection, 1, 5, type="deposit")
        assert at.adapter.apply(connection, [again])[0].replayed
        assert at.adapter.apply(connection, [Movement.credit(1, 1, type="x"), again, again])[2].replayed
    assert [only(said, "change", "idempotency_key") for said in details(at)] == [[-60, "k"]]


REFUSED: dict[str, tuple[type[Exception], Callable[[LegacyBalanceAdapter, Connection], object]]] = {
    "no such account": (UnknownAccount, lambda a, c: a.set_balance(c, 9, 40, **ADA)),
    "too much": (AmountOverflow, lambda a, c: a.set_balance(c, 1, 10**7, **ADA)),
    "no such transaction": (UnknownTransaction, lambda a, c: a.reverse(c, 999, **ADA)),
    "a batch": (
        InsufficientFunds,
        lambda a, c: a.apply(c, [Movement.set_balance(1, 40, **ADA), Movement.debit(1, 41, type="booking")]),
    ),
}


@pytest.mark.parametrize("refused", list(REFUSED))
def test_a_refusal_leaves_none(database_url: str, refused: str) -> None:
    at = place(database_url, rows=1, floor=D(0), coins_type="numeric(8,2)")
    kind, call = REFUSED[refused]
    with at.engine.begin() as connection, pytest.raises(kind):
        call(at.adapter, connection)
    assert (deeds(at), at.coins(1)) == ([], 100)


@pytest.mark.parametrize("policy", ["shadow", "strict"])
def test_a_batch_leaves_one_for_each(database_url: str, policy: str) -> None:
    at = place(database_url, rows=2, policy=policy)
    with at.engine.begin() as connection:
        number = at.adapter.credit(connection, 2, 5, type="deposit").transaction_id or 0
        done = at.adapter.apply(
            connection,
            [
                Movement.set_balance(1, 40, **ADA),
                Movement.credit(1, 5, type="deposit"),
                Movement.set_balance(1, 45, **ADA),
                Movement.reverse(number, reason="refund"),
            ],
        )
    assert [only(said, "key", "change", "transaction_id") for said in details(at)] == [
        ["1", -60, done[0].transaction_id],
        ["2", -5, done[3].transaction_id],
    ]
    at.check()


@pytest.mark.parametrize("alone", [True, False], ids=["alone", "in a batch"])
def test_a_shadow_leg_that_fails_neither_loses_nor_doubles_it(database_url: str, alone: bool) -> None:
    at = place(database_url, rows=2, policy="shadow")
    execute(at.engine, "alter table wallet.transactions add constraint no_sixty check (amount <> 60)")
    also = [] if alone else [Movement.credit(2, 5, type="deposit")]
    with at.engine.begin() as connection:
        at.adapter.apply(connection, [Movement.set_balance(1, 40, **ADA), *also])
    (said,) = details(at)
    assert only(said, "key", "change", "transaction_id", "mode", "outcome") == [
        *("1", -60, None, "legacy", "ledger_failed")
    ]
    assert at.coins(1) == 40
    with at.engine.connect() as connection:
        found = [one.where for one in trace(connection, at.settings, "request-7")]
    assert sorted(found) == ["audit", "failure"]


def test_one_that_strict_takes_back_takes_it_along(database_url: str) -> None:
    at = place(database_url, rows=1, policy="strict")
    body = "begin new.total_coins := new.total_coins + 1; return new; end"
    execute(at.engine, f"create function public.app() returns trigger language plpgsql as $$ {body} $$")
    execute(at.engine, "create trigger app before update on users for each row execute function public.app()")
    with at.engine.begin() as connection, pytest.raises(LedgerMismatch), connection.begin_nested():
        at.adapter.set_balance(connection, 1, 40, **ADA)
    assert (deeds(at), at.coins(1)) == ([], 100)


@pytest.mark.parametrize("flags", [DUAL, OFF], ids=["on", "off"])
def test_what_cannot_go_on_record_is_not_done(database_url: str, flags: dict[str, bool]) -> None:
    at = place(database_url, rows=1, policy="shadow", flags=flags)
    execute(at.engine, "alter table wallet.audit_log add constraint full_disk check (action <> 'set_balance')")
    with suppress(DBAPIError), at.engine.begin() as connection:
        at.adapter.set_balance(connection, 1, 40, **ADA)
    assert (deeds(at), at.coins(1)) == ([], 100)


def test_it_is_gone_with_the_caller_s_transaction(database_url: str) -> None:
    at = place(database_url, rows=1)
    with at.engine.begin() as connection:
        at.adapter.set_balance(connection, 1, 40, **ADA)
        connection.rollback()
    assert (deeds(at), at.coins(1)) == ([], 100)


def test_it_takes_no_further_round_trip(database_url: str) -> None:
    at = place(database_url, rows=1)
    sent: list[str] = []
    with at.engine.begin() as connection:
        at.adapter.credit(connection, 1, 1, type="deposit")
        at.adapter.balance(connection, 1)
        event.listen(connection, "before_cursor_execute", lambda *said: sent.append(said[2]))
        at.adapter.set_balance(connection, 1, 40, **ADA)
    assert len(sent) == 1


def test_an_account_of_the_ledger_alone_has_it_with_its_transaction(database_url: str) -> None:
    at = place(database_url, rows=1, phase="wallet_only")
    with at.engine.begin() as connection:
        at.adapter.credit(connection, 1, 1, type="deposit")
        seal(connection, 1)
        done = at.adapter.set_balance(connection, 1, 40, **ADA)
    assert [only(said, "mode", "change", "transaction_id") for said in details(at)] == [
        ["ledger", -61, done.transaction_id]
    ]


def test_trace_shows_it_by_correlation_id_and_by_idempotency_key(database_url: str) -> None:
    at = place(database_url, rows=2)
    with at.engine.begin() as connection:
        at.adapter.set_balance(connection, 1, 40, idempotency_key="k", **ADA)
        at.flags(OFF)
        at.adapter.set_balance(connection, 2, 40, idempotency_key="l", actor="a", reason="b", correlation_id="other")
    with at.engine.connect() as connection:
        for identifier in ("request-7", "k"):
            found = [(one.where, one.what) for one in trace(connection, at.settings, identifier)]
            assert [where for where, _ in found] == ["ledger", "ledger", "key", "audit"]
            assert found[3][1] == "set_balance by admin:7: case 12"
        assert [one.where for one in trace(connection, at.settings, "other")] == ["audit"]
        assert sorted(one.where for one in trace(connection, at.settings, "l")) == ["audit", "key"]


def test_the_async_adapter_leaves_it_too(database_url: str) -> None:
    at = place(database_url, rows=1)

    async def scenario() -> None:
        engine = create_async_engine(at.engine.url.set(drivername="postgresql+psycopg"))
        async with AsyncSession(engine) as session, session.begin():
            adapter = AsyncLegacyBalanceAdapter(at.settings, at.source)
            done = await adapter.set_balance(session, 1, 40, **ADA)
            await adapter.reverse(session, done.transaction_id or 0, **ADA)
        await engine.dispose()

    asyncio.run(scenario())
    assert [(row[0], row[-1]["change"]) for row in deeds(at)] == [("set_balance", -60), ("reverse", 60)]
