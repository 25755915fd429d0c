"""Which functions act with the owner's rights, and that none of these can be led to other tables by a search_path."""

from __future__ import annotations

import pytest
from sqlalchemy import Engine

from ledger import engine_named, execute, install_users, post, rows, users_settings
from walletmigrate.schema import render, run_script

DEFINERS = {
    *("turn_stale", "diverged", "probe_account", "replay", "resolve", "enter_batch"),
    *("leg_users", "fence_users", "fence_truncate_users", "retired_users"),
    *("open_users", "seal_users", "unseal_users", "close_users", "amend_users", "recount_users"),
    *("undo_openings", "adopt_journal", "erase", "fold_system_accounts", "fill_accounts", "set_line"),
    "follow_phase",
}
"""They write the ledger for those who may not, and decide for themselves what. All others run as who calls them."""

PINNED_ONLY = {
    *("begin_snapshot", "fold_snapshot", "advance_snapshot", "merge_snapshots", "drop_snapshots", "refuse_change"),
}

_FUNCTIONS = """
select p.proname, p.prosecdef, coalesce((
    select substr(c, 13) from unnest(p.proconfig) as c where c like 'search\\_path=%'
), '') as path
from pg_proc as p where p.pronamespace = 'wallet'::regnamespace
"""


@pytest.fixture
def engine(database_url: str) -> Engine:
    engine, _ = install_users(database_url, phase="dual_write")
    with engine.begin() as connection:
        run_script(connection, render("guard", schema='"wallet"', mapping="users", relation="public.users"))
    return engine


def test_the_functions_that_act_as_the_owner_are_these(engine: Engine) -> None:
    assert {name for name, definer, _ in rows(engine, _FUNCTIONS) if definer} == DEFINERS


def test_each_of_them_looks_into_the_catalog_first_and_into_temporary_tables_last(engine: Engine) -> None:
    paths = {name: path.replace('"', "").split(", ") for name, _, path in rows(engine, _FUNCTIONS) if path}
    assert paths.keys() == DEFINERS | PINNED_ONLY
    assert {(path[0], path[-1]) for path in paths.values()} == {("pg_catalog", "pg_temp")}
    assert {name for name, path in paths.items() if path[1:-1] not in ([], ["wallet"])} == set()


@pytest.mark.parametrize("dual", [True, False])
def test_a_caller_s_own_tables_and_path_lead_no_posting_astray(database_url: str, engine: Engine, dual: bool) -> None:
    execute(engine, "grant select, update on users to wallet_app")
    app = engine_named(database_url, role="wallet_app")
    with app.begin() as connection:
        connection.exec_driver_sql("create temporary table accounts (id bigint, state text)")
        connection.exec_driver_sql("create temporary table idempotency_keys (key text, request uuid)")
        connection.exec_driver_sql("set local search_path = pg_temp, public")
        done = post(connection, users_settings(database_url), "credit", 1, 5, dual=dual, idempotency_key="k")
        again = post(connection, users_settings(database_url), "credit", 1, 5, dual=dual, idempotency_key="k")
        connection.exec_driver_sql("select wallet.turn_stale(1, 'test')")
        found = connection.exec_driver_sql(
            "select (select count(*) from pg_temp.accounts), (select count(*) from pg_temp.idempotency_keys)"
        )
        assert tuple(found.one()) == (0, 0)
    assert (done["outcome"], again["outcome"]) == ("ok" if dual else "skipped", "replayed")
    assert rows(engine, "select key from wallet.idempotency_keys") == [("k",)]
