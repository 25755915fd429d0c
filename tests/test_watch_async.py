"""Watched attributes in async sessions: the hooks run in the session's greenlet."""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import update
from sqlalchemy.ext.asyncio import AsyncSession

from adapting import Place, User, place
from test_adapter_async import run, shell
from walletmigrate import AsyncLegacyBalanceAdapter
from walletmigrate.errors import InvalidAmount
from watching import lost, unrouted

D = Decimal
COINS: Any = User.total_coins


@pytest.fixture
def at(database_url: str) -> Iterator[Place]:
    made = place(database_url, rows=3, floor=D(0))
    with shell(made).watch(User.total_coins, actor="async"):
        yield made


def test_assignments_inserts_and_updates_are_posted(at: Place) -> None:
    async def scenario(_: AsyncLegacyBalanceAdapter, session: AsyncSession) -> None:
        one, two = await session.get_one(User, 1), await session.get_one(User, 2)
        one.total_coins += 10
        two.total_coins = COINS - 10
        session.add(User(id=9, total_coins=D(9)))
        await session.flush()
        assert [one.total_coins, two.total_coins] == [110, 90]
        await session.execute(update(User).where(User.id < 3).values(total_coins=COINS + 1))
        assert [one.total_coins, two.total_coins] == [111, 91], "read anew at once"
        async with session.begin_nested() as inner:
            one.total_coins = D(0)
            await session.flush()
            await inner.rollback()
        await session.refresh(one)
        assert one.total_coins == 111

    run(at, scenario)
    assert [at.account(key) for key in (1, 2, 9)] == [("mirrored", D(k)) for k in (111, 91, 9)]
    assert (lost(at), unrouted(at)) == ([], [])
    at.check()


def test_a_lost_update_is_told_and_a_refusal_is_rolled_back(at: Place) -> None:
    async def scenario(_: AsyncLegacyBalanceAdapter, session: AsyncSession) -> None:
        one = await session.get_one(User, 1)
        with at.engine.begin() as other:
            at.adapter.credit(other, 1, 7, type="deposit")
        one.total_coins = D("0.001")
        with pytest.raises(InvalidAmount):
            await session.flush()
        await session.rollback()
        one = await session.get_one(User, 1)
        await session.refresh(one)
        with at.engine.begin() as other:
            at.adapter.credit(other, 1, 7, type="deposit")
        one.total_coins += 1
        await session.commit()
        assert one.total_coins == 108

    run(at, scenario)
    assert [(told.expected, told.found) for told in lost(at)] == [(D(107), D(114))]
    assert at.account(1) == ("mirrored", D(108))
