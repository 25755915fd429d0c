"""What the tests of verify share: a ledger that follows its legacy table, a run over it, and what is said of it."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import Engine

from copies import copied
from ledger import ACT, engine_named, install_users, post, rows, scalar, users_settings
from walletmigrate.backfill import backfill
from walletmigrate.config import Settings
from walletmigrate.verify import Verification, verify

Ledger = tuple[Engine, Settings]
ROWS = 10


def prepared(url: str, **options: Any) -> Ledger:
    """Ten mirrored accounts of 100, of which some have moved money."""
    copied(url, f"verifying {sorted(options.items())}", lambda: _prepare(url, options))
    columns = {name: value for name, value in options.items() if name in ("unit", "scale", "with_promo", "policy")}
    return engine_named(url), users_settings(url, **columns)


def _prepare(url: str, options: dict[str, Any]) -> None:
    engine, settings = install_users(url, **{"rows": ROWS, "phase": "dual_write", **options})
    backfill(engine, settings, settings.mapping(), ACT)
    keys = [key for (key,) in rows(engine, "select u.id::text from users as u order by u.id")]
    with engine.begin() as connection:
        post(connection, settings, "credit", keys[0], 5)
        post(connection, settings, "credit", keys[0], "2.50")
        post(connection, settings, "transfer", keys[0], 10, payee=keys[1])
        post(connection, settings, "debit", keys[2], 100)


@pytest.fixture
def made(database_url: str) -> Ledger:
    return prepared(database_url)


def run(made: Ledger, **options: Any) -> Verification:
    engine, settings = made
    return verify(engine, settings, settings.mapping(), ACT, **options)


def account(engine: Engine, key: str) -> int:
    return int(scalar(engine, "select id from wallet.accounts where key = :key and bucket = 'cash'", key=key))


def assert_only(result: Verification, *parts: str) -> None:
    """These parts of the result have something to say, and no others."""
    assert not result.clean
    said = {
        "drift": bool(result.drift or result.drift_accounts),
        "behind": bool(result.behind or result.missing or result.stale),
        "journal": bool(result.journal or result.journal_accounts),
        "imbalance": any(result.imbalance.values()),
        "guards": bool(result.guards),
    }
    assert {name for name, is_said in said.items() if is_said} == set(parts)


def states_of(engine: Engine) -> dict[str, str]:
    """The state of every account, by key and bucket, that is not mirrored."""
    query = "select key || ' ' || bucket, state::text from wallet.accounts where state <> 'mirrored' order by 1"
    return dict(rows(engine, query))


def marks(engine: Engine) -> list[dict[str, Any]]:
    """What the audit rows of the marks say."""
    return [
        facts for (facts,) in rows(engine, "select details from wallet.audit_log where action = 'verify mark-stale'")
    ]
