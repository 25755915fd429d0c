-- Posting, the part that is the same for every mapping. Every install replaces these functions.
-- Functions without a search_path of their own are called only by those that pin it, and run as the owner.

create or replace function {{ schema }}.turn_stale(p_account bigint, p_reason text) returns void
language plpgsql
security definer
set search_path = pg_catalog, {{ schema }}, pg_temp
as $$
begin
    update accounts
    set state = 'stale', state_at = clock_timestamp(), state_reason = p_reason
    where id = p_account and state in ('mirrored', 'closed');
end
$$;

-- The database was asked to write what it then did not hold: the account is behind, and it is on record.
create or replace function {{ schema }}.diverged(
    m {{ schema }}.movement, p {{ schema }}.posting, p_mapping text
) returns void
language plpgsql
security definer
set search_path = pg_catalog, {{ schema }}, pg_temp
as $$
begin
    -- By key: an account that this posting opened has no id in p.
    perform turn_stale(a.id, 'legacy and ledger differ after a posting')
    from accounts as a
    where
        a.mapping = p_mapping and a.key in (p.debtor, p.creditor)
        and a.bucket = m.bucket and a.currency = m.currency;
    update idempotency_keys
    set balances = array[p.debtor_legacy, p.debtor_ledger, p.creditor_legacy, p.creditor_ledger]
    where key = m.idempotency_key and request = m.request;
    insert into failures (mapping, key, bucket, currency, operation, sqlstate, message, correlation_id)
    select
        p_mapping, coalesce(p.debtor, p.creditor), m.bucket, m.currency, m.operation, 'WM020',
        'legacy and ledger differ after a posting', m.correlation_id
    where p.mode <> 'legacy';
end
$$;

-- At REPEATABLE READ and above an account may have been opened since the snapshot: an insert finds out.
-- The subtransaction is rolled back; a conflict with an invisible row raises 40001, as it must.
create or replace function {{ schema }}.probe_account(
    p_mapping text, p_key text, p_bucket text, p_currency text
) returns void
language plpgsql
security definer
set search_path = pg_catalog, {{ schema }}, pg_temp
as $$
begin
    if current_setting('transaction_isolation') in ('read committed', 'read uncommitted') then
        return;
    end if;
    begin
        insert into accounts (mapping, key, bucket, currency, state, balance)
        values (p_mapping, p_key, p_bucket, p_currency, 'stale', 0)
        on conflict do nothing;
        raise exception using errcode = 'WM000';
    exception
        when sqlstate 'WM000' then
            return;
    end;
end
$$;

-- The movement that a label stands for: a credit or a debit of one side.
create or replace function {{ schema }}.labelled(p_label {{ schema }}.label, p_key text, p_bucket text, p_currency text)
returns {{ schema }}.movement
language plpgsql
stable
as $$
declare
    m {{ schema }}.movement;
begin
    m.amount := abs(p_label.change);
    if p_label.change < 0 then
        m.operation := 'debit';
        m.debtor := p_key;
    else
        m.operation := 'credit';
        m.creditor := p_key;
    end if;
    m.bucket := p_bucket;
    m.currency := p_currency;
    m.dual := p_label.dual;
    m.type := p_label.type;
    m.reference_type := p_label.reference_type;
    m.reference_id := p_label.reference_id;
    m.idempotency_key := p_label.idempotency_key;
    m.request := p_label.request;
    m.correlation_id := p_label.correlation_id;
    m.actor := p_label.actor;
    m.reason := p_label.reason;
    return m;
end
$$;

-- Bring an absent, stale or closed account to its legacy balance. Returns its id.
create or replace function {{ schema }}.bring_up(
    s {{ schema }}.side, m {{ schema }}.movement, r {{ schema }}.column_rule
) returns bigint
language plpgsql
as $$
declare
    v_account bigint := s.account;
    v_behind numeric := s.legacy - coalesce(s.balance, 0);
    v_kind transaction_kind := case when s.account is null then 'opening' else 'resync' end;
    v_counter bigint := case
        when s.account is null then r.opening
        -- Money that an opening brought, and that was taken back with it, comes from there again.
        when exists (select from accounts where id = s.account and state_reason = 'opening taken back') then r.opening
        else r.bypass
    end;
begin
    if s.account is null then
        insert into accounts (mapping, key, bucket, currency, state, balance)
        values (
            r.mapping, s.key, r.bucket, r.currency,
            (case s.mode when 'ledger' then 'frozen' else 'mirrored' end)::account_state, s.legacy
        )
        on conflict do nothing
        returning id into v_account;
        if not found then
            raise exception 'account % was opened meanwhile', s.key using errcode = '40001';
        end if;
    else
        update accounts
        set
            balance = s.legacy, state = 'mirrored', state_at = clock_timestamp(),
            -- The cause stays readable: the gates ask what was written past the adapter in the window.
            state_reason = concat_ws(': ', 'resync', state_reason)
        where id = s.account;
    end if;
    if v_behind <> 0 then
        insert into transactions (
            id, debit_account, credit_account, kind, type, amount, debit_balance, credit_balance,
            currency, correlation_id, actor, reason
        )
        values (
            s.first_id,
            case when v_behind > 0 then v_counter else v_account end,
            case when v_behind > 0 then v_account else v_counter end,
            v_kind, v_kind::text, abs(v_behind),
            case when v_behind < 0 then s.legacy end, case when v_behind > 0 then s.legacy end,
            r.currency, m.correlation_id, m.actor,
            case v_kind when 'resync' then 'the account was ' || s.state::text end
        );
    end if;
    return v_account;
end
$$;

-- The one balanced row, and the new balance of each owner's account in it. System accounts have negative ids. An
-- account that would pay itself is no second account, and the row has to have two.
create or replace function {{ schema }}.write_transaction(
    m {{ schema }}.movement, p {{ schema }}.posting, p_debit bigint, p_credit bigint
) returns void
language plpgsql
as $$
begin
    if p_debit > 0 then
        update accounts set balance = p.debtor_ledger where id = p_debit;
    end if;
    if p_credit > 0 then
        update accounts set balance = p.creditor_ledger where id = p_credit;
    end if;
    insert into transactions (
        id, debit_account, credit_account, kind, type, amount, debit_balance, credit_balance, currency,
        reference_type, reference_id, correlation_id, actor, reason, reverses, group_id
    )
    values (
        p.transaction_id, p_debit, nullif(p_credit, p_debit),
        case m.operation
            when 'reverse' then 'reversal'::transaction_kind
            when 'set_balance' then 'correction'
            else 'posting'
        end,
        m.type, p.amount, p.debtor_ledger, p.creditor_ledger, m.currency,
        m.reference_type, m.reference_id, m.correlation_id, m.actor, m.reason, m.reverses, m.group_id
    );
    if coalesce(m.description, m.address) is not null then
        insert into transaction_details (transaction_id, description, address)
        values (p.transaction_id, m.description, m.address);
    end if;
end
$$;

-- The ledger's part of a movement: each side's account brought up, then the transaction.
create or replace function {{ schema }}.write_ledger(
    m {{ schema }}.movement, d {{ schema }}.side, c {{ schema }}.side, r {{ schema }}.column_rule,
    p {{ schema }}.posting
) returns void
language plpgsql
as $$
declare
    -- Opposite a single side stands the outside world; opposite half a transfer, the money in transit.
    v_counter bigint := case
        when d.key is not null and c.key is not null then r.transit
        else coalesce(m.counter, case m.operation when 'set_balance' then r.correction else r.external end)
    end;
begin
    if d.first_id is not null then
        d.account := bring_up(d, m, r);
    end if;
    if c.first_id is not null then
        c.account := bring_up(c, m, r);
    end if;
    if p.transaction_id is not null then
        perform write_transaction(
            m, p,
            case when d.mode <> 'legacy' then d.account else v_counter end,
            case when c.mode <> 'legacy' then c.account else v_counter end
        );
    end if;
end
$$;

-- The first result of a key, marked replayed; or a refusal when the key belongs to another request.
create or replace function {{ schema }}.replay(m {{ schema }}.movement, inout p {{ schema }}.posting)
language plpgsql
stable
security definer
set search_path = pg_catalog, {{ schema }}, pg_temp
as $$
declare
    k idempotency_keys;
begin
    select * into k from idempotency_keys where key = m.idempotency_key;
    if k.mode is null and k.transaction_id is null then
        return; -- no such key, or one that this batch has reserved
    end if;
    p.debtor_change := null;
    p.creditor_change := null;
    if k.request <> m.request then
        p.refusal := 'key_reused';
        return;
    end if;
    p.refusal := null;
    p.replayed := true;
    p.mismatch := false;
    p.outcome := 'replayed';
    p.mode := coalesce(k.mode, 'dual_write');
    p.transaction_id := k.transaction_id;
    p.debtor_legacy := k.balances[1];
    p.debtor_ledger := k.balances[2];
    p.creditor_legacy := k.balances[3];
    p.creditor_ledger := k.balances[4];
    if k.balances is null then
        select t.debit_balance, t.debit_balance, t.credit_balance, t.credit_balance
        into p.debtor_legacy, p.debtor_ledger, p.creditor_legacy, p.creditor_ledger
        from transactions as t
        where t.id = k.transaction_id;
    end if;
end
$$;

-- What an administrator did stands in the audit log, whatever became of the ledger's part. Who calls the function
-- past the adapter may name nobody, and give no reason.
create or replace function {{ schema }}.put_on_record(
    m {{ schema }}.movement, p {{ schema }}.posting, p_mapping text
) returns void
language plpgsql
as $$
begin
    insert into audit_log (action, actor, reason, mapping, correlation_id, details)
    values (
        m.operation, coalesce(m.actor, session_user), coalesce(m.reason, ''), p_mapping, m.correlation_id,
        jsonb_strip_nulls(jsonb_build_object(
            'key', coalesce(p.debtor, p.creditor),
            'payee', case when p.debtor is not null then p.creditor end,
            'bucket', m.bucket,
            'currency', m.currency,
            'change', case when p.debtor is null then p.amount else -p.amount end,
            'transaction_id', p.transaction_id,
            'reverses', m.reverses,
            'mode', p.mode,
            'outcome', p.outcome,
            'idempotency_key', m.idempotency_key
        ))
    );
end
$$;

-- Decide and write the ledger's part of one movement, whose sides were read under their locks.
create or replace function {{ schema }}.post_movement(
    m {{ schema }}.movement, d {{ schema }}.side, c {{ schema }}.side, r {{ schema }}.column_rule,
    p_policy text, p_reserved boolean
) returns {{ schema }}.posting
language plpgsql
as $$
declare
    p posting;
    v_amount numeric := m.amount;
    v_plain boolean;
begin
    if p_reserved and m.idempotency_key is not null then
        p := replay(m, p);
        if p.replayed or p.refusal is not null then
            return p;
        end if;
    end if;
    if m.operation = 'set_balance' then
        v_amount := v_amount - case c.mode when 'ledger' then coalesce(c.balance, c.legacy) else c.legacy end;
        if v_amount < 0 then
            v_amount := -v_amount;
            d := c;
            c := null;
        end if;
    end if;
    -- NaN is greater than infinity, and a null fails every comparison.
    p.refusal := case
        when (
            m.amount = round(m.amount, r.scale) and m.amount < 'Infinity'
            and (m.amount > 0 or m.operation in ('set_balance', 'open_account') and m.amount > '-Infinity')
        ) is not true then 'invalid_amount'
        when d.mode <> 'ledger' and (d.unfit and p_policy = 'strict' or (abs(d.legacy) < 'Infinity') is not true)
            or c.mode <> 'ledger' and (c.unfit and p_policy = 'strict' or (abs(c.legacy) < 'Infinity') is not true)
            then 'legacy_value'
        when m.operation <> 'set_balance'
            and (case d.mode when 'ledger' then coalesce(d.balance, d.legacy) else d.legacy end) - v_amount < r.floor
            then 'insufficient_funds'
        -- Also while the ledger alone is written: the column must be able to take the balance back.
        when (case d.mode when 'ledger' then coalesce(d.balance, d.legacy) else d.legacy end) - v_amount < r.minimum
            or (case c.mode when 'ledger' then coalesce(c.balance, c.legacy) else c.legacy end) + v_amount > r.maximum
            then 'overflow'
    end;
    if p.refusal is not null then
        p.debtor := d.key;
        p.creditor := c.key;
        p.debtor_legacy := case d.mode when 'ledger' then coalesce(d.balance, d.legacy) else d.legacy end;
        p.creditor_legacy := case c.mode when 'ledger' then coalesce(c.balance, c.legacy) else c.legacy end;
        -- A key that moved money before is a replay, whatever the balance is today.
        return replay(m, p);
    end if;

    v_plain := coalesce(d.mode <> 'legacy' and d.state in ('mirrored', 'frozen'), d.key is null)
        and coalesce(c.mode <> 'legacy' and c.state in ('mirrored', 'frozen'), c.key is null);
    if not v_plain then
        -- Ids grow in the order of posting: an opening or a resync comes before the movement itself.
        d.first_id := case
            when d.mode <> 'legacy' and coalesce(d.state, 'stale') in ('stale', 'closed') then nextval('transaction_ids')
        end;
        c.first_id := case
            when c.mode <> 'legacy' and coalesce(c.state, 'stale') in ('stale', 'closed') then nextval('transaction_ids')
        end;
    end if;
    p := row(
        null,
        case
            when d.unfit or c.unfit then 'ledger_failed'
            when d.mode <> 'legacy' or c.mode <> 'legacy' then 'ok'
            else 'skipped'
        end,
        false,
        case
            when 'dual_write' in (d.mode, c.mode) then 'dual_write'
            when 'ledger' in (d.mode, c.mode) then 'ledger'
            else 'legacy'
        end,
        case when v_amount > 0 and (d.mode <> 'legacy' or c.mode <> 'legacy') then nextval('transaction_ids') end,
        round(v_amount, r.scale),
        d.key,
        case when d.mode <> 'ledger' then -v_amount end, -- who pays, pays something
        case when d.mode <> 'ledger' then d.legacy - v_amount end,
        case when d.mode <> 'legacy'
            then case when d.state in ('mirrored', 'frozen') then d.balance else d.legacy end - v_amount
        end,
        d.account,
        c.key,
        case when c.mode <> 'ledger' and v_amount > 0 then v_amount end,
        case when c.mode <> 'ledger' then c.legacy + v_amount end,
        case when c.mode <> 'legacy'
            then case when c.state in ('mirrored', 'frozen') then c.balance else c.legacy end + v_amount
        end,
        c.account,
        false,
        0
    );

    if m.idempotency_key is not null and not p_reserved then
        insert into idempotency_keys (
            key, transaction_id, request, mode, balances
        )
        values (
            m.idempotency_key, p.transaction_id, m.request, p.mode::posting_mode,
            array[p.debtor_legacy, p.debtor_ledger, p.creditor_legacy, p.creditor_ledger]
        )
        on conflict do nothing;
        if not found then
            p := replay(m, p);
            if p.replayed is not true and p.refusal is null then
                raise exception 'idempotency key % was removed meanwhile', m.idempotency_key using errcode = '40001';
            end if;
            return p;
        end if;
    end if;

    if p_reserved or 'legacy' in (d.mode, c.mode) then
        -- The first of a batch gives the group its number. Or half a transfer: its other half comes as the resync of
        -- the other account, from `bypass`.
        m.group_id := coalesce(m.group_id, p.transaction_id);
    end if;
    if p.mode <> 'legacy' then
        if p_policy = 'strict' or 'ledger' in (d.mode, c.mode) then
            perform write_ledger(m, d, c, r, p);
        else
            p := shadow_ledger(m, d, c, r, p);
        end if;
    end if;
    if not v_plain and v_amount > 0 then
        perform turn_stale(x.account, 'written while dual-write was off or the line stopped')
        from (values (d.account, d.mode), (c.account, c.mode)) as x (account, mode)
        where x.mode = 'legacy';
    end if;
    if d.unfit or c.unfit then
        insert into failures (mapping, key, bucket, currency, operation, sqlstate, message, correlation_id)
        values (
            r.mapping, case when d.unfit then d.key else c.key end, r.bucket, r.currency, m.operation, 'WM023',
            'the legacy column holds no exact amount', m.correlation_id
        );
    end if;
    if p_reserved and m.idempotency_key is not null then
        update idempotency_keys
        set
            transaction_id = p.transaction_id, mode = p.mode::posting_mode,
            balances = array[p.debtor_legacy, p.debtor_ledger, p.creditor_legacy, p.creditor_ledger]
        where key = m.idempotency_key;
    end if;
    -- Behind the ledger's part: what became of that is known, and a shadow leg that failed has not taken it along.
    if m.operation in ('set_balance', 'reverse') and v_amount > 0 and m.watched is not true then
        perform put_on_record(m, p, r.mapping);
    end if;
    return p;
end
$$;

-- The ledger leg under the shadow policy is a subtransaction: when it fails for good, legacy goes on alone, the
-- account turns stale and the failure is recorded. What can be retried reaches the caller.
create or replace function {{ schema }}.shadow_ledger(
    m {{ schema }}.movement, d {{ schema }}.side, c {{ schema }}.side, r {{ schema }}.column_rule,
    inout p {{ schema }}.posting
)
language plpgsql
as $$
declare
    v_state text;
    v_message text;
begin
    perform write_ledger(m, d, c, r, p);
exception
    when others then
        get stacked diagnostics v_state = returned_sqlstate, v_message = message_text;
        if v_state like '40%' or v_state = '55P03' then
            raise;
        end if;
        p.outcome := 'ledger_failed';
        p.mode := 'legacy';
        p.transaction_id := null;
        p.debtor_ledger := null;
        p.creditor_ledger := null;
        perform turn_stale(p.debtor_account, 'a ledger leg failed');
        perform turn_stale(p.creditor_account, 'a ledger leg failed');
        update idempotency_keys
        set transaction_id = null, mode = 'legacy', balances = array[p.debtor_legacy, null, p.creditor_legacy, null]
        where key = m.idempotency_key;
        insert into failures (mapping, key, bucket, currency, operation, sqlstate, message, correlation_id)
        values (
            r.mapping, coalesce(p.debtor, p.creditor), r.bucket, r.currency, m.operation, v_state, v_message,
            m.correlation_id
        );
end
$$;

-- Who pays and who is paid. A reversal takes both, and the system account, from the transaction it undoes.
create or replace function {{ schema }}.resolve(p_mapping text, inout m {{ schema }}.movement)
language plpgsql
security definer
set search_path = pg_catalog, {{ schema }}, pg_temp
as $$
declare
    t transactions;
    v_debit accounts;
    v_credit accounts;
begin
    select * into t from transactions where id = m.reverses;
    select * into v_debit from accounts where id = t.debit_account and mapping = p_mapping;
    select * into v_credit from accounts where id = t.credit_account and mapping = p_mapping;
    if v_debit.id is null and v_credit.id is null then
        m.refusal := 'unknown_transaction';
        return;
    end if;
    -- Of a transfer with one leg in transit the ledger knows one side: its reversal would leave the other its money.
    if
        t.kind in ('opening', 'resync', 'reversal')
        or exists (
            select from system_accounts where id in (t.debit_account, t.credit_account) and name = 'transit'
        )
    then
        m.refusal := 'not_reversible';
        return;
    end if;
    m.debtor := v_credit.key;
    m.creditor := v_debit.key;
    m.counter := least(t.debit_account, t.credit_account);
    m.bucket := coalesce(v_debit.bucket, v_credit.bucket);
    m.currency := t.currency;
    m.amount := t.amount;
    m.type := coalesce(m.type, t.type);
end
$$;

-- For a batch: all account locks by id, then all idempotency keys sorted, before the first movement.
create or replace function {{ schema }}.enter_batch(p_mapping text, p_keys text[], p_movements {{ schema }}.movement[])
returns void
language plpgsql
security definer
set search_path = pg_catalog, {{ schema }}, pg_temp
as $$
begin
    perform 1 from accounts where mapping = p_mapping and key = any(p_keys) order by id for no key update;
    insert into idempotency_keys (key, request)
    select distinct on (b.idempotency_key collate "C") b.idempotency_key, b.request
    from unnest(p_movements) with ordinality as b
    where b.idempotency_key is not null
    order by b.idempotency_key collate "C", b.ordinality
    on conflict do nothing;
end
$$;
