"""The example shop, before and after, through the whole matrix: what a user does × where the migration stands."""

from __future__ import annotations

import difflib
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from itertools import product
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import Engine

import ledger
from adapting import check_invariants
from commandline import REASON, Project
from monitoring import until
from shopping import SHOP, WORKERS, Shop, make_tables, serving
from walletmigrate.flag_sources import FileSource

D = Decimal
ADOPTION, README = SHOP.parent.parent / "docs" / "adoption.md", SHOP.parent.parent / "README.md"


OPERATIONS = {"booking", "refund", "adjustment", "export"}


def scenario(shop: Shop) -> Iterator[tuple[str, int, Decimal]]:
    """Bookings, refunds, adjustments and exports by two users: the same answers wherever the migration stands.

    Gives, after each request, what it was, whose balance to look at, and what that must be.
    """
    ann, bob = shop.join("acme"), shop.join("globex")
    assert shop.balance(ann) == 0
    assert shop.adjust(ann, "100.00").body == {"balance": "100.00"}
    yield "adjustment", ann, D(100)
    assert shop.adjust(bob, "20.50").status == 200
    yield "adjustment", bob, D("20.50")
    booked = shop.book(ann, "30.25")
    assert booked.status == 201
    assert shop.balance(ann) == D("69.75")
    yield "booking", ann, D("69.75")
    assert shop.book(bob, "20.51").status == 409
    assert shop.book(999_999, "1").status == 404
    assert shop.balance(bob) == D("20.50")
    yield "booking", bob, D("20.50")
    assert shop.refund(booked.body["booking"]).body["state"] == "refunded"
    yield "refund", ann, D(100)
    assert shop.refund(booked.body["booking"]).status == 409
    assert shop.balance(ann) == 100
    yield "refund", ann, D(100)
    assert shop.book(ann, "100.00").status == 201
    yield "booking", ann, D(0)
    exported = shop.export()
    for user, balance in ((ann, D(0)), (bob, D("20.50"))):
        assert exported[user] == balance
        yield "export", user, balance


@dataclass(frozen=True)
class Mode:
    """How the migration comes to where it stands, which side is written there, and which is read."""

    steps: tuple[tuple[str, ...], ...]
    legacy: bool = True
    ledger: bool = True
    read: str = "legacy"

    def sides(self, balance: Decimal) -> tuple[Decimal, Decimal | None]:
        """What must stand in the column and in the ledger, if a new user has so much; the column began at 0."""
        return balance if self.legacy else D(0), balance if self.ledger else None


def held(engine: Engine, user: int) -> tuple[Decimal, Decimal | None]:
    """What stands in the column and in the ledger; None without an account there."""
    installed = ledger.scalar(engine, "select to_regclass('wallet.accounts') is not null")
    query = "select balance from wallet.accounts where key = :key and bucket = 'cash'"
    return (
        ledger.scalar(engine, "select balance from users where id = :id", id=user),
        ledger.scalar(engine, query, key=str(user)) if installed else None,
    )


@pytest.fixture
def project(database_url: str, tmp_path: Path) -> Project:
    made = Project(tmp_path, database_url)
    make_tables(database_url)
    shutil.copy(SHOP / "walletmigrate.toml", made.config)
    return made


def test_the_shop_works_before_it_knows_of_a_ledger(database_url: str, tmp_path: Path) -> None:
    make_tables(database_url)
    engine = ledger.engine_named(database_url)
    with serving("before", database_url, tmp_path) as shop:
        for what, user, balance in scenario(shop):
            assert held(engine, user) == (balance, None), what


ADVANCE = ("phase", "advance")
CONFIRM = ("--confirm", "users")
FOR_ALL = ("flags", "set", "wallet.dualWrite", "on", "--everyone")
MODES = {
    "not installed": Mode((), ledger=False),
    "legacy": Mode((("install",),), ledger=False),
    "dual_write": Mode((ADVANCE, FOR_ALL, ("backfill",))),
    "read_ledger": Mode(
        (
            ("backfill",),  # for what a worker wrote before it saw the flag
            ("verify",),
            ("rollback", "--exercise"),
            ADVANCE,
            ("cutover", "--cohort", "tenant=acme", *CONFIRM),
            ("cutover", "--everyone", *CONFIRM),
        ),
        read="ledger",
    ),
    "wallet_only": Mode((ADVANCE,), read="ledger"),
    "frozen": Mode(
        (("rollback", "--exercise"), ("backfill",), ("verify",), ("freeze", *CONFIRM)), legacy=False, read="ledger"
    ),
    "wallet_only again": Mode((("unfreeze", *CONFIRM),), read="ledger"),
    "read_ledger again": Mode((("phase", "back"),), read="ledger"),
    "legacy reads again": Mode((("rollback",),)),
}


def test_one_running_shop_goes_all_the_way_to_the_ledger_and_back(project: Project) -> None:
    engine, cells = ledger.engine_named(project.url), set()
    with serving("after", project.url, project.folder, project.config) as shop:
        for name, mode in MODES.items():
            for step in mode.steps:
                said = project.run(*step, *REASON)
                assert said.exit_code == 0, (name, step, said)
            if name != "not installed":
                until_decided(project)
            reads = read(shop)
            for what, user, balance in scenario(shop):
                assert held(engine, user) == mode.sides(balance), (name, what)
                cells.add((name, what))
            assert set(read(shop) - reads) == {mode.read}, name
            if name != "not installed":
                verified = project.run("verify", "--json").document
                assert [one["drift_accounts"] for one in verified["mappings"]] == [0], name
                check_invariants(engine, project.settings)
        counted = Counter(dict(_scraped(shop)))
    assert cells == set(product(MODES, OPERATIONS))
    # Two users joined, two adjustments, three bookings, of which one was refused, and a refund.
    posted = [each for each in counted if each[0] == "walletmigrate_dual_write_total" and counted[each]]
    assert sum(counted[each] for each in posted) == len(MODES) * 8
    refused = {labels for _, labels in posted if ("outcome", "refused") in labels}
    assert sum(counted["walletmigrate_dual_write_total", labels] for labels in refused) == len(MODES)


def read(shop: Shop) -> Counter[str]:
    """How many balances all workers have read, by the side that answered."""
    found = [(dict(labels), value) for (name, labels), value in _scraped(shop) if name == "walletmigrate_read_total"]
    return Counter({labels["source"]: int(value) for labels, value in found})


def until_decided(project: Project) -> None:
    """Wait until each worker has said that it decides by the flags as they are now."""
    now = FileSource(project.flag_path).snapshot().document_id
    query = "select count(*) from wallet.processes where name = 'shop' and document_id = :now"
    engine = ledger.engine_named(project.url)
    until(lambda: ledger.scalar(engine, query, now=now) == WORKERS)


def _scraped(shop: Shop) -> list[tuple[tuple[str, tuple[tuple[str, str], ...]], float]]:
    page = shop.ask("/metrics").body
    return [
        ((sample.name, tuple(sorted(sample.labels.items()))), sample.value)
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    ]


def test_a_request_is_traced_from_its_header_to_the_ledger_and_each_worker_is_known(project: Project) -> None:
    for step in (("install",), ("phase", "advance"), ("flags", "set", "wallet.dualWrite", "on", "--everyone")):
        project.change(*step)
    with serving("after", project.url, project.folder, project.config) as shop:
        ann = shop.join()
        shop.adjust(ann, "10")
        assert shop.book(ann, "4", request_id="request-77").status == 201
        traced = project.run("trace", "request-77", "--json").document["rows"]
        until_decided(project)  # each beats by itself once it has started
        until(lambda: '"request-77"' in shop.log.read_text(encoding="utf-8"))
    assert [row["where"] for row in traced] == ["ledger"]
    assert traced[0]["details"]["reference_type"] == "booking"


@pytest.mark.parametrize("page", [README, ADOPTION], ids=["README", "adoption"])
def test_the_whole_difference_between_the_two_files_is_shown_as_it_is(page: Path) -> None:
    before, after = ((SHOP / name).read_text().splitlines() for name in ("before.py", "after.py"))
    made = "\n".join(difflib.unified_diff(before, after, "before.py", "after.py", lineterm="", n=2))
    needed = ("+from walletmigrate import", ".from_config(", "+heartbeat = ", "adapter.debit(", "adapter.set_balance(")
    assert [line for line in needed if line not in made] == []
    assert f"```diff\n{made}\n```" in page.read_text(encoding="utf-8")
