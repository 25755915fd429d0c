"""The status report: phase, line, flags, accounts, jobs, verifications, and the next command."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from decimal import Decimal
from pathlib import Path

import pytest
from sqlalchemy import Engine
from sqlalchemy.pool import NullPool

import flag_documents
import ledger
from ledger import ACT
from walletmigrate import connect, line, phases
from walletmigrate.audit import Act
from walletmigrate.backfill import backfill
from walletmigrate.cli_watch import _job_line, _lines
from walletmigrate.config import Settings
from walletmigrate.flag_sources import FileSource
from walletmigrate.flags import DUAL_WRITE, READ_FROM_LEDGER, Decision, StaticSource
from walletmigrate.freeze import freeze
from walletmigrate.reconcile import Limits, reconcile
from walletmigrate.report import ReconciliationStatus, Status, status
from walletmigrate.standing import shown_time
from walletmigrate.verify import verify

KNOWN = StaticSource(Decision(True, True, False))
Look = Callable[[], Status]


@pytest.fixture
def made(database_url: str) -> tuple[Engine, Settings]:
    engine, settings = ledger.install_users(database_url)
    return engine, settings.model_copy(update={"observation_window": timedelta(0)})


def add_job(engine: Engine, **fields: object) -> None:
    """A row of a backfill, begun a hundred seconds ago."""
    row = {
        "state": "'running'",
        "total": "1000",
        "done": "400",
        "failed": "0",
        "started": "clock_timestamp() - interval '100 s'",
        "updated": "clock_timestamp()",
        **fields,
    }
    ledger.execute(
        engine,
        "insert into wallet.jobs (kind, mapping, state, actor, reason, version, items_total, items_done, "
        "items_failed, started_at, updated_at) values ('backfill', 'users', {state}, 'admin:7', 'open', '1', "
        "{total}, {done}, {failed}, {started}, {updated})".format(**row),
    )


def test_before_an_install_the_next_command_is_install(database_url: str) -> None:
    engine = connect.engine(database_url, application_name="test", poolclass=NullPool)
    seen = status(engine, ledger.users_settings(database_url), KNOWN)
    assert (seen.installed, seen.phase, seen.next_phase) == (False, "legacy", "dual_write")
    assert seen.next_command == "walletmigrate install --reason '…'"
    assert seen.refused == (("the ledger is not installed in this database", seen.next_command),)
    assert sum(seen.accounts.values()) == 0


def test_every_phase_names_the_next_command(made: tuple[Engine, Settings]) -> None:
    engine, settings = made

    def next_command() -> str:
        return status(engine, settings, KNOWN).next_command

    assert next_command() == "walletmigrate phase advance --reason '…'"
    phases.advance(engine, settings, KNOWN, ACT)
    assert next_command() == "walletmigrate backfill --mapping users --reason '…'"
    backfill(engine, settings, settings.mapping(), ACT)
    assert next_command() == "walletmigrate verify --mapping users"
    verify(engine, settings, settings.mapping(), ACT)
    assert next_command() == "walletmigrate rollback --exercise --reason '…'"
    phases.exercise(engine, settings, KNOWN, ACT)
    assert next_command() == "walletmigrate phase advance --reason '…'"
    for _ in range(2):
        phases.advance(engine, settings, KNOWN, ACT)
    assert next_command() == "walletmigrate rollback --exercise --reason '…'"
    phases.exercise(engine, settings, KNOWN, ACT)
    assert next_command() == "walletmigrate freeze --confirm users --reason '…'"
    phases.enter_frozen(engine, settings, KNOWN, ACT)
    assert next_command() == "walletmigrate freeze --confirm users --reason '…'"
    freeze(engine, settings, settings.mapping(), ACT)
    assert next_command().startswith("none: the ledger alone is true")
    phases.leave_frozen(engine, settings, ACT)
    assert next_command() == "walletmigrate unfreeze --confirm users --reason '…'"


def test_the_next_command_is_one_that_can_be_run_even_if_the_first_reason_is_to_wait(
    made: tuple[Engine, Settings],
) -> None:
    engine, settings = made
    week = settings.model_copy(update={"observation_window": timedelta(days=7)})
    phases.advance(engine, settings, KNOWN, ACT)
    backfill(engine, settings, settings.mapping(), ACT)
    verify(engine, settings, settings.mapping(), ACT)
    seen = status(engine, week, KNOWN)
    assert seen.refused[0][1].startswith("wait until ")
    assert seen.next_command == "walletmigrate rollback --exercise --reason '…'"


def test_accounts_are_counted_by_state_with_those_that_are_absent(made: tuple[Engine, Settings]) -> None:
    engine, settings = made
    ledger.set_phase(engine, "dual_write")
    backfill(engine, settings, settings.mapping(), ACT)
    ledger.execute(engine, "update public.users set total_coins = 1 where id in (2, 3)")
    ledger.execute(engine, "delete from public.users where id = 4")
    ledger.add_users(engine, 11, 13)
    with ledger.unguarded(engine, "public.users") as connection:
        connection.exec_driver_sql("update public.users set total_coins = 2 where id = 5")
    seen = status(engine, settings, KNOWN)
    assert seen.accounts == {"absent": 3, "mirrored": 7, "stale": 2, "frozen": 0, "closed": 1}
    assert seen.drifted == 1


def test_a_running_job_has_a_rate_and_a_time_left(made: tuple[Engine, Settings]) -> None:
    add_job(made[0], done="380", failed="20")
    job = status(*made, KNOWN).jobs[0]
    assert (job.kind, job.state, job.stalled, job.items_done, job.items_failed) == (
        "backfill",
        "running",
        False,
        380,
        20,
    )
    assert job.rate == pytest.approx(4, rel=0.05)
    assert job.eta_seconds == pytest.approx(150, rel=0.05)


@pytest.mark.parametrize("state", ["paused", "done", "failed", "cancelled"])
def test_a_job_that_does_not_run_has_no_rate_and_no_time_left(made: tuple[Engine, Settings], state: str) -> None:
    add_job(made[0], state=f"'{state}'")
    job = status(*made, KNOWN).jobs[0]
    assert (job.state, job.rate, job.eta_seconds) == (state, None, None)


@pytest.mark.parametrize(
    ("state", "share"), [("running", True), ("paused", True), ("done", False), ("cancelled", False)]
)
def test_only_a_job_that_may_go_on_shows_how_far_it_is(made: tuple[Engine, Settings], state: str, share: bool) -> None:
    add_job(made[0], state=f"'{state}'")
    assert (", 40 %" in _job_line(status(*made, KNOWN).jobs[0])) is share


def test_a_job_whose_process_is_gone_is_stalled_and_has_no_time_left(made: tuple[Engine, Settings]) -> None:
    add_job(made[0], updated="clock_timestamp() - interval '61 s'")
    job = status(*made, KNOWN).jobs[0]
    assert (job.state, job.stalled, job.rate, job.eta_seconds) == ("running", True, None, None)


def test_the_rate_is_of_the_last_minute_so_that_a_pause_does_not_count(made: tuple[Engine, Settings]) -> None:
    """Begun yesterday and resumed: two batches of 60 accounts, from 50 s ago to 10 s ago; 580 are left of 1000."""
    add_job(made[0], done="400", failed="20", started="clock_timestamp() - interval '1 d'")
    batches = (("180", "done", 3600), ("60", "done", 30), ("55", "done", 10), ("0", "claimed", 0))
    for number, (done, state, ago) in enumerate(batches, 1):
        ledger.execute(
            made[0],
            "insert into wallet.job_batches (job_id, number, pass, upto_key, keys, state, done, failed, seconds, at) "
            f"values (1, {number}, 1, '9', 60, '{state}', {done}, {5 if number == 3 else 0}, 20, "
            f"clock_timestamp() - interval '{ago} s')",
        )
    job = status(*made, KNOWN).jobs[0]
    assert job.share == pytest.approx(0.42)
    assert job.rate == pytest.approx(3, rel=0.05)
    assert job.eta_seconds == pytest.approx(193, rel=0.05)


@pytest.mark.parametrize(("done", "shown"), [("40", ", 0.4/s, about 4"), ("400", ", 4.0/s, "), ("4000", ", 40/s, ")])
def test_a_slow_job_is_shown_with_its_rate_too(made: tuple[Engine, Settings], done: str, shown: str) -> None:
    add_job(made[0], done=done, total="100000" if done == "4000" else "1000")
    assert shown in _job_line(status(*made, KNOWN).jobs[0])


def test_a_job_that_was_just_resumed_has_no_rate_until_it_has_done_a_batch(made: tuple[Engine, Settings]) -> None:
    """Of its 400 accounts it had done the last an hour ago: all the time since its start would say a day."""
    add_job(made[0], started="clock_timestamp() - interval '1 d'")
    ledger.execute(
        made[0],
        "insert into wallet.job_batches (job_id, number, pass, upto_key, keys, state, done, failed, seconds, at) "
        "values (1, 1, 1, '9', 400, 'done', 400, 0, 20, clock_timestamp() - interval '1 h'), "
        "(1, 2, 1, '99', 60, 'claimed', 0, 0, null, clock_timestamp())",
    )
    job = status(*made, KNOWN).jobs[0]
    assert (job.share, job.rate, job.eta_seconds) == (0.4, None, None)


def test_a_job_that_waits_by_itself_has_no_rate_and_no_time_left(made: tuple[Engine, Settings]) -> None:
    add_job(made[0])
    ledger.execute(made[0], "update wallet.jobs set held = 'replica lag', held_at = clock_timestamp()")
    job = status(*made, KNOWN).jobs[0]
    assert (job.state, job.held, job.rate, job.eta_seconds) == ("running", "replica lag", None, None)


def test_a_job_whose_process_died_while_it_was_held_is_stalled_and_waits_for_nothing(
    made: tuple[Engine, Settings],
) -> None:
    add_job(made[0], updated="clock_timestamp() - interval '61 s'")
    ledger.execute(made[0], "update wallet.jobs set held = 'replica lag', held_at = clock_timestamp()")
    job = status(*made, KNOWN).jobs[0]
    assert (job.state, job.stalled, job.runs, job.held) == ("running", True, False, None)


def test_a_job_that_is_at_work_is_not_the_next_command(made: tuple[Engine, Settings]) -> None:
    ledger.set_phase(made[0], "dual_write")
    add_job(made[0])
    assert status(*made, KNOWN).next_command == "walletmigrate jobs show 1  # the backfill runs"
    ledger.execute(made[0], "update wallet.jobs set mapping = 'others'")
    assert status(*made, KNOWN).next_command == "walletmigrate backfill --mapping users --reason '…'"
    ledger.execute(made[0], "update wallet.jobs set mapping = 'users', state = 'paused'")
    assert status(*made, KNOWN).next_command == "walletmigrate backfill --mapping users --reason '…'"


def test_a_job_without_a_total_has_a_rate_and_no_time_left(made: tuple[Engine, Settings]) -> None:
    add_job(made[0], total="null")
    job = status(*made, KNOWN).jobs[0]
    assert job.rate == pytest.approx(4, rel=0.05)
    assert job.eta_seconds is None


def test_the_newest_job_of_each_kind_is_shown(made: tuple[Engine, Settings]) -> None:
    add_job(made[0], state="'done'", done="1000")
    add_job(made[0], state="'paused'", done="7")
    assert [(job.id, job.items_done) for job in status(*made, KNOWN).jobs] == [(2, 7)]


def test_a_job_of_a_mapping_that_is_no_longer_configured_is_not_shown(made: tuple[Engine, Settings]) -> None:
    add_job(made[0])
    add_job(made[0], state="'failed'")
    ledger.execute(made[0], "update wallet.jobs set mapping = 'gone' where id = 2")
    assert [job.id for job in status(*made, KNOWN).jobs] == [1]
    ledger.execute(made[0], "update wallet.jobs set mapping = '(all)' where id = 2")
    assert [job.id for job in status(*made, KNOWN).jobs] == [1, 2], "a snapshot is of all mappings"


def test_the_last_full_verification_is_shown_with_its_drift(made: tuple[Engine, Settings]) -> None:
    engine, settings = made
    ledger.set_phase(engine, "dual_write")
    backfill(engine, settings, settings.mapping(), ACT)
    verify(engine, settings, settings.mapping(), ACT)
    assert [one.clean for one in status(engine, settings, KNOWN).verifications] == [True]
    with ledger.fence_down(engine, settings) as connection:
        connection.exec_driver_sql("update public.users set total_coins = 97.5 where id = 5")
    verify(engine, settings, settings.mapping(), ACT)
    (seen,) = status(engine, settings, KNOWN).verifications
    assert (seen.mapping, seen.currency, seen.clean, seen.drift_accounts) == ("users", "EUR", False, 1)
    assert seen.drift_amount == Decimal("2.5")


def test_what_a_reconciliation_left_is_shown_until_another_one_lifts_it(made: tuple[Engine, Settings]) -> None:
    engine, settings = made
    ledger.set_phase(engine, "dual_write")
    backfill(engine, settings, settings.mapping(), ACT)
    with ledger.fence_down(engine, settings) as connection:
        connection.exec_driver_sql("update public.users set total_coins = 97.5 where id = 5")
    assert status(engine, settings, KNOWN).reconciliations == ()
    run = reconcile(engine, settings, settings.mapping(), ACT, limits=Limits(correct_up_to=Decimal(1)))
    (seen,) = status(engine, settings, KNOWN).reconciliations
    assert seen == ReconciliationStatus(run.run or 0, "users", "legacy", "EUR", 1, Decimal("2.5"))
    reconcile(engine, settings, settings.mapping(), ACT, limits=Limits(correct_up_to=Decimal(3)))
    assert status(engine, settings, KNOWN).reconciliations == ()


def test_a_ledger_that_does_not_come_to_0_is_told(made: tuple[Engine, Settings]) -> None:
    engine, settings = made
    assert status(engine, settings, KNOWN).imbalance == {}
    ledger.execute(engine, "update wallet.system_accounts set balance = balance + 7 where name = 'external'")
    assert status(engine, settings, KNOWN).imbalance == {"EUR": Decimal(7)}


def test_failures_are_counted_within_the_observation_window(made: tuple[Engine, Settings]) -> None:
    engine, settings = made
    for hours in (1, 5):
        ledger.execute(
            engine,
            "insert into wallet.failures (at, mapping, key, bucket, currency, operation, sqlstate, message) values "
            f"(clock_timestamp() - interval '{hours} h', 'users', '3', 'cash', 'EUR', 'credit', '22003', 'a test')",
        )
    for hours, expected in ((0, 0), (2, 1), (6, 2)):
        window = settings.model_copy(update={"observation_window": timedelta(hours=hours)})
        assert status(engine, window, KNOWN).failures == expected


def test_flags_and_what_is_wrong_with_their_source_are_shown(made: tuple[Engine, Settings], tmp_path: Path) -> None:
    path = tmp_path / "environment.json"
    path.write_bytes(flag_documents.body(flag_documents.document(DUAL_WRITE)))
    source = FileSource(path)
    seen = status(*made, source).flags
    assert [(one.flag, one.default) for one in seen.flags][:2] == [(DUAL_WRITE, True), (READ_FROM_LEDGER, False)]
    assert (seen.problem, seen.source) == (None, f"file {path}")
    path.unlink()
    source.refresh()
    assert "No such file" in str(status(*made, source).flags.problem)


def test_the_line_is_shown(made: tuple[Engine, Settings]) -> None:
    running = status(*made, KNOWN)
    assert (running.line_running, running.stopped) == (True, None)
    assert "line: runs" in _lines(running)
    line.stop(*made, Act("ada", "INC-7: payments fail"))
    line.resume(*made, Act("ada", "INC-7: mended"))
    assert status(*made, KNOWN).stopped is None
    # Past the command: nobody is to be named for it.
    ledger.execute(made[0], "select wallet.set_line(false)")
    past = status(*made, KNOWN)
    assert (past.line_running, past.stopped) == (False, None)
    assert "line: STOPPED" in _lines(past)
    ledger.execute(made[0], "select wallet.set_line(true)")
    line.stop(*made, Act("bob", "INC-8: again"))
    stopped = status(*made, KNOWN)
    assert stopped.stopped is not None
    assert (stopped.stopped.actor, stopped.stopped.reason) == ("bob", "INC-8: again")
    assert f"line: STOPPED since {shown_time(stopped.stopped.at)} by bob: INC-8: again" in _lines(stopped)


def test_an_auditor_may_ask_for_the_status(made: tuple[Engine, Settings]) -> None:
    engine, settings = made
    assert settings.database_url is not None
    auditor = connect.engine(
        settings.database_url,
        application_name="test",
        poolclass=NullPool,
        connect_args={"options": "-c role=wallet_auditor"},
    )
    with auditor.connect() as connection:
        assert connection.exec_driver_sql("select current_user").scalar() == "wallet_auditor"
    assert status(auditor, settings, KNOWN) == status(engine, settings, KNOWN)


def test_with_broken_flags_the_next_command_is_to_look_at_them_and_not_to_switch_one(
    made: tuple[Engine, Settings], tmp_path: Path
) -> None:
    engine, settings = made
    file = tmp_path / "environment.json"
    file.write_bytes(flag_documents.body(flag_documents.document()))
    source = FileSource(file)
    ledger.set_phase(engine, "dual_write")
    assert status(engine, settings, source).next_command != "walletmigrate flags check"
    file.write_text("broken", encoding="utf-8")
    source.refresh()
    seen = status(engine, settings, source)
    assert seen.flags.problem is not None
    assert "where there was none, everything is off" in seen.flags.problem
    assert seen.next_command == "walletmigrate flags check"
