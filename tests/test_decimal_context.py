"""The application's decimal context and loaders are for its own sums, never for an amount of the ledger's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal, Inexact, Rounded, localcontext

import psycopg
import pytest
from psycopg.types.numeric import FloatLoader
from sqlalchemy import create_engine, event
from sqlalchemy.pool import NullPool

from adapting import READ, Place, place
from refusing import refusal
from walletmigrate.errors import AmountOverflow, InsufficientFunds, UnknownAccount, UsageError

D = Decimal
LARGE = D("123456789012345678901234567890.12")


@contextmanager
def narrow() -> Iterator[None]:
    """Three digits, and an error where one is lost."""
    with localcontext() as context:
        context.prec = 3
        context.traps[Inexact] = context.traps[Rounded] = True
        yield


@pytest.fixture
def at(database_url: str) -> Place:
    made = place(database_url, coins_type="numeric(32, 2)", coins=f"{LARGE}", floor=D(0), phase="read_ledger")
    made.flags(READ)
    return made


@pytest.mark.parametrize("trapped", [False, True])
def test_every_operation_says_what_it_moved_to_the_last_digit(at: Place, trapped: bool) -> None:
    amount, half = D("123456789012345678901234567890.11"), D("0.01")
    with at.engine.begin() as connection, narrow() if trapped else localcontext():
        paid = at.adapter.debit(connection, 1, amount, type="booking")
        assert (paid.amount, paid.legacy_change, paid.legacy_balance) == (amount, amount.copy_negate(), half)
        back = at.adapter.credit(connection, 1, amount, type="refund")
        assert (back.amount, back.legacy_change, back.legacy_balance) == (amount, amount, LARGE)
        gift = at.adapter.transfer(connection, 1, 2, amount, type="gift")
        assert (gift.amount, gift.legacy_change, gift.ledger_balance) == (amount, amount.copy_negate(), half)
        assert gift.transaction_id is not None
        undone = at.adapter.reverse(connection, gift.transaction_id, reason="mistake")
        assert undone.amount == amount
        put = at.adapter.set_balance(connection, 1, half, actor="admin:7", reason="case 1")
        assert (put.amount, put.legacy_balance) == (amount, half)
        assert at.adapter.balance(connection, 2).amount == LARGE
        entry = at.adapter.history(connection, 1)[0]
        assert (entry.amount, entry.balance_before, entry.balance_after) == (amount.copy_negate(), LARGE, half)
    at.check()


def test_every_refusal_has_its_figures_to_the_last_digit(at: Place) -> None:
    with narrow(), refusal(at, UnknownAccount) as got:
        at.adapter.debit(got[0], 99, LARGE, type="booking")
    with narrow(), refusal(at, InsufficientFunds) as got:
        at.adapter.debit(got[0], 2, D("123456789012345678901234567890.13"), type="booking")
    assert (got[1].balance, got[1].amount) == (LARGE, D("123456789012345678901234567890.13"))
    most = D("999999999999999999999999999999.99")
    with narrow(), refusal(at, AmountOverflow) as got:
        at.adapter.credit(got[0], 2, most, type="deposit")
    assert got[1].balance == D("1123456789012345678901234567890.11")


def test_an_engine_that_reads_numeric_as_float_is_refused(at: Place) -> None:
    other = create_engine(at.engine.url, poolclass=NullPool)

    @event.listens_for(other, "connect")
    def _(connection: psycopg.Connection[object], _record: object) -> None:
        connection.adapters.register_loader("numeric", FloatLoader)

    with other.begin() as connection, pytest.raises(UsageError, match="numeric as float"):
        at.adapter.balance(connection, 1)
    other.dispose()
