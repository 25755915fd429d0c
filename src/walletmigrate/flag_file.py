"""The flag file as something to edit: one edit at a time, written whole or not at all."""

from __future__ import annotations

import contextlib
import copy
import fcntl
import json
import os
import stat
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from walletmigrate.errors import FlagSourceUnreachable, UsageError
from walletmigrate.flag_editor import Edit, FlagEditor
from walletmigrate.flags import Document, Json, read_document


class FlagFile(FlagEditor):
    """The flag document at ``path``. Edits are atomic, safe against each other, and do nothing when repeated.

    Raises `FlagSourceUnreachable` if the file cannot be read, `FlagDocumentInvalid` or `FlagsMissing` if it
    is no good document, `UsageError` for a request that makes no sense; then the file is as it was.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        # A link is followed once and for all: replacing the link itself would part it from its file.
        self.path: Final = Path(path).resolve()
        self.name = f"file {os.fspath(path)}"

    def read(self) -> Json:
        """The file's document."""
        try:
            body = self.path.read_bytes()
        except OSError as error:
            raise FlagSourceUnreachable(self.name, _reason(error)) from None
        return read_document(body, self.name)

    def apply(self, edit: Edit, *, dry_run: bool) -> tuple[Json, Json]:
        """Edit the file: wholly, or not at all."""
        with self._locked():
            content = self.read()
            Document(content, self.name)  # where that cannot be evaluated, nobody knows what an edit would change
            edited = copy.deepcopy(content)
            edit(edited)
            if edited != content:
                edited["updated_at"] = datetime.now(UTC).isoformat(timespec="seconds")
                Document(edited, self.name)  # what could not be evaluated must not be written
                if not dry_run:
                    self._write(edited)
            return content, edited

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        # The directory, not the file: every edit replaces the file, and a lock would stay with the old one.
        try:
            place = os.open(self.path.parent, os.O_RDONLY)
        except OSError as error:
            raise FlagSourceUnreachable(self.name, _reason(error)) from None
        try:
            fcntl.flock(place, fcntl.LOCK_EX)
            yield
        finally:
            os.close(place)

    def _write(self, content: Json) -> None:
        try:
            body = (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
            _replace(self.path, body)
        except (OSError, UnicodeError) as error:
            raise UsageError(f"{self.name} cannot be written: {_reason(error)}") from None


def _replace(path: Path, body: bytes) -> None:
    """Put ``body`` in the place of a file: after a crash at any point it is the old file or the new one."""
    found = path.stat()
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(descriptor, "wb") as file:
            with contextlib.suppress(PermissionError):  # only root may give a file away
                os.fchown(descriptor, found.st_uid, found.st_gid)
            os.fchmod(descriptor, stat.S_IMODE(found.st_mode))
            file.write(body)
            file.flush()
            os.fsync(descriptor)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
    # The new one is in force by now. Some file systems cannot write a folder out, and that is no failure to switch.
    with contextlib.suppress(OSError):
        place = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(place)
        finally:
            os.close(place)


def _reason(error: OSError | UnicodeError) -> str:
    said = error.strerror if isinstance(error, OSError) else None
    return said or type(error).__name__
