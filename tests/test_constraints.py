"""What the tables hold by themselves, whatever function writes them."""

from __future__ import annotations

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.exc import DBAPIError

from ledger import execute, install_users, rows
from walletmigrate import LegacyBalanceAdapter, StaticSource
from walletmigrate.flags import DUAL_WRITE

CHECKS = {
    "accounts_key_mapping_bucket_currency_key": "UNIQUE (key, mapping, bucket, currency)",
    "amount_check": "CHECK (((VALUE > (0)::numeric) AND (VALUE < 'Infinity'::numeric)))",
    "balance_check": "CHECK (((VALUE IS NULL) OR (scale(VALUE) IS NOT NULL)))",
    "control_singleton_check": "CHECK (singleton)",
    "flag_documents_singleton_check": "CHECK (singleton)",
    "system_accounts_id_check": "CHECK ((id < 0))",
    "system_accounts_name_currency_key": "UNIQUE (name, currency)",
    "verifications_check": "CHECK ((complete OR (NOT clean)))",
}
WORDS = {
    "control_phase_check": ("legacy", "dual_write", "read_ledger", "wallet_only", "frozen", "retired"),
    "job_batches_state_check": ("pending", "claimed", "done", "set_aside"),
    "jobs_state_check": ("running", "paused", "done", "failed", "cancelled"),
    "mappings_capture_mode_check": ("stale", "mirror", "reject"),
    "snapshots_state_check": ("running", "complete", "pruned"),
    "verifications_form_check": ("full", "incremental", "sample"),
}
ONCE = {
    "transactions_reversed_once": "reverses IS NOT NULL",
    "audit_log_corrected": "action = 'reconcile corrected'::text",
    "audit_log_undone": "action = 'reconcile undone'::text",
    "jobs_unfinished": "state = ANY (ARRAY['running'::text, 'paused'::text]",
    "snapshots_running": "state = 'running'::text",
}


@pytest.fixture
def engine(database_url: str) -> Engine:
    return install_users(database_url, rows=1)[0]


def test_every_constraint_stands_as_it_was_made(engine: Engine) -> None:
    query = (
        "select conname, pg_get_constraintdef(oid) from pg_constraint "
        "where connamespace = 'wallet'::regnamespace and contype in ('c', 'u')"
    )
    found = {str(name): str(definition) for name, definition in rows(engine, query)}
    assert found.keys() == CHECKS.keys() | WORDS.keys()
    assert {name: found[name] for name in CHECKS} == CHECKS
    for name, words in WORDS.items():
        assert found[name].count("'") == 2 * len(words)
        assert all(f"'{word}'::text" in found[name] for word in words)


def test_what_may_happen_once_is_a_unique_index_over_what_happened(engine: Engine) -> None:
    query = (
        "select c.relname, i.indisunique, pg_get_expr(i.indpred, i.indrelid) from pg_index as i "
        "join pg_class as c on c.oid = i.indexrelid where c.relnamespace = 'wallet'::regnamespace"
    )
    found = {name: (unique, str(predicate).strip("()")) for name, unique, predicate in rows(engine, query)}
    assert {name: found[name] for name in ONCE} == {name: (True, predicate) for name, predicate in ONCE.items()}


def test_the_view_of_entries_shows_two_legs_of_each_transaction_and_what_reversed_it(database_url: str) -> None:
    engine, settings = install_users(database_url, rows=2, phase="dual_write")
    adapter = LegacyBalanceAdapter(settings, StaticSource({DUAL_WRITE: True}))
    with engine.begin() as connection:
        one, two = (adapter.credit(connection, key, 5, type="test").transaction_id or 0 for key in (1, 2))
        back = adapter.reverse(connection, one, reason="refund").transaction_id or 0
    query = (
        "select transaction_id, direction, reversed_by from wallet.wallet_entries where transaction_id = any(:ids) "
        "order by transaction_id, direction"
    )
    by = {one: back, two: None, back: None}
    assert rows(engine, query, ids=list(by)) == [
        (which, direction, by[which]) for which in sorted(by) for direction in ("credit", "debit")
    ]


@pytest.mark.parametrize("value", ["0", "-1", "NaN", "Infinity"])
def test_no_amount_is_zero_negative_or_without_end(engine: Engine, value: str) -> None:
    with pytest.raises(DBAPIError, match="amount_check"):
        execute(engine, "select cast(cast(:value as numeric) as wallet.amount)", value=value)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity"])
def test_no_balance_is_without_end(engine: Engine, value: str) -> None:
    with pytest.raises(DBAPIError, match="balance_check"):
        execute(engine, "select cast(cast(:value as numeric) as wallet.balance)", value=value)


def test_no_transaction_goes_from_an_account_to_itself(engine: Engine) -> None:
    """Asked where two owners' accounts can meet: elsewhere one is the system's, whose id is negative."""
    written = (
        "select write_transaction(null, jsonb_populate_record(null::posting, "
        """'{"transaction_id": 1, "amount": 1, "debtor_ledger": 0, "creditor_ledger": 1}'), 7, :credit)"""
    )
    with engine.begin() as connection:
        connection.execute(text("set local search_path = pg_catalog, wallet"))
        with pytest.raises(DBAPIError, match=r'"credit_account".* violates not-null constraint'):
            connection.execute(text(written), {"credit": 7})
