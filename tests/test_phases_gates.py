"""The gates of the phases: what each asks for, and what it says of what is missing."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import text

import flag_documents
import ledger
from phase_stage import ACT, KNOWN, Stage, failed, fence, stage
from walletmigrate import phases
from walletmigrate.backfill import backfill
from walletmigrate.errors import PreconditionRefused
from walletmigrate.flag_sources import FileSource
from walletmigrate.flags import ALL_FLAGS, DUAL_WRITE, READ_FROM_LEDGER
from walletmigrate.install import install, uninstall
from walletmigrate.observation import read_by_everyone

__all__ = ["stage"]


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


def test_the_freeze_is_refused_while_a_view_reads_the_column_unless_it_is_accepted(stage: Stage) -> None:
    stage.to("wallet_only")
    phases.exercise(stage.engine, stage.settings, KNOWN, ACT)
    ledger.execute(stage.engine, "create view public.rich as select id from public.users where total_coins > 1000")
    assert stage.reasons("frozen") == ["public.users: its balances are still used by view public.rich"]
    ledger.execute(stage.engine, "comment on view public.rich is 'walletmigrate: ignore a report of last year'")
    assert stage.reasons("frozen") == []


def test_a_window_in_which_nobody_was_dual_written_opens_no_gate(stage: Stage) -> None:
    stage.to("dual_write")
    phases.exercise(stage.engine, stage.settings, KNOWN, ACT)
    stage.flags.set(DUAL_WRITE, False, everyone=True)
    source = FileSource(stage.path)
    with stage.engine.connect() as connection:
        told = phases.reasons(connection, stage.settings, source, "read_ledger")
    mend = f"walletmigrate flags set {DUAL_WRITE} on --everyone --reason '…'"
    assert told == [(f"{DUAL_WRITE} is on for nobody", mend)]
    stage.flags.set(DUAL_WRITE, True, trait=("tenant", "acme"))
    source.refresh()
    assert stage.advance(source).after == "read_ledger"


UNBALANCED = "update wallet.system_accounts set balance = balance + 7 where name = 'external'"


@pytest.mark.parametrize(("at", "to"), [("dual_write", "read_ledger"), ("read_ledger", "wallet_only")])
def test_a_ledger_that_does_not_come_to_0_opens_no_gate(stage: Stage, at: str, to: str) -> None:
    stage.to(at)
    ledger.execute(stage.engine, UNBALANCED)
    told = [one for one in stage.reasons(to) if "come to" in one]
    assert told == ["the balances of the ledger in EUR come to 7.00, and not to 0"]


def test_nobody_reads_from_a_ledger_that_does_not_come_to_0(stage: Stage) -> None:
    stage.to("read_ledger")
    ledger.execute(stage.engine, UNBALANCED)
    with pytest.raises(PreconditionRefused, match=r"EUR come to 7.00, and not to 0"):
        stage.cutover(("tenant", "acme"))


@pytest.mark.parametrize(("at", "to"), [("dual_write", "read_ledger"), ("read_ledger", "wallet_only")])
def test_a_flag_source_that_cannot_be_asked_opens_no_gate(stage: Stage, at: str, to: str) -> None:
    stage.to(at)
    stage.path.unlink()
    with stage.engine.connect() as connection:
        told = phases.reasons(connection, stage.settings, FileSource(stage.path), to)
    (mend,) = [mend for what, mend in told if stage.path.name in what]
    assert mend == "mend the flag source; then: walletmigrate flags list"
    assert not [what for what, _ in told if "is not on for" in what or "is on for nobody" in what]


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
