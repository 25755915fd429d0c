"""The fence on its tables: partitions, and a fence that is not as it was made."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import interleaving
from fencing import FROZEN, TRUNCATE, UPDATE, World, application_trigger, found_by, world
from ledger import ACT, execute, set_phase, users_settings
from walletmigrate.fences import set_mode
from walletmigrate.install import install

__all__ = ["world"]


@pytest.fixture
def partitioned(database_url: str) -> Iterator[World]:
    """Users 1 to 10 in two partitions by id."""
    engine = interleaving.patient_engine(database_url)
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "create table users (id bigint primary key, tenant text not null default 'acme', "
            "role text not null default 'member', total_coins numeric(20, 2), promo numeric(20, 2) not null default 5) "
            "partition by range (id); "
            "create table users_low partition of users for values from (0) to (6); "
            "create table users_high partition of users for values from (6) to (100); "
            "insert into users (id, total_coins) select g, 100 from generate_series(1, 10) as g"
        )
    settings = users_settings(database_url, with_promo=True)
    install(engine, settings, ACT)
    set_phase(engine, "dual_write")
    made = World(engine, settings)
    yield made
    made.assert_sound()


def test_a_write_to_a_partition_by_its_own_name_meets_the_fence(partitioned: World) -> None:
    partitioned.bring("mirrored")
    assert partitioned.write("update users_low set total_coins = 1 where id = 1") == ""
    assert partitioned.state() == "stale"
    partitioned.bring("frozen", key=2)
    assert partitioned.write("delete from users_low where id = 2") == FROZEN


def test_a_row_that_moves_to_another_partition_takes_no_balance_along_unseen(partitioned: World) -> None:
    partitioned.bring("mirrored", key=1)
    partitioned.bring("closed", key=7)
    assert partitioned.write("update users set id = 7 where id = 1") == ""
    assert (partitioned.state(1), partitioned.state(7)) == ("closed", "stale")
    partitioned.bring("frozen", key=2)
    assert partitioned.write("update users set id = 77 where id = 2") == FROZEN


def test_the_truncation_of_a_partition_closes_only_its_own_accounts(partitioned: World) -> None:
    partitioned.bring("mirrored", key=1)
    partitioned.bring("mirrored", key=8)
    assert partitioned.write("truncate users_low") == ""
    assert (partitioned.state(1), partitioned.state(8)) == ("closed", "mirrored")
    partitioned.freeze()
    assert partitioned.write("truncate users_high") == FROZEN
    assert partitioned.write(TRUNCATE) == FROZEN


def test_reject_asks_of_a_truncated_partition_s_money_alone(partitioned: World) -> None:
    partitioned.bring("mirrored", key=8)
    set_mode(partitioned.engine, partitioned.settings, partitioned.settings.mapping(None), "reject", ACT)
    assert partitioned.write("truncate users_low") == ""
    assert partitioned.write("truncate users_high") == "WM031"
    assert partitioned.write("insert into users (id, total_coins) values (1, 100)") == ""
    assert partitioned.write("truncate users_high") == "WM031", "of rows in the other partition nothing is asked"
    assert partitioned.state(8) == "mirrored"


def test_a_partition_made_later_is_fenced_for_rows_at_once_and_reported_until_install_runs(partitioned: World) -> None:
    made = "create table users_top partition of users for values from (100) to (200)"
    assert partitioned.write(made, "insert into users (id, total_coins) values (100, 7)") == ""
    partitioned.bring("mirrored", key=100)
    assert partitioned.write("set local session_replication_role = replica", "update users set total_coins = 8") == ""
    assert partitioned.state(100) == "stale"
    problems = found_by(partitioned)
    assert "walletmigrate_users_truncate on public.users_top" in problems
    assert all(name.endswith(" on public.users_top") for name in problems)
    install(partitioned.engine, partitioned.settings, ACT)
    assert found_by(partitioned) == {}
    partitioned.bring("mirrored", key=100)
    assert partitioned.write("truncate users_top") == ""
    assert partitioned.state(100) == "closed"


def test_a_partition_that_is_detached_is_no_longer_the_fence_s(partitioned: World) -> None:
    assert partitioned.write("alter table users detach partition users_high") == ""
    assert found_by(partitioned) == {}


# What became of the fence

REPLACED = (
    "drop trigger {0} on users; create trigger {0} after update on users for each row when (false) "
    "execute function wallet.fence_users(); alter table users enable always trigger {0}"
)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("drop trigger {0} on users", "is missing"),
        ("alter table users disable trigger {0}", "is disabled, or does not fire in replica role"),
        ("alter table users disable trigger all", "is disabled, or does not fire in replica role"),
        ("alter table users enable replica trigger {0}", "is disabled, or does not fire in replica role"),
        ("alter table users enable trigger {0}", "is disabled, or does not fire in replica role"),
        (REPLACED, "was replaced or altered"),
        (
            "alter table users disable trigger {0}; alter table users enable always trigger {0}",
            "was replaced or altered",
        ),
        ("alter trigger {0} on users rename to other", "is missing"),
        ("drop function wallet.fence_users() cascade", "is missing"),
    ],
)
def test_a_fence_that_is_not_as_it_was_made_is_found_and_mended_by_install(
    world: World, change: str, problem: str
) -> None:
    assert found_by(world) == {}
    trigger = "walletmigrate_users_update"
    assert world.write(change.format(trigger)) == ""
    assert found_by(world)[f"{trigger} on public.users"] == problem
    install(world.engine, world.settings, ACT)
    assert found_by(world) == {}
    world.bring("mirrored")
    assert world.write(UPDATE) == ""
    assert world.state() == "stale"


def test_a_fence_that_another_cluster_made_is_not_this_one_though_its_transaction_has_the_same_number(
    world: World,
) -> None:
    name = "walletmigrate_users_update on public.users"
    execute(
        world.engine,
        "update wallet.mappings set fence = jsonb_set(fence, array[:name, 'cluster'], to_jsonb('1'::text))",
        name=name,
    )
    assert found_by(world) == {name: "was replaced or altered"}


def test_the_type_of_a_balance_column_is_not_altered_unseen_while_the_fence_stands(world: World) -> None:
    for column in ("total_coins", "promo", "id"):
        assert world.write(f"alter table users alter column {column} type text") == "0A000"


def test_a_fence_that_was_never_made_is_a_problem(world: World) -> None:
    execute(world.engine, "update wallet.mappings set fence = '{}'")
    assert list(found_by(world).values()) == ["was never installed"]


def test_adding_a_trigger_or_a_column_of_the_application_is_no_problem(world: World) -> None:
    application_trigger(world, "after insert", "return null;")
    assert world.write("alter table users add column nick text") == ""
    assert found_by(world) == {}
