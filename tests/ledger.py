"""A legacy table with an installed ledger, for tests of everything above the SQL functions."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal
from typing import Any

from pydantic import SecretStr
from sqlalchemy import Connection, Engine, text
from sqlalchemy.pool import NullPool

from copies import copied
from walletmigrate import connect
from walletmigrate.audit import Act
from walletmigrate.config import Column, Mapping, Settings
from walletmigrate.functions import fingerprint, relation
from walletmigrate.install import install
from walletmigrate.schema import quoted

ACT = Act("tests", "a test of the library")

PATIENCE_SECONDS = 30.0
"""How long `until_blocked` waits for a session to wait."""

_KEYS = {
    "bigint": "g",
    "text": "'user-' || lpad(g::text, 7, '0')",
    "uuid": "('00000000-0000-4000-8000-' || lpad(g::text, 12, '0'))::uuid",
}


def install_users(
    url: str,
    *,
    rows: int = 10,
    key_type: str = "bigint",
    coins: str = "100",
    coins_type: str = "numeric(20, 2)",
    unit: str = "major",
    scale: int = 2,
    floor: Decimal | None = None,
    with_promo: bool = False,
    policy: str = "shadow",
    phase: str = "legacy",
) -> tuple[Engine, Settings]:
    """Make ``users(id, tenant, role, total_coins, promo)`` with rows 1 … ``rows``, and install the ledger.

    ``coins`` is SQL for the column ``total_coins`` of row number g. ``promo`` holds 5 in every row, and is
    mapped as the bucket "promo" only ``with_promo``. Tenants are "acme" (odd rows) and "globex"; the role of
    every fifth row is "vip", of others "member". The engine keeps no connection, so it need not be disposed.
    """
    engine = connect.engine(url, application_name="walletmigrate-test", poolclass=NullPool)
    settings = users_settings(url, unit=unit, scale=scale, floor=floor, with_promo=with_promo, policy=policy)
    table = (rows, key_type, coins, coins_type)
    what = f"install_users {table} {(unit, scale, floor, with_promo, policy, phase)}"
    copied(url, what, lambda: _install_users(engine, settings, *table, phase))
    return engine, settings


def _install_users(
    engine: Engine, settings: Settings, rows: int, key_type: str, coins: str, coins_type: str, phase: str
) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql(
            f"create table public.users (id {key_type} primary key, tenant text not null, "
            f"role text not null, total_coins {coins_type}, promo numeric(20, 2) not null default 0)"
        )
    add_users(engine, 1, rows, key_type=key_type, coins=coins)
    install(engine, settings, ACT)
    if phase != "legacy":
        set_phase(engine, phase)


def add_users(engine: Engine, first: int, last: int, *, key_type: str = "bigint", coins: str = "100") -> None:
    """Insert the legacy rows number ``first`` to ``last``, past the adapter."""
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "insert into public.users (id, tenant, role, total_coins, promo) "
            f"select {_KEYS[key_type.partition(' ')[0]]}, case g % 2 when 1 then 'acme' else 'globex' end, "
            f"case g % 5 when 0 then 'vip' else 'member' end, {coins}, 5 "
            f"from generate_series({first}, {last}) as g",
            execution_options={"no_parameters": True},
        )


def users_settings(
    url: str,
    *,
    unit: str = "major",
    scale: int = 2,
    floor: Decimal | None = None,
    with_promo: bool = False,
    policy: str = "shadow",
) -> Settings:
    """The settings of the table ``public.users``, without touching a database."""
    cash = {"bucket": "cash", "column": "total_coins", "currency": "EUR"}
    columns = [Column.model_validate({**cash, "unit": unit, "scale": scale, "floor": floor})]
    if with_promo:
        columns.append(Column(bucket="promo", column="promo", currency="EUR", scale=2))
    mapping = Mapping.model_validate(
        {
            "name": "users",
            "table": "public.users",
            "key": "id",
            "policy": policy,
            "traits": {"tenant": "tenant", "role": "role"},
            "columns": columns,
        }
    )
    return Settings(database_url=SecretStr(url), mappings=(mapping,))


def set_phase(engine: Engine, phase: str) -> None:
    """Put the migration into a phase, without any gate."""
    execute(engine, "update wallet.control set phase = :phase, changed_at = clock_timestamp()", phase=phase)


def post(
    connection: Connection,
    settings: Settings,
    operation: str,
    key: object,
    amount: object,
    *,
    payee: object = None,
    dual: bool = True,
    bucket: str = "cash",
    idempotency_key: str | None = None,
    **fields: Any,
) -> dict[str, Any]:
    """Post one movement through SQL in the caller's transaction, and give its result row.

    ``key`` pays in a debit or a transfer (to ``payee``), and is paid otherwise.
    """
    mapping = settings.mapping(None)
    pays = operation in ("debit", "transfer")
    movement = {
        "operation": operation,
        "debtor": str(key) if pays else None,
        "creditor": str(payee) if payee is not None else None if pays else str(key),
        "bucket": bucket,
        "currency": mapping.column(bucket).currency,
        "amount": str(amount),
        "dual": dual,
        "type": "test",
        "idempotency_key": idempotency_key,
        "request": str(uuid.uuid5(uuid.NAMESPACE_OID, f"{operation} {key} {amount} {payee}")),
        **fields,
    }
    request = {"fingerprint": fingerprint(mapping), "policy": mapping.policy, "movements": [movement]}
    row = connection.execute(
        text(
            f"select to_jsonb(p) from {quoted(settings.ledger_schema)}.post_{mapping.name}"
            "(cast(:request as jsonb)) as p"
        ),
        {"request": json.dumps(request)},
    ).scalar_one()
    return dict(row)


def execute(engine: Engine, statement: str, **parameters: Any) -> None:
    """Run one statement in a transaction of its own."""
    with engine.begin() as connection:
        connection.execute(text(statement), parameters)


def rows(engine: Engine, query: str, **parameters: Any) -> list[tuple[Any, ...]]:
    """What a query yields, as tuples."""
    with engine.connect() as connection:
        return [tuple(row) for row in connection.execute(text(query), parameters)]


def scalar(engine: Engine, query: str, **parameters: Any) -> Any:
    """The first column of the first row that a query yields."""
    with engine.connect() as connection:
        return connection.execute(text(query), parameters).scalar()


@contextmanager
def fence_down(engine: Engine, settings: Settings) -> Iterator[Connection]:
    """A superuser's transaction past the fence; afterwards the fence is installed anew and recorded."""
    with unguarded(engine, relation(settings.mapping(None))) as connection:
        yield connection
    install(engine, settings, ACT)


@contextmanager
def unguarded(engine: Engine, table: str) -> Iterator[Connection]:
    """A superuser's transaction in which no trigger of the table fires; then they stand as before.

    Turning a trigger off and on leaves a trace in the catalog (``pg_trigger.xmin``), as in real life.
    """
    with engine.begin() as connection:
        connection.exec_driver_sql(f"alter table {table} disable trigger all")
        yield connection
        connection.exec_driver_sql(f"alter table {table} enable trigger all")
        names = connection.execute(
            text(
                "select quote_ident(tgname) from pg_trigger where tgrelid = cast(:t as regclass) and not tgisinternal"
            ),
            {"t": table},
        ).scalars()
        for name in list(names):
            connection.exec_driver_sql(f"alter table {table} enable always trigger {name}")


def engine_named(url: str, name: str = "walletmigrate-test", role: str = "", **options: Any) -> Engine:
    """An engine whose sessions `until_blocked` can tell from others, and that may act as another role."""
    if role:
        options["connect_args"] = {"options": f"-c role={role}"}
    return connect.engine(url, application_name=name, poolclass=NullPool, **options)


def until_blocked(engine: Engine, name: str) -> None:
    """Return once a session of that application name waits for a lock that another one holds."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        blocked = scalar(
            engine,
            "select count(*) from pg_stat_activity "
            "where application_name = :name and cardinality(pg_blocking_pids(pid)) > 0",
            name=name,
        )
        if blocked:
            return
        time.sleep(0.005)  # the pause between two looks, not what makes the order
    raise AssertionError(f"no session of {name} came to wait for a lock")


def journal(engine: Engine) -> list[tuple[Any, ...]]:
    """Everything the ledger holds about money, to compare two moments."""
    return rows(
        engine,
        "select 'account', id, mapping, key, bucket, currency, state::text, balance, job_id "
        "from wallet.accounts union all select 'transaction', id, kind::text, debit_account::text, "
        "credit_account::text, currency, concat_ws('/', debit_balance, credit_balance), amount, job_id "
        "from wallet.transactions order by 1, 2",
    )
