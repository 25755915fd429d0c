"""One run of one command: its options, settings, connection, actor and reason, and how it ends."""

from __future__ import annotations

import getpass
import os
import re
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from types import FrameType
from typing import Any, Final

import typer
from sqlalchemy import Engine

from walletmigrate import connect, console, job_workers
from walletmigrate.audit import Act
from walletmigrate.census import Cohort
from walletmigrate.config import Mapping, Settings
from walletmigrate.configfile import ENVIRONMENT_PREFIX
from walletmigrate.console import Answer
from walletmigrate.errors import ConfigError, PreconditionRefused, UnknownMapping, UsageError
from walletmigrate.flag_editor import FlagEditor
from walletmigrate.flag_server import FlagsmithSource
from walletmigrate.flags import FlagSource
from walletmigrate.movements import TEXT_LIMIT
from walletmigrate.observe import correlation_id
from walletmigrate.sources import editor_of, source_of
from walletmigrate.standing import confirmation, refreshed

KEYS: Final = "WALLETMIGRATE_FLAGSMITH_KEY and WALLETMIGRATE_FLAGSMITH_ADMIN_KEY"
CORRELATION_ID: Final = f"{ENVIRONMENT_PREFIX}CORRELATION_ID"
NO_URL: Final = "set WALLETMIGRATE_DATABASE_URL, or pass --database-url"


class Run:
    """What a command works with. Made by `command`; closed when the command ends."""

    def __init__(
        self,
        command: str,
        *,
        config: Path | None,
        database_url: str | None,
        as_json: bool,
        dry_run: bool = False,
        actor: str | None = None,
        reason: str | None = None,
        confirm: str | None = None,
        changes: bool = False,
        mapping: str | None = None,
    ) -> None:
        self.command: Final = command
        self.changes: Final = changes
        self.mapping: Final = mapping
        """The mapping that was named, if one was."""
        self.as_json: Final = as_json
        self.dry_run: Final = dry_run
        self._config = config
        self._url = database_url
        self._actor = actor
        self._reason = reason
        self._confirm = confirm
        self.address = "(no database)"
        """The database last connected to, its password masked."""
        self._stack = ExitStack()
        self._stopped = threading.Event()
        self.left: tuple[str, ...] = ()
        """The mappings that the operator's stop left untouched."""

    @property
    def config_path(self) -> Path:
        """The file of the configuration, whether it exists or not."""
        return self._config or Path(os.environ.get(f"{ENVIRONMENT_PREFIX}CONFIG") or "walletmigrate.toml")

    @cached_property
    def settings(self) -> Settings:
        """The configuration. Raises ConfigError."""
        return Settings.load(self._config, database_url=self._url)

    @property
    def url(self) -> str:
        """The database's URL, without a configuration being read. Raises ConfigError."""
        found = self._url or os.environ.get(f"{ENVIRONMENT_PREFIX}DATABASE_URL")
        if not found:
            raise ConfigError("no database URL is set", fix=NO_URL)
        return found

    @property
    def url_given(self) -> str | None:
        """The database's URL if somebody named one."""
        return self._url or os.environ.get(f"{ENVIRONMENT_PREFIX}DATABASE_URL") or None

    @property
    def url_option(self) -> str | None:
        """The database's URL if it was named on the command line, whatever the environment says."""
        return self._url

    @property
    def configured(self) -> bool:
        """Whether there is a configuration: somebody named one, or the file is where it is looked for."""
        return self._config is not None or f"{ENVIRONMENT_PREFIX}CONFIG" in os.environ or self.config_path.exists()

    @cached_property
    def engine(self) -> Engine:
        """The configured database. Raises ConfigError without a URL, DatabaseUnreachable when it is away."""
        url = self.settings.database_url
        if url is None:
            raise ConfigError("no database URL is set", fix=NO_URL)
        return self.connected(url.get_secret_value())

    def connected(self, url: str) -> Engine:
        """An engine that has answered, disposed at the end. Raises ConfigError or DatabaseUnreachable."""
        made = connect.engine(url, application_name=f"walletmigrate {self.command}")
        self._stack.callback(made.dispose)
        self.address = connect.masked(made.url)
        connect.reachable(made)
        return made

    @cached_property
    def source(self) -> FlagSource:
        """The configured flag source, having looked just now. Raises ConfigError."""
        # Without the database as memory: an operator wants to see what the server says, not what it once said.
        made = source_of(self.settings.model_copy(update={"database_url": None}))
        if isinstance(made, FlagsmithSource):
            self._stack.callback(made.close)
        return refreshed(made)

    @cached_property
    def editor(self) -> FlagEditor | None:
        """The flags to switch; None where they come from a server and its admin key is not set."""
        return editor_of(self.settings)

    def editable_flags(self, flag: str, what: str) -> FlagEditor:
        """The flags to switch. Raises PreconditionRefused, with the manual steps, where it must be done by hand."""
        if self.editor is None:
            raise PreconditionRefused(self.command, [server_steps(self.settings, flag, what)])
        return self.editor

    def act(self, default_reason: str | None = None) -> Act:
        """Who does this and why, under one correlation id. Raises UsageError without a reason; a dry run needs none."""
        reason = (self._reason or "").strip() or default_reason or ("dry run" if self.dry_run else "")
        if not reason:
            raise UsageError("say why: add --reason '…' (it goes into the audit log)")
        return Act(self.actor, reason, self.correlation_id)

    @property
    def actor(self) -> str:
        """Who does this: as the option says, the environment, or the login."""
        return (self._actor or os.environ.get(f"{ENVIRONMENT_PREFIX}ACTOR") or "").strip() or _user()

    @cached_property
    def correlation_id(self) -> str:
        """One for all that a command does, so that `walletmigrate trace` finds it together. A script gives it in the
        environment; else one is made. Raises UsageError for what is too long to be one, or no text.
        """
        from structlog.contextvars import bound_contextvars  # not above: a command that only looks needs none

        made = _given_id() or correlation_id()
        self._stack.enter_context(bound_contextvars(correlation_id=made))  # for what is written under another act
        return made

    def mappings(self, name: str | None) -> tuple[Mapping, ...]:
        """The mapping of that name, or all of them. Raises UsageError."""
        try:
            return self.settings.mappings if name is None else (self.settings.mapping(name),)
        except UnknownMapping as error:
            raise UsageError(str(error)) from None

    def confirmed(self, *mappings: str) -> None:
        """Make sure that the operator named the mappings (default: all). Raises UsageError; a dry run asks nothing."""
        if self.dry_run:
            return
        wanted = confirmation(self.settings, *mappings)
        given = self._confirm
        if given is None:
            if not (sys.stdin.isatty() and sys.stderr.isatty()):
                raise UsageError(f"{self.command} wants a confirmation: add --confirm {wanted}")
            given = str(typer.prompt(f"{self.command}: type {wanted} to go on", err=True))
        if {one.strip() for one in given.split(",")} != set(wanted.split(",")):
            raise UsageError(f"--confirm must be {wanted}, and was {given!r}: nothing was changed")

    def stop(self) -> bool:
        """Whether the operator has asked to stop."""
        return self._stopped.is_set()

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Ctrl-C or SIGTERM ends the job after the batch at hand; a second Ctrl-C ends it in the midst."""

        def stop(number: int, frame: FrameType | None) -> None:
            if self._stopped.is_set():
                signal.default_int_handler(number, frame)
            self._stopped.set()
            console.say("stopping after this batch; once more to stop at once")

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def unwinding(self) -> Iterator[None]:
        """SIGTERM ends the command as Ctrl-C does: what it has seen goes on record, and no half a file stays."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    @contextmanager
    def hands(self, workers: int | None, dask: str | None) -> Iterator[dict[str, Any]]:
        """``workers`` and ``executor`` of a job, by ``--workers`` and ``--dask``. Raises UsageError if none is."""
        if dask is None or self.dry_run:
            yield {"workers": workers or 1, "executor": None}
            return
        with job_workers.dask(dask) as (executor, count):
            if not count:
                raise UsageError(f"the Dask cluster at {dask} has no worker: start one, such as dask worker {dask}")
            yield {"workers": workers or count, "executor": executor}

    def until_stopped(self, chosen: Sequence[Mapping]) -> Iterator[Mapping]:
        """One mapping after the other, until the operator stops; those that are not come to are `left`."""
        for done, one in enumerate(chosen, 1):
            yield one
            if self.stop():
                self.left = tuple(each.name for each in chosen[done:])
                return

    def states(self, results: Iterable[Any]) -> list[str]:
        """How the jobs of a command ended; those of mappings that a stop left untouched count as paused."""
        return [str(one.state) for one in results] + ["paused" for _ in self.left]

    def close(self) -> None:
        """Give back what the run opened."""
        self._stack.close()


def wait_for_the_end(run: Run, answer: Answer) -> None:
    """Show an answer now, then wait for Ctrl-C or SIGTERM: the way in which a service ends in order."""
    ended = threading.Event()
    before = {one: signal.signal(one, lambda *_: ended.set()) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        console.show(run.command, answer, as_json=run.as_json)
        ended.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def cohort(value: str | None) -> Cohort | None:
    """A trait's name and value out of ``tenant=acme``. Raises UsageError."""
    if value is None:
        return None
    name, mark, wanted = value.partition("=")
    if not mark or not name or not wanted:
        raise UsageError(f"--cohort {value!r}: write a trait and its value, for example --cohort tenant=acme")
    return name, wanted


def server_steps(settings: Settings, flag: str, what: str) -> tuple[str, str]:
    """Why a flag is not switched here, and how to do it on the flag server by hand."""
    by_hand = f"in Flagsmith, open the environment, then the feature {flag}, and {what}"
    return (
        f"flags come from {settings.flags.api_url}, which is only read without an admin key",
        f"set {KEYS}, and run it again; or {by_hand}; then: walletmigrate flags list",
    )


def _given_id() -> str | None:
    given = os.environ.get(CORRELATION_ID, "").strip()
    if len(given) > TEXT_LIMIT or not given.isprintable():
        raise UsageError(f"{CORRELATION_ID} must be a text of one line, of at most {TEXT_LIMIT} characters")
    return given or None


def _user() -> str:
    try:
        return f"user:{getpass.getuser()}"
    except (KeyError, OSError):  # a container may run under an id that has no name
        return f"user:{os.getuid()}"


def period(said: str, option: str = "--since") -> timedelta:
    """A span of time as an option says it: ``90s``, ``30m``, ``12h``, ``7d``. Raises UsageError."""
    match = re.fullmatch(r"([1-9][0-9]{0,5})([smhd])", said)
    if match is None:
        raise UsageError(f"{option} {said!r}: write a number and s, m, h or d, for example 7d")
    return timedelta(**{{"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}[match[2]]: int(match[1])})
