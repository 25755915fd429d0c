"""What every refusal of the adapter has in common, as an assertion."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import pytest
from sqlalchemy import Connection

from adapting import Place
from walletmigrate import LegacyBalanceAdapter, PostingRefused

Call = Callable[[LegacyBalanceAdapter, Connection], object]

WRITTEN = {
    "users": "select id, total_coins, promo from users order by id",
    "accounts": "select id, key, bucket, state, balance from wallet.accounts order by id",
    "transactions": "select id from wallet.transactions order by id",
    "keys": "select key from wallet.idempotency_keys order by key",
    "failures": "select key, message from wallet.failures order by id",
    "details": "select * from wallet.transaction_details",
}


@contextmanager
def refusal(at: Place, error: type[PostingRefused], key: object = 1) -> Iterator[list[Any]]:
    """The block's call is refused, nothing of it is written, and the same transaction can still post.

    Yields a list: of the connection, and in the end of the error.
    """
    got: list[Any] = []
    with at.engine.connect() as connection, connection.begin() as transaction:
        before = {name: str(connection.exec_driver_sql(query).all()) for name, query in WRITTEN.items()}
        got.append(connection)
        with pytest.raises(error) as refused:
            yield got
        got.append(refused.value)
        after = {name: str(connection.exec_driver_sql(query).all()) for name, query in WRITTEN.items()}
        assert after == before
        assert fields(refused.value), "an error has fields"  # type: ignore[arg-type]
        assert len(str(refused.value)) > 20, "an error is a sentence"
        at.adapter.credit(connection, key, 1, type="still usable")  # type: ignore[arg-type]
        transaction.commit()
    assert at.heard.posted[-2].outcome == "refused"
    assert at.heard.posted[-2].error == refused.value.code
    at.check()
