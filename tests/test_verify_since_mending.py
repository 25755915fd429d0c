"""An incremental run after a fence that was down: what went past it stands in legacy rows alone, so it looks at all."""

from __future__ import annotations

from typing import Any

import pytest

from ledger import ACT, execute, scalar
from test_verify_forms import drift
from verifying import Ledger, prepared, run
from walletmigrate import verifications
from walletmigrate.backfill import backfill


@pytest.fixture
def made(database_url: str) -> Ledger:
    return prepared(database_url)


def test_an_incremental_run_after_a_mended_fence_looks_at_all_accounts(made: Ledger) -> None:
    """What was written past the fence stands in legacy rows alone. It is so until a full run has been clean."""
    engine, settings = made
    run(made)
    assert run(made, since_last=True).widened is None
    drift(*made)
    mended = scalar(engine, "select max(at) from wallet.audit_log where action = 'fence mended'")
    asked: tuple[dict[str, Any], ...] = ({}, {"since_last": True}, {"since_last": True})
    for options in asked:
        result = run(made, **options)
        assert (result.form, result.clean, result.widened) == ("full", False, mended if options else None)
    with engine.begin() as connection:
        found = verifications.runs(connection, settings, limit=1)[0]
    assert (found.form, found.details["widened"]) == ("full", mended.isoformat())
    run(made, since_last=True, mark_stale=True)
    backfill(*made, settings.mapping(None), ACT)
    assert run(made, since_last=True).clean
    assert run(made, since_last=True).form == "incremental"


def test_a_mended_fence_of_another_mapping_widens_nothing(made: Ledger) -> None:
    run(made)
    execute(
        made[0],
        "insert into wallet.audit_log (action, actor, reason, mapping) values ('fence mended', 'tests', 'x', 'others')",
    )
    assert run(made, since_last=True).form == "incremental"
