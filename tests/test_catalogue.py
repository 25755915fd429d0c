"""The catalogue: what is on record of a write past the adapter."""

from __future__ import annotations

from contextlib import closing
from decimal import Decimal

import psycopg
import pytest
from sqlalchemy import text
from sqlalchemy.pool import NullPool

from capturing import ADD, Place
from ledger import ACT, execute, rows, scalar, users_settings
from walletmigrate import LegacyBalanceAdapter, StaticSource, bypasses, connect
from walletmigrate.config import CaptureSettings
from walletmigrate.flags import DUAL_WRITE
from walletmigrate.install import install


@pytest.fixture
def place(database_url: str) -> Place:
    return Place(database_url)


@pytest.mark.parametrize(
    ("statement", "line"),
    [
        (ADD, ("update", "1", "total_coins", "turned_stale", 100, 105)),
        ("update users set total_coins = 7 where id = 2", ("update", "2", "total_coins", "stale", 101, 7)),
        ("update users set total_coins = 7 where id = 3", ("update", "3", "total_coins", "absent", 100, 7)),
        ("delete from users where id = 1", ("delete", "1", "total_coins", "closed", 100, None)),
        ("delete from users where id = 3", ("delete", "3", "total_coins", "absent", 100, None)),
        (
            "insert into users (id, tenant, role, total_coins) values (99, 'acme', 'member', 7)",
            ("insert", "99", "total_coins", "absent", None, 7),
        ),
        ("truncate users", ("truncate", None, None, "closed", None, None)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_write_past_the_adapter_is_on_record(place: Place, statement: str, line: tuple[object, ...]) -> None:
    assert place.write(statement) == ""
    assert place.catalogued() == [line]


@pytest.mark.parametrize(
    "statement",
    [
        (
            "insert into users (id, tenant, role, total_coins) values (1, 'a', 'b', 3) "
            "on conflict (id) do update set total_coins = excluded.total_coins"
        ),
        (
            "merge into users u using (values (1, 3)) v (id, coins) on u.id = v.id "
            "when matched then update set total_coins = v.coins"
        ),
        "with w as (update users set total_coins = 3 where id = 1 returning id) select * from w",
        "do $$ begin update users set total_coins = 3 where id = 1; end $$",
        "set local session_replication_role = replica; update users set total_coins = 3 where id = 1",
    ],
    ids=["upsert", "merge", "with", "block", "replica"],
)
def test_every_kind_of_statement_is_on_record(place: Place, statement: str) -> None:
    assert place.write(statement) == ""
    assert place.catalogued() == [("update", "1", "total_coins", "turned_stale", 100, 3)]


def test_copy_is_on_record_line_by_line(place: Place) -> None:
    with closing(place.engine.raw_connection()) as pooled:
        driver = pooled.driver_connection
        assert isinstance(driver, psycopg.Connection)
        with driver.cursor().copy("copy users (id, tenant, role, total_coins) from stdin") as copy:
            copy.write_row((50, "acme", "member", 7))
            copy.write_row((51, "acme", "member", 8))
        driver.commit()
    assert place.catalogued() == [
        ("insert", "50", "total_coins", "absent", None, 7),
        ("insert", "51", "total_coins", "absent", None, 8),
    ]
    assert place.paths()[0].fingerprint == "copy users (id, tenant, role, total_coins) from stdin"


def test_a_cascade_is_on_record_under_the_statement_that_began_it(place: Place) -> None:
    made = place.write(
        "create table owners (id bigint primary key)",
        "insert into owners select id from users",
        "alter table users add foreign key (id) references owners on delete cascade on update cascade",
    )
    assert made == ""
    assert place.write("delete from owners where id = 1", "update owners set id = 33 where id = 3") == ""
    assert [line[:4] for line in place.catalogued()] == [
        ("delete", "1", "total_coins", "closed"),
        ("update", "3", "total_coins", "absent"),
        ("update", "33", "total_coins", "absent"),
    ]
    assert {path.fingerprint for path in place.paths()} == {
        "delete from owners where id = ?",
        "update owners set id = ? where id = ?",
    }


def test_a_row_that_moves_between_partitions_is_on_record_under_both(database_url: str) -> None:
    engine = connect.engine(database_url, application_name="tests", poolclass=NullPool)
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "create table users (id bigint primary key, tenant text not null, role text not null, "
            "total_coins numeric(20, 2)) partition by range (id); "
            "create table users_low partition of users for values from (0) to (6); "
            "create table users_high partition of users for values from (6) to (100); "
            "insert into users select g, 'acme', 'member', 100 from generate_series(1, 10) as g"
        )
    settings = users_settings(database_url)
    install(engine, settings, ACT)
    execute(engine, "update users set id = 77, total_coins = 50 where id = 1")
    query = "select relation::text, operation, key, old_value, new_value from wallet.bypasses order by at"
    assert rows(engine, query) == [
        ("users_low", "delete", "1", 100, None),
        ("users_high", "insert", "77", None, 50),
    ]


def test_what_is_rolled_back_is_not_on_record(place: Place) -> None:
    assert place.write("savepoint s", ADD, "rollback to savepoint s") == ""
    assert place.write(ADD, "select 1 / 0") == "22012"
    assert place.catalogued() == []
    assert place.state() == ("mirrored", 100, 100)


def test_a_changed_key_is_a_delete_of_the_old_and_an_insert_of_the_new(place: Place) -> None:
    assert place.write("update users set id = 77 where id = 1") == ""
    assert place.catalogued() == [
        ("update", "1", "total_coins", "closed", 100, None),
        ("update", "77", "total_coins", "absent", None, 100),
    ]


def test_only_the_column_that_was_written_is_on_record(database_url: str) -> None:
    place = Place(database_url, with_promo=True)
    assert place.write("update users set promo = promo + 1 where id = 3") == ""
    assert [line[2] for line in place.catalogued()] == ["promo"]


def test_a_write_that_leaves_the_balance_as_it_was_is_not_on_record(place: Place) -> None:
    """Of an account that is mirrored, of one that is stale, and of one that is not there."""
    assert place.write("update users set role = 'vip', total_coins = total_coins where id in (1, 2, 3)") == ""
    assert place.write("update users set role = 'member' where id in (1, 2, 3)") == ""
    assert place.catalogued() == []


@pytest.mark.parametrize("dual", [True, False])
@pytest.mark.parametrize("operation", ["short", "long", "transfer", "set", "open"])
def test_what_the_adapter_writes_is_not_on_record(place: Place, dual: bool, operation: str) -> None:
    adapter = LegacyBalanceAdapter(place.settings, StaticSource({DUAL_WRITE: dual}))
    with place.engine.begin() as connection:
        for key in (1, 2, 3):
            if operation == "short":
                adapter.credit(connection, key, 5, type="test", idempotency_key=f"k{key}")
            elif operation == "long":
                adapter.credit(connection, key, 5, type="test", description="said at length")
            elif operation == "transfer":
                adapter.transfer(connection, key, key + 3, 5, type="test")
            elif operation == "set":
                adapter.set_balance(connection, key, 17, actor="admin:7", reason="support")
            else:
                adapter.open_account(connection, key)
    assert place.catalogued() == []


def test_the_label_of_the_adapter_hides_no_write_to_another_row(place: Place) -> None:
    body = "begin update users set total_coins = total_coins + 1 where id = 4; return null; end"
    assert (
        place.write(
            f"create function app() returns trigger language plpgsql as $$ {body} $$",
            "create trigger app after update on users for each row when (new.id = 3) execute function app()",
        )
        == ""
    )
    adapter = LegacyBalanceAdapter(place.settings, StaticSource({DUAL_WRITE: False}))
    with place.engine.begin() as connection:
        adapter.set_balance(connection, 3, 17, actor="admin:7", reason="support")
    assert [line[1] for line in place.catalogued()] == ["4"]


def test_a_line_says_who_and_when_and_by_which_statement(place: Place) -> None:
    assert place.write(ADD, name="nightly") == ""
    ((application, user, fingerprint, query, xid),) = rows(
        place.engine,
        "select application_name, database_user, fingerprint, query, xid from wallet.bypasses",
    )
    assert (application, fingerprint) == ("nightly", "update users set total_coins = total_coins + ? where id = ?")
    assert user == scalar(place.engine, "select session_user")
    assert query is None
    assert xid > 0


def test_the_raw_statement_is_kept_only_where_it_is_switched_on(place: Place) -> None:
    settings = place.settings.model_copy(update={"capture": CaptureSettings(raw_queries=True)})
    install(place.engine, settings, ACT)
    assert place.write(ADD) == ""
    assert scalar(place.engine, "select query from wallet.bypasses") == ADD
    assert place.paths(settings)[0].example == ADD


@pytest.mark.parametrize(
    ("statement", "fingerprint"),
    [
        ("update t set a = 1.5, b = 'x''y' where c in (1, 2,3)", "update t set a = ?, b = ? where c in (?)"),
        ("update t1 set col2 = $1 where id = $12 -- now 17", "update t1 set col2 = ? where id = ?"),
        ("/* by 'bob' */ update t set a = 'b /* */ c' /* d", "? update t set a = ?"),
        ("update t set a = 'secret -- x', b = 5", "update t set a = ?, b = ?"),
        ('update "T 1" set a = -5', 'update "T 1" set a = ?'),
        ("select E'a\\'b', x5, 5e", "select ?, x5, 5e"),
        ("select 'never closed", "select ?"),
        ("select $body$secret$body$, 1", "select ?"),
        ("select $a1$secret$a1$, 1", "select ?"),
        ("select 1 /* a /* b */ secret */ + 2", "select ?"),
        ("select 1 /* a */ + c /* b */", "select ? + c ?"),
        (
            "update t set a = 1e5, b = .5, c = 0x1F, d = 1_000, e = -2.5E-3",
            "update t set a = ?, b = ?, c = ?, d = ?, e = ?",
        ),
        ("update t set a = ?, b = 2", "update t set a = ?, b = ?"),
    ],
)
def test_a_fingerprint_has_no_values(place: Place, statement: str, fingerprint: str) -> None:
    assert scalar(place.engine, "select wallet.fingerprint(:q)", q=statement) == fingerprint


def test_a_session_without_standard_strings_writes_past_the_adapter_as_any_other(place: Place) -> None:
    with place.engine.begin() as connection:
        connection.execute(text("set local standard_conforming_strings = off"))
        connection.execute(text("update users set total_coins = total_coins + 1 where id = 1"))
    assert place.paths()[0].fingerprint == "update users set total_coins = total_coins + ? where id = ?"


def test_the_report_is_a_list_of_code_paths(place: Place) -> None:
    for key in (1, 3, 3):
        assert place.write(f"update users set total_coins = total_coins + 5 where id = {key}", name="cron") == ""
    assert place.write("delete from users where id = 9", name="admin") == ""
    adding, deleting = place.paths()
    assert (adding.writes, adding.accounts, adding.moved) == (3, 2, Decimal(15))
    assert adding.treatments == {"turned_stale": 1, "absent": 2}
    assert (adding.relation, adding.column, adding.application_names) == ("users", "total_coins", ("cron",))
    assert (deleting.operation, deleting.application_names, deleting.moved) == ("delete", ("admin",), Decimal(-100))


def test_lines_older_than_the_retention_are_removed_and_no_others(place: Place) -> None:
    assert place.write(ADD) == ""
    assert place.write("update users set total_coins = 7 where id = 3") == ""
    execute(place.engine, "update wallet.bypasses set at = at - interval '31 days' where key = '1'")
    assert bypasses.prune(place.engine, place.settings, ACT, dry_run=True) == 1
    assert len(place.catalogued()) == 2
    assert bypasses.prune(place.engine, place.settings, ACT) == 1
    assert [line[1] for line in place.catalogued()] == ["3"]
