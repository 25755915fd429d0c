"""SQL read for what it does to a mapped column."""

from __future__ import annotations

import pytest

from walletmigrate.findings import Wanted
from walletmigrate.source_sql import read_sql

USERS = Wanted("users", "public", "users", ("total_coins",), frozenset({"users", "users_2026"}))


def accesses(sql: str, *, fragment: bool = False) -> list[str]:
    """The accesses in order; "?" where the table is not known, "*" for whole rows."""
    touches = read_sql(sql, USERS, fragment=fragment)
    return [f"{each.access}{'' if each.column else '*'}{'' if each.sure else '?'}" for each in touches]


@pytest.mark.parametrize(
    ("sql", "found"),
    [
        ("update users set total_coins = total_coins + 1", ["write", "read"]),
        ('update only "public"."users" as u set x = 1, "total_coins" = 2', ["write"]),
        ("update users_2026 set total_coins = 0", ["write"]),
        ("update other.users set total_coins = 0", []),
        ('update "Users" set total_coins = 0', []),
        ("UPDATE USERS SET TOTAL_COINS = 0", ["write"]),
        ("update orders set total_coins = 0", []),
        ("update orders o set x = u.total_coins from users u where o.total_coins = 1", ["read"]),
        ("update users set (x, total_coins) = (1, total_coins)", ["write", "read"]),
        ("update users set x = 'total_coins' -- total_coins\n /* total_coins */", []),
        ("update users set x = :total_coins, y = %(total_coins)s", []),
        ("insert into users (id, total_coins) values (1, 2)", ["write"]),
        ("insert into users (id) values (1)", []),
        ("insert into users values (1, 2)", ["write*"]),
        ("insert into users select * from imported", ["write*"]),
        ("insert into log (x) select total_coins from users", ["read"]),
        ("insert into users (id) values (1) on conflict (id) do update set total_coins = 1", ["write"]),
        ("insert into orders (id) values (1) on conflict (id) do update set total_coins = excluded.total_coins", []),
        ("merge into users u using s on true when matched then update set total_coins = 1", ["write"]),
        ("merge into users u using s on true when not matched then insert (id, total_coins) values (1, 1)", ["write"]),
        ("merge into users u using s on true when matched then delete", ["write*"]),
        ("merge into orders using users on true when matched then update set total_coins = 1", []),
        ("delete from users where id = 1", ["write*"]),
        ("delete from orders using users", []),
        ("truncate orders, users", ["write*"]),
        ("copy users from stdin", ["write*"]),
        ("copy users (id, total_coins) from stdin", ["write"]),
        ("copy users to stdout", ["read*"]),
        ("select * from users", ["read*"]),
        ("select o.* from users u join orders o on true", []),
        ("select count(*) from users", []),
        ("select sum(total_coins) as total_coins from users for update", ["read"]),
        ("select total_coins from orders", []),
        ("with gone as (update users set total_coins = 0 returning id) select id from gone", ["write"]),
        ("create table users (id int, total_coins numeric)", ["definition"]),
        ("alter table users alter column total_coins set not null", ["definition"]),
        ("create index on users (total_coins)", ["definition"]),
        ("create view rich as select total_coins from users", ["read"]),
        ("create table copy_of as select total_coins from users", ["read"]),
        ("create rule r as on update to v do instead update users set total_coins = 1", ["write"]),
        ("do $x$ begin update users set total_coins = 0; end $x$", ["write"]),
        ("begin execute 'update users set total_coins = 0'; end", ["write"]),
        ("update {} set total_coins = 0", ["write?"]),
        ("update users set {} = 0", ["unknown*"]),
        ("total_coins > 5", []),
    ],
)
def test_a_statement_does_to_the_column_what_it_says(sql: str, found: list[str]) -> None:
    assert sorted(accesses(sql)) == sorted(found)


def test_a_fragment_may_leave_out_its_table() -> None:
    assert accesses("total_coins > 5", fragment=True) == ["read?"]


@pytest.mark.parametrize(("side", "found"), [("mapped", ["write"]), ("other", []), ("hole", ["write?"])])
def test_new_is_a_row_of_the_table_that_the_trigger_is_on(side: str, found: list[str]) -> None:
    body = "begin new.total_coins := 0; return new; end"
    touches = read_sql(body, USERS, row=side)  # type: ignore[arg-type]  # one of the three, as listed above
    assert [each.access + ("" if each.sure else "?") for each in touches] == found


def test_a_touch_is_told_at_the_offset_of_its_word() -> None:
    sql = "select 1;\nupdate users\nset total_coins = 0"
    assert [sql[each.offset :].split(maxsplit=1)[0] for each in read_sql(sql, USERS)] == ["total_coins"]
