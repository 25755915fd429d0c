-- The ledger: run once by the first migration, as the owner role, with search_path left alone.
-- Amounts are numeric in major units. Balance of an account = its credits − its debits.

create type {{ schema }}.account_state as enum ('mirrored', 'stale', 'frozen', 'closed');

create type {{ schema }}.transaction_kind as enum ('opening', 'resync', 'posting', 'correction', 'reversal');

create type {{ schema }}.posting_mode as enum ('legacy', 'dual_write', 'ledger');

-- Domains, because a CHECK of a table is read from the catalog and compiled at every statement (2 to 5 µs of CPU
-- each, measured); a domain's is compiled once a session. NaN is greater than infinity: one bound excludes both. And
-- neither has a scale, which asks in one call what two bounds do.
create domain {{ schema }}.amount as numeric check (value > 0 and value < 'Infinity');
create domain {{ schema }}.balance as numeric check (value is null or scale(value) is not null);

create table {{ schema }}.mappings (
    name text collate "C" primary key,
    relation regclass not null,
    -- What the functions were made from; the adapter sends its fingerprint with every posting.
    fingerprint text not null,
    functions_version integer not null,
    definition jsonb not null,
    -- What the fence does to a mirrored account that is written past the adapter.
    capture_mode text not null default 'stale' check (capture_mode in ('stale', 'mirror', 'reject')),
    -- Identity of each fence trigger as it was made: {"trigger on relation": {"xmin": …, "enabled": …}}.
    fence jsonb not null default '{}',
    installed_at timestamptz not null default clock_timestamp()
);

create table {{ schema }}.control (
    singleton boolean primary key default true check (singleton),
    phase text not null default 'legacy'
    check (phase in ('legacy', 'dual_write', 'read_ledger', 'wallet_only', 'frozen', 'retired')),
    changed_at timestamptz not null default clock_timestamp(),
    -- The cluster that the xids of the journal are of. A logical restore brings the rows into another one, whose
    -- counter says nothing about them; adopt_journal() then sets both, and what it found up to restored_id is settled.
    system_identifier bigint not null,
    restored_id bigint not null default 0
);

insert into {{ schema }}.control (system_identifier) select p.system_identifier from pg_control_system() as p;

-- 1 = the line runs, 2 = it is stopped. A sequence, because its value is seen at once even by old snapshots.
create sequence {{ schema }}.line as smallint minvalue 1 maxvalue 2 start 1;
select setval('{{ schema }}.line', 1);

-- What the phase lets flags ask for: 1 = nothing (legacy), 2 = dual-write. It follows the phase; a posting asks it,
-- because a sequence costs a tenth of a row (measured with 16 clients).
create sequence {{ schema }}.ceiling as smallint minvalue 1 maxvalue 2 start 1;
select setval('{{ schema }}.ceiling', 1);

create table {{ schema }}.accounts (
    id bigint generated always as identity primary key,
    mapping text collate "C" not null,
    key text collate "C" not null,
    bucket text collate "C" not null,
    currency text collate "C" not null,
    state {{ schema }}.account_state not null,
    balance {{ schema }}.balance not null,
    opened_at timestamptz not null default clock_timestamp(),
    -- When and why the state last changed; a posting leaves both alone, so its update stays heap-only.
    state_at timestamptz,
    state_reason text,
    job_id bigint,
    -- The key first: a search compares from the left, and a mapping has as many rows as keys.
    unique (key, mapping, bucket, currency)
) with (fillfactor = 70);

-- Ids of system accounts are negative: (name, currency) of opening, external, correction, bypass, transit.
create table {{ schema }}.system_accounts (
    id bigint primary key check (id < 0),
    name text collate "C" not null,
    currency text collate "C" not null,
    -- The fold: what transactions with xid < folded_xid came to.
    balance numeric not null default 0,
    folded_xid bigint not null default 0,
    unique (name, currency)
);

create sequence {{ schema }}.transaction_ids as bigint;

create table {{ schema }}.transactions (
    id bigint primary key,
    -- Never the same. Only write_transaction can be asked for two owners' accounts, and gives no second one then; all
    -- others write one owner's and one of the system, whose ids are negative.
    debit_account bigint not null,
    credit_account bigint not null,
    posted_at timestamptz not null default clock_timestamp(),
    -- Not pg_current_xact_id(), which is no bigint and goes there by way of text, in every posting.
    xid bigint not null default txid_current(),
    group_id bigint,
    reverses bigint,
    job_id bigint,
    kind {{ schema }}.transaction_kind not null,
    amount {{ schema }}.amount not null,
    -- Balance after this transaction; null for a system account, which has no balance row.
    debit_balance numeric,
    credit_balance numeric,
    currency text collate "C" not null,
    type text not null,
    reference_type text,
    reference_id text,
    correlation_id text,
    actor text,
    reason text
);

-- History of one owner's account; ids grow under the account's lock, so id order is posting order.
create index transactions_debit on {{ schema }}.transactions (debit_account, id) where debit_account > 0;
create index transactions_credit on {{ schema }}.transactions (credit_account, id) where credit_account > 0;
create unique index transactions_reversed_once on {{ schema }}.transactions (reverses) where reverses is not null;
-- Rows arrive in nearly the order of their xid: a fold or an incremental run reads only the tail.
create index transactions_xid on {{ schema }}.transactions using brin (xid) with (pages_per_range = 32);

-- Personal data stands apart, so that it can be erased while the transaction stays.
create table {{ schema }}.transaction_details (
    transaction_id bigint primary key,
    description text,
    address text
);

create table {{ schema }}.idempotency_keys (
    key text collate "C" primary key,
    transaction_id bigint,
    -- Null where the transaction says when.
    created_at timestamptz default clock_timestamp(),
    -- Digest of the request; another request under the same key is an error.
    request uuid not null,
    -- Null of what the short way posted, in dual-write with its transaction; and, with none, while a batch that
    -- reserved the key is still at work.
    mode {{ schema }}.posting_mode,
    -- Legacy and ledger of the debtor, then of the creditor, as the first result had them. Null where the
    -- transaction says it all: dual-write on every side that it has.
    balances numeric[]
);

create table {{ schema }}.failures (
    id bigint generated always as identity primary key,
    at timestamptz not null default clock_timestamp(),
    mapping text not null,
    key text not null,
    bucket text not null,
    currency text not null,
    operation text not null,
    sqlstate text not null,
    message text not null,
    correlation_id text
);

-- Every write to a mapped column that did not come through the adapter, and what the fence made of it. No index
-- and no number: who writes past the adapter would pay for it.
create table {{ schema }}.bypasses (
    at timestamptz not null default clock_timestamp(),
    mapping text not null,
    -- The table or partition that was written; no column and no key where all are meant (truncate).
    relation regclass not null,
    column_name text,
    key text,
    bucket text,
    currency text,
    operation text not null,
    -- absent, stale: recorded only; turned_stale, mirrored, closed: what became of the account.
    treatment text not null,
    -- In major units; null before an insert and after a delete.
    old_value numeric,
    new_value numeric,
    application_name text not null default current_setting('application_name'),
    database_user text not null default session_user,
    -- The statement that the client sent, without its values and comments: one code path, one fingerprint.
    fingerprint text not null,
    -- As it was sent; only where the configuration switches it on.
    query text,
    xid bigint not null default txid_current()
);

-- What was pruned from the catalogue, so that the counts of writes never fall.
create table {{ schema }}.bypasses_pruned (
    treatment text primary key,
    writes bigint not null
);

create table {{ schema }}.jobs (
    id bigint generated always as identity primary key,
    kind text not null,
    mapping text,
    state text not null default 'running' check (state in ('running', 'paused', 'done', 'failed', 'cancelled')),
    actor text not null,
    reason text not null,
    version text not null,
    items_total bigint,
    items_done bigint not null default 0,
    items_failed bigint not null default 0,
    -- What the operator has set (see docs/jobs.md), read whenever a batch is claimed.
    settings jsonb not null default '{}',
    functions_version integer,
    -- 1: all keys up to the largest when the job began; 2: what was written since, for a kind that asks for it.
    pass smallint not null default 1,
    -- Batches are cut behind the cursor, the last key of the last one that was cut, up to this key.
    cursor text,
    until_key text,
    -- Legacy rows written since have an xmin that is not below it.
    row_xid bigint not null default pg_snapshot_xmin(pg_current_snapshot())::text::bigint,
    -- As the job tunes it; null until the first batch.
    batch_size integer,
    batches bigint not null default 0,
    -- Where fencing tokens come from; commits that were refused for their token.
    claims bigint not null default 0,
    claims_lost bigint not null default 0,
    -- Whether a batch has succeeded since the job was last started; else how many failed alike, and of what.
    proven boolean not null default false,
    alike integer not null default 0,
    last_error text,
    -- With a rate: when the next batch may begin.
    paced_until timestamptz,
    -- Why a running job stands still by itself, and since when.
    held text,
    held_at timestamptz,
    last_batch_seconds double precision,
    started_at timestamptz not null default clock_timestamp(),
    updated_at timestamptz not null default clock_timestamp(),
    finished_at timestamptz,
    details jsonb not null default '{}'
);

-- At most one unfinished job of a kind on a mapping: a second start resumes it.
create unique index jobs_unfinished on {{ schema }}.jobs (kind, mapping) where state in ('running', 'paused');

-- The batches of jobs that are not done, and what was set aside: keys k with after_key < k <= upto_key, in the order
-- of the legacy table's key; no after_key: from the first. Batches that are done go when their job is.
create table {{ schema }}.job_batches (
    job_id bigint not null references {{ schema }}.jobs,
    number bigint not null,
    pass smallint not null,
    after_key text,
    upto_key text not null,
    -- Keys when it was cut.
    keys integer not null,
    state text not null check (state in ('pending', 'claimed', 'done', 'set_aside')),
    -- Whoever claims a batch gets a higher token than all before; a commit with another one is refused.
    token bigint not null default 0,
    -- Until then the worker must have begun; from then on it holds the row's lock until it ends.
    lease_until timestamptz,
    worker text,
    attempts integer not null default 0,
    done bigint not null default 0,
    failed bigint not null default 0,
    error text,
    seconds double precision,
    at timestamptz not null default clock_timestamp(),
    primary key (job_id, number)
);

create index job_batches_open on {{ schema }}.job_batches (job_id, number) where state <> 'done';

create table {{ schema }}.verifications (
    id bigint generated always as identity primary key,
    mapping text not null,
    started_at timestamptz not null,
    finished_at timestamptz not null default clock_timestamp(),
    clean boolean not null,
    -- full: all accounts and the whole journal; incremental: what changed since a run that stands here; sample: some.
    form text not null default 'full' check (form in ('full', 'incremental', 'sample')),
    -- False: it was ended when it had seen a fault, and stands for that alone. None that is clean is kept so.
    complete boolean not null default true check (complete or not clean),
    full_run boolean not null generated always as (form = 'full' and complete) stored,
    -- Of the cluster with this identifier, all that was written by transactions with an xid below has been looked at,
    -- by this run or by those that it counts from; null of a sample.
    system_identifier bigint,
    horizon bigint,
    accounts bigint not null,
    missing bigint not null,
    drift_accounts bigint not null,
    drift_amount numeric not null,
    currency text not null,
    actor text not null,
    details jsonb not null default '{}'
);

-- A snapshot is the set of transactions that one MVCC snapshot of the database saw: those with an xid below the
-- horizon, and of the others those below next_xid that were not in flight; ids up to restored_id came by a logical
-- restore. It never changes: batches look at it hours later and see the same. An xid bound alone is not enough: below
-- it may be a posting that stands on one above it.
create table {{ schema }}.snapshots (
    id bigint generated always as identity primary key,
    state text not null default 'running' check (state in ('running', 'complete', 'pruned')),
    -- The snapshot that this one's totals count from; null: from the first transaction.
    previous bigint,
    horizon bigint not null,
    next_xid bigint not null,
    in_flight bigint[] not null,
    -- The last id that was given when it was taken; no transaction in it has a larger one.
    last_id bigint not null,
    restored_id bigint not null,
    -- Transactions up to this id are folded in.
    cursor bigint not null,
    taken_at timestamptz not null default clock_timestamp(),
    finished_at timestamptz,
    verified_at timestamptz,
    verified_clean boolean,
    actor text not null,
    reason text not null
);

-- One at a time: a second start goes on with it.
create unique index snapshots_running on {{ schema }}.snapshots (state) where state = 'running';

-- Rows for accounts that changed since the snapshot before; an account's balance at a snapshot is its newest row up to
-- it. The five sums are net, and null for nothing; balance = the row before's + all five.
create table {{ schema }}.snapshot_balances (
    account_id bigint not null,
    snapshot_id bigint not null,
    -- The account's last transaction in the snapshot, and the balance after it.
    transaction_id bigint not null,
    balance numeric not null,
    opening numeric,
    resync numeric,
    posting numeric,
    correction numeric,
    reversal numeric,
    transactions bigint not null,
    primary key (account_id, snapshot_id)
);

-- Totals of a snapshot: of owners' accounts by mapping, bucket and currency; of the system's as mapping '(system)'
-- with the account's name as bucket. accounts and balance are of the snapshot, all others since the one before.
create table {{ schema }}.snapshot_totals (
    snapshot_id bigint not null,
    mapping text collate "C" not null,
    bucket text collate "C" not null,
    currency text collate "C" not null,
    accounts bigint not null,
    balance numeric not null,
    changed bigint not null,
    opening numeric not null,
    resync numeric not null,
    posting numeric not null,
    correction numeric not null,
    reversal numeric not null,
    transactions bigint not null,
    primary key (snapshot_id, mapping, bucket, currency)
);

-- What the journal's rows were when a snapshot folded them, by ranges of 10,000 ids: of those that it has and the one
-- before has not, how many, and the sum of their hashes. The sums of all snapshots up to one are those of all its
-- transactions, so they can be merged.
create table {{ schema }}.snapshot_checksums (
    -- The first id of the range, a multiple of 10,000.
    first_id bigint not null,
    snapshot_id bigint not null,
    transactions bigint not null,
    checksum numeric not null,
    primary key (first_id, snapshot_id)
);

create table {{ schema }}.audit_log (
    id bigint generated always as identity primary key,
    at timestamptz not null default clock_timestamp(),
    action text not null,
    actor text not null,
    reason text not null,
    mapping text,
    job_id bigint,
    correlation_id text,
    database_user text not null default session_user,
    details jsonb not null default '{}'
);

-- A run of a reconciliation corrects an account at most once, and a correction is undone at most once.
create unique index audit_log_corrected on {{ schema }}.audit_log (
    job_id, mapping, (details ->> 'key'), (details ->> 'bucket'), (details ->> 'currency')
) where action = 'reconcile corrected';
create unique index audit_log_undone on {{ schema }}.audit_log ((details ->> 'undoes'))
where action = 'reconcile undone';

-- The last good flag document, for a process that starts while the flag server is away.
create table {{ schema }}.flag_documents (
    singleton boolean primary key default true check (singleton),
    stored_at timestamptz not null default clock_timestamp(),
    document jsonb not null
);

-- Processes that live, by their heartbeats, and the flag document that each decides by.
create table {{ schema }}.processes (
    id uuid primary key,
    name text not null,
    pid integer not null,
    version text not null,
    started_at timestamptz not null default clock_timestamp(),
    seen_at timestamptz not null default clock_timestamp(),
    document_id text not null,
    document_source text not null,
    document_age_seconds double precision not null,
    problem text
) with (fillfactor = 50);

create function {{ schema }}.refuse_change() returns trigger
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
    raise exception 'rows of % are never changed or removed', tg_table_name
        using errcode = 'WM040', hint = 'Post a reversal or a correction instead.';
end
$$;

-- At the commit of the step: a sequence has no rollback.
create function {{ schema }}.follow_phase() returns trigger
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
    perform setval('{{ schema }}.ceiling', case new.phase when 'legacy' then 1 else 2 end);
    return null;
end
$$;

create constraint trigger ceiling after insert or update on {{ schema }}.control
deferrable initially deferred
for each row execute function {{ schema }}.follow_phase();

create trigger append_only before update or delete on {{ schema }}.transactions
for each row execute function {{ schema }}.refuse_change();
create trigger append_only_truncate before truncate on {{ schema }}.transactions
for each statement execute function {{ schema }}.refuse_change();
create trigger append_only before update or delete on {{ schema }}.audit_log
for each row execute function {{ schema }}.refuse_change();
create trigger append_only_truncate before truncate on {{ schema }}.audit_log
for each statement execute function {{ schema }}.refuse_change();
-- Gates ask what was verified: who could change that could open them.
create trigger append_only before update or delete on {{ schema }}.verifications
for each row execute function {{ schema }}.refuse_change();
create trigger append_only_truncate before truncate on {{ schema }}.verifications
for each statement execute function {{ schema }}.refuse_change();
alter table {{ schema }}.transactions enable always trigger append_only;
alter table {{ schema }}.transactions enable always trigger append_only_truncate;
alter table {{ schema }}.audit_log enable always trigger append_only;
alter table {{ schema }}.audit_log enable always trigger append_only_truncate;
alter table {{ schema }}.verifications enable always trigger append_only;
alter table {{ schema }}.verifications enable always trigger append_only_truncate;

-- Each transaction's two legs, for people who think in journal entries.
create view {{ schema }}.wallet_entries as
select
    t.id as transaction_id,
    e.account_id,
    e.direction,
    e.amount,
    e.balance_after - e.amount as balance_before,
    e.balance_after,
    t.currency,
    t.kind,
    t.type,
    t.posted_at,
    t.group_id,
    t.reverses,
    r.id as reversed_by,
    t.reference_type,
    t.reference_id,
    t.correlation_id,
    t.actor,
    t.reason,
    t.job_id,
    t.xid
from {{ schema }}.transactions as t
left join {{ schema }}.transactions as r on t.id = r.reverses
cross join lateral (
    values
    (t.debit_account, 'debit', -t.amount, t.debit_balance),
    (t.credit_account, 'credit', t.amount, t.credit_balance)
) as e (account_id, direction, amount, balance_after);

-- In another cluster than the fold was made in the fold does not count: new rows may have lower xids than it.
create view {{ schema }}.system_balances as
select
    s.id,
    s.name,
    s.currency,
    f.balance
    + coalesce((
        select sum(t.amount) from {{ schema }}.transactions as t
        where t.credit_account = s.id and t.xid >= f.xid
    ), 0)
    - coalesce((
        select sum(t.amount) from {{ schema }}.transactions as t
        where t.debit_account = s.id and t.xid >= f.xid
    ), 0) as balance
from {{ schema }}.system_accounts as s
cross join lateral (
    select
        case when k.system_identifier = p.system_identifier then s.balance else 0 end as balance,
        case when k.system_identifier = p.system_identifier then s.folded_xid else 0 end as xid
    from {{ schema }}.control as k, pg_control_system() as p
) as f;

-- Recognise a logical restore: the journal lies in another cluster than its xids are of. From now on its rows count
-- as settled by their ids, and the fold begins anew. The lock waits for postings in flight, so that all ids up to the
-- last one are settled indeed. True if there was something to adopt.
create function {{ schema }}.adopt_journal() returns boolean
language plpgsql
security definer
set search_path = pg_catalog, {{ schema }}, pg_temp
as $$
begin
    if exists (
        select from control as k, pg_control_system() as p where k.system_identifier = p.system_identifier
    ) then
        return false;
    end if;
    lock table transactions in share mode;
    update control as k
    set
        system_identifier = p.system_identifier,
        restored_id = (select case when n.is_called then n.last_value else 0 end from transaction_ids as n)
    from pg_control_system() as p;
    update system_accounts set balance = 0, folded_xid = 0;
    return true;
end
$$;

-- Fold what every present and future snapshot agrees on: transactions below the oldest running xid.
create function {{ schema }}.fold_system_accounts() returns bigint
language plpgsql
security definer
set search_path = pg_catalog, {{ schema }}, pg_temp
as $$
declare
    v_upto bigint;
begin
    perform 1 from system_accounts order by id for no key update;
    if exists (
        select from control as k, pg_control_system() as p where k.system_identifier <> p.system_identifier
    ) then
        return 0; -- restored from another cluster: the view sums the whole journal until adopt_journal() was run
    end if;
    -- After the lock: a fold that waited for another goes on from where that one came to.
    v_upto := pg_snapshot_xmin(pg_current_snapshot())::text::bigint;
    -- A logical restore gives rows their old xids in a cluster whose counter may be lower: fold anew then.
    update system_accounts set balance = 0, folded_xid = 0 where folded_xid > v_upto;
    update system_accounts as s
    set
        balance = s.balance + coalesce((
            select sum(case when t.credit_account = s.id then t.amount else -t.amount end)
            from transactions as t
            where s.id in (t.debit_account, t.credit_account) and t.xid >= s.folded_xid and t.xid < v_upto
        ), 0),
        folded_xid = v_upto;
    return v_upto;
end
$$;

-- How full openings fill the pages of accounts, in per cent. PostgreSQL clears a page of its dead versions at each
-- visit as long as there is less room on it than the table asks for: with the 30 % that openings leave, after every
-- posting. A table that asks for 10 % then has the rest for some ten postings, and one look for all of them.
create function {{ schema }}.fill_accounts(p_percent integer) returns void
language plpgsql
security definer
set search_path = pg_catalog, {{ schema }}, pg_temp
set lock_timeout = '1s'
as $$
begin
    execute format('alter table accounts set (fillfactor = %s)', p_percent);
exception
    when lock_not_available then
        null; -- a vacuum is at work, and this is a matter of speed alone
end
$$;

create function {{ schema }}.set_line(p_running boolean) returns void
language sql
security definer
set search_path = pg_catalog, {{ schema }}, pg_temp
begin atomic
    select setval('{{ schema }}.line', case when p_running then 1 else 2 end);
end;

-- One movement as a caller asks for it: who pays (debtor), who is paid (creditor), or one of them and the
-- outside world. Keys are text; amounts are in major units.
create type {{ schema }}.movement as (
    operation text,
    debtor text,
    creditor text,
    bucket text,
    currency text,
    amount numeric,
    dual boolean,
    type text,
    reference_type text,
    reference_id text,
    idempotency_key text,
    request uuid,
    correlation_id text,
    actor text,
    reason text,
    reverses bigint,
    description text,
    address text,
    -- Assigned by the application's ORM code: its traffic, and no administrator's deed.
    watched boolean,
    -- Worked out in the database: the system account opposite a single side, and a reversal's refusal.
    counter bigint,
    group_id bigint,
    refusal text
);

-- A credit or a debit on its way to the fence, which hears it from a setting. Typed, because a field costs a third of
-- what an array's element and its cast do, at the first look in each transaction.
create type {{ schema }}.label as (
    -- mapping/bucket/currency/key
    place text collate "C",
    change numeric,
    dual boolean,
    type text,
    reference_type text,
    reference_id text,
    idempotency_key text,
    request uuid,
    correlation_id text,
    actor text,
    reason text
);

-- One owner's side of a movement, read under the locks of its legacy row and its account.
create type {{ schema }}.side as (
    key text,
    legacy numeric,
    exact boolean,
    account bigint,
    state {{ schema }}.account_state,
    balance numeric,
    -- legacy: the column alone is written; dual_write: both; ledger: the ledger alone (frozen).
    mode text,
    -- Id set aside for the opening or resync that has to come before the movement itself.
    first_id bigint,
    -- Wanted in the ledger, but the legacy value is no exact amount.
    unfit boolean
);

-- What a mapping says of the column at hand, with the ids of the currency's system accounts.
create type {{ schema }}.column_rule as (
    mapping text,
    bucket text,
    currency text,
    scale integer,
    floor numeric,
    minimum numeric,
    maximum numeric,
    opening bigint,
    external bigint,
    correction bigint,
    bypass bigint,
    transit bigint
);

-- What became of one movement. A change that is not null is still to be written to the legacy column.
create type {{ schema }}.posting as (
    refusal text,
    outcome text,
    replayed boolean,
    mode text,
    transaction_id bigint,
    amount numeric,
    debtor text,
    debtor_change numeric,
    debtor_legacy numeric,
    debtor_ledger numeric,
    debtor_account bigint,
    creditor text,
    creditor_change numeric,
    creditor_legacy numeric,
    creditor_ledger numeric,
    creditor_account bigint,
    mismatch boolean,
    ordinal integer
);

-- What came of holding one account against a truth, with both balances before and after; difference = truth − balance.
create type {{ schema }}.correction as (
    outcome text,
    refusal text,
    account_id bigint,
    key text,
    bucket text,
    currency text,
    -- As it was found; null: no account.
    state {{ schema }}.account_state,
    truth numeric,
    difference numeric,
    legacy_before numeric,
    ledger_before numeric,
    legacy_after numeric,
    ledger_after numeric,
    transaction_id bigint
);
