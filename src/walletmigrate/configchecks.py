"""A cross-check as the configuration has it: SQL that says what balances should be, from the business's own tables."""

from __future__ import annotations

from collections.abc import Collection
from decimal import Decimal
from typing import Literal

from pydantic import BaseModel, ConfigDict

from walletmigrate.configfields import BucketName, CheckName, CurrencyName, Query, Tolerance, wrong


class CrossCheck(BaseModel):
    """A query with the columns ``key`` and ``expected`` (major units): what the balance of each key should be.

    ``bucket`` and ``currency`` say which balance, where the mapping has several. Differences up to ``tolerance`` (major
    units) are in order. Of a key that the query does not give, ``others`` "zero" expects 0, and "ignore" nothing.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, validate_default=True)

    name: CheckName
    sql: Query
    bucket: BucketName | None = None
    currency: CurrencyName | None = None
    tolerance: Tolerance = Decimal(0)
    others: Literal["zero", "ignore"] = "zero"


def fitting(checks: tuple[CrossCheck, ...], columns: Collection[tuple[str, str]]) -> tuple[CrossCheck, ...]:
    """The checks, each having a name of its own and one column of (bucket, currency). Raises what pydantic expects."""
    names: set[str] = set()
    for index, check in enumerate(checks):
        if check.name in names:
            raise wrong(f"two cross-checks are named {check.name!r}", "give one another name", index, "name")
        names.add(check.name)
        found = [
            column for column in columns if check.bucket in (None, column[0]) and check.currency in (None, column[1])
        ]
        if len(found) != 1:
            kinds = ", ".join(f"{bucket} in {currency}" for bucket, currency in columns)
            what = "no column of the mapping" if not found else "several columns of the mapping"
            place = "bucket" if check.bucket else "currency" if check.currency else "name"
            raise wrong(
                f"{what} for cross-check {check.name!r}", f"name bucket and currency, of: {kinds}", index, place
            )
    return checks
