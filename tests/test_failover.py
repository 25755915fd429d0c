"""A crash of the primary and the promotion of a standby: what must have survived, and what a retry comes to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

import ledger
from ledger import ACT
from runbook_incidents import credit, failed_over, moved
from runbook_stage import Stage, backfilled
from servers import Postgres
from standby import pair
from walletmigrate import bypasses, doctor, fences, line, phases, snapshot_checks, snapshots
from walletmigrate.doctor import Finding
from walletmigrate.verify import verify

REJECTED = 2
LOGGED_AHEAD = 32
"""Values that PostgreSQL logs ahead of those that a sequence has given."""


@dataclass(frozen=True)
class Story:
    """What the primary said last, and what the promoted standby said first."""

    stage: Stage
    last: dict[str, Any]
    findings: tuple[Finding, ...]
    first: dict[str, Any]


LOOK = {
    "line": "select last_value from wallet.line",
    "transactions": "select count(*) from wallet.transactions",
    "last_id": "select max(id) from wallet.transactions",
    "system": "select array_agg(balance order by id) from wallet.system_balances",
    "audit": "select max(id) from wallet.audit_log",
    "fence": "select fence from wallet.mappings",
}


def seen(stage: Stage) -> dict[str, Any]:
    return {name: ledger.scalar(stage.engine, query) for name, query in LOOK.items()}


@pytest.fixture(scope="module")
def synchronous(server: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    """A synchronous standby takes over; the line had been stopped, and the crash comes amid a step of the phase."""
    with pair(server) as servers:
        stage = backfilled(server, servers.primary.create_database("shop"), tmp_path_factory.mktemp("failover"))
        fences.set_mode(stage.engine, stage.settings, stage.settings.mapping(None), "reject", ACT)
        for _ in range(REJECTED):
            with pytest.raises(DBAPIError, match="written through the adapter only"):
                ledger.execute(stage.engine, "update users set total_coins = 0 where id = 9")
        snapshots.take(stage.engine, stage.settings, ACT)
        servers.synchronous()
        credit(stage, 1, 5, "deposit:1")
        line.stop(stage.engine, stage.settings, ACT)
        step = psycopg.connect(stage.engine.url.set(drivername="postgresql").render_as_string(hide_password=False))
        step.execute("update wallet.control set phase = 'legacy'")
        step.execute("set constraints all immediate")
        # Its commit takes along to the disk, and to the standby, what the step has written, but not the step's end.
        credit(stage, 2, 5, "deposit:2")
        last = seen(stage)
        servers.crash_primary()
        servers.promote()
        assert servers.standby is not None
        after = moved(stage, servers.standby.url_for("shop"))
        first = seen(after)
        with after.engine.connect() as connection:
            findings = doctor.examine(connection, after.settings)
        step.close()
        yield Story(after, last, findings, first)


def test_what_was_committed_before_the_crash_is_there_the_stopped_line_included(synchronous: Story) -> None:
    assert synchronous.last["line"] == 2
    assert synchronous.first == synchronous.last


def test_a_step_of_the_phase_that_the_crash_cut_in_two_is_found_and_its_command_mends_it(synchronous: Story) -> None:
    assert [one.what for one in synchronous.findings] == [
        "postings take the phase for legacy; it is dual_write",
        "the line is stopped: accounts turn stale at their next write",
    ]
    owner, _, statement = synchronous.findings[0].mend.partition(": ")
    assert owner == "as the ledger's owner"
    ledger.execute(synchronous.stage.engine, statement)
    with synchronous.stage.engine.connect() as connection:
        (stopped,) = doctor.examine(connection, synchronous.stage.settings)
        assert stopped == synchronous.findings[1]
        assert phases.show(connection, synchronous.stage.settings).phase == "dual_write"


def test_the_journal_goes_on_above_its_last_id_and_is_no_restore(synchronous: Story) -> None:
    stage = synchronous.stage
    ledger.execute(stage.engine, "update wallet.control set phase = phase")  # what the crash had cut in two
    line.resume(stage.engine, stage.settings, ACT)
    posted = credit(stage, 4, 5, "deposit:4")
    assert posted.transaction_id is not None
    assert synchronous.last["last_id"] < posted.transaction_id <= synchronous.last["last_id"] + LOGGED_AHEAD + 1
    assert not snapshots.adopt(stage.engine, stage.settings, ACT)
    assert snapshots.take(stage.engine, stage.settings, ACT) is not None
    assert snapshot_checks.verify(stage.engine, stage.settings, ACT).clean


def test_the_count_of_rejected_writes_may_jump_as_the_runbook_says_but_never_falls(synchronous: Story) -> None:
    with synchronous.stage.engine.connect() as connection:
        counted = bypasses.rejected(connection, synchronous.stage.settings)["users"]
    assert REJECTED <= counted <= REJECTED + LOGGED_AHEAD


def test_a_payment_that_an_asynchronous_standby_lost_is_made_once_by_its_retry(
    server: Postgres, database_url: str, tmp_path: Path
) -> None:
    stage = failed_over(server, database_url, tmp_path)
    with stage.cleanup:
        with stage.engine.connect() as connection:
            assert phases.show(connection, stage.settings).line_running, "the stop was lost with the rest"
            coins = connection.scalar(text("select total_coins from users where id = 3"))
        again = [credit(stage, 3, 10, key) for key in ("deposit:41", "deposit:42", "deposit:42")]
        assert [one.replayed for one in again] == [True, False, True]
        assert ledger.scalar(stage.engine, "select total_coins from users where id = 3") == coins + 10 == 120
        assert verify(stage.engine, stage.settings, stage.settings.mapping(None), ACT).clean
