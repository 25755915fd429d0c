"""What a call of the adapter carries, details and batches, and what it sees of a flag, line or phase that moves."""

from __future__ import annotations

from decimal import Decimal

import pytest
from sqlalchemy import text
from structlog.contextvars import bound_contextvars

from adapting import DUAL, OFF, bring_into, place
from ledger import execute, rows, set_phase
from walletmigrate import Movement

D = Decimal


# Details of a movement


def test_a_movement_s_details_stand_where_they_belong(database_url: str) -> None:
    at = place(database_url, rows=1)
    with at.engine.begin() as connection:
        result = at.adapter.credit(
            connection,
            1,
            5,
            type="deposit",
            reference=("deposit", 17),
            correlation_id="c-1",
            actor="admin:7",
            reason="case 9",
            description="Deposit of Ann Other",
            address="1 High Street",
        )
    stored = rows(
        at.engine,
        "select reference_type, reference_id, correlation_id, actor, reason, type, kind::text "
        "from wallet.transactions where id = :id",
        id=result.transaction_id,
    )
    assert stored == [("deposit", "17", "c-1", "admin:7", "case 9", "deposit", "posting")]
    details = rows(at.engine, "select * from wallet.transaction_details")
    assert details == [(result.transaction_id, "Deposit of Ann Other", "1 High Street")]
    journal = rows(at.engine, "select t::text from wallet.transactions as t")
    assert not any("High Street" in row or "Ann" in row for (row,) in journal), "personal data is in the side table"
    assert result.correlation_id == "c-1"


def test_a_movement_without_personal_data_has_no_row_in_the_side_table(database_url: str) -> None:
    at = place(database_url, rows=1)
    with at.engine.begin() as connection:
        at.adapter.credit(connection, 1, 5, type="deposit")
    assert rows(at.engine, "select * from wallet.transaction_details") == []


@pytest.mark.parametrize("wish", ["on", "off"])
def test_the_caller_s_correlation_id_reaches_result_row_and_event(database_url: str, wish: str) -> None:
    at = place(database_url, rows=1, flags=DUAL if wish == "on" else OFF)
    with bound_contextvars(correlation_id="request-42"), at.engine.begin() as connection:
        result = at.adapter.credit(connection, 1, 5, type="deposit")
    assert result.correlation_id == "request-42"
    assert [event.correlation_id for event in at.heard.posted] == ["request-42"]
    stored = rows(at.engine, "select correlation_id from wallet.transactions")
    assert stored == ([("request-42",)] * 2 if wish == "on" else [])  # the opening, too


def test_a_correlation_id_of_the_movement_goes_before_the_caller_s(database_url: str) -> None:
    at = place(database_url, rows=1)
    with bound_contextvars(correlation_id="outer"), at.engine.begin() as connection:
        assert at.adapter.credit(connection, 1, 5, type="deposit", correlation_id="mine").correlation_id == "mine"


def test_without_a_correlation_id_one_is_made_for_the_whole_call(database_url: str) -> None:
    at = place(database_url, rows=1)
    with at.engine.begin() as connection:
        batch = at.adapter.apply(connection, [Movement.credit(1, 1, type="a"), Movement.credit(1, 2, type="b")])
        later = at.adapter.credit(connection, 1, 3, type="c")
    assert len({each.correlation_id for each in batch}) == 1
    assert later.correlation_id != batch[0].correlation_id
    assert len(later.correlation_id) == 32


@pytest.mark.parametrize("name", ["", "psql", "walletmigrate backfill"])
def test_the_application_name_makes_no_difference(database_url: str, name: str) -> None:
    at = place(database_url, rows=1)
    with at.engine.begin() as connection:
        connection.execute(text("select set_config('application_name', :name, true)"), {"name": name})
        assert at.adapter.credit(connection, 1, 5, type="deposit").mode == "dual_write"
    assert at.account(1) == ("mirrored", D(105))


# Batches


def test_a_batch_is_carried_out_in_the_order_given_with_one_result_for_each(database_url: str) -> None:
    at = place(database_url, rows=3, floor=D(0))
    with at.engine.begin() as connection:
        results = at.adapter.apply(
            connection,
            [
                Movement.set_balance(3, 0, actor="admin:7", reason="start"),
                Movement.credit(3, 10, type="deposit"),
                Movement.debit(3, 10, type="booking"),
                Movement.transfer(2, 1, 7, type="gift"),
                Movement.credit(1, 1, type="deposit"),
            ],
        )
    assert [(each.operation, each.key, each.ledger_balance) for each in results] == [
        ("set_balance", 3, D(0)),
        ("credit", 3, D(10)),
        ("debit", 3, D(0)),
        ("transfer", 2, D(93)),
        ("credit", 1, D(108)),
    ]
    numbers = [each.transaction_id for each in results]
    assert None not in numbers
    assert numbers == sorted(n for n in numbers if n is not None)
    assert (at.coins(1), at.coins(2), at.coins(3)) == (108, 93, 0)
    at.check()


def test_a_batch_in_another_order_takes_the_same_locks_and_ends_the_same(database_url: str) -> None:
    at = place(database_url, rows=3)
    movements = [
        Movement.transfer(3, 1, 5, type="gift", idempotency_key="z"),
        Movement.transfer(2, 3, 5, type="gift", idempotency_key="a"),
        Movement.credit(1, 5, type="deposit", idempotency_key="m"),
    ]
    with at.engine.begin() as connection:
        first = at.adapter.apply(connection, movements)
    with at.engine.begin() as connection:
        second = at.adapter.apply(connection, movements[::-1])
    assert [each.replayed for each in second] == [True, True, True]
    assert [each.transaction_id for each in second] == [each.transaction_id for each in reversed(first)]
    assert (at.coins(1), at.coins(2), at.coins(3)) == (110, 95, 100)
    at.check()


def test_an_empty_batch_does_nothing(database_url: str) -> None:
    at = place(database_url, rows=1)
    with at.engine.begin() as connection:
        assert at.adapter.apply(connection, []) == ()
    assert at.heard.events == []


def test_a_batch_over_all_states_posts_each_by_its_state(database_url: str) -> None:
    at = place(database_url, rows=0)
    states = ["absent", "mirrored", "stale", "frozen", "closed, live"]
    for key, state in enumerate(states, 1):
        bring_into(at, key, state)
    with at.engine.begin() as connection:
        results = at.adapter.apply(connection, [Movement.credit(key, 1, type="deposit") for key in range(1, 6)])
    assert [each.mode for each in results] == ["dual_write", "dual_write", "dual_write", "ledger", "dual_write"]
    assert {each.ledger_balance for each in results} == {D(101)}
    at.check()


def test_a_batch_takes_one_round_trip(database_url: str) -> None:
    at = place(database_url, rows=5)
    from sqlalchemy import event

    with at.engine.begin() as connection:
        at.adapter.credit(connection, 1, 1, type="warm-up")
        statements: list[str] = []
        event.listen(connection, "before_cursor_execute", lambda _c, _u, statement, *_: statements.append(statement))
        at.adapter.apply(connection, [Movement.credit(key, 1, type="deposit") for key in range(1, 6)])
        at.adapter.transfer(connection, 1, 2, 1, type="gift")
    assert len(statements) == 2


# Flag flips and phases in a row


def test_an_account_goes_through_flips_of_the_flag_without_a_wrong_balance(database_url: str) -> None:
    at = place(database_url, rows=1)
    states = []
    for flags in (DUAL, OFF, OFF, DUAL, OFF, DUAL):
        at.flags(flags)
        with at.engine.begin() as connection:
            at.adapter.credit(connection, 1, 1, type="deposit")
        states.append(at.account(1))
        at.check()
    assert states == [
        ("mirrored", D(101)),
        ("stale", D(101)),
        ("stale", D(101)),
        ("mirrored", D(104)),
        ("stale", D(104)),
        ("mirrored", D(106)),
    ]
    assert at.coins(1) == 106


def test_a_stopped_line_is_seen_at_the_next_statement_of_a_running_transaction(database_url: str) -> None:
    at = place(database_url, rows=1)
    engine = at.engine.execution_options(isolation_level="REPEATABLE READ")
    with engine.begin() as connection:
        assert at.adapter.credit(connection, 1, 1, type="deposit").mode == "dual_write"
        execute(at.engine, "select wallet.set_line(false)")
        assert at.adapter.credit(connection, 1, 1, type="deposit").mode == "legacy"
        execute(at.engine, "select wallet.set_line(true)")
        assert at.adapter.credit(connection, 1, 1, type="deposit").mode == "dual_write"
    assert at.account(1) == ("mirrored", D(103))
    at.check()


def test_the_phase_may_change_under_a_running_adapter(database_url: str) -> None:
    at = place(database_url, rows=1, phase="legacy")
    modes = []
    for phase in ("legacy", "dual_write", "legacy", "wallet_only"):
        set_phase(at.engine, phase)
        with at.engine.begin() as connection:
            modes.append(at.adapter.credit(connection, 1, 1, type="deposit").mode)
    assert modes == ["legacy", "dual_write", "legacy", "dual_write"]
    at.check()
