-- Erase what is personal about one owner. Transactions, balances and the audit log stay as they are.

-- Texts beside the owner's transactions, raw statements of the catalogue, messages of failures. A text or a statement
-- that tells of two owners goes for both. p_dry_run: only count.
create or replace function {{ schema }}.erase(
    p_mapping text, p_key text, p_dry_run boolean, out details bigint, out queries bigint, out messages bigint
)
language plpgsql
security definer
set search_path = pg_catalog, {{ schema }}, pg_temp
as $$
declare
    v_accounts bigint[] := array(select a.id from accounts as a where a.mapping = p_mapping and a.key = p_key);
    v_transactions bigint[] := array(
        select t.id from transactions as t where t.debit_account > 0 and t.debit_account = any(v_accounts)
        union
        select t.id from transactions as t where t.credit_account > 0 and t.credit_account = any(v_accounts)
    );
    -- One statement that wrote several rows stands in a line of each, and what was sent twice in the lines of both.
    v_queries text[] := array(select distinct b.query from bypasses as b where b.mapping = p_mapping and b.key = p_key);
begin
    select count(*) into details from transaction_details as d where d.transaction_id = any(v_transactions);
    select count(*) into queries from bypasses as b where b.query = any(v_queries);
    select count(*) into messages from failures as f
    where f.mapping = p_mapping and f.key = p_key and f.message <> '';
    if p_dry_run then
        return;
    end if;
    delete from transaction_details as d where d.transaction_id = any(v_transactions);
    update bypasses as b set query = null where b.query = any(v_queries);
    update failures as f set message = '' where f.mapping = p_mapping and f.key = p_key and f.message <> '';
end
$$;
