"""History and past balances of one account, in pages, as the journal has them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from itertools import pairwise
from typing import Any

import pytest

from adapting import Place, bring_into, place, seal
from ledger import ACT, execute, rows, scalar
from walletmigrate import Movement
from walletmigrate.errors import InvalidKey, UsageError
from walletmigrate.install import install

D = Decimal


@pytest.fixture
def at(database_url: str) -> Place:
    return place(database_url, rows=3, with_promo=True)


def test_an_entry_tells_all_that_is_known_of_it(at: Place) -> None:
    with at.engine.begin() as connection:
        at.adapter.open_account(connection, 1)
        posted = at.adapter.debit(
            connection,
            1,
            D("12.50"),
            type="booking",
            reference=("booking", 17),
            correlation_id="c-1",
            actor="admin:7",
            reason="case",
        )
        (newest, opening) = at.adapter.history(connection, 1)
    assert (newest.transaction_id, newest.direction, newest.kind, newest.type) == (
        posted.transaction_id,
        "debit",
        "posting",
        "booking",
    )
    assert (newest.amount, newest.balance_before, newest.balance_after) == (D("-12.50"), D(100), D("87.50"))
    assert (newest.currency, newest.reference, newest.correlation_id) == ("EUR", ("booking", "17"), "c-1")
    assert (newest.actor, newest.reason, newest.job_id) == ("admin:7", "case", None)
    assert (newest.reverses, newest.reversed_by) == (None, None)
    assert abs(datetime.now(UTC) - newest.posted_at) < timedelta(minutes=5)
    assert (opening.kind, opening.direction, opening.amount, opening.balance_before) == (
        "opening",
        "credit",
        D(100),
        D(0),
    )
    assert opening.reference is None


def test_both_sides_of_a_transfer_have_their_own_entry(at: Place) -> None:
    with at.engine.begin() as connection:
        at.adapter.transfer(connection, 1, 2, 30, type="gift")
        payer, payee = at.adapter.history(connection, 1)[0], at.adapter.history(connection, 2)[0]
    assert payer.transaction_id == payee.transaction_id
    assert (payer.direction, payer.amount, payer.balance_after) == ("debit", D(-30), D(70))
    assert (payee.direction, payee.amount, payee.balance_after) == ("credit", D(30), D(130))


def test_a_reversal_and_what_it_undid_name_each_other(at: Place) -> None:
    with at.engine.begin() as connection:
        posted = at.adapter.credit(connection, 1, 5, type="deposit")
        undone = at.adapter.reverse(connection, posted.transaction_id or 0, reason="refund")
        newest, first, _ = at.adapter.history(connection, 1)
    assert (newest.kind, newest.reverses, newest.reason) == ("reversal", posted.transaction_id, "refund")
    assert first.reversed_by == undone.transaction_id == newest.transaction_id


def test_pages_follow_each_other_without_gap_or_double(at: Place) -> None:
    with at.engine.begin() as connection:
        for number in range(12):
            if number % 3:
                at.adapter.debit(connection, 1, number, type="booking")
            else:
                at.adapter.transfer(connection, 2, 1, number + 1, type="gift")
        whole = at.adapter.history(connection, 1)
        pages, before = [], None
        while page := at.adapter.history(connection, 1, limit=5, before=before):
            pages.append(page)
            before = page[-1].transaction_id
    assert [len(page) for page in pages] == [5, 5, 3]
    assert tuple(entry for page in pages for entry in page) == whole
    numbers = [entry.transaction_id for entry in whole]
    assert numbers == sorted(numbers, reverse=True)
    times = [entry.posted_at for entry in whole]
    assert times == sorted(times, reverse=True)
    for newer, older in pairwise(whole):
        assert newer.balance_before == older.balance_after


@pytest.mark.parametrize(("limit", "length"), [(1, 1), (2, 2), (0, 1), (-5, 1), (10**9, 1000)])
def test_a_page_has_at_least_one_and_at_most_a_thousand_entries(at: Place, limit: int, length: int) -> None:
    with at.engine.begin() as connection:
        at.adapter.apply(connection, [Movement.credit(1, 1, type="deposit") for _ in range(1100 if limit > 5 else 3)])
        assert len(at.adapter.history(connection, 1, limit=limit)) == length


@pytest.mark.parametrize("asked", [{"limit": True}, {"limit": "50"}, {"limit": 2.0}, {"before": "7"}, {"before": 7.5}])
def test_a_page_that_is_asked_for_by_no_int_is_refused_before_the_database_is_asked(
    at: Place, asked: dict[str, Any]
) -> None:
    with at.engine.begin() as connection:
        with pytest.raises(UsageError, match=next(iter(asked))):
            at.adapter.history(connection, 1, **asked)
        at.adapter.credit(connection, 1, 1, type="deposit")
    at.check()


@pytest.mark.parametrize(("before", "length"), [(10**30, 2), (-(10**30), 0)])
def test_a_page_before_what_no_transaction_reaches(at: Place, before: int, length: int) -> None:
    with at.engine.begin() as connection:
        at.adapter.credit(connection, 1, 1, type="deposit")
        assert len(at.adapter.history(connection, 1, before=before)) == length


def test_a_bucket_has_a_history_of_its_own(at: Place) -> None:
    with at.engine.begin() as connection:
        at.adapter.credit(connection, 1, 1, type="bonus", bucket="promo")
        at.adapter.credit(connection, 1, 2, type="deposit")
        promo = at.adapter.history(connection, 1, bucket="promo", currency="EUR")
        cash = at.adapter.history(connection, 1)
    assert [(entry.kind, entry.amount) for entry in promo] == [("posting", D(1)), ("opening", D(5))]
    assert [(entry.kind, entry.amount) for entry in cash] == [("posting", D(2)), ("opening", D(100))]


def test_an_account_that_the_ledger_does_not_have_has_no_history(at: Place) -> None:
    with at.engine.connect() as connection:
        assert at.adapter.history(connection, 1) == ()
        assert at.adapter.history(connection, 404) == ()
        with pytest.raises(InvalidKey):
            at.adapter.history(connection, "1")


def test_history_outlives_the_row_and_the_freeze(at: Place) -> None:
    execute(at.engine, "delete from users")
    for key, state in enumerate(["frozen", "closed", "stale"], 1):
        bring_into(at, key, state)
    with at.engine.connect() as connection:
        assert [len(at.adapter.history(connection, key)) for key in (1, 2, 3)] == [2, 2, 2]


def test_openings_of_a_backfill_name_their_job(at: Place) -> None:
    execute(at.engine, "select * from wallet.backfill_users(null, null, 42)")
    with at.engine.connect() as connection:
        assert [entry.job_id for entry in at.adapter.history(connection, 1)] == [42]


# Past balances


def test_the_balance_at_a_past_time_is_the_one_that_stood_then(at: Place) -> None:
    with at.engine.begin() as connection:
        for amount in (1, 2, 3):
            at.adapter.credit(connection, 1, amount, type="deposit")
            at.adapter.transfer(connection, 1, 2, amount, type="gift")
        entries = at.adapter.history(connection, 1)
        assert len({entry.posted_at for entry in entries}) == len(entries)
        for entry in entries:
            assert at.adapter.balance_at(connection, 1, entry.posted_at) == entry.balance_after
            just_before = at.adapter.balance_at(connection, 1, entry.posted_at - timedelta(microseconds=1))
            assert just_before == (None if entry.kind == "opening" else entry.balance_before)
        assert at.adapter.balance_at(connection, 1, datetime.now(UTC) + timedelta(days=1)) == 100
        assert at.adapter.balance_at(connection, 1, datetime(2000, 1, 1, tzinfo=UTC)) is None
        assert at.adapter.balance_at(connection, 1, datetime.now(UTC), bucket="promo") is None
        assert at.adapter.balance_at(connection, 3, datetime.now(UTC)) is None


def test_a_time_without_a_time_zone_is_refused(at: Place) -> None:
    with at.engine.connect() as connection:
        with pytest.raises(UsageError, match="no time zone"):
            at.adapter.balance_at(connection, 1, datetime(2026, 1, 1))  # noqa: DTZ001 - it is the fault
        assert at.adapter.balance(connection, 1).amount == 100


def test_posting_times_follow_the_order_of_posting_though_transactions_overlap(at: Place) -> None:
    with at.engine.connect() as early, at.engine.connect() as late:
        early.exec_driver_sql("select now()")
        with late.begin():
            at.adapter.credit(late, 1, 1, type="began later, posts first")
        at.adapter.credit(early, 1, 2, type="began earlier, posts second")
        early.commit()
    with at.engine.connect() as connection:
        entries = at.adapter.history(connection, 1)
        assert [entry.amount for entry in entries] == [2, 1, 100]
        assert entries[0].posted_at > entries[1].posted_at
        assert at.adapter.balance_at(connection, 1, entries[1].posted_at) == 101
    at.check()


def test_the_entries_view_agrees_with_the_history(at: Place) -> None:
    with at.engine.begin() as connection:
        at.adapter.transfer(connection, 1, 2, 30, type="gift")
        at.adapter.set_balance(connection, 1, 500, actor="admin:7", reason="case")
        entries = at.adapter.history(connection, 1)
    view = rows(
        at.engine,
        "select transaction_id, direction, amount, balance_before, balance_after from wallet.wallet_entries "
        "where account_id = (select id from wallet.accounts where key = '1') order by transaction_id desc",
    )
    assert view == [(e.transaction_id, e.direction, e.amount, e.balance_before, e.balance_after) for e in entries]


def test_history_goes_on_over_an_install_that_is_run_again(at: Place) -> None:
    with at.engine.begin() as connection:
        at.adapter.credit(connection, 1, 1, type="deposit")
    install(at.engine, at.settings, ACT)
    with at.engine.begin() as connection:
        at.adapter.credit(connection, 1, 1, type="deposit")
        seal(connection, 1)
        at.adapter.credit(connection, 1, 1, type="deposit")
        assert [entry.balance_after for entry in at.adapter.history(connection, 1)] == [103, 102, 101, 100]
    assert scalar(at.engine, "select count(*) from wallet.transactions") == 4
    at.check()
