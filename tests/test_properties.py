"""The whole protocol against a model of it: whatever happens in whatever order, the database agrees with the model.

The model keeps, for each user, the legacy balance, the state and balance of the ledger account, and the entries of its
history, as the protocol's table gives them. After every step the database must hold exactly that, and be sound.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from sqlalchemy import Connection, Engine, text
from sqlalchemy.engine.interfaces import IsolationLevel
from sqlalchemy.exc import DBAPIError

import servers
from conftest import MakeDatabase
from interleaving import LEVELS
from invariants import violations
from ledger import install_users
from walletmigrate import connect
from walletmigrate.adapter import LegacyBalanceAdapter
from walletmigrate.config import Settings
from walletmigrate.errors import IdempotencyKeyReused, InsufficientFunds, NotReversible, UnknownAccount
from walletmigrate.flags import DUAL_WRITE, StaticSource
from walletmigrate.ledger import Entry
from walletmigrate.postings import Posting

USERS = (1, 2, 3)
FROZEN_COLUMN = "WM030"

users = st.sampled_from(USERS)
amounts = st.integers(1, 12000).map(lambda cents: Decimal(cents) / 100)
levels = st.sampled_from(LEVELS)
counts = st.integers(1, len(USERS))
"""How far a job gets before it is interrupted."""
keys = st.none() | st.sampled_from(["k1", "k2", "k3"])

Kind = tuple[str, str]
"""An entry's kind and type."""
Refusal = type[Exception]
Call = Callable[[Connection], Posting]


@dataclass
class Account:
    """A ledger account of the model."""

    state: str
    balance: Decimal


@dataclass(frozen=True)
class Line:
    """An entry of an account's history, as the model knows it. ``amount`` is signed."""

    kind: Kind
    amount: Decimal
    balance: Decimal

    @classmethod
    def read(cls, entry: Entry) -> Line:
        """The same of an entry that the ledger gives, whose other figures must go with these."""
        assert entry.direction == ("credit" if entry.amount > 0 else "debit")
        assert entry.balance_before + entry.amount == entry.balance_after
        return cls((entry.kind, entry.type), entry.amount, entry.balance_after)


@dataclass
class Moved:
    """A transaction of the model that can be reversed: who paid and who was paid, None for the outside world."""

    payer: int | None
    payee: int | None
    amount: Decimal
    type: str
    half: bool
    reversal: Posting | None = None


@dataclass
class Model:
    """What must be true. ``legacy`` has the rows that exist, ``accounts`` the accounts that are not absent.

    ``lines`` are the entries of each user's account in the order of posting, ``stirred`` the users who got one since
    the database was last held against them.
    """

    legacy: dict[int, Decimal]
    accounts: dict[int, Account] = field(default_factory=dict)
    lines: dict[int, list[Line]] = field(default_factory=lambda: {user: [] for user in USERS})
    stirred: set[int] = field(default_factory=set)
    phase: str = "dual_write"
    flag: bool = True
    running: bool = True

    def mode(self, user: int) -> str:
        account = self.accounts.get(user)
        if account and account.state == "frozen":
            return "ledger"
        if not (self.flag and self.running and self.phase != "legacy"):
            return "legacy"
        return "ledger" if account is None and self.phase == "frozen" else "dual_write"

    def balance(self, user: int) -> Decimal:
        """The balance that counts."""
        account = self.accounts.get(user)
        return account.balance if account and account.state == "frozen" else self.legacy[user]

    def move(self, user: int, change: Decimal, kind: Kind) -> None:
        mode = self.mode(user)
        account = self.accounts.get(user)
        if mode == "legacy":
            self.legacy[user] += change
            if account and account.state == "mirrored" and change:
                account.state = "stale"
            return
        if account is None or account.state == "stale":
            account = self.bring_up(user, "frozen" if mode == "ledger" else "mirrored")
        account.balance += change
        self._enter(user, kind, change)
        if mode == "dual_write":
            self.legacy[user] += change

    def bring_up(self, user: int, state: str) -> Account:
        """An account that is absent or stale gets the legacy balance: an opening, or a resync."""
        before = self.accounts.get(user)
        account = self.accounts[user] = Account(state, self.legacy[user])
        kind = "opening" if before is None else "resync"
        self._enter(user, (kind, kind), account.balance - (before.balance if before else 0))
        return account

    def _enter(self, user: int, kind: Kind, change: Decimal) -> None:
        """An entry, with the balance that the account has now; what changes nothing is none."""
        if change:
            self.lines[user].append(Line(kind, change, self.accounts[user].balance))
            self.stirred.add(user)

    def written(self, user: int) -> None:
        """A raw write of the row, which now is as ``legacy`` has it."""
        account = self.accounts.get(user)
        if account is None:
            return
        if user not in self.legacy:
            account.state = "closed"
        elif account.state == "closed" or (account.state == "mirrored" and account.balance != self.legacy[user]):
            account.state = "stale"

    def frozen(self, user: int) -> bool:
        return self.mode(user) == "ledger" and user in self.accounts


class Protocol(RuleBasedStateMachine):
    """One database for one run."""

    make: Callable[[], tuple[Engine, Settings, ExitStack]]

    def __init__(self) -> None:
        super().__init__()
        self.engine, self.settings, self.resources = type(self).make()
        self.source = StaticSource({DUAL_WRITE: True})
        self.adapter = LegacyBalanceAdapter(self.settings, self.source)
        self.model = Model({user: Decimal(100) for user in USERS})
        self.moved: dict[int, Moved] = {}
        self.first: dict[str, tuple[tuple[Any, ...], Posting]] = {}

    def teardown(self) -> None:
        self.resources.close()

    # Postings

    @rule(user=users, amount=amounts, key=keys, level=levels)
    def credit(self, user: int, amount: Decimal, key: str | None, level: IsolationLevel) -> None:
        call = self._call("credit", user, amount, key=key)
        self._post(call, level, ("credit", user, amount), None, user, amount, key)

    @rule(user=users, amount=amounts, key=keys, level=levels)
    def debit(self, user: int, amount: Decimal, key: str | None, level: IsolationLevel) -> None:
        call = self._call("debit", user, amount, key=key)
        self._post(call, level, ("debit", user, amount), user, None, amount, key)

    @rule(payer=users, step=st.integers(1, len(USERS) - 1), amount=amounts, key=keys, level=levels)
    def transfer(self, payer: int, step: int, amount: Decimal, key: str | None, level: IsolationLevel) -> None:
        payee = (payer + step - 1) % len(USERS) + 1
        call = self._call("transfer", payer, payee, amount, key=key)
        self._post(call, level, ("transfer", payer, payee, amount), payer, payee, amount, key)

    @rule(user=users, balance=st.integers(-5000, 30000).map(lambda cents: Decimal(cents) / 100), level=levels)
    def set_balance(self, user: int, balance: Decimal, level: IsolationLevel) -> None:
        def call(connection: Connection) -> Posting:
            return self.adapter.set_balance(connection, user, balance, actor="admin", reason="test")

        if user not in self.model.legacy:
            self._refused(call, level, UnknownAccount)
            return
        change = balance - self.model.balance(user)
        posted = self._run(call, level)
        payer, payee = (None, user) if change > 0 else (user, None)
        self._moved(posted, payer, payee, abs(change), ("correction", "set_balance"))

    @precondition(lambda self: self.moved)
    @rule(data=st.data(), level=levels)
    def reverse(self, data: st.DataObject, level: IsolationLevel) -> None:
        number = data.draw(st.sampled_from(sorted(self.moved)), label="transaction")
        original = self.moved[number]
        payer, payee = original.payee, original.payer

        def call(connection: Connection) -> Posting:
            return self.adapter.reverse(connection, number, reason="test")

        if original.half:
            self._refused(call, level, NotReversible)
        elif original.reversal is not None:
            self._replays(call, level, original.reversal)
        elif not self._rows_of(payer, payee):
            self._refused(call, level, UnknownAccount)
        elif payer is not None and self.model.balance(payer) < original.amount:
            self._refused(call, level, InsufficientFunds)
        else:
            original.reversal = self._run(call, level)
            self._moved(original.reversal, payer, payee, original.amount, ("reversal", original.type))

    @rule(user=users, amount=amounts, level=levels)
    def credit_and_roll_back(self, user: int, amount: Decimal, level: IsolationLevel) -> None:
        with self._transaction(level) as connection:
            savepoint = connection.begin_nested()
            if user in self.model.legacy:
                self.adapter.credit(connection, user, amount, type="test")
            savepoint.rollback()

    # Writes past the adapter

    @rule(user=users, amount=st.integers(-3, 3), level=levels)
    def raw_update(self, user: int, amount: int, level: IsolationLevel) -> None:
        statement = f"update users set total_coins = total_coins + {amount} where id = {user}"
        if user in self.model.legacy and amount and self.model.frozen(user):
            self._rejected(statement, level)
            return
        self._write(statement, level)
        if user in self.model.legacy and amount:
            self.model.legacy[user] += amount
            self.model.written(user)

    @rule(user=users, level=levels)
    def raw_delete(self, user: int, level: IsolationLevel) -> None:
        statement = f"delete from users where id = {user}"
        if self.model.frozen(user):
            self._rejected(statement, level)
            return
        self._write(statement, level)
        if self.model.legacy.pop(user, None) is not None:
            self.model.written(user)

    @precondition(lambda self: len(self.model.legacy) < len(USERS))
    @rule(balance=st.integers(-5, 200), level=levels)
    def raw_insert(self, balance: int, level: IsolationLevel) -> None:
        user = next(user for user in USERS if user not in self.model.legacy)
        self._write(f"insert into users (id, tenant, role, total_coins) values ({user}, 'a', 'b', {balance})", level)
        self.model.legacy[user] = Decimal(balance)
        self.model.written(user)

    # What an operator does

    @rule(on=st.booleans())
    def flip(self, on: bool) -> None:
        self.source.set({DUAL_WRITE: on})
        self.model.flag = on

    @rule(running=st.booleans())
    def line(self, running: bool) -> None:
        self._job(f"select wallet.set_line({running})")
        self.model.running = running

    @precondition(lambda self: self.model.phase != "frozen")
    @rule(phase=st.sampled_from(["legacy", "dual_write", "read_ledger"]))
    def step(self, phase: str) -> None:
        self._phase(phase)

    @precondition(lambda self: self.model.phase != "legacy")
    @rule(count=counts)
    def backfill(self, count: int) -> None:
        self._job(f"select * from wallet.backfill_users(null, {_last(count)}, null)")
        for user in self._first_users(count):
            account = self.model.accounts.get(user)
            if account is None:
                state = "frozen" if self.model.phase == "frozen" else "mirrored"
                self.model.bring_up(user, state)
            elif account.state == "stale":
                self.model.bring_up(user, "mirrored")

    @precondition(lambda self: self.model.phase != "legacy")
    @rule(count=counts)
    def freeze(self, count: int) -> None:
        self._phase("frozen")
        self._job(f"select * from wallet.freeze_users(null, {_last(count)})")
        for user in self._first_users(count):
            account = self.model.accounts.get(user)
            if account and account.state == "mirrored":
                account.state = "frozen"

    @precondition(lambda self: any(account.state == "frozen" for account in self.model.accounts.values()))
    @rule(count=counts)
    def unfreeze(self, count: int) -> None:
        self._phase("wallet_only")
        self._job(f"select * from wallet.unfreeze_users(null, {_last(count)})")
        for user in self._first_users(count):
            account = self.model.accounts.get(user)
            if account and account.state == "frozen":
                account.state = "mirrored"
                self.model.legacy[user] = account.balance

    @rule()
    def fold(self) -> None:
        self._job("select wallet.fold_system_accounts()")

    @rule(user=users, limit=st.integers(1, 5))
    def read_the_newest(self, user: int, limit: int) -> None:
        with self._transaction("READ COMMITTED") as connection:
            page = self.adapter.history(connection, user, limit=limit)
            assert [Line.read(entry) for entry in page] == self.model.lines[user][::-1][:limit]
            if page:
                older = self.adapter.history(connection, user, before=page[-1].transaction_id)
                assert [Line.read(entry) for entry in older] == self.model.lines[user][::-1][limit:][:50]

    # What must hold after each of them

    @invariant()
    def the_database_is_as_the_model_says(self) -> None:
        with self._transaction("READ COMMITTED") as connection:
            legacy = connection.execute(text("select id, total_coins from users"))
            assert {row[0]: row[1] for row in legacy} == self.model.legacy
            accounts = connection.execute(text("select key, state::text, balance from wallet.accounts"))
            found = {int(row[0]): Account(row[1], row[2]) for row in accounts}
            assert found == self.model.accounts
            assert violations(connection, self.settings) == []
            for user in self.model.stirred:
                entries = self.adapter.history(connection, user, limit=1000)[::-1]
                assert [Line.read(entry) for entry in entries] == self.model.lines[user]
                numbers = [entry.transaction_id for entry in entries]
                assert numbers == sorted(set(numbers))
        self.model.stirred.clear()

    # Means

    def _first_users(self, count: int) -> list[int]:
        return sorted(self.model.legacy)[:count]

    def _call(self, operation: str, *arguments: Any, key: str | None) -> Call:
        method = getattr(self.adapter, operation)
        reference = None if key is None else ("idempotency key", key)

        def call(connection: Connection) -> Posting:
            result = method(connection, *arguments, type="test", idempotency_key=key, reference=reference)
            assert isinstance(result, Posting)
            return result

        return call

    def _post(
        self,
        call: Call,
        level: IsolationLevel,
        request: tuple[Any, ...],
        payer: int | None,
        payee: int | None,
        amount: Decimal,
        key: str | None,
    ) -> None:
        """Post, and expect the refusal, the replay or the result that the model gives."""
        if key in self.first and self.first[key][0] != request:
            self._refused(call, level, IdempotencyKeyReused)
        elif key in self.first:
            self._replays(call, level, self.first[key][1])
        elif not self._rows_of(payer, payee):
            self._refused(call, level, UnknownAccount)
        elif payer is not None and self.model.balance(payer) < amount:
            self._refused(call, level, InsufficientFunds)
        else:
            posted = self._run(call, level)
            self._moved(posted, payer, payee, amount, ("posting", "test"))
            if key is not None:
                self.first[key] = (request, posted)

    def _moved(self, posted: Posting, payer: int | None, payee: int | None, amount: Decimal, kind: Kind) -> None:
        """Move the model's money, and compare the result with it."""
        sides = [user for user in (payer, payee) if user is not None]
        modes = {self.model.mode(user) for user in sides}
        for user, change in ((payer, -amount), (payee, amount)):
            if user is not None:
                self.model.move(user, change, kind)
        expected = next((mode for mode in ("dual_write", "ledger") if mode in modes), "legacy")
        assert (posted.mode, posted.replayed, posted.mismatch) == (expected, False, False)
        assert (posted.transaction_id is None) == (expected == "legacy" or amount == 0)
        if sides[0] == (payer or payee):
            for balance in (posted.legacy_balance, posted.ledger_balance):
                assert balance is None or balance == self.model.balance(sides[0])
        if kind[0] != "reversal" and posted.transaction_id is not None:
            self.moved[posted.transaction_id] = Moved(payer, payee, amount, kind[1], half="legacy" in modes)

    def _replays(self, call: Call, level: IsolationLevel, first: Posting) -> None:
        again = self._run(call, level)
        assert (again.replayed, again.outcome) == (True, "replayed")
        for name in ("transaction_id", "mode", "legacy_balance", "ledger_balance", "payee_ledger_balance"):
            assert getattr(again, name) == getattr(first, name)

    def _refused(self, call: Call, level: IsolationLevel, error: Refusal) -> None:
        """The refusal leaves the transaction usable, and what is committed with it is nothing."""
        with self._transaction(level) as connection:
            try:
                call(connection)
            except error:
                assert connection.scalar(text("select 1")) == 1
            else:
                raise AssertionError(f"no {error.__name__}")

    def _rejected(self, statement: str, level: IsolationLevel) -> None:
        try:
            self._write(statement, level)
        except DBAPIError as error:
            state = getattr(error.orig, "sqlstate", None)
        else:
            state = None
        assert state == FROZEN_COLUMN

    def _rows_of(self, *sides: int | None) -> bool:
        return all(user is None or user in self.model.legacy for user in sides)

    def _run(self, call: Call, level: IsolationLevel) -> Posting:
        with self._transaction(level) as connection:
            return call(connection)

    def _write(self, statement: str, level: IsolationLevel) -> None:
        with self._transaction(level) as connection:
            connection.exec_driver_sql(statement)

    def _job(self, statement: str) -> None:
        self._write(statement, "READ COMMITTED")

    def _phase(self, phase: str) -> None:
        self._write(f"update wallet.control set phase = '{phase}'", "READ COMMITTED")
        self.model.phase = phase

    def _transaction(self, level: IsolationLevel) -> Any:
        return self.engine.execution_options(isolation_level=level).begin()


def _last(count: int) -> str:
    """SQL for the key of the last of the first ``count`` users."""
    return f"(select upto from wallet.cut_users(null, null, {count}))"


def test_half_a_transfer_is_not_reversible_because_its_other_half_would_stay(database_url: str) -> None:
    """The payer is frozen, the payee in legacy alone: the transaction knows only the payer."""
    engine, configured = install_users(database_url, rows=2, phase="dual_write")
    source = StaticSource({DUAL_WRITE: True})
    adapter = LegacyBalanceAdapter(configured, source)
    with engine.begin() as connection:
        adapter.credit(connection, 1, 5, type="test")
        connection.exec_driver_sql("select * from wallet.freeze_users(null, '1')")
        source.set({DUAL_WRITE: False})
        half = adapter.transfer(connection, 1, 2, 10, type="test")
        assert half.mode == "ledger"
        assert [half.ledger_balance, half.payee_legacy_balance] == [95, 110]
        with pytest.raises(NotReversible):
            adapter.reverse(connection, half.transaction_id or 0, reason="test")
        assert adapter.balance(connection, 1).amount + adapter.balance(connection, 2).amount == 205
    with engine.connect() as connection:
        assert violations(connection, configured) == []


@pytest.mark.parametrize("state", ["absent", "mirrored", "frozen"])
def test_personal_data_is_kept_in_its_side_table_whatever_way_a_posting_takes(database_url: str, state: str) -> None:
    engine, configured = install_users(database_url, rows=2, phase="dual_write")
    adapter = LegacyBalanceAdapter(configured, StaticSource({DUAL_WRITE: True}))
    with engine.begin() as connection:
        if state != "absent":
            adapter.open_account(connection, 1)
        if state == "frozen":
            connection.exec_driver_sql("select * from wallet.freeze_users(null, '1')")
        posted = adapter.credit(connection, 1, 5, type="test", description="a gift", address="a street")
        found = connection.exec_driver_sql(
            "select transaction_id, description, address from wallet.transaction_details"
        )
        assert [tuple(row) for row in found] == [(posted.transaction_id, "a gift", "a street")]


def test_a_retry_after_the_row_is_gone_gives_the_first_result(database_url: str) -> None:
    engine, configured = install_users(database_url, rows=2, phase="dual_write")
    adapter = LegacyBalanceAdapter(configured, StaticSource({DUAL_WRITE: True}))
    with engine.begin() as connection:
        first = adapter.debit(connection, 1, 5, type="test", idempotency_key="k")
        connection.exec_driver_sql("delete from users where id = 1")
        again = adapter.debit(connection, 1, 5, type="test", idempotency_key="k")
        assert (again.replayed, again.transaction_id) == (True, first.transaction_id)


@pytest.mark.timeout(1200)  # a database for each of its stories: minutes on a busy machine
def test_the_protocol_holds_in_every_order_of_events(server: servers.Postgres, make_database: MakeDatabase) -> None:
    template = make_database()
    _, configured = install_users(template, rows=len(USERS), floor=Decimal(0), phase="dual_write")
    name = template.rpartition("/")[2].partition("?")[0]

    def make() -> tuple[Engine, Settings, ExitStack]:
        with ExitStack() as stack:
            url = stack.enter_context(connect.scratch_database(server.url, name))
            engine = connect.engine(url, application_name="walletmigrate-test", pool_size=1, max_overflow=0)
            stack.callback(engine.dispose)
            return engine, configured, stack.pop_all()

    # A class of its own for each server: the machine is made without arguments.
    machine = type("Protocol", (Protocol,), {"make": staticmethod(make)})
    modest = settings(
        max_examples=25,
        stateful_step_count=40,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(machine, settings=modest)
