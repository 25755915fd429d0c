"""Putting the fence up and down, what doctor finds, and postings on a table that was altered."""

from __future__ import annotations

from decimal import Decimal

import pytest

from capturing import ADD, Place
from findings import assert_told
from ledger import ACT, execute, rows, set_phase, unguarded
from walletmigrate import LegacyBalanceAdapter, StaticSource, doctor, fences, phases
from walletmigrate.backfill import backfill
from walletmigrate.errors import LegacyTableAltered, PreconditionRefused
from walletmigrate.flags import DUAL_WRITE
from walletmigrate.install import install


@pytest.fixture
def place(database_url: str) -> Place:
    return Place(database_url)


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
    execute(place.engine, "select * from wallet.freeze_users(null, '1')")
    set_phase(place.engine, "legacy")
    with pytest.raises(PreconditionRefused, match="frozen"):
        fences.take_down(place.engine, place.settings, ACT)


# What doctor finds


def findings(place: Place) -> list[str]:
    with place.engine.connect() as connection:
        found = doctor.examine(connection, place.settings)
    assert_told(found)
    return [one.what for one in found]


HOLLOW = "returns trigger language plpgsql as 'begin return null; end'"


@pytest.mark.parametrize(
    ("fault", "finding"),
    [
        ("drop trigger walletmigrate_users_update on users", "walletmigrate_users_update on public.users is missing"),
        ("alter table users disable trigger walletmigrate_users_delete", "is disabled, or does not fire in replica"),
        ("alter table users enable trigger walletmigrate_users_delete", "is disabled, or does not fire in replica"),
        ("alter table users enable replica trigger walletmigrate_users_delete", "does not fire in replica role"),
        ("create or replace function wallet.fence_users() " + HOLLOW, "function wallet.fence_users was replaced"),
        ("create or replace function wallet.fence_truncate_users() " + HOLLOW, "fence_truncate_users was replaced"),
        ("alter function wallet.fence_users() security invoker", "function wallet.fence_users was replaced"),
        ("alter function wallet.fence_users() reset search_path", "function wallet.fence_users was replaced"),
        ("alter function wallet.turn_stale(bigint, text) rename to other", "wallet.turn_stale is missing"),
        ("alter table users rename column total_coins to coins", "was altered since the install"),
        ("alter table users rename to people", "was altered since the install"),
        ("alter table wallet.transactions disable trigger append_only", "append_only on wallet.transactions"),
        ("alter table wallet.audit_log enable trigger append_only", "append_only on wallet.audit_log"),
        ("drop trigger append_only_truncate on wallet.verifications", "append_only_truncate on wallet.verifications"),
        ("alter table wallet.verifications enable trigger append_only", "append_only on wallet.verifications"),
        ("select setval('wallet.ceiling', 1)", "postings take the phase for legacy; it is dual_write"),
        ("update wallet.mappings set fingerprint = 'x'", "was installed from another configuration"),
        ("update wallet.mappings set functions_version = 0", "are of version 0"),
    ],
)
def test_doctor_finds_what_is_not_as_it_was_made(place: Place, fault: str, finding: str) -> None:
    assert findings(place) == []
    execute(place.engine, fault)
    assert any(finding in found for found in findings(place)), findings(place)


def test_a_function_of_the_fence_that_was_replaced_is_made_anew_by_install_alone_and_closes_the_gates(
    place: Place,
) -> None:
    execute(place.engine, "create or replace function wallet.fence_users() " + HOLLOW)
    with pytest.raises(PreconditionRefused, match=r"fence_users was replaced"):
        fences.put_up(place.engine, place.settings, ACT)
    with pytest.raises(PreconditionRefused, match=r"fence_users was replaced"):
        place.mode("mirror")
    with place.engine.connect() as connection:
        found = phases.reasons(connection, place.settings, StaticSource(), "read_ledger")
    assert any("fence_users was replaced" in what for what, _ in found)
    assert install(place.engine, place.settings, ACT).mended == ("users",)
    assert findings(place) == []
    place.mode("mirror")
    assert findings(place) == []


def test_doctor_finds_a_fence_that_was_disabled_and_enabled_again(place: Place) -> None:
    with unguarded(place.engine, "users"):
        pass
    assert any("was replaced or altered" in found for found in findings(place))


@pytest.mark.parametrize(
    "alteration", ["alter table users rename column total_coins to coins", "alter table users rename to people"]
)
def test_a_backfill_of_a_table_that_was_altered_is_refused_before_it_begins(place: Place, alteration: str) -> None:
    execute(place.engine, alteration)
    with pytest.raises(PreconditionRefused, match="was altered since the install"):
        backfill(place.engine, place.settings, place.settings.mapping(None), ACT)
    assert rows(place.engine, "select * from wallet.jobs") == []


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
