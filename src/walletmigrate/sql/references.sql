-- What points at something that does not exist. Each statement lists at most :limit rows of each kind, and counts all.
{# Written since the run that the journal is known from, when no transaction below :horizon was running; 0: any row.
   A row's xmin is the lower half of an id, and what is older than 2 billion may be taken for new. #}
{% macro since_known(row) -%}
    (
        (:horizon)::bigint = 0
        or ((:horizon)::bigint - {{ row }}.xmin::text::bigint) & 4294967295 not between 1 and 2147483647
    )
{%- endmacro %}
{% macro first_of(found) %}
select
    problem,
    subject,
    target,
    in_all
from (
    select
        x.*,
        row_number() over (partition by x.problem order by x.subject, x.target) as rank,
        count(*) over (partition by x.problem) as in_all
    from {{ found }} as x
) as ranked
where rank <= :limit
order by problem, rank;
{% endmacro %}

-- name: references
with found as (
    select
        'idempotency key of a transaction that does not exist' as problem,
        k.key as subject,
        k.transaction_id::text as target
    from {{ schema }}.idempotency_keys as k
    where
        k.transaction_id is not null
        and {{ since_known("k") }}
        and not exists (
            select from {{ schema }}.transactions as t
            where t.id = k.transaction_id
        )
    union all
    select
        'details of a transaction that does not exist' as problem,
        d.transaction_id::text as subject,
        d.transaction_id::text as target
    from {{ schema }}.transaction_details as d
    where
        {{ since_known("d") }}
        and not exists (
            select from {{ schema }}.transactions as t
            where t.id = d.transaction_id
        )
    union all
    select
        'audit row of a transaction that does not exist' as problem,
        u.id::text as subject,
        u.details ->> 'transaction_id' as target
    from {{ schema }}.audit_log as u
    where
        u.details ->> 'transaction_id' is not null
        and {{ since_known("u") }}
        and not exists (
            select from {{ schema }}.transactions as t
            where t.id = (u.details ->> 'transaction_id')::bigint
        )
    union all
    select
        'reversal of a transaction that does not exist' as problem,
        r.id::text as subject,
        r.reverses::text as target
    from {{ schema }}.transactions as r
    where
        r.reverses is not null
        and {{ since_known("r") }}
        and not exists (
            select from {{ schema }}.transactions as t
            where t.id = r.reverses
        )
    union all
    select
        'snapshot balance of an account that does not exist' as problem,
        b.snapshot_id::text as subject,
        b.account_id::text as target
    from {{ schema }}.snapshot_balances as b
    where
        b.account_id > 0
        and not exists (
            select from {{ schema }}.accounts as a
            where a.id = b.account_id
        )
        or b.account_id < 0
        and not exists (
            select from {{ schema }}.system_accounts as s
            where s.id = b.account_id
        )
    union all
    select
        'snapshot balance of a transaction that does not exist' as problem,
        b.snapshot_id::text as subject,
        b.transaction_id::text as target
    from {{ schema }}.snapshot_balances as b
    where
        not exists (
            select from {{ schema }}.transactions as t
            where t.id = b.transaction_id
        )
    union all
    select
        'balance in a snapshot that does not exist' as problem,
        b.account_id::text as subject,
        b.snapshot_id::text as target
    from {{ schema }}.snapshot_balances as b
    where
        not exists (
            select from {{ schema }}.snapshots as s
            where s.id = b.snapshot_id
        )
    union all
    select
        'total in a snapshot that does not exist' as problem,
        concat_ws(' ', n.mapping, n.bucket, n.currency) as subject,
        n.snapshot_id::text as target
    from {{ schema }}.snapshot_totals as n
    where
        not exists (
            select from {{ schema }}.snapshots as s
            where s.id = n.snapshot_id
        )
    union all
    select
        'snapshot that counts from one that does not exist' as problem,
        n.id::text as subject,
        n.previous::text as target
    from {{ schema }}.snapshots as n
    where n.previous is not null and not exists (
        select from {{ schema }}.snapshots as s
        where s.id = n.previous
    )
)

{{ first_of("found") }}

-- name: groups
with found as (
    select
        'group of a transaction that does not exist' as problem,
        g.id::text as subject,
        g.group_id::text as target
    from {{ schema }}.transactions as g
    where
        g.group_id is not null
        and {{ since_known("g") }}
        and not exists (
            select from {{ schema }}.transactions as t
            where t.id = g.group_id
        )
)

{{ first_of("found") }}

-- name: strangers
with found as (
    select
        'account of a mapping, bucket or currency that the ledger does not know' as problem,
        a.id::text as subject,
        concat_ws(' ', a.mapping, a.bucket, a.currency) as target
    from {{ schema }}.accounts as a
    where not exists (
        select from {{ schema }}.mappings as m
        cross join jsonb_array_elements(m.definition -> 'columns') as c
        where m.name = a.mapping and c ->> 'bucket' = a.bucket and c ->> 'currency' = a.currency
    )
)

{{ first_of("found") }}

-- name: known
select
    m.name as mapping,
    c ->> 'bucket' as bucket,
    c ->> 'currency' as currency
from {{ schema }}.mappings as m
cross join jsonb_array_elements(m.definition -> 'columns') as c;

-- name: uniqueness
-- The unique indexes of the ledger that do not stand: without them there may be two of what there is one of.
select
    w.relation,
    array_to_string(w.columns, ', ') as columns
from (
    values
    ('accounts', array['id']),
    ('accounts', array['bucket', 'currency', 'key', 'mapping']),
    ('system_accounts', array['id']),
    ('system_accounts', array['currency', 'name']),
    ('transactions', array['id']),
    ('transactions', array['reverses']),
    ('transaction_details', array['transaction_id']),
    ('idempotency_keys', array['key'])
) as w (relation, columns)
where
    not exists (
        select from pg_index as i
        inner join pg_class as c on i.indrelid = c.oid
        inner join pg_namespace as n on c.relnamespace = n.oid
        where
            n.nspname = :schema and c.relname = w.relation
            and i.indisunique and i.indisvalid and i.indimmediate and i.indexprs is null
            and (i.indpred is null or w.columns = array['reverses'])
            and w.columns = (
                select array_agg(t.attname::text order by t.attname) from pg_attribute as t
                where t.attrelid = c.oid and t.attnum = any(i.indkey::smallint[])
            )
    )
order by w.relation, w.columns;

-- name: duplicates
with found as (
    select
        'several accounts of one owner' as problem,
        concat_ws(' ', a.mapping, a.key, a.bucket, a.currency) as subject,
        array_to_string(array_agg(a.id order by a.id), ' ') as target
    from {{ schema }}.accounts as a
    group by a.mapping, a.key, a.bucket, a.currency
    having count(*) > 1
    union all
    select
        'several accounts with one id' as problem,
        a.id::text as subject,
        array_to_string(array_agg(a.key order by a.key), ' ') as target
    from {{ schema }}.accounts as a
    group by a.id
    having count(*) > 1
    union all
    select
        'several system accounts of one name' as problem,
        concat_ws(' ', s.name, s.currency) as subject,
        array_to_string(array_agg(s.id order by s.id), ' ') as target
    from {{ schema }}.system_accounts as s
    group by s.name, s.currency
    having count(*) > 1
    union all
    select
        'several transactions with one id' as problem,
        t.id::text as subject,
        count(*)::text as target
    from {{ schema }}.transactions as t
    group by t.id
    having count(*) > 1
    union all
    select
        'several reversals of one transaction' as problem,
        t.reverses::text as subject,
        array_to_string(array_agg(t.id order by t.id), ' ') as target
    from {{ schema }}.transactions as t
    where t.reverses is not null
    group by t.reverses
    having count(*) > 1
    union all
    select
        'one idempotency key several times' as problem,
        k.key as subject,
        array_to_string(array_agg(k.transaction_id order by k.transaction_id), ' ') as target
    from {{ schema }}.idempotency_keys as k
    group by k.key
    having count(*) > 1
)

{{ first_of("found") }}

-- name: gone
-- Of what the run :run saw, how many are left, whether they were written again or not: those of that run's snapshot,
-- and what came by a logical restore, whose ids are another cluster's.
select
    'transactions that an earlier run saw and that are gone' as problem,
    'verification ' || (:run)::text as subject,
    ((:transactions)::bigint - s.still)::text as target,
    (:transactions)::bigint - s.still as in_all
from (
    select count(*) as still from {{ schema }}.transactions as t
    where
        t.id <= (select c.restored_id from {{ schema }}.control as c)
        or t.xid < pg_snapshot_xmin((:seen)::pg_snapshot)::text::bigint
        or t.xid < pg_snapshot_xmax((:seen)::pg_snapshot)::text::bigint
        and pg_visible_in_snapshot(t.xid::text::xid8, (:seen)::pg_snapshot)
) as s
where s.still < (:transactions)::bigint;
