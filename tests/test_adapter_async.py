"""The async shell: the same methods, results and errors on AsyncSession and AsyncConnection."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import pytest
from sqlalchemy import inspect as state_of
from sqlalchemy import make_url
from sqlalchemy.ext.asyncio import (
    AsyncConnection,
    AsyncEngine,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.pool import NullPool

from adapting import Place, User, place
from walletmigrate import AsyncLegacyBalanceAdapter, LegacyBalanceAdapter, Movement
from walletmigrate.errors import InsufficientFunds, UsageError

D = Decimal

Scenario = Callable[[AsyncLegacyBalanceAdapter, AsyncSession], Awaitable[None]]


def run(at: Place, scenario: Scenario) -> None:
    """Run the scenario in a session of its own, and commit."""

    async def main() -> None:
        engine = async_engine(at)
        async with AsyncSession(engine, expire_on_commit=False) as session:
            await scenario(shell(at), session)
            await session.commit()
        await engine.dispose()

    asyncio.run(main())


def async_engine(at: Place) -> AsyncEngine:
    url = make_url(at.engine.url.render_as_string(hide_password=False))
    return create_async_engine(url.set(drivername="postgresql+psycopg"), poolclass=NullPool)


def shell(at: Place) -> AsyncLegacyBalanceAdapter:
    return AsyncLegacyBalanceAdapter(at.settings, at.source, observers=[at.heard])


@pytest.fixture
def at(database_url: str) -> Place:
    return place(database_url, rows=3, floor=D(0), with_promo=True, phase="read_ledger")


def test_the_shell_has_every_public_method_of_the_adapter_with_the_same_parameters() -> None:
    def methods(of: type) -> set[str]:
        return {name for name, each in vars(of).items() if callable(each) and not name.startswith("_")}

    assert methods(AsyncLegacyBalanceAdapter) == methods(LegacyBalanceAdapter)
    for name in methods(LegacyBalanceAdapter):
        assert getattr(AsyncLegacyBalanceAdapter, name).__doc__ == getattr(LegacyBalanceAdapter, name).__doc__
        assert getattr(AsyncLegacyBalanceAdapter, name).__name__ == name


def test_a_scoped_session_is_the_session_of_its_task(at: Place) -> None:
    async def main() -> None:
        engine = async_engine(at)
        scoped = async_scoped_session(async_sessionmaker(engine), asyncio.current_task)
        user = await scoped.get_one(User, 1)
        user.total_coins = D(50)
        assert (await shell(at).credit(scoped, 1, 5, type="deposit")).ledger_balance == 55
        assert user.total_coins == 55
        await scoped.commit()
        assert (await shell(at).balance(scoped, 1)).amount == 55
        await scoped.remove()
        await engine.dispose()

    asyncio.run(main())
    assert [event.committed for event in at.heard.posted] == [True]
    at.check()


def test_every_operation_works_on_an_async_session(at: Place) -> None:
    async def scenario(adapter: AsyncLegacyBalanceAdapter, session: AsyncSession) -> None:
        posted = await adapter.credit(session, 1, 5, type="deposit", idempotency_key="k")
        assert (posted.mode, posted.ledger_balance) == ("dual_write", D(105))
        assert (await adapter.credit(session, 1, 5, type="deposit", idempotency_key="k")).replayed
        assert (await adapter.debit(session, 1, 5, type="booking", bucket="promo")).ledger_balance == 0
        assert (await adapter.transfer(session, 1, 2, 10, type="gift")).payee_ledger_balance == 110
        assert (await adapter.set_balance(session, 3, 7, actor="admin:7", reason="case")).ledger_balance == 7
        assert (await adapter.reverse(session, posted.transaction_id or 0, reason="refund")).ledger_balance == 90
        assert len(await adapter.open_account(session, 2)) == 2
        batch = await adapter.apply(session, [Movement.credit(1, 1, type="a"), Movement.credit(2, 1, type="b")])
        assert [each.ledger_balance for each in batch] == [91, 111]
        assert (await adapter.balance(session, 1)).amount == 91
        assert (await adapter.history(session, 1, limit=1))[0].balance_after == 91
        assert await adapter.balance_at(session, 1, datetime(2000, 1, 1, tzinfo=UTC)) is None
        assert (await adapter.decision(session, 1)).dual_write

    run(at, scenario)
    assert (at.coins(1), at.coins(2), at.coins(3)) == (91, 111, 7)
    at.check()


def test_a_loaded_balance_is_anew_at_once(at: Place) -> None:
    async def scenario(adapter: AsyncLegacyBalanceAdapter, session: AsyncSession) -> None:
        user = await session.get_one(User, 1)
        user.total_coins = D(50)
        await adapter.credit(session, 1, 5, type="deposit")
        assert [user.total_coins, user.promo] == [55, 5]
        number = (await adapter.transfer(session, 1, 2, 30, type="gift")).transaction_id
        await adapter.reverse(session, number or 0, reason="refund")
        assert [user.total_coins, user.promo] == [55, 5]

    run(at, scenario)


def test_a_balance_read_in_a_savepoint_that_is_rolled_back_is_forgotten(at: Place) -> None:
    async def scenario(adapter: AsyncLegacyBalanceAdapter, session: AsyncSession) -> None:
        user = await session.get_one(User, 1)
        async with session.begin_nested() as savepoint:
            await adapter.debit(session, 1, 30, type="booking")
            assert user.total_coins == 70
            await savepoint.rollback()
        assert "total_coins" in state_of(user).unloaded
        await session.refresh(user)
        assert user.total_coins == 100

    run(at, scenario)


def test_a_refusal_leaves_the_async_transaction_usable(at: Place) -> None:
    async def scenario(adapter: AsyncLegacyBalanceAdapter, session: AsyncSession) -> None:
        with pytest.raises(InsufficientFunds):
            await adapter.debit(session, 1, 500, type="booking")
        await adapter.debit(session, 1, 100, type="booking")

    run(at, scenario)
    assert at.coins(1) == 0


def test_observers_are_told_after_the_commit_and_not_of_lost_savepoints(at: Place) -> None:
    async def scenario(adapter: AsyncLegacyBalanceAdapter, session: AsyncSession) -> None:
        await adapter.credit(session, 1, 1, type="kept", correlation_id="kept")
        async with session.begin_nested() as savepoint:
            await adapter.credit(session, 1, 1, type="lost", correlation_id="lost")
            await savepoint.rollback()
        assert at.heard.posted == []

    run(at, scenario)
    assert [(each.correlation_id, each.committed) for each in at.heard.posted] == [("kept", True)]
    assert at.coins(1) == 101


def test_an_async_connection_serves_as_well(at: Place) -> None:
    async def main() -> None:
        engine = async_engine(at)
        async with engine.begin() as connection:
            assert isinstance(connection, AsyncConnection)
            assert (await shell(at).credit(connection, 1, 5, type="deposit")).ledger_balance == 105
        await engine.dispose()

    asyncio.run(main())
    assert at.coins(1) == 105
    assert [each.committed for each in at.heard.posted] == [False]


def test_many_tasks_share_one_adapter(at: Place) -> None:
    async def main() -> None:
        engine, adapter = async_engine(at), shell(at)

        async def one(number: int) -> None:
            async with AsyncSession(engine) as session, session.begin():
                await adapter.transfer(session, number % 3 + 1, (number + 1) % 3 + 1, 1, type="gift")

        await asyncio.gather(*(one(number) for number in range(12)))
        await engine.dispose()

    asyncio.run(main())
    assert (at.coins(1), at.coins(2), at.coins(3)) == (100, 100, 100)
    assert len(at.heard.posted) == 12
    at.check()


def test_the_shell_is_built_from_a_configuration_file(at: Place, tmp_path: Path) -> None:
    file = tmp_path / "walletmigrate.toml"
    file.write_text(
        '[[mappings]]\nname = "users"\ntable = "public.users"\nkey = "id"\n'
        '[[mappings.columns]]\nbucket = "cash"\ncolumn = "total_coins"\ncurrency = "EUR"\nscale = 2\n'
    )
    made = AsyncLegacyBalanceAdapter.from_config(file, source=at.source, observers=[])
    assert made.adapter.mapping.name == "users"
    assert inspect.iscoroutinefunction(made.credit)


def test_a_plain_session_is_refused_by_name(at: Place) -> None:
    async def main() -> None:
        with at.engine.connect() as connection:
            await shell(at).credit(connection, 1, 1, type="deposit")  # type: ignore[arg-type]

    with pytest.raises(UsageError, match="pass an AsyncSession or an AsyncConnection, not Connection"):
        asyncio.run(main())
