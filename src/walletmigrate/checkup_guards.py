"""Constraints, indexes and triggers of the ledger's tables and domains, as PostgreSQL tells them after an install."""

from __future__ import annotations

import re
from typing import Final, NamedTuple

# Made from a fresh schema, without its name; a test compares them on each version. What PostgreSQL prints is no text of
# the migration's, so they cannot be read out of that, as functions are.
_GUARDS: Final = """
constraint accounts_key_mapping_bucket_currency_key on accounts: UNIQUE (key, mapping, bucket, currency)
constraint accounts_pkey on accounts: PRIMARY KEY (id)
constraint amount_check on amount: CHECK (((VALUE > (0)::numeric) AND (VALUE < 'Infinity'::numeric)))
constraint audit_log_pkey on audit_log: PRIMARY KEY (id)
constraint balance_check on balance: CHECK (((VALUE IS NULL) OR (scale(VALUE) IS NOT NULL)))
constraint bypasses_pruned_pkey on bypasses_pruned: PRIMARY KEY (treatment)
constraint control_phase_check on control: CHECK ((phase = ANY (ARRAY['legacy'::text, 'dual_write'::text,
    'read_ledger'::text, 'wallet_only'::text, 'frozen'::text, 'retired'::text])))
constraint control_pkey on control: PRIMARY KEY (singleton)
constraint control_singleton_check on control: CHECK (singleton)
constraint failures_pkey on failures: PRIMARY KEY (id)
constraint flag_documents_pkey on flag_documents: PRIMARY KEY (singleton)
constraint flag_documents_singleton_check on flag_documents: CHECK (singleton)
constraint idempotency_keys_pkey on idempotency_keys: PRIMARY KEY (key)
constraint job_batches_job_id_fkey on job_batches: FOREIGN KEY (job_id) REFERENCES jobs(id)
constraint job_batches_pkey on job_batches: PRIMARY KEY (job_id, number)
constraint job_batches_state_check on job_batches: CHECK ((state = ANY (ARRAY['pending'::text, 'claimed'::text,
    'done'::text, 'set_aside'::text])))
constraint jobs_pkey on jobs: PRIMARY KEY (id)
constraint jobs_state_check on jobs: CHECK ((state = ANY (ARRAY['running'::text, 'paused'::text, 'done'::text,
    'failed'::text, 'cancelled'::text])))
constraint mappings_capture_mode_check on mappings: CHECK ((capture_mode = ANY (ARRAY['stale'::text, 'mirror'::text,
    'reject'::text])))
constraint mappings_pkey on mappings: PRIMARY KEY (name)
constraint processes_pkey on processes: PRIMARY KEY (id)
constraint schema_version_pkc on schema_version: PRIMARY KEY (version_num)
constraint snapshot_balances_pkey on snapshot_balances: PRIMARY KEY (account_id, snapshot_id)
constraint snapshot_checksums_pkey on snapshot_checksums: PRIMARY KEY (first_id, snapshot_id)
constraint snapshot_totals_pkey on snapshot_totals: PRIMARY KEY (snapshot_id, mapping, bucket, currency)
constraint snapshots_pkey on snapshots: PRIMARY KEY (id)
constraint snapshots_state_check on snapshots: CHECK ((state = ANY (ARRAY['running'::text, 'complete'::text,
    'pruned'::text])))
constraint system_accounts_id_check on system_accounts: CHECK ((id < 0))
constraint system_accounts_name_currency_key on system_accounts: UNIQUE (name, currency)
constraint system_accounts_pkey on system_accounts: PRIMARY KEY (id)
constraint transaction_details_pkey on transaction_details: PRIMARY KEY (transaction_id)
constraint transactions_pkey on transactions: PRIMARY KEY (id)
constraint verifications_check on verifications: CHECK ((complete OR (NOT clean)))
constraint verifications_form_check on verifications: CHECK ((form = ANY (ARRAY['full'::text, 'incremental'::text,
    'sample'::text])))
constraint verifications_pkey on verifications: PRIMARY KEY (id)
index audit_log_corrected on audit_log: CREATE UNIQUE INDEX audit_log_corrected ON audit_log USING btree (job_id,
    mapping, ((details ->> 'key'::text)), ((details ->> 'bucket'::text)), ((details ->> 'currency'::text))) WHERE
    (action = 'reconcile corrected'::text)
index audit_log_undone on audit_log: CREATE UNIQUE INDEX audit_log_undone ON audit_log USING btree (((details ->>
    'undoes'::text))) WHERE (action = 'reconcile undone'::text)
index job_batches_open on job_batches: CREATE INDEX job_batches_open ON job_batches USING btree (job_id, number) WHERE
    (state <> 'done'::text)
index jobs_unfinished on jobs: CREATE UNIQUE INDEX jobs_unfinished ON jobs USING btree (kind, mapping) WHERE (state =
    ANY (ARRAY['running'::text, 'paused'::text]))
index snapshots_running on snapshots: CREATE UNIQUE INDEX snapshots_running ON snapshots USING btree (state) WHERE
    (state = 'running'::text)
index transactions_credit on transactions: CREATE INDEX transactions_credit ON transactions USING btree
    (credit_account, id) WHERE (credit_account > 0)
index transactions_debit on transactions: CREATE INDEX transactions_debit ON transactions USING btree (debit_account,
    id) WHERE (debit_account > 0)
index transactions_reversed_once on transactions: CREATE UNIQUE INDEX transactions_reversed_once ON transactions USING
    btree (reverses) WHERE (reverses IS NOT NULL)
index transactions_xid on transactions: CREATE INDEX transactions_xid ON transactions USING brin (xid) WITH
    (pages_per_range='32')
trigger append_only on audit_log: CREATE TRIGGER append_only BEFORE DELETE OR UPDATE ON audit_log FOR EACH ROW EXECUTE
    FUNCTION refuse_change()
trigger append_only_truncate on audit_log: CREATE TRIGGER append_only_truncate BEFORE TRUNCATE ON audit_log FOR EACH
    STATEMENT EXECUTE FUNCTION refuse_change()
trigger ceiling on control: CREATE CONSTRAINT TRIGGER ceiling AFTER INSERT OR UPDATE ON control DEFERRABLE INITIALLY
    DEFERRED FOR EACH ROW EXECUTE FUNCTION follow_phase()
trigger append_only on transactions: CREATE TRIGGER append_only BEFORE DELETE OR UPDATE ON transactions FOR EACH ROW
    EXECUTE FUNCTION refuse_change()
trigger append_only_truncate on transactions: CREATE TRIGGER append_only_truncate BEFORE TRUNCATE ON transactions FOR
    EACH STATEMENT EXECUTE FUNCTION refuse_change()
trigger append_only on verifications: CREATE TRIGGER append_only BEFORE DELETE OR UPDATE ON verifications FOR EACH ROW
    EXECUTE FUNCTION refuse_change()
trigger append_only_truncate on verifications: CREATE TRIGGER append_only_truncate BEFORE TRUNCATE ON verifications
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change()
"""


class Guard(NamedTuple):
    """Its kind (constraint, index or trigger), its name, and the table or domain that it is on."""

    kind: str
    name: str
    relation: str


GUARDS: Final = {
    Guard(kind, name, relation): " ".join(definition.split())
    for kind, name, relation, definition in re.findall(
        r"^(\w+) (\w+) on (\w+): (.*(?:\n    .*)*)$", _GUARDS, re.MULTILINE
    )
}
"""What each says."""
