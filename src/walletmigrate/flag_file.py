"""The flag file as something to edit: one edit at a time, written whole or not at all."""

from __future__ import annotations

import contextlib
import copy
import fcntl
import json
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from walletmigrate.errors import FlagDocumentInvalid, FlagsMissing, FlagSourceUnreachable, UsageError
from walletmigrate.flag_edits import (
    FlagState,
    Override,
    doubts,
    drop,
    set_account,
    set_everyone,
    set_percent,
    set_trait,
    state_of,
)
from walletmigrate.flags import ALL_FLAGS, Document, Json, read_document, unknown_flag


@dataclass(frozen=True, slots=True)
class Change:
    """What an edit did, or with ``dry_run`` would do; ``also`` names other flags that moved with it."""

    before: FlagState
    after: FlagState
    changed: bool
    also: tuple[str, ...] = ()


class FlagFile:
    """The flag document at ``path``. Edits are atomic, safe against each other, and do nothing when repeated.

    Raises `FlagSourceUnreachable` if the file cannot be read, `FlagDocumentInvalid` or `FlagsMissing` if it
    is no good document, `UsageError` for a request that makes no sense; then the file is as it was.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        # A link is followed once and for all: replacing the link itself would part it from its file.
        self.path: Final = Path(path).resolve()
        self.name: Final = f"file {os.fspath(path)}"

    def list(self) -> tuple[FlagState, ...]:
        """All three flags."""
        content = self._read()
        return tuple(state_of(content, flag) for flag in ALL_FLAGS)

    def validate(self) -> tuple[str, ...]:
        """What is wrong with the file, as sentences; empty if nothing is. Raises nothing."""
        try:
            content = self._read()
            Document(content, self.name)
        except (FlagSourceUnreachable, FlagDocumentInvalid, FlagsMissing) as error:
            return (str(error),)
        return tuple(doubts(content))

    def set(
        self,
        flag: str,
        enabled: bool,
        *,
        trait: tuple[str, str] | None = None,
        percent: int | None = None,
        percent_of: str | None = None,
        account: str | None = None,
        everyone: bool = False,
        dry_run: bool = False,
    ) -> Change:
        """Switch a flag for exactly one of: a trait (name, value), a percentage, an account, everyone.

        The percentage (1 to 100) is of accounts, or of the values of the trait ``percent_of``. All flags
        share one percentage: raising it keeps who is in, and takes the other flags along. Off for everyone
        also ends each override that is on; on for everyone keeps those that are off.
        """
        _check_flag(flag)
        if sum((trait is not None, percent is not None, account is not None, everyone)) != 1:
            raise UsageError("name exactly one of: a trait, a percentage, an account, everyone")
        if percent_of is not None and percent is None:
            raise UsageError("a trait to take a percentage of needs the percentage")

        def edit(content: Json) -> None:
            if trait is not None:
                set_trait(content, flag, enabled, trait)
            elif percent is not None:
                set_percent(content, flag, enabled, percent, percent_of)
            elif account is not None:
                set_account(content, flag, enabled, account)
            else:
                set_everyone(content, flag, enabled)

        return self._edit(flag, edit, dry_run)

    def remove(
        self,
        flag: str,
        *,
        trait: tuple[str, str] | None = None,
        percent: bool = False,
        account: str | None = None,
        dry_run: bool = False,
    ) -> Change:
        """End the override of exactly one of: a trait, the percentage, an account; none is no error."""
        _check_flag(flag)
        if sum((trait is not None, percent, account is not None)) != 1:
            raise UsageError("name exactly one of: a trait, the percentage, an account")

        def ended(override: Override) -> bool:
            if trait is not None:
                return override.kind == "trait" and override.value == "=".join(trait)
            if account is not None:
                return override.kind == "account" and override.value == account
            return override.kind == "percent"

        return self._edit(flag, lambda content: drop(content, flag, ended), dry_run)

    def _edit(self, flag: str, edit: Callable[[Json], None], dry_run: bool) -> Change:
        with self._locked():
            content = self._read()
            edited = copy.deepcopy(content)
            edit(edited)
            before = {name: state_of(content, name) for name in ALL_FLAGS}
            after = {name: state_of(edited, name) for name in ALL_FLAGS}
            also = tuple(name for name in ALL_FLAGS if name != flag and before[name] != after[name])
            if edited == content:
                return Change(before[flag], after[flag], False)
            edited["updated_at"] = datetime.now(UTC).isoformat(timespec="seconds")
            Document(edited, self.name)  # what could not be evaluated must not be written
            if not dry_run:
                self._write(edited)
            return Change(before[flag], after[flag], True, also)

    def _read(self) -> Json:
        try:
            body = self.path.read_bytes()
        except OSError as error:
            raise FlagSourceUnreachable(self.name, _reason(error)) from None
        return read_document(body, self.name)

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
    place = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(place)
    finally:
        os.close(place)


def _check_flag(flag: str) -> None:
    if flag not in ALL_FLAGS:
        raise unknown_flag(flag, ALL_FLAGS)


def _reason(error: OSError | UnicodeError) -> str:
    said = error.strerror if isinstance(error, OSError) else None
    return said or type(error).__name__
