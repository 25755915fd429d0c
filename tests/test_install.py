"""Install and uninstall: what they make, what they refuse, and that both can be run again."""

from __future__ import annotations

from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import BigInteger, Engine, MetaData, Numeric, Table, Text
from sqlalchemy import Column as SqlColumn

import interleaving
from conftest import MakeDatabase
from installing import FENCES, adapter_of, plain_engine, reasons
from invariants import assert_sound
from ledger import ACT, execute, install_users, rows, scalar, set_phase, users_settings
from walletmigrate import schema
from walletmigrate.errors import ConfigError, LedgerNotInstalled, PreconditionRefused
from walletmigrate.install import install, uninstall
from walletmigrate.schema import hide_from_autogenerate


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
