"""What doctor finds: each fault is really made, most in a transaction that is rolled back; a healthy place has none."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from pydantic import SecretStr
from sqlalchemy import Connection

import flag_documents
import flagsmith_stub
from capturing import Place
from commandline import Project, parsed
from findings import ROOT, assert_told
from ledger import ACT, execute, install_users
from servers import Postgres
from walletmigrate import Settings, checkup_tables, connect, doctor
from walletmigrate.config import ExporterSettings, Roles
from walletmigrate.doctor import Finding
from walletmigrate.errors import UsageError
from walletmigrate.exporter import serve
from walletmigrate.flag_server import FlagsmithSource
from walletmigrate.flag_sources import FileSource
from walletmigrate.flags import DUAL_WRITE, READ_FROM_LEDGER
from walletmigrate.heartbeat import Heartbeat
from walletmigrate.install import install


@pytest.fixture(scope="module")
def place(server: Postgres) -> Iterator[Place]:
    with connect.scratch_database(server.url) as url:
        yield Place(url)


@pytest.fixture
def connection(place: Place) -> Iterator[Connection]:
    """A transaction that is rolled back, so that a fault made in it is gone afterwards."""
    with place.engine.connect() as connection:
        yield connection
        connection.rollback()


def run(connection: Connection, statements: str) -> None:
    connection.exec_driver_sql(statements, execution_options={"no_parameters": True})


def test_a_healthy_place_has_no_finding(connection: Connection, place: Place, tmp_path: Path) -> None:
    file = tmp_path / "environment.json"
    file.write_bytes(flag_documents.body(flag_documents.document(DUAL_WRITE)))
    run(connection, "create role bi; grant usage on schema wallet to bi; grant select on wallet.accounts to bi")
    run(connection, "create role shop login; grant wallet_app to shop")
    # A job of a mapping that is no longer configured, which nobody will finish.
    run(connection, JOB.format("failed", 0, "null", 0).replace("'users'", "'gone'"))
    assert doctor.examine(connection, place.settings, FileSource(file), logins=("shop",)) == ()


HOLLOW = "returns trigger language plpgsql set search_path = pg_catalog, pg_temp as 'begin return new; end'"
JOB = (
    "insert into wallet.jobs (kind, mapping, state, actor, reason, version, items_failed, held, updated_at) "
    "values ('backfill', 'users', '{}', 'ana', 'test', '1', {}, {}, clock_timestamp() - interval '{} s')"
)
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


def assert_it_can_be_run(found: Sequence[Finding]) -> None:
    """Each command in what mends has its options, known and whole, and its reason."""
    for one in found:
        for command in re.findall(r"walletmigrate [a-z][^;#,]*", one.mend):
            assert parsed(command), one


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


def test_the_constraints_and_triggers_that_doctor_looks_for_are_those_of_a_fresh_schema(
    connection: Connection, place: Place
) -> None:
    table = "join pg_class as c on c.oid = {} where c.relnamespace = 'wallet'::regnamespace"
    kinds = "and x.contype in ('p', 'u', 'c', 'f', 'x')"
    constraints = f"select conname from pg_constraint as x {table.format('x.conrelid')} {kinds}"
    assert set(connection.exec_driver_sql(constraints).scalars()) == checkup_tables.CONSTRAINTS
    triggers = f"select tgname from pg_trigger as x {table.format('x.tgrelid')} and not tgisinternal"
    assert set(connection.exec_driver_sql(triggers).scalars()) == checkup_tables.TRIGGERS


def test_the_tables_of_another_release_are_not_held_against_this_one_s(connection: Connection, place: Place) -> None:
    run(
        connection, "drop index wallet.transactions_reversed_once; alter table wallet.accounts drop column state_reason"
    )
    assert len(doctor.examine(connection, place.settings)) == 2
    run(connection, "update wallet.schema_version set version_num = '9999'")
    (found,) = doctor.examine(connection, place.settings)
    assert "a newer release was installed" in found.what


def test_what_is_not_the_ledger_s_goes_by_the_command_that_is_shown(connection: Connection, place: Place) -> None:
    run(connection, f"create function public.f() {HOLLOW}; create unique index one on wallet.accounts (key, id)")
    run(connection, 'create trigger "My own" before insert on wallet.jobs for each row execute function public.f()')
    run(connection, "alter table wallet.transactions add constraint no_x check (type <> 'x') not valid")
    found = doctor.examine(connection, place.settings)
    assert len(found) == 3
    for one in found:
        run(connection, one.mend.rpartition(": ")[2])
    assert doctor.examine(connection, place.settings) == ()


def test_every_runbook_that_doctor_can_name_exists() -> None:
    named = set()
    for file in (ROOT / "src" / "walletmigrate").glob("checkup*.py"):
        named |= set(re.findall(r'"([\w-]+/[\w-]+\.md)"', file.read_text(encoding="utf-8")))
    assert len(named) > 8
    assert [one for one in sorted(named) if not (ROOT / one).is_file() or not one.startswith("runbooks/")] == []


def test_a_role_that_is_not_there_is_found(connection: Connection, place: Place) -> None:
    other = place.settings.model_copy(update={"roles": Roles(app="nobody_app")})
    assert "there is no role 'nobody_app'" in [one.what for one in doctor.examine(connection, other)]


def test_a_login_of_the_application_must_be_a_member_of_its_role(connection: Connection, place: Place) -> None:
    run(connection, "create role shop login")
    found = doctor.examine(connection, place.settings, logins=("shop", "shopp"))
    assert [one.what for one in found] == [
        "shop is no member of wallet_app: its postings are refused",
        "there is no role 'shopp'",
    ]
    assert_told(found)
    run(connection, found[0].mend)
    assert doctor.examine(connection, place.settings, logins=("shop",)) == ()


def test_two_mappings_share_functions_and_a_fault_of_them_is_found_once(database_url: str) -> None:
    engine, settings = install_users(database_url)
    execute(engine, "create table shops (id bigint primary key, credit numeric(20, 2) not null)")
    column = settings.mappings[0].columns[0].model_copy(update={"column": "credit"})
    shops = settings.mappings[0].model_copy(
        update={"name": "shops", "table": "public.shops", "traits": {}, "columns": (column,)}
    )
    both = settings.model_copy(update={"mappings": (*settings.mappings, shops)})
    install(engine, both, ACT)
    with engine.connect() as connection:
        assert doctor.examine(connection, both) == ()
        run(connection, "alter function wallet.bring_up rename to other")
        assert [one.what for one in doctor.examine(connection, both)] == ["the function wallet.bring_up is missing"]


# What mends a fault does


def test_a_sequence_that_was_dropped_is_made_anew_by_what_doctor_says(database_url: str) -> None:
    place = Place(database_url)
    last = "select last_value from wallet.{}"
    with place.engine.connect() as connection:
        before = {
            n: connection.exec_driver_sql(last.format(n)).scalar() for n in ("line", "ceiling", "transaction_ids")
        }
    for name, value in before.items():
        execute(place.engine, f"drop sequence wallet.{name} cascade")
        with place.engine.connect() as connection:
            (found,) = doctor.examine(connection, place.settings)
        match = re.fullmatch(r"in psql, as a superuser: (.*;) then: walletmigrate install --reason '…'", found.mend)
        assert match is not None
        with place.engine.begin() as connection:
            run(connection, match[1])
        install(place.engine, place.settings, ACT)
        with place.engine.connect() as connection:
            assert doctor.examine(connection, place.settings) == ()
            assert connection.exec_driver_sql(last.format(name)).scalar() == value


@pytest.mark.parametrize(
    "fault",
    [
        "alter function wallet.lock_users(bigint[]) security definer",
        "drop function wallet.cut_users(text, text, integer)",
        "revoke execute on function wallet.set_line(boolean) from wallet_operator",
        "drop sequence wallet.rejected_users",
    ],
)
def test_what_install_is_said_to_mend_it_mends(database_url: str, fault: str) -> None:
    place = Place(database_url)
    execute(place.engine, fault)
    with place.engine.connect() as connection:
        (found,) = doctor.examine(connection, place.settings)
    assert found.mend.startswith("walletmigrate install --reason")
    install(place.engine, place.settings, ACT)
    with place.engine.connect() as connection:
        assert doctor.examine(connection, place.settings) == ()


# Flags, clocks, statistics


def test_flags_that_cannot_be_read_are_found(connection: Connection, place: Place, tmp_path: Path) -> None:
    file = tmp_path / "environment.json"
    document = flag_documents.document(READ_FROM_LEDGER)
    for content, what in (
        (json.dumps(document), "wallet.dualWrite is not: it counts as off"),
        (json.dumps({**document, "feature_states": document["feature_states"][:2]}), "wallet.enableWithdrawals"),
        ("{", "environment.json"),
        (None, "environment.json"),
    ):
        file.unlink() if content is None else file.write_text(content, encoding="utf-8")
        found = doctor.examine(connection, place.settings, FileSource(file))
        assert any(what in one.what for one in found), found
        assert_told(found)


def test_flags_that_no_process_decides_by_are_found(place: Place, tmp_path: Path) -> None:
    file, other = tmp_path / "environment.json", tmp_path / "other.json"
    for one in (file, other):
        one.write_bytes(flag_documents.body(flag_documents.document(DUAL_WRITE)))
    beats = Heartbeat(place.settings, FileSource(other, check_seconds=0))

    def found() -> list[str]:
        beats.beat()
        with place.engine.connect() as connection:
            told = doctor.examine(connection, place.settings, FileSource(file))
        assert_told(told)
        return [one.what for one in told]

    try:
        assert found() == []
        file.write_bytes(flag_documents.body(flag_documents.document(DUAL_WRITE, READ_FROM_LEDGER)))
        what = f"no process decides by the flags that this command reads from file {file}; theirs are of file {other}"
        assert found() == [what]
        other.write_bytes(file.read_bytes())
        assert found() == []
        other.write_text("{", encoding="utf-8")
        file.write_bytes(flag_documents.body(flag_documents.document(DUAL_WRITE)))
        assert [one for one in found() if "no process" in one] == []
    finally:
        execute(place.engine, "delete from wallet.processes")


def test_a_flagsmith_server_that_lacks_a_flag_or_does_not_answer_is_found(connection: Connection, place: Place) -> None:
    with flagsmith_stub.running() as server:
        whole, lacking = (FlagsmithSource(server.api_url, flagsmith_stub.ENVIRONMENT_KEY) for _ in range(2))
        assert doctor.examine(connection, place.settings, whole) == ()
        del server.project.features[server.flag(READ_FROM_LEDGER)]
        found = doctor.examine(connection, place.settings, lacking)
        assert [READ_FROM_LEDGER in one.what for one in found] == [True]
        assert_told(found)
    found = doctor.examine(connection, place.settings, FlagsmithSource(server.api_url, flagsmith_stub.ENVIRONMENT_KEY))
    assert [one.runbook for one in found] == ["runbooks/flags-stale.md"]
    assert_told(found)


@pytest.mark.parametrize(("off", "said"), [(60, "60 s behind this machine's"), (-60, "60 s ahead of this machine's")])
def test_a_clock_that_is_off_is_found(connection: Connection, place: Place, off: int, said: str) -> None:
    """The clock of a machine that runs tests is not set: doctor takes it as a function."""
    found = doctor.examine(connection, place.settings, now=lambda: time.time() + off)
    assert [one.what for one in found] == [f"the database's clock is {said}"]
    assert_told(found)
    assert doctor.examine(connection, place.settings, now=lambda: time.time() + off / 20) == ()


def test_statistics_that_are_missing_or_old_are_found_and_analyze_mends_them(database_url: str) -> None:
    place = Place(database_url)
    grow = (
        "insert into wallet.accounts (mapping, key, bucket, currency, state, balance) "
        "select 'users', 'x' || g, 'cash', 'EUR', 'stale', 0 from generate_series(1, 10000) as g"
    )

    def found() -> list[Finding]:
        with place.engine.connect() as connection:
            return [one for one in doctor.examine(connection, place.settings) if "analyse" in one.what]

    def flushed(statement: str) -> None:
        with place.engine.begin() as connection:
            run(connection, statement)
            run(connection, "select pg_stat_force_next_flush()")

    execute(place.engine, "alter table wallet.accounts set (autovacuum_enabled = off)")
    flushed(grow)
    (one,) = found()
    assert "was never analysed, and has about 100" in one.what
    assert_told([one])
    flushed(one.mend.rpartition(": ")[2])
    assert found() == []
    for _ in range(2):
        flushed("update wallet.accounts set state_reason = 'test'")
    (one,) = found()
    assert "has changed more than all its rows" in one.what
    assert_told([one])


# The exporter


class Stranger(BaseHTTPRequestHandler):
    """Some other server."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"hello\n")

    def log_request(self, *_: object) -> None:
        """Nothing."""


def of_exporter(connection: Connection, settings: Settings, port: int) -> list[str]:
    found = doctor.examine(connection, settings, exporter=f"http://127.0.0.1:{port}")
    assert {one.runbook for one in found} <= {"runbooks/exporter-down.md"}
    assert_told(found)
    return [one.what for one in found]


def test_an_exporter_that_is_down_blind_or_another_s_is_found(
    connection: Connection, place: Place, database_url: str
) -> None:
    served = serve(place.settings, 0)
    try:
        assert of_exporter(connection, place.settings, served.port) == []
        run(connection, "update wallet.control set phase = 'read_ledger'")
        (what,) = of_exporter(connection, place.settings, served.port)
        assert "serves phase dual_write, and the phase is read_ledger" in what
        connection.rollback()
    finally:
        served.close()
    (what,) = of_exporter(connection, place.settings, served.port)
    assert "does not answer" in what
    blind = serve(
        Settings(database_url=SecretStr(database_url), mappings=place.settings.mappings), 0
    )  # nothing is installed there
    try:
        (what,) = of_exporter(connection, place.settings, blind.port)
        assert "does not reach its database" in what
    finally:
        blind.close()


def test_what_is_no_exporter_is_found(connection: Connection, place: Place) -> None:
    stranger = ThreadingHTTPServer(("127.0.0.1", 0), Stranger)
    thread = Thread(target=stranger.serve_forever)
    thread.start()
    try:
        (what,) = of_exporter(connection, place.settings, stranger.server_port)
    finally:
        stranger.shutdown()
        stranger.server_close()
        thread.join()
    assert "is no exporter of walletmigrate" in what


@pytest.mark.parametrize("url", ["nowhere", "file:///etc/passwd", "http://"])
def test_an_address_that_is_none_is_refused(connection: Connection, place: Place, url: str) -> None:
    with pytest.raises(UsageError, match="--exporter"):
        doctor.examine(connection, place.settings, exporter=url)


# The command


def test_the_command_looks_at_flags_logins_and_the_exporter(database_url: str, tmp_path: Path) -> None:
    Place(database_url)
    project = Project(tmp_path, database_url)
    said = project.run("doctor")
    assert (said.exit_code, said.stderr) == (0, "")
    assert said.stdout.startswith("note: no process has a heartbeat, ")
    assert said.stdout.endswith("everything else is as it should be\n")
    Heartbeat(project.settings, FileSource(project.flag_path)).beat()
    project.flags.set(READ_FROM_LEDGER, True, trait=("tenant", "acme"))
    said = project.run("doctor", "--exporter", "http://127.0.0.1:1", "--login", "nobody", "--json")
    assert said.exit_code == 3
    assert said.document["schema_version"] == 1
    texts = [one["what"] for one in said.document["findings"]]
    assert [any(part in one for one in texts) for part in ("does not answer", "'nobody'", "counts as off")] == [
        True
    ] * 3
    assert all(set(one) == {"what", "mend", "runbook", "severity"} for one in said.document["findings"])
    assert project.run("doctor", "--exporter", "nowhere").exit_code == 2
    assert project.run("doctor", url="postgresql://nobody@127.0.0.1:1/nowhere").exit_code == 5


def test_without_its_address_doctor_says_that_it_did_not_look_at_the_exporter_and_how_to(
    database_url: str, tmp_path: Path
) -> None:
    place = Place(database_url)
    project = Project(tmp_path, database_url)
    Heartbeat(project.settings, FileSource(project.flag_path)).beat()
    said = project.run("doctor")
    assert (said.exit_code, said.stderr) == (0, "")
    assert said.stdout == (
        "note: the exporter was not looked at: its address was not named\n"
        "  mend: walletmigrate doctor --exporter http://127.0.0.1:9464  # or wherever it is; [exporter] url: for good\n"
        "  runbook: runbooks/exporter-down.md\n"
        "everything else is as it should be\n"
    )
    (note,) = project.run("doctor", "--json").document["findings"]
    assert (note["severity"], note["what"].partition(":")[0]) == ("note", "the exporter was not looked at")
    execute(place.engine, "drop view wallet.wallet_entries cascade")
    said = project.run("doctor")
    assert said.exit_code == 3
    assert "\nnote: the exporter was not looked at" in said.stdout
    execute(place.engine, "drop table wallet.processes")
    with place.engine.connect() as connection:
        assert_told(doctor.notes(connection, place.settings))
    served = serve(project.settings, 0)
    try:
        url = f"http://127.0.0.1:{served.port}"
        assert "exporter" not in Project(tmp_path, database_url).run("doctor", "--exporter", url).stdout
    finally:
        served.close()


def test_the_address_of_the_exporter_is_taken_from_the_configuration_and_the_option_wins(
    connection: Connection, place: Place
) -> None:
    nowhere = place.settings.model_copy(update={"exporter": ExporterSettings(url="http://127.0.0.1:1")})
    assert [one.runbook for one in doctor.notes(connection, nowhere)] == ["runbooks/releases.md"]
    (found,) = doctor.examine(connection, nowhere)
    assert "does not answer" in found.what
    served = serve(place.settings, 0)
    try:
        assert doctor.examine(connection, nowhere, exporter=f"http://127.0.0.1:{served.port}") == ()
        there = ExporterSettings(url=f"http://127.0.0.1:{served.port}")
        assert doctor.examine(connection, place.settings.model_copy(update={"exporter": there})) == ()
    finally:
        served.close()


def test_each_note_is_told_by_its_runbook(connection: Connection, place: Place) -> None:
    told = doctor.notes(connection, place.settings)
    assert [one.what.partition(",")[0].partition(":")[0] for one in told] == [
        "no process has a heartbeat",
        "the exporter was not looked at",
    ]
    assert_told(told)
    assert_it_can_be_run(told)
