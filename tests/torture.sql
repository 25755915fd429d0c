-- What the torture needs in its database, besides the legacy table and the ledger. Every order has ten keys of its
-- own: rows A and B at 1 and 2 in their states, and a role that wakes triggers of A.
create function public.torture_set_up(p_keys bigint[], p_states text[], p_roles text[]) returns void
language plpgsql
as $$
declare
    v_key bigint;
begin
    update wallet.control set phase = 'dual_write' where phase <> 'dual_write';
    perform wallet.set_line(true);
    if to_regclass('public.users_' || p_keys[1] - 1) is not null then
        -- A partition is not truncated while any account of the mapping is frozen, or under reject left without a row.
        update wallet.accounts set state = 'closed' where mapping = 'users' and state <> 'closed';
    end if;
    insert into public.users (id, tenant, role, total_coins)
    select k.key, 'acme', 'member', 100 from unnest(p_keys) as k (key);
    perform wallet.open_users(torture_in(p_keys, p_states, '{mirrored,stale,frozen,closed}'), null);
    -- By hand, so that the mode of the fence makes no difference.
    update wallet.accounts set state = 'stale'
    where mapping = 'users' and key = any(torture_in(p_keys, p_states, '{stale,closed}')::text[]);
    update public.users set total_coins = total_coins + 1 where id = any(torture_in(p_keys, p_states, '{stale}'));
    delete from public.users where id = any(torture_in(p_keys, p_states, '{closed}'));
    perform wallet.seal_users(torture_in(p_keys, p_states, '{frozen}'));
    foreach v_key in array torture_in(p_keys, p_states, '{frozen}') loop
        -- The ledger alone is written: from here on the column is not true.
        perform wallet.plain_users('FINGERPRINT', 'shadow', v_key, 'cash', 'EUR', 5, row(
            'users/cash/EUR/' || v_key, 5, true, 'start', null, null, null, null, null, null, null
        )::wallet.label::text);
    end loop;
    update public.users as u set role = k.role
    from unnest(p_keys, p_roles) as k (key, role) where u.id = k.key and k.role <> '';
end
$$;

-- The keys whose state is one of these.
create function public.torture_in(p_keys bigint[], p_states text[], p_asked text[]) returns bigint[]
language sql immutable
as $$
    select coalesce(array_agg(k.key order by k.key), '{}')
    from unnest(p_keys, p_states) as k (key, state) where k.state = any(p_asked)
$$;

-- What an order shares with all others, from its first step on: phase, line, the mode of the fence if it is another.
create function public.torture_begin(p_phase text, p_running boolean, p_mode text) returns void
language plpgsql
as $$
begin
    if p_mode <> '' then
        perform torture_mode(p_mode);
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

-- What became of the keys. A plan for these few rows is as good for the next; it is made once, by index.
create function public.torture_look(p_base bigint)
returns table (
    key bigint, legacy numeric, state text, ledger numeric, journal numeric, broken bigint, accounts bigint, failure text
)
language plpgsql
set plan_cache_mode = 'force_generic_plan'
set enable_seqscan = off
as $$
begin
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
    ) as e on true
    order by k.key;
end
$$;

-- The same after a batch of a backfill.
create function public.torture_finish(p_base bigint)
returns table (
    key bigint, legacy numeric, state text, ledger numeric, journal numeric, broken bigint, accounts bigint, failure text
)
language plpgsql
as $$
begin
    perform from wallet.backfill_users(p_base::text, (p_base + 10)::text, null);
    return query select * from torture_look(p_base);
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
