"""Loggers with a structlog chain of their own, whatever chain the application has configured.

structlog is loaded by who asks for such a logger, and not with this module.
"""

from __future__ import annotations

import logging
from typing import Any, Literal, TextIO


def stdlib_logger() -> logging.Logger:
    """The library's logger, which the application may configure."""
    return logging.getLogger("walletmigrate")


def default_logger() -> Any:
    """A structlog logger whose chain is its own.

    An unconfigured ``structlog.get_logger()`` prints to stdout, where it would corrupt ``--json``, and
    configuring structlog globally would overrule the application. Chain, wrapper and target are therefore
    all passed here; the target is the standard library's logger, which without handlers writes warnings to
    stderr.
    """
    import structlog

    return structlog.wrap_logger(
        stdlib_logger(),
        processors=[structlog.stdlib.filter_by_level, *_chain(structlog.processors.JSONRenderer(default=str))],
        wrapper_class=structlog.stdlib.BoundLogger,
        context_class=dict,
        cache_logger_on_first_use=True,
    )


def stream_logger(stream: TextIO, *, form: Literal["json", "console"]) -> Any:
    """A structlog logger that writes every event as one line to ``stream``: as JSON, or for people."""
    import structlog

    render: Any = structlog.processors.JSONRenderer(default=str)
    if form == "console":
        render = structlog.dev.ConsoleRenderer(colors=stream.isatty())
    logger = structlog.PrintLogger(stream)
    return structlog.wrap_logger(logger, processors=_chain(render), wrapper_class=structlog.BoundLogger)


def _chain(render: Any) -> list[Any]:
    import structlog

    return [structlog.processors.add_log_level, structlog.processors.TimeStamper(fmt="iso", utc=True), render]
