"""What bounds the fence's modes: the line, the phase, a ledger that cannot be written, rows that go as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from decimal import Decimal

import pytest
from sqlalchemy import Connection, text, update
from sqlalchemy.engine.interfaces import IsolationLevel
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

import adapting
import interleaving
from adapting import User
from capturing import ADD, REJECTED, Place
from interleaving import LEVELS, READ_COMMITTED, Stage, of, outcome
from invariants import assert_sound
from ledger import ACT, execute, post, rows, scalar, set_phase, users_settings
from walletmigrate import LegacyBalanceAdapter, StaticSource, fences, line
from walletmigrate.flags import DUAL_WRITE
from walletmigrate.install import install
from watching import unrouted

D = Decimal
DELETE = "delete from users where id = 1"
NEWEST = "select coalesce(max(id), 0) from wallet.transactions"
each_level = pytest.mark.parametrize("isolation", LEVELS, ids=lambda level: level.replace(" ", "_").lower())


@pytest.fixture
def place(database_url: str) -> Place:
    return Place(database_url)


@pytest.fixture
def sessions(place: Place) -> Iterator[Stage]:
    with interleaving.stage(place.engine.url.render_as_string(hide_password=False)) as made:
        yield made


def adapter(place: Place) -> LegacyBalanceAdapter:
    return LegacyBalanceAdapter(place.settings, StaticSource({DUAL_WRITE: True}))


def credit(place: Place, key: int = 1) -> Callable[[Connection], object]:
    return lambda connection: adapter(place).credit(connection, key, 10, type="test")


# The line


@each_level
@pytest.mark.parametrize(("statement", "after"), [(ADD, ("stale", 100, 105)), (DELETE, ("closed", 100, None))])
def test_mirror_writes_nothing_into_the_ledger_while_the_line_is_stopped(
    place: Place, sessions: Stage, isolation: IsolationLevel, statement: str, after: tuple[object, ...]
) -> None:
    place.mode("mirror")
    old = sessions.session(isolation)
    old.look()
    newest = scalar(place.engine, NEWEST)
    line.stop(place.engine, place.settings, ACT)
    assert line.wait(place.engine, place.settings, timeout=0) == ()
    old.sql(statement)
    old.commit()
    assert (scalar(place.engine, NEWEST), place.state()) == (newest, after)
    assert_sound(place.engine, place.settings)


@each_level
def test_a_write_that_mirror_followed_is_waited_for_like_any_posting_in_flight(
    place: Place, sessions: Stage, isolation: IsolationLevel
) -> None:
    place.mode("mirror")
    raw, bystander = sessions.session(isolation), sessions.session(isolation)
    raw.sql(ADD)
    bystander.sql("update users set total_coins = total_coins + 5 where id = 2")  # stale: nothing is posted
    line.stop(place.engine, place.settings, ACT)
    (left,) = line.wait(place.engine, place.settings, timeout=0)
    assert left.pid == raw.pid
    bystander.commit()
    raw.sql(ADD)
    raw.commit()
    assert line.wait(place.engine, place.settings, timeout=0) == ()
    assert place.state() == ("stale", 105, 110), "the first write before the stop, the second one after"
    line.resume(place.engine, place.settings, ACT)
    execute(place.engine, "select * from wallet.backfill_users(null, null, null)")
    assert place.write(ADD) == ""
    assert place.state() == ("mirrored", 115, 115)


@pytest.mark.parametrize("statement", [ADD, DELETE])
def test_reject_refuses_also_while_the_line_is_stopped(place: Place, statement: str) -> None:
    place.mode("reject")
    line.stop(place.engine, place.settings, ACT)
    assert place.write(statement) == REJECTED
    assert place.state() == ("mirrored", 100, 100)


# The phase


@pytest.mark.parametrize("mode", ["mirror", "reject"])
@pytest.mark.parametrize(
    ("statement", "after"),
    [(ADD, ("stale", 100, 105)), (DELETE, ("closed", 100, None)), ("truncate users", ("closed", 100, None))],
)
def test_back_in_phase_legacy_every_mode_is_stale_until_the_phase_is_left_again(
    place: Place, mode: fences.Mode, statement: str, after: tuple[object, ...]
) -> None:
    place.mode(mode)
    set_phase(place.engine, "legacy")
    newest = scalar(place.engine, NEWEST)
    assert place.write(statement) == ""
    assert (scalar(place.engine, NEWEST), place.state(), place.rejected()) == (newest, after, 0)
    set_phase(place.engine, "dual_write")
    execute(place.engine, "insert into users values (11, 'acme', 'member', 100, 0)")
    with place.engine.begin() as connection:
        adapter(place).open_account(connection, 11)
    wrote = place.write("update users set total_coins = total_coins + 5 where id = 11")
    assert (wrote, place.state(11)) == (
        ("", ("mirrored", 105, 105)) if mode == "mirror" else (REJECTED, ("mirrored", 100, 100))
    )


# Rows that go


def test_reject_refuses_a_truncate_that_would_take_money_along_and_counts_it(place: Place) -> None:
    place.mode("reject")
    assert place.write("truncate users") == REJECTED
    assert (place.state(), place.rejected()) == (("mirrored", 100, 100), 1)


@pytest.mark.parametrize("statement", [DELETE, "update users set id = 77 where id = 1", "delete from users"])
def test_reject_lets_a_row_go_whose_balance_the_adapter_has_taken_to_zero(place: Place, statement: str) -> None:
    place.mode("reject")
    with place.engine.begin() as connection:
        adapter(place).debit(connection, 1, 100, type="payout")
    assert place.write(statement) == ""
    assert place.state() == ("closed", 0, None)
    assert place.rejected() == 0


def test_reject_lets_a_truncate_pass_that_takes_no_mirrored_money_along(place: Place) -> None:
    place.mode("reject")
    with place.engine.begin() as connection:
        adapter(place).debit(connection, 1, 100, type="payout")
    assert place.write("truncate users") == ""
    assert place.state() == ("closed", 0, None)


# A ledger that cannot be written


@pytest.fixture
def broken(place: Place) -> Place:
    place.mode("mirror")
    execute(
        place.engine,
        "create function broken() returns trigger language plpgsql as "
        "$$ begin raise exception 'out of order' using errcode = current_setting('test.code'); end $$",
    )
    execute(
        place.engine,
        "create trigger broken before insert on wallet.transactions for each row "
        "when (new.type = 'bypass') execute function broken()",
    )
    return place


@pytest.mark.parametrize(("statement", "after"), [(ADD, ("stale", 100, 105)), (DELETE, ("closed", 100, None))])
def test_a_write_that_mirror_cannot_follow_is_not_lost_and_the_failure_is_recorded(
    broken: Place, statement: str, after: tuple[object, ...]
) -> None:
    assert broken.write("set local test.code = '23514'", statement) == ""
    assert broken.state() == after
    found = rows(broken.engine, "select mapping, key, bucket, operation, sqlstate, message from wallet.failures")
    assert found == [("users", "1", "cash", "bypass", "23514", "out of order")]
    assert_sound(broken.engine, broken.settings)


@pytest.mark.parametrize("code", ["40001", "40P01", "55P03"])
def test_what_can_be_tried_again_reaches_the_writer_whom_mirror_follows(broken: Place, code: str) -> None:
    assert broken.write(f"set local test.code = '{code}'", ADD) == code
    assert broken.state() == ("mirrored", 100, 100)
    assert rows(broken.engine, "select * from wallet.failures") == []


# Values, and several columns


@pytest.mark.parametrize("value", ["100.001", "'Infinity'", "'NaN'", "null"])
@pytest.mark.parametrize("isolation", ["rc", "rr"])
def test_mirror_follows_what_the_ledger_can_hold_and_takes_the_rest_for_stale(
    database_url: str, value: str, isolation: str
) -> None:
    at = adapting.place(database_url, coins_type="numeric")
    with at.engine.begin() as connection:
        at.adapter.open_account(connection, 1)
    fences.set_mode(at.engine, at.settings, at.mapping, "mirror", ACT)
    level: IsolationLevel = "READ COMMITTED" if isolation == "rc" else "REPEATABLE READ"
    with at.engine.connect().execution_options(isolation_level=level) as connection:
        connection.execute(text(f"update users set total_coins = {value} where id = 1"))
        connection.commit()
        assert at.account(1) == ("stale", D(100))
        connection.execute(text("update users set total_coins = 7 where id = 1"))
        connection.commit()
    assert at.account(1) == ("stale", D(100)), "a stale account is brought up by a resync, not by a raw write"
    at.check()


def test_each_column_of_a_row_is_treated_by_its_own_account(database_url: str) -> None:
    place = Place(database_url, with_promo=True)
    with place.engine.begin() as connection:
        post(connection, place.settings, "open_account", 1, 0, bucket="promo")
    place.mode("mirror")
    assert place.write("update users set total_coins = 'NaN', promo = promo + 2 where id = 1") == ""
    assert place.write("update users set total_coins = 3, promo = promo + 2 where id = 1") == ""
    query = "select bucket, state::text, balance from wallet.accounts where key = '1' order by 1"
    assert rows(place.engine, query) == [("cash", "stale", 100), ("promo", "mirrored", 9)]
    place.mode("reject")
    assert place.write("update users set total_coins = 4 where id = 1") == ""
    assert place.write("update users set total_coins = 5, promo = 0 where id = 1") == REJECTED
    assert_sound(place.engine, place.settings)


# The adapter's own writes, and an application's triggers


@pytest.mark.parametrize("mode", ["mirror", "reject"])
def test_the_adapter_with_dual_write_off_turns_the_account_stale_in_every_mode(place: Place, mode: fences.Mode) -> None:
    place.mode(mode)
    off = LegacyBalanceAdapter(place.settings, StaticSource({DUAL_WRITE: False}))
    with place.engine.begin() as connection:
        assert off.credit(connection, 1, 5, type="test").mode == "legacy"
    assert place.state() == ("stale", 100, 105)
    assert place.catalogued() == []


def on_each_credit(place: Place, body: str) -> None:
    """A trigger behind the fence that does something more for each update of user 1."""
    made = place.write(
        "create function app() returns trigger language plpgsql as "
        f"$$ begin if new.id = 1 and pg_trigger_depth() = 1 then {body} end if; return null; end $$",
        "create trigger z_last after update on users for each row execute function app()",
    )
    assert made == ""


@pytest.mark.parametrize("words", ["", "goes the long way"])
def test_an_application_s_trigger_that_writes_another_row_is_rejected_with_the_posting_and_counted_once(
    place: Place, words: str
) -> None:
    with place.engine.begin() as connection:
        adapter(place).open_account(connection, 3)
    place.mode("reject")
    on_each_credit(place, "update users set total_coins = total_coins + 1 where id = 3;")
    with pytest.raises(DBAPIError) as raised, place.engine.begin() as connection:
        adapter(place).credit(connection, 1, 5, type="test", description=words or None)
    assert getattr(raised.value.orig, "sqlstate", "") == REJECTED
    assert (place.state(1), place.state(3)) == (("mirrored", 100, 100), ("mirrored", 100, 100))
    assert place.rejected() == 1


@pytest.mark.parametrize("mode", ["stale", "reject"])
def test_a_posting_whose_row_a_trigger_writes_once_more_goes_through_and_nothing_counts_as_rejected(
    place: Place, mode: fences.Mode
) -> None:
    place.mode(mode)
    on_each_credit(place, "update users set total_coins = total_coins + 1 where id = 1;")
    with place.engine.begin() as connection:
        adapter(place).credit(connection, 1, 5, type="test")
    assert (place.state()[0], place.state()[2]) == ("stale", 106)
    assert place.rejected() == 0


# A change of mode while writes are in flight


@pytest.mark.parametrize(
    ("before", "after", "end"),
    [
        ("stale", "mirror", ("mirrored", 105, 105)),
        ("stale", "reject", REJECTED),
        ("mirror", "stale", ("stale", 100, 105)),
        ("reject", "mirror", ("mirrored", 105, 105)),
    ],
)
@each_level
def test_a_write_that_waits_for_its_row_meets_the_mode_that_is_in_force_when_it_goes_on(
    place: Place,
    sessions: Stage,
    isolation: IsolationLevel,
    before: fences.Mode,
    after: fences.Mode,
    end: object,
) -> None:
    place.mode(before)
    holder, raw = sessions.session(), sessions.session(isolation)
    holder.sql("select from users where id = 1 for update")
    waiting = raw.waiting(lambda connection: connection.exec_driver_sql(ADD).rowcount, on=holder)
    place.mode(after)  # waits for nobody
    holder.rollback()
    if of(waiting) == REJECTED:
        raw.rollback()
        assert end == REJECTED
    else:
        raw.commit()
        assert place.state() == end
    assert_sound(place.engine, place.settings)


@each_level
def test_a_transaction_meets_each_mode_that_comes_into_force_while_it_runs(
    place: Place, sessions: Stage, isolation: IsolationLevel
) -> None:
    raw = sessions.session(isolation)
    place.mode("mirror")
    raw.sql(ADD)
    place.mode("reject")
    raw.sql("savepoint s")
    assert outcome(lambda: raw.sql(ADD)) == REJECTED
    raw.sql("rollback to savepoint s")
    place.mode("stale")
    raw.sql(ADD)
    raw.commit()
    assert place.state() == ("stale", 105, 110)
    assert_sound(place.engine, place.settings)


@each_level
def test_a_raw_write_after_a_posting_and_one_after_a_savepoint_are_treated_by_the_mode(
    place: Place, sessions: Stage, isolation: IsolationLevel
) -> None:
    place.mode("mirror")
    one = sessions.session(isolation)
    one.do(credit(place))
    one.sql(ADD)
    one.sql("savepoint s")
    one.do(credit(place))
    one.sql("rollback to savepoint s")
    one.sql(ADD)
    one.commit()
    assert place.state() == ("mirrored", 120, 120)
    place.mode("reject")
    one.do(credit(place))
    one.sql("savepoint s")
    assert outcome(lambda: one.sql(ADD)) == REJECTED
    one.sql("rollback to savepoint s")
    one.do(credit(place))
    one.commit()
    assert place.state() == ("mirrored", 140, 140)
    assert_sound(place.engine, place.settings)


# Watched attributes: what could not be routed


@pytest.fixture
def watched(database_url: str) -> Iterator[adapting.Place]:
    made = adapting.place(database_url, rows=3)
    with made.engine.begin() as connection:
        made.adapter.open_account(connection, 1)
    with made.adapter.watch(User.total_coins):
        yield made


UNROUTED = update(User).where(User.id == 1).values(total_coins=User.total_coins * 2)


def committed(session: Session, write: Callable[[], object]) -> object:
    """Write and commit; the SQLSTATE where that failed."""

    def work() -> None:
        write()
        session.commit()

    return outcome(work)


def test_an_unrouted_write_is_followed_by_mirror_and_told_all_the_same(watched: adapting.Place) -> None:
    fences.set_mode(watched.engine, watched.settings, watched.mapping, "mirror", ACT)
    with Session(watched.engine) as session:
        session.get_one(User, 1).total_coins = User.total_coins * 2
        session.commit()
        session.execute(UNROUTED)
        session.commit()
        session.get_one(User, 1).total_coins += 1
        session.commit()
    assert watched.account(1) == ("mirrored", D(401))
    assert [where for where, _ in unrouted(watched)] == ["flush", "update"]
    watched.check()


def test_an_unrouted_write_is_rejected_with_its_transaction_and_not_told_as_written(watched: adapting.Place) -> None:
    fences.set_mode(watched.engine, watched.settings, watched.mapping, "reject", ACT)
    with Session(watched.engine) as session:
        for write in (
            lambda: setattr(session.get_one(User, 1), "total_coins", User.total_coins * 2),
            lambda: session.execute(UNROUTED),
            lambda: session.delete(session.get_one(User, 1)),
        ):
            session.get_one(User, 2).total_coins += 1
            assert committed(session, write) == REJECTED
            session.rollback()
        session.get_one(User, 1).total_coins += 1
        session.execute(update(User).where(User.id == 1).values(total_coins=User.total_coins + 1))
        session.commit()
    assert (watched.account(1), watched.account(2), unrouted(watched)) == (("mirrored", D(102)), None, [])
    watched.check()


def test_a_watched_attribute_can_be_taken_to_zero_and_its_object_deleted_in_one_flush_or_two(
    watched: adapting.Place,
) -> None:
    fences.set_mode(watched.engine, watched.settings, watched.mapping, "reject", ACT)
    with Session(watched.engine) as session:
        user = session.get_one(User, 1)
        user.total_coins = D(0)
        session.flush()
        session.delete(user)
        session.commit()
    assert watched.account(1) == ("closed", D(0))


def test_a_raw_write_in_a_watched_flush_waits_like_any_other_and_is_followed(
    watched: adapting.Place,
) -> None:
    """The flush holds the row from its posting on: a raw writer comes before it or after it, never between."""
    fences.set_mode(watched.engine, watched.settings, watched.mapping, "mirror", ACT)
    with interleaving.stage(watched.engine.url.render_as_string(hide_password=False)) as sessions:
        raw = sessions.session(READ_COMMITTED)
        with Session(watched.engine) as session:
            session.get_one(User, 1).total_coins += 10
            session.flush()
            waiting = raw.waiting(lambda connection: connection.exec_driver_sql(ADD).rowcount)
            session.commit()
        assert of(waiting) == 1
        raw.commit()
    assert watched.account(1) == ("mirrored", D(115))
    watched.check()


# Who else makes the functions anew


def test_install_with_another_column_keeps_mode_and_bounds(place: Place) -> None:
    place.mode("mirror")
    more = users_settings(place.engine.url.render_as_string(hide_password=False), with_promo=True)
    install(place.engine, more, ACT)
    line.stop(place.engine, more, ACT)
    assert place.write(ADD) == ""
    assert place.state() == ("stale", 100, 105)
