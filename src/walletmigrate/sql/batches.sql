-- What jobs do to one mapping, a span of keys at a time: open and resync, freeze, unfreeze.
-- A span is (p_after, p_upto] in the order of the legacy table's own key; null leaves an end open.
-- Legacy rows are locked first, by key, then read in a new statement.
{% macro within() -%}
    l.{{ key }} >= v_low and l.{{ key }} <= v_high and (p_after is null or l.{{ key }} > v_low)
{%- endmacro %}
{% macro bounds(upto) -%}
    v_low {{ key_type }} := coalesce(
        p_after::{{ key_type }}, (select l.{{ key }} from {{ relation }} as l order by l.{{ key }} limit 1)
    );
    v_high {{ key_type }} := coalesce(
        {{ upto }}::{{ key_type }}, (select l.{{ key }} from {{ relation }} as l order by l.{{ key }} desc limit 1)
    );
{%- endmacro %}

{% macro kinds() -%}
    {% for c in columns %}('{{ c.bucket }}', '{{ c.currency }}'){{ "" if loop.last else ", " }}{% endfor %}
{%- endmacro %}

-- Where a span of p_limit keys behind p_after ends, not beyond p_until; null and 0 where there is no key.
create or replace function {{ schema }}.cut_{{ mapping }}(p_after text, p_until text, p_limit integer)
returns table (upto text, keys integer)
language plpgsql
stable
as $$
#variable_conflict use_variable
declare
    {{ bounds("p_until") }}
    v_keys {{ key_type }}[];
begin
    v_keys := array(
        select l.{{ key }} from {{ relation }} as l
        where {{ within() }}
        order by l.{{ key }}
        limit p_limit
    );
    upto := v_keys[cardinality(v_keys)]::text;
    keys := coalesce(cardinality(v_keys), 0);
    return next;
end
$$;

-- The largest key, null in an empty table.
create or replace function {{ schema }}.last_{{ mapping }}() returns text
language sql
stable
as $$
    select l.{{ key }}::text from {{ relation }} as l order by l.{{ key }} desc limit 1
$$;

-- Lock the legacy rows of a span in the order of their keys, and return the keys.
create or replace function {{ schema }}.span_{{ mapping }}(p_after text, p_upto text) returns {{ key_type }}[]
language plpgsql
as $$
#variable_conflict use_variable
declare
    {{ bounds("p_upto") }}
begin
    return array(
        select l.{{ key }} from {{ relation }} as l
        where {{ within() }}
        order by l.{{ key }}
        for no key update
    );
end
$$;

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
    begin
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
    exception
        when unique_violation then
            -- Another backfill changes no legacy row: only a snapshot from before it does not see its accounts.
            raise exception 'an account was opened meanwhile' using errcode = '40001';
    end;
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

-- One batch of a backfill.
create or replace function {{ schema }}.backfill_{{ mapping }}(p_after text, p_upto text, p_job bigint)
returns table (keys bigint, opened bigint, resynced bigint, failed bigint)
language plpgsql
as $$
#variable_conflict use_variable
declare
    v_keys {{ key_type }}[];
begin
    v_keys := {{ schema }}.span_{{ mapping }}(p_after, p_upto);
    keys := coalesce(cardinality(v_keys), 0);
    select o.opened, o.resynced, o.failed into opened, resynced, failed
    from {{ schema }}.open_{{ mapping }}(v_keys, p_job) as o;
    return next;
end
$$;

-- One batch of a backfill's last pass: rows that were written since the job began and are not in step. A row's xmin
-- tells, so that the accounts of all others need not be looked up. Values that are no amount are counted anew.
create or replace function {{ schema }}.late_{{ mapping }}(p_after text, p_upto text, p_job bigint)
returns table (keys bigint, opened bigint, resynced bigint, failed bigint)
language plpgsql
as $$
#variable_conflict use_variable
declare
    v_keys {{ key_type }}[];
    {{ bounds("p_upto") }}
    v_age integer;
    -- Transaction ids are compared by their lower half, which says nothing of a job that is older than that.
    v_old boolean;
    v_aside text[] := array(
        select b.upto_key from {{ schema }}.job_batches as b
        where b.job_id = p_job and b.state = 'set_aside'
    );
begin
    select
        age((j.row_xid % 4294967296)::text::xid),
        pg_snapshot_xmax(pg_current_snapshot())::text::bigint - j.row_xid > 2000000000
    into v_age, v_old
    from {{ schema }}.jobs as j
    where j.id = p_job;
    select
        count(*),
        array_agg(l.{{ key }} order by l.{{ key }}) filter (
            where (v_old or age(l.xmin) <= v_age)
            and l.{{ key }}::text <> all(v_aside)
            and (
                select count(*) from {{ schema }}.accounts as a
                where
                    a.mapping = '{{ mapping }}' and a.key = l.{{ key }}::text collate "C"
                    and a.state in ('mirrored', 'frozen') and (a.bucket, a.currency) in ({{ kinds() }})
            ) < {{ columns | length }}
        ),
        {% for c in columns %}
        {{ "" if loop.first else "+ " }}count(*) filter (
            where ({{ c.value }} > '-Infinity' and {{ c.value }} < 'Infinity'
                and {{ c.value }} = round({{ c.value }}, {{ c.scale }})) is not true
        )
        {% endfor %}
    into keys, v_keys, failed
    from {{ relation }} as l
    where {{ within() }};
    v_keys := {{ schema }}.lock_{{ mapping }}(v_keys);
    select o.opened, o.resynced into opened, resynced from {{ schema }}.open_{{ mapping }}(v_keys, p_job) as o;
    return next;
end
$$;

-- One batch of a freeze: mirrored accounts whose ledger equals legacy turn frozen; the rest is counted.
create or replace function {{ schema }}.freeze_{{ mapping }}(p_after text, p_upto text)
returns table (keys bigint, frozen bigint, refused bigint)
language plpgsql
as $$
#variable_conflict use_variable
declare
    v_keys {{ key_type }}[];
begin
    v_keys := {{ schema }}.span_{{ mapping }}(p_after, p_upto);
    keys := coalesce(cardinality(v_keys), 0);
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
create or replace function {{ schema }}.unfreeze_{{ mapping }}(p_after text, p_upto text)
returns table (keys bigint, unfrozen bigint)
language plpgsql
as $$
#variable_conflict use_variable
declare
    v_keys {{ key_type }}[];
    v_now numeric;
    a record;
begin
    v_keys := {{ schema }}.span_{{ mapping }}(p_after, p_upto);
    keys := coalesce(cardinality(v_keys), 0);
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
