"""Reconciliation: one account or all against a truth, small differences corrected, and what must not happen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import Engine

import interleaving
from invariants import assert_sound
from ledger import ACT, execute, fence_down, install_users, post, rows, scalar, set_phase, unguarded
from walletmigrate.audit import Act
from walletmigrate.backfill import backfill
from walletmigrate.config import Settings
from walletmigrate.errors import PreconditionRefused, UsageError
from walletmigrate.freeze import freeze
from walletmigrate.install import install
from walletmigrate.line import stop
from walletmigrate.recalculate import recalculate
from walletmigrate.reconcile import Limits, Reconciliation, reconcile
from walletmigrate.truths import LEDGER, LEGACY, Truth, asked
from walletmigrate.verify import verify

D = Decimal
WIDE = Limits(correct_up_to=D(1000))
BY = Act("user:anna", "CHG-7: differences of the night")


@dataclass
class World:
    engine: Engine
    settings: Settings
    url: str

    def reconcile(self, truth: Truth = LEGACY, limits: Limits = WIDE, **options: Any) -> Reconciliation:
        return reconcile(
            self.engine, self.settings, self.settings.mappings[0], BY, truth=truth, limits=limits, **options
        )

    def one(self, key: int, truth: Truth = LEGACY, limits: Limits = WIDE, **options: Any) -> Any:
        made = self.reconcile(truth, limits, account=str(key), **options)
        return made.items[0] if made.items else None

    def account(self, key: int) -> tuple[Any, ...] | None:
        """State, ledger and legacy balance."""
        found = rows(
            self.engine,
            "select a.state::text, a.balance, u.total_coins from users as u left join wallet.accounts as a "
            "on a.key = u.id::text and a.bucket = 'cash' where u.id = :key",
            key=key,
        )
        return found[0] if found else None

    def damage(self, *statements: str) -> None:
        """Change rows as a superuser with all triggers off; the fence is then installed anew."""
        with fence_down(self.engine, self.settings) as connection:
            for statement in statements:
                connection.exec_driver_sql(statement)

    def corrections(self) -> list[tuple[Any, ...]]:
        return rows(
            self.engine,
            "select kind::text, amount, actor, reason, job_id from wallet.transactions "
            "where kind not in ('opening') order by id",
        )

    def audited(self, action: str = "reconcile corrected") -> list[dict[str, Any]]:
        query = (
            "select details || jsonb_build_object('by', actor, 'run', job_id) from wallet.audit_log where action = :a"
        )
        return [row[0] for row in rows(self.engine, query + " order by id", a=action)]


@pytest.fixture
def world(database_url: str) -> Iterator[World]:
    """Ten mirrored accounts of 100, in phase dual_write."""
    engine, settings = install_users(database_url, phase="dual_write")
    backfill(engine, settings, settings.mappings[0], ACT)
    yield World(engine, settings, database_url)
    if scalar(engine, "select to_regclass('wallet.accounts') is not null"):
        assert_sound(engine, settings)


def told(balance: object) -> Truth:
    """The same outside balance for everybody; None for those it does not know."""
    return asked(lambda _key, _bucket, _currency: balance, "a function")  # type: ignore[arg-type,return-value]


def told_of(**balances: object) -> Truth:
    """Outside balances of some keys, k1=…"""
    return asked(lambda key, _b, _c: balances.get(f"k{key}"), "a function")  # type: ignore[arg-type,return-value]


def test_the_ledger_is_brought_to_legacy_and_legacy_stays(world: World) -> None:
    world.damage("update users set total_coins = 100.75 where id = 3")
    made = world.reconcile(limits=Limits())
    assert (made.state, made.counts["corrected"], made.counts["in_order"]) == ("done", 1, 9)
    assert world.account(3) == ("mirrored", D("100.75"), D("100.75"))
    assert world.corrections() == [("correction", D("0.75"), BY.actor, BY.reason, made.run)]
    audited = world.audited()[0]
    assert (audited["by"], audited["run"], audited["key"]) == (BY.actor, made.run, "3")
    assert (audited["ledger_before"], audited["ledger_after"], audited["difference"]) == (100, 100.75, 0.75)


def test_legacy_is_brought_to_the_ledger_without_a_transaction(world: World) -> None:
    world.damage("update users set total_coins = 99.50 where id = 3")
    made = world.reconcile(LEDGER, Limits())
    assert made.counts["corrected"] == 1
    assert world.account(3) == ("mirrored", D(100), D(100))
    assert world.corrections() == []
    assert world.audited()[0]["legacy_before"] == 99.5
    assert rows(world.engine, "select * from wallet.bypasses where key = '3'") == []


def test_both_sides_are_brought_to_an_outside_truth(world: World) -> None:
    made = world.reconcile(told_of(k1=D("100.40"), k2=D("99.20"), k3=102), Limits(D("0.50"), D(1)))
    assert {name: n for name, n in made.counts.items() if n} == {
        "in_order": 1,
        "corrected": 1,
        "reported": 1,
        "unlisted": 7,
    }
    assert made.reported_amount == {"EUR": D("2.00")}
    assert world.account(1) == ("mirrored", D(100), D(100))
    assert world.account(2) == ("mirrored", D("99.20"), D("99.20"))
    assert world.account(3) == ("mirrored", D(100), D(100))


@pytest.mark.parametrize(("difference", "outcome"), [("0.50", None), ("0.51", "corrected"), ("1.00", "corrected")])
def test_the_limits_belong_to_what_they_limit(world: World, difference: str, outcome: str | None) -> None:
    made = world.one(1, told(D(100) - D(difference)), Limits(D("0.50"), D("1.00")))
    assert (made.outcome if made else None) == outcome


def test_a_difference_above_the_limit_is_reported_and_left(world: World) -> None:
    made = world.one(1, told(D("101.01")), Limits(D("0.50"), D("1.00")))
    assert (made.outcome, made.difference, made.transaction_id) == ("reported", D("1.01"), None)
    assert world.account(1) == ("mirrored", D(100), D(100))
    assert world.audited() == []


def test_both_sides_that_differ_from_each_other_and_from_the_truth_come_to_the_truth(world: World) -> None:
    world.damage("update users set total_coins = 103 where id = 3")
    made = world.one(3, told(104))
    # Legacy is off by 1, the ledger by 4: the side that is further away counts.
    assert (made.outcome, made.difference) == ("corrected", D(4))
    assert world.account(3) == ("mirrored", D(104), D(104))
    assert world.one(3, told(104)) is None


def test_an_absent_account_is_refused_unless_it_may_be_opened(world: World) -> None:
    execute(world.engine, "insert into users values (11, 'acme', 'member', 7, 0)")
    made = world.reconcile()
    assert (made.counts["refused"], made.items[0].refusal) == (1, "absent")
    assert world.account(11) == (None, None, D(7))
    opened = world.reconcile(limits=Limits(create_missing=True))
    assert opened.counts["opened"] == 1
    assert world.account(11) == ("mirrored", D(7), D(7))
    assert world.audited("reconcile opened")[0]["run"] == opened.run


def test_an_account_is_opened_at_its_legacy_balance_and_then_corrected_to_the_outside_one(world: World) -> None:
    execute(world.engine, "insert into users values (11, 'acme', 'member', 7, 0)")
    made = world.one(11, told(D("7.80")), Limits(create_missing=True))
    assert (made.outcome, made.state, made.difference) == ("corrected", None, D("0.80"))
    assert world.account(11) == ("mirrored", D("7.80"), D("7.80"))
    kinds = rows(world.engine, "select kind::text, amount from wallet.transactions order by id desc limit 2")
    assert kinds == [("correction", D("0.80")), ("opening", D(7))]


def test_an_absent_account_that_differs_too_much_is_not_opened(world: World) -> None:
    execute(world.engine, "insert into users values (11, 'acme', 'member', 7, 0)")
    assert world.one(11, told(70), Limits(create_missing=True)).outcome == "reported"
    assert world.account(11) == (None, None, D(7))


def test_a_stale_account_is_resynced_and_then_corrected(world: World) -> None:
    execute(world.engine, "update users set total_coins = 60 where id = 3")
    made = world.one(3, told(61))
    assert (made.outcome, made.state, made.difference) == ("corrected", "stale", D(1))
    assert world.account(3) == ("mirrored", D(61), D(61))
    kinds = [(kind, amount) for kind, amount, *_ in world.corrections()]
    assert kinds == [("resync", D(40)), ("correction", D(1))]


def test_against_legacy_a_stale_account_is_resynced_however_far_it_is_behind(world: World) -> None:
    execute(world.engine, "update users set total_coins = 60 where id = 3")
    made = world.reconcile(limits=Limits())
    assert (made.counts["resynced"], made.counts["corrected"]) == (1, 0)
    assert world.account(3) == ("mirrored", D(60), D(60))


@pytest.mark.parametrize("truth", [60, "60.40"])
def test_a_stale_account_whose_legacy_is_the_outside_truth_is_resynced_and_not_in_order(
    world: World, truth: object
) -> None:
    execute(world.engine, "update users set total_coins = 60 where id = 3")
    limits = Limits(D("0.50"), D(1))
    assert world.one(3, told(D(str(truth))), limits, dry_run=True).outcome == "resynced"
    assert world.account(3) == ("stale", D(100), D(60))
    made = world.reconcile(told_of(k1=100, k3=D(str(truth))), limits)
    assert (made.counts["resynced"], made.counts["in_order"], made.counts["corrected"]) == (1, 1, 0)
    assert world.account(3) == ("mirrored", D(60), D(60))
    again = world.reconcile(told_of(k1=100, k3=D(str(truth))), limits)
    assert (again.counts["resynced"], again.counts["in_order"]) == (0, 2)


def test_a_stale_ledger_is_no_truth(world: World) -> None:
    execute(world.engine, "update users set total_coins = 60 where id = 3")
    assert world.one(3, LEDGER).refusal == "stale"
    assert world.account(3) == ("stale", D(100), D(60))


def test_a_frozen_account_is_corrected_in_the_ledger_alone(world: World) -> None:
    set_phase(world.engine, "frozen")
    freeze(world.engine, world.settings, world.settings.mappings[0], ACT)
    made = world.one(3, told(D("100.30")))
    assert (made.outcome, made.state, made.legacy_after) == ("corrected", "frozen", D(100))
    assert world.account(3) == ("frozen", D("100.30"), D(100))
    assert world.reconcile(LEDGER).counts["in_order"] == 10
    with pytest.raises(PreconditionRefused, match="legacy cannot be the truth"):
        world.reconcile(LEGACY)


def test_one_frozen_account_is_refused_where_legacy_is_the_truth(world: World) -> None:
    set_phase(world.engine, "frozen")
    freeze(world.engine, world.settings, world.settings.mappings[0], ACT)
    set_phase(world.engine, "wallet_only")
    assert world.one(3, LEGACY).refusal == "frozen"


def test_a_closed_account_is_refused_whether_it_has_a_row_or_not(world: World) -> None:
    execute(world.engine, "delete from users where id = 3")
    assert world.one(3, told(5)).refusal == "no_row"
    execute(world.engine, "insert into users values (3, 'acme', 'member', 7, 0)")
    execute(world.engine, "update wallet.accounts set state = 'closed' where key = '3'")
    assert world.one(3, told(7)).refusal == "closed"
    assert scalar(world.engine, "select balance from wallet.accounts where key = '3'") == 100


def test_a_negative_truth_is_refused_unless_it_is_allowed(world: World) -> None:
    made = world.one(3, told(-1))
    assert (made.refusal, world.account(3)) == ("negative", ("mirrored", D(100), D(100)))
    assert world.one(3, told(-1), Limits(D(0), D(1000), allow_negative=True)).outcome == "corrected"
    assert world.account(3) == ("mirrored", D(-1), D(-1))


def test_a_truth_that_fails_for_one_account_is_told_and_the_rest_goes_on(world: World) -> None:
    def source(key: str, _bucket: str, _currency: str) -> Any:
        if key == "2":
            raise ConnectionError("the bank does not answer")
        return {"3": 100.5, "4": D("100.005"), "5": D("100.5")}.get(key, 100)

    made = world.reconcile(asked(source, "a function"))
    assert (made.counts["failed"], made.counts["corrected"], made.counts["in_order"]) == (3, 1, 6)
    said = {one.key: one.why for one in made.items if one.outcome == "failed"}
    assert "the bank does not answer" in said["2"]
    assert "float" in said["3"]
    assert "decimals" in said["4"]
    assert world.account(5) == ("mirrored", D("100.50"), D("100.50"))


def test_an_account_whose_row_refuses_the_update_fails_alone_and_whole(world: World) -> None:
    execute(
        world.engine,
        "create function no() returns trigger language plpgsql as "
        "$$ begin if new.id = 3 then raise exception 'not this one'; end if; return new; end $$",
    )
    execute(world.engine, "create trigger no before update on users for each row execute function no()")
    made = world.reconcile(told(D("100.50")))
    assert (made.counts["failed"], made.counts["corrected"]) == (1, 9)
    assert "not this one" in made.items[2].why
    assert world.account(3) == ("mirrored", D(100), D(100))
    assert scalar(world.engine, "select items_failed from wallet.jobs where id = :run", run=made.run) == 1


def test_a_row_that_takes_another_balance_than_the_truth_fails_whole(world: World) -> None:
    execute(
        world.engine,
        "create function more() returns trigger language plpgsql as "
        "$$ begin new.total_coins := new.total_coins + 1; return new; end $$",
    )
    execute(world.engine, "create trigger more before update on users for each row execute function more()")
    made = world.one(3, told(101))
    assert made.outcome == "failed"
    assert "WM020" in made.why
    assert world.account(3) == ("mirrored", D(100), D(100))


def test_a_dry_run_tells_the_same_and_writes_nothing(world: World) -> None:
    execute(world.engine, "insert into users values (11, 'acme', 'member', 7, 0)")
    execute(world.engine, "update users set total_coins = 60 where id = 4")
    limits = Limits(D(0), D(1), create_missing=True)
    truth = told_of(k1=D("100.50"), k2=200, k11=7, k4=61)
    before = rows(world.engine, "select * from wallet.transactions"), world.audited("reconcile done")
    planned = world.reconcile(truth, limits, dry_run=True)
    assert (rows(world.engine, "select * from wallet.transactions"), world.audited("reconcile done")) == before
    assert rows(world.engine, "select * from wallet.jobs where kind like 'reconcile%'") == []
    assert (planned.run, planned.state) == (None, "planned")
    done = world.reconcile(truth, limits)
    assert planned.counts == done.counts
    assert [one.outcome for one in planned.items] == [one.outcome for one in done.items]


def test_a_second_run_finds_everything_in_order(world: World) -> None:
    truth = told(D("100.75"))
    assert world.reconcile(truth).counts["corrected"] == 10
    again = world.reconcile(truth)
    assert (again.counts["in_order"], again.counts["corrected"]) == (10, 0)


def test_a_posting_that_holds_the_account_is_waited_for_and_counted(world: World) -> None:
    with interleaving.stage(world.url) as stage:
        poster, corrector = stage.session(), stage.session()
        poster.do(lambda connection: post(connection, world.settings, "credit", 3, 5))
        query = (
            "select (c).outcome, (c).difference from wallet.correct_users(jsonb_build_object('fingerprint', "
            "(select fingerprint from wallet.mappings), 'key', '3', 'bucket', 'cash', 'currency', 'EUR', 'truth', "
            "'value', 'amount', '105.5', 'tolerance', '0', 'limit', '1', 'actor', 'a', 'reason', 'r', 'type', 't')) c"
        )
        waiting = corrector.waiting(lambda connection: connection.exec_driver_sql(query).one(), on=poster)
        poster.commit()
        # Read before the lock, the balance would have been 100, and the difference reported.
        assert tuple(waiting.result()) == ("corrected", D("0.50"))
        corrector.commit()
    assert world.account(3) == ("mirrored", D("105.50"), D("105.50"))


def test_a_function_is_asked_again_when_money_moved_while_it_was_asked(world: World) -> None:
    asked_for: list[str] = []

    def source(key: str, _bucket: str, _currency: str) -> Decimal:
        asked_for.append(key)
        if len(asked_for) == 1:
            with world.engine.begin() as connection:
                post(connection, world.settings, "credit", 3, 5)
            return D(100)  # what the outside said before the deposit: taken as it is, it would take the deposit away
        return D(105)

    made = world.reconcile(asked(source, "a function"), account="3")
    assert (made.counts["in_order"], asked_for) == (1, ["3", "3"])
    assert world.account(3) == ("mirrored", D(105), D(105))


def test_a_function_that_is_asked_while_money_never_rests_fails(world: World) -> None:
    def source(_key: str, _bucket: str, _currency: str) -> Decimal:
        with world.engine.begin() as connection:
            post(connection, world.settings, "credit", 3, 5)
        return D(100)

    made = world.one(3, asked(source, "a function"))
    assert (made.outcome, "money moved" in made.why) == ("failed", True)
    assert world.account(3) == ("mirrored", D(115), D(115))


@pytest.mark.parametrize("trouble", ["legacy", "line", "fence"])
def test_a_run_is_refused_before_the_ledger_can_be_corrected(world: World, trouble: str) -> None:
    if trouble == "legacy":
        set_phase(world.engine, "legacy")
    elif trouble == "line":
        stop(world.engine, world.settings, ACT)
    else:
        with unguarded(world.engine, "public.users"):
            pass
    with pytest.raises(PreconditionRefused):
        world.reconcile()
    if trouble == "fence":
        install(world.engine, world.settings, ACT)


def test_the_line_that_stops_amid_a_run_is_minded_by_each_account(world: World) -> None:
    def source(_key: str, _bucket: str, _currency: str) -> Decimal:
        stop(world.engine, world.settings, ACT)
        return D(101)

    made = world.reconcile(asked(source, "a function"))
    assert made.counts["refused"] == 10
    assert made.items[0].refusal == "stopped"
    assert world.account(1) == ("mirrored", D(100), D(100))


def test_wrong_limits_are_refused() -> None:
    for wrong in ({"tolerance": D(-1)}, {"correct_up_to": D("NaN")}, {"tolerance": 0.5}):
        with pytest.raises(UsageError):
            Limits(**wrong)


def test_a_run_leaves_nothing_for_verify_to_find(world: World) -> None:
    world.damage("update users set total_coins = total_coins + 3 where id in (2, 5)")
    mapping = world.settings.mappings[0]
    assert not verify(world.engine, world.settings, mapping, ACT).clean
    world.reconcile(limits=Limits(D(0), D(3)))
    assert verify(world.engine, world.settings, mapping, ACT).clean


@pytest.mark.parametrize("truth", [LEGACY, LEDGER], ids=["legacy", "ledger"])
def test_nothing_is_corrected_upon_a_balance_that_is_not_the_sum_of_its_journal(world: World, truth: Truth) -> None:
    """Corrected to the truth, the journal would be wrong by what the balance was, and a recalculation bring it back."""
    for operation, amount in (("credit", 7), ("debit", 2)):
        with world.engine.begin() as connection:
            post(connection, world.settings, operation, 3, amount)
    execute(world.engine, "update wallet.accounts set balance = 106 where key = '3'")
    made = world.reconcile(truth, Limits(D(0), D(10)))
    assert (made.counts["refused"], made.counts["in_order"], made.items[0].refusal) == (1, 9, "journal")
    assert world.account(3) == ("mirrored", D(106), D(105))
    recalculated = recalculate(world.engine, world.settings, world.settings.mappings[0], BY, account="3")
    assert [one.outcome for one in recalculated.items] == ["recalculated"]
    assert world.reconcile(truth, Limits(D(0), D(10))).counts["in_order"] == 10
