-- sqlfluff:exclude_rules:references.keywords,references.from,structure.column_order,layout.indent,layout.long_lines
-- (indentation and long lines are not checked here: sqlfluff looks at the rendered macros, not at their source)
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
            -- Who leaves the phase waits for what is opened in it, as nobody else sees that account yet: an unfreeze would
            -- pass it over. With a snapshot of before the step this fails, and is tried again.
            perform 1 from control where phase in ('frozen', 'retired') for share;
            s.mode := case when found then 'ledger' else s.mode end;
        end if;
    end if;
    return s;
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
        -- Keeps the catalogue clean, no more: the fence compares all the same.
        perform set_config('walletmigrate.posting', 'adapter:{{ mapping }}:' || p.{{ side }}, true);
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
        perform set_config('walletmigrate.posting', '', true);
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
    -- A refusal, like a replay, changes neither side, and so writes nothing here.
    p := {{ schema }}.leg_{{ mapping }}(m, p_policy, p_reserved);
    {{ write_legacy("debtor") }}
    {{ write_legacy("creditor") }}
    if p.mismatch then
        p := {{ schema }}.settle_{{ mapping }}(m, p_policy, p);
    end if;
    return p;
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

-- The adapter's one round trip for a credit or a debit, and nearly always three statements: the legacy row is updated
-- under a label, and the fence, which fires on it, writes the ledger from the row itself (see fence.sql). What does
-- not fit takes itself back and goes the long way, which decides, with the same results, and meets the same failures.
-- p_label: the row of type label that the fence reads, as text. Returns "done [<transaction> ]<balance>", without a transaction where legacy
-- alone was written, or the long way's row as JSON.
create or replace function {{ schema }}.plain_{{ mapping }}(
    p_fingerprint text, p_policy text, p_key {{ key_type }}, p_bucket text, p_currency text, p_change numeric,
    p_label text
) returns text
language plpgsql
as $$
#variable_conflict use_variable
declare
    v_done text;
begin
    if p_fingerprint is distinct from '{{ fingerprint }}' then
        raise exception 'mapping {{ mapping }} was installed from another configuration'
            using errcode = 'WM010', hint = 'Run: walletmigrate install';
    end if;
    begin
        v_done := set_config('walletmigrate.posting', p_label, true);
        {# Of a single column it need not be asked: the fence holds the label against it. #}
        {% for c in columns %}
        {% if columns | length > 1 %}
        {{ "if" if loop.first else "elsif" }} p_bucket = '{{ c.bucket }}' and p_currency = '{{ c.currency }}' then
        {% endif %}
            update {{ relation }} as l set {{ c.column }} = {{ c.changed | replace("<change>", "p_change") }}
            where l.{{ key }} = p_key;
        {% endfor %}
        {{ "end if;" if columns | length > 1 }}
        -- What the fence has left there; looked at and taken away in one go.
        v_done := current_setting('walletmigrate.posting') || set_config('walletmigrate.posting', '', true);
        if v_done like 'done %' then
            return v_done;
        end if;
        -- The fence had nothing to fire on, or a trigger of the application took the label away: posted itself.
        raise exception using errcode = 'WM000';
    exception
        when serialization_failure or deadlock_detected or lock_not_available then
            raise;
        when others then
            null; -- all taken back, the label too
    end;
    return to_jsonb({{ schema }}.move_{{ mapping }}(
        {{ schema }}.labelled(p_label::{{ schema }}.label, p_key::text, p_bucket, p_currency), p_policy, false
    ))::text;
end
$$;

-- The adapter's one round trip for everything else. p_request: {"fingerprint", "policy", "movements": [movement, …]}.
-- A refusal comes back as a row and has written nothing, so the caller's transaction stays usable.
create or replace function {{ schema }}.post_{{ mapping }}(p_request jsonb) returns setof {{ schema }}.posting
language plpgsql
as $$
#variable_conflict use_variable
declare
    v_movements {{ schema }}.movement[];
    v_results {{ schema }}.posting[] := '{}';
    v_keys {{ key_type }}[] := '{}';
    m {{ schema }}.movement;
    p {{ schema }}.posting;
    v_group bigint;
begin
    if p_request ->> 'fingerprint' is distinct from '{{ fingerprint }}' then
        raise exception 'mapping {{ mapping }} was installed from another configuration'
            using errcode = 'WM010', hint = 'Run: walletmigrate install';
    end if;
    if p_request #> '{movements,1}' is null then
        m := jsonb_populate_record(null::{{ schema }}.movement, p_request #> '{movements,0}');
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
                m.group_id := v_group;
                p := {{ schema }}.move_{{ mapping }}(m, p_request ->> 'policy', true);
                v_group := coalesce(v_group, case when p.replayed is not true then p.transaction_id end);
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
