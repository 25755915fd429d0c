-- The catalogue of writes past the adapter, the part that is the same for every mapping. Called by the fences, which
-- pin the search_path and run as the owner.

-- A statement without its values: literals, numbers, parameters and comments as ?, a list of them as one. Whatever is
-- left open at the end, or quoted by dollars, is cut off: no value is to come through.
create or replace function {{ schema }}.fingerprint(p_query text) returns text
language plpgsql
immutable
set standard_conforming_strings = on -- an application may have it off, and a backslash would not be one
as $$
declare
    -- No non-greedy quantifier: in an expression with branches PostgreSQL takes the longest match all the same.
    v_values constant text := concat_ws(
        '|',
        '/\*(?:[^*]|\*+[^*/])*(?:\*+/|$)',
        '/\*(?=(?:[^*]|\*+[^*/])*/\*).*', -- a comment in a comment
        '--[^\n]*',
        '[eE]''(?:[^''\\]|\\.|'''')*(?:''|$)',
        '''(?:[^'']|'''')*(?:''|$)',
        '\$[0-9]+',
        '\$(?:[[:alpha:]_][[:alnum:]_]*)?\$.*',
        '(?<![[:alnum:]_."])-?(?:0[xob][0-9a-f_]+|(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9][0-9_]*)(?:e[+-]?[0-9]+)?)'
        '(?![[:alnum:]_"])'
    );
    v_words text := regexp_replace(left(p_query, 4000), v_values, '?', 'gi');
begin
    v_words := regexp_replace(v_words, '(?:\?[\s,]*)+\?', '?', 'g');
    return left(btrim(regexp_replace(v_words, '\s+', ' ', 'g')), 300);
end
$$;

-- The fingerprint of the statement at work. It is kept with the statement's hash: the fences do not ask again for the
-- same one, as prepared ones are.
create or replace function {{ schema }}.stated() returns text
language plpgsql
as $$
declare
    -- A worker of logical replication has no statement.
    v_query text := coalesce(current_query(), '');
begin
    perform set_config('walletmigrate.stated', hashtextextended(v_query, 0)::text, false);
    return set_config('walletmigrate.fingerprint', fingerprint(v_query), false);
end
$$;

-- A write past the adapter, mirrored: the ledger follows the row. Where it cannot, the writer, who knows of no ledger,
-- loses nothing: the account turns stale, and the failure is recorded. What can be retried reaches him. Returns the
-- treatment.
create or replace function {{ schema }}.follow(
    p_account bigint, p_balance numeric, p_now numeric, p_currency text, p_bypass bigint
) returns text
language plpgsql
as $$
declare
    v_state text;
    v_message text;
begin
    update accounts set balance = p_now where id = p_account;
    insert into transactions (
        id, debit_account, credit_account, kind, type, amount, debit_balance, credit_balance, currency, actor, reason
    )
    values (
        nextval('transaction_ids'),
        case when p_now > p_balance then p_bypass else p_account end,
        case when p_now > p_balance then p_account else p_bypass end,
        'resync', 'bypass', abs(p_now - p_balance),
        case when p_now < p_balance then p_now end, case when p_now > p_balance then p_now end,
        p_currency, session_user, 'written past the adapter by ' || current_setting('application_name')
    );
    return 'mirrored';
exception
    when others then
        get stacked diagnostics v_state = returned_sqlstate, v_message = message_text;
        if v_state like '40%' or v_state = '55P03' then
            raise;
        end if;
        perform turn_stale(p_account, 'written past the adapter, and the ledger leg failed');
        insert into failures (mapping, key, bucket, currency, operation, sqlstate, message)
        select a.mapping, a.key, a.bucket, a.currency, 'bypass', v_state, v_message
        from accounts as a
        where a.id = p_account;
        return 'turned_stale';
end
$$;
