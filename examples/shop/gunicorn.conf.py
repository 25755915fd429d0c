"""How the shop is served: two workers, whose metrics are added up."""

from __future__ import annotations

from typing import Any

from prometheus_client import multiprocess

workers = 2
bind = "127.0.0.1:8000"


def child_exit(server: Any, worker: Any) -> None:  # noqa: ARG001 - the names are gunicorn's
    """A worker that is gone no longer counts for the age of the flags."""
    multiprocess.mark_process_dead(worker.pid)
