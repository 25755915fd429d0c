"""What must be true of a ledger at every commit, asked of the database itself."""

from __future__ import annotations

from sqlalchemy import Connection, Engine, text

from walletmigrate.config import Column, Mapping, Settings
from walletmigrate.functions import relation, value_of
from walletmigrate.schema import quoted

_GENERAL = {
    "all balances of {0} add up to {1}": """
        select currency, sum(balance)
        from (
            select currency, balance from {schema}.accounts
            union all
            select currency, balance from {schema}.system_balances
        ) as everything
        group by currency having sum(balance) <> 0
    """,
    "account {0} holds {1}, its journal says {2}": """
        select a.id, a.balance, coalesce(sum(e.amount), 0)
        from {schema}.accounts as a left join {schema}.wallet_entries as e on e.account_id = a.id
        group by a.id having a.balance <> coalesce(sum(e.amount), 0)
    """,
    "account {0}: transaction {1} starts at {2}, the one before ended at {3}": """
        select * from (
            select
                account_id, transaction_id, balance_before,
                lag(balance_after, 1, 0::numeric) over (partition by account_id order by transaction_id) as ended
            from {schema}.wallet_entries where account_id > 0
        ) as chain
        where balance_before is distinct from ended
    """,
    "account {0}: transaction {1} was posted before its predecessor": """
        select account_id, transaction_id from (
            select
                account_id, transaction_id, posted_at,
                lag(posted_at) over (partition by account_id order by transaction_id) as earlier
            from {schema}.wallet_entries where account_id > 0
        ) as chain
        where posted_at < earlier
    """,
    "transaction {0} names an account that does not exist": """
        select t.id from {schema}.transactions as t
        where exists (
            select from unnest(array[t.debit_account, t.credit_account]) as side
            where not exists (select from {schema}.accounts as a where a.id = side)
            and not exists (select from {schema}.system_accounts as s where s.id = side)
        )
    """,
    "{0} transactions belong to the idempotency key {1}": """
        select count(*), reference_id from {schema}.transactions
        where reference_type = 'idempotency key' and kind in ('posting', 'correction')
        group by reference_id having count(*) > 1
    """,
}


def violations(connection: Connection, settings: Settings) -> list[str]:
    """Every broken invariant as a sentence; an empty list means that the ledger is sound."""
    schema = quoted(settings.ledger_schema)
    found = []
    for sentence, query in _GENERAL.items():
        rows = connection.execute(text(query.replace("{schema}", schema)))
        found += [sentence.format(*row) for row in rows]
    for mapping in settings.mappings:
        for column in mapping.columns:
            found += _untrue_mirrors(connection, schema, mapping, column)
    return found


def assert_sound(engine: Engine, settings: Settings) -> None:
    """Fail with all broken invariants."""
    with engine.connect() as connection:
        assert violations(connection, settings) == []


def _untrue_mirrors(connection: Connection, schema: str, mapping: Mapping, column: Column) -> list[str]:
    value = value_of(column, is_float=False)
    rows = connection.execute(
        text(
            f"select a.key, a.balance, {value} as legacy from {schema}.accounts as a "
            f"left join {relation(mapping)} as l on l.{quoted(mapping.key)}::text = a.key "
            "where a.mapping = :mapping and a.bucket = :bucket and a.currency = :currency "
            f"and a.state = 'mirrored' and a.balance is distinct from {value}"
        ),
        {"mapping": mapping.name, "bucket": column.bucket, "currency": column.currency},
    )
    return [f"mirrored account {key!r} holds {ledger}, its legacy row {legacy}" for key, ledger, legacy in rows]
