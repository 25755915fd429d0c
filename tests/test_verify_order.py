"""The order of an account's transactions is followed once: until something that a clean run saw was written again."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import Connection, text

from ledger import execute, post, rows, scalar, unguarded
from verifying import Ledger, account, prepared, run
from walletmigrate import journals
from walletmigrate.comparison import ALL, Comparison, Scope
from walletmigrate.verifications import last_clean

DISORDER = "the balance after a transaction does not follow from the one before"
KEY = "4"


@pytest.fixture
def made(database_url: str) -> Ledger:
    return prepared(database_url)


@pytest.fixture
def followed(monkeypatch: pytest.MonkeyPatch) -> list[str | int]:
    """What was followed each time: ``all``, all of accounts with ``new`` transactions, or how many accounts singly."""
    found: list[str | int] = []
    plainly = Comparison.run

    def asked(comparison: Comparison, connection: Connection, name: str, scope: Scope = ALL, **parameters: Any) -> Any:
        if name == "disorder":
            found.append("new" if parameters["known"] else "all")
        if name == "journal" and scope.within == "keys":
            found.append(len(scope.accounts))
        return plainly(comparison, connection, name, scope, **parameters)

    monkeypatch.setattr(Comparison, "run", asked)
    return found


def move(made: Ledger, *operations: str, idempotency_key: str | None = None) -> None:
    """Post 5 in and out of one account, each in a transaction of the database, some in a subtransaction of it."""
    for number, operation in enumerate(operations):
        with made[0].begin() as connection:
            connection.execute(text("select pg_current_xact_id()"))
            token = idempotency_key and f"{idempotency_key}-{number}"
            if number % 2:
                post(connection, made[1], operation, KEY, 5, idempotency_key=token)
            else:
                with connection.begin_nested():
                    post(connection, made[1], operation, KEY, 5, idempotency_key=token)


def exchange(made: Ledger, first: int, second: int) -> None:
    """Exchange two transactions of the account, by their place in its history: as a set, they are what they were."""
    query = (
        "select id from wallet.transactions where credit_account = :account or debit_account = :account "
        "order by id offset :place limit 1"
    )
    one, other = (scalar(made[0], query, account=account(made[0], KEY), place=place - 1) for place in (first, second))
    with unguarded(made[0], "wallet.transactions") as superuser:
        superuser.execute(text("update wallet.transactions set id = -id where id in (:a, :b)"), {"a": one, "b": other})
        superuser.execute(
            text("update wallet.transactions set id = case id when -:a then :b else :a end where id in (-:a, -:b)"),
            {"a": one, "b": other},
        )


@pytest.mark.parametrize("places", [(1, 4), (2, 3)], ids=["the opening with another", "two others"])
@pytest.mark.parametrize("when", ["no run yet", "a run saw them", "a run saw the first"])
def test_transactions_in_another_order_are_found_whatever_a_run_has_seen(
    made: Ledger, when: str, places: tuple[int, int]
) -> None:
    if when == "a run saw the first":
        assert run(made).clean
    move(made, "credit", "debit", "debit", "credit")
    if when == "a run saw them":
        assert run(made).clean
    # 0 → 100 → 105 → 100 → 95 → 100: those that are exchanged lead to, or from, a balance that comes several times.
    exchange(made, *places)
    result = run(made)
    assert [(one.key, one.problem) for one in result.journal] == [(KEY, DISORDER)]
    assert (result.reference_count, result.drift_accounts, any(result.imbalance.values())) == (0, 0, False)


def test_what_a_clean_run_has_followed_and_nobody_has_written_since_is_not_followed_again(
    made: Ledger, followed: list[str | int], monkeypatch: pytest.MonkeyPatch
) -> None:
    move(made, "credit", "debit")
    assert [run(made).clean, run(made).clean] == [True, True]
    assert followed == ["all"]
    move(made, "credit")
    assert run(made).clean
    assert followed == ["all", 1]
    monkeypatch.setattr(journals, "FEW", 0)
    move(made, "debit")
    assert run(made).clean
    assert followed == ["all", 1, "new"]


@pytest.mark.parametrize("few", [journals.FEW, 0])
@pytest.mark.parametrize("change", ["id = -id", "id = -id, xid = 3"], ids=["as it was", "as if it were old"])
def test_a_step_from_nothing_that_was_put_in_front_of_older_ones_is_found(
    made: Ledger, change: str, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a step is an account's first as a rule, and then there is no order to follow: not where others are known."""
    assert run(made).clean
    with made[0].begin() as connection:
        taken = post(connection, made[1], "credit", 3, 7)["transaction_id"]
    with unguarded(made[0], "wallet.transactions") as superuser:
        superuser.execute(text(f"update wallet.transactions set {change} where id = :id"), {"id": taken})
    monkeypatch.setattr(journals, "FEW", few)
    assert ("3", DISORDER) in [(one.key, one.problem) for one in run(made).journal]


def test_what_was_in_flight_at_the_last_run_is_followed_by_the_next(made: Ledger, followed: list[str | int]) -> None:
    """And is no reason to follow all the rest: the last run did not see it."""
    with made[0].connect() as writer:
        post(writer, made[1], "credit", 5, 5)
        move(made, "credit", "debit")
        assert run(made).clean
        writer.commit()
    assert run(made).clean
    assert followed == ["all", 1]


def test_a_transaction_that_was_seen_and_is_gone_lets_everything_be_looked_at_again(
    made: Ledger, followed: list[str | int]
) -> None:
    """Two that came to nothing leave no sum and no order behind that would be wrong; their keys dangle, and they are
    missed."""
    move(made, "credit", "debit", idempotency_key="gone")
    assert run(made).clean
    with unguarded(made[0], "wallet.transactions") as superuser:
        superuser.exec_driver_sql(
            "delete from wallet.transactions where id in (select transaction_id from wallet.idempotency_keys "
            "where key like 'gone%%')"
        )
    result = run(made)
    assert (result.journal, result.reference_count) == ((), 2 + 2)
    assert followed == ["all", "all"]


def test_a_key_that_was_led_elsewhere_since_the_last_run_is_found(made: Ledger) -> None:
    move(made, "credit", idempotency_key="led")
    assert run(made).clean
    execute(made[0], "update wallet.idempotency_keys set transaction_id = -1 where key = 'led-0'")
    assert [one.subject for one in run(made).references] == ["led-0"]


def test_a_balance_after_that_is_missing_between_two_owners_is_found(made: Ledger) -> None:
    """Without both, no step is in any sum; that it is there must be enough to look."""
    assert run(made).clean
    execute(
        made[0],
        "insert into wallet.transactions (id, debit_account, credit_account, kind, amount, currency, type) "
        "select nextval('wallet.transaction_ids'), min(id), max(id), 'posting', 5, 'EUR', 'forged' "
        "from wallet.accounts where key in ('5', '6')",
    )
    assert {one.key for one in run(made).journal} == {"5", "6"}


@pytest.mark.parametrize("form", [{}, {"sample": 100}], ids=["full", "sample"])
def test_a_run_that_finds_something_takes_back_what_was_known_until_a_full_clean_one(
    made: Ledger, followed: list[str | int], form: dict[str, Any]
) -> None:
    assert run(made).clean
    execute(made[0], "update wallet.accounts set balance = balance + 1 where key = '4'")
    assert not run(made, **form).clean
    execute(made[0], "update wallet.accounts set balance = balance - 1 where key = '4'")
    followed.clear()
    assert [run(made).clean, run(made).clean] == [True, True]
    assert followed == ["all"]


@pytest.mark.parametrize(
    "change",
    [
        "system_identifier = system_identifier + 1",
        "horizon = horizon - 2000000000",
        "details = details - 'journal_seen'",
        "form = 'incremental'",
        "mapping = 'other'",
    ],
    ids=["of another cluster", "long ago", "by an older release", "not full", "of another mapping"],
)
def test_a_run_that_does_not_speak_for_this_journal_is_not_known(made: Ledger, change: str) -> None:
    run(made)
    engine, settings = made
    with engine.connect() as connection:
        last = last_clean(connection, settings, settings.mapping())
    assert last is not None
    assert last.known is not None
    assert last.known.transactions == len(rows(engine, "select from wallet.transactions"))
    with unguarded(engine, "wallet.verifications") as superuser:
        superuser.exec_driver_sql(f"update wallet.verifications set {change}")
    with engine.connect() as connection:
        assert last_clean(connection, settings, settings.mapping()) is None


def test_a_transaction_that_pays_the_account_it_is_taken_from_is_named(made: Ledger) -> None:
    move(made, "credit")
    assert run(made).clean
    execute(
        made[0],
        "insert into wallet.transactions "
        "(id, debit_account, credit_account, kind, amount, debit_balance, credit_balance, currency, type) "
        "select 1000000, id, id, 'posting', 3, balance - 3, balance, 'EUR', 'forged' from wallet.accounts "
        "where key = :key",
        key=KEY,
    )
    result = run(made)
    assert ("a transaction pays the account that it is taken from", 1000000) in [
        (one.problem, one.transaction_id) for one in result.journal
    ]


@pytest.mark.parametrize("rewritten", [False, True], ids=["the others as they were", "the others written again"])
def test_transactions_that_a_clean_run_saw_are_missed_when_they_came_to_nothing_together(
    made: Ledger, rewritten: bool
) -> None:
    move(made, "credit", "debit")
    assert run(made).clean
    with unguarded(made[0], "wallet.transactions") as superuser:
        gone = superuser.exec_driver_sql("delete from wallet.transactions where kind = 'posting'").rowcount
        if rewritten:
            superuser.exec_driver_sql("update wallet.transactions set reason = 'moved to another disk'")
    for _ in range(2):  # the first of them, which was not clean, has not made it right
        result = run(made)
        assert ("transactions that an earlier run saw and that are gone", str(gone)) in [
            (one.problem, one.target) for one in result.references
        ]
        assert not result.clean


def test_transactions_that_were_written_again_are_not_gone(made: Ledger) -> None:
    move(made, "credit", "debit")
    assert run(made).clean
    with unguarded(made[0], "wallet.transactions") as superuser:
        superuser.exec_driver_sql("update wallet.transactions set reason = 'moved to another disk'")
    assert run(made).clean
