"""The worker processes of a rehearsal, seen from the parent: start, give orders, listen, never hang, stop."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection as Pipe
from multiprocessing.context import SpawnProcess
from types import TracebackType
from typing import Final, Self

from walletmigrate.errors import WalletMigrateError
from walletmigrate.rehearsal_messages import Assignment, Beat, Failed, Message, Order, Quit, Restart, Run, Tally
from walletmigrate.rehearsal_worker import work

STALL_SECONDS: Final = 120.0
"""How long no worker may get any further before the rehearsal gives up."""

_QUIT_SECONDS: Final = 10.0
_CHECK_SECONDS: Final = 0.2


@dataclass(eq=False)
class WorkersFailed(WalletMigrateError):
    """A worker ended, gave up or stands still; ``reasons`` say which and why."""

    reasons: Sequence[str]

    code = "workers_failed"

    def __str__(self) -> str:
        return "\n".join(self.reasons)


@dataclass(eq=False)
class _Member:
    assignment: Assignment
    process: SpawnProcess
    pipe: Pipe[Order, Message]
    listener: threading.Thread | None = None
    beat: Beat | None = None
    tally: Tally | None = None
    failed: bool = False
    killed: bool = False
    before: int = 0

    @property
    def name(self) -> str:
        return f"worker {self.assignment.number} (process {self.process.pid})"


class Crew:
    """All workers. A context manager: leaving it stops them, at once if it is left by an exception."""

    def __init__(self, assignments: Sequence[Assignment], heard: Callable[[int], None]) -> None:
        """``heard`` is told how many transactions are done, from other threads."""
        self.reasons: list[str] = []
        self.traces: list[str] = []
        self._assignments = assignments
        self._heard = heard
        self._members: list[_Member] = []
        self._condition = threading.Condition()
        self._stopping = False
        self._leg = -1
        self._before = 0
        self._started = self._moved = time.monotonic()

    @property
    def failed(self) -> bool:
        """Whether a worker failed; what runs beside the workers may then stop."""
        return bool(self.reasons)

    @property
    def done(self) -> int:
        """How many transactions are posted and committed."""
        return sum(member.beat.done for member in self._members if member.beat)

    def __enter__(self) -> Self:
        try:
            self._start()
            self._wait_for(lambda: all(member.beat for member in self._members))
        except BaseException:
            self._stop(at_once=True)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop(at_once=kind is not None)

    @property
    def quiet(self) -> bool:
        """Whether all traffic of the leg is done."""
        return all(member.tally for member in self._members)

    def run(self, leg: int, seconds: float = 0.0) -> None:
        """Let every worker post its share of a leg, spread over so many seconds (0: as fast as can be)."""
        with self._condition:
            self._leg, self._before = leg, self.done
            self._started = self._moved = time.monotonic()
            for member in self._members:
                member.tally, member.before = None, member.beat.done if member.beat else 0
        self._order(Run(leg, seconds))

    def replace_one(self) -> str:
        """Kill a worker amid the leg by SIGKILL, and give its whole share of the leg to a new process.

        Returns what was done. Raises WorkersFailed.
        """
        self._wait_for(lambda: self.quiet or any(_has_begun(member) for member in self._members))
        at = next((place for place, member in enumerate(self._members) if _has_begun(member)), 0)
        with self._condition:
            victim = self._members[at]
            victim.killed = True
        victim.process.kill()
        _end(victim.process)
        if victim.listener:
            victim.listener.join(_QUIT_SECONDS)
        victim.pipe.close()
        with self._condition, _interrupt_blocked():
            successor = self._members[at] = _hired(replace(victim.assignment, from_leg=self._leg))
        self._heed(successor)
        self._wait_for(lambda: successor.beat is not None)
        with contextlib.suppress(OSError):
            successor.pipe.send(Run(self._leg))
        return f"{victim.name} killed, its transactions sent again by process {successor.process.pid}"

    def wait_for_share(self, share: float) -> None:
        """Wait until this share (0 to 1) of the leg's transactions is done. Raises WorkersFailed."""
        wanted = self._before + share * sum(len(each.legs[self._leg]) for each in self._assignments)
        self._wait_for(lambda: self.done >= wanted)

    def finish(self) -> tuple[Tally, float]:
        """Wait for the end of the leg; give all counts and the seconds it took. Raises WorkersFailed."""
        self._wait_for(lambda: all(member.tally for member in self._members))
        total = Tally(self._leg)
        for member in self._members:
            if member.tally:
                total.add(member.tally)
        return total, self._moved - self._started

    def restart(self) -> None:
        """Let every worker start its application anew, amid its traffic. Raises WorkersFailed."""
        wanted = 1 + max((member.beat.restarts for member in self._members if member.beat), default=0)
        self._order(Restart())
        self._wait_for(lambda: all(m.beat and m.beat.restarts >= wanted for m in self._members))

    def wait_for_document(self, document_id: str) -> None:
        """Wait until every worker decides by this flag document. Raises WorkersFailed."""
        self._wait_for(lambda: all(m.beat and m.beat.document_id == document_id for m in self._members))

    def _start(self) -> None:
        with _interrupt_blocked():
            for assignment in self._assignments:
                self._members.append(_hired(assignment))
        for member in self._members:
            self._heed(member)

    def _heed(self, member: _Member) -> None:
        member.listener = threading.Thread(target=self._listen, args=(member,), daemon=True)
        member.listener.start()

    def _listen(self, member: _Member) -> None:
        try:
            while True:
                self._take(member, member.pipe.recv())
        except (EOFError, OSError):
            if self._stopping or member.failed or member.killed:
                return
            member.process.join(_QUIT_SECONDS)
            with self._condition:
                if not self._stopping:
                    self.reasons.append(f"{member.name} ended with exit code {member.process.exitcode}")
                self._condition.notify_all()

    def _take(self, member: _Member, message: Message) -> None:
        with self._condition:
            before = (self.done, member.beat.restarts if member.beat else -1)
            match message:
                case Beat():
                    member.beat = message
                case Tally():
                    member.tally = message
                case Failed():
                    member.failed = True
                    self.reasons.append(f"{member.name}: {message.what}")
                    self.traces += [message.trace] if message.trace else []
            done = self.done
            if isinstance(message, Tally) or before != (done, member.beat.restarts if member.beat else -1):
                self._moved = time.monotonic()
            self._condition.notify_all()
        self._heard(done)

    def _wait_for(self, ready: Callable[[], bool]) -> None:
        with self._condition:
            since = time.monotonic()
            while not ready():
                if not self.reasons and time.monotonic() - max(since, self._moved) > STALL_SECONDS:
                    self.reasons.append(f"no worker got any further for {STALL_SECONDS:.0f} seconds")
                if self.reasons:
                    break
                self._condition.wait(_CHECK_SECONDS)
            if self.reasons:
                raise WorkersFailed(tuple(self.reasons))

    def _order(self, order: Order) -> None:
        for member in self._members:
            with contextlib.suppress(OSError):  # a worker that is gone is noticed by its listener
                member.pipe.send(order)

    def _stop(self, *, at_once: bool) -> None:
        with self._condition:
            self._stopping = True
        started = [member for member in self._members if member.process.pid is not None]
        if not at_once:
            self._order(Quit())
        for member in started:
            if at_once:
                member.process.terminate()
        for member in started:
            _end(member.process)
            if member.listener:
                member.listener.join(_QUIT_SECONDS)
            member.pipe.close()


def _hired(assignment: Assignment) -> _Member:
    """A new worker process; call it with Ctrl-C blocked."""
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    name = f"walletmigrate-rehearse-{assignment.number}"
    process = context.Process(target=work, args=(assignment, theirs), name=name, daemon=True)
    process.start()
    theirs.close()  # so that the worker's end of the pipe ends with the worker
    return _Member(assignment, process, mine)


def _has_begun(member: _Member) -> bool:
    """Whether it has posted something of the leg."""
    return member.beat is not None and member.beat.done > member.before


def _end(process: SpawnProcess) -> None:
    process.join(_QUIT_SECONDS)
    for end in (process.terminate, process.kill):
        if process.is_alive():
            end()
            process.join(_QUIT_SECONDS)


@contextlib.contextmanager
def _interrupt_blocked() -> Iterator[None]:
    """Start processes with Ctrl-C blocked, until they are ready to ignore it; ours is delivered afterwards."""
    resource_tracker.ensure_running()  # it would unblock the signal if it were started in between
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
