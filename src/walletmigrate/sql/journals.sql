-- What verify asks the journal, in the same snapshot as the statements of verify.sql.
{# Hash of the balance after, or before, a transaction on the side of an owner. #}
{% macro credited(change="") -%}
    hash_numeric_extended(t.credit_balance {{ change }}, hashint8extended(t.credit_account, cast(:seed as bigint)))
{%- endmacro %}
{% macro debited(change="") -%}
    hash_numeric_extended(t.debit_balance {{ change }}, hashint8extended(t.debit_account, cast(:seed as bigint)))
{%- endmacro %}

{# Whether a row stands as an earlier run saw it, whose snapshot was :seen, from :horizon to :next: the transaction of
   the database that it names had been committed, and the row has not been written again since. It was written by that
   transaction, or by a subtransaction, whose id is a little larger; xmin is the lower half of that id, which the row's
   own number completes, so that it holds of rows that are older than ids go round. Read as a text it is slow, and most
   rows can do without. Of no earlier run (1, 1): none. #}
{% macro untouched() -%}
    (
        (
            t.xid < (:horizon)::bigint
            or t.xid < (:next)::bigint
            and pg_visible_in_snapshot(t.xid::text::xid8, (:seen)::pg_snapshot)
        )
        and case
            when t.xmin = (((t.xid + 2147483648) & 4294967295) - 2147483648)::integer then true
            else (t.xmin::text::bigint - t.xid) & 4294967295 < least(16777216, (:next)::bigint - t.xid)
        end
    )
{%- endmacro %}

{% macro of_accounts(account) %}
    {% if within == "keys" %}
        and {{ account }} = any(cast(:accounts as bigint[]))
    {% endif %}
{% endmacro %}

-- name: journal
with legs as (
    select
        t.id,
        t.credit_account as account,
        t.amount as change,
        t.credit_balance as balance,
        t.currency,
        t.credit_account = t.debit_account as pays_itself
    from {{ schema }}.transactions as t
    where
        t.credit_account > 0
        {{ of_accounts("t.credit_account") }}
    union all
    select
        t.id,
        t.debit_account as account,
        -t.amount as change,
        t.debit_balance as balance,
        t.currency,
        t.credit_account = t.debit_account as pays_itself
    from {{ schema }}.transactions as t
    where
        t.debit_account > 0
        {{ of_accounts("t.debit_account") }}
),

chain as (
    select
        account,
        id,
        change,
        balance,
        currency,
        pays_itself,
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
        min(id) filter (where pays_itself) as itself_at,
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
    s.itself_at,
    a.id is null as unknown,
    (a.balance is distinct from coalesce(s.total, 0)) as unexplained,
    (s.account is not null and a.balance is distinct from s.last_balance) as not_last,
    a.currency <> s.first_currency or a.currency <> s.last_currency as other_currency,
    count(*) over () as found
from (
    select x.* from {{ schema }}.accounts as x
    where
        true
        {{ of_accounts("x.id") }}
) as a
full join summed as s on a.id = s.account
where
    (a.id is null or a.mapping = '{{ mapping }}')
    and (
        a.id is null
        or a.balance is distinct from coalesce(s.total, 0)
        or s.broken_at is not null
        or s.itself_at is not null
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
    where t.credit_account <= 0
    union all
    select
        t.debit_account as account,
        -t.amount as change,
        t.currency,
        t.xid
    from {{ schema }}.transactions as t
    where t.debit_account <= 0
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

-- name: steps
-- The root of the journal: of each account of the system what went in and out, and of the owners' the hashes of the
-- balances that steps led to and from. Each must be left as often as it was come to, but for the last. Nothing is not
-- among them: as each step has two ends, it comes out when all others do. Three passes that each take their own rows
-- run in parallel, where one grouping of all would not.
select
    'debit' as side,
    t.debit_account as account,
    t.currency,
    count(*) as transactions,
    count(*) filter (where {{ untouched() }}) as untouched,
    sum(t.amount) as amount,
    sum(t.amount) filter (where t.xid < (:folded)::bigint) as folded,
    sum(case when t.credit_account > 0 and t.credit_balance <> 0 then {{ credited() }} end) as after,
    sum(
        case when t.credit_account > 0 and t.credit_balance <> t.amount then {{ credited("- t.amount") }} end
    ) as before,
    count(*) filter (where t.credit_account > 0 and t.credit_balance is distinct from t.amount) as further,
    count(t.group_id) as grouped,
    0 as pay_themselves
from {{ schema }}.transactions as t
where t.debit_account <= 0
group by t.debit_account, t.currency
union all
select
    'credit' as side,
    t.credit_account as account,
    t.currency,
    count(*) as transactions,
    count(*) filter (where {{ untouched() }}) as untouched,
    sum(t.amount) as amount,
    sum(t.amount) filter (where t.xid < (:folded)::bigint) as folded,
    sum(case when t.debit_account > 0 and t.debit_balance <> 0 then {{ debited() }} end) as after,
    sum(
        case when t.debit_account > 0 and t.debit_balance <> -t.amount then {{ debited("+ t.amount") }} end
    ) as before,
    count(*) filter (where t.debit_account > 0 and t.debit_balance is distinct from -t.amount) as further,
    count(t.group_id) filter (where t.debit_account > 0) as grouped,
    0 as pay_themselves
from {{ schema }}.transactions as t
where t.credit_account <= 0
group by t.credit_account, t.currency
union all
select
    'owners' as side,
    null as account,
    t.currency,
    count(*) as transactions,
    count(*) filter (where {{ untouched() }}) as untouched,
    null as amount,
    null as folded,
    coalesce(sum(case when t.credit_balance <> 0 then {{ credited() }} end), 0)
    + coalesce(sum(case when t.debit_balance <> 0 then {{ debited() }} end), 0) as after,
    coalesce(sum(case when t.credit_balance <> t.amount then {{ credited("- t.amount") }} end), 0)
    + coalesce(sum(case when t.debit_balance <> -t.amount then {{ debited("+ t.amount") }} end), 0) as before,
    count(*) as further,
    count(t.group_id) as grouped,
    count(*) filter (where t.debit_account = t.credit_account) as pay_themselves
from {{ schema }}.transactions as t
where t.debit_account > 0 and t.credit_account > 0
group by t.currency;

-- name: fresh
-- Transactions that are not untouched, if no other ones are missing: those by the journal's newest rows.
select
    t.credit_account,
    t.debit_account
from {{ schema }}.transactions as t
where
    t.xid >= (:horizon)::bigint
    and not {{ untouched() }};

-- name: disorder
-- Where the steps come out as a set: whether an account's transactions do so in their order too. Looked at are
-- accounts with a step that is not untouched; and of these, where no earlier run has looked at the rest (:known), those
-- with a step from another balance than nothing. What is sorted is as narrow as can be.
with moved as (
    select t.credit_account as account
    from {{ schema }}.transactions as t
    where
        t.credit_account > 0
        and not {{ untouched() }}
        and ((:known)::boolean or t.credit_balance is distinct from t.amount)
    union all
    select t.debit_account as account
    from {{ schema }}.transactions as t
    where
        t.debit_account > 0
        and not {{ untouched() }}
        and ((:known)::boolean or t.debit_balance is distinct from -t.amount)
),

steps as (
    select
        t.id,
        t.credit_account as account,
        hash_numeric_extended(t.credit_balance, (:seed)::bigint) as after,
        hash_numeric_extended(t.credit_balance - t.amount, (:seed)::bigint) as before
    from {{ schema }}.transactions as t
    where t.credit_account > 0
    union all
    select
        t.id,
        t.debit_account as account,
        hash_numeric_extended(t.debit_balance, (:seed)::bigint) as after,
        hash_numeric_extended(t.debit_balance + t.amount, (:seed)::bigint) as before
    from {{ schema }}.transactions as t
    where t.debit_account > 0
),

chain as (
    select
        before,
        lag(after, 1, hash_numeric_extended(0, (:seed)::bigint)) over in_order as led
    from steps
    where account in (select m.account from moved as m)
    window in_order as (partition by account order by id)
)

select count(*) > 0 as found from chain
where before is distinct from led;
