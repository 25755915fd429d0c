"""Whether what stands around the ledger is well: flags, processes, clocks, replicas, the exporter."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, Final
from urllib.parse import urlsplit

from sqlalchemy import Connection, Engine, Row, text
from sqlalchemy.exc import DBAPIError

from walletmigrate import connect, flag_http
from walletmigrate.checkup import AROUND, RELEASES, Finding
from walletmigrate.config import Settings
from walletmigrate.errors import (
    ConfigError,
    DatabaseUnreachable,
    FlagDocumentInvalid,
    FlagsMissing,
    FlagSourceUnreachable,
    UsageError,
)
from walletmigrate.flag_doubts import doubtful
from walletmigrate.flag_sources import DocumentSnapshot, check
from walletmigrate.flags import FlagSource
from walletmigrate.heartbeat import LIVE_SECONDS
from walletmigrate.schema import quoted
from walletmigrate.standing import database_time, reached, show
from walletmigrate.throttle import BEHIND, replica_engines

CLOCK_SECONDS: Final = 5.0
"""How far two clocks may be apart."""

LAG_SECONDS: Final = 30.0
"""How far a replica may be behind, unless the configuration says otherwise."""

FLAGS_SECONDS: Final = 300.0
"""As the alert has it: how old the flags of a process may be."""

FLAGS: Final = "runbooks/flags-stale.md"
EXPORTER: Final = "runbooks/exporter-down.md"
_EXPORTER_SECONDS: Final = 5.0
"""Added to what a statement of its look may take."""
_PHASE: Final = re.compile(r'^walletmigrate_phase\{phase="(\w+)"\} 1(?:\.0)?$', re.MULTILINE)
_UP: Final = re.compile(r"^walletmigrate_exporter_up (\S+)$", re.MULTILINE)


def flags(source: FlagSource) -> Iterator[Finding]:
    """The source answers, its document can be read and has all three flags, and says nothing twice."""
    try:
        check(source)
    except FlagsMissing as error:
        yield Finding(
            str(error), "make the flag in the source, off for everyone; then: walletmigrate flags list", FLAGS
        )
    except (FlagDocumentInvalid, FlagSourceUnreachable) as error:
        yield Finding(str(error), "mend the flag source; then: walletmigrate flags list", FLAGS)
    snapshot = source.snapshot()
    if isinstance(snapshot, DocumentSnapshot) and snapshot.document:
        for what, mend in doubtful(snapshot.document.content):
            yield Finding(what, mend, "runbooks/flag-disagreement.md")


def processes(connection: Connection, settings: Settings) -> Iterator[Finding]:
    """What the living processes say of themselves by their heartbeats."""
    rows = connection.execute(
        text(
            "select name, pid, version, document_id, document_age_seconds as age, problem, "
            "extract(epoch from seen_at - clock_timestamp())::float8 as ahead "
            f"from {quoted(settings.ledger_schema)}.processes "
            "where seen_at > clock_timestamp() - make_interval(secs => :live) order by name, pid, id"
        ),
        {"live": LIVE_SECONDS},
    ).all()
    yield from _apart(rows)
    for row in rows:
        who = _who(row)
        if row.ahead > CLOCK_SECONDS:
            what = f"the last heartbeat of {who} is {row.ahead:.0f} s in the future: the database's clock went back"
            mend = "set the clock of the database's machine by NTP; time columns of the ledger are in doubt since"
            yield Finding(what, mend, AROUND)
        if row.problem:
            yield Finding(
                f"{who} cannot read its flags: {row.problem}",
                "mend its flag source; then: walletmigrate flags check",
                FLAGS,
            )
        elif row.age > FLAGS_SECONDS:
            what = f"the flags of {who} were last confirmed {row.age:.0f} s ago"
            yield Finding(what, "see that it reaches its flag source, or restart it", FLAGS)


def elsewhere(connection: Connection, settings: Settings, source: FlagSource) -> Iterator[Finding]:
    """If no living process decides by the document of ``source``: who switches flags there switches them for nobody."""
    snapshot = source.snapshot()
    if not isinstance(snapshot, DocumentSnapshot) or snapshot.document is None:
        return
    living = text(
        f"select document_id, document_source from {quoted(settings.ledger_schema)}.processes "
        "where seen_at > clock_timestamp() - make_interval(secs => :live) and problem is null order by 2"
    )
    rows = connection.execute(living, {"live": LIVE_SECONDS}).all()
    if not rows or snapshot.document_id in {row.document_id for row in rows}:
        return
    theirs = ", ".join(dict.fromkeys(str(row.document_source) for row in rows))
    what = f"no process decides by the flags that this command reads from {snapshot.source}; theirs are of {theirs}"
    mend = "look again in half a minute, which a change may take; then give processes and commands one flag source"
    yield Finding(what, mend, "runbooks/flag-disagreement.md")


def unseen() -> Finding:
    """Where the exporter listens is not known here, so without an address it cannot be looked at."""
    what = "the exporter was not looked at: its address was not named"
    mend = "walletmigrate doctor --exporter http://127.0.0.1:9464  # or wherever it is; [exporter] url: for good"
    return Finding(what, mend, EXPORTER, "note")


def unheard(connection: Connection, settings: Settings) -> Iterator[Finding]:
    """From phase dual_write on, if no process has a heartbeat: its flags and its release are then not looked at. A
    note, not a problem: an application that has not started, or stands still as before a restore, has none either.
    """
    if not reached(show(connection, settings).phase, "dual_write"):
        return
    alive = text(
        f"select exists (select from {quoted(settings.ledger_schema)}.processes "
        "where seen_at > clock_timestamp() - make_interval(secs => :live))"
    )
    if not connection.scalar(alive, {"live": LIVE_SECONDS}):
        what = "no process has a heartbeat, so the flags and the releases of the application were not looked at"
        mend = "start a Heartbeat in each process; it is as it should be only while the application stands still"
        yield Finding(what, mend, RELEASES, "note")


def _apart(rows: Sequence[Row[Any]]) -> Iterator[Finding]:
    """Different documents, different releases. The many first: the few are who is to be looked at."""
    for column, what, mend, runbook in (
        (
            "document_id",
            "processes decide by different flag documents",
            "restart those that lag behind; see that all read the same source",
            "runbooks/flag-disagreement.md",
        ),
        ("version", "processes run different releases", "finish the deploy, or go back", RELEASES),
    ):
        groups: dict[str, list[str]] = defaultdict(list)
        for row in rows:
            groups[getattr(row, column)].append(_who(row))
        if len(groups) > 1:
            shown = sorted(groups.items(), key=lambda one: (-len(one[1]), one[0]))
            said = "; ".join(f"{name}: {', '.join(whos)}" for name, whos in shown)
            yield Finding(f"{what}: {said}", mend, runbook)


def _who(row: Row[Any]) -> str:
    return f"{row.name} (pid {row.pid})"


def clock(connection: Connection, now: Callable[[], float] = time.time) -> Iterator[Finding]:
    """The database's clock against this machine's; ``now`` gives seconds since 1970."""
    before = now()
    theirs = float(connection.scalar(text("select extract(epoch from clock_timestamp())")) or 0)
    after = now()
    # The database looked at its clock somewhere in between.
    apart = before - theirs if theirs < before else max(theirs - after, 0.0)
    if apart > CLOCK_SECONDS:
        which = "behind" if theirs < before else "ahead of"
        what = f"the database's clock is {apart:.0f} s {which} this machine's"
        yield Finding(what, "set both by NTP: windows and ages are counted by the database's clock", AROUND)


def replicas(connection: Connection, settings: Settings) -> Iterator[Finding]:
    """Replicas as the primary sees them, and those that the configuration names, asked directly."""
    limit = settings.throttle.replica_lag_seconds or LAG_SECONDS
    mend = "walletmigrate jobs list  # pause what writes most; see the replica's own log"
    if connection.scalar(text("select pg_is_in_recovery()")):
        what = "this database is a replica itself: nothing can be posted in it"
        yield Finding(what, "set WALLETMIGRATE_DATABASE_URL to the primary", AROUND)
        return
    rows = connection.execute(
        text(
            "select application_name as name, state, "
            "coalesce(extract(epoch from replay_lag), 0)::float8 as lag from pg_stat_replication order by 1, pid"
        )
    )
    for row in rows:
        if row.state is None:
            what = f"the lag of replica {row.name} is not shown to this role"
            yield Finding(what, "as a superuser: grant pg_monitor to it", AROUND)
        elif row.state not in ("streaming", "backup"):
            yield Finding(f"replica {row.name} does not stream: its state is {row.state}", mend, AROUND)
        elif row.lag > limit:
            yield Finding(f"replica {row.name} is {row.lag:.0f} s behind, more than {limit:g} s", mend, AROUND)
    for engine in replica_engines(settings):
        yield from _replica(connect.masked(engine.url), engine, limit, mend)


def _replica(name: str, engine: Engine, limit: float, mend: str) -> Iterator[Finding]:
    try:
        connect.reachable(engine)
        with engine.connect() as connection:
            standby = connection.scalar(text("select pg_is_in_recovery()"))
            behind = connection.scalar(text(BEHIND)) if standby else None
            paused = standby and connection.scalar(text("select pg_is_wal_replay_paused()"))
    except (DatabaseUnreachable, DBAPIError) as error:
        detail = error.detail if isinstance(error, DatabaseUnreachable) else type(error.orig).__name__
        yield Finding(f"replica {name} does not answer: {detail}", "start it, or take it out of the list", AROUND)
        return
    if not standby:
        yield Finding(f"{name} is configured as a replica, and is none", "correct WALLETMIGRATE_REPLICA_URLS", AROUND)
        return
    if paused:
        what = f"replica {name} was told to pause its replay"
        yield Finding(what, "on it, as a superuser: select pg_wal_replay_resume()", AROUND)
    if behind is not None and behind > limit:
        yield Finding(f"replica {name} is {behind:.0f} s behind, more than {limit:g} s", mend, AROUND)


def exporter(connection: Connection, settings: Settings, url: str) -> Iterator[Finding]:
    """The exporter at ``url`` answers, reaches its database, and serves this one. Raises UsageError for no address."""
    address = _metrics(url)
    parts = urlsplit(address)
    shown = f"{parts.netloc.rpartition('@')[2]}{parts.path}"
    start = "walletmigrate exporter  # or restart it"
    seconds = _EXPORTER_SECONDS + settings.exporter.look_seconds
    try:
        status, body = flag_http.call("GET", address, {}, seconds)
    except flag_http.NoAnswer as error:
        yield Finding(f"the exporter at {shown} does not answer: {error}", start, EXPORTER)
        return
    said = body.decode("utf-8", "replace")
    up = _UP.search(said)
    if status != 200 or up is None:
        yield Finding(f"what answers at {shown} (status {status}) is no exporter of walletmigrate", start, EXPORTER)
    elif float(up[1]) != 1:
        yield Finding(f"the exporter at {shown} does not reach its database", start, EXPORTER)
    else:
        served, state = _PHASE.findall(said), show(connection, settings)
        # What it saw last it serves for a while; who has just gone back a phase must not be sent after the exporter.
        lately = timedelta(seconds=settings.exporter.hold_seconds + seconds)
        settled = state.since is None or database_time(connection) - state.since > lately
        if served != [state.phase] and settled:
            what = f"the exporter at {shown} serves phase {', '.join(served) or 'none'}, and the phase is {state.phase}"
            why = f"it looks at another database, or not every {settings.exporter.hold_seconds:g} s"
            yield Finding(f"{what}: {why}", start, EXPORTER)


def _metrics(url: str) -> str:
    try:
        flag_http.server_name(url)
    except ConfigError:
        raise UsageError(
            f"--exporter, or url in [exporter], is {url!r}: write an address such as http://127.0.0.1:9464"
        ) from None
    return url if urlsplit(url).path.strip("/") else f"{url.rstrip('/')}/metrics"
