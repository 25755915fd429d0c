-- sqlfluff:exclude_rules:references.keywords,references.from,structure.column_order,layout.indent,layout.select_targets
-- What reads snapshots: each statement stands under its name. Read-only; a snapshot is the same whenever it is asked.
{% from "windows.sql" import hashed, kinds, within %}

-- name: problems
-- Each account of a range: what the journal says it was at the snapshot, against the snapshot's rows.
with legs as (
    select x.account, x.id, x.kind, x.change, x.balance
    from {{ schema }}.snapshots as p
    cross join lateral (
        select t.credit_account as account, t.id, t.kind, t.amount as change, t.credit_balance as balance
        from {{ schema }}.transactions as t
        where
            t.credit_account > 0 and t.credit_account > :after and t.credit_account <= :upto
            and {{ within("t", "p") }}
        union all
        select t.debit_account as account, t.id, t.kind, -t.amount as change, t.debit_balance as balance
        from {{ schema }}.transactions as t
        where
            t.debit_account > 0 and t.debit_account > :after and t.debit_account <= :upto
            and {{ within("t", "p") }}
    ) as x
    where p.id = :snapshot
),

said as (
    select
        l.account,
        sum(l.change) as balance,
        max(l.id) as transaction_id,
        (array_agg(l.balance order by l.id desc))[1] as last_balance,
        count(*) as transactions,
        {% for kind in kinds %}
        coalesce(sum(l.change) filter (where l.kind = '{{ kind }}'), 0) as {{ kind }}{{ "," if not loop.last }}
        {% endfor %}
    from legs as l
    group by l.account
),

stored as (
    select
        b.account_id as account,
        (array_agg(b.balance order by b.snapshot_id desc))[1] as balance,
        max(b.transaction_id) as transaction_id,
        sum(b.transactions) as transactions,
        {% for kind in kinds %}
        coalesce(sum(b.{{ kind }}), 0) as {{ kind }}{{ "," if not loop.last }}
        {% endfor %}
    from {{ schema }}.snapshot_balances as b
    where b.account_id > :after and b.account_id <= :upto and b.snapshot_id <= :snapshot
    group by b.account_id
)

select
    coalesce(j.account, s.account) as account,
    a.mapping,
    a.key,
    a.bucket,
    coalesce(j.balance, 0) as expected,
    s.balance as found,
    case
        when s.account is null then 'missing'
        when j.account is null then 'unexplained'
        when j.balance <> s.balance then 'differs'
        when (j.last_balance is distinct from s.balance) then 'journal_broken'
        when j.transaction_id <> s.transaction_id or j.transactions <> s.transactions then 'transactions'
        else 'kinds'
    end as problem
from said as j
full join stored as s on j.account = s.account
left join {{ schema }}.accounts as a on a.id = coalesce(j.account, s.account)
where
    (j.balance, j.last_balance, j.transaction_id, j.transactions, {{ "j." ~ kinds | join(", j.") }})
    is distinct from
    (s.balance, s.balance, s.transaction_id, s.transactions, {{ "s." ~ kinds | join(", s.") }})
order by account;

-- name: owners
-- The balances of a range of accounts at the snapshot, added up.
select
    coalesce(a.mapping, '(unknown)') as mapping,
    coalesce(a.bucket, cast(min(n.account_id) as text)) as bucket,
    coalesce(a.currency, '') as currency,
    count(*) as accounts,
    sum(n.balance) as balance
from (
    select distinct on (b.account_id) b.account_id, b.balance
    from {{ schema }}.snapshot_balances as b
    where b.account_id > :after and b.account_id <= :upto and b.snapshot_id <= :snapshot
    order by b.account_id asc, b.snapshot_id desc
) as n
left join {{ schema }}.accounts as a on n.account_id = a.id
group by a.mapping, a.bucket, a.currency, case when a.id is null then n.account_id end;

-- name: next_account
-- Where the next range of accounts ends; null: none is left.
select max(x.id) as upto from (
    select a.id
    from {{ schema }}.accounts as a
    where a.id > :after
    order by a.id
    limit :limit
) as x;

-- name: system
-- The system accounts' part of a range of transactions, as far as they are in the snapshot.
select
    coalesce(x.name, cast(e.account as text)) as name,
    coalesce(x.currency, '') as currency,
    sum(e.change) as balance
from {{ schema }}.snapshots as p
inner join {{ schema }}.transactions as t on t.id > :after and t.id <= :upto and {{ within("t", "p") }}
cross join lateral (values (t.debit_account, -t.amount), (t.credit_account, t.amount)) as e (account, change)
left join {{ schema }}.system_accounts as x on e.account = x.id
where p.id = :snapshot and e.account < 0
group by e.account, x.name, x.currency;

-- name: next_transaction
select max(x.id) as upto from (
    select t.id
    from {{ schema }}.transactions as t
    where t.id > :after and t.id <= (select p.last_id from {{ schema }}.snapshots as p
        where p.id = :snapshot)
    order by t.id
    limit :limit
) as x;

-- name: bare
-- The newest snapshot up to this one that has transactions and no checksums (null: none), and how many those come to.
select
    max(n.snapshot_id) as upto,
    coalesce(sum(o.transactions) / 2, 0) as transactions
from (
    select max(t.snapshot_id) as snapshot_id
    from {{ schema }}.snapshot_totals as t
    where
        t.snapshot_id <= :snapshot and t.transactions > 0
        and not exists (
            select from {{ schema }}.snapshot_checksums as c
            where c.snapshot_id = t.snapshot_id
        )
) as n
left join {{ schema }}.snapshot_totals as o on n.snapshot_id >= o.snapshot_id;

-- name: checksums
-- Ranges of ids: what the journal has of this snapshot's transactions, and what it and those before have kept of them.
with held as (
    select
        t.id - t.id % 10000 as first_id,
        count(*) as transactions,
        sum({{ hashed("t") }}) as checksum
    from {{ schema }}.snapshots as p
    inner join {{ schema }}.transactions as t on t.id > :after and t.id <= :upto and {{ within("t", "p") }}
    left join {{ schema }}.snapshots as b on b.id = cast(:bare as bigint)
    where p.id = :snapshot and {{ within("t", "b") }} is not true
    group by t.id - t.id % 10000
),

kept as (
    select
        c.first_id,
        sum(c.transactions) as transactions,
        sum(c.checksum) as checksum
    from {{ schema }}.snapshot_checksums as c
    where
        c.first_id > :after and c.first_id <= :upto
        and c.snapshot_id <= :snapshot and c.snapshot_id > coalesce(cast(:bare as bigint), 0)
    group by c.first_id
)

select
    coalesce(h.first_id, k.first_id) as first_id,
    coalesce(k.transactions, 0) as kept,
    coalesce(k.checksum, 0) as kept_checksum,
    coalesce(h.transactions, 0) as held,
    coalesce(h.checksum, 0) as held_checksum
from held as h
full join kept as k on h.first_id = k.first_id
order by first_id;

-- name: windows
-- One of these ranges, by the snapshot that has each transaction first: those whose part is not what it was.
with kept as (
    select c.snapshot_id, c.transactions, c.checksum
    from {{ schema }}.snapshot_checksums as c
    where
        c.first_id = :first
        and c.snapshot_id <= :snapshot and c.snapshot_id > coalesce(cast(:bare as bigint), 0)
),

held as (
    select
        coalesce(w.snapshot_id, p.id) as snapshot_id,
        count(*) as transactions,
        sum({{ hashed("t") }}) as checksum
    from {{ schema }}.snapshots as p
    inner join {{ schema }}.transactions as t
        on t.id >= :first and t.id < cast(:first as bigint) + 10000 and {{ within("t", "p") }}
    left join {{ schema }}.snapshots as b on b.id = cast(:bare as bigint)
    left join lateral (
        select k.snapshot_id
        from kept as k
        inner join {{ schema }}.snapshots as s on k.snapshot_id = s.id
        where {{ within("t", "s") }}
        order by k.snapshot_id
        limit 1
    ) as w on true
    where p.id = :snapshot and {{ within("t", "b") }} is not true
    group by coalesce(w.snapshot_id, p.id)
)

select
    coalesce(h.snapshot_id, k.snapshot_id) as snapshot_id,
    coalesce(k.transactions, 0) as kept,
    coalesce(h.transactions, 0) as held
from held as h
full join kept as k on h.snapshot_id = k.snapshot_id
where (h.transactions, h.checksum) is distinct from (k.transactions, k.checksum)
order by snapshot_id;

-- name: balances
-- All accounts that had a transaction by then, with what changed since the snapshot before.
select
    a.mapping, a.key, a.bucket, a.currency, n.account_id, n.balance, n.transaction_id,
    {% for kind in kinds %}
    case when n.snapshot_id = :snapshot then coalesce(n.{{ kind }}, 0) else 0 end as {{ kind }},
    {% endfor %}
    case when n.snapshot_id = :snapshot then n.transactions else 0 end as transactions
from (
    select distinct on (b.account_id) b.*
    from {{ schema }}.snapshot_balances as b
    where b.snapshot_id <= :snapshot
    order by b.account_id asc, b.snapshot_id desc
) as n
left join {{ schema }}.accounts as a on n.account_id = a.id
order by n.account_id;

-- name: journal
-- What the journal says of every account's kinds of money, by mapping, bucket and currency: what snapshots have folded,
-- and what came since the newest. `bypass` is what came from the system account of that name, if no snapshot has folded
-- any of it: those keep the kinds alone.
with newest as (
    select p.*
    from {{ schema }}.snapshots as p
    where p.state = 'complete'
    order by p.id desc
    limit 1
),

since as (
    select
        e.account,
        t.kind,
        e.change,
        y.id is not null as bypass
    from {{ schema }}.transactions as t
    cross join lateral (values
        (t.debit_account, -t.amount, t.credit_account),
        (t.credit_account, t.amount, t.debit_account)
    ) as e (account, change, other)
    left join {{ schema }}.system_accounts as y on e.other = y.id and y.name = 'bypass'
    where not exists (select from newest as p where {{ within("t", "p") }})
    -- Only the tail is read: by xid, and by id for what a restore or another cluster's counter would hide.
    and (
        cast(:horizon as bigint) is null
        or t.xid >= cast(:horizon as bigint)
        or t.id > cast(:last_id as bigint)
    )
),

parts as (
    select
        coalesce(a.mapping, case when x.id is null then '(unknown)' else '(system)' end) as mapping,
        coalesce(a.bucket, x.name, cast(min(s.account) as text)) as bucket,
        coalesce(a.currency, x.currency, '') as currency,
        sum(s.change) as balance,
        coalesce(sum(s.change) filter (where s.bypass), 0) as bypass,
        {% for kind in kinds %}
        coalesce(sum(s.change) filter (where s.kind = '{{ kind }}'), 0) as {{ kind }}{{ "," if not loop.last }}
        {% endfor %}
    from since as s
    left join {{ schema }}.accounts as a on s.account = a.id
    left join {{ schema }}.system_accounts as x on s.account = x.id
    group by
        a.mapping, a.bucket, a.currency, x.id, x.name, x.currency, case when a.id is null then s.account end
    union all
    select
        o.mapping, o.bucket, o.currency,
        o.opening + o.resync + o.posting + o.correction + o.reversal as balance,
        cast(null as numeric) as bypass,
        {{ "o." ~ kinds | join(", o.") }}
    from {{ schema }}.snapshot_totals as o
    inner join {{ schema }}.snapshots as s on o.snapshot_id = s.id
    where s.state = 'complete' or s.state = 'pruned'
)

select
    mapping,
    bucket,
    currency,
    sum(balance) as balance,
    case when count(bypass) = count(*) then sum(bypass) end as bypass,
    {% for kind in kinds %}
    sum({{ kind }}) as {{ kind }}{{ "," if not loop.last }}
    {% endfor %}
from parts
group by mapping, bucket, currency
order by mapping, bucket, currency;
