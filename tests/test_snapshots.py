"""Snapshots: one point whatever is in flight, proved against the journal, resumed, pruned, and after a restore."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import Connection
from sqlalchemy.exc import ProgrammingError

from adapting import Place, place
from interleaving import REPEATABLE_READ, Session, crowd, stage
from ledger import ACT, engine_named, execute, rows, scalar, unguarded
from walletmigrate import checksums, snapshot_checks, snapshots
from walletmigrate.checksums import Bare
from walletmigrate.errors import LedgerNotInstalled, PreconditionRefused, UnknownRun, UsageError
from walletmigrate.install import uninstall
from walletmigrate.snapshot_checks import SnapshotVerification
from walletmigrate.snapshots import Snapshot

D = Decimal


@pytest.fixture
def at(database_url: str) -> Place:
    made = place(database_url, rows=6, with_promo=True)
    with made.engine.begin() as connection:
        for key in range(1, 6):
            made.adapter.open_account(connection, key)
    return made


def take(at: Place, **options: Any) -> Snapshot:
    made = snapshots.take(at.engine, at.settings, ACT, **options)
    assert made is not None
    return made


def held(at: Place, snapshot: Snapshot, key: int, bucket: str = "cash") -> Decimal | None:
    with at.engine.connect() as connection:
        found = list(snapshots.balances(connection, at.settings, snapshot))
    return next((one.balance for one in found if (one.key, one.bucket) == (str(key), bucket)), None)


def proof(at: Place, snapshot: Snapshot | None = None, **options: Any) -> SnapshotVerification:
    return snapshot_checks.verify(
        at.engine, at.settings, ACT, snapshot_id=None if snapshot is None else snapshot.id, **options
    )


def credit(at: Place, key: int, amount: object) -> None:
    with at.engine.begin() as connection:
        at.adapter.credit(connection, key, D(str(amount)), type="deposit")


def ends_after(count: int) -> Any:
    """A stop that lets ``count`` batches through."""
    left = iter([False] * count)
    return lambda: next(left, True)


# What it holds


def test_a_snapshot_has_every_balance_and_the_sums_by_kind_since_the_one_before(at: Place) -> None:
    first = take(at)
    assert (first.state, first.previous, first.accounts, first.changed, first.transactions) == (
        "complete",
        None,
        10,
        10,
        10,
    )
    with at.engine.begin() as connection:
        posted = at.adapter.credit(connection, 1, 5, type="deposit")
        at.adapter.transfer(connection, 1, 2, 30, type="gift")
        at.adapter.reverse(connection, posted.transaction_id or 0, reason="refund")
        at.adapter.set_balance(connection, 3, 500, actor="admin", reason="case")
    execute(at.engine, "update users set total_coins = 7 where id = 4")
    execute(at.engine, "select * from wallet.backfill_users(null, null, 1)")
    second = take(at)
    assert (second.previous, second.accounts, second.changed, second.transactions) == (first.id, 12, 6, 7)
    with at.engine.connect() as connection:
        found = {(one.key, one.bucket): one for one in snapshots.balances(connection, at.settings, second)}
        kept = {(one.mapping, one.bucket): one for one in snapshots.totals(connection, at.settings, second)}
    one = found["1", "cash"]
    assert (one.balance, one.posting, one.reversal, one.opening, one.transactions) == (D(70), D(-25), D(-5), D(0), 3)
    assert (found["3", "cash"].balance, found["3", "cash"].correction) == (D(500), D(400))
    assert (found["4", "cash"].balance, found["4", "cash"].resync) == (D(7), D(-93))
    assert (found["5", "cash"].balance, found["5", "cash"].transactions) == (D(100), 0)
    assert (found["6", "cash"].opening, found["6", "promo"].opening) == (D(100), D(5))
    cash = kept["users", "cash"]
    assert (cash.accounts, cash.changed, cash.balance, cash.resync, cash.reversal) == (6, 5, D(907), D(-93), D(-5))
    assert kept["(system)", "bypass"].balance == 93
    assert sum(total.balance for total in kept.values()) == 0
    assert [held(at, first, key) for key in (1, 2, 3, 4, 6)] == [100, 100, 100, 100, None]
    assert proof(at, second).clean
    assert proof(at, first).clean


def test_a_snapshot_of_an_empty_journal_and_one_without_a_change_are_complete(database_url: str) -> None:
    at = place(database_url, rows=1)
    assert (take(at).accounts, take(at).changed) == (0, 0)
    credit(at, 1, 1)
    assert (take(at).changed, take(at).changed) == (1, 0)
    assert proof(at).clean


def test_closed_accounts_stay_in_the_snapshot(at: Place) -> None:
    execute(at.engine, "delete from users where id = 1")
    made = take(at)
    assert held(at, made, 1) == 100
    assert proof(at, made).clean


# One point


def test_a_posting_in_flight_is_outside_and_is_in_the_next_one_once(at: Place) -> None:
    with stage(at.engine.url.render_as_string(hide_password=False)) as plays:
        flying = plays.session()
        flying.do(lambda connection: at.adapter.transfer(connection, 1, 2, 30, type="gift"))
        credit(at, 3, 1)  # a larger id and a larger xid, committed before the point
        made = take(at, batch_size=3, stop=ends_after(1))
        assert made.state == "running"
        flying.commit()
        credit(at, 4, 1)  # committed before the batch that reads its place in the journal
        made = take(at, batch_size=3)
        assert made.resumed
        assert [held(at, made, key) for key in (1, 2, 3, 4)] == [100, 100, 101, 100]
        assert proof(at, made).clean
        after = take(at)
    assert [held(at, after, key) for key in (1, 2, 3, 4)] == [70, 130, 101, 101]
    assert (after.changed, after.transactions) == (3, 2)
    assert proof(at, after).clean
    assert proof(at, made).clean


def test_a_posting_that_stands_on_one_with_a_larger_xid_never_comes_without_it(at: Place) -> None:
    """Below the oldest running xid is a debit of money that came with an xid above it: an xid bound would tear them."""

    def numbered(session: Session) -> None:
        session.sql("select pg_current_xact_id()")

    with stage(at.engine.url.render_as_string(hide_password=False)) as plays:
        spends, runs, pays = plays.session(), plays.session(), plays.session()
        for session in (spends, runs, pays):
            numbered(session)
        pays.do(lambda connection: at.adapter.credit(connection, 1, 50, type="deposit"))
        pays.commit()
        spends.do(lambda connection: at.adapter.debit(connection, 1, 120, type="booking"))
        spends.commit()
        made = take(at)
        low, high = scalar(at.engine, "select min(xid) from wallet.transactions where type = 'booking'"), made.id
        horizon = scalar(at.engine, "select horizon from wallet.snapshots where id = :id", id=high)
        above = scalar(at.engine, "select max(xid) from wallet.transactions where type = 'deposit'")
        assert low < horizon < above, "the order that this is about"
        assert held(at, made, 1) == 30
        assert proof(at, made).clean
        runs.rollback()
    again = take(at)
    assert (again.changed, held(at, again, 1)) == (0, D(30))


def test_a_prepared_posting_is_in_flight_until_it_is_committed(at: Place) -> None:
    with at.engine.connect() as connection:
        at.adapter.credit(connection, 1, 5, type="deposit")
        connection.exec_driver_sql("prepare transaction 'late'")
        connection.rollback()
    made = take(at)
    with at.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("commit prepared 'late'")
    assert (held(at, made, 1), held(at, take(at), 1)) == (D(100), D(105))
    assert proof(at, made).clean


def test_snapshots_taken_amid_postings_are_all_clean_and_add_up_to_zero(at: Place) -> None:
    def posts(number: int) -> Any:
        def work(connection: Connection) -> None:
            for turn in range(12):
                at.adapter.transfer(connection, 1 + (number + turn) % 5, 1 + (number + turn + 1) % 5, 1, type="gift")

        return work

    taken: list[Snapshot] = []

    def takes(_: Connection) -> None:
        taken.extend(take(at, batch_size=7) for _ in range(4))

    for isolation in ("READ COMMITTED", REPEATABLE_READ):
        crowd(at.engine, "READ COMMITTED" if isolation != REPEATABLE_READ else isolation, [takes, *map(posts, (0, 0))])
    taken.append(take(at))
    assert len({one.id for one in taken}) == len(taken)
    for one in taken:
        assert proof(at, one, batch_size=3).clean
    assert sum(one.transactions for one in taken) == scalar(at.engine, "select count(*) from wallet.transactions")
    at.check()


def test_two_processes_take_one_snapshot_together(at: Place) -> None:
    execute(at.engine, "select * from wallet.backfill_users(null, null, 1)")
    assert take(at, batch_size=1, stop=ends_after(2)).state == "running"
    made, _ = crowd(at.engine, "READ COMMITTED", [lambda _: take(at, batch_size=1)] * 2)
    assert {one.id for one in made} == {scalar(at.engine, "select max(id) from wallet.snapshots")}
    assert proof(at).clean


def test_a_dry_run_writes_nothing(at: Place) -> None:
    assert snapshots.take(at.engine, at.settings, ACT, dry_run=True) is None
    made = take(at)
    assert proof(at, dry_run=True).clean
    assert snapshots.prune(at.engine, at.settings, ACT, keep=1, dry_run=True).pruned == ()
    with at.engine.connect() as connection:
        (listed,) = snapshots.listing(connection, at.settings)
    assert (listed.id, listed.verified_clean) == (made.id, None)


# Proof


def _edit(at: Place, statement: str) -> None:
    with unguarded(at.engine, "wallet.transactions") as connection:
        connection.exec_driver_sql(statement)


ROW = "account_id = (select id from wallet.accounts where key = '1' and bucket = 'cash')"


@pytest.mark.parametrize(
    ("statement", "problems"),
    [
        (f"update wallet.snapshot_balances set balance = balance + 1 where {ROW}", {"differs", "total"}),
        (f"delete from wallet.snapshot_balances where {ROW}", {"missing", "total"}),
        (
            "insert into wallet.snapshot_balances values (999, 1, 1, 5, 5, null, null, null, null, 1)",
            {"unexplained", "total"},
        ),
        (f"update wallet.snapshot_balances set opening = 99, posting = 1 where {ROW}", {"kinds"}),
        (f"update wallet.snapshot_balances set transaction_id = 2 where {ROW}", {"transactions"}),
        ("update wallet.snapshot_totals set balance = balance + 1 where bucket = 'cash'", {"total", "imbalance"}),
        ("update wallet.snapshot_totals set balance = balance + 1 where bucket = 'opening'", {"system", "imbalance"}),
        ("delete from wallet.transactions where id = 3", {"unexplained", "system", "edited"}),
        ("update wallet.transactions set credit_balance = 1 where id = 3", {"journal_broken", "edited"}),
        ("update wallet.transactions set amount = amount + 1 where id = 3", {"differs", "system", "edited"}),
    ],
)
def test_what_was_changed_behind_its_back_is_found(at: Place, statement: str, problems: set[str]) -> None:
    made = take(at)
    assert proof(at, made).clean
    _edit(at, statement)
    found = proof(at, made, batch_size=4)
    assert not found.clean
    assert {one.problem for one in found.problems} == problems
    with at.engine.connect() as connection:
        assert snapshots.get(connection, at.settings).verified_clean is False


def test_a_forged_transaction_without_a_balance_is_refused_by_its_cause(at: Place) -> None:
    newest = "(select max(id) from wallet.transactions where credit_account > 0)"
    _edit(at, f"update wallet.transactions set credit_balance = null where id = {newest}")
    with pytest.raises(PreconditionRefused, match="no balance") as refused:
        take(at)
    assert [mend for _, mend in refused.value.reasons] == ["walletmigrate verify  # names it"]


def test_only_so_many_problems_are_listed_and_all_are_counted(at: Place) -> None:
    take(at)
    execute(at.engine, "update wallet.snapshot_balances set balance = balance + 1")
    found = proof(at, limit=2)
    assert (len(found.problems), found.found) == (2, 12)


# Pruning


def test_pruning_merges_what_older_ones_say_and_stays_exact(at: Place) -> None:
    for turn in range(1, 5):
        take(at)
        credit(at, turn, turn)
    last = take(at)
    before = [held(at, last, key) for key in range(1, 6)]
    done = snapshots.prune(at.engine, at.settings, ACT, keep=2, batch_size=3)
    assert (len(done.pruned), len(done.kept)) == (3, 2)
    with at.engine.connect() as connection:
        listed = snapshots.listing(connection, at.settings)
    assert [one.id for one in listed] == [last.id, last.id - 1]
    assert (listed[1].previous, listed[1].changed, listed[1].transactions) == (None, 10, 13)
    assert [held(at, last, key) for key in range(1, 6)] == before == [101, 102, 103, 104, 100]
    assert [held(at, listed[1], key) for key in range(1, 6)] == [101, 102, 103, 100, 100]
    assert proof(at, last).clean
    assert proof(at, listed[1]).clean
    credit(at, 1, 1)
    assert proof(at, take(at)).clean


def test_a_prune_that_was_killed_is_finished_by_the_next(at: Place) -> None:
    for turn in range(1, 4):
        take(at)
        credit(at, turn, turn)
    last = take(at)
    execute(at.engine, "update wallet.snapshots set state = 'pruned' where id < :id", id=last.id)
    execute(at.engine, "select wallet.merge_snapshots(:id, 0, 4)", id=last.id)
    assert proof(at, last).clean
    assert len(snapshots.prune(at.engine, at.settings, ACT, keep=5).pruned) == 3
    assert scalar(at.engine, "select count(*) from wallet.snapshots") == 1
    assert scalar(at.engine, "select count(*) from wallet.snapshot_balances where snapshot_id <> :id", id=last.id) == 0
    assert proof(at, last).clean


def test_the_last_snapshot_is_never_pruned(at: Place) -> None:
    with pytest.raises(UsageError, match="at least 1"):
        snapshots.prune(at.engine, at.settings, ACT, keep=0)
    assert snapshots.prune(at.engine, at.settings, ACT, keep=1).kept == ()


# A logical restore


def _restored(at: Place) -> None:
    """What a dump into another cluster looks like: xids far beyond the counter, another cluster's identity."""
    _edit(at, "update wallet.transactions set xid = xid + 10000000000")
    execute(
        at.engine,
        "update wallet.snapshots set horizon = horizon + 10000000000, next_xid = next_xid + 10000000000, "
        "in_flight = array(select x + 10000000000 from unnest(in_flight) as x)",
    )
    # In a dump the rows come with the xids that were folded, so their checksums fit.
    with at.engine.connect() as connection:
        last = scalar(at.engine, "select max(id) from wallet.snapshots")
        found = [] if last is None else checksums.ranges(connection, at.settings, last, Bare(None, 0))
    for one in found:
        execute(at.engine, "update wallet.snapshot_checksums set checksum = :sum", sum=one.held_checksum)
    execute(at.engine, "update wallet.system_accounts set folded_xid = folded_xid + 10000000000")
    execute(at.engine, "update wallet.control set system_identifier = 1")


def test_after_a_logical_restore_everything_is_folded_from_the_start(at: Place) -> None:
    old = take(at)
    credit(at, 1, 1)
    _restored(at)
    credit(at, 2, 2)  # an xid below all that was restored, and below the fold
    at.check()
    assert scalar(at.engine, "select wallet.fold_system_accounts()") == 0
    at.check()
    made = take(at)
    assert [held(at, made, key) for key in (1, 2)] == [101, 102]
    assert (made.changed, made.transactions) == (2, 2)
    assert proof(at, made).clean
    assert proof(at, old).clean
    assert rows(
        at.engine, "select distinct folded_xid > 0 and folded_xid < 10000000000 from wallet.system_accounts"
    ) == [(True,)]
    at.check()
    credit(at, 3, 3)
    assert (take(at).changed, proof(at).clean) == (1, True)
    at.check()
    assert scalar(at.engine, "select count(*) from wallet.audit_log where action = 'journal adopted'") == 1


def test_the_adoption_waits_for_postings_in_flight(at: Place) -> None:
    _restored(at)
    with stage(at.engine.url.render_as_string(hide_password=False)) as plays:
        flying, adopts = plays.session(), plays.session()
        flying.do(lambda connection: at.adapter.credit(connection, 1, 5, type="deposit"))
        waits = adopts.waiting(
            lambda connection: connection.exec_driver_sql("select wallet.adopt_journal()"), on=flying
        )
        flying.commit()
        waits.result(30)
        adopts.commit()
    made = take(at)
    assert held(at, made, 1) == 105
    assert proof(at, made).clean


# Bad input, and who may


def test_what_is_not_there_is_said(at: Place) -> None:
    with pytest.raises(UnknownRun, match="walletmigrate snapshot take"):
        proof(at)
    take(at)
    with at.engine.connect() as connection, pytest.raises(UnknownRun, match="no snapshot 77"):
        snapshots.get(connection, at.settings, 77)
    credit(at, 1, 1)
    begun = take(at, batch_size=1, stop=ends_after(0))
    with pytest.raises(UsageError, match="finish it first"):
        proof(at, begun)


def test_without_a_ledger_nothing_is_taken(database_url: str) -> None:
    at = place(database_url, rows=1, phase="legacy")
    uninstall(at.engine, at.settings, ACT, drop_ledger=True)
    with pytest.raises(LedgerNotInstalled):
        take(at)


def test_an_operator_takes_and_an_auditor_proves_and_the_application_does_neither(at: Place) -> None:
    url = at.engine.url.render_as_string(hide_password=False)
    operator, auditor, app = (engine_named(url, role=f"wallet_{name}") for name in ("operator", "auditor", "app"))
    credit(at, 1, 1)
    made = snapshots.take(operator, at.settings, ACT)
    assert made is not None
    assert snapshot_checks.verify(operator, at.settings, ACT).clean
    assert snapshot_checks.verify(auditor, at.settings, ACT, dry_run=True).clean
    assert snapshots.prune(operator, at.settings, ACT, keep=1).pruned == ()
    for engine in (auditor, app):
        with pytest.raises(ProgrammingError) as refused:
            snapshots.take(engine, at.settings, ACT)
        assert getattr(refused.value.orig, "sqlstate", None) == "42501"
