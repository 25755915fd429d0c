-- sqlfluff:exclude_rules:references.keywords,references.from,structure.column_order,layout.indent,layout.long_lines
-- (indentation and long lines are not checked here: sqlfluff looks at the rendered macros, not at their source)
-- Reconciliation: one account held against a truth, and corrected, under its locks: legacy row, account, journal.

-- What is true of a currency's column, from the mapping's own templates.
{% macro rules() %}
    {% for c in columns %}
    {{ "if" if loop.first else "elsif" }}
        p_request ->> 'bucket' = '{{ c.bucket }}' and p_request ->> 'currency' = '{{ c.currency }}'
    then
        r := row(
            '{{ mapping }}', '{{ c.bucket }}', '{{ c.currency }}', {{ c.scale }}, {{ c.floor }},
            {{ c.minimum }}, {{ c.maximum }},
            {{ c.opening }}, {{ c.external }}, {{ c.correction }}, {{ c.bypass }}, {{ c.transit }}
        );
    {% endfor %}
    else
        raise exception 'mapping {{ mapping }} has no such column' using errcode = 'WM010';
    end if;
{% endmacro %}
{% macro same_configuration() %}
    if p_request ->> 'fingerprint' is distinct from '{{ fingerprint }}' then
        raise exception 'mapping {{ mapping }} was installed from another configuration'
            using errcode = 'WM010', hint = 'Run: walletmigrate install';
    end if;
{% endmacro %}
-- What the journal says of an owner's account, under the account's lock: the sum of its transactions.
create or replace function {{ schema }}.journal_balance(p_account bigint) returns numeric
language plpgsql
stable
as $$
begin
    return coalesce((
        select sum(t.amount) from transactions as t where t.credit_account = p_account and t.credit_account > 0
    ), 0) - coalesce((
        select sum(t.amount) from transactions as t where t.debit_account = p_account and t.debit_account > 0
    ), 0);
end
$$;

-- Decide, and write the ledger's part. The sides were read under the locks of legacy row and account.
-- q: truth (legacy, ledger, value, change) with amount, tolerance, limit, seen, create, negative, dry; run, actor …
create or replace function {{ schema }}.amend(s {{ schema }}.side, r {{ schema }}.column_rule, q jsonb)
returns {{ schema }}.correction
language plpgsql
as $$
declare
    k correction;
    m movement;
    v_truth text := q ->> 'truth';
    v_current numeric := case s.state when 'frozen' then s.balance else s.legacy end;
    v_account bigint := s.account;
    v_from numeric := s.balance;
    v_within boolean;
begin
    k.key := q ->> 'key';
    k.bucket := r.bucket;
    k.currency := r.currency;
    k.account_id := s.account;
    k.state := s.state;
    k.legacy_before := s.legacy;
    k.ledger_before := s.balance;
    k.legacy_after := s.legacy;
    k.ledger_after := s.balance;
    k.refusal := case
        when s.state is distinct from 'frozen' and s.exact is not true then 'legacy_value'
        when s.mode = 'legacy' then 'stopped'
        when s.state = 'closed' then 'closed'
        when s.account is null and (q ->> 'create')::boolean is not true then 'absent'
        when s.state = 'stale' and v_truth = 'ledger' then 'stale'
        when s.state = 'frozen' and v_truth = 'legacy' then 'frozen'
        when s.state = 'mirrored' and v_truth = 'change' and s.legacy <> s.balance then 'differs'
    end;
    if k.refusal is not null then
        k.outcome := 'refused';
        return k;
    end if;

    k.truth := case v_truth
        when 'legacy' then s.legacy
        when 'ledger' then coalesce(s.balance, s.legacy)
        when 'value' then (q ->> 'amount')::numeric
        when 'change' then v_current + (q ->> 'amount')::numeric
    end;
    k.difference := k.truth - v_current;
    -- Of a mirrored account both balances are to be true: the side that is further away counts.
    if s.state = 'mirrored' and abs(k.truth - s.balance) > abs(k.difference) then
        k.difference := k.truth - s.balance;
    end if;
    v_within := abs(k.difference) <= (q ->> 'tolerance')::numeric;
    k.outcome := case
        when (q ->> 'seen')::numeric <> v_current then 'moved'
        when v_truth = 'change' then 'corrected'
        when v_within and s.account is null then 'opened'
        when v_within and s.state = 'stale' then 'resynced'
        when v_within then 'in_order'
        when abs(k.difference) > (q ->> 'limit')::numeric then 'reported'
        else 'corrected'
    end;
    if k.outcome = 'corrected' then
        -- NaN is greater than infinity, and a null fails every comparison.
        k.refusal := case
            when (k.truth = round(k.truth, r.scale) and abs(k.truth) < 'Infinity') is not true then 'invalid'
            when k.truth < 0 and (q ->> 'negative')::boolean is not true then 'negative'
            -- Also while the ledger alone is written: the column must be able to take the balance back.
            when k.truth < r.minimum or k.truth > r.maximum then 'overflow'
        end;
        k.outcome := case when k.refusal is null then 'corrected' else 'refused' end;
    end if;
    if k.outcome not in ('corrected', 'opened', 'resynced') then
        return k;
    end if;
    -- A correction of a balance that is not the journal's would make the journal wrong instead.
    if s.account is not null and s.balance is distinct from journal_balance(s.account) then
        k.refusal := 'journal';
        k.outcome := 'refused';
        return k;
    end if;
    -- What this run has done it does not do again, when it is cut short and goes on.
    if exists (
        select from audit_log as a
        where
            a.job_id = (q ->> 'run')::bigint and a.action = 'reconcile corrected' and a.mapping = r.mapping
            and a.details ->> 'key' = k.key and a.details ->> 'bucket' = k.bucket
            and a.details ->> 'currency' = k.currency
    ) then
        k.outcome := 'in_order';
        return k;
    end if;

    k.ledger_after := case k.outcome when 'corrected' then k.truth else s.legacy end;
    if s.mode <> 'ledger' then
        k.legacy_after := k.ledger_after;
    end if;
    if (q ->> 'dry')::boolean then
        return k;
    end if;
    m.operation := 'set_balance';
    m.actor := q ->> 'actor';
    m.reason := q ->> 'reason';
    m.correlation_id := q ->> 'correlation';
    if s.account is null or s.state = 'stale' then
        s.first_id := nextval('transaction_ids');
        v_account := bring_up(s, m, r);
        v_from := s.legacy;
        k.account_id := v_account;
    end if;
    if k.ledger_after <> v_from then
        k.transaction_id := nextval('transaction_ids');
        update accounts set balance = k.ledger_after where id = v_account;
        insert into transactions (
            id, debit_account, credit_account, kind, type, amount, debit_balance, credit_balance, currency,
            correlation_id, actor, reason, job_id
        )
        values (
            k.transaction_id,
            case when k.ledger_after > v_from then r.correction else v_account end,
            case when k.ledger_after > v_from then v_account else r.correction end,
            'correction', q ->> 'type', abs(k.ledger_after - v_from),
            case when k.ledger_after < v_from then k.ledger_after end,
            case when k.ledger_after > v_from then k.ledger_after end,
            r.currency, m.correlation_id, m.actor, m.reason, (q ->> 'run')::bigint
        );
        if q ->> 'notes' is not null then
            insert into transaction_details (transaction_id, description) values (k.transaction_id, q ->> 'notes');
        end if;
    end if;
    return k;
end
$$;

-- Take one correction back: each side goes back by what the correction moved on it, the ledger by a reversal.
create or replace function {{ schema }}.unamend(s {{ schema }}.side, r {{ schema }}.column_rule, q jsonb)
returns {{ schema }}.correction
language plpgsql
as $$
declare
    k correction;
    v_done audit_log;
    t transactions;
    v_moved numeric := 0;
    v_own_key text;
    v_told numeric[];
begin
    select * into v_done from audit_log where id = (q ->> 'audit')::bigint;
    select * into t from transactions where id = (v_done.details ->> 'transaction_id')::bigint;
    v_own_key := 'walletmigrate:reversal:' || t.id;
    k.key := v_done.details ->> 'key';
    k.bucket := r.bucket;
    k.currency := r.currency;
    k.account_id := s.account;
    k.state := s.state;
    k.legacy_before := s.legacy;
    k.ledger_before := s.balance;
    k.legacy_after := s.legacy;
    k.ledger_after := s.balance;
    if t.id is not null then
        v_moved := case s.account when t.credit_account then t.amount when t.debit_account then -t.amount end;
        k.ledger_after := s.balance - v_moved;
    end if;
    if s.state <> 'frozen' then
        k.legacy_after := s.legacy - case
            -- Corrected in the ledger alone, and an unfreeze has since brought that to the row. What was absent was
            -- opened frozen, or mirrored and moved on both sides alike.
            when coalesce(v_done.details ->> 'state', 'frozen') = 'frozen' then v_moved
            else (v_done.details ->> 'legacy_after')::numeric - (v_done.details ->> 'legacy_before')::numeric
        end;
    end if;
    k.truth := case s.state when 'frozen' then k.ledger_after else k.legacy_after end;
    k.difference := k.truth - case s.state when 'frozen' then s.balance else s.legacy end;
    k.refusal := case
        when exists (
            select from audit_log as a
            where a.action = 'reconcile undone' and a.details ->> 'undoes' = v_done.id::text
        ) then 'undone_before'
        when exists (select from transactions where reverses = t.id)
            or exists (select from idempotency_keys where key = v_own_key) then 'reversed_before'
        when s.account is null or v_moved is null then 'absent'
        when s.state = 'closed' then 'closed'
        when s.state = 'frozen' and t.id is null then 'frozen'
        when s.state <> 'frozen' and s.exact is not true then 'legacy_value'
        when s.mode = 'legacy' then 'stopped'
        when k.difference < 0 and k.truth < r.floor then 'floor'
        when k.truth < r.minimum or k.truth > r.maximum then 'overflow'
    end;
    k.outcome := case when k.refusal is null then 'undone' else 'refused' end;
    if k.refusal is not null or (q ->> 'dry')::boolean then
        return k;
    end if;
    if t.id is not null then
        k.transaction_id := nextval('transaction_ids');
        -- The key of every reversal: the adapter's finds this one, and replays it, with the balances as they are now.
        v_told := array[case when s.mode = 'dual_write' then k.legacy_after end, k.ledger_after];
        insert into idempotency_keys (key, transaction_id, request, mode, balances)
        values (
            v_own_key, k.transaction_id, (q ->> 'request')::uuid,
            (case s.mode when 'ledger' then 'ledger' else 'dual_write' end)::posting_mode,
            case when v_moved > 0 then v_told else array[null, null]::numeric[] || v_told end
        );
        update accounts set balance = k.ledger_after where id = s.account;
        insert into transactions (
            id, debit_account, credit_account, kind, type, amount, debit_balance, credit_balance, currency,
            correlation_id, actor, reason, reverses, job_id
        )
        values (
            k.transaction_id, t.credit_account, t.debit_account, 'reversal', t.type, t.amount,
            case when t.credit_account = s.account then k.ledger_after end,
            case when t.debit_account = s.account then k.ledger_after end,
            t.currency, q ->> 'correlation', q ->> 'actor', q ->> 'reason', t.id, (q ->> 'run')::bigint
        );
    end if;
    if s.state = 'mirrored' and k.ledger_after <> k.legacy_after then
        -- The correction moved one side alone; before it the two differed, and no mirrored account may.
        perform turn_stale(s.account, 'a correction of one side was undone');
    end if;
    return k;
end
$$;

create or replace function {{ schema }}.amend_{{ mapping }}(p_request jsonb, p_undo boolean)
returns {{ schema }}.correction
language plpgsql
security definer
set search_path = pg_catalog, {{ schema }}, pg_temp
as $$
#variable_conflict use_variable
declare
    s side;
    r column_rule;
begin
    {{ rules() }}
    s := side_{{ mapping }}(p_request ->> 'key', r.bucket, r.currency, true);
    if s.key is null then
        raise exception 'row-level security hides rows of {{ relation }} from the role that owns the ledger'
            using errcode = 'WM022', hint = 'Run: walletmigrate install';
    end if;
    return case when p_undo then unamend(s, r, p_request) else amend(s, r, p_request) end;
end
$$;

-- Bring a legacy balance to what the ledger's part decided, as the caller's role; the fence compares once more.
create or replace function {{ schema }}.rewrite_{{ mapping }}(
    p_key {{ key_type }}, p_bucket text, p_currency text, p_before numeric, p_after numeric
) returns void
language plpgsql
as $$
#variable_conflict use_variable
declare
    v_change numeric := p_after - p_before;
    v_now numeric;
begin
    if (v_change <> 0) is not true then
        return;
    end if;
    perform set_config('walletmigrate.posting', 'adapter:{{ mapping }}:' || p_key, true);
    {% for c in columns %}
    {{ "if" if loop.first else "elsif" }} p_bucket = '{{ c.bucket }}' and p_currency = '{{ c.currency }}' then
        update {{ relation }} as l set {{ c.column }} = {{ c.changed | replace("<change>", "v_change") }}
        where l.{{ key }} = p_key
        returning {{ c.value }} into v_now;
    {% endfor %}
    end if;
    if not found then
        raise exception 'the update of {{ mapping }} % wrote no row', p_key
            using errcode = 'WM021', hint = 'A trigger or a policy of the application suppressed it.';
    end if;
    perform set_config('walletmigrate.posting', '', true);
    if v_now is distinct from p_after then
        raise exception 'legacy row % of {{ mapping }} holds % after the correction, not %', p_key, v_now, p_after
            using errcode = 'WM020';
    end if;
end
$$;

-- One account, whole: compared with the truth, corrected on both sides, on record. A refusal has written nothing.
create or replace function {{ schema }}.correct_{{ mapping }}(p_request jsonb) returns {{ schema }}.correction
language plpgsql
as $$
#variable_conflict use_variable
declare
    k {{ schema }}.correction;
    v_key {{ key_type }} := p_request ->> 'key';
    v_undo constant boolean := p_request ? 'audit';
begin
    {{ same_configuration() }}
    -- Twice: a row that was deleted and inserted again while the first statement waited is seen by the second.
    if {{ schema }}.lock_{{ mapping }}(array[v_key]) = '{}' and {{ schema }}.lock_{{ mapping }}(array[v_key]) = '{}' then
        k.key := v_key;
        k.bucket := p_request ->> 'bucket';
        k.currency := p_request ->> 'currency';
        k.outcome := 'refused';
        k.refusal := 'no_row';
        return k;
    end if;
    k := {{ schema }}.amend_{{ mapping }}(p_request, v_undo);
    if k.outcome in ('corrected', 'opened', 'resynced', 'undone') and (p_request ->> 'dry')::boolean is not true then
        perform {{ schema }}.rewrite_{{ mapping }}(v_key, k.bucket, k.currency, k.legacy_before, k.legacy_after);
        insert into {{ schema }}.audit_log (action, actor, reason, mapping, job_id, correlation_id, details)
        values (
            case p_request ->> 'type' when 'adjust' then 'adjust' else 'reconcile ' || k.outcome end,
            p_request ->> 'actor', p_request ->> 'reason', '{{ mapping }}', (p_request ->> 'run')::bigint,
            p_request ->> 'correlation',
            jsonb_strip_nulls(to_jsonb(k) || jsonb_build_object('undoes', (p_request ->> 'audit')::bigint))
        );
    end if;
    return k;
end
$$;

-- The stored balance of one account is made the sum of its journal; a mirrored account that then differs from its
-- legacy row turns stale: nobody has said that legacy is wrong.
create or replace function {{ schema }}.recount_{{ mapping }}(p_request jsonb) returns {{ schema }}.correction
language plpgsql
security definer
set search_path = pg_catalog, {{ schema }}, pg_temp
as $$
#variable_conflict use_variable
declare
    k correction;
begin
    select a.id, a.key, a.bucket, a.currency, a.state, a.balance
    into k.account_id, k.key, k.bucket, k.currency, k.state, k.ledger_before
    from accounts as a
    where
        a.mapping = '{{ mapping }}' and a.key = p_request ->> 'key'
        and a.bucket = p_request ->> 'bucket' and a.currency = p_request ->> 'currency'
    for no key update;
    if not found then
        k.key := p_request ->> 'key';
        k.bucket := p_request ->> 'bucket';
        k.currency := p_request ->> 'currency';
        k.outcome := 'refused';
        k.refusal := 'absent';
        return k;
    end if;
    -- A retired column may be gone; a statement that is not come to is not planned.
    if (select s.phase from control as s) <> 'retired' then
        {% for c in columns %}
        {{ "if" if loop.first else "elsif" }} k.bucket = '{{ c.bucket }}' and k.currency = '{{ c.currency }}' then
            select {{ c.value }} into k.legacy_before
            from {{ relation }} as l where l.{{ key }} = k.key::{{ key_type }};
        {% endfor %}
        end if;
    end if;
    k.legacy_after := k.legacy_before;
    k.truth := journal_balance(k.account_id);
    k.ledger_after := k.truth;
    k.difference := k.truth - k.ledger_before;
    if k.difference = 0 then
        k.outcome := 'in_order';
        return k;
    end if;
    k.outcome := case
        when k.state = 'mirrored' and k.legacy_before is distinct from k.truth then 'turned_stale' else 'recalculated'
    end;
    if (p_request ->> 'dry')::boolean is not true then
        update accounts set balance = k.truth where id = k.account_id;
        if k.outcome = 'turned_stale' then
            perform turn_stale(k.account_id, 'recalculated: the journal says another balance than legacy');
        end if;
    end if;
    return k;
end
$$;

create or replace function {{ schema }}.recalculate_{{ mapping }}(p_request jsonb) returns {{ schema }}.correction
language plpgsql
as $$
#variable_conflict use_variable
declare
    k {{ schema }}.correction;
begin
    {{ same_configuration() }}
    perform {{ schema }}.lock_{{ mapping }}(array[p_request ->> 'key']::{{ key_type }}[]);
    k := {{ schema }}.recount_{{ mapping }}(p_request);
    if k.outcome in ('recalculated', 'turned_stale') and (p_request ->> 'dry')::boolean is not true then
        insert into {{ schema }}.audit_log (action, actor, reason, mapping, correlation_id, details)
        values (
            'recalculate', p_request ->> 'actor', p_request ->> 'reason', '{{ mapping }}', p_request ->> 'correlation',
            jsonb_strip_nulls(to_jsonb(k))
        );
    end if;
    return k;
end
$$;

-- How the accounts of these keys stand, unlocked: what differs is looked at again under its locks.
create or replace function {{ schema }}.standing_{{ mapping }}(p_keys {{ key_type }}[])
returns table (
    key text, bucket text, currency text, state text, legacy numeric, ledger numeric
)
language plpgsql
stable
as $$
#variable_conflict use_column
begin
    {% for c in columns %}
    return query
    select
        l.{{ key }}::text, '{{ c.bucket }}'::text, '{{ c.currency }}'::text, coalesce(a.state::text, 'absent'),
        case when abs({{ c.value }}) < 'Infinity' then {{ c.value }} end, a.balance::numeric
    from {{ relation }} as l
    left join {{ schema }}.accounts as a
        on
            a.mapping = '{{ mapping }}' and a.bucket = '{{ c.bucket }}' and a.currency = '{{ c.currency }}'
            and a.key = any(p_keys::text[]) and a.key = l.{{ key }}::text collate "C"
    where l.{{ key }} = any(p_keys)
    order by l.{{ key }};
    {% endfor %}
end
$$;
