"""Samples, incremental runs, the second look, ranges: what each says, what it does not, and what none of them hides."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal, localcontext
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, text

from ledger import ACT, add_users, execute, fence_down, install_users, post, rows, unguarded
from verifying import Ledger, assert_only, prepared, run, states_of
from walletmigrate import comparison, looks, samples, sums, verifications
from walletmigrate import verify as verifying
from walletmigrate.backfill import backfill
from walletmigrate.comparison import Comparison, snapshot
from walletmigrate.errors import PreconditionRefused, UnknownRun, UsageError
from walletmigrate.facts import VOIDED, read_facts
from walletmigrate.observation import verified
from walletmigrate.report import status
from walletmigrate.sources import source_of
from walletmigrate.verify import Drift, Verification

SCOPE = [("users", "EUR")]


@pytest.fixture
def made(database_url: str) -> Ledger:
    return prepared(database_url)


def drift(engine: Engine, settings: Any, change: int = 1, where: str = "id = 4") -> None:
    """Move the legacy balance of some rows past the fence."""
    with fence_down(engine, settings) as superuser:
        superuser.exec_driver_sql(f"update users set total_coins = total_coins + {change} where {where}")


def mend(engine: Engine, settings: Any, where: str = "id = 4") -> None:
    drift(engine, settings, -1, where)


def whole(made: Ledger) -> comparison.Seen:
    engine, settings = made
    with snapshot(engine) as connection:
        return Comparison(connection, settings, settings.mapping(), with_traits=True).whole(connection)


# Ranges


def test_where_nothing_differs_no_row_is_compared_and_where_one_does_only_its_range(made: Ledger) -> None:
    assert (whole(made).scope, whole(made).ranges) == (None, ())
    drift(*made)
    seen = whole(made)
    assert seen.scope is not None
    (found,) = seen.ranges
    assert seen.scope.ranges == (found.number,)
    assert (found.legacy_accounts, found.ledger_accounts) == (found.legacy_accounts,) * 2
    assert (found.legacy or 0) - (found.ledger or 0) == 1
    result = run(made)
    assert [one.key for one in result.drift] == ["4"]
    assert [one.legacy_accounts for one in result.ranges] == [found.legacy_accounts]


@pytest.mark.parametrize("all_at_once", [False, True], ids=["ranges", "all rows"])
def test_the_ranges_come_to_the_same_as_a_comparison_of_all_rows(
    database_url: str, monkeypatch: pytest.MonkeyPatch, all_at_once: bool
) -> None:
    """Groups, totals by trait, missing, stale, closed, reopened, orphans, NULL: in the sum nothing may be lost."""
    made = prepared(database_url, with_promo=True, rows=60)
    engine = made[0]
    execute(engine, "update users set total_coins = 1 where id = 11")
    execute(engine, "delete from users where id in (12, 13)")
    add_users(engine, 61, 62)
    with fence_down(*made) as superuser:
        superuser.exec_driver_sql("insert into users values (13, 'new', 'member', 7, 5)")
        superuser.exec_driver_sql("delete from users where id = 14")
        superuser.exec_driver_sql("update users set total_coins = total_coins + id, tenant = 'x' where id in (20, 21)")
    with unguarded(engine, "users") as superuser:
        superuser.exec_driver_sql("update users set total_coins = null where id = 30")
        superuser.exec_driver_sql("update users set promo = 'NaN' where id = 31")
    if all_at_once:
        monkeypatch.setattr(comparison, "RANGES", 2)
    seen = whole(made)
    assert seen.scope is not None
    assert seen.scope.within == ("all" if all_at_once else "ranges")
    problems: dict[tuple[str, str | None], int] = {}
    for group in seen.groups:
        if group.problem:
            problems[group.bucket, group.problem] = problems.get((group.bucket, group.problem), 0) + group.accounts
    assert problems == {
        **{("cash", name): count for name, count in (("stale", 1), ("missing", 2), ("reopened", 1))},
        **{("cash", name): count for name, count in (("orphan", 1), ("differs", 2), ("no_value", 1))},
        **{("promo", name): count for name, count in (("missing", 2), ("reopened", 1), ("orphan", 1))},
        ("promo", "no_value"): 1,
    }
    states: dict[tuple[str, str], int] = {}
    for group in seen.groups:
        states[group.bucket, group.state] = states.get((group.bucket, group.state), 0) + group.accounts
    assert states == {
        (bucket, state): count
        for bucket, state, count in rows(
            engine, "select bucket, state::text, count(*) from wallet.accounts group by 1, 2"
        )
    } | {("cash", "absent"): 2, ("promo", "absent"): 2}
    sides: dict[str, tuple[Decimal, Decimal]] = {}
    for total in seen.totals:
        if total.trait == "tenant" and total.bucket == "cash":
            sides[total.value or "(gone)"] = (total.legacy, total.ledger)
    expected = rows(
        engine,
        "select coalesce(u.tenant, '(gone)'), coalesce(sum(u.total_coins), 0), coalesce(sum(a.balance), 0) "
        "from users u full join (select * from wallet.accounts where bucket = 'cash') a on a.key = u.id::text "
        "where u.id is not null or a.state <> 'closed' group by 1",
    )
    assert sides == {tenant: (legacy, ledger) for tenant, legacy, ledger in expected}


def test_keys_of_the_ledger_that_no_row_can_have_are_orphans_and_no_error(made: Ledger) -> None:
    run(made)
    for key in ("abc", "007", "99999999999999999999"):
        execute(
            made[0],
            "insert into wallet.accounts (mapping, key, bucket, currency, state, balance) "
            "values ('users', :key, 'cash', 'EUR', 'mirrored', 0)",
            key=key,
        )
    for options in ({"since_last": True}, {"sample": 100}, {}):
        found = run(made, **options)
        assert {(one.key, one.problem) for one in found.drift} == {
            (key, "orphan") for key in ("abc", "007", "99999999999999999999")
        }


# The second look


@contextmanager
def between_the_looks(monkeypatch: pytest.MonkeyPatch, happens: Any) -> Iterator[None]:
    """Let something happen after the first snapshot has ended and before the second is taken."""
    taken: list[int] = []

    @contextmanager
    def counted(engine: Engine) -> Iterator[Connection]:
        taken.append(1)
        if len(taken) == 2:
            happens()
        with snapshot(engine) as connection:
            yield connection

    with monkeypatch.context() as patch:
        for module in (verifying, looks):
            patch.setattr(module, "snapshot", counted)
        yield
    assert len(taken) == 2


def test_a_difference_that_a_transaction_has_ended_is_counted_apart(
    made: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Account 4 is turned stale and brought up by a backfill while verify is under way; account 5 stays wrong."""
    engine, settings = made
    drift(engine, settings, where="id in (4, 5)")

    def happens() -> None:
        execute(engine, "update wallet.accounts set state = 'stale', state_at = now() where key = '4'")
        backfill(engine, settings, settings.mapping(), ACT)

    with between_the_looks(monkeypatch, happens):
        result = run(made)
    assert_only(result, "drift")
    assert [one.key for one in result.drift] == ["5"]
    assert (result.drift_accounts, result.drift_amount["EUR"]) == (1, Decimal(1))
    assert result.passing == (Drift("4", "cash", "EUR", Decimal(101), Decimal(100), "mirrored", "differs"),)
    assert rows(engine, "select drift_accounts, drift_amount from wallet.verifications") == [(1, 1)]
    with engine.connect() as connection:
        (kept,) = verifications.runs(connection, settings)
    assert kept.details["passing_accounts"] == 1
    assert kept.details["passing"] == ["4 (cash, EUR): legacy 101.00, ledger 100.00, mirrored, differs"]


def test_a_difference_that_ended_without_a_transaction_stays_one(made: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody put the row right by hand while verify ran: no run may call that clean."""
    drift(*made)
    with between_the_looks(monkeypatch, lambda: mend(*made)):
        result = run(made)
    assert (result.clean, result.drift_accounts, result.passing) == (False, 1, ())


@pytest.mark.parametrize("mark_stale", [False, True])
def test_a_difference_whose_account_turned_stale_between_the_looks_stays_one(
    made: Ledger, monkeypatch: pytest.MonkeyPatch, mark_stale: bool
) -> None:
    """As by an adapter that read and compared it: from then on it is not compared, but it is not mended either."""
    drift(*made)
    stale = "select wallet.turn_stale(id, 'the adapter compared') from wallet.accounts where key = '4'"
    with between_the_looks(monkeypatch, lambda: execute(made[0], stale)):
        result = run(made, mark_stale=mark_stale)
    assert (result.clean, result.drift_accounts, result.passing) == (False, 1, ())
    assert states_of(made[0]) == {"4 cash": "stale"}
    assert rows(made[0], "select clean, drift_accounts from wallet.verifications") == [(False, 1)]


def test_a_difference_whose_account_closed_between_the_looks_is_counted_apart(
    made: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    drift(*made)
    with between_the_looks(monkeypatch, lambda: execute(made[0], "delete from users where id = 4")):
        result = run(made)
    assert (result.clean, result.drift_accounts, len(result.passing)) == (True, 0, 1)


def test_a_difference_whose_account_has_merely_been_written_is_still_one(
    made: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    execute(made[0], "update wallet.accounts set balance = balance + 1 where key = '4'")

    def happens() -> None:
        with fence_down(*made) as superuser:
            superuser.exec_driver_sql("update users set promo = promo + 1 where id = 4")

    with between_the_looks(monkeypatch, happens):
        assert run(made).drift_accounts == 1


def test_too_many_differences_are_not_looked_at_again(made: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    drift(*made, where="id < 5")
    monkeypatch.setattr(looks, "AGAIN", 3)
    assert run(made).drift_accounts == 4


# Samples


def test_a_sample_says_how_many_may_be_wrong_at_most(made: Ledger) -> None:
    result = run(made, sample=4)
    assert (result.clean, result.form, result.accounts) == (True, "sample", 4)
    assert result.sample == samples.Sample(4, 0, False, 0.95, samples.at_most(0, 4))
    assert (result.imbalance, result.totals) == ({}, ())
    everything = run(made, sample=11)
    assert everything.sample == samples.Sample(10, 0, True, 0.95, 0.0)


def test_a_sample_counts_wrong_balances_and_wrong_journals_once_a_key(made: Ledger) -> None:
    drift(*made)
    execute(made[0], "update wallet.accounts set balance = balance + 1 where key in ('4', '5')")
    execute(made[0], "update users set total_coins = 1 where id = 6")
    with unguarded(made[0], "wallet.transactions") as superuser:
        superuser.exec_driver_sql("update wallet.transactions set reason = 'edited', amount = amount + 1 where id = 7")
    result = run(made, sample=100, limit=1)
    assert result.sample is not None
    wrong = {"5"} | {one.key for one in run(made).journal if one.key and one.key.isdigit() and int(one.key) < 99}
    assert result.sample.wrong == len(wrong - {"opening", "external"})
    assert (result.stale, result.clean) == (1, False)


def test_each_key_is_as_likely_to_be_drawn_as_any_other(made: Ledger) -> None:
    """300 samples of 2 out of 10: each key is expected 60 times, with a standard deviation of 7."""
    engine, settings = made
    drawn: dict[str, int] = {}
    with snapshot(engine) as connection:
        for _ in range(300):
            found = samples.draw(Comparison(connection, settings, settings.mapping()), connection, 2)
            assert len(set(found)) == 2
            for key in found:
                drawn[key] = drawn.get(key, 0) + 1
    assert set(drawn) == {str(key) for key in range(1, 11)}
    assert all(25 < count < 95 for count in drawn.values()), drawn


@pytest.mark.parametrize(
    ("wrong", "keys", "bound"),
    # 1 − 0.05^(1/n) for none, else as tables of exact one-sided 95 % limits have them.
    [(0, 1, 0.95), (0, 10, 0.25887), (0, 1000, 0.0029912), (1, 10, 0.39416), (2, 50, 0.12062), (10, 10, 1.0)],
)
def test_the_bound_is_the_exact_one(wrong: int, keys: int, bound: float) -> None:
    assert samples.at_most(wrong, keys) == pytest.approx(bound, abs=2e-5)


def test_the_bound_leaves_the_stated_chance_and_no_more() -> None:
    for wrong, keys in ((0, 7), (3, 40), (5, 5000)):
        share = samples.at_most(wrong, keys)
        seen = math.fsum(math.comb(keys, k) * share**k * (1 - share) ** (keys - k) for k in range(wrong + 1))
        assert seen == pytest.approx(0.05, rel=1e-6)


def test_contradictory_options_are_usage(made: Ledger) -> None:
    for options in ({"sample": 0}, {"sample": 3, "since_last": True}):
        with pytest.raises(UsageError):
            run(made, **options)


# Incremental runs


def test_an_incremental_run_looks_at_what_changed_and_at_nothing_else(made: Ledger) -> None:
    engine, settings = made
    with pytest.raises(PreconditionRefused, match="no clean full verification"):
        run(made, since_last=True)
    run(made, sample=5)
    with pytest.raises(PreconditionRefused, match="no clean full verification"):
        run(made, since_last=True)
    run(made)
    assert run(made, since_last=True).accounts == 0
    with engine.begin() as connection:
        post(connection, settings, "transfer", 6, 1, payee=7)
    execute(engine, "update users set total_coins = 1 where id = 8")
    add_users(engine, 11, 11)
    result = run(made, since_last=True)
    assert (result.form, result.accounts, dict(result.states)) == ("incremental", 3, {"mirrored": 2, "stale": 1})
    assert [one.key for one in result.behind] == ["8"]


def test_an_incremental_run_begins_where_the_last_clean_one_looked(made: Ledger) -> None:
    engine, settings = made
    run(made)
    for key in (6, 7):
        with engine.begin() as connection:
            post(connection, settings, "credit", key, 1)
        assert run(made, since_last=True).accounts == 1
        assert run(made, since_last=True, dry_run=True).accounts == 0


def test_an_incremental_run_does_not_pass_over_what_an_earlier_one_found(made: Ledger) -> None:
    """Neither the first after it nor the second, whatever was clean before; a full clean run moves the bound again."""
    engine, _ = made
    run(made)
    assert run(made, since_last=True).clean
    execute(engine, "update wallet.accounts set balance = balance + 1 where key = '4'")
    for _ in range(3):
        result = run(made, since_last=True)
        assert (result.clean, [one.key for one in result.drift]) == (False, ["4"])
    assert not run(made).clean
    assert not run(made, since_last=True).clean
    execute(engine, "update wallet.accounts set balance = balance - 1 where key = '4'")
    result = run(made, since_last=True)
    assert (result.clean, result.accounts) == (True, 1)
    assert run(made, since_last=True).accounts == 1
    assert run(made).clean
    assert run(made, since_last=True).accounts == 0


def test_after_a_first_full_run_that_was_not_clean_there_is_nothing_to_go_on_from(made: Ledger) -> None:
    drift(*made)
    assert not run(made).clean
    with pytest.raises(PreconditionRefused, match="no clean full verification"):
        run(made, since_last=True)


def test_an_incremental_run_finds_balances_and_states_that_were_forged_since(made: Ledger) -> None:
    run(made)
    execute(made[0], "update wallet.accounts set balance = balance + 1 where key = '4'")
    execute(made[0], "update wallet.accounts set state = 'closed' where key = '5'")
    result = run(made, since_last=True)
    assert {(one.key, one.problem) for one in result.drift} == {("4", "differs"), ("5", "reopened")}
    assert {one.key for one in result.journal} == {"4"}


@pytest.mark.parametrize("runs_between", [0, 2])
def test_what_was_in_flight_at_the_last_run_is_seen_by_the_next(made: Ledger, runs_between: int) -> None:
    """Its id is lower than of what the last run saw: only the oldest running transaction is a bound without a gap."""
    engine, settings = made
    with engine.connect() as writer:
        post(writer, settings, "credit", 4, 5)
        writer.execute(text("update wallet.accounts set balance = balance + 1 where key = '4'"))
        with engine.begin() as connection:
            post(connection, settings, "credit", 5, 5)
        assert run(made).clean
        for _ in range(runs_between):
            with engine.begin() as connection:
                post(connection, settings, "credit", 6, 5)
            assert run(made, since_last=True).clean
        writer.commit()
    result = run(made, since_last=True)
    assert [one.key for one in result.drift] == ["4"]


def test_a_bound_of_another_cluster_is_none(made: Ledger) -> None:
    """As after a logical restore: xids of the one cluster say nothing in the other."""
    run(made)
    with unguarded(made[0], "wallet.verifications") as superuser:
        superuser.exec_driver_sql("update wallet.verifications set system_identifier = system_identifier + 1")
    with pytest.raises(PreconditionRefused, match="by this cluster"):
        run(made, since_last=True)


def test_more_changed_accounts_than_are_compared_at_once_are_all_looked_at(
    made: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(made)
    execute(made[0], "update wallet.accounts set balance = balance + 1")
    monkeypatch.setattr(looks, "AT_A_TIME", 3)
    result = run(made, since_last=True, limit=4, mark_stale=True)
    assert (result.accounts, result.drift_accounts, len(result.drift), result.turned_stale) == (10, 10, 4, 10)
    assert result.journal_accounts == 10
    assert len(states_of(made[0])) == 10


@pytest.mark.parametrize("options", [{"sample": 100}, {"since_last": True}], ids=["sample", "incremental"])
def test_the_other_forms_mark_what_they_found_stale(made: Ledger, options: dict[str, Any]) -> None:
    run(made)
    execute(made[0], "update wallet.accounts set balance = balance + 1 where key = '4'")
    assert run(made, mark_stale=True, dry_run=True, **options).turned_stale == 1
    assert run(made, mark_stale=True, **options).turned_stale == 1
    assert states_of(made[0]) == {"4 cash": "stale"}


# What voids what


def gates(made: Ledger) -> list[str]:
    with made[0].connect() as connection:
        return [what for what, _ in verified(connection, made[1])]


def last_success(made: Ledger) -> Any:
    with made[0].connect() as connection:
        return read_facts(connection, "wallet", SCOPE).last_success


def metric(made: Ledger) -> tuple[int, Any]:
    with made[0].connect() as connection:
        seen = read_facts(connection, "wallet", SCOPE)
    return seen.drift_accounts["EUR"], seen.drift_amount["EUR"]


@pytest.mark.parametrize(
    ("options", "words"), [({"sample": 100}, "a sampled"), ({"since_last": True}, "an incremental"), ({}, "last full")]
)
def test_a_run_that_finds_something_voids_what_stood_until_a_full_clean_one(
    made: Ledger, options: dict[str, Any], words: str
) -> None:
    engine, settings = made
    assert gates(made) == ["mapping 'users' was never fully verified"]
    run(made, sample=100)
    assert gates(made) == ["mapping 'users' was never fully verified"]
    run(made)
    assert (gates(made), last_success(made) > 0, metric(made)) == ([], True, (0, 0))
    execute(engine, "update wallet.accounts set balance = balance + 1 where key = '4'")
    run(made, dry_run=True, **options)
    assert gates(made) == []
    run(made, **options)
    (said,) = gates(made)
    assert words in said
    assert (last_success(made), metric(made)) == (VOIDED, (1, 1))
    execute(engine, "update wallet.accounts set balance = balance - 1 where key = '4'")
    assert run(made, sample=100).clean
    assert run(made, since_last=True).clean
    assert (len(gates(made)), last_success(made), metric(made)) == (1, VOIDED, (1, 1))
    (shown,) = status(engine, settings, source_of(settings)).verifications
    assert (shown.clean, shown.voided is not None) == (bool(options), bool(options))
    assert run(made).clean
    assert (gates(made), last_success(made) > 0, metric(made)) == ([], True, (0, 0))


def test_a_clean_full_run_that_began_before_the_finding_does_not_lift_it(made: Ledger) -> None:
    """Two runs side by side: the one that ends last looked first."""
    run(made)
    execute(made[0], "update wallet.accounts set balance = balance + 1 where key = '4'")
    run(made, sample=100)
    execute(
        made[0],
        "insert into wallet.verifications (mapping, started_at, clean, form, accounts, missing, drift_accounts, "
        "drift_amount, currency, actor) select mapping, min(started_at), true, 'full', 10, 0, 0, 0, currency, 'test' "
        "from wallet.verifications group by mapping, currency",
    )
    assert len(gates(made)) == 1
    assert last_success(made) == VOIDED


# The log


def test_runs_are_kept_in_a_log(made: Ledger) -> None:
    engine, settings = made
    run(made)
    drift(*made)
    run(made, sample=100)
    run(made, since_last=True, dry_run=True)
    with engine.connect() as connection:
        newest, first = verifications.runs(connection, settings)
        assert [one.id for one in verifications.runs(connection, settings, limit=1)] == [newest.id]
        assert verifications.runs(connection, settings, mapping="other") == ()
        assert verifications.show(connection, settings, first.id) == first
        with pytest.raises(UnknownRun):
            verifications.show(connection, settings, 999)
    assert (first.form, first.clean, newest.form, newest.clean) == ("full", True, "sample", False)
    assert newest.details["drift"] == ["4 (cash, EUR): legacy 101.00, ledger 100.00, mirrored, differs"]
    assert newest.details["sample"]["wrong"] == 1


# Sums


def test_sums_of_more_digits_than_python_s_context_has_are_exact(database_url: str) -> None:
    """30 digits before the point and 2 behind: Python's own addition would round them to 28."""
    huge = Decimal("123456789012345678901234567890.12")
    engine, settings = made = install_users(
        database_url, rows=3, coins=str(huge), coins_type="numeric(32, 2)", phase="dual_write"
    )
    backfill(engine, settings, settings.mapping(), ACT)
    execute(engine, "update wallet.accounts set state = 'frozen' where key = '3'")  # a group of its own
    with localcontext() as context:
        context.prec = 28
        result: Verification = run(made)
        assert result.clean, result
        assert result.legacy_total["EUR"] == result.ledger_total["EUR"]
        assert f"{result.legacy_total['EUR']:f}" == "370370367037037036703703703670.36"
        with engine.connect() as connection:
            assert read_facts(connection, "wallet", SCOPE).imbalance == {"EUR": 0}
        execute(engine, "update wallet.accounts set balance = balance + 0.01 where key = '1'")
        result = run(made)
    assert (dict(result.imbalance), dict(result.drift_amount)) == ({"EUR": Decimal("0.01")},) * 2
    assert sums.total([huge, huge.copy_negate(), Decimal("0.01")]) == Decimal("0.01")
