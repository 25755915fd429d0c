"""The way of a migration and back by all commands, each where it can be carried out: for tests of what all promise."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from sqlalchemy import Engine

import ledger
from commandline import Project, Said, project_at
from retiring import FIRST
from walletmigrate.commands import ROLES

WALK = """
phase advance
flags set wallet.dualWrite on --everyone
flags explain 1
backfill
backfill undo --job 1
backfill
jobs list
jobs show 1
jobs pause 3
jobs set 3 rate=1000
jobs resume 3
jobs cancel 3
adjust --account 1 --amount 5 --notes gift
erase --account 1
reconcile --all
reconcile list
reconcile show 4
reconcile undo 4
recalculate --all
trace nobody
snapshot take
snapshot verify
snapshot take
snapshot list
snapshot prune --keep 1
balance --account 1
history --account 1
overview
report snapshot:2 --to {folder}/snapshot.csv
verify
status
phase show
doctor
discover --source {folder}
capture report
capture mode mirror
capture mode stale
stop-the-line
resume
phase back
phase advance
verify
phase advance
cutover --everyone --confirm users
phase advance
rollback --exercise
freeze --confirm users
verify
verify list
verify show 1
archive --to {folder}/users.gz
archive check {folder}/users.gz
evidence --to {folder}/evidence
evidence check {folder}/evidence --with-database
retire --archive {folder}/users.gz --migrations {folder}/versions --confirm users
phase back
unfreeze --confirm users
rollback
phase back
capture prune
capture remove --confirm users
capture install
install
uninstall --confirm users
"""
"""The way of a migration and back. Each line is refused to lesser roles first, with nothing changed."""

SERVICES = {"exporter", "sandbox", "rehearse", "init", "watch"}
"""Run until they are stopped, in a database of their own, or on no ledger: see the tests below."""

UNFINISHED = {"jobs pause": "running", "jobs set": "paused", "jobs resume": "paused", "jobs cancel": "paused"}
"""What the third job, the second backfill, is before these commands."""

FOUND_NOTHING = {
    "trace": "it ends with 1 where nothing carries the id that it was asked for, and of the walk's id nothing does"
}
"""The commands of the walk that are carried out and yet end with 1, each with its reason."""


def begun(folder: Path, url: str) -> tuple[Project, Engine]:
    """Where the walk begins: a ledger of three users in phase legacy, and an application that has a migration."""
    project, engine = project_at(folder, url, "legacy", rows=3)
    (folder / "versions").mkdir()
    (folder / "versions" / "0001_first.py").write_text(FIRST, encoding="utf-8")
    return project, engine


def steps(admin: Engine, project: Project) -> Iterator[tuple[str, list[str], str]]:
    """Each line of the walk, its words and its command, when all is there that the command needs to do something."""
    ledger.execute(
        admin,
        "insert into wallet.bypasses (at, mapping, relation, operation, treatment, fingerprint) "
        "values ('2001-01-01', 'users', 'public.users', 'update', 'stale', 'x')",
    )
    for line in WALK.strip().splitlines():
        words = line.format(folder=project.folder).split()
        command = next(name for name in (" ".join(words[:2]), words[0]) if name in ROLES)
        if command in UNFINISHED:
            ledger.execute(admin, "update wallet.jobs set state = :state where id = 3", state=UNFINISHED[command])
        if command == "recalculate":  # which writes nothing where nothing differs
            ledger.execute(admin, "update wallet.accounts set balance = balance + 1 where key = '2'")
        yield line, words, command


def carried_out(command: str, said: Said) -> bool:
    """Whether a command did what it was told: it ends with 0, or with 3 where it found a difference."""
    return said.exit_code in ((1,) if command in FOUND_NOTHING else (0, 3)) and said.document.get("error") is None


def files(folder: Path) -> set[Path]:
    """What stands in the project's folder, evidence begun aside: the folder is made before the database is asked."""
    return {path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
