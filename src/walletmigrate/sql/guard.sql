-- The guard of retired balance columns, for as long as they stand: it takes the fence's place.

-- Until the column is dropped nobody may write it: the value would be lost with it.
create or replace function {{ schema }}.retired_{{ mapping }}() returns trigger
language plpgsql
security definer
set search_path = pg_catalog, {{ schema }}, pg_temp
as $$
begin
    -- Put up a moment before the phase; and where a retirement broke off in between, it does nobody any harm.
    if not exists (select from control where phase in ('frozen', 'retired')) then
        return null;
    end if;
    perform nextval('rejected_{{ mapping }}');
    raise exception 'the balance columns of {{ relation }} are retired, the ledger alone is true'
        using errcode = 'WM030', hint = 'Write through the adapter.';
end
$$;
