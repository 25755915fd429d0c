-- What the torture needs in its database, besides the legacy table and the ledger. Every order has ten keys of its
-- own behind p_base: rows A and B at 1 and 2 in the states of p_states, and a role that wakes triggers of A.
-- The mode of the fence is p_mode from the start on; null: as it is.
create function public.torture_start(
    p_base bigint, p_states text[], p_role text, p_phase text, p_running boolean, p_mode text
)
returns void
language plpgsql
as $$
declare
    v_key bigint;
    v_state text;
begin
    update wallet.control set phase = 'dual_write' where phase <> 'dual_write';
    perform wallet.set_line(true);
    if p_mode is not null then
        perform torture_mode(p_mode);
    end if;
    if to_regclass('public.users_' || p_base) is not null then
        -- A partition is not truncated while any account of the mapping is frozen, or under reject left without a row.
        update wallet.accounts set state = 'closed' where mapping = 'users' and state <> 'closed';
    end if;
    for i in 1 .. cardinality(p_states) loop
        v_key := p_base + i;
        v_state := p_states[i];
        insert into public.users (id, tenant, role, total_coins) values (v_key, 'acme', 'member', 100);
        continue when v_state = 'absent';
        perform wallet.open_users(array[v_key], null);
        if v_state in ('stale', 'closed') then
            -- By hand, so that the mode of the fence makes no difference.
            update wallet.accounts set state = 'stale' where mapping = 'users' and key = v_key::text;
        end if;
        if v_state = 'stale' then
            update public.users set total_coins = total_coins + 1 where id = v_key;
        elsif v_state = 'closed' then
            delete from public.users where id = v_key;
        elsif v_state = 'frozen' then
            perform wallet.seal_users(array[v_key]);
            -- The ledger alone is written: from here on the column is not true.
            perform wallet.plain_users('FINGERPRINT', 'shadow', v_key, 'cash', 'EUR', 5, row(
                'users/cash/EUR/' || v_key, 5, true, 'start', null, null, null, null, null, null, null
            )::wallet.label::text);
        end if;
    end loop;
    if p_role <> '' then
        update public.users set role = p_role where id = p_base + 1;
    end if;
    update wallet.control set phase = p_phase where phase <> p_phase;
    perform wallet.set_line(p_running);
end
$$;

-- A change of the fence's mode, as `fences.set_mode` makes it, from the functions that it made before.
create table public.torture_modes (mode text, function text);

create function public.torture_mode(p_mode text) returns void
language plpgsql
as $$
declare
    v_function text;
begin
    for v_function in select m.function from torture_modes as m where m.mode = p_mode loop
        execute v_function;
    end loop;
end
$$;

-- What became of the keys; with p_backfill after a batch of a backfill.
create function public.torture_look(p_base bigint, p_backfill boolean)
returns table (
    key bigint, legacy numeric, state text, ledger numeric, journal numeric, broken bigint, accounts bigint, failure text
)
language plpgsql
as $$
begin
    if p_backfill then
        perform * from wallet.backfill_users(p_base::text, (p_base + 10)::text, null);
    end if;
    return query
    select
        k.key, u.total_coins, a.state::text, a.balance::numeric, e.total, e.broken,
        (select count(*) from wallet.accounts as x where x.mapping = 'users' and x.key = k.key::text),
        (select min(f.sqlstate || ' ' || f.message) from wallet.failures as f where f.key = k.key::text)
    from generate_series(p_base + 1, p_base + 4) as k (key)
    left join public.users as u on u.id = k.key
    left join wallet.accounts as a
        on a.mapping = 'users' and a.key = k.key::text and a.bucket = 'cash' and a.currency = 'EUR'
    left join lateral (
        select coalesce(sum(c.amount), 0) as total, count(*) filter (where c.ended <> c.expected) as broken
        from (
            select l.amount, l.ended, l.amount + lag(l.ended, 1, 0::numeric) over (order by l.id) as expected
            from (
                select t.id, t.amount, t.credit_balance as ended from wallet.transactions as t
                where t.credit_account = a.id and t.credit_account > 0
                union all
                select t.id, -t.amount, t.debit_balance from wallet.transactions as t
                where t.debit_account = a.id and t.debit_account > 0
            ) as l
        ) as c
    ) as e on true;
end
$$;

-- Triggers of an application, which the role of a row wakes: one changes the balance on its way in, others write the
-- same row or the next one before (a_) or after (z_) the fence. Each tells the tally what it has added.
create table public.tally (key bigint, change numeric);
create index on public.tally (key);

create function public.torture_before() returns trigger
language plpgsql
as $$
begin
    new.total_coins := new.total_coins + 1;
    insert into public.tally values (new.id, 1);
    return new;
end
$$;

create function public.torture_after() returns trigger
language plpgsql
as $$
declare
    v_target bigint := new.id + case when new.role like '%other' then 1 else 0 end;
begin
    update public.users set total_coins = total_coins + 1 where id = v_target;
    if found then
        insert into public.tally values (v_target, 1);
    end if;
    return null;
end
$$;

create trigger a_before before update on public.users for each row
when (new.role = 'before' and new.total_coins is distinct from old.total_coins)
execute function public.torture_before();
create trigger a_after after update on public.users for each row
when (new.role like 'early%' and new.total_coins is distinct from old.total_coins and pg_trigger_depth() = 0)
execute function public.torture_after();
create trigger z_after after update on public.users for each row
when (new.role like 'late%' and new.total_coins is distinct from old.total_coins and pg_trigger_depth() = 0)
execute function public.torture_after();

-- A ledger leg that fails: the type of the posting says with what.
create function public.torture_fail() returns trigger
language plpgsql
as $$
begin
    raise exception 'the leg was told to fail' using errcode = right(new.type, 5);
end
$$;

create trigger fail before insert on wallet.transactions for each row
when (new.type like 'fail _____') execute function public.torture_fail();
