"""The phase machine and its gates, on a real database."""

from __future__ import annotations

import json
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.exc import ProgrammingError
from sqlalchemy.pool import NullPool

import flag_documents
import ledger
from walletmigrate import connect, phases
from walletmigrate.audit import Act
from walletmigrate.backfill import backfill
from walletmigrate.config import Settings
from walletmigrate.errors import (
    FlagDocumentInvalid,
    LedgerNotInstalled,
    PreconditionRefused,
    UsageError,
)
from walletmigrate.flag_file import FlagFile
from walletmigrate.flag_sources import FileSource
from walletmigrate.flags import ALL_FLAGS, DUAL_WRITE, READ_FROM_LEDGER, Decision, StaticSource
from walletmigrate.freeze import freeze
from walletmigrate.install import install, uninstall
from walletmigrate.observation import read_by_everyone
from walletmigrate.standing import in_force_since
from walletmigrate.starter import blank_document
from walletmigrate.verify import verify

ACT = Act("admin:7", "a test of the phases")
KNOWN = StaticSource(Decision(True, False, False))
EVERYONE = StaticSource(Decision(True, True, False))


class Stage:
    """An installed ledger with ten users, its flag file, and the steps of an operator."""

    def __init__(self, url: str, folder: Path, *, window: timedelta = timedelta(0), rows: int = 10) -> None:
        self.engine, settings = ledger.install_users(url, rows=rows)
        self.settings = settings.model_copy(update={"observation_window": window})
        self.path = folder / "environment.json"
        self.path.write_bytes(flag_documents.body(flag_documents.document(DUAL_WRITE)))
        self.flags = FlagFile(self.path)

    def with_window(self, window: timedelta) -> Settings:
        return self.settings.model_copy(update={"observation_window": window})

    def advance(self, source: Any = KNOWN, **options: Any) -> phases.PhaseChange:
        return phases.advance(self.engine, self.settings, source, ACT, **options)

    def back(self, **options: Any) -> phases.PhaseChange:
        return phases.back(self.engine, self.settings, ACT, **options)

    def backfill(self) -> None:
        backfill(self.engine, self.settings, self.settings.mapping(), ACT)

    def verify(self) -> bool:
        return verify(self.engine, self.settings, self.settings.mapping(), ACT).clean

    def cutover(self, cohort: tuple[str, str] | None, **options: Any) -> phases.FlagChange:
        return phases.cutover(self.engine, self.settings, self.flags, cohort, ACT, **options)

    def to(self, phase: str) -> Stage:
        """Walk there as an operator would."""
        if phase == "legacy":
            return self
        self.advance()
        self.backfill()
        self.verify()
        if phase == "dual_write":
            return self
        phases.exercise(self.engine, self.settings, KNOWN, ACT)
        self.advance()
        if phase == "read_ledger":
            return self
        self.advance(EVERYONE)
        if phase == "frozen":
            phases.exercise(self.engine, self.settings, KNOWN, ACT)
            phases.enter_frozen(self.engine, self.settings, KNOWN, ACT)
            freeze(self.engine, self.settings, self.settings.mapping(), ACT)
        return self

    @property
    def phase(self) -> str:
        with self.engine.connect() as connection:
            return phases.show(connection, self.settings).phase

    def reasons(self, to: str, source: Any = KNOWN, settings: Settings | None = None) -> list[str]:
        with self.engine.connect() as connection:
            return [what for what, _ in phases.reasons(connection, settings or self.settings, source, to)]

    def audited(self) -> list[tuple[Any, ...]]:
        query = "select action, actor, reason, details from wallet.audit_log order by id"
        return ledger.rows(self.engine, query)


@pytest.fixture
def stage(database_url: str, tmp_path: Path) -> Stage:
    return Stage(database_url, tmp_path)


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


def test_dual_write_is_refused_for_a_fence_that_is_not_as_it_was_made(stage: Stage) -> None:
    ledger.execute(stage.engine, f"alter table public.users disable trigger {fence(stage, 'delete')}")
    assert ["disabled" in reason for reason in stage.reasons("dual_write")] == [True]
    ledger.execute(stage.engine, f"drop trigger {fence(stage, 'delete')} on public.users")
    assert ["is missing" in reason for reason in stage.reasons("dual_write")] == [True]


def test_dual_write_is_refused_for_values_that_are_no_exact_amounts(stage: Stage) -> None:
    ledger.execute(stage.engine, "update public.users set total_coins = 'NaN' where id = 7")
    assert ["total_coins of 7 holds NaN" in reason for reason in stage.reasons("dual_write")] == [True]


def test_dual_write_is_refused_for_a_mapping_that_changed_since_the_install(stage: Stage) -> None:
    mapping = stage.settings.mapping()
    column = mapping.columns[0].model_copy(update={"scale": 3})
    changed = mapping.model_copy(update={"columns": (column,)})
    settings = stage.settings.model_copy(update={"mappings": (changed,)})
    assert ["changed in the configuration" in one for one in stage.reasons("dual_write", settings=settings)] == [True]
    uninstall(stage.engine, stage.settings, ACT)
    assert stage.reasons("dual_write") == ["mapping 'users' is not installed"]


def test_dual_write_is_refused_while_the_source_lacks_a_flag_or_cannot_be_read(stage: Stage) -> None:
    stage.path.write_bytes(flag_documents.body(flag_documents.document(names=ALL_FLAGS[:2])))
    assert [ALL_FLAGS[2] in reason for reason in stage.reasons("dual_write", FileSource(stage.path))] == [True]
    stage.path.write_bytes(b"{")
    assert ["not JSON" in reason for reason in stage.reasons("dual_write", FileSource(stage.path))] == [True]
    stage.path.unlink()
    assert ["No flags from" in reason for reason in stage.reasons("dual_write", FileSource(stage.path))] == [True]


def test_all_reasons_come_at_once_each_with_what_mends_it(stage: Stage) -> None:
    stage.advance()
    ledger.execute(stage.engine, "select wallet.set_line(false)")
    ledger.execute(stage.engine, f"drop trigger {fence(stage, 'insert')} on public.users")
    with pytest.raises(PreconditionRefused) as refused:
        phases.advance(stage.engine, stage.with_window(timedelta(days=7)), KNOWN, ACT)
    told = refused.value.reasons
    expected = {
        "is missing": "walletmigrate install",
        "the line is stopped": "walletmigrate resume",
        "10 absent of 10 accounts": "walletmigrate backfill",
        "was never fully verified": "walletmigrate verify",
        "the observation window is 7 d": "wait until",
        "the way back has not been exercised": "walletmigrate rollback --exercise",
    }
    assert len(told) == len(expected)
    for what, mend in expected.items():
        assert [m.startswith(mend) for w, m in told if what in w] == [True], (what, told)
    assert str(refused.value).count("→") == len(expected)


def test_read_ledger_opens_after_backfill_verification_and_an_exercise_of_the_way_back(stage: Stage) -> None:
    stage.to("dual_write")
    assert stage.reasons("read_ledger") == ["the way back has not been exercised"]
    phases.exercise(stage.engine, stage.settings, KNOWN, ACT)
    assert stage.reasons("read_ledger") == []
    assert stage.advance().after == "read_ledger"


def test_read_ledger_is_refused_for_a_stale_and_for_a_drifted_account(stage: Stage) -> None:
    stage.to("dual_write")
    stage.back()
    stage.advance()
    stage.verify()
    ledger.execute(stage.engine, "update public.users set total_coins = 1 where id = 3")
    assert stage.reasons("read_ledger")[0] == "users (cash, EUR): 1 stale of 10 accounts, for example 3"
    with ledger.unguarded(stage.engine, "public.users") as connection:
        connection.execute(text("update public.users set total_coins = 2 where id = 4"))
    assert "users (cash, EUR): ledger and legacy differ in 1 accounts, for example 4" in stage.reasons("read_ledger")


def test_read_ledger_is_refused_while_a_backfill_is_unfinished(stage: Stage) -> None:
    stage.to("dual_write")
    stage.back()
    stage.advance()
    stage.verify()
    asked = iter([False, True])
    ledger.execute(stage.engine, "update public.users set total_coins = 1 where id = 9")
    backfill(stage.engine, stage.settings, stage.settings.mapping(), ACT, batch_size=4, stop=lambda: next(asked))
    assert [one for one in stage.reasons("read_ledger") if "job" in one] == ["backfill job 3 of users is paused"]
    stage.backfill()
    assert stage.verify()
    assert stage.reasons("read_ledger") == []


def test_read_ledger_needs_a_clean_verification_newer_than_the_last_failure(stage: Stage) -> None:
    stage.to("dual_write")
    phases.exercise(stage.engine, stage.settings, KNOWN, ACT)
    failed(stage.engine, "clock_timestamp()")
    assert [("after its last verification" in one) for one in stage.reasons("read_ledger")] == [True]
    assert stage.verify()
    assert stage.reasons("read_ledger") == []
    ledger.execute(stage.engine, "update public.users set total_coins = 1 where id = 3")
    assert not stage.verify()
    stage.backfill()
    assert stage.reasons("read_ledger") == ["the last full verification of 'users' was not clean"]


def test_a_verification_from_before_dual_write_began_does_not_count(stage: Stage) -> None:
    stage.to("dual_write")
    stage.back()
    stage.advance()
    assert stage.reasons("read_ledger") == ["mapping 'users' was last verified before dual-write began"]


def test_a_failure_counts_for_as_long_as_the_observation_window(stage: Stage) -> None:
    stage.to("dual_write")
    stage.back()
    ledger.set_phase(stage.engine, "dual_write")
    failed(stage.engine, "clock_timestamp() - interval '2 h'")
    assert stage.verify()
    for hours, expected in ((1, 0), (3, 1)):
        found = stage.reasons("read_ledger", settings=stage.with_window(timedelta(hours=hours)))
        assert len([one for one in found if "1 failed or differing postings" in one]) == expected


def test_a_write_past_the_adapter_counts_for_as_long_as_the_observation_window(stage: Stage) -> None:
    stage.to("dual_write")
    ledger.execute(stage.engine, "update public.users set total_coins = 1 where id = 3")
    ledger.execute(stage.engine, "update wallet.accounts set state_at = state_at - interval '2 h' where key = '3'")
    ledger.execute(stage.engine, "update wallet.bypasses set at = at - interval '2 h'")
    for hours, expected in ((1, 0), (3, 1)):
        found = stage.reasons("read_ledger", settings=stage.with_window(timedelta(hours=hours)))
        assert len([one for one in found if "1 accounts written past the adapter" in one]) == expected


def test_an_account_left_behind_by_dual_write_being_off_is_no_bypass(stage: Stage) -> None:
    stage.to("dual_write")
    with stage.engine.begin() as connection:
        ledger.post(connection, stage.settings, "credit", 3, 5, dual=False)
    found = stage.reasons("read_ledger", settings=stage.with_window(timedelta(days=7)))
    assert [one for one in found if "stale" in one] == ["users (cash, EUR): 1 stale of 10 accounts, for example 3"]
    assert not [one for one in found if "past the adapter" in one]


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


def test_the_freeze_is_refused_while_a_view_reads_the_column_unless_it_is_accepted(stage: Stage) -> None:
    stage.to("wallet_only")
    phases.exercise(stage.engine, stage.settings, KNOWN, ACT)
    ledger.execute(stage.engine, "create view public.rich as select id from public.users where total_coins > 1000")
    assert stage.reasons("frozen") == ["public.users: its balances are still used by view public.rich"]
    ledger.execute(stage.engine, "comment on view public.rich is 'walletmigrate: ignore a report of last year'")
    assert stage.reasons("frozen") == []


def test_wallet_only_needs_reads_on_for_everyone(stage: Stage) -> None:
    stage.to("read_ledger")
    assert stage.reasons("wallet_only") == [f"{READ_FROM_LEDGER} is not on for everyone"]
    stage.flags.set(DUAL_WRITE, True, everyone=True)
    stage.flags.set(READ_FROM_LEDGER, True, everyone=True)
    stage.flags.set(READ_FROM_LEDGER, False, trait=("tenant", "acme"))
    source = FileSource(stage.path)
    with stage.engine.connect() as connection:
        told = phases.reasons(connection, stage.settings, source, "wallet_only")
    assert told == [
        (
            f"{READ_FROM_LEDGER} is not on for everyone (off for tenant=acme)",
            f"walletmigrate flags set {READ_FROM_LEDGER} remove --cohort tenant=acme --reason '…'",
        )
    ]
    stage.flags.remove(READ_FROM_LEDGER, trait=("tenant", "acme"))
    source.refresh()
    assert stage.advance(source).after == "wallet_only"


def test_wallet_only_waits_until_reads_were_on_for_the_whole_window(stage: Stage) -> None:
    stage.to("read_ledger")
    stage.cutover(None)
    hour = stage.with_window(timedelta(hours=1))
    found = stage.reasons("wallet_only", FileSource(stage.path), hour)
    assert [one for one in found if one.startswith("all accounts are read from the ledger for 0 s")]
    assert stage.reasons("wallet_only", FileSource(stage.path)) == []


def test_a_flip_made_elsewhere_restarts_the_window_by_the_documents_own_date(stage: Stage) -> None:
    stage.to("read_ledger")
    now = ledger.scalar(stage.engine, "select clock_timestamp()")
    content = flag_documents.document(DUAL_WRITE, READ_FROM_LEDGER)
    seconds = timedelta(seconds=90)
    for updated, expected in ((now, 1), (now - timedelta(days=2), 0)):
        stage.path.write_bytes(flag_documents.body({**content, "updated_at": updated.isoformat()}))
        with stage.engine.connect() as connection:
            # A phase that began long ago: only the document's date is left to wait for.
            connection.execute(text("update wallet.control set changed_at = changed_at - interval '1 day'"))
            connection.execute(text("set local session_replication_role = replica"))
            connection.execute(text("alter table wallet.audit_log disable trigger append_only"))
            connection.execute(text("update wallet.audit_log set at = at - interval '1 day'"))
            settings = stage.with_window(seconds)
            told = list(read_by_everyone(connection, settings, FileSource(stage.path)))
            connection.rollback()
        assert len(told) == expected


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


def test_two_mappings_are_both_asked_for(database_url: str, tmp_path: Path) -> None:
    stage = Stage(database_url, tmp_path).to("dual_write")
    ledger.execute(stage.engine, "create table public.shops (id text primary key, credit numeric(12, 2) not null)")
    ledger.execute(stage.engine, "insert into public.shops values ('a', 1)")
    users = stage.settings.mapping()
    column = users.columns[0].model_copy(update={"column": "credit"})
    shops = users.model_copy(update={"name": "shops", "table": "public.shops", "traits": {}, "columns": (column,)})
    stage.settings = stage.settings.model_copy(update={"mappings": (users, shops)})
    with stage.engine.connect() as connection:
        told = phases.reasons(connection, stage.settings, KNOWN, "dual_write")
    assert told == [("mapping 'shops' is not installed", "walletmigrate install --reason '…'")]
    install(stage.engine, stage.settings, ACT)
    found = stage.reasons("read_ledger")
    assert "shops (cash, EUR): 1 absent of 1 accounts, for example a" in found
    assert "mapping 'shops' was never fully verified" in found


def fence(stage: Stage, event: str) -> str:
    """The name of the fence's trigger for an event."""
    query = "select tgname from pg_trigger where tgrelid = 'public.users'::regclass and tgname like :pattern"
    return str(ledger.scalar(stage.engine, query, pattern=f"walletmigrate%{event}"))


def failed(engine: Engine, at: str) -> None:
    """A posting whose ledger leg failed."""
    ledger.execute(
        engine,
        "insert into wallet.failures (at, mapping, key, bucket, currency, operation, sqlstate, message) "
        f"values ({at}, 'users', '3', 'cash', 'EUR', 'credit', '22003', 'a test')",
    )


def test_a_blank_document_is_what_the_repository_ships() -> None:
    shipped = Path(__file__).parent.parent / "flags" / "environment.json"
    assert json.loads(shipped.read_text(encoding="utf-8")) == blank_document()
