-- What verify and the dry runs ask, in one snapshot; each statement stands under its name. All of them work on
-- whole sets in the database, and only sums and the first differences travel to the client.
{% macro compared() %}
    {% for c in columns %}
    select
        coalesce(a.key, l.{{ key }}::text collate "C") as key,
        '{{ c.bucket }}'::text as bucket,
        '{{ c.currency }}'::text as currency,
        coalesce(a.state::text, 'absent') as state,
        a.balance as ledger,
        -- NaN is greater than infinity, so one upper bound excludes both.
        case when {{ c.value }} > '-Infinity' and {{ c.value }} < 'Infinity' then {{ c.value }} end as legacy,
        {{ c.value }} > '-Infinity' and {{ c.value }} < 'Infinity'
        and {{ c.value }} = round({{ c.value }}, {{ c.scale }}) is true as exact,
        {% for t in traits %}
        l.{{ t }}::text as trait_{{ loop.index }},
        {% endfor %}
        l.{{ key }} is not null as lives
    from (
        select x.key, x.state, x.balance from {{ schema }}.accounts as x
        where x.mapping = '{{ mapping }}' and x.bucket = '{{ c.bucket }}' and x.currency = '{{ c.currency }}'
    ) as a
    full join {{ relation }} as l on a.key = l.{{ key }}::text collate "C"
    {{ "union all" if not loop.last }}
    {% endfor %}
{% endmacro %}

-- name: census
with compared as (
    {{ compared() }}
),

grouped as (
    select
        grouping({% for t in traits %}trait_{{ loop.index }}, {% endfor %}bucket) as which,
        bucket,
        currency,
        state,
        lives,
        exact,
        legacy = ledger as equal,
        {% for t in traits %}
            trait_{{ loop.index }},
        {% endfor %}
        count(*) as accounts,
        coalesce(sum(legacy), 0) as legacy,
        -- A closed account's balance is kept for the auditors; it stands against no legacy balance.
        coalesce(sum(ledger) filter (where lives or state <> 'closed'), 0) as ledger,
        coalesce(sum(abs(coalesce(legacy, 0) - ledger)), 0) as apart
    from compared
    group by grouping sets (
        {% for t in traits %}
            (bucket, currency, trait_{{ loop.index }}),
        {% endfor %}
        (bucket, currency, state, lives, exact, legacy = ledger)
    )
),

-- A trait may have as many values as there are accounts: those that differ most come first.
ranked as (
    select
        *,
        row_number() over (
            partition by which, bucket, currency
            order by
                abs(legacy - ledger) desc
                {%- for t in traits %}, trait_{{ loop.index }}{% endfor %}

        ) as place
    from grouped
)

select * from ranked
where state is not null or place <= :limit;

-- name: differences
with compared as (
    {{ compared() }}
),

judged as (
    select
        key,
        bucket,
        currency,
        legacy,
        ledger,
        state,
        case
            when state = 'absent' then 'missing'
            when state = 'closed' then case when lives then 'reopened' end
            when not lives then 'orphan'
            when state = 'stale' then 'stale'
            when state = 'frozen' then null
            when legacy is null then 'no_value'
            when legacy <> ledger then 'differs'
        end as problem
    from compared
)

select * from judged
where problem in ('missing', 'stale') = :behind
order by key, bucket, currency
limit :limit;

-- name: journal
with legs as (
    select
        t.id,
        t.credit_account as account,
        t.amount as change,
        t.credit_balance as balance,
        t.currency
    from {{ schema }}.transactions as t
    where t.credit_account > 0
    union all
    select
        t.id,
        t.debit_account as account,
        -t.amount as change,
        t.debit_balance as balance,
        t.currency
    from {{ schema }}.transactions as t
    where t.debit_account > 0
),

chain as (
    select
        account,
        id,
        change,
        balance,
        currency,
        change + lag(balance, 1, 0::numeric) over in_order as expected,
        lead(id) over in_order is null as is_last
    from legs
    window in_order as (partition by account order by id)
),

summed as (
    select
        account,
        sum(change) as total,
        max(balance) filter (where is_last) as last_balance,
        min(id) filter (where balance is distinct from expected) as broken_at,
        min(currency) as first_currency,
        max(currency) as last_currency
    from chain
    group by account
)

select
    coalesce(a.id, s.account) as account,
    a.key,
    a.bucket,
    coalesce(a.currency, s.first_currency) as currency,
    a.balance,
    coalesce(s.total, 0) as total,
    s.last_balance,
    s.broken_at,
    a.id is null as unknown,
    (a.balance is distinct from coalesce(s.total, 0)) as unexplained,
    (s.account is not null and a.balance is distinct from s.last_balance) as not_last,
    a.currency <> s.first_currency or a.currency <> s.last_currency as other_currency,
    count(*) over () as found
from {{ schema }}.accounts as a
full join summed as s on a.id = s.account
where
    (a.id is null or a.mapping = '{{ mapping }}')
    and (
        a.id is null
        or a.balance is distinct from coalesce(s.total, 0)
        or s.broken_at is not null
        or s.account is not null and a.balance is distinct from s.last_balance
        or a.currency <> s.first_currency or a.currency <> s.last_currency
    )
order by account
limit :limit;

-- name: system
with legs as (
    select
        t.credit_account as account,
        t.amount as change,
        t.currency,
        t.xid
    from {{ schema }}.transactions as t
    where t.credit_account < 0
    union all
    select
        t.debit_account as account,
        -t.amount as change,
        t.currency,
        t.xid
    from {{ schema }}.transactions as t
    where t.debit_account < 0
),

summed as (
    select
        l.account,
        sum(l.change) filter (where l.xid < s.folded_xid) as folded,
        sum(l.change) filter (where s.id is null or l.xid >= s.folded_xid) as since,
        min(l.currency) as first_currency,
        max(l.currency) as last_currency
    from legs as l
    left join {{ schema }}.system_accounts as s on l.account = s.id
    group by l.account
)

select
    coalesce(s.id, u.account) as account,
    s.name,
    coalesce(s.currency, u.first_currency) as currency,
    s.id is null as unknown,
    coalesce(s.balance, 0) + coalesce(u.since, 0) as balance,
    coalesce(u.folded, 0) + coalesce(u.since, 0) as total,
    s.currency <> u.first_currency or s.currency <> u.last_currency as other_currency
from {{ schema }}.system_accounts as s
full join summed as u on s.id = u.account
order by account desc;

-- name: owners
select
    currency,
    sum(balance) as balance
from {{ schema }}.accounts
group by currency;

-- name: append_only
select
    format('%s on %I.%I', w.name, '{{ mapping }}', w.relation) as trigger,
    w.name,
    w.relation,
    t.oid is not null as stands,
    t.tgenabled::text as enabled,
    t.tgtype = w.type and t.tgfoid = p.oid and t.tgqual is null and t.tgattr::text = '' as as_made
from (
    values
    ('append_only', 'transactions', 27),
    ('append_only_truncate', 'transactions', 34),
    ('append_only', 'audit_log', 27),
    ('append_only_truncate', 'audit_log', 34)
) as w (name, relation, type)
left join pg_namespace as n on n.nspname = :schema
left join pg_class as c on n.oid = c.relnamespace and w.relation = c.relname
left join pg_proc as p on n.oid = p.pronamespace and p.proname = 'refuse_change'
left join pg_trigger as t on c.oid = t.tgrelid and w.name = t.tgname;

-- name: bodies
select
    p.proname as name,
    p.prosrc as body
from pg_proc as p
inner join pg_namespace as n on p.pronamespace = n.oid
where
    n.nspname = :schema
    and p.proname in ('refuse_change', 'fence_{{ mapping }}', 'fence_truncate_{{ mapping }}');
