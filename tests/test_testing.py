"""The pytest plugin, used as an adopting application uses it: by tests of its own, in a pytest of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import servers
from shopping import SHOP

CONFTEST = """
import pytest
from models import Base

pytest_plugins = ["walletmigrate.testing"]


@pytest.fixture(scope="session")
def wallet_tables():
    return Base.metadata.create_all


@pytest.fixture
def ann(wallet):
    with wallet.session() as session, session.begin():
        user = User(tenant="acme", balance=100)
        session.add(user)
        session.flush()
        return user.id


from models import User
"""

TESTS = """
from decimal import Decimal

import pytest
from models import Booking, User
from sqlalchemy import func, select, text

from walletmigrate.errors import InsufficientFunds


@pytest.mark.parametrize("number", [1, 2, 3])
def test_what_is_committed_is_gone_at_the_next_test(wallet, number):
    with wallet.session() as session, session.begin():
        assert session.scalar(select(func.count()).select_from(User)) == 0
        session.add(User(tenant="acme", balance=5))


def test_without_flags_only_legacy_is_written(wallet, ann):
    wallet.adapter.debit(wallet.connection, ann, 30, type="booking")
    assert wallet.state(ann) == "absent"
    wallet.assert_balance(ann, 70)
    wallet.assert_entries(ann)


def test_with_dual_write_both_are_written_and_the_postings_can_be_asserted(wallet, ann):
    wallet.flags(dual_write=True)
    with wallet.session() as session:
        wallet.adapter.debit(session, ann, Decimal("30.25"), type="booking")
        wallet.adapter.credit(session, ann, 1, type="gift")
        session.commit()
    assert wallet.state(ann) == "mirrored"
    wallet.assert_balance(ann, Decimal("70.75"))
    wallet.assert_entries(ann, ("booking", Decimal("-30.25")), ("gift", 1))
    assert [entry.kind for entry in wallet.entries(ann)] == ["opening", "posting", "posting"]


def test_a_refused_posting_leaves_the_session_usable(wallet, ann):
    wallet.flags(dual_write=True)
    with wallet.session() as session:
        with pytest.raises(InsufficientFunds):
            wallet.adapter.debit(session, ann, 101, type="booking")
        session.add(Booking(user_id=ann, price=1))
        session.commit()
    wallet.assert_balance(ann, 100)


def test_the_phase_is_the_ceiling_of_the_flags(wallet, ann):
    wallet.flags(dual_write=True, read_from_ledger=True)
    wallet.phase("dual_write")
    wallet.adapter.credit(wallet.connection, ann, 1, type="gift")
    assert wallet.adapter.balance(wallet.connection, ann).source == "legacy"
    wallet.phase("read_ledger")
    assert wallet.adapter.balance(wallet.connection, ann).source == "ledger"
    wallet.phase("legacy")
    wallet.adapter.credit(wallet.connection, ann, 1, type="gift")
    assert wallet.state(ann) == "stale"


def test_the_phase_of_the_test_before_is_forgotten(wallet, ann):
    wallet.flags(dual_write=True)
    wallet.adapter.credit(wallet.connection, ann, 1, type="gift")
    assert wallet.state(ann) == "mirrored"


def test_a_frozen_account_lives_in_the_ledger_alone(wallet, ann):
    wallet.flags(dual_write=True)
    wallet.adapter.credit(wallet.connection, ann, 1, type="gift")
    wallet.freeze(ann)
    wallet.adapter.credit(wallet.connection, ann, 2, type="gift")
    wallet.assert_balance(ann, 103)
    assert wallet.connection.scalar(text("select balance from users")) == 101


def test_assertions_name_what_they_found(wallet, ann):
    wallet.flags(dual_write=True)
    wallet.adapter.credit(wallet.connection, ann, 1, type="gift")
    with pytest.raises(AssertionError, match=r"mirrored.*expected 5, found .*101"):
        wallet.assert_balance(ann, 5)
    with pytest.raises(AssertionError, match="expected .*booking.*found .*gift"):
        wallet.assert_entries(ann, ("booking", 1))
    wallet.freeze(ann)
    with pytest.raises(AssertionError, match="is frozen, not mirrored"):
        wallet.freeze(ann)


def test_a_phase_that_there_is_not_is_refused(wallet):
    with pytest.raises(Exception, match="wallet.freeze"):
        wallet.phase("frozen")
"""

AWAITING = """
import asyncio
from decimal import Decimal

import pytest
from models import User
from sqlalchemy import func, select

from walletmigrate.errors import InsufficientFunds


async def ann_of(wallet):
    async with wallet.session() as session, session.begin():
        assert await session.scalar(select(func.count()).select_from(User)) == 0
        user = User(tenant="acme", balance=100)
        session.add(user)
        await session.flush()
        return user.id


@pytest.mark.parametrize("number", [1, 2])
def test_what_is_awaited_is_written_and_rolled_back(async_wallet, number):
    async def go():
        async with async_wallet() as wallet:
            ann = await ann_of(wallet)
            wallet.flags(dual_write=True)
            async with wallet.session() as session:
                await wallet.adapter.debit(session, ann, Decimal("30.25"), type="booking")
                with pytest.raises(InsufficientFunds):
                    await wallet.adapter.debit(session, ann, 101, type="booking")
                await session.commit()
            assert await wallet.state(ann) == "mirrored"
            await wallet.assert_balance(ann, Decimal("69.75"))
            await wallet.assert_entries(ann, ("booking", Decimal("-30.25")))
            assert [entry.kind for entry in await wallet.entries(ann)] == ["opening", "posting"]
            with pytest.raises(AssertionError, match="expected 5"):
                await wallet.assert_balance(ann, 5)

    asyncio.run(go())


@pytest.mark.parametrize("number", [1, 2])
def test_phase_and_state_are_of_one_test(async_wallet, number):
    async def go():
        async with async_wallet() as wallet:
            ann = await ann_of(wallet)
            wallet.flags(dual_write=True, read_from_ledger=True)
            await wallet.adapter.credit(wallet.connection, ann, 1, type="gift")
            assert await wallet.state(ann) == "mirrored"
            await wallet.phase("dual_write")
            assert (await wallet.adapter.balance(wallet.connection, ann)).source == "legacy"
            await wallet.freeze(ann)
            await wallet.adapter.credit(wallet.connection, ann, 2, type="gift")
            await wallet.assert_balance(ann, 103)
            await wallet.phase("legacy")

    asyncio.run(go())


def test_the_plain_one_finds_nothing_of_it(wallet, ann):
    wallet.flags(dual_write=True)
    wallet.adapter.credit(wallet.connection, ann, 1, type="gift")
    assert wallet.state(ann) == "mirrored"
"""


def run(folder: Path, server: servers.Postgres | None, *more: str) -> tuple[int, str]:
    environment = {**os.environ, "PYTHONPATH": str(SHOP), "WALLETMIGRATE_CONFIG": str(SHOP / "walletmigrate.toml")}
    if server is not None:
        environment["WALLETMIGRATE_TEST_DATABASE_URL"] = server.url
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(folder), *more]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=240
    )
    return done.returncode, done.stdout + done.stderr


def test_an_application_tests_its_bookings_against_a_ledger_that_is_rolled_back(
    server: servers.Postgres, tmp_path: Path
) -> None:
    (tmp_path / "conftest.py").write_text(CONFTEST, encoding="utf-8")
    (tmp_path / "test_shop.py").write_text(TESTS, encoding="utf-8")
    code, said = run(tmp_path, server)
    assert code == 0, said
    assert re.search(rf"{len(re.findall('^def test_', TESTS, re.MULTILINE)) + 2} passed", said), said


def test_an_application_that_awaits_tests_as_well(server: servers.Postgres, tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(CONFTEST, encoding="utf-8")
    (tmp_path / "test_shop.py").write_text(AWAITING, encoding="utf-8")
    code, said = run(tmp_path, server)
    assert code == 0, said
    assert "5 passed" in said, said


def test_without_a_server_of_its_own_an_embedded_one_is_started(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(CONFTEST, encoding="utf-8")
    (tmp_path / "test_shop.py").write_text(TESTS, encoding="utf-8")
    code, said = run(tmp_path, None, "-k", "without_flags")
    assert code == 0, said


def test_who_forgets_the_tables_is_told_how(server: servers.Postgres, tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["walletmigrate.testing"]\n', encoding="utf-8")
    (tmp_path / "test_it.py").write_text("def test_it(wallet):\n    pass\n", encoding="utf-8")
    code, said = run(tmp_path, server)
    assert code == 1
    assert "override the session fixture wallet_tables" in said


def test_the_plugin_is_loaded_only_by_who_asks_for_it() -> None:
    code = "import sys, walletmigrate, walletmigrate.adapter; assert 'pytest' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
