"""Evidence: a folder that is checked again elsewhere, and against the database."""

from __future__ import annotations

import json
import shutil
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

import ledger
from retiring import SOURCE, End
from walletmigrate import checksums, snapshot_checks, snapshots
from walletmigrate.errors import UnreadableInput, UsageError
from walletmigrate.evidence import Evidence, gather
from walletmigrate.evidence_check import EvidenceCheck, check

D = Decimal


@pytest.fixture
def end(database_url: str, tmp_path: Path) -> End:
    made = End(database_url, tmp_path)
    with made.engine.begin() as connection:
        made.adapter().credit(connection, 1, 5, type="deposit")
    assert made.verify()
    return made


def gathered(end: End) -> Evidence:
    return gather(end.engine, end.settings, SOURCE, end.folder / "evidence")


def checked(end: End, *, alone: bool = True) -> EvidenceCheck:
    folder = end.folder / "evidence"
    return check(folder) if alone else check(folder, end.engine, end.settings)


def edited(end: End, name: str, **changes: Any) -> None:
    """Change a document, and make the manifest fit: only what it says can then be wrong."""
    path = end.folder / "evidence" / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    manifest = end.folder / "evidence" / "manifest.json"
    found = json.loads(manifest.read_text())
    from walletmigrate.archive import digest

    found["files"][name] = digest(path)[0]
    manifest.write_text(json.dumps(found))


def test_evidence_is_checked_on_another_machine_and_against_the_database(end: End) -> None:
    made = gathered(end)
    assert (made.clean, made.phase, made.transactions) == (True, "dual_write", 11)
    assert {name for name, _ in made.files} == {
        *("audit.jsonl", "flags.json", "journal.json", "phase.json", "snapshots.json", "totals.json"),
        *("verification.json", "versions.json"),
    }
    elsewhere = end.folder / "elsewhere"
    shutil.copytree(end.folder / "evidence", elsewhere)
    found = check(elsewhere)
    assert (found.intact, found.clean, found.with_database) == (True, True, False), found.problems
    assert checked(end, alone=False).intact


def test_what_is_posted_and_done_since_does_not_matter(end: End) -> None:
    gathered(end)
    end.freeze()
    with end.engine.begin() as connection:
        end.adapter().credit(connection, 2, 5, type="deposit")
    ledger.execute(end.engine, "select wallet.fold_system_accounts()")
    found = checked(end, alone=False)
    assert found.problems == ()


def test_a_posting_in_flight_is_no_part_of_it(end: End) -> None:
    with end.engine.connect() as late:
        end.adapter().credit(late, 2, 5, type="deposit")
        gathered(end)
        late.commit()
    assert checked(end, alone=False).problems == ()


@pytest.mark.parametrize(
    ("error", "raised"),
    [(KeyboardInterrupt(), KeyboardInterrupt), (OSError(28, "No space left on device"), UsageError)],
    ids=["cut short", "disk full"],
)
def test_what_is_cut_short_leaves_an_empty_folder_for_the_next(
    end: End, monkeypatch: pytest.MonkeyPatch, error: BaseException, raised: type[BaseException]
) -> None:
    def fail(*_: Any) -> Any:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("walletmigrate.evidence.totals", fail)  # the audit log is written by then
        with pytest.raises(raised, match="cannot be written: No space" if raised is UsageError else None):
            gathered(end)
    assert gathered(end).clean


@pytest.mark.parametrize("name", ["versions.json", "phase.json", "flags.json"])
def test_a_file_that_is_in_neither_the_folder_nor_the_manifest_is_missed(end: End, name: str) -> None:
    gathered(end)
    folder = end.folder / "evidence"
    found = json.loads((folder / "manifest.json").read_text())
    del found["files"][name]
    (folder / "manifest.json").write_text(json.dumps(found))
    (folder / name).unlink()
    assert checked(end).problems == (f"missing: {name}",)


@pytest.mark.parametrize("name", ["totals.json", "audit.jsonl", "verification.json", "flags.json", "snapshots.json"])
def test_a_file_that_was_changed_removed_or_added_is_named(end: End, name: str) -> None:
    gathered(end)
    path = end.folder / "evidence" / name
    kept = path.read_bytes()
    path.write_bytes(kept + b" ")
    assert any(name in problem and "checksum" in problem for problem in checked(end).problems)
    path.unlink()
    assert checked(end).problems == (f"missing: {name}",)
    path.write_bytes(kept)
    (end.folder / "evidence" / "more.txt").write_text("x")
    assert checked(end).problems == ("more.txt is in no manifest",)


def test_balances_that_do_not_come_to_zero_are_found_though_the_manifest_fits(end: End) -> None:
    gathered(end)
    totals = json.loads((end.folder / "evidence" / "totals.json").read_text())["EUR"]
    totals["system"][0]["balance"] = "1"
    edited(end, "totals.json", EUR=totals)
    assert ["not to zero" in problem for problem in checked(end).problems] == [True]
    edited(end, "totals.json", EUR=None)
    assert ["is not what the evidence has there" in problem for problem in checked(end).problems] == [True]


def test_a_verdict_that_was_made_better_is_found(end: End) -> None:
    with ledger.unguarded(end.engine, "public.users") as connection:
        connection.execute(text("update public.users set total_coins = 1 where id = 3"))
    assert not gathered(end).clean
    told = checked(end)
    assert (told.clean, told.problems) == (False, ())
    manifest = end.folder / "evidence" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "clean": True}))
    found = checked(end)
    assert (found.clean, found.problems) == (
        False,
        ("manifest.json: its verdict is not that of verification.json and snapshots.json",),
    )
    verification = json.loads((end.folder / "evidence" / "verification.json").read_text())
    edited(end, "verification.json", clean=True)
    assert checked(end).problems == ("verification.json: its verdict is not that of its runs",)
    assert not checked(end).clean
    edited(end, "verification.json", clean=True, runs=[{**verification["runs"][0], "mapping": "others", "clean": True}])
    assert checked(end).problems == ("verification.json: there is no run of users",)
    edited(end, "verification.json", clean=True, runs=[])
    assert not checked(end).clean


def test_owners_totals_that_were_made_up_are_found_with_the_database(end: End) -> None:
    gathered(end)
    kept = json.loads((end.folder / "evidence" / "totals.json").read_text())["EUR"]
    (owner,) = kept["owners"]
    half = D(owner["balance"]) / 2
    # In other states the same money: that may be so.
    parts = [{**owner, "balance": str(half)}, {**owner, "state": "frozen", "balance": str(half)}]
    edited(end, "totals.json", EUR={**kept, "owners": parts})
    assert checked(end, alone=False).problems == ()
    # In another mapping's name it is not.
    edited(end, "totals.json", EUR={**kept, "owners": [parts[0], {**parts[1], "bucket": "promo"}]})
    assert checked(end).problems == ()
    assert checked(end, alone=False).problems == (
        "the database: the journal gives the owners of users cash (EUR) another balance",
        "the database: the journal gives the owners of users promo (EUR) another balance",
    )


def test_an_audit_row_that_was_changed_breaks_the_chain(end: End) -> None:
    gathered(end)
    path = end.folder / "evidence" / "audit.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    for harmed in ([lines[0].replace("tests", "nobody"), *lines[1:]], lines[1:], lines[:-1]):
        path.write_text("".join(harmed))
        assert any("chain" in problem for problem in checked(end).problems)


def test_a_journal_that_was_edited_since_is_found_with_the_database(end: End) -> None:
    gathered(end)
    with ledger.unguarded(end.engine, "wallet.transactions") as connection:
        connection.execute(text("update wallet.transactions set reason = 'better' where id = 4"))
    assert checked(end).intact
    assert checked(end, alone=False).problems == ("the database: transactions from 0 on are not those of the evidence",)


def test_it_carries_the_newest_snapshot_s_checksums_and_misses_them_when_they_are_made_to_fit(end: End) -> None:
    for key in (1, 2, 3):
        snapshots.take(end.engine, end.settings, ledger.ACT)
        with end.engine.begin() as connection:
            end.adapter().credit(connection, key, 5, type="deposit")
    gathered(end)
    told = json.loads((end.folder / "evidence" / "snapshots.json").read_text())
    assert (told["snapshot"], told["unchecked"], told["edited"]) == (3, 0, [])
    sums = "select first_id, sum(transactions), sum(checksum)::text from wallet.snapshot_checksums group by first_id"
    assert [(one["from"], one["rows"], one["checksum"]) for one in told["ranges"]] == ledger.rows(end.engine, sums)
    snapshots.prune(end.engine, end.settings, ledger.ACT, keep=1)
    assert checked(end, alone=False).problems == ()
    with ledger.unguarded(end.engine, "wallet.transactions") as connection:
        connection.execute(text("update wallet.transactions set reason = 'better' where id = 4"))
    journal = "the database: transactions from 0 on are not those of the evidence"
    folded = "the database: transactions from 0 on are not those that snapshots folded"
    assert checked(end, alone=False).problems == (journal, folded)
    with end.engine.connect() as connection:
        (one,) = checksums.ranges(connection, end.settings, 3, checksums.Bare(None, 0))
    ledger.execute(end.engine, "update wallet.snapshot_checksums set checksum = :sum", sum=one.held_checksum)
    assert snapshot_checks.verify(end.engine, end.settings, ledger.ACT).clean
    kept = "the database: checksum 0 of snapshot 3 is not the one of the evidence"
    assert checked(end, alone=False).problems == (journal, kept)
    snapshots.take(end.engine, end.settings, ledger.ACT)
    snapshots.prune(end.engine, end.settings, ledger.ACT, keep=1)
    assert checked(end, alone=False).problems == (journal,)


def test_evidence_of_a_journal_that_is_not_what_a_snapshot_folded_says_so(end: End) -> None:
    snapshots.take(end.engine, end.settings, ledger.ACT)
    with ledger.unguarded(end.engine, "wallet.transactions") as connection:
        connection.execute(text("update wallet.transactions set reason = 'better' where id = 4"))
    assert not gathered(end).clean
    told = json.loads((end.folder / "evidence" / "snapshots.json").read_text())
    assert told["edited"] == [{"first": 0, "snapshot": 1, "kept": 11, "held": 11}]
    for alone in (True, False):
        found = checked(end, alone=alone)
        assert (found.intact, found.clean) == (True, False), found.problems
    manifest = end.folder / "evidence" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "clean": True}))
    assert checked(end).problems == ("manifest.json: its verdict is not that of verification.json and snapshots.json",)


def test_an_audit_row_that_was_edited_or_removed_since_is_found_with_the_database(end: End) -> None:
    gathered(end)
    with ledger.unguarded(end.engine, "wallet.audit_log") as connection:
        connection.execute(text("update wallet.audit_log set actor = 'nobody' where id = 1"))
        connection.execute(text("delete from wallet.audit_log where id = 2"))
    assert checked(end, alone=False).problems == (
        "the database: audit row 1 is not the one of the evidence",
        "the database: audit row 2 is gone",
    )


def test_evidence_of_drift_says_so(end: End) -> None:
    with ledger.unguarded(end.engine, "public.users") as connection:
        connection.execute(text("update public.users set total_coins = 1 where id = 3"))
    assert not gathered(end).clean
    found = checked(end)
    assert (found.intact, found.clean) == (True, False)


def test_evidence_is_never_written_over_and_needs_a_manifest(end: End) -> None:
    gathered(end)
    with pytest.raises(UsageError, match="is not empty"):
        gathered(end)
    with pytest.raises(UnreadableInput):
        check(end.folder)
    edited(end, "totals.json")
    manifest = end.folder / "evidence" / "manifest.json"
    document = json.loads(manifest.read_text())
    document["files"]["../walletmigrate.toml"] = "0"
    manifest.write_text(json.dumps(document))
    assert "missing: ../walletmigrate.toml" in checked(end).problems
