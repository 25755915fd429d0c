"""Without the ledger the adapter does what the application did before; and the ledger may come and go."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal, localcontext
from typing import Any

import pytest
from sqlalchemy import Engine, event
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from adapting import DUAL, READ, Place, User, custom, placed
from ledger import ACT, execute, rows, set_phase, users_settings
from walletmigrate import Movement, PostingRefused, connect, sites
from walletmigrate.errors import (
    AmountOverflow,
    ConfigError,
    InsufficientFunds,
    InvalidAmount,
    LedgerNotInstalled,
    LegacyValueInvalid,
    SelfTransfer,
    UnknownAccount,
)
from walletmigrate.install import install, uninstall

D = Decimal

DDL = (
    "create table public.users (id bigint primary key, tenant text not null default 'acme', "
    "role text not null default 'member', total_coins {type}, promo numeric(20, 2) not null default 5);"
    "insert into users (id, total_coins) select g, {coins} from generate_series(1, 3) as g"
)


def bare(url: str, *, type: str = "numeric(20, 2)", coins: str = "100", **settings: Any) -> Place:  # noqa: A002
    """A table of users in a database that has never seen the ledger."""
    engine: Engine = connect.engine(url, application_name="walletmigrate-test", poolclass=NullPool)
    with engine.begin() as connection:
        connection.exec_driver_sql(DDL.format(type=type, coins=coins), execution_options={"no_parameters": True})
    return placed(engine, users_settings(url, **settings), READ)


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Believe "not installed" for no time at all."""
    monkeypatch.setattr(sites, "ABSENT_SECONDS", 0.0)


def test_every_operation_is_one_plain_update_for_each_account(database_url: str) -> None:
    at = bare(database_url, floor=D(0), with_promo=True)
    with at.engine.begin() as connection:
        at.adapter.balance(connection, 1)
        statements: list[str] = []
        event.listen(connection, "before_cursor_execute", lambda _c, _u, statement, *_: statements.append(statement))
        credit = at.adapter.credit(connection, 1, D("12.50"), type="deposit", idempotency_key="k")
        at.adapter.debit(connection, 1, 3, type="booking", bucket="promo")
        at.adapter.set_balance(connection, 2, 7, actor="admin:7", reason="case")
        assert len(statements) == 3
        assert all(each.startswith("update ") for each in statements)
        gift = at.adapter.transfer(connection, 1, 3, 10, type="gift")
        at.adapter.open_account(connection, 1)
    assert (credit.mode, credit.outcome, credit.replayed) == ("legacy", "skipped", False)
    assert (credit.legacy_balance, credit.ledger_balance, credit.transaction_id) == (D("112.50"), None, None)
    assert (gift.legacy_balance, gift.payee_legacy_balance) == (D("102.50"), D(110))
    assert (at.coins(1), at.coins(1, "promo"), at.coins(2), at.coins(3)) == (D("102.5"), 2, 7, 110)
    assert rows(at.engine, "select 1 from pg_namespace where nspname = 'wallet'") == []


def test_a_read_comes_from_legacy_whatever_the_flags_ask_for(database_url: str) -> None:
    at = bare(database_url)
    with at.engine.begin() as connection:
        found = at.adapter.balance(connection, 1)
        assert at.adapter.history(connection, 1) == ()
        with pytest.raises(UnknownAccount):
            at.adapter.balance(connection, 404)
    assert (found.amount, found.source, found.ledger_balance, found.state, found.compare) == (
        D(100),
        "legacy",
        None,
        None,
        None,
    )


@pytest.mark.parametrize(
    ("type_", "unit", "scale", "coins", "amount", "after"),
    [
        ("integer", "minor", 2, "10000", D("0.01"), 10001),
        ("bigint", "major", 0, "100", D(5), 105),
        ("numeric", "major", 4, "100", D("0.0001"), D("100.0001")),
        ("double precision", "major", 2, "0.1", D("0.20"), pytest.approx(0.3)),
        ("real", "minor", 2, "10", D("0.20"), 30.0),
    ],
)
def test_types_and_units_are_written_as_they_are(
    database_url: str, type_: str, unit: str, scale: int, coins: str, amount: Decimal, after: object
) -> None:
    at = bare(database_url, type=type_, coins=coins, unit=unit, scale=scale)
    with at.engine.begin() as connection:
        before = at.adapter.balance(connection, 1).amount
        assert at.adapter.credit(connection, 1, amount, type="deposit").legacy_balance == before + amount
        assert at.adapter.balance(connection, 1).amount == before + amount
    assert at.coins(1) == after


def test_no_amount_is_rounded_by_the_decimal_context_of_the_application(database_url: str) -> None:
    at = bare(database_url, type="numeric(38, 2)", coins="10000000.01")
    with localcontext() as context, at.engine.begin() as connection:
        context.prec = 3
        at.adapter.debit(connection, 1, D("1234567.89"), type="booking")
        at.adapter.transfer(connection, 2, 3, D("1234567.89"), type="gift")
    assert rows(at.engine, "select total_coins from users order by id") == [
        (D("8765432.12"),),
        (D("8765432.12"),),
        (D("11234567.90"),),
    ]


def test_a_float_column_does_not_gather_noise(database_url: str) -> None:
    at = bare(database_url, type="double precision", coins="0.1")
    with at.engine.begin() as connection:
        for _ in range(30):
            at.adapter.credit(connection, 1, D("0.1"), type="deposit")
    assert at.coins(1) == 3.1


REFUSALS: list[tuple[str, type[PostingRefused], Any]] = [
    ("below the floor", InsufficientFunds, lambda a, on: a.debit(on, 1, 101, type="x")),
    ("transfer below the floor", InsufficientFunds, lambda a, on: a.transfer(on, 1, 2, 101, type="x")),
    ("too much", AmountOverflow, lambda a, on: a.credit(on, 1, 10_000, type="x")),
    ("too much for the payee", AmountOverflow, lambda a, on: a.transfer(on, 2, 3, 100, type="x")),
    ("set too high", AmountOverflow, lambda a, on: a.set_balance(on, 1, 10_000, actor="a", reason="r")),
    ("set too low", AmountOverflow, lambda a, on: a.set_balance(on, 1, -10_000, actor="a", reason="r")),
    ("unknown", UnknownAccount, lambda a, on: a.credit(on, 404, 1, type="x")),
    ("set unknown", UnknownAccount, lambda a, on: a.set_balance(on, 404, 1, actor="a", reason="r")),
    ("unknown payer", UnknownAccount, lambda a, on: a.transfer(on, 404, 1, 1, type="x")),
    ("unknown payee", UnknownAccount, lambda a, on: a.transfer(on, 1, 404, 1, type="x")),
    ("no amount", InvalidAmount, lambda a, on: a.credit(on, 1, 1.5, type="x")),
    ("itself", SelfTransfer, lambda a, on: a.transfer(on, 1, 1, 1, type="x")),
    (
        "in a batch",
        InsufficientFunds,
        lambda a, on: a.apply(on, [Movement.credit(2, 1, type="x"), Movement.debit(1, 101, type="x")]),
    ),
]


@pytest.mark.parametrize(("error", "call"), [each[1:] for each in REFUSALS], ids=[each[0] for each in REFUSALS])
def test_refusals_are_typed_write_nothing_and_leave_the_transaction_usable(
    database_url: str, error: type[PostingRefused], call: Any
) -> None:
    at = bare(database_url, type="numeric(6, 2)", coins="case g when 3 then 9999 else 100 end", floor=D(0))
    with Session(at.engine) as session:
        session.get_one(User, 1).role = "vip"
        with pytest.raises(error):
            call(at.adapter, session)
        at.adapter.credit(session, 1, 1, type="still usable")
        session.commit()
        assert session.get_one(User, 1).role == "vip"
    assert (at.coins(1), at.coins(2), at.coins(3)) == (101, 100, 9999)
    assert at.heard.posted[0].error == error.code


@pytest.mark.parametrize("value", ["null", "'NaN'", "'Infinity'", "'-Infinity'"])
def test_a_value_that_is_no_amount_is_refused_until_it_is_set(database_url: str, value: str) -> None:
    at = bare(database_url, type="numeric", coins=value)
    with at.engine.begin() as connection:
        for call in (at.adapter.credit, at.adapter.debit):
            with pytest.raises(LegacyValueInvalid):
                call(connection, 1, 1, type="x")
        if value == "null":
            with pytest.raises(LegacyValueInvalid):
                at.adapter.balance(connection, 1)
        assert at.adapter.set_balance(connection, 1, 5, actor="admin:7", reason="mend").legacy_balance == 5
        assert at.adapter.credit(connection, 1, 1, type="x").legacy_balance == 6


def test_a_reversal_needs_the_ledger_and_says_so(database_url: str) -> None:
    at = bare(database_url)
    with at.engine.begin() as connection:
        with pytest.raises(LedgerNotInstalled, match="walletmigrate install"):
            at.adapter.reverse(connection, 1, reason="refund")
        assert at.adapter.credit(connection, 1, 1, type="x").legacy_balance == 101


def test_loaded_balances_are_expired_and_observers_are_told(database_url: str) -> None:
    at = bare(database_url)
    with Session(at.engine) as session:
        user = session.get_one(User, 1)
        user.total_coins = D(50)
        at.adapter.credit(session, 1, 5, type="deposit")
        assert user.total_coins == 55
        session.commit()
    assert [(each.mode, each.outcome, each.committed) for each in at.heard.posted] == [("legacy", "skipped", True)]
    assert at.metric("dual_write_total", operation="credit", outcome="skipped") == 1


@pytest.mark.usefixtures("no_memory")
def test_the_ledger_may_come_go_and_come_back_under_a_running_adapter(database_url: str) -> None:
    at = bare(database_url)

    def credit() -> str:
        with at.engine.begin() as connection:
            return at.adapter.credit(connection, 1, 1, type="deposit").mode

    assert credit() == "legacy"
    install(at.engine, at.settings, ACT)
    set_phase(at.engine, "dual_write")
    assert credit() == "dual_write"
    at.check()
    set_phase(at.engine, "legacy")
    uninstall(at.engine, at.settings, ACT)
    with pytest.raises(LedgerNotInstalled, match="Retry the transaction"):
        credit()
    assert credit() == "legacy"
    install(at.engine, at.settings, ACT)
    set_phase(at.engine, "dual_write")
    assert credit() == "dual_write"
    assert at.coins(1) == 104
    at.check()


@pytest.mark.parametrize("call", ["credit", "balance", "history", "reverse"])
def test_a_ledger_that_was_dropped_is_noticed_by_every_call(database_url: str, call: str) -> None:
    at = bare(database_url)
    install(at.engine, at.settings, ACT)
    with at.engine.begin() as connection:
        at.adapter.credit(connection, 1, 1, type="deposit")
    uninstall(at.engine, at.settings, ACT, drop_ledger=True)

    def again() -> object:
        with at.engine.begin() as connection:
            if call == "credit":
                return at.adapter.credit(connection, 1, 1, type="deposit").mode
            if call == "balance":
                return at.adapter.balance(connection, 1).source
            if call == "history":
                return at.adapter.history(connection, 1)
            return at.adapter.reverse(connection, 1, reason="refund")

    with pytest.raises(LedgerNotInstalled):
        again()
    if call == "reverse":
        with pytest.raises(LedgerNotInstalled, match="a reversal needs the ledger"):
            again()
    else:
        assert again() == {"credit": "legacy", "balance": "legacy", "history": ()}[call]


def test_a_posting_from_another_configuration_is_refused_by_the_database(database_url: str) -> None:
    at = bare(database_url)
    install(at.engine, at.settings, ACT)
    set_phase(at.engine, "dual_write")
    other = placed(at.engine, users_settings(database_url, floor=D(5)), DUAL)
    with pytest.raises(LedgerNotInstalled, match="another configuration"), at.engine.begin() as connection:
        other.adapter.credit(connection, 1, 1, type="deposit")
    assert at.coins(1) == 100
    install(at.engine, other.settings, ACT)
    with other.engine.begin() as connection:
        assert other.adapter.credit(connection, 1, 1, type="deposit").mode == "dual_write"
    at.check()


def test_the_look_at_a_database_is_remembered(database_url: str) -> None:
    at = bare(database_url)
    seen: list[str] = []
    with at.engine.connect() as connection:
        event.listen(connection, "before_cursor_execute", lambda _c, _u, statement, *_: seen.append(statement))
        at.adapter.credit(connection, 1, 1, type="a")
        first = len(seen)
        at.adapter.credit(connection, 1, 1, type="b")
    assert len(seen) == first + 1


def test_a_table_that_the_ledger_could_not_work_on_is_named_at_the_first_call(database_url: str) -> None:
    at = custom(
        database_url,
        "create table users (id bigint, shop bigint, total_coins numeric(12, 2), primary key (id, shop))",
        {
            "name": "users",
            "table": "public.users",
            "key": "id",
            "columns": [{"bucket": "cash", "column": "total_coins", "currency": "EUR", "scale": 2}],
        },
        installed=False,
    )
    with at.engine.connect() as connection, pytest.raises(ConfigError, match="id"):
        at.adapter.credit(connection, 1, 1, type="deposit")


def test_a_missing_table_is_named(database_url: str) -> None:
    at = bare(database_url)
    execute(at.engine, "drop table users")
    with at.engine.connect() as connection, pytest.raises(ConfigError, match="users"):
        at.adapter.balance(connection, 1)


def test_results_are_frozen(database_url: str) -> None:
    at = bare(database_url)
    with at.engine.begin() as connection:
        result = at.adapter.credit(connection, 1, 1, type="deposit")
        found = at.adapter.balance(connection, 1)
    for value in (result, found):
        with pytest.raises(AttributeError):
            value.key = 2  # type: ignore[misc]
        assert replace(value, key=2).key == 2
