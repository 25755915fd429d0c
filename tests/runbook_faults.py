"""Faults that the alerts' runbooks are for, where they take processes, locks or a Prometheus of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psycopg
from sqlalchemy import make_url

from ledger import ACT, execute, scalar, unguarded, until_blocked
from monitoring import until
from runbook_stage import Stage, backfilled, cut_over, cut_over_from, drift, drifted
from servers import Postgres
from walletmigrate.backfill import backfill
from walletmigrate.errors import JobFailed
from walletmigrate.flag_sources import FileSource
from walletmigrate.functions import relation
from walletmigrate.heartbeat import Heartbeat
from walletmigrate.undo import undo
from walletmigrate.verify import verify

BEATING = Path(__file__).parent / "apps" / "beating.py"
SECONDS = 60.0


@contextmanager
def running(stage: Stage, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process as somebody started it in the stage's shell; at the end it is killed."""
    shell = stage.shell()
    with (stage.folder / "started.log").open("ab") as log:
        process = subprocess.Popen(
            words, cwd=shell.folder, env=shell.environment, stdin=subprocess.PIPE, stdout=log, stderr=log
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdin is not None
        process.stdin.close()


def command(*words: str) -> tuple[str, ...]:
    """The command line of walletmigrate."""
    return (str(Path(sys.executable).with_name("walletmigrate")), *words)


def drift_found(server: Postgres, url: str, folder: Path) -> Stage:
    """As `drifted`, and the nightly verification has found it. An hourly reconciliation had found before that user 3
    has 12.00 less than the bank says.
    """
    stage = cut_over(server, url, folder)
    (folder / "bank.csv").write_text("key,balance\n1,100.00\n2,100.00\n3,112.00\n", encoding="utf-8")
    with running(stage, *command("reconcile", "--all", "--truth", "bank.csv", "--reason", "hourly")) as process:
        assert process.wait(SECONDS) == 3
    drift(stage)
    assert not verify(stage.engine, stage.settings, stage.settings.mapping(None), ACT).clean
    return stage


BANK = """\
import json
from pathlib import Path


def balance_of(key, bucket, currency):
    return json.loads(Path("bank.json").read_text())[key]
"""
"""A truth that does not know each account; a whole number is an amount too."""


def failed_jobs(server: Postgres, url: str, folder: Path) -> Stage:
    """As `backfilled`, and four jobs failed. A reconciliation asked a function that raises for user 4; the sessions of
    a verification and of an archive, which waited for a lock on the table, were ended by an administrator; and the
    backfill was taken back, to be begun anew, when somebody had added a constraint that every opening breaks.
    """
    stage = backfilled(server, url, folder)
    (folder / "bank.py").write_text(BANK, encoding="utf-8")
    (folder / "bank.json").write_text(json.dumps({str(key): 100 for key in range(1, 11) if key != 4}), encoding="utf-8")
    words = command("reconcile", "--all", "--truth", "python:bank:balance_of", "--reason", "hourly")
    with running(stage, *words) as process:
        assert process.wait(SECONDS) == 1
    with psycopg.connect(url) as migration:
        migration.execute("lock table users in access exclusive mode")
        for name, *options in (("verify",), ("archive", "--to", "users.jsonl.gz", "--reason", "month's end")):
            with running(stage, *command(name, *options)) as process:
                until_blocked(stage.engine, f"walletmigrate {name}")
                whose = f"application_name = 'walletmigrate {name}' and cardinality(pg_blocking_pids(pid)) > 0"
                execute(stage.engine, f"select pg_terminate_backend(pid) from pg_stat_activity where {whose}")
                assert process.wait(SECONDS) == 5
        migration.rollback()
    undo(stage.engine, stage.settings, 1, ACT)
    rule = (
        "alter table wallet.transactions add constraint no_openings check (type not in ('opening', 'resync')) not valid"
    )
    execute(stage.engine, rule)
    with suppress(JobFailed):
        backfill(stage.engine, stage.settings, stage.settings.mapping(None), ACT)
    return stage


def read_apart(server: Postgres, url: str, folder: Path) -> Stage:
    """As `drifted`; then the application read the balance of user 7 from the ledger, and compared."""
    stage = drifted(server, url, folder)

    def read() -> None:
        with stage.engine.begin() as connection:
            found = stage.adapter().balance(connection, 7)
        assert found.compare == expected.pop(0), found

    expected = ["mismatch", "match"]
    read()
    stage.meanwhile["read"] = read
    return stage


def unverified(server: Postgres, url: str, folder: Path) -> Stage:
    """As `cut_over`; then maintenance switched the fence off and on again, and the nightly verification found that:
    it was not clean, and so voids the clean one before it.
    """
    stage = cut_over(server, url, folder)
    with unguarded(stage.engine, relation(stage.settings.mapping(None))):
        pass
    assert not verify(stage.engine, stage.settings, stage.settings.mapping(None), ACT).clean
    return stage


def stalled(server: Postgres, url: str, folder: Path) -> Stage:
    """As `backfilled`, but none was open; a backfill waited for a report's lock on user 5 when its process was killed.
    That was an hour ago: the times of the job, which nobody has touched since, are put back by as much.
    """
    stage = backfilled(server, url, folder, opened=False)
    words = command("backfill", "--batch-size", "2", "--reason", "CHG-31: open all accounts")
    sessions = "select count(*) from pg_stat_activity where application_name like 'walletmigrate %' and datname = :name"
    with psycopg.connect(url, application_name="reporting") as report, running(stage, *words) as process:
        report.execute("select 1 from users where id = 5 for update")
        until_blocked(stage.engine, "walletmigrate backfill")
        process.kill()
        process.wait()
        report.rollback()
        name = make_url(url).database
        until(lambda: scalar(stage.engine, sessions, name=name) == 0, lambda: "its session has not ended")
    assert scalar(stage.engine, "select state from wallet.jobs") == "running"
    assert scalar(stage.engine, "select count(*) from wallet.job_batches where state = 'claimed'") == 1
    execute(stage.engine, "update wallet.jobs set updated_at = updated_at - interval '1 hour'")
    execute(stage.engine, "update wallet.job_batches set lease_until = lease_until - interval '1 hour'")
    return stage


def unreadable_flags(server: Postgres, url: str, folder: Path) -> Stage:
    """As `cut_over`; then somebody edited the flag file by hand, and for ten minutes a process has decided by what it
    had read before. The last good file stands beside it. (The minutes are the process's clock, which is put forward.)
    """
    stage = cut_over(server, url, folder)
    file, ahead = stage.settings.flags.path, 0.0
    source = FileSource(file, clock=lambda: time.monotonic() + ahead)
    heartbeat = Heartbeat(stage.settings, source, name="shop", observers=[stage.shop.observer])
    heartbeat.beat()
    (file.parent / "last-good.json").write_bytes(file.read_bytes())
    file.write_text(file.read_text(encoding="utf-8").replace("true", "ture", 1), encoding="utf-8")
    ahead = 600.0
    heartbeat.beat()

    def later() -> None:
        nonlocal ahead
        ahead += 10.0  # a beat comes every ten seconds
        heartbeat.beat()

    stage.meanwhile["beat"] = later
    return stage


def disagreeing(server: Postgres, url: str, folder: Path) -> Stage:
    """As `cut_over`; one process decides by the flag file, another by a copy of it from before the last flip."""
    stage = backfilled(server, url, folder)
    old = folder / "old-copy.json"
    old.write_bytes(stage.settings.flags.path.read_bytes())
    stage = cut_over_from(stage)
    alive = ExitStack()
    stage.cleanup.push(alive)
    first = alive.enter_context(_beats(stage, stage.settings.flags.path))
    second = stage.cleanup.enter_context(_beats(stage, old))

    def restart() -> None:
        """The one with the old copy is deployed anew; a minute later the one before it is forgotten."""
        second.kill()
        second.wait()
        alive.enter_context(_beats(stage, stage.settings.flags.path))
        gone = f"update wallet.processes set seen_at = seen_at - interval '1 minute' where pid = {second.pid}"
        execute(stage.engine, gone)
        assert first.poll() is None

    stage.meanwhile["restarted"] = restart
    return stage


@contextmanager
def _beats(stage: Stage, flags: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A living process of the application that has told the database of itself."""
    count = "select count(*) from wallet.processes where pid = :pid"
    with running(
        stage, sys.executable, str(BEATING), "walletmigrate.toml", os.path.relpath(flags, stage.folder)
    ) as one:
        until(lambda: scalar(stage.engine, count, pid=one.pid) == 1 or one.poll() is not None)
        assert one.poll() is None, (stage.folder / "started.log").read_text(encoding="utf-8")
        yield one


def failing(server: Postgres, url: str, folder: Path) -> Stage:
    """As `cut_over`; then somebody added a constraint that every booking breaks. Of 309 payments nine were bookings."""
    stage = cut_over(server, url, folder)
    rule = "alter table wallet.transactions add constraint no_bookings check (type <> 'booking') not valid"
    execute(stage.engine, rule)
    adapter = stage.adapter()
    with stage.engine.connect() as connection:
        for turn in range(300):
            with connection.begin():
                adapter.credit(connection, 4 + turn % 6, 1, type="deposit")
        for turn in range(9):
            with connection.begin():
                adapter.debit(connection, 1 + turn % 3, 1, type="booking")

    def book() -> None:
        with stage.engine.connect() as connection:
            for turn in range(300):
                with connection.begin():
                    adapter.debit(connection, 1 + turn % 10, 1, type="booking")

    stage.meanwhile["bookings"] = book
    return stage


FAULTS: dict[str, Callable[[Postgres, str, Path], Stage]] = {
    "backfill-stalled": stalled,
    "balance-drift": drift_found,
    "dual-write-error-budget-burn": failing,
    "flag-disagreement": disagreeing,
    "flags-stale": unreadable_flags,
    "job-failed": failed_jobs,
    "read-mismatch": read_apart,
    "verification-stale": unverified,
}
