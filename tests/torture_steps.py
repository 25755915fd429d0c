"""What the steps of the torture are made of: the scene they play in, statements past the adapter, and postings."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from decimal import Decimal

from sqlalchemy import Connection

from walletmigrate.adapter import LegacyBalanceAdapter
from walletmigrate.config import Settings
from walletmigrate.flags import DUAL_WRITE, READ_FROM_LEDGER, StaticSource
from walletmigrate.movements import Movement, prepare
from walletmigrate.postings import Calls, Posting

Effect = dict[int, Decimal]
"""By how much a step changed the true balance of each key, if its transaction commits."""


@dataclass
class Scene:
    """The keys of one order: A and B have rows at the start (unless closed), C and the spare one have none.

    ``states`` are those of A and B at the start, ``phase`` and ``mode`` those of the migration and the fence; ``modes``
    are those that the fence has or may get. ``truth`` is what the committed operations make of each key, ``snapshots``
    what it was when a session took its snapshot, ``memory`` what a session has read.
    """

    base: int
    adapters: dict[str, LegacyBalanceAdapter]
    truth: dict[int, Decimal]
    states: tuple[str, str]
    phase: str
    mode: str
    stopped: bool = False
    modes: frozenset[str] = frozenset({"stale"})
    role: str = ""
    tolerant: bool = False
    whole: bool = False
    detached: bool = False
    waited: bool = False
    complaints: list[str] = field(default_factory=list)
    snapshots: dict[int, dict[int, Decimal]] = field(default_factory=dict)
    memory: dict[int, object] = field(default_factory=dict)

    @property
    def a(self) -> int:
        return self.base + 1

    @property
    def b(self) -> int:
        return self.base + 2

    @property
    def c(self) -> int:
        return self.base + 3

    @property
    def words(self) -> dict[str, int]:
        """What stands in the braces of a statement."""
        return {
            "base": self.base,
            "a": self.a,
            "b": self.b,
            "c": self.c,
            "spare": self.base + 4,
            "upto": self.base + 10,
        }

    def add(self, effects: Iterable[Effect]) -> None:
        """Take what was committed into the truth."""
        for effect in effects:
            for key, change in effect.items():
                self.truth[key] += change

    def seen(self, number: int) -> dict[int, Decimal]:
        """The truth that a statement of this session has to see."""
        return self.snapshots.get(number, self.truth)


Step = Callable[[Scene, int, Connection], Effect]
Ask = Callable[[Scene, str], Movement]


@dataclass(frozen=True)
class Operation:
    """Statements of one transaction, and the SQLSTATEs and refusals that it may meet.

    ``before`` is a statement that commits first; ``again`` is what the caller sends again under its idempotency key.
    ``once`` is the sum that operations with the same keys may move together, however many there are. ``passed_on`` is
    an error of the ledger leg that the caller gets.
    """

    steps: tuple[Step, ...]
    allowed: frozenset[str] = frozenset()
    job: bool = False
    before: str = ""
    again: Step | None = None
    once: int | None = None
    passed_on: str = ""


def adapters(settings: Settings) -> dict[str, LegacyBalanceAdapter]:
    """Adapters of processes with dual-write on, off, and on with reads from the ledger."""
    flags = {"on": {DUAL_WRITE: True}, "off": {DUAL_WRITE: False}, "read": {DUAL_WRITE: True, READ_FROM_LEDGER: True}}
    return {name: LegacyBalanceAdapter(settings, StaticSource(asked)) for name, asked in flags.items()}


def statement(sql: str, *changes: tuple[str, str]) -> Step:
    """SQL past the adapter; ``changes`` are (key, column of the row that comes back)."""

    def step(scene: Scene, number: int, connection: Connection) -> Effect:
        before = _posted(connection) if changes and scene.stopped else None
        result = connection.exec_driver_sql(sql.format(**scene.words))
        row = result.first() if changes else None
        if before is not None and _posted(connection) != before:
            scene.complaints.append(f"session {number}'s raw write was posted although the line had been stopped")
        return {} if row is None else {scene.words[key]: Decimal(getattr(row, column)) for key, column in changes}

    return step


def postings(*asked: tuple[Ask, dict[str, int], str], flags: str = "on", tolerant: bool = False) -> Step:
    """One call of the adapter. Each movement with what it changes, unless it is a replay, and its key."""

    def step(scene: Scene, number: int, connection: Connection) -> Effect:
        stopped, effect = scene.stopped, Effect()
        scene.tolerant |= tolerant
        movements = [ask(scene, key.format(base=scene.base, number=number)) for ask, _, key in asked]
        results = scene.adapters[flags].apply(connection, movements)
        for result, (_, changes, _) in zip(results, asked, strict=True):
            _complain(scene, number, result, stopped=stopped)
            for name, change in () if result.replayed else changes.items():
                effect[scene.words[name]] = effect.get(scene.words[name], Decimal(0)) + change
        return effect

    return step


def posting(
    ask: Ask, *, flags: str = "on", key: str = "{base}-{number}", tolerant: bool = False, **changes: int
) -> Step:
    """One movement by itself."""
    return postings((ask, changes, key), flags=flags, tolerant=tolerant)


def in_turn(*steps: Step) -> Step:
    """Several steps as one, without a chance for others in between unless one waits."""

    def step(scene: Scene, number: int, connection: Connection) -> Effect:
        effect = Effect()
        for each in steps:
            for key, change in each(scene, number, connection).items():
                effect[key] = effect.get(key, Decimal(0)) + change
        return effect

    return step


def undone(step: Step) -> Step:
    """A step in a savepoint that is rolled back."""

    def undo(scene: Scene, number: int, connection: Connection) -> Effect:
        connection.exec_driver_sql("savepoint torture")
        step(scene, number, connection)
        connection.exec_driver_sql("rollback to savepoint torture")
        return {}

    return undo


def forged(name: str, amount: int, *, dual: bool = True) -> Step:
    """A label that nobody but the adapter should set: a credit of ``amount`` to the key ``name``."""

    def step(scene: Scene, _number: int, connection: Connection) -> Effect:
        mapping = scene.adapters["on"].mapping
        request = prepare(
            Movement.credit(scene.words[name], amount, type="forged"), mapping, "integer", "nobody"
        ).request
        label = Calls("wallet", mapping).plain({**request, "dual": dual})[-1]
        connection.exec_driver_sql("select set_config('walletmigrate.posting', %s, true)", (label,))
        return {}

    return step


def read(scene: Scene, number: int, connection: Connection) -> Effect:
    """A read by the adapter: one statement, and what it says is true in its snapshot."""
    found = scene.adapters["read"].balance(connection, scene.a)
    _compare(scene, number, found.amount, f"from {found.source}")
    return {}


def ask_state(scene: Scene, number: int, connection: Connection) -> Effect:
    """The first half of a reader in two statements: where the money stands."""
    query = "select state::text from wallet.accounts where mapping = 'users' and key = %s"
    scene.memory[number] = connection.exec_driver_sql(query, (str(scene.a),)).scalar()
    return {}


def read_there(scene: Scene, number: int, connection: Connection) -> Effect:
    """The second half: the balance from where the first half said that it stands."""
    if scene.memory[number] in ("mirrored", "frozen"):
        query = f"select balance from wallet.accounts where mapping = 'users' and key = '{scene.a}'"
    else:
        query = f"select total_coins from users where id = {scene.a}"
    _compare(scene, number, Decimal(connection.exec_driver_sql(query).scalar() or 0), f"as {scene.memory[number]}")
    return {}


def stop(scene: Scene, _number: int, connection: Connection) -> Effect:
    """The line, from the next statement of everybody on."""
    connection.exec_driver_sql("select wallet.set_line(false)")
    scene.stopped = True
    return {}


def _posted(connection: Connection) -> int:
    """How many transactions of the ledger this transaction of the database has written."""
    query = "select count(*) from wallet.transactions where xid = pg_current_xact_id_if_assigned()::text::bigint"
    return int(connection.exec_driver_sql(query).scalar_one())


def _compare(scene: Scene, number: int, amount: Decimal, source: str) -> None:
    true = scene.seen(number)[scene.a]
    if amount != true:
        scene.complaints.append(f"session {number} read {amount} {source}, and {true} was true")


def _complain(scene: Scene, number: int, result: Posting, *, stopped: bool) -> None:
    if stopped and result.mode == "dual_write" and not result.replayed:
        scene.complaints.append(f"session {number} wrote the ledger although the line had been stopped before")
    if (result.mismatch or result.outcome == "ledger_failed") and not scene.tolerant:
        scene.complaints.append(f"session {number}: {result}")
