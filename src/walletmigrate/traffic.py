"""The transactions that a rehearsal replays: read from a CSV file, or made from a seed.

Columns: ``transaction_id``, ``account_id``, ``tenant``, ``date``, ``type``, ``amount``. Others, such as
``recorded_balance``, are not looked at. The order of the file is the order of the transactions.

- ``amount`` is plain digits with a sign and at most two decimals: ``700``, ``-14.6``, ``1000.00``. Exponents,
  thousands separators, NaN and more decimals are refused; nothing is ever rounded.
- A row of amount 0 moves no money, so it is skipped and counted; its account is made all the same.
- A transaction that stands in the file twice with the same content is one transaction; with another content
  it cannot be read.
- An account belongs to one tenant.
"""

from __future__ import annotations

import csv
import gzip
import random
import re
import zlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Context, Decimal, localcontext
from pathlib import Path
from typing import IO, Final, TypeAlias

from walletmigrate.errors import UnreadableInput, UsageError

COLUMNS: Final = ("transaction_id", "account_id", "tenant", "date", "type", "amount")
GENERATED: Final = 12_000
"""How many transactions `generate` makes unless told otherwise."""

EXACT: Final = Context(prec=80)
"""Wide enough that sums of amounts are never rounded."""

Place: TypeAlias = tuple[str, int]
"""An account, and the place of a balance column in the mapping."""

LONGEST_TEXT: Final = 200
LARGEST: Final = Decimal(10) ** 18
"""What a balance (numeric(20,2), in major units) stays below, whatever the order of its transactions."""

_AMOUNT: Final = re.compile(r"[+-]?[0-9]+(\.[0-9]{1,2}0*)?")
_INTEGER: Final = re.compile(r"0|-?[1-9][0-9]{0,17}")
_CENT: Final = Decimal("0.01")
_GZIP: Final = b"\x1f\x8b"

_ACCOUNTS: Final = 240
_TENANTS: Final = 8
# Type, how often, and the range of its amount in cents.
_KINDS: Final = (
    ("cash_deposit", 30, 5_000, 300_000),
    ("cash_withdrawal", 30, -250_000, -2_000),
    ("interest", 14, 1, 4_000),
    ("statement_fee", 10, -1_460, -1_460),
    ("transfer", 16, 1_000, 150_000),
)


@dataclass(frozen=True, slots=True)
class Transaction:
    """One row: ``amount`` is signed, never 0, in major units at the column's scale; ``line`` is 1-based.

    ``tenant`` is "" where the account has none; ``place`` is the balance column's place in the mapping.
    """

    id: str
    account: str
    tenant: str
    type: str
    amount: Decimal
    line: int
    place: int = 0


@dataclass(frozen=True)
class Traffic:
    """Transactions in order, the tenant of each account, and how many rows said nothing new or nothing.

    ``trait`` is what the mapping calls the tenant; ``start`` has the balance that each account and place begins
    with, in major units. Without it there is one place, and everybody begins at 0.
    """

    source: str
    transactions: tuple[Transaction, ...]
    tenants: dict[str, str]
    repeated: int = 0
    zero: int = 0
    trait: str = "tenant"
    start: dict[Place, Decimal] = field(default_factory=dict)

    @property
    def expected(self) -> dict[str, Decimal]:
        """What each account of traffic with one place must come to: the sum of its amounts, in major units."""
        return {account: amount for (account, _), amount in self.expectations.items()}

    @property
    def expectations(self) -> dict[Place, Decimal]:
        """What each account must come to in each place: its start and the sum of its amounts, in major units."""
        sums = dict(self.start) or {(account, 0): Decimal("0.00") for account in self.tenants}
        with localcontext(EXACT):
            for one in self.transactions:
                sums[one.account, one.place] += one.amount
        return sums

    @property
    def integer_keys(self) -> bool:
        """Whether every account id is the canonical text of a 64-bit integer."""
        return all(_INTEGER.fullmatch(account) for account in self.tenants)


def read(path: Path) -> Traffic:
    """Read a ``.csv`` or gzipped file.

    Raises UnreadableInput with every row that cannot be read, UsageError when there is no such file.
    """
    reader = _Reader(str(path))
    try:
        with path.open("rb") as file:
            packed = file.read(2) == _GZIP
        # Bytes that are no UTF-8 become surrogates, so that they are found with their line.
        with _opened(path, packed=packed) as text:
            reader.read(text)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        reader.wrong(reader.line + 1, f"the gzip file is damaged here ({error})")
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from None
    return reader.traffic()


def _opened(path: Path, *, packed: bool) -> IO[str]:
    opener = gzip.open if packed else open
    file: IO[str] = opener(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="")
    return file


@dataclass
class _Reader:
    source: str
    line: int = 0
    transactions: list[Transaction] = field(default_factory=list)
    known: dict[str, tuple[int, tuple[str, ...], Decimal]] = field(default_factory=dict)
    tenants: dict[str, tuple[str, int]] = field(default_factory=dict)
    moved: defaultdict[str, Decimal] = field(default_factory=lambda: defaultdict(Decimal))
    problems: list[tuple[int, str]] = field(default_factory=list)
    repeated: int = 0
    zero: int = 0

    def wrong(self, line: int, what: str) -> None:
        self.problems.append((line, what))

    def read(self, text: IO[str]) -> None:
        rows = csv.reader(text, strict=True)
        try:
            header = [name.strip() for name in next(rows, [])]
            self.line = rows.line_num
            if not self._header(header):
                return
            places = {name: header.index(name) for name in COLUMNS}
            begins = self.line + 1
            for row in rows:
                # Where it begins: a field in quotes may have lines of its own.
                self.line, begins = begins, rows.line_num + 1
                if row:
                    self._row(row, len(header), places)
        except csv.Error as error:
            self.wrong(rows.line_num, f"not CSV: {error}")

    def _header(self, header: list[str]) -> bool:
        if not header:
            self.wrong(1, f"the file is empty; its first line must name the columns {', '.join(COLUMNS)}")
        else:
            for name in COLUMNS:
                if header.count(name) != 1:
                    how = "missing" if name not in header else "there more than once"
                    self.wrong(1, f"column {name} is {how}")
        return not self.problems

    def _row(self, row: list[str], width: int, places: dict[str, int]) -> None:
        if len(row) != width:
            self.wrong(self.line, f"has {len(row)} fields, the header has {width}")
            return
        fields = {name: row[at].strip() for name, at in places.items()}
        found = list(_text_problems(fields))
        amount = None
        try:
            amount = _amount(fields["amount"])
        except ValueError as error:
            found.append(str(error))
        if found or amount is None:
            self.wrong(self.line, "; ".join(found))
            return
        self._take(fields, amount)

    def _take(self, fields: dict[str, str], amount: Decimal) -> None:
        key, account, tenant = fields["transaction_id"], fields["account_id"], fields["tenant"]
        content = tuple(fields[name] for name in COLUMNS[1:-1])
        first, *same = self.known.setdefault(key, (self.line, content, amount))
        if first != self.line:
            if same == [content, amount]:
                self.repeated += 1
                return
            other = "amount" if same[1] != amount else "account, tenant, date or type"
            self.wrong(self.line, f"transaction_id {key!r} stands in line {first} with another {other}")
            return
        at_first, line = self.tenants.setdefault(account, (tenant, self.line))
        if at_first != tenant:
            what = f"account {account!r} is of tenant {at_first!r} in line {line}, here {tenant!r}"
            self.wrong(self.line, what)
            return
        self.moved[account] += abs(amount)
        if self.moved[account] >= LARGEST:
            self.wrong(self.line, f"the amounts of account {account!r} come to more than a balance can hold")
        elif amount:
            self.transactions.append(Transaction(key, account, tenant, fields["type"], amount, self.line))
        else:
            self.zero += 1

    def traffic(self) -> Traffic:
        if not self.problems and not self.transactions:
            self.wrong(self.line or 1, "the file has no transaction that moves money")
        if self.problems:
            raise UnreadableInput(self.source, tuple(self.problems))
        tenants = {account: tenant for account, (tenant, _) in self.tenants.items()}
        return Traffic(self.source, tuple(self.transactions), tenants, self.repeated, self.zero)


def _text_problems(fields: dict[str, str]) -> Iterator[str]:
    for name in COLUMNS[:-1]:
        value = fields[name]
        if not value:
            yield f"{name} is empty"
        elif len(value) > LONGEST_TEXT:
            yield f"{name} has {len(value)} characters, more than {LONGEST_TEXT}"
        elif not value.isprintable():
            yield f"{name} {value!a} has characters that are not printable, or not UTF-8"
        elif name == "date" and not _is_date(value):
            yield f"date {value!r} is no date such as 2026-01-31"


def _is_date(value: str) -> bool:
    try:
        datetime.fromisoformat(value)
    except ValueError:
        return False
    return True


def _amount(value: str) -> Decimal:
    if not value:
        raise ValueError("amount is empty")
    if not _AMOUNT.fullmatch(value):
        raise ValueError(f"amount {value[:40]!a} is no amount: write digits and at most two decimals")
    amount = Decimal(value)
    if abs(amount) >= LARGEST:
        raise ValueError(f"amount {value[:40]} is larger than a balance can be")
    return amount.quantize(_CENT)


def generate(seed: int, transactions: int = GENERATED) -> Traffic:
    """Make traffic of a small bank: 8 tenants, 240 accounts, some busy; the same for the same seed."""
    dice = random.Random(f"walletmigrate {seed}")
    tenants = {str(100 + n): f"tenant-{1 + dice.randrange(_TENANTS)}" for n in range(_ACCOUNTS)}
    accounts = list(tenants)
    # A few accounts have much of the traffic, as in any bank: postings of one account must keep their order.
    weights = [1 / (1 + rank) ** 0.7 for rank in range(len(accounts))]
    made: list[Transaction] = []
    while len(made) < transactions:
        kind, _, low, high = dice.choices(_KINDS, [often for _, often, _, _ in _KINDS])[0]
        amount = Decimal(dice.randint(low, high)).scaleb(-2)
        account, other = dice.choices(accounts, weights, k=2)
        legs = [(account, kind, amount)]
        if kind == "transfer":
            if account == other or len(made) + 2 > transactions:
                continue
            legs = [(account, "transfer_out", -amount), (other, "transfer_in", amount)]
        for key, what, signed in legs:
            number = len(made) + 1
            made.append(Transaction(f"g{seed}-{number}", key, tenants[key], what, signed, number + 1))
    return Traffic(f"seed {seed}", tuple(made), tenants)
