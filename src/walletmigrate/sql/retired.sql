-- sqlfluff:exclude_rules:references.keywords,references.from,structure.column_order,layout.indent
-- One mapping in phase retired: what takes the place of functions that name its balance columns. The table is only
-- asked whether a key has a row; nothing of it is locked, for there is nothing of it to write.

-- The account of one side, locked. What is absent, or was closed and has a row again, begins at nothing.
create or replace function {{ schema }}.side_{{ mapping }}(p_key text, p_bucket text, p_currency text, p_dual boolean)
returns {{ schema }}.side
language plpgsql
as $$
declare
    s side;
    v_old accounts;
    v_bypass bigint;
begin
    s.key := p_key;
    s.mode := 'ledger';
    s.exact := true;
    s.unfit := false;
    if not exists (
        select from accounts as a
        where a.mapping = '{{ mapping }}' and a.key = p_key and a.bucket = p_bucket and a.currency = p_currency
    ) then
        -- Who leaves the phase waits for what is opened in it: see mapping.sql.
        perform 1 from control where phase = 'retired' for share;
        if not found then
            raise exception 'the phase is no longer retired' using errcode = '40001';
        end if;
        -- All of the key's at once. Whoever comes second waits here for the first, and finds them below.
        insert into accounts (mapping, key, bucket, currency, state, balance)
        values
        {% for c in columns %}
        ('{{ mapping }}', p_key, '{{ c.bucket }}', '{{ c.currency }}', 'frozen', 0){{ "," if not loop.last }}
        {% endfor %}
        on conflict do nothing;
    end if;
    -- The row came again: whoever it is now, the old balances are not theirs. All buckets at once, locked by id.
    for v_old in
        select x.* from accounts as x
        where
            x.mapping = '{{ mapping }}' and x.key = p_key
            and exists (
                select from accounts as y
                where y.mapping = '{{ mapping }}' and y.key = p_key and y.state <> 'frozen'
            )
        order by x.id
        for no key update
    loop
        if v_old.state <> 'frozen' then
            -- Asked under the lock that whoever deletes the row takes, too.
            if not exists (select from {{ relation }} as l where l.{{ key }} = p_key::{{ key_type }}) then
                raise exception 'the row of account % is gone', p_key using errcode = '40001';
            end if;
            if v_old.balance <> 0 then
                select x.id into v_bypass from system_accounts as x
                where x.name = 'bypass' and x.currency = v_old.currency;
                insert into transactions (
                    id, debit_account, credit_account, kind, type, amount, debit_balance, credit_balance, currency,
                    reason
                )
                values (
                    nextval('transaction_ids'),
                    case when v_old.balance > 0 then v_old.id else v_bypass end,
                    case when v_old.balance > 0 then v_bypass else v_old.id end,
                    'resync', 'resync', abs(v_old.balance),
                    case when v_old.balance > 0 then 0 end, case when v_old.balance < 0 then 0 end, v_old.currency,
                    'the account was ' || v_old.state::text
                );
            end if;
            update accounts as x
            set
                balance = 0, state = 'frozen', state_at = clock_timestamp(),
                state_reason = concat_ws(': ', 'resync', x.state_reason)
            where x.id = v_old.id;
        end if;
    end loop;
    select x.id, x.state, x.balance into s.account, s.state, s.balance
    from accounts as x
    where x.mapping = '{{ mapping }}' and x.key = p_key and x.bucket = p_bucket and x.currency = p_currency
    for no key update;
    if s.state <> 'frozen' then
        raise exception 'the row of account % is gone', p_key using errcode = '40001';
    end if;
    s.legacy := s.balance;
    return s;
end
$$;

-- The keys that have a row.
create or replace function {{ schema }}.lock_{{ mapping }}(p_keys {{ key_type }}[]) returns {{ key_type }}[]
language plpgsql
as $$
#variable_conflict use_variable
begin
    return array(
        select l.{{ key }} from {{ relation }} as l
        where l.{{ key }} = any(p_keys)
        order by l.{{ key }}
    );
end
$$;

create or replace function {{ schema }}.move_{{ mapping }}(
    m {{ schema }}.movement, p_policy text, p_reserved boolean
) returns {{ schema }}.posting
language plpgsql
as $$
declare
    p {{ schema }}.posting;
    v_found {{ key_type }}[];
begin
    v_found := {{ schema }}.lock_{{ mapping }}(array[m.debtor, m.creditor]::{{ key_type }}[]);
    if cardinality(v_found) <> num_nonnulls(m.debtor, m.creditor) then
        p.refusal := 'unknown_account';
        p.debtor := case when m.debtor::{{ key_type }} <> all(v_found) then m.debtor end;
        p.creditor := m.creditor;
        -- What was done once stays done, also when the row is gone since.
        if m.idempotency_key is not null then
            p := {{ schema }}.replay(m, p);
        end if;
        return p;
    end if;
    return {{ schema }}.leg_{{ mapping }}(m, p_policy, p_reserved);
end
$$;

create or replace function {{ schema }}.plain_{{ mapping }}(
    p_fingerprint text, p_policy text, p_key {{ key_type }}, p_bucket text, p_currency text, p_change numeric,
    p_label text
) returns text
language plpgsql
as $$
begin
    if p_fingerprint is distinct from '{{ fingerprint }}' then
        raise exception 'mapping {{ mapping }} was installed from another configuration'
            using errcode = 'WM010', hint = 'Run: walletmigrate install';
    end if;
    return to_jsonb({{ schema }}.move_{{ mapping }}(
        {{ schema }}.labelled(p_label::{{ schema }}.label, p_key::text, p_bucket, p_currency), p_policy, false
    ))::text;
end
$$;

-- Nobody else asks the table any more. A row that goes closes its accounts: whoever gets its key later is somebody
-- else. A key that changes would leave its money behind.
create or replace function {{ schema }}.gone_{{ mapping }}() returns trigger
language plpgsql
security definer
set search_path = pg_catalog, {{ schema }}, pg_temp
as $$
#variable_conflict use_variable
begin
    if tg_op = 'TRUNCATE' then
        -- Its snapshot may not see all the rows that it takes away, nor all accounts.
        if current_setting('transaction_isolation') not in ('read committed', 'read uncommitted') then
            raise exception '{{ relation }} is mapped to a ledger, and cannot be truncated at this isolation level'
                using errcode = '0A000', hint = 'Truncate at READ COMMITTED, or delete the rows.';
        end if;
        perform 1 from accounts as a where a.mapping = '{{ mapping }}' order by a.id for no key update;
        update accounts as a set state = 'closed', state_at = clock_timestamp(), state_reason = 'truncate'
        where
            a.mapping = '{{ mapping }}' and a.state = 'frozen'
            and not exists (select from {{ relation }} as l where l.{{ key }}::text collate "C" = a.key);
        return null;
    end if;
    -- Also what a posting in flight opens, or one that this snapshot does not see (40001).
    insert into accounts (mapping, key, bucket, currency, state, balance)
    values
    {% for c in columns %}
    (
        '{{ mapping }}', old.{{ key }}::text, '{{ c.bucket }}', '{{ c.currency }}', 'closed', 0
    ){{ "," if not loop.last }}
    {% endfor %}
    on conflict do nothing;
    perform 1 from accounts as a
    where a.mapping = '{{ mapping }}' and a.key = old.{{ key }}::text collate "C"
    order by a.id
    for no key update;
    if tg_op = 'UPDATE' and exists (
        select from accounts as a
        where
            a.mapping = '{{ mapping }}' and a.key = old.{{ key }}::text collate "C"
            and a.state = 'frozen' and a.balance <> 0
    ) then
        raise exception '{{ relation }} %: the ledger keeps a balance under this key', old.{{ key }}
            using
                errcode = 'WM030',
                hint = 'Bring the balance to zero through the adapter, change the key, then bring it back.';
    end if;
    -- Before an update: the row is not yet what it will be, and goes on.
    if tg_when = 'BEFORE' then
        return new;
    end if;
    update accounts as a set state = 'closed', state_at = clock_timestamp(), state_reason = 'row gone'
    where
        a.mapping = '{{ mapping }}' and a.key = old.{{ key }}::text collate "C" and a.state = 'frozen';
    return null;
end
$$;
