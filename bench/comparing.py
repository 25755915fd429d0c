"""A full verification against the bare SQL comparison, as somebody would type it: of legacy table and balances, and
in a ledger that is used, of the journal too.

Of a ledger with openings alone; of one that is used, when no run has seen it yet; and the night after: when a clean run
has, and some accounts have moved since.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import stage
from figures import Figure, at_most, ratio_note
from inside import posting_call
from sqlalchemy import Engine, text
from stage import ACT, USERS, Scale

from walletmigrate import connect
from walletmigrate.embedded import Server
from walletmigrate.verify import verify

Timed = Callable[[Engine, int], float]

_BARE = (
    "select count(*) from users as l full join (select * from wallet.accounts where mapping = 'users' "
    "and bucket = 'cash' and currency = 'EUR') as a on a.key = l.id::text "
    "where a.balance is distinct from l.total_coins"
)
_BARE_WITH_JOURNAL = _BARE.replace(
    "where a.balance is distinct",
    "full join (select account, sum(amount) as balance from ("
    "select credit_account as account, amount from wallet.transactions where credit_account > 0 union all "
    "select debit_account, -amount from wallet.transactions where debit_account > 0) as legs group by account"
    ") as j on j.account = a.id where coalesce(j.balance, 0) is distinct from a.balance or a.balance is distinct",
)
_USED = "select g.id from users as g cross join generate_series(1, 1 + g.id / 10 % 5) where g.id % 10 = 0"
"""Every tenth account, one to five times each: three on the average."""
_SINCE = "select g.id from users as g where g.id % 100 = 50"
"""Every hundredth account once."""
_IN_ONE = 2_000
"""Postings in one transaction of the database."""


def measure(server: Server, scale: Scale) -> list[Figure]:
    """Time ratios, verify ÷ bare. Raises RuntimeError unless both see every account, and no difference."""
    long, short = scale.rounds(full=9, quick=5), scale.rounds(full=5, quick=3)
    with stage.database(server, "bench_verify") as url:
        engine = stage.application(url)
        jobs = connect.engine(url, application_name="walletmigrate-bench")
        try:
            stage.make_users(engine, USERS, scale.accounts)
            with engine.begin() as connection:
                connection.execute(text("update users set total_coins = total_coins + id % 1000"))
            stage.install_ledger(url, "dual_write")
            stage.mirror(engine, scale.accounts)
            stage.settle(engine)
            openings = _rounds(jobs, scale.accounts, long, (_bare, _verified))
            posted = _post(engine, _USED)
            unseen = _rounds(jobs, scale.accounts, short, (_bare, _verified, _bare_with_journal))
            verify(jobs, stage.settings_of(), stage.settings_of().mapping(), ACT)
            since = _post(engine, _SINCE)
            seen = _rounds(jobs, scale.accounts, long, (_bare, _verified, _bare_with_journal))
        finally:
            jobs.dispose()
            engine.dispose()
    used = f"used ({posted:,} postings)"
    return [
        _ratio("full", f"verify of {scale.accounts:,} accounts, openings alone", openings, _bare),
        _ratio("used", f"{used}, seen by a clean run, {since:,} postings since", seen, _bare_with_journal),
        _ratio("used_balances", "the same", seen, _bare),
        _ratio("unseen", f"{used}, seen by no run", unseen, _bare_with_journal),
        _ratio("unseen_balances", "the same", unseen, _bare),
    ]


def _rounds(engine: Engine, accounts: int, rounds: int, kinds: tuple[Timed, ...]) -> dict[Timed, list[float]]:
    """The seconds that each kind took, in turns and in alternate order."""
    for kind in kinds:  # what is read first is read from the disk
        kind(engine, accounts)
    found: dict[Timed, list[float]] = {kind: [] for kind in kinds}
    for number in range(rounds):
        for kind in kinds[:: 1 if number % 2 else -1]:
            found[kind].append(kind(engine, accounts))
    return found


def _ratio(name: str, what: str, found: dict[Timed, list[float]], base: Timed) -> Figure:
    verified, bare = found[_verified], found[base]
    with_journal = base is _bare_with_journal
    return Figure(
        f"verify.{name}",
        what,
        tuple(a / b for a, b in zip(verified, bare, strict=True)),
        f"× the bare comparison's time{', with the journal' if with_journal else ''}",
        at_most(1.5, binding=with_journal or name == "full"),
        ratio_note([one * 1000 for one in verified], [one * 1000 for one in bare], "ms"),
    )


def _post(engine: Engine, keys: str) -> int:
    """Post a credit to each of these keys, in an order that is not the accounts'; how many there were."""
    call = posting_call("shadow", "p.id", "(100000000000000000 + p.token)")
    with engine.begin() as connection:
        first = connection.scalar(text("select count(*) from wallet.idempotency_keys")) or 0
        connection.execute(
            text(
                f"create table posted as select id, row_number() over (order by random()) as number from ({keys}) as k"
            )
        )
        connection.execute(text("create index on posted (number)"))
        count = connection.scalar(text("select count(*) from posted")) or 0
    statement = f"select count({call}) from (select id, number + {int(first)} as token from posted where number > "
    for after in range(0, count, _IN_ONE):
        with engine.begin() as connection:
            connection.exec_driver_sql(
                f"{statement}{after} and number <= {after + _IN_ONE}) as p", execution_options={"no_parameters": True}
            )
    with engine.begin() as connection:
        connection.execute(text("drop table posted"))
    stage.settle(engine)
    return int(count)


def _bare(engine: Engine, accounts: int) -> float:
    return _compared(engine, accounts, _BARE)


def _bare_with_journal(engine: Engine, accounts: int) -> float:
    return _compared(engine, accounts, _BARE_WITH_JOURNAL)


def _compared(engine: Engine, accounts: int, query: str) -> float:
    started = time.perf_counter()
    with engine.begin() as connection:
        differing = connection.scalar(text(query))
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
