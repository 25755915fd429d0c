"""Flags that arrive late: each process of a rehearsal decides by a new document after a delay of its own."""

from __future__ import annotations

import threading
import time
from collections import deque

from walletmigrate.flags import FlagSource, Snapshot


class LateSource:
    """What another source says, ``delay`` seconds after it says so. What stands at the start counts at once.

    A process's heartbeat asks too, from a thread of its own.
    """

    def __init__(self, source: FlagSource, delay: float) -> None:
        self._source = source
        self._delay = delay
        self._current = self._newest = source.snapshot()
        self._lock = threading.Lock()
        self._coming: deque[tuple[float, Snapshot]] = deque()

    def snapshot(self) -> Snapshot:
        """The flags that have arrived."""
        with self._lock:
            now, seen = time.monotonic(), self._source.snapshot()
            if seen.document_id != self._newest.document_id:
                self._newest = seen
                self._coming.append((now + self._delay, seen))
            while self._coming and self._coming[0][0] <= now:
                self._current = self._coming.popleft()[1]
            return self._current
