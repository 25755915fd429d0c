"""The balances of system accounts: the last fold, and what came since."""

from __future__ import annotations

from decimal import Decimal

import pytest
from sqlalchemy import Engine

import interleaving
from ledger import execute, install_users, post, rows, scalar

FOLD = "select wallet.fold_system_accounts()"


class Place:
    """Ten users, of whom some have accounts in two buckets."""

    def __init__(self, url: str) -> None:
        self.engine, self.settings = install_users(url, with_promo=True, phase="dual_write")
        self.post("credit", 1, 5)
        self.post("debit", 2, 3, bucket="promo")

    def post(self, operation: str, key: int, amount: int, bucket: str = "cash") -> None:
        with self.engine.begin() as connection:
            assert post(connection, self.settings, operation, key, amount, bucket=bucket)["transaction_id"]

    def check(self) -> None:
        """Each balance is what the journal says, summed up by hand."""
        journal = rows(self.engine, "select debit_account, credit_account, amount from wallet.transactions")
        sums: dict[int, Decimal] = {}
        for debit, credit, amount in journal:
            sums[debit] = sums.get(debit, Decimal(0)) - amount
            sums[credit] = sums.get(credit, Decimal(0)) + amount
        found = rows(self.engine, "select id, balance from wallet.system_balances")
        assert len(found) == 5
        assert {account: balance for account, balance in found if balance} == {
            account: total for account, total in sums.items() if account < 0 and total
        }

    def folded(self) -> list[tuple[object, ...]]:
        return rows(self.engine, "select name, balance from wallet.system_accounts where balance <> 0 order by name")


@pytest.fixture
def place(database_url: str) -> Place:
    return Place(database_url)


def test_a_fold_changes_no_balance_and_what_comes_after_it_is_added(place: Place) -> None:
    place.check()
    assert place.folded() == []
    for _ in range(2):
        execute(place.engine, FOLD)
        place.check()
        assert place.folded() == [("external", -2), ("opening", -105)]
    place.post("credit", 3, 7)
    place.check()
    execute(place.engine, FOLD)
    place.check()
    assert place.folded() == [("external", -9), ("opening", -205)]


def test_a_transaction_that_is_running_holds_a_fold_back_and_is_counted_once(place: Place, database_url: str) -> None:
    with interleaving.stage(database_url) as stage:
        running = stage.session()
        running.do(lambda connection: post(connection, place.settings, "credit", 4, 1))
        place.post("credit", 5, 2)  # its xid is above that of the one that runs
        execute(place.engine, FOLD)
        place.check()
        assert place.folded() == [("external", -2), ("opening", -105)]
        running.commit()
        place.check()
    execute(place.engine, FOLD)
    place.check()
    assert place.folded() == [("external", -5), ("opening", -305)]


def test_a_fold_that_is_ahead_of_the_counter_is_made_anew(place: Place) -> None:
    """As in a cluster whose counter was set back: new rows would have lower xids than the fold."""
    execute(place.engine, FOLD)
    execute(place.engine, "update wallet.system_accounts set folded_xid = folded_xid + 10000000000, balance = 1")
    execute(place.engine, FOLD)
    place.check()
    assert place.folded() == [("external", -2), ("opening", -105)]


def test_folds_come_one_after_the_other_though_one_stands_still_in_the_middle(place: Place, database_url: str) -> None:
    """Else the one that went on first is taken back to where the other began, and counted twice."""
    execute(
        place.engine,
        "create function pause() returns trigger language plpgsql as $$ begin "
        "if current_setting('test.pause', true) = 'on' then perform pg_advisory_xact_lock(1); end if; "
        "return null; end $$",
    )
    execute(
        place.engine,
        "create trigger pause before update on wallet.system_accounts for each statement execute function pause()",
    )
    with interleaving.stage(database_url) as stage:
        holder, slow, fast = stage.session(), stage.session(), stage.session()
        holder.sql("select pg_advisory_lock(1)")
        slow.sql("set test.pause = 'on'")
        first = slow.waiting(lambda connection: connection.exec_driver_sql(FOLD).scalar(), on=holder)
        place.post("credit", 6, 4)
        second = fast.waiting(lambda connection: connection.exec_driver_sql(FOLD).scalar(), on=slow)
        holder.sql("select pg_advisory_unlock(1)")
        first.result(interleaving.PATIENCE_SECONDS)
        slow.commit()
        second.result(interleaving.PATIENCE_SECONDS)
        fast.commit()
    place.check()


def test_a_fold_locks_the_accounts_by_id(place: Place, database_url: str) -> None:
    least = "(select min(id) from wallet.system_accounts)"
    assert rows(place.engine, "select id from wallet.system_accounts order by ctid limit 1") != rows(
        place.engine, "select min(id) from wallet.system_accounts"
    )
    with interleaving.stage(database_url) as stage:
        holder, fold, other = stage.session(), stage.session(), stage.session()
        holder.sql(f"select from wallet.system_accounts where id = {least} for update")
        waiting = fold.waiting(lambda connection: connection.exec_driver_sql(FOLD).scalar(), on=holder)
        other.sql(f"select from wallet.system_accounts where id <> {least} for update nowait")
        other.rollback()
        holder.rollback()
        waiting.result(interleaving.PATIENCE_SECONDS)
        fold.commit()
    place.check()


# The cluster


def identity(engine: Engine) -> list[tuple[object, ...]]:
    return rows(engine, "select system_identifier, restored_id from wallet.control")


def test_a_journal_in_its_own_cluster_is_not_adopted(place: Place) -> None:
    before = identity(place.engine)
    execute(place.engine, FOLD)
    folded = place.folded()
    execute(place.engine, "select wallet.adopt_journal()")
    assert (identity(place.engine), place.folded()) == (before, folded)


@pytest.mark.parametrize("empty", [False, True])
def test_a_journal_of_another_cluster_is_adopted_once_and_settled_up_to_its_last_id(
    database_url: str, empty: bool
) -> None:
    engine, settings = install_users(database_url, rows=1, phase="dual_write")
    own = scalar(engine, "select system_identifier from wallet.control")
    if not empty:
        with engine.begin() as connection:
            post(connection, settings, "credit", 1, 5)
    last = scalar(engine, "select coalesce(max(id), 0) from wallet.transactions")
    execute(engine, "update wallet.control set system_identifier = 1")
    execute(engine, "update wallet.system_accounts set balance = 1, folded_xid = 10000000000")
    assert [adopted(engine), adopted(engine)] == [True, False]
    assert identity(engine) == [(own, last)]
    assert rows(engine, "select distinct balance, folded_xid from wallet.system_accounts") == [(0, 0)]


def adopted(engine: Engine) -> bool:
    with engine.begin() as connection:
        return bool(connection.exec_driver_sql("select wallet.adopt_journal()").scalar_one())
