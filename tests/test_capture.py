"""The catalogue and the fence's modes: what becomes of a write past the adapter, and what is on record of it."""

from __future__ import annotations

from decimal import Decimal

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from invariants import assert_sound
from ledger import ACT, execute, install_users, post, rows, scalar, set_phase, unguarded
from walletmigrate import LegacyBalanceAdapter, StaticSource, bypasses, connect, doctor, fences
from walletmigrate.bypasses import CodePath
from walletmigrate.config import CaptureSettings, Settings
from walletmigrate.errors import LegacyTableAltered, PreconditionRefused, UsageError
from walletmigrate.flags import DUAL_WRITE
from walletmigrate.install import install

ADD = "update users set total_coins = total_coins + 5 where id = 1"
REJECTED = "WM031"


class Place:
    """Ten users of 100 each in phase dual_write; the first has an account, the second a stale one."""

    def __init__(self, url: str, *, with_promo: bool = False) -> None:
        self.engine, self.settings = install_users(url, phase="dual_write", with_promo=with_promo)
        with self.engine.begin() as connection:
            for key in (1, 2):
                post(connection, self.settings, "open_account", key, 0)
        self.write("update users set total_coins = total_coins + 1 where id = 2")
        execute(self.engine, "delete from wallet.bypasses")

    def write(self, *statements: str, name: str = "cron") -> str:
        """One transaction of another program; the SQLSTATE it ended with, empty when it committed."""
        engine = connect.engine(self.settings.database_url or "", application_name=name)
        try:
            with engine.begin() as connection:
                for statement in statements:
                    connection.exec_driver_sql(statement, execution_options={"no_parameters": True})
        except DBAPIError as error:
            return str(getattr(error.orig, "sqlstate", ""))
        finally:
            engine.dispose()
        return ""

    def mode(self, mode: fences.Mode) -> None:
        fences.set_mode(self.engine, self.settings, self.settings.mapping(None), mode, ACT)

    def state(self, key: int = 1) -> tuple[object, ...]:
        found = rows(
            self.engine,
            "select a.state::text, a.balance, u.total_coins from wallet.accounts as a "
            "left join users as u on u.id::text = a.key where a.key = :key and a.bucket = 'cash'",
            key=str(key),
        )
        return found[0]

    def catalogued(self) -> list[tuple[object, ...]]:
        query = "select operation, key, column_name, treatment, old_value, new_value from wallet.bypasses order by id"
        return rows(self.engine, query)

    def paths(self, settings: Settings | None = None) -> tuple[CodePath, ...]:
        with self.engine.connect() as connection:
            return bypasses.report(connection, settings or self.settings).paths

    def rejected(self) -> int:
        with self.engine.connect() as connection:
            return bypasses.rejected(connection, self.settings)["users"]


@pytest.fixture
def place(database_url: str) -> Place:
    return Place(database_url)


# What is on record


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
    assert place.write("update users set role = 'vip', total_coins = 100 where id = 1") == ""
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
        place.engine, "select application_name, database_user, fingerprint, query, xid from wallet.bypasses"
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
        ("update t set a = ?, b = 2", "update t set a = ?, b = ?"),
    ],
)
def test_a_fingerprint_has_no_values(place: Place, statement: str, fingerprint: str) -> None:
    assert scalar(place.engine, "select wallet.fingerprint(:q)", q=statement) == fingerprint


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


# Modes


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
    execute(place.engine, "select * from wallet.freeze_users(null, 1)")
    assert place.write(ADD) == "WM030"
    assert place.rejected() == 1


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


# Up and down


def test_the_fence_comes_down_only_in_phase_legacy_and_leaves_no_account_mirrored(place: Place) -> None:
    with pytest.raises(PreconditionRefused) as raised:
        fences.take_down(place.engine, place.settings, ACT)
    assert "dual-writes would go on without a fence" in str(raised.value)
    set_phase(place.engine, "legacy")
    assert [one.changed for one in fences.take_down(place.engine, place.settings, ACT)] == [True]
    assert place.state()[0] == "stale"
    assert [one.changed for one in fences.take_down(place.engine, place.settings, ACT)] == [False]
    assert place.write(ADD) == ""
    assert place.catalogued() == []
    assert [one.changed for one in fences.put_up(place.engine, place.settings, ACT)] == [True]
    assert [one.changed for one in fences.put_up(place.engine, place.settings, ACT)] == [False]
    assert place.write(ADD) == ""
    assert len(place.catalogued()) == 1


def test_the_fence_does_not_come_down_over_frozen_accounts(place: Place) -> None:
    execute(place.engine, "select * from wallet.freeze_users(null, 1)")
    set_phase(place.engine, "legacy")
    with pytest.raises(PreconditionRefused, match="frozen"):
        fences.take_down(place.engine, place.settings, ACT)


# What doctor finds


def findings(place: Place) -> list[str]:
    with place.engine.connect() as connection:
        return [one.what for one in doctor.examine(connection, place.settings)]


@pytest.mark.parametrize(
    ("fault", "finding"),
    [
        ("drop trigger walletmigrate_users_update on users", "walletmigrate_users_update on public.users is missing"),
        ("alter table users disable trigger walletmigrate_users_delete", "is disabled, or does not fire in replica"),
        ("alter table users enable trigger walletmigrate_users_delete", "is disabled, or does not fire in replica"),
        ("alter table users enable replica trigger walletmigrate_users_delete", "does not fire in replica role"),
        ("alter table users rename column total_coins to coins", "was altered since the install"),
        ("alter table users rename to people", "was altered since the install"),
        ("alter table wallet.transactions disable trigger append_only", "append_only on wallet.transactions"),
        ("alter table wallet.audit_log enable trigger append_only", "append_only on wallet.audit_log"),
        ("select setval('wallet.ceiling', 1)", "postings take the phase for legacy; it is dual_write"),
        ("update wallet.mappings set fingerprint = 'x'", "was installed from another configuration"),
        ("update wallet.mappings set functions_version = 0", "are of version 0"),
    ],
)
def test_doctor_finds_what_is_not_as_it_was_made(place: Place, fault: str, finding: str) -> None:
    assert findings(place) == []
    execute(place.engine, fault)
    assert any(finding in found for found in findings(place)), findings(place)


def test_doctor_finds_a_fence_that_was_disabled_and_enabled_again(place: Place) -> None:
    with unguarded(place.engine, "users"):
        pass
    assert any("was replaced or altered" in found for found in findings(place))


@pytest.mark.parametrize("description", [None, "the long way"])
@pytest.mark.parametrize(
    "alteration",
    [
        (
            "alter table users rename column total_coins to coins",
            "alter table users rename column coins to total_coins",
        ),
        ("alter table users rename to people", "alter table people rename to users"),
        ("alter table users rename column id to number", "alter table users rename column number to id"),
    ],
)
def test_a_posting_on_a_table_that_was_altered_is_refused_and_loses_nothing(
    place: Place, alteration: tuple[str, str], description: str | None
) -> None:
    adapter = LegacyBalanceAdapter(place.settings, StaticSource({DUAL_WRITE: True}))
    with place.engine.begin() as connection:
        adapter.credit(connection, 1, 5, type="test")
    execute(place.engine, alteration[0])
    with place.engine.begin() as connection:
        savepoint = connection.begin_nested()
        with pytest.raises(LegacyTableAltered, match="walletmigrate doctor"):
            adapter.credit(connection, 1, 5, type="test", description=description)
        savepoint.rollback()
    execute(place.engine, alteration[1])
    assert place.state() == ("mirrored", Decimal(105), Decimal(105))
    with place.engine.begin() as connection:
        adapter.credit(connection, 1, 5, type="test", description=description)
    assert place.state() == ("mirrored", Decimal(110), Decimal(110))
