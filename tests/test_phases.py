"""The phase machine, on a real database: steps forward and back, the exercise, and two steps at once."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from sqlalchemy import Connection, text
from sqlalchemy.pool import NullPool

import ledger
from phase_stage import ACT, EVERYONE, KNOWN, Stage, fence, stage
from walletmigrate import connect, phases
from walletmigrate.config import Settings
from walletmigrate.errors import LedgerNotInstalled, PreconditionRefused, UsageError
from walletmigrate.flag_sources import FileSource
from walletmigrate.standing import in_force_since

__all__ = ["stage"]


def test_a_database_without_a_ledger_is_in_phase_legacy_and_cannot_advance(database_url: str) -> None:
    settings = ledger.users_settings(database_url)
    engine = connect.engine(database_url, application_name="test", poolclass=NullPool)
    with engine.connect() as connection:
        state = phases.show(connection, settings)
    assert (state.phase, state.installed, state.next, state.previous) == ("legacy", False, "dual_write", None)
    with pytest.raises(PreconditionRefused, match="not installed") as refused:
        phases.advance(engine, settings, KNOWN, ACT)
    assert refused.value.reasons[0][1].startswith("walletmigrate install")
    with pytest.raises(LedgerNotInstalled):
        phases.rollback(engine, settings, None, ACT)


def test_a_step_forward_leaves_an_audit_row_with_actor_and_reason(stage: Stage) -> None:
    done = stage.advance()
    assert (done.before, done.after, done.changed, done.dry_run) == ("legacy", "dual_write", True, False)
    assert stage.audited()[-1] == (
        "phase advance",
        "admin:7",
        "a test of the phases",
        {"from": "legacy", "to": "dual_write"},
    )
    assert done.audit_id == ledger.scalar(stage.engine, "select max(id) from wallet.audit_log")


def test_a_dry_run_goes_through_the_gate_and_changes_nothing(stage: Stage) -> None:
    before = stage.audited()
    done = stage.advance(dry_run=True)
    assert (done.after, done.audit_id) == ("dual_write", None)
    assert (stage.phase, stage.audited()) == ("legacy", before)
    ledger.execute(stage.engine, f"drop trigger {fence(stage, 'update')} on public.users")
    with pytest.raises(PreconditionRefused):
        stage.advance(dry_run=True)


def test_a_target_that_is_reached_already_is_no_error_and_leaves_no_row(stage: Stage) -> None:
    stage.advance(to="dual_write")
    rows = stage.audited()
    assert not stage.advance(to="dual_write").changed
    assert not stage.back(to="dual_write").changed
    assert stage.audited() == rows
    with pytest.raises(UsageError, match="no phase 'dualwrite'"):
        stage.advance(to="dualwrite")


def test_the_phase_moves_one_step_at_a_time_in_both_directions(stage: Stage) -> None:
    with pytest.raises(PreconditionRefused, match="one step at a time"):
        stage.advance(to="read_ledger")
    stage.to("read_ledger")
    with pytest.raises(PreconditionRefused, match="one step at a time"):
        stage.back(to="legacy")
    assert stage.phase == "read_ledger"


def test_the_exercise_steps_back_and_forward_and_does_not_restart_the_window(stage: Stage) -> None:
    stage.to("dual_write")
    since = "select at from wallet.audit_log where details ->> 'to' = 'dual_write' order by id limit 1"
    begun = ledger.scalar(stage.engine, since)
    done = phases.exercise(stage.engine, stage.settings, KNOWN, ACT)
    assert (done.phase, done.through, len(done.audit_ids)) == ("dual_write", "legacy", 2)
    assert [(row[0], row[3]) for row in stage.audited()[-2:]] == [
        ("phase back", {"from": "dual_write", "to": "legacy", "exercise": True}),
        ("phase advance", {"from": "legacy", "to": "dual_write", "exercise": True}),
    ]
    with stage.engine.connect() as connection:
        assert in_force_since(connection, stage.settings, "dual_write") == begun


def test_an_exercise_whose_way_forward_fails_says_where_it_left_the_phase(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command again would begin one phase lower."""
    stage.to("dual_write")
    honest = phases._move

    def move(connection: Connection, settings: Settings, action: str, *rest: Any, **options: Any) -> Any:
        if action == "phase advance":
            connection.exec_driver_sql("do $$ begin raise 'canceling statement' using errcode = '57014'; end $$")
        return honest(connection, settings, action, *rest, **options)

    monkeypatch.setattr(phases, "_move", move)
    with pytest.raises(PreconditionRefused) as refused:
        phases.exercise(stage.engine, stage.settings, KNOWN, ACT)
    assert stage.phase == "legacy"
    assert "from dual_write to legacy, and perhaps not forward again: canceling statement" in str(refused.value)
    assert "walletmigrate phase advance --to dual_write" in str(refused.value)


def test_the_exercise_is_refused_where_there_is_no_step_or_no_way_forward(stage: Stage) -> None:
    with pytest.raises(PreconditionRefused, match="legacy is the first phase"):
        phases.exercise(stage.engine, stage.settings, KNOWN, ACT)
    stage.to("dual_write")
    ledger.execute(stage.engine, f"drop trigger {fence(stage, 'insert')} on public.users")
    with pytest.raises(PreconditionRefused, match="is missing"):
        phases.exercise(stage.engine, stage.settings, KNOWN, ACT)
    assert stage.phase == "dual_write"


def test_a_dry_run_of_the_exercise_leaves_no_trace(stage: Stage) -> None:
    stage.to("dual_write")
    before = stage.audited()
    assert phases.exercise(stage.engine, stage.settings, KNOWN, ACT, dry_run=True).audit_ids == ()
    assert (stage.phase, stage.audited()) == ("dual_write", before)


def test_a_step_back_is_never_gated_and_loses_nothing(stage: Stage) -> None:
    stage.to("dual_write")
    ledger.execute(stage.engine, "select wallet.set_line(false)")
    assert stage.back().after == "legacy"
    ledger.execute(stage.engine, "select wallet.set_line(true)")
    with stage.engine.begin() as connection:
        assert ledger.post(connection, stage.settings, "credit", 3, 5)["mode"] == "legacy"
    stage.advance()
    stage.backfill()
    assert stage.verify()
    assert ledger.scalar(stage.engine, "select balance from wallet.accounts where key = '3'") == 105


def test_every_phase_but_the_first_and_frozen_can_be_left_backwards(stage: Stage) -> None:
    stage.to("wallet_only")
    assert [stage.back().after for _ in range(3)] == ["read_ledger", "dual_write", "legacy"]
    with pytest.raises(PreconditionRefused, match="legacy is the first phase") as refused:
        stage.back()
    assert "uninstall" in refused.value.reasons[0][1]


def test_frozen_is_left_by_unfreeze_alone(stage: Stage) -> None:
    stage.to("frozen")
    for step in (
        stage.back,
        lambda: phases.rollback(stage.engine, stage.settings, stage.flags, ACT),
        lambda: phases.exercise(stage.engine, stage.settings, KNOWN, ACT),
    ):
        with pytest.raises(PreconditionRefused, match="walletmigrate unfreeze"):
            step()
    assert stage.phase == "frozen"
    assert phases.leave_frozen(stage.engine, stage.settings, ACT).after == "wallet_only"
    assert not phases.leave_frozen(stage.engine, stage.settings, ACT).changed


def test_frozen_is_entered_by_freeze_alone_which_asks_for_everything_again(stage: Stage) -> None:
    stage.to("read_ledger")
    with pytest.raises(PreconditionRefused, match="the phase is read_ledger, not wallet_only"):
        phases.enter_frozen(stage.engine, stage.settings, KNOWN, ACT)
    stage.advance(EVERYONE)
    phases.exercise(stage.engine, stage.settings, KNOWN, ACT)
    with pytest.raises(PreconditionRefused) as refused:
        stage.advance(EVERYONE)
    assert [mend for _, mend in refused.value.reasons] == ["walletmigrate freeze --confirm users --reason '…'"]
    ledger.execute(stage.engine, "update public.users set total_coins = 1 where id = 3")
    with pytest.raises(PreconditionRefused, match="1 stale of 10"):
        phases.enter_frozen(stage.engine, stage.settings, KNOWN, ACT)
    stage.backfill()
    assert phases.enter_frozen(stage.engine, stage.settings, KNOWN, ACT).after == "frozen"
    assert not phases.enter_frozen(stage.engine, stage.settings, KNOWN, ACT).changed


def test_the_way_back_is_exercised_again_between_wallet_only_and_the_freeze(stage: Stage) -> None:
    again = ["the way back has not been exercised again since the phase came to wallet_only"]
    stage.to("wallet_only")
    assert stage.reasons("frozen") == again
    with pytest.raises(PreconditionRefused, match="rollback --exercise"):
        phases.enter_frozen(stage.engine, stage.settings, KNOWN, ACT)
    stage.back()
    stage.advance(EVERYONE)
    assert stage.reasons("frozen") == again, "a step back is not a way back and forth that ends here"
    phases.exercise(stage.engine, stage.settings, KNOWN, ACT)
    assert stage.reasons("frozen") == []
    assert phases.enter_frozen(stage.engine, stage.settings, KNOWN, ACT).after == "frozen"
    phases.leave_frozen(stage.engine, stage.settings, ACT)
    assert stage.reasons("frozen") == [], "an unfreeze is no new way to wallet_only"


def test_a_cohort_that_was_rolled_back_in_wallet_only_has_exercised_the_way_back(stage: Stage) -> None:
    stage.to("read_ledger")
    stage.cutover(None)
    stage.advance(FileSource(stage.path))
    assert len(stage.reasons("frozen")) == 1
    phases.rollback(stage.engine, stage.settings, stage.flags, ACT, cohort=("tenant", "acme"))
    assert stage.reasons("frozen") == []


def test_retired_is_entered_by_retire_alone_and_not_without_an_archive(stage: Stage) -> None:
    stage.to("frozen")
    with pytest.raises(PreconditionRefused) as refused:
        stage.advance()
    assert [mend.split(" --")[0] for _, mend in refused.value.reasons] == [
        "walletmigrate archive",
        "walletmigrate retire",
    ]


def test_a_step_waits_for_another_and_sees_what_it_did(stage: Stage) -> None:
    outcome: list[phases.PhaseChange] = []
    with stage.engine.begin() as other:
        other.execute(text("select 1 from wallet.control for update"))
        worker = threading.Thread(target=lambda: outcome.append(stage.advance(to="dual_write")))
        worker.start()
        waiting = "select exists (select from pg_locks where not granted)"
        while not ledger.scalar(stage.engine, waiting):
            assert worker.is_alive()
        other.execute(text("update wallet.control set phase = 'dual_write'"))
    worker.join()
    assert [one.changed for one in outcome] == [False]


def test_a_step_whose_phase_was_moved_meanwhile_is_refused(stage: Stage) -> None:
    stage.to("dual_write")
    phases.exercise(stage.engine, stage.settings, KNOWN, ACT)
    refused: list[str] = []

    def advance() -> None:
        with pytest.raises(PreconditionRefused) as error:
            stage.advance()
        refused.append(str(error.value))

    with stage.engine.begin() as other:
        other.execute(text("select 1 from wallet.control for update"))
        worker = threading.Thread(target=advance)
        worker.start()
        while not ledger.scalar(stage.engine, "select exists (select from pg_locks where not granted)"):
            assert worker.is_alive()
        other.execute(text("update wallet.control set phase = 'legacy'"))
    worker.join()
    assert ["went from dual_write to legacy meanwhile" in one for one in refused] == [True]
    assert stage.phase == "legacy"


def test_a_rollback_does_not_wait_for_a_gate_that_is_being_looked_at(stage: Stage) -> None:
    stage.to("read_ledger")

    def advance() -> None:
        with pytest.raises(PreconditionRefused):
            stage.advance()

    with stage.engine.begin() as other:
        # The gate reads the whole legacy table, and hangs here.
        other.execute(text("lock table public.users in access exclusive mode"))
        worker = threading.Thread(target=advance)
        worker.start()
        while not ledger.scalar(stage.engine, "select exists (select from pg_locks where not granted)"):
            assert worker.is_alive()
        assert phases.rollback(stage.engine, stage.settings, stage.flags, ACT).phase_after == "dual_write"
    worker.join()
