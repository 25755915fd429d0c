"""What a caller asks for, checked and put into the form that the database's function takes."""

from __future__ import annotations

import hashlib
import re
import uuid
from collections.abc import Mapping as MappingABC
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Literal, TypedDict, Unpack, get_args

from walletmigrate.config import Column, KeyType, Mapping, exact, key_text
from walletmigrate.errors import InvalidMovement, SelfTransfer
from walletmigrate.ledger import Touched

Operation = Literal["credit", "debit", "transfer", "set_balance", "reverse", "open_account"]
Key = int | str | uuid.UUID
Traits = MappingABC[str, str | int | bool]
Request = dict[str, str | int | bool | None]

TEXT_LIMIT = 500
"""Characters of a text that a movement brings: a type, a reference, a correlation id."""
_UNSTORABLE = re.compile("[\0\ud800-\udfff]")
_OWN_KEYS = "walletmigrate:"
"""Idempotency keys that begin so are the library's: a caller's key cannot stand in the way of a reversal."""
_OPERATIONS = get_args(Operation)
_PAYS = frozenset({"debit", "transfer"})


class Details(TypedDict, total=False):
    """What any movement may say of itself; see `Movement`."""

    bucket: str | None
    currency: str | None
    reference: tuple[str, object] | None
    idempotency_key: str | None
    correlation_id: str | None
    actor: str | None
    reason: str | None
    description: str | None
    address: str | None
    traits: Traits | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Movement:
    """One change of balance. ``amount`` is in major units; use the class methods rather than the constructor.

    ``type`` is the application's own word (deposit, booking); ``reference`` is (kind, id) of what caused it.
    The same ``idempotency_key`` with the same request moves money once; with another request it is refused.
    ``watched`` marks what a watched attribute was assigned (`LegacyBalanceAdapter.watch`): that is the application's
    traffic, and leaves no audit row.
    """

    operation: Operation
    key: Key | None = None
    payee: Key | None = None
    amount: Decimal | int = 0
    type: str | None = None
    bucket: str | None = None
    currency: str | None = None
    reference: tuple[str, object] | None = None
    idempotency_key: str | None = None
    correlation_id: str | None = None
    actor: str | None = None
    reason: str | None = None
    description: str | None = None
    address: str | None = None
    transaction_id: int | None = None
    traits: Traits | None = field(default=None, compare=False)
    watched: bool = False

    @classmethod
    def credit(cls, key: Key, amount: Decimal | int, *, type: str, **details: Unpack[Details]) -> Movement:
        """Money that comes in to one account."""
        return cls(operation="credit", key=key, amount=amount, type=type, **details)

    @classmethod
    def debit(cls, key: Key, amount: Decimal | int, *, type: str, **details: Unpack[Details]) -> Movement:
        """Money that goes out of one account."""
        return cls(operation="debit", key=key, amount=amount, type=type, **details)

    @classmethod
    def transfer(
        cls, payer: Key, payee: Key, amount: Decimal | int, *, type: str, **details: Unpack[Details]
    ) -> Movement:
        """Money that goes from one account to another."""
        return cls(operation="transfer", key=payer, payee=payee, amount=amount, type=type, **details)

    @classmethod
    def set_balance(cls, key: Key, balance: Decimal | int, **details: Unpack[Details]) -> Movement:
        """An administrator's adjustment to a balance, with an actor and a reason."""
        return cls(operation="set_balance", key=key, amount=balance, **details)

    @classmethod
    def reverse(cls, transaction_id: int, **details: Unpack[Details]) -> Movement:
        """The undoing of one transaction, at most once, with a reason."""
        return cls(operation="reverse", transaction_id=transaction_id, **details)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A movement that passed every check that needs no database. ``keys`` are the canonical key texts."""

    movement: Movement
    column: Column
    keys: tuple[str, ...]
    request: Request


def prepare(
    movement: Movement, mapping: Mapping, key_type: KeyType, correlation_id: str, touched: Touched | None = None
) -> Prepared:
    """Check a movement and make its request. Raises a PostingRefused; nothing has touched the database.

    ``touched`` is what the transaction moved that a reversal undoes.

    The digest covers what moves money (operation, accounts, amount, type, reference), so that a retry with
    another correlation id or wording is still the same request.
    """
    _check(movement, correlation_id)
    if touched is not None:
        return _prepare_reversal(movement, mapping, touched, correlation_id)
    column = mapping.column(movement.bucket, movement.currency)
    key = key_text(movement.key, key_type, mapping.name)
    payee = None
    if movement.operation == "transfer":
        payee = key_text(movement.payee, key_type, mapping.name)
        if payee == key:
            raise SelfTransfer(mapping.name, movement.key)
    free = movement.operation == "set_balance"
    zero = free or movement.operation == "open_account"
    amount = str(exact(movement.amount, column, allow_negative=free, allow_zero=zero))
    pays = movement.operation in _PAYS
    request = _common(movement, correlation_id)
    request["debtor"] = key if pays else None
    request["creditor"] = payee if pays else key
    request["bucket"] = column.bucket
    request["currency"] = column.currency
    request["amount"] = amount
    if movement.idempotency_key is not None:
        parts = (
            mapping.name,
            movement.operation,
            key,
            payee,
            column.bucket,
            column.currency,
            amount,
            movement.type,
        )
        request["idempotency_key"] = movement.idempotency_key
        request["request"] = digest(*parts, request["reference_type"], request["reference_id"])
    return Prepared(movement, column, (key,) if payee is None else (key, payee), request)


def digest(*parts: object) -> str:
    """The first 16 bytes of SHA-256 over the parts, as hex; None differs from every text."""
    texts = [b"\x00" if part is None else str(part).encode() for part in parts]
    return hashlib.sha256(b"".join([b"%d:%b" % (len(text), text) for text in texts])).hexdigest()[:32]


def transaction_number(movement: Movement) -> int:
    """The id of the transaction that a reversal undoes. Raises InvalidMovement."""
    number = movement.transaction_id
    if isinstance(number, bool) or not isinstance(number, int) or not 0 < number < 2**63:
        raise InvalidMovement("transaction_id", f"{number!r} is no id of a transaction")
    return number


def _prepare_reversal(movement: Movement, mapping: Mapping, touched: Touched, correlation_id: str) -> Prepared:
    number = transaction_number(movement)
    request = _common(movement, correlation_id)
    request["reverses"] = number
    request["amount"] = str(touched.amount)
    # A transaction is its own key: it is undone at most once in every mode, also where no ledger row is written.
    request["idempotency_key"] = f"{_OWN_KEYS}reversal:{number}"
    request["request"] = digest(mapping.name, "reverse", number)
    return Prepared(movement, mapping.column(touched.bucket, touched.currency), touched.keys, request)


def _common(movement: Movement, correlation_id: str) -> Request:
    kind, identity = movement.reference or (None, None)
    return {
        "operation": movement.operation,
        # A reversal is of the type of what it undoes.
        "type": movement.type or (None if movement.operation == "reverse" else movement.operation),
        "reference_type": kind,
        "reference_id": None if identity is None else str(identity),
        "correlation_id": movement.correlation_id or correlation_id,
        "actor": movement.actor,
        "reason": movement.reason,
        "description": movement.description,
        "address": movement.address,
        "watched": movement.watched,
    }


def _check(movement: Movement, correlation_id: str) -> None:
    if movement.operation not in _OPERATIONS:
        raise InvalidMovement("operation", f"{movement.operation!r} is none of {', '.join(_OPERATIONS)}")
    reference: object = movement.reference
    if reference is not None and not (isinstance(reference, tuple) and len(reference) == 2):
        raise InvalidMovement("reference", "pass (kind, id), for example ('deposit', 17)")
    if movement.operation == "set_balance" and not (movement.actor and movement.reason):
        raise InvalidMovement("actor", "an adjustment has an actor and a reason; pass both")
    if movement.operation == "reverse" and not movement.reason:
        raise InvalidMovement("reason", "a reversal has a reason; pass it")
    if movement.operation == "reverse" and movement.idempotency_key is not None:
        # One that was dropped would let the same key move money once more, for another request.
        what = "a transaction is its own key, and is undone at most once; leave it out"
        raise InvalidMovement("idempotency_key", what)
    if isinstance(movement.idempotency_key, str) and movement.idempotency_key.startswith(_OWN_KEYS):
        raise InvalidMovement("idempotency_key", f"keys that begin with {_OWN_KEYS!r} are the library's own")
    _check_texts(movement, correlation_id)


def _check_texts(movement: Movement, correlation_id: str) -> None:
    """What the database could not store would end the caller's transaction, so it is found here."""
    kind, identity = movement.reference or (None, None)
    texts: dict[str, object] = {
        "type": movement.type,
        "reference": kind,
        "reference id": None if identity is None else str(identity),
        "idempotency_key": movement.idempotency_key,
        "correlation_id": movement.correlation_id or correlation_id,
        "actor": movement.actor,
        "reason": movement.reason,
        "description": movement.description,
        "address": movement.address,
    }
    for name, value in texts.items():
        if value is None:
            continue
        if not isinstance(value, str) or not value.strip():
            raise InvalidMovement(name, f"{value!r} is no text; pass a non-empty str or leave it out")
        if _UNSTORABLE.search(value) or len(value) > TEXT_LIMIT:
            raise InvalidMovement(name, f"pass at most {TEXT_LIMIT} characters, without NUL and lone surrogates")
