"""Observers are told after the outermost commit of a session, and nothing that did not happen."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from adapting import Place, User
from ledger import execute
from test_adapter_sessions import at, session
from walletmigrate import Movement
from walletmigrate.errors import InsufficientFunds
from walletmigrate.observe import FlagsSeen

__all__ = ["at", "session"]

D = Decimal


def test_observers_are_told_only_after_the_commit(at: Place, session: Session) -> None:
    at.adapter.credit(session, 1, 5, type="deposit")
    assert at.heard.posted == []
    assert at.metric("dual_write_total", operation="credit", outcome="ok") == 0
    session.commit()
    assert [(each.operation, each.outcome, each.mode, each.committed) for each in at.heard.posted] == [
        ("credit", "ok", "dual_write", True)
    ]
    assert at.metric("dual_write_total", operation="credit", outcome="ok") == 1
    assert at.metric("dual_write_duration_seconds_count", operation="credit", mode="dual_write") == 1


def test_what_is_rolled_back_is_never_told(at: Place, session: Session) -> None:
    at.adapter.credit(session, 1, 5, type="deposit")
    session.rollback()
    at.adapter.credit(session, 1, 7, type="deposit")
    session.commit()
    session.commit()
    assert len(at.heard.posted) == 1


def test_a_closed_session_tells_nothing(at: Place) -> None:
    session = Session(at.engine)
    at.adapter.credit(session, 1, 5, type="deposit")
    session.close()
    session.execute(select(1))
    session.commit()
    session.close()
    assert at.heard.posted == []


def test_a_savepoint_s_release_tells_nothing_yet(at: Place, session: Session) -> None:
    with session.begin_nested():
        at.adapter.credit(session, 1, 5, type="deposit")
    assert at.heard.posted == []
    session.commit()
    assert len(at.heard.posted) == 1


def test_rolled_back_savepoints_are_never_told(at: Place, session: Session) -> None:
    def post(kind: str) -> None:
        at.adapter.credit(session, 1, 1, type=kind, correlation_id=kind)

    post("outer")
    with session.begin_nested():
        post("released")
        with session.begin_nested() as inner:
            post("inner, lost")
            inner.rollback()
        with session.begin_nested():
            post("inner, released")
    with session.begin_nested() as lost:
        post("lost")
        with session.begin_nested():
            post("released into what is lost")
        lost.rollback()
    post("after")
    assert at.heard.posted == []
    session.commit()
    assert [each.correlation_id for each in at.heard.posted] == ["outer", "released", "inner, released", "after"]
    assert at.coins(1) == 104


def test_a_savepoint_lost_by_an_exception_is_never_told(at: Place, session: Session) -> None:
    def fails() -> None:
        with session.begin_nested():
            at.adapter.credit(session, 1, 1, type="lost")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    session.commit()
    assert at.heard.posted == []


def test_a_savepoint_lost_by_a_flush_that_fails_is_never_told(at: Place, session: Session) -> None:
    def fails() -> None:
        with session.begin_nested():
            at.adapter.credit(session, 1, 1, type="lost")
            session.add(User(id=2, total_coins=D(0)))
            session.flush()

    with pytest.raises(Exception, match="unique"):
        fails()
    session.commit()
    assert at.heard.posted == []


def test_a_released_savepoint_of_a_rolled_back_transaction_is_never_told(at: Place, session: Session) -> None:
    with session.begin_nested():
        at.adapter.credit(session, 1, 1, type="lost")
    session.rollback()
    session.commit()
    assert at.heard.posted == []


def test_a_flush_between_posting_and_commit_changes_nothing(at: Place, session: Session) -> None:
    at.adapter.credit(session, 1, 1, type="deposit")
    session.add(User(id=9, total_coins=D(0)))
    session.flush()
    assert at.heard.posted == []
    session.commit()
    assert len(at.heard.posted) == 1


def test_a_commit_that_fails_tells_nothing(at: Place, session: Session) -> None:
    execute(at.engine, "create table later (id int, user_id bigint references users deferrable initially deferred)")
    at.adapter.credit(session, 1, 1, type="deposit")
    session.connection().exec_driver_sql("insert into later values (1, 404)")
    with pytest.raises(Exception, match="foreign key"):
        session.commit()
    session.rollback()
    assert at.heard.posted == []
    assert at.coins(1) == 100


def test_on_a_bare_connection_a_posting_is_told_at_once_as_posted(at: Place) -> None:
    with at.engine.begin() as connection:
        at.adapter.credit(connection, 1, 5, type="deposit")
        assert [(each.outcome, each.committed) for each in at.heard.posted] == [("ok", False)]


def test_a_batch_is_measured_once_and_told_movement_by_movement(at: Place, session: Session) -> None:
    at.adapter.apply(session, [Movement.credit(1, 1, type="a"), Movement.debit(2, 1, type="b")])
    session.commit()
    assert [(each.operation, each.seconds is None) for each in at.heard.posted] == [("credit", False), ("debit", True)]


@pytest.mark.parametrize("operation", ["one", "batch"])
def test_a_refusal_is_told_at_once_and_counted(at: Place, session: Session, operation: str) -> None:
    movement = Movement.debit(1, 500, type="booking", correlation_id="c")
    with pytest.raises(InsufficientFunds):
        at.adapter.apply(session, [movement] if operation == "one" else [movement, movement])
    name = "debit" if operation == "one" else "apply"
    assert [(each.operation, each.outcome, each.error, each.correlation_id) for each in at.heard.posted] == [
        (name, "refused", "insufficient_funds", "c")
    ]
    assert at.metric("dual_write_total", operation=name, outcome="refused") == 1
    session.rollback()
    assert len(at.heard.posted) == 1


def test_outcomes_are_counted_as_they_are(at: Place, session: Session) -> None:
    at.adapter.credit(session, 1, 5, type="deposit", idempotency_key="k")
    at.adapter.credit(session, 1, 5, type="deposit", idempotency_key="k")
    at.flags({})
    at.adapter.credit(session, 1, 5, type="deposit")
    session.commit()
    counted = {
        outcome: at.metric("dual_write_total", operation="credit", outcome=outcome)
        for outcome in ("ok", "replayed", "skipped", "refused", "ledger_failed")
    }
    assert counted == {"ok": 1, "replayed": 1, "skipped": 1, "refused": 0, "ledger_failed": 0}


def test_the_age_of_the_flags_that_a_call_decided_by_is_told(at: Place, session: Session) -> None:
    for gauge in ("wallet.dualWrite", "wallet.readFromLedger", "wallet.enableWithdrawals"):
        assert at.metric("flag_age_seconds", flag=gauge) == 0
    at.adapter.transfer(session, 1, 2, 1, type="gift")
    seen = [each for each in at.heard.events if isinstance(each, FlagsSeen)]
    assert [(each.source, each.document_id) for each in seen] == [("static", "static")]


def test_flags_that_are_in_force_still_are_told_once_a_second(
    at: Place, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("walletmigrate.adapter.time.monotonic", lambda: now[0])

    def told_after(seconds: float) -> int:
        now[0] += seconds
        at.heard.events.clear()
        at.adapter.balance(session, 1)
        return sum(isinstance(each, FlagsSeen) for each in at.heard.events)

    assert [told_after(0), told_after(0.5), told_after(0.6), told_after(0.5)] == [1, 0, 1, 0]
    at.flags({})
    assert told_after(0) == 1, "another document is told at once"


def test_one_snapshot_answers_all_questions_of_a_call(at: Place, session: Session) -> None:
    taken = []
    snapshot = at.source.snapshot

    def counted() -> Any:
        taken.append(1)
        return snapshot()

    at.source.snapshot = counted  # type: ignore[method-assign]
    at.adapter.apply(session, [Movement.transfer(1, 2, 1, type="gift"), Movement.credit(3, 1, type="deposit")])
    assert len(taken) == 1


def test_an_observer_that_fails_does_not_fail_the_posting(at: Place) -> None:
    def broken(_: object) -> None:
        raise RuntimeError("no more disk")

    adapter = at.another(observers=[broken, at.heard])
    with Session(at.engine) as session:
        assert adapter.credit(session, 1, 5, type="deposit").legacy_balance == 105
        session.commit()
    assert len(at.heard.posted) == 1
    assert at.coins(1) == 105


def test_two_adapters_on_one_session_are_both_told(at: Place, session: Session) -> None:
    other = at.another(observers=[at.heard])
    at.adapter.credit(session, 1, 1, type="a", correlation_id="first")
    other.credit(session, 1, 1, type="b", correlation_id="second")
    session.commit()
    assert [each.correlation_id for each in at.heard.posted] == ["first", "second"]
