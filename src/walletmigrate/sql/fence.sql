-- The fence of one mapping. It needs no marker to be right: because the ledger is posted first, it only asks
-- whether the ledger equals the legacy row as it is now, whoever wrote.

create or replace function {{ schema }}.fence_{{ mapping }}() returns trigger
language plpgsql
security definer
set search_path = pg_catalog, {{ schema }}, pg_temp
as $$
#variable_conflict use_variable -- A column of the legacy table may have any name.
declare
    v_keys {{ key_type }}[];
    v_key {{ key_type }};
    v_found boolean;
    v_equal bigint;
    v_now numeric[];
    v_account record;
begin
    -- The common case, in one statement: every account of the row stands mirrored at what the row holds now.
    if tg_op = 'UPDATE' then
        -- By key, not by a join: without statistics a plan may walk all accounts of the mapping.
        perform 1
        from {{ relation }} as l, accounts as a
        where
            l.{{ key }} = new.{{ key }} and old.{{ key }} = new.{{ key }}
            and a.mapping = '{{ mapping }}' and a.key = new.{{ key }}::text collate "C" and a.state = 'mirrored'
            and case
                {% for c in columns %}
                when a.bucket = '{{ c.bucket }}' and a.currency = '{{ c.currency }}' then a.balance = {{ c.value }}
                {% endfor %}
            end
        for no key update of a;
        get diagnostics v_equal = row_count;
        if v_equal = {{ columns | length }} then
            return null;
        end if;
        -- And the next common one: the row has no account. Above READ COMMITTED one may be there unseen.
        if
            old.{{ key }} = new.{{ key }}
            and current_setting('transaction_isolation') in ('read committed', 'read uncommitted')
            and not exists (select from accounts as a where a.mapping = '{{ mapping }}' and a.key = new.{{ key }}::text collate "C")
        then
            return null;
        end if;
    end if;
    v_keys := case
        when tg_op = 'INSERT' then array[new.{{ key }}]
        when tg_op = 'DELETE' then array[old.{{ key }}]
        when old.{{ key }} = new.{{ key }} then array[new.{{ key }}]
        else array[least(old.{{ key }}, new.{{ key }}), greatest(old.{{ key }}, new.{{ key }})]
    end;
    foreach v_key in array v_keys loop
        select array[{{ columns | map(attribute="value") | join(", ") }}] into v_now
        from {{ relation }} as l where l.{{ key }} = v_key;
        v_found := found;
        {% for c in columns %}
        select x.id, x.state, x.balance into v_account
        from accounts as x
        where
            x.mapping = '{{ mapping }}' and x.key = v_key::text collate "C"
            and x.bucket = '{{ c.bucket }}' and x.currency = '{{ c.currency }}'
        for no key update;
        if not found then
            perform probe_account('{{ mapping }}', v_key::text, '{{ c.bucket }}', '{{ c.currency }}');
        elsif v_account.state = 'mirrored' and v_found and v_now[{{ loop.index }}] = v_account.balance then
            null;
        elsif v_account.state = 'frozen' then
            if
                tg_op <> 'UPDATE' or old.{{ key }} is distinct from new.{{ key }}
                or old.{{ c.column }} is distinct from new.{{ c.column }}
            then
                raise exception '{{ relation }} %: column {{ c.column }} is frozen, the ledger alone is true', v_key
                    using errcode = 'WM030', hint = 'Write through the adapter, or unfreeze.';
            end if;
        elsif not v_found then
            if (select c.relrowsecurity from pg_class as c where c.oid = '{{ relation }}'::regclass)
                and not exists (
                    select from pg_policy as p
                    where p.polrelid = '{{ relation }}'::regclass and p.polname = 'walletmigrate_owner'
                )
            then
                raise exception 'row-level security hides rows of {{ relation }} from the role that owns the ledger'
                    using errcode = 'WM022', hint = 'Run: walletmigrate install';
            end if;
            update accounts as x set state = 'closed', state_at = clock_timestamp(), state_reason = 'row gone'
            where x.id = v_account.id and x.state <> 'closed';
        elsif v_account.state in ('mirrored', 'closed') then
            perform turn_stale(v_account.id, 'written past the adapter (' || lower(tg_op) || ')');
        end if;
        {% endfor %}
    end loop;
    return null;
end
$$;

create or replace function {{ schema }}.fence_truncate_{{ mapping }}() returns trigger
language plpgsql
security definer
set search_path = pg_catalog, {{ schema }}, pg_temp
as $$
begin
    -- TRUNCATE takes rows away that its snapshot does not see, and so their accounts; nothing can probe for these.
    if current_setting('transaction_isolation') not in ('read committed', 'read uncommitted') then
        raise exception '{{ relation }} is mapped to a ledger, and cannot be truncated at this isolation level'
            using errcode = '0A000', hint = 'Truncate at READ COMMITTED, or delete the rows.';
    end if;
    perform 1 from accounts as a where a.mapping = '{{ mapping }}' order by a.id for no key update;
    if exists (select from accounts as a where a.mapping = '{{ mapping }}' and a.state = 'frozen') then
        raise exception '{{ relation }} has frozen accounts, the ledger alone is true'
            using errcode = 'WM030', hint = 'Unfreeze first.';
    end if;
    -- A truncated partition leaves the other partitions' rows alive: only keys without a row close.
    update accounts as a set state = 'closed', state_at = clock_timestamp(), state_reason = 'truncate'
    where
        a.mapping = '{{ mapping }}' and a.state in ('mirrored', 'stale')
        and not exists (select from {{ relation }} as l where l.{{ key }}::text collate "C" = a.key);
    return null;
end
$$;
