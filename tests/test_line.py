"""Stop the line: seen at once, waited out to the last posting in flight, and resumed by transactions."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection
from sqlalchemy.engine.interfaces import IsolationLevel

import interleaving
import ledger
from adapting import Place, place, seal
from commandline import REASON, Project, Said
from interleaving import LEVELS, REPEATABLE_READ, SERIALIZABLE, Stage
from ledger import ACT, engine_named, execute, rows, scalar, set_phase
from walletmigrate import line
from walletmigrate.backfill import backfill
from walletmigrate.errors import LedgerNotInstalled
from walletmigrate.flags import ALL_FLAGS, OFF, Decision
from walletmigrate.line import Holder
from walletmigrate.postings import Posting
from walletmigrate.standing import show

each_level = pytest.mark.parametrize("isolation", LEVELS, ids=lambda level: level.replace(" ", "_").lower())
ON = dict.fromkeys(ALL_FLAGS, True)
LATEST = "select max(id) from wallet.transactions"


@pytest.fixture
def at(database_url: str) -> Place:
    made = place(database_url, rows=3, flags=ON)
    with made.engine.begin() as connection:
        for key in (1, 2, 3):
            made.adapter.open_account(connection, key)
    return made


@pytest.fixture
def sessions(at: Place) -> Iterator[Stage]:
    with interleaving.stage(str(at.engine.url.render_as_string(hide_password=False))) as made:
        yield made


def credit(at: Place, key: int = 1) -> Callable[[Connection], Posting]:
    return lambda connection: at.adapter.credit(connection, key, 10, type="test")


def stop(at: Place) -> None:
    assert line.stop(at.engine, at.settings, ACT).changed


def wait(at: Place, *, timeout: float | None = 30, told: line.Told | None = None) -> tuple[Holder, ...]:
    return line.wait(at.engine, at.settings, timeout=timeout, told=told)


class Ends:
    """Hears who is waited for, and then lets them end, one act each time."""

    def __init__(self, *acts: Callable[[], object]) -> None:
        self.heard: list[tuple[Holder, ...]] = []
        self._acts = list(acts)

    def __call__(self, left: tuple[Holder, ...]) -> None:
        self.heard.append(left)
        self._acts.pop(0)()


@each_level
def test_a_posting_in_flight_is_named_and_waited_for_until_it_is_committed(
    at: Place, sessions: Stage, isolation: IsolationLevel
) -> None:
    bystander = sessions.session(SERIALIZABLE)  # keeps the predicate locks of whoever ends before it
    bystander.sql("select count(*) from users")
    writer = sessions.session(isolation)
    assert writer.do(credit(at)).mode == "dual_write"
    only_the_long_way = "writes a description"
    posted = writer.do(lambda on: at.adapter.credit(on, 1, 5, type="test", description=only_the_long_way))
    assert posted.mode == "dual_write"
    stop(at)
    ends = Ends(writer.commit)
    assert wait(at, told=ends) == ()
    ((one,),) = ends.heard
    assert (one.application_name, one.pid, one.prepared) == ("interleaving", writer.pid, None)
    assert one.since is not None
    assert at.account(1) == ("mirrored", Decimal(115))
    at.check()


def test_a_posting_that_has_read_the_line_and_not_yet_written_is_waited_for(at: Place, sessions: Stage) -> None:
    blocker, writer = sessions.session(), sessions.session()
    blocker.sql("select 1 from wallet.accounts where key = '1' for update")
    posting = writer.waiting(credit(at), on=blocker)
    stop(at)

    def let_go() -> None:
        blocker.commit()
        assert posting.result(30).mode == "dual_write"
        writer.commit()

    ends = Ends(let_go)
    assert wait(at, told=ends) == ()
    assert [[one.pid for one in heard] for heard in ends.heard] == [[writer.pid]]
    assert at.account(1) == ("mirrored", Decimal(110))


@each_level
def test_whoever_has_not_read_the_line_is_not_waited_for_and_writes_legacy_alone(
    at: Place, sessions: Stage, isolation: IsolationLevel
) -> None:
    old = sessions.session(isolation)
    old.look()
    old.sql("update users set role = 'other' where id = 2")
    stop(at)
    assert wait(at, timeout=0) == ()
    newest = scalar(at.engine, LATEST)
    assert old.do(credit(at)).mode == "legacy"
    old.commit()
    assert scalar(at.engine, LATEST) == newest
    assert at.account(1) == ("stale", Decimal(100))


def test_whoever_begins_after_the_wait_is_not_waited_for(at: Place, sessions: Stage) -> None:
    before, after = sessions.session(), sessions.session()
    before.do(credit(at, 1))
    stop(at)

    def go_on() -> None:
        assert after.do(credit(at, 2)).mode == "legacy"
        before.rollback()

    assert wait(at, told=Ends(go_on)) == ()
    assert at.account(1) == ("mirrored", Decimal(100))


def test_who_is_left_when_the_time_is_over_is_given_back_and_the_line_stays_stopped(at: Place, sessions: Stage) -> None:
    writer = sessions.session()
    writer.do(credit(at))
    stop(at)
    (left,) = wait(at, timeout=0.3)
    assert left.pid == writer.pid
    assert scalar(at.engine, "select last_value from wallet.line") == 2


def test_a_prepared_transaction_is_waited_for_also_one_that_is_prepared_meanwhile(at: Place, sessions: Stage) -> None:
    first, second = sessions.session(), sessions.session()
    first.do(credit(at, 1))
    first.sql("prepare transaction 'first'")
    second.do(credit(at, 2))
    stop(at)
    committer = sessions.session().connection.execution_options(isolation_level="AUTOCOMMIT")
    ends = Ends(
        lambda: second.sql("prepare transaction 'second'"),
        lambda: committer.exec_driver_sql("commit prepared 'first'"),
        lambda: committer.exec_driver_sql("commit prepared 'second'"),
    )
    assert wait(at, told=ends) == ()
    assert [[(one.prepared, one.pid) for one in heard] for heard in ends.heard] == [
        [("first", None), (None, second.pid)],
        [("first", None), ("second", None)],
        [("second", None)],
    ]
    assert all(one.since for heard in ends.heard for one in heard)
    assert [at.account(1), at.account(2)] == [("mirrored", Decimal(110))] * 2
    at.check()


def test_an_operator_without_further_rights_sees_who_is_left(at: Place, sessions: Stage) -> None:
    writer = sessions.session()
    writer.do(credit(at))
    url = at.engine.url.render_as_string(hide_password=False)
    operator = engine_named(url, role="wallet_operator")
    assert line.stop(operator, at.settings, ACT).changed
    (left,) = line.wait(operator, at.settings, timeout=0)
    assert (left.application_name, left.pid, left.since) == ("interleaving", writer.pid, None)


def test_wallet_only_features_and_dual_write_are_off_while_stopped_also_for_an_old_snapshot(
    at: Place, sessions: Stage
) -> None:
    set_phase(at.engine, "wallet_only")
    execute(at.engine, "grant select on users to wallet_app")
    old = sessions.session(REPEATABLE_READ)
    old.sql("set role wallet_app")

    def decided() -> Decision:
        return old.do(lambda connection: at.adapter.decision(connection, 1))

    assert decided() == Decision(True, True, True)
    stop(at)
    assert decided() == Decision(False, True, False)
    line.resume(at.engine, at.settings, ACT)
    assert decided() == Decision(True, True, True)


@pytest.mark.parametrize(
    ("phase", "wanted"),
    [
        ("legacy", OFF),
        ("dual_write", Decision(True, False, False)),
        ("read_ledger", Decision(True, True, False)),
        ("wallet_only", Decision(True, True, True)),
        ("frozen", Decision(True, True, True)),
    ],
)
def test_a_decision_stays_below_the_ceiling_of_the_phase(at: Place, phase: str, wanted: Decision) -> None:
    set_phase(at.engine, phase)
    with at.engine.begin() as connection:
        assert at.adapter.decision(connection, 1) == wanted


def test_frozen_accounts_keep_working_on_the_ledger_while_stopped(at: Place) -> None:
    with at.engine.begin() as connection:
        seal(connection, 1)
    stop(at)
    with at.engine.begin() as connection:
        assert at.adapter.credit(connection, 1, 10, type="test").mode == "ledger"
        assert at.adapter.balance(connection, 1).amount == 110
    assert at.account(1) == ("frozen", Decimal(110))
    at.check()


def test_what_was_written_meanwhile_is_resynced_by_transactions_of_the_next_posting_and_of_the_backfill(
    at: Place,
) -> None:
    stop(at)
    with at.engine.begin() as connection:
        for key in (1, 2):
            assert credit(at, key)(connection).mode == "legacy"
    newest = at.last_id()
    line.resume(at.engine, at.settings, ACT)
    assert [at.account(key) for key in (1, 2)] == [("stale", Decimal(100))] * 2
    with at.engine.begin() as connection:
        assert credit(at, 1)(connection).mode == "dual_write"
    backfill(at.engine, at.settings, at.mapping, ACT)
    assert at.legs(newest) == [
        ("resync", "bypass", "1", Decimal(10)),
        ("posting", "external", "1", Decimal(10)),
        ("resync", "bypass", "2", Decimal(10)),
    ]
    assert [at.account(key) for key in (1, 2)] == [("mirrored", Decimal(120)), ("mirrored", Decimal(110))]
    at.check()


def test_each_change_is_one_audit_row_and_a_dry_run_is_none(at: Place) -> None:
    before = scalar(at.engine, "select coalesce(max(id), 0) from wallet.audit_log")
    planned = line.stop(at.engine, at.settings, ACT, dry_run=True)
    assert (planned.running, planned.changed, planned.audit_id) == (True, True, None)
    done = [change(at.engine, at.settings, ACT) for change in (line.stop, line.stop, line.resume, line.resume)]
    assert [(one.running, one.changed) for one in done] == [(False, True), (False, False), (True, True), (True, False)]
    assert rows(
        at.engine,
        "select action, actor, reason, details from wallet.audit_log where id > :before order by id",
        before=before,
    ) == [
        ("stop-the-line", ACT.actor, ACT.reason, {"running": False}),
        ("resume", ACT.actor, ACT.reason, {"running": True}),
    ]


def test_without_a_ledger_there_is_no_line(database_url: str) -> None:
    engine = engine_named(database_url)
    with pytest.raises(LedgerNotInstalled):
        line.stop(engine, ledger.users_settings(database_url), ACT)


# The commands


@pytest.fixture
def project(at: Place, tmp_path: Path) -> Project:
    return Project(tmp_path, at.engine.url.render_as_string(hide_password=False))


def left_of(said: Said) -> list[int]:
    return [one["pid"] for one in said.document["left"]]


def test_the_command_waits_and_names_those_who_are_left_when_the_time_is_over(
    at: Place, sessions: Stage, project: Project
) -> None:
    writer = sessions.session()
    writer.do(credit(at))
    name = f"interleaving, pid {writer.pid}, since "
    planned = project.run("stop-the-line", "--wait", "--dry-run", "--json")
    assert (planned.exit_code, planned.document["line_running"], left_of(planned)) == (0, True, [writer.pid])
    said = project.run("stop-the-line", "--wait", "--timeout", "0.1", "--json", *REASON)
    assert (said.exit_code, said.document["line_running"], left_of(said)) == (1, False, [writer.pid])
    assert f"waiting for {name}" in said.stderr
    assert f"left: {name}" in said.stderr
    assert "the line is stopped, and stays so" in said.stderr
    writer.commit()
    again = project.run("stop-the-line", "--wait", *REASON)
    assert (again.exit_code, again.stdout.splitlines()) == (
        0,
        ["the line is stopped already", "all transactions begun before the stop have ended"],
    )
    assert at.account(1) == ("mirrored", Decimal(110))


def test_a_stop_holds_against_a_resume_that_looked_before_it_and_comes_after(
    at: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The resume has committed when the stop, which saw the line stopped, goes on."""
    stop(at)

    def overtaken(*place: Any) -> Any:
        seen = show(*place)
        execute(at.engine, "select wallet.set_line(true)")
        return seen

    with monkeypatch.context() as patch:
        patch.setattr(line, "show", overtaken)
        assert not line.stop(at.engine, at.settings, ACT).changed
    assert scalar(at.engine, "select last_value from wallet.line") == 2


def test_ctrl_c_leaves_the_line_stopped_and_says_so(at: Place, sessions: Stage, project: Project) -> None:
    writer = sessions.session()
    writer.do(credit(at))
    process = project.start("stop-the-line", "--wait", "--json", *REASON)
    assert process.stderr is not None
    assert process.stderr.readline().startswith("waiting for interleaving")
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert '"line_running": false' in stdout
    assert "interrupted while waiting" in stderr
    assert "the line is stopped, and stays so" in stderr
    assert scalar(at.engine, "select last_value from wallet.line") == 2


def test_a_time_limit_without_a_wait_is_a_mistake_and_stops_nothing(at: Place, project: Project) -> None:
    assert project.run("stop-the-line", "--timeout", "5", *REASON).exit_code == 2
    assert project.run("stop-the-line", "--wait", "--timeout", "-1", *REASON).exit_code == 2
    assert scalar(at.engine, "select last_value from wallet.line") == 1
