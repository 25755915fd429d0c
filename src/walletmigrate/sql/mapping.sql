-- sqlfluff:exclude_rules:references.keywords,references.from,structure.column_order,layout.indent
-- (indentation is not checked here: sqlfluff looks at the rendered macros, not at their source)
-- Posting, the part made for one mapping. `legacy` is {{ relation }}, keyed by {{ key }}.

-- Read one side of a movement: the legacy row with the phase and the line, then, in a new statement, the account.
-- The phase is a row: an old snapshot that sees a lower phase writes legacy alone, which is safe. The line is a
-- sequence: its value is seen at once.
create or replace function {{ schema }}.side_{{ mapping }}(p_key text, p_bucket text, p_currency text, p_dual boolean)
returns {{ schema }}.side
language plpgsql
as $$
#variable_conflict use_variable
declare
    s side;
    v_frozen boolean;
begin
    {% for c in columns %}
    {{ "if" if loop.first else "elsif" }} p_bucket = '{{ c.bucket }}' and p_currency = '{{ c.currency }}' then
        select
            l.{{ key }}::text, {{ c.value }},
            case
                when {{ c.value }} = round({{ c.value }}, {{ c.scale }}) then abs({{ c.value }}) < 'Infinity'
                else false
            end,
            case when p_dual and k.phase <> 'legacy' and n.last_value = 1 then 'dual_write' else 'legacy' end,
            k.phase in ('frozen', 'retired')
        into s.key, s.legacy, s.exact, s.mode, v_frozen
        from {{ relation }} as l, control as k, line as n
        where l.{{ key }} = p_key::{{ key_type }};
    {% endfor %}
    end if;
    if s.key is null then
        return s;
    end if;
    select a.id, a.state, a.balance into s.account, s.state, s.balance
    from accounts as a
    where a.mapping = '{{ mapping }}' and a.key = p_key and a.bucket = p_bucket and a.currency = p_currency
    for no key update;
    if s.state = 'frozen' then
        s.mode := 'ledger';
    elsif s.exact is not true then
        s.unfit := s.mode = 'dual_write';
        s.mode := 'legacy';
    elsif s.account is null then
        if s.mode = 'legacy' then
            perform probe_account('{{ mapping }}', p_key, p_bucket, p_currency);
        elsif v_frozen then
            s.mode := 'ledger';
        end if;
    end if;
    return s;
end
$$;

-- The next p_limit keys behind p_after, in order.
create or replace function {{ schema }}.keys_{{ mapping }}(p_after text, p_limit integer) returns {{ key_type }}[]
language plpgsql
stable
as $$
#variable_conflict use_variable
begin
    if p_after is null then
        return array(select l.{{ key }} from {{ relation }} as l order by l.{{ key }} limit p_limit);
    end if;
    return array(
        select l.{{ key }} from {{ relation }} as l
        where l.{{ key }} > p_after::{{ key_type }}
        order by l.{{ key }}
        limit p_limit
    );
end
$$;

-- Lock legacy rows in the order of their keys. Returns the keys that have a row: only these are locked.
create or replace function {{ schema }}.lock_{{ mapping }}(p_keys {{ key_type }}[]) returns {{ key_type }}[]
language plpgsql
as $$
#variable_conflict use_variable
begin
    return array(
        select l.{{ key }} from {{ relation }} as l
        where l.{{ key }} = any(p_keys)
        order by l.{{ key }}
        for no key update
    );
end
$$;

-- One movement's ledger part. The caller holds the locks of the legacy rows.
create or replace function {{ schema }}.leg_{{ mapping }}(
    m {{ schema }}.movement, p_policy text, p_reserved boolean
) returns {{ schema }}.posting
language plpgsql
security definer
set search_path = pg_catalog, {{ schema }}, pg_temp
as $$
#variable_conflict use_variable
declare
    d side;
    c side;
    r column_rule;
    p posting;
begin
    {% for c in columns %}
    {{ "if" if loop.first else "elsif" }} m.bucket = '{{ c.bucket }}' and m.currency = '{{ c.currency }}' then
        r := row(
            '{{ mapping }}', '{{ c.bucket }}', '{{ c.currency }}', {{ c.scale }}, {{ c.floor }},
            {{ c.minimum }}, {{ c.maximum }},
            {{ c.opening }}, {{ c.external }}, {{ c.correction }}, {{ c.bypass }}, {{ c.transit }}
        );
    {% endfor %}
    else
        p.refusal := 'unknown_column';
        return p;
    end if;
    if m.debtor is not null and m.creditor is not null then
        perform 1 from accounts as a
        where
            a.mapping = '{{ mapping }}' and a.key in (m.debtor, m.creditor)
            and a.bucket = m.bucket and a.currency = m.currency
        order by a.id
        for no key update;
    end if;
    if m.debtor is not null then
        d := side_{{ mapping }}(m.debtor, m.bucket, m.currency, m.dual);
    end if;
    if m.creditor is not null then
        c := side_{{ mapping }}(m.creditor, m.bucket, m.currency, m.dual);
    end if;
    if m.debtor is not null and d.key is null or m.creditor is not null and c.key is null then
        raise exception 'row-level security hides rows of {{ relation }} from the role that owns the ledger'
            using errcode = 'WM022', hint = 'Run: walletmigrate install';
    end if;
    return post_movement(m, d, c, r, p_policy, p_reserved);
end
$$;

{% macro write_legacy(side) %}
    if p.{{ side }}_change is not null then
        {% for c in columns %}
        {{ "if" if loop.first else "elsif" }} m.bucket = '{{ c.bucket }}' and m.currency = '{{ c.currency }}' then
            update {{ relation }} as l set {{ c.column }} = {{ c.changed | replace("<change>", "p." ~ side ~ "_change") }}
            where l.{{ key }} = p.{{ side }}::{{ key_type }}
            returning {{ c.value }} into v_now;
        {% endfor %}
        end if;
        if not found then
            raise exception 'the update of {{ mapping }} % wrote no row', p.{{ side }}
                using errcode = 'WM021', hint = 'A trigger or a policy of the application suppressed it.';
        end if;
        if v_now is distinct from coalesce(p.{{ side }}_ledger, p.{{ side }}_legacy) then
            p.mismatch := true;
            p.{{ side }}_legacy := v_now;
        end if;
    end if;
{% endmacro %}
-- One movement: legacy rows locked, ledger first, then legacy, then the comparison. Legacy is written as the
-- caller's role, so that the application's own triggers and row-level security see the application.
create or replace function {{ schema }}.move_{{ mapping }}(
    m {{ schema }}.movement, p_policy text, p_reserved boolean
) returns {{ schema }}.posting
language plpgsql
as $$
#variable_conflict use_variable
declare
    p {{ schema }}.posting;
    v_now numeric;
    v_found bigint;
    v_locked {{ key_type }}[];
begin
    perform 1 from {{ relation }} as l
    where l.{{ key }} = any(array[m.debtor, m.creditor]::{{ key_type }}[])
    order by l.{{ key }}
    for no key update;
    get diagnostics v_found = row_count;
    if v_found <> num_nonnulls(m.debtor, m.creditor) then
        -- No row: look once more with a fresh snapshot, for a row that was deleted and inserted again while
        -- this statement waited for its lock. Only a row that is locked is written.
        v_locked := {{ schema }}.lock_{{ mapping }}(array[m.debtor, m.creditor]::{{ key_type }}[]);
        if cardinality(v_locked) <> num_nonnulls(m.debtor, m.creditor) then
            p.refusal := 'unknown_account';
            p.debtor := case when m.debtor::{{ key_type }} <> all(v_locked) then m.debtor end;
            p.creditor := m.creditor;
            -- What was done once stays done, also when the row is gone since.
            if m.idempotency_key is not null then
                p := {{ schema }}.replay(m, p);
            end if;
            return p;
        end if;
    end if;
    p := {{ schema }}.leg_{{ mapping }}(m, p_policy, p_reserved);
    if p.refusal is not null then
        return p;
    end if;
    {{ write_legacy("debtor") }}
    {{ write_legacy("creditor") }}
    if p.mismatch then
        p := {{ schema }}.settle_{{ mapping }}(m, p_policy, p);
    end if;
    return p;
end
$$;

-- Nearly every posting of one side: dual-write on and the account mirrored and equal, or dual-write off and the
-- account absent or behind. Returns null for whatever does not fit, and has then written nothing: the long way
-- decides, with the same results, and meets the same failures. The caller has locked the legacy row.
create or replace function {{ schema }}.plain_{{ mapping }}(
    m {{ schema }}.movement, p_legacy numeric
) returns {{ schema }}.posting
language plpgsql
security definer
set search_path = pg_catalog, {{ schema }}, pg_temp
as $$
#variable_conflict use_variable
declare
    v_after numeric := case when m.debtor is null then p_legacy + m.amount else p_legacy - m.amount end;
    v_debtor numeric := case when m.creditor is null then v_after end;
    v_creditor numeric := case when m.debtor is null then v_after end;
    v_state account_state;
    v_transaction bigint;
    v_account bigint;
begin
    {% for c in columns %}
    {{ "if" if loop.first else "elsif" }} m.bucket = '{{ c.bucket }}' and m.currency = '{{ c.currency }}' then
        if (
            m.amount > 0 and m.amount = round(m.amount, {{ c.scale }}) and p_legacy = round(p_legacy, {{ c.scale }})
            {% if c.floor != "null::numeric" %}
            and (m.debtor is null or v_after >= {{ c.floor }})
            {% endif %}
            and v_after between {{ c.minimum }} and {{ c.maximum }}
        ) is not true then
            return null;
        end if;
        if m.dual is not true then
            -- Above READ COMMITTED an account may be there unseen: the long way probes for it.
            select a.state into v_state
            from accounts as a
            where
                a.mapping = '{{ mapping }}' and a.key = coalesce(m.debtor, m.creditor)
                and a.bucket = '{{ c.bucket }}' and a.currency = '{{ c.currency }}'
            for no key update;
            if v_state in ('mirrored', 'frozen') or current_setting('transaction_isolation') <> 'read committed' then
                return null;
            end if;
            if m.idempotency_key is not null then
                insert into idempotency_keys (key, request, mode, debtor_legacy, creditor_legacy)
                values (m.idempotency_key, m.request, 'legacy', v_debtor, v_creditor)
                on conflict do nothing;
                if not found then
                    return null;
                end if;
            end if;
            return row(
                null, 'skipped', false, 'legacy', null, m.amount,
                m.debtor, null, v_debtor, null, null, m.creditor, null, v_creditor, null, null, false, 0
            )::{{ schema }}.posting;
        end if;
        begin
            -- The update is the lock of the account, and asks under it for all that has to hold.
            update accounts as a set balance = v_after
            from control as k
            where
                a.mapping = '{{ mapping }}' and a.key = coalesce(m.debtor, m.creditor)
                and a.bucket = '{{ c.bucket }}' and a.currency = '{{ c.currency }}'
                and a.state = 'mirrored' and a.balance = p_legacy
                and k.phase <> 'legacy' and (select n.last_value from line as n) = 1
            returning a.id into v_account;
            if not found then
                return null;
            end if;
            v_transaction := nextval('transaction_ids');
            if m.idempotency_key is not null then
                insert into idempotency_keys (
                    key, transaction_id, request, mode, debtor_legacy, debtor_ledger, creditor_legacy, creditor_ledger
                )
                values (
                    m.idempotency_key, v_transaction, m.request, 'dual_write',
                    v_debtor, v_debtor, v_creditor, v_creditor
                )
                on conflict do nothing;
                if not found then
                    raise exception using errcode = 'WM000'; -- takes the update back
                end if;
            end if;
            insert into transactions (
                id, debit_account, credit_account, kind, type, amount, debit_balance, credit_balance, currency,
                reference_type, reference_id, correlation_id, actor, reason
            )
            values (
                v_transaction,
                case when m.debtor is null then {{ c.external }} else v_account end,
                case when m.debtor is null then v_account else {{ c.external }} end,
                'posting', m.type, round(m.amount, {{ c.scale }}), v_debtor, v_creditor, '{{ c.currency }}',
                m.reference_type, m.reference_id, m.correlation_id, m.actor, m.reason
            );
        exception
            when serialization_failure or deadlock_detected or lock_not_available then
                raise;
            when others then
                return null;
        end;
        return row(
            null, 'ok', false, 'dual_write', v_transaction, m.amount,
            m.debtor, null, v_debtor, v_debtor, case when m.creditor is null then v_account end,
            m.creditor, null, v_creditor, v_creditor, case when m.debtor is null then v_account end,
            false, 0
        )::{{ schema }}.posting;
    {% endfor %}
    end if;
    return null;
end
$$;

-- What follows the legacy write: nothing when both sides hold the same, else the policy decides.
create or replace function {{ schema }}.settle_{{ mapping }}(
    m {{ schema }}.movement, p_policy text, inout p {{ schema }}.posting
)
language plpgsql
as $$
#variable_conflict use_variable
begin
    if p_policy = 'strict' and p.mode <> 'legacy' then
        raise exception 'legacy and ledger of {{ mapping }} % differ after the posting',
            concat_ws(', ', p.debtor, p.creditor)
            using errcode = 'WM020';
    end if;
    p.mismatch := p.mode <> 'legacy';
    perform {{ schema }}.diverged(m, p, '{{ mapping }}');
end
$$;

-- The adapter's one round trip. p_request: {"fingerprint", "policy", "movements": [movement, …]}.
-- A refusal comes back as a row and has written nothing, so the caller's transaction stays usable.
create or replace function {{ schema }}.post_{{ mapping }}(p_request jsonb) returns setof {{ schema }}.posting
language plpgsql
as $$
#variable_conflict use_variable
declare
    v_movements {{ schema }}.movement[];
    v_results {{ schema }}.posting[] := '{}';
    v_keys {{ key_type }}[] := '{}';
    v_now numeric;
    v_change numeric;
    m {{ schema }}.movement;
    p {{ schema }}.posting;
begin
    if p_request ->> 'fingerprint' is distinct from '{{ fingerprint }}' then
        raise exception 'mapping {{ mapping }} was installed from another configuration'
            using errcode = 'WM010', hint = 'Run: walletmigrate install';
    end if;
    if p_request #> '{movements,1}' is null then
        m := jsonb_populate_record(null::{{ schema }}.movement, p_request #> '{movements,0}');
        if m.operation in ('credit', 'debit') and coalesce(m.description, m.address) is null then
            {% for c in columns %}
            {{ "if" if loop.first else "elsif" }} m.bucket = '{{ c.bucket }}' and m.currency = '{{ c.currency }}' then
                select {{ c.value }} into v_now from {{ relation }} as l
                where l.{{ key }} = coalesce(m.debtor, m.creditor)::{{ key_type }}
                for no key update;
                p := {{ schema }}.plain_{{ mapping }}(m, v_now);
                if p.mode is not null then
                    v_change := case when m.debtor is null then m.amount else -m.amount end;
                    update {{ relation }} as l set {{ c.column }} = {{ c.changed | replace("<change>", "v_change") }}
                    where l.{{ key }} = coalesce(m.debtor, m.creditor)::{{ key_type }}
                    returning {{ c.value }} into v_now;
                    if not found then
                        raise exception 'the update of {{ mapping }} % wrote no row', coalesce(m.debtor, m.creditor)
                            using errcode = 'WM021', hint = 'A trigger or a policy of the application suppressed it.';
                    end if;
                    if v_now is distinct from coalesce(p.debtor_legacy, p.creditor_legacy) then
                        p.debtor_legacy := case when m.creditor is null then v_now end;
                        p.creditor_legacy := case when m.debtor is null then v_now end;
                        p := {{ schema }}.settle_{{ mapping }}(m, p_request ->> 'policy', p);
                    end if;
                    return next p;
                    return;
                end if;
            {% endfor %}
            end if;
        end if;
        if m.operation = 'reverse' then
            m := {{ schema }}.resolve('{{ mapping }}', m);
        end if;
        if m.refusal is null then
            p := {{ schema }}.move_{{ mapping }}(m, p_request ->> 'policy', false);
        else
            p.refusal := m.refusal;
        end if;
        p.ordinal := 0;
        return next p;
        return;
    end if;

    for i in 0 .. jsonb_array_length(p_request -> 'movements') - 1 loop
        m := jsonb_populate_record(null::{{ schema }}.movement, p_request -> 'movements' -> i);
        if m.operation = 'reverse' then
            m := {{ schema }}.resolve('{{ mapping }}', m);
        end if;
        v_movements := v_movements || m;
        v_keys := v_keys || array[m.debtor, m.creditor]::{{ key_type }}[];
    end loop;
    begin
        -- All legacy rows by key, all accounts by id, all idempotency keys sorted; then the movements as they come.
        perform {{ schema }}.lock_{{ mapping }}(v_keys);
        perform {{ schema }}.enter_batch('{{ mapping }}', v_keys::text[], v_movements);
        foreach m in array v_movements loop
            if m.refusal is null then
                p := {{ schema }}.move_{{ mapping }}(m, p_request ->> 'policy', true);
            else
                p.refusal := m.refusal;
            end if;
            p.ordinal := cardinality(v_results);
            if p.refusal is not null then
                raise exception using errcode = 'WM050';
            end if;
            v_results := v_results || p;
        end loop;
    exception
        when sqlstate 'WM050' then
            v_results := array[p];
    end;
    return query select * from unnest(v_results);
end
$$;
