"""What a job does about an error that may pass: it tries again soon, and waits for a database that is away.

An outage lasts as long as it lasts, and no count of tries is a measure of it: while the server does not answer, nothing
is counted. Counted is what fails although the server answers: a batch that ends its own session each time must not be
tried for ever.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeVar

from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

from walletmigrate import connect
from walletmigrate.errors import DatabaseUnreachable, Retryable
from walletmigrate.job_rows import retryable, said

ATTEMPTS: Final = 8
"""How often is tried what meets a deadlock or a lock time limit, or loses its connection to a server that answers."""

REFUSALS: Final = 20
"""How often a server is asked that answers and lets nobody in, for a minute and a half in all: it may have too many
connections for now, or another password for good.
"""

TOLD_SECONDS: Final = 600.0
"""How often it is said that the database is still away."""

_FIRST_PAUSE: Final = 0.05
_LONGEST_PAUSE: Final = 2.0
_LONGEST_OUTAGE_PAUSE: Final = 10.0
_LOOK: Final = 0.25
_log = logging.getLogger("walletmigrate")

_T = TypeVar("_T")


def never() -> bool:
    """Wait for as long as it takes."""
    return False


@dataclass(frozen=True)
class Patience:
    """How long ``who`` tries: until it succeeds, until ``over`` says that nobody waits for it, or too often in vain."""

    engine: Engine
    who: str
    over: Callable[[], bool] = never

    def persist(self, call: Callable[[], _T]) -> _T:
        """What ``call`` gives, which is tried again while that may help, and so has to be something that may be done
        twice. Raises as `outlast` and `again`.
        """
        tries = 0
        while True:
            try:
                return call()
            except DBAPIError as error:
                tries += 1
                self.outlast(error)
                self.again(error, tries)
                if _refused(error) and self.over():
                    raise self._given_up(connect.words(error, self.engine.url)) from error

    def outlast(self, error: DBAPIError) -> None:
        """After a lost connection: back when the database answers, however long that takes. Other errors do not wait.

        An outage is told once, then every `TOLD_SECONDS`; its end, too. Raises DatabaseUnreachable if it is ``over``
        before.
        """
        if not connect.lost(error):
            return
        began, told, pause = time.monotonic(), float("-inf"), _FIRST_PAUSE
        while (why := connect.away(self.engine)) is not None:
            now = time.monotonic()
            if now - told >= TOLD_SECONDS:
                told = now
                _log.warning("%s waits for the database, for %.0f s so far: %s", self.who, now - began, why)
            pause = min(2 * pause, _LONGEST_OUTAGE_PAUSE)
            self._rest(random.uniform(0.5, 1) * pause)
            if self.over():
                raise self._given_up(why) from error
        if told > float("-inf"):
            _log.warning("%s goes on after %.0f s without the database", self.who, time.monotonic() - began)

    def again(self, error: DBAPIError, tries: int) -> None:
        """Wait a little before the next try, after so many. Raises Retryable when it would be one too many, and the
        error itself when it is none that passes.
        """
        if not retryable(error):
            raise error
        refused = _refused(error)
        if tries >= (REFUSALS if refused else ATTEMPTS):
            why = connect.words(error, self.engine.url) if refused else said(error)
            raise Retryable(f"{self.who} failed {tries} times, last by: {why}") from error
        longest = _LONGEST_OUTAGE_PAUSE if refused else _LONGEST_PAUSE
        time.sleep(random.uniform(0.5, 1) * min(_FIRST_PAUSE * 2**tries, longest))

    def _rest(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0 and not self.over():
            time.sleep(min(left, _LOOK))

    def _given_up(self, why: str) -> DatabaseUnreachable:
        detail = f"{why}; {self.who} was stopped, and the same command goes on with it"
        return DatabaseUnreachable(connect.masked(self.engine.url), detail)


def _refused(error: DBAPIError) -> bool:
    """Whether a connection could not be made. The driver tells no SQLSTATE then."""
    return connect.lost(error) and not connect.sqlstate(error) and not error.connection_invalidated
