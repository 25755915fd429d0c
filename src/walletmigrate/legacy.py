"""The application's own updates, for a database in which the ledger is not installed: what was done before."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from decimal import Decimal
from functools import lru_cache
from typing import Any

from sqlalchemy import Connection, Row, TextClause, text

from walletmigrate.config import Column
from walletmigrate.errors import (
    AmountOverflow,
    InsufficientFunds,
    LegacyValueInvalid,
    PostingRefused,
    UnknownAccount,
)
from walletmigrate.functions import relation
from walletmigrate.movements import Prepared
from walletmigrate.postings import Posting
from walletmigrate.schema import quoted
from walletmigrate.sites import INSTALLED, Site


@lru_cache(maxsize=256)
def _statement(sql: str) -> TextClause:
    """SQLAlchemy looks for the parameters in a text each time that one is made."""
    return text(sql)


class LedgerAppearedError(Exception):
    """The ledger was installed since this process last looked. Nothing was written: post through it."""


def post_legacy(connection: Connection, site: Site, movements: Sequence[Prepared]) -> list[Posting]:
    """One UPDATE for each account touched. Several stand in a savepoint, so that a refusal undoes them all."""
    alone = len(movements) == 1 and len(movements[0].keys) < 2
    with nullcontext() if alone else connection.begin_nested():
        return [_post(connection, site, each) for each in movements]


def _post(connection: Connection, site: Site, prepared: Prepared) -> Posting:
    movement, column = prepared.movement, prepared.column
    amount = Decimal(str(prepared.request["amount"]))
    less = amount.copy_negate()  # a minus would round it to the precision of the application's decimal context
    changes: dict[str, list[Decimal | None]] = {
        "credit": [amount],
        "debit": [less],
        "transfer": [less, amount],
        "open_account": [Decimal(0)],
        "set_balance": [None],
    }
    post = _look if movement.operation == "open_account" else _update
    sides = list(zip(prepared.keys, changes[movement.operation], strict=True))
    balances = {
        key: post(connection, site, column, prepared, key, change)
        for key, change in sorted(sides, key=lambda side: _order(site, side[0]))
    }
    return Posting(
        operation=movement.operation,
        key=movement.key,
        bucket=column.bucket,
        currency=column.currency,
        legacy_balance=balances[prepared.keys[0]],
        ledger_balance=None,
        transaction_id=None,
        mode="legacy",
        outcome="skipped",
        replayed=False,
        mismatch=False,
        correlation_id=str(prepared.request["correlation_id"]),
        payee_legacy_balance=balances[prepared.keys[1]] if len(prepared.keys) > 1 else None,
        amount=None if movement.operation == "set_balance" else amount or None,
    )


def _order(site: Site, key: str) -> Any:
    return int(key) if site.key_type == "integer" else key


def _update(
    connection: Connection, site: Site, column: Column, prepared: Prepared, key: str, change: Decimal | None
) -> Decimal:
    """Write one row and return its balance in major units. A ``change`` of None sets the request's amount.

    The update itself asks whether the ledger has been installed meanwhile, so that no key is forgotten because
    a process still believes in its absence. What would be refused is asked in the same statement: an error of
    the database would end the caller's
    transaction.
    """
    limits, value, name = site.limits(column), site.value(column), quoted(column.column)
    factor = f" * {10**column.scale}" if column.unit == "minor" and column.scale else ""
    amount = "cast(:amount as numeric)"
    names = {"schema": site.schema, "function": f"post_{site.mapping.name}"}
    values: dict[str, Any] = {"key": key, "amount": prepared.request["amount"] if change is None else change}
    if change is None:
        if not limits.minimum <= Decimal(str(values["amount"])) <= limits.maximum:
            raise _why_not(connection, site, column, prepared, key, change)
        assigned, guard = f"{amount}{factor}", "true"
    else:
        assigned = f"({value} + {amount}){factor}" if limits.is_float else f"l.{name} + ({amount}{factor})"
        guard = f"abs({value}) < 'Infinity' and {value} + {amount} {'>=' if change < 0 else '<='} :limit"
        low = limits.minimum if column.floor is None else max(limits.minimum, column.floor)
        values["limit"] = low if change < 0 else limits.maximum
    row = connection.execute(
        _statement(
            f"update {relation(site.mapping)} as l set {name} = {assigned} "
            f"where l.{quoted(site.mapping.key)} = cast(:key as {site.key_sql_type}) and {guard} "
            f"and not {INSTALLED} returning {value}"
        ),
        {**values, **names},
    ).one_or_none()
    if row is None:
        if connection.scalar(_statement(f"select {INSTALLED}"), names):
            raise LedgerAppearedError
        raise _why_not(connection, site, column, prepared, key, change)
    return Decimal(row[0])


def _look(
    connection: Connection, site: Site, column: Column, prepared: Prepared, key: str, change: Decimal | None
) -> Decimal:
    """The balance as it is, for an operation that writes nothing here."""
    row = _read(connection, site, column, key)
    if row is None or row[0] is None:
        raise _why_not(connection, site, column, prepared, key, change)
    return Decimal(row[0])


def _read(connection: Connection, site: Site, column: Column, key: str) -> Row[Any] | None:
    return connection.execute(
        _statement(
            f"select {site.value(column)} from {relation(site.mapping)} as l "
            f"where l.{quoted(site.mapping.key)} = cast(:key as {site.key_sql_type})"
        ),
        {"key": key},
    ).one_or_none()


def _why_not(
    connection: Connection, site: Site, column: Column, prepared: Prepared, key: str, change: Decimal | None
) -> PostingRefused:
    name, movement = site.mapping.name, prepared.movement
    row = _read(connection, site, column, key)
    asked = movement.payee if key != prepared.keys[0] else movement.key
    if row is None:
        return UnknownAccount(name, asked)
    balance: Decimal | None = row[0]
    if change is not None and (balance is None or not balance.is_finite()):
        return LegacyValueInvalid(name, asked, column.column)
    amount = Decimal(str(prepared.request["amount"]))
    if change is None or balance is None:
        return AmountOverflow(name, asked, amount, column.column)
    if change < 0 and column.floor is not None and balance + change < column.floor:
        return InsufficientFunds(name, asked, balance, amount, column.floor)
    return AmountOverflow(name, asked, balance + change, column.column)
