"""The archive of legacy balances, and its proof against the ledger's journal."""

from __future__ import annotations

import gzip
import hashlib
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

import ledger
from retiring import ACT, End
from walletmigrate.archive_check import archive, check
from walletmigrate.errors import UnreadableInput, UsageError

D = Decimal


@pytest.fixture
def end(database_url: str, tmp_path: Path) -> End:
    return End(database_url, tmp_path)


def lines(path: Path) -> list[Any]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def rewritten(end: End, *documents: Any) -> Path:
    path = end.folder / "other.jsonl.gz"
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(one, separators=(",", ":")) + "\n" for one in documents)
    return path


def test_an_archive_proves_when_it_is_made_and_still_does_after_any_number_of_postings(end: End) -> None:
    adapter = end.adapter()
    with end.engine.begin() as connection:
        adapter.credit(connection, 1, D("0.07"), type="deposit")
    made = end.archive()
    assert (made.proven, made.rows, made.states, made.problems) == (True, 10, {"mirrored": 10}, ())
    with end.engine.begin() as connection:
        for key in (1, 2, 1):
            adapter.credit(connection, key, 5, type="deposit")
    end.freeze()
    with end.engine.begin() as connection:
        adapter.debit(connection, 1, 50, type="booking")
    again = check(end.engine, end.settings, end.file)
    assert (again.proven, again.sha256) == (True, made.sha256)
    head, *rows, foot = lines(end.file)
    assert rows[0] == ["1", ["100.07", "100.07", "mirrored", "100.07", None]]
    assert (head["phase"], foot["rows"], foot["columns"][0]["total"]) == ("dual_write", 10, "1000.07")
    own = hashlib.sha256("".join(f"{row[0]}\t{row[1][0]}\n" for row in rows).encode()).hexdigest()
    assert foot["columns"][0]["sha256"] == own


def test_a_frozen_column_is_proved_by_what_the_ledger_held_when_it_was_frozen(end: End) -> None:
    end.freeze()
    adapter = end.adapter()
    ledger.execute(end.engine, "insert into public.users values (11, 'acme', 'member', 40, 0)")
    with end.engine.begin() as connection:
        adapter.credit(connection, 1, 5, type="deposit")
        adapter.credit(connection, 11, 2, type="deposit")
    made = end.archive()
    assert (made.proven, made.states) == (True, {"frozen": 11})
    cells = {row[0]: row[1] for row in lines(end.file)[1:-1]}
    assert (cells["1"][0], cells["1"][3]) == ("100.00", "105.00")
    assert cells["11"][:4] == ["40.00", "40.00", "frozen", "42.00"]
    assert cells["11"][4] == "opening"


def test_what_differs_is_named_and_proves_nothing(end: End) -> None:
    ledger.execute(end.engine, "update public.users set total_coins = 7 where id = 3")
    ledger.execute(end.engine, "insert into public.users values (12, 'acme', 'member', 1, 0)")
    with ledger.unguarded(end.engine, "public.users") as connection:
        connection.execute(text("update public.users set total_coins = 101 where id = 4"))
        connection.execute(text("delete from public.users where id = 5"))
    made = end.archive()
    assert (made.proven, made.problem_count) == (False, 4)
    assert {(one.key, one.problem, one.archived, one.ledger) for one in made.problems} == {
        ("3", "the account was stale", "7.00", None),
        ("12", "the account was absent", "1.00", None),
        ("4", "the legacy balance is not the ledger's", "101.00", "100.00"),
        (None, "1 accounts had no legacy row, and are not in the archive", None, None),
    }
    assert ledger.rows(end.engine, "select details -> 'proven' from wallet.audit_log where action = 'archive'") == [
        (False,)
    ]


def test_a_posting_that_commits_after_the_archive_is_no_part_of_its_moment(end: End) -> None:
    adapter = end.adapter()
    with end.engine.connect() as late:
        adapter.credit(late, 1, 5, type="deposit")
        assert end.archive().proven
        late.commit()
    assert check(end.engine, end.settings, end.file).proven


def test_a_journal_that_was_edited_since_no_longer_proves(end: End) -> None:
    end.archive()
    with ledger.unguarded(end.engine, "wallet.transactions") as connection:
        connection.execute(text("update wallet.transactions set credit_balance = 99, amount = 99 where id = 4"))
    found = check(end.engine, end.settings, end.file)
    assert [(one.key, one.archived, one.ledger) for one in found.problems] == [("4", "100.00", "99")]


def test_a_file_that_was_edited_is_found_by_its_own_sums_or_by_the_audit_log(end: End) -> None:
    end.archive()
    head, first, *rest = lines(end.file)
    changed = [first[0], ["900.00", "900.00", *first[1][2:]]]
    found = check(None, end.settings, rewritten(end, head, changed, *rest))
    assert [one.problem for one in found.problems] == ["the rows do not come to the sums in the foot of the file"]
    found = check(end.engine, end.settings, rewritten(end, head, first, *rest))
    assert ["audit log knows no archive" in one.problem for one in found.problems] == [True]
    *rows, foot = rest
    swapped = rewritten(end, head, rows[0], first, *rows[1:], foot)
    assert check(None, end.settings, swapped).problem_count == 1


def test_an_archive_without_a_database_is_looked_at_and_proves_nothing(end: End) -> None:
    end.archive()
    found = check(None, end.settings, end.file)
    assert (found.proven, found.problem_count, found.rows) == (False, 0, 10)


@pytest.mark.parametrize("harm", ["cut", "no gzip", "no foot", "another row"])
def test_a_file_that_cannot_be_read_is_refused_with_its_line(end: End, harm: str) -> None:
    end.archive()
    head, *rows, foot = lines(end.file)
    path = end.file
    if harm == "cut":
        path.write_bytes(path.read_bytes()[:-30])
    elif harm == "no gzip":
        path.write_bytes(b"hello")
    else:
        path = rewritten(end, head, *rows) if harm == "no foot" else rewritten(end, head, ["1", []], *rows, foot)
    with pytest.raises(UnreadableInput) as refused:
        check(end.engine, end.settings, path)
    assert refused.value.file == str(path)


def test_a_file_is_never_written_over_and_half_a_file_is_never_left(end: End) -> None:
    end.file.write_text("mine")
    with pytest.raises(UsageError, match="exists already"):
        end.archive()
    assert end.file.read_text() == "mine"
    with pytest.raises(UsageError, match="cannot be written"):
        archive(end.engine, end.settings, end.mapping, end.folder / "none" / "a.gz", ACT)
    end.file.unlink()
    ledger.execute(end.engine, "alter table wallet.accounts rename to hidden")
    with pytest.raises(Exception, match="accounts"):
        end.archive()
    assert [one.name for one in end.folder.glob("*.gz*")] == []


def test_a_dry_run_writes_neither_file_nor_row(end: End) -> None:
    made, checked = archive(end.engine, end.settings, end.mapping, end.file, ACT, dry_run=True)
    assert (made.rows, made.sha256, checked, end.file.exists()) == (10, None, None, False)
    assert ledger.scalar(end.engine, "select count(*) from wallet.audit_log where action = 'archive'") == 0


@pytest.mark.parametrize(
    ("table", "first"),
    [
        ({"coins": "0.1 * g", "coins_type": "double precision"}, ["0.1", "0.10", "mirrored", "0.10", None]),
        ({"coins": "123", "coins_type": "integer", "unit": "minor"}, ["123", "1.23", "mirrored", "1.23", None]),
        ({"key_type": "text"}, ["100.00", "100.00", "mirrored", "100.00", None]),
        ({"key_type": "uuid"}, ["100.00", "100.00", "mirrored", "100.00", None]),
    ],
)
def test_the_text_of_every_kind_of_column_and_key_is_kept(
    database_url: str, tmp_path: Path, table: dict[str, str], first: list[str | None]
) -> None:
    end = End(database_url, tmp_path, **table)
    assert end.archive().proven
    assert lines(end.file)[1][1] == first
    end.freeze()
    assert archive(end.engine, end.settings, end.mapping, tmp_path / "frozen.gz", ACT)[1].proven  # type: ignore[union-attr]
