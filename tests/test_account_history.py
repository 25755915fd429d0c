"""An account's history by filters and pages, its balance at any time, and the overview of all money."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest

from adapting import Place, place
from ledger import ACT, execute, install_users, scalar, unguarded
from walletmigrate import history, snapshots
from walletmigrate.backfill import backfill
from walletmigrate.errors import InvalidTime, PageOutOfRange, UnknownBucket, UnknownLedgerAccount, UsageError
from walletmigrate.history import Account, Selection
from walletmigrate.ledger import Entry
from walletmigrate.overview import Overview, overview

D = Decimal


@pytest.fixture
def at(database_url: str) -> Place:
    made = place(database_url, rows=5, with_promo=True)
    with made.engine.begin() as connection:
        for key in range(1, 4):
            made.adapter.open_account(connection, key)
        for number in range(1, 13):
            made.adapter.credit(connection, 1, number, type="deposit" if number % 2 else "bonus")
            if number % 4 == 0:
                made.adapter.transfer(connection, 1, 2, number, type="gift")
        made.adapter.set_balance(connection, 1, 500, actor="admin:7", reason="case")
    return made


def account(at: Place, key: str = "1", **place: str) -> Account:
    with at.engine.connect() as connection:
        return history.account_of(connection, at.settings, at.mapping, key, **place)


def page(at: Place, selection: Selection | None = None, **options: Any) -> history.Page:
    with at.engine.connect() as connection:
        return history.page(connection, at.settings, account(at), selection, **options)


def everything(at: Place, selection: Selection | None = None, key: str = "1") -> list[Entry]:
    with at.engine.connect() as connection:
        return list(history.entries(connection, at.settings, account(at, key), selection))


def balance_at(at: Place, when: datetime, key: str = "1") -> history.BalanceAt:
    with at.engine.connect() as connection:
        return history.balance_at(connection, at.settings, account(at, key), when)


# The account


def test_a_text_key_is_taken_as_it_is_written(database_url: str) -> None:
    engine, settings = install_users(database_url, rows=1, key_type="text", phase="dual_write")
    execute(engine, "insert into users (id, tenant, role, total_coins) values ('bob', 'acme', 'member', 777)")
    backfill(engine, settings, settings.mappings[0], ACT)
    with engine.connect() as connection:
        assert history.account_of(connection, settings, settings.mappings[0], "bob").balance == 777
        for other in ("BOB", "Bob", "bob "):
            with pytest.raises(UnknownLedgerAccount):
                history.account_of(connection, settings, settings.mappings[0], other)


def test_a_uuid_is_the_same_in_capitals(database_url: str) -> None:
    engine, settings = install_users(database_url, rows=1, key_type="uuid", phase="dual_write")
    execute(engine, "update users set id = '00000000-0000-4000-8000-abcdefabcdef'")
    backfill(engine, settings, settings.mappings[0], ACT)
    with engine.connect() as connection:
        for key in ("00000000-0000-4000-8000-abcdefabcdef", "00000000-0000-4000-8000-ABCDEFabcdef"):
            assert history.account_of(connection, settings, settings.mappings[0], key).balance == 100


# History


def test_the_stream_has_what_the_adapter_s_history_has(at: Place) -> None:
    with at.engine.connect() as connection:
        assert tuple(everything(at)) == at.adapter.history(connection, 1, limit=1000)


def test_pages_by_number_and_behind_a_transaction_are_the_same(at: Place) -> None:
    whole = everything(at)
    assert len(whole) == 17
    after: int | None = None
    behind: list[Entry] = []
    for number in range(1, 5):
        numbered, here = page(at, limit=5, number=number), page(at, limit=5, after=after)
        assert numbered.entries == here.entries
        assert (numbered.number, numbered.pages, numbered.after) == (number, 4, here.after)
        behind += here.entries
        after = here.after
    assert after is None
    assert behind == whole


@pytest.mark.parametrize(
    ("selection", "count"),
    [
        (Selection(types=("gift",)), 3),
        (Selection(types=("gift", "bonus")), 9),
        (Selection(kinds=("opening", "correction")), 2),
        (Selection(types=("gift",), kinds=("opening",)), 0),
    ],
)
def test_types_and_kinds_choose_entries(at: Place, selection: Selection, count: int) -> None:
    found = everything(at, selection)
    assert len(found) == count
    assert found == [
        one
        for one in everything(at)
        if (not selection.types or one.type in selection.types) and (not selection.kinds or one.kind in selection.kinds)
    ]
    assert page(at, selection, number=1).entries == tuple(found)


def test_from_is_within_and_to_is_not_to_the_microsecond(at: Place) -> None:
    whole = everything(at)
    since, until = whole[12].posted_at, whole[4].posted_at
    assert everything(at, Selection(since=since, until=until)) == whole[5:13]
    assert everything(at, Selection(since=since + timedelta(microseconds=1))) == whole[:12]
    assert everything(at, Selection(until=whole[-1].posted_at)) == []
    assert page(at, Selection(since=since, until=until), limit=3, number=3).entries == tuple(whole[11:13])


def test_an_account_without_its_row_keeps_its_history(at: Place) -> None:
    execute(at.engine, "delete from users where id = 2")
    assert account(at, "2").state == "closed"
    assert [one.type for one in everything(at, key="2")] == ["gift"] * 3 + ["opening"]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"number": 0}, PageOutOfRange),
        ({"number": 5, "limit": 5}, PageOutOfRange),
        ({"limit": 0}, UsageError),
        ({"limit": 10_001}, UsageError),
        ({"number": 1, "after": 5}, UsageError),
    ],
)
def test_a_page_that_is_not_there_is_refused(at: Place, options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        page(at, **options)


def test_an_empty_list_has_one_page(at: Place) -> None:
    assert page(at, Selection(types=("nothing",)), number=1).pages == 1


def test_bad_selections_are_refused() -> None:
    with pytest.raises(UsageError, match="no kind 'posted'"):
        Selection(kinds=("posted",))
    with pytest.raises(InvalidTime, match="no time zone"):
        Selection(since=datetime(2026, 1, 1))  # noqa: DTZ001 - it is the fault
    with pytest.raises(InvalidTime, match="is not after"):
        Selection(since=datetime(2026, 1, 2, tzinfo=UTC), until=datetime(2026, 1, 1, tzinfo=UTC))
    with pytest.raises(InvalidTime, match="cannot be read"):
        history.read_time("yesterday")
    assert history.read_time("2026-01-01T00:00Z") == datetime(2026, 1, 1, tzinfo=UTC)


def test_unknown_accounts_and_buckets_are_told(at: Place) -> None:
    with pytest.raises(UnknownLedgerAccount, match="'404'") as refused:
        account(at, "404")
    assert refused.value.exit_code == 2
    with pytest.raises(UnknownLedgerAccount):
        account(at, "5")  # a legacy row without an account
    with pytest.raises(UnknownBucket):
        account(at, "1", bucket="gold")


# Balance at a time


def test_the_balance_at_every_time_is_the_one_of_the_last_transaction_before(at: Place) -> None:
    whole = everything(at)
    for entry in whole:
        found = balance_at(at, entry.posted_at)
        assert (found.balance, found.transaction_id) == (entry.balance_after, entry.transaction_id)
        just_before = balance_at(at, entry.posted_at - timedelta(microseconds=1))
        assert (just_before.balance or 0) == entry.balance_before
    assert balance_at(at, datetime(2000, 1, 1, tzinfo=UTC)).balance is None
    assert balance_at(at, datetime.now(UTC)).balance == 500


def test_an_account_that_was_opened_with_nothing_held_nothing(at: Place) -> None:
    execute(at.engine, "insert into users values (9, 'acme', 'member', 0, 0)")
    with at.engine.begin() as connection:
        at.adapter.open_account(connection, 9)
    found = balance_at(at, datetime.now(UTC), "9")
    assert (found.balance, found.transaction_id, found.proven) == (D(0), None, None)
    assert balance_at(at, datetime(2000, 1, 1, tzinfo=UTC), "9").balance is None


def test_a_snapshot_before_the_time_proves_the_balance_or_speaks_against_it(at: Place) -> None:
    before = datetime.now(UTC)
    made = snapshots.take(at.engine, at.settings, ACT)
    assert made is not None
    with at.engine.begin() as connection:
        at.adapter.credit(connection, 1, 5, type="deposit")
        at.adapter.transfer(connection, 1, 2, 7, type="gift")
    assert (balance_at(at, before).snapshot_id, balance_at(at, before).proven) == (None, None)
    for key in ("1", "2", "3"):
        found = balance_at(at, datetime.now(UTC), key)
        assert (found.snapshot_id, found.proven) == (made.id, True)
    assert balance_at(at, datetime.now(UTC)).balance == 498
    with unguarded(at.engine, "wallet.transactions") as connection:
        connection.exec_driver_sql("update wallet.transactions set debit_balance = 400 where debit_balance = 498")
    found = balance_at(at, datetime.now(UTC))
    assert (found.balance, found.proven) == (D(400), False)


def test_times_without_a_zone_and_in_the_future_are_refused(at: Place) -> None:
    with pytest.raises(InvalidTime, match="no time zone"):
        balance_at(at, datetime(2026, 1, 1))  # noqa: DTZ001 - it is the fault
    with pytest.raises(InvalidTime, match="in the future"):
        balance_at(at, datetime.now(UTC) + timedelta(hours=1))
    with pytest.raises(InvalidTime, match="in the future"):
        everything(at, Selection(since=datetime.now(UTC) + timedelta(hours=1)))


def test_a_time_of_long_ago_costs_no_more_than_a_few_probes(at: Place) -> None:
    with unguarded(at.engine, "wallet.transactions") as connection:
        connection.exec_driver_sql(
            "insert into wallet.transactions (id, debit_account, credit_account, posted_at, kind, amount, "
            "credit_balance, currency, type) select 1000 + g, -2, 1, clock_timestamp() - interval '1 day' + "
            "g * interval '1 second', 'posting', 1, g, 'EUR', 'many' from generate_series(1, 20000) as g"
        )
        connection.exec_driver_sql("delete from wallet.transactions where id < 1000")
        connection.exec_driver_sql("analyze wallet.transactions")
    first = scalar(at.engine, "select min(posted_at) from wallet.transactions")
    statement = history._BISECTION.format(schema="wallet").replace(":account", "1").replace(":at", f"'{first}'")
    with at.engine.connect() as connection:
        plan = connection.exec_driver_sql(f"explain (analyze, buffers, format json) {statement}").scalar_one()
    assert plan[0]["Plan"]["Shared Hit Blocks"] + plan[0]["Plan"]["Shared Read Blocks"] < 400
    assert balance_at(at, first).transaction_id == 1001


# The overview


def look(at: Place) -> Overview:
    return overview(at.engine, at.settings)


def test_the_overview_adds_up_what_is_there_what_should_be_and_where_it_came_from(at: Place) -> None:
    execute(at.engine, "update users set total_coins = total_coins + 5 where id = 2")
    execute(at.engine, "select * from wallet.backfill_users(null, '4', 1)")
    execute(at.engine, "delete from users where id = 3")
    found = look(at)
    cash, promo = found.buckets
    assert (cash.accounts, cash.legacy, cash.ledger, cash.closed) == (4, D(829), D(729), D(100))
    assert (cash.expected, cash.discrepancy, cash.unmirrored) == (D(729), D(0), D(100))
    assert (cash.opening, cash.resync, cash.correction, cash.posting) == (D(400), D(5), D(346), D(78))
    assert (cash.bypass, promo.bypass) == (D(5), D(0))
    assert (promo.legacy, promo.ledger, promo.opening) == (D(20), D(15), D(20))
    by_tenant = {(one.value, one.bucket): (one.legacy, one.ledger) for _, one in found.traits if one.trait == "tenant"}
    assert by_tenant["acme", "cash"] == (D(600), D(500))
    assert {(one.name, one.balance) for one in found.system} >= {("opening", D(-420)), ("bypass", D(-5))}
    assert (found.imbalance, found.sound) == ({"EUR": D(0)}, True)


def test_a_snapshot_changes_nothing_in_the_overview_before_and_after_postings_and_prunes(at: Place) -> None:
    before = look(at)
    snapshots.take(at.engine, at.settings, ACT)
    after = look(at)
    assert (after.buckets, after.system, after.snapshot_id) == (before.buckets, before.system, 1)
    with at.engine.begin() as connection:
        at.adapter.credit(connection, 1, 5, type="deposit")
    snapshots.take(at.engine, at.settings, ACT)
    with at.engine.begin() as connection:
        at.adapter.credit(connection, 1, 6, type="deposit")
    assert look(at).buckets[0].posting == before.buckets[0].posting + 11
    snapshots.prune(at.engine, at.settings, ACT, keep=1)
    pruned = look(at)
    assert pruned.buckets[0].posting == before.buckets[0].posting + 11
    assert (pruned.sound, pruned.buckets[0].opening) == (True, before.buckets[0].opening)


def test_what_came_past_the_adapter_is_told_apart_as_far_as_snapshots_leave_it_known(at: Place) -> None:
    execute(at.engine, "update users set total_coins = total_coins + 5 where id = 2")
    execute(at.engine, "select * from wallet.backfill_users(null, '4', 1)")
    assert [one.bypass for one in look(at).buckets] == [D(5), D(0)]
    snapshots.take(at.engine, at.settings, ACT)
    assert [one.bypass for one in look(at).buckets] == [None, None], "which of the two, nobody knows"


def test_one_bucket_of_a_currency_has_all_that_came_past_the_adapter(database_url: str) -> None:
    made = place(database_url, rows=3)
    with made.engine.begin() as connection:
        for key in (1, 2, 3):
            made.adapter.open_account(connection, key)
    for number in (1, 2):
        execute(made.engine, "update users set total_coins = total_coins + 5 where id = 2")
        execute(made.engine, "select * from wallet.backfill_users(null, '4', 1)")
        assert look(made).buckets[0].bypass == 5 * number
        snapshots.take(made.engine, made.settings, ACT)
        assert look(made).buckets[0].bypass == 5 * number


def test_money_that_no_transaction_explains_is_a_discrepancy(at: Place) -> None:
    execute(at.engine, "update wallet.accounts set balance = balance + 3 where key = '1' and bucket = 'cash'")
    found = look(at)
    assert (found.buckets[0].discrepancy, found.imbalance, found.sound) == (D(3), {"EUR": D(3)}, False)
    execute(at.engine, "update wallet.accounts set balance = balance - 3 where key = '1' and bucket = 'cash'")
    execute(at.engine, "update wallet.system_accounts set balance = balance + 1 where name = 'opening'")
    assert [one.discrepancy for one in look(at).system if one.name == "opening"] == [1]


def test_a_retired_legacy_table_leaves_the_ledger_s_part(at: Place) -> None:
    execute(at.engine, "update wallet.control set phase = 'retired'")
    (cash, _) = look(at).buckets
    assert (cash.legacy, cash.unmirrored, cash.ledger) == (None, None, cash.expected)
