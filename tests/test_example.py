"""The example shop, before and after, through the whole matrix: what a user does × where the migration stands."""

from __future__ import annotations

import difflib
import shutil
import time
from collections import Counter
from decimal import Decimal
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

import ledger
from adapting import check_invariants
from commandline import REASON, Project
from shopping import SHOP, WORKERS, Shop, make_tables, serving

D = Decimal
ADOPTION = SHOP.parent.parent / "docs" / "adoption.md"


def scenario(shop: Shop) -> None:
    """Bookings, refunds, adjustments and exports by two users: the same answers wherever the migration stands."""
    ann, bob = shop.join("acme"), shop.join("globex")
    assert shop.balance(ann) == 0
    assert shop.adjust(ann, "100.00").body == {"balance": "100.00"}
    assert shop.adjust(bob, "20.50").status == 200
    booked = shop.book(ann, "30.25")
    assert booked.status == 201
    assert shop.balance(ann) == D("69.75")
    assert shop.book(bob, "20.51").status == 409
    assert shop.book(999_999, "1").status == 404
    assert shop.balance(bob) == D("20.50")
    assert shop.refund(booked.body["booking"]).body["state"] == "refunded"
    assert shop.refund(booked.body["booking"]).status == 409
    assert shop.balance(ann) == 100
    assert shop.book(ann, "100.00").status == 201
    exported = shop.export()
    assert (exported[ann], exported[bob]) == (D(0), D("20.50"))


@pytest.fixture
def project(database_url: str, tmp_path: Path) -> Project:
    made = Project(tmp_path, database_url)
    make_tables(database_url)
    shutil.copy(SHOP / "walletmigrate.toml", made.config)
    return made


def test_the_shop_works_before_it_knows_of_a_ledger(database_url: str, tmp_path: Path) -> None:
    make_tables(database_url)
    with serving("before", database_url, tmp_path) as shop:
        scenario(shop)


def test_one_running_shop_goes_all_the_way_to_the_ledger_and_back(project: Project) -> None:
    advance = ("phase", "advance")
    confirm = ("--confirm", "users")
    modes: dict[str, list[tuple[str, ...]]] = {
        "not installed": [],
        "legacy": [("install",)],
        "dual_write": [advance, ("flags", "set", "wallet.dualWrite", "on", "--everyone"), ("backfill",)],
        "read_ledger": [
            ("backfill",),  # for what a worker wrote before it saw the flag
            ("verify",),
            ("rollback", "--exercise"),
            advance,
            ("cutover", "--cohort", "tenant=acme", *confirm),
            ("cutover", "--everyone", *confirm),
        ],
        "wallet_only": [advance],
        "frozen": [("rollback", "--exercise"), ("backfill",), ("verify",), ("freeze", *confirm)],
        "wallet_only again": [("unfreeze", *confirm)],
        "read_ledger again": [("phase", "back")],
        "legacy reads again": [("rollback",)],
    }
    engine = ledger.engine_named(project.url)
    with serving("after", project.url, project.folder, project.config) as shop:
        for mode, steps in modes.items():
            for step in steps:
                said = project.run(*step, *REASON)
                assert said.exit_code == 0, (mode, step, said)
            scenario(shop)
            if mode != "not installed":
                verified = project.run("verify", "--json").document
                assert [one["drift_accounts"] for one in verified["mappings"]] == [0], mode
                check_invariants(engine, project.settings)
        counted = Counter(dict(_scraped(shop)))
    # Two users joined, two adjustments, three bookings, of which one was refused, and a refund.
    posted = [each for each in counted if each[0] == "walletmigrate_dual_write_total" and counted[each]]
    assert sum(counted[each] for each in posted) == len(modes) * 8
    refused = {labels for _, labels in posted if ("outcome", "refused") in labels}
    assert sum(counted["walletmigrate_dual_write_total", labels] for labels in refused) == len(modes)


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
        assert until_beating(project) == WORKERS
    assert [row["where"] for row in traced] == ["ledger"]
    assert traced[0]["details"]["reference_type"] == "booking"


def until_beating(project: Project) -> int:
    """How many workers the database knows; each beats by itself once it has started."""
    count, deadline = 0, time.monotonic() + 30
    while count < WORKERS and time.monotonic() < deadline:
        count = ledger.scalar(
            ledger.engine_named(project.url), "select count(*) from wallet.processes where name = 'shop'"
        )
    return count


def test_the_adoption_guide_shows_the_difference_between_the_two_files_as_it_is() -> None:
    before, after = ((SHOP / name).read_text().splitlines() for name in ("before.py", "after.py"))
    made = "\n".join(difflib.unified_diff(before, after, "before.py", "after.py", lineterm="", n=2))
    assert f"```diff\n{made}\n```" in ADOPTION.read_text(encoding="utf-8")
