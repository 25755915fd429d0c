"""16 clients inside the database: the posting function against a bare UPDATE, by pgbench.

The request is the one that the adapter sends, made by the adapter's own code; pgbench only puts the account and
a fresh idempotency key into its text.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import stage
from figures import Figure, at_least, at_most, ratio_note
from pgbench import CLIENTS, in_turns
from sqlalchemy import Engine, text
from stage import AMOUNT, BARE, USERS, Scale

from walletmigrate.embedded import Server
from walletmigrate.movements import Movement, prepare
from walletmigrate.postings import Calls

ROWS = 100_000
POLICIES = ("shadow", "strict")

_ACCOUNT = 987654321987654321
_TOKEN = "k" * 36
"""A key of 36 characters, half of it a random number that the client makes, as it makes the key in an application."""
_BARE_SCRIPT = (
    f"\\set id random(1, {ROWS})\nupdate users_bare set total_coins = total_coins + {AMOUNT} where id = :id;\n"
)
_SIZES = (
    "select c.relname, pg_total_relation_size(c.oid) from pg_class as c "
    "where c.relnamespace = 'wallet'::regnamespace and c.relkind = 'r'"
)
_POSTINGS = "select count(*) from wallet.transactions"


def measure(server: Server, scale: Scale) -> list[Figure]:
    """Throughput ratios, dual-write ÷ bare, and the bytes that a posting adds to the ledger."""
    seconds = 4 if scale.quick else 12
    ratios: dict[str, list[tuple[float, float]]] = {policy: [] for policy in POLICIES}
    with stage.database(server, "bench_inside") as url, tempfile.TemporaryDirectory() as name:
        engine = stage.application(url)
        try:
            folder = _prepare(engine, url, Path(name))
            before, began = _sizes(engine), stage.count(engine, _POSTINGS)
            for _ in range(scale.rounds(full=5, quick=2)):
                for policy in POLICIES:
                    ratios[policy].append(_round(server, url, engine, folder, policy, seconds))
            growth = _bytes(before, _sizes(engine), stage.count(engine, _POSTINGS) - began)
            stage.check_mirrored(engine, ROWS)
        finally:
            engine.dispose()
    return [*(_throughput(policy, ratios[policy]) for policy in POLICIES), growth]


def _prepare(engine: Engine, url: str, folder: Path) -> Path:
    for table in (USERS, BARE):
        stage.make_users(engine, table, ROWS)
    stage.install_ledger(url, "dual_write")
    stage.mirror(engine, ROWS)
    with engine.begin() as connection:
        # Dead rows are to be counted, whenever the last vacuum was; and no side of the comparison has a vacuum.
        for name in ("wallet.accounts", "wallet.transactions", "wallet.idempotency_keys", USERS.name, BARE.name):
            connection.execute(text(f"alter table {name} set (autovacuum_enabled = off)"))
    stage.settle(engine)
    (folder / "bare").write_text(_BARE_SCRIPT)
    for policy in POLICIES:
        (folder / policy).write_text(_posting_script(policy))
    return folder


def _round(
    server: Server,
    url: str,
    engine: Engine,
    folder: Path,
    policy: str,
    seconds: int,
) -> tuple[float, float]:
    """Bare and dual-write in turns: (dual-write, bare) transactions per second."""
    stage.checkpoint(engine)
    postings = stage.count(engine, _POSTINGS)
    bare, posted = in_turns(server, url, (folder / "bare", folder / policy), seconds)
    written = stage.count(engine, _POSTINGS) - postings
    if written != posted.transactions:
        raise RuntimeError(f"{posted.transactions} calls wrote {written} postings")
    return posted.per_second, bare.per_second


def _posting_script(policy: str) -> str:
    token = f"\\set token random({10**17}, {10**18 - 1})"
    return f"\\set id random(1, {ROWS})\n{token}\nselect {posting_call(policy, ':id', ':token')};\n"


def posting_call(policy: str, account: str, token: str) -> str:
    """The call of a credit, as SQL; ``account`` and ``token`` (18 digits, fresh each time) are SQL themselves."""
    settings = stage.settings_of(policy)
    mapping = settings.mapping(None)
    movement = Movement.credit(
        _ACCOUNT, AMOUNT, type="deposit", reference=("deposit", "r" * 18), idempotency_key=_TOKEN
    )
    request = prepare(movement, mapping, "integer", "0123456789abcdef" * 2).request
    calls = Calls(settings.ledger_schema, mapping)
    words = ", ".join(f"'{each}'" for each in calls.plain({**request, "dual": True}))
    words = words.replace(f"'{_ACCOUNT}'", account)
    words = words.replace(str(_ACCOUNT), f"'||{account}||'").replace(_TOKEN, "k" * 18 + f"'||{token}||'")
    return f"wallet.plain_users({words})"


def _throughput(policy: str, pairs: list[tuple[float, float]]) -> Figure:
    dual, bare = zip(*pairs, strict=True)
    return Figure(
        f"inside.{policy}",
        f"{CLIENTS} clients inside: dual-write, {policy}",
        tuple(a / b for a, b in pairs),
        "× the bare throughput",
        at_least(0.40),
        ratio_note(dual, bare, "a second"),
    )


def _sizes(engine: Engine) -> dict[str, int]:
    """Bytes of each table of the ledger with its indexes."""
    with engine.connect() as connection:
        return {name: int(size) for name, size in connection.execute(text(_SIZES))}


def _bytes(before: dict[str, int], after: dict[str, int], postings: int) -> Figure:
    """Over all runs together: an index grows in bursts, when its pages split, so one run says little."""
    grown = {name: (size - before[name]) / postings for name, size in after.items() if size > before[name]}
    return Figure(
        "inside.bytes",
        f"{CLIENTS} clients inside: bytes per posting",
        (sum(grown.values()),),
        "bytes",
        at_most(420),
        f"{postings:,} postings: {', '.join(f'{name} {size:.0f}' for name, size in sorted(grown.items()))}",
    )
