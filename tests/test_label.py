"""The label: an update that carries one is posted by the fence, and no label makes a balance wrong."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from invariants import assert_sound
from ledger import ACT, execute, install_users, post, rows, scalar, unguarded
from walletmigrate import LegacyBalanceAdapter, StaticSource, functions
from walletmigrate.errors import AmountOverflow
from walletmigrate.fences import Mode, set_mode
from walletmigrate.flags import DUAL_WRITE
from walletmigrate.movements import Movement, prepare
from walletmigrate.postings import Calls

ADD_ONE = "update users set total_coins = total_coins + 1 where id = 1"


@pytest.fixture
def world(database_url: str) -> Place:
    return Place(database_url)


class Place:
    """Ten users, the first with an account, and an adapter that asks for dual-write."""

    def __init__(self, url: str, **table: Any) -> None:
        self.engine, self.settings = install_users(url, phase="dual_write", floor=Decimal(0), **table)
        self.adapter = LegacyBalanceAdapter(self.settings, StaticSource({DUAL_WRITE: True}))
        with self.engine.begin() as connection:
            post(connection, self.settings, "open_account", 1, 0)

    def label(
        self, amount: int | str, *, key: int = 1, dual: bool | None = True, idempotency_key: str | None = None
    ) -> str:
        """Of a credit; with an amount as text, what no adapter would say."""
        mapping = self.settings.mapping(None)
        movement = Movement.credit(key, 1, type="forged", idempotency_key=idempotency_key)
        request = prepare(movement, mapping, "integer", "of nobody").request
        return Calls("wallet", mapping).plain({**request, "dual": dual, "amount": amount})[-1]

    def state(self) -> tuple[object, ...]:
        query = (
            "select a.state::text, a.balance, u.total_coins from wallet.accounts as a "
            "inner join users as u on u.id::text = a.key where u.id = 1"
        )
        (found,) = rows(self.engine, query)
        return found


def write(world: Place, label: str, *statements: str) -> None:
    """One transaction of somebody who sets the label by himself."""
    with world.engine.begin() as connection:
        connection.execute(text("select set_config('walletmigrate.posting', :label, true)"), {"label": label})
        for statement in statements:
            connection.execute(text(statement))


def test_a_forged_label_that_fits_is_a_posting_and_no_wrong_balance(world: Place) -> None:
    write(world, world.label(1), ADD_ONE)
    assert world.state() == ("mirrored", 101, 101)
    assert scalar(world.engine, "select type from wallet.transactions order by id desc limit 1") == "forged"
    assert_sound(world.engine, world.settings)


@pytest.mark.parametrize("dual", [True, False, None])
def test_a_forged_label_that_does_not_fit_is_met_as_any_other_write(world: Place, dual: bool | None) -> None:
    write(world, world.label(2, dual=dual), ADD_ONE)
    assert world.state() == ("stale", 100, 101)
    assert_sound(world.engine, world.settings)


@pytest.mark.parametrize("dual", [True, False])
def test_a_label_that_does_not_fit_a_stale_account_uses_no_key_and_hides_no_write(world: Place, dual: bool) -> None:
    execute(world.engine, ADD_ONE)
    write(world, world.label(2, dual=dual, idempotency_key="k"), ADD_ONE)
    assert world.state() == ("stale", 100, 102)
    assert rows(world.engine, "select key from wallet.idempotency_keys") == []
    assert rows(world.engine, "select key, treatment from wallet.bypasses") == [("1", "turned_stale")]


def test_a_label_that_moves_nothing_uses_no_key(world: Place) -> None:
    execute(world.engine, ADD_ONE)
    write(world, world.label(0, dual=False, idempotency_key="k"), "update users set role = 'vip' where id = 1")
    assert rows(world.engine, "select key from wallet.idempotency_keys") == []


@pytest.mark.parametrize("idempotency_key", [None, "k"])
def test_a_label_for_dual_write_on_a_stale_account_fails_no_write(world: Place, idempotency_key: str | None) -> None:
    execute(world.engine, ADD_ONE)
    write(world, world.label(1, idempotency_key=idempotency_key), ADD_ONE)
    assert world.state() == ("stale", 100, 102)
    assert rows(world.engine, "select key from wallet.idempotency_keys") == []


def test_a_label_takes_no_other_account_of_the_same_balance(world: Place) -> None:
    with world.engine.begin() as connection:
        post(connection, world.settings, "open_account", 2, 0)
    execute(world.engine, ADD_ONE)
    execute(world.engine, ADD_ONE.replace("+ 1", "- 1"))
    write(world, world.label(1), ADD_ONE)
    assert rows(world.engine, "select key, state::text, balance from wallet.accounts order by key") == [
        ("1", "stale", 100),
        ("2", "mirrored", 100),
    ]


def test_a_label_with_more_decimals_than_the_ledger_is_no_posting(database_url: str) -> None:
    world = Place(database_url, coins_type="numeric")
    write(world, world.label("1.005"), ADD_ONE.replace("+ 1", "+ 1.005"))
    assert world.state() == ("stale", 100, Decimal("101.005"))
    assert_sound(world.engine, world.settings)


def test_a_label_for_one_column_hides_no_write_of_another(database_url: str) -> None:
    world = Place(database_url, with_promo=True)
    with world.engine.begin() as connection:
        post(connection, world.settings, "open_account", 1, 0, bucket="promo")
    write(world, world.label(1), ADD_ONE.replace("+ 1", "+ 1, promo = promo + 1"))
    assert rows(world.engine, "select bucket, state::text from wallet.accounts") == [
        ("cash", "stale"),
        ("promo", "stale"),
    ]
    assert_sound(world.engine, world.settings)


def test_a_label_for_a_key_that_the_row_takes_only_now_hides_no_row_that_goes(world: Place) -> None:
    with world.engine.begin() as connection:
        post(connection, world.settings, "open_account", 2, 0)
    with unguarded(world.engine, "users") as connection:
        connection.exec_driver_sql("delete from users where id = 2")
    write(world, world.label(1, key=2), ADD_ONE.replace("where", ", id = 2 where"))
    assert rows(world.engine, "select key, state::text from wallet.accounts order by key") == [
        ("1", "closed"),
        ("2", "stale"),
    ]


@pytest.mark.parametrize("dual", [False, None])
def test_a_label_that_does_not_ask_for_dual_write_does_not_leave_a_mirrored_account_behind(
    world: Place, dual: bool | None
) -> None:
    write(world, world.label(1, dual=dual), ADD_ONE)
    assert world.state() == ("stale", 100, 101)


@pytest.mark.parametrize("label", ['("users', '("users/cash/EUR/1","x",t,,,,,,,,)'])
def test_a_label_that_cannot_be_read_fails_the_write(world: Place, label: str) -> None:
    with pytest.raises(DBAPIError):
        write(world, label, ADD_ONE)
    assert world.state() == ("mirrored", 100, 100)


def test_what_is_no_label_is_met_as_any_other_write(world: Place) -> None:
    write(world, '{"users/cash/EUR/1","1",t}', ADD_ONE)
    assert world.state() == ("stale", 100, 101)


def test_a_label_for_another_row_does_not_hide_a_raw_write(world: Place) -> None:
    write(world, world.label(1, key=2), ADD_ONE)
    assert world.state() == ("stale", 100, 101)


def test_a_label_is_used_once(world: Place) -> None:
    write(world, world.label(1), ADD_ONE, ADD_ONE)
    assert world.state() == ("stale", 101, 102)


def test_a_label_does_not_move_money_twice_under_one_key(world: Place) -> None:
    write(world, world.label(1, idempotency_key="once"), ADD_ONE)
    with pytest.raises(DBAPIError):
        write(world, world.label(1, idempotency_key="once"), ADD_ONE)
    assert world.state() == ("mirrored", 101, 101)


def test_a_label_does_not_reach_below_the_floor(world: Place) -> None:
    write(world, world.label("-101"), "update users set total_coins = total_coins - 101 where id = 1")
    assert world.state() == ("stale", 100, -1)  # as anybody's UPDATE, which no floor binds; the ledger has none of it


def test_no_label_is_left_behind_a_posting_that_went_either_way(world: Place) -> None:
    with world.engine.begin() as connection:
        assert world.adapter.credit(connection, 1, 5, type="test").transaction_id
        assert connection.scalar(text("select current_setting('walletmigrate.posting', true)")) == ""
        assert world.adapter.credit(connection, 2, 5, type="test").transaction_id  # opens: the long way
        assert connection.scalar(text("select current_setting('walletmigrate.posting', true)")) == ""
        connection.execute(text(ADD_ONE))
    assert world.state() == ("stale", 105, 106)


@pytest.mark.parametrize("name", ["a_first", "z_last"])
@pytest.mark.parametrize("bonus", ["promo = promo + 1", "total_coins = total_coins - 2"])
@pytest.mark.parametrize(("mode", "dual"), [("stale", True), ("reject", True), ("reject", False)])
def test_a_trigger_that_catches_errors_loses_no_write_of_its_own_to_the_short_way(
    database_url: str, bonus: str, name: str, mode: Mode, dual: bool
) -> None:
    """Whatever it writes under the label of the posting, it writes as it would without an adapter."""
    engine, settings = install_users(database_url, phase="dual_write", with_promo=True)
    set_mode(engine, settings, settings.mapping(None), mode, ACT)
    execute(
        engine,
        "create function bonus() returns trigger language plpgsql as $$ begin "
        f"if new.total_coins > old.total_coins then begin update users set {bonus} where id = new.id; "
        "exception when others then raise warning 'lost: %', sqlerrm; end; end if; return null; end $$",
    )
    execute(engine, f"create trigger {name} after update on users for each row execute function bonus()")
    execute(engine, "update users set total_coins = total_coins + 10 where id = 2")
    with engine.begin() as connection:
        if dual:  # else absent: the short way writes legacy alone
            post(connection, settings, "open_account", 1, 0)
        post(connection, settings, "open_account", 1, 0, bucket="promo")
        LegacyBalanceAdapter(settings, StaticSource({DUAL_WRITE: dual})).credit(connection, 1, 10, type="test")
    bare, posted = rows(engine, "select total_coins, promo from users where id in (1, 2) order by id desc")
    assert posted == bare
    assert_sound(engine, settings)


@pytest.mark.parametrize(
    ("operation", "after", "kept"),
    [("credit", 105, [None, None, 105, None]), ("debit", 95, [95, None, None, None])],
)
def test_a_posting_with_the_flag_off_moves_money_once_and_is_replayed_as_it_was(
    world: Place, operation: str, after: int, kept: list[int | None]
) -> None:
    adapter = LegacyBalanceAdapter(world.settings, StaticSource({}))
    for replayed in (False, True):
        with world.engine.begin() as connection:
            done = getattr(adapter, operation)(connection, 3, 5, type="test", idempotency_key="k")
        assert (done.replayed, done.mode, done.legacy_balance, done.ledger_balance) == (replayed, "legacy", after, None)
        execute(world.engine, "update users set total_coins = total_coins + 1 where id = 3")
    assert scalar(world.engine, "select total_coins from users where id = 3") == after + 2
    assert scalar(world.engine, "select balances from wallet.idempotency_keys") == kept


def test_an_error_of_an_application_s_trigger_reaches_the_caller_and_nothing_is_written(world: Place) -> None:
    execute(
        world.engine,
        "create function closed() returns trigger language plpgsql as "
        "$$ begin raise exception 'closed on Sundays' using errcode = 'AP001'; end $$",
    )
    execute(world.engine, "create trigger closed after update on users for each row execute function closed()")
    with world.engine.begin() as connection:
        with pytest.raises(DBAPIError) as raised, connection.begin_nested():
            world.adapter.credit(connection, 1, 5, type="test", idempotency_key="k")
        assert getattr(raised.value.orig, "sqlstate", "") == "AP001"
        assert connection.scalar(text("select current_setting('walletmigrate.posting', true)")) in ("", None)
    assert world.state() == ("mirrored", 100, 100)
    assert rows(world.engine, "select key from wallet.idempotency_keys") == []


@pytest.mark.parametrize("state", ["40001", "40P01", "55P03"])
def test_what_can_be_retried_in_the_short_way_reaches_the_caller_and_is_not_tried_the_long_way(
    world: Place, state: str
) -> None:
    """The trigger fails once: a second try within the call would hide it."""
    execute(world.engine, "create sequence fired")
    execute(
        world.engine,
        "create function busy() returns trigger language plpgsql as $$ begin if nextval('fired') = 1 then "
        f"raise exception 'busy' using errcode = '{state}'; end if; return null; end $$",
    )
    execute(world.engine, "create trigger busy after update on users for each row execute function busy()")
    with world.engine.connect() as connection:
        with pytest.raises(DBAPIError) as raised:
            world.adapter.credit(connection, 1, 5, type="test")
        connection.rollback()
    assert getattr(raised.value.orig, "sqlstate", "") == state
    assert world.state() == ("mirrored", 100, 100)


@pytest.mark.parametrize("name", ["a_first", "z_last"])
@pytest.mark.parametrize("dual", [True, False])
def test_a_trigger_that_takes_the_label_away_by_posting_itself_makes_no_key_move_money_twice(
    world: Place, dual: bool, name: str
) -> None:
    """It fires before the fence, or after it; the posting then goes the long way."""
    (posting,) = Calls("wallet", world.settings.mapping(None)).plain(
        prepare(Movement.credit(10, 1, type="bonus"), world.settings.mapping(None), "integer", "b").request
        | {"dual": True}
    )[-1:]
    fingerprint, policy = functions.fingerprint(world.settings.mapping(None)), world.settings.mapping(None).policy
    execute(
        world.engine,
        "create function bonus() returns trigger language plpgsql as $$ begin if new.id = 1 then "
        f"perform wallet.plain_users('{fingerprint}', '{policy}', 10, 'cash', 'EUR', 1, $label${posting}$label$); "
        "end if; return null; end $$",
    )
    execute(world.engine, f"create trigger {name} after update on users for each row execute function bonus()")
    adapter = LegacyBalanceAdapter(world.settings, StaticSource({DUAL_WRITE: dual}))
    for replayed in (False, True):
        with world.engine.begin() as connection:
            done = adapter.credit(connection, 1, 5, type="test", idempotency_key="once")
        assert done.replayed is replayed
        assert (done.transaction_id is not None) is dual
    assert world.state() == ("mirrored" if dual else "stale", 105 if dual else 100, 105)
    assert scalar(world.engine, "select total_coins from users where id = 10") == 101
    assert_sound(world.engine, world.settings)


@pytest.mark.parametrize(
    ("coins_type", "most"),
    [("numeric", Decimal("9" * 30 + ".99")), ("double precision", Decimal("9999999999999.99"))],
)
def test_the_short_way_keeps_the_column_s_limit_as_the_long_way_does(
    database_url: str, coins_type: str, most: Decimal
) -> None:
    engine, settings = install_users(
        database_url, phase="dual_write", coins_type=coins_type, coins=f"'{most}'::numeric - 7"
    )
    adapter = LegacyBalanceAdapter(settings, StaticSource({DUAL_WRITE: True}))
    with engine.begin() as connection:
        post(connection, settings, "open_account", 1, 0)
        assert adapter.credit(connection, 1, 7, type="test").ledger_balance == most
        for description in (None, "the long way"):
            with pytest.raises(AmountOverflow):
                adapter.credit(connection, 1, 1, type="test", description=description)
    assert_sound(engine, settings)


@pytest.mark.parametrize("words", ['"', "\\", '{a,"b"}', "NULL", "a\nb", '\\\\"', "ünï", "%s :x $1"])
def test_every_text_comes_into_the_ledger_as_it_was_said(world: Place, words: str) -> None:
    with world.engine.begin() as connection:
        world.adapter.credit(
            connection,
            1,
            5,
            type=words,
            reference=(words, words),
            idempotency_key=words,
            correlation_id=words,
            actor=words,
            reason=words,
        )
    query = (
        "select type, reference_type, reference_id, correlation_id, actor, reason, "
        "(select key from wallet.idempotency_keys) from wallet.transactions order by id desc limit 1"
    )
    assert rows(world.engine, query) == [(words,) * 7]


def test_where_the_application_s_role_was_renamed_a_posting_goes_the_long_way(world: Place) -> None:
    with world.engine.connect() as connection:
        connection.execute(text("alter role wallet_app rename to wallet_app_before"))
        connection.execute(text("update users set total_coins = total_coins + 1 where id = 2"))
        assert world.adapter.credit(connection, 1, 5, type="test").mode == "dual_write"
        found = connection.execute(text("select key, state::text, balance from wallet.accounts")).all()
        connection.rollback()
    assert [tuple(row) for row in found] == [("1", "mirrored", 105)]


def test_the_ceiling_follows_the_phase_when_its_step_commits_and_not_before(world: Place) -> None:
    ceiling = "select last_value from wallet.ceiling"
    assert scalar(world.engine, ceiling) == 2
    with world.engine.connect() as connection:
        connection.execute(text("update wallet.control set phase = 'legacy'"))
        assert scalar(world.engine, ceiling) == 2
        connection.rollback()
    assert scalar(world.engine, ceiling) == 2
    execute(world.engine, "update wallet.control set phase = 'legacy'")
    assert scalar(world.engine, ceiling) == 1
    with world.engine.begin() as connection:
        assert world.adapter.credit(connection, 1, 5, type="test").mode == "legacy"
    assert world.state() == ("stale", 100, 105)


def test_a_stopped_line_holds_the_short_way_too_at_the_next_statement_of_an_old_snapshot(world: Place) -> None:
    with world.engine.connect().execution_options(isolation_level="REPEATABLE READ") as connection:
        connection.execute(text("select 1 from users limit 1"))
        execute(world.engine, "select wallet.set_line(false)")
        assert world.adapter.credit(connection, 1, 5, type="test").mode == "legacy"
        connection.commit()
    assert world.state() == ("stale", 100, 105)
