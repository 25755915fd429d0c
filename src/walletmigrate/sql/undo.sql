-- Take back what a backfill opened: a reversal for each opening that no later transaction stands on.

-- The next p_limit accounts behind p_after, in the order of their ids, that job p_job opened. One after the other is
-- locked, looked at under its lock, and either taken back (undone) or left, with the reason. An account that is taken
-- back turns stale: its row is the only truth again, and the next posting or backfill brings it up from `opening`.
create or replace function {{ schema }}.undo_openings(
    p_mapping text, p_job bigint, p_undo bigint, p_after bigint, p_limit integer, p_actor text, p_reason text,
    p_dry_run boolean
)
returns table (account bigint, key text, bucket text, currency text, undone boolean, why text)
language plpgsql
security definer
set search_path = pg_catalog, {{ schema }}, pg_temp
as $$
#variable_conflict use_column
declare
    v_id bigint;
    a accounts;
    o transactions;
    v_why text;
begin
    for v_id in
        select x.id from accounts as x
        where x.mapping = p_mapping and x.job_id = p_job and x.id > p_after
        order by x.id
        limit p_limit
    loop
        select * into a from accounts as x where x.id = v_id for no key update;
        -- A new statement, after the lock: what was posted meanwhile is seen.
        select * into o from transactions as t
        where
            (t.credit_account > 0 and t.credit_account = v_id or t.debit_account > 0 and t.debit_account = v_id)
            and t.kind = 'opening' and t.job_id = p_job
        order by t.id
        limit 1;
        v_why := case
            when a.state = 'frozen' then 'frozen: the ledger alone is true'
            when exists (select from transactions as t where t.reverses = o.id)
                or o.id is null and a.state_reason like '%opening taken back' then 'taken back before'
            when exists (
                select from transactions as t
                where t.credit_account > 0 and t.credit_account = v_id and t.id > coalesce(o.id, 0)
                union all
                select from transactions as t
                where t.debit_account > 0 and t.debit_account = v_id and t.id > coalesce(o.id, 0)
            ) then 'later transactions stand on it'
        end;
        if v_why is null and not p_dry_run then
            update accounts as x
            set
                balance = x.balance - case
                    when o.id is null then 0 when o.credit_account = v_id then o.amount else -o.amount
                end,
                state = case a.state when 'closed' then 'closed'::account_state else 'stale' end,
                state_at = clock_timestamp(), state_reason = 'opening taken back'
            where x.id = v_id
            returning * into a;
            if o.id is not null then
                insert into transactions (
                    id, debit_account, credit_account, reverses, job_id, kind, type, amount, debit_balance,
                    credit_balance, currency, actor, reason
                )
                values (
                    nextval('transaction_ids'), o.credit_account, o.debit_account, o.id, p_undo, 'reversal', 'opening',
                    o.amount, case when o.credit_account = v_id then a.balance end,
                    case when o.debit_account = v_id then a.balance end, o.currency, p_actor, p_reason
                );
            end if;
        end if;
        account := v_id;
        key := a.key;
        bucket := a.bucket;
        currency := a.currency;
        undone := v_why is null;
        why := v_why;
        return next;
    end loop;
end
$$;
