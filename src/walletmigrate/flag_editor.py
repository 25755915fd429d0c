"""Flags as something to edit: what the file and the server have in common, so that a flip is the same in both."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from walletmigrate.errors import (
    FlagChangeIncomplete,
    FlagDocumentInvalid,
    FlagServerRefused,
    FlagsMissing,
    FlagSourceUnreachable,
    UsageError,
    WalletMigrateError,
)
from walletmigrate.flag_doubts import doubts
from walletmigrate.flag_edits import (
    FlagState,
    Override,
    drop,
    named_segment,
    set_account,
    set_everyone,
    set_percent,
    set_segment,
    set_trait,
    state_of,
)
from walletmigrate.flags import ALL_FLAGS, Document, Json, unknown_flag

Edit: TypeAlias = Callable[[Json], None]

FLAG_PROBLEMS: Final[tuple[type[WalletMigrateError], ...]] = (
    FlagSourceUnreachable,
    FlagDocumentInvalid,
    FlagsMissing,
    FlagServerRefused,
    FlagChangeIncomplete,
    UsageError,
)
"""What can keep a flag from being switched."""


@dataclass(frozen=True, slots=True)
class Change:
    """What an edit did, or with ``dry_run`` would do; ``also`` names other flags that moved with it.

    ``documents`` are the whole document before and after, for who wants to know whom it concerns.
    """

    before: FlagState
    after: FlagState
    changed: bool
    also: tuple[str, ...] = ()
    documents: tuple[Json, Json] = field(default=({}, {}), repr=False, compare=False)


class FlagEditor(ABC):
    """The flags of one source, to be looked at and switched. Edits do nothing when repeated.

    All methods raise `FlagSourceUnreachable`, `FlagDocumentInvalid`, `FlagsMissing` or `FlagServerRefused` if the
    source cannot be read or written, and `UsageError` for a request that makes no sense; then everything is as it
    was. `FlagChangeIncomplete` alone says that something was done, and what.
    """

    name: str
    """The source, for people; holds no secret."""

    @abstractmethod
    def read(self) -> Json:
        """The document as it stands now."""

    @abstractmethod
    def apply(self, edit: Edit, *, dry_run: bool) -> tuple[Json, Json]:
        """Carry out an edit; the document before and after. A dry run writes nothing."""

    def document(self) -> Document:
        """What stands now, to be asked for decisions. It reports nothing."""
        return Document(self.read(), self.name, lambda _: None)

    def list(self) -> tuple[FlagState, ...]:
        """All three flags."""
        content = self.read()
        return tuple(state_of(content, flag) for flag in ALL_FLAGS)

    def validate(self) -> tuple[str, ...]:
        """What is wrong with the flags, as sentences; empty if nothing is. Raises nothing."""
        try:
            content = self.read()
            Document(content, self.name)
        except FLAG_PROBLEMS as error:
            return (str(error),)
        return tuple(doubts(content))

    def set(
        self,
        flag: str,
        enabled: bool,
        *,
        trait: tuple[str, str] | None = None,
        segment: str | None = None,
        percent: int | None = None,
        percent_of: str | None = None,
        account: str | None = None,
        everyone: bool = False,
        dry_run: bool = False,
    ) -> Change:
        """Switch a flag for exactly one of: a trait (name, value), a segment, a percentage, an account, everyone.

        The percentage (1 to 100) is of accounts, or of the values of the trait ``percent_of``. All flags
        share one percentage: raising it keeps who is in, and takes the other flags along. Off for everyone
        also ends each override that is on; on for everyone keeps those that are off.
        """
        _check_flag(flag)
        _one_of(trait=trait, segment=segment, percent=percent, account=account, everyone=everyone or None)
        if percent_of is not None and percent is None:
            raise UsageError("a trait to take a percentage of needs the percentage")

        def edit(content: Json) -> None:
            if trait is not None:
                set_trait(content, flag, enabled, trait)
            elif segment is not None:
                set_segment(content, flag, enabled, segment)
            elif percent is not None:
                set_percent(content, flag, enabled, percent, percent_of)
            elif account is not None:
                set_account(content, flag, enabled, account)
            else:
                set_everyone(content, flag, enabled)

        return self._change(flag, edit, dry_run)

    def remove(
        self,
        flag: str,
        *,
        trait: tuple[str, str] | None = None,
        segment: str | None = None,
        percent: bool = False,
        account: str | None = None,
        dry_run: bool = False,
    ) -> Change:
        """End the override of exactly one of: a trait, a segment, the percentage, an account; none is no error."""
        _check_flag(flag)
        _one_of(trait=trait, segment=segment, percent=percent or None, account=account)

        def ended(override: Override) -> bool:
            if trait is not None:
                return override.kind == "trait" and override.value == "=".join(trait)
            if segment is not None:
                return override.segment == segment
            if account is not None:
                return override.kind == "account" and override.value == account
            return override.kind == "percent"

        def edit(content: Json) -> None:
            if segment is not None:
                named_segment(content, segment)
            drop(content, flag, ended)

        return self._change(flag, edit, dry_run)

    def _change(self, flag: str, edit: Edit, dry_run: bool) -> Change:
        content, edited = self.apply(edit, dry_run=dry_run)
        before = {name: state_of(content, name) for name in ALL_FLAGS}
        after = {name: state_of(edited, name) for name in ALL_FLAGS}
        also = tuple(name for name in ALL_FLAGS if name != flag and before[name] != after[name])
        return Change(before[flag], after[flag], edited != content, also, (content, edited))


def _check_flag(flag: str) -> None:
    if flag not in ALL_FLAGS:
        raise unknown_flag(flag, ALL_FLAGS)


def _one_of(**who: object) -> None:
    if sum(one is not None for one in who.values()) != 1:
        names = {"trait": "a trait (--cohort tenant=acme)", "segment": "a segment (--cohort beta)"}
        names |= {"percent": "a percentage (--percent 5)", "account": "an account (--account 42)"}
        names |= {"everyone": "everyone (--everyone)"}
        raise UsageError("name exactly one of: " + ", ".join(names[name] for name in who))
