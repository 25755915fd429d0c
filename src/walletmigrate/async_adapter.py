"""The adapter for AsyncSession and AsyncConnection: one logic, run in the session's greenlet."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_scoped_session

from walletmigrate.adapter import LegacyBalanceAdapter
from walletmigrate.config import Settings
from walletmigrate.errors import UsageError
from walletmigrate.flags import FlagSource
from walletmigrate.observe import Observer
from walletmigrate.sessions import Target

P = ParamSpec("P")
R = TypeVar("R")

AsyncTarget = AsyncSession | async_scoped_session[Any] | AsyncConnection


def _shell(
    method: Callable[Concatenate[LegacyBalanceAdapter, Target, P], R],
) -> Callable[Concatenate[AsyncLegacyBalanceAdapter, AsyncTarget, P], Awaitable[R]]:
    async def call(self: AsyncLegacyBalanceAdapter, target: AsyncTarget, /, *args: P.args, **kwargs: P.kwargs) -> R:
        # A scoped one stands for the session of the task that asks; it has no run_sync of its own.
        given: object = target() if isinstance(target, async_scoped_session) else target
        if not isinstance(given, AsyncSession | AsyncConnection):
            raise UsageError(f"pass an AsyncSession or an AsyncConnection, not {type(target).__name__}")
        return await given.run_sync(lambda sync: method(self.adapter, sync, *args, **kwargs))

    call.__doc__ = method.__doc__
    call.__name__ = method.__name__
    return call


def _same(
    method: Callable[Concatenate[LegacyBalanceAdapter, P], R],
) -> Callable[Concatenate[AsyncLegacyBalanceAdapter, P], R]:
    """What touches no database is not awaited."""

    def call(self: AsyncLegacyBalanceAdapter, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return method(self.adapter, *args, **kwargs)

    call.__doc__ = method.__doc__
    call.__name__ = method.__name__
    return call


class AsyncLegacyBalanceAdapter:
    """`LegacyBalanceAdapter` with ``await``: the same methods, arguments, results and errors.

    A balance that a loaded object holds is read anew at once, because an async session cannot do it behind
    an attribute. Behind a savepoint that is rolled back it is not loaded, as what SQLAlchemy itself had written:
    refresh the object.
    """

    def __init__(
        self,
        settings: Settings,
        source: FlagSource,
        *,
        mapping: str | None = None,
        observers: Iterable[Observer] = (),
    ) -> None:
        self.adapter = LegacyBalanceAdapter(settings, source, mapping=mapping, observers=observers, reload=True)

    @classmethod
    def from_config(
        cls,
        path: Path | str | None = None,
        *,
        mapping: str | None = None,
        source: FlagSource | None = None,
        observers: Iterable[Observer] | None = None,
    ) -> AsyncLegacyBalanceAdapter:
        """Build from walletmigrate.toml, as `LegacyBalanceAdapter.from_config` does."""
        made = cls.__new__(cls)
        made.adapter = LegacyBalanceAdapter.from_config(
            path, mapping=mapping, source=source, observers=observers, reload=True
        )
        return made

    credit = _shell(LegacyBalanceAdapter.credit)
    debit = _shell(LegacyBalanceAdapter.debit)
    transfer = _shell(LegacyBalanceAdapter.transfer)
    set_balance = _shell(LegacyBalanceAdapter.set_balance)
    reverse = _shell(LegacyBalanceAdapter.reverse)
    open_account = _shell(LegacyBalanceAdapter.open_account)
    apply = _shell(LegacyBalanceAdapter.apply)
    balance = _shell(LegacyBalanceAdapter.balance)
    balances = _shell(LegacyBalanceAdapter.balances)
    history = _shell(LegacyBalanceAdapter.history)
    balance_at = _shell(LegacyBalanceAdapter.balance_at)
    decision = _shell(LegacyBalanceAdapter.decision)
    watch = _same(LegacyBalanceAdapter.watch)
