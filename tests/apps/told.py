"""The example shop with one more route, by which a test tells events to the observers of a worker, and learns to which."""

from __future__ import annotations

import os
from typing import Any

from after import app, heartbeat, observers
from flask import request

from walletmigrate import observe

heartbeat.close()  # each beat would tell another age of the flags


@app.post("/tell")
def tell() -> Any:
    """Tell [event, its fields] so many times."""
    for name, fields, times in request.get_json()["events"]:
        event = getattr(observe, name)(**fields)
        for _ in range(times):
            observe.Observers(observers).tell(event)
    return {"worker": os.getpid()}
