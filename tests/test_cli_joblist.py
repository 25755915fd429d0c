"""The commands under ``jobs``: what they show, and that they steer a job that runs."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from contextlib import nullcontext
from decimal import Decimal
from pathlib import Path

import pytest
from sqlalchemy import Engine

import ledger
from commandline import REASON, Project, Said, project_at
from ledger import ACT
from walletmigrate import cli_jobs, cli_reconcile, jobs
from walletmigrate.backfill import backfill
from walletmigrate.errors import UsageError
from walletmigrate.reconcile import Limits, reconcile


@pytest.fixture
def made(database_url: str, tmp_path: Path) -> tuple[Project, Engine]:
    """A project in phase dual_write whose table has 20 rows without an account, and an aborted backfill of four."""
    project, engine = project_at(tmp_path, database_url, "dual_write")
    ledger.add_users(engine, 11, 30)
    settings = project.settings
    calls = iter([False, True])
    backfill(engine, settings, settings.mapping(), ACT, batch_size=14, stop=lambda: next(calls))
    return project, engine


def stops_after(batches: int) -> Callable[[], bool]:
    calls = iter(range(batches))
    return lambda: next(calls, None) is None


def newest(engine: Engine) -> tuple[int, str]:
    ((job, state),) = ledger.rows(engine, "select id, state from wallet.jobs order by id desc limit 1")
    return job, state


def test_jobs_are_listed_and_shown_with_progress_and_settings(made: tuple[Project, Engine]) -> None:
    project, engine = made
    job, _ = newest(engine)
    listed = project.run("jobs", "list", "--json").document["jobs"]
    listed_as = [("backfill", "paused"), ("verify", "done"), ("backfill", "done")]
    assert [(one["kind"], one["state"]) for one in listed] == listed_as
    shown = project.run("jobs", "show", str(job))
    assert f"job {job}: backfill of users, paused, 14 of 30 accounts" in shown.stdout
    assert "cut up to key 14 of 30; 1 batches done, 0 open" in shown.stdout
    assert "batch-size=14" in shown.stdout
    assert project.run("jobs", "show", "999").exit_code == 2


def test_a_job_that_died_while_it_was_held_is_not_said_to_wait(made: tuple[Project, Engine]) -> None:
    project, engine = made
    job, _ = newest(engine)
    held = "update wallet.jobs set state = 'running', held = 'replica lag', held_at = now(), updated_at = now() "
    for ago, text, document in (
        ("40 s", "running, waiting: replica lag, 14 of 30", (False, "replica lag")),
        ("61 s", "running, but no batch for a minute, 14 of 30", (True, None)),
    ):
        for words in (("jobs", "list"), ("jobs", "show", str(job))):
            for more in ((), ("--json",)):
                # Anew for each command, and with twenty seconds for it: a busy machine has been seen to take several.
                ledger.execute(engine, f"{held} - cast(:ago as interval) where id = :id", id=job, ago=ago)
                said = project.run(*words, *more)
                if not more:
                    assert f"job {job}: backfill of users, {text} accounts" in said.stdout
                else:
                    one = said.document["job"] if "job" in said.document else said.document["jobs"][0]
                    assert (one["stalled"], one["held"]) == document
    said = project.run("jobs", "show", str(job))
    assert f"walletmigrate jobs resume {job} --reason" in said.stderr
    stalled, elapsed = True, 1.0
    while elapsed >= 1:  # a look that took longer than the second that is left would tell nothing
        began = time.monotonic()
        ledger.execute(engine, f"{held} - interval '59 s' where id = :id", id=job)
        with engine.connect() as connection:
            stalled = jobs.get(connection, project.settings, job).stalled
        elapsed = time.monotonic() - began
    assert not stalled


def test_a_job_is_resumed_here_with_the_settings_that_it_has(made: tuple[Project, Engine]) -> None:
    project, engine = made
    job, _ = newest(engine)
    project.change("jobs", "set", str(job), "batch-size=5", "rate=1000000")
    said = project.change("jobs", "resume", str(job))
    assert f"job {job}: backfill of users, done" in said.stdout
    assert newest(engine) == (job, "done")
    assert ledger.scalar(engine, "select count(*) from wallet.accounts where state = 'mirrored'") == 30
    actions = ledger.rows(engine, "select action, actor, reason from wallet.audit_log where job_id = :id", id=job)
    assert ("backfill set", "tests", "a test") in actions
    assert ("backfill resume", "tests", "a test") in actions
    # It is done, and nothing was set aside: nothing to resume.
    assert project.run("jobs", "resume", str(job), *REASON).exit_code == 4


def test_a_backfill_begins_at_the_rate_that_its_command_names(made: tuple[Project, Engine]) -> None:
    project, engine = made
    project.change("jobs", "cancel", str(newest(engine)[0]))
    batches: list[int] = []
    settings = project.settings

    def told(job: jobs.Job) -> None:
        batches.append(job.counts["keys"])

    backfill(engine, settings, settings.mapping(), ACT, rate=150, progress=told, stop=lambda: bool(batches))
    assert batches == [3]  # a fiftieth of a second's worth, from the first batch on
    assert project.change("backfill", "--rate", "1000000").exit_code == 0
    found = project.run("jobs", "list", "--json").document["jobs"][0]
    assert (found["state"], found["options"]["rate"], found["options"]["batch-size"]) == ("done", "1000000", "auto")
    assert project.run("backfill", "--rate", "0", *REASON).exit_code == 2
    with pytest.raises(UsageError, match="more than 0"):
        backfill(engine, settings, settings.mapping(), ACT, rate=0)
    with pytest.raises(UsageError, match="name one at least"):
        backfill(engine, settings, settings.mapping(), ACT, workers=0)
    assert newest(engine) == (found["id"], "done")


@pytest.mark.parametrize(("words", "rate"), [((), "3000"), (("--workers", "2"), "6000"), (("--rate", "none"), "none")])
def test_a_backfill_is_paced_unless_its_command_says_otherwise(
    made: tuple[Project, Engine], words: tuple[str, ...], rate: str
) -> None:
    project, engine = made
    project.change("jobs", "cancel", str(newest(engine)[0]))
    assert project.change("backfill", *words).exit_code == 0
    assert project.run("jobs", "list", "--json").document["jobs"][0]["options"]["rate"] == rate


def test_a_backfill_that_goes_on_keeps_the_pace_that_it_was_set(made: tuple[Project, Engine]) -> None:
    project, engine = made
    job, _ = newest(engine)
    project.change("jobs", "set", str(job), "rate=none")
    assert project.change("backfill").exit_code == 0
    assert project.run("jobs", "show", str(job), "--json").document["job"]["options"]["rate"] == "none"


def test_a_running_job_is_paused_from_another_process(made: tuple[Project, Engine]) -> None:
    project, engine = made
    settings = project.settings

    def pause(job: jobs.Job) -> None:
        project.change("jobs", "pause", str(job.id))

    result = backfill(engine, settings, settings.mapping(), ACT, batch_size=1, progress=pause)
    assert (result.state, result.keys) == ("paused", 15)
    job, state = newest(engine)
    assert state == "paused"
    assert project.run("jobs", "pause", str(job), *REASON).exit_code == 4


def test_a_cancelled_job_is_not_resumed(made: tuple[Project, Engine]) -> None:
    project, engine = made
    job, _ = newest(engine)
    assert project.run("jobs", "cancel", str(job), "--dry-run").exit_code == 0
    assert newest(engine) == (job, "paused")
    project.change("jobs", "cancel", str(job))
    assert newest(engine) == (job, "cancelled")
    assert project.run("jobs", "resume", str(job), *REASON).exit_code == 4
    assert project.run("jobs", "cancel", str(job), *REASON).exit_code == 4


def told(said: Said) -> list[list[str]]:
    """The commands that an answer names, as words."""
    found = re.findall(r"walletmigrate (.+? --reason) '…'", said.stdout + said.stderr)
    return [[*words.split(), "a test"] for words in found]


def test_an_old_reconciliation_is_given_up_by_the_commands_that_the_refusal_names(
    made: tuple[Project, Engine],
) -> None:
    project, engine = made
    settings = project.settings
    limits = Limits(correct_up_to=Decimal("1.00"))  # the command's own: else it is another run
    reconcile(engine, settings, settings.mapping(), ACT, limits=limits, batch_size=1, stop=stops_after(3))
    job, state = newest(engine)
    assert state == "paused"
    ledger.execute(engine, "update wallet.jobs set updated_at = now() - interval '8 days' where id = :id", id=job)
    said = project.run("reconcile", "--all", *REASON)
    assert (said.exit_code, "--force" in said.stderr) == (4, False)
    commands = told(said)
    assert [words[:2] for words in commands] == [["jobs", "cancel"], ["reconcile", "--all"]]
    assert project.run(*commands[0]).exit_code == 0
    project.change("backfill")  # accounts that are absent are refused
    assert project.run(*commands[1]).exit_code == 0
    assert project.run("reconcile", "--all", *REASON).exit_code == 0


def test_jobs_with_a_command_of_their_own_name_it_and_are_left_as_they_are(made: tuple[Project, Engine]) -> None:
    project, engine = made
    settings = project.settings
    project.change("backfill")
    names = {}
    for kind, details in (
        ("reconcile", "{}"),
        ("reconcile undo", '{"undoes": 7}'),
        ("backfill undo", '{"of": 1}'),
        ("snapshot take", "{}"),
    ):
        with jobs.begin(engine) as connection:
            job = jobs.started(connection, settings, kind, "users", ACT, details=json.loads(details))
        paused = project.change("jobs", "pause", str(job.id))
        said = project.run("jobs", "resume", str(job.id), *REASON)
        assert (said.exit_code, newest(engine)) == (2, (job.id, "paused"))
        assert told(paused) == told(said)
        names[kind] = " ".join(told(said)[0][:-2])
    assert names == {
        "reconcile": "reconcile --all --mapping users",
        "reconcile undo": "reconcile undo 7",
        "backfill undo": "backfill undo --job 1",
        "snapshot take": "snapshot take",
    }
    assert "walletmigrate reconcile undo 7 --reason" in project.run("doctor").stdout
    # Done, with a row set aside: a look at it opens nothing again.
    done = reconcile(engine, settings, settings.mapping(), ACT, batch_size=100)
    ledger.execute(
        engine,
        "insert into wallet.job_batches (job_id, number, pass, upto_key, keys, state, error, attempts) "
        "values (:id, 99, 1, '3', 1, 'set_aside', 'broken', 1)",
        id=done.run,
    )
    assert told(project.run("jobs", "show", str(done.run)))[0][:2] == ["reconcile", "--all"]
    assert project.run("jobs", "resume", str(done.run), *REASON).exit_code == 2
    assert ledger.scalar(engine, "select state from wallet.jobs where id = :id", id=done.run) == "done"


@pytest.mark.parametrize(("state", "code"), [("cancelled", 1), ("failed", 1), ("paused", 130)])
@pytest.mark.parametrize("command", ["backfill", "reconcile --all", "jobs resume {job}"])
def test_a_job_that_is_ended_elsewhere_is_no_success(
    made: tuple[Project, Engine], monkeypatch: pytest.MonkeyPatch, command: str, state: str, code: int
) -> None:
    project, engine = made
    settings = project.settings

    def end(job: jobs.Job) -> None:
        with jobs.begin(engine) as connection:
            if state == "cancelled":
                jobs.cancel(connection, settings, job.kind, "users", ACT)
        jobs.leave(engine, settings, job, state)

    for module in (cli_jobs, cli_reconcile):
        monkeypatch.setattr(module, "bar", lambda *_, **__: nullcontext(end))
    words = command.format(job=newest(engine)[0]).split()
    size = () if "resume" in words else ("--batch-size", "5")
    said = project.run(*words, *size, "--json", *REASON)
    assert (said.exit_code, newest(engine)[1], said.document["interrupted"]) == (code, state, state == "paused")
    assert ("taken out of work elsewhere" in said.stderr) == (code == 1)


@pytest.mark.parametrize("command", ["pause", "resume", "cancel", "set"])
def test_what_steers_a_job_wants_a_reason(made: tuple[Project, Engine], command: str) -> None:
    project, engine = made
    words = ["jobs", command, str(newest(engine)[0]), *(["rate=5"] if command == "set" else [])]
    said = project.run(*words)
    assert (said.exit_code, "--reason" in said.stderr) == (2, True)


def test_rows_that_a_done_job_has_set_aside_are_shown_and_tried_again(made: tuple[Project, Engine]) -> None:
    project, engine = made
    job, _ = newest(engine)
    ledger.execute(engine, "alter table wallet.accounts add constraint odd check (key <> '20')")
    said = project.run("jobs", "resume", str(job), *REASON)
    assert said.exit_code == 4
    shown = project.run("jobs", "show", str(job), "--json").document
    assert [one["key"] for one in shown["set_aside"]] == ["20"]
    assert "odd" in shown["set_aside"][0]["reason"]
    assert newest(engine) == (job, "done")
    ledger.execute(engine, "alter table wallet.accounts drop constraint odd")
    project.change("jobs", "resume", str(job))
    assert ledger.scalar(engine, "select count(*) from wallet.accounts where state = 'mirrored'") == 30
    assert ledger.rows(engine, "select items_done, items_failed from wallet.jobs where id = :id", id=job) == [(30, 0)]


def test_a_settings_word_that_makes_no_sense_changes_nothing(made: tuple[Project, Engine]) -> None:
    project, engine = made
    job, _ = newest(engine)
    before = ledger.scalar(engine, "select settings ->> 'rate' from wallet.jobs where id = :id", id=job)
    assert project.run("jobs", "set", str(job), "batch-size=0", *REASON).exit_code == 2
    assert project.run("jobs", "set", str(job), "rate=5", "--dry-run").exit_code == 0
    said = project.run("jobs", "set", str(job), "min-batch-size=20000", *REASON)
    assert (said.exit_code, "above max-batch-size=10000" in said.stderr) == (2, True)
    assert project.run("jobs", "set", str(job), "min-batch-size=20000", "max-batch-size=30000", *REASON).exit_code == 0
    assert before == ledger.scalar(engine, "select settings ->> 'rate' from wallet.jobs where id = :id", id=job)
    assert before != "5"
