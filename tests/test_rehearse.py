"""The rehearsal: it passes where the money is right, fails where it is not, never hangs and leaves nothing."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from types import ModuleType
from typing import Any

import psycopg
import pytest
from sqlalchemy import Engine, make_url, text

from servers import Postgres
from walletmigrate import line, phases, rehearsal_crew, rehearsal_steps, traffic
from walletmigrate.errors import DatabaseUnreachable, PreconditionRefused, UnreadableInput, UsageError
from walletmigrate.rehearsal_crew import Crew
from walletmigrate.rehearsal_raw import is_raw
from walletmigrate.rehearsal_report import AccountBalances, Report, judge, stage
from walletmigrate.rehearsal_stages import STAGES, legs_of
from walletmigrate.rehearse import rehearse, rehearse_traffic
from walletmigrate.traffic import Traffic

HEADER = "transaction_id,account_id,tenant,date,type,amount"
UNREACHABLE = "postgresql://nobody@127.0.0.1:1/none"
FLAG_LAG = 0.2


def left_on(server: Postgres) -> tuple[list[str], list[str]]:
    """Databases and roles of rehearsals on the server."""
    with psycopg.connect(server.url) as connection:
        databases = connection.execute("select datname from pg_database where datname like 'walletmigrate_%'")
        names = [name for (name,) in databases]
        roles = connection.execute("select rolname from pg_roles where rolname like 'rehearsal_%'")
        return names, [name for (name,) in roles]


@pytest.fixture
def nothing_is_left(server: Postgres) -> Iterator[None]:
    before = left_on(server)
    yield
    assert left_on(server) == before
    assert multiprocessing.active_children() == []


@contextmanager
def login(server: Postgres, rights: str) -> Iterator[str]:
    """Give the URL of a user of the server that has these rights only."""
    name = f"login_{uuid.uuid4().hex[:8]}"
    with psycopg.connect(server.url, autocommit=True) as connection:
        connection.execute(f"create role {name} login {rights} password 'trusted'")
        try:
            url = make_url(server.url).set(username=name, password="trusted")
            yield url.render_as_string(hide_password=False)
        finally:
            connection.execute(f"drop role {name}")


def run(server: Postgres, made: Traffic, *, workers: int = 2, seed: int = 1) -> Report:
    return rehearse_traffic(
        made, workers=workers, seed=seed, database_url=server.url, progress=False, flag_lag=FLAG_LAG
    )


@pytest.mark.usefixtures("nothing_is_left")
@pytest.mark.parametrize(("workers", "seed"), [(1, 5), (3, 6)])
def test_generated_traffic_migrates_and_goes_back_with_every_balance_right(
    server: Postgres, workers: int, seed: int
) -> None:
    made = traffic.generate(seed, 900)
    report = run(server, made, workers=workers, seed=seed)
    assert report.errors == ()
    assert report.verdict == "pass"
    assert (report.applied, report.mismatches, report.drift_accounts) == (900, 0, 0)
    assert report.drift_amount == 0
    assert report.legacy_total == report.ledger_total == report.expected_total == sum(made.expected.values())
    assert {each.account_id: each.ledger for each in report.balances} == made.expected
    assert [each.name for each in report.stages] == [name for name, _ in STAGES]
    assert sum(each.transactions for each in report.stages) == 900
    assert report.postgres_version == server.version
    raw = [[is_raw(seed, one) for one in leg] for leg in legs_of(made.transactions)]
    legs = [name for name, of_stage in STAGES for _ in of_stage]
    refusable = sum(sum(each) for name, each in zip(legs, raw, strict=True) if name in {"ledger only", "unfreeze"})
    assert sum(map(sum, raw)) - refusable <= report.bypass_writes <= sum(map(sum, raw))
    assert report.bypass_writes > 0
    assert report.replayed > 0
    assert report.resyncs > 0
    assert report.serialization_retries > 0


@pytest.mark.usefixtures("nothing_is_left")
def test_all_that_a_killed_worker_had_sent_is_replayed_and_moves_no_money_again(
    server: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, shares = Crew.replace_one, []

    def once_all_is_sent(crew: Crew) -> str:
        crew._wait_for(lambda: crew.quiet)
        shares.append(crew._assignments[0].legs[crew._leg])
        return honest(crew)

    monkeypatch.setattr(Crew, "replace_one", once_all_is_sent)
    report = run(server, traffic.generate(9, 800), workers=1, seed=9)
    assert (report.errors, report.verdict, report.applied) == ((), "pass", 800)
    (share,) = shares
    raw = sum(is_raw(9, one) for one in share)
    assert raw > 0
    assert report.replayed >= len(share) - raw > 0


@pytest.mark.usefixtures("nothing_is_left")
def test_the_files_say_what_the_report_says(server: Postgres, tmp_path: Path) -> None:
    source, report, balances = (tmp_path / name for name in ("in.csv", "report.json", "balances.csv"))
    rows = ["a,x-1,north,2026-01-01,deposit,10.10", "b,x-2,south,2026-01-01,fee,-0.05"]
    source.write_text("\n".join([HEADER, *rows, rows[0], "c,x-3,south,2026-01-01,none,0.00"]), encoding="utf-8")
    made = rehearse(
        source,
        workers=3,
        report=report,
        balances=balances,
        database_url=server.url,
        progress=False,
        flag_lag=0,
    )
    document = json.loads(report.read_text(encoding="utf-8"))
    stages = document.pop("stages")
    counts = {name: document.pop(name) for name in ("replayed", "resyncs", "serialization_retries")}
    assert all(isinstance(count, int) for count in counts.values())
    assert document == {
        "schema_version": 1,
        "verdict": "pass",
        "accounts": 3,
        "transactions": 2,
        "applied": 2,
        "mismatches": 0,
        "drift_accounts": 0,
        "drift_amount": "0.00",
        "legacy_total": "10.05",
        "ledger_total": "10.05",
        "expected_total": "10.05",
        "bypass_writes": sum(is_raw(1, one) for one in traffic.read(source).transactions),
        "postgres_version": server.version,
    }
    keys = {"name", "transactions", "seconds", "per_second", "p50_ms", "p99_ms"}
    assert [set(each) for each in stages] == [keys] * len(STAGES)
    assert made.to_json() == report.read_text(encoding="utf-8")
    with balances.open(encoding="utf-8", newline="") as file:
        assert list(csv.reader(file)) == [
            ["account_id", "legacy_balance", "ledger_balance", "expected_balance"],
            ["x-1", "10.10", "10.10", "10.10"],
            ["x-2", "-0.05", "-0.05", "-0.05"],
            ["x-3", "0.00", "0.00", "0.00"],
        ]


@pytest.mark.timeout(900)
@pytest.mark.usefixtures("nothing_is_left")
@pytest.mark.parametrize(("workers", "seed"), [(4, 1), (2, 7)])
def test_real_bank_transactions_migrate_and_go_back(
    server: Postgres, shared_data: Path, workers: int, seed: int
) -> None:
    report = rehearse(shared_data, workers=workers, seed=seed, database_url=server.url, progress=False, flag_lag=1)
    assert report.errors == ()
    assert report.verdict == "pass"
    assert (report.accounts, report.transactions, report.applied) == (591, 23_932, 23_932)
    assert report.ledger_total == Decimal("19057313.70")


def test_progress_off_a_terminal_is_one_line_per_stage_on_standard_error(
    server: Postgres, capfd: pytest.CaptureFixture[str]
) -> None:
    made = traffic.generate(3, 200)
    rehearse_traffic(made, workers=2, seed=3, database_url=server.url, progress=True, flag_lag=FLAG_LAG)
    said = capfd.readouterr()
    assert said.out == ""
    lines = said.err.splitlines()
    assert [name for (name, _), line in zip(STAGES, lines, strict=True) if line.startswith(name)] == [
        name for name, _ in STAGES
    ]
    assert "240 opened" in lines[1]
    assert "killed, its transactions sent again by process" in lines[2]
    assert "stopped, postings in flight waited out; resumed" in lines[4]
    assert "240 accounts frozen" in lines[6]


def test_a_worker_that_is_killed_fails_the_rehearsal_and_nothing_hangs(server: Postgres, nothing_is_left: None) -> None:
    with while_running(kill_the_second_worker):
        report = run(server, traffic.generate(1), workers=2)
    assert report.verdict == "fail"
    assert report.applied < report.transactions
    assert any("worker 2" in error and f"exit code -{signal.SIGKILL}" in error for error in report.errors)


def kill_the_second_worker() -> bool:
    for child in multiprocessing.active_children():
        if child.name.endswith("-2") and child.pid is not None:
            os.kill(child.pid, signal.SIGKILL)
            return True
    return False


@contextmanager
def while_running(act: Callable[[], bool]) -> Iterator[None]:
    """Try ``act`` beside the body until it says that it is done."""
    over = threading.Event()

    def repeat() -> None:
        while not over.is_set() and not act():
            over.wait(0.01)

    thread = threading.Thread(target=repeat)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@pytest.mark.usefixtures("nothing_is_left")
def test_a_worker_that_is_refused_says_at_which_transaction(server: Postgres) -> None:
    made = traffic.generate(1, 300)
    bad = replace(made.transactions[150], amount=Decimal("0.001"))
    report = run(server, replace(made, transactions=(*made.transactions[:150], bad, *made.transactions[151:])))
    assert report.verdict == "fail"
    (error,) = report.errors
    assert f"transaction {bad.id} (line {bad.line}): InvalidAmount" in error


@pytest.mark.usefixtures("nothing_is_left")
def test_workers_that_stand_still_fail_the_rehearsal(server: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal_crew, "STALL_SECONDS", 1.0)
    monkeypatch.setattr(Crew, "run", lambda *_: None)
    report = run(server, traffic.generate(1, 100))
    assert report.verdict == "fail"
    assert report.errors == ("no worker got any further for 1 seconds",)


@pytest.mark.usefixtures("nothing_is_left")
def test_a_step_that_is_refused_fails_the_rehearsal_with_its_reasons(
    server: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(phases, "back", lambda *_: None)
    report = run(server, traffic.generate(1, 300))
    assert report.verdict == "fail"
    assert "the way back has not been exercised" in report.errors[0]


@pytest.mark.usefixtures("nothing_is_left")
@pytest.mark.parametrize(
    ("module", "step", "told"),
    [(phases, "rollback", "read in mode ledger"), (line, "stop", "while the line was stopped")],
)
def test_a_step_without_an_effect_fails_the_rehearsal(
    server: Postgres, monkeypatch: pytest.MonkeyPatch, module: ModuleType, step: str, told: str
) -> None:
    monkeypatch.setattr(module, step, lambda *_: None)
    report = run(server, traffic.generate(1, 600))
    assert report.verdict == "fail"
    assert any(told in error for error in report.errors)


@pytest.mark.usefixtures("nothing_is_left")
@pytest.mark.parametrize("step", ["install", "backfill", "unfreeze"])
def test_one_cent_that_nobody_paid_fails_the_rehearsal(
    server: Postgres, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    honest = getattr(rehearsal_steps, step)
    cents = [Decimal("0.01")]

    def forge(engine: Engine, *arguments: Any, **options: Any) -> Any:
        done = honest(engine, *arguments, **options)
        with engine.begin() as connection:
            values = {"cent": cents.pop() if cents else 0}
            connection.execute(text("update public.accounts set balance = balance + :cent where id = 100"), values)
        return done

    monkeypatch.setattr(rehearsal_steps, step, forge)
    made = traffic.generate(1, 600)
    report = run(server, made)
    assert report.verdict == "fail"
    assert report.errors
    assert cents == []


def test_rows_that_cannot_be_read_are_listed_and_nothing_is_run(tmp_path: Path) -> None:
    source, report = tmp_path / "in.csv", tmp_path / "report.json"
    source.write_text(f"{HEADER}\n1,7,t,2026-01-01,x,1.00\n1,7,t,2026-01-01,x,2.00\n2,7,t,2026-01-01,x,oops\n")
    with pytest.raises(UnreadableInput) as caught:
        rehearse(source, report=report, database_url=UNREACHABLE, progress=False)
    assert [line for line, _ in caught.value.problems] == [3, 4]
    assert not report.exists()


@pytest.mark.usefixtures("nothing_is_left")
def test_a_user_who_may_create_databases_and_roles_is_enough(server: Postgres) -> None:
    with login(server, "createdb createrole") as url:
        made = traffic.generate(1, 300)
        report = rehearse_traffic(made, workers=2, seed=1, database_url=url, progress=False, flag_lag=0)
    assert report.errors == ()
    assert report.verdict == "pass"


@pytest.mark.usefixtures("nothing_is_left")
@pytest.mark.parametrize("rights", ["", "createdb"])
def test_a_user_without_these_rights_is_refused_with_what_to_do(server: Postgres, rights: str) -> None:
    with login(server, rights) as url, pytest.raises(PreconditionRefused, match="create databases and roles"):
        rehearse_traffic(traffic.generate(1, 10), workers=1, seed=1, database_url=url, progress=False)


def test_a_server_that_does_not_answer_is_named(tmp_path: Path) -> None:
    with pytest.raises(DatabaseUnreachable):
        rehearse(database_url=UNREACHABLE, progress=False)


@pytest.mark.parametrize("workers", [0, -1, 65])
def test_a_senseless_number_of_workers_is_refused(workers: int) -> None:
    with pytest.raises(UsageError, match="workers"):
        rehearse(workers=workers, database_url=UNREACHABLE, progress=False)


@pytest.mark.parametrize("seconds", [-0.1, 61, float("nan")])
def test_a_senseless_lag_of_flags_is_refused(seconds: float) -> None:
    with pytest.raises(UsageError, match="flag lag"):
        rehearse(flag_lag=seconds, database_url=UNREACHABLE, progress=False)


def test_a_result_that_could_not_be_written_is_refused_before_anything_is_run(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none" / "report.json"):
        with pytest.raises(UsageError, match=str(path)):
            rehearse(report=path, database_url=UNREACHABLE, progress=False)
        with pytest.raises(UsageError, match=str(path)):
            rehearse(balances=path, database_url=UNREACHABLE, progress=False)


INTERRUPTED = """
import multiprocessing, sys
from walletmigrate.rehearse import rehearse
if __name__ == "__main__":
    try:
        rehearse(workers=2, database_url=sys.argv[1], progress=False)
    except KeyboardInterrupt:
        sys.exit(1 if multiprocessing.active_children() else 130)
"""


@pytest.mark.parametrize("started", [1, 2], ids=["while the workers start", "amid the traffic"])
def test_an_interrupt_on_the_terminal_stops_all_and_leaves_nothing(
    server: Postgres, nothing_is_left: None, tmp_path: Path, started: int
) -> None:
    script = tmp_path / "interrupted.py"
    script.write_text(INTERRUPTED, encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, str(script), server.url], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    with psycopg.connect(server.url, autocommit=True) as connection:
        query = "select count(distinct application_name) from pg_stat_activity where application_name like %s"
        pattern = "walletmigrate-rehearse%" if started == 1 else "walletmigrate-rehearse-_"
        until = time.monotonic() + 60
        while connection.execute(query, [pattern]).fetchone() < (started,):  # type: ignore[operator]
            assert process.poll() is None
            assert time.monotonic() < until
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said == ""


def test_every_transaction_is_in_one_leg_and_in_order() -> None:
    made = traffic.generate(1, 1_000).transactions
    legs = legs_of(made)
    assert len(legs) == sum(len(of_stage) for _, of_stage in STAGES)
    assert tuple(one for leg in legs for one in leg) == made
    assert tuple(one for leg in legs_of(made[:1]) for one in leg) == made[:1]


def balances(legacy: str | None, ledger: str | None, expected: str) -> AccountBalances:
    return AccountBalances(
        "7",
        None if legacy is None else Decimal(legacy),
        None if ledger is None else Decimal(ledger),
        Decimal(expected),
    )


def judged(*found: AccountBalances, applied: int = 1, mismatches: int = 0, errors: tuple[str, ...] = ()) -> Report:
    return judge(
        transactions=1,
        applied=applied,
        mismatches=mismatches,
        balances=found,
        stages=(),
        postgres_version="18.4",
        errors=errors,
    )


def test_the_verdict_is_a_pass_only_if_nothing_at_all_is_wrong() -> None:
    right = balances("1.00", "1.00", "1.00")
    assert judged(right).verdict == "pass"
    assert judged(right, applied=0).verdict == "fail"
    assert judged(right, applied=2).verdict == "fail"
    assert judged(right, mismatches=1).verdict == "fail"
    assert judged(right, errors=("no",)).verdict == "fail"


@pytest.mark.parametrize(
    ("wrong", "amount"),
    [
        (("1.01", "1.00", "1.00"), "0.01"),
        (("1.00", "0.99", "1.00"), "0.01"),
        (("1.00", "1.00", "1.01"), "0.01"),
        (("1.00", None, "1.00"), "1.00"),
        ((None, "1.00", "1.00"), "1.00"),
        (("0.00", None, "0.00"), "0.00"),
        (("-5.00", "5.00", "1.00"), "10.00"),
    ],
)
def test_one_balance_that_differs_or_is_missing_fails_the_rehearsal(
    wrong: tuple[str | None, str | None, str], amount: str
) -> None:
    report = judged(balances("1.00", "1.00", "1.00"), balances(*wrong))
    assert (report.verdict, report.drift_accounts, report.drift_amount) == ("fail", 1, Decimal(amount))


def test_large_totals_are_written_to_the_last_decimal() -> None:
    huge = "999999999999999999.99"
    document = json.loads(judged(balances(huge, huge, huge), balances("0.01", "0.01", "0.01")).to_json())
    assert document["legacy_total"] == document["ledger_total"] == "1000000000000000000.00"


def test_percentiles_are_durations_that_were_measured() -> None:
    found = stage("any", 100, 2.0, array("d", [n / 1000 for n in range(100, 0, -1)]))
    assert (found.per_second, found.p50_ms, found.p99_ms) == (50.0, 50.0, 99.0)
    assert stage("one", 1, 0.5, array("d", [0.003])).p99_ms == 3.0
    empty = stage("none", 0, 0.0, array("d"))
    assert (empty.per_second, empty.p50_ms, empty.p99_ms) == (0.0, None, None)
