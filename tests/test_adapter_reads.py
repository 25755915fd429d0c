"""Reads: which side answers, by flag, phase and state; the comparison, and that it never fails the caller."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.orm import Session
from structlog.contextvars import bound_contextvars

import servers
from adapting import DUAL, OFF, READ, Place, User, bring_into, place, placed
from flag_documents import document, tenant
from ledger import fence_down, set_phase, unguarded
from walletmigrate import LegacyBalanceAdapter, StaticSource, connect
from walletmigrate.errors import LegacyValueInvalid, UnknownAccount
from walletmigrate.flag_sources import FileSource
from walletmigrate.flags import Decision

D = Decimal
STATES = ["absent", "mirrored", "stale", "frozen", "closed, live", "closed"]
KEYS = {state: number for number, state in enumerate(STATES, 1)}
READING_PHASES = ["read_ledger", "wallet_only", "frozen"]
OTHER_PHASES = ["legacy", "dual_write"]

# state: amount, source when the ledger is not asked for, source when it is, ledger balance, comparison
ANSWERS: dict[str, tuple[str, str, str, str | None, str | None]] = {
    "absent": ("100", "legacy", "fallback", None, None),
    "mirrored": ("100", "legacy", "ledger", "100", "match"),
    "stale": ("100", "legacy", "fallback", "85", "stale"),
    "frozen": ("107", "ledger", "ledger", "107", None),
    "closed, live": ("100", "legacy", "fallback", "85", "stale"),
}


@pytest.fixture(scope="module")
def shared(server: servers.Postgres) -> Iterator[Place]:
    """One account in each state; the frozen one was credited 7 since."""
    with connect.scratch_database(server.url) as url:
        made = place(url, rows=0)
        for state, key in KEYS.items():
            bring_into(made, key, state)
        with made.engine.begin() as connection:
            made.adapter.credit(connection, KEYS["frozen"], 7, type="deposit")
        yield made
        made.check()


@pytest.mark.parametrize("phase", [*OTHER_PHASES, *READING_PHASES])
@pytest.mark.parametrize("flags", [OFF, DUAL, READ], ids=["off", "dual", "read"])
def test_many_balances_read_together_are_those_read_one_by_one(
    shared: Place, phase: str, flags: dict[str, bool]
) -> None:
    set_phase(shared.engine, phase)
    at = placed(shared.engine, shared.settings, flags)
    known = [KEYS[state] for state in ANSWERS]
    with at.engine.connect() as connection:
        each = {key: at.adapter.balance(connection, key) for key in known}
        alone, at.heard.events[:] = list(at.heard.reads), []
        assert at.adapter.balances(connection, [999, *reversed(known), KEYS["closed"]]) == each
    assert list(each) == known
    assert sorted(map(str, (read.source for read in at.heard.reads))) == sorted(read.source for read in alone)


def test_many_balances_cost_one_statement_and_one_for_the_traits(shared: Place, tmp_path: Path) -> None:
    set_phase(shared.engine, "read_ledger")
    file = tmp_path / "environment.json"
    acme = tenant(1, "acme", "wallet.dualWrite", "wallet.readFromLedger")
    file.write_text(json.dumps(document(segments=[acme])), encoding="utf-8")
    adapter = LegacyBalanceAdapter(shared.settings, FileSource(file))
    with shared.engine.connect() as connection:
        adapter.balance(connection, KEYS["absent"])
        seen: list[str] = []
        event.listen(connection, "before_cursor_execute", lambda *given: seen.append(given[2]))
        found = adapter.balances(connection, list(KEYS.values()))
    assert len(seen) == 2
    assert found[KEYS["mirrored"]].source == "ledger"  # the flag is on for its tenant alone


def test_many_balances_of_a_table_without_a_ledger_are_the_columns(database_url: str) -> None:
    at = place(database_url)
    settings = at.settings.model_copy(update={"ledger_schema": "elsewhere"})
    adapter = LegacyBalanceAdapter(settings, StaticSource(READ))
    with at.engine.connect() as connection:
        found = adapter.balances(connection, [3, 1])
    assert list(found) == [3, 1]
    assert {(one.amount, one.source) for one in found.values()} == {(D(100), "legacy")}


@pytest.mark.parametrize("state", list(ANSWERS))
@pytest.mark.parametrize("phase", [*OTHER_PHASES, *READING_PHASES])
@pytest.mark.parametrize("flags", [OFF, DUAL, READ], ids=["off", "dual", "read"])
def test_a_read_is_answered_by_the_side_that_is_true(
    shared: Place, state: str, phase: str, flags: dict[str, bool]
) -> None:
    set_phase(shared.engine, phase)
    at = placed(shared.engine, shared.settings, flags)
    amount, unasked, asked, ledger, compare = ANSWERS[state]
    with at.engine.connect() as connection:
        found = at.adapter.balance(connection, KEYS[state])
    source = asked if flags is READ and phase in READING_PHASES else unasked
    assert (found.amount, found.source, found.compare) == (D(amount), source, compare)
    assert found.ledger_balance == (None if ledger is None else D(ledger))
    assert (found.state or "absent") == state.partition(",")[0]
    assert (found.legacy_balance, found.bucket, found.currency) == (D(100), "cash", "EUR")
    assert at.metric("read_total", source=source) == 1
    compared = {each: at.metric("read_compare_total", outcome=each) for each in ("match", "mismatch", "stale")}
    assert compared == {**dict.fromkeys(compared, 0), **({compare: 1} if compare else {})}
    assert at.metric("mismatch_total", where="read") == 0


@pytest.mark.parametrize("flags", [OFF, READ], ids=["off", "read"])
@pytest.mark.parametrize("key", [KEYS["closed"], 404])
def test_an_account_whose_row_is_gone_or_never_was_is_unknown(shared: Place, key: int, flags: dict[str, bool]) -> None:
    at = placed(shared.engine, shared.settings, flags)
    with at.engine.connect() as connection:
        with pytest.raises(UnknownAccount) as refused:
            at.adapter.balance(connection, key)
        assert at.adapter.balance(connection, KEYS["mirrored"]).amount == 100
    assert refused.value.key == key


def test_a_frozen_account_is_readable_though_its_row_is_gone(database_url: str) -> None:
    at = place(database_url, rows=0, flags=OFF)
    bring_into(at, 1, "frozen")
    with unguarded(at.engine, "public.users") as connection:
        connection.exec_driver_sql("delete from users where id = 1")
    with at.engine.connect() as connection:
        found = at.adapter.balance(connection, 1)
    assert (found.amount, found.source, found.legacy_balance) == (D(100), "ledger", None)


# Comparison


@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("flags", [OFF, READ], ids=["off", "read"])
def test_a_difference_is_counted_and_legacy_is_returned(
    database_url: str, flags: dict[str, bool], share: float
) -> None:
    at = place(database_url, rows=2, phase="read_ledger")
    with at.engine.begin() as connection:
        at.adapter.open_account(connection, 1)
        at.adapter.open_account(connection, 2)
    with fence_down(at.engine, at.settings) as connection:
        connection.exec_driver_sql("update users set total_coins = 90 where id = 1")
    settings = at.settings.model_copy(update={"compare_share": share})
    reader = placed(at.engine, settings, flags)
    with at.engine.connect() as connection, bound_contextvars(correlation_id="c-9"):
        found = [reader.adapter.balance(connection, key) for key in (1, 2, 1)]
    assert [each.amount for each in found] == [90, 100, 90]
    sources = ["fallback", "ledger", "fallback"] if flags is READ else ["legacy"] * 3
    assert [each.source for each in found] == sources
    counted = 2 if share else 0
    assert [each.compare for each in found] == (["mismatch", "match", "mismatch"] if share else [None] * 3)
    assert reader.metric("mismatch_total", where="read") == counted
    assert reader.metric("read_compare_total", outcome="mismatch") == counted
    assert [(each.key, each.legacy, each.ledger, each.correlation_id) for each in reader.heard.mismatches] == [
        (1, D(90), D(100), "c-9")
    ] * counted


def test_a_share_of_the_reads_is_compared(shared: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    draws = iter([0.0, 0.24, 0.25, 0.99])
    monkeypatch.setattr(random, "random", lambda: next(draws))
    at = placed(shared.engine, shared.settings.model_copy(update={"compare_share": 0.25}))
    with at.engine.connect() as connection:
        compared = [at.adapter.balance(connection, KEYS["mirrored"]).compare for _ in range(4)]
    assert compared == ["match", "match", None, None]


def test_both_sides_are_read_in_one_statement(shared: Place) -> None:
    from sqlalchemy import event

    statements: list[str] = []
    with shared.engine.connect() as connection:
        shared.adapter.balance(connection, KEYS["mirrored"])
        event.listen(connection, "before_cursor_execute", lambda _c, _u, statement, *_: statements.append(statement))
        shared.adapter.balance(connection, KEYS["mirrored"])
    assert len(statements) == 1


def test_an_observer_that_fails_does_not_fail_a_read(shared: Place) -> None:
    def broken(_: object) -> None:
        raise RuntimeError("no more disk")

    with shared.engine.connect() as connection:
        assert shared.another(observers=[broken]).balance(connection, KEYS["mirrored"]).amount == 100


def test_a_null_in_the_column_is_no_balance(database_url: str) -> None:
    at = place(database_url, rows=1, phase="read_ledger", flags=READ)
    with at.engine.begin() as connection:
        at.adapter.open_account(connection, 1)
        connection.exec_driver_sql("update users set total_coins = null")
        with pytest.raises(LegacyValueInvalid) as refused:
            at.adapter.balance(connection, 1)
        assert at.account(1) is None
    assert (refused.value.key, refused.value.column) == (1, "total_coins")


# The caller's transaction


def test_a_read_sees_what_the_caller_s_transaction_wrote(database_url: str) -> None:
    at = place(database_url, rows=2, phase="read_ledger", flags=READ)
    with Session(at.engine) as session:
        session.get_one(User, 2).total_coins = D(50)
        at.adapter.credit(session, 1, 5, type="deposit")
        inside = at.adapter.balance(session, 1)
        assert (inside.amount, inside.source) == (D(105), "ledger")
        assert at.adapter.balance(session, 2).amount == 50
        session.rollback()
        after = at.adapter.balance(session, 1)
        assert (after.amount, after.source) == (D(100), "fallback")


def test_a_read_writes_nothing_and_works_in_a_read_only_transaction(shared: Place) -> None:
    with shared.engine.connect() as connection:
        connection.exec_driver_sql("set transaction read only")
        assert shared.adapter.balance(connection, KEYS["stale"]).amount == 100
        assert len(shared.adapter.history(connection, KEYS["stale"])) == 2


# Cohorts


@dataclass
class ByTenant:
    """A flag source whose decisions need the trait "tenant"; it keeps the traits that it was asked about."""

    asked: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    document_id: str = "by-tenant"
    source: str = "test"
    needs_traits: bool = True

    def snapshot(self) -> ByTenant:
        return self

    def decide(self, identifier: str, traits: Any) -> Decision:
        self.asked.append((identifier, dict(traits)))
        on = traits.get("tenant") == "acme"
        return Decision(on, on)

    def age_seconds(self) -> float:
        return 0.0


def test_a_cohort_reads_from_the_ledger_and_others_do_not(database_url: str) -> None:
    at = place(database_url, rows=2, phase="read_ledger")
    with at.engine.begin() as connection:
        for key in (1, 2):
            at.adapter.open_account(connection, key)
        adapter = LegacyBalanceAdapter(at.settings, ByTenant())
        assert [adapter.balance(connection, key).source for key in (1, 2)] == ["ledger", "legacy"]
        assert [adapter.decision(connection, key).dual_write for key in (1, 2)] == [True, False]


def test_traits_come_from_the_legacy_row_once_and_from_the_caller_first(database_url: str) -> None:
    at = place(database_url, rows=2, phase="read_ledger")
    source = ByTenant()
    adapter = LegacyBalanceAdapter(at.settings, source)
    with at.engine.begin() as connection:
        adapter.balance(connection, 1)
        connection.exec_driver_sql("update users set tenant = 'globex' where id = 1")
        adapter.balance(connection, 1)
        adapter.balance(connection, 2, traits={"tenant": "acme"})
        adapter.balance(connection, 2)
    assert source.asked == [
        ("1", {"tenant": "acme", "role": "member"}),
        ("1", {"tenant": "acme", "role": "member"}),
        ("2", {"tenant": "acme"}),
        ("2", {"tenant": "acme"}),
    ]


def test_a_row_that_is_not_there_yet_has_no_traits_that_could_be_remembered(database_url: str) -> None:
    at = place(database_url, rows=0, phase="read_ledger")
    adapter = LegacyBalanceAdapter(at.settings, ByTenant())
    with at.engine.begin() as connection:
        with pytest.raises(UnknownAccount):
            adapter.balance(connection, 1)
        connection.exec_driver_sql("insert into users values (1, 'acme', 'member', 5, 0)")
        assert adapter.open_account(connection, 1)[0].mode == "dual_write"


def test_the_payee_s_traits_are_the_payee_s_own(database_url: str) -> None:
    at = place(database_url, rows=2)
    source = ByTenant()
    adapter = LegacyBalanceAdapter(at.settings, source)
    with at.engine.begin() as connection:
        result = adapter.transfer(connection, 2, 1, 5, type="gift", traits={"tenant": "initech"})
    assert source.asked == [("2", {"tenant": "initech"}), ("1", {"tenant": "acme", "role": "member"})]
    assert result.mode == "dual_write"


def test_traits_are_not_looked_up_when_no_trait_can_matter(database_url: str) -> None:
    from sqlalchemy import event

    at = place(database_url, rows=1)
    adapter = LegacyBalanceAdapter(at.settings, StaticSource(DUAL))
    statements: list[str] = []
    with at.engine.begin() as connection:
        adapter.credit(connection, 1, 1, type="warm-up")
        event.listen(connection, "before_cursor_execute", lambda _c, _u, statement, *_: statements.append(statement))
        adapter.credit(connection, 1, 1, type="deposit")
    assert len(statements) == 1


def test_a_stale_account_is_read_from_the_ledger_again_after_the_next_posting(database_url: str) -> None:
    at = place(database_url, rows=1, phase="read_ledger", flags=READ)
    sources = []
    with at.engine.begin() as connection:
        at.adapter.open_account(connection, 1)
        sources.append(at.adapter.balance(connection, 1).source)
        connection.exec_driver_sql("update users set total_coins = 50")
        sources.append(at.adapter.balance(connection, 1).source)
        at.adapter.credit(connection, 1, 1, type="deposit")
        sources.append(at.adapter.balance(connection, 1).source)
    assert sources == ["ledger", "fallback", "ledger"]
    at.check()
