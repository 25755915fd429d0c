"""What the application's database role can do through the adapter, and what it cannot do past it."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal

import pytest
from sqlalchemy import Engine, make_url, text
from sqlalchemy.exc import DBAPIError, ProgrammingError
from sqlalchemy.pool import NullPool

from adapting import DUAL, Place, bring_into, place, placed
from conftest import MakeDatabase
from ledger import ACT, execute, rows, set_phase
from walletmigrate import Movement, connect, fences
from walletmigrate.errors import LedgerNotInstalled, UnknownAccount
from walletmigrate.movements import prepare
from walletmigrate.postings import Calls

D = Decimal


@dataclass
class Login:
    """A role that can log in; ``at`` posts as that role, ``admin`` is the superuser's place."""

    name: str
    at: Place
    admin: Place

    @property
    def engine(self) -> Engine:
        return self.at.engine

    def refuses(self, statement: str) -> None:
        """Fail unless this role has no right to run the statement."""
        with self.engine.connect() as connection, pytest.raises(ProgrammingError) as raised:
            connection.exec_driver_sql(statement, execution_options={"no_parameters": True})
        assert getattr(raised.value.orig, "sqlstate", None) == "42501", statement


def log_in(admin: Place, *grants: str) -> Login:
    """Make a role with these grants, and an adapter that posts as it."""
    name, password = f"app_{secrets.token_hex(6)}", secrets.token_hex(8)
    execute(admin.engine, f"create role {name} login password '{password}'")
    for grant in grants:
        execute(admin.engine, f"grant {grant} to {name}")
    url = make_url(admin.engine.url).set(username=name, password=password)
    engine = connect.engine(url, application_name="application", poolclass=NullPool)
    return Login(name, placed(engine, admin.settings, DUAL), admin)


@pytest.fixture
def admin(make_database: MakeDatabase) -> Iterator[Place]:
    made = place(make_database(), rows=3, floor=D(0), phase="read_ledger", with_promo=True)
    yield made
    made.check()
    # Roles outlive the database: those of this test own nothing and have rights in it alone.
    for (name,) in rows(made.engine, "select rolname from pg_roles where rolname ~ '^app_[0-9a-f]{12}$'"):
        execute(made.engine, f"drop owned by {name}")
        execute(made.engine, f"drop role {name}")


RIGHTS = ("wallet_app", "select, insert, update, delete on public.users")


@pytest.fixture
def app(admin: Place) -> Login:
    return log_in(admin, *RIGHTS)


def test_the_application_s_role_can_post_and_read(app: Login) -> None:
    adapter = app.at.adapter
    with app.engine.begin() as connection:
        posted = adapter.credit(connection, 1, 5, type="deposit", idempotency_key="k", description="d", address="a")
        assert (posted.mode, posted.ledger_balance) == ("dual_write", D(105))
        assert adapter.credit(connection, 1, 5, type="deposit", idempotency_key="k").replayed
        assert adapter.debit(connection, 1, 5, type="booking", bucket="promo").ledger_balance == 0
        assert adapter.transfer(connection, 1, 2, 10, type="gift").payee_ledger_balance == 110
        assert adapter.set_balance(connection, 3, 7, actor="admin:7", reason="case").ledger_balance == 7
        assert adapter.reverse(connection, posted.transaction_id or 0, reason="refund").ledger_balance == 90
        batch = adapter.apply(connection, [Movement.credit(1, 1, type="a"), Movement.credit(2, 1, type="b")])
        assert [each.ledger_balance for each in batch] == [91, 111]
        connection.exec_driver_sql("insert into users values (9, 'acme', 'member', 0, 0)")
        assert len(adapter.open_account(connection, 9)) == 2
        assert adapter.balance(connection, 1).source == "legacy"
        assert adapter.history(connection, 1)[0].balance_after == 91
        assert adapter.balance_at(connection, 1, datetime.now(UTC)) == 91


def test_what_an_administrator_does_through_it_is_on_record_with_the_login(app: Login, admin: Place) -> None:
    with app.engine.begin() as connection:
        app.at.adapter.set_balance(connection, 3, 7, actor="admin:7", reason="case")
        login = connection.exec_driver_sql("select session_user").scalar_one()
    found = "select actor, database_user from wallet.audit_log where action = 'set_balance'"
    assert rows(admin.engine, found) == [("admin:7", login)]


@pytest.mark.parametrize("state", ["absent", "mirrored", "stale", "frozen", "closed, live"])
def test_the_application_s_role_can_post_to_an_account_in_every_state(admin: Place, state: str) -> None:
    bring_into(admin, 50, state)
    app = log_in(admin, *RIGHTS)
    with app.engine.begin() as connection:
        assert app.at.adapter.credit(connection, 50, 1, type="deposit").ledger_balance == 101


def test_the_flags_may_be_off_and_the_ledger_leg_may_fail_for_that_role_too(app: Login, admin: Place) -> None:
    with app.engine.begin() as connection:
        app.at.adapter.credit(connection, 1, 1, type="deposit")
    app.at.flags({})
    with app.engine.begin() as connection:
        assert app.at.adapter.credit(connection, 1, 1, type="deposit").mode == "legacy"
    app.at.flags(DUAL)
    execute(admin.engine, "alter table wallet.transactions add check (amount <> 13)")
    with app.engine.begin() as connection:
        assert app.at.adapter.credit(connection, 2, 13, type="deposit").outcome == "ledger_failed"
    assert (admin.account(1), admin.account(2)) == (("stale", D(101)), None)


@pytest.mark.parametrize(
    "statement",
    [
        "insert into wallet.transactions select * from wallet.transactions limit 1",
        "update wallet.transactions set amount = 1",
        "delete from wallet.transactions",
        "truncate wallet.transactions",
        "insert into wallet.accounts overriding system value select * from wallet.accounts limit 1",
        "update wallet.accounts set balance = balance + 1",
        "update wallet.accounts set state = 'mirrored'",
        "delete from wallet.accounts",
        "insert into wallet.idempotency_keys (key, request) values ('k', gen_random_uuid())",
        "delete from wallet.idempotency_keys",
        "select * from wallet.transaction_details",
        "update wallet.control set phase = 'frozen'",
        "update wallet.system_accounts set balance = 0",
        "insert into wallet.audit_log (action, actor, reason) values ('a', 'b', 'c')",
        "insert into wallet.jobs (kind, actor, reason, version) values ('a', 'b', 'c', 'd')",
        "select nextval('wallet.transaction_ids')",
        "select setval('wallet.line', 2)",
        "select wallet.set_line(false)",
        "select wallet.fold_system_accounts()",
        "select wallet.fill_accounts(10)",
        "select * from wallet.backfill_users(null, null, null)",
        "select * from wallet.open_users(array[1]::bigint[], null)",
        "select * from wallet.freeze_users(null, null)",
        "select * from wallet.seal_users(array[1]::bigint[])",
        "select * from wallet.unfreeze_users(null, null)",
        "select * from wallet.unseal_users(array[1]::bigint[], 'cash', 'EUR')",
        "select wallet.write_ledger(null, null, null, null, null)",
        "select wallet.bring_up(null, null, null)",
        "select wallet.put_on_record(null, null, 'users')",
        "alter table wallet.accounts disable trigger all",
        "alter table public.users disable trigger all",
        "drop table public.users",
        "create table wallet.mine (id int)",
    ],
)
def test_the_application_s_role_cannot_write_the_ledger_itself(app: Login, statement: str) -> None:
    with app.engine.begin() as connection:
        app.at.adapter.credit(connection, 1, 5, type="deposit")
    app.refuses(statement)


def test_the_application_s_role_cannot_take_the_fence_down(app: Login, admin: Place) -> None:
    fences = rows(
        admin.engine,
        "select quote_ident(tgname) from pg_trigger where tgrelid = 'public.users'::regclass and not tgisinternal",
    )
    assert len(fences) == 4
    for (name,) in fences:
        app.refuses(f"drop trigger {name} on public.users")
        app.refuses(f"alter table public.users disable trigger {name}")


def test_a_refused_statement_in_a_savepoint_leaves_the_transaction_usable(app: Login) -> None:
    with app.engine.begin() as connection:
        savepoint = connection.begin_nested()
        with pytest.raises(ProgrammingError):
            connection.exec_driver_sql("update wallet.accounts set balance = 10")
        savepoint.rollback()
        assert app.at.adapter.credit(connection, 1, 5, type="deposit").ledger_balance == 105


def test_the_right_to_update_the_balance_columns_alone_is_enough(admin: Place) -> None:
    app = log_in(admin, "wallet_app", "select, update (total_coins, promo) on public.users")
    with app.engine.begin() as connection:
        assert app.at.adapter.credit(connection, 1, 5, type="deposit").ledger_balance == 105
        assert app.at.adapter.transfer(connection, 1, 2, 5, type="gift").ledger_balance == 100


def test_a_role_without_rights_on_the_legacy_table_cannot_post(admin: Place) -> None:
    reader = log_in(admin, "wallet_app", "select on public.users")
    with reader.engine.connect() as connection, pytest.raises(DBAPIError) as raised:
        reader.at.adapter.credit(connection, 1, 5, type="deposit")
    assert getattr(raised.value.orig, "sqlstate", None) == "42501"
    with reader.engine.connect() as connection:
        assert reader.at.adapter.balance(connection, 1).amount == 100
    assert (admin.coins(1), admin.account(1)) == (100, None)


def test_a_role_without_rights_on_the_ledger_is_told_so(admin: Place) -> None:
    stranger = log_in(admin, "select, update on public.users")
    with stranger.engine.connect() as connection:
        with pytest.raises(LedgerNotInstalled, match="no right to use the ledger"):
            stranger.at.adapter.credit(connection, 1, 5, type="deposit")
        connection.rollback()
        with pytest.raises(LedgerNotInstalled, match="no right to use the ledger"):
            stranger.at.adapter.balance(connection, 1)
    assert admin.coins(1) == 100


def test_the_fence_holds_for_a_writer_without_any_right_on_the_ledger(admin: Place) -> None:
    with admin.engine.begin() as connection:
        admin.adapter.open_account(connection, 1)
        admin.adapter.open_account(connection, 2)
    stranger = log_in(admin, "select, insert, update, delete on public.users")
    with stranger.engine.begin() as connection:
        connection.exec_driver_sql("update users set total_coins = 50 where id = 1")
        connection.exec_driver_sql("delete from users where id = 2")
        connection.exec_driver_sql("insert into users values (8, 'acme', 'member', 1, 0)")
    assert (admin.account(1), admin.account(2)) == (("stale", D(100)), ("closed", D(100)))


@pytest.mark.parametrize("mode", ["stale", "reject"])
@pytest.mark.parametrize("short", [True, False])
def test_a_label_of_a_writer_without_any_right_on_the_ledger_counts_for_nothing(
    admin: Place, mode: fences.Mode, short: bool
) -> None:
    """It would post in another's name, use up a key, and keep the write off the record."""
    with admin.engine.begin() as connection:
        admin.adapter.open_account(connection, 1)
    mapping = admin.settings.mapping(None)
    fences.set_mode(admin.engine, admin.settings, mapping, mode, ACT)
    movement = Movement.credit(1, 5, type="forged", idempotency_key="of another", actor="boss")
    request = prepare(movement, mapping, "integer", "of nobody").request
    label = Calls("wallet", mapping).plain({**request, "dual": True})[-1] if short else "adapter:users:1"
    stranger = log_in(admin, "select, update on public.users")

    def forge() -> None:
        with stranger.engine.begin() as connection:
            connection.execute(text("select set_config('walletmigrate.posting', :label, true)"), {"label": label})
            connection.exec_driver_sql("update users set total_coins = total_coins + 5 where id = 1")

    if mode == "reject":
        with pytest.raises(DBAPIError) as raised:
            forge()
        assert getattr(raised.value.orig, "sqlstate", None) == "WM031"
        assert admin.account(1) == ("mirrored", D(100))
        return
    forge()
    assert admin.account(1) == ("stale", D(100))
    assert rows(admin.engine, "select database_user, treatment from wallet.bypasses") == [
        (stranger.name, "turned_stale")
    ]
    assert rows(admin.engine, "select type from wallet.transactions where type = 'forged'") == []
    assert rows(admin.engine, "select key from wallet.idempotency_keys where key = 'of another'") == []


@pytest.mark.parametrize("role", ["wallet_app", "wallet_operator"])
def test_a_member_of_either_role_posts_by_the_short_way(admin: Place, role: str) -> None:
    """Which leaves the balances to the transaction; the long way keeps them with the key."""
    with admin.engine.begin() as connection:
        admin.adapter.open_account(connection, 1)
    member = log_in(admin, role, "select, update on public.users")
    with member.engine.begin() as connection:
        member.at.adapter.credit(connection, 1, 5, type="deposit", idempotency_key="k")
    assert rows(admin.engine, "select balances from wallet.idempotency_keys where key = 'k'") == [(None,)]


def test_a_definer_s_function_posts_for_a_session_that_may_not(app: Login, admin: Place) -> None:
    """The label does not count, and the long way does without."""
    with admin.engine.begin() as connection:
        admin.adapter.open_account(connection, 1)
    mapping = admin.settings.mapping(None)
    request = prepare(Movement.credit(1, 5, type="bonus"), mapping, "integer", "c").request
    given = ", ".join(f"$arg${one}$arg$" for one in Calls("wallet", mapping).plain({**request, "dual": True}))
    body = f"select wallet.plain_users({given})"
    execute(admin.engine, f"create function bonus() returns text language sql security definer as $$ {body} $$")
    execute(admin.engine, f"grant create on schema public to {app.name}")
    execute(admin.engine, f"alter function bonus() owner to {app.name}")
    stranger = log_in(admin, "select on public.users")
    with stranger.engine.begin() as connection:
        connection.exec_driver_sql("select bonus()")
    assert (admin.account(1), admin.coins(1)) == (("mirrored", D(105)), 105)
    assert rows(admin.engine, "select count(*) from wallet.bypasses") == [(0,)]


def test_the_application_s_triggers_see_the_application_s_role(app: Login, admin: Place) -> None:
    execute(admin.engine, "alter table users add changed_by text")
    execute(
        admin.engine,
        "create function public.stamp() returns trigger language plpgsql as "
        "$$ begin new.changed_by := current_user; return new; end $$",
    )
    execute(admin.engine, "create trigger stamp before update on users for each row execute function public.stamp()")
    with app.engine.begin() as connection:
        app.at.adapter.credit(connection, 1, 5, type="deposit")
    assert admin.coins(1, "changed_by") == app.name


def test_row_level_security_hides_accounts_from_the_adapter_as_from_the_application(admin: Place) -> None:
    app = log_in(admin, *RIGHTS)
    execute(admin.engine, "alter table users enable row level security")
    execute(admin.engine, f"create policy own on users to {app.name} using (tenant = 'acme')")
    execute(admin.engine, "create policy walletmigrate_owner on users for select to wallet_owner using (true)")
    with app.engine.begin() as connection:
        assert app.at.adapter.credit(connection, 1, 5, type="deposit").ledger_balance == 105
        with pytest.raises(UnknownAccount):
            app.at.adapter.credit(connection, 2, 5, type="deposit")
        with pytest.raises(UnknownAccount) as refused:
            app.at.adapter.transfer(connection, 1, 2, 5, type="gift")
        assert refused.value.key == 2
        with pytest.raises(UnknownAccount):
            app.at.adapter.balance(connection, 2)
    assert (admin.coins(1), admin.coins(2)) == (105, 100)


@pytest.mark.parametrize("grant", ["wallet_app", "wallet_operator", ""])
def test_a_label_is_heard_of_who_may_post_and_of_nobody_else(admin: Place, grant: str) -> None:
    with admin.engine.begin() as connection:
        admin.adapter.open_account(connection, 1)
    login = log_in(admin, *filter(None, (grant, RIGHTS[1])))
    request = prepare(Movement.credit(1, 5, type="forged"), admin.mapping, "integer", "c").request | {"dual": True}
    label = Calls("wallet", admin.mapping).plain(request)[-1]
    for text_of_it, left in ((label, ("mirrored", D(105))), ("adapter:users:1", ("stale", D(105)))):
        with login.engine.begin() as connection:
            connection.execute(text("select set_config('walletmigrate.posting', :label, true)"), {"label": text_of_it})
            connection.execute(text("update users set total_coins = total_coins + 5 where id = 1"))
        assert admin.account(1) == (left if grant else ("stale", D(100)))
        treatments = rows(admin.engine, "select treatment from wallet.bypasses order by at")
        assert treatments == ([] if grant else [("turned_stale",), ("stale",)][: len(treatments)])
        assert bool(treatments) is not bool(grant)


def test_what_the_adapter_writes_the_long_way_as_that_role_is_not_on_record(app: Login, admin: Place) -> None:
    with app.engine.begin() as connection:
        app.at.adapter.credit(connection, 1, 5, type="deposit", description="said at length")
        app.at.adapter.set_balance(connection, 2, 7, actor="admin:7", reason="case")
    app.at.flags({})
    with app.engine.begin() as connection:
        app.at.adapter.set_balance(connection, 1, 9, actor="admin:7", reason="case")
    assert rows(admin.engine, "select key from wallet.bypasses") == []


OWNER_S_POLICY = "create policy walletmigrate_owner on {} for select to wallet_owner using (true)"


def test_a_fence_from_which_rows_are_hidden_closes_no_account(admin: Place) -> None:
    """Another policy, or another table's, does not let it see."""
    with admin.engine.begin() as connection:
        admin.adapter.open_account(connection, 1)
    execute(admin.engine, "create table other (id bigint)")
    execute(admin.engine, OWNER_S_POLICY.format("other"))
    execute(admin.engine, "alter table users enable row level security")
    execute(admin.engine, "create policy own on users using (true)")
    with pytest.raises(DBAPIError) as raised:
        execute(admin.engine, "delete from users where id = 1")
    assert getattr(raised.value.orig, "sqlstate", "") == "WM022"
    assert admin.account(1) == ("mirrored", D(100))


def test_a_fence_that_a_policy_lets_see_all_rows_closes_as_without_row_level_security(admin: Place) -> None:
    with admin.engine.begin() as connection:
        admin.adapter.open_account(connection, 1)
    execute(admin.engine, OWNER_S_POLICY.format("users"))
    execute(admin.engine, "alter table users enable row level security")
    execute(admin.engine, "delete from users where id = 1")
    assert admin.account(1) == ("closed", D(100))


def test_an_object_of_the_same_name_on_the_caller_s_search_path_is_not_used(app: Login, admin: Place) -> None:
    execute(admin.engine, f"create schema trap authorization {app.name}")
    with app.engine.begin() as connection:
        connection.execute(text("create table trap.accounts (like wallet.accounts)"))
        connection.execute(text("create table trap.control (singleton boolean, phase text)"))
        connection.execute(text("insert into trap.control values (true, 'frozen')"))
        connection.execute(text("create temporary table users (id bigint, total_coins numeric)"))
        connection.execute(text("set local search_path = trap, pg_temp, public"))
        assert app.at.adapter.credit(connection, 1, 5, type="deposit").mode == "dual_write"
    assert (admin.coins(1), admin.account(1)) == (105, ("mirrored", D(105)))
    execute(admin.engine, "drop schema trap cascade")


def test_the_phase_still_bounds_what_that_role_may_ask_for(app: Login, admin: Place) -> None:
    set_phase(admin.engine, "legacy")
    with app.engine.begin() as connection:
        assert app.at.adapter.credit(connection, 1, 5, type="deposit").mode == "legacy"
