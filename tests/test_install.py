"""Install and uninstall: what they make, what they refuse, and that both can be run again."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from pydantic import SecretStr, ValidationError
from sqlalchemy import BigInteger, Engine, MetaData, Numeric, Table, Text, make_url
from sqlalchemy import Column as SqlColumn
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

import interleaving
import servers
from conftest import MakeDatabase
from invariants import assert_sound
from ledger import ACT, execute, install_users, post, rows, scalar, set_phase, users_settings
from walletmigrate import connect, schema
from walletmigrate.adapter import LegacyBalanceAdapter
from walletmigrate.capture import fence_problems
from walletmigrate.config import Column, Mapping, Roles, Settings
from walletmigrate.errors import (
    ConfigError,
    IdempotencyKeyReused,
    LedgerNotInstalled,
    PreconditionRefused,
    WalletMigrateError,
)
from walletmigrate.flags import DUAL_WRITE, StaticSource
from walletmigrate.functions import relation
from walletmigrate.install import install, uninstall
from walletmigrate.movements import Movement
from walletmigrate.schema import hide_from_autogenerate, quoted

FENCES = "select tgrelid::regclass::text || ' ' || tgname from pg_trigger where tgname like 'walletmigrate%' order by 1"


def plain_engine(url: str) -> Engine:
    return connect.engine(url, application_name="walletmigrate-test", poolclass=NullPool)


def adapter_of(settings: Settings, mapping: str | None = None) -> LegacyBalanceAdapter:
    return LegacyBalanceAdapter(settings, StaticSource({DUAL_WRITE: True}), mapping=mapping)


def with_columns(settings: Settings, **changes: Any) -> Settings:
    """The same settings with another first column."""
    mapping = settings.mapping(None)
    column = Column.model_validate({**mapping.columns[0].model_dump(), **changes})
    return with_mapping(settings, columns=(column, *mapping.columns[1:]))


def with_mapping(settings: Settings, **changes: Any) -> Settings:
    mapping = Mapping.model_validate({**settings.mapping(None).model_dump(), **changes})
    return Settings(database_url=settings.database_url, mappings=(mapping,))


def reasons(error: pytest.ExceptionInfo[PreconditionRefused]) -> str:
    return "\n".join(what for what, _ in error.value.reasons)


# Twice, and dry


def test_a_second_install_changes_nothing(database_url: str) -> None:
    engine, settings = install_users(database_url)
    before = catalog(engine)
    fence = scalar(engine, "select fence from wallet.mappings")
    result = install(engine, settings, ACT)
    assert (result.fences_made, result.mappings, result.dry_run) == ((), ("users",), False)
    assert result.revision == schema.head()
    assert catalog(engine) == before
    assert scalar(engine, "select fence from wallet.mappings") == fence
    assert scalar(engine, "select count(*) from wallet.audit_log where action = 'install'") == 2


def test_a_dry_run_makes_nothing_and_lists_what_does_not_convert(database_url: str) -> None:
    engine = plain_engine(database_url)
    execute(engine, "create table users (id bigint primary key, tenant text, role text, total_coins numeric)")
    execute(engine, "insert into users values (1, 'a', 'b', 1.005), (2, 'a', 'b', null), (3, 'a', 'b', 7)")
    result = install(engine, users_settings(database_url), ACT, dry_run=True)
    assert result.dry_run
    assert sorted(result.unconvertible) == [
        ("users", "1", "total_coins", "1.005"),
        ("users", "2", "total_coins", "NULL"),
    ]
    assert scalar(engine, "select to_regnamespace('wallet') is null")
    assert rows(engine, FENCES) == []


# Refusals


def test_values_that_do_not_convert_are_refused_all_at_once_with_what_to_do(database_url: str) -> None:
    engine = plain_engine(database_url)
    execute(engine, "create table users (id bigint primary key, tenant text, role text, total_coins numeric)")
    execute(engine, "insert into users values (1, 'a', 'b', 1.005), (2, 'a', 'b', 'NaN'), (3, 'a', 'b', 7)")
    settings = users_settings(database_url)
    with pytest.raises(PreconditionRefused) as refused:
        install(engine, settings, ACT)
    assert reasons(refused).splitlines() == [
        "users: total_coins of 1 holds 1.005, which is no exact amount",
        "users: total_coins of 2 holds NaN, which is no exact amount",
    ]
    assert all(mend for _, mend in refused.value.reasons)
    assert scalar(engine, "select to_regnamespace('wallet') is null")
    execute(engine, "update users set total_coins = 1 where id < 3")
    assert install(engine, settings, ACT).fences_made == ("users",)


@pytest.mark.parametrize(
    ("made", "problem"),
    [
        (
            "create table users (id bigint, tenant text, role text, total_coins numeric, primary key (id, tenant))",
            "comp",
        ),
        ("create view users as select 1::bigint id, 'a' tenant, 'b' role, 1.0 total_coins", "a view"),
        (
            (
                "create table users (id bigint primary key, tenant text, role text, c int, "
                "total_coins numeric generated always as (c / 100.0) stored)"
            ),
            "generated",
        ),
        ("create table users (id float primary key, tenant text, role text, total_coins numeric)", "type"),
        ("select 1", "no table"),
    ],
)
def test_a_table_that_the_ledger_cannot_guard_is_refused(database_url: str, made: str, problem: str) -> None:
    engine = plain_engine(database_url)
    execute(engine, made)
    with pytest.raises(ConfigError, match=problem):
        install(engine, users_settings(database_url), ACT)
    assert scalar(engine, "select to_regnamespace('wallet') is null")


@pytest.mark.parametrize(
    "change",
    [{"scale": 1}, {"unit": "minor"}, {"column": "promo"}, {"currency": "USD"}, {"bucket": "main"}],
    ids=lambda change: next(iter(change)),
)
def test_another_meaning_beneath_open_accounts_is_refused(database_url: str, change: dict[str, Any]) -> None:
    engine, settings = install_users(database_url, phase="dual_write")
    with engine.begin() as connection:
        post(connection, settings, "open_account", 1, 0)
    with pytest.raises(PreconditionRefused, match="1 accounts of mapping 'users'"):
        install(engine, with_columns(settings, **change), ACT)
    with engine.begin() as connection:
        assert post(connection, settings, "credit", 1, 1)["debtor_ledger"] is None


def test_more_decimals_are_taken_beneath_open_accounts_and_their_journal_goes_on(database_url: str) -> None:
    engine, settings = install_users(database_url, phase="dual_write", coins_type="numeric(20, 4)")
    with engine.begin() as connection:
        adapter_of(settings).credit(connection, 1, 1, type="test", idempotency_key="one")
    finer = with_columns(settings, scale=4)
    install(engine, finer, ACT)
    with engine.begin() as connection, pytest.raises(LedgerNotInstalled, match="another configuration"):
        adapter_of(settings).credit(connection, 1, 1, type="test")
    with engine.begin() as connection:
        posted = adapter_of(finer).credit(connection, 1, Decimal("0.0001"), type="test")
    assert (posted.ledger_balance, posted.legacy_balance) == (Decimal("101.0001"), Decimal("101.0001"))
    with engine.begin() as connection, pytest.raises(IdempotencyKeyReused):  # never twice, though not a replay either
        adapter_of(finer).credit(connection, 1, 1, type="test", idempotency_key="one")
    assert_sound(engine, finer)
    with pytest.raises(PreconditionRefused, match="opened under another"):
        install(engine, settings, ACT)


def test_more_decimals_of_a_floating_column_are_another_meaning(database_url: str) -> None:
    """What was rounded away at the old scale is a part of the value at the new one."""
    engine, settings = install_users(
        database_url, coins="12345678.000004", coins_type="double precision", phase="dual_write"
    )
    with engine.begin() as connection:
        post(connection, settings, "open_account", 1, 0)
    set_phase(engine, "legacy")
    with pytest.raises(PreconditionRefused, match="another table, key, column, scale or unit"):
        install(engine, with_columns(settings, scale=6), ACT)


def test_more_decimals_of_minor_units_are_another_meaning(database_url: str) -> None:
    engine, settings = install_users(database_url, phase="dual_write", unit="minor", coins_type="bigint")
    with engine.begin() as connection:
        post(connection, settings, "open_account", 1, 0)
    with pytest.raises(PreconditionRefused, match=r"currency-or-scale-change\.md"):
        install(engine, with_columns(settings, scale=3), ACT)


def test_another_table_or_key_beneath_open_accounts_is_refused(database_url: str) -> None:
    engine, settings = install_users(database_url, phase="dual_write")
    execute(engine, "alter table users add number bigint generated always as identity unique not null")
    execute(engine, "create table clients (like users including all)")
    with engine.begin() as connection:
        post(connection, settings, "open_account", 1, 0)
    for change in ({"key": "number"}, {"table": "public.clients"}):
        with pytest.raises(PreconditionRefused, match="opened under another"):
            install(engine, with_mapping(settings, **change), ACT)


def test_another_meaning_is_taken_while_no_account_is_open(database_url: str) -> None:
    engine, settings = install_users(database_url, phase="dual_write")
    changed = with_columns(settings, scale=1, bucket="main")
    install(engine, changed, ACT)
    with engine.begin() as connection:
        assert adapter_of(changed).credit(connection, 1, Decimal("0.5"), type="test").ledger_balance == Decimal("100.5")
    with engine.begin() as connection, pytest.raises(LedgerNotInstalled, match="another configuration"):
        adapter_of(settings).credit(connection, 1, 1, type="test")


def test_a_new_floor_and_a_new_bucket_are_taken_beneath_open_accounts(database_url: str) -> None:
    engine, settings = install_users(database_url, phase="dual_write")
    with engine.begin() as connection:
        post(connection, settings, "open_account", 1, 0)
    changed = users_settings(database_url, floor=Decimal(50), with_promo=True)
    install(engine, changed, ACT)
    with engine.begin() as connection:
        assert post(connection, changed, "debit", 1, 60)["refusal"] == "insufficient_funds"
        assert post(connection, changed, "credit", 1, 1, bucket="promo")["creditor_ledger"] == 6
        connection.exec_driver_sql("update users set promo = 1 where id = 1")
    states = rows(engine, "select bucket, state::text from wallet.accounts order by 1")
    assert states == [("cash", "mirrored"), ("promo", "stale")]


def test_a_mapping_that_moves_to_another_table_takes_its_fence_along(database_url: str) -> None:
    engine, settings = install_users(database_url, phase="dual_write")
    execute(
        engine, "create table clients (number bigint primary key, tenant text, role text, total_coins numeric(20,2))"
    )
    moved = with_mapping(settings, table="public.clients", key="number")
    assert install(engine, moved, ACT).fences_made == ("users",)
    assert {name for (name,) in rows(engine, FENCES)} == {
        f"clients walletmigrate_users_{event}" for event in ("insert", "update", "delete", "truncate")
    }
    execute(engine, "update users set total_coins = 5")  # no trigger calls functions that are not for this table
    execute(engine, "insert into clients values (1, 'a', 'b', 3)")
    with engine.begin() as connection:
        assert adapter_of(moved).credit(connection, 1, 1, type="test").ledger_balance == 4
    assert_sound(engine, moved)


def test_two_mappings_of_one_table_have_a_fence_each(database_url: str) -> None:
    engine, settings = install_users(database_url, phase="dual_write")
    promo = Column(bucket="promo", column="promo", currency="EUR", scale=2)
    other = Mapping.model_validate({**settings.mapping(None).model_dump(), "name": "promos", "columns": (promo,)})
    both = Settings(database_url=settings.database_url, mappings=(*settings.mappings, other))
    assert install(engine, both, ACT).fences_made == ("promos",)
    assert install(engine, both, ACT).fences_made == ()
    with engine.begin() as connection:
        for mapping in both.mappings:
            assert fence_problems(connection, both, mapping) == []
            adapter_of(both, mapping.name).credit(connection, 1, 1, type="test")
        connection.exec_driver_sql("update users set promo = promo + 1, total_coins = total_coins + 1 where id = 1")
    states = rows(engine, "select mapping, state::text from wallet.accounts order by 1")
    assert states == [("promos", "stale"), ("users", "stale")]
    assert_sound(engine, both)


# Uninstall


def test_an_uninstall_leaves_the_journal_and_an_adapter_that_goes_on(database_url: str) -> None:
    engine, settings = install_users(database_url, phase="dual_write")
    adapter = adapter_of(settings)
    with engine.begin() as connection:
        adapter.credit(connection, 1, 1, type="test")
    set_phase(engine, "legacy")
    uninstall(engine, settings, ACT)
    assert rows(engine, FENCES) == []
    assert rows(engine, "select state::text, state_reason from wallet.accounts") == [("stale", "uninstall")]
    assert scalar(engine, "select count(*) from wallet.transactions") == 2
    execute(engine, "update users set total_coins = total_coins + 1")
    with engine.connect() as connection:
        with pytest.raises(LedgerNotInstalled):  # the transaction in which it found out
            adapter.credit(connection, 1, 1, type="test")
        connection.rollback()
        assert adapter.credit(connection, 1, 1, type="test").mode == "legacy"
        connection.commit()
    before = scalar(engine, "select count(*) from wallet.audit_log")
    uninstall(engine, settings, ACT)
    assert scalar(engine, "select count(*) from wallet.audit_log") == before
    install(engine, settings, ACT)
    set_phase(engine, "dual_write")
    with engine.begin() as connection:
        assert adapter_of(settings).credit(connection, 1, 1, type="test").ledger_balance == 104
    assert_sound(engine, settings)


def test_an_uninstall_that_drops_the_ledger_can_be_run_twice_and_installed_again(database_url: str) -> None:
    engine, settings = install_users(database_url)
    uninstall(engine, settings, ACT, drop_ledger=True)
    assert scalar(engine, "select to_regnamespace('wallet') is null")
    uninstall(engine, settings, ACT, drop_ledger=True)
    assert install(engine, settings, ACT).fences_made == ("users",)


def test_an_uninstall_is_refused_while_the_ledger_is_needed_with_all_reasons(database_url: str) -> None:
    engine, settings = install_users(database_url, phase="dual_write")
    execute(engine, "select * from wallet.backfill_users(null, null, null)")
    execute(engine, "select * from wallet.freeze_users(null, null)")
    for dry_run in (True, False):
        with pytest.raises(PreconditionRefused) as refused:
            uninstall(engine, settings, ACT, dry_run=dry_run)
        assert reasons(refused).splitlines() == [
            "the phase is dual_write",
            "10 accounts are frozen: the ledger alone is true",
        ]
    assert len(rows(engine, FENCES)) == 4


def test_a_dry_uninstall_takes_nothing_out(database_url: str) -> None:
    engine, settings = install_users(database_url)
    before = catalog(engine)
    uninstall(engine, settings, ACT, drop_ledger=True, dry_run=True)
    assert catalog(engine) == before


def test_an_uninstall_and_a_posting_in_flight_do_not_deadlock(database_url: str) -> None:
    engine, settings = install_users(database_url, phase="dual_write")
    execute(engine, "select * from wallet.backfill_users(null, null, null)")
    adapter = adapter_of(settings)
    with interleaving.stage(database_url) as stage:
        poster, remover = stage.session(), stage.session()
        poster.do(lambda connection: adapter.credit(connection, 2, 1, type="test"))
        set_phase(engine, "legacy")
        removing = remover.start(lambda _: uninstall(stage.engine, settings, ACT))
        poster.until_blocking(removing)
        again = poster.do(lambda connection: adapter.credit(connection, 1, 1, type="test"))
        assert again.mode == "legacy"
        poster.commit()
        removing.result(interleaving.PATIENCE_SECONDS)
    assert rows(engine, "select distinct state::text from wallet.accounts") == [("stale",)]
    assert rows(engine, FENCES) == []
    assert_sound(engine, settings)


# What stands in the catalog


CATALOG = """
select 'relation', c.relname, c.relkind::text, coalesce(array_to_string(c.reloptions, ','), ''),
    pg_get_userbyid(c.relowner)
from pg_class c where c.relnamespace = 'wallet'::regnamespace
union all
select 'column', c.relname, a.attname, format_type(a.atttypid, a.atttypmod) || a.attnotnull,
    coalesce(pg_get_expr(d.adbin, d.adrelid), '')
from pg_class c join pg_attribute a on a.attrelid = c.oid
left join pg_attrdef d on d.adrelid = c.oid and d.adnum = a.attnum
where c.relnamespace = 'wallet'::regnamespace and a.attnum > 0
union all
select 'constraint', conname, coalesce(conrelid::regclass::text, ''), pg_get_constraintdef(oid), ''
from pg_constraint where connamespace = 'wallet'::regnamespace
union all
select 'index', indexname, tablename, indexdef, '' from pg_indexes where schemaname = 'wallet'
union all
select 'trigger', t.tgname, t.tgrelid::regclass::text, pg_get_triggerdef(t.oid), t.tgenabled::text
from pg_trigger t where not t.tgisinternal
union all
select 'function', p.oid::regprocedure::text, md5(pg_get_functiondef(p.oid)), pg_get_userbyid(p.proowner),
    array_to_string(array(select x::text from unnest(p.proacl) x order by 1), ',')
from pg_proc p where p.pronamespace = 'wallet'::regnamespace
union all
select 'grant', c.relname, array_to_string(array(select x::text from unnest(c.relacl) x order by 1), ','), '', ''
from pg_class c where c.relnamespace = 'wallet'::regnamespace
union all
select 'type', t.typname, t.typtype::text, coalesce(string_agg(e.enumlabel, ',' order by e.enumsortorder), ''), ''
from pg_type t left join pg_enum e on e.enumtypid = t.oid where t.typnamespace = 'wallet'::regnamespace group by 2, 3
order by 1, 2, 3, 4
"""


def catalog(engine: Engine) -> list[tuple[Any, ...]]:
    """Everything of the ledger's schema, and the triggers, as the database knows it."""
    return rows(engine, CATALOG.replace(":", r"\:"))


def test_a_fresh_schema_equals_one_that_went_through_every_migration_alone(make_database: MakeDatabase) -> None:
    fresh, _ = install_users(make_database())
    engine, settings = install_users(make_database())
    uninstall(engine, settings, ACT, drop_ledger=True)
    config = schema._config()
    revisions = [r.revision for r in ScriptDirectory.from_config(config).walk_revisions()][::-1]
    assert revisions[-1] == schema.head()
    execute(engine, "create schema wallet authorization wallet_owner")
    for revision in revisions:
        with engine.begin() as connection:
            connection.exec_driver_sql("set local role wallet_owner")
            config.attributes.update(connection=connection, schema="wallet")
            command.upgrade(config, revision)
        with engine.begin() as connection:
            assert schema.revision(connection, "wallet") == revision
    install(engine, settings, ACT)
    assert catalog(engine) == catalog(fresh)
    assert len(catalog(engine)) > 200


def test_the_application_s_autogenerate_does_not_see_the_ledger(database_url: str) -> None:
    engine, _ = install_users(database_url)
    metadata = MetaData()
    Table(
        "users",
        metadata,
        SqlColumn("id", BigInteger, primary_key=True),
        SqlColumn("tenant", Text, nullable=False),
        SqlColumn("role", Text, nullable=False),
        SqlColumn("total_coins", Numeric(20, 2)),
        SqlColumn("promo", Numeric(20, 2), nullable=False),
    )

    def differences(**options: Any) -> list[Any]:
        with engine.connect() as connection:
            context = MigrationContext.configure(connection, opts={"include_schemas": True, **options})
            return list(compare_metadata(context, metadata))

    assert differences(include_name=hide_from_autogenerate()) == []
    assert len(differences()) > 10


def test_nobody_but_the_roles_may_run_or_write_anything(database_url: str) -> None:
    engine, settings = install_users(database_url, phase="dual_write")
    public = "select p.proname from pg_proc p, aclexplode(p.proacl) a where a.grantee = 0 and p.pronamespace = "
    assert rows(engine, public + r"'wallet'\:\:regnamespace") == []
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "grant select, update, insert, delete on users to wallet_app; set local role wallet_app"
        )
        posted = adapter_of(settings).credit(connection, 1, 1, type="test")
        assert posted.ledger_balance == 101
        connection.exec_driver_sql("update users set total_coins = 5 where id = 1")
        assert adapter_of(settings).transfer(connection, 1, 2, 1, type="test").ledger_balance == 4
    for role in ("wallet_app", "wallet_operator", "wallet_auditor"):
        for statement in (
            "update wallet.accounts set balance = 0",
            "insert into wallet.transactions select * from wallet.transactions",
            "delete from wallet.idempotency_keys",
            "update wallet.mappings set fingerprint = ''",
        ):
            assert failure(engine, f"set local role {role}", statement) == "42501"
    for table in ("transactions", "audit_log"):
        for statement in (f"delete from wallet.{table}", f"truncate wallet.{table}"):
            assert failure(engine, "set local session_replication_role = replica", statement) == "WM040"
    assert_sound(engine, settings)


def job(engine: Engine, statement: str) -> tuple[Any, ...]:
    """Run one batch of a job, and give its counts."""
    with engine.begin() as connection:
        return tuple(connection.exec_driver_sql(statement).one())


def failure(engine: Engine, *statements: str) -> str:
    """The SQLSTATE with which a transaction of these statements fails, or nothing."""
    try:
        with engine.begin() as connection:
            for statement in statements:
                connection.exec_driver_sql(statement)
    except DBAPIError as error:
        return str(getattr(error.orig, "sqlstate", ""))
    return ""


# Without a superuser


@pytest.fixture
def managed(server: servers.Postgres, database_url: str) -> Iterator[tuple[str, Roles]]:
    """The URL of a database whose owner may create roles and is no superuser, and names for new roles."""
    mark = secrets.token_hex(4)
    owner = f"landlord_{mark}"
    roles = Roles(owner=f"o_{mark}", app=f"a_{mark}", operator=f"p_{mark}", auditor=f"u_{mark}")
    url = make_url(database_url)
    engine = plain_engine(database_url)
    execute(engine, f"create role {owner} login createrole password '{mark}'")
    execute(engine, f'alter database "{url.database}" owner to {owner}')
    try:
        yield url.set(username=owner, password=mark).render_as_string(hide_password=False), roles
    finally:
        execute(engine, f'alter database "{url.database}" owner to current_user')
        for name in (*roles.model_dump().values(), owner):
            if scalar(engine, "select 1 from pg_roles where rolname = :name", name=name):
                execute(engine, f"drop owned by {name} cascade")
        for name in (*roles.model_dump().values(), owner):
            execute(engine, f"drop role if exists {name}")


def test_a_role_that_is_no_superuser_installs_posts_and_uninstalls(managed: tuple[str, Roles]) -> None:
    url, roles = managed
    engine = plain_engine(url)
    assert not scalar(engine, "select rolsuper from pg_roles where rolname = current_user")
    execute(engine, "create table users (id bigint primary key, tenant text, role text, total_coins numeric(20, 2))")
    execute(engine, "insert into users values (1, 'a', 'b', 100), (2, 'a', 'b', 100)")
    settings = Settings(database_url=SecretStr(url), roles=roles, mappings=users_settings(url).mappings)
    assert install(engine, settings, ACT).fences_made == ("users",)
    assert install(engine, settings, ACT).fences_made == ()
    assert (
        scalar(engine, "select nspowner\\:\\:regrole\\:\\:text from pg_namespace where nspname = 'wallet'")
        == roles.owner
    )
    with engine.begin() as connection:
        connection.exec_driver_sql(f"update wallet.control set phase = 'dual_write'; grant {roles.app} to current_user")
        connection.exec_driver_sql(f"grant select, update on users to {roles.app}")
    with engine.begin() as connection:
        connection.exec_driver_sql(f"set local role {roles.app}")
        assert adapter_of(settings).credit(connection, 1, 1, type="test").ledger_balance == 101
        connection.exec_driver_sql("update users set total_coins = 7 where id = 1")
    assert rows(engine, "select state\\:\\:text from wallet.accounts") == [("stale",)]
    execute(engine, "update wallet.control set phase = 'legacy'")
    uninstall(engine, settings, ACT, drop_ledger=True)
    assert scalar(engine, "select to_regnamespace('wallet') is null")


def test_the_application_s_role_can_post_from_the_moment_that_the_functions_are_there(
    managed: tuple[str, Roles], database_url: str
) -> None:
    url, roles = managed
    engine = plain_engine(url)
    execute(engine, "create table users (id bigint primary key, tenant text, role text, total_coins numeric(20, 2))")
    execute(engine, "insert into users values (1, 'a', 'b', 100)")
    settings = Settings(database_url=SecretStr(url), roles=roles, mappings=users_settings(url).mappings)
    shop, late = f"{roles.app}_shop", f"{roles.app}_late"
    engines = {}
    for name in (shop, late):
        execute(engine, f"create role {name} login password 'x'")
        execute(engine, f"grant select, update on users to {name}")
        own = make_url(url).set(username=name, password="x")
        engines[name] = plain_engine(own.render_as_string(hide_password=False))

    def mode(name: str) -> str:
        with engines[name].begin() as connection:
            return adapter_of(settings).credit(connection, 1, 1, type="test").mode

    try:
        assert (mode(shop), mode(late)) == ("legacy", "legacy")
        for _ in range(2):
            done = install(engine, settings, ACT, grant_to=[shop])
            assert (done.granted_to, done.phase) == ((shop,), "legacy")
            assert mode(shop) == "legacy"
        with pytest.raises(LedgerNotInstalled):
            mode(late)
        execute(engine, "update wallet.control set phase = 'dual_write'")
        assert mode(shop) == "dual_write"
        assert install(engine, settings, ACT, grant_to=[late]).phase == "dual_write"
        assert mode(late) == "dual_write"
        granted = rows(engine, "select details -> 'granted_to' from wallet.audit_log where action = 'install'")
        assert granted == [([shop],), ([shop],), ([late],)]
    finally:
        for name in engines:
            execute(plain_engine(database_url), f"drop owned by {name}")
            execute(plain_engine(database_url), f"drop role {name}")


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_role_to_grant_to_that_does_not_exist_is_refused(database_url: str, dry_run: bool) -> None:
    engine, settings = install_users(database_url)
    uninstall(engine, settings, ACT, drop_ledger=True)
    with pytest.raises(PreconditionRefused, match="there is no role 'no shop'") as caught:
        install(engine, settings, ACT, grant_to=["no shop", "nor this"], dry_run=dry_run)
    assert len(caught.value.reasons) == 2
    assert scalar(engine, "select to_regnamespace('wallet') is null")


# Tables of every kind


def test_a_partitioned_table_is_fenced_on_every_partition(database_url: str) -> None:
    engine = plain_engine(database_url)
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "create table users (id bigint primary key, tenant text, role text, total_coins numeric(20, 2)) "
            "partition by range (id); create table users_a partition of users for values from (0) to (10) "
            "partition by hash (id); "
            "create table users_a0 partition of users_a for values with (modulus 2, remainder 0); "
            "create table users_a1 partition of users_a for values with (modulus 2, remainder 1); "
            "create table users_b partition of users default; "
            "insert into users values (1, 'a', 'b', 5), (20, 'a', 'b', 5)"
        )
    settings = users_settings(database_url)
    install(engine, settings, ACT)
    assert len(rows(engine, FENCES)) == 4 * 5
    assert (
        scalar(engine, "select count(*) from pg_trigger where tgname like 'walletmigrate%' and tgenabled <> 'A'") == 0
    )
    assert install(engine, settings, ACT).fences_made == ()
    set_phase(engine, "dual_write")
    assert job(engine, "select opened, failed from wallet.backfill_users(null, null, null)") == (2, 0)
    uninstall_in_legacy(engine, settings)
    assert rows(engine, FENCES) == []


def uninstall_in_legacy(engine: Engine, settings: Settings) -> None:
    set_phase(engine, "legacy")
    uninstall(engine, settings, ACT)


ROW_SECURITY = (
    "alter table users enable row level security; create policy tenants on users to wallet_app "
    "using (tenant = current_setting('app.tenant', true)); grant select, insert, update, delete on users to wallet_app"
)


def as_tenant(connection: Any, tenant: str) -> None:
    connection.exec_driver_sql(f"set local role wallet_app; set local app.tenant = '{tenant}'")


def test_row_level_security_shows_the_application_its_rows_and_the_fence_all(database_url: str) -> None:
    engine, settings = install_users(database_url, phase="dual_write")
    execute(engine, ROW_SECURITY.replace(":", r"\:"))
    install(engine, settings, ACT)
    adapter = adapter_of(settings)
    with engine.begin() as connection:
        as_tenant(connection, "acme")
        assert adapter.credit(connection, 1, 1, type="test").ledger_balance == 101
        with pytest.raises(LookupError):
            adapter.credit(connection, 2, 1, type="test")  # a row of globex
        connection.exec_driver_sql("update users set total_coins = 3 where id = 1")
        assert adapter.credit(connection, 1, 1, type="test").ledger_balance == 4
        connection.exec_driver_sql("delete from users where id = 3")
    states = rows(engine, "select key, state\\:\\:text, balance from wallet.accounts order by 1")
    assert states == [("1", "mirrored", 4)]
    assert_sound(engine, settings)


def test_row_level_security_that_comes_later_never_loses_a_posting_in_silence(database_url: str) -> None:
    """The owner of the ledger then sees no row: a posting must fail, not report what it did not write."""
    engine, settings = install_users(database_url, phase="dual_write")
    with engine.begin() as connection:
        adapter_of(settings).credit(connection, 1, 1, type="test")
    execute(engine, ROW_SECURITY.replace(":", r"\:"))
    reported = 101
    for amount in (1, 2, 4):
        with engine.connect() as connection:
            as_tenant(connection, "acme")
            try:
                adapter_of(settings).credit(connection, 1, amount, type="test")
            except (DBAPIError, WalletMigrateError):
                connection.rollback()
            else:
                connection.commit()
                reported += amount
    assert scalar(engine, "select total_coins from users where id = 1") == reported
    install(engine, settings, ACT)
    with engine.begin() as connection:
        as_tenant(connection, "acme")
        assert adapter_of(settings).credit(connection, 1, 1, type="test").ledger_balance == reported + 1
    assert_sound(engine, settings)


NAMES = [
    # table, key, balance column, another column: names that mean something in SQL or in the ledger's functions.
    ("public.Users", "ID", "Total Coins".replace(" ", "_"), "Role"),
    ("public.user", "order", "select", "table"),
    ("Größe.Konten$", "schlüssel", "saldo€".replace("€", "_ß"), "mandant"),
    ("public.accounts", "key", "balance", "state"),
    ("public.transactions", "id", "amount", "failed"),
    ("public.line", "p_key", "p_change", "last_value"),
    ("public.control", "m", "tip_change", "opened"),
    ("public.l", "l", "a", "k"),
    ("public.mapping", "v_key", "v_now", "s"),
    ("wallet_legacy.job", "debtor", "creditor", "p"),
]


@pytest.mark.parametrize(("table", "key", "column", "other"), NAMES, ids=str)
def test_names_of_any_kind_are_only_names(database_url: str, table: str, key: str, column: str, other: str) -> None:
    engine = plain_engine(database_url)
    mapping = Mapping(
        name="odd",
        table=table,
        key=key,
        traits={"tenant": other},
        columns=(
            Column(bucket="main", column=column, currency="EUR", scale=2),
            Column(bucket="extra", column="extra", currency="EUR", scale=2),
        ),
    )
    settings = Settings(database_url=SecretStr(database_url), mappings=(mapping,))
    name = relation(mapping)
    if mapping.schema_name != "public":
        execute(engine, f"create schema {quoted(mapping.schema_name)}")
    execute(
        engine,
        f"create table {name} ({quoted(key)} bigint primary key, {quoted(column)} numeric(20, 2), "
        f"{quoted(other)} text, extra numeric(20, 2) default 5)",
    )
    execute(
        engine, f"insert into {name} ({quoted(key)}, {quoted(column)}) select g, 100 from generate_series(1, 9) as g"
    )
    install(engine, settings, ACT)
    set_phase(engine, "dual_write")
    adapter = adapter_of(settings)
    with engine.begin() as connection:
        adapter.credit(connection, 1, 5, type="test", idempotency_key="k")
        adapter.transfer(connection, 1, 2, 5, type="test", bucket="extra")
        first = adapter.debit(connection, 1, 3, type="test")
        adapter.reverse(connection, first.transaction_id or 0, reason="test")
        adapter.set_balance(connection, 2, 50, actor="a", reason="b")
        adapter.apply(connection, [Movement.credit(1, 1, type="test"), Movement.debit(2, 1, type="test")])
        assert adapter.balance(connection, 1).amount == 106
    execute(engine, f"update {name} set {quoted(column)} = 7 where {quoted(key)} = 1")
    execute(engine, f"update {name} set {quoted(key)} = 33 where {quoted(key)} = 3")
    assert job(engine, "select opened, resynced, failed from wallet.backfill_odd(null, null, null)") == (14, 1, 0)
    assert_sound(engine, settings)
    assert job(engine, "select frozen, refused from wallet.freeze_odd(null, null)") == (18, 0)
    assert failure(engine, f"update {name} set {quoted(column)} = 8 where {quoted(key)} = 1") == "WM030"
    with engine.begin() as connection:
        assert adapter.credit(connection, 1, 1, type="test").mode == "ledger"
    assert job(engine, "select unfrozen from wallet.unfreeze_odd(null, null)") == (18,)
    assert scalar(engine, f"select {quoted(column)} from {name} where {quoted(key)} = 1") == 8
    execute(engine, f"truncate {name}")
    assert rows(engine, "select distinct state::text from wallet.accounts") == [("closed",)]
    assert_sound(engine, settings)
    uninstall_in_legacy(engine, settings)


@pytest.mark.parametrize(
    "name", ['public."Weird Table"', "public.Weird Table", "public.weird;table", "a.b.c", "1users"]
)
def test_a_table_name_that_is_no_name_is_refused_by_the_configuration(name: str) -> None:
    with pytest.raises(ValidationError, match="not the name of a table"):
        with_mapping(users_settings("postgresql://localhost/x"), table=name)


@pytest.mark.parametrize("key_type", ["smallint", "integer"])
def test_a_key_too_large_for_its_column_is_an_unknown_account(database_url: str, key_type: str) -> None:
    engine, settings = install_users(database_url, key_type="bigint", rows=0)
    uninstall(engine, settings, ACT)
    execute(engine, f"alter table users alter id type {key_type}")
    execute(engine, "insert into users values (1, 'a', 'b', 100)")
    install(engine, settings, ACT)
    set_phase(engine, "dual_write")
    adapter = adapter_of(settings)
    with engine.begin() as connection:
        for key in (70_000, 2**40, -(2**40)):
            with pytest.raises(LookupError):
                adapter.credit(connection, key, 1, type="test")
        with pytest.raises(LookupError):
            adapter.transfer(connection, 1, 2**40, 1, type="test")
        assert adapter.credit(connection, 1, 1, type="test").ledger_balance == 101
    assert_sound(engine, settings)
