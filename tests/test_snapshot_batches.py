"""A snapshot's functions one batch at a time: what each reads, folds and merges, and what it leaves alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy import Connection, text

import interleaving
from adapting import Place
from interleaving import REPEATABLE_READ, Stage
from ledger import execute, rows, scalar, unguarded
from test_snapshots import at, credit, proof, take

__all__ = ["at"]


@pytest.fixture
def stage(at: Place) -> Iterator[Stage]:
    with interleaving.stage(at.engine.url.render_as_string(hide_password=False)) as made:
        yield made


def begin(at: Place) -> int:
    with at.engine.begin() as connection:
        return int(connection.execute(text("select wallet.begin_snapshot('a', 'r')")).scalar_one())


def advanced(at: Place, snapshot: int, limit: int) -> int:
    with at.engine.begin() as connection:
        return advance(connection, snapshot, limit)


def advance(connection: Connection, snapshot: int, limit: int) -> int:
    query = text("select wallet.advance_snapshot(:id, :limit)")
    return int(connection.execute(query, {"id": snapshot, "limit": limit}).scalar_one())


def merged(at: Place, into: int, after: int, limit: int) -> int | None:
    with at.engine.begin() as connection:
        query = text("select wallet.merge_snapshots(:into, :after, :limit)")
        found: int | None = connection.execute(query, {"into": into, "after": after, "limit": limit}).scalar_one()
        return found


def standing(at: Place) -> list[tuple[object, ...]]:
    return rows(at.engine, "select id, state, cursor, previous, finished_at from wallet.snapshots order by id")


def held(at: Place, snapshot: int) -> list[int]:
    query = "select account_id from wallet.snapshot_balances where snapshot_id = :id order by account_id"
    return [account for (account,) in rows(at.engine, query, id=snapshot)]


def test_each_batch_reads_on_behind_the_one_before_and_the_last_one_ends_it(at: Place) -> None:
    ids = [number for (number,) in rows(at.engine, "select id from wallet.transactions order by id")]
    first = take(at).id
    credit(at, 1, 1)
    second = begin(at)
    assert begin(at) == second
    credit(at, 2, 1)
    before = standing(at)[:1]
    assert [advanced(at, second, 4), standing(at)[1][2]] == [1, ids[-1] + 1]
    assert standing(at)[1][1] == "running"
    assert advanced(at, second, 4) == 0
    done = standing(at)
    assert (done[0], done[1][1]) == (before[0], "complete")
    assert advanced(at, second, 4) == 0
    assert standing(at) == done
    assert first < second
    assert proof(at).clean


def test_the_first_one_reads_the_whole_journal_in_batches(at: Place) -> None:
    snapshot = begin(at)
    ids = [number for (number,) in rows(at.engine, "select id from wallet.transactions order by id")]
    cursors = [(advanced(at, snapshot, 4), standing(at)[0][2]) for _ in range(3)]
    assert cursors == [(4, ids[3]), (4, ids[7]), (2, ids[9])]
    assert advanced(at, snapshot, 4) == 0
    assert proof(at).clean


def test_a_snapshot_begins_behind_the_last_one_and_leaves_its_cursor_and_totals_alone(at: Place) -> None:
    for key in (1, 2):
        take(at)
        credit(at, key, 1)
    take(at)
    before = standing(at), rows(at.engine, "select * from wallet.snapshot_totals order by 1, 2, 3, 4")
    last = scalar(at.engine, "select max(id) from wallet.transactions")
    made = begin(at)
    assert standing(at)[-1][2:4] == (last, before[0][-1][0])
    assert standing(at)[:-1] == before[0]
    assert (
        rows(at.engine, "select * from wallet.snapshot_totals where snapshot_id < :id order by 1, 2, 3, 4", id=made)
        == (before[1])
    )
    assert advanced(at, made, 100) == 0


def test_what_came_between_the_view_of_the_database_and_the_look_at_the_last_id_is_outside(
    at: Place, stage: Stage
) -> None:
    old = stage.session(REPEATABLE_READ)
    old.look()
    credit(at, 3, 1)
    old.sql("select wallet.begin_snapshot('a', 'r')")
    old.commit()
    made = take(at)
    assert (made.resumed, made.transactions, take(at).transactions) == (True, 10, 1)
    assert proof(at).clean


def test_what_came_with_a_restore_is_not_read_again(at: Place) -> None:
    """Its xids are another cluster's, and may be greater than any horizon."""
    last = scalar(at.engine, "select max(id) from wallet.transactions")
    with unguarded(at.engine, "wallet.transactions") as connection:
        connection.exec_driver_sql("update wallet.transactions set xid = xid + 10000000000")
    execute(at.engine, "update wallet.control set restored_id = :last", last=last)
    take(at)
    credit(at, 1, 1)
    assert advanced(at, begin(at), 100) == 1


def test_of_an_account_in_two_batches_one_change_is_counted(at: Place) -> None:
    first = take(at)
    for _ in range(3):
        credit(at, 1, 1)
    second = take(at, batch_size=1)
    assert (first.changed, second.changed, second.accounts, second.transactions) == (10, 1, 10, 3)


def test_the_legs_of_an_account_that_nobody_knows_are_counted_apart(at: Place) -> None:
    gone = scalar(at.engine, "select id from wallet.accounts where key = '5' and bucket = 'cash'")
    execute(at.engine, "delete from wallet.accounts where id = :gone", gone=gone)
    made = take(at)
    query = "select bucket, currency, balance from wallet.snapshot_totals where snapshot_id = :id and mapping = :m"
    assert rows(at.engine, query, id=made.id, m="(unknown)") == [(str(gone), "", 100)]
    assert {bucket for bucket, _, _ in rows(at.engine, query, id=made.id, m="(system)")} == {"opening"}


def test_two_batches_at_once_take_turns(at: Place, stage: Stage) -> None:
    snapshot = begin(at)
    first, second = stage.session(), stage.session()
    assert first.do(lambda connection: advance(connection, snapshot, 4)) == 4
    waiting = second.waiting(lambda connection: advance(connection, snapshot, 4), on=first)
    first.commit()
    assert waiting.result(interleaving.PATIENCE_SECONDS) == 4
    second.commit()
    assert advanced(at, snapshot, 4) == 2
    assert advanced(at, snapshot, 4) == 0
    assert proof(at).clean


@pytest.mark.parametrize("function", ["merge_snapshots(:into, 0, 100)", "drop_snapshots(:into)"])
def test_a_prune_waits_for_who_holds_its_snapshot_and_for_no_other(at: Place, stage: Stage, function: str) -> None:
    for _ in "ab":
        take(at)
        credit(at, 1, 1)
    into = take(at).id
    holder, other = stage.session(), stage.session()
    lock = "select from wallet.snapshots where id {} :into for no key update"

    def prune(connection: Connection) -> None:
        connection.execute(text(f"select wallet.{function}"), {"into": into})

    holder.sql(lock.format("<>"), into=into)
    other.sql("set local lock_timeout = '2s'")
    other.do(prune)
    other.rollback()
    holder.rollback()
    holder.sql(lock.format("="), into=into)
    waiting = other.waiting(prune, on=holder)
    # Nothing is locked before it.
    for table in ("totals", "checksums", "balances"):
        holder.sql(f"select from wallet.snapshot_{table} for update nowait")
    holder.rollback()
    waiting.result(interleaving.PATIENCE_SECONDS)
    other.commit()


def test_a_batch_of_a_prune_moves_its_own_accounts_and_older_rows_alone(at: Place) -> None:
    first = take(at).id
    for key in (1, 2, 3):
        credit(at, key, 1)
    into = take(at).id
    credit(at, 1, 1)
    newer = take(at).id
    accounts = held(at, first)
    changed = held(at, into)
    assert (len(accounts), len(changed), len(held(at, newer))) == (10, 3, 1)
    assert merged(at, into, accounts[5], 2) == accounts[7]
    assert held(at, first) == [one for one in accounts if one not in accounts[6:8]]
    assert held(at, into) == sorted({*changed, *accounts[6:8]})
    assert len(held(at, newer)) == 1
    kinds = (
        "select opening, posting, transactions from wallet.snapshot_balances where account_id = :a and snapshot_id = :i"
    )
    assert merged(at, into, 0, 100) == accounts[-1]
    assert rows(at.engine, kinds, a=changed[0], i=into) == [(100, 1, 2)]
    assert merged(at, into, accounts[-1], 2) is None


def test_the_end_of_a_prune_drops_what_is_marked_and_older_and_nothing_else(at: Place) -> None:
    taken = [take(at).id for _ in range(4)]
    execute(at.engine, "update wallet.snapshots set state = 'pruned' where id in (:a, :b)", a=taken[1], b=taken[3])
    execute(at.engine, "select wallet.drop_snapshots(:into)", into=taken[2])
    assert [(row[0], row[3]) for row in standing(at)] == [
        (taken[0], None),
        (taken[2], None),
        (taken[3], taken[2]),
    ]
