"""Sessions that run programs: who may do what, and each step that a session can take next."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from model import transactions
from model.server import Blocked, Done, Raised, Seen, Server
from model.statements import Commit, Request, Steps
from model.transactions import Database, Transaction

FOREVER = -1


@dataclass(frozen=True)
class Program:
    """One transaction that an actor may run. `start` makes it anew; `isolated`: at snapshot isolation."""

    name: str
    isolated: bool
    start: Callable[[], Steps[None]]


@dataclass(frozen=True)
class Actor:
    """A session that runs `transactions` (or FOREVER) of its programs, any of them each time.

    `keys` are the idempotency keys it uses. Actors of one `kind` are interchangeable.
    """

    name: str
    kind: str
    programs: tuple[Program, ...]
    transactions: int = 1
    keys: frozenset[str] = frozenset()
    moves_line: bool = False
    moves_phase: bool = False


class Local(NamedTuple):
    """Where a session stands: transactions left, and the one that runs."""

    left: int
    transaction: Transaction | None = None


@dataclass(frozen=True)
class Move:
    """One step of a session. `changes`: what its commit did to others' snapshots. `broken`: an invariant."""

    words: tuple[str, ...]
    local: Local
    database: Database
    changes: int = 0
    broken: str | None = None


class _Node:
    """Where a program stands: after these answers, with this request."""

    __slots__ = ("children", "index", "parent", "program", "request", "result")

    def __init__(self, index: int, program: Program, parent: _Node | None, result: Any, request: Request) -> None:
        self.index = index
        self.program = program
        self.parent = parent
        self.result = result
        self.request = request
        self.children: dict[Any, _Node] = {}


class Sessions:
    """The steps of all sessions. Programs are run once for each row of answers, and remembered."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self._nodes: list[_Node] = []
        self._roots: dict[int, _Node] = {}

    def isolated(self, transaction: Transaction) -> bool:
        """Whether it runs at snapshot isolation."""
        return self._nodes[transaction.node].program.isolated

    def moves(self, actor: Actor, local: Local, database: Database, others: int) -> tuple[list[Move], int]:
        """Every step that the session can take, and the bits that it waits for."""
        if local.transaction is not None:
            moves, blocked = self._step(local.left, local.transaction, database, others)
            if local.transaction.work.holds:
                moves.append(Move(("is rolled back",), Local(local.left), database))
            return moves, blocked
        moves = []
        if local.left:
            left = local.left if local.left == FOREVER else local.left - 1
            for program in actor.programs:
                begun = Transaction(self._root(program).index)
                for start in self._run_on(left, begun, database, (f"begins: {program.name}",)):
                    assert start.local.transaction is not None
                    steps, _ = self._step(left, start.local.transaction, database, others)
                    moves += [replace(step, words=(*start.words, *step.words)) for step in steps]
        return moves, 0

    def _step(self, left: int, transaction: Transaction, database: Database, others: int) -> tuple[list[Move], int]:
        node = self._nodes[transaction.node]
        if isinstance(node.request, Commit) and transaction.work.holds:
            committed, changes, broken = transactions.commit(transaction.work, database)
            return [Move(("commits",), Local(left), committed, changes, broken)], 0
        if self.server.local(node.request, transaction, node.program.isolated):
            return self._run_on(left, transaction, database, ()), 0
        answer = self.server.answer(node.request, transaction, database, others, node.program.isolated)
        match answer:
            case Blocked(on):
                return [], on
            case Raised(words):
                return [Move((words, "is rolled back"), Local(left), database)], 0
            case Seen(seen, words):
                return [Move((words,), Local(left, seen), database)], 0
        assert isinstance(answer, Done)
        return self._answered(left, node, answer, database, ()), 0

    def _answered(self, left: int, node: _Node, done: Done, database: Database, words: tuple[str, ...]) -> list[Move]:
        after = done.transaction._replace(node=self._child(node, done.result).index)
        database = done.database or database
        words = (*words, done.words) if done.words else words
        if done.broken:
            return [Move(words, Local(left, after), database, 0, done.broken)]
        return self._run_on(left, after, database, words)

    def _run_on(self, left: int, transaction: Transaction, database: Database, words: tuple[str, ...]) -> list[Move]:
        """Go on through whatever others cannot notice."""
        node = self._nodes[transaction.node]
        if not self.server.local(node.request, transaction, node.program.isolated):
            return [Move(words, Local(left, transaction), database)]
        if isinstance(node.request, Commit):
            return [Move((*words, "ends"), Local(left), database)]
        answer = self.server.answer(node.request, transaction, database, 0, node.program.isolated)
        if isinstance(answer, Raised):
            return [Move((*words, answer.words, "is rolled back"), Local(left), database)]
        options = answer if isinstance(answer, tuple) else (answer,)
        moves: list[Move] = []
        for done in options:
            assert isinstance(done, Done)
            moves += self._answered(left, node, done, database, words)
        return moves

    def _root(self, program: Program) -> _Node:
        if id(program) not in self._roots:
            self._roots[id(program)] = self._node(program, None, None, [])
        return self._roots[id(program)]

    def _child(self, node: _Node, result: Any) -> _Node:
        if result not in node.children:
            answers = [result]
            at: _Node | None = node
            while at is not None and at.parent is not None:
                answers.append(at.result)
                at = at.parent
            node.children[result] = self._node(node.program, node, result, answers[::-1])
        return node.children[result]

    def _node(self, program: Program, parent: _Node | None, result: Any, answers: list[Any]) -> _Node:
        steps = program.start()
        request: Request
        try:
            request = next(steps)
            for answer in answers:
                request = steps.send(answer)
        except StopIteration:
            request = Commit()
        node = _Node(len(self._nodes), program, parent, result, request)
        self._nodes.append(node)
        return node
