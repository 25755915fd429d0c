"""Reads are switched for a cohort or for everyone, and back; each flip of a flag leaves its row."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import ProgrammingError

import ledger
from phase_stage import ACT, EVERYONE, Stage, failed, stage
from walletmigrate import phases
from walletmigrate.errors import FlagDocumentInvalid, PreconditionRefused, UsageError
from walletmigrate.flag_sources import FileSource
from walletmigrate.flags import DUAL_WRITE, READ_FROM_LEDGER
from walletmigrate.starter import blank_document

__all__ = ["stage"]

ENDED = (
    "select pg_terminate_backend(pid) from pg_stat_activity "
    "where datname = current_database() and pid <> pg_backend_pid()"
)


def test_a_cutover_switches_reads_for_the_cohort_and_leaves_before_and_after_on_record(stage: Stage) -> None:
    stage.to("read_ledger")
    done = stage.cutover(("tenant", "acme"))
    assert (done.flag, done.who, done.changed) == (READ_FROM_LEDGER, "tenant=acme", True)
    decide = FileSource(stage.path).snapshot().decide
    assert decide("1", {"tenant": "acme"}).read_from_ledger
    assert not decide("2", {"tenant": "globex"}).read_from_ledger
    action, actor, reason, details = stage.audited()[-1]
    assert (action, actor, reason) == ("cutover", "admin:7", "a test of the phases")
    assert (details["flag"], details["who"]) == (READ_FROM_LEDGER, "tenant=acme")
    assert details["before"] == {"default": False, "overrides": []}
    assert [(one["value"], one["enabled"]) for one in details["after"]["overrides"]] == [("tenant=acme", True)]
    assert stage.phase == "read_ledger"


def test_a_repeated_cutover_changes_nothing_and_leaves_no_row(stage: Stage) -> None:
    stage.to("read_ledger")
    stage.cutover(("tenant", "acme"))
    document, rows = stage.path.read_bytes(), stage.audited()
    assert not stage.cutover(("tenant", "acme")).changed
    assert (stage.path.read_bytes(), stage.audited()) == (document, rows)


def test_a_dry_run_of_a_cutover_writes_neither_file_nor_row(stage: Stage) -> None:
    stage.to("read_ledger")
    document, rows = stage.path.read_bytes(), stage.audited()
    assert stage.cutover(("tenant", "acme"), dry_run=True).changed
    assert (stage.path.read_bytes(), stage.audited()) == (document, rows)


def test_a_cutover_is_refused_for_its_cohort_alone(stage: Stage) -> None:
    stage.to("read_ledger")
    ledger.execute(stage.engine, "update public.users set total_coins = 1 where id = 3")
    with pytest.raises(PreconditionRefused) as refused:
        stage.cutover(("tenant", "acme"))
    assert refused.value.reasons[0][0] == "users (cash, EUR): 1 stale of 5 accounts, for example 3"
    assert stage.cutover(("tenant", "globex")).changed


def test_a_cutover_is_refused_for_a_drifted_and_for_an_absent_account(stage: Stage) -> None:
    stage.to("read_ledger")
    ledger.add_users(stage.engine, 11, 11)
    with ledger.unguarded(stage.engine, "public.users") as connection:
        connection.execute(text("update public.users set total_coins = 2 where id = 5"))
    with pytest.raises(PreconditionRefused) as refused:
        stage.cutover(("tenant", "acme"))
    assert [what for what, _ in refused.value.reasons] == [
        "users (cash, EUR): 1 absent of 6 accounts, for example 11",
        "users (cash, EUR): ledger and legacy differ in 1 accounts, for example 5",
    ]


def test_a_cutover_is_refused_where_dual_write_is_off_for_a_single_account(stage: Stage) -> None:
    stage.to("read_ledger")
    stage.flags.set(DUAL_WRITE, False, account="7")
    with pytest.raises(PreconditionRefused) as refused:
        stage.cutover(("tenant", "acme"))
    assert refused.value.reasons == [
        (
            f"{DUAL_WRITE} is off for 1 accounts of users, for example 7",
            f"walletmigrate flags set {DUAL_WRITE} on --cohort tenant=acme --reason '…'",
        )
    ]
    assert stage.cutover(("tenant", "globex")).changed


def test_a_cutover_is_refused_before_its_phase_and_without_a_clean_verification(stage: Stage) -> None:
    stage.to("read_ledger")
    failed(stage.engine, "clock_timestamp()")
    stage.back()
    with pytest.raises(PreconditionRefused) as refused:
        stage.cutover(None)
    told = [what for what, _ in refused.value.reasons]
    assert told[0] == "the phase is dual_write, and reads need read_ledger"
    assert "after its last verification" in told[1]
    assert len(told) == 2


def test_a_cutover_of_nobody_or_by_an_unknown_trait_is_refused(stage: Stage) -> None:
    stage.to("read_ledger")
    with pytest.raises(PreconditionRefused, match="no account has tenant=acem"):
        stage.cutover(("tenant", "acem"))
    with pytest.raises(UsageError, match=r"no trait 'plan' \(it has: tenant, role\)"):
        stage.cutover(("plan", "pro"))


def test_a_rollback_of_everyone_switches_the_flag_off_and_lowers_the_phase(stage: Stage) -> None:
    stage.to("read_ledger")
    stage.cutover(("tenant", "acme"))
    stage.advance(EVERYONE)
    done = phases.rollback(stage.engine, stage.settings, stage.flags, ACT)
    assert (done.phase_before, done.phase_after, done.changed) == ("wallet_only", "dual_write", True)
    assert not FileSource(stage.path).snapshot().decide("1", {"tenant": "acme"}).read_from_ledger
    assert [row[0] for row in stage.audited()[-2:]] == ["rollback", "rollback"]
    rows = stage.audited()
    assert not phases.rollback(stage.engine, stage.settings, stage.flags, ACT).changed
    assert stage.audited() == rows


def test_a_rollback_of_a_cohort_leaves_the_phase_and_the_others_alone(stage: Stage) -> None:
    stage.to("read_ledger")
    stage.cutover(None)
    done = phases.rollback(stage.engine, stage.settings, stage.flags, ACT, cohort=("tenant", "acme"))
    assert (done.phase_after, done.changed) == ("read_ledger", True)
    decide = FileSource(stage.path).snapshot().decide
    assert not decide("1", {"tenant": "acme"}).read_from_ledger
    assert decide("2", {"tenant": "globex"}).read_from_ledger


def test_a_rollback_of_everyone_whose_phase_went_back_has_not_failed_when_the_database_then_goes(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.to("read_ledger")
    stage.cutover(None)
    switch = stage.flags.set

    def first(*words: Any, **options: Any) -> Any:
        ledger.execute(stage.engine, ENDED)
        return switch(*words, **options)

    monkeypatch.setattr(stage.flags, "set", first)
    done = phases.rollback(stage.engine, stage.settings, stage.flags, ACT)
    assert (done.phase_after, done.changed, done.flag) == ("dual_write", True, None)
    assert "terminat" in str(done.flag_problem)
    assert stage.phase == "dual_write"


def test_a_rollback_of_everyone_does_not_wait_for_a_broken_flag_file(stage: Stage) -> None:
    stage.to("read_ledger")
    stage.path.write_text("{")
    done = phases.rollback(stage.engine, stage.settings, stage.flags, ACT)
    assert (done.phase_after, done.flag) == ("dual_write", None)
    assert done.flag_problem is not None
    assert "not JSON" in done.flag_problem
    assert stage.phase == "dual_write"
    with pytest.raises(FlagDocumentInvalid):
        phases.rollback(stage.engine, stage.settings, stage.flags, ACT, cohort=("tenant", "acme"))


def test_a_rollback_needs_no_flag_file_for_everyone_and_one_for_a_cohort(stage: Stage) -> None:
    stage.to("read_ledger")
    with pytest.raises(UsageError):
        phases.rollback(stage.engine, stage.settings, None, ACT, cohort=("tenant", "acme"))
    assert phases.rollback(stage.engine, stage.settings, None, ACT).phase_after == "dual_write"


def test_a_flag_is_not_switched_when_its_audit_row_cannot_be_written(stage: Stage) -> None:
    document = stage.path.read_bytes()
    ledger.execute(stage.engine, "alter table wallet.audit_log rename to hidden")
    with pytest.raises(ProgrammingError):
        phases.set_flag(stage.engine, stage.settings, stage.flags, DUAL_WRITE, False, ACT, everyone=True)
    assert stage.path.read_bytes() == document


@pytest.mark.parametrize("lost", ["process", "database"])
def test_a_flag_that_is_switched_is_on_record_whatever_goes_away_behind_it(
    stage: Stage, lost: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C behind the write of the file; or the connection, before anything more is said to the database."""
    switch = stage.flags.set

    def and_then(*words: Any, **options: Any) -> Any:
        done = switch(*words, **options)
        if not options["dry_run"]:
            if lost == "process":
                raise KeyboardInterrupt
            ledger.execute(stage.engine, ENDED)
        return done

    monkeypatch.setattr(stage.flags, "set", and_then)
    with suppress(KeyboardInterrupt):
        phases.set_flag(stage.engine, stage.settings, stage.flags, DUAL_WRITE, False, ACT, everyone=True)
    assert stage.audited()[-1][3]["after"]["default"] is False
    assert not FileSource(stage.path).snapshot().decide("1", {}).dual_write


def test_a_flag_is_set_and_its_override_removed_on_record(stage: Stage) -> None:
    def set_flag(enabled: bool | None, **who: Any) -> phases.FlagChange:
        return phases.set_flag(stage.engine, stage.settings, stage.flags, DUAL_WRITE, enabled, ACT, **who)

    assert set_flag(False, account="7").who == "account 7"
    assert set_flag(True, percent=25, percent_of="tenant").who == "25 % of tenant"
    assert set_flag(None, account="7").after.overrides[0].kind == "percent"
    assert not set_flag(None, account="7").changed
    assert [row[0] for row in stage.audited()[-3:]] == ["flags set"] * 3
    with pytest.raises(UsageError, match="no override to remove"):
        set_flag(None, everyone=True)


def test_a_blank_document_is_what_the_repository_ships() -> None:
    shipped = Path(__file__).parent.parent / "flags" / "environment.json"
    assert json.loads(shipped.read_text(encoding="utf-8")) == blank_document()
