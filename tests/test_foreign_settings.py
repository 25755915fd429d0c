"""A database whose settings are not PostgreSQL's own: what is read, proved and kept there is the same as anywhere."""

from __future__ import annotations

import gzip
import json
import shlex
from pathlib import Path
from typing import Any, Final

from sqlalchemy import make_url, text
from sqlalchemy.pool import NullPool

import ledger
from commandline import REASON, Project, Said
from conftest import MakeDatabase
from walletmigrate import connect

FOREIGN: Final = {
    "datestyle": "German",
    "intervalstyle": "sql_standard",
    "timezone": "'Asia/Kathmandu'",
    "extra_float_digits": "-15",
    "bytea_output": "escape",
    "search_path": "nowhere",
    "array_nulls": "off",
    "quote_all_identifiers": "on",
    "client_encoding": "LATIN1",
    "default_transaction_isolation": "serializable",
    "default_transaction_deferrable": "on",
}
KEY: Final = "Σ-1"  # in no Latin alphabet

WAY: Final = """
install
phase advance
flags set wallet.dualWrite on --everyone
backfill --batch-size 3
reconcile --all --correct-up-to 5
reconcile undo 2
verify
rollback --exercise
phase advance
cutover --everyone --confirm users
phase advance
snapshot take
adjust --account {key} --amount 5
recalculate --all
verify --since-last
rollback --exercise
verify
archive --to {folder}/mirrored.jsonl.gz
freeze --confirm users
archive --to {folder}/users.jsonl.gz
snapshot take
snapshot verify
"""
LOOKS: Final = """
evidence --to {folder}/evidence
status
jobs list
jobs show 1
snapshot list
reconcile list
history --account {key}
history --account {key} --from 2026-01-01T00:00:00Z
balance --account {key}
overview
report job:1 --to {folder}/job.csv
report snapshot:1 --to {folder}/snapshot.html
report verification:1 --to {folder}/verification.csv
capture report
discover --source {folder}
"""
PROOFS: Final = """
archive check {folder}/mirrored.jsonl.gz
archive check {folder}/users.jsonl.gz
evidence check {folder}/evidence --with-database
snapshot verify --dry-run
verify --dry-run
"""


def with_settings(url: str, settings: dict[str, str]) -> None:
    name = make_url(url).database
    admin = connect.engine(url, application_name="tests", isolation_level="AUTOCOMMIT", poolclass=NullPool)
    with admin.connect() as connection:
        connection.exec_driver_sql(f'alter database "{name}" reset all')
        for setting, value in settings.items():
            connection.exec_driver_sql(f'alter database "{name}" set {setting} = {value}')


def all_of(project: Project, commands: str, *more: str, url: str | None = None) -> list[Said]:
    """Run them; each has to succeed."""
    done = []
    for line in commands.strip().splitlines():
        words = shlex.split(line.format(folder=project.folder, key=KEY))
        said = project.run(*words, *more, url=url)
        assert said.exit_code == 0, (line, said)
        done.append(said)
    return done


def test_the_whole_way_goes_through_and_what_was_made_there_is_proved_elsewhere(
    database_url: str, make_database: MakeDatabase, tmp_path: Path
) -> None:
    project = Project(tmp_path, database_url)
    engine = ledger.engine_named(database_url)
    with engine.begin() as connection:
        connection.execute(
            text(
                "create table public.users (id text primary key, tenant text, role text, total_coins double precision)"
            )
        )
        # As many digits as a double has.
        filled = "insert into public.users select 'Σ-' || g, 't', 'r', 1234567890123.25 + g"
        connection.execute(text(f"{filled} from generate_series(1, 8) as g"))
    with_settings(database_url, FOREIGN)
    all_of(project, WAY, *REASON)
    all_of(project, LOOKS)
    *_, listed = (said.document for said in all_of(project, "jobs list", "--json"))
    assert {job["state"] for job in listed["jobs"]} == {"done"}
    with gzip.open(tmp_path / "users.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows: list[Any] = [json.loads(line) for line in lines][1:-1]
    assert [row[1][0] for row in rows] == [f"12345678901{n}.25" for n in (29, 25, 26, 27, 28, 29, 30, 31)]
    assert all("T" in row[1][4] and row[1][4].endswith("+05:45") for row in rows), "a time that is read everywhere"

    all_of(project, PROOFS)
    elsewhere = make_database(make_url(database_url).database)
    all_of(project, PROOFS, url=elsewhere)
    with_settings(elsewhere, {"datestyle": "'SQL, DMY'", "timezone": "'America/St_Johns'"})
    all_of(project, PROOFS, url=elsewhere)
    doctor = project.run("doctor")
    assert "function" not in doctor.stdout, doctor
