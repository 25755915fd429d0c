"""The journal's rows against what snapshots keep of them: edits that fit in themselves are found, nothing else is."""

from __future__ import annotations

import hashlib
from decimal import Decimal
from typing import Any

import pytest

from adapting import Place, place
from interleaving import stage
from ledger import ACT, execute, fence_down, rows, unguarded
from test_snapshots import credit, ends_after, proof, take
from walletmigrate import checksums, snapshots
from walletmigrate.checksums import Bare
from walletmigrate.erasure import erase
from walletmigrate.snapshot_checks import SnapshotProblem
from walletmigrate.verify import verify

D = Decimal
KEPT = "select first_id, snapshot_id, transactions, checksum from wallet.snapshot_checksums order by 1, 2"
FAR = 25_000
"""An id in another range than the first."""


@pytest.fixture
def at(database_url: str) -> Place:
    """Two windows: openings, and what the edits are about; then a posting that no snapshot has.

    Second window, by id: 6 and 7 pay 5 to accounts 1 and 2, 8 and 9 come and go at account 4, 10 and 11 are left out,
    12 to 16 pay 1 to each account.
    """
    made = place(database_url, rows=5)
    for key in range(1, 6):
        with made.engine.begin() as connection:
            made.adapter.open_account(connection, key)
    take(made)
    credit(made, 1, 5)
    credit(made, 2, 5)
    credit(made, 4, 4)
    with made.engine.begin() as connection:
        made.adapter.debit(connection, 4, 4, type="booking", reference=("trip", "1"), reason="paid")
    execute(made.engine, "select nextval('wallet.transaction_ids'), nextval('wallet.transaction_ids')")
    for key in range(1, 6):
        credit(made, key, 1)
    take(made)
    credit(made, 1, 1)
    return made


def edit(at: Place, *statements: str) -> None:
    """As a superuser with the triggers of journal and legacy table off."""
    for statement in statements:
        legacy = "public.users" in statement
        with (
            fence_down(at.engine, at.settings) if legacy else unguarded(at.engine, "wallet.transactions") as connection
        ):
            connection.exec_driver_sql(statement)


def found(at: Place, **options: Any) -> list[tuple[str, int | None, int | None, Decimal | None, Decimal | None]]:
    def told(one: SnapshotProblem) -> tuple[Any, ...]:
        return (one.problem, one.window, one.first_id, one.expected, one.found)

    return [told(one) for one in proof(at, **options).problems]


# The accounts of keys 1 to 5 have the ids 1 to 5. Each edit mends what snapshots have folded, too.
_BALANCES = "update wallet.snapshot_balances set {} where snapshot_id = 2 and account_id = {}"
_TOTALS = "update wallet.snapshot_totals set {} where snapshot_id = 2 and bucket in {}"
AMOUNT = (
    "update wallet.transactions set amount = amount + 1 where id = 6",
    "update wallet.transactions set credit_balance = credit_balance + 1 where credit_account = 1 and id >= 6",
    "update wallet.accounts set balance = balance + 1 where id = 1",
    "update public.users set total_coins = total_coins + 1 where id = 1",
    "update wallet.system_accounts set balance = balance - 1 where name = 'external' and folded_xid > 0",
    _BALANCES.format("balance = balance + 1, posting = posting + 1", 1),
    _TOTALS.format("balance = balance + 1, posting = posting + 1", "('cash')"),
    _TOTALS.format("balance = balance - 1, posting = posting - 1", "('external')"),
)
ACCOUNTS = ("update wallet.transactions set credit_account = 3 - credit_account where id in (6, 7)",)
_COPY = (
    "insert into wallet.transactions (id, debit_account, credit_account, amount, debit_balance, credit_balance, "
    "posted_at, xid, kind, currency, type) select {}, {}, posted_at, xid, kind, currency, type "
    "from wallet.transactions where id = 8"
)
PAIR_ADDED = (
    _COPY.format(10, "debit_account, 3, 1, null, 101"),
    _COPY.format(11, "3, debit_account, 1, 100, null"),
    _BALANCES.format("transactions = transactions + 2", 3),
    _TOTALS.format("transactions = transactions + 2", "('cash', 'external')"),
)
PAIR_DELETED = (
    "delete from wallet.transactions where id in (8, 9)",
    _BALANCES.format("transactions = transactions - 2", 4),
    _TOTALS.format("transactions = transactions - 2", "('cash', 'external')"),
)


@pytest.mark.parametrize(
    ("statements", "held"),
    [(AMOUNT, 9), (ACCOUNTS, 9), (PAIR_ADDED, 11), (PAIR_DELETED, 7)],
    ids=["amount", "accounts", "pair added", "pair deleted"],
)
def test_an_edit_that_fits_in_itself_is_found_by_the_checksum_alone(
    at: Place, statements: tuple[str, ...], held: int
) -> None:
    assert found(at) == []
    edit(at, *statements)
    assert verify(at.engine, at.settings, at.mapping, ACT).clean, "what docs/verify.md says that verify cannot see"
    at.check()
    assert found(at) == [("edited", 2, 0, D(held), D(9))]
    with at.engine.connect() as connection:
        assert snapshots.get(connection, at.settings).verified_clean is False


EDITS = {
    "id": "10",
    "debit_account": "-debit_account",
    "credit_account": "5",
    "posted_at": "posted_at + interval '1 microsecond'",
    "xid": "xid - 1",
    "group_id": "1",
    "reverses": "1",
    "job_id": "1",
    "kind": "'correction'",
    "amount": "amount + 0.0001",
    "debit_balance": "0",
    "credit_balance": "0",
    "currency": "'USD'",
    "type": "'bonus'",
    "reference_type": "''",
    "reference_id": "'trip 2'",
    "correlation_id": "'x'",
    "actor": "'nobody'",
    "reason": "null",
}


def test_an_edit_of_any_column_of_a_transaction_is_found(at: Place) -> None:
    columns = rows(at.engine, "select attname from pg_attribute where attrelid = 'wallet.transactions'::regclass "
                              "and attnum > 0 and not attisdropped")  # fmt: skip
    assert {name for (name,) in columns} == set(EDITS)
    execute(at.engine, "create table kept as select * from wallet.transactions where id = 9")
    for name, value in EDITS.items():
        edit(at, f"update wallet.transactions set {name} = {value} where id = 9")
        assert ("edited", 2, 0, D(9), D(9)) in found(at), name
        edit(at, "delete from wallet.transactions where id in (9, 10)", "insert into wallet.transactions table kept")
        assert found(at) == [], name


def test_the_range_of_ids_and_the_window_are_named(at: Place) -> None:
    execute(at.engine, f"select setval('wallet.transaction_ids', {FAR})")
    credit(at, 2, 1)
    late = take(at)
    edit(at, f"update wallet.transactions set actor = 'nobody' where id in (2, {FAR + 1})")
    assert found(at, batch_size=1) == [("edited", 1, 0, D(5), D(5)), ("edited", late.id, 20_000, D(1), D(1))]
    assert [one.problem for one in proof(at, limit=1).problems] == ["edited"]
    assert proof(at, limit=1).found == 2
    with at.engine.connect() as connection:
        older = snapshots.get(connection, at.settings, 2)
    assert [one.window for one in proof(at, older).problems] == [1]


def test_a_posting_that_was_in_flight_counts_in_the_window_that_has_it(at: Place) -> None:
    with stage(at.engine.url.render_as_string(hide_password=False)) as plays:
        flying = plays.session()
        flying.do(lambda connection: at.adapter.credit(connection, 2, 1, type="late"))
        credit(at, 3, 1)
        assert take(at).id == 3
        credit(at, 4, 1)
        flying.commit()
        assert take(at).id == 4
    assert found(at) == []
    assert [(one[1], one[2]) for one in rows(at.engine, KEPT)] == [(1, 5), (2, 9), (3, 2), (4, 2)]
    edit(at, "update wallet.transactions set actor = 'nobody' where type = 'late'")
    assert found(at) == [("edited", 4, 0, D(2), D(2))]


def test_rows_in_ranges_that_no_snapshot_has_anything_of_are_found_too(at: Place) -> None:
    execute(at.engine, f"select setval('wallet.transaction_ids', {FAR})")
    last = take(at)
    for number in (-7, 20_001, -20_007):
        edit(at, _COPY.format(number, "-1, -2, 1, null, null"))
    assert [one for one in found(at, batch_size=3) if one[0] == "edited"] == [
        ("edited", None, -20_000, D(1), D(0)),
        ("edited", None, 0, D(16), D(15)),
        ("edited", last.id, 20_000, D(1), D(0)),
    ]


def test_a_snapshot_that_was_stopped_and_gone_on_with_keeps_the_same_as_one_in_one_go(at: Place) -> None:
    execute(at.engine, f"select setval('wallet.transaction_ids', {FAR})")
    for key in range(1, 6):
        credit(at, key, key)
    begun = take(at, batch_size=2, stop=ends_after(2))
    assert begun.state == "running"
    assert take(at, batch_size=3).resumed
    halves = rows(at.engine, KEPT)
    assert [one[:3] for one in halves if one[1] == begun.id] == [(0, begun.id, 1), (20_000, begun.id, 5)]
    for table in ("checksums", "balances", "totals"):
        execute(at.engine, f"delete from wallet.snapshot_{table} where snapshot_id = :id", id=begun.id)
    execute(at.engine, "update wallet.snapshots set state = 'running', cursor = 0 where id = :id", id=begun.id)
    assert take(at).id == begun.id
    assert rows(at.engine, KEPT) == halves


# What it may not depend on

ROW = {
    "id": "17",
    "debit_account": "-2",
    "credit_account": "1",
    "posted_at": "2026-03-29 01:30:00.000001+01",
    "xid": "3",
    "group_id": None,
    "reverses": None,
    "job_id": "4",
    "kind": "posting",
    "amount": "0.10",
    "debit_balance": None,
    "credit_balance": "107.10",
    "currency": "EUR",
    "type": 'a "quoted" \\ type',
    "reference_type": "",
    "reference_id": "NULL",
    "correlation_id": "{a,b}",
    "actor": "Žofie",
    "reason": None,
}
TEXT = (
    '{17,-2,1,1774744200.000001,3,NULL,NULL,4,posting,0.10,NULL,107.10,EUR,"a \\"quoted\\" \\\\ type","","NULL",'
    '"{a,b}",Žofie,NULL}'
)


def test_the_checksum_of_a_row_is_the_same_on_every_server_and_with_every_setting(at: Place) -> None:
    """A value that is worked out here without the database: kept sums have to fit after an upgrade and a restore."""
    names = ", ".join(ROW)
    execute(at.engine, f"select setval('wallet.transaction_ids', {FAR})")
    edit(at, f"update wallet.transactions set id = {FAR} - 1 where id = 17")
    values = ", ".join("null" if one is None else f"$q${one}$q$" for one in ROW.values())
    execute(at.engine, f"insert into wallet.transactions ({names}) values ({values})".replace(":", "\\:"))
    wanted = int.from_bytes(hashlib.sha256(TEXT.encode()).digest()[:8], "big", signed=True)
    made = take(at)
    ((_, _, _, kept),) = [one for one in rows(at.engine, KEPT) if one[:2] == (0, made.id)]
    assert kept == wanted
    with at.engine.connect() as connection:
        for setting in ("timezone = 'Asia/Kolkata'", "datestyle = 'German, DMY'", "bytea_output = 'escape'"):
            connection.exec_driver_sql(f"set {setting}")
        for setting in ("array_nulls = off", "standard_conforming_strings = off", "client_encoding = 'LATIN2'"):
            connection.exec_driver_sql(f"set {setting}")
        first, *_ = checksums.ranges(connection, at.settings, made.id, Bare(2, 0))
    assert first.held_checksum == first.kept_checksum == wanted


def test_an_erasure_leaves_every_checksum_as_it_is(at: Place) -> None:
    with at.engine.begin() as connection:
        at.adapter.credit(connection, 1, 1, type="deposit", description="by Ada", address="10.0.0.7", actor="ada")
    take(at)
    assert erase(at.engine, at.settings, at.mapping, "1", ACT).details == 1
    assert found(at) == []


# Pruned, and from before


def test_a_prune_adds_the_checksums_up_and_loses_none(at: Place) -> None:
    credit(at, 2, 1)
    last = take(at)
    snapshots.prune(at.engine, at.settings, ACT, keep=1)
    assert [one[:3] for one in rows(at.engine, KEPT)] == [(0, last.id, 16)]
    assert found(at) == []
    edit(at, "update wallet.transactions set actor = 'nobody' where id = 9")
    assert found(at) == [("edited", last.id, 0, D(16), D(16))]


def test_a_prune_leaves_the_newer_ones_checksums_alone_and_a_window_without_transactions_is_not_bare(at: Place) -> None:
    assert take(at).id == 3
    assert take(at).id == 4, "nothing in its window"
    credit(at, 2, 1)
    assert take(at).id == 5
    snapshots.prune(at.engine, at.settings, ACT, keep=2)
    assert [one[1:3] for one in rows(at.engine, KEPT)] == [(4, 15), (5, 1)]
    execute(at.engine, "delete from wallet.snapshot_checksums where snapshot_id = 4")
    credit(at, 2, 1)
    assert take(at).id == 6
    snapshots.prune(at.engine, at.settings, ACT, keep=2)
    assert [one[1:3] for one in rows(at.engine, KEPT)] == [(6, 1)]
    credit(at, 2, 1)
    assert take(at).id == 7
    snapshots.prune(at.engine, at.settings, ACT, keep=2)
    assert [one[1:3] for one in rows(at.engine, KEPT)] == [(7, 1)]
    assert (proof(at).unchecked, found(at)) == (17, [])


def test_a_newer_snapshot_without_checksums_takes_none_from_an_older_one(at: Place) -> None:
    newest = take(at)
    execute(at.engine, "delete from wallet.snapshot_checksums where snapshot_id = :id", id=newest.id)
    snapshots.prune(at.engine, at.settings, ACT, keep=2)
    with at.engine.connect() as connection:
        older = snapshots.get(connection, at.settings, 2)
    assert (proof(at, older).unchecked, proof(at, older).clean, proof(at).unchecked) == (0, True, 15)


def test_snapshots_from_before_checksums_are_said_and_no_failure(at: Place) -> None:
    assert proof(at).unchecked == 0
    execute(at.engine, "delete from wallet.snapshot_checksums where snapshot_id = 1")
    edit(at, "update wallet.transactions set actor = 'nobody' where id = 2")
    assert (proof(at).unchecked, found(at)) == (5, [])
    with at.engine.connect() as connection:
        older = snapshots.get(connection, at.settings, 1)
    assert (proof(at, older).unchecked, proof(at, older).clean) == (5, True)
    edit(at, "update wallet.transactions set actor = 'nobody' where id = 9")
    assert found(at) == [("edited", 2, 0, D(9), D(9))]
    snapshots.prune(at.engine, at.settings, ACT, keep=1)
    assert (proof(at).unchecked, found(at), rows(at.engine, KEPT)) == (14, [], [])
    take(at)
    assert (proof(at).unchecked, found(at)) == (14, [])
    edit(at, "update wallet.transactions set actor = 'nobody' where id = 17")
    assert found(at) == [("edited", 3, 0, D(1), D(1))]


def test_ranges_say_what_is_kept_and_what_is_there(at: Place) -> None:
    with at.engine.connect() as connection:
        bare = checksums.bare(connection, at.settings, 2)
        (one,) = checksums.ranges(connection, at.settings, 2, bare)
    assert (bare, one.first, one.kept, one.held, one.same) == (Bare(None, 0), 0, 14, 14, True)
    assert one.kept_checksum == sum(kept for *_, kept in rows(at.engine, KEPT))
