"""A full verification against the bare SQL comparison of the same two tables, as somebody would type it."""

from __future__ import annotations

import time

import stage
from figures import Figure, at_most, ratio_note
from sqlalchemy import Engine, text
from stage import ACT, USERS, Scale

from walletmigrate import connect
from walletmigrate.embedded import Server
from walletmigrate.verify import verify

_BARE = (
    "select count(*) from users as l full join (select * from wallet.accounts where mapping = 'users' "
    "and bucket = 'cash' and currency = 'EUR') as a on a.key = l.id::text "
    "where a.balance is distinct from l.total_coins"
)


def measure(server: Server, scale: Scale) -> list[Figure]:
    """Time ratio, verify ÷ bare. Raises RuntimeError unless both see every account, and no difference."""
    pairs: list[tuple[float, float]] = []
    with stage.database(server, "bench_verify") as url:
        engine = stage.application(url)
        jobs = connect.engine(url, application_name="walletmigrate-bench", pool_size=1, max_overflow=0)
        try:
            stage.make_users(engine, USERS, scale.accounts)
            with engine.begin() as connection:
                connection.execute(text("update users set total_coins = total_coins + id % 1000"))
            stage.install_ledger(url, "dual_write")
            stage.mirror(engine, scale.accounts)
            stage.settle(engine)
            for measured in (_bare, _verified):  # what is read first is read from the disk
                measured(jobs, scale.accounts)
            for number in range(scale.rounds(full=9, quick=5)):
                found = {one: one(jobs, scale.accounts) for one in ((_bare, _verified), (_verified, _bare))[number % 2]}
                pairs.append((found[_verified], found[_bare]))
        finally:
            jobs.dispose()
            engine.dispose()
    verified, bare = zip(*pairs, strict=True)
    return [
        Figure(
            "verify.full",
            f"verify of {scale.accounts:,} accounts: legacy, balances, journal, totals, references",
            tuple(a / b for a, b in pairs),
            "× the bare comparison's time",
            at_most(1.5),
            ratio_note([one * 1000 for one in verified], [one * 1000 for one in bare], "ms"),
        )
    ]


def _bare(engine: Engine, accounts: int) -> float:
    started = time.perf_counter()
    with engine.begin() as connection:
        differing = connection.scalar(text(_BARE))
    seconds = time.perf_counter() - started
    if differing:
        raise RuntimeError(f"{differing} of {accounts} accounts differ: the figures mean nothing")
    return seconds


def _verified(engine: Engine, accounts: int) -> float:
    settings = stage.settings_of()
    started = time.perf_counter()
    seen = verify(engine, settings, settings.mapping(), ACT, dry_run=True)
    seconds = time.perf_counter() - started
    if not seen.clean or seen.accounts != accounts:
        raise RuntimeError(f"the verification saw {seen.accounts} accounts of {accounts}, clean: {seen.clean}")
    return seconds
