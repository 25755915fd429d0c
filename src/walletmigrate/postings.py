"""What the database answered: results, and refusals as typed errors."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from decimal import Decimal
from typing import Literal

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from walletmigrate import connect, observe
from walletmigrate.config import WIDE, Column, Mapping, key_value
from walletmigrate.errors import (
    AmountOverflow,
    IdempotencyKeyReused,
    InsufficientFunds,
    InvalidAmount,
    LedgerMismatch,
    LedgerNotInstalled,
    LegacyTableAltered,
    LegacyUpdateSuppressed,
    LegacyValueInvalid,
    NotReversible,
    PostingRefused,
    UnknownAccount,
    UnknownTransaction,
    WalletMigrateError,
)
from walletmigrate.functions import fingerprint
from walletmigrate.movements import Key, Movement, Operation, Prepared, Request
from walletmigrate.schema import quoted
from walletmigrate.survey import LegacyTable

Mode = Literal["legacy", "dual_write", "ledger"]
Outcome = Literal["ok", "ledger_failed", "skipped", "replayed"]

_PLAIN = frozenset({"credit", "debit"})
_LABEL = (
    "type",
    "reference_type",
    "reference_id",
    "idempotency_key",
    "request",
    "correlation_id",
    "actor",
    "reason",
)
"""What stands in a label behind place (mapping/bucket/currency/key), change and dual."""

_GONE = frozenset({"42883", "3F000", "42P01"})  # no such function, schema, table

_UNFIT = _GONE | {"42703", "42804", "42704"}  # and no such column, another type, no such type
_NOT_THE_LEDGERS = ("40", "WM03")
"""What can be tried again; and what the fence refuses because something else than the adapter writes."""

_OURS = ("plain", "move", "side", "lock", "fence")


@dataclass(frozen=True, slots=True)
class Posting:
    """The result of one movement. Balances are in major units, as they are after it.

    ``legacy_balance`` is None for a frozen account, whose column is no longer true; ``ledger_balance`` is
    None where the ledger was not written. ``transaction_id`` is None in mode "legacy" and where nothing had
    to move. ``replayed`` says that the key had been used before: these are the first call's figures. For a
    transfer the balances are the payer's, ``payee_legacy_balance`` and ``payee_ledger_balance`` the payee's.
    ``amount`` is what this call moved, without a sign; None where nothing moved, as in a replay, and where it is not
    known: an adjustment in a database without a ledger.
    ``legacy_change`` is by how much the functions of the ledger changed the legacy balance; None where they did not.
    """

    operation: Operation
    key: Key | None
    bucket: str
    currency: str
    legacy_balance: Decimal | None
    ledger_balance: Decimal | None
    transaction_id: int | None
    mode: Mode
    outcome: Outcome
    replayed: bool
    mismatch: bool
    correlation_id: str
    payee_legacy_balance: Decimal | None = None
    payee_ledger_balance: Decimal | None = None
    amount: Decimal | None = None
    legacy_change: Decimal | None = None


@dataclass(slots=True)
class Row:
    """What the database says of one movement; see the type ``posting`` in ledger.sql."""

    mode: Mode = "legacy"
    outcome: Outcome = "skipped"
    transaction_id: int | None = None
    refusal: str | None = None
    replayed: bool = False
    mismatch: bool = False
    ordinal: int = 0
    amount: Decimal | None = None
    debtor: str | None = None
    debtor_change: Decimal | None = None
    debtor_legacy: Decimal | None = None
    debtor_ledger: Decimal | None = None
    creditor: str | None = None
    creditor_change: Decimal | None = None
    creditor_legacy: Decimal | None = None
    creditor_ledger: Decimal | None = None


_ROW = tuple(each.name for each in fields(Row))
_NUMBERS = frozenset(
    {"amount", *(f"{side}_{which}" for side in ("debtor", "creditor") for which in ("change", "legacy", "ledger"))}
)


class Calls:
    """The two functions of a mapping that post: one for a credit or a debit, one for everything else."""

    def __init__(self, schema: str, mapping: Mapping) -> None:
        self._mapping = mapping.name
        self._policy = mapping.policy
        self._fingerprint = fingerprint(mapping)
        self._plain = f"select {quoted(schema)}.plain_{mapping.name}(%s, %s, %s, %s, %s, %s, %s)"
        self._post = f"select to_jsonb(p)::text from {quoted(schema)}.post_{mapping.name}(cast(%s as jsonb)) as p"

    def post(self, connection: Connection, prepared: Sequence[Prepared]) -> list[Row]:
        """One round trip. Each request says in ``dual`` whether dual-write is asked for."""
        request = prepared[0].request
        if (
            len(prepared) == 1
            and request["operation"] in _PLAIN
            and request["description"] is request["address"] is None
        ):
            return [_plain_row(connection.exec_driver_sql(self._plain, self.plain(request)).scalar_one(), request)]
        rows = connection.exec_driver_sql(self._post, (self.request(prepared),)).scalars()
        return [_row(document) for document in rows]

    def plain(self, request: Request) -> tuple[str, ...]:
        """The arguments of the function for a credit or a debit, its label last."""
        debtor, amount = request["debtor"], str(request["amount"])
        key, change = (request["creditor"], amount) if debtor is None else (debtor, f"-{amount}")
        column = (str(request["bucket"]), str(request["currency"]))
        place = "/".join((self._mapping, *column, str(key)))
        label = _record((place, change, "t" if request["dual"] else "f", *(request.get(name) for name in _LABEL)))
        return (self._fingerprint, self._policy, str(key), *column, change, label)

    def request(self, prepared: Sequence[Prepared]) -> str:
        """The argument of the function for everything else, as JSON."""
        movements = [each.request for each in prepared]
        document = {"fingerprint": self._fingerprint, "policy": self._policy, "movements": movements}
        return json.dumps(document, separators=(",", ":"))


def _record(values: Iterable[object]) -> str:
    """The values as PostgreSQL writes a row."""
    texts = [None if v is None else str(v).replace("\\", "\\\\").replace('"', '""') for v in values]
    return "(" + ",".join(["" if text is None else f'"{text}"' for text in texts]) + ")"


def _plain_row(answer: str, request: Request) -> Row:
    if answer.startswith("{"):
        return _row(answer)
    _, *transaction, balance = answer.split(" ")
    now, row = Decimal(balance), Row()
    if transaction:
        row.mode, row.outcome, row.transaction_id = "dual_write", "ok", int(transaction[0])
    ledger = now if transaction else None
    if request["debtor"] is None:
        row.creditor_legacy, row.creditor_ledger, row.creditor_change = now, ledger, Decimal(str(request["amount"]))
    else:
        # Not by a minus, here and below: that rounds to the precision of the application's decimal context.
        less = Decimal(str(request["amount"])).copy_negate()
        row.debtor_legacy, row.debtor_ledger, row.debtor_change = now, ledger, less
    return row


def _row(answer: str) -> Row:
    document = json.loads(answer, parse_float=Decimal)
    row = Row()
    for name in _ROW:
        value = document[name]
        if value is not None:
            setattr(row, name, Decimal(value) if name in _NUMBERS else value)
    return row


def posting(prepared: Prepared, row: Row) -> Posting:
    """The result for one row of the answer."""
    movement, column = prepared.movement, prepared.column
    two = row.debtor_legacy is not None or row.debtor_ledger is not None
    first = ("debtor", "creditor") if two else ("creditor", "debtor")
    return Posting(
        operation=movement.operation,
        key=movement.key,
        bucket=column.bucket,
        currency=column.currency,
        legacy_balance=getattr(row, f"{first[0]}_legacy"),
        ledger_balance=getattr(row, f"{first[0]}_ledger"),
        transaction_id=row.transaction_id,
        mode=row.mode,
        outcome=row.outcome,
        replayed=row.replayed,
        mismatch=row.mismatch,
        correlation_id=str(prepared.request["correlation_id"]),
        payee_legacy_balance=getattr(row, f"{first[1]}_legacy"),
        payee_ledger_balance=getattr(row, f"{first[1]}_ledger"),
        amount=_moved(prepared, row),
        legacy_change=getattr(row, f"{first[0]}_change"),
    )


def _moved(prepared: Prepared, row: Row) -> Decimal | None:
    if row.replayed:
        return None
    # The request of an adjustment says where the balance goes, not how far.
    adjusts = prepared.movement.operation == "set_balance"
    return (row.amount if adjusts else Decimal(str(prepared.request["amount"]))) or None


def refused(mapping: str, legacy: LegacyTable, prepared: Sequence[Prepared], row: Row) -> PostingRefused:
    """The error for a refusal. Nothing was written, the caller's transaction is usable."""
    asked = prepared[row.ordinal]
    movement, column, number = asked.movement, asked.column, asked.movement.transaction_id or 0
    paying = _payer_refused(legacy, asked, row)
    balance = row.debtor_legacy if paying else row.creditor_legacy
    text = row.debtor if paying else row.creditor
    # The transaction alone knows the accounts of a reversal, as texts.
    key: object = None if text is None else key_value(text, legacy.key_type)
    if movement.key is not None:
        key = movement.key if paying or movement.payee is None else movement.payee
    amount = after = Decimal(str(asked.request["amount"]))
    if row.refusal == "overflow" and movement.operation != "set_balance":
        after = WIDE.add(balance or 0, amount.copy_negate() if paying else amount)
    errors: dict[str | None, PostingRefused] = {
        "unknown_account": UnknownAccount(mapping, key),
        "insufficient_funds": InsufficientFunds(
            mapping, key, balance or Decimal(0), amount, column.floor or Decimal(0)
        ),
        "overflow": AmountOverflow(mapping, key, after, column.column),
        "key_reused": IdempotencyKeyReused(str(asked.request.get("idempotency_key"))),
        "legacy_value": LegacyValueInvalid(mapping, key, column.column),
        "unknown_transaction": UnknownTransaction(number),
        "not_reversible": NotReversible(number, "only postings and corrections are, and none with a leg in transit"),
    }
    return errors.get(row.refusal, InvalidAmount(movement.amount, f"refused by the database ({row.refusal})"))


def _payer_refused(legacy: LegacyTable, prepared: Prepared, row: Row) -> bool:
    """Whether it was the paying side that was refused."""
    if row.refusal == "unknown_account" or row.debtor is None or row.creditor is None:
        return row.debtor is not None
    if row.refusal == "legacy_value":
        return not _is_exact(row.debtor_legacy, prepared.column)
    amount, limits = Decimal(str(prepared.request["amount"])), legacy.column(prepared.column.column)
    return row.refusal != "overflow" or WIDE.subtract(row.debtor_legacy or 0, amount) < limits.minimum


def _is_exact(balance: Decimal | None, column: Column) -> bool:
    return balance is not None and balance.is_finite() and WIDE.remainder(balance, column.quantum) == 0


def typed(mapping: str, error: DBAPIError) -> WalletMigrateError | None:
    """The library's error for what the database raised; None for an error that is the application's or the
    database's own.
    """
    state, words = connect.sqlstate(error), str(error.orig).partition("\n")[0]
    context: str | None = getattr(getattr(error.orig, "diag", None), "context", None)
    # An error from inside a function has a context; without one, it is the call itself that was not understood.
    called = context is None
    where = next((line for line in (context or "").splitlines() if not line.startswith("SQL")), "")
    if called and state in _GONE:
        return LedgerNotInstalled(mapping)
    if called and state == "42501":
        return LedgerNotInstalled(mapping, f"this database role has no right to use the ledger ({words})")
    if state in _UNFIT and any(f"{name}_{mapping}(" in where for name in _OURS):
        return LegacyTableAltered(mapping, words)
    match state:
        case "WM010":
            return LedgerNotInstalled(mapping, "it was installed from another configuration")
        case "WM020":
            return LedgerMismatch(words)
        case "WM022":
            return LedgerNotInstalled(mapping, words)
        case "WM021":
            return LegacyUpdateSuppressed(words)
    return None


def posted(mapping: str, result: Posting, seconds: float | None, committed: bool) -> list[observe.Event]:
    """What observers are told of a posting."""
    events: list[observe.Event] = [
        observe.Posted(
            operation=result.operation,
            mode=result.mode,
            outcome=result.outcome,
            seconds=seconds,
            mapping=mapping,
            bucket=result.bucket,
            currency=result.currency,
            transaction_id=result.transaction_id,
            correlation_id=result.correlation_id,
            committed=committed,
            key=result.key,
            amount=result.amount,
        )
    ]
    if result.mismatch:
        events.append(
            observe.Mismatch(
                where="write",
                mapping=mapping,
                bucket=result.bucket,
                currency=result.currency,
                correlation_id=result.correlation_id,
                transaction_id=result.transaction_id,
                key=result.key,
                legacy=result.legacy_balance,
                ledger=result.ledger_balance,
            )
        )
    return events


def failed(
    mapping: str,
    movements: Sequence[Movement],
    correlation_id: str,
    error: WalletMigrateError | DBAPIError,
    seconds: float,
) -> list[observe.Event]:
    """What observers are told of a call that raised after ``seconds``; a batch is told as one, because it failed as
    one.
    """
    first, alone = movements[0], len(movements) == 1
    broke = _ledger_broke(mapping, error)
    correlation_id = first.correlation_id or correlation_id
    events: list[observe.Event] = [
        observe.Posted(
            operation=first.operation if alone else "apply",
            mode="dual_write" if broke else "legacy",
            outcome="ledger_failed" if broke else "refused",
            seconds=seconds if broke else None,
            mapping=mapping,
            bucket=first.bucket,
            currency=first.currency,
            transaction_id=None,
            correlation_id=correlation_id,
            committed=False,
            key=first.key if alone else None,
            error=error.code if isinstance(error, WalletMigrateError) else connect.sqlstate(error),
        )
    ]
    if isinstance(error, LedgerMismatch):
        events.append(
            observe.Mismatch("write", mapping, first.bucket or "", first.currency or "", correlation_id, key=first.key)
        )
    return events


def _ledger_broke(mapping: str, error: WalletMigrateError | DBAPIError) -> bool:
    """Whether the call failed by the ledger's doing, so that it counts against the error budget.

    It did not where the legacy table refused the write (a constraint, a trigger, a row that another session has
    locked), where the connection was lost, and where the same transaction succeeds when it is tried again (class 40).
    A time-out (55P03, 57014) is the ledger's when it was reached in the ledger's part of the call.
    """
    if isinstance(error, WalletMigrateError):
        # Without a cause the adapter itself said so: a reversal where no ledger was ever installed.
        raised = error.__cause__ is not None
        return raised and isinstance(error, (LedgerMismatch, LedgerNotInstalled, LegacyTableAltered))
    if connect.sqlstate(error).startswith(_NOT_THE_LEDGERS):
        return False
    context = str(getattr(getattr(error.orig, "diag", None), "context", None) or "")
    return re.search(rf"\b((leg|settle|fence)_{mapping}|enter_batch)\(", context) is not None
