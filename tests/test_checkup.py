"""What doctor finds: each fault is really made, most in a transaction that is rolled back; a healthy place has none."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import Connection

import flag_documents
from capturing import Place
from examining import HOLLOW, JOB, assert_it_can_be_run, connection, place, run
from findings import assert_told
from walletmigrate import doctor
from walletmigrate.flag_sources import FileSource
from walletmigrate.flags import DUAL_WRITE

__all__ = ["connection", "place"]


def test_a_healthy_place_has_no_finding(connection: Connection, place: Place, tmp_path: Path) -> None:
    file = tmp_path / "environment.json"
    file.write_bytes(flag_documents.body(flag_documents.document(DUAL_WRITE)))
    run(connection, "create role bi; grant usage on schema wallet to bi; grant select on wallet.accounts to bi")
    run(connection, "create role shop login; grant wallet_app to shop")
    # A job of a mapping that is no longer configured, which nobody will finish.
    run(connection, JOB.format("failed", 0, "null", 0).replace("'users'", "'gone'"))
    assert doctor.examine(connection, place.settings, FileSource(file), logins=("shop",)) == ()


PROCESS = (
    "insert into wallet.processes (id, name, pid, version, document_id, document_source, document_age_seconds, "
    "problem, seen_at) values (gen_random_uuid(), 'shop', {}, '{}', '{}', 'file', {}, {}, "
    "clock_timestamp() + interval '{} s');"
)
VERIFIED = (
    "insert into wallet.verifications (mapping, started_at, finished_at, clean, form, accounts, missing, "
    "drift_accounts, drift_amount, currency, actor) values ('users', now() - interval '{0}', "
    "now() - interval '{0}', {1}, 'full', 10, 0, 0, 0, 'EUR', 'ana');"
)
SAMPLED = VERIFIED.replace("'full'", "'sample'")
OF_SIDES, OUTSIDE = '{"truth": "legacy", "kind": "legacy"}', '{"truth": "bank.csv", "kind": "file"}'
RECONCILED = (
    "insert into wallet.jobs (kind, mapping, state, actor, reason, version, details, finished_at) values ('reconcile', "
    "'users', 'done', 'ana', 'test', '1', '{{\"options\": {}, \"differences\": {{\"EUR\": {{\"accounts\": {}, "
    '"amount": "12.00"}}}}}}\', clock_timestamp());'
)
OF_DATABASE = "do $$ begin execute format('alter database %I set session_replication_role = replica', {}); end $$"


FAULTS = {
    # What is gone
    "drop sequence wallet.line cascade": ("the sequence wallet.line is missing", "altered"),
    "drop sequence wallet.ceiling": ("the sequence wallet.ceiling is missing", "altered"),
    "drop sequence wallet.transaction_ids": ("the sequence wallet.transaction_ids is missing", "altered"),
    "drop sequence wallet.rejected_users": ('"wallet".rejected_users is missing', "altered"),
    "drop table wallet.failures": ("the table wallet.failures is missing", "altered"),
    "drop view wallet.wallet_entries cascade": ("the view wallet.wallet_entries is missing", "altered"),
    "drop function wallet.cut_users(text, text, integer)": ("wallet.cut_users is missing", "altered"),
    "update wallet.system_accounts set name = 'x' where name = 'transit'": ("account 'transit' of EUR", "altered"),
    "update wallet.system_accounts set balance = balance + 7 where name = 'external'": (
        "the balances of the ledger in EUR come to 7",
        "ledger-imbalance",
    ),
    # What is another than was made
    f"create or replace function wallet.refuse_change() {HOLLOW}": ("refuse_change was replaced", "altered"),
    "alter function wallet.follow_phase() security invoker": ("follow_phase runs as its caller", "altered"),
    "alter function wallet.lock_users(bigint[]) security definer": ("lock_users runs as its owner", "altered"),
    "alter function wallet.set_line(boolean) reset search_path": ("wallet.set_line has not the search_path", "altered"),
    "alter function wallet.fence_users() owner to current_user": ("wallet.fence_users() is postgres's", "altered"),
    "alter table wallet.accounts owner to current_user": ("the table wallet.accounts is postgres's", "altered"),
    "alter sequence wallet.line owner to current_user": ("the sequence wallet.line is postgres's", "altered"),
    "alter schema wallet owner to current_user": ("the schema wallet is postgres's", "altered"),
    "alter table wallet.control disable trigger ceiling": ("the trigger ceiling on wallet.control", "altered"),
    "alter table wallet.idempotency_keys drop constraint idempotency_keys_pkey": (
        "the constraint idempotency_keys_pkey of the ledger wallet is missing",
        "altered",
    ),
    "drop index wallet.transactions_reversed_once": ("the index transactions_reversed_once of the ledger", "altered"),
    "update pg_index set indisvalid = false where indexrelid = 'wallet.transactions_reversed_once'::regclass": (
        "the index transactions_reversed_once of the ledger",
        "altered",
    ),
    "alter table wallet.accounts drop column state_reason": ("the column state_reason of wallet.accounts", "altered"),
    "alter table wallet.transactions add constraint \"no ifs\" check (type <> 'x') not valid": (
        "the constraint no ifs on wallet.transactions is not the ledger's",
        "altered",
    ),
    "create unique index one on wallet.accounts (key)": ("the index one on wallet.accounts is not", "altered"),
    f"create function public.f() {HOLLOW}; create trigger mine before insert on wallet.accounts for each row "
    "execute function public.f()": ("the trigger mine on wallet.accounts is not the ledger's", "altered"),
    # Releases
    "update wallet.schema_version set version_num = '9999'": ("revision 9999, this release has 0001: a ", "releases"),
    "delete from wallet.schema_version": ("revision None, this release has 0001: it was not installed", "releases"),
    "update wallet.mappings set functions_version = 99": ("of version 99, this release makes 1: a newer", "releases"),
    # Rights
    "revoke execute on function wallet.set_line(boolean) from wallet_operator": ("operator lacks execute", "rights"),
    "revoke select on wallet.line from wallet_app": ('wallet_app lacks select on sequence "wallet"."line"', "rights"),
    "revoke usage on schema wallet from wallet_auditor": ("wallet_auditor lacks usage on schema", "rights"),
    "revoke insert on wallet.transactions from wallet_owner": ("wallet_owner lacks insert on table", "rights"),
    "revoke select on public.users from wallet_auditor": ("wallet_auditor lacks select on public.users", "rights"),
    "revoke usage on schema public from public, wallet_operator": ("operator lacks usage on schema public", "rights"),
    "alter table users enable row level security": ("has row-level security, and wallet_owner no policy", "rights"),
    "grant select on wallet.accounts to public": ('PUBLIC has select on table "wallet"."accounts"', "rights"),
    "grant execute on function wallet.set_line(boolean) to public": ("PUBLIC has execute on function", "rights"),
    "grant create on schema wallet to public": ("PUBLIC has create on schema", "rights"),
    "grant update (balance) on wallet.accounts to wallet_app": ("wallet_app has update on table", "rights"),
    "create role bi; grant delete on wallet.failures to bi": ('bi has delete on table "wallet"."failures"', "rights"),
    "alter role wallet_owner login": ("wallet_owner can log in", "rights"),
    # Sessions in which the application's triggers do not fire
    OF_DATABASE.format("current_database()"): ("begin with session_replication_role=replica", "bypass-writes"),
    "alter role wallet_app set session_replication_role = local": ("role \"wallet_app\" begin with", "bypass-writes"),
    "set local session_replication_role = replica": ("every session begins with session_replication_role", "bypass-"),
    # What runs
    "alter sequence wallet.line restart with 2": ("the line is stopped", "line-stopped"),
    JOB.format("failed", 0, "null", 0): ("of users has failed", "job-failed"),
    JOB.format("paused", 0, "null", 0): ("of users is paused since", "backfill-stalled"),
    JOB.format("running", 0, "null", 61): ("has committed no batch since", "backfill-stalled"),
    JOB.format("running", 0, "'replica lag'", 1): ("of users waits: replica lag", "backfill-stalled"),
    JOB.format("running", 0, "'replica lags'", 61): ("has committed no batch since", "backfill-stalled"),
    JOB.format("done", 3, "null", 0): ("has set 3 accounts aside", "job-failed"),
    VERIFIED.format("1 h", "true") + VERIFIED.format("1 min", "false"): ("found differences", "balance-drift"),
    VERIFIED.format("2 h", "true") + SAMPLED.format("1 h", "false"): ("no full one came after it", "balance-drift"),
    SAMPLED.format("1 h", "false"): ("sample verification of 'users' found differences, and no", "balance-drift"),
    VERIFIED.format("2 h", "true") + RECONCILED.format(OUTSIDE, 3): ("with bank.csv left 3 accounts", "balance-drift"),
    VERIFIED.format("2 h", "true") + RECONCILED.format(OF_SIDES, 3): ("with legacy left 3 accounts", "balance-drift"),
    VERIFIED.format("27 h", "true"): ("'users' within 26 h: the last is 27 h old", "verification-stale"),
    "update wallet.control set phase = 'read_ledger', changed_at = now() - interval '27 h'": (
        "'users' within 26 h: there never was one",
        "verification-stale",
    ),
    # Processes
    PROCESS.format(7, "1", "a", 0, "null", 0) + PROCESS.format(8, "1", "b", 0, "null", 0): (
        "different flag documents: a: shop (pid 7); b: shop (pid 8)",
        "flag-disagreement",
    ),
    PROCESS.format(7, "1", "a", 0, "null", 0) + PROCESS.format(8, "2", "a", 0, "null", 0): (
        "different releases: 1: shop (pid 7); 2: shop (pid 8)",
        "releases",
    ),
    PROCESS.format(7, "1", "a", 301, "null", 0): ("shop (pid 7) were last confirmed 301 s ago", "flags-stale"),
    PROCESS.format(7, "1", "a", 0, "'no such file'", 0): ("shop (pid 7) cannot read its flags: no ", "flags-stale"),
    PROCESS.format(7, "1", "a", 0, "null", 90): ("s in the future: the database's clock went back", "clocks"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_found_with_its_runbook(connection: Connection, place: Place, fault: str) -> None:
    what, runbook = FAULTS[fault]
    run(connection, fault)
    found = doctor.examine(connection, place.settings)
    assert [one for one in found if what in one.what and runbook in one.runbook and one.mend], found
    assert_told(found)
    assert_it_can_be_run(found)


@pytest.mark.parametrize("state", ["failed", "paused"])
@pytest.mark.parametrize(
    ("kind", "mapping", "details", "again"),
    [
        ("reconcile", "users", "{}", "reconcile --all --mapping users"),
        ("reconcile", "users", '{"options": {"truth": "legacy"}}', "reconcile --all --mapping users"),
        (
            "reconcile",
            "users",
            '{"options": {"truth": "a b.csv", "tolerance": "0.50", "correct_up_to": "1.00", "create_missing": "True"}}',
            "reconcile --all --mapping users --truth 'a b.csv' --tolerance 0.50 --create-missing",
        ),
        ("reconcile undo", "users", '{"undoes": 7}', "reconcile undo 7"),
        ("backfill undo", "users", '{"of": 7}', "backfill undo --job 7"),
        ("snapshot take", "(all)", "{}", "snapshot take"),
    ],
)
def test_what_goes_on_with_a_job_can_be_run_as_it_is_shown(
    connection: Connection, place: Place, kind: str, mapping: str, details: str, again: str, state: str
) -> None:
    row = JOB.format(state, 0, "null", 0).replace("'backfill', 'users'", f"'{kind}', '{mapping}'")
    run(connection, row)
    run(connection, f"update wallet.jobs set details = details || '{details}'")
    (found,) = doctor.examine(connection, place.settings)
    assert f"walletmigrate {again} --reason '…'" in found.mend
    assert_it_can_be_run([found])


@pytest.mark.parametrize(
    ("kind", "names"), [("reconcile", "reconcile show"), ("reconcile undo", "reconcile undo"), ("freeze", "jobs show")]
)
def test_accounts_that_were_set_aside_are_named_by_the_command_that_is_shown(
    connection: Connection, place: Place, kind: str, names: str
) -> None:
    run(connection, JOB.format("done", 3, "null", 0).replace("'backfill'", f"'{kind}'"))
    run(connection, """update wallet.jobs set details = '{"undoes": 7}'""")
    (found,) = doctor.examine(connection, place.settings)
    assert found.mend.startswith(f"walletmigrate {names} ")
    assert_it_can_be_run([found])


@pytest.mark.parametrize(
    "harmless",
    [
        JOB.format("failed", 0, "null", 0) + "; " + JOB.format("done", 0, "null", 0),
        JOB.format("running", 0, "null", 30),
        JOB.format("cancelled", 5, "null", 0),
        VERIFIED.format("25 h", "true"),
        VERIFIED.format("2 h", "false") + VERIFIED.format("1 h", "true"),
        VERIFIED.format("3 h", "true") + SAMPLED.format("2 h", "false") + VERIFIED.format("1 h", "true"),
        RECONCILED.format(OUTSIDE, 3) + RECONCILED.format(OUTSIDE, 0),
        RECONCILED.format(OF_SIDES, 3) + VERIFIED.format("-1 s", "true"),
        RECONCILED.format(OUTSIDE, 3).replace("'users'", "'gone'"),
        "update wallet.control set phase = 'read_ledger', changed_at = now() - interval '25 h'",
        PROCESS.format(7, "1", "a", 299, "null", 0) + PROCESS.format(8, "2", "b", 0, "null", -61),
        "alter role wallet_app set session_replication_role = origin",
        "create index report on wallet.transactions (posted_at)",
    ],
)
def test_what_is_in_order_is_not_found(connection: Connection, place: Place, harmless: str) -> None:
    run(connection, harmless)
    assert doctor.examine(connection, place.settings) == ()


def test_in_phase_legacy_what_was_found_before_is_not_told_as_the_alert_has_it(
    connection: Connection, place: Place
) -> None:
    old = VERIFIED.format("2 h", "true") + VERIFIED.format("1 h", "false") + RECONCILED.format(OUTSIDE, 3)
    run(connection, old)
    drift = [one.what for one in doctor.examine(connection, place.settings) if "balance-drift" in one.runbook]
    assert len(drift) == 2
    run(connection, "update wallet.control set phase = 'legacy'")
    assert not [one for one in doctor.examine(connection, place.settings) if "balance-drift" in one.runbook]
