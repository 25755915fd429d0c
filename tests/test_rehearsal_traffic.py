"""Traffic made from a table's own distribution: whose, how much, and never out of the range of its balances."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from decimal import Decimal, localcontext

import pytest

from walletmigrate.config import Column
from walletmigrate.errors import PreconditionRefused
from walletmigrate.rehearsal_ground import amount_of
from walletmigrate.rehearsal_traffic import FEWEST, Holding, Limits, likeness, usual_count
from walletmigrate.traffic import EXACT, GENERATED, Traffic

WIDE = Limits(2, 10**12)
ROWS = [Holding(f"a-{n}", "big" if n % 10 else "small", (n * 100, n % 5)) for n in range(1, 101)]


def made(rows: list[Holding], *limits: Limits, seed: int = 1, count: int = 2_000) -> Traffic:
    return likeness("here", rows, limits, trait="tenant", seed=seed, count=count)


def walked(traffic: Traffic) -> dict[int, list[Decimal]]:
    """Every balance that anybody comes to, by place, the first ones included."""
    balances = dict(traffic.start)
    seen: dict[int, list[Decimal]] = {}
    for (_, place), amount in balances.items():
        seen.setdefault(place, []).append(amount)
    for one in traffic.transactions:
        balances[one.account, one.place] += one.amount
        seen[one.place].append(balances[one.account, one.place])
    assert balances == traffic.expectations
    return seen


def test_the_same_rows_and_seed_make_the_same_traffic_and_another_seed_another() -> None:
    first = made(ROWS, WIDE, WIDE)
    assert first == made(ROWS, WIDE, WIDE)
    assert first.transactions != made(ROWS, WIDE, WIDE, seed=2).transactions
    assert len({one.id for one in first.transactions}) == len(first.transactions) == 2_000


def test_everybody_begins_with_the_balance_that_was_copied() -> None:
    traffic = made(ROWS, WIDE, Limits(0, 10**9))
    assert traffic.start["a-7", 0] == Decimal("7.00")
    assert traffic.start["a-7", 1] == Decimal(2)
    assert str(traffic.start["a-7", 0]) == "7.00"


def test_tenants_have_their_share_of_the_rows_and_few_accounts_much_of_the_traffic() -> None:
    counted = Counter(one.tenant for one in made(ROWS, WIDE, WIDE, count=10_000).transactions)
    assert 0.08 < counted["small"] / 10_000 < 0.12
    accounts = Counter(one.account for one in made(ROWS, WIDE, WIDE, count=10_000).transactions if one.tenant == "big")
    busiest = [count for _, count in accounts.most_common()]
    assert sum(busiest[:9]) > 2 * sum(busiest[-45:]) / 5
    assert busiest[0] > 5 * busiest[len(busiest) // 2]


def test_amounts_follow_the_tenants_own_balances() -> None:
    rows = [Holding(f"r-{n}", "rich", (1_000_000 + n,)) for n in range(20)]
    rows += [Holding(f"p-{n}", "poor", (100 + n,)) for n in range(20)]
    traffic = made(rows, WIDE)
    most = {
        name: max(abs(one.amount) for one in traffic.transactions if one.tenant == name) for name in ("rich", "poor")
    }
    assert most["poor"] <= Decimal("0.35")
    assert Decimal(1_000) < most["rich"] <= Decimal("3000.05")


def test_no_balance_leaves_the_range_of_the_sources_own() -> None:
    seen = walked(made(ROWS, WIDE, WIDE, count=5_000))
    assert (min(seen[0]), max(seen[0])) == (Decimal(1), Decimal(100))
    assert min(seen[1]) == 0


@pytest.mark.parametrize(("floor", "lowest"), [(None, "-50"), (-2_000, "-20"), (0, "0")])
def test_no_debit_goes_below_the_floor_or_the_smallest_balance(floor: int | None, lowest: str) -> None:
    rows = [Holding(f"a-{n}", "t", (n * 100,)) for n in range(-50, 50)]
    traffic = made(rows, replace(WIDE, floor=floor), count=5_000)
    balances = dict(traffic.start)
    debits = 0
    for one in traffic.transactions:
        balances[one.account, 0] += one.amount
        if one.amount < 0:
            debits += 1
            assert balances[one.account, 0] >= Decimal(lowest)
    assert debits > 1_000


def test_balances_that_are_all_the_same_still_move_and_never_above_what_the_column_holds() -> None:
    rows = [Holding(f"a-{n}", "", (30_000,)) for n in range(5)]
    seen = walked(made(rows, Limits(0, 32_767)))[0]
    assert min(seen) == 30_000
    assert 30_000 < max(seen) <= 32_767
    with pytest.raises(PreconditionRefused, match="no room for any movement"):
        made([Holding("a", "", (32_767,))], Limits(0, 32_767), count=10)


def test_under_a_check_amounts_are_multiples_of_the_balances_common_divisor() -> None:
    rows = [Holding(f"a-{n}", "t", (n * 5,)) for n in range(50)]
    amounts = {one.amount for one in made(rows, Limits(0, 10**9, coarse=True)).transactions}
    assert len(amounts) > 10
    assert all(amount % 5 == 0 for amount in amounts)
    assert any(one.amount % 5 for one in made(rows, Limits(0, 10**9)).transactions)


def test_balances_of_thirty_digits_keep_their_last_one() -> None:
    huge = 10**31 + 1
    traffic = made([Holding("a", "t", (huge,)), Holding("b", "t", (0,))], Limits(2, 10**32))
    assert traffic.start["a", 0] == Decimal("100000000000000000000000000000.01")
    with localcontext(EXACT):
        moved = sum(int(one.amount.scaleb(2)) for one in traffic.transactions)
        assert sum(int(amount.scaleb(2)) for amount in traffic.expectations.values()) == huge + moved
    assert max(len(one.amount.as_tuple().digits) for one in traffic.transactions) > 28


@pytest.mark.parametrize(
    ("raw", "unit", "scale", "amount"),
    [
        ("12.5", "major", 2, "12.50"),
        ("1250", "minor", 2, "12.50"),
        ("-7", "minor", 2, "-0.07"),
        ("0.30000000000000004", "major", 2, "0.30"),
        ("7", "major", 0, "7"),
        ("999999999999999999999999999999.99", "major", 2, "999999999999999999999999999999.99"),
    ],
)
def test_a_columns_text_is_an_amount_in_major_units(raw: str, unit: str, scale: int, amount: str) -> None:
    column = Column.model_validate(
        {"bucket": "cash", "column": "balance", "currency": "EUR", "scale": scale, "unit": unit}
    )
    assert str(amount_of(column, raw)) == amount


def test_the_usual_number_of_transactions_fits_the_accounts() -> None:
    assert [usual_count(rows) for rows in (1, 500, 100_000)] == [FEWEST, 5_000, GENERATED]
