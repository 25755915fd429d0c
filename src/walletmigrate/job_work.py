"""A worker's loop: claim a batch, do it, note it, and what to do with one that failed."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Final

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError

from walletmigrate import connect, job_batches, job_claims, job_rows
from walletmigrate.config import Settings
from walletmigrate.errors import DatabaseUnreachable, JobFailed, LedgerNotInstalled, WalletMigrateError
from walletmigrate.job_batches import Claim
from walletmigrate.job_claims import AtRest, ClaimLost, NoClaim
from walletmigrate.job_outages import Patience, never
from walletmigrate.job_rows import Batch, Job, begin, leave, said
from walletmigrate.standing import INSTALL
from walletmigrate.throttle import Throttle

_OTHERS_AT_WORK: Final = 0.05
_HELD: Final = 0.25
_NO_FUNCTIONS: Final = ("42883", "42P01", "3F000", "WM010")
_NO_GRANT: Final = "42501"

Step = Callable[[Connection, str | None, str | None], Batch]
"""``step(connection, after, upto)``: the work on the keys k with after < k <= upto; None leaves an end open.

To be run by other processes it has to be picklable: a frozen dataclass with ``__call__``, or a function.
"""
Progress = Callable[[Job], None]
"""Told after each committed batch."""
Stop = Callable[[], bool]
"""Asked before each batch; True pauses the job."""


@dataclass(frozen=True)
class Work:
    """What a worker needs: ``steps``, one for each pass over the keys, and whom it asks and tells on the way.

    ``stop`` True pauses the job; ``rest`` True ends this worker alone; ``throttle`` makes all workers stand still.
    """

    engine: Engine
    settings: Settings
    steps: Sequence[Step]
    progress: Progress | None = None
    stop: Stop = never
    rest: Stop = never
    throttle: Throttle | None = None
    name: str = field(default_factory=lambda: f"{socket.gethostname()}:{os.getpid()}:{threading.get_ident() % 10_000}")

    def run(self, job: Job) -> tuple[Job, bool]:
        """Do batches until none is left; the job as it is then, and whether it has come to its end.

        Raises Retryable when a batch ran out of attempts, LedgerNotInstalled or JobFailed; the job is failed then.
        DatabaseUnreachable if it is to stop, or rest, before the end of an outage: the job stays as it is. Ctrl-C
        pauses it and goes on as KeyboardInterrupt.
        """
        tries = 0
        try:
            while not self.rest():
                if self.stop():
                    return self.pause(job), False
                found: Claim | NoClaim | None = None
                try:
                    self.ask(job)
                    found = self._claim(job)
                    if isinstance(found, NoClaim):
                        now = replace(found.job, resumed=job.resumed)
                        if found.ended or now.state != "running":
                            return now, found.ended
                        time.sleep(_OTHERS_AT_WORK if now.held is None and not found.paced else _HELD)
                        continue
                    job = replace(self._carry_out(found), resumed=job.resumed)
                    tries = 0
                except ClaimLost as error:
                    self._lose(found if isinstance(found, Claim) else None, error)
                    continue
                except Exception as error:  # noqa: BLE001 - each is sorted: try again, split, or stop
                    tries += 1
                    self._failed(job, found if isinstance(found, Claim) else None, error, tries)
                    continue
                if self.progress is not None:
                    self.progress(job)
        except DatabaseUnreachable:
            raise
        except BaseException as error:
            self.leave_somehow(job, error)
            raise
        return job, False

    def patience(self, job: Job) -> Patience:
        """With the database, for as long as somebody waits for this worker."""
        return Patience(self.engine, f"job {job.id} ({job.kind})", lambda: self.stop() or self.rest())

    def pause(self, job: Job) -> Job:
        """Take the job out of work, because its operator says so here."""
        return self.patience(job).persist(lambda: leave(self.engine, self.settings, job, "paused"))

    def ask(self, job: Job) -> None:
        """Ask the throttle, and write down what it says: no worker claims a batch while the job is held."""
        if self.throttle is not None:
            reason = self.throttle.reason()
            with begin(self.engine) as connection:
                job_rows.hold(connection, self.settings, job.id, reason)

    def _claim(self, job: Job) -> Claim | NoClaim:
        with begin(self.engine) as connection:
            return job_claims.claim(connection, self.settings, job.id, self.name, len(self.steps))

    def _carry_out(self, claimed: Claim) -> Job:
        try:
            time.sleep(claimed.delay)
            with begin(self.engine) as connection:
                began = time.monotonic()
                job_claims.hold(connection, self.settings, claimed)
                batch = self.steps[claimed.batch_pass - 1](connection, claimed.after, claimed.upto)
                seconds = time.monotonic() - began
                return job_claims.complete(connection, self.settings, claimed, batch, seconds)
        except BaseException as error:
            if not isinstance(error, Exception):
                self._give_back(claimed)
            raise

    def _lose(self, claimed: Claim | None, error: ClaimLost) -> None:
        if isinstance(error, AtRest) and claimed is not None:
            self._give_back(claimed)
        elif claimed is not None:
            with suppress(DBAPIError), begin(self.engine) as connection:
                job_claims.lose(connection, self.settings, claimed)

    def _failed(self, job: Job, claimed: Claim | None, error: Exception, tries: int) -> None:
        """Make the batch ready to be tried again, whole or in halves. Raises what ends the job."""
        if isinstance(error, DBAPIError) and job_rows.retryable(error):
            patience = self.patience(job)
            patience.outlast(error)
            if claimed is not None:
                self._give_back(claimed)
                tries = max(tries, claimed.attempts)
            patience.again(error, tries)
            return
        if claimed is None or isinstance(error, WalletMigrateError):
            if claimed is not None:
                self._give_back(claimed)
            raise typed(job, error) from error
        if isinstance(error, DBAPIError) and connect.sqlstate(error) in (*_NO_FUNCTIONS, _NO_GRANT):
            self._give_back(claimed)
            raise typed(job, error) from error
        why = None
        # Without a database the lease ends the claim, and the batch fails once more.
        with suppress(DBAPIError), begin(self.engine) as connection:
            why = job_batches.fail(connection, self.settings, claimed, said(error))
        if why is not None:
            raise JobFailed(job.id, job.kind, why) from error

    def _give_back(self, claimed: Claim) -> None:
        """Without a database the lease ends the claim."""
        with suppress(DBAPIError), begin(self.engine) as connection:
            job_claims.give_back(connection, self.settings, claimed)

    def leave_somehow(self, job: Job, error: BaseException) -> None:
        """Without a database the job stays ``running``; the next start resumes it all the same."""
        with suppress(DBAPIError):
            if not isinstance(error, Exception):
                leave(self.engine, self.settings, job, "paused")
            else:
                detail = error.detail if isinstance(error, JobFailed) else said(error)
                leave(self.engine, self.settings, job, "failed", detail)


def typed(job: Job, error: Exception) -> Exception:
    """What a worker raises for an error that no other try would mend."""
    if not isinstance(error, DBAPIError):
        return error
    if connect.sqlstate(error) in _NO_FUNCTIONS:
        return LedgerNotInstalled(job.mapping or "", said(error), INSTALL)
    return JobFailed(job.id, job.kind, said(error))
