"""The fence's modes: what becomes of a mirrored account that is written past the adapter."""

from __future__ import annotations

from decimal import Decimal

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from capturing import ADD, REJECTED, Place
from invariants import assert_sound
from ledger import ACT, execute, install_users, post, rows, scalar, set_phase
from walletmigrate import LegacyBalanceAdapter, StaticSource, fences
from walletmigrate.errors import PreconditionRefused, UsageError
from walletmigrate.flags import DUAL_WRITE
from walletmigrate.install import install


@pytest.fixture
def place(database_url: str) -> Place:
    return Place(database_url)


def test_mirror_follows_the_row_by_a_transaction(place: Place) -> None:
    place.mode("mirror")
    assert place.write(ADD, name="nightly") == ""
    assert place.state() == ("mirrored", 105, 105)
    ((kind, of_type, amount, reason),) = rows(
        place.engine, "select kind::text, type, amount, reason from wallet.transactions order by id desc limit 1"
    )
    assert (kind, of_type, amount, reason) == ("resync", "bypass", 5, "written past the adapter by nightly")
    assert place.catalogued() == [("update", "1", "total_coins", "mirrored", 100, 105)]
    assert_sound(place.engine, place.settings)


def test_mirror_follows_downwards_and_below_zero(place: Place) -> None:
    place.mode("mirror")
    assert place.write("update users set total_coins = -3 where id = 1") == ""
    assert place.state() == ("mirrored", -3, -3)
    assert_sound(place.engine, place.settings)


def test_mirror_follows_several_writes_of_one_transaction_and_a_savepoint(place: Place) -> None:
    place.mode("mirror")
    assert place.write(ADD, "savepoint s", ADD, "rollback to savepoint s", ADD, ADD) == ""
    assert place.state() == ("mirrored", 115, 115)
    assert_sound(place.engine, place.settings)


def test_mirror_acts_on_the_row_as_it_is_now_when_triggers_write_it_out_of_order(place: Place) -> None:
    place.mode("mirror")
    body = (
        "begin if pg_trigger_depth() = 1 then update users set total_coins = total_coins + 1 where id = new.id; "
        "end if; return null; end"
    )
    made = place.write(
        f"create function app() returns trigger language plpgsql as $$ {body} $$",
        "create trigger a_first after update on users for each row execute function app()",
        "create trigger z_last after update on users for each row execute function app()",
    )
    assert made == ""
    assert place.write(ADD) == ""
    assert place.state() == ("mirrored", 107, 107)
    assert_sound(place.engine, place.settings)


@pytest.mark.parametrize("value", ["'NaN'", "null"])
def test_mirror_turns_an_account_stale_that_it_cannot_follow(place: Place, value: str) -> None:
    place.mode("mirror")
    assert place.write(f"update users set total_coins = {value} where id = 1") == ""
    assert place.state()[0] == "stale"


def test_mirror_does_not_follow_beyond_the_ledger_s_thirty_digits(database_url: str) -> None:
    engine, settings = install_users(database_url, phase="dual_write", coins_type="numeric")
    with engine.begin() as connection:
        post(connection, settings, "open_account", 1, 0)
    fences.set_mode(engine, settings, settings.mapping(None), "mirror", ACT)
    for value, state in (("1e30 - 0.01", "mirrored"), ("1e30", "stale")):
        execute(engine, f"update users set total_coins = {value} where id = 1")
        assert rows(engine, "select state::text, balance from wallet.accounts") == [(state, Decimal("9" * 30 + ".99"))]


def test_mirror_takes_a_deleted_row_to_zero_and_closes_it(place: Place) -> None:
    place.mode("mirror")
    assert place.write("delete from users where id = 1") == ""
    assert place.state() == ("closed", 0, None)
    assert_sound(place.engine, place.settings)


def test_mirror_does_not_revive_what_is_stale_or_closed(place: Place) -> None:
    place.mode("mirror")
    assert place.write("update users set total_coins = total_coins + 5 where id = 2") == ""
    assert place.state(2) == ("stale", 100, 106)
    insert = "insert into users (id, tenant, role, total_coins) values (1, 'acme', 'member', 7)"
    assert place.write("delete from users where id = 1", insert) == ""
    assert place.state(1) == ("stale", 0, 7)
    assert place.write("delete from users where id = 2") == ""
    assert place.state(2) == ("closed", 100, None)


def test_mirror_closes_an_account_without_money_by_no_transaction_and_no_failure(place: Place) -> None:
    place.mode("mirror")
    assert place.write("update users set total_coins = 0 where id = 1") == ""
    newest = scalar(place.engine, "select max(id) from wallet.transactions")
    assert place.write("delete from users where id = 1") == ""
    assert place.state() == ("closed", 0, None)
    assert scalar(place.engine, "select max(id) from wallet.transactions") == newest
    assert rows(place.engine, "select message from wallet.failures") == []


@pytest.mark.parametrize(
    "statement",
    [ADD, "delete from users where id = 1", "update users set id = 77 where id = 1"],
)
def test_reject_refuses_a_write_to_a_mirrored_account_and_counts_it(place: Place, statement: str) -> None:
    place.mode("reject")
    before = place.state()
    assert place.write(statement) == REJECTED
    assert place.write(statement) == REJECTED
    assert place.state() == before == ("mirrored", 100, 100)
    assert place.catalogued() == []
    assert place.rejected() == 2


def test_reject_names_the_statement_for_the_server_s_log(place: Place) -> None:
    place.mode("reject")
    with pytest.raises(DBAPIError) as raised:
        execute(place.engine, ADD)
    diagnosis = getattr(raised.value.orig, "diag")  # noqa: B009 - not every driver's error has one
    assert diagnosis.message_detail == "update users set total_coins = total_coins + ? where id = ?"
    assert "capture mode stale" in diagnosis.message_hint


def test_reject_lets_through_what_concerns_no_mirrored_account(place: Place) -> None:
    place.mode("reject")
    for key in (2, 3):
        assert place.write(f"update users set total_coins = total_coins + 5 where id = {key}") == ""
    assert place.write("update users set role = 'vip' where id = 1") == ""
    assert place.write("delete from users where id = 2") == ""
    assert place.state(2) == ("closed", 100, None)
    adapter = LegacyBalanceAdapter(place.settings, StaticSource({DUAL_WRITE: True}))
    with place.engine.begin() as connection:
        adapter.credit(connection, 1, 5, type="test")
        adapter.set_balance(connection, 1, 50, actor="admin:7", reason="support")
    assert place.state() == ("mirrored", 50, 50)


@pytest.mark.parametrize("mode", ["mirror", "reject"])
def test_a_write_of_the_adapter_that_a_trigger_changes_turns_the_account_stale_in_every_mode(
    place: Place, mode: fences.Mode
) -> None:
    place.mode(mode)
    body = "begin new.total_coins := new.total_coins + 1; return new; end"
    assert (
        place.write(
            f"create function app() returns trigger language plpgsql as $$ {body} $$",
            "create trigger app before update on users for each row execute function app()",
        )
        == ""
    )
    adapter = LegacyBalanceAdapter(place.settings, StaticSource({DUAL_WRITE: True}))
    with place.engine.begin() as connection:
        assert adapter.credit(connection, 1, 5, type="test").mismatch
    assert place.state() == ("stale", 105, 106)


@pytest.mark.parametrize("mode", ["mirror", "reject"])
def test_a_frozen_account_is_refused_in_every_mode_and_counted(place: Place, mode: fences.Mode) -> None:
    place.mode(mode)
    execute(place.engine, "select * from wallet.freeze_users(null, '1')")
    assert place.write(ADD) == "WM030"
    assert place.rejected() == 1
    assert place.write("truncate users") == "WM030"
    assert place.rejected() == 2


def test_a_mode_holds_from_the_next_statement_of_a_session_that_was_there_before(place: Place) -> None:
    with place.engine.connect() as connection:
        connection.execute(text("update users set total_coins = total_coins + 1 where id = 5"))
        place.mode("reject")
        with pytest.raises(DBAPIError) as raised:
            connection.execute(text(ADD))
    assert getattr(raised.value.orig, "sqlstate", "") == REJECTED


def test_install_keeps_the_mode(place: Place) -> None:
    place.mode("mirror")
    install(place.engine, place.settings, ACT)
    assert place.write(ADD) == ""
    assert place.state() == ("mirrored", 105, 105)


@pytest.mark.parametrize(("phase", "allowed"), [("legacy", False), ("retired", False), ("read_ledger", True)])
@pytest.mark.parametrize("mode", ["mirror", "reject"])
def test_a_mode_that_the_phase_has_no_use_for_is_refused(
    place: Place, phase: str, allowed: bool, mode: fences.Mode
) -> None:
    set_phase(place.engine, phase)
    if allowed:
        place.mode(mode)
        return
    with pytest.raises(PreconditionRefused):
        place.mode(mode)
    assert scalar(place.engine, "select capture_mode from wallet.mappings") == "stale"


def test_a_mode_that_does_not_exist_is_refused(place: Place) -> None:
    with pytest.raises(UsageError, match="stale, mirror, reject"):
        place.mode("ignore")  # type: ignore[arg-type]


def test_a_change_of_mode_is_on_record_and_a_dry_run_changes_nothing(place: Place) -> None:
    mapping = place.settings.mapping(None)
    dry = fences.set_mode(place.engine, place.settings, mapping, "reject", ACT, dry_run=True)
    assert (dry.before, dry.after, dry.changed) == ("stale", "reject", True)
    assert place.write(ADD) == ""
    place.mode("reject")
    place.mode("reject")
    found = rows(
        place.engine, "select details ->> 'from', details ->> 'to' from wallet.audit_log where action = 'capture mode'"
    )
    assert found == [("stale", "reject")]
