"""Rows that come by logical replication meet the fence like any other: its worker has no statement to be named by."""

from __future__ import annotations

from pathlib import Path

import psycopg

from ledger import install_users, post, rows
from monitoring import until
from servers import SETTINGS, Postgres
from walletmigrate.embedded import Server

COINS = "select total_coins from users where id = 1"


def test_a_row_that_comes_by_logical_replication_is_written_and_turns_its_account_stale(server: Postgres) -> None:
    assert server.binaries is not None
    with Server.start(Path(server.binaries), settings={**SETTINGS, "wal_level": "logical"}) as own:
        there, here = own.create_database("there"), own.create_database("here")
        engine, settings = install_users(here, phase="dual_write")
        with engine.begin() as connection:
            post(connection, settings, "open_account", 1, 0)
        source, _ = install_users(there)
        with psycopg.connect(there, autocommit=True) as connection:
            connection.execute("create publication coins for table users")
            connection.execute("select pg_create_logical_replication_slot('coins', 'pgoutput')")
            (name,) = connection.execute("select current_database()").fetchone() or ("",)
            (folder,) = connection.execute("show unix_socket_directories").fetchone() or ("",)
        with psycopg.connect(here, autocommit=True) as connection:
            connection.execute(
                f"create subscription coins connection 'dbname={name} host={folder} port=5432 user=postgres' "
                "publication coins with (create_slot = false, copy_data = false)"
            )
            with source.begin() as publisher:
                publisher.exec_driver_sql("update users set total_coins = 500 where id = 1")
            until(lambda: rows(engine, COINS) == [(500,)])
            found = "select a.state::text, b.treatment, b.fingerprint from wallet.accounts as a, wallet.bypasses as b"
            assert rows(engine, found) == [("stale", "turned_stale", "")]
            connection.execute("alter subscription coins disable")
            connection.execute("alter subscription coins set (slot_name = none)")
            connection.execute("drop subscription coins")
        with psycopg.connect(there, autocommit=True) as connection:
            connection.execute("select pg_drop_replication_slot('coins')")
