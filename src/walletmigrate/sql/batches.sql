-- What jobs do to one mapping, a batch at a time: open and resync, freeze, unfreeze.
-- Legacy rows are locked first, by key, then read in a new statement.

-- Open or resync the accounts of these keys, whose legacy rows the caller has locked.
create or replace function {{ schema }}.open_{{ mapping }}(p_keys {{ key_type }}[], p_job bigint)
returns table (opened bigint, resynced bigint, failed bigint)
language plpgsql
security definer
set search_path = pg_catalog, {{ schema }}, pg_temp
as $$
#variable_conflict use_variable
declare
    v_state account_state := case when k.phase in ('frozen', 'retired') then 'frozen' else 'mirrored' end
    from control as k;
    v_due boolean;
    v_new {{ key_type }}[];
    v_count bigint;
begin
    opened := 0;
    resynced := 0;
    failed := 0;
    perform 1 from accounts as a
    where a.mapping = '{{ mapping }}' and a.key = any(p_keys::text[]) and a.state in ('stale', 'closed')
    order by a.id
    for no key update;
    v_due := found;
    {% for c in columns %}
    -- Every account is opened under the lock of its legacy row, so those that are missing now stay so until this
    -- commits; an insert without a conflict clause is a third faster.
    v_new := array(
        select k.key::{{ key_type }} from (
            select n.key::text collate "C" as key from unnest(p_keys) as n (key)
            except
            select a.key from accounts as a
            where
                a.mapping = '{{ mapping }}' and a.key = any(p_keys::text[])
                and a.bucket = '{{ c.bucket }}' and a.currency = '{{ c.currency }}'
        ) as k
    );
    with fresh as (
        insert into accounts (mapping, key, bucket, currency, state, balance, job_id)
        select '{{ mapping }}', l.{{ key }}::text, '{{ c.bucket }}', '{{ c.currency }}', v_state, {{ c.value }}, p_job
        from {{ relation }} as l
        where
            l.{{ key }} = any(v_new)
            and {{ c.value }} > '-Infinity' and {{ c.value }} < 'Infinity'
            and {{ c.value }} = round({{ c.value }}, {{ c.scale }})
        order by l.{{ key }}
        returning id, balance
    ), opening as (
        insert into transactions (
            id, debit_account, credit_account, kind, type, amount, debit_balance, credit_balance, currency, job_id
        )
        select
            nextval('transaction_ids'),
            case when f.balance > 0 then {{ c.opening }} else f.id end,
            case when f.balance > 0 then f.id else {{ c.opening }} end,
            'opening', 'opening', abs(f.balance),
            case when f.balance < 0 then f.balance end, case when f.balance > 0 then f.balance end,
            '{{ c.currency }}', p_job
        from fresh as f
        where f.balance <> 0
    )
    select count(*) into v_count from fresh;
    opened := opened + v_count;

    if v_due then
        with behind as (
            select
                a.id, a.balance, {{ c.value }} as legacy,
                case when a.state_reason = 'opening taken back' then {{ c.opening }} else {{ c.bypass }} end as counter
            from accounts as a
            inner join {{ relation }} as l on a.key = l.{{ key }}::text collate "C"
            where
                a.mapping = '{{ mapping }}' and a.bucket = '{{ c.bucket }}' and a.currency = '{{ c.currency }}'
                and a.key = any(p_keys::text[]) and l.{{ key }} = any(p_keys) and a.state in ('stale', 'closed')
                and {{ c.value }} > '-Infinity' and {{ c.value }} < 'Infinity'
                and {{ c.value }} = round({{ c.value }}, {{ c.scale }})
        ), mended as (
            update accounts as a
            set
                    balance = b.legacy, state = 'mirrored', state_at = clock_timestamp(),
                    -- The cause stays readable: the gates ask what was written past the adapter in the window.
                    state_reason = concat_ws(': ', 'resync', a.state_reason)
            from behind as b
            where a.id = b.id
            returning a.id, b.balance, b.legacy, b.counter
        ), resync as (
            insert into transactions (
                id, debit_account, credit_account, kind, type, amount, debit_balance, credit_balance, currency, job_id
            )
            select
                nextval('transaction_ids'),
                case when n.legacy > n.balance then n.counter else n.id end,
                case when n.legacy > n.balance then n.id else n.counter end,
                'resync', 'resync', abs(n.legacy - n.balance),
                case when n.legacy < n.balance then n.legacy end, case when n.legacy > n.balance then n.legacy end,
                '{{ c.currency }}', p_job
            from mended as n
            where n.legacy <> n.balance
        )
        select count(*) into v_count from mended;
        resynced := resynced + v_count;
    end if;

    select failed + count(*) into failed
    from {{ relation }} as l
    where
        l.{{ key }} = any(p_keys)
        and ({{ c.value }} > '-Infinity' and {{ c.value }} < 'Infinity'
            and {{ c.value }} = round({{ c.value }}, {{ c.scale }})) is not true;
    {% endfor %}
    return next;
end
$$;

-- One batch of a backfill: the next p_limit keys behind p_after. Returns the last key, null when none was left.
create or replace function {{ schema }}.backfill_{{ mapping }}(p_after text, p_limit integer, p_job bigint)
returns table (last_key text, keys bigint, opened bigint, resynced bigint, failed bigint)
language plpgsql
as $$
#variable_conflict use_variable
declare
    v_keys {{ key_type }}[];
begin
    v_keys := {{ schema }}.keys_{{ mapping }}(p_after, p_limit);
    last_key := v_keys[cardinality(v_keys)]::text;
    keys := coalesce(cardinality(v_keys), 0);
    v_keys := {{ schema }}.lock_{{ mapping }}(v_keys);
    select o.opened, o.resynced, o.failed into opened, resynced, failed
    from {{ schema }}.open_{{ mapping }}(v_keys, p_job) as o;
    return next;
end
$$;

-- One batch of a freeze: mirrored accounts whose ledger equals legacy turn frozen; the rest is counted.
create or replace function {{ schema }}.freeze_{{ mapping }}(p_after text, p_limit integer)
returns table (last_key text, keys bigint, frozen bigint, refused bigint)
language plpgsql
as $$
#variable_conflict use_variable
declare
    v_keys {{ key_type }}[];
begin
    v_keys := {{ schema }}.keys_{{ mapping }}(p_after, p_limit);
    last_key := v_keys[cardinality(v_keys)]::text;
    keys := coalesce(cardinality(v_keys), 0);
    v_keys := {{ schema }}.lock_{{ mapping }}(v_keys);
    select f.frozen, f.refused into frozen, refused from {{ schema }}.seal_{{ mapping }}(v_keys) as f;
    return next;
end
$$;

create or replace function {{ schema }}.seal_{{ mapping }}(p_keys {{ key_type }}[])
returns table (frozen bigint, refused bigint)
language plpgsql
security definer
set search_path = pg_catalog, {{ schema }}, pg_temp
as $$
#variable_conflict use_variable
declare
    v_frozen bigint;
begin
    frozen := 0;
    perform 1 from accounts as a
    where a.mapping = '{{ mapping }}' and a.key = any(p_keys::text[])
    order by a.id
    for no key update;
    {% for c in columns %}
    update accounts as a
    set state = 'frozen', state_at = clock_timestamp(), state_reason = 'freeze'
    from {{ relation }} as l
    where
        a.mapping = '{{ mapping }}' and a.bucket = '{{ c.bucket }}' and a.currency = '{{ c.currency }}'
        and a.key = any(p_keys::text[]) and l.{{ key }} = any(p_keys) and a.key = l.{{ key }}::text collate "C"
        and a.state = 'mirrored' and a.balance = {{ c.value }};
    get diagnostics v_frozen = row_count;
    frozen := frozen + v_frozen;
    {% endfor %}
    select coalesce(cardinality(p_keys), 0) * {{ columns | length }} - count(*) into refused
    from accounts as a
    where a.mapping = '{{ mapping }}' and a.key = any(p_keys::text[]) and a.state = 'frozen';
    return next;
end
$$;

-- State first, then legacy := ledger, by a statement of the caller's role; the fence compares.
create or replace function {{ schema }}.unfreeze_{{ mapping }}(p_after text, p_limit integer)
returns table (last_key text, keys bigint, unfrozen bigint)
language plpgsql
as $$
#variable_conflict use_variable
declare
    v_keys {{ key_type }}[];
    v_now numeric;
    a record;
begin
    v_keys := {{ schema }}.keys_{{ mapping }}(p_after, p_limit);
    last_key := v_keys[cardinality(v_keys)]::text;
    keys := coalesce(cardinality(v_keys), 0);
    v_keys := {{ schema }}.lock_{{ mapping }}(v_keys);
    unfrozen := 0;
    {% for c in columns %}
    -- One column after the other: the fence must find the others still frozen, not mirrored and behind.
    for a in select * from {{ schema }}.unseal_{{ mapping }}(v_keys, '{{ c.bucket }}', '{{ c.currency }}') loop
        update {{ relation }} as l set {{ c.column }} = {{ c.assigned }}
        where l.{{ key }} = a.key::{{ key_type }}
        returning {{ c.value }} into v_now;
        if v_now is distinct from a.balance then
            raise exception 'legacy row % of {{ mapping }} holds % after unfreeze, the ledger %', a.key, v_now, a.balance
                using errcode = 'WM020';
        end if;
        unfrozen := unfrozen + 1;
    end loop;
    {% endfor %}
    return next;
end
$$;

create or replace function {{ schema }}.unseal_{{ mapping }}(
    p_keys {{ key_type }}[], p_bucket text, p_currency text
)
returns table (key text, balance numeric)
language plpgsql
security definer
set search_path = pg_catalog, {{ schema }}, pg_temp
as $$
#variable_conflict use_variable
begin
    perform 1 from accounts as a
    where
        a.mapping = '{{ mapping }}' and a.key = any(p_keys::text[])
        and a.bucket = p_bucket and a.currency = p_currency
    order by a.id
    for no key update;
    return query
    update accounts as a
    set state = 'mirrored', state_at = clock_timestamp(), state_reason = 'unfreeze'
    where
        a.mapping = '{{ mapping }}' and a.key = any(p_keys::text[])
        and a.bucket = p_bucket and a.currency = p_currency and a.state = 'frozen'
    returning a.key, a.balance::numeric;
end
$$;

-- Close an account whose legacy row is gone, as the fence would have: lock first, look after. False: there is a row
-- now, or the account is frozen or closed. The balance stays, for the auditors.
create or replace function {{ schema }}.close_{{ mapping }}(p_account bigint, p_reason text) returns boolean
language plpgsql
security definer
set search_path = pg_catalog, {{ schema }}, pg_temp
as $$
#variable_conflict use_variable
declare
    v_key text;
begin
    select a.key into v_key
    from accounts as a
    where a.id = p_account and a.mapping = '{{ mapping }}' and a.state in ('mirrored', 'stale')
    for no key update;
    if not found or exists (select from {{ relation }} as l where l.{{ key }} = v_key::{{ key_type }}) then
        return false;
    end if;
    update accounts as a
    set state = 'closed', state_at = clock_timestamp(), state_reason = p_reason
    where a.id = p_account;
    return true;
end
$$;
