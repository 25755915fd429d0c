"""The fence taken down, or replaced by one that looks the same: what comes meanwhile is not frozen."""

from __future__ import annotations

import pytest
from sqlalchemy.engine.interfaces import IsolationLevel

import interleaving
from interleaving import LEVELS
from ledger import ACT, execute, install_users, rows, scalar, set_phase
from torture_steps import adapters
from walletmigrate import fences
from walletmigrate.errors import PreconditionRefused, UnknownAccount
from walletmigrate.freeze import freeze
from walletmigrate.install import install

DOWN = {
    "disabled": ("alter table users disable trigger {0}", "alter table users enable always trigger {0}"),
    "removed": ("drop trigger {0} on users", ""),
    "replaced": ("drop trigger {0} on users", "{1}; alter table users enable always trigger {0}"),
}
"""How the trigger {0}, which was made by {1}, goes and comes again."""


@pytest.mark.parametrize("isolation", LEVELS, ids=lambda level: level.replace(" ", "_").lower())
@pytest.mark.parametrize("way", DOWN)
def test_what_was_written_while_the_fence_was_down_is_not_frozen_and_not_read(
    database_url: str, isolation: IsolationLevel, way: str
) -> None:
    engine, settings = install_users(database_url, rows=4, phase="dual_write")
    execute(engine, "select * from wallet.backfill_users(null, null, null)")
    adapter, mapping = adapters(settings)["on"], settings.mapping(None)
    name = "walletmigrate_users_update"
    made = scalar(engine, f"select pg_get_triggerdef(oid) from pg_trigger where tgname = '{name}'")
    down, up = (each.format(name, made) for each in DOWN[way])
    raw = "update users set total_coins = total_coins + 7 where id = {}"
    with interleaving.stage(database_url) as stage:
        writer, undecided, operator = stage.session(isolation), stage.session(isolation), stage.session()
        late = stage.session(isolation)
        writer.sql(raw.format(1))
        undecided.sql(raw.format(4))
        late.look()
        waiting = operator.waiting(lambda c: c.exec_driver_sql(down), on=writer)  # writers in flight meet the fence
        writer.commit()
        operator.until_blocked(waiting, by=undecided)
        undecided.rollback()
        waiting.result(interleaving.PATIENCE_SECONDS)
        operator.commit()
        late.sql(raw.format(2))
        late.commit()
        if up:
            operator.do(lambda connection: connection.exec_driver_sql(up))
            operator.commit()
    set_phase(engine, "frozen")
    with pytest.raises(PreconditionRefused, match=name):
        freeze(engine, settings, mapping, ACT)
    install(engine, settings, ACT)
    done = freeze(engine, settings, mapping, ACT)
    assert (done.changed, done.refused) == (2, 2)
    with engine.begin() as connection:
        assert adapters(settings)["read"].balance(connection, 2).amount == 107
        assert adapter.credit(connection, 2, 10, type="test").legacy_balance == 117
        found = connection.exec_driver_sql("select key, state::text from wallet.accounts order by key").all()
    assert [tuple(row) for row in found] == [("1", "stale"), ("2", "stale"), ("3", "frozen"), ("4", "frozen")]


WHILE_DOWN = {
    "raw": "update users set total_coins = total_coins + 7 where id = {0}",
    "insert": "insert into users (id, tenant, role, total_coins) values ({0} + 100, 'acme', 'member', 3)",
    "delete": "delete from users where id = {0}",
    "reinsert": "with gone as (delete from users where id = {0}) select 1",
    "key": "update users set id = {0} + 200 where id = {0}",
}
"""What is written past the adapter while nothing looks, of row {0}."""


@pytest.mark.parametrize("mode", fences.MODES)
@pytest.mark.parametrize("way", DOWN)
def test_whatever_comes_while_the_fence_is_down_a_freeze_takes_no_wrong_balance(
    database_url: str, way: str, mode: fences.Mode
) -> None:
    engine, settings = install_users(database_url, rows=20, phase="dual_write")
    execute(engine, "select * from wallet.backfill_users(null, null, null)")
    mapping = settings.mapping(None)
    fences.set_mode(engine, settings, mapping, mode, ACT)
    adapter = adapters(settings)["on"]
    names = [f"walletmigrate_users_{what}" for what in ("insert", "update", "delete")]
    ups = []
    for name in names:
        made = scalar(engine, f"select pg_get_triggerdef(oid) from pg_trigger where tgname = '{name}'")
        execute(engine, DOWN[way][0].format(name))
        ups.append(DOWN[way][1].format(name, made))
    with engine.begin() as connection:
        for row, statement in enumerate(WHILE_DOWN.values(), start=1):
            connection.exec_driver_sql(statement.format(row))
        connection.exec_driver_sql("insert into users (id, tenant, role, total_coins) values (4, 'acme', 'member', 9)")
        adapter.credit(connection, 6, 10, type="test")
        adapter.transfer(connection, 7, 8, 10, type="test")
        connection.exec_driver_sql(WHILE_DOWN["raw"].format(9))
        adapter.credit(connection, 9, 10, type="test")
    execute(engine, "select * from wallet.backfill_users('10', '12', null)")
    for up in filter(None, ups):
        execute(engine, up)
    set_phase(engine, "frozen")
    with pytest.raises(PreconditionRefused, match="walletmigrate_users"):
        freeze(engine, settings, mapping, ACT)
    install(engine, settings, ACT)
    assert freeze(engine, settings, mapping, ACT).refused == 7
    frozen = {
        key: (balance, coins)
        for key, balance, coins in rows(
            engine,
            "select a.key, a.balance, u.total_coins from wallet.accounts as a "
            "left join users as u on u.id::text = a.key where a.state = 'frozen'",
        )
    }
    assert set(frozen) == {"2", "6", "7", "8", *map(str, range(10, 21))}
    assert [one for one in frozen.values() if one[0] != one[1]] == []
    with engine.begin() as connection:
        read = adapters(settings)["read"].balances(connection, [1, 4, 9, 102, 205])
        assert {key: one.amount for key, one in read.items()} == {1: 107, 4: 9, 9: 117, 102: 3, 205: 100}
        with pytest.raises(UnknownAccount):
            adapters(settings)["read"].balance(connection, 3)
