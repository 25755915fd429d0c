"""Every interleaving of the protocol's operations, a share of them in each test run and all with `make torture`.

What an order is, and how its name is read, stands in torture_scheduler.py. `pytest tests/test_torture.py --order NAME`
plays one again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import islice, product

import psycopg
import pytest
from sqlalchemy.pool import NullPool

import servers
import shares
from guardless import ACCOUNT_LOCKS, PROBE, Mutant, remove
from invariants import assert_sound
from ledger import ACT, execute, install_users, set_phase, users_settings
from shares import Share
from torture import Arena, OrderFailedError, arena
from torture_orders import MODES, PAIRED, STATES, pairs, pauses
from torture_scheduler import Order
from torture_stories import STORIES, partitions
from walletmigrate import connect
from walletmigrate.install import install

_ORDERS_PER_DATABASE = 3000
_PARTITIONS_PER_DATABASE = 60

SHARES = {
    "pairs": 571,
    "pauses": 2203,
    "a_old_snapshots": 29,
    "b_postings_that_wait_for_jobs": 13,
    "c_backfills_that_wait": 5,
    "d_keys": 211,
    "e_failing_legs": 211,
    "f_readers": 43,
    "g_triggers": 1201,
    "h_forgeries": 919,
    "i_transfers": 307,
    "j_folds": 499,
    "m_changes_of_mode": 1229,
    "l_partitions": 367,
}
"""One order of so many is played without --torture; primes, so that every kind of order comes."""


@dataclass
class Theatre:
    """Arenas on one server, each used for some thousand orders: what a ledger holds makes its checks slower."""

    server: servers.Postgres
    share: Share | None
    _stack: ExitStack = field(default_factory=ExitStack)
    _arena: Arena | None = None
    _impossible: set[tuple[str, ...]] = field(default_factory=set)

    def play(self, orders: list[Order], counts: Counter[str]) -> list[str]:
        """Play orders in one database, and check it as a whole. Returns which failed, and how."""
        if self._arena is None or self._arena.counts["orders"] > _ORDERS_PER_DATABASE:
            self.renew()
        assert self._arena is not None
        before = self._arena.counts.copy()
        failed = self._arena.run_all(orders)
        counts.update(self._arena.counts - before)
        assert_sound(self._arena.engine, self._arena.settings)
        return failed

    def play_partitions(self, orders: list[Order], counts: Counter[str]) -> list[str]:
        """The same for orders each of which has a partition of its own."""
        with connect.scratch_database(self.server.url, None) as url, partitioned(url) as made:
            failed = made.run_all(orders)
            counts.update(made.counts)
        return failed

    def renew(self) -> Arena:
        """Go on in a fresh database."""
        self.close()
        url = self._stack.enter_context(connect.scratch_database(self.server.url, None))
        settings = install_users(url, rows=0, phase="dual_write")[1]
        self._arena = self._stack.enter_context(arena(url, settings, impossible=self._impossible))
        return self._arena

    def close(self) -> None:
        """Close the sessions and drop the database."""
        self._arena = None
        self._stack.close()


@pytest.fixture(scope="module")
def theatre(server: servers.Postgres, pytestconfig: pytest.Config) -> Iterator[Theatre]:
    made = Theatre(server, shares.asked(pytestconfig))
    yield made
    made.close()


Play = Callable[[str, Iterable[Order]], None]


@pytest.fixture
def play(theatre: Theatre, record_property: Callable[[str, object], None]) -> Play:
    """Play a share of the orders of a kind; the summary of the run adds up how many there were."""

    def played(kind: str, orders: Iterable[Order]) -> None:
        share = theatre.share or Share(1, SHARES[kind])
        counts, failed = Counter[str](), list[str]()
        chosen = share.choose(_counted(orders, counts))
        by, at_once = (
            (theatre.play_partitions, _PARTITIONS_PER_DATABASE)
            if kind == "l_partitions"
            else (theatre.play, _ORDERS_PER_DATABASE)
        )
        try:
            while some := list(islice(chosen, at_once)):
                failed += by(some, counts)
        finally:
            record_property("orders", [counts["orders"] + counts["failed"], counts["impossible"], counts["there are"]])
        if failed:
            raise OrderFailedError(f"{len(failed)} orders failed:\n" + "\n".join(failed[:20]))
        # A share of very many may have no order, or none that is possible.
        assert counts["orders"] or (theatre.share and counts["there are"] < 1000 * theatre.share.of)

    return played


@pytest.mark.parametrize("first", PAIRED)
def test_after_every_interleaving_of_two_transactions_the_money_is_right(play: Play, first: str) -> None:
    play("pairs", pairs(first=first))


@pytest.mark.parametrize("first", PAIRED)
def test_after_every_pause_inside_a_call_the_money_is_right(play: Play, first: str) -> None:
    play("pauses", pauses(first=first))


@pytest.mark.parametrize("story", STORIES)
def test_after_every_order_of_a_story_the_money_is_right(play: Play, story: str) -> None:
    play(story, STORIES[story]())


def test_after_partitions_are_truncated_detached_or_made_the_money_is_right(play: Play) -> None:
    play("l_partitions", partitions())


def test_an_order_by_its_name(theatre: Theatre, pytestconfig: pytest.Config) -> None:
    names = pytestconfig.getoption("order") or ["mirrored:credit.rc.commit,backfill.rc.rollback:1-2-e1-e2"]
    orders = [Order.named(name) for name in names]
    assert [str(order) for order in orders] == names
    assert theatre.play(orders, Counter()) == []


BEGUN = {
    "absent": (100, None, None),
    "mirrored": (100, "mirrored", 100),
    "stale": (101, "stale", 100),
    "frozen": (100, "frozen", 105),
    "closed": (None, "closed", 100),
}
"""Row, state and ledger at the start of an order, by state."""


@pytest.mark.parametrize("mode", MODES)
def test_orders_that_are_set_up_at_once_begin_each_as_its_name_says(theatre: Theatre, mode: str) -> None:
    place, pairs_of_states = theatre.renew(), list(product(STATES, STATES))
    execute(place.engine, "select torture_mode(:mode)", mode=mode)  # whichever the order before had
    orders = [Order.named(f"{one}+{other}:credit.rc.commit:1-e1") for one, other in pairs_of_states]
    for scene, states in zip(place.set_up(orders), pairs_of_states, strict=True):
        found = [(row.legacy, row.state, row.ledger) for row in place.look(scene)]
        assert found == [*(BEGUN[state] for state in states), *[(None, None, None)] * 2]


def test_what_the_torture_asks_in_vain_is_an_error(theatre: Theatre) -> None:
    wire = theatre.renew().crew.wire
    with pytest.raises(psycopg.errors.DivisionByZero):
        wire.ask("select 1 / $1::int", 0)
    assert wire.ask("select $1::int, null", 7) == [("7", None)]


def _counted(orders: Iterable[Order], counts: Counter[str]) -> Iterator[Order]:
    for order in orders:
        counts["there are"] += 1
        yield order


# The orders find what they are there for


def test_a_reader_in_two_statements_needs_a_snapshot(theatre: Theatre) -> None:
    """That is why the library reads in one."""
    name = (
        "stale+reading:read_in_two.{}.commit,backfill.rc.commit,freeze.rc.commit,credit.rc.commit:1-2-e2-3-e3-4-e4-1-e1"
    )
    place = theatre.renew()
    place.run(Order.named(name.format("rr")))
    with pytest.raises(OrderFailedError, match="and 111"):
        place.run(Order.named(name.format("rc")))


FOUND: dict[str, tuple[Mutant, str]] = {
    "accounts read without a lock": (ACCOUNT_LOCKS, "stale:raw.rr.commit,backfill.rc.commit:l1-2-e2-1-e1"),
    "no probe": (PROBE, "absent:raw.rr.commit,backfill.rc.commit:l1-2-e2-1-e1"),
    "rows read without a lock": (
        Mutant(("lock_users", "span_users"), "for no key update", ""),
        "absent:credit.rc.commit,backfill.rc.commit:1-2-e1-e2",
    ),
    "no key in the long way": (
        Mutant(("post_movement",), r"if m\.idempotency_key is not null and not p_reserved", "if false"),
        "absent:same.rc.commit,same.rc.commit:1-2-e1-e2",
    ),
    "a key in use is not asked for": (
        Mutant(("fence_users",), r"(?<=v_label\.request\));", " on conflict do nothing;"),
        "mirrored:same.rc.commit,same.rc.commit:1-2-e1-e2",
    ),
    "neither state nor balance asked by the update": (
        Mutant(("fence_users",), r"a\.state = 'mirrored' and a\.balance = \S+\s+returning", "true returning"),
        "frozen:forged.rc.commit,stop.rc.commit:1-e1-2-e2",
    ),
    "mirror does not ask for the line": (
        Mutant(("fence_users",), r"and pg_sequence_last_value\(\S+\) < pg_sequence_last_value\(\S+\)\s+then", "then"),
        "mirrored+mirror:stop.rc.commit,raw.rr.commit:l2-1-e1-2-e2",
    ),
    "mirror follows what the event wrote, not the row as it is now": (
        Mutant(("fence_users",), r"v_now\[1\]", "v_after"),
        "mirrored+early_same+mirror:raw.rc.commit,backfill.rc.commit:1-e1-2-e2",
    ),
    "mirror reads the account without a lock": (
        ACCOUNT_LOCKS,
        "stale+mirror:raw.rr.commit,backfill.rc.commit:l1-2-e2-1-e1",
    ),
    "reject does not reject": (
        Mutant(("fence_users",), r"raise exception '[^']+ is written through[^;]+;", "v_treatment := 'stale';"),
        "mirrored+reject:raw.rc.commit,freeze.rc.commit:1-e1-2-e2",
    ),
    "a serialization failure of the leg is hidden": (
        Mutant(("shadow_ledger",), r"v_state like '40%'", "false"),
        "absent:fail_serial.rc.commit,stop.rc.commit:1-e1-2-e2",
    ),
    "what is not frozen is rejected": (
        Mutant(("fence_users",), r"(?<=elsif v_account\.state) = 'frozen'", " <> 'stale'"),
        "mirrored:raw.rc.commit,stop.rc.commit:1-e1-2-e2",
    ),
}
"""A guard, and an order that ends badly without it."""


@pytest.mark.parametrize("guard", FOUND)
def test_an_order_ends_well_and_without_a_guard_badly(theatre: Theatre, guard: str) -> None:
    mutant, name = FOUND[guard]
    place = theatre.renew()
    place.run(Order.named(name))
    remove(place.engine, mutant)
    with pytest.raises(OrderFailedError):
        place.run(Order.named(name))
    theatre.close()


def test_a_truncate_is_refused_for_its_own_order_s_frozen_accounts_and_found_where_it_leaves_a_mirror(
    theatre: Theatre,
) -> None:
    with connect.scratch_database(theatre.server.url, None) as url, partitioned(url) as made:
        frozen, order = (
            Order.named(f"{state}:truncate.rc.commit,raw.rc.commit:1-e1-2-e2") for state in ("frozen", "mirrored")
        )
        assert made.run(frozen).startswith("truncate: WM030")
        assert made.run(order).startswith("truncate: done")
        remove(made.engine, Mutant(("fence_truncate_users",), r"in \('mirrored', 'stale'\)", "is null"))
        with pytest.raises(OrderFailedError, match="the mirror is not true"):
            made.run(order)


@contextmanager
def partitioned(url: str) -> Iterator[Arena]:
    """An arena whose table has a partition for the rows A and B of each order."""
    engine = connect.engine(url, application_name="torture", poolclass=NullPool)
    bounds = range(10, 10 * _PARTITIONS_PER_DATABASE + 10, 10)
    parts = [
        f"create table users_{base} partition of users for values from ({base + 1}) to ({base + 3})" for base in bounds
    ]
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "create table users (id bigint primary key, tenant text, role text, total_coins numeric(20, 2)) "
            "partition by range (id); " + "; ".join(parts)
        )
    settings = users_settings(url)
    install(engine, settings, ACT)
    set_phase(engine, "dual_write")
    with arena(url, settings, at_once=1) as made:
        yield made
