"""Reading and making the transactions of a rehearsal."""

from __future__ import annotations

import gzip
from decimal import Decimal
from pathlib import Path

import pytest

from walletmigrate import traffic
from walletmigrate.errors import UnreadableInput, UsageError

HEADER = "transaction_id,account_id,tenant,date,type,amount,recorded_balance"
GOOD = "1,7,north,2026-01-01,deposit,700.00,700.00"


def file_of(folder: Path, *rows: str, header: str = HEADER) -> Path:
    path = folder / "transactions.csv"
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


def problems_of(path: Path) -> dict[int, str]:
    with pytest.raises(UnreadableInput) as caught:
        traffic.read(path)
    assert caught.value.exit_code == 2
    return dict(caught.value.problems)


def test_rows_are_read_in_their_order_with_exact_amounts(tmp_path: Path) -> None:
    path = file_of(tmp_path, GOOD, "2,8,south,2026-01-01,withdrawal,-14.6,", "3,7,north,2026-01-02,fee,+3,696")
    read = traffic.read(path)
    assert [(one.id, one.account, one.tenant, one.type, str(one.amount), one.line) for one in read.transactions] == [
        ("1", "7", "north", "deposit", "700.00", 2),
        ("2", "8", "south", "withdrawal", "-14.60", 3),
        ("3", "7", "north", "fee", "3.00", 4),
    ]
    assert read.tenants == {"7": "north", "8": "south"}
    assert read.expected == {"7": Decimal("703.00"), "8": Decimal("-14.60")}


def test_columns_may_stand_in_any_order_and_recorded_balance_may_be_missing(tmp_path: Path) -> None:
    path = file_of(
        tmp_path, "5.00,deposit,2026-01-01,north,7,1,x", header="amount,type,date,tenant,account_id,transaction_id,note"
    )
    (one,) = traffic.read(path).transactions
    assert (one.id, one.account, one.amount) == ("1", "7", Decimal("5.00"))


def test_a_gzipped_file_reads_like_a_plain_one_whatever_its_name(tmp_path: Path) -> None:
    plain = file_of(tmp_path, GOOD)
    packed = tmp_path / "packed"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert traffic.read(packed).transactions == traffic.read(plain).transactions


def test_a_byte_order_mark_and_windows_line_ends_are_no_trouble(tmp_path: Path) -> None:
    path = tmp_path / "windows.csv"
    path.write_bytes(("\ufeff" + HEADER + "\r\n" + GOOD + "\r\n").encode())
    assert len(traffic.read(path).transactions) == 1


@pytest.mark.parametrize(
    "amount",
    [
        "",
        "abc",
        "1e3",
        "1,5",
        "1_000",
        "NaN",
        "inf",
        "-",
        "0x10",
        "700.001",
        "0.30000000000000004",
        "٣",
        "--1",
        ".5",
        "5.",
    ],
)
def test_an_amount_that_is_not_plain_digits_with_two_decimals_is_refused_with_its_line(
    tmp_path: Path, amount: str
) -> None:
    path = file_of(tmp_path, GOOD, f'2,7,north,2026-01-01,deposit,"{amount}",')
    found = problems_of(path)
    assert list(found) == [3]
    assert "amount" in found[3]


def test_an_amount_or_a_balance_that_the_column_cannot_hold_is_refused(tmp_path: Path) -> None:
    half = "600000000000000000.00"
    path = file_of(
        tmp_path,
        "1,7,north,2026-01-01,deposit,1000000000000000000,",
        f"2,8,north,2026-01-01,deposit,{half},",
        f"3,8,north,2026-01-01,deposit,{half},",
    )
    assert problems_of(path).keys() == {2, 4}


@pytest.mark.parametrize("column", ["transaction_id", "account_id", "tenant", "date", "type", "amount"])
def test_every_column_is_needed_and_named_when_missing(tmp_path: Path, column: str) -> None:
    path = file_of(tmp_path, header=HEADER.replace(column, "other", 1))
    assert problems_of(path) == {1: f"column {column} is missing"}


@pytest.mark.parametrize("column", ["transaction_id", "account_id", "tenant", "date", "type"])
def test_every_field_must_have_a_value(tmp_path: Path, column: str) -> None:
    fields = dict(zip(HEADER.split(","), GOOD.split(","), strict=True)) | {column: "  "}
    path = file_of(tmp_path, GOOD, ",".join(fields.values()))
    assert problems_of(path) == {3: f"{column} is empty"}


def test_a_row_of_several_lines_is_named_by_its_first(tmp_path: Path) -> None:
    path = file_of(
        tmp_path, GOOD, '"2","7","no\n\nrth",2026-01-01,deposit,1.5e3,', "3,7,north,2026-01-01,deposit,1.5e4,"
    )
    assert list(problems_of(path)) == [3, 6]


def test_all_unreadable_rows_are_listed_at_once_each_with_its_line(tmp_path: Path) -> None:
    path = file_of(
        tmp_path,
        GOOD,
        "2,7,north,2026-01-01,deposit,1.5e3,",
        "3,7,north,2026-13-01,deposit,1.00,",
        "4,7,north,2026-01-01,deposit",
        "5,7,south,2026-01-01,deposit,1.00,",
        "1,7,north,2026-01-01,deposit,700.01,",
        "6,7,north,2026-01-01,dep\x07osit,1.00,",
    )
    found = problems_of(path)
    assert list(found) == [3, 4, 5, 6, 7, 8]
    assert "1.5e3" in found[3]
    assert "2026-13-01" in found[4]
    assert found[5] == "has 5 fields, the header has 7"
    assert "tenant 'north' in line 2" in found[6]
    assert found[7] == "transaction_id '1' stands in line 2 with another amount"
    assert "type" in found[8]


def test_a_row_that_repeats_another_is_one_transaction(tmp_path: Path) -> None:
    path = file_of(tmp_path, GOOD, GOOD, "1,7,north,2026-01-01,deposit,700,")
    read = traffic.read(path)
    assert len(read.transactions) == 1
    assert read.repeated == 2
    assert read.expected == {"7": Decimal("700.00")}


def test_the_same_id_for_another_account_cannot_be_read(tmp_path: Path) -> None:
    path = file_of(tmp_path, GOOD, "1,8,north,2026-01-01,deposit,700.00,")
    assert "another account" in problems_of(path)[3]


def test_an_amount_of_zero_is_skipped_and_counted_and_its_account_stays(tmp_path: Path) -> None:
    path = file_of(tmp_path, GOOD, "2,8,north,2026-01-01,interest,0.00,", "3,7,north,2026-01-01,interest,-0,")
    read = traffic.read(path)
    assert read.zero == 2
    assert [one.id for one in read.transactions] == ["1"]
    assert read.expected == {"7": Decimal("700.00"), "8": Decimal("0.00")}


def test_bytes_that_are_not_utf8_are_found_with_their_line(tmp_path: Path) -> None:
    path = file_of(tmp_path, GOOD, "2,7,nord\xe9,2026-01-01,deposit,1.00,")
    path.write_bytes(path.read_text(encoding="utf-8").encode("latin-1"))
    assert "not UTF-8" in problems_of(path)[3]


@pytest.mark.parametrize("text", ["", HEADER + "\n", HEADER + "\n\n\n"])
def test_a_file_without_a_transaction_cannot_be_rehearsed(tmp_path: Path, text: str) -> None:
    path = tmp_path / "empty.csv"
    path.write_text(text, encoding="utf-8")
    assert problems_of(path)


def test_a_damaged_gzip_file_is_refused_where_it_breaks(tmp_path: Path) -> None:
    rows = "\n".join(f"{n},{n * 7919},t,2026-01-01,deposit,{n}.00," for n in range(1, 20_000))
    whole = gzip.compress((HEADER + "\n" + rows).encode())
    path = tmp_path / "cut.csv.gz"
    path.write_bytes(whole[: len(whole) // 2])
    ((line, what),) = problems_of(path).items()
    assert line > 2
    assert "gzip" in what


def test_an_open_quote_is_refused_with_its_line(tmp_path: Path) -> None:
    assert "not CSV" in problems_of(file_of(tmp_path, '"2,7,north')).popitem()[1]


def test_a_file_that_is_not_there_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        traffic.read(tmp_path / "none.csv")
    with pytest.raises(UsageError, match="cannot be read"):
        traffic.read(tmp_path)


def test_account_ids_are_integers_only_if_all_of_them_are(tmp_path: Path) -> None:
    assert traffic.read(file_of(tmp_path, GOOD)).integer_keys
    assert not traffic.read(file_of(tmp_path, GOOD, "2,007,north,2026-01-01,deposit,1.00,")).integer_keys
    assert not traffic.read(file_of(tmp_path, "2,9" + "9" * 18 + ",n,2026-01-01,deposit,1.00,")).integer_keys


def test_generated_traffic_is_the_same_for_a_seed_and_another_for_another() -> None:
    assert traffic.generate(1) == traffic.generate(1)
    assert traffic.generate(1).transactions != traffic.generate(2).transactions


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_generated_traffic_has_what_makes_a_migration_hard(seed: int) -> None:
    made = traffic.generate(seed)
    assert len(made.transactions) == traffic.GENERATED
    assert len({one.id for one in made.transactions}) == traffic.GENERATED
    assert len(set(made.tenants.values())) > 4
    assert {one.type for one in made.transactions} >= {"cash_deposit", "transfer_in", "transfer_out", "interest"}
    assert all(one.amount and one.amount == round(one.amount, 2) for one in made.transactions)
    assert all(one.tenant == made.tenants[one.account] for one in made.transactions)
    assert min(made.expected.values()) < 0 < max(made.expected.values())
    moved = sum(one.amount for one in made.transactions if one.type.startswith("transfer"))
    assert moved == 0


def test_the_bank_file_is_read_whole(shared_data: Path) -> None:
    read = traffic.read(shared_data)
    assert len(read.transactions) == 23_932
    assert len(read.tenants) == 591
    assert read.integer_keys
    assert (read.repeated, read.zero) == (0, 0)
    assert sum(read.expected.values()) == Decimal("19057313.70")
