"""The public API as a user's type checker sees it. Never run: `make check` has mypy read it."""

from __future__ import annotations

from datetime import datetime
from decimal import Decimal
from typing import Literal, assert_type
from uuid import UUID

from sqlalchemy import Connection
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession
from sqlalchemy.orm import Session, scoped_session

from walletmigrate import (
    AsyncLegacyBalanceAdapter,
    Balance,
    Decision,
    Entry,
    LegacyBalanceAdapter,
    Mapping,
    Movement,
    Posting,
    Settings,
    StaticSource,
)
from walletmigrate.errors import InsufficientFunds, PostingRefused
from walletmigrate.observe import Event, LogObserver, Posted


def building(settings: Settings) -> None:
    def heard(event: Event) -> None:
        if isinstance(event, Posted):
            assert_type(event.committed, bool)

    assert_type(LegacyBalanceAdapter.from_config("walletmigrate.toml"), LegacyBalanceAdapter)
    assert_type(AsyncLegacyBalanceAdapter.from_config(mapping="users"), AsyncLegacyBalanceAdapter)
    adapter = LegacyBalanceAdapter(settings, StaticSource(), mapping="users", observers=[heard, LogObserver()])
    assert_type(adapter.mapping, Mapping)
    LegacyBalanceAdapter(settings)  # type: ignore[call-arg]  # flags have to come from somewhere


def posting(adapter: LegacyBalanceAdapter, session: Session, connection: Connection) -> None:
    posted = adapter.credit(
        session,
        17,
        Decimal("12.50"),
        type="deposit",
        reference=("deposit", 4),
        idempotency_key="deposit:4",
        correlation_id="c",
        bucket="cash",
        currency="EUR",
        actor="admin:7",
        reason="r",
        description="d",
        address="a",
        traits={"tenant": "acme", "vip": True, "level": 3},
    )
    assert_type(posted, Posting)
    assert_type(posted.legacy_balance, Decimal | None)
    assert_type(posted.ledger_balance, Decimal | None)
    assert_type(posted.transaction_id, int | None)
    assert_type(posted.mode, Literal["legacy", "dual_write", "ledger"])
    assert_type(posted.replayed, bool)
    assert_type(adapter.debit(connection, "ann", 3, type="booking"), Posting)
    assert_type(adapter.transfer(connection, UUID(int=1), UUID(int=2), 3, type="gift"), Posting)
    assert_type(adapter.set_balance(session, 17, 500, actor="admin:7", reason="case"), Posting)
    assert_type(adapter.reverse(session, 4, reason="refund"), Posting)
    assert_type(adapter.open_account(session, 17), tuple[Posting, ...])
    assert_type(adapter.apply(session, [Movement.credit(1, 2, type="deposit")]), tuple[Posting, ...])


def refused_by_the_checker(adapter: LegacyBalanceAdapter, session: Session, posted: Posting) -> None:
    adapter.credit(session, 17, 12.5, type="deposit")  # type: ignore[arg-type]  # money is no float
    adapter.credit(session, 17, "12", type="deposit")  # type: ignore[arg-type]
    adapter.credit(session, 17, 12)  # type: ignore[call-arg]  # what for?
    adapter.credit(session, (1, 2), 12, type="deposit")  # type: ignore[arg-type]  # keys are not composite
    adapter.credit(session, 17, 12, type="deposit", colour="red")  # type: ignore[call-arg]
    adapter.credit(session, 17, 12, type="deposit", reference="deposit:4")  # type: ignore[arg-type]
    adapter.apply(session, [17])  # type: ignore[list-item]
    posted.replayed = False  # type: ignore[misc]  # results are frozen
    Movement(operation="steal", key=1)  # type: ignore[arg-type]


def reading(adapter: LegacyBalanceAdapter, session: scoped_session[Session], at: datetime) -> None:
    found = adapter.balance(session, 17, bucket="cash", currency="EUR", traits={"tenant": "acme"})
    assert_type(found, Balance)
    assert_type(found.amount, Decimal)
    assert_type(found.source, Literal["legacy", "ledger", "fallback"])
    assert_type(found.compare, Literal["match", "mismatch", "stale"] | None)
    assert_type(adapter.history(session, 17, limit=50, before=4), tuple[Entry, ...])
    assert_type(adapter.balance_at(session, 17, at), Decimal | None)
    assert_type(adapter.decision(session, 17), Decision)


def failing(adapter: LegacyBalanceAdapter, session: Session) -> None:
    try:
        adapter.debit(session, 17, 3, type="booking")
    except InsufficientFunds as error:
        assert_type(error.balance, Decimal)
        assert_type(error.floor, Decimal)
    except PostingRefused as error:
        assert_type(error.code, str)


async def waiting(adapter: AsyncLegacyBalanceAdapter, session: AsyncSession, connection: AsyncConnection) -> None:
    assert_type(await adapter.credit(session, 17, 3, type="deposit", idempotency_key="k"), Posting)
    assert_type(await adapter.apply(connection, [Movement.reverse(4, reason="refund")]), tuple[Posting, ...])
    assert_type(await adapter.balance(session, 17), Balance)
    assert_type(await adapter.history(session, 17, limit=5), tuple[Entry, ...])
    await adapter.credit(session, 17, 12.5, type="deposit")  # type: ignore[arg-type]
