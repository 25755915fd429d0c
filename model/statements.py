"""What a session can ask of the server: the vocabulary in which the protocol is written.

A program is a generator that yields these and is sent the answers. There is one legacy row (`row`, its balance
or None), one ledger account, and a table of idempotency keys.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")


class Account(NamedTuple):
    """A ledger account: "mirrored", "stale", "frozen" or "closed", and its balance."""

    state: str
    balance: int


class View(NamedTuple):
    """What a snapshot shows, the session's own writes included."""

    row: int | None = None
    account: Account | None = None
    keys: frozenset[str] = frozenset()
    frozen: bool = False  # the phase; plain reads do not ask for it


class Request:
    """Anything a program yields."""


Steps = Generator[Request, Any, T]
"""A program, or a part of one that answers T."""


@dataclass(frozen=True)
class Look(Request):
    """A plain read: one statement, one snapshot. Answers a View, with the used `keys` if asked for."""

    keys: bool = False


@dataclass(frozen=True)
class LockRow(Request):
    """`select … for no key update` of the legacy row by its key, or the lock that an UPDATE takes.

    Answers the balance, None where there is no row; `with_account` the account too, as the same snapshot shows it.
    """

    with_account: bool = False


@dataclass(frozen=True)
class LockAccount(Request):
    """Lock the account where it is in one of these states (None: any) and has this balance (None: any).

    Answers the account, or None where no row came.
    """

    states: frozenset[str] | None = None
    balance: int | None = None

    def matches(self, account: Account) -> bool:
        """Whether the statement's WHERE holds for the account."""
        return (self.states is None or account.state in self.states) and self.balance in (None, account.balance)


@dataclass(frozen=True)
class WriteRow(Request):
    """Write the legacy row whose lock is held; None deletes it."""

    value: int | None


@dataclass(frozen=True)
class InsertRow(Request):
    """Insert the legacy row. A duplicate is an error (23505)."""

    value: int


@dataclass(frozen=True)
class WriteAccount(Request):
    """Write the account whose lock is held."""

    account: Account


@dataclass(frozen=True)
class InsertAccount(Request):
    """`insert … on conflict do nothing`. Answers whether it was inserted."""

    account: Account


@dataclass(frozen=True)
class Probe(Request):
    """The same insert, in a subtransaction that is rolled back; at READ COMMITTED nothing."""


@dataclass(frozen=True)
class InsertKey(Request):
    """Insert an idempotency key, `on conflict do nothing`. Answers whether it was new."""

    key: str


@dataclass(frozen=True)
class Line(Request):
    """Read the sequence that says whether the line runs. Answers True or False."""


@dataclass(frozen=True)
class Side(Request):
    """Read phase (a row) and line (a sequence) in one statement. Answers (frozen, runs)."""


@dataclass(frozen=True)
class SetLine(Request):
    """Stop the line or let it run; no transaction can undo it."""

    runs: bool


@dataclass(frozen=True)
class SetPhase(Request):
    """Move the phase to or from frozen, in a transaction of its own."""

    frozen: bool


@dataclass(frozen=True)
class Choose(Request):
    """Anything may happen: answers each option in turn."""

    options: tuple[Any, ...]
    what: str


@dataclass(frozen=True)
class Savepoint(Request):
    """Begin a subtransaction."""


@dataclass(frozen=True)
class Release(Request):
    """End a subtransaction well."""


@dataclass(frozen=True)
class Undo(Request):
    """Roll a subtransaction back; the locks that it took are free again."""


@dataclass(frozen=True)
class Fail(Request):
    """An error that ends the transaction."""

    why: str


@dataclass(frozen=True)
class Did(Request):
    """Ghost: if this transaction commits, the true balance has changed so.

    `set_to` makes `amount` the balance (None: there is none any more), else it is added. `key` is the idempotency
    key under which the money moved.
    """

    amount: int | None
    set_to: bool = False
    key: str | None = None


@dataclass(frozen=True)
class Told(Request):
    """Ghost: a reader was told this balance, which must be one of those that were true."""

    value: int | None
    true: frozenset[int | None]


@dataclass(frozen=True)
class Commit(Request):
    """What the end of a program stands for."""


def truth(row: int | None, account: Account | None) -> int | None:
    """The balance that counts: the ledger's when the account is frozen, else legacy's. None: no such account."""
    return account.balance if account is not None and account.state == "frozen" else row
