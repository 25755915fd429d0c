-- What verify and the dry runs ask, in one snapshot; each statement stands under its name. All of them work on
-- whole sets in the database, and only sums and the first differences travel to the client.
{# A key's place among the ranges of keys, and the seed of its balance's hash. The seed of all is drawn anew for each
   run, so that nobody can choose balances whose hashes add up. #}
{% macro place(key) -%}
    hashtextextended({{ key }}, cast(:seed as bigint))
{%- endmacro %}
{% macro legacy_place() -%}
    {{ place("l." ~ key ~ '::text collate "C"') }}
{%- endmacro %}

{# Legacy row by legacy row what stands against it, of all keys, of some ranges, or of some keys. #}
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
        where
            x.mapping = '{{ mapping }}' and x.bucket = '{{ c.bucket }}' and x.currency = '{{ c.currency }}'
            {% if within == "ranges" %}
            and {{ place("x.key") }} & {{ last_range }} = any(cast(:ranges as bigint[]))
            {% elif within == "keys" %}
            and x.key = any(cast(:keys as text[]))
            {% endif %}
    ) as a
    full join (
        select l.* from {{ relation }} as l
        {% if within == "ranges" %}
        where {{ legacy_place() }} & {{ last_range }} = any(cast(:ranges as bigint[]))
        {% elif within == "keys" %}
        where
            l.{{ key }} = any(cast(cast(:legacy_keys as text[]) as {{ key_type }}[]))
            -- A collation of the key's may take other keys for the same.
            and l.{{ key }}::text collate "C" = any(cast(:keys as text[]))
        {% endif %}
    ) as l on a.key = l.{{ key }}::text collate "C"
    {{ "union all" if not loop.last }}
    {% endfor %}
{% endmacro %}

{# A row for each trait of a legacy row, as the table or as the comparison has it. #}
{% macro traits_of(compared) %}
    cross join lateral (
        values
        {% for t in traits %}
            (
                {{ loop.index }},
                {{ "x.trait_" ~ loop.index if compared else "l." ~ t ~ "::text" }}
            ){{ "," if not loop.last }}
        {% else %}
            (0, null::text)
        {% endfor %}
    ) as t (which, value)
{% endmacro %}

-- name: legacy
-- The root of the ranges, on the side of the legacy table; and its totals by trait. One pass, in parallel: a
-- grouping by the traits' values together is cheap where they are few, and right where they are many.
with together as (
    select
        {% for t in traits %}
            l.{{ t }}::text as trait_{{ loop.index }},
        {% endfor %}
        {% for c in columns %}
            sum({{ c.value }}) as sum_{{ loop.index }},
            sum(hash_numeric_extended({{ c.value }}, {{ legacy_place() }})) as hash_{{ loop.index }},
        {% endfor %}
        count(*) as accounts
    from {{ relation }} as l
    {% if traits %}
        group by l.{{ traits | join("::text, l.") }}::text
    {% endif %}
),

grouped as (
    select
        {% if traits %}
            grouping(
                {% for t in traits %}
                    trait_{{ loop.index }}{{ "," if not loop.last }}
                {% endfor %}
            ) as which,
            {% for t in traits %}
                trait_{{ loop.index }},
            {% endfor %}
        {% else %}
        0 as which,
        {% endif %}
        {% for c in columns %}
            sum(sum_{{ loop.index }}) as sum_{{ loop.index }},
            sum(hash_{{ loop.index }}) as hash_{{ loop.index }},
        {% endfor %}
        coalesce(sum(accounts), 0)::bigint as accounts
    from together
    {% if traits %}
        group by grouping sets ((){% for t in traits %}, (trait_{{ loop.index }}){% endfor %})
    {% endif %}
),

ranked as (
    select
        *,
        row_number() over (
            partition by which
            order by which{% for t in traits %}, trait_{{ loop.index }}{% endfor %}

        ) as rank
    from grouped
)

select * from ranked
where rank <= :limit;

-- name: ledger
-- The same root on the side of the ledger, by state, of all mappings: the sums are those of the whole ledger, and
-- last is what the journal's steps have to lead to.
select
    mapping,
    bucket,
    currency,
    state::text as state,
    count(*) as accounts,
    sum(balance) as balance,
    sum(hash_numeric_extended(balance, {{ place("key") }})) as hash,
    sum(case when balance <> 0 then hash_numeric_extended(balance, hashint8extended(id, (:seed)::bigint)) end) as last
from {{ schema }}.accounts
group by mapping, bucket, currency, state;

-- name: ranges
-- One level down: which ranges of keys differ in count, sum or hash, or hold accounts that are not compared so.
with
{% for c in columns %}
    legacy_{{ loop.index }} as (
        select
            {{ legacy_place() }} & {{ last_range }} as number,
            count(*) as accounts,
            sum({{ c.value }}) as balance,
            sum(hash_numeric_extended({{ c.value }}, {{ legacy_place() }})) as hash
        from {{ relation }} as l
        group by {{ legacy_place() }} & {{ last_range }}
    ),

    ledger_{{ loop.index }} as (
        select
            {{ place("x.key") }} & {{ last_range }} as number,
            count(*) filter (where x.state = 'mirrored') as accounts,
            sum(x.balance) filter (where x.state = 'mirrored') as balance,
            sum(hash_numeric_extended(x.balance, {{ place("x.key") }})) filter (where x.state = 'mirrored') as hash,
            count(*) filter (where x.state in ('stale', 'frozen')) as others
        from {{ schema }}.accounts as x
        where x.mapping = '{{ mapping }}' and x.bucket = '{{ c.bucket }}' and x.currency = '{{ c.currency }}'
        group by {{ place("x.key") }} & {{ last_range }}
    ){{ "," if not loop.last }}

{% endfor %}
{% for c in columns %}
    select
        '{{ c.bucket }}'::text as bucket,
        '{{ c.currency }}'::text as currency,
        coalesce(l.number, a.number) as number,
        coalesce(l.accounts, 0) as legacy_accounts,
        l.balance as legacy,
        coalesce(a.accounts, 0) as ledger_accounts,
        a.balance as ledger
    from legacy_{{ loop.index }} as l
    full join ledger_{{ loop.index }} as a on l.number = a.number
    where
        coalesce(a.others, 0) > 0
        or coalesce(l.accounts, 0) <> coalesce(a.accounts, 0)
        or l.balance is distinct from a.balance
        or l.hash is distinct from a.hash
    {{ "union all" if not loop.last }}
{% endfor %}
order by number, bucket, currency;

-- name: census
with compared as (
    {{ compared() }}
)

select
    bucket,
    currency,
    state,
    lives,
    exact,
    legacy = ledger as equal,
    count(*) as accounts,
    coalesce(sum(legacy), 0) as legacy,
    -- A closed account's balance is kept for the auditors; it stands against no legacy balance.
    coalesce(sum(ledger) filter (where lives or state <> 'closed'), 0) as ledger,
    coalesce(sum(abs(coalesce(legacy, 0) - ledger)), 0) as apart
from compared
group by bucket, currency, state, lives, exact, legacy = ledger;

-- name: totals
-- By trait and value: what legacy says of all rows, and the ledger by what differs in the ranges that differ.
with compared as (
    {{ compared() }}
),

apart as (
    select
        t.which,
        t.value,
        x.bucket,
        x.currency,
        sum(coalesce(x.ledger, 0) - coalesce(x.legacy, 0)) as amount
    from compared as x
    {{ traits_of(true) }}
    where x.lives or x.state <> 'closed'
    group by t.which, t.value, x.bucket, x.currency
),

whole as (
    select
        t.which,
        t.value,
        c.bucket,
        c.currency,
        coalesce(sum(c.legacy), 0) as amount
    from {{ relation }} as l
    {{ traits_of(false) }}
    cross join
        lateral (
            values
            {% for c in columns %}
                (
                    '{{ c.bucket }}'::text,
                    '{{ c.currency }}'::text,
                    case when {{ c.value }} > '-Infinity' and {{ c.value }} < 'Infinity' then {{ c.value }} end
                ){{ "," if not loop.last }}
            {% endfor %}
        ) as c (bucket, currency, legacy)
    group by t.which, t.value, c.bucket, c.currency
),

-- A trait may have as many values as there are accounts: those that differ most come first.
ranked as (
    select
        coalesce(w.which, d.which) as which,
        coalesce(w.value, d.value) as value,
        coalesce(w.bucket, d.bucket) as bucket,
        coalesce(w.currency, d.currency) as currency,
        coalesce(w.amount, 0) as legacy,
        coalesce(w.amount, 0) + coalesce(d.amount, 0) as ledger,
        row_number() over (
            partition by coalesce(w.which, d.which), coalesce(w.bucket, d.bucket), coalesce(w.currency, d.currency)
            order by abs(coalesce(d.amount, 0)) desc, coalesce(w.value, d.value)
        ) as rank
    from whole as w
    full join apart as d
        on
            w.which = d.which
            and coalesce(w.value, '') = coalesce(d.value, '')
            and (w.value is null) = (d.value is null)
            and w.bucket = d.bucket and w.currency = d.currency
)

select
    which,
    value,
    bucket,
    currency,
    legacy,
    ledger
from ranked
where rank <= :limit;

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

-- name: sample
-- The keys with the smallest hashes under a seed that nobody knew: each set of so many keys is equally likely, and
-- both sides are asked, so that rows without accounts and accounts without rows are in it.
with chosen as (
    (
        select
            l.{{ key }}::text collate "C" as key, -- noqa: RF03
            {{ legacy_place() }} as place -- noqa: RF03
        from {{ relation }} as l
        order by {{ legacy_place() }}
        limit :limit
    )
    union
    (
        select
            x.key,
            {{ place("x.key") }} as place
        from {{ schema }}.accounts as x
        where x.mapping = '{{ mapping }}'
        order by {{ place("x.key") }}
        limit :limit * {{ columns | length }}
    )
)

select key from chosen
order by place, key
limit :limit;

-- name: changed
-- Accounts with a transaction, or with a row, that was written by a transaction of the database that had not ended when
-- the last run looked. A row's xmin is the lower half of an id, which says nothing of what is older than 2 billion.
with looked as (
    select
        age(((:since)::bigint % 4294967296)::text::xid) as age,
        pg_snapshot_xmax(pg_current_snapshot())::text::bigint - (:since)::bigint > 2000000000 as long_ago
),

moved as (
    select t.credit_account as account from {{ schema }}.transactions as t
    where t.xid >= (:since)::bigint and t.credit_account > 0
    union
    select t.debit_account as account from {{ schema }}.transactions as t
    where t.xid >= (:since)::bigint and t.debit_account > 0
)

select distinct a.key
from {{ schema }}.accounts as a
cross join looked as w
left join moved as m on a.id = m.account
where a.mapping = '{{ mapping }}' and (m.account is not null or w.long_ago or age(a.xmin) <= w.age);

-- name: ids
select
    a.id,
    a.key
from {{ schema }}.accounts as a
where a.mapping = '{{ mapping }}' and a.key = any((:keys)::text[]);

-- name: explained
-- Of accounts that differed at the first look: those whose end of it the ledger can tell, by a transaction that the
-- first look did not see, or by their closing. One that turned stale is merely not compared any more, and not mended.
select
    a.key,
    a.bucket,
    a.currency
from {{ schema }}.accounts as a
where
    a.mapping = '{{ mapping }}' and a.key = any((:keys)::text[])
    and (
        a.state = 'closed'
        or exists (
            select from {{ schema }}.transactions as t
            where
                t.credit_account = a.id and t.credit_account > 0
                and not pg_visible_in_snapshot(t.xid::text::xid8, (:snapshot)::pg_snapshot)
        )
        or exists (
            select from {{ schema }}.transactions as t
            where
                t.debit_account = a.id and t.debit_account > 0
                and not pg_visible_in_snapshot(t.xid::text::xid8, (:snapshot)::pg_snapshot)
        )
    );

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
    ('append_only_truncate', 'audit_log', 34),
    ('append_only', 'verifications', 27),
    ('append_only_truncate', 'verifications', 34)
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

-- name: balances
with compared as (
    {{ compared() }}
)

select
    key,
    bucket,
    currency,
    case when state in ('mirrored', 'frozen') then ledger else legacy end as balance
from compared
where lives or state <> 'closed';
