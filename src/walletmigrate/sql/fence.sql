-- sqlfluff:exclude_rules:references.keywords,references.from,structure.column_order,layout.long_lines,layout.indent
-- (long lines are not checked here: sqlfluff adds up what the loops render, and no line has more than 120 characters;
-- indentation is not: it looks at the rendered macros)
-- The fence of one mapping. It needs no marker to be right: it asks whether the ledger equals the legacy row as it
-- is now, whoever wrote. Where plain_ labelled the update, it writes the ledger itself, from the row's own old and
-- new balance: a label that was forged is a posting by whoever may post, and no wrong balance; of anybody else it
-- counts for nothing.

{# Phase legacy has no use for a mode: there every one is stale. #}
{% set in_use = "pg_sequence_last_value('" ~ schema ~ ".ceiling'::regclass) = 2" %}
{# The line runs (1, not 2) and the phase lets dual-write be asked for (2, not 1). Mirror posts, so
   it asks as a posting does, and is waited for. #}
{% set open = "pg_sequence_last_value('" ~ schema ~ ".line'::regclass) < pg_sequence_last_value('" ~ schema
    ~ ".ceiling'::regclass)" %}
{# Not in the short way: what fails there is tried the long way, which decides. #}
{% macro counted() -%}
    where coalesce(v_setting, '') = '' or v_setting like 'adapter:%'
{%- endmacro %}
{% macro reject(c) %}
perform nextval('rejected_{{ mapping }}') {{ counted() }};
                raise exception '{{ relation }} %: column {{ c.column }} is written through the adapter only', v_key
                    using
                        errcode = 'WM031', detail = stated(),
                        hint = 'Move this code path to the adapter, or: walletmigrate capture mode stale';
{%- endmacro %}
{# The account of a key and a column. One comparison with three values costs half of what three of one cost, before any
   row is read; by the key alone the index of accounts gives no more than the few that have it. #}
{% macro owned(a, key, c) -%}
{{ a }}.key = {{ key }}::text collate "C"
                    and array[{{ a }}.mapping, {{ a }}.bucket, {{ a }}.currency]
                    = array['{{ mapping }}', '{{ c.bucket }}', '{{ c.currency }}']
{%- endmacro %}
{# What the label says and the row then did are one movement, and one that the ledger can take. A credit that stays
   below the floor is left to the long way. #}
{% macro fits(c) %}
v_after - {{ c.before }} = v_label.change
                {% if c.finer %}
                and v_after = round(v_after, {{ c.scale }}) -- its type keeps no such limit
                {% endif %}
                {% if c.floor != "null::numeric" %}
                and v_after >= {{ c.floor }}
                {% endif %}
                {% if c.wide %}
                and v_after between {{ c.minimum }} and {{ c.maximum }} -- nor this one
                {% endif %}
                {% for other in columns if other.bucket != c.bucket or other.currency != c.currency %}
                and old.{{ other.column }} is not distinct from new.{{ other.column }}
                {% endfor %}
{%- endmacro %}
{# The row of a labelled posting, whose account pays or is paid; the amount with exactly the column's decimals, as the
   adapter sends it. #}
{% macro booked(c, pays) -%}
(
                            id, debit_account, credit_account, kind, type, amount,
                            {{ "debit_balance" if pays else "credit_balance" }}, currency,
                            reference_type, reference_id, correlation_id, actor, reason
                        )
                        values (
                            v_transaction, {{ "v_id" if pays else c.external }}, {{ c.external if pays else "v_id" }},
                            'posting', v_label.type, {{ "-" if pays }}v_label.change, v_after, '{{ c.currency }}',
                            v_label.reference_type, v_label.reference_id, v_label.correlation_id, v_label.actor,
                            v_label.reason
                        )
{%- endmacro %}
{% macro row(version) -%}
row({% for c in columns %}{{ version }}.{{ c.column }}{{ ", " if not loop.last }}{% endfor %})
{%- endmacro %}
{# A write past the adapter goes on record. A session keeps the fingerprint of the last statement that it looked at. #}
{% macro catalogue(c, key, operation, treatment, before, after) -%}
insert into bypasses (
                    mapping, relation, column_name, key, bucket, currency, operation, treatment, old_value, new_value,
                    fingerprint{{ ", query" if raw_queries == "true" }}
                )
                values (
                    '{{ mapping }}', tg_relid, '{{ c.name }}', {{ key }}, '{{ c.bucket }}', '{{ c.currency }}',
                    {{ operation }}, {{ treatment }}, {{ before }}, {{ after }},
                    case
                        when
                            hashtextextended(current_query(), 0)::text = current_setting('walletmigrate.stated', true)
                            then current_setting('walletmigrate.fingerprint', true)
                        else stated()
                    end{{ ", left(current_query(), 10000)" if raw_queries == "true" }}
                );
{%- endmacro %}
-- Writes that were refused, though their transactions are gone: a sequence has no rollback.
create sequence if not exists {{ schema }}.rejected_{{ mapping }};

create or replace function {{ schema }}.fence_{{ mapping }}() returns trigger
language plpgsql
security definer
set search_path = pg_catalog, {{ schema }}, pg_temp
as $$
#variable_conflict use_variable -- A column of the legacy table may have any name.
declare
    v_key {{ key_type }};
    v_next {{ key_type }};
    v_found boolean;
    v_now numeric[];
    v_account record;
    v_known boolean;
    v_looked boolean;
    v_ours boolean;
    v_settled boolean;
    v_written boolean;
    v_treatment text;
    v_setting text := current_setting('walletmigrate.posting', true);
    v_label label;
    v_before numeric;
    v_after numeric;
    v_id bigint;
    v_transaction bigint;
    v_state account_state;
begin
    <<short>>
    begin
        exit short when v_setting is null; -- as in a session that never posted
        -- The setting is anybody's. It is heard from a session whose user may post; the user of this function is the
        -- owner. Where a role was renamed a label fails here, and plain_ goes the long way, which fails no write; nor does
        -- a write without a label, for which the role is not looked at (of `null and …` it would be).
        if (v_setting like '("%') is true and pg_has_role(session_user, '{{ app }}', 'member') then
            v_label := v_setting::label;
        elsif v_setting <> '' then
            if
                pg_has_role(session_user, to_regrole('{{ app }}')::oid, 'member') is not true
                and pg_has_role(session_user, to_regrole('{{ operator }}')::oid, 'member') is not true
            then
                v_setting := null;
                exit short;
            end if;
            exit short when v_setting not like '("%';
            v_label := v_setting::label;
        else
            v_setting := null; -- '', as a transaction leaves it that had a label
            exit short;
        end if;
        {% for c in columns %}
        {{ "if" if loop.first else "elsif" }}
            v_label.place = '{{ mapping }}/{{ c.bucket }}/{{ c.currency }}/' || new.{{ key }}::text collate "C"
            and old.{{ key }} = new.{{ key }}
        then
            v_after := {{ c.after }};
            -- One condition for all that is mostly so: the first look at an expression costs more than its answer.
            if
                {{ fits(c) }}
                and v_label.dual and {{ open }}
            then
                -- The update is the lock of the account, and asks under it for all that has to hold.
                update accounts as a set balance = v_after
                where
                    {{ owned("a", "new." ~ key, c) }}
                    and a.state = 'mirrored' and a.balance = {{ c.before }}
                returning a.id, nextval('transaction_ids') into v_id, v_transaction;
                if v_id is not null and v_label.idempotency_key is not null then
                    -- One statement, the key first. Not `on conflict`, which looks twice: a key that was used goes the
                    -- long way like all else.
                    {% for pays in (true, false) %}
                    {{ "if v_label.change < 0 then" if pays else "else" }}
                        with written as (insert into transactions {{ booked(c, pays) }})
                        insert into idempotency_keys (key, transaction_id, created_at, request)
                        values (v_label.idempotency_key, v_transaction, null, v_label.request);
                    {% endfor %}
                    end if;
                else
                    exit short when v_id is null;
                    {% for pays in (true, false) %}
                    {{ "if v_label.change < 0 then" if pays else "else" }}
                        insert into transactions {{ booked(c, pays) }};
                    {% endfor %}
                    end if;
                end if;
                v_setting := set_config(
                    'walletmigrate.posting', concat_ws(' ', 'done', v_transaction, v_after), true
                );
                return null;
            end if;
            exit short when v_label.change = 0 or ({{ fits(c) }}) is not true;
            select a.state into v_state from accounts as a
            where
                {{ owned("a", "new." ~ key, c) }}
            for no key update;
            -- Above READ COMMITTED an account may be there unseen: the long way probes for it.
            exit short when v_state <> 'stale' or current_setting('transaction_isolation') <> 'read committed';
            if v_label.idempotency_key is not null then
                insert into idempotency_keys (key, request, mode, balances)
                values (
                    v_label.idempotency_key, v_label.request, 'legacy',
                    case when v_label.change < 0 then array[v_after, null, null, null]
                    else array[null, null, v_after, null] end
                );
            end if;
            v_setting := set_config('walletmigrate.posting', 'done ' || v_after, true);
            return null;
        {% endfor %}
        else
            v_label := null; -- of another row, whose posting is not touched by this write
        end if;
    end short;
    -- Of an insert OLD is null, of a delete NEW: no key of theirs equals or differs.
    v_key := coalesce(new.{{ key }}, old.{{ key }});
    if old.{{ key }} = new.{{ key }} then
        -- Updates of other columns come here too. WHEN would keep them out, but is parsed at every update of the table,
        -- which costs as much as this, and every posting.
        if {{ row("old") }} is not distinct from {{ row("new") }} then
            return null;
        end if;
        v_settled := v_setting is null and current_setting('transaction_isolation') = 'read committed';
    elsif old.{{ key }} <> new.{{ key }} then
        v_next := greatest(old.{{ key }}, new.{{ key }});
        v_key := least(old.{{ key }}, new.{{ key }});
    end if;
    if v_label.place is not null then
        -- It does not fit. Not raised: a trigger of the application that catches errors would lose its write. So it is
        -- met as any other write, and plain_, which finds no result, takes all back and goes the long way.
        v_setting := set_config('walletmigrate.posting', 'spoilt', true);
    end if;
    {% if capture_mode == "reject" %}
    -- What plain_ has not yet taken: a trigger of the application writes behind the fence. Refused here, its write would
    -- be lost where it catches errors; so plain_ takes all back, and the long way lets it through, or refuses it.
    if v_setting like 'done %' then
        v_setting := set_config('walletmigrate.posting', 'spoilt', true);
    end if;
    {% endif %}
    loop
        v_looked := false;
        if v_setting is not null then
            v_ours := v_setting = 'spoilt'
                or v_setting like 'adapter:%' and v_setting = 'adapter:{{ mapping }}:' || v_key;
        end if;
        {% for c in columns %}
        v_written := true;
        {% if columns | length > 1 %}
        v_written := old.{{ key }} is distinct from new.{{ key }}
            or old.{{ c.column }} is distinct from new.{{ c.column }};
        {% endif %}
        if v_settled and v_written then
            -- Without a lock of its own: what opens an account, or brings it up, has the lock of the legacy row first, as
            -- this update has. So what is absent or stale stays it.
            select x.state into v_state
            from accounts as x
            where
                {{ owned("x", "new." ~ key, c) }};
            if v_state is null or v_state = 'stale' then
                {{ catalogue(c, "new." ~ key, "'update'", "coalesce(v_state::text, 'absent')", c.before, c.after) }}
                v_written := false;
            end if;
        end if;
        if v_written then
            v_after := case when new.{{ key }} = v_key then {{ c.after }} end;
            -- By key, not by a join: without statistics a plan may walk all accounts of the mapping.
            select x.id, x.state, x.balance into v_account
            from accounts as x
            where
                {{ owned("x", "v_key", c) }}
            for no key update;
            v_known := found;
            -- Another event may have come between: what was mirrored is held against the row as it is now. (Not where
            -- it equals what this event wrote: had the row changed again since, that event would come, or have come.)
            if
                not v_looked and (
                    v_account.state = 'mirrored' and v_account.balance is distinct from v_after
                    or v_account.state <> 'frozen' and v_after is null
                    or v_account.state = 'closed'
                )
            then
                select array[{{ columns | map(attribute="value") | join(", ") }}] into v_now
                from {{ relation }} as l where l.{{ key }} = v_key;
                v_found := found;
                v_looked := true;
            end if;
            if not v_known then
                if current_setting('transaction_isolation') <> 'read committed' then
                    perform probe_account('{{ mapping }}', v_key::text, '{{ c.bucket }}', '{{ c.currency }}');
                end if;
                v_treatment := 'absent';
            elsif v_account.state = 'mirrored' and v_account.balance in (v_after, v_now[{{ loop.index }}]) then
                v_written := false;
            elsif v_account.state = 'frozen' then
                perform nextval('rejected_{{ mapping }}') {{ counted() }};
                raise exception '{{ relation }} %: column {{ c.column }} is frozen, the ledger alone is true', v_key
                    using errcode = 'WM030', hint = 'Write through the adapter, or unfreeze.';
            elsif v_looked and not v_found then
                if (select c.relrowsecurity from pg_class as c where c.oid = '{{ relation }}'::regclass)
                    and not exists (
                        select from pg_policy as p
                        where p.polrelid = '{{ relation }}'::regclass and p.polname = 'walletmigrate_owner'
                    )
                then
                    raise exception 'row-level security hides rows of {{ relation }} from the role that owns the ledger'
                        using errcode = 'WM022', hint = 'Run: walletmigrate install';
                end if;
                {% if capture_mode == "reject" %}
                -- A row without money may go: the adapter has no other way to close an account.
                if v_account.state = 'mirrored' and v_account.balance <> 0 and {{ in_use }} then
                    {{ reject(c) }}
                end if;
                {% elif capture_mode == "mirror" %}
                if v_account.state = 'mirrored' and v_account.balance <> 0 and {{ open }} then
                    perform follow(v_account.id, v_account.balance, 0, '{{ c.currency }}', {{ c.bypass }});
                end if;
                {% endif %}
                update accounts as x set state = 'closed', state_at = clock_timestamp(), state_reason = 'row gone'
                where x.id = v_account.id and x.state <> 'closed';
                v_treatment := 'closed';
            elsif v_ours then
                -- The row took another balance than the adapter posted: the comparison behind it will say so too.
                perform turn_stale(v_account.id, 'legacy took another balance than was posted');
            {% if capture_mode == "reject" %}
            elsif v_account.state = 'mirrored' and {{ in_use }} then
                {{ reject(c) }}
            {% elif capture_mode == "mirror" %}
            elsif
                v_account.state = 'mirrored' and v_now[{{ loop.index }}] between {{ c.minimum }} and {{ c.maximum }}
                and v_now[{{ loop.index }}] = round(v_now[{{ loop.index }}], {{ c.scale }})
                and {{ open }}
            then
                v_treatment := follow(
                    v_account.id, v_account.balance, v_now[{{ loop.index }}], '{{ c.currency }}', {{ c.bypass }}
                );
            {% endif %}
            elsif v_account.state in ('mirrored', 'closed') then
                perform turn_stale(v_account.id, 'written past the adapter (' || lower(tg_op) || ')');
                v_treatment := 'turned_stale';
            else
                v_treatment := 'stale';
            end if;
            if v_written and v_ours is not true then
                v_before := case when old.{{ key }} = v_key then {{ c.before }} end;
                {{ catalogue(c, "v_key", "lower(tg_op)", "v_treatment", "v_before", "v_after") }}
            end if;
        end if;
        {% endfor %}
        exit when v_next is null;
        v_key := v_next;
        v_next := null;
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
        perform nextval('rejected_{{ mapping }}');
        raise exception '{{ relation }} has frozen accounts, the ledger alone is true'
            using errcode = 'WM030', hint = 'Unfreeze first.';
    end if;
    {% if capture_mode == "reject" %}
    if {{ in_use }} and exists (
        select from accounts as a
        where
            a.mapping = '{{ mapping }}' and a.state = 'mirrored' and a.balance <> 0
            and not exists (select from {{ relation }} as l where l.{{ key }}::text collate "C" = a.key)
    ) then
        perform nextval('rejected_{{ mapping }}');
        raise exception '{{ relation }} has balances that are written through the adapter only'
            using
                errcode = 'WM031', detail = stated(),
                hint = 'Take the balances to zero first, or: walletmigrate capture mode stale';
    end if;
    {% endif %}
    -- A truncated partition leaves the other partitions' rows alive: only keys without a row close.
    update accounts as a set state = 'closed', state_at = clock_timestamp(), state_reason = 'truncate'
    where
        a.mapping = '{{ mapping }}' and a.state in ('mirrored', 'stale')
        and not exists (select from {{ relation }} as l where l.{{ key }}::text collate "C" = a.key);
    insert into bypasses (mapping, relation, operation, treatment, fingerprint, query)
    values (
        '{{ mapping }}', tg_relid, 'truncate', 'closed', stated(),
        {{ "left(current_query(), 10000)" if raw_queries == "true" else "null" }}
    );
    return null;
end
$$;
