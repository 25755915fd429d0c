"""Several workers on one job: processes of this machine, a Dask cluster, or any `concurrent.futures` executor.

What travels to a worker is the job's number, the settings, the steps and the database's URL, pickled. A worker works
for a few seconds at a time and comes back: so one that is lost costs no more than its batch, which the next claim
takes up, and whoever is left goes on.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, CancelledError, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from typing import Any, Final

from pydantic import SecretStr
from sqlalchemy.exc import DBAPIError

from walletmigrate import connect, job_rows, observe
from walletmigrate.config import Settings
from walletmigrate.errors import DatabaseUnreachable, JobFailed, UsageError, WalletMigrateError
from walletmigrate.job_outages import Patience
from walletmigrate.job_rows import Job, begin
from walletmigrate.job_work import Step, Work, typed

SLICE_SECONDS: Final = 5.0
"""How long a worker works before it comes back for more."""

LOSSES: Final = 20
"""How many workers may be lost one after the other, and no account done meanwhile, before the job is failed: then it is
the machines, or the work kills its process.
"""

UNREACHED: Final = 3
"""How often each worker may come back without having reached the database, while this process does reach it."""

_LOOK: Final = 0.25


@dataclass(frozen=True)
class Assignment:
    """What a worker gets. Its text never shows the URL's password. What it puts on record has that correlation id."""

    settings: Settings
    url: SecretStr
    job_id: int
    steps: tuple[Step, ...]
    seconds: float = SLICE_SECONDS
    correlation_id: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What a worker brings back: the job as it left it, whether that has come to its end, or why it stopped."""

    job: Job | None
    ended: bool
    error: WalletMigrateError | None = None


def work(assignment: Assignment) -> Outcome:
    """Do batches for a while; runs in the worker."""
    from structlog.contextvars import bound_contextvars  # not above: a command without workers needs none

    if assignment.correlation_id is None:
        return _worked(assignment)
    with bound_contextvars(correlation_id=assignment.correlation_id):
        return _worked(assignment)


def _worked(assignment: Assignment) -> Outcome:
    # One connection for the batch, one for a step that has transactions of its own in it.
    engine = connect.engine(assignment.url, application_name="walletmigrate worker", pool_size=2, max_overflow=0)
    end = time.monotonic() + assignment.seconds

    def rest() -> bool:
        return time.monotonic() > end

    def found() -> Job:
        with begin(engine) as connection:
            return job_rows.get(connection, assignment.settings, assignment.job_id)

    try:
        job = Patience(engine, f"a worker of job {assignment.job_id}", rest).persist(found)
        return Outcome(*Work(engine, assignment.settings, assignment.steps, rest=rest).run(job))
    except WalletMigrateError as error:
        return Outcome(None, False, error)
    finally:
        engine.dispose()


class Crew:
    """``count`` workers of an executor on one job; ``executor`` None makes processes of this machine."""

    def __init__(self, main: Work, count: int, executor: Executor | None) -> None:
        self._main = main
        self._count = count
        self._given = executor
        self._pool = executor or _processes(count)
        self._losses = self._unreached = 0
        self._done = 0

    def run(self, job: Job) -> tuple[Job, bool]:
        """As `Work.run`: until the job ends, stops, or a worker says why it cannot go on."""
        try:
            return self._run(job)
        except BaseException as error:
            # The workers see it before their next batch, and end.
            self._main.leave_somehow(job, error)
            raise
        finally:
            if self._given is None:
                self._pool.shutdown(wait=True, cancel_futures=True)

    def _run(self, job: Job) -> tuple[Job, bool]:
        url = SecretStr(self._main.engine.url.render_as_string(hide_password=False))
        under = observe.correlation_id()
        steps = tuple(self._main.steps)
        task = partial(work, Assignment(self._main.settings, url, job.id, steps, correlation_id=under))
        running: set[Future[Outcome]] = set()
        ended, told = False, -1
        job = self._look(job)
        while True:
            if self._main.progress is not None and job.items_done + job.items_failed != told:
                told = job.items_done + job.items_failed
                self._main.progress(job)
            if job.state == "running" and not ended and self._main.stop():
                job = self._main.pause(job)
            while job.state == "running" and not ended and len(running) < self._count:
                running.add(self._submit(task))
            if not running:
                return job, ended
            done, running = wait(running, timeout=_LOOK, return_when=FIRST_COMPLETED)
            # Before losses are counted: what the lost ones did has to be seen, or too many seem lost in a row.
            job = self._look(job)
            outcomes = [self._outcome(job, one) for one in self._counted(done)]
            if self._given is None and any(one is None for one in outcomes):
                # A process that dies takes its pool along.
                self._pool.shutdown(wait=True, cancel_futures=True)
                self._pool, running = _processes(self._count), set()
            for outcome in outcomes:
                if outcome is not None:
                    self._judge(outcome)
                    ended = ended or outcome.ended

    def _submit(self, task: Callable[[], Outcome]) -> Future[Outcome]:
        """A pool may be found broken only here, when a process has died since it was last looked at: a loss as any."""
        try:
            return self._pool.submit(task)
        except BrokenProcessPool as error:
            lost: Future[Outcome] = Future()
            lost.set_exception(error)
            return lost

    def _counted(self, done: set[Future[Outcome]]) -> list[Future[Outcome]]:
        """Of the workers that went down with their pool only one, as they are one loss: one process died."""
        broken = [one for one in done if not one.cancelled() and isinstance(one.exception(), BrokenProcessPool)]
        return [one for one in done if one not in broken[1:]]

    def _look(self, job: Job) -> Job:
        """Ask the throttle, and look how far the job is. A database that is away is waited for, as in the workers."""

        def look() -> Job:
            self._main.ask(job)
            with begin(self._main.engine) as connection:
                return replace(job_rows.get(connection, self._main.settings, job.id), resumed=job.resumed)

        try:
            return self._main.patience(job).persist(look)
        except DBAPIError as error:
            raise typed(job, error) from error

    def _judge(self, outcome: Outcome) -> None:
        """Raises what the worker stopped for, unless it has only been away from the database as everybody was."""
        reached = not isinstance(outcome.error, DatabaseUnreachable)
        self._unreached = 0 if reached else self._unreached + 1
        if outcome.error is not None and (reached or self._unreached > UNREACHED * self._count):
            raise outcome.error

    def _outcome(self, job: Job, future: Future[Outcome]) -> Outcome | None:
        """None for a worker that was lost. Raises JobFailed for one that could not be given its work."""
        try:
            return future.result()
        except Exception as error:  # noqa: BLE001 - each executor has errors of its own
            lost = isinstance(error, BrokenProcessPool | CancelledError) or type(error).__module__.startswith(
                "distributed"
            )
            done = job.items_done + job.items_failed
            self._losses, self._done = 1 if done > self._done else self._losses + 1, done
            if lost and self._losses <= LOSSES:
                return None
            what = f"{self._losses} workers were lost, the last by" if lost else "a worker could not do its work:"
            raise JobFailed(job.id, job.kind, f"{what} {type(error).__name__}") from None


@contextmanager
def dask(address: str) -> Iterator[tuple[Executor, int]]:
    """The executor of a Dask cluster (``tcp://host:port``) and how many workers it has. Raises UsageError."""
    try:
        distributed: Any = import_module("distributed")
    except ImportError:
        raise UsageError("--dask needs the extra: pip install 'walletmigrate[dask]'") from None
    try:
        client = distributed.Client(address, timeout=10)
    except (OSError, ValueError, TimeoutError) as error:
        raise UsageError(f"no Dask scheduler answers at {address}: {type(error).__name__}") from None
    with client:
        yield client.get_executor(pure=False), len(client.scheduler_info(n_workers=-1)["workers"])


def _processes(count: int) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(count, mp_context=context, initializer=_prepare)


def _prepare() -> None:
    """A worker process leaves Ctrl-C to the one that made it, and does not outlive it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
