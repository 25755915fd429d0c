"""Doctor on the schema, the roles and several mappings; and that its commands mend what they are shown for."""

from __future__ import annotations

import re

import pytest
from sqlalchemy import Connection

from capturing import Place
from examining import HOLLOW, connection, place, run
from findings import ROOT, assert_told
from ledger import ACT, execute, install_users
from walletmigrate import doctor
from walletmigrate.config import Roles
from walletmigrate.install import install

__all__ = ["connection", "place"]


def test_the_tables_of_another_release_are_not_held_against_this_one_s(connection: Connection, place: Place) -> None:
    run(
        connection, "drop index wallet.transactions_reversed_once; alter table wallet.accounts drop column state_reason"
    )
    assert len(doctor.examine(connection, place.settings)) == 2
    run(connection, "update wallet.schema_version set version_num = '9999'")
    (found,) = doctor.examine(connection, place.settings)
    assert "a newer release was installed" in found.what


def test_what_is_not_the_ledger_s_goes_by_the_command_that_is_shown(connection: Connection, place: Place) -> None:
    run(connection, f"create function public.f() {HOLLOW}; create unique index one on wallet.accounts (key, id)")
    run(connection, 'create trigger "My own" before insert on wallet.jobs for each row execute function public.f()')
    run(connection, "alter table wallet.transactions add constraint no_x check (type <> 'x') not valid")
    found = doctor.examine(connection, place.settings)
    assert len(found) == 3
    for one in found:
        run(connection, one.mend.rpartition(": ")[2])
    assert doctor.examine(connection, place.settings) == ()


def test_every_runbook_that_doctor_can_name_exists() -> None:
    named = set()
    for file in (ROOT / "src" / "walletmigrate").glob("checkup*.py"):
        named |= set(re.findall(r'"([\w-]+/[\w-]+\.md)"', file.read_text(encoding="utf-8")))
    assert len(named) > 8
    assert [one for one in sorted(named) if not (ROOT / one).is_file() or not one.startswith("runbooks/")] == []


def test_a_role_that_is_not_there_is_found(connection: Connection, place: Place) -> None:
    other = place.settings.model_copy(update={"roles": Roles(app="nobody_app")})
    assert "there is no role 'nobody_app'" in [one.what for one in doctor.examine(connection, other)]


def test_a_login_of_the_application_must_be_a_member_of_its_role(connection: Connection, place: Place) -> None:
    run(connection, "create role shop login")
    found = doctor.examine(connection, place.settings, logins=("shop", "shopp"))
    assert [one.what for one in found] == [
        "shop is no member of wallet_app: its postings are refused",
        "there is no role 'shopp'",
    ]
    assert_told(found)
    run(connection, found[0].mend)
    assert doctor.examine(connection, place.settings, logins=("shop",)) == ()


def test_two_mappings_share_functions_and_a_fault_of_them_is_found_once(database_url: str) -> None:
    engine, settings = install_users(database_url)
    execute(engine, "create table shops (id bigint primary key, credit numeric(20, 2) not null)")
    column = settings.mappings[0].columns[0].model_copy(update={"column": "credit"})
    shops = settings.mappings[0].model_copy(
        update={"name": "shops", "table": "public.shops", "traits": {}, "columns": (column,)}
    )
    both = settings.model_copy(update={"mappings": (*settings.mappings, shops)})
    install(engine, both, ACT)
    with engine.connect() as connection:
        assert doctor.examine(connection, both) == ()
        run(connection, "alter function wallet.bring_up rename to other")
        assert [one.what for one in doctor.examine(connection, both)] == ["the function wallet.bring_up is missing"]


# What mends a fault does


def test_a_sequence_that_was_dropped_is_made_anew_by_what_doctor_says(database_url: str) -> None:
    place = Place(database_url)
    last = "select last_value from wallet.{}"
    with place.engine.connect() as connection:
        before = {
            n: connection.exec_driver_sql(last.format(n)).scalar() for n in ("line", "ceiling", "transaction_ids")
        }
    for name, value in before.items():
        execute(place.engine, f"drop sequence wallet.{name} cascade")
        with place.engine.connect() as connection:
            (found,) = doctor.examine(connection, place.settings)
        match = re.fullmatch(r"in psql, as a superuser: (.*;) then: walletmigrate install --reason '…'", found.mend)
        assert match is not None
        with place.engine.begin() as connection:
            run(connection, match[1])
        install(place.engine, place.settings, ACT)
        with place.engine.connect() as connection:
            assert doctor.examine(connection, place.settings) == ()
            assert connection.exec_driver_sql(last.format(name)).scalar() == value


@pytest.mark.parametrize(
    "fault",
    [
        "alter function wallet.lock_users(bigint[]) security definer",
        "drop function wallet.cut_users(text, text, integer)",
        "revoke execute on function wallet.set_line(boolean) from wallet_operator",
        "drop sequence wallet.rejected_users",
    ],
)
def test_what_install_is_said_to_mend_it_mends(database_url: str, fault: str) -> None:
    place = Place(database_url)
    execute(place.engine, fault)
    with place.engine.connect() as connection:
        (found,) = doctor.examine(connection, place.settings)
    assert found.mend.startswith("walletmigrate install --reason")
    install(place.engine, place.settings, ACT)
    with place.engine.connect() as connection:
        assert doctor.examine(connection, place.settings) == ()
