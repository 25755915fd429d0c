"""Who has to know that the process was forked: what has a thread or a lock of its own."""

from __future__ import annotations

import os
import weakref
from typing import Final, Protocol


class Forked(Protocol):
    """Something that begins anew in a forked child, where no thread of the parent lives."""

    def after_fork(self) -> None:
        """Called in the child, before anything else runs there."""


_watched: Final[weakref.WeakSet[Forked]] = weakref.WeakSet()
_registered = False


def watch(one: Forked) -> None:
    """Tell ``one`` of every fork for as long as it lives."""
    global _registered  # noqa: PLW0603 - registered with the first: it cannot be taken back
    if not _registered and hasattr(os, "register_at_fork"):
        _registered = True
        os.register_at_fork(after_in_child=_in_child)
    _watched.add(one)


def _in_child() -> None:
    for one in list(_watched):
        one.after_fork()
