"""Every error of the library: one base, typed fields, the exit code, and what to do next.

Errors that the database raises are recognised by SQLSTATE (class ``WM``), never by their text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import ClassVar


class WalletMigrateError(Exception):
    """Base of all errors. ``str(error)`` is a sentence that says what to do next."""

    code: ClassVar[str] = "error"
    exit_code: ClassVar[int] = 1


class UsageError(WalletMigrateError):
    """The request cannot be carried out as it was put (exit code 2)."""

    code = "usage"
    exit_code = 2


@dataclass(eq=False)
class ConfigError(UsageError):
    """A setting is wrong; ``line`` is 1-based in ``file``, None when the value came from the environment."""

    message: str
    file: str | None = None
    line: int | None = None
    fix: str = ""

    code = "config"

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}: " if self.file and self.line else f"{self.file}: " if self.file else ""
        return place + self.message + (f" Fix: {self.fix}" if self.fix else "")


@dataclass(eq=False)
class UnreadableInput(UsageError):
    """An input file has rows that cannot be read; ``problems`` are (line number, what is wrong)."""

    file: str
    problems: Sequence[tuple[int, str]]

    code = "unreadable_input"

    def __str__(self) -> str:
        shown = "\n".join(f"  {self.file}:{line}: {what}" for line, what in self.problems[:50])
        more = f"\n  … and {len(self.problems) - 50} more" if len(self.problems) > 50 else ""
        return f"{len(self.problems)} rows cannot be read, nothing was run:\n{shown}{more}"


@dataclass(eq=False)
class PreconditionRefused(WalletMigrateError):
    """A step was refused; ``reasons`` are all that is missing, each with the command that mends it."""

    step: str
    reasons: Sequence[tuple[str, str]]

    code = "precondition"
    exit_code = 4

    def __str__(self) -> str:
        lines = [f"  - {what}" + (f"\n    → {mend}" if mend else "") for what, mend in self.reasons]
        return f"{self.step} is refused:\n" + "\n".join(lines)


@dataclass(eq=False)
class CrossCheckFailed(UsageError):
    """A cross-check's query of the configuration cannot be used: it fails, or gives no usable key or amount."""

    mapping: str
    check: str
    problem: str

    code = "cross_check"

    def __str__(self) -> str:
        mend = f"Mend its sql under [[mappings.cross_checks]] of {self.mapping!r}; nothing was put on record."
        return f"cross-check {self.check!r}: {self.problem}. {mend}"


@dataclass(eq=False)
class DatabaseUnreachable(WalletMigrateError):
    """No connection to PostgreSQL; ``url`` has its password masked."""

    url: str
    detail: str

    code = "database_unreachable"
    exit_code = 5

    def __str__(self) -> str:
        mend = "Check the address, or set WALLETMIGRATE_DATABASE_URL."
        return f"PostgreSQL at {self.url} cannot be reached: {self.detail}. {mend}"


@dataclass(eq=False)
class FlagSourceUnreachable(WalletMigrateError):
    """The flag server or file gave no usable document."""

    source: str
    detail: str

    code = "flag_source_unreachable"
    exit_code = 5

    def __str__(self) -> str:
        return f"No flags from {self.source}: {self.detail}"


@dataclass(eq=False)
class FlagsMissing(WalletMigrateError):
    """The source does not know all three flags; ``near`` are (name that it has, name that is probably meant)."""

    source: str
    missing: Sequence[str]
    near: Sequence[tuple[str, str]] = ()

    code = "flags_missing"
    exit_code = 4

    def __str__(self) -> str:
        near = "".join(f" It has {found}, which must be spelt {wanted}." for found, wanted in self.near)
        names = ", ".join(self.missing)
        mend = "Make it there, spelt exactly so (names are case-sensitive)."
        return f"{self.source} has no flag named {names}.{near} {mend}"


@dataclass(eq=False)
class FlagDocumentInvalid(UsageError):
    """A flag document is not an environment document of Flagsmith's; the one in force stays.

    Where none was in force, everything is off.
    """

    source: str
    detail: str

    code = "flag_document"

    def __str__(self) -> str:
        kept = "The last good document stays in force; where there was none, everything is off."
        return f"{self.source} is not a flag document: {self.detail}. {kept}"


@dataclass(eq=False)
class FlagServerRefused(WalletMigrateError):
    """The flag server refused a call of its Admin API (HTTP ``status``). What was asked for was not done."""

    source: str
    what: str
    status: int
    detail: str

    code = "flag_server_refused"
    exit_code = 4

    def __str__(self) -> str:
        return f"{self.source} refused to {self.what} ({self.status}): {self.detail}"


@dataclass(eq=False)
class FlagChangeIncomplete(WalletMigrateError):
    """A change of several calls stopped in the midst; ``left`` are (what is not done, the command that does it)."""

    source: str
    cause: str
    done: Sequence[str]
    left: Sequence[tuple[str, str]]

    code = "flag_change_incomplete"

    def __str__(self) -> str:
        done = [f"  - done: {what}" for what in self.done]
        left = [f"  - not done, or not known to be: {what}\n    → {mend}" for what, mend in self.left]
        return f"{self.source}: the change is not complete. {self.cause}\n" + "\n".join(done + left)


class PostingRefused(WalletMigrateError):
    """Base of what a posting can be refused for. Nothing was written; the caller's transaction is usable."""

    code = "refused"


@dataclass(eq=False)
class InvalidAmount(PostingRefused, ValueError):
    """The amount is no exact positive amount of the currency (major units)."""

    amount: object
    problem: str

    code = "invalid_amount"

    def __str__(self) -> str:
        return f"amount {self.amount!r}: {self.problem}"


@dataclass(eq=False)
class InvalidKey(PostingRefused, ValueError):
    """The account key is not of the mapping's key type."""

    mapping: str
    key: object
    expected: str

    code = "invalid_key"

    def __str__(self) -> str:
        return f"key {self.key!r} of mapping {self.mapping!r}: pass {self.expected}"


@dataclass(eq=False)
class InvalidMovement(PostingRefused, ValueError):
    """A field of a movement has a form that cannot be stored."""

    field: str
    problem: str

    code = "invalid_movement"

    def __str__(self) -> str:
        return f"{self.field}: {self.problem}"


@dataclass(eq=False)
class UnknownMapping(PostingRefused, LookupError):
    """No mapping of that name in the configuration."""

    mapping: str
    known: Sequence[str]

    code = "unknown_mapping"
    exit_code = 2

    def __str__(self) -> str:
        return f"no mapping {self.mapping!r}; the configuration has {', '.join(self.known) or 'none'}"


@dataclass(eq=False)
class UnknownAccount(PostingRefused, LookupError):
    """The legacy table has no row with that key."""

    mapping: str
    key: object

    code = "unknown_account"

    def __str__(self) -> str:
        return f"mapping {self.mapping!r} has no account {self.key!r}; insert the legacy row first"


@dataclass(eq=False)
class UnknownBucket(PostingRefused, LookupError):
    """The mapping has no such bucket."""

    mapping: str
    bucket: str
    known: Sequence[str]

    code = "unknown_bucket"

    def __str__(self) -> str:
        return f"mapping {self.mapping!r} has no bucket {self.bucket!r}; use one of {', '.join(self.known)}"


@dataclass(eq=False)
class UnknownCurrency(PostingRefused, LookupError):
    """The mapping has no column of that bucket in that currency, or several and none was named."""

    mapping: str
    bucket: str
    currency: str | None
    known: Sequence[str]

    code = "unknown_currency"

    def __str__(self) -> str:
        asked = f"no currency {self.currency!r}" if self.currency else "several currencies, and none was named"
        return f"bucket {self.bucket!r} of mapping {self.mapping!r} has {asked}; use one of {', '.join(self.known)}"


@dataclass(eq=False)
class SelfTransfer(PostingRefused, ValueError):
    """Payer and payee are the same account."""

    mapping: str
    key: object

    code = "self_transfer"

    def __str__(self) -> str:
        return f"account {self.key!r} of mapping {self.mapping!r} cannot pay itself"


@dataclass(eq=False)
class InsufficientFunds(PostingRefused):
    """A debit would take the balance below the mapping's floor (all in major units)."""

    mapping: str
    key: object
    balance: Decimal
    amount: Decimal
    floor: Decimal

    code = "insufficient_funds"

    def __str__(self) -> str:
        account = f"account {self.key!r} of mapping {self.mapping!r}"
        return f"{account} holds {self.balance}; {self.amount} would go below {self.floor}"


@dataclass(eq=False)
class AmountOverflow(PostingRefused, OverflowError):
    """The new balance does not fit the legacy column's type."""

    mapping: str
    key: object
    balance: Decimal
    column: str

    code = "overflow"

    def __str__(self) -> str:
        return f"balance {self.balance} of account {self.key!r} does not fit column {self.column!r}; widen the column"


@dataclass(eq=False)
class IdempotencyKeyReused(PostingRefused):
    """The key was used for another request; no money moved."""

    idempotency_key: str

    code = "key_reused"

    def __str__(self) -> str:
        return f"idempotency key {self.idempotency_key!r} belongs to another request; use a new key for a new movement"


@dataclass(eq=False)
class UnknownTransaction(PostingRefused, LookupError):
    """The ledger has no transaction with that id in this mapping."""

    transaction_id: int

    code = "unknown_transaction"

    def __str__(self) -> str:
        return f"the ledger has no transaction {self.transaction_id} of this mapping"


@dataclass(eq=False)
class NotReversible(PostingRefused):
    """The transaction was reversed already, or is of a kind that is not undone by a reversal."""

    transaction_id: int
    problem: str

    code = "not_reversible"

    def __str__(self) -> str:
        return f"transaction {self.transaction_id} cannot be reversed: {self.problem}"


@dataclass(eq=False)
class LegacyValueInvalid(PostingRefused):
    """The legacy column holds NULL, NaN, infinity or more decimals than the scale."""

    mapping: str
    key: object
    column: str

    code = "legacy_value"

    def __str__(self) -> str:
        return (
            f"column {self.column!r} of account {self.key!r} in mapping {self.mapping!r} holds no exact amount; "
            "see `walletmigrate install --dry-run` for the list, and mend the row"
        )


@dataclass(eq=False)
class LedgerMismatch(WalletMigrateError):
    """Strict policy: legacy and ledger differ after the posting. The transaction must be rolled back."""

    detail: str

    code = "ledger_mismatch"

    def __str__(self) -> str:
        return f"{self.detail}. Roll back, then see runbooks/balance-drift.md"


@dataclass(eq=False)
class LedgerNotInstalled(WalletMigrateError):
    """The functions of the mapping are not (or no longer) in the database, or do not fit this release."""

    mapping: str
    detail: str = "its functions are not in the database"
    mend: str = "Retry the transaction; if it is refused again, run `walletmigrate install --reason '…'`."

    code = "not_installed"
    exit_code = 4

    def __str__(self) -> str:
        return f"mapping {self.mapping!r}: {self.detail}. {self.mend}"


@dataclass(eq=False)
class LegacyTableAltered(WalletMigrateError):
    """The functions of the mapping no longer fit the legacy table or the ledger. Nothing was written."""

    mapping: str
    detail: str

    code = "legacy_altered"
    exit_code = 4

    def __str__(self) -> str:
        mend = (
            "Put it back, or change the configuration and run `walletmigrate install`; `walletmigrate doctor` checks."
        )
        return f"mapping {self.mapping!r}: the legacy table was altered since the install ({self.detail}). {mend}"


@dataclass(eq=False)
class AssignmentRefused(WalletMigrateError):
    """A value was assigned to a watched attribute of a frozen account, whose column is no longer true. Roll back."""

    mapping: str
    key: object
    attribute: str

    code = "assignment_refused"

    def __str__(self) -> str:
        return (
            f"{self.attribute} of account {self.key!r} in mapping {self.mapping!r} was assigned, but the account is "
            "frozen: the ledger alone is true, and the value was made from a column that is not. Roll back, and write "
            "through the adapter (credit, debit, set_balance)"
        )


@dataclass(eq=False)
class Retryable(WalletMigrateError):
    """A serialization failure, deadlock or lock time-out inside a job that ran out of attempts."""

    detail: str

    code = "retryable"

    def __str__(self) -> str:
        return f"{self.detail}. Nothing was lost: run the same command again."


@dataclass(eq=False)
class EmbeddedUnavailable(WalletMigrateError):
    """No scratch PostgreSQL server can be run on this machine; ``fix`` says what to install or change."""

    problem: str
    fix: str

    code = "embedded_unavailable"
    exit_code = 5

    def __str__(self) -> str:
        return f"the embedded PostgreSQL cannot run: {self.problem}. {self.fix}"


@dataclass(eq=False)
class LegacyUpdateSuppressed(WalletMigrateError):
    """The UPDATE of the legacy row wrote nothing, though the row was locked. Roll the transaction back."""

    detail: str

    code = "legacy_update_suppressed"

    def __str__(self) -> str:
        return f"{self.detail}: a trigger or a row-level policy of the application suppressed it. Roll back."


@dataclass(eq=False)
class JobFailed(WalletMigrateError):
    """A batch of a job failed for a reason that trying again does not mend. Earlier batches are committed."""

    job_id: int
    kind: str
    detail: str

    code = "job_failed"

    def __str__(self) -> str:
        return (
            f"job {self.job_id} ({self.kind}) stopped: {self.detail}. What it did so far is committed and stays; "
            "mend the cause and run the same command again, it goes on from there."
        )


@dataclass(eq=False)
class JobCancelled(WalletMigrateError):
    """A job that only reads was cancelled, or another run has taken its place. It has no result; only faults that a
    verification had seen by then are on record.
    """

    job_id: int
    kind: str

    code = "job_cancelled"

    def __str__(self) -> str:
        return (
            f"job {self.job_id} ({self.kind}) was cancelled, or taken for dead by another run: it has no result. "
            f"walletmigrate jobs show {self.job_id} says how it stands; the same command begins anew."
        )


@dataclass(eq=False)
class SnapshotTooOld(WalletMigrateError):
    """The throttle has held a job for ``seconds`` in all with its snapshot open, which keeps vacuum from its work."""

    kind: str
    seconds: float
    held: str

    code = "snapshot_too_old"

    def __str__(self) -> str:
        return (
            f"{self.kind} was held for {self.seconds:g} s with its snapshot open, and has ended so that vacuum can "
            f"go on ({self.held}). Run the same command again, which begins anew, when the database is quieter, or on "
            "a standby; the limit is snapshot_seconds under [throttle]."
        )


@dataclass(eq=False)
class DatabaseFailed(WalletMigrateError):
    """The database refused a statement of the command line for a reason that has no type of its own."""

    sqlstate: str
    detail: str

    code = "database"

    def __str__(self) -> str:
        return f"the database says: {self.detail} (SQLSTATE {self.sqlstate})."


@dataclass(eq=False)
class GrantMissing(WalletMigrateError):
    """The database role that the command ran as may not do that (42501). Nothing was changed by the refused statement.

    ``needs`` is the role of the configuration that the command runs with, None where it takes more than one of these
    (the owner of the legacy tables); ``member`` says that the role has it already, and lacks a right on something else.
    """

    command: str
    role: str
    needs: str | None
    member: bool
    detail: str

    code = "grant_missing"
    exit_code = 4

    def __str__(self) -> str:
        said = f"database role {self.role!r} may not run `{self.command}`: {self.detail}."
        if self.needs is None:
            return (
                f"{said} It needs a role that owns the legacy tables and may make roles, or a superuser. "
                "Connect as one (WALLETMIGRATE_DATABASE_URL)."
            )
        if self.member:
            return (
                f"{said} The role is a member of {self.needs} already, so a right of that one is missing: "
                "run `walletmigrate install` again as the owner of the tables, which grants it."
            )
        return f"{said} It needs membership in {self.needs}. Run: grant {_quoted(self.needs)} to {_quoted(self.role)}"


def _quoted(name: str) -> str:
    """A role's name as SQL takes it."""
    return name if name.isidentifier() and name == name.lower() else '"' + name.replace('"', '""') + '"'


@dataclass(eq=False)
class UnknownLedgerAccount(UsageError, LookupError):
    """The ledger has no account of that key, bucket and currency in the mapping."""

    mapping: str
    key: str
    bucket: str
    currency: str

    code = "unknown_ledger_account"

    def __str__(self) -> str:
        what = f"the ledger has no account {self.key!r} ({self.bucket}, {self.currency}) of mapping {self.mapping!r}"
        return f"{what}. Look at the key's spelling, or open it: walletmigrate backfill --reason '…'"


@dataclass(eq=False)
class UnknownRun(UsageError, LookupError):
    """There is no run (a snapshot, a job, a verification) of that kind and id; ``fix`` says where to look."""

    kind: str
    run: str
    fix: str

    code = "unknown_run"

    def __str__(self) -> str:
        return f"there is no {self.kind} {self.run}. {self.fix}"


@dataclass(eq=False)
class InvalidTime(UsageError, ValueError):
    """A point in time that cannot be used: unreadable, without a time zone, or in the future."""

    time: str
    problem: str

    code = "invalid_time"

    def __str__(self) -> str:
        return f"time {self.time!r} {self.problem}; write for example 2026-11-21T08:00:00+01:00, or …Z for UTC"


@dataclass(eq=False)
class PageOutOfRange(UsageError):
    """A list has no such page; ``pages`` is how many it has, of ``limit`` rows each."""

    page: int
    pages: int
    limit: int

    code = "page_out_of_range"

    def __str__(self) -> str:
        return (
            f"there is no page {self.page}: the list has {self.pages} of {self.limit} rows. Ask for 1 to {self.pages}"
        )


@dataclass(eq=False)
class ExportRefused(UsageError):
    """A file cannot be written as asked; nothing was written."""

    file: str
    problem: str
    fix: str

    code = "export_refused"

    def __str__(self) -> str:
        return f"{self.file}: {self.problem}. {self.fix}"


@dataclass(eq=False)
class ExtraMissing(UsageError):
    """A library that only some commands need is not installed; ``extra`` of walletmigrate brings it."""

    what: str
    library: str
    extra: str

    code = "extra_missing"

    def __str__(self) -> str:
        return f"{self.what} needs {self.library}, which is not installed: pip install 'walletmigrate[{self.extra}]'"
