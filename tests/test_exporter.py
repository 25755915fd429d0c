"""What the exporter finds in a real database, fact by fact."""

from __future__ import annotations

import math
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest
from prometheus_client import CollectorRegistry
from sqlalchemy import Engine, event, text

from exporting import (
    EXPORTED,
    POSTINGS,
    SCHEMA,
    SCOPE,
    Execute,
    engine_of,
    executing,
    facts,
    install,
    of,
    samples,
)
from ledger import ACT, install_users, unguarded
from walletmigrate.backfill import backfill
from walletmigrate.exporter import DatabaseFacts
from walletmigrate.facts import JOB_KINDS, PHASES, STATES, TREATMENTS, WHOLE_KINDS
from walletmigrate.observe import FLAGS, PrometheusObserver
from walletmigrate.verify import verify

NO_JOBS = {kind + name: 0 for kind in JOB_KINDS for name in ("shops", "users")} | {
    kind + "(all)": 0 for kind in WHOLE_KINDS
}


@pytest.fixture
def ledger(database_url: str) -> str:
    """The URL of a database with a ledger that has seen nothing yet."""
    install(database_url)
    return database_url


@pytest.fixture
def execute(database_url: str) -> Iterator[Execute]:
    with executing(database_url) as made:
        yield made


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    made = engine_of(database_url)
    yield made
    made.dispose()


def test_a_fresh_ledger_shows_every_label_set_at_zero_and_the_phase_legacy(ledger: str, engine: Engine) -> None:
    seen = facts(engine)
    assert {name for name, _ in seen} == EXPORTED
    assert of(seen, "bypass_writes_total") == dict.fromkeys(TREATMENTS, 0)
    assert of(seen, "phase") == dict.fromkeys(PHASES, 0) | {"legacy": 1}
    assert of(seen, "accounts") == dict.fromkeys(STATES, 0)
    assert of(seen, "mismatch_total") == {"verify": 0}
    assert of(seen, "flag_rollout_ratio") == dict.fromkeys(FLAGS, 0)
    for name in ("drift_accounts", "drift_amount", "ledger_imbalance"):
        assert of(seen, name) == {"EUR": 0, "USD": 0}
    for name in ("job_items", "job_failed", "job_paused", "job_remaining", "job_batch_seconds"):
        assert of(seen, name) == NO_JOBS
    for name in ("line_stopped", "flag_documents", "verification_last_success_timestamp_seconds"):
        assert of(seen, name) == {"": 0}


def test_each_phase_shows_as_the_only_one(ledger: str, engine: Engine, execute: Execute) -> None:
    for phase in PHASES:
        execute(f"update control set phase = '{phase}'")
        assert of(facts(engine), "phase") == dict.fromkeys(PHASES, 0) | {phase: 1}


def test_the_states_are_those_of_the_ledger_and_absent(ledger: str, engine: Engine) -> None:
    with engine.connect() as connection:
        known = connection.scalars(text("select unnest(enum_range(null::wallet.account_state))::text"))
        assert {*known, "absent"} == set(STATES)


def test_a_stopped_line_shows_until_it_runs_again(ledger: str, engine: Engine, execute: Execute) -> None:
    execute("select set_line(false)")
    assert of(facts(engine), "line_stopped") == {"": 1}
    execute("select set_line(true)")
    assert of(facts(engine), "line_stopped") == {"": 0}


def test_accounts_are_counted_by_state_and_a_balanced_ledger_sums_to_zero(
    ledger: str, engine: Engine, execute: Execute
) -> None:
    execute(POSTINGS)
    seen = facts(engine)
    assert of(seen, "accounts") == {"absent": 0, "mirrored": 2, "stale": 1, "frozen": 1, "closed": 0}
    assert of(seen, "ledger_imbalance") == {"EUR": 0, "USD": 0}


def test_a_balance_without_a_transaction_shows_as_an_imbalance_of_its_currency(
    ledger: str, engine: Engine, execute: Execute
) -> None:
    execute(POSTINGS)
    execute("update accounts set balance = balance + 0.01 where key = '1'")
    assert of(facts(engine), "ledger_imbalance") == {"EUR": 0.01, "USD": 0}


def test_all_facts_are_of_one_moment_although_postings_commit_in_between(
    ledger: str, engine: Engine, execute: Execute
) -> None:
    execute(POSTINGS)

    def post_behind_its_back(_connection: object, _cursor: object, statement: str, *_rest: object) -> None:
        if "system_balances" in statement:
            execute(
                "update accounts set balance = balance + 1 where key = '1';"
                "insert into transactions (id, debit_account, credit_account, kind, amount, currency, type)"
                " values (3, -2, 1, 'posting', 1, 'EUR', 'deposit')"
            )

    event.listen(engine, "before_cursor_execute", post_behind_its_back)
    assert of(facts(engine), "ledger_imbalance") == {"EUR": 0, "USD": 0}
    event.remove(engine, "before_cursor_execute", post_behind_its_back)
    execute("update accounts set balance = balance - 1 where key = '1'")  # the posting did happen
    assert of(facts(engine), "ledger_imbalance") == {"EUR": -1, "USD": 0}


VERIFICATION = """
insert into verifications (mapping, currency, started_at, finished_at, clean, form, accounts, missing,
    drift_accounts, drift_amount, actor)
values ('{}', '{}', '{}', '{}', {}, '{}', 9, {}, {}, {}, 'test')
"""


def verified(
    mapping: str,
    currency: str,
    hour: int,
    *,
    missing: int = 0,
    drift: tuple[int, str] = (0, "0"),
    form: str = "full",
) -> str:
    at = f"2030-01-01 {hour:02}:00Z"
    clean = str(not missing and not drift[0]).lower()
    return VERIFICATION.format(mapping, currency, at, at, clean, form, missing, *drift)


def unix(hour: int) -> float:
    return datetime(2030, 1, 1, hour, tzinfo=UTC).timestamp()


def test_drift_and_absent_accounts_are_those_of_each_mappings_last_full_verification(
    ledger: str, engine: Engine, execute: Execute
) -> None:
    execute(verified("users", "EUR", 1, missing=50, drift=(40, "400")))
    execute(verified("users", "EUR", 2, missing=5, drift=(4, "12.34")))
    execute(verified("users", "EUR", 3, form="sample"))  # a clean sample does not clear what it did not look at
    execute(verified("shops", "USD", 2, missing=1, drift=(1, "0.01")))
    execute(verified("gone", "EUR", 4, missing=1000, drift=(1000, "1000")))  # no longer configured
    seen = facts(engine)
    assert of(seen, "drift_accounts") == {"EUR": 4, "USD": 1}
    assert of(seen, "drift_amount") == {"EUR": 12.34, "USD": 0.01}
    assert of(seen, "accounts")["absent"] == 6


def test_the_last_success_is_that_of_the_mapping_that_waits_longest(
    ledger: str, engine: Engine, execute: Execute
) -> None:
    name = "verification_last_success_timestamp_seconds"
    execute(verified("users", "EUR", 1))
    assert of(facts(engine), name) == {"": 0}, "shops was never verified"
    execute(verified("shops", "USD", 2))
    assert of(facts(engine), name) == {"": unix(1)}
    execute(verified("users", "EUR", 3))
    assert of(facts(engine), name) == {"": unix(2)}
    execute(verified("shops", "USD", 4, drift=(1, "1")))
    execute(verified("shops", "USD", 5, form="sample"))
    assert of(facts(engine), name) == {"": 1}, "a failure voids what was clean before it, and a sample is no success"
    execute(verified("shops", "USD", 6))
    assert of(facts(engine), name) == {"": unix(3)}
    execute(verified("users", "EUR", 7, form="sample", drift=(1, "1")))
    assert of(facts(engine), name) == {"": 1}, "a sample that finds something voids as well"
    assert of(facts(engine), "drift_accounts") == {"EUR": 1, "USD": 0}
    execute(verified("users", "EUR", 8, form="incremental", drift=(1, "0.50")))
    assert of(facts(engine), "drift_amount") == {"EUR": 1, "USD": 0}, (
        "later runs raise what is told, and never lower it"
    )
    execute(verified("users", "EUR", 9))
    assert of(facts(engine), name) == {"": unix(6)}
    assert of(facts(engine), "drift_accounts") == {"EUR": 0, "USD": 0}


def test_a_voided_verification_is_not_hidden_by_a_mapping_that_was_never_verified(
    ledger: str, engine: Engine, execute: Execute
) -> None:
    name = "verification_last_success_timestamp_seconds"
    execute(verified("users", "EUR", 1, missing=1))
    assert of(facts(engine), name) == {"": 0}, "never clean: there may be a backfill to do"
    execute(verified("users", "EUR", 2))
    execute(verified("users", "EUR", 3).replace(", true, ", ", false, "))  # nothing differs: a guard was found down
    seen = facts(engine)
    assert (of(seen, name), of(seen, "drift_accounts")) == ({"": 1}, {"EUR": 0, "USD": 0})


def test_mismatches_are_counted_once_for_each_verification_that_met_them_and_never_fall(
    ledger: str, engine: Engine, execute: Execute
) -> None:
    def counted() -> float:
        return of(facts(engine), "mismatch_total")["verify"]

    execute(verified("users", "EUR", 1, missing=7))
    assert counted() == 0, "an account that is missing is behind, and does not differ"
    execute(verified("users", "EUR", 2, drift=(2, "10")) + ";" + verified("shops", "USD", 2, drift=(3, "10")))
    assert counted() == 5
    execute(verified("users", "EUR", 3, form="sample", drift=(1, "1")))
    execute(verified("users", "EUR", 4, form="incremental", drift=(1, "1")))
    assert counted() == 7
    execute(verified("users", "EUR", 5) + ";" + verified("shops", "USD", 5))
    execute(verified("gone", "EUR", 6, drift=(10, "1")))
    seen = samples(DatabaseFacts(engine, SCHEMA, {("shops", "USD")}))
    assert of(seen, "mismatch_total") == {"verify": 17}, "a mapping that leaves the configuration takes nothing along"


def test_a_verification_by_the_command_shows_in_the_next_scrape(database_url: str) -> None:
    engine, settings = install_users(database_url, rows=5, phase="dual_write")
    backfill(engine, settings, settings.mapping(None), ACT)
    with unguarded(engine, "public.users") as connection:
        connection.exec_driver_sql("update users set total_coins = 90 where id in (1, 2)")
    found = verify(engine, settings, settings.mapping(None), ACT, dry_run=True)
    assert (found.drift_accounts, of(facts(engine), "mismatch_total")) == (2, {"verify": 0}), "nothing is on record"
    verify(engine, settings, settings.mapping(None), ACT)
    assert of(facts(engine), "mismatch_total") == {"verify": 2}


def test_what_processes_count_and_what_the_exporter_counts_are_different_series(ledger: str, engine: Engine) -> None:
    registry = CollectorRegistry()
    PrometheusObserver(registry)
    processes = {
        (sample.name, tuple(sorted(sample.labels.items())))
        for family in registry.collect()
        for sample in family.samples
    }
    exporters = {
        (sample.name, tuple(sorted(sample.labels.items())))
        for family in DatabaseFacts(engine, SCHEMA, SCOPE).collect()
        for sample in family.samples
    }
    assert not processes & exporters
    name = "walletmigrate_mismatch_total"
    places = {labels[0][1] for metric, labels in processes | exporters if metric == name}
    assert places == {"write", "read", "verify"}


def job(kind: str, mapping: str, state: str, total: str, done: int, failed: int = 0) -> str:
    return (
        "insert into jobs"
        " (kind, mapping, state, actor, reason, version, items_total, items_done, items_failed)"
        f" values ('{kind}', '{mapping}', '{state}', 'test', 'test', '0', {total}, {done}, {failed})"
    )


def test_jobs_show_the_newest_of_each_kind_and_mapping(ledger: str, engine: Engine, execute: Execute) -> None:
    execute(job("backfill", "users", "failed", "999", 999, 999))  # superseded by the next
    execute(job("backfill", "users", "running", "100", 30, 2))
    execute(job("backfill", "shops", "paused", "10", 4))
    execute(job("backfill", "gone", "failed", "1000", 500, 500))  # no longer configured
    execute(
        job("snapshot take", "users", "done", "6", 6)
        + ";update jobs set mapping = '(all)' where kind = 'snapshot take'"
    )
    execute(job("freeze", "users", "failed", "10", 0))  # failed before any item did
    execute(job("unfreeze", "users", "done", "7", 5))  # two rows went away meanwhile
    execute(job("archive", "users", "running", "3", 1))
    seen = facts(engine)
    zero = NO_JOBS | {"archiveusers": 0}
    items = {"backfillusers": 30, "backfillshops": 4, "unfreezeusers": 5, "archiveusers": 1, "snapshot take(all)": 6}
    assert of(seen, "job_items") == zero | items
    assert of(seen, "job_failed") == zero | {"backfillusers": 2, "freezeusers": 1}
    assert of(seen, "job_paused") == zero | {"backfillshops": 1}
    left = {"backfillusers": 68, "backfillshops": 6, "freezeusers": 10, "archiveusers": 2}
    assert of(seen, "job_remaining") == zero | left


def test_a_job_that_stands_still_is_told_apart_from_one_of_another_mapping_that_goes_on(
    ledger: str, engine: Engine, execute: Execute
) -> None:
    execute(job("backfill", "users", "running", "100", 30))
    execute(job("backfill", "shops", "running", "100", 30))
    before = of(facts(engine), "job_items")
    execute("update jobs set items_done = items_done + 5 where mapping = 'shops'")
    moved = {name for name, items in of(facts(engine), "job_items").items() if items != before[name]}
    assert moved == {"backfillshops"}


def test_a_job_that_was_given_up_has_failed_no_more_and_leaves_nothing(
    ledger: str, engine: Engine, execute: Execute
) -> None:
    execute(job("backfill", "users", "failed", "100", 30, 2))
    assert of(facts(engine), "job_failed")["backfillusers"] == 2
    execute("update jobs set state = 'cancelled'")
    seen = facts(engine)
    assert (of(seen, "job_failed")["backfillusers"], of(seen, "job_remaining")["backfillusers"]) == (0, 0)


def test_a_job_that_is_held_is_paused_until_nobody_says_so_any_more(
    ledger: str, engine: Engine, execute: Execute
) -> None:
    execute(job("backfill", "users", "running", "100", 30))
    execute("update jobs set held = 'replica lag', held_at = clock_timestamp()")
    assert of(facts(engine), "job_paused")["backfillusers"] == 1
    execute("update jobs set updated_at = clock_timestamp() - interval '61 s'")
    assert of(facts(engine), "job_paused")["backfillusers"] == 0, "its process is gone: the alert must fire"


def test_what_remains_of_a_job_of_unknown_size_is_not_zero(ledger: str, engine: Engine, execute: Execute) -> None:
    execute(job("backfill", "users", "running", "null", 30))
    assert math.isnan(of(facts(engine), "job_remaining")["backfillusers"])
