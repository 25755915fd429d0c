"""What the sessions of an order do, and the locks at which a call can be made to pause."""

from __future__ import annotations

from sqlalchemy import Connection

from torture_steps import (
    Ask,
    Effect,
    Operation,
    Scene,
    Step,
    ask_state,
    forged,
    in_turn,
    posting,
    postings,
    read,
    read_there,
    statement,
    stop,
    undone,
)
from walletmigrate.movements import Movement

FROZEN = "WM030"
REJECTED = "WM031"
GONE = "UnknownAccount"
REUSED = "IdempotencyKeyReused"
TAKEN = "23505"
UNSEEN = "0A000"
"""A TRUNCATE whose snapshot may not see all rows that it takes away."""
DEADLOCK = "40P01"
"""Allowed only where a transaction has several statements of its own: one call never deadlocks."""

_SHARED = "{base}-shared"
_ROW = "insert into users (id, tenant, role, total_coins) values ({key}, 'acme', 'member', {coins})"


def _adapter(step: Step, *allowed: str, once: int | None = None) -> Operation:
    return Operation((step,), frozenset({GONE, *allowed}), again=step, once=once)


def _plain(*steps: Step, allowed: tuple[str, ...] = ()) -> Operation:
    return Operation(steps, frozenset(allowed))


def _credit(key: str = "a", kind: str = "test") -> Ask:
    return lambda scene, name: Movement.credit(scene.words[key], 10, type=kind, idempotency_key=name)


def _long(key: str = "a") -> Ask:
    words = "goes the long way"
    return lambda scene, name: Movement.credit(
        scene.words[key], 10, type="test", idempotency_key=name, description=words
    )


def _debit(scene: Scene, name: str) -> Movement:
    return Movement.debit(scene.a, 3, type="test", idempotency_key=name)


def _transfer(payer: str, payee: str) -> Ask:
    return lambda scene, name: Movement.transfer(
        scene.words[payer], scene.words[payee], 4, type="test", idempotency_key=name
    )


def _moved(source: str, target: str) -> Step:
    return statement(
        f"update users set id = {{{target}}} where id = {{{source}}} "
        "returning -total_coins as gone, total_coins as came",
        (source, "gone"),
        (target, "came"),
    )


def _failing(sqlstate: str) -> Step:
    return posting(_credit(kind=f"fail {sqlstate}"), tolerant=True, a=10)


def _passing_on(sqlstate: str) -> Operation:
    return Operation((_failing(sqlstate),), frozenset({GONE, sqlstate}), passed_on=sqlstate)


def _fold(scene: Scene, _number: int, connection: Connection) -> Effect:
    connection.exec_driver_sql("select wallet.fold_system_accounts()")
    scene.whole = True
    return {}


def _emptied(locked: str, action: str) -> Step:
    """Something done to the partition of A and B, after which their rows are gone: frozen money stays in the ledger."""
    query = (
        "select u.id, u.total_coins from users_{base} as u where not exists (select from wallet.accounts as a "
        "where a.mapping = 'users' and a.key = u.id::text and a.state = 'frozen')"
    )

    def step(scene: Scene, _number: int, connection: Connection) -> Effect:
        connection.exec_driver_sql(f"lock table {locked} in access exclusive mode".format(**scene.words))
        rows = connection.exec_driver_sql(query.format(**scene.words)).all()
        connection.exec_driver_sql(action.format(**scene.words))
        scene.detached |= "detach" in action
        return {row.id: -row.total_coins for row in rows}

    return step


_RAW = statement("update users set total_coins = total_coins + 7 where id = {a} returning 7 as got", ("a", "got"))
_DELETE = statement("delete from users where id = {a} returning -total_coins as got", ("a", "got"))
_NEW = statement(_ROW.format(key="{c}", coins=20) + " returning 20 as got", ("c", "got"))

_WRITES = {
    "credit": _adapter(posting(_credit(), a=10)),
    "debit": _adapter(posting(_debit, a=-3)),
    "long": _adapter(posting(_long(), a=10)),
    "off": _adapter(posting(_credit(), flags="off", a=10)),
    "pay": _adapter(posting(_transfer("a", "b"), a=-4, b=4)),
    "repay": _adapter(posting(_transfer("b", "a"), a=4, b=-4)),
    "pay_off": _adapter(posting(_transfer("a", "b"), flags="off", a=-4, b=4)),
    "repay_off": _adapter(posting(_transfer("b", "a"), flags="off", a=4, b=-4)),
    "raw": _plain(_RAW, allowed=(FROZEN,)),
    "insert": _plain(
        statement(
            _ROW.format(key="{a}", coins=20)
            + " on conflict (id) do update set total_coins = users.total_coins + 20 returning 20 as got",
            ("a", "got"),
        ),
        allowed=(FROZEN,),
    ),
    "new": _plain(_NEW, allowed=(TAKEN,)),
    "delete": _plain(_DELETE, allowed=(FROZEN,)),
    "reinsert": _plain(
        _DELETE,
        statement(_ROW.format(key="{a}", coins=40) + " returning 40 as got", ("a", "got")),
        allowed=(FROZEN, DEADLOCK, TAKEN),
    ),
    "swap": _plain(_moved("a", "spare"), _moved("b", "a"), _moved("spare", "b"), allowed=(FROZEN, DEADLOCK, TAKEN)),
}
_JOBS = {
    "backfill": Operation((statement("select * from wallet.backfill_users('{base}', '{upto}', null)"),), job=True),
    "freeze": Operation(
        (statement("select * from wallet.freeze_users('{base}', '{upto}')"),),
        job=True,
        before="update wallet.control set phase = 'frozen' where phase <> 'frozen'",
    ),
    "unfreeze": Operation(
        (statement("select * from wallet.unfreeze_users('{base}', '{upto}')"),),
        job=True,
        before="update wallet.control set phase = 'wallet_only' where phase <> 'wallet_only'",
    ),
    "stop": Operation((stop,), job=True),
    "fold": Operation((_fold,), job=True),
}
_KEYS = {
    "same": _adapter(posting(_credit(), key=_SHARED, a=10), REUSED, once=10),
    "same_long": _adapter(posting(_long(), key=_SHARED, a=10), REUSED, once=10),
    "same_off": _adapter(posting(_credit(), key=_SHARED, flags="off", a=10), REUSED, once=10),
    "same_failed": _adapter(posting(_credit(kind="fail 23514"), key=_SHARED, tolerant=True, a=10), REUSED, once=10),
    "same_other": _adapter(posting(_credit("b"), key=_SHARED, b=10), REUSED, once=10),
    "batch": _adapter(postings((_credit(), {"a": 10}, "{base}-x"), (_credit("b"), {"b": 10}, "{base}-y")), once=20),
    "batch_back": _adapter(
        postings((_credit("b"), {"b": 10}, "{base}-y"), (_credit(), {"a": 10}, "{base}-x")), once=20
    ),
}
_FAILURES = {
    "fail_check": _adapter(_failing("23514")),
    "fail_serial": _passing_on("40001"),
    "fail_deadlock": _passing_on("40P01"),
    "fail_lock": _passing_on("55P03"),
}
_FORGERIES = {
    "forged": _plain(in_turn(forged("a", 7), _RAW), allowed=(FROZEN,)),
    "forged_off": _plain(in_turn(forged("a", 7, dual=False), _RAW), allowed=(FROZEN,)),
    "forged_amount": _plain(in_turn(forged("a", 8), _RAW), allowed=(FROZEN,)),
    "forged_key": _plain(in_turn(forged("b", 7), _RAW), allowed=(FROZEN,)),
    "after_adapter": _plain(posting(_credit(), a=10), _RAW, allowed=(FROZEN, GONE)),
    "after_savepoint": _plain(undone(posting(_credit(), a=10)), _RAW, allowed=(FROZEN, GONE)),
    "after_forgery": _plain(undone(in_turn(forged("a", 7), _RAW)), _RAW, allowed=(FROZEN,)),
}
_READERS = {
    "read": _plain(read, read, allowed=(GONE,)),
    "read_in_two": _plain(ask_state, read_there),
}
_PARTITIONS = {
    "truncate": _plain(_emptied("users_{base}", "truncate users_{base}"), allowed=(FROZEN, UNSEEN)),
    "detach": _plain(_emptied("users", "alter table users detach partition users_{base}")),
    "attach": _plain(
        statement("create table users_{base}_late partition of users for values from ({c}) to ({spare})"), _NEW
    ),
}
_MODES = {
    f"to_{mode}": Operation((statement(f"select torture_mode('{mode}')"),), job=True)
    for mode in ("stale", "mirror", "reject")
}
OPERATIONS: dict[str, Operation] = {
    **_MODES,
    **_WRITES,
    **_JOBS,
    **_KEYS,
    **_FAILURES,
    **_FORGERIES,
    **_READERS,
    **_PARTITIONS,
}

BYPASSES = frozenset(
    {
        *("raw", "insert", "delete", "reinsert", "swap", "truncate"),
        *("forged_key", "after_adapter", "after_savepoint", "after_forgery"),
    }
)
"""Operations that write the column of rows that are there, or take the rows away, past the adapter."""

STEADY = frozenset(
    {
        *("credit", "debit", "long", "pay", "repay", "same", "same_long", "batch", "batch_back"),
        *("raw", "insert", "new", "backfill", "freeze", "unfreeze", "fold", "read", "attach"),
        *("forged_key", "after_adapter", "after_savepoint", "after_forgery"),
    }
)
"""Operations after which no account that mirror follows is stale."""

MIRRORING = frozenset(
    {
        *("credit", "debit", "long", "pay", "repay", "same", "same_long", "same_other", "batch", "batch_back"),
        *("backfill", "unfreeze", "after_adapter", "forged"),
    }
)
"""Operations after which an account may be mirrored that was not."""

TAKING = frozenset({"delete", "reinsert", "swap", "truncate", "detach"})
"""Operations by which a row is gone, if only for a moment."""

_ACCOUNT = (
    "insert into wallet.accounts (mapping, key, bucket, currency, state, balance) "
    "values ('users', '{{{0}}}', 'cash', 'EUR', 'mirrored', 0) on conflict (mapping, key, bucket, currency) "
    "do update set state_reason = 'held'"
)
HOLDS: dict[str, str] = {
    "row": "select from users where id = {a} for update",
    "rowB": "select from users where id = {b} for update",
    # An account that is not there is held by its unique index entry.
    "account": _ACCOUNT.format("a"),
    "accountB": _ACCOUNT.format("b"),
    "key": "insert into wallet.idempotency_keys (key, request, mode) "
    "values ('{base}-1', '00000000-0000-4000-8000-000000000000', 'legacy')",
    "control": "lock table wallet.control in access exclusive mode",
    "line": "alter sequence wallet.line owner to current_user",
    "ceiling": "alter sequence wallet.ceiling owner to current_user",
    # Between the ledger's balance and its transaction; between the ledger and the legacy column.
    "journal": "lock table wallet.transactions in share mode",
    "legacy": "lock table users in share mode",
    # Between the account's state and the catalogue.
    "catalogue": "lock table wallet.bypasses in share mode",
}
"""What a further session takes and rolls back. A table lock lets all who wait go on at once; a row's, one by one."""
