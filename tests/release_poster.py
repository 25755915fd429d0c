"""A process of an application: postings of every kind, and reads, one after another, until standard input ends."""

from __future__ import annotations

import json
import random
import select
import sys
from collections import Counter
from decimal import Decimal

from sqlalchemy import create_engine

import ledger
from walletmigrate import LegacyBalanceAdapter, StaticSource, connect, functions

ACCOUNTS = range(1, 6)
KINDS = ("credit", "debit", "transfer", "described", "target", "reversal")


def post(adapter: LegacyBalanceAdapter, engine: object, kind: str, key: int, name: str) -> tuple[str, Decimal]:
    """One posting in a transaction of its own; its mode, and by how much it changed the sum of all balances."""
    other = next(one for one in ACCOUNTS if one != key)
    amount = Decimal(random.randint(1, 500)).scaleb(-2)
    if kind == "described":  # a page that shows the balance, in a transaction of its own
        with engine.connect() as connection:  # type: ignore[attr-defined]
            adapter.balance(connection, key)
    with engine.begin() as connection:  # type: ignore[attr-defined]
        if kind == "transfer":
            return adapter.transfer(connection, key, other, amount, type=name).mode, Decimal(0)
        if kind == "debit":
            return adapter.debit(connection, key, amount, type=name).mode, -amount
        if kind == "target":
            done = adapter.set_balance(connection, key, 100, actor=name, reason="a test")
            return done.mode, done.legacy_change or Decimal(0)
        credit = adapter.credit(connection, key, amount, type=name, description="x" if kind == "described" else None)
        if kind == "reversal" and credit.transaction_id is not None:
            adapter.reverse(connection, credit.transaction_id, actor=name, reason="a test")
            return credit.mode, Decimal(0)
        return credit.mode, amount


def say(told: object) -> None:
    """One line."""
    sys.stdout.write(json.dumps(told) + "\n")
    sys.stdout.flush()


def main(url: str, name: str) -> None:
    """Say how often it has posted, in lines of JSON; at the end, everything."""
    engine = create_engine(connect.parsed(url), connect_args={"application_name": name})
    adapter = LegacyBalanceAdapter(ledger.users_settings(url), StaticSource({"wallet.dualWrite": True}))
    modes, errors, change, posted = Counter[str](), [], Decimal(0), 0
    while True:
        kind = KINDS[posted % len(KINDS)]
        try:
            mode, moved = post(adapter, engine, kind, random.choice(ACCOUNTS), name)
            modes[mode] += 1
            change += moved
        except Exception as error:  # noqa: BLE001 - whatever it is, the test wants to see it
            errors.append(f"{kind}: {type(error).__name__}: {error}")
        posted += 1
        answer = {"posted": posted}
        if select.select([sys.stdin], [], [], 0)[0]:
            if not sys.stdin.readline():
                break
            answer["now"] = posted
        say(answer)
    told = {"functions": functions.FUNCTIONS_VERSION, "modes": modes, "errors": errors, "change": str(change)}
    say(told)


main(*sys.argv[1:])
