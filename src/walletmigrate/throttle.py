"""Signals of the database, and of the user's own, that make a job stand still until they are well again.

Each signal has a limit in the table ``[throttle]`` of the configuration; one without a limit is not read. A signal that
cannot be read for `BLIND_SECONDS` counts as over its limit: who does not see does not drive.
"""

from __future__ import annotations

import pkgutil
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from sqlalchemy import Engine, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from walletmigrate import connect
from walletmigrate.config import Settings
from walletmigrate.functions import relation
from walletmigrate.job_rows import said, table

BLIND_SECONDS: Final = 15.0
LOOK_SECONDS: Final = 1.0
"""How often the signals are read at most."""

ANSWER_SECONDS: Final = 2.0
"""How long a signal may take; one that takes longer cannot be read for now."""

_REST_SECONDS: Final = 5
_HIDDEN: Final = "<insufficient privilege>"


class Unreadable(Exception):
    """A signal has no value that could be trusted."""


@dataclass(frozen=True)
class Signal:
    """Something to be read: a number, which is held against ``limit``, or why to stand still, or None."""

    name: str
    read: Callable[[], float | str | None]
    limit: float = 0.0


class Throttle:
    """Asked before each claim; reads the signals at most once in `LOOK_SECONDS`. ``clock`` gives seconds."""

    def __init__(self, signals: Sequence[Signal], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._signals = tuple(signals)
        self._clock = clock
        self._looked: float | None = None
        self._read_at = dict.fromkeys((one.name for one in self._signals), clock())
        self._reason: str | None = None
        self._asked: dict[str, Future[float | str | None]] = {}

    def reason(self) -> str | None:
        """Why the job has to stand still, None: it need not."""
        now = self._clock()
        if self._looked is None or now - self._looked >= LOOK_SECONDS:
            self._looked = now
            self._ask()
            # All of them: one that was not looked at because another one held the job would count as not readable.
            found = [self._judged(one) for one in self._signals]
            self._reason = next((why for why in found if why is not None), None)
        return self._reason

    def _ask(self) -> None:
        """Read all signals at once, each in a thread of its own: a network that swallows the question, or a user's
        function that never comes back, must not leave the workers without anybody who looks.
        """
        for one in self._signals:
            if one.name not in self._asked:
                self._asked[one.name] = _begun(one.read)
        wait(self._asked.values(), ANSWER_SECONDS)

    def _judged(self, signal: Signal) -> str | None:
        try:
            value = self._value(signal)
        except Exception as error:  # noqa: BLE001 - the user's callable may raise anything; blind is blind
            blind = self._clock() - self._read_at[signal.name]
            if blind < BLIND_SECONDS:
                return None
            return f"{signal.name} cannot be read for {blind:.0f} s: {_words(error)}"
        self._read_at[signal.name] = self._clock()
        if value is None or isinstance(value, str):
            return value if value is None else f"{signal.name}: {value}"
        return f"{signal.name} {value:g} is over {signal.limit:g}" if value > signal.limit else None

    def _value(self, signal: Signal) -> float | str | None:
        """What it says. A question without an answer stands until there is one."""
        if not self._asked[signal.name].done():
            raise Unreadable(f"no answer within {ANSWER_SECONDS:g} s")
        return self._asked.pop(signal.name).result()


def _begun(read: Callable[[], float | str | None]) -> Future[float | str | None]:
    future: Future[float | str | None] = Future()

    def answer() -> None:
        try:
            future.set_result(read())
        except BaseException as error:  # noqa: BLE001 - raised where it is asked for
            future.set_exception(error)

    # A daemon: a process that is to end does not wait for it.
    threading.Thread(target=answer, name="walletmigrate throttle", daemon=True).start()
    return future


def of_settings(engine: Engine, settings: Settings, job_id: int, mapping_name: str | None) -> Throttle | None:
    """The throttle that the configuration asks for, None where it sets no limit.

    A job without a mapping touches no legacy table: who waits for one's locks does not wait for it.
    """
    signals = tuple(_configured(engine, settings, job_id, mapping_name))
    return Throttle(signals) if signals else None


def replica_engines(settings: Settings) -> list[Engine]:
    """The replicas that the configuration names, to be asked directly."""
    urls = settings.replica_urls.get_secret_value() if settings.replica_urls else ""
    return [connect.engine(url, application_name="walletmigrate throttle", poolclass=NullPool) for url in urls.split()]


def _configured(engine: Engine, settings: Settings, job_id: int, mapping_name: str | None) -> Iterator[Signal]:
    limits = settings.throttle
    if limits.replica_lag_seconds is not None:
        replicas = replica_engines(settings)
        read = partial(_replicas, replicas) if replicas else partial(_replay_lag, engine)
        yield Signal("replica lag in seconds", read, limits.replica_lag_seconds)
    if limits.lock_waits is not None and mapping_name is not None:
        values: dict[str, Any] = {"table": relation(settings.mapping(mapping_name))}
        yield Signal("sessions waiting for locks", partial(_query, engine, _WAITS, values), limits.lock_waits)
    if limits.active_sessions is not None:
        values = {"hidden": _HIDDEN}
        yield Signal("active sessions", partial(_query, engine, _ACTIVE, values), limits.active_sessions)
    if limits.wal_bytes_per_second is not None:
        yield Signal("WAL bytes per second", _Rate(partial(_query, engine, _WAL, {})), limits.wal_bytes_per_second)
    if limits.batch_seconds is not None:
        query = _LATENCY.format(table=table(settings))
        values = {"id": job_id, "rest": _REST_SECONDS}
        yield Signal("seconds of the last batch", partial(_query, engine, query, values), limits.batch_seconds)
    if limits.check is not None:
        yield Signal(limits.check, partial(_asked, limits.check))


# Who takes a backup stands in the view as well. A state of null means that this role is not shown it.
_LAG: Final = (
    "select count(*) as replicas, coalesce(bool_or(state is null), false) as hidden, "
    "coalesce(extract(epoch from max(replay_lag)), 0)::float8 as lag "
    "from pg_stat_replication where state is distinct from 'backup'"
)
# All that was received is replayed; but who does not receive at all may be behind by all the time since.
BEHIND: Final = (
    "select case when not pg_is_in_recovery() or (pg_last_wal_receive_lsn() = pg_last_wal_replay_lsn() "
    "and exists (select from pg_stat_wal_receiver)) then 0 else extract(epoch from clock_timestamp() - "
    "coalesce(pg_last_xact_replay_timestamp(), pg_postmaster_start_time())) end::float8"
)
# Who waits for a row waits for a transaction; that it is one of this table's the locks that it has tell.
_WAITS: Final = (
    "select count(distinct w.pid) from pg_locks as w where not w.granted and exists (select from pg_locks as h "
    "where h.pid = w.pid and h.relation = cast(:table as regclass) "
    "and h.database = (select oid from pg_database where datname = current_database()))"
)
_ACTIVE: Final = (
    "select case when bool_or(query = :hidden) then null else count(*) filter (where state = 'active') end "
    "from pg_stat_activity where pid <> pg_backend_pid() and datname = current_database()"
)
_WAL: Final = "select pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')::float8"
_LATENCY: Final = (
    "select coalesce(max(last_batch_seconds), 0) from {table} "
    "where id = :id and updated_at > clock_timestamp() - make_interval(secs => :rest)"
)


_HIDDEN_HERE: Final = "the database does not show it to this role: grant it pg_monitor"


def _query(engine: Engine, query: str, values: dict[str, Any]) -> float:
    with engine.connect() as connection:
        found = connection.scalar(text(query), values)
    if found is None:
        raise Unreadable(_HIDDEN_HERE)
    return float(found)


def _replay_lag(engine: Engine) -> float:
    """As the primary sees it. A replica that is cut off is not in its view at all."""
    with engine.connect() as connection:
        found = connection.execute(text(_LAG)).one()
    if found.hidden:
        raise Unreadable(_HIDDEN_HERE)
    if not found.replicas:
        raise Unreadable("no replica streams from this server; name replicas in WALLETMIGRATE_REPLICA_URLS to ask them")
    return float(found.lag)


def _replicas(replicas: Sequence[Engine]) -> float:
    return max(_query(one, BEHIND, {}) for one in replicas)


class _Rate:
    """How fast a counter grows, in units a second, from one look to the next."""

    def __init__(self, read: Callable[[], float]) -> None:
        self._read = read
        self._last: tuple[float, float] | None = None

    def __call__(self) -> float:
        now, value = time.monotonic(), self._read()
        before, self._last = self._last, (now, value)
        if before is None or now <= before[0]:
            return 0.0
        return (value - before[1]) / (now - before[0])


def _asked(name: str) -> str | None:
    answer = pkgutil.resolve_name(name.removeprefix("python:"))()
    if answer is True:
        return None
    return answer if isinstance(answer, str) else f"it answers {answer!r}"


def _words(error: Exception) -> str:
    if isinstance(error, DBAPIError | Unreadable):
        return said(error)
    return re.sub(r"//[^/@\s]*@", "//***@", said(error))
