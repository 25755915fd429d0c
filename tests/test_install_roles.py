"""Install by a role that is no superuser, and what the roles of the ledger and nobody else may do."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import pytest
from pydantic import SecretStr
from sqlalchemy import make_url

import servers
from installing import adapter_of, failure, plain_engine
from invariants import assert_sound
from ledger import ACT, execute, install_users, rows, scalar, users_settings
from walletmigrate.config import Roles, Settings
from walletmigrate.errors import LedgerNotInstalled, PreconditionRefused
from walletmigrate.install import install, uninstall


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
