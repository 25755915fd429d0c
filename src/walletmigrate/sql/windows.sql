-- sqlfluff:exclude_rules:layout.indent
-- What a snapshot says of the journal, for those who make it and those who read it.

{% set kinds = ["opening", "resync", "posting", "correction", "reversal"] %}
{# Which transactions a snapshot p has. #}
{% macro within(t, p) %}
({{ t }}.id <= {{ p }}.restored_id or {{ t }}.id <= {{ p }}.last_id and (
    {{ t }}.xid < {{ p }}.horizon or {{ t }}.xid < {{ p }}.next_xid and {{ t }}.xid <> all({{ p }}.in_flight)
))
{%- endmacro %}
{# 64 bits of a row of the journal, by SHA-256 over all of its columns as text: the same in every version of
   PostgreSQL, on every platform, with every setting and after a restore, which nobody says of PostgreSQL's own hash
   functions. Never change it: what was kept would not fit any more. A column that a later release adds stays out. #}
{% macro hashed(t) %}
('x' || left(encode(sha256(convert_to(array[
    {{ t }}.id::text, {{ t }}.debit_account::text, {{ t }}.credit_account::text,
    extract(epoch from {{ t }}.posted_at)::text, {{ t }}.xid::text, {{ t }}.group_id::text, {{ t }}.reverses::text,
    {{ t }}.job_id::text, {{ t }}.kind::text, {{ t }}.amount::text, {{ t }}.debit_balance::text,
    {{ t }}.credit_balance::text, {{ t }}.currency, {{ t }}.type, {{ t }}.reference_type, {{ t }}.reference_id,
    {{ t }}.correlation_id, {{ t }}.actor, {{ t }}.reason
]::text, 'UTF8')), 'hex'), 16))::bit(64)::bigint
{%- endmacro %}
