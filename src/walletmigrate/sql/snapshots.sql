-- sqlfluff:exclude_rules:references.keywords,references.from,structure.column_order,layout.indent,layout.long_lines
-- (long lines are not checked here: sqlfluff adds up what the loops render; no line has more than 120 characters)
-- Snapshots: all balances as of one set of transactions, folded from the journal in batches.

{% from "windows.sql" import hashed, kinds, within %}

-- Begin a snapshot, or go on with the one that is not finished. What is in it is decided by one statement's view of
-- the database: a posting in flight is not, though it commits a moment later.
create or replace function {{ schema }}.begin_snapshot(p_actor text, p_reason text) returns bigint
language plpgsql
set search_path = pg_catalog, {{ schema }}, pg_temp
as $$
declare
    v_id bigint;
    v_previous bigint;
begin
    select s.id into v_id from snapshots as s where s.state = 'running';
    if found then
        return v_id;
    end if;
    select max(s.id) into v_previous from snapshots as s where s.state = 'complete';
    insert into snapshots (previous, horizon, next_xid, in_flight, last_id, restored_id, cursor, actor, reason)
    select
        v_previous,
        pg_snapshot_xmin(w.seen)::text::bigint,
        pg_snapshot_xmax(w.seen)::text::bigint,
        array(select x::text::bigint from pg_snapshot_xip(w.seen) as x),
        case when n.is_called then n.last_value else 0 end,
        k.restored_id,
        0,
        p_actor,
        p_reason
    from (select pg_current_snapshot() as seen) as w, transaction_ids as n, control as k
    returning id into v_id;
    -- The first transaction that the snapshot before has not: behind its last id, or one that was in flight then.
    update snapshots as s
    set cursor = least(p.last_id, (
        select min(x.id) - 1 from (
            select t.id from transactions as t
            where t.xid >= p.horizon and t.id <= p.last_id and t.id > p.restored_id
            offset 0
        ) as x
    ))
    from snapshots as p
    where s.id = v_id and p.id = v_previous;
    insert into snapshot_totals (
        snapshot_id, mapping, bucket, currency, accounts, balance, changed, {{ kinds | join(", ") }}, transactions
    )
    select v_id, o.mapping, o.bucket, o.currency, o.accounts, o.balance, 0, 0, 0, 0, 0, 0, 0
    from snapshot_totals as o
    where o.snapshot_id = v_previous;
    return v_id;
end
$$;

-- Fold the transactions of a snapshot with p_after < id <= p_upto into its rows and totals. The caller sees to it that
-- each range is folded once, in the order of ids.
create or replace function {{ schema }}.fold_snapshot(p_snapshot bigint, p_after bigint, p_upto bigint) returns void
language plpgsql
set search_path = pg_catalog, {{ schema }}, pg_temp
-- Each batch reads by index, planned for what stands there now: the first one finds a table without a row, and a plan
-- that was made for that walks all of it for each account later on.
set enable_seqscan = off
set plan_cache_mode = force_custom_plan
as $$
declare
    p snapshots;
    o snapshots;
begin
    select * into strict p from snapshots as s where s.id = p_snapshot;
    select * into o from snapshots as s where s.id = p.previous;
    if not found then
        o.last_id := 0;
        o.restored_id := 0;
        o.horizon := 0;
        o.next_xid := 0;
        o.in_flight := '{}';
    end if;
    with legs as (
        select e.account, e.change, e.balance, t.id, t.kind
        from transactions as t
        cross join lateral (
            values (t.debit_account, -t.amount, t.debit_balance), (t.credit_account, t.amount, t.credit_balance)
        ) as e (account, change, balance)
        where t.id > p_after and t.id <= p_upto and {{ within("t", "p") }} and not {{ within("t", "o") }}
    ), summed as materialized (
        select
            l.account,
            max(l.id) as transaction_id,
            (array_agg(l.balance order by l.id desc))[1] as balance,
            sum(l.change) as change,
            {% for kind in kinds %}
            sum(l.change) filter (where l.kind = '{{ kind }}') as {{ kind }},
            {% endfor %}
            count(*) as transactions
        from legs as l
        group by l.account
    ), placed as materialized (
        select
            coalesce(a.mapping, case when x.id is null then '(unknown)' else '(system)' end) as mapping,
            coalesce(a.bucket, x.name, s.account::text) as bucket,
            coalesce(a.currency, x.currency, '') as currency,
            -- The account's newest row before this batch: none at all, an older snapshot's, or this one's.
            s.account > 0 and b.snapshot_id is null as first,
            s.account > 0 and b.snapshot_id is distinct from p.id as fresh,
            s.*
        from summed as s
        left join accounts as a on s.account = a.id
        left join system_accounts as x on s.account = x.id
        left join lateral (
            select e.snapshot_id from snapshot_balances as e
            where e.account_id = s.account and e.snapshot_id <= p.id
            order by e.snapshot_id desc
            limit 1
        ) as b on true
    ), written as (
        insert into snapshot_balances as b (
            account_id, snapshot_id, transaction_id, balance, {{ kinds | join(", ") }}, transactions
        )
        select s.account, p.id, s.transaction_id, s.balance, s.{{ kinds | join(", s.") }}, s.transactions
        from placed as s
        where s.account > 0
        order by s.account
        on conflict (account_id, snapshot_id) do update
        set
            transaction_id = excluded.transaction_id,
            balance = excluded.balance,
            {% for kind in kinds %}
            {{ kind }} = case
                when b.{{ kind }} is null then excluded.{{ kind }}
                else b.{{ kind }} + coalesce(excluded.{{ kind }}, 0)
            end,
            {% endfor %}
            transactions = b.transactions + excluded.transactions
    )
    insert into snapshot_totals as n (
        snapshot_id, mapping, bucket, currency, accounts, balance, changed, {{ kinds | join(", ") }}, transactions
    )
    select
        p.id, l.mapping, l.bucket, l.currency,
        count(*) filter (where l.first), sum(l.change), count(*) filter (where l.fresh),
        {% for kind in kinds %}
        coalesce(sum(l.{{ kind }}), 0),
        {% endfor %}
        sum(l.transactions)
    from placed as l
    group by l.mapping, l.bucket, l.currency
    on conflict (snapshot_id, mapping, bucket, currency) do update
    set
        {% for name in ["accounts", "balance", "changed"] + kinds + ["transactions"] %}
        {{ name }} = n.{{ name }} + excluded.{{ name }}{{ "," if not loop.last }}
        {% endfor %};
    insert into snapshot_checksums as c (first_id, snapshot_id, transactions, checksum)
    select t.id - t.id % 10000, p.id, count(*), sum({{ hashed("t") }})
    from transactions as t
    where t.id > p_after and t.id <= p_upto and {{ within("t", "p") }} and not {{ within("t", "o") }}
    group by t.id - t.id % 10000
    on conflict (first_id, snapshot_id) do update
    set transactions = c.transactions + excluded.transactions, checksum = c.checksum + excluded.checksum;
end
$$;

-- One batch: the next p_limit transactions behind the cursor, cursor and rows in one transaction. Two processes take
-- turns on the snapshot's row. Returns how many were read; none: it is complete.
create or replace function {{ schema }}.advance_snapshot(p_snapshot bigint, p_limit integer) returns bigint
language plpgsql
set search_path = pg_catalog, {{ schema }}, pg_temp
as $$
declare
    p snapshots;
    v_upto bigint;
    v_read bigint;
begin
    select * into strict p from snapshots as s where s.id = p_snapshot for no key update;
    if p.state <> 'running' then
        return 0;
    end if;
    select max(x.id), count(*) into v_upto, v_read from (
        select t.id from transactions as t where t.id > p.cursor and t.id <= p.last_id order by t.id limit p_limit
    ) as x;
    if v_read > 0 then
        perform fold_snapshot(p.id, p.cursor, v_upto);
        update snapshots as s set cursor = v_upto where s.id = p.id;
    else
        update snapshots as s set state = 'complete', finished_at = clock_timestamp() where s.id = p.id;
    end if;
    return v_read;
end
$$;

-- Merge what older snapshots say of the next p_limit accounts behind p_after into snapshot p_into, which then counts
-- from the first transaction. Returns the last account that was looked at, null when none was left.
create or replace function {{ schema }}.merge_snapshots(p_into bigint, p_after bigint, p_limit integer) returns bigint
language plpgsql
set search_path = pg_catalog, {{ schema }}, pg_temp
as $$
declare
    v_upto bigint;
begin
    perform 1 from snapshots as s where s.id = p_into for no key update;
    select max(x.account_id) into v_upto from (
        select b.account_id from snapshot_balances as b where b.account_id > p_after order by b.account_id limit p_limit
    ) as x;
    with old as (
        delete from snapshot_balances as b
        where b.account_id > p_after and b.account_id <= v_upto and b.snapshot_id < p_into
        returning b.*
    )
    insert into snapshot_balances as b (
        account_id, snapshot_id, transaction_id, balance, {{ kinds | join(", ") }}, transactions
    )
    select
        o.account_id, p_into, max(o.transaction_id), (array_agg(o.balance order by o.snapshot_id desc))[1],
        {% for kind in kinds %}
        sum(o.{{ kind }}),
        {% endfor %}
        sum(o.transactions)
    from old as o
    group by o.account_id
    -- The newer row's balance and last transaction stay.
    on conflict (account_id, snapshot_id) do update
    set
        {% for kind in kinds %}
        {{ kind }} = case
            when b.{{ kind }} is null then excluded.{{ kind }}
            else b.{{ kind }} + coalesce(excluded.{{ kind }}, 0)
        end,
        {% endfor %}
        transactions = b.transactions + excluded.transactions;
    return v_upto;
end
$$;

-- The end of a prune: totals and checksums of what was merged go to the snapshot that is kept, the others' rows go. Where
-- one has transactions and no checksums, it was taken before they were kept, and the merged one has none either.
create or replace function {{ schema }}.drop_snapshots(p_into bigint) returns bigint
language plpgsql
set search_path = pg_catalog, {{ schema }}, pg_temp
as $$
declare
    v_dropped bigint;
begin
    perform 1 from snapshots as s where s.id = p_into for no key update;
    if exists (
        select from snapshot_totals as t
        where
            t.snapshot_id <= p_into and t.transactions > 0
            and not exists (select from snapshot_checksums as c where c.snapshot_id = t.snapshot_id)
    ) then
        delete from snapshot_checksums as c where c.snapshot_id <= p_into;
    end if;
    with old as (
        delete from snapshot_checksums as c where c.snapshot_id < p_into returning c.*
    )
    insert into snapshot_checksums as c (first_id, snapshot_id, transactions, checksum)
    select o.first_id, p_into, sum(o.transactions), sum(o.checksum) from old as o group by o.first_id
    on conflict (first_id, snapshot_id) do update
    set transactions = c.transactions + excluded.transactions, checksum = c.checksum + excluded.checksum;
    with old as (
        delete from snapshot_totals as t where t.snapshot_id < p_into returning t.*
    ), summed as (
        select
            o.mapping, o.bucket, o.currency,
            {% for name in kinds + ["transactions"] %}
            sum(o.{{ name }}) as {{ name }}{{ "," if not loop.last }}
            {% endfor %}
        from old as o
        group by o.mapping, o.bucket, o.currency
    )
    update snapshot_totals as n
    set
        changed = n.accounts,
        {% for name in kinds + ["transactions"] %}
        {{ name }} = n.{{ name }} + s.{{ name }}{{ "," if not loop.last }}
        {% endfor %}
    from summed as s
    where n.snapshot_id = p_into and (n.mapping, n.bucket, n.currency) = (s.mapping, s.bucket, s.currency);
    update snapshots as s set previous = null where s.id = p_into;
    delete from snapshots as s where s.id < p_into and s.state = 'pruned';
    get diagnostics v_dropped = row_count;
    return v_dropped;
end
$$;
