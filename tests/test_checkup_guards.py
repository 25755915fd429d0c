"""What `doctor` says of guards that stand under their names and are others than were made."""

from __future__ import annotations

import pytest
from sqlalchemy import Connection

from capturing import Place
from examining import HOLLOW, connection, place, run
from findings import assert_told
from walletmigrate import doctor
from walletmigrate.checkup_guards import GUARDS
from walletmigrate.cli_capture import _finding_lines
from walletmigrate.doctor import Finding

__all__ = ["connection", "place"]

_FRESH = """
select 'constraint', x.conname, coalesce(c.relname, t.typname), pg_get_constraintdef(x.oid) from pg_constraint as x
left join pg_class as c on c.oid = x.conrelid left join pg_type as t on t.oid = x.contypid
where x.connamespace = 'wallet'::regnamespace and x.contype in ('p', 'u', 'c', 'f', 'x')
union all
select 'index', i.relname, c.relname, pg_get_indexdef(i.oid) from pg_index as x
join pg_class as i on i.oid = x.indexrelid join pg_class as c on c.oid = x.indrelid
where c.relnamespace = 'wallet'::regnamespace and not exists (select from pg_constraint where conindid = i.oid)
union all
select 'trigger', x.tgname, c.relname, pg_get_triggerdef(x.oid) from pg_trigger as x
join pg_class as c on c.oid = x.tgrelid where c.relnamespace = 'wallet'::regnamespace and not x.tgisinternal
"""
OTHERS = {
    "alter table wallet.jobs drop constraint jobs_state_check; "
    "alter table wallet.jobs add constraint jobs_state_check check (true)": (
        "the constraint jobs_state_check on wallet.jobs is not as it was made: CHECK (true)"
    ),
    "alter table wallet.verifications drop constraint verifications_check; alter table wallet.verifications "
    "add constraint verifications_check check (complete or not clean) not valid": (
        "the constraint verifications_check on wallet.verifications is not as it was made: "
        "CHECK ((complete OR (NOT clean))) NOT VALID"
    ),
    "alter table wallet.idempotency_keys drop constraint idempotency_keys_pkey; "
    "alter table wallet.idempotency_keys add constraint idempotency_keys_pkey primary key (key, request)": (
        "the constraint idempotency_keys_pkey on wallet.idempotency_keys is not as it was made: "
        "PRIMARY KEY (key, request)"
    ),
    "alter table wallet.job_batches drop constraint job_batches_job_id_fkey; alter table wallet.job_batches "
    "add constraint job_batches_job_id_fkey foreign key (job_id) references wallet.jobs (id) on delete cascade": (
        "the constraint job_batches_job_id_fkey on wallet.job_batches is not as it was made: "
        "FOREIGN KEY (job_id) REFERENCES jobs(id) ON DELETE CASCADE"
    ),
    "alter domain wallet.amount drop constraint amount_check; "
    "alter domain wallet.amount add constraint amount_check check (value <> 0)": (
        "the constraint amount_check on wallet.amount is not as it was made: CHECK ((VALUE <> (0)::numeric))"
    ),
    "alter domain wallet.balance drop constraint balance_check": (
        "the constraint balance_check of the ledger wallet is missing"
    ),
    "alter domain wallet.amount add constraint small check (value < 100) not valid": (
        "the constraint small on wallet.amount is not the ledger's: postings may fail by it"
    ),
    "drop index wallet.transactions_reversed_once; "
    "create index transactions_reversed_once on wallet.transactions (reverses) where reverses is not null": (
        "the index transactions_reversed_once on wallet.transactions is not as it was made: "
        "CREATE INDEX transactions_reversed_once ON transactions USING btree (reverses) WHERE (reverses IS NOT NULL)"
    ),
    f"create function public.f() {HOLLOW}; drop trigger append_only on wallet.transactions; "
    "create trigger append_only before update or delete "
    "on wallet.transactions for each row execute function public.f(); "
    "alter table wallet.transactions enable always trigger append_only": (
        "the trigger append_only on wallet.transactions is not as it was made: CREATE TRIGGER append_only "
        "BEFORE DELETE OR UPDATE ON transactions FOR EACH ROW EXECUTE FUNCTION public.f()"
    ),
    "alter table wallet.transactions alter column debit_account drop not null": (
        "the column debit_account of wallet.transactions is not as it was made: it may be null"
    ),
    "alter table wallet.snapshot_balances alter column balance type double precision": (
        "the column balance of wallet.snapshot_balances is not as it was made: double precision"
    ),
}


def test_the_guards_that_doctor_looks_for_are_those_of_a_fresh_schema(connection: Connection) -> None:
    fresh = connection.exec_driver_sql(_FRESH).all()
    assert {tuple(row[:3]): row[3].replace("wallet.", "") for row in fresh} == GUARDS


@pytest.mark.parametrize(("change", "said"), OTHERS.items(), ids=OTHERS.values())
def test_a_guard_of_another_definition_is_found_and_its_runbook_tells_of_it(
    connection: Connection, place: Place, change: str, said: str
) -> None:
    # Without a path the schema's own name is in every definition.
    connection.exec_driver_sql("set local search_path = pg_catalog")
    run(connection, change)
    found = doctor.examine(connection, place.settings)
    assert [one.what for one in found] == [said]
    assert_told(found)


@pytest.mark.parametrize("path", ["pg_catalog", "public", "wallet, public"])
def test_the_path_of_the_session_does_not_count(connection: Connection, place: Place, path: str) -> None:
    connection.exec_driver_sql(f"set local search_path = {path}")
    assert doctor.examine(connection, place.settings) == ()


def test_what_is_not_a_domain_s_own_goes_by_the_command_that_is_shown(connection: Connection, place: Place) -> None:
    connection.exec_driver_sql("alter domain wallet.amount add constraint small check (value < 100) not valid")
    (found,) = doctor.examine(connection, place.settings)
    connection.exec_driver_sql(found.mend.partition("as the ledger's owner: ")[2])
    assert doctor.examine(connection, place.settings) == ()


def test_what_mends_several_findings_in_a_row_is_said_once() -> None:
    one, other = Finding("a", "mend it", "r.md"), Finding("b", "mend it", "r.md")
    apart, note = Finding("c", "mend that", "r.md"), Finding("d", "mend that", "s.md", "note")
    assert list(_finding_lines((one, other, apart, note, one))) == [
        "a",
        "b",
        "  mend: mend it\n  runbook: r.md",
        "c",
        "  mend: mend that\n  runbook: r.md",
        "note: d",
        "  mend: mend that\n  runbook: s.md",
        "a",
        "  mend: mend it\n  runbook: r.md",
    ]
