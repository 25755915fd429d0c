"""Posting on a psycopg connection that another framework owns: its transaction stays its own."""

from __future__ import annotations

import gc
import weakref
from decimal import Decimal

import psycopg
import pytest
from psycopg.rows import dict_row
from psycopg.types.numeric import FloatLoader

import adapting
from walletmigrate.borrowed import borrowed
from walletmigrate.errors import InsufficientFunds, UsageError

D = Decimal


@pytest.fixture
def place(database_url: str) -> adapting.Place:
    return adapting.place(database_url, floor=D(0))


def coins(connection: psycopg.Connection[tuple[object, ...]]) -> object:
    row = connection.execute("select total_coins from users where id = 1").fetchone()
    assert row is not None
    return row[0]


def test_a_posting_is_committed_with_the_owners_transaction(place: adapting.Place, database_url: str) -> None:
    with psycopg.connect(database_url) as connection, connection.transaction():
        posted = place.adapter.credit(connection, 1, D("2.50"), type="gift")
        assert posted.mode == "dual_write"
        assert place.adapter.balance(connection, 1).amount == D("102.50")
        assert place.coins(1) == 100  # another session does not see it yet
    assert place.coins(1) == D("102.50")
    assert place.account(1) == ("mirrored", D("102.50"))
    place.check()


def test_a_posting_is_rolled_back_with_the_owners_transaction(place: adapting.Place, database_url: str) -> None:
    with psycopg.connect(database_url) as connection:
        with connection.transaction(force_rollback=True):
            place.adapter.credit(connection, 1, 5, type="gift")
        assert coins(connection) == 100
        with connection.transaction():
            place.adapter.credit(connection, 1, 7, type="gift")
            with connection.transaction(force_rollback=True):
                place.adapter.credit(connection, 1, 5, type="gift")
    assert place.account(1) == ("mirrored", D(107))
    place.check()


def test_nothing_that_sqlalchemy_does_ends_the_owners_transaction(place: adapting.Place, database_url: str) -> None:
    with psycopg.connect(database_url) as connection:
        connection.execute("insert into users (id, tenant, role, total_coins) values (99, 'acme', 'member', 1)")
        place.adapter.credit(connection, 99, 5, type="gift")
        lent = borrowed(connection)
        lent.rollback()
        lent.close()
        place.adapter.credit(connection, 99, 5, type="gift")
        lent.engine.dispose()
        place.adapter.credit(connection, 99, 5, type="gift")
        connection.commit()
    assert place.coins(99) == 16
    place.check()


def test_a_refusal_leaves_the_owners_transaction_usable(place: adapting.Place, database_url: str) -> None:
    with psycopg.connect(database_url) as connection:
        with pytest.raises(InsufficientFunds):
            place.adapter.debit(connection, 1, 101, type="booking")
        place.adapter.debit(connection, 1, 100, type="booking")
    assert place.coins(1) == 0


def test_the_owners_way_of_rows_is_its_own(place: adapting.Place, database_url: str) -> None:
    with psycopg.connect(database_url, row_factory=dict_row) as connection:
        place.adapter.credit(connection, 1, 5, type="gift")
        assert connection.execute("select 1 as one").fetchone() == {"one": 1}


def test_a_connection_in_autocommit_posts_each_call_by_itself(place: adapting.Place, database_url: str) -> None:
    with psycopg.connect(database_url, autocommit=True) as connection:
        place.adapter.credit(connection, 1, 5, type="gift")
        assert place.coins(1) == 105
    place.check()


def test_a_connection_is_looked_at_once_and_not_kept_alive(place: adapting.Place, database_url: str) -> None:
    connection = psycopg.connect(database_url)
    assert borrowed(connection) is borrowed(connection)
    connection.close()
    known = weakref.ref(connection)
    del connection
    gc.collect()
    assert known() is None


def test_what_the_owner_registered_for_numbers_and_cursors_is_its_own(place: adapting.Place, database_url: str) -> None:
    with psycopg.connect(database_url, cursor_factory=psycopg.RawCursor) as connection:
        connection.adapters.register_loader("numeric", FloatLoader)
        posted = place.adapter.credit(connection, 1, D("0.10"), type="gift")
        found = place.adapter.balance(connection, 1)
        entry = place.adapter.history(connection, 1)[0]
        assert [(type(one), one) for one in (posted.legacy_balance, found.amount, entry.balance_after)] == [
            (D, D("100.10"))
        ] * 3
        row = connection.execute("select total_coins from users where id = $1", [1]).fetchone()
        assert row == (100.1,)
    place.check()


def test_a_connection_in_a_pipeline_is_refused_before_anything_is_sent(
    place: adapting.Place, database_url: str
) -> None:
    with psycopg.connect(database_url) as connection:
        place.adapter.balance(connection, 1)
        with connection.pipeline(), pytest.raises(UsageError, match="pipeline"):
            place.adapter.credit(connection, 1, 5, type="gift")
        place.adapter.credit(connection, 1, 7, type="gift")
    assert place.coins(1) == 107


def test_a_closed_connection_is_refused(place: adapting.Place, database_url: str) -> None:
    connection = psycopg.connect(database_url)
    connection.close()
    with pytest.raises(UsageError, match="closed"):
        place.adapter.credit(connection, 1, 5, type="gift")


class connection:  # noqa: N801 - as psycopg2 calls its own
    """A connection of another driver, as Django has it where only psycopg2 is installed."""


def test_a_connection_of_another_driver_is_refused_by_its_name(place: adapting.Place) -> None:
    said = rf"a connection of psycopg 3, and not {__name__}\.connection; async"
    with pytest.raises(UsageError, match=said):
        place.adapter.credit(connection(), 1, 5, type="deposit")  # type: ignore[arg-type]
