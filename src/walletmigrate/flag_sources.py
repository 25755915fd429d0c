"""Where flag documents come from: what all sources share, and the file.

A source keeps the last good document in force whatever happens to the file or the server, and says in
``problem`` what is wrong. A document that lacks one of the three flags is not a good one.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

from walletmigrate import forks
from walletmigrate.errors import (
    FlagDocumentInvalid,
    FlagsMissing,
    FlagSourceUnreachable,
)
from walletmigrate.flags import (
    NO_DOCUMENT,
    OFF,
    Decision,
    Document,
    FlagNotice,
    FlagSource,
    Report,
    Snapshot,
    Traits,
    log_notice,
    read_document,
    tell,
)

Clock: TypeAlias = Callable[[], float]
Failure: TypeAlias = FlagSourceUnreachable | FlagsMissing | FlagDocumentInvalid

# Time stamps of files are as coarse as 2 s on some file systems: until a file is older than that, one that is
# written again may look unchanged, so it is read again.
SETTLED_NANOSECONDS: Final = 2_000_000_000

NOTHING_GOOD: Final = "This process has seen no good document, so all flags are off."


@dataclass(frozen=True, slots=True)
class DocumentSnapshot:
    """A document (None: everything is off) and when its source last confirmed it."""

    document: Document | None
    source: str
    confirmed: float
    clock: Clock

    def decide(self, identifier: str, traits: Traits) -> Decision:
        """What the document wants of account ``identifier``."""
        return OFF if self.document is None else self.document.decide(identifier, traits)

    @property
    def document_id(self) -> str:
        """The document's id, or `NO_DOCUMENT`."""
        return NO_DOCUMENT if self.document is None else self.document.id

    @property
    def needs_traits(self) -> bool:
        """Whether a trait can change a decision."""
        return self.document is not None and self.document.needs_traits

    def age_seconds(self) -> float:
        """Seconds since the source confirmed the document; if it never did, since the source was made."""
        return max(0.0, self.clock() - self.confirmed)


class DocumentSource:
    """What file and server share: the document in force, and what is wrong. ``name`` is for people."""

    def __init__(self, name: str, report: Report | None, clock: Clock) -> None:
        self.name: Final = name
        self.failure: Failure | None = None
        self._report = report or log_notice
        self._clock = clock
        self._hook_problems: dict[str, str] = {}
        self._lock = threading.Lock()
        self._current = DocumentSnapshot(None, name, clock(), clock)
        forks.watch(self)

    @property
    def problem(self) -> str | None:
        """What is wrong at the moment, as sentences; None if nothing is."""
        said = [str(self.failure)] if self.failure else []
        if self.failure and self._current.document is None:
            said.append(NOTHING_GOOD)
        return " ".join(said + list(self._hook_problems.values())) or None

    def snapshot(self) -> Snapshot:
        """The flags in force."""
        raise NotImplementedError

    def refresh(self) -> Snapshot:
        """Look for a new document now, in this thread, and return the flags in force then."""
        raise NotImplementedError

    def after_fork(self) -> None:
        """Called in a forked child: a lock that another thread held at the fork is never released there."""
        self._lock = threading.Lock()

    def _take(self, body: bytes, *, confirm: bool = True) -> bool:
        """Put a document in force if it is good. Returns whether it was."""
        try:
            content = read_document(body, self.name)
            standing = self._current.document
            if standing is not None and standing.says(content):
                document = standing  # keeps what it remembers of decisions, and was tried already
            else:
                document = Document(content, self.name, self._report)
        except (FlagDocumentInvalid, FlagsMissing) as error:
            self._fail(error)
            return False
        confirmed = self._clock() if confirm else self._current.confirmed
        self._current = DocumentSnapshot(document, self.name, confirmed, self._clock)
        return True

    def _confirm(self) -> None:
        self._current = DocumentSnapshot(self._current.document, self.name, self._clock(), self._clock)

    def _fail(self, failure: Failure) -> None:
        before, self.failure = self.failure, failure
        if str(before) != str(failure):  # once per fault: an outage would otherwise fill the log
            tell(self._report, FlagNotice("source_problem", self.name, self._current.document_id, str(failure)))


def check(source: FlagSource) -> None:
    """Look once, now, and raise what is wrong.

    Raises `FlagsMissing`, `FlagDocumentInvalid` or `FlagSourceUnreachable`.
    """
    if isinstance(source, DocumentSource):
        source.refresh()
        if source.failure is not None:
            raise source.failure


class FileSource(DocumentSource):
    """A document in a file, looked at again when flags are asked for, at most every ``check_seconds``.

    A file that is broken or gone leaves the last good document in force; with none, as in a process that starts then,
    everything is off. Not kept in the database, unlike a server's: two hosts' files would stand in for each other.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        check_seconds: float = 1.0,
        *,
        report: Report | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        super().__init__(f"file {os.fspath(path)}", report, clock)
        self.path: Final = Path(path)
        self._check_seconds = check_seconds
        self._signature: tuple[int, ...] | None = None
        self._due = 0.0
        self.refresh()

    def snapshot(self) -> Snapshot:
        """The flags in force. Only one thread looks at the file; the others take what stands."""
        if self._clock() >= self._due and self._lock.acquire(blocking=False):
            try:
                self._look()
            finally:
                self._lock.release()
        return self._current

    def refresh(self) -> Snapshot:
        """Read the file now, changed or not."""
        with self._lock:
            self._signature = None
            self._look()
        return self._current

    def _look(self) -> None:
        self._due = self._clock() + self._check_seconds
        try:
            with self.path.open("rb") as file:
                # Before the content, so that a change in between is seen at the next look.
                found = os.fstat(file.fileno())
                signature = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
                body = None if signature == self._signature else file.read()
        except OSError as error:
            self._signature = None
            self._fail(FlagSourceUnreachable(self.name, error.strerror or type(error).__name__))
            return
        if body is not None:
            settled = time.time_ns() - found.st_mtime_ns > SETTLED_NANOSECONDS
            self._signature = signature if settled else None
            if self._take(body):
                self.failure = None
        elif self.failure is None:
            self._confirm()
