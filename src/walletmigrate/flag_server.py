"""Flags from a Flagsmith server, polled in the background so that no caller ever waits for it."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
import weakref
from collections.abc import Callable

from walletmigrate.errors import ConfigError, FlagSourceUnreachable
from walletmigrate.flag_http import NoAnswer, call, server_name
from walletmigrate.flag_sources import Clock, DocumentSource
from walletmigrate.flags import FlagNotice, Json, Report, Snapshot, tell


class FlagsmithSource(DocumentSource):
    """A Flagsmith server, polled by a thread of this process that starts at the first `snapshot`.

    ``api_url`` ends in ``/api/v1/``; ``environment_key`` is a server-side key (``ser.…``) and appears nowhere
    else. ``timeout_seconds`` bounds each wait for the server, and the body as a whole. ``fallback`` returns
    the last good document of an earlier time, or None, and is asked (in the thread) while no document is in
    force; ``remember`` is given each new good document. What the two raise is swallowed, and shown in
    ``problem``. Raises `ConfigError`.

    The flags of a process that just started are off until its first document is there: call `wait` at start.
    Flagsmith's own polling is not used: it can show flags that no document had, and it dies at a fork.
    """

    def __init__(
        self,
        api_url: str,
        environment_key: str,
        poll_seconds: float = 10.0,
        timeout_seconds: float = 5.0,
        *,
        fallback: Callable[[], Json | None] | None = None,
        remember: Callable[[Json], None] | None = None,
        report: Report | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        super().__init__(server_name(api_url), report, clock)
        if not environment_key:
            raise ConfigError("no environment key for Flagsmith", fix="set WALLETMIGRATE_FLAGSMITH_KEY")
        self._url = api_url.rstrip("/") + "/environment-document/"
        self._key = environment_key
        self._poll_seconds = poll_seconds
        self._timeout = timeout_seconds
        self._fallback = fallback
        self._remember = remember
        self._remembered: str | None = None
        self._starting = threading.Lock()
        self._ready = threading.Event()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._pid: int | None = None  # the process whose thread polls

    def snapshot(self) -> Snapshot:
        """The flags in force, at once, whatever the server does."""
        if self._pid != os.getpid():
            self._start()
        return self._current

    def wait(self, seconds: float) -> bool:
        """Wait until a document is in force, at most ``seconds``. Returns whether one is."""
        self.snapshot()
        return self._ready.wait(seconds)

    def refresh(self) -> Snapshot:
        """Ask the server now, in this thread; waits at most the time-out, twice if a poll is under way."""
        with self._lock:
            if self._current.document is None:
                self._ask_fallback()
            self._poll()
        return self._current

    def close(self, wait_seconds: float = 1.0) -> None:
        """End the polling for good; the flags in force stay. Waits no longer for a poll under way."""
        self._stop.set()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(wait_seconds)

    def after_fork(self) -> None:
        """Threads do not survive a fork: the child starts its own at its first `snapshot`."""
        super().after_fork()
        closed, ready = self._stop.is_set(), self._ready.is_set()
        self._starting, self._ready, self._stop = threading.Lock(), threading.Event(), threading.Event()
        if closed:
            self._stop.set()
        if ready:
            self._ready.set()
        self._thread = self._pid = None

    def _start(self) -> None:
        with self._starting:
            if self._pid == os.getpid():
                return
            if not self._stop.is_set():
                thread = threading.Thread(
                    target=_poll_until,
                    args=(weakref.ref(self), self._stop, self._poll_seconds),
                    name="walletmigrate-flags",
                    daemon=True,
                )
                # At the interpreter's end no thread can start any more; flags stay as they are then.
                with contextlib.suppress(RuntimeError):
                    thread.start()
                    self._thread = thread
            self._pid = os.getpid()

    def _poll(self) -> None:
        try:
            body = _fetch(self._url, self._key, self._timeout)
        except NoAnswer as error:
            self._fail(FlagSourceUnreachable(self.name, str(error)))
            return
        if self._take(body):
            self.failure = None
            self._hook_problems.pop("fallback", None)
            self._ready.set()
            self._store()

    def _ask_fallback(self) -> None:
        if self._fallback is None:
            return
        try:
            content = self._fallback()
            body = None if content is None else json.dumps(content).encode()
        except Exception as error:  # noqa: BLE001 - a hook's fault must not end the polling
            self._hook_problem("fallback", "The last good document cannot be fetched", error)
            return
        self._hook_problems.pop("fallback", None)
        if body is not None and self._take(body, confirm=False):
            self._remembered = self._current.document_id
            self._ready.set()

    def _store(self) -> None:
        document = self._current.document
        if self._remember is None or document is None or document.id == self._remembered:
            return
        try:
            self._remember(document.content)
        except Exception as error:  # noqa: BLE001 - as above; tried again at the next poll
            self._hook_problem("remember", "The document cannot be stored", error)
            return
        self._remembered = document.id
        self._hook_problems.pop("remember", None)

    def _hook_problem(self, hook: str, what: str, error: Exception) -> None:
        # The type alone: what a database's error says may name hosts and users.
        said = f"{what} ({type(error).__name__})."
        if self._hook_problems.get(hook) != said:
            self._hook_problems[hook] = said
            tell(self._report, FlagNotice("source_problem", self.name, self._current.document_id, said))


def _poll_until(source: weakref.ref[FlagsmithSource], stop: threading.Event, pause: float) -> None:
    # Holds the source only while it polls, so that one nobody closed can still be collected.
    while not stop.is_set():
        polled = source()
        if polled is None:
            return
        polled.refresh()
        del polled
        stop.wait(pause)


def _fetch(url: str, key: str, timeout: float) -> bytes:
    # Unconditional: the server's updated-at header lags the document by a minute.
    status, body = call("GET", url, {"X-Environment-Key": key}, timeout)
    if status != 200:
        raise NoAnswer(_refusal(status))
    return body


def _refusal(status: int) -> str:
    if status in (401, 403):
        return f"the server refused the environment key ({status}); it must be a server-side key (ser.…)"
    if status == 404:
        return "the server knows no environment document there (404); check that api_url ends in /api/v1/"
    if 300 <= status < 400:
        return f"the server redirects ({status}), which is not followed; put its own address in api_url"
    return f"the server answered {status}"
