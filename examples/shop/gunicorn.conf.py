"""How the shop is served: two workers, whose metrics are added up."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from prometheus_client import multiprocess

workers = 2
bind = "127.0.0.1:8000"


def on_starting(server: Any) -> None:
    """What the workers of a killed server left counts no longer: nobody called `child_exit` for them.

    Not called at a reload. After USR2 the old server's workers still count in the folder, so it stays as it is. With
    `preload_app` the application is loaded by now, and what this process has written is every series at 0.
    """
    folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    own = f"_{os.getpid()}" if server.cfg.preload_app else None
    if folder and not server.master_pid:
        for file in Path(folder).glob("*.db"):
            if own is None or not file.stem.endswith(own):
                file.unlink()


def child_exit(server: Any, worker: Any) -> None:  # noqa: ARG001 - the names are gunicorn's
    """A worker that is gone no longer counts for the age of the flags."""
    multiprocess.mark_process_dead(worker.pid)
